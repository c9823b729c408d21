"""Drawability begins at what mean and variance give, falls with structure, and does not depend on the scale of channels."""

import math

import pytest
import torch

from openvision3.evaluate.metrics.drawability import GAUSSIAN, FlowTraining, evaluate_drawability

SHORT = FlowTraining(width=32, depth=1, heads=2, steps=60, batch=32)


def independent(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 4, 6, generator=torch.Generator().manual_seed(seed))


def structured(count: int, seed: int) -> torch.Tensor:
    """All tokens and channels of an image are one number."""
    return torch.randn(count, 1, 1, generator=torch.Generator().manual_seed(seed)).expand(count, 4, 6).contiguous()


def test_the_loss_of_mean_and_variance_alone_is_the_integral_of_the_posterior_variance():
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    covariance, variance = 2 * t - 1, (1 - t) ** 2 + t**2
    assert (2 - covariance**2 / variance).mean().item() == pytest.approx(math.pi / 2, abs=1e-9) == GAUSSIAN


def test_independent_tokens_cannot_be_drawn_better_than_by_mean_and_variance():
    untrained = FlowTraining(width=32, depth=1, heads=2, steps=0)
    assert evaluate_drawability(independent(512, 0), independent(512, 1), training=untrained).value == pytest.approx(GAUSSIAN, rel=0.03)
    assert evaluate_drawability(independent(512, 0), independent(512, 1), training=SHORT).value > 0.97 * GAUSSIAN


def test_tokens_with_structure_are_easier_and_a_change_of_each_channels_scale_and_mean_is_not_seen():
    train, held_out = structured(512, 0), structured(64, 1)
    value = evaluate_drawability(train, held_out, training=SHORT).value
    assert value < 0.8 * GAUSSIAN
    scale, shift = torch.linspace(0.1, 30, 6), torch.linspace(-5, 5, 6)
    assert evaluate_drawability(train * scale + shift, held_out * scale + shift, training=SHORT).value == pytest.approx(value, rel=1e-2)


def test_a_seed_gives_one_number_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    values = [evaluate_drawability(independent(64, 0), independent(8, 1), seed, SHORT).value for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2] and torch.equal(state, torch.get_rng_state())


def test_tokens_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="equal shapes"):
        evaluate_drawability(independent(8, 0), independent(8, 1)[:, :2])
    with pytest.raises(ValueError, match="not finite"):
        evaluate_drawability(independent(8, 0) * math.nan, independent(8, 1))
