"""Micro-batches of any training, prepared ahead by worker processes or by a thread, from samples that depend on their position in the run alone.

The global batch of `step` holds positions step x batch to (step + 1) x batch; rank r of W has the r-th of W equal parts of it, cut into
micro-batches. So a run can continue from its step number, with any number of workers and ranks.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from typing import Any

from torch import Tensor

from openvision3.data.problems import Problem, Problems
from openvision3.data.workers import Workers, check_shared_memory, wait
from openvision3.distributed import Ranks

Collated = tuple[dict[str, Tensor], list[Problem]]
"""a batch, and the problems of its samples"""


def rows_of_a_process(batch: int, world: int, micro_batch: int) -> int:
    """Rows of each process. Raises ValueError if the batch cannot be divided among the processes, or their rows into micro-batches."""
    if batch < 1 or batch % world:
        raise ValueError(f"batch {batch} cannot be divided among {world} processes; choose a positive multiple of {world}, such as {_next(batch, world)}")
    local = batch // world
    if micro_batch < 0 or local % (micro_batch or local):
        raise ValueError(
            f"micro_batch {micro_batch} does not divide the {local} images of a process (batch {batch} / {world}); "
            f"choose one of 0, {', '.join(str(n) for n in range(1, local + 1) if local % n == 0)}"
        )
    return local


class PreparedBatches(ABC):
    """Endless micro-batches, `pieces` of them a step; `problems` collects the samples that were skipped.

    Images stay uint8 until `batches.to_device`. `pinned` puts batches into pinned memory, for asynchronous copies to a GPU.
    A wait for a batch ends soon after `stopping()` becomes true.

    Raises:
        ValueError: a batch that cannot be divided.
    """

    def __init__(
        self,
        batch: int,
        micro_batch: int = 0,
        *,
        ranks: Ranks = Ranks(),
        workers: int = 0,
        pinned: bool = False,
        stopping: Callable[[], object] = lambda: False,
    ):
        local = rows_of_a_process(batch, ranks.world, micro_batch)
        self.batch, self.workers, self.pinned = batch, workers, pinned
        self.stopping, self._processes = stopping, Workers(self, workers, stopping)
        self.rows = range(ranks.rank * local, (ranks.rank + 1) * local)
        self.pieces = local // (micro_batch or local)
        self.problems = Problems()

    @abstractmethod
    def sample(self, position: int) -> Any:
        """The sample at `position` of the run."""

    @abstractmethod
    def collate(self, rows: list[Any]) -> Collated:
        """Samples -> a batch, without the random draws of a step."""

    def add_draws(self, batch: dict[str, Tensor], step: int, rows: range) -> dict[str, Tensor]:
        """Add the random draws of a step to these rows of its batch."""
        return batch

    def __getitem__(self, number: int) -> Collated | Exception:
        """Micro-batch `number` of this rank. An error is returned, not raised, so that threads and processes pass it on alike."""
        step, rows = self._place(number)
        try:
            return self.collate([self.sample(step * self.batch + row) for row in rows])
        except Exception as error:  # from_step raises it
            return error

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"stopping": None, "_processes": None, "problems": Problems()}  # not needed in workers, and cannot be pickled

    @property
    def lost_workers(self) -> int:
        """the number of worker processes that died and were replaced"""
        return self._processes.deaths

    def check_room(self, processes: int = 1) -> None:
        """Read a sample, and check that batches of that size fit into the shared memory, which `processes` like this one use.

        Raises:
            ValueError: no sample can be used, or there is too little shared memory.
        """
        batch, _ = self.collate([self.sample(self.rows.start)])  # its own row: for another, a shard would be fetched in vain
        rows = len(self.rows) // self.pieces
        check_shared_memory(rows * sum(value.nbytes for value in batch.values()), self.workers, held=self.pieces, processes=processes)

    def _place(self, number: int) -> tuple[int, range]:
        """Micro-batch `number` -> its step, and its rows of the global batch."""
        step, piece = divmod(number, self.pieces)
        count = len(self.rows) // self.pieces
        return step, self.rows[piece * count : (piece + 1) * count]

    def from_step(self, first_step: int) -> Iterator[dict[str, Tensor]]:
        """The micro-batches from step `first_step` on, prepared ahead by worker processes, or by a thread."""
        first = first_step * self.pieces
        prepared = self._processes.make(itertools.count(first)) if self.workers else self._from_thread(first)
        with contextlib.closing(prepared):
            for number, item in enumerate(prepared, first):
                if isinstance(item, Exception):
                    raise item
                batch, problems = item
                self.problems.extend(problems)
                batch = self.add_draws(batch, *self._place(number))
                yield _pin(batch) if self.pinned else batch

    def _from_thread(self, first: int, ahead: int = 2) -> Generator[Collated | Exception, None, None]:
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
                item = self[number]
                put((_pin(item[0]), item[1]) if self.pinned and not isinstance(item, Exception) else item)

        thread = threading.Thread(target=work, name="batches", daemon=True)
        thread.start()
        try:
            while True:
                yield wait(lambda seconds: ready.get(timeout=seconds), self.stopping)
        finally:
            stop.set()
            thread.join(5)  # a disk that does not answer must not block the end


def _pin(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.pin_memory() for name, value in batch.items()}  # does not copy what is pinned


def _next(batch: int, world: int) -> int:
    return max(1, math.ceil(batch / world)) * world
