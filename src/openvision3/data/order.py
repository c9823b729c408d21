"""The order of an epoch as a function of (seed, epoch, position), without a list of all samples.

Each class answers `place(position) -> (index, round)`: which sample stands at `position` of the epoch, and which time
through its own source that is (the epoch itself, unless sources are mixed by weight). Nothing is kept that grows with the
number of samples: at 100 million of them a permutation in memory would be 800 MB in every process.

Where shards have to be fetched, positions are dealt to *lanes*: entry v of a run (position + epoch x length) belongs to lane v % lanes, and each
lane reads shards of its own. A machine whose rows of every batch are those of some lanes fetches their shards and no others.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

from openvision3.draws import draw_seed

ROUNDS = 8
"""of the Feistel network; with fewer, short lists look less than shuffled"""

_MASK = 2**64 - 1


class Order(Protocol):
    """One epoch of a source."""

    def place(self, position: int) -> tuple[int, int]:
        """The sample at `position`, and the round its random view is drawn from."""
        ...


def permuted(position: int, count: int, key: int) -> int:
    """Where the shuffle named `key` of `count` things puts `position`: a bijection of 0 .. count - 1.

    A Feistel network on pairs (a, b) with a x b just over `count`; what falls outside is sent on until it falls inside.
    """
    if not 0 <= position < count:
        raise IndexError(f"position {position} of {count}")
    keys = _round_keys(key)
    # At least 16 x 16: a network on a handful of values knows too few permutations of them.
    first = max(16, math.isqrt(count - 1) + 1)
    second = max(16, -(-count // first))
    while True:
        high, low = divmod(position, second)
        for number in range(0, ROUNDS, 2):
            high = (high + _mix(low ^ keys[number])) % first
            low = (low + _mix(high ^ keys[number + 1])) % second
        position = high * second + low
        if position < count:
            return position


@lru_cache(64)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(draw_seed("round", key, number) for number in range(ROUNDS))


def _mix(value: int) -> int:
    """64 bits in, 64 well mixed bits out (the finaliser of splitmix64)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


class Shuffle:
    """All of `count` samples once, in the random order of (seed, epoch)."""

    def __init__(self, count: int, seed: int, epoch: int):
        self.count, self.epoch, self.key = count, epoch, draw_seed(seed, "order", epoch)

    def place(self, position: int) -> tuple[int, int]:
        return permuted(position, self.count, self.key), self.epoch


