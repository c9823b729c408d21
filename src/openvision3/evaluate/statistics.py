"""Scores of single samples, confidence intervals over samples, and paired tests over samples or seeds.

    columns["psnr"] = Column(indices, scores)                      # an evaluator adds the score of each sample
    with_interval(number, columns)                                 # 95 % interval of a metric over samples
    subset_numbers(numbers, columns, unseen, "unseen samples")     # the same metrics over some of the samples
    difference("psnr", "a", "b", columns_a, columns_b)             # paired over the samples of both
    over_seeds(values_a, values_b)                                 # paired over seeds

All metrics that are functions of sums, means or ranks of single samples support this. A Frechet distance does not (resampled sets
are further apart than the sets), nor does the Inception Score, nor METEOR (Java returns one number for the whole set).
"""

from __future__ import annotations

import functools
import math
import re
import statistics
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from openvision3.evaluate.protocol import Number

RESAMPLES, FEWER, MANY = 10_000, 2_000, 2_000
"""bootstrap resamples of an interval; FEWER for more than MANY samples, because they take seconds"""
FLIPS = 9_999
"""random sign flips of a paired test"""
EXACT = 13
"""up to this number of samples, all flips are tried"""
AT_ONCE = 2**24
"""numbers in memory at a time: 128 MB"""
SEED = 0
LEVEL = 0.05
"""two numbers differ if p is below this; intervals cover 1 - LEVEL"""


@dataclass(frozen=True)
class Column:
    """Scores of an evaluation by row: a row is a sample, or one of the captions of a sample."""

    samples: list[Any]
    """(n,) the sample that each row belongs to: its index in the source, or its key"""
    values: list[Any]
    """(n,) numbers, or lists of numbers: (rank, class number), or the sums for BLEU"""

    def of(self, samples: Collection[Hashable]) -> Column:
        """The rows of these samples alone."""
        rows = [row for row, sample in enumerate(self.samples) if sample in samples]
        return Column([self.samples[row] for row in rows], [self.values[row] for row in rows])


Columns = dict[str, Column]
"""{name: column}: several metrics may share a column, such as R@1 and the median rank."""


# -- metrics as functions of columns --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Definition:
    """How a metric is computed from a column."""

    column: str
    kind: str
    """mean, share (of values up to k), median, class mean (of ranks of 1, by class), bleu (k), ratio (of two sums), sum of means (of groups)"""
    k: int = 0

    def row_values(self, values: Tensor) -> Tensor:
        """(n,) or (n, D) -> (n,): the values whose mean is the metric, for a mean or a share."""
        return (values if values.ndim == 1 else values[:, 0]) <= self.k if self.kind == "share" else values


def definition(metric: str) -> Definition | None:
    """The definition of a metric; None if it cannot be computed from scores of single samples."""
    if (
        metric in ("rfid", "gfid", "sfid", "inception_score", "meteor")
        or metric.startswith("FID")
        or metric.endswith(("largest_class_share", "commonest_answer"))
    ):
        return None
    if metric.endswith((": precision", ": recall", ": f1")):
        return Definition(metric, "ratio")
    if metric in ("perception", "cognition"):
        return Definition(metric, "sum of means")
    for pattern, kind in ((r"(.*)_r@(\d+)", "share"), (r"(.*_|)top_(\d+)", "share"), (r"bleu_(\d)", "bleu")):
        if found := re.fullmatch(pattern, metric):
            *name, k = found.groups()
            column = "bleu" if kind == "bleu" else f"{name[0].removesuffix('_')}_rank".removeprefix("_")
            return Definition(column, kind, int(k))
    for ending, kind in (("median_rank", "median"), ("mean_class_accuracy", "class mean")):
        if metric.endswith(ending):
            return Definition(metric.removesuffix(ending) + "rank", kind)
    return Definition(metric, "mean")


