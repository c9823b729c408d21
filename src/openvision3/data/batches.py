"""A source -> batches, in an order and with random draws that are functions of (seed, epoch, sample) alone.

Sample `position` of a run is entry `position % len` of the shuffle of epoch `position // len`; the global batch of `step` holds
positions step x batch to (step + 1) x batch, and rank r of W the r-th of W equal parts of it, cut into micro-batches. So a run goes
on from its step number alone, with any number of workers and ranks. With lanes (see `order`) a batch's positions are dealt to its rows in turn:
each lane has rows side by side, and the ranks of a machine the same few lanes in every step.
A sample that cannot be used is replaced by another one of the epoch, and reported.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from openvision3.data.captions import Captions, TextError
from openvision3.data.images import ImageError, damage_seen, to_tensor
from openvision3.data.order import Order
from openvision3.data.problems import Problem, Problems
from openvision3.data.sources import Source
from openvision3.data.text import TextTokenizer, sentences
from openvision3.data.workers import Workers, check_shared_memory, wait
from openvision3.distributed import Ranks
from openvision3.draws import draw_seed

if TYPE_CHECKING:
    from openvision3.data.latents.read import CachedView, LatentCache

FAMILY = 16
TRIES = 256
"""Samples tried for one place in a batch: a run survives nine broken samples in ten, and stops with the reason where all are broken."""
NEAR = 65_536
"""Positions among which a replacement is sought at first."""

Sample = tuple[str, "Tensor | CachedView", str, tuple[str, ...], list[Problem]]
"""sample key, image as uint8 (or what a cache has in its place), caption to predict, texts to contrast, problems met on the way"""
Made = tuple[dict[str, Tensor], list[Problem]]
"""a batch and the problems met on the way"""


@dataclass(frozen=True)
class TextShape:
    """How captions become ids."""

    text_positions: int
    caption_positions: int
    captions: int = 1
    """K, how many captions an image are contrasted"""
    sentences: bool = False
    """the caption to predict is contrasted as one random sentence of it"""
    whole: bool = True
    """with `sentences`, the whole of it fills in for other captions that a sample lacks; False: they are marked absent"""


@dataclass(frozen=True)
class BatchPlan:
    """What the batches of a run hold: equal plans give equal batches, however they are prepared."""

    text: TextShape
    size: int
    """side of the images, in pixels"""
    batch: int
    """rows on all ranks"""
    seed: int
    pixel_share: float = 1.0
    """the share of rows that get the pixel loss: every 1/share-th row of the global batch, moved on by one a step"""
    micro_batch: int = 0
    """rows of a rank that are computed at a time (0: all)"""
    families: bool = False
    """every other epoch keeps samples of one family side by side, so that the contrast has to tell them apart: at random, two skin tones of one
    emoji hardly ever meet in a batch"""
    lanes: int = 1
    """parts of the batch that read remote shards of their own (`choose_lanes`)"""


def rows_of_a_process(batch: int, world: int, micro_batch: int) -> int:
    """Raises ValueError where the batch cannot be divided among the processes, or a process's share into micro-batches."""
    if batch < 1 or batch % world:
        raise ValueError(f"batch {batch} cannot be divided among {world} processes; legal are positive multiples of {world}, such as {_next(batch, world)}")
    local = batch // world
    if micro_batch < 0 or local % (micro_batch or local):
        raise ValueError(
            f"micro_batch {micro_batch} does not divide the {local} pictures of a process (batch {batch} / {world}); "
            f"legal are 0 and {', '.join(str(n) for n in range(1, local + 1) if local % n == 0)}"
        )
    return local


