"""The diffusion transformer of RAE (arXiv 2510.11690): a deep trunk, and a wide and shallow head that the trunk's tokens modulate.

Without a head (head_depth 0) it is the plain DiT. It predicts what `flow` asks of it, from noisy tokens, a time and a condition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision3.model.transformer import (
    Attention,
    KeyValueCache,
    TransformerSize,
    attend,
    check_positions,
    init_weights,
    positions_on,
    rotation_on,
)
from openvision3.settings import check_choices, unknown

ROPE_BASE = 1e4
"""RAE's base of the rotations; images have 16 x 16 tokens there"""
FREQUENCIES = 256
"""random Fourier frequencies of the time"""


@dataclass
class DiTConfig:
    """Size and options of the network; `dit_config` has the presets."""

    width: int = 1152
    """channels of the trunk"""
    depth: int = 28
    """blocks of the trunk"""
    heads: int = 16
    """attention heads of the trunk"""
    mlp: int = 0
    """hidden channels of the trunk's MLPs; 0: 8/3 of the width"""
    head_width: int = 2048
    """channels of the head"""
    head_depth: int = 2
    """blocks of the head; 0: no head, which is the plain DiT"""
    head_heads: int = 16
    """attention heads of the head"""
    head_mlp: int = 0
    """hidden channels of the head's MLPs; 0: 8/3 of its width"""
    qk_norm: bool = False
    """a LayerNorm on the queries and keys of every attention head, which keeps bf16 finite (off in the paper)"""
    words: Literal["keys", "cross"] = "keys"
    """how tokens read the words of a text: keys: as further keys and values of each attention of the trunk; cross: by an attention of their own"""
    stored_positions: int = 0
    """number of tokens whose positions lie with the weights, as in RAE's files; 0: positions are computed, for any grid"""

    def __post_init__(self):
        check_choices(self)
        if self.head_depth < 0 or self.stored_positions < 0:
            raise ValueError(f"head_depth {self.head_depth} and stored_positions {self.stored_positions} must not be negative")
        for size in (self.trunk, self.head):
            if size is not None:
                check_positions("rope", size)

    @property
    def trunk(self) -> TransformerSize:
        return TransformerSize(self.width, self.depth, self.heads, self.mlp or int(self.width * 8 / 3))

    @property
    def head(self) -> TransformerSize | None:
        return TransformerSize(self.head_width, self.head_depth, self.head_heads, self.head_mlp or int(self.head_width * 8 / 3)) if self.head_depth else None


