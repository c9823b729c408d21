"""Drawing tokens (RAE, arXiv 2510.11690): a frozen token space, the statistics of its tokens, and the network, as one trainable."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from openvision3 import distributed
from openvision3.draws import draw_seed, normal, uniform
from openvision3.generate import flow
from openvision3.generate.config import GenerateConfig
from openvision3.generate.dit import Condition, DiT
from openvision3.generate.flow import Sampling
from openvision3.generate.space import TokenSpace, TokenStatistics
from openvision3.model.lengths import by_length

_NOISE_STREAM, _DROP_STREAM, _CAPTION_STREAM = 0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179, 0x428A2F98D728AE22
"""Keep the random streams of a row's noise, of dropping its condition and of choosing its caption apart."""


class RAE(nn.Module):
    """A frozen token space, the exact statistics of its tokens, and the network that learns to draw them.

    `classes` counts labels; 0 for texts or nothing, as the config says.
    """

    def __init__(self, config: GenerateConfig, space: TokenSpace, classes: int = 0):
        super().__init__()
        self.config, self.grid = config, space.grid(config.size)
        tokens = self.grid[0] * self.grid[1]
        self.space = space
        self.statistics = TokenStatistics(tokens, space.channels)
        self.dit = DiT(config.dit, space.channels, classes, space.word_width if config.condition == "text" else 0)
        self.shift = config.flow.shift or flow.dimension_shift(tokens * space.channels)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One batch -> (loss, {}), this rank's share. `images` (B, 3, H, W) or `latents` (B, C, h, w), or the `tokens` that `prepare` made of them;

        `draw_key` (B,), of which noise, time and the dropping of the condition are functions; `labels` (B,), or `text_ids` (B, K, T) with
        `text_present` (B, K), of which a present one is drawn.
        """
        tokens, keys = self._tokens(batch), batch["draw_key"]
        count = batch["count"] if "count" in batch else distributed.total(keys.new_full((), len(keys)))
        t = flow.draw_times(keys, self.config.flow, self.shift)
        noise = normal(keys ^ _NOISE_STREAM, tokens[0].numel()).view(tokens.shape)
        drops = self.config.drop if self.config.condition != "none" else 0.0
        dropped = uniform(keys ^ _DROP_STREAM, 1)[:, 0] < drops
        if self.space.text_encoder is None or self.config.condition != "text":
            errors = self.errors(tokens, noise, t, self.condition(batch).with_dropped(dropped))
        else:
            errors = by_length(
                self.dit,
                lambda rows, ids: self.errors(tokens[rows], noise[rows], t[rows], self.read(ids).with_dropped(dropped[rows])),
                _choose_text(batch),
                self.space.text_encoder.pad_id,
            )
        return distributed.share(errors.sum(), count), {}

    def errors(self, tokens: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """(B,) mean squared errors of the velocity; tokens are normalised."""
        prediction = self.dit(flow.interpolate(tokens, noise, t), t, self.grid, condition)
        return flow.squared_errors(prediction, tokens, noise, t, self.config.flow)

    def prepare(self, batches: Iterable[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The micro-batches of one step, each with the number of rows of all, and tokens in place of images."""
        with torch.no_grad():
            kept = []
            for batch in batches:
                small = {name: value for name, value in batch.items() if name in ("draw_key", "labels", "text_ids", "text_present")}
                kept.append(small | {"tokens": self._tokens(batch)})
            count = distributed.total(torch.stack([batch["draw_key"].new_full((), len(batch["draw_key"])) for batch in kept]).sum())
        return [batch | {"count": count} for batch in kept]

    def _tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """Normalised tokens (B, N, D) in fp32, without gradient."""
        if "tokens" in batch:
            return batch["tokens"]
        return self.statistics.normalise(self.encode(batch))

    @torch.no_grad()
    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        """The tokens (B, N, D) of a batch's images or latents, not normalised."""
        return self.space.encode(batch["latents"].float() if "latents" in batch else self.space.vae.encode(batch["images"]))

    def condition(self, batch: dict[str, Tensor]) -> Condition:
        if self.config.condition == "label":
            return Condition(labels=batch["labels"])
        return self.read(_choose_text(batch)) if self.config.condition == "text" else Condition()

    def read(self, text_ids: Tensor) -> Condition:
        """text_ids (B, T) -> the condition of these texts."""
        words, present = self.space.words(text_ids)
        return Condition(words=words, present=present)

    # -- drawing ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def draw(
        self,
        noise: Tensor,
        condition: Condition,
        sampling: Sampling,
        weaker: RAE | None = None,
        each: Callable[[int, Tensor], object] | None = None,
    ) -> Tensor:
        """noise (B, N, D) -> tokens (B, N, D) of the space, not normalised.

        Guidance compares with the rows drawn without a condition, in one batch of twice the rows; or with a `weaker` generator of the same space.
        `each` is called after every step with its number and the tokens promised from there.
        """
        low, high = sampling.interval
        apart = torch.arange(2 * len(noise), device=noise.device) >= len(noise)
        both = Condition(*(value if value is None else torch.cat([value, value]) for value in condition)).with_dropped(apart)

        def velocity(x: Tensor, now: float) -> Tensor:
            t = x.new_full((len(x),), now)
            if sampling.guidance == 1 or not low <= now <= high:
                return self._velocity(x, t, condition)
            if weaker is not None:
                return flow.guided(self._velocity(x, t, condition), weaker._velocity(x, t, condition), sampling.guidance)
            conditional, alone = self._velocity(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
            return flow.guided(conditional, alone, sampling.guidance)

        report = None if each is None else lambda number, tokens: each(number, self.statistics.restore(tokens))
        tokens = flow.integrate(velocity, noise, flow.time_grid(sampling, self.shift), sampling.method, report)
        return self.statistics.restore(tokens)

    def _velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return flow.velocity_of(self.dit(x, t, self.grid, condition), x, t, self.config.flow)


def _choose_text(batch: dict[str, Tensor]) -> Tensor:
    """One of the present texts of each row (B, T): drawn by its key in training, the first in evaluation."""
    text_ids = batch["text_ids"]
    if "draw_key" not in batch or text_ids.shape[1] == 1:
        return text_ids[:, 0]
    count = batch["text_present"].sum(1)
    place = (uniform(batch["draw_key"] ^ _CAPTION_STREAM, 1)[:, 0] * count).long().clamp_max(text_ids.shape[1] - 1)
    return text_ids[torch.arange(len(text_ids), device=text_ids.device), place]


def noise_of(indices: Sequence[int], seed: int, shape: tuple[int, int]) -> Tensor:
    """The noise (B, N, D) that samples of these numbers begin with, functions of (seed, number)."""
    keys = torch.tensor([draw_seed("sample", seed, index) for index in indices])
    return normal(keys, math.prod(shape)).view(len(indices), *shape)