class TrainingBatches:
    """Endless micro-batches from `first_step` on, `pieces` of them a step; `problems` collects what was skipped, each sample once.

    With a cache of `latents` these stand in the batch, and only images whose pixels are compared are opened.
    Images are uint8 until `to_device`; `pinned` batches lie where a GPU fetches them from while the host goes on.
    A wait for a batch ends soon after `stopping()` says that the run was asked to stop.

    Raises:
        ValueError: an empty source or a batch that cannot be divided so; while iterating, when 256 samples in a row cannot be used.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: TextTokenizer,
        plan: BatchPlan,
        *,
        ranks: Ranks = Ranks(),
        latents: LatentCache | None = None,
        workers: int = 0,
        pinned: bool = False,
        stopping: Callable[[], object] = lambda: False,
    ):
        local = rows_of_a_process(plan.batch, ranks.world, plan.micro_batch)
        if not 0 <= plan.pixel_share <= 1:
            raise ValueError(f"pixel_share {plan.pixel_share} must lie between 0 and 1")
        if plan.lanes < 1 or plan.batch % plan.lanes:
            raise ValueError(f"lanes {plan.lanes} do not divide the batch of {plan.batch}")
        if not len(source):
            raise ValueError("the data holds no sample; name a source that has some")
        self.source, self.tokenizer, self.plan = source, tokenizer, plan
        self.batch, self.size, self.shape = plan.batch, plan.size, plan.text
        self.workers, self.latents, self.pinned = workers, latents, pinned
        self.stopping, self._processes = stopping, Workers(self, workers, stopping)
        self.rows = range(ranks.rank * local, (ranks.rank + 1) * local)
        self.pieces = local // (plan.micro_batch or local)
        self.problems = Problems()
        self.problems.extend(source.problems, everywhere=True)
        self._orders: dict[int, Order | np.ndarray] = {}
        self._families: list[list[int]] = []
        if plan.families:
            members: dict[str, list[int]] = {}
            for index in range(len(source)):
                members.setdefault(source.family(index), []).append(index)
            self._families = list(members.values())

    def index(self, position: int) -> int:
        return self.place(position)[0]

    def place(self, position: int) -> tuple[int, int]:
        """The sample at `position` of the run, and which time through its source that is: what its random view is drawn from."""
        return self._at(self._entry(position))

    def _entry(self, position: int) -> int:
        """Which entry of the epochs stands at `position`: entry v is of lane v % lanes, and lane l has the l-th of `lanes` equal parts of each batch."""
        step, row = divmod(position, self.batch)
        lane, number = divmod(row, self.batch // self.plan.lanes)
        return step * self.batch + number * self.plan.lanes + lane

    def _at(self, entry: int) -> tuple[int, int]:
        epoch, within = divmod(entry, len(self.source))
        order = self._orders.get(epoch)
        if order is None:
            if self._families and epoch % 2:
                order = self._by_family(np.random.Generator(np.random.Philox(key=draw_seed(self.plan.seed, "order", epoch))))
            else:
                order = self.source.order(self.plan.seed, epoch, self.plan.lanes)
            kept = list(self._orders.items())[-1:]  # each lane of a batch goes from one epoch into the next
            self._orders = dict([*kept, (epoch, order)])
        return (int(order[within]), epoch) if isinstance(order, np.ndarray) else order.place(within)

    def _by_family(self, rng: np.random.Generator) -> np.ndarray:
        """A shuffle that keeps families together, in pieces of at most FAMILY."""
        pieces = []
        for family in self._families:
            mixed = rng.permutation(family)
            pieces += [mixed[i : i + FAMILY] for i in range(0, len(mixed), FAMILY)]
        return np.concatenate([pieces[i] for i in rng.permutation(len(pieces))])

    def sample(self, position: int) -> Sample:
        """The sample at `position` of the run, or where it cannot be used the first usable of those drawn instead."""
        problems: list[Problem] = []
        entry = self._entry(position)
        for attempt in range(TRIES):
            index, epoch = self._at(self._instead(entry, attempt) if attempt else entry)
            name = f"sample {index}"  # until the source, which may have lost its index, says its name
            try:
                name = self.source.key(index)
                key = self.latents.key_of(self.source, index) if self.latents is not None else self.source.sample_key(index)
                generator = torch.Generator().manual_seed(draw_seed(self.plan.seed, epoch, key))
                captions = self.source.captions(index)
                if not captions:
                    problems.append({"key": name, "reason": "no caption", "detail": "missing or empty"})
                    continue
                captions = captions.led_by(draw_seed(self.plan.seed, "caption", epoch, key))
                if self.latents is not None:
                    pixels = self._has_pixels(*divmod(position, self.batch))
                    view: Tensor | CachedView = self.latents.view(self.source, index, key=key, seed=self.plan.seed, epoch=epoch, pixels=pixels)
                else:
                    view = self.source.crop(index, self.size, generator)[0]
            except ImageError as error:
                problems.append(error.as_problem(name))
                continue
            if damage := damage_seen():
                problems.append({"key": name, **damage})
            return key, view, captions[0], self._choose(captions, generator), problems
        raise ValueError(f"{TRIES} samples in a row cannot be used, the last because of: {problems[-1]['reason']} ({problems[-1]['detail']}); check the data")

    def _instead(self, entry: int, attempt: int) -> int:
        """Another entry of the same epoch: near by and of the same lane at first, where remote shards are at hand, then anywhere."""
        count = len(self.source)
        epoch, within = divmod(entry, count)
        first, last, lanes = 0, count, 1
        if attempt < TRIES // 2:
            first = within // NEAR * NEAR
            last, lanes = min(first + NEAR, count), self.plan.lanes
        drawn = first + draw_seed(self.plan.seed, "instead", entry, attempt) % (last - first)
        drawn += (within - drawn) % lanes  # the next of the lane, or the one before
        return epoch * count + (drawn if drawn < last else drawn - lanes)

    def _choose(self, captions: Captions, generator: torch.Generator) -> tuple[str, ...]:
        """What is contrasted: the first caption and K - 1 others, drawn where there are more.

        With `sentences` one random sentence stands for the first caption (paper: long synthetic captions), and with `whole` the
        whole of it fills in for others that the sample lacks.
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

    def collate(self, rows: list[Sample]) -> Made:
        count = self.shape.captions
        texts = [(*contrasted, *[""] * (count - len(contrasted))) for _, _, _, contrasted, _ in rows]
        flat = self.tokenizer.text_ids([t for row in texts for t in row], self.shape.text_positions)
        """Samples -> a batch, without the draws of a step. Images stay as they are: uint8 is a quarter of what a model sees (`to_device`)."""
        caption_ids = self.tokenizer.caption_ids([caption for _, _, caption, _, _ in rows], self.shape.caption_positions)
        batch = {
            **self._pictures([view for _, view, *_ in rows]),
            "text_ids": flat.unflatten(0, (len(rows), count)),
            "text_present": torch.tensor([[k < len(contrasted) for k in range(count)] for _, _, _, contrasted, _ in rows]),
            "caption_ids": caption_ids,
            "word_positions": (caption_ids[:, 1:] != self.tokenizer.pad_id).flatten().nonzero()[:, 0],
            "sample_key": torch.tensor([draw_seed(key) for key, *_ in rows]),
        }
        return batch, [problem for *_, problems in rows for problem in problems]

    def _pictures(self, views: list[Tensor | CachedView]) -> dict[str, Tensor]:
        images = [view for view in views if isinstance(view, Tensor)]
        if images:
            return {"images": torch.stack(images)}
        cached = [view for view in views if not isinstance(view, Tensor)]
        compared = [view.image for view in cached if view.image is not None]
        shown = torch.stack(compared) if compared else self._no_images()
        return {"latents": torch.stack([view.latents for view in cached]), "pixel_images": shown}

    def _no_images(self) -> Tensor:
        return torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)

    def __getitem__(self, number: int) -> Made | Exception:
        """Micro-batch `number` of this rank; an error is returned, so that it reaches the consumer in one line from a thread or a process alike."""
        step, rows = self._place(number)
        try:
            return self.collate([self.sample(step * self.batch + row) for row in rows])
        except Exception as error:  # from_step raises it
            return error

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"stopping": None, "_processes": None, "problems": Problems()}  # which a worker that is not forked neither needs nor gets

    @property
    def lost_workers(self) -> int:
        """Worker processes that died and were replaced."""
        return self._processes.deaths

    def check_room(self, processes: int = 1) -> None:
        """Read a sample, and see that batches of such samples fit into the memory that workers of `processes` like this one share.

        Raises:
            ValueError: no sample can be used, or there is too little room.
        """
        batch, _ = self.collate([self.sample(self.rows.start)])  # of its own: the shard of another would be fetched for nothing
        rows = len(self.rows) // self.pieces
        check_shared_memory(rows * sum(value.nbytes for value in batch.values()), self.workers, held=self.pieces, processes=processes)

    def _place(self, number: int) -> tuple[int, range]:
        """Micro-batch `number` -> its step, and its rows of the global batch."""
        step, piece = divmod(number, self.pieces)
        count = len(self.rows) // self.pieces
        return step, self.rows[piece * count : (piece + 1) * count]

    def add_draws(self, batch: dict[str, Tensor], step: int, rows: range) -> dict[str, Tensor]:
        """The random draws of the step: a noise seed for each row, and the rows whose pixels are compared."""
        batch["draw_key"] = torch.tensor([draw_seed(self.plan.seed, step, row) for row in rows])
        if not self.plan.pixel_share:
            batch["pixel_images"] = self._no_images()
        elif self.plan.pixel_share < 1 or "latents" in batch:
            chosen = [place for place, row in enumerate(rows) if self._has_pixels(step, row)]
            batch["pixel_rows"] = torch.tensor(chosen, dtype=torch.long)
        return batch

    def _has_pixels(self, step: int, row: int) -> bool:
        return math.floor((row + step) * self.plan.pixel_share) > math.floor((row + step - 1) * self.plan.pixel_share)

    def from_step(self, first_step: int) -> Iterator[dict[str, Tensor]]:
        """The micro-batches of step `first_step`, `first_step` + 1, ... prepared ahead by worker processes, or by a thread."""
        first = first_step * self.pieces
        made = self._processes.make(itertools.count(first)) if self.workers else self._from_thread(first)
        with contextlib.closing(made):
            for number, item in enumerate(made, first):
                if isinstance(item, Exception):
                    raise item
                batch, problems = item
                self.problems.extend(problems)
                batch = self.add_draws(batch, *self._place(number))
                yield _pin(batch) if self.pinned else batch

    def _from_thread(self, first: int, ahead: int = 2) -> Generator[Made | Exception, None, None]:
        ready: queue.Queue = queue.Queue(ahead)
        stop = threading.Event()

        def put(item: object) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.2)
                except queue.Full:
                    continue

        def work() -> None:
            for number in itertools.count(first):
                if stop.is_set():
                    return
                made = self[number]
                put((_pin(made[0]), made[1]) if self.pinned and not isinstance(made, Exception) else made)

        thread = threading.Thread(target=work, name="batches", daemon=True)
        thread.start()
        try:
            while True:
                yield wait(lambda seconds: ready.get(timeout=seconds), self.stopping)
        finally:
            stop.set()
            thread.join(5)  # and no longer for a disk that gives nothing


def _pin(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.pin_memory() for name, value in batch.items()}  # what is pinned already stays


def to_device(batch: dict[str, Tensor], device: str | torch.device) -> dict[str, Tensor]:
    """A batch of `TrainingBatches` as a model takes it: on the device, and images, which travel as uint8, in [-1, 1]."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    return {name: to_tensor(value) if value.dtype == torch.uint8 else value for name, value in moved.items()}


def _next(batch: int, world: int) -> int:
    return max(1, math.ceil(batch / world)) * world


def fewer_than_a_batch(samples: int, batch: int) -> str:
    """What a step looks like where the data hold fewer samples than a batch has rows: it is filled from further epochs."""
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
