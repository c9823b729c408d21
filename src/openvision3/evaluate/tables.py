"""Rows of several models -> tables in which only comparable numbers stand side by side, and the formatting of values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from openvision3.evaluate.peers import published
from openvision3.evaluate.protocol import Number
from openvision3.evaluate.results import DRAWING_KINDS, UNSEEN, NotRun, Row, Scores, Setting
from openvision3.evaluate.statistics import Difference, best_first, differences


@dataclass
class Line:
    """One line of a table: a metric by one protocol, with the number of each model."""

    metric: str
    how: str
    values: dict[str, Number]
    differences: list[Difference] = field(default_factory=list)
    """paired differences between its models, if the scores of the samples are known"""


def table(rows: Iterable[Row]) -> list[Line]:
    """Rows of several models -> one line per metric. Numbers that cannot be compared are refused.

    Raises:
        ValueError: two protocols of one metric, or two numbers of one model by the same protocol.
    """
    lines: dict[str, Line] = {}
    first: dict[str, Row] = {}
    for row in rows:
        before = first.setdefault(row.metric, row)
        if before.protocol != row.protocol:
            raise ValueError(f"{row.metric} of {row.model} and of {before.model} cannot stand in one table: {_unlike(before, row)}; compare them apart")
        line = lines.setdefault(row.metric, Line(row.metric, row.number.how, {}))
        if row.model in line.values and line.values[row.model] != row.number:
            raise ValueError(f"{row.metric} of {row.model} is there twice: {line.values[row.model].value:g} and {row.number.value:g}")
        line.values[row.model] = row.number
    return list(lines.values())


def _unlike(a: Row, b: Row) -> str:
    one, other = a.to_json(), b.to_json()
    apart = [
        name
        for name in one
        if one[name] != other[name]
        and name not in ("model", "model_sha256", "licence", "note", "value", "spread", "detail", "library", "data", "low", "high", "interval")
    ]
    return ", ".join(f"{name} {one[name]!r} and {other[name]!r}" for name in apart)


def named(setting: Setting, lines: Iterable[Line]) -> str:
    """The name of the data, and the part of them that the numbers were computed from."""
    parts = {number.part for line in lines for number in line.values.values()}
    part = parts.pop() if len(parts) == 1 else ""
    return f"{setting.data}, {part}" if part else setting.data


def leading(rows: Iterable[Row]) -> list[Row]:
    """The rows that a figure shows: numbers over unseen samples where they exist, else numbers over all; those of a kind of drawing are in the tables."""
    rows = [row for row in rows if not row.number.part.startswith(DRAWING_KINDS)]
    apart = {(row.model, row.metric, row.setting.data) for row in rows if row.number.part.startswith(UNSEEN)}
    return [row for row in rows if row.number.part.startswith(UNSEEN) or (row.model, row.metric, row.setting.data) not in apart]


def split(rows: Sequence[Row]) -> list[tuple[Setting, list[Line]]]:
    """Rows of any protocols -> the fewest tables that each hold comparable numbers only."""
    piles: list[tuple[Setting, list[Row]]] = []
    for row in rows:
        for setting, pile in piles:
            if replace(setting, data=row.setting.data, overlap=row.setting.overlap) == row.setting and all(
                other.protocol == row.protocol and other.model != row.model for other in pile if other.metric == row.metric
            ):
                pile.append(row)
                break
        else:
            piles.append((row.setting, [row]))
    return [(setting, table(pile)) for setting, pile in piles]


def by_need(not_run: Iterable[NotRun]) -> list[tuple[str, list[str]]]:
    """[(what is needed, ["metric of model", ...])], without duplicates."""
    names: dict[str, dict[str, None]] = {}
    for entry in not_run:
        names.setdefault(entry.needs, {})[f"{entry.metric} of {entry.model}"] = None
    return [(what, list(who)) for what, who in names.items()]


PERCENT = (
    "near_duplicates",
    "exact_match",
    "token_f1",
    "bleu_",
    "rouge_l",
    "meteor",
    "_r@",
    "top_",
    "mean_class_accuracy",
    "largest_class_share",
    "accuracy",
    ": precision",
    ": recall",
    ": f1",
    "yes_ratio",
    "unmatched",
    "commonest_answer",
)
"""Metrics that are shares of 1 and are shown in %."""


def surely_best(line: Line) -> str:
    """The best model of the line, if a paired test finds it different from the second best; otherwise ""."""
    ranking = best_first(line.metric, {model: number.value for model, number in line.values.items()})
    apart = {frozenset((one.a, one.b)) for one in line.differences if one.differs}
    return ranking[0] if len(ranking) > 1 and frozenset(ranking[:2]) in apart else ""


def titles(tables: Sequence[tuple[Setting, Sequence[Line]]], rows: Iterable[Row]) -> list[str]:
    """The title of each table: data, size, precision, N. If one name stands for several weights, the sha256 of those in this table is added."""
    hashes: dict[tuple[str, Number], set[str]] = {}
    by_name: dict[str, set[str]] = {}
    for row in rows:
        hashes.setdefault((row.model, row.number), set()).add(row.model_sha256)
        by_name.setdefault(row.model, set()).add(row.model_sha256)
    table_titles = []
    for setting, lines in tables:
        counts = sorted({number.count for line in lines for number in line.values.values()})
        which: dict[str, None] = {}
        for line in lines:
            for model, number in line.values.items():
                if len(by_name.get(model, ())) > 1:
                    which |= {f"{model} sha256 {sha256[:12] or 'none'}": None for sha256 in sorted(hashes[model, number])}
        head = f"{named(setting, lines)}, {setting.resolution}, {setting.dtype}, N = {', '.join(f'{count:,}' for count in counts)}"
        table_titles.append("; ".join([head, *which]))
    return table_titles


def how_to_read(lines: Iterable[Line]) -> str:
    """The meaning of brackets and bold numbers in these tables; "" if there are none."""
    lines = list(lines)
    brackets = any(number.low is not None for line in lines for number in line.values.values())
    several = any(len(line.values) > 1 for line in lines)
    bold = "Bold: the best, where it differs from the second best with p < .05, paired over the same samples." if several else ""
    return " ".join(part for part in ("[95 % interval over samples]." if brackets else "", bold) if part)


def with_differences(tables: Sequence[tuple[Setting, list[Line]]], evaluations: Sequence[tuple[Sequence[Row], Scores]]) -> list[Difference]:
    """Put the paired differences into each line of the tables and return them all. `evaluations` holds (rows, scores) of each evaluation.

    Raises:
        ValueError: numbers of one protocol over different samples.
    """
    places: dict[tuple[str, Number], Scores] = {(row.model, row.number): scores for rows, scores in evaluations for row in rows}
    for _, lines in tables:
        for line in lines:
            own = {model: places[model, number] for model, number in line.values.items() if (model, number) in places}
            parts = {name: samples for scores in own.values() for name, samples in scores.parts.items()}
            columns = {model: scores.columns[model] for model, scores in own.items() if model in scores.columns}
            line.differences = differences(line.metric, line.values, columns, parts)
    return [one for _, lines in tables for line in lines for one in line.differences]


def shown(metric: str, number: Number) -> str:
    """A value with its unit and interval: 29.81 dB [29.52, 30.10], 37.9 % [30.1, 46.0].

    KID without an interval and the Inception Score are shown with their spread: 0.0195 ± 0.0015.
    """
    if any(part in metric for part in PERCENT):
        return f"{100 * number.value:.1f} %" + _interval(number, 1, 100)
    if metric in ("perception", "cognition") or metric.endswith(": score"):
        return f"{number.value:.1f}" + _interval(number, 1)
    unit, digits = {"psnr": (" dB", 2), "image_to_text_median_rank": ("", 1), "text_to_image_median_rank": ("", 1)}.get(
        metric.split(",")[0].split(" ")[0], ("", 4)
    )
    has_error = number.spread is not None and metric.startswith(("KID", "inception_score"))  # the spread of other metrics is over images
    error = f" ± {number.spread:.{digits}f}" if has_error else ""
    return f"{number.value:.{digits}f}{unit}{_interval(number, digits) or error}"


def _interval(number: Number, digits: int, factor: int = 1) -> str:
    return f" [{factor * number.low:.{digits}f}, {factor * number.high:.{digits}f}]" if number.low is not None and number.high is not None else ""


Table = tuple[Setting, list[Line]]


def cells(lines: Sequence[Line], only_published: Sequence[str] = ()) -> tuple[list[str], list[list[str]], set[tuple[int, int]], int]:
    """(header, rows, (row, column) of the bold cells, columns of measured models) of one table.

    One line per metric and one column per model. Published numbers of these models and of `only_published` follow in columns of their own.
    """
    models = list(dict.fromkeys(model for line in lines for model in line.values))
    metrics = [line.metric for line in lines]
    columns = [column for model in (*models, *only_published) for column in published.beside(model, metrics).items()]
    rows = [
        [
            line.metric,
            *(shown(line.metric, line.values[model]) if model in line.values else "" for model in models),
            *(values.get(line.metric, "") for _, values in columns),
        ]
        for line in lines
    ]
    bold = {(y, 1 + models.index(best)) for y, line in enumerate(lines) if (best := surely_best(line))}
    return ["", *models, *(heading for heading, _ in columns)], rows, bold, len(models)