def bleu_of_sums(sums: Tensor, order: int) -> Tensor:
    """(..., 10) matched and written n-grams for n = 1 to 4, written words, reference words -> BLEU-`order` (...). The small constants are COCO's."""
    ratio = (sums[..., 8] + 1e-15) / (sums[..., 9] + 1e-9)
    penalty = torch.where(ratio < 1, torch.exp(1 - 1 / ratio), torch.ones_like(ratio))
    precisions = (sums[..., :4] + 1e-15) / (sums[..., 4:8] + 1e-9)
    return precisions[..., :order].log().mean(-1).exp() * penalty


def _estimates(what: Definition, values: Tensor, weights: Tensor) -> Tensor:
    """Values (n,) or (n, D) of rows, weights (B, n) of these rows -> the metric for each row of weights (B,)."""
    if what.kind in ("mean", "share"):
        return weights @ what.row_values(values).double() / weights.sum(1)
    if what.kind == "bleu":
        return bleu_of_sums(weights @ values, what.k)
    if what.kind == "class mean":
        classes = values[:, 1].long()
        counts, right = (torch.zeros(len(weights), int(classes.max()) + 1, dtype=torch.float64) for _ in range(2))
        counts.index_add_(1, classes, weights)
        right.index_add_(1, classes, weights * (values[:, 0] <= 1))
        return (right / counts.clamp_min(1)).sum(1) / (counts > 0).sum(1)
    if what.kind == "ratio":
        above, below = (weights @ values).unbind(1)
        return torch.where(below > 0, above / below.clamp_min(1e-12), 0.0)
    if what.kind == "sum of means":
        groups = values[:, 1].long()
        counts, sums = (torch.zeros(len(weights), int(groups.max()) + 1, dtype=torch.float64) for _ in range(2))
        counts.index_add_(1, groups, weights)
        sums.index_add_(1, groups, weights * values[:, 0])
        return (sums / counts.clamp_min(1)).sum(1)
    order = values.argsort(stable=True)
    cumulative, ordered = weights[:, order].cumsum(1), values[order].double()
    half = cumulative[:, -1:] / 2
    low, high = (torch.searchsorted(cumulative, half, right=right)[:, 0].clamp_max(len(values) - 1) for right in (False, True))
    return (ordered[low] + ordered[high]) / 2


def _value(what: Definition, column: Column) -> float:
    values = torch.tensor(column.values, dtype=torch.float64)
    return float(_estimates(what, values, torch.ones(1, len(values), dtype=torch.float64)))


# -- intervals over samples -----------------------------------------------------------------------------------------


def _rows_by_sample(column: Column) -> tuple[list[Any], Tensor]:
    """The distinct samples, and for each row the position of its sample among them (n,)."""
    places = {sample: place for place, sample in enumerate(dict.fromkeys(column.samples))}
    return list(places), torch.tensor([places[sample] for sample in column.samples])


def resamples(count: int) -> int:
    """The number of bootstrap resamples for `count` samples."""
    return RESAMPLES if count <= MANY else FEWER


@functools.lru_cache(maxsize=2)
def _resampled(count: int, part: int, parts: int) -> Tensor:
    """(B, count): how often each sample was drawn. The same for every model and metric, so that differences are paired."""
    generator = torch.Generator().manual_seed(SEED + part)
    size = resamples(count) * (part + 1) // parts - resamples(count) * part // parts
    drawn = torch.randint(count, (size, count), generator=generator)
    return torch.zeros(size, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(size, count, dtype=torch.float64))


