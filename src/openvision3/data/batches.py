"""Batches of a source, in an order and with random draws that depend on (seed, epoch, sample) only.

Sample `position` of a run is entry `position % len` of the shuffle of epoch `position // len` (see `prepared` for the positions of a batch). With
lanes (see `order`), the positions of a batch are dealt to lanes in turn: the rows of a lane are neighbours, and the ranks of a machine have the same
lanes in every step.
A sample that cannot be used is replaced by another one of the epoch and reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from openvision3.data.captions import Captions, TextError
from openvision3.data.images import ImageError, damage_seen, to_tensor
from openvision3.data.labelled import Classes
from openvision3.data.order import Order
from openvision3.data.prepared import Collated, PreparedBatches
from openvision3.data.problems import Problem, Problems
from openvision3.data.sources import Source
from openvision3.data.text import TextTokenizer, sentences
from openvision3.distributed import Ranks
from openvision3.draws import draw_seed

if TYPE_CHECKING:
    from openvision3.data.latents.read import CachedView, LatentCache

FAMILY = 16
"""most samples of a family that `families` keeps side by side"""
TRIES = 256
"""samples tried for one row: a run survives nine unusable samples in ten, and stops with the reason if all are unusable"""
NEAR = 65_536
"""a replacement is drawn from so many neighbouring positions at first"""


class Sample(NamedTuple):
    """One row of a batch."""

    key: str
    """its sample key"""
    view: Tensor | CachedView
    """the image as uint8 (3, size, size), or its cached latents"""
    caption: str
    """the caption to predict"""
    texts: tuple[str, ...]
    """the captions to contrast"""
    problems: list[Problem]
    """of the samples that were tried before it"""
    label: int | None = None
    """the number of its class, where the batches have labels"""


@dataclass(frozen=True)
class TextShape:
    """How captions become ids."""

    text_positions: int
    caption_positions: int
    captions: int = 1
    """K, the number of captions to contrast for each image"""
    sentences: bool = False
    """contrast one random sentence of the caption to predict, not all of it"""
    whole: bool = True
    """with `sentences`, the whole caption fills in for captions that a sample lacks; False: these are marked absent"""


@dataclass(frozen=True)
class BatchPlan:
    """What the batches of a run hold. Equal plans give equal batches, however they are prepared."""

    text: TextShape
    """of batches with a tokenizer"""
    size: int
    """side of the images, in pixels"""
    batch: int
    """rows on all ranks"""
    seed: int
    _: KW_ONLY
    pixel_share: float = 1.0
    """the share of rows that get the pixel loss: every 1/share-th row of the global batch, shifted by one each step"""
    micro_batch: int = 0
    """rows that a rank computes at a time (0: all)"""
    families: bool = False
    """keep samples of a family side by side in every other epoch, so that the contrast has to distinguish them: in random order, two skin
    tones of an emoji are rarely in the same batch"""
    family_balance: float = 0.0
    """how far families count alike, see `GenerateConfig`; above 0 it orders every epoch"""
    lanes: int = 1
    """parts of the batch that each read their own remote shards (see `choose_lanes`)"""


class TrainingBatches(PreparedBatches):
    """The micro-batches of a source of images with captions (see `PreparedBatches`).

    With a cache of `latents`, batches hold latents, and only images whose pixels are compared are opened. With the classes of `labels`, they
    hold `labels` (B,), and a sample without a class is skipped. Without a `tokenizer`, they hold no text, and samples need no caption.

    Raises:
        ValueError: an empty source, or a batch that cannot be divided; while iterating, 256 samples in a row that cannot be used.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: TextTokenizer | None,
        plan: BatchPlan,
        *,
        labels: Classes | None = None,
        ranks: Ranks = Ranks(),
        latents: LatentCache | None = None,
        workers: int = 0,
        pinned: bool = False,
        stopping: Callable[[], object] = lambda: False,
    ):
        super().__init__(plan.batch, plan.micro_batch, ranks=ranks, workers=workers, pinned=pinned, stopping=stopping)
        if not 0 <= plan.pixel_share <= 1:
            raise ValueError(f"pixel_share {plan.pixel_share} must lie between 0 and 1")
        if plan.lanes < 1 or plan.batch % plan.lanes:
            raise ValueError(f"lanes {plan.lanes} do not divide the batch of {plan.batch}")
        if not len(source):
            raise ValueError("the data holds no sample; name a source that has some")
        self.source, self.tokenizer, self.plan, self.labels = source, tokenizer, plan, labels
        self.size, self.shape, self.latents = plan.size, plan.text, latents
        self.problems.extend(source.problems, everywhere=True)
        self._orders: dict[int, Order | np.ndarray] = {}
        self._families: list[list[int]] = []
        if plan.families or plan.family_balance:
            members: dict[str, list[int]] = {}
            for index in range(len(source)):
                members.setdefault(source.family(index), []).append(index)
            self._families = list(members.values())

    def index(self, position: int) -> int:
        return self.place(position)[0]

    def place(self, position: int) -> tuple[int, int]:
        """The index of the sample at `position` of the run, and the round of its source, for which its random view is drawn."""
        return self._at(self._entry(position))

    def _entry(self, position: int) -> int:
        """The entry of the epochs at `position`: entry v belongs to lane v % lanes, and lane l has the l-th of `lanes` equal parts of each batch."""
        step, row = divmod(position, self.batch)
        lane, number = divmod(row, self.batch // self.plan.lanes)
        return step * self.batch + number * self.plan.lanes + lane

    def _at(self, entry: int) -> tuple[int, int]:
        epoch, within = divmod(entry, len(self.source))
        order = self._orders.get(epoch)
        if order is None:
            rng = np.random.Generator(np.random.Philox(key=draw_seed(self.plan.seed, "order", epoch)))
            if self.plan.family_balance:
                order = self._balanced(rng)
            elif self.plan.families and epoch % 2:
                order = self._by_family(rng)
            else:
                order = self.source.order(self.plan.seed, epoch, self.plan.lanes)
            kept = list(self._orders.items())[-1:]  # a batch can reach into the next epoch
            self._orders = dict([*kept, (epoch, order)])
        return (int(order[within]), epoch) if isinstance(order, np.ndarray) else order.place(within)

    def _by_family(self, rng: np.random.Generator) -> np.ndarray:
        """A shuffle that keeps families together, at most FAMILY samples each."""
        pieces = []
        for family in self._families:
            mixed = rng.permutation(family)
            pieces += [mixed[i : i + FAMILY] for i in range(0, len(mixed), FAMILY)]
        return np.concatenate([pieces[i] for i in rng.permutation(len(pieces))])

    def _balanced(self, rng: np.random.Generator) -> np.ndarray:
        """An epoch of the usual length, in which a family of n samples has a share that grows as n^(1 - family_balance)."""
        shares = np.array([len(family) for family in self._families]) ** (1 - self.plan.family_balance)
        ends = np.cumsum(shares) * (len(self.source) / shares.sum())
        ends[-1] = len(self.source)
        counts = np.diff(np.floor(ends + rng.random()), prepend=0).astype(int)  # rounded at random, and their sum is that of the samples
        drawn = [np.resize(rng.permutation(family), count) for family, count in zip(self._families, counts, strict=True) if count]
        return rng.permutation(np.concatenate(drawn))

    def sample(self, position: int) -> Sample:
        """The sample at `position` of the run; if it cannot be used, the first usable one of its replacements."""
        problems: list[Problem] = []
        entry = self._entry(position)
        for attempt in range(TRIES):
            index, epoch = self._at(self._instead(entry, attempt) if attempt else entry)
            name = f"sample {index}"  # if its shard's index is lost, it has no key
            try:
                name = self.source.key(index)
                key = self.latents.key_of(self.source, index) if self.latents is not None else self.source.sample_key(index)
                generator = torch.Generator().manual_seed(draw_seed(self.plan.seed, epoch, key))
                captions = Captions()
                if self.tokenizer is not None:
                    captions = self.source.captions(index)
                    if not captions:
                        problems.append({"key": name, "reason": "no caption", "detail": "missing or empty"})
                        continue
                    captions = captions.led_by(draw_seed(self.plan.seed, "caption", epoch, key))
                label = self.labels.number(self.source, index) if self.labels is not None else None
                if self.latents is not None:
                    pixels = self._has_pixels(*divmod(position, self.batch))
                    view: Tensor | CachedView = self.latents.view(self.source, index, key=key, seed=self.plan.seed, epoch=epoch, pixels=pixels)
                else:
                    view = self.source.crop(index, self.size, generator)[0]
            except ImageError as error:
                problems.append(error.as_problem(name))
                damage_seen()  # what Pillow said of this image is not said of the next one
                continue
            if damage := damage_seen():
                problems.append({"key": name, **damage})
            caption, texts = (captions[0], self._choose_texts(captions, generator)) if captions else ("", ())
            return Sample(key, view, caption, texts, problems, label)
        raise ValueError(f"{TRIES} samples in a row cannot be used, the last because of: {problems[-1]['reason']} ({problems[-1]['detail']}); check the data")

    def _instead(self, entry: int, attempt: int) -> int:
        """A replacement from the same epoch: at first one nearby in the same lane, whose remote shards are in the cache, then any."""
        count = len(self.source)
        epoch, within = divmod(entry, count)
        first, last, lanes = 0, count, 1
        if attempt < TRIES // 2:
            first = within // NEAR * NEAR
            last, lanes = min(first + NEAR, count), self.plan.lanes
        drawn = first + draw_seed(self.plan.seed, "instead", entry, attempt) % (last - first)
        drawn += (within - drawn) % lanes  # the next entry of the lane, or the one before
        return epoch * count + (drawn if drawn < last else drawn - lanes)

    def _choose_texts(self, captions: Captions, generator: torch.Generator) -> tuple[str, ...]:
        """The texts to contrast: the first caption, and K - 1 others, drawn at random if there are more.

        With `sentences`, one random sentence replaces the first caption (as the paper does for long synthetic captions), and with
        `whole`, the whole caption fills in for others that the sample lacks.
        """
        first, others = captions[0], tuple(captions[1:])
        if len(others) >= self.shape.captions:
            picked = torch.randperm(len(others), generator=generator)[: self.shape.captions - 1].tolist()
            others = tuple(others[i] for i in picked)
        if not self.shape.sentences:
            return (first, *others)[: self.shape.captions]
        parts = sentences(first)
        part = parts[int(torch.randint(len(parts), (1,), generator=generator))]
        return (part, *others, *[first] * (self.shape.captions if self.shape.whole else 0))[: self.shape.captions]

    def collate(self, rows: list[Sample]) -> Collated:
        """Samples -> a batch, without the random draws of a step. Images stay uint8, a quarter of their size as floats."""
        batch = {
            **self._stack([row.view for row in rows]),
            **(self._texts(rows, self.tokenizer) if self.tokenizer is not None else {}),
            "sample_key": torch.tensor([draw_seed(row.key) for row in rows]),
        }
        if self.labels is not None:
            batch["labels"] = torch.tensor([row.label for row in rows])
        return batch, [problem for row in rows for problem in row.problems]

    def _texts(self, rows: list[Sample], tokenizer: TextTokenizer) -> dict[str, Tensor]:
        count = self.shape.captions
        texts = [text for row in rows for text in (*row.texts, *[""] * (count - len(row.texts)))]
        caption_ids = tokenizer.caption_ids([row.caption for row in rows], self.shape.caption_positions)
        return {
            "text_ids": tokenizer.text_ids(texts, self.shape.text_positions).unflatten(0, (len(rows), count)),
            "text_present": torch.tensor([[k < len(row.texts) for k in range(count)] for row in rows]),
            "caption_ids": caption_ids,
            "word_positions": (caption_ids[:, 1:] != tokenizer.pad_id).flatten().nonzero()[:, 0],
        }

    def _stack(self, views: list[Tensor | CachedView]) -> dict[str, Tensor]:
        images = [view for view in views if isinstance(view, Tensor)]
        if images:
            return {"images": torch.stack(images)}
        cached = [view for view in views if not isinstance(view, Tensor)]
        compared = [view.image for view in cached if view.image is not None]
        return {
            "latents": torch.stack([view.latents for view in cached]),
            "pixel_images": torch.stack(compared) if compared else self._no_images(),
        }

    def _no_images(self) -> Tensor:
        return torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)

    def add_draws(self, batch: dict[str, Tensor], step: int, rows: range) -> dict[str, Tensor]:
        """Add the random draws of a step: a noise seed for each row, and the rows whose pixels are compared."""
        batch["draw_key"] = torch.tensor([draw_seed(self.plan.seed, step, row) for row in rows])
        if not self.plan.pixel_share:
            batch["pixel_images"] = self._no_images()
        elif self.plan.pixel_share < 1 or "latents" in batch:
            chosen = [place for place, row in enumerate(rows) if self._has_pixels(step, row)]
            batch["pixel_rows"] = torch.tensor(chosen, dtype=torch.long)
        return batch

    def _has_pixels(self, step: int, row: int) -> bool:
        return math.floor((row + step) * self.plan.pixel_share) > math.floor((row + step - 1) * self.plan.pixel_share)


