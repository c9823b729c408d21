"""The pictures of an evaluation: this rank's share of them in batches, and results of all ranks back in one order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from openvision3 import distributed
from openvision3.data.batches import evaluation_batches
from openvision3.data.shards import Source

T = TypeVar("T")
Watch = Callable[[Any, str, int], Any]


def _plain(items: Any, what: str, total: int) -> Any:
    return items


class Batch(NamedTuple):
    """Usable pictures in the evaluation view, and where they stand in the source."""

    indices: list[int]
    keys: list[str]
    images: Tensor
    """(B, 3, size, size) in [-1, 1]"""
    captions: list[tuple[str, ...]]


@dataclass
class Pictures:
    """Some pictures of a source, all of one size. Each is seen by one rank, once; what cannot be read is listed in `problems`."""

    source: Source
    size: int
    batch: int = 32
    indices: Sequence[int] | None = None
    """which of the source; None: all"""
    watch: Watch = _plain
    """shows progress: (batches, what, how many)"""
    problems: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"batch {self.batch} must be at least 1")
        if self.size < 16 or self.size % 16:
            raise ValueError(f"size {self.size} must be a multiple of 16, such as {max(16, round(self.size / 16) * 16)}")

    @property
    def chosen(self) -> Sequence[int]:
        return range(len(self.source)) if self.indices is None else self.indices

    def subset(self, indices: Sequence[int]) -> Pictures:
        """These pictures of the same source."""
        return Pictures(self.source, self.size, self.batch, indices, self.watch, self.problems)

    def batches(self, what: str) -> Iterator[Batch]:
        """This rank's pictures, a run of neighbours."""
        chosen, world, rank = self.chosen, distributed.world(), distributed.rank()
        mine = chosen[len(chosen) * rank // world : len(chosen) * (rank + 1) // world]
        found: list[dict[str, str]] = []
        rows = evaluation_batches(self.source, self.size, self.batch, found, mine)
        for row in self.watch(rows, what, -(-len(mine) // self.batch)):
            yield Batch(*row)
        for each in found:
            if each not in self.problems:
                self.problems.append(each)

    def collect(self, what: str, function: Callable[[Batch], Sequence[T]]) -> dict[int, T]:
        """What `function` says of each usable picture, by its index, in the order of the pictures, on every rank.

        Raises:
            OtherRankFailed: another rank has failed, and says why.
        """
        found: list[tuple[int, T]] = []
        with distributed.together():
            for batch in self.batches(what):
                said = function(batch)
                if len(said) != len(batch.indices):
                    raise ValueError(f"{what}: {len(said)} results for {len(batch.indices)} pictures")
                found += zip(batch.indices, said, strict=True)
        everywhere = distributed.gather_objects(found)
        self.share_problems()
        return dict(sorted((pair for part in everywhere for pair in part), key=lambda pair: pair[0]))

    def share_problems(self) -> None:
        """All ranks know what any of them could not read."""
        self.problems[:] = list({str(each): each for part in distributed.gather_objects(self.problems) for each in part}.values())

    def digest(self, keys: Sequence[str]) -> str:
        """sha256 of the keys of the pictures that were used: two evaluations with the same have seen pictures of the same names."""
        return sha256("\n".join(sorted(keys)).encode("utf-8", "replace")).hexdigest()
