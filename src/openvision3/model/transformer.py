"""Attention, MLP, Block and position tables, of which the encoder, both decoders and the text encoder are made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision3.settings import unknown

Gelu = Literal["exact", "tanh"]
Positions = Literal["sincos", "rope"]


@dataclass(frozen=True)
class TransformerSize:
    """One row of the paper's size table."""

    width: int
    """channels of every block"""
    depth: int
    """number of blocks"""
    heads: int
    """attention heads; must divide the width"""
    mlp: int
    """hidden channels of the MLP"""

    def __post_init__(self):
        if min(self.width, self.depth, self.heads, self.mlp) < 1 or self.width % self.heads:
            raise ValueError(f"width {self.width} must be a positive multiple of heads {self.heads}, depth {self.depth} and mlp {self.mlp} positive")


class Attention(nn.Module):
    """Multi-head self-attention with one projection to queries, keys and values (its rows, in that order).

    With `qk_norm` a LayerNorm over the channels of a head comes before the product of queries and keys, so that logits cannot grow
    without bound (Dehghani et al. 2023, arXiv 2302.05442).
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_q = LayerNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = LayerNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None, rotation: Tensor | None = None) -> Tensor:
        """x (B, N, W); mask is True where a query (row) may see a key (column), broadcast over (B, heads, N, keys); rotation: see `rope_positions`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, W/heads)
        q, k = self.norm_q(q), self.norm_k(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q, k = q.to(v.dtype), k.to(v.dtype)  # norms and rotations are computed in fp32
        if cache is not None:
            k, v = cache.append(k, v)
        y = attend(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(width)) v on (B, heads, N, width); mask is True where a query may see a key.

    On a CPU the backward pass of torch's fused kernel takes half of a small model's step; for few tokens plain products are twice
    as fast (a block's forward and backward pass, 65 tokens, bf16: 0.22 s against 0.46 s).
    """
    if q.device.type != "cpu" or k.shape[2] > PLAIN_TOKENS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return plain_attention(q, k, v, mask)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attend` by matrix products."""
    scores = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).float()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


PLAIN_TOKENS = 256
"""Most tokens for which a CPU uses plain products."""


class KeyValueCache:
    """Keys and values of one attention layer while a caption is written word by word."""

    def __init__(self):
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.keys, self.values = keys, values
        return keys, values

    def select(self, rows: Tensor) -> None:
        """Keep or repeat these rows of the batch: beam search reorders its hypotheses."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, gelu: Gelu = "exact"):
        super().__init__()
        self.fc_in = nn.Linear(width, hidden)
        self.fc_out = nn.Linear(hidden, width)
        self.approximate = "tanh" if gelu == "tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_out(F.gelu(self.fc_in(x), approximate=self.approximate))


class LayerNorm(nn.LayerNorm):
    """Always computes in fp32: FSDP gathers the weights of a block in bf16, and autocast on a CPU does not cast them back."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)). LayerNorm eps 1e-6, no layer scale."""

    def __init__(self, size: TransformerSize, gelu: Gelu = "exact", qk_norm: bool = False):
        super().__init__()
        self.norm_attention = LayerNorm(size.width, eps=1e-6)
        self.attention = Attention(size.width, size.heads, qk_norm)
        self.norm_mlp = LayerNorm(size.width, eps=1e-6)
        self.mlp = MLP(size.width, size.mlp, gelu)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None, rotation: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm_attention(x), mask, cache, rotation)
        return x + self.mlp(self.norm_mlp(x))


def check_gelu(gelu: str) -> None:
    """Raises ValueError for an unknown kind of GELU."""
    if gelu not in ("exact", "tanh"):
        raise unknown("gelu", str(gelu), ("exact", "tanh"))


def check_positions(positions: str, size: TransformerSize) -> None:
    """Raises ValueError for an unknown kind of positions, or heads whose width RoPE cannot divide into quarters."""
    if positions not in ("sincos", "rope"):
        raise unknown("positions", str(positions), ("sincos", "rope"))
    if positions == "rope" and size.width // size.heads % 4:
        raise ValueError(f"positions rope need heads whose width is a multiple of 4, not {size.width // size.heads}; use sincos")


