"""The training of a generator: its data, evaluation and export, as a build of `train_run`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvision3 import distributed
from openvision3.data.batches import BatchPlan, TextShape, TrainingBatches, fewer_than_a_batch, to_device
from openvision3.data.identity import digest
from openvision3.data.images import ImageError, pil_images
from openvision3.data.labelled import read_classes
from openvision3.data.problems import Problems
from openvision3.data.shards.source import choose_lanes
from openvision3.draws import draw_seed, normal
from openvision3.generate import flow, folder
from openvision3.generate.config import GenerateConfig
from openvision3.generate.dit import Condition
from openvision3.generate.flow import Sampling
from openvision3.generate.rae import RAE, noise_of
from openvision3.generate.space import Moments, open_space
from openvision3.progress import track
from openvision3.report.sheets import grid
from openvision3.train.checkpoint import RunState
from openvision3.train.loop import Training, autocast
from openvision3.train.open_data import data_digest, open_data, open_held_out, shared_rows
from openvision3.train.run import Outcome, Start, train_run
from openvision3.train.run_folder import RunFolder
from openvision3.train.signals import Signals

LEVELS = 8
"""times at which the loss of each held-out image is taken, the middles of equal parts of [0, 1], then shifted"""
DRAWN = 8
"""images on the sheet of an evaluation"""
ROWS = 64
"""images computed at a time for the statistics"""


def train_generator(config: GenerateConfig, recipe: str = "generator", signals: Signals | None = None) -> Outcome[Generation]:
    """Train a generator as `config` says, see `train_run`; `recipe` names the run."""
    return train_run(config, functools.partial(Generation, recipe=recipe), Path(config.out or f"runs/{recipe}"), signals)


class Generation(Training):
    """A generator, its data and its held-out images, opened as `config` says."""

    model: RAE
    batches: TrainingBatches

    def __init__(self, config: GenerateConfig, start: Start, *, recipe: str = "generator"):
        self.config, self.start, self.recipe = config, start, recipe
        ranks, checkpoint = start.ranks, start.checkpoint
        with distributed.together():
            self.space = open_space(config.tokens, start.precision)
            if config.condition == "text" and self.space.text_encoder is None:
                raise ValueError(f"the text encoder of {config.tokens} was never trained, so no text can be read; set --condition label or none")
            self.source, self.cache, self.about_cache = open_data(config, self.space.vae, 0.0)
            self.held_out = open_held_out(config, self.source)
            self.source.problems.extend(self.held_out.problems)
            labelled = config.condition == "label"
            self.classes = read_classes(self.source, config.label_key, config.classes, watch=track) if labelled else None
        self.label_names = self.classes.names if self.classes is not None else ()
        with distributed.together():  # the first rank alone may fail here, and all exchange the moments of the tokens below
            start.check_inputs(config, self._identities)
            torch.manual_seed(config.seed)
            self.model = RAE(config, self.space, len(self.label_names))
            self.model.dit.init_weights()
            if config.init and not checkpoint and ranks.rank == 0:  # the first rank's weights are sent to all
                folder.start_from(self.model, config.init)
        self.tokenizer = self.space.tokenizer if config.condition == "text" else None
        self.lanes = choose_lanes(self.source, config.batch, config.lanes, math.ceil(ranks.world / ranks.local_world))
        config.lanes = config.lanes or self.lanes
        text_encoder = self.space.text_encoder
        self.shape = TextShape(text_encoder.config.positions if text_encoder is not None else 2, 2, config.captions)
        self.batches = TrainingBatches(
            self.source,
            self.tokenizer,
            BatchPlan(
                self.shape,
                config.size,
                config.batch,
                config.seed,
                pixel_share=0.0 if self.cache is not None else 1.0,
                micro_batch=config.micro_batch,
                family_balance=config.family_balance,
                lanes=self.lanes,
            ),
            labels=self.classes,
            ranks=ranks,
            latents=self.cache,
            workers=config.workers,
            pinned=start.device == "cuda",
            stopping=start.stopping,
        )
        self.batches.check_room(ranks.local_world)
        self.facts = {
            "samples": (len(self.source), self.source.key(0), self.source.key(len(self.source) - 1)),
            "held-out images": len(self.held_out),
            "tokens": self.space.sha256,
            "classes": digest(self.label_names),
            "latent cache": self.cache.sha256 if self.cache is not None else "",
        }
        if config.statistics and not checkpoint:
            self.model.statistics.set(self._moments())

    def _moments(self) -> Moments:
        """The moments of the tokens of the first `statistics` samples of the run, all ranks together."""
        config, ranks = self.config, self.start.ranks
        model = self.model.to(self.start.device)
        moments = Moments(*model.statistics.mean.shape)
        total = min(config.statistics, len(self.source))
        starts = range(ranks.rank * ROWS, total, ranks.world * ROWS)
        with distributed.together():
            for first in track(starts, "statistics of tokens") if ranks.rank == 0 else starts:
                rows, _ = self.batches.collate([self.batches.sample(position) for position in range(first, min(first + ROWS, total))])
                with autocast(self.start.device, self.start.precision):
                    moments.add(model.encode(to_device(rows, self.start.device)))
        return moments.over_ranks()

    def begin(self, run: RunFolder) -> None:
        config, source = self.config, self.source
        tokens, channels = self.model.statistics.mean.shape
        if self.classes is not None:
            shown = ", ".join(self.label_names[:5])
            run.say(f"{len(self.label_names)} classes: {shown}{' ...' if len(self.label_names) > 5 else ''}")
        run.say(f"{self.recipe}: {len(source):,} samples; {tokens} tokens of {channels} channels of {config.tokens}, times shifted by {self.model.shift:.3g}")
        if config.statistics:
            run.say(f"tokens are normalised by the statistics of {int(self.model.statistics.count):,} images")
        if self.about_cache:
            run.say(self.about_cache)
        if len(source) < config.batch:
            run.say(fewer_than_a_batch(len(source), config.batch))
        widest = max(config.dit.width, config.dit.head_width if config.dit.head_depth else 0)
        if widest < channels:
            run.say(f"no part of the network is as wide as the {channels} channels of a token, so the loss cannot reach its floor; see --dit.width")

    def evaluate(self, step: int, run: RunFolder) -> dict[str, float]:
        """The loss of held-out images, LEVELS times each, with noise that is the same in every evaluation; and a sheet of the first of them, drawn anew."""
        model, errors, problems = self.model, [], Problems()
        conditions: list[Condition] = []
        texts: list[str] = []
        for indices, keys, images, captions in shared_rows(self.held_out, self.config.size, problems):
            rows, entries, words = self._held_out_conditions(indices, keys, captions, problems)
            if not rows:
                continue
            batch = to_device({"images": images[rows], **entries}, self.start.device)
            condition, tokens = model.condition(batch), model.statistics.normalise(model.encode(batch))
            for level in range(LEVELS):
                t = flow.shift_time(tokens.new_full((len(rows),), (level + 0.5) / LEVELS), model.shift)
                draw_key = torch.tensor([draw_seed("held out", keys[place], level) for place in rows], device=tokens.device)
                errors.append(model.errors(tokens, normal(draw_key, tokens[0].numel()).view(tokens.shape), t, condition).cpu())
            conditions.append(condition)
            texts = texts or words  # of the rows of conditions[0], which the sheet shows
        self.batches.problems.extend(problems, everywhere=True)
        if not errors:
            return {"skipped": len(problems)}
        self._draw_sheet(step, run, conditions[0], texts)
        return {"loss": torch.cat(errors).mean().item()} | ({"skipped": len(problems)} if problems else {})

    def _held_out_conditions(
        self, indices: Sequence[int], keys: Sequence[str], captions: Sequence[Sequence[str]], problems: Problems
    ) -> tuple[list[int], dict[str, Tensor], list[str]]:
        """(rows that have a condition, its entries of their batch, the condition in words); the others are added to `problems`."""
        rows, labels, words = [], [], []
        for row, (index, key) in enumerate(zip(indices, keys, strict=True)):
            if self.classes is not None:
                try:
                    labels.append(self.classes.number(self.held_out, index))
                except ImageError as error:
                    problems.add(error.as_problem(key))
                    continue
                words.append(self.label_names[labels[-1]])
            elif self.tokenizer is not None:
                if not captions[row]:
                    problems.add({"key": key, "reason": "no caption", "detail": "missing or empty"})
                    continue
                words.append(captions[row][0])
            else:
                words.append("")
            rows.append(row)
        if self.classes is not None:
            return rows, {"labels": torch.tensor(labels)}, words
        if self.tokenizer is not None and rows:
            return rows, {"text_ids": self.tokenizer.text_ids(words, self.shape.text_positions)[:, None]}, words
        return rows, {}, words

    def _draw_sheet(self, step: int, run: RunFolder, condition: Condition, texts: Sequence[str]) -> None:
        """Draw the first DRAWN conditions; all ranks compute, one writes."""
        model, count = self.model, min(DRAWN, len(texts))
        first = Condition(*(value if value is None else value[:count] for value in condition))
        noise = noise_of(range(count), self.config.seed, (model.statistics.mean.shape[0], self.space.channels)).to(self.start.device)
        images = self.space.decode(model.draw(noise, first, Sampling(steps=25)), model.grid).clamp(-1, 1).cpu()
        if run.writes:
            path = run.path / "samples" / f"step-{step:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grid([pil_images(images)], [text[:24] for text in texts[:count]]).save(path)
            run.image(step, "val/sheet", path)

    def export(self, path: Path, weights: dict[str, Tensor], state: RunState) -> None:
        folder.save(path, self.model, self.label_names, training=self._record(state), weights=weights)

    def finish(self, state: RunState) -> None:
        self.model.eval()

    def _record(self, state: RunState) -> dict[str, Any]:
        config = self.config
        return {
            "recipe": self.recipe,
            "steps": state.step,
            "samples_seen": state.samples,
            "data": list(config.data or (self.cache.settings.data if self.cache is not None else ())),
            "only": list(config.only),
            "training_samples": len(self.source),
            "seconds": round(state.seconds),
            "precision": self.start.precision,
            "seed": config.seed,
            **({"latents": self.cache.sha256} if self.cache is not None else {}),
        }

    def _identities(self) -> dict[str, Any]:
        """{field of PLACES: digest}, "" for what is not read."""
        return {
            "data": data_digest(self.source),
            "val": data_digest(self.held_out),
            "latents": self.cache.sha256 if self.cache is not None else "",
            "tokens": self.space.sha256,
            "classes": digest(self.label_names),
        }
