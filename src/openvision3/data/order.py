"""The order of an epoch as a function of (seed, epoch, position), without a list of all samples.

Each class has `place(position) -> (index, round)`: the sample at `position` of the epoch, and how often its source has been gone
through before (the epoch, unless sources are mixed by weight). Memory does not grow with the number of samples: a permutation of
100 million would take 800 MB in every process.

Positions of remote shards are dealt to *lanes*: entry v of a run (position + epoch x length) belongs to lane v % lanes, and each lane
reads its own shards. A machine whose batch rows belong to certain lanes fetches the shards of these lanes only.
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
"""of the Feistel network; with fewer, short lists are not well shuffled"""

_MASK = 2**64 - 1


class Order(Protocol):
    """One epoch of a source."""

    def place(self, position: int) -> tuple[int, int]:
        """The sample at `position`, and the round that its random view is drawn for."""
        ...


def permuted(position: int, count: int, key: int) -> int:
    """Where the permutation `key` of 0 .. count - 1 puts `position`.

    A Feistel network on pairs (a, b) with a x b just above `count`, applied again to results outside of the range.
    """
    if not 0 <= position < count:
        raise IndexError(f"position {position} of {count}")
    keys = _round_keys(key)
    # At least 16 x 16: on few values the network has too few permutations.
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
    """64 bits -> 64 well mixed bits (the finaliser of splitmix64)."""
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

    For remote shards: a plain shuffle would read another shard for every sample. `starts` has the number of samples before each
    shard, and the number of all samples at the end.

    With `lanes`, the sequence of shuffled shards is cut into one part per lane, with as many samples as the lane has positions in the
    epoch. So every sample comes once whatever the sizes of the shards, all lanes end an epoch together, and two neighbouring lanes share at
    most the one shard in which they were cut. Each lane reads its part of window // lanes shards at a time (at least one).
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
"""samples in which the sources of a mix are shuffled together; each block holds its share of every source"""


class Mix:
    """An epoch of several sources by weight.

    It has as many samples as all sources together; source s gives `quotas(...)[s]` of them, its share of the weights. Each source
    is read in its own rounds, every sample once before any comes again, and continues in the next epoch where this one stopped. So an
    epoch shows a part of a source that is larger than its share, and a smaller one more than once. The shares also hold within the
    epoch, to within one sample in each block of 4096.

    With `lanes`, all of this is done with rows of `lanes` samples, one per lane, and each lane is shuffled by itself. The quotas are exact
    after `lanes` epochs, the shares hold to within two rows in each block of 4096 samples, and the rounds of a source go through its own
    lanes. No sample comes twice in a round, but rounds end within epochs, even if each weight is the size of its source: around the end of
    a round, an epoch holds some samples twice and others not at all.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], parts: Sequence[Callable[[int], Order]], seed: int, epoch: int, lanes: int = 1):
        """`parts[s](round)` is the order of source s in its round `round`, in the same lanes."""
        self.counts, self.parts, self.seed, self.epoch, self.lanes = counts, parts, seed, epoch, lanes
        self.quotas = quotas(sum(counts), weights)
        for count, quota, weight in zip(counts, self.quotas, weights, strict=True):
            if count and not quota:
                share = f"{weight:g} / {sum(weights):g} of the {sum(counts):,} samples of an epoch"
                raise ValueError(
                    f"weights {' '.join(f'{w:g}' for w in weights)}: {share} is less than one, so this source would never be read; raise its weight"
                )
        self.total = sum(self.quotas)
        self.starts = [sum(counts[:s]) for s in range(len(counts))]
        self._orders: dict[tuple[int, int], Order] = {}

    def source(self, position: int) -> tuple[int, int]:
        """Which source the sample at `position` comes from, and its position among the samples of the run from this source."""
        row, lane = divmod(self.epoch * self.total + position, self.lanes)
        epoch, position = divmod(row, self.total)
        size = max(1, BLOCK // self.lanes)
        block, within = divmod(position, size)
        length = min(size, self.total - block * size)
        key = draw_seed(self.seed, "mix", epoch)
        position = block * size + permuted(within, length, draw_seed(key, block, lane) if self.lanes > 1 else draw_seed(key, block))
        rest = self.total
        for number, quota in enumerate(self.quotas):  # spread the first source evenly over all positions, the second over those left ...
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
    """Divide `total` by weight into whole numbers that sum to it (largest remainders first)."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda s: (shares[s] - exact[s], s))
    for s in by_remainder[: total - sum(shares)]:
        shares[s] += 1
    return shares
