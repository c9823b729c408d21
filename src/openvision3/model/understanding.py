"""Branch 2, understanding: a text encoder, contrasted with the pooled tokens, and a captioner, which reads the tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision3.draws import uniform
from openvision3.model.encoder import named_size
from openvision3.model.transformer import KeyValueCache, TransformerSize, blocks, init_weights

TEXT_SIZES = {
    "tiny": TransformerSize(64, 2, 2, 256),
    "micro": TransformerSize(256, 2, 4, 1024),
    "mini": TransformerSize(256, 3, 4, 1024),
    "Ti": TransformerSize(192, 12, 3, 768),
    "S": TransformerSize(384, 12, 6, 1536),
    "M": TransformerSize(512, 12, 8, 2048),
    "B": TransformerSize(512, 12, 8, 2048),
    "L": TransformerSize(768, 12, 12, 3072),
    "So400m": TransformerSize(1152, 27, 16, 4304),
    "H": TransformerSize(1024, 24, 16, 4096),
}
"""Sizes of text encoder and captioner for an encoder of that name: the paper's, and three of ours."""


@dataclass
class TextEncoderConfig:
    """Captions -> embeddings to contrast with images."""

    size: str = "B"
    """tiny, micro, mini, Ti, S, M, B, L, So400m or H"""
    positions: int = 80
    """longest caption in word pieces, including the class token at its end"""

    def __post_init__(self):
        named_size(self.size, TEXT_SIZES)
        if self.positions < 2:
            raise ValueError(f"positions {self.positions} must be at least 2: a text has a special token and a word")


@dataclass
class CaptionerConfig:
    """Tokens -> captions, word by word."""

    size: str = "B"
    """tiny, micro, mini, Ti, S, M, B, L, So400m or H"""
    positions: int = 128
    """longest caption in word pieces, including the begin and end tokens"""
    token_share: float = 1.0
    """share of the tokens that the captioner sees in training, drawn anew for every image and step (arXiv 2509.01644); captions are written from all"""

    def __post_init__(self):
        named_size(self.size, TEXT_SIZES)
        if not 0 < self.token_share <= 1:
            raise ValueError(f"token_share {self.token_share} must be above 0 and at most 1")
        if self.positions < 2:
            raise ValueError(f"positions {self.positions} must be at least 2: a text has a special token and a word")


MAX_TEMPERATURE = 100.0

_CHOICE_STREAM = 0x5851F42D4C957F2D
"""Keeps the choice of tokens apart from other draws of a row."""


def temperature(log_temperature: Tensor) -> Tensor:
    """The factor of cosines before a softmax, at most 100 (Radford et al. 2021), in fp32.

    The gradient passes through the clamp; with a plain clamp, a temperature above the limit would never come back.
    """
    log = log_temperature.float()
    return (log + (log.clamp(max=math.log(MAX_TEMPERATURE)) - log).detach()).exp()


