"""The run of a generator: its network on the meta device beside the frozen parts that it draws in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvision3.data.labelled import read_names
from openvision3.estimate.counts import Cost, Shapes, count
from openvision3.estimate.planned import PlannedRun
from openvision3.generate import flow
from openvision3.generate.config import PEER_TOKENS, VAE_TOKENS, GenerateConfig
from openvision3.generate.dit import Condition, DiT
from openvision3.generate.space import TokenSpace

DRAWN, STEPS = 50_000, 50
"""images that gFID is computed from, and the steps of each"""
CLASSES = 1000
"""of ImageNet, where the run's own are not here"""


class PlannedGenerator(PlannedRun):
    """The network is trained; the VAE and the encoder, and the text encoder of texts, are passed through without gradient."""

    config: GenerateConfig

    def _count_model(self) -> None:
        config = self.config
        with torch.device("meta"):
            self.space = space = self._build_space()
            self.grid = space.grid(config.size)
            dit = DiT(config.dit, space.channels, self._classes(), space.word_width if config.condition == "text" else 0)
        self.length = 0
        if config.condition == "text" and space.text_encoder is not None:
            self.length = self._length("text", self.options.text_length, space.text_encoder.config.positions)
        self.kept_numbers = self.grid[0] * self.grid[1] * space.channels
        self.passes = {}  # of several captions one is read
        self.parameters = {"DiT": sum(p.numel() for p in dit.parameters() if p.requires_grad)}
        self.frozen = sum(p.numel() for p in space.parameters()) - sum(p.numel() for p in space.vae.parameters())
        self._count_trained(dit)
        self.costs = self._count_costs(dit)

    def _build_space(self) -> TokenSpace:
        """The frozen parts."""
        name = self.config.tokens
        if name.startswith(PEER_TOKENS):
            raise ValueError(f"{name} is a model of others, whose cost is not counted here; estimate with a model of ours in --tokens, or with vae:NAME")
        if name.startswith(VAE_TOKENS):
            self._build_vae(name.removeprefix(VAE_TOKENS))
            return TokenSpace(name, self.vae)
        model, _ = self._build_model(name)
        return TokenSpace(name, self.vae, model)

    def _classes(self) -> int:
        classes = self.config.classes
        if self.config.condition != "label":
            return 0
        if Path(classes or " ").is_file():
            return len(read_names(classes))
        if classes.isdecimal():
            return int(classes)
        self.assumptions.append(f"the classes are not counted here and taken for {CLASSES:,}; name a file of them, or their number, with --classes")
        return CLASSES

    def _count_costs(self, dit: DiT) -> dict[str, Cost]:
        config, space, shapes = self.config, self.space, self._shapes(self.length, 0)
        side, latent = config.size, (space.vae.latent_channels, config.size // space.vae.stride, config.size // space.vae.stride)
        tokens = (self.grid[0] * self.grid[1], space.channels)
        dtype = torch.bfloat16 if shapes.bf16 else torch.float32
        fused = Shapes(side, self.length, 0, shapes.bf16, False, False)  # diffusers leaves attention to torch on a CPU, too

        def draw(part: Any, rows: int) -> Tensor:
            noisy, t = torch.empty(rows, *tokens), torch.empty(rows)
            return flow.squared_errors(part(noisy, t, self.grid, self._condition(rows)), noisy, torch.empty(rows, *tokens), t, config.flow)

        with torch.no_grad():
            frozen: dict[str, Cost] = {}
            if space.vae.network is not None:
                frozen["VAE encode"] = count(space.vae.network, lambda _, rows: space.vae._encode(torch.empty(rows, 3, side, side, dtype=dtype)), fused)
                decoded = count(space.vae.network, lambda _, rows: space.vae._decode(torch.empty(rows, *latent, dtype=dtype)), fused)
                self.decoding = decoded.forward
            else:
                self.decoding = 0.0
            if space.encoder is not None:
                frozen["encoder"] = count(space.encoder, lambda part, rows: part(torch.empty(rows, *latent))[0], shapes)
            if space.latent_decoder is not None:
                self.decoding += count(space.latent_decoder, lambda part, rows: part(torch.empty(rows, *tokens), self.grid), shapes).forward
            if self.length and space.text_encoder is not None:
                frozen["text encoder"] = count(space.text_encoder, lambda part, rows: part.words(torch.empty(rows, self.length, dtype=torch.long))[0], shapes)
        return frozen | {"DiT": count(dit, draw, shapes)}

    def _condition(self, rows: int) -> Condition:
        dropped = torch.empty(rows, dtype=torch.bool)
        if self.config.condition == "label":
            return Condition(labels=torch.empty(rows, dtype=torch.long), dropped=dropped)
        if not self.length:
            return Condition()
        words = torch.empty(rows, self.length, self.space.word_width)
        return Condition(words=words, present=torch.empty(rows, self.length, dtype=torch.bool), dropped=dropped)

    def extra_work(self) -> dict[str, float]:
        config, draw = self.config, self.costs["DiT"].forward
        encode = sum(cost.forward for name, cost in self.costs.items() if name in ("VAE encode", "encoder"))
        plain, guided = (DRAWN * (times * STEPS * draw + self.decoding) for times in (1, 2))
        work = {"statistics, once": min(config.statistics, self.options.samples or config.statistics) * encode, f"drawing {DRAWN:,} images": plain}
        if config.drop and config.condition != "none":
            work["drawing them guided"] = guided
        return {name: operations for name, operations in work.items() if operations}
