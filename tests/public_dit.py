"""A small random network in the layout of RAE's public weights, and what it computes, in plain tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def public_state(
    width: int, heads: int, depth: int, head_width: int, head_heads: int, grid: int = 3, channels: int = 5, classes: int = 4, seed: int = 0
) -> dict[str, Tensor]:
    """All tensors random, so that no part can be left out unseen."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    state = {"pos_embed": random(1, grid**2, width), "t_embedder.W": random(256), "y_embedder.embedding_table.weight": random(classes + 1, width)}
    layers = {"t_embedder.mlp.0": (width, 512), "t_embedder.mlp.2": (width, width), "s_projector": (head_width, width)}
    layers |= {"final_layer.linear": (channels, head_width), "final_layer.adaLN_modulation.1": (2 * head_width, head_width)}
    for number in range(depth + 2):
        own = width if number < depth else head_width
        hidden = int(own * 8 / 3)
        state |= {f"blocks.{number}.norm{i}.weight": 1 + random(own) for i in (1, 2)}
        layers |= {f"blocks.{number}.{name}": shape for name, shape in {
            "attn.qkv": (3 * own, own), "attn.proj": (own, own), "mlp.w12": (2 * hidden, own), "mlp.w3": (own, hidden), "adaLN_modulation.1": (6 * own, own),
        }.items()}  # fmt: skip
    state["final_layer.norm_final.weight"] = 1 + random(head_width)
    for name, shape in layers.items():
        state |= {f"{name}.weight": random(*shape), f"{name}.bias": random(shape[0])}
    for name, own in (("s_embedder.proj", width), ("x_embedder.proj", head_width)):
        state |= {f"{name}.weight": random(own, channels, 1, 1), f"{name}.bias": random(own)}
    for name, size in (("enc_feat_rope", width // heads), ("dec_feat_rope", head_width // head_heads)):
        angles = rotations(grid, size)
        state |= {f"{name}.freqs_cos": angles.cos(), f"{name}.freqs_sin": angles.sin()}
    return state


def rotations(grid: int, size: int) -> Tensor:
    """(grid^2, size) angles: half of the channels by the row, half by the column, each angle for two neighbours."""
    frequencies = [10000 ** (-2 * j / (size / 2)) for j in range(size // 4)]
    rows = []
    for row in range(grid):
        for column in range(grid):
            rows.append([place * frequency for place in (row, column) for frequency in frequencies for _ in range(2)])
    return torch.tensor(rows)


def public_output(state: dict[str, Tensor], tokens: Tensor, t: Tensor, labels: Tensor, depth: int) -> Tensor:
    """tokens (B, N, C) -> prediction (B, N, C), as RAE's network computes it."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].flatten(1).T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]

    def block(number: int, x: Tensor, c: Tensor, rope: str) -> Tensor:
        name = f"blocks.{number}"
        parts = linear(f"{name}.adaLN_modulation.1", F.silu(c)).chunk(6, -1)
        cos, sin = state[f"{rope}.freqs_cos"], state[f"{rope}.freqs_sin"]
        q, k, v = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x) * (1 + parts[1]) + parts[0]).chunk(3, -1)
        out = []
        for first in range(0, q.shape[-1], cos.shape[-1]):
            of_head = slice(first, first + cos.shape[-1])
            turned = []
            for y in (q[..., of_head], k[..., of_head]):
                even, odd = y[..., 0::2], y[..., 1::2]
                turned.append(y * cos + torch.stack([-odd, even], -1).flatten(-2) * sin)
            weights = (turned[0] @ turned[1].transpose(1, 2) / cos.shape[-1] ** 0.5).softmax(-1)
            out.append(weights @ v[..., of_head])
        x = x + parts[2] * linear(f"{name}.attn.proj", torch.cat(out, -1))
        a, b = linear(f"{name}.mlp.w12", norm(f"{name}.norm2", x) * (1 + parts[4]) + parts[3]).chunk(2, -1)
        return x + parts[5] * linear(f"{name}.mlp.w3", F.silu(a) * b)

    angles = 2 * torch.pi * t[:, None] * state["t_embedder.W"]
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.sin(), angles.cos()], -1))))[:, None]
    c = F.silu(time + state["y_embedder.embedding_table.weight"][labels][:, None])
    s = linear("s_embedder.proj", tokens) + state["pos_embed"]
    blocks = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for number in range(depth):
        s = block(number, s, c, "enc_feat_rope")
    s = linear("s_projector", F.silu(s + time))
    x = linear("x_embedder.proj", tokens)
    for number in range(depth, blocks):
        x = block(number, x, s, "dec_feat_rope")
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(s)).chunk(2, -1)
    return linear("final_layer.linear", norm("final_layer.norm_final", x) * (1 + scale) + shift)