def blocks(size: TransformerSize, gelu: Gelu = "exact", qk_norm: bool = False) -> nn.ModuleList:
    return nn.ModuleList(Block(size, gelu, qk_norm) for _ in range(size.depth))


def positions_on(x: Tensor, height: int, width: int, channels: int, dtype: torch.dtype) -> Tensor:
    """`sincos_positions` on the device of `x` in `dtype`, computed once for each grid. Do not change it in place."""
    return _table_on(x, sincos_positions, (height, width, channels), dtype)


def rotation_on(x: Tensor, height: int, width: int, size: TransformerSize, base: float = 100.0) -> Tensor:
    """`rope_positions` for the heads of a transformer, as `positions_on`."""
    return _table_on(x, rope_positions, (height, width, size.width // size.heads, base), torch.float32)


def _table_on(x: Tensor, table: Callable[..., Tensor], shape: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """A table of positions, kept for the next call. While a graph is traced (compile, export, fake tensors) it becomes part of the graph and is not kept."""
    if type(x) is Tensor and not torch.compiler.is_compiling():
        return _kept_positions(table, shape, x.device, dtype)
    return table(*shape, device=x.device).to(dtype)


@functools.lru_cache(maxsize=64)
def _kept_positions(table: Callable[..., Tensor], shape: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # a table made within inference_mode could not be used in training later
        return table(*shape, device=device).to(dtype)


def sincos_positions(height: int, width: int, channels: int, device: torch.device | str | None = None) -> Tensor:
    """Fixed 2-D sine-cosine table of a grid in row order: (height x width, channels) in fp32.

    Each row is [sin x, cos x, sin y, cos y] on integer coordinates with frequencies 10000^-(k / (channels/4 - 1)): the
    convention of the released encoders (big_vision's `posemb_sincos_2d`), not that of MoCo-v3 or MAE.

    Raises:
        ValueError: channels is not a multiple of 4, or less than 8 (two frequencies).
    """
    if channels % 4 or channels < 8:
        raise ValueError(f"positions need a width that is a multiple of 4 and at least 8, not {channels}")
    steps = {"dtype": torch.float64, "device": device}  # computed on the device: copying a table from the CPU would wait for it
    y, x = torch.meshgrid(torch.arange(height, **steps), torch.arange(width, **steps), indexing="ij")  # type: ignore[arg-type]
    frequencies = 10000.0 ** -(torch.arange(channels // 4, **steps) / (channels // 4 - 1))  # type: ignore[arg-type]
    x, y = x.reshape(-1, 1) * frequencies, y.reshape(-1, 1) * frequencies
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).to(torch.float32)


def rope_positions(height: int, width: int, channels: int, base: float = 100.0, device: torch.device | str | None = None) -> Tensor:
    """Cosine and sine of the angles by which `rotate` turns the channels of a head: (2, 1 + height x width, channels / 2) in fp32.

    Row 0 is for a class token and does not rotate; the others are the grid in row order. One half of the angles is x, the other y, on
    integer coordinates, times base^-(k / (channels/4)): axial RoPE of Heo et al. (arXiv 2403.13298), whose base is 100. Attention depends on the distance
    of two tokens alone, and the rows of a grid do not depend on its size, so a model continues on a larger one.
    """
    steps = {"dtype": torch.float64, "device": device}
    y, x = torch.meshgrid(torch.arange(height, **steps), torch.arange(width, **steps), indexing="ij")  # type: ignore[arg-type]
    frequencies = base ** -(torch.arange(channels // 4, **steps) / (channels // 4))  # type: ignore[arg-type]
    angles = torch.cat([x.reshape(-1, 1) * frequencies, y.reshape(-1, 1) * frequencies], dim=1)
    angles = F.pad(angles, (0, 0, 1, 0))
    return torch.stack([angles.cos(), angles.sin()]).to(torch.float32)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x (B, heads, N, C) with channels i and i + C/2 turned as a pair by angle i; rotation (2, N, C/2) holds cosines and sines. In fp32."""
    cos, sin = rotation
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform matrices (q, k and v separately), zero biases, unit norms. For `module.apply`."""
    if isinstance(module, Attention):
        for part in module.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(part)
        nn.init.zeros_(module.qkv.bias)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
