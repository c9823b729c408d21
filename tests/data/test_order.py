"""An epoch holds every sample once, whatever the numbers; mixes keep their shares; nothing depends on who asks, or when."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openvision3.data.order import BLOCK, Mix, ShardShuffle, Shuffle, permuted, quotas
from openvision3.draws import draw_seed


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
def test_a_shuffle_is_a_bijection_for_every_count_and_key(count, key):
    assert sorted(permuted(i, count, key) for i in range(count)) == list(range(count))


@pytest.mark.parametrize("count", [1, 2, 3, 255, 256, 257, 65_535, 65_537])
def test_counts_around_powers_of_two_are_no_exception(count):
    assert len({permuted(i, count, 5) for i in range(count)}) == count


def test_a_hundred_million_samples_are_shuffled_without_a_list_of_them():
    count = 100_000_000
    some = [permuted(i, count, 1) for i in range(0, count, 99_991)]
    assert len(set(some)) == len(some)
    assert abs(np.mean(some) / count - 0.5) < 0.02
    with pytest.raises(IndexError):
        permuted(count, count, 1)


def test_all_orders_of_four_things_are_equally_likely():
    seen = Counter(tuple(permuted(i, 4, key) for i in range(4)) for key in range(4800))
    assert len(seen) == 24
    chi_squared = sum((n - 200) ** 2 / 200 for n in seen.values())
    assert chi_squared < 50, "23 degrees of freedom; more than 50 comes once in a thousand"


@pytest.mark.parametrize("count", [10, 1000, 4096, 50_000])
def test_a_shuffle_looks_shuffled(count):
    order = np.array([permuted(i, count, 3) for i in range(count)])
    ranks = np.arange(count)
    limit = 4 / np.sqrt(count)
    assert abs(np.corrcoef(order, ranks)[0, 1]) < limit
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < limit
    other = np.array([permuted(i, count, 4) for i in range(count)])
    assert abs(np.corrcoef(order, other)[0, 1]) < limit
    assert (order == other).sum() < 10


def test_an_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return [Shuffle(50, seed, epoch).place(i) for i in range(50)]

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (1, 2)}) == 4
    assert {turn for _, turn in order(1, 2)} == {2}


# --- shards that have to be fetched ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any), st.integers(1, 8), st.integers(0, 100))
def test_every_sample_once_and_only_a_window_of_shards_at_a_time(sizes, window, epoch):
    starts = [0, *np.cumsum(sizes).tolist()]
    order = ShardShuffle(starts, window, 7, epoch)
    places = [order.place(i)[0] for i in range(starts[-1])]
    assert sorted(places) == list(range(starts[-1]))
    shards = [int(np.searchsorted(starts, place, "right")) - 1 for place in places]
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for position, shard in enumerate(shards):
        first.setdefault(shard, position)
        last[shard] = position
    assert max(sum(first[s] <= position <= last[s] for s in first) for position in range(len(shards))) <= window


def test_shards_are_met_in_another_order_every_epoch_and_mixed_within_a_window():
    starts = list(range(0, 4100, 100))
    orders = [[order.place(i)[0] // 100 for i in range(4000)] for order in (ShardShuffle(starts, 4, 0, epoch) for epoch in (0, 1))]
    assert orders[0] != orders[1]
    changes = sum(a != b for a, b in zip(orders[0], orders[0][1:], strict=False))
    assert changes > 2500, "three of four neighbours are from unlike shards"


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any), st.integers(1, 20), st.integers(1, 20), st.integers(0, 100))
def test_lanes_share_out_an_epoch_each_sample_once_and_read_shards_of_their_own(sizes, window, lanes, epoch):
    starts = [0, *np.cumsum(sizes).tolist()]
    order = ShardShuffle(starts, window, 7, epoch, lanes)
    places = [order.place(i)[0] for i in range(starts[-1])]
    assert sorted(places) == list(range(starts[-1]))
    shards = np.searchsorted(starts, places, "right") - 1
    touched = 0
    for lane in range(lanes):
        mine = shards[(lane - epoch * starts[-1]) % lanes :: lanes].tolist()
        touched += len(set(mine))
        spans = [(mine.index(s), len(mine) - 1 - mine[::-1].index(s)) for s in set(mine)]
        assert max((sum(a <= i <= b for a, b in spans) for i in range(len(mine))), default=0) <= max(1, window // lanes)
    assert touched <= np.count_nonzero(sizes) + lanes - 1, "a shard is read by two lanes only where it is cut"


def digest_of(orders) -> str:
    return hashlib.sha256(repr([order.place(i) for order, count in orders for i in range(count)]).encode()).hexdigest()[:16]


def test_without_lanes_the_order_is_that_of_runs_before_there_were_any():
    sizes = [0, 7, 40, 3, 0, 12, 25, 9, 31, 18, 0, 6]
    starts = [0, *np.cumsum(sizes).tolist()]
    assert digest_of((ShardShuffle(starts, 4, 5, epoch), 151) for epoch in range(3)) == "9e0b69cc400c8f14"
    parts = [lambda turn: Shuffle(5000, 1, turn), lambda turn: ShardShuffle(starts, 4, 2, turn), lambda turn: Shuffle(300, 3, turn)]
    assert digest_of((Mix((5000, 151, 300), (1, 2, 1), parts, 7, epoch), 5451) for epoch in (0, 3)) == "d0353b74ea791171"


# --- mixes ----------------------------------------------------------------------------------------------------------------


def mix(counts, weights, epoch, seed=0):
    return Mix(counts, weights, [lambda turn, n=n, c=c: Shuffle(c, draw_seed(seed, n), turn) for n, c in enumerate(counts)], seed, epoch)


@settings(deadline=None)
@given(st.integers(1, 10**9), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_quotas_sum_to_the_epoch_and_are_the_shares_to_within_one(total, weights):
    shares = quotas(total, weights)
    assert sum(shares) == total
    assert all(abs(share - total * weight / sum(weights)) <= 1 for share, weight in zip(shares, weights, strict=True))


def test_an_epoch_holds_each_source_by_its_weight_and_so_does_every_stretch_of_it():
    counts = (6000, 3000, 3000)
    order = mix(counts, (1, 2, 1), 0)
    sources = np.array([order.source(i)[0] for i in range(12_000)])
    assert np.bincount(sources).tolist() == order.quotas == [3000, 6000, 3000]
    for start in range(0, 12_000 - BLOCK, BLOCK):
        assert np.abs(np.bincount(sources[start : start + BLOCK]) - np.array([1, 2, 1]) * BLOCK / 4).max() <= 2
    assert np.abs(np.bincount(sources[:400]) / 400 - np.array([0.25, 0.5, 0.25])).max() < 0.1, "and they alternate"


def test_each_source_goes_on_where_the_last_epoch_left_it_so_that_no_sample_comes_twice_before_all_came_once():
    counts = (1000, 50)
    seen: list[int] = []
    for epoch in range(4):
        order = mix(counts, (1, 1), epoch)
        seen += [order.place(i)[0] for i in range(1050)]
    drawn = Counter(seen)
    large, small = [drawn[i] for i in range(1000)], [drawn[i] for i in range(1000, 1050)]
    assert sum(large) == sum(small) == 2100
    assert {min(large), max(large)} == {2, 3}
    assert set(small) == {42}


def test_a_sample_that_comes_twice_in_an_epoch_comes_in_unlike_rounds():
    order = mix((1000, 50), (1, 1), 3)
    places = [order.place(i) for i in range(1050)]
    assert len(set(places)) == 1050


def test_a_mix_by_the_sizes_of_its_sources_is_every_sample_once():
    for epoch in (0, 5):
        order = mix((300, 77, 1), (300, 77, 1), epoch)
        places = [order.place(i) for i in range(378)]
        assert sorted(index for index, _ in places) == list(range(378))
        assert {turn for _, turn in places} == {epoch}
    with pytest.raises(IndexError):
        order.place(378)


def test_a_weight_that_would_never_be_seen_is_refused_with_the_arithmetic():
    with pytest.raises(ValueError, match=r"0\.1 / 7\.1 of the 21 samples of an epoch is less than one"):
        Mix((3, 7, 11), (5, 0.1, 2), [lambda turn, c=c: Shuffle(c, 0, turn) for c in (3, 7, 11)], 0, 0)


@pytest.mark.parametrize("weights", [(800, 90, 5), (1, 1, 2)])
def test_a_mix_in_lanes_keeps_the_lanes_and_the_rounds_and_the_shares_of_its_sources(weights):
    """Shards of 50, a source smaller than a row of lanes, and epochs that end within one."""
    lanes, counts, epochs = 8, (800, 90, 5), 12
    starts = list(range(0, 850, 50))

    def parts(s, turn):
        return ShardShuffle(starts, 16, 1, turn, lanes) if s == 0 else Shuffle(counts[s], s, turn)

    seen: list[Counter] = [Counter() for _ in range(lanes)]
    shards: dict[int, set[tuple[int, int]]] = {}
    sources = []
    for epoch in range(epochs):
        order = Mix(counts, weights, [lambda turn, s=s: parts(s, turn) for s in range(3)], 0, epoch, lanes)
        for position in range(895):
            index, turn = order.place(position)
            lane = (epoch * 895 + position) % lanes
            seen[lane][index, turn] += 1
            sources.append(order.source(position)[0])
            if index < 800:
                shards.setdefault(lane, set()).add((index // 50, turn))
    assert sum(map(len, seen)) == sum(map(Counter.total, seen)) == len(set().union(*seen)), "no sample twice in a round of its source"
    rounds = 1 + max(turn for lane in shards.values() for _, turn in lane)
    assert sum(map(len, shards.values())) <= rounds * 16, "of each round each shard is read by one lane"
    assert np.bincount(sources[: lanes * 895]).tolist() == [lanes * quota for quota in order.quotas]
    assert np.abs(np.bincount(sources[:BLOCK]) - BLOCK * np.array(weights) / sum(weights)).max() <= 2 * lanes