def _bootstrap(columns: Sequence[Column], what: Definition) -> Tensor:
    """(columns, resamples): the metric of each column over samples drawn with replacement. All columns have the same samples in the same order."""
    samples, place = _rows_by_sample(columns[0])
    values = [torch.tensor(column.values, dtype=torch.float64) for column in columns]
    width = max(len(place), (int(values[0][:, 1].max()) + 1) if what.kind == "class mean" else 0)
    parts = min(resamples(len(samples)), -(-resamples(len(samples)) * width // AT_ONCE))
    estimates = [[_estimates(what, scores, _resampled(len(samples), part, parts)[:, place]) for part in range(parts)] for scores in values]
    return torch.stack([torch.cat(chunks) for chunks in estimates])


def _bounds(estimates: Tensor) -> tuple[float, float]:
    low, high = estimates.quantile(torch.tensor([LEVEL / 2, 1 - LEVEL / 2], dtype=torch.float64)).tolist()
    return low, high


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count` (Wilson 1927): unlike a bootstrap interval, it has a width even if the share is 0 or 1."""
    z = statistics.NormalDist().inv_cdf(1 - LEVEL / 2)
    middle, scale = share + z * z / (2 * count), 1 + z * z / count
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - half) / scale if share else 0.0, (middle + half) / scale if share < 1 else 1.0


ZERO_OR_ONE = ("exact_match", "precision", "recall", "near_duplicates")
"""prefixes of metrics that are the mean of scores of 0 or 1"""
SHARES = (": accuracy", ": accuracy_plus", ": yes_ratio", "unmatched")
"""endings of metrics of questions that are, too; several questions may share an image, which is the sample"""
HOW_WILSON = "95 %, Wilson's interval of a share"
FIXED = {
    "cider": "; document frequencies of the whole set held fixed",
    "KID": "; of jackknife pseudo-values, whose mean is the unbiased estimate",
}
"""Remarks on the resampling of some metrics, by prefix of the metric's name."""


def with_interval(number: Number, columns: Mapping[str, Column]) -> Number:
    """The number with its 95 % interval over samples; unchanged if there are no scores of at least two samples."""
    what = definition(number.metric)
    column = columns.get(what.column) if what else None
    if what is None or column is None or len(set(column.samples)) < 2:
        return number
    samples, values = len(set(column.samples)), column.values
    is_share = what.kind == "share" or number.metric.startswith(ZERO_OR_ONE) or number.metric.endswith(SHARES) or number.metric == "accuracy"
    if (is_share and len(values) == samples) or ((is_share or what.kind == "ratio") and number.value in (0, 1)):
        low, high = wilson(number.value, samples)
        return replace(number, low=low, high=high, interval=HOW_WILSON)
    low, high = _bounds(_bootstrap([column], what)[0])
    fixed = next((text for name, text in FIXED.items() if number.metric.startswith(name)), "")
    return replace(number, low=low, high=high, interval=f"95 %, percentile bootstrap over samples, {resamples(samples):,} resamples{fixed}")


def subset_numbers(numbers: Sequence[Number], columns: Mapping[str, Column], samples: Collection[Hashable], what: str) -> list[Number]:
    """The numbers over these samples alone, with intervals. `what` names the samples in the protocol, such as "unseen samples".

    In retrieval, these images and captions are the queries and all samples remain candidates. CIDEr keeps the document frequencies of the whole set.
    Metrics of whole sets, such as rFID and KID, are left out, and so are metrics without a score for any of these samples.
    """
    subset, chosen = [], set(samples)
    for each in numbers:
        made_of = definition(each.metric)
        if made_of is None or made_of.column not in columns or each.metric.startswith("KID"):
            continue
        part = columns[made_of.column].of(chosen)
        if not part.values:
            continue
        how = f"{each.how}; over {len(set(part.samples)):,} of {len(set(columns[made_of.column].samples)):,} samples: {what}"
        spread = statistics.pstdev(part.values) if each.spread is not None else None
        value = replace(each, value=_value(made_of, part), count=len(part.values), how=how, spread=spread, low=None, high=None, interval="", part=what)
        subset.append(with_interval(value, {made_of.column: part}))
    return subset


# -- differences over equal samples ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A metric of model `a` minus that of model `b`, on the same samples."""

    metric: str
    a: str
    b: str
    difference: float
    low: float
    high: float
    """95 % interval, paired bootstrap over samples"""
    p: float
    """two-sided p of no difference; not corrected for the number of comparisons"""
    test: str
    count: int
    """number of samples"""
    part: str = ""
    """the part of the samples, as in the numbers"""

    @property
    def differs(self) -> bool:
        return self.p < LEVEL


def difference(metric: str, a: str, b: str, columns_a: Mapping[str, Column], columns_b: Mapping[str, Column]) -> Difference | None:
    """The paired difference of a metric; None without scores of at least two samples.

    Scores of 0 or 1: exact McNemar test. Means: sign-flip test. Medians and BLEU: paired bootstrap.

    Raises:
        ValueError: the two were measured on different samples.
    """
    what = definition(metric)
    if what is None or what.column not in columns_a or what.column not in columns_b:
        return None
    one, other = columns_a[what.column], _in_order_of(columns_b[what.column], columns_a[what.column], f"{metric} of {a} and of {b}")
    samples, place = _rows_by_sample(one)
    if len(samples) < 2:
        return None
    both = _bootstrap([one, other], what)
    low, high = _bounds(both[0] - both[1])
    p, test = _paired_test(what, one, other, place, len(samples), both[0] - both[1])
    return Difference(metric, a, b, _value(what, one) - _value(what, other), low, high, p, test, len(samples))


def _in_order_of(column: Column, like: Column, which: str) -> Column:
    """The column with its samples in the order of `like`; rows of one sample keep theirs."""
    rows: dict[Any, list[Any]] = {}
    for sample, value in zip(column.samples, column.values, strict=True):
        rows.setdefault(sample, []).append(value)
    turns = {sample: iter(values) for sample, values in rows.items()}
    try:
        values = [next(turns[sample]) for sample in like.samples]
    except (KeyError, StopIteration):
        values = []
    if len(values) != len(column.values):
        raise ValueError(f"{which} are over unlike samples: a paired test needs the same samples")
    return Column(list(like.samples), values)


def _paired_test(what: Definition, one: Column, other: Column, place: Tensor, samples: int, resampled: Tensor) -> tuple[float, str]:
    """(p, which test)."""
    if what.kind in ("median", "bleu", "ratio", "sum of means"):
        return bootstrap_p(resampled), f"paired bootstrap, {resamples(samples):,} resamples"
    values = [torch.tensor(column.values, dtype=torch.float64) for column in (one, other)]
    if what.kind == "class mean":
        classes = values[0][:, 1].long()
        weights = 1 / classes.bincount()[classes].double()
        apart = ((values[0][:, 0] <= 1).double() - (values[1][:, 0] <= 1).double()) * weights
    else:
        own, theirs = (what.row_values(each).double() for each in values)
        if len(place) == samples and all(((each == 0) | (each == 1)).all() for each in (own, theirs)):
            return mcnemar(int(((own == 1) & (theirs == 0)).sum()), int(((own == 0) & (theirs == 1)).sum())), "exact McNemar test"
        apart = own - theirs
    return sign_flip(torch.zeros(samples, dtype=torch.float64).index_add_(0, place, apart))


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p from the numbers of samples that only one of two models gets right: a fair coin for each."""
    count, least = only_a + only_b, min(only_a, only_b)
    term = total = 1  # exact integers: a sum of logarithms would lose digits
    for k in range(1, least + 1):
        term = term * (count - k + 1) // k
        total += term
    return min(1.0, float(2 * total * 10**18 // 2**count) / 10**18) if count else 1.0


def sign_flip(differences: Tensor) -> tuple[float, str]:
    """Differences (n,) of samples -> (two-sided p of a mean of 0, name of the test). p is the share of sign flips whose mean is at least as far from 0."""
    count, reach = len(differences), float(differences.sum().abs())
    reach *= 1 - 1e-12  # tolerance for sums in another order
    if count <= EXACT:
        signs = torch.tensor([[1 - 2 * (number >> i & 1) for i in range(count)] for number in range(2**count)], dtype=torch.float64)
        return float(((signs @ differences).abs() >= reach).double().mean()), f"paired sign-flip test, all {2**count:,} flips"
    generator, far, done = torch.Generator().manual_seed(SEED), 0, 0
    chunk = max(1, AT_ONCE // count)
    while done < FLIPS:
        size = min(chunk, FLIPS - done)
        signs = torch.randint(2, (size, count), generator=generator, dtype=torch.int8).double() * 2 - 1
        far, done = far + int(((signs @ differences).abs() >= reach).sum()), done + size
    return (1 + far) / (1 + FLIPS), f"paired sign-flip test, {FLIPS:,} flips"


def bootstrap_p(differences: Tensor) -> float:
    """Two-sided p of no difference: twice the share of resampled differences on the far side of 0, at least 1 / resamples."""
    low, high = (1 + int((differences <= 0).sum())), (1 + int((differences >= 0).sum()))
    return min(1.0, 2 * min(low, high) / (1 + len(differences)))


def differences(metric: str, numbers: Mapping[str, Number], columns: Mapping[str, Columns], parts: Mapping[str, Collection[Hashable]]) -> list[Difference]:
    """{model: number} by one protocol -> the differences of the first model from all others, and of the best from the second best.

    `columns` holds the columns of each model; models without columns are skipped. `parts` holds the samples of each part.
    A column named "PART: COLUMN" holds the scores of a part that was measured as a set of its own.
    """
    values = {model: number.value for model, number in numbers.items() if model in columns}
    pairs = [(next(iter(values)), other) for other in list(values)[1:]]
    pairs += [(ranking[0], ranking[1])] if len(ranking := best_first(metric, values)) > 1 else []
    named = {number.part for number in numbers.values()}  # all samples may be the unseen ones for one model and not for another
    made_of, part = definition(metric), named.pop() if len(named) == 1 else ""
    if made_of is None or (part and part not in parts):
        return []
    own = f"{part}: {made_of.column}"  # the scores of a part that was measured alone
    chosen = {
        model: {made_of.column: of.get(own) or (of[made_of.column].of(parts[part]) if part else of[made_of.column])}
        for model, of in columns.items()
        if made_of.column in of
    }
    all_differences = [difference(metric, a, b, chosen[a], chosen[b]) for a, b in {frozenset(pair): pair for pair in reversed(pairs)}.values()]
    return [replace(one, part=part) for one in all_differences if one is not None]


LOWER_IS_BETTER = (
    *("distance", "KID", "FID", "lpips", "rfid", "gfid", "sfid", "near_duplicates", "median_rank"),
    *("loss", "pixel", "latent", "perceptual", "contrastive", "caption"),
)


def best_first(metric: str, values: Mapping[str, float]) -> list[str]:
    """Models by value, the best first; empty for a metric that does not depend on the model, or where more is neither better nor worse."""
    if metric.endswith(("largest_class_share", "commonest_answer", "yes_ratio", "unmatched")):
        return []
    sign = 1 if any(part in metric for part in LOWER_IS_BETTER) else -1
    return sorted(values, key=lambda name: sign * values[name])


# -- spread over seeds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OverSeeds:
    """The mean of paired differences over seeds."""

    difference: float
    low: float
    high: float
    """95 % interval of Student's t; infinite for one seed"""
    p: float
    seeds: int

    @property
    def differs(self) -> bool:
        return self.p < LEVEL


def over_seeds(a: Sequence[float], b: Sequence[float]) -> OverSeeds:
    """Values of two settings for the same seeds in the same order -> mean difference a - b, its t interval and two-sided p of the paired t-test.

    With one seed, p is 1 and the interval is infinite. Raises ValueError: different counts, or no values.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} values cannot be paired by seed")
    apart = [x - y for x, y in zip(a, b, strict=True)]
    mean, count = statistics.fmean(apart), len(apart)
    if count < 2:
        return OverSeeds(mean, -math.inf, math.inf, 1.0, count)
    error = statistics.stdev(apart) / math.sqrt(count)
    half = t_quantile(1 - LEVEL / 2, count - 1) * error
    p = t_p(mean / error, count - 1) if error else float(not mean)
    return OverSeeds(mean, mean - half, mean + half, p, count)


def t_p(t: float, freedom: int) -> float:
    """Two-sided p of Student's t with a whole number of degrees of freedom, by the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = (cosine if odd else 1.0) if freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= (k - 1) / k * cosine * cosine
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1 - inside)


def t_quantile(share: float, freedom: int) -> float:
    """The t below which `share` (more than a half) of Student's distribution lies."""
    low, high = 0.0, 1.0
    while t_p(high, freedom) > 2 * (1 - share):
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_p(middle, freedom) > 2 * (1 - share) else (low, middle)
    return high


def spoken_p(p: float) -> str:
    """p = .03, p < .001."""
    return "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".", 1) if p < 0.1 else f"p = {p:.2f}".replace("0.", ".", 1)
