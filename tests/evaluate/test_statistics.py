"""Intervals and paired tests against scipy.stats 1.17 (its values stand here as numbers), and what they must hold by definition."""

from __future__ import annotations

import itertools
import math
import statistics as plain
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openvision3.evaluate.metrics.captioning import bleu, bleu_sums, words
from openvision3.evaluate.metrics.distances import kernel_distance, kernel_distance_shares
from openvision3.evaluate.protocol import number
from openvision3.evaluate.statistics import (
    Column,
    bootstrap_p,
    definition,
    difference,
    differences,
    mcnemar,
    over_seeds,
    sign_flip,
    subset_numbers,
    t_p,
    t_quantile,
    wilson,
    with_interval,
)


def draws(count: int, seed: int) -> list[float]:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()


def test_students_t_is_scipys():
    for t, freedom, p in ((2.0, 1, 0.2951672353008665), (3.3, 2, 0.08084769380366799), (1.0, 3, 0.3910022189557705), (4.2, 9, 0.002306692506540238)):
        assert t_p(t, freedom) == t_p(-t, freedom) == pytest.approx(p, rel=1e-10)
    for freedom, t in ((1, 12.706204736174694), (2, 4.302652729749462), (3, 3.1824463052837078), (10, 2.228138851986274), (200, 1.9718962236339088)):
        assert t_quantile(0.975, freedom) == pytest.approx(t, rel=1e-10)


def test_a_difference_over_seeds_is_scipys_paired_t_test_and_one_seed_says_nothing():
    found = over_seeds([0.3, 0.5, 0.1], [0.2, 0.1, 0.05])
    assert (found.p, found.low, found.high) == pytest.approx((0.23544714845739256, -0.2869063461125382, 0.6535730127792049), rel=1e-9)
    assert not found.differs and over_seeds([1.0, 1.1, 1.2], [0.0, 0.1, 0.21]).differs
    one = over_seeds([5.0], [1.0])
    assert one.p == 1 and one.low == -math.inf and one.high == math.inf and not one.differs
    assert over_seeds([1.0, 2.0], [1.0, 2.0]).p == 1 and over_seeds([1.0, 2.0], [0.5, 1.5]).p == 0
    with pytest.raises(ValueError, match="cannot be paired"):
        over_seeds([1.0], [1.0, 2.0])


def test_mcnemars_exact_p_is_scipys_binomial_test():
    for only_a, only_b, p in ((0, 0, 1.0), (1, 0, 1.0), (0, 6, 0.03125), (3, 12, 0.03515625), (50, 34, 0.10113634213880449), (9000, 9300, 0.0270836059)):
        assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a) == pytest.approx(p, rel=1e-6)


def test_wilsons_interval_is_scipys_and_has_a_width_where_none_is_right():
    assert wilson(0.3, 50) == pytest.approx((0.1910355350088095, 0.43750350464453397), rel=1e-9)
    assert wilson(0, 20) == pytest.approx((0, 0.1611251580528193)) and wilson(1, 20) == pytest.approx((1 - 0.1611251580528193, 1))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=7))
def test_few_samples_have_all_their_signs_flipped(values):
    p, test = sign_flip(torch.tensor(values, dtype=torch.float64))
    flips = [abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in itertools.product((1, -1), repeat=len(values))]
    assert "all" in test and p == pytest.approx(sum(flip >= abs(sum(values)) for flip in flips) / len(flips))


def test_many_samples_have_the_p_of_a_t_test():
    apart = torch.randn(200, generator=torch.Generator().manual_seed(0)).double() + 0.15
    assert sign_flip(apart)[0] == pytest.approx(0.06405588496251817, abs=0.01) and sign_flip(apart) == sign_flip(apart)
    assert sign_flip(apart + 2)[0] == 1 / 10_000, "never 0: it is one of the flips itself"


