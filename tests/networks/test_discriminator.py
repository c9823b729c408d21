"""The two players of the adversarial stage, against their formulas and in what their gradients reach."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from openvision3.networks.discriminator import FeatureDiscriminator
from openvision3.networks.perceptual import load_efficientnet


@pytest.fixture
def discriminator() -> FeatureDiscriminator:
    torch.manual_seed(0)
    return FeatureDiscriminator()


def images(seed: int, rows: int = 3, side: int = 32) -> torch.Tensor:
    coarse = torch.rand(rows, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, size=(side, side), mode="bilinear")


def maps_written_out(discriminator: FeatureDiscriminator, pictures: torch.Tensor) -> list[torch.Tensor]:
    weights, outputs = dict(discriminator.named_parameters()), load_efficientnet().features(pictures)
    maps = []
    for stage in (1, 2, 4):
        x = outputs[stage]
        x = x / x.square().sum(1, keepdim=True).sqrt() * x.shape[1] ** 0.5
        for layer, padding in ((0, 0), (2, 1), (4, 0)):
            name = f"heads.stages.stage_{stage}.{layer}"
            x = F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)
            x = torch.where(x > 0, x, 0.2 * x) if layer < 4 else x
        maps.append(x)
    return maps


def test_both_losses_equal_their_formulas(discriminator):
    real, rebuilt = images(0), images(1)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(4)  # so that some scores lie beyond the hinge
    said_of_real, said_of_rebuilt = maps_written_out(discriminator, real), maps_written_out(discriminator, rebuilt)
    assert any((scores.abs() > 1).any() for scores in said_of_real) and any((scores.abs() < 1).any() for scores in said_of_real)
    hinge = sum((1 - a).clamp_min(0).mean() + (1 + b).clamp_min(0).mean() for a, b in zip(said_of_real, said_of_rebuilt, strict=True)) / 3
    adversarial = -sum(scores.mean() for scores in said_of_rebuilt) / 3
    losses = discriminator(real, rebuilt, torch.tensor(3))
    assert [loss.item() for loss in losses] == pytest.approx([hinge.item(), adversarial.item()], rel=1e-4)
    shares = [torch.stack(discriminator(a, b, torch.tensor(3))) for a, b in zip(real.split([1, 2]), rebuilt.split([1, 2]), strict=True)]
    torch.testing.assert_close(sum(shares), torch.stack(losses), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_each_loss_reaches_one_player_alone(discriminator):
    rebuilt = images(1).requires_grad_()
    heads = list(discriminator.parameters())
    with torch.no_grad():
        for parameter in heads:
            parameter.mul_(4)  # within the hinge, the gradients of the last biases cancel
    hinge, adversarial = discriminator(images(0), rebuilt, torch.tensor(3))
    assert torch.autograd.grad(hinge, rebuilt, retain_graph=True, allow_unused=True) == (None,)
    assert all(gradient is not None and gradient.any() for gradient in torch.autograd.grad(hinge, heads, retain_graph=True))
    assert torch.autograd.grad(adversarial, rebuilt, retain_graph=True)[0].any()
    assert all(gradient is None for gradient in torch.autograd.grad(adversarial, heads, allow_unused=True))


def test_without_images_every_head_has_a_gradient_of_zero(discriminator):
    loss = discriminator.idle()
    loss.backward()
    assert loss.item() == 0 and all(parameter.grad is not None and not parameter.grad.any() for parameter in discriminator.parameters())


def test_only_its_heads_are_parameters_and_they_learn_to_tell_blurred_images(discriminator):
    assert all(name.startswith("heads.") and parameter.requires_grad for name, parameter in discriminator.named_parameters())
    assert not list(discriminator.buffers())
    real = images(0, 8) + 0.3 * torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    blurred = F.avg_pool2d(real, 3, 1, 1)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = discriminator(real, blurred, torch.tensor(8))[0]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.8 and losses[-1] < 0.5