class TextEncoder(nn.Module):
    """text_ids (B, T) -> (B, E), not normalised: bidirectional, tanh GELU, read at the class token that ends a text.

    Padding is masked, so that the embedding of a caption does not depend on the length of its neighbours.
    """

    def __init__(self, config: TextEncoderConfig, vocabulary: int, embed_dim: int, pad_id: int = 0):
        super().__init__()
        size = named_size(config.size, TEXT_SIZES)
        self.config, self.pad_id = config, pad_id
        self.embedding = nn.Embedding(vocabulary, size.width)
        self.positions = nn.Parameter(torch.empty(config.positions, size.width))
        self.blocks = blocks(size, "tanh")
        self.norm = nn.LayerNorm(size.width, eps=1e-6)
        self.projection = nn.Linear(size.width, embed_dim, bias=False)

    def init_weights(self) -> None:
        self.apply(init_weights)
        nn.init.normal_(self.positions, std=0.01)

    def forward(self, text_ids: Tensor) -> Tensor:
        x, seen = self._features(text_ids)
        return self.projection(self.norm(at_class_token(x, seen)))

    def words(self, text_ids: Tensor) -> tuple[Tensor, Tensor]:
        """text_ids (B, T) -> normalised features of all pieces (B, T, W), and which of them are no padding (B, T)."""
        x, seen = self._features(text_ids)
        return self.norm(x), seen

    def _features(self, text_ids: Tensor) -> tuple[Tensor, Tensor]:
        if text_ids.ndim != 2 or not text_ids.shape[1]:
            raise ValueError(f"text_ids of shape {tuple(text_ids.shape)} cannot be read; pass (B, T) with at least one piece")
        length = text_ids.shape[1]
        if length > self.config.positions:
            raise ValueError(f"texts of {length} pieces are longer than this text encoder's {self.config.positions} positions")
        seen = text_ids != self.pad_id  # (B, T)
        x = self.embedding(text_ids) + self.positions[:length]
        # A row of padding alone (a missing caption) would attend to nothing: let it see itself.
        mask = (seen | ~seen.any(1, keepdim=True))[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        return x, seen


def at_class_token(x: Tensor, seen: Tensor) -> Tensor:
    """x (B, T, W) -> (B, W): the row of the last piece that is no padding."""
    last = seen.sum(1).sub(1).clamp_min(0)
    return x[torch.arange(len(x), device=x.device), last]


class Captioner(nn.Module):
    """Prefix language model (paper, section 3.3): tokens see each other; words see the tokens and the words before them.

    The output matrix is the transposed word embedding.
    """

    def __init__(self, config: CaptionerConfig, vocabulary: int, token_width: int):
        super().__init__()
        size = named_size(config.size, TEXT_SIZES)
        self.config = config
        self.embed_tokens = nn.Linear(token_width, size.width)
        self.embedding = nn.Embedding(vocabulary, size.width)
        self.positions = nn.Parameter(torch.empty(config.positions, size.width))
        self.blocks = blocks(size, "tanh")
        self.norm = nn.LayerNorm(size.width, eps=1e-6)
        self.output_bias = nn.Parameter(torch.empty(vocabulary))

    def init_weights(self) -> None:
        self.apply(init_weights)
        nn.init.normal_(self.positions, std=0.01)
        nn.init.zeros_(self.output_bias)

    def forward(self, tokens: Tensor, caption_ids: Tensor) -> Tensor:
        """tokens (B, N, D), caption_ids (B, L) from the begin token on -> logits (B, L, V): position i predicts word i + 1."""
        return self._logits(self.features(tokens, caption_ids))

    def features(self, tokens: Tensor, caption_ids: Tensor) -> Tensor:
        """The features (B, L, W) that the logits are computed from. In training the loss computes a few logits at a time."""
        count, length = tokens.shape[1], caption_ids.shape[1]
        self._check(length)
        words = self.embedding(caption_ids) + self.positions[:length]
        x = torch.cat([self._embed(tokens), words], dim=1)
        mask = torch.ones(count + length, count + length, dtype=torch.bool, device=x.device).tril()
        mask[:count, :count] = True
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x[:, count:])

    def choose_tokens(self, tokens: Tensor, draw_key: Tensor) -> Tensor:
        """tokens (B, N, D) -> (B, `token_count(N)`, D): those of a row are a function of its `draw_key`, each as likely as any other."""
        chosen = uniform(draw_key ^ _CHOICE_STREAM, tokens.shape[1]).argsort(stable=True, dim=1)[:, : self.token_count(tokens.shape[1])]
        return tokens.gather(1, chosen[:, :, None].expand(-1, -1, tokens.shape[2]))

    def token_count(self, count: int) -> int:
        """How many of so many tokens are seen in training: `token_share` of them, rounded, at least one."""
        return max(1, round(self.config.token_share * count))

    def _embed(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 3 or tokens.shape[2] != self.embed_tokens.in_features:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)} do not fit this captioner; pass (B, N, {self.embed_tokens.in_features})")
        return self.embed_tokens(tokens).to(self.positions.dtype)  # residual sums and norms in fp32, as in Encoder

    def _check(self, length: int) -> None:
        if length > self.config.positions:
            raise ValueError(f"captions of {length} pieces are longer than this captioner's {self.config.positions} positions")

    def _check_writing(self, max_length: int) -> None:
        if not isinstance(max_length, Integral) or not 1 <= max_length < self.config.positions:
            raise ValueError(f"max_length {max_length} must be from 1 to {self.config.positions - 1}: this captioner has {self.config.positions} positions")

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embedding.weight, self.output_bias)

    def read(self, tokens: Tensor) -> list[KeyValueCache]:
        """The prefix pass: keys and values of the tokens in every block. Raises ValueError for tokens with NaN or infinity."""
        if not bool(tokens.isfinite().all()):
            raise ValueError("the tokens contain NaN or infinity, so that no caption can be written; did the training of these weights diverge?")
        caches = [KeyValueCache() for _ in self.blocks]
        x = self._embed(tokens)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, None, cache)
        return caches

    def step(self, words: Tensor, position: int, caches: list[KeyValueCache]) -> Tensor:
        """One word (B,) at `position` -> logits (B, V) of the next."""
        x = (self.embedding(words) + self.positions[position])[:, None]
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, None, cache)
        return self._logits(self.norm(x[:, 0]))

    @torch.no_grad()
    def write(
        self,
        tokens: Tensor,
        begin: int,
        end: int,
        *,
        max_length: int = 32,
        top_p: float | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> list[list[int]]:
        """tokens (B, N, D) -> word ids of one caption a row, without special tokens: greedy, or sampled from the top-p nucleus.

        A caption ends at its end token, or after `max_length` words.
        """
        self._check_writing(max_length)
        check_sampling(top_p, temperature)
        caches = self.read(tokens)
        words = torch.full((len(tokens),), begin, device=tokens.device)
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        columns = []
        for position in range(max_length):
            logits = self.step(words, position, caches).float()
            logits[:, begin] = -torch.inf
            words = logits.argmax(-1) if top_p is None else _nucleus(logits / temperature, top_p, generator)
            done = done | (words == end)
            columns.append(words)
            if done.all():
                break
        return [row[: row.index(end)] if end in row else row for row in torch.stack(columns, 1).tolist()]

    @torch.no_grad()
    def log_probabilities(self, tokens: Tensor, captions: Sequence[Sequence[int]], begin: int, end: int) -> tuple[Tensor, Tensor]:
        """tokens (B, N, D) and the word ids of a caption each -> log-probability of each caption (B,): mean and sum over its words.

        The end token is included where it fits.
        """
        rows = [[begin, *caption, end][: self.config.positions] for caption in captions]
        length = max(map(len, rows))
        ids = torch.tensor([row + [end] * (length - len(row)) for row in rows], device=tokens.device)
        counts = torch.tensor([len(row) - 1 for row in rows], device=tokens.device)
        scores = self(tokens, ids)[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        is_word = torch.arange(length - 1, device=tokens.device) < counts[:, None]
        total = (scores * is_word).sum(1)
        return total / counts, total

    @torch.no_grad()
    def write_beam(self, tokens: Tensor, begin: int, end: int, *, max_length: int = 32, beams: int = 4, length_penalty: float = 0.6) -> list[list[int]]:
        """As `write`, by beam search: the finished caption with the highest log-probability / length^length_penalty."""
        self._check_writing(max_length)
        if beams < 1 or length_penalty < 0:
            raise ValueError(f"beams {beams} must be at least 1, length_penalty {length_penalty} must not be negative")
        return [self._beam(row[None], begin, end, max_length, beams, length_penalty) for row in tokens]

    def _beam(self, tokens: Tensor, begin: int, end: int, max_length: int, beams: int, penalty: float) -> list[int]:
        caches = self.read(tokens)
        words = torch.full((1,), begin, device=tokens.device)
        scores = torch.zeros(1, device=tokens.device)
        captions: list[list[int]] = [[]]
        finished: list[tuple[float, list[int]]] = []
        for position in range(max_length):
            logits = self.step(words, position, caches).float()
            logits[:, begin] = -torch.inf
            total = scores[:, None] + logits.log_softmax(-1)  # (beams, V)
            best, flat = total.flatten().topk(min(2 * beams, total.numel()))
            keep_rows: list[int] = []
            keep_words: list[int] = []
            keep_scores: list[float] = []
            for rank, (score, index) in enumerate(zip(best.tolist(), flat.tolist(), strict=True)):
                row, word = divmod(index, total.shape[1])
                if word == end:
                    if rank < beams:
                        finished.append((score / (position + 1) ** penalty, captions[row]))
                elif len(keep_rows) < beams and score > -torch.inf:
                    keep_rows.append(row)
                    keep_words.append(word)
                    keep_scores.append(score)
            if not keep_rows:
                break
            captions = [[*captions[row], word] for row, word in zip(keep_rows, keep_words, strict=True)]
            if len(finished) >= beams or (finished and max(finished)[0] >= keep_scores[0] / max_length**penalty):
                break  # enough captions, or no unfinished one can still win
            rows = torch.tensor(keep_rows, device=tokens.device)
            for cache in caches:
                cache.select(rows)
            words = torch.tensor(keep_words, device=tokens.device)
            scores = torch.tensor(keep_scores, device=tokens.device)
        else:
            finished += [(score / max_length**penalty, caption) for score, caption in zip(scores.tolist(), captions, strict=True)]
        return max(finished, key=lambda pair: pair[0])[1]


def class_embedding(groups: Sequence[Tensor]) -> Tensor:
    """For each class the embeddings (n, E) of its prompts -> (classes, E): the mean of their directions, of unit length."""
    return F.normalize(torch.stack([F.normalize(group.float(), dim=-1).mean(0) for group in groups]), dim=-1)


COLDEST, HOTTEST = 1e-6, 1e6
"""Range of temperatures for which the divided logits stay finite in fp32."""


def check_sampling(top_p: float | None, temperature: float) -> None:
    """Raises ValueError for a top_p or temperature out of range, or a temperature without sampling."""
    if isinstance(temperature, bool) or not isinstance(temperature, Real) or not COLDEST <= temperature <= HOTTEST:
        raise ValueError(f"temperature {temperature!r} must be a positive number from {COLDEST:g} to {HOTTEST:g}; leave top_p unset for greedy captions")
    if top_p is None:
        if temperature != 1:
            raise ValueError(f"temperature {temperature} has no effect without sampling; set top_p too, such as 0.9, or leave the temperature at 1")
    elif isinstance(top_p, bool) or not isinstance(top_p, Real) or not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p!r} must lie in (0, 1]")


def _nucleus(logits: Tensor, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Sample (B,) from the smallest set of words whose total probability reaches top_p."""
    values, order = logits.softmax(-1).sort(-1, descending=True)
    values = values.masked_fill(values.cumsum(-1) - values >= top_p, 0.0)
    choice = torch.multinomial(values, 1, generator=generator)
    return order.gather(-1, choice)[:, 0]
