import pytest
import torch
import torch.nn.functional as F
from shapes import PAPER

from openvision3.model.encoder import SIZES, Encoder, EncoderConfig
from openvision3.model.transformer import sincos_positions


def make(channels=4, **changes) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(**{"size": "tiny", "embed_dim": 24, **changes}), channels)
    encoder.init_weights()
    return encoder


@pytest.mark.parametrize("name", PAPER)
def test_every_size_of_the_papers_table_has_its_shapes(name):
    width, depth, mlp, heads = PAPER[name]
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig(size=name), latent_channels=16)
    shapes = {key: tuple(value.shape) for key, value in encoder.named_parameters()}
    assert shapes["patchify.weight"] == (width, 16, 2, 2)
    assert shapes["pool_projection.weight"] == (768, width)
    assert len(encoder.blocks) == depth
    for i in range(depth):
        assert shapes[f"blocks.{i}.attention.qkv.weight"] == (3 * width, width)
        assert shapes[f"blocks.{i}.mlp.fc_in.weight"] == (mlp, width)
        assert encoder.blocks[i].attention.heads == heads
    assert len(shapes) == 5 + 12 * depth  # the released files hold one more: the position table


def test_only_our_own_sizes_are_beside_the_papers():
    assert set(SIZES) - set(PAPER) == {"tiny", "micro", "mini"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"token_norm": "none"},
        {"gelu": "tanh"},
        {"sum_blocks": 2},
        {"sum_blocks": 2, "token_norm": "none"},
        {"positions": "rope"},
        {"qk_norm": True},
        {"positions": "rope", "qk_norm": True, "sum_blocks": 2},
    ],
    ids=str,
)
def test_forward_equals_the_released_structure_written_out_with_each_change(changes):
    encoder, latents = make(**changes), torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(encoder.pool_norm.weight)
    for block in encoder.blocks:
        torch.nn.init.normal_(block.mlp.fc_in.weight, std=0.3)
        torch.nn.init.normal_(block.attention.qkv.weight, std=0.3)  # attention that is not flat
        if "qk_norm" in changes:
            for parameter in (*block.attention.norm_q.parameters(), *block.attention.norm_k.parameters()):
                torch.nn.init.normal_(parameter)
    weights = encoder.state_dict()
    rows = []
    for i in range(3):
        for j in range(2):
            square = latents[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            rows.append(torch.einsum("bcij,dcij->bd", square, weights["patchify.weight"]))
    x = torch.stack(rows, 1)
    if "positions" not in changes:
        x = x + sincos_positions(3, 2, 64)
    x = torch.cat([weights["class_token"].expand(2, 1, 64), x], 1)

    def norm(x, name, i):
        return F.layer_norm(x, (64,), weights[f"blocks.{i}.{name}.weight"], weights[f"blocks.{i}.{name}.bias"], 1e-6)

    def turned(x):
        """Rotary positions of heads of 32, as complex numbers: the class token, then three rows of two."""
        waves = 100.0 ** -(torch.arange(8) / 8)
        angles = torch.stack([torch.zeros(16)] + [torch.cat([column * waves, row * waves]) for row in range(3) for column in range(2)])
        y = torch.complex(x[..., :16], x[..., 16:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([y.real, y.imag], -1)

    outputs = []
    for i in range(2):
        q, k, v = (norm(x, "norm_attention", i) @ weights[f"blocks.{i}.attention.qkv.weight"].T).chunk(3, -1)
        heads = []
        for part in range(2):
            channels = slice(32 * part, 32 * part + 32)
            query, key = q[..., channels], k[..., channels]
            if "qk_norm" in changes:
                query, key = (
                    F.layer_norm(one, (32,), weights[f"blocks.{i}.attention.norm_{name}.weight"], weights[f"blocks.{i}.attention.norm_{name}.bias"], 1e-6)
                    for one, name in ((query, "q"), (key, "k"))
                )
            if "positions" in changes:
                query, key = turned(query), turned(key)
            attention = (query @ key.transpose(1, 2) / 32**0.5).softmax(-1)
            heads.append(attention @ v[..., channels])
        x = x + torch.cat(heads, -1) @ weights[f"blocks.{i}.attention.out.weight"].T
        hidden = norm(x, "norm_mlp", i) @ weights[f"blocks.{i}.mlp.fc_in.weight"].T
        curve = torch.erf(hidden / 2**0.5) if "gelu" not in changes else torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3))
        hidden = hidden * 0.5 * (1 + curve)
        x = x + hidden @ weights[f"blocks.{i}.mlp.fc_out.weight"].T
        outputs.append(x[:, 1:])  # biases are zero at the start
    tokens = sum(outputs) if "sum_blocks" in changes else outputs[-1]
    if "token_norm" not in changes:
        tokens = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    pooled = F.layer_norm(tokens.mean(1), (64,), weights["pool_norm.weight"], None, 1e-6) @ weights["pool_projection.weight"].T

    ours_tokens, ours_pooled = encoder(latents)
    torch.testing.assert_close(ours_tokens, tokens, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours_pooled, pooled, rtol=1e-4, atol=1e-4)


def test_tokens_have_zero_mean_and_unit_variance():
    tokens, _ = make()(torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(1)) * 5)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 6), rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens.var(-1, unbiased=False), torch.ones(2, 6), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"positions": "rope", "sum_blocks": 2}], ids=str)
def test_what_the_blocks_add_to_stays_in_fp32_under_autocast(changes):
    encoder, latents = make(**changes), torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(1))
    seen = []
    for module in encoder.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        tokens, _ = encoder(latents)
    assert tokens.dtype == torch.float32 and set(seen) == {torch.float32} and len(seen) == 2 * 6


def test_the_class_token_takes_part():
    encoder, latents = make(), torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    before = encoder(latents)[0]
    torch.nn.init.normal_(encoder.class_token, std=3.0)
    assert (encoder(latents)[0] - before).abs().max() > 1e-3


def test_init_weights_reaches_every_parameter():
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig(size="tiny", qk_norm=True), 4)
    encoder.to_empty(device="cpu")
    for parameter in encoder.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    encoder.init_weights()
    assert not any(p.isnan().any() for p in encoder.parameters())


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: EncoderConfig(size="XL"), "unknown size 'XL'.* Choose one of .*So400m"),
        (lambda: EncoderConfig(token_norm="rms"), "unknown token_norm 'rms'"),
        (lambda: EncoderConfig(patch=0), "patch 0"),
        (lambda: EncoderConfig(patch=2.5), "patch 2.5"),
        (lambda: EncoderConfig(gelu="relu"), "unknown gelu 'relu'.* Choose one of exact, tanh"),
        (lambda: EncoderConfig(positions="learned"), "unknown positions 'learned'.* Choose one of sincos, rope"),
        (lambda: EncoderConfig(size="tiny", sum_blocks=0), "sum_blocks 0 must be from 1 to 2"),
        (lambda: EncoderConfig(size="tiny", sum_blocks=3), "sum_blocks 3 must be from 1 to 2, the number of blocks of size tiny"),
        (lambda: make()(torch.zeros(4, 4, 4)), r"\(4, 4, 4\) .* pass \(B, 4, h, w\)"),
        (lambda: make()(torch.zeros(1, 16, 4, 4)), "16 channels, but this encoder was built for 4"),
        (lambda: make()(torch.zeros(1, 4, 4, 5)), "4 x 5 .* multiples of 16"),
    ],
)
def test_what_is_wrong_gets_one_clear_line(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