def test_a_bootstrap_interval_of_a_mean_is_scipys():
    scores = torch.randn(100, generator=torch.Generator().manual_seed(1)).exp().tolist()
    found = with_interval(number("psnr", plain.fmean(scores), 100, ""), {"psnr": Column(list(range(100)), scores)})
    assert (found.low, found.high) == pytest.approx((1.0325, 1.6771), abs=0.012)
    assert "bootstrap" in found.interval and found == with_interval(found, {"psnr": Column(list(range(100)), scores)})


def test_intervals_hold_the_true_mean_nineteen_times_in_twenty():
    held = 0
    for seed in range(200):
        scores = draws(60, seed)
        found = with_interval(number("psnr", plain.fmean(scores), 60, ""), {"psnr": Column(list(range(60)), scores)})
        held += found.low <= 0 <= found.high
    assert 0.90 <= held / 200 <= 0.98


def test_captions_of_one_picture_are_drawn_together():
    """Five captions that say the same are not five samples: an interval over captions would be too narrow by the root of five."""
    owners, hits = [i // 5 for i in range(200)], [int(i // 5 % 2) for i in range(200)]
    ranks = Column(owners, [1 if hit else 9 for hit in hits])
    found = with_interval(number("text_to_image_r@1", 0.5, 200, ""), {"text_to_image_rank": ranks})
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 40), rel=0.1)


def test_of_one_sample_and_of_what_is_no_function_of_samples_there_is_no_interval():
    assert with_interval(number("psnr", 3, 1, ""), {"psnr": Column([0], [3.0])}).low is None
    for metric in ("rfid", "meteor", "knn_largest_class_share"):
        assert definition(metric) is None and with_interval(number(metric, 3, 9, ""), {}).low is None


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 3)), min_size=2, max_size=30), st.data())
def test_numbers_of_a_subset_are_those_of_its_samples_alone(rows, data):
    chosen = data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1))
    columns = {"knn_rank": Column(list(range(len(rows))), [list(row) for row in rows]), "psnr": Column(list(range(len(rows))), [float(r) for r, _ in rows])}
    asked = [number(metric, 0, len(rows), "how") for metric in ("knn_top_5", "knn_mean_class_accuracy", "psnr", "KID on x features", "rfid")]
    found = {each.metric: each for each in subset_numbers(asked, columns, chosen, "unseen samples")}
    own = [rows[i] for i in sorted(chosen)]
    by_class = [[r <= 1 for r, c in own if c == k] for k in {c for _, c in own}]
    assert found.keys() == {"knn_top_5", "knn_mean_class_accuracy", "psnr"}
    assert found["knn_top_5"].value == pytest.approx(sum(r <= 5 for r, _ in own) / len(own))
    assert found["knn_mean_class_accuracy"].value == pytest.approx(plain.fmean(sum(each) / len(each) for each in by_class))
    assert found["psnr"].value == pytest.approx(plain.fmean(r for r, _ in own)) and found["psnr"].count == len(own)
    assert all(each.part == "unseen samples" and f"over {len(own)} of {len(rows)} samples: unseen samples" in each.how for each in found.values())


def test_bleu_of_drawn_samples_is_that_of_their_captions():
    written = [words(each) for each in ("a red cat on a mat", "two dogs", "the house by the sea", "a bird")]
    references = [[words(each)] for each in ("a red cat lies on a mat", "two small dogs run", "a house by the sea", "a bird on a tree")]
    column = Column([0, 1, 2, 3], bleu_sums(written, references))
    [found] = subset_numbers([number("bleu_2", 0, 4, "")], {"bleu": column}, {0, 2}, "some")
    assert found.value == pytest.approx(bleu(written[::2], references[::2])[1], rel=1e-12)


def test_what_each_picture_adds_to_kid_comes_to_kid_and_to_its_jackknife():
    x = torch.tensor(draws(12 * 6, 1)).view(12, 6)
    y = x + 0.3 * torch.tensor(draws(12 * 6, 2)).view(12, 6)
    whole, shares = kernel_distance(x, y, paired=True).value, kernel_distance_shares(x, y, chunk=5)
    assert float(shares.mean()) == pytest.approx(whole, rel=1e-9)
    without = [kernel_distance(*(torch.cat([side[:i], side[i + 1 :]]) for side in (x, y)), paired=True).value for i in range(12)]
    assert shares.tolist() == pytest.approx([12 * whole - 11 * each for each in without], rel=1e-6)


