import cmath
import math

import pytest
import torch
from shapes import torchs_layer

from openvision3.model.transformer import (
    PLAIN_TOKENS,
    Attention,
    Block,
    KeyValueCache,
    TransformerSize,
    blocks,
    init_weights,
    rope_positions,
    rotate,
    sincos_positions,
)

SIZE = TransformerSize(48, 2, 3, 80)


def random_block(gelu="exact") -> Block:
    torch.manual_seed(0)
    block = Block(SIZE, gelu)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_block_equals_torchs_encoder_layer_on_the_same_weights(gelu):
    ours = random_block(gelu)
    x = torch.randn(2, 7, 48)
    torch.testing.assert_close(ours(x), torchs_layer(ours, gelu)(x), rtol=1e-4, atol=1e-4)


def test_the_two_gelus_differ():
    x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(1))
    assert (random_block("exact")(x) - random_block("tanh")(x)).abs().max() > 1e-4


def test_a_masked_key_has_no_influence():
    block, x = random_block(), torch.randn(1, 6, 48, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    mask[..., 4:] = False
    changed = torch.cat([x[:, :4], x[:, 4:] + 10], 1)
    assert torch.equal(block(x, mask)[:, :4], block(changed, mask)[:, :4])
    assert not torch.equal(block(x)[:, :4], block(changed)[:, :4])


@pytest.mark.parametrize("count", [PLAIN_TOKENS - 1, PLAIN_TOKENS + 1])
def test_masked_attention_is_that_of_torch_whichever_way_it_is_computed(count):
    block, generator = random_block(), torch.Generator().manual_seed(1)
    x = torch.randn(1, count, 48, generator=generator)
    mask = torch.rand(count, count, generator=generator) < 0.5
    mask.fill_diagonal_(True)
    torch.testing.assert_close(block(x, mask), torchs_layer(block)(x, src_mask=~mask), rtol=1e-4, atol=1e-4)


def test_cached_attention_equals_causal_attention():
    torch.manual_seed(0)
    attention, x = Attention(48, 3), torch.randn(2, 6, 48)
    whole = attention(x, torch.ones(6, 6, dtype=torch.bool).tril())
    cache = KeyValueCache()
    steps = torch.cat([attention(x[:, i : i + 1], None, cache) for i in range(6)], 1)
    torch.testing.assert_close(steps, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("height, width, channels", [(3, 5, 16), (4, 2, 64)])
def test_positions_equal_the_formula_written_out(height, width, channels):
    table = sincos_positions(height, width, channels)
    quarter = channels // 4
    for y in range(height):
        for x in range(width):
            row = []
            for wave, coordinate in ((math.sin, x), (math.cos, x), (math.sin, y), (math.cos, y)):
                row += [wave(coordinate / 10000 ** (k / (quarter - 1))) for k in range(quarter)]
            torch.testing.assert_close(table[y * width + x], torch.tensor(row), rtol=0, atol=1e-6)
    assert len(table) == height * width


def test_a_larger_grid_keeps_the_positions_of_a_smaller_one():
    large = sincos_positions(6, 7, 32).view(6, 7, 32)
    assert torch.equal(large[:3, :4].reshape(12, 32), sincos_positions(3, 4, 32))


@pytest.mark.parametrize("channels", [4, 30])
def test_positions_refuse_a_width_that_has_no_quarter(channels):
    with pytest.raises(ValueError, match=f"not {channels}"):
        sincos_positions(2, 2, channels)


def test_rope_multiplies_complex_channels_by_their_angles():
    x = torch.randn(2, 3, 7, 16, generator=torch.Generator().manual_seed(1))
    turned = rotate(x, rope_positions(2, 3, 16))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])  # the class token
    for place in range(6):
        row, column = divmod(place, 3)
        angles = [column * 100 ** (-k / 4) for k in range(4)] + [row * 100 ** (-k / 4) for k in range(4)]
        seen = torch.complex(*x[:, :, 1 + place].chunk(2, -1)) * torch.tensor([cmath.exp(1j * angle) for angle in angles], dtype=torch.complex64)
        torch.testing.assert_close(turned[:, :, 1 + place], torch.cat([seen.real, seen.imag], -1), rtol=1e-5, atol=1e-5)


def test_rope_sees_the_distance_of_two_tokens_alone():
    generator = torch.Generator().manual_seed(1)
    q, k = (rotate(torch.randn(16, generator=generator).expand(1, 1, 31, 16), rope_positions(5, 6, 16))[0, 0, 1:].view(5, 6, 16) for _ in range(2))
    scores = torch.einsum("ijc,klc->ijkl", q, k)
    for down, right in ((0, 0), (1, 0), (0, 2), (2, -1)):
        same = torch.stack([scores[i, j, i + down, j + right] for i in range(3) for j in range(1, 4)])
        torch.testing.assert_close(same, same[:1].expand(9), rtol=1e-4, atol=1e-4)
    assert (scores[0, 0, 0, 2] - scores[0, 0, 2, 0]).abs() > 1e-2 and (scores[0, 0, 0, 2] - scores[0, 2, 0, 0]).abs() > 1e-2


def test_a_larger_grid_keeps_the_rotations_of_a_smaller_one():
    large = rope_positions(6, 7, 32)[:, 1:].view(2, 6, 7, 16)
    assert torch.equal(large[:, :3, :4].reshape(2, 12, 16), rope_positions(3, 4, 32)[:, 1:])


def test_normalised_queries_and_keys_make_attention_blind_to_their_scale():
    torch.manual_seed(0)
    plain, ours = Attention(48, 3), Attention(48, 3, qk_norm=True)
    x = torch.randn(2, 6, 48)
    assert {name for name, _ in ours.named_parameters()} - {name for name, _ in plain.named_parameters()} == {
        f"norm_{one}.{part}" for one in "qk" for part in ("weight", "bias")
    }
    before = ours(x)
    with torch.no_grad():
        ours.qkv.weight[:96] *= 100
        ours.qkv.bias[:96] *= 100
    torch.testing.assert_close(ours(x), before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        ours.norm_q.weight *= 3
    assert (ours(x) - before).abs().max() > 1e-3  # the scale that is learned


def test_size_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match=r"width 50 .* heads 4"):
        TransformerSize(50, 2, 4, 100)


def test_each_of_q_k_v_starts_as_a_square_xavier_matrix():
    torch.manual_seed(0)
    stack = blocks(TransformerSize(64, 2, 4, 256)).apply(init_weights)
    for block in stack:
        bound = math.sqrt(6 / (64 + 64))
        for part in block.attention.qkv.weight.chunk(3):
            assert 0.95 * bound < part.abs().max() <= bound
        assert block.mlp.fc_in.weight.abs().max() <= math.sqrt(6 / (64 + 256))
        assert not any(p.any() for name, p in block.named_parameters() if name.endswith("bias"))