def to_device(batch: dict[str, Tensor], device: str | torch.device) -> dict[str, Tensor]:
    """Move a batch of `TrainingBatches` to a device, and scale its images from uint8 to [-1, 1]."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    return {name: to_tensor(value) if value.dtype == torch.uint8 else value for name, value in moved.items()}


def fewer_than_a_batch(samples: int, batch: int) -> str:
    """A warning for data with fewer samples than a batch has rows: batches are filled from further epochs."""
    least, rest = divmod(batch, samples)
    times = f"{least} or {least + 1} times" if rest else f"{least} times"
    return f"{samples} samples are fewer than a batch of {batch}: every step shows each of them {times} and contrasts it with its copies; see --batch"


def evaluation_batches(
    source: Source, size: int, batch: int, problems: Problems, indices: Iterable[int] | None = None
) -> Iterator[tuple[list[int], list[str], Tensor, list[tuple[str, ...]]]]:
    """(indices, keys, images, captions) of every usable sample in order, in the evaluation view; what is skipped goes to `problems`.

    `indices` names the samples to take (None: all). An image without usable captions stays, with (): it can be reconstructed, if not retrieved.
    """
    rows: list[tuple[int, str, Tensor, tuple[str, ...]]] = []
    for index in range(len(source)) if indices is None else indices:
        key, captions = source.key(index), Captions()
        try:
            try:
                captions = source.captions(index)
            except TextError as error:
                problems.add(error.as_problem(key))
            image = to_tensor(source.image(index, size))
        except ImageError as error:
            problems.add(error.as_problem(key))
            continue
        if damage := damage_seen():
            problems.add({"key": key, **damage})
        rows.append((index, key, image, captions))
        if len(rows) == batch:
            yield _columns(rows)
            rows = []
    if rows:
        yield _columns(rows)


def _columns(rows: list[tuple[int, str, Tensor, tuple[str, ...]]]) -> tuple[list[int], list[str], Tensor, list[tuple[str, ...]]]:
    indices, keys, images, captions = zip(*rows, strict=True)
    return list(indices), list(keys), torch.stack(images), list(captions)