def test_differences_are_paired_by_sample_in_whatever_order_they_come():
    a, noise = draws(50, 3), draws(50, 4)
    b = [x + 0.2 + 0.1 * e for x, e in zip(a, noise, strict=True)]
    order = list(reversed(range(50)))
    one, other = {"psnr": Column(list(range(50)), a)}, {"psnr": Column(order, [b[i] for i in order])}
    found = difference("psnr", "a", "b", one, other)
    assert found.difference == pytest.approx(plain.fmean(a) - plain.fmean(b)) and found.low < found.difference < found.high < 0 and found.p < 0.001
    same = difference("psnr", "a", "a", one, one)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1) and not same.differs
    with pytest.raises(ValueError, match="unlike samples"):
        difference("psnr", "a", "b", one, {"psnr": Column(list(range(1, 51)), b)})


@pytest.mark.parametrize("metric", ["image_to_text_median_rank", "bleu_4", "cider", "zeroshot_mean_class_accuracy", "text_to_image_r@1"])
def test_equal_models_do_not_differ_and_unlike_ones_do_by_any_metric(metric):
    generator = torch.Generator().manual_seed(5)
    good, bad = (torch.randint(1, high, (120,), generator=generator).tolist() for high in (4, 40))
    made = {
        "image_to_text_median_rank": ("image_to_text_rank", good, bad),
        "text_to_image_r@1": ("text_to_image_rank", good, bad),
        "cider": ("cider", [1 / r for r in good], [1 / r for r in bad]),
        "zeroshot_mean_class_accuracy": ("zeroshot_rank", [[r, i % 4] for i, r in enumerate(good)], [[r, i % 4] for i, r in enumerate(bad)]),
        "bleu_4": ("bleu", [[9, 8, 7, 6, 10, 9, 8, 7, 10, 10]] * 120, [[9, 5, 2 + i % 3, 1, 10, 9, 8, 7, 10, 10] for i in range(120)]),
    }
    name, *values = made[metric]
    one, other = ({name: Column(list(range(120)), each)} for each in values)
    assert difference(metric, "good", "bad", one, other).p <= 0.001 and difference(metric, "good", "good", one, one).p == 1


def test_only_the_first_against_the_others_and_the_best_against_the_second_are_compared():
    columns = {name: {"psnr": Column(list(range(20)), [x + shift for x in draws(20, 6)])} for name, shift in (("a", 0.0), ("b", 1.0), ("c", 2.0))}
    numbers = {name: number("psnr", plain.fmean(column["psnr"].values), 20, "") for name, column in columns.items()}
    assert [{each.a, each.b} for each in differences("psnr", numbers, columns, {})] == [{"c", "b"}, {"a", "c"}, {"a", "b"}]
    assert not differences("psnr", {"a": numbers["a"]}, columns, {})


def test_numbers_over_a_part_for_one_model_and_over_all_for_another_are_compared_over_all_and_not_called_a_part():
    columns = {name: {"psnr": Column(list(range(6)), [x + shift for x in draws(6, 6)])} for name, shift in (("a", 0.0), ("b", 1.0))}
    numbers = {name: replace(number("psnr", plain.fmean(columns[name]["psnr"].values), 6, ""), part=part) for name, part in (("a", "unseen"), ("b", ""))}
    [found] = differences("psnr", numbers, columns, {"unseen": {0, 1}})
    assert found.count == 6 and found.part == ""
    both = {name: replace(one, part="unseen") for name, one in numbers.items()}
    assert [one.count for one in differences("psnr", both, columns, {"unseen": {0, 1}})] == [2]


def test_a_bootstraps_p_is_never_0():
    assert bootstrap_p(torch.ones(999)) == 2 / 1000 and bootstrap_p(torch.tensor([-1.0, 1.0] * 50)) == 1
