import pytest
import torch
import torch.nn.functional as F
from shapes import PAPER, torchs_layer

from openvision3.model.reconstruction import LatentDecoder, LatentDecoderConfig, add_noise
from openvision3.model.transformer import rope_positions, sincos_positions


def make(channels=4, patch=2, **changes) -> LatentDecoder:
    torch.manual_seed(0)
    network = LatentDecoder(LatentDecoderConfig(size="tiny", **changes), 48, channels, patch)
    network.init_weights()
    return network


def tokens(rows=3, count=6) -> torch.Tensor:
    return torch.randn(rows, count, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PAPER)
def test_every_size_of_the_papers_table_has_its_shapes(name):
    width, depth, mlp, heads = PAPER[name]
    with torch.device("meta"):
        network = LatentDecoder(LatentDecoderConfig(size=name), 768, 16, 2)
    shapes = {key: tuple(value.shape) for key, value in network.named_parameters()}
    assert shapes["embed.weight"] == (width, 768)
    assert shapes["linear.weight"] == (64, width)  # 4C values a token
    assert len(network.blocks) == depth
    assert shapes[f"blocks.{depth - 1}.mlp.fc_out.weight"] == (width, mlp)
    assert network.blocks[0].attention.heads == heads


def test_each_token_gives_its_own_square_of_latents():
    network = make()
    seen = []
    network.linear.register_forward_hook(lambda module, inputs, output: seen.append(output))
    latents = network(tokens(), (2, 3))
    assert latents.shape == (3, 4, 4, 6)
    for row in range(2):
        for column in range(3):
            square = latents[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(square.flatten(1), seen[0][:, row * 3 + column])


@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_latents_are_those_of_torchs_layers_on_the_same_weights(gelu):
    torch.manual_seed(0)
    network = LatentDecoder(LatentDecoderConfig(size="tiny", gelu=gelu), 48, 4, 2)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    x = tokens() @ network.embed.weight.T + network.embed.bias + sincos_positions(2, 3, 64)
    for block in network.blocks:
        x = torchs_layer(block, gelu)(x)
    x = F.layer_norm(x, (64,), network.norm.weight, network.norm.bias, 1e-6) @ network.linear.weight.T + network.linear.bias
    latents_hat = network(tokens(), (2, 3))
    torch.testing.assert_close(F.pixel_unshuffle(latents_hat, 2).flatten(2).transpose(1, 2), x, rtol=1e-3, atol=1e-3)


def test_rows_and_columns_of_the_grid_are_not_mixed_up():
    network = make()
    assert network(tokens(), (2, 3)).shape == (3, 4, 4, 6)
    tall, wide = network(tokens(), (3, 2)), network(tokens(), (2, 3))
    assert (F.pixel_unshuffle(tall, 2).flatten(2) - F.pixel_unshuffle(wide, 2).flatten(2)).abs().max() > 1e-3  # positions differ too


def test_with_rope_latents_depend_on_the_distances_of_tokens_alone():
    network = make(positions="rope", qk_norm=True)
    elsewhere = rope_positions(5, 6, 32)[:, 1:].view(2, 5, 6, 16)[:, 2:4, 3:6].reshape(2, 6, 16)  # the same grid, further down and right
    x = network.embed(tokens())
    for block in network.blocks:
        x = block(x, rotation=elsewhere)
    x = network.linear(network.norm(x))
    torch.testing.assert_close(F.pixel_unshuffle(network(tokens(), (2, 3)), 2).flatten(2).transpose(1, 2), x, rtol=1e-4, atol=1e-5)
    same = tokens()[:, :1].expand(-1, 6, -1)  # equal tokens: nothing says where they are
    equal, table = network(same, (2, 3)), make()(same, (2, 3))
    torch.testing.assert_close(equal[:, :, :2, :2], equal[:, :, 2:, 4:], rtol=1e-4, atol=1e-5)
    assert (table[:, :, :2, :2] - table[:, :, 2:, 4:]).abs().max() > 1e-2


def test_init_weights_reaches_every_parameter():
    network = make(qk_norm=True)
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    network.init_weights()
    assert not any(p.isnan().any() for p in network.parameters())


def test_noise_of_a_row_depends_on_its_key_alone():
    u, keys = tokens(4), torch.tensor([7, 2**62 + 5, 9, 7])
    noise = add_noise(u, 0.8, keys) - u
    order = [2, 0, 1]
    torch.testing.assert_close(add_noise(u[order], 0.8, keys[order]) - u[order], noise[order])
    alone = add_noise(u[1:2], 0.8, keys[1:2]) - u[1:2]
    torch.testing.assert_close(alone, noise[1:2])
    torch.testing.assert_close(noise[0], noise[3])
    assert (noise[0] - noise[2]).abs().max() > 1e-2


def test_noise_leaves_torchs_own_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    add_noise(tokens(), 0.8, torch.arange(3))
    assert torch.equal(torch.rand(3), expected)


def test_noise_strength_is_uniform_up_to_tau():
    zeros, tau = torch.zeros(2000, 16, 16), 0.8
    noise = add_noise(zeros, tau, torch.arange(2000))
    sigma = noise.flatten(1).std(1) / tau  # 256 draws a row: within about 4 % of the strength
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert abs(sigma.quantile(quantile).item() - quantile) < 0.05
    unit = noise / noise.flatten(1).std(1)[:, None, None]
    assert abs(unit.mean().item()) < 0.01 and abs(unit.pow(4).mean().item() - 3) < 0.1  # normal: kurtosis 3


def test_tau_zero_is_no_noise():
    u = tokens()
    assert torch.equal(add_noise(u, 0.0, torch.arange(3)), u)


def test_noise_passes_the_gradient_whole():
    u = tokens().requires_grad_()
    add_noise(u, 0.8, torch.arange(3)).sum().backward()
    assert torch.equal(u.grad, torch.ones_like(u))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: LatentDecoderConfig(size="b"), "unknown size 'b'"),
        (lambda: LatentDecoderConfig(positions="rotary"), "unknown positions 'rotary'.* Choose one of sincos, rope"),
        (lambda: make()(tokens(), (2, 2)), "6 tokens do not fill a grid of 2 x 2"),
        (lambda: make()(torch.zeros(1, 6, 32), (2, 3)), "tokens are 32 wide, but this latent decoder was built for 48"),
    ],
)
def test_what_is_wrong_gets_one_clear_line(call, words):
    with pytest.raises(ValueError, match=words):
        call()
