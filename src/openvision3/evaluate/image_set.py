"""The images of an evaluation: this rank's share of them in batches, and results of all ranks back in one order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from openvision3 import distributed
from openvision3.data.batches import evaluation_batches
from openvision3.data.crops import check_size
from openvision3.data.fingerprint import WIDTH, describe
from openvision3.data.images import to_uint8
from openvision3.data.problems import Problems
from openvision3.data.sources import Source

T = TypeVar("T")
Watch = Callable[[Any, str, int], Any]
"""Shows progress: (items, label, number of items) -> the items."""


def without_progress(items: Any, what: str, total: int) -> Any:
    return items


class Batch(NamedTuple):
    """Readable images in the evaluation view, and their indices in the source."""

    indices: list[int]
    keys: list[str]
    images: Tensor
    """(B, 3, size, size) in [-1, 1]"""
    captions: list[tuple[str, ...]]


class Rows(NamedTuple):
    """The values computed from each readable image of all ranks, in the order of the images."""

    indices: list[int]
    captions: list[tuple[str, ...]]
    values: Tensor
    """(N, ...) on the CPU"""


@dataclass
class ImageSet:
    """Some images of a source, all of one size. One rank reads each image, once; unreadable images are listed in `problems`."""

    source: Source
    size: int
    batch: int = 32
    indices: Sequence[int] | None = None
    """indices in the source; None: all"""
    watch: Watch = without_progress
    problems: Problems = field(default_factory=Problems)
    digests: dict[int, str] = field(default_factory=dict)
    """sha256 of the view of each image read so far, by index"""
    described: dict[int, bytes] = field(default_factory=dict)
    """descriptor of each image for finding near-duplicates, by index; see data/fingerprint.py"""

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"batch {self.batch} must be at least 1")
        check_size(self.size)

    @property
    def chosen(self) -> Sequence[int]:
        return range(len(self.source)) if self.indices is None else self.indices

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """These images of the same source."""
        return ImageSet(self.source, self.size, self.batch, indices, self.watch, self.problems, self.digests, self.described)

    def resized(self, size: int) -> ImageSet:
        """The same images at another size."""
        return ImageSet(self.source, size, self.batch, self.indices, self.watch, self.problems)

    def batches(self, what: str) -> Iterator[Batch]:
        """This rank's contiguous share of the images, in batches."""
        chosen, world, rank = self.chosen, distributed.world(), distributed.rank()
        mine = chosen[len(chosen) * rank // world : len(chosen) * (rank + 1) // world] if world > 1 else chosen
        rows = evaluation_batches(self.source, self.size, self.batch, self.problems, mine)
        for row in self.watch(rows, f"{what}, {self.batch} at a time", -(-len(mine) // self.batch)):
            batch = Batch(*row)
            new = [row for row, index in enumerate(batch.indices) if index not in self.digests]
            for row, descriptor in zip(new, describe(batch.images[new]), strict=True):
                self.digests[batch.indices[row]] = sha256(to_uint8(batch.images[row]).numpy().tobytes()).hexdigest()
                self.described[batch.indices[row]] = descriptor.numpy().tobytes()
            yield batch

    def collect(self, what: str, function: Callable[[Batch], Sequence[T]]) -> dict[int, T]:
        """Apply `function` to each batch. Returns the result of each readable image by its index, in order, on every rank.

        Raises:
            OtherRankFailed: another rank failed; it reports the cause.
        """
        results_here: list[tuple[int, T]] = []
        with distributed.together():
            for batch in self.batches(what):
                results = function(batch)
                if len(results) != len(batch.indices):
                    raise ValueError(f"{what}: {len(results)} results for {len(batch.indices)} images")
                results_here += zip(batch.indices, results, strict=True)
        results_by_rank = distributed.gather_objects(results_here)
        self.share()
        return dict(sorted((pair for part in results_by_rank for pair in part), key=lambda pair: pair[0]))

    def collect_rows(self, what: str, function: Callable[[Tensor], Tensor]) -> Rows:
        """Like `collect`, for a function that returns one row of numbers per image. Raises OtherRankFailed."""
        parts: list[Tensor] = []
        captioned: list[tuple[int, tuple[str, ...]]] = []
        with distributed.together(), torch.no_grad():
            for batch in self.batches(what):
                parts.append(function(batch.images).float().cpu())
                captioned += zip(batch.indices, batch.captions, strict=True)
                if len(parts[-1]) != len(batch.indices):
                    raise ValueError(f"{what}: {len(parts[-1])} results for {len(batch.indices)} images")
        widths = [tuple(part.shape[1:]) for part in parts[:1]]
        shape = next((width for widths_of_rank in distributed.gather_objects(widths) for width in widths_of_rank), ())
        values = distributed.gather_rows(torch.cat([torch.zeros(0, *shape), *parts]))
        captioned_images = [pair for part in distributed.gather_objects(captioned) for pair in part]
        self.share()
        order = sorted(range(len(captioned_images)), key=lambda i: captioned_images[i][0])
        return Rows([captioned_images[i][0] for i in order], [captioned_images[i][1] for i in order], values[order])

    def share(self) -> None:
        """Give every rank the problems, digests and descriptors of all ranks."""
        parts = distributed.gather_objects((self.problems, self.digests, self.described))
        for problems, digests, described in parts:
            self.problems.extend(problems)
            self.digests.update(digests)
            self.described.update(described)

    def descriptions(self, indices: Sequence[int]) -> Tensor:
        """Descriptors of these images for finding near-duplicates: (n, bytes) uint8."""
        rows = [torch.frombuffer(bytearray(self.described[index]), dtype=torch.uint8) for index in indices]
        return torch.stack(rows) if rows else torch.zeros(0, WIDTH, dtype=torch.uint8)

    def digest(self, indices: Sequence[int]) -> str:
        """sha256 over the views of these images. It does not depend on their names or paths."""
        return sha256("\n".join(self.digests[index] for index in sorted(indices)).encode()).hexdigest()


def on_first(compute: Callable[[], T]) -> T:
    """Compute on rank 0 and return the result on every rank; all ranks fail together."""
    results: list[T] = []
    with distributed.together():
        if distributed.rank() == 0 or distributed.world() == 1:
            results.append(compute())
    return distributed.from_first(results)[0]