class ShardShuffle:
    """All samples once, but only `window` shards at a time: shards are shuffled, then the samples within each window of them.

    For shards that have to be fetched: a plain shuffle would touch another shard with every sample. `starts` is the number of
    samples before each shard, and their sum at the end.

    With `lanes` the line of shuffled shards is cut into that many parts, one a lane, of as many samples as the lane has positions in the epoch. So
    every sample comes once whatever the sizes of shards, all lanes end an epoch together, and of each two neighbouring lanes at most one shard
    is read by both: where it was cut. Each lane goes through window // lanes shards at a time (at least one), on its own part of them.
    """

    def __init__(self, starts: Sequence[int], window: int, seed: int, epoch: int, lanes: int = 1):
        self.starts, self.window, self.epoch, self.key = starts, max(1, window // lanes), epoch, draw_seed(seed, "order", epoch)
        shards = len(starts) - 1
        self.shards = [permuted(i, shards, draw_seed(self.key, "shards")) for i in range(shards)]
        self.ends: list[int] = []
        total = 0
        for shard in self.shards:
            total += starts[shard + 1] - starts[shard]
            self.ends.append(total)
        self.lanes, self.before = lanes, epoch * total
        positions = (len(range((lane - self.before) % lanes, total, lanes)) for lane in range(lanes))
        self.cuts = [0, *itertools.accumulate(positions)]

    def place(self, position: int) -> tuple[int, int]:
        if not 0 <= position < self.ends[-1]:
            raise IndexError(f"position {position} of {self.ends[-1]}")
        lane = (self.before + position) % self.lanes
        position = self.cuts[lane] + position // self.lanes
        first = bisect.bisect_right(self.ends, position) // self.window * self.window
        last = min(first + self.window, len(self.shards)) - 1
        before = max(self.ends[first - 1] if first else 0, self.cuts[lane])
        after = min(self.ends[last], self.cuts[lane + 1])
        within = before + permuted(position - before, after - before, draw_seed(self.key, "window", first))
        number = bisect.bisect_right(self.ends, within, first)
        return self.starts[self.shards[number]] + within - (self.ends[number - 1] if number else 0), self.epoch


BLOCK = 4096
"""Samples within which the sources of a mix are shuffled among each other; each block holds its share of every source."""


class Mix:
    """An epoch of several sources by weight.

    It has as many samples as all sources together, of which source s gives `quotas(...)[s]`: its share of the weights. Each
    source is read in rounds of its own, every sample once before any comes twice, and goes on in the next epoch where this one
    left it. So a source whose share is smaller than itself is seen in part, and one whose share is larger more than once.
    Within every stretch of the epoch the shares hold too, to within one sample for each block of 4096.

    With `lanes` all of this is done with rows of `lanes` samples, one a lane, each lane shuffled by itself: the quotas are exact after `lanes` epochs,
    the shares hold to within a row or two for each block of 4096 samples, and the rounds of a source go through its own lanes. No sample
    comes twice in a round; but rounds end within epochs, also where each source has the weight of its size, so that about the end of a round an
    epoch holds some samples twice and others not at all.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], parts: Sequence[Callable[[int], Order]], seed: int, epoch: int, lanes: int = 1):
        """`parts[s](round)` is the order of source s in that round of its own, in the same lanes."""
        self.counts, self.parts, self.seed, self.epoch, self.lanes = counts, parts, seed, epoch, lanes
        self.quotas = quotas(sum(counts), weights)
        for count, quota, weight in zip(counts, self.quotas, weights, strict=True):
            if count and not quota:
                share = f"{weight:g} / {sum(weights):g} of the {sum(counts):,} samples of an epoch"
                raise ValueError(
                    f"weights {' '.join(f'{w:g}' for w in weights)}: {share} is less than one, so that source would never be seen; raise its weight"
                )
        self.total = sum(self.quotas)
        self.starts = [sum(counts[:s]) for s in range(len(counts))]
        self._orders: dict[tuple[int, int], Order] = {}

    def source(self, position: int) -> tuple[int, int]:
        """Which source gives the sample at `position`, and the how manieth of the run from that source it is."""
        row, lane = divmod(self.epoch * self.total + position, self.lanes)
        epoch, position = divmod(row, self.total)
        size = max(1, BLOCK // self.lanes)
        block, within = divmod(position, size)
        length = min(size, self.total - block * size)
        key = draw_seed(self.seed, "mix", epoch)
        position = block * size + permuted(within, length, draw_seed(key, block, lane) if self.lanes > 1 else draw_seed(key, block))
        rest = self.total
        for number, quota in enumerate(self.quotas):  # an even spread of the first over all, of the second over what is left ...
            taken, after = position * quota // rest, (position + 1) * quota // rest
            if after > taken:
                return number, (epoch * self.quotas[number] + taken) * self.lanes + lane
            position, rest = position - taken, rest - quota
        raise AssertionError("the last source takes all that is left")

    def place(self, position: int) -> tuple[int, int]:
        if not 0 <= position < self.total:
            raise IndexError(f"position {position} of {self.total}")
        number, taken = self.source(position)
        turn, within = divmod(taken, self.counts[number])
        order = self._orders.get((number, turn))
        if order is None:
            order = self._orders[number, turn] = self.parts[number](turn)
        index, turn = order.place(within)
        return self.starts[number] + index, turn


def quotas(total: int, weights: Sequence[float]) -> list[int]:
    """`total` things shared out by weight, in whole numbers that sum to it (largest remainders first)."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda s: (shares[s] - exact[s], s))
    for s in by_remainder[: total - sum(shares)]:
        shares[s] += 1
    return shares