_TRUNKS = {"tiny": (256, 8, 4), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
_TINY_HEAD = (320, 2, 5, 768)  # with words, 30 MB in bf16
_WIDE_HEAD = (2048, 2, 16, 0)


def dit_config(size: str, *, head: bool = True, qk_norm: bool = False) -> DiTConfig:
    """S, B, L and XL are RAE's sizes, `tiny` is ours for two cores. Raises ValueError for another name."""
    if size not in _TRUNKS:
        raise unknown("size of a DiT", size, _TRUNKS)
    width, depth, heads = _TRUNKS[size]
    head_width, head_depth, head_heads, head_mlp = _TINY_HEAD if size == "tiny" else _WIDE_HEAD
    return DiTConfig(
        width, depth, heads, head_width=head_width, head_depth=head_depth if head else 0, head_heads=head_heads, head_mlp=head_mlp, qk_norm=qk_norm
    )


class Condition(NamedTuple):
    """What each row is to show: a label, or a text. `dropped` rows are drawn without it."""

    labels: Tensor | None = None
    """(B,) numbers of classes"""
    words: Tensor | None = None
    """(B, T, width of the text encoder), the features of a text's word pieces"""
    present: Tensor | None = None
    """(B, T), which of them are no padding"""
    dropped: Tensor | None = None
    """(B,) booleans; None: no row"""

    def with_dropped(self, dropped: Tensor) -> Condition:
        return self._replace(dropped=dropped)


class RMSNorm(nn.RMSNorm):
    """Computes in fp32 whatever the precision of weights and input, as `transformer.LayerNorm`."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


class SwiGLU(nn.Module):
    """out(silu(a) b), where a and b are the halves of one projection (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc_in = nn.Linear(width, 2 * hidden)
        self.fc_out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fc_in(x).chunk(2, -1)
        return self.fc_out(F.silu(a) * b)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class WordAttention(nn.Module):
    """Tokens read words by an attention of its own; its last matrix begins at zero."""

    def __init__(self, size: TransformerSize):
        super().__init__()
        self.heads = size.heads
        self.norm = RMSNorm(size.width)
        self.query = nn.Linear(size.width, size.width)
        self.out = nn.Linear(size.width, size.width)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, present: Tensor) -> Tensor:
        q = self.query(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.out(attend(q, keys.to(q.dtype), values.to(q.dtype), present).transpose(1, 2).flatten(2))


class DiTBlock(nn.Module):
    """adaLN-zero block (Peebles and Xie, arXiv 2212.09748) with RMSNorm and SwiGLU; the condition modulates all tokens alike, or each by its own row."""

    def __init__(self, size: TransformerSize, qk_norm: bool, words: str = ""):
        super().__init__()
        self.norm_attention = RMSNorm(size.width)
        self.attention = Attention(size.width, size.heads, qk_norm)
        self.norm_mlp = RMSNorm(size.width)
        self.mlp = SwiGLU(size.width, size.mlp)
        self.modulation = nn.Linear(size.width, 6 * size.width)
        self.word_keys = nn.Linear(size.width, 2 * size.width) if words else None
        self.word_attention = WordAttention(size) if words == "cross" else None

    def forward(self, x: Tensor, condition: Tensor, rotation: Tensor, words: Tensor | None = None, present: Tensor | None = None) -> Tensor:
        """x (B, N, W), condition (B, 1, W) or (B, N, W); words (B, T, W) with present (B, T), where the block was built to read some."""
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = self.modulation(F.silu(condition)).chunk(6, -1)
        cache, mask = None, None
        if self.word_keys is not None and words is not None and present is not None:
            keys, values = self.word_keys(words).unflatten(-1, (2, self.attention.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, T, W / heads)
            keys = self.attention.norm_k(keys).to(values.dtype)
            if self.word_attention is not None:
                x = x + self.word_attention(x, keys, values, present[:, None, None])
            else:
                cache = KeyValueCache()
                cache.append(keys, values)
                mask = F.pad(present, (0, x.shape[1]), value=True)[:, None, None]  # every token may be seen
        x = x + gate_attention * self.attention(modulate(self.norm_attention(x), shift_attention, scale_attention), mask, cache, rotation)
        return x + gate_mlp * self.mlp(modulate(self.norm_mlp(x), shift_mlp, scale_mlp))


class TimeEmbedding(nn.Module):
    """t (B,) -> (B, W): sine and cosine of 2 pi t times fixed random frequencies, then two layers."""

    frequencies: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequencies", torch.empty(FREQUENCIES))
        self.fc_in = nn.Linear(2 * FREQUENCIES, width)
        self.fc_out = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        angles = 2 * torch.pi * t[:, None].float() * self.frequencies
        return self.fc_out(F.silu(self.fc_in(torch.cat([angles.sin(), angles.cos()], -1))))


class DiT(nn.Module):
    """noisy tokens (B, N, C), t (B,), a condition -> a prediction (B, N, C) in fp32.

    `classes` counts labels, `word_width` is the width of the text encoder; at most one of them is above 0, and with neither nothing conditions the image.
    A row without its condition gets the null label, or one learned word.
    """

    stored_positions: Tensor | None

    def __init__(self, config: DiTConfig, channels: int, classes: int = 0, word_width: int = 0):
        super().__init__()
        if classes and word_width:
            raise ValueError(f"{classes} classes and words of width {word_width}: a DiT is conditioned by labels or by texts")
        trunk, head = config.trunk, config.head
        self.config, self.channels, self.classes = config, channels, classes
        self.trunk_size, self.head_size = trunk, head
        self.time = TimeEmbedding(trunk.width)
        self.labels = nn.Embedding(classes + 1, trunk.width) if classes else None
        self.read_words = nn.Linear(word_width, trunk.width) if word_width else None
        self.null_word = nn.Parameter(torch.empty(trunk.width)) if word_width else None
        # A buffer, for checkpoints and exported folders hold no frozen parameters.
        self.register_buffer("stored_positions", torch.empty(config.stored_positions, trunk.width) if config.stored_positions else None)
        self.enter = nn.Linear(channels, trunk.width)
        self.trunk = nn.ModuleList(DiTBlock(trunk, config.qk_norm, config.words if word_width else "") for _ in range(trunk.depth))
        last = trunk
        if head is not None:
            self.to_head = nn.Linear(trunk.width, head.width)
            self.enter_head = nn.Linear(channels, head.width)
            self.head = nn.ModuleList(DiTBlock(head, config.qk_norm) for _ in range(head.depth))
            last = head
        self.norm = RMSNorm(last.width)
        self.modulation = nn.Linear(last.width, 2 * last.width)
        self.leave = nn.Linear(last.width, channels)

    def init_weights(self) -> DiT:
        """Modulations and the last layer begin at zero, so that every block is the identity and the prediction is 0."""
        self.apply(init_weights)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, DiTBlock):
                nn.init.zeros_(module.modulation.weight)
                if module.word_attention is not None:
                    nn.init.zeros_(module.word_attention.out.weight)
        for layer in (self.modulation, self.leave):
            nn.init.zeros_(layer.weight)
        for layer in (self.time.fc_in, self.time.fc_out):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.normal_(self.time.frequencies)
        if self.null_word is not None:
            nn.init.normal_(self.null_word, std=0.02)
        if self.stored_positions is not None:
            nn.init.zeros_(self.stored_positions)  # they come with weights
        return self

    def forward(self, noisy: Tensor, t: Tensor, grid: tuple[int, int], condition: Condition = Condition()) -> Tensor:
        rows, columns = grid
        time = self.time(t)[:, None]  # (B, 1, W)
        summary, words, present = self._read(condition, len(noisy))
        c = F.silu(time if summary is None else time + summary)
        x = self.enter(noisy).to(time.dtype) + self._positions(noisy, grid)
        rotation = rotation_on(noisy, rows, columns, self.trunk_size, ROPE_BASE)[:, 1:]  # there is no class token
        for block in self.trunk:
            x = block(x, c, rotation, words, present)  # (B, N, W)
        if self.head_size is not None:
            c = self.to_head(F.silu(x + time))  # (B, N, W of the head): the trunk reaches the head as its modulation alone
            x = self.enter_head(noisy).to(c.dtype)
            rotation = rotation_on(noisy, rows, columns, self.head_size, ROPE_BASE)[:, 1:]
            for block in self.head:
                x = block(x, c, rotation)
        shift, scale = self.modulation(F.silu(c)).chunk(2, -1)
        return self.leave(modulate(self.norm(x), shift, scale)).float()

    def _read(self, condition: Condition, count: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(what is added to the time (B, 1, W), words (B, T, W), which are present (B, T)). Raises ValueError: a condition of another kind."""
        dropped = condition.dropped
        if self.labels is not None:
            if condition.labels is None:
                raise ValueError("this network draws by labels; give the number of a class for each row")
            labels = condition.labels if dropped is None else condition.labels.masked_fill(dropped, self.classes)
            return self.labels(labels)[:, None], None, None
        if self.read_words is None or self.null_word is None:
            return None, None, None
        if condition.words is None or condition.present is None:
            raise ValueError("this network draws by texts; give the words of one for each row")
        words, present = self.read_words(condition.words), condition.present
        if dropped is not None:
            first = torch.arange(present.shape[1], device=present.device) == 0
            words = torch.where(dropped[:, None, None], self.null_word.to(words.dtype), words)
            present = torch.where(dropped[:, None], first, present)
        mean = (words * present[:, :, None]).sum(1) / present.sum(1, keepdim=True).clamp_min(1)
        return mean[:, None], words, present

    def _positions(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.stored_positions is None:
            return positions_on(x, *grid, self.trunk_size.width, torch.float32)
        if len(self.stored_positions) != x.shape[1]:
            raise ValueError(f"this network was trained on {len(self.stored_positions)} tokens, not {x.shape[1]}; draw images of its own size")
        return self.stored_positions
