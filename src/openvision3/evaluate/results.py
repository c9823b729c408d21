"""Numbers of one or several evaluations in one file, and the tables in which only like may stand beside like."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from openvision3.contents import holds
from openvision3.evaluate.protocol import Number
from openvision3.evaluate.statistics import Column, Columns, Difference, best_first, differences
from openvision3.files import write_whole

FORMAT = 1
UNSEEN, SEEN = "unseen in training", "seen in training"
"""how the names of these parts begin"""
FILE = "results.json"


@dataclass(frozen=True)
class Setting:
    """What the numbers of one evaluation have in common."""

    data: str
    """the names of the set, as they were given"""
    data_sha256: str
    """over its pictures as they were evaluated"""
    resolution: str
    """such as 128x128"""
    crop: str
    """how a picture became that large"""
    dtype: str
    seed: int
    guidance: str = "none"
    labels: str = "none"
    """where the classes come from, and hashes of what stands for them"""
    captions: str = "none"
    """where the captions come from, and a hash of them"""
    overlap: str = "not looked for"
    """what the samples were compared with, to tell those that training has seen from the others"""


@dataclass(frozen=True)
class Row:
    """One number of one model, whole: all that has to be known to repeat it or to compare it."""

    model: str
    model_sha256: str
    number: Number
    setting: Setting
    note: str = ""
    licence: str = "unknown"
    """of the model's weights"""

    @property
    def metric(self) -> str:
        return self.number.metric

    @property
    def protocol(self) -> tuple:
        """Equal for numbers that may be compared: not the model, the value, the versions of libraries, and the path that leads to the pictures."""
        n = self.number
        return (
            n.metric,
            n.count,
            n.how,
            n.network,
            n.network_sha256,
            *(value for name, value in asdict(self.setting).items() if name not in ("data", "overlap")),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "model_sha256": self.model_sha256,
            "licence": self.licence,
            "note": self.note,
            **asdict(self.number),
            **asdict(self.setting),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Row:
        """Raises KeyError, TypeError for a row that lacks a field, or has one of another type."""
        own = {name: values[name] for name in ("model", "model_sha256", "note", "licence")}
        values = {"low": None, "high": None, "interval": "", "part": "", "overlap": "not looked for", **values}  # earlier versions knew no intervals
        parts = [{name: values[name] for name in kind.__dataclass_fields__} for kind in (Number, Setting)]
        maybe = (int, float, type(None))
        numbers = {"value": (int, float), "count": (int,), "seed": (int,), "spread": maybe, "low": maybe, "high": maybe}
        for name, value in (*own.items(), *parts[0].items(), *parts[1].items()):
            if not isinstance(value, numbers.get(name, (str,))):  # type: ignore[arg-type]
                raise TypeError(f"{name} is {value!r}")
        return cls(own["model"], own["model_sha256"], Number(**parts[0]), Setting(**parts[1]), own["note"], own["licence"])


@dataclass(frozen=True)
class NotRun:
    """A metric that was not measured, and what it needs."""

    model: str
    metric: str
    needs: str


def by_need(not_run: Iterable[NotRun]) -> list[tuple[str, list[str]]]:
    """[(what is needed, ["metric of model", ...])]: each once, however many evaluations say so."""
    found: dict[str, dict[str, None]] = {}
    for each in not_run:
        found.setdefault(each.needs, {})[f"{each.metric} of {each.model}"] = None
    return [(what, list(who)) for what, who in found.items()]


@dataclass
class Results:
    """What one command measured."""

    rows: list[Row] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    """pictures that could not be read: {key, reason, detail}"""
    left_out: list[dict[str, Any]] = field(default_factory=list)
    """pictures that a metric leaves out: {model, of, reason, count}"""
    command: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    differences: list[Difference] = field(default_factory=list)
    """of two models on the same samples"""
    overlap: str = ""
    """how many samples training has seen, in words"""

    def save(self, folder: Path) -> Path:
        """Write results.json into `folder`, whole or not at all. Raises OSError."""
        path = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        values = {
            "format": FORMAT,
            "command": self.command,
            "seconds": round(self.seconds, 1),
            "environment": self.environment,
            "rows": [row.to_json() for row in self.rows],
            "differences": [asdict(each) for each in self.differences],
            "not_run": [asdict(each) for each in self.not_run],
            "skipped": self.skipped,
            "left_out": self.left_out,
            "overlap": self.overlap,
        }
        write_whole(path, json.dumps(values, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """A results.json, or the folder that holds one. Raises FileNotFoundError, ValueError."""
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no results at {path}; openvision3 evaluate writes them")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict) or "format" not in values or "rows" not in values:
                raise ValueError("it holds other JSON")
            if values["format"] != FORMAT:
                raise ValueError(f"it has format {values['format']}, this version reads format {FORMAT}; evaluate anew")
            rows = [Row.from_json(row) for row in values["rows"]]
            not_run = [NotRun(**each) for each in values["not_run"]]
            apart = [Difference(**each) for each in values.get("differences", [])]
            return cls(
                rows,
                not_run,
                values["skipped"],
                values["left_out"],
                values["command"],
                values["environment"],
                values["seconds"],
                apart,
                values.get("overlap", ""),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            seen = {
                json.JSONDecodeError: f"it {holds(path)}",
                UnicodeDecodeError: f"it {holds(path)}",
                KeyError: f"it has no field {error}",
                TypeError: f"its fields do not fit: {error}",
            }
            raise ValueError(f"{path} is not a results.json of `openvision3 evaluate`: {seen.get(type(error), error)}") from error


@dataclass
class Scores:
    """What each sample scored, of one evaluation or of several on the same samples: what stands in pictures.jsonl."""

    columns: dict[str, Columns] = field(default_factory=dict)
    """by model; a sample is named by the hash of its pixels and how often these came before"""
    parts: dict[str, set[tuple[str, int]]] = field(default_factory=dict)
    """the samples of each part that numbers are over, such as the unseen ones"""

    @classmethod
    def load(cls, folder: Path) -> Scores:
        """Those of the pictures.jsonl in `folder`; none where there is no such file. Raises ValueError for one that is damaged."""
        found = cls()
        path = folder / SCORES
        if not path.is_file():
            return found
        seen: Counter[tuple[str, str]] = Counter()
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                if "image" not in row:  # of an earlier version
                    continue
                sample = (row["image"], seen[row["model"], row["image"]])
                seen[row["model"], row["image"]] += 1
                for part in row["parts"]:
                    found.parts.setdefault(part, set()).add(sample)
                for name in row.keys() - set(NOT_SCORES):
                    value = row[name]
                    column = found.columns.setdefault(row["model"], {}).setdefault(name, Column([], []))
                    values = value if name in ROWS_OF_CAPTIONS else [value]
                    column.samples.extend([sample] * len(values))
                    column.values.extend(values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no file of scores: {type(error).__name__} {error}; remove it, or evaluate again") from error
        return found


SCORES = "pictures.jsonl"
NOT_SCORES = ("model", "key", "image", "parts", "written", "true")
"""what else stands in a line"""
ROWS_OF_CAPTIONS = ("text_to_image_rank",)
"""columns with a row a caption: a list for each sample"""


def scores_by_sample(columns: Columns) -> dict[Any, dict[str, Any]]:
    """{sample: {column: what it scored}}, as it stands in pictures.jsonl; numbers to seven digits."""
    found: dict[Any, dict[str, Any]] = {}
    for name, column in columns.items():
        for sample, value in zip(column.samples, column.values, strict=True):
            own = found.setdefault(sample, {})
            rounded = float(f"{value:.7g}") if isinstance(value, float) else value
            if name in ROWS_OF_CAPTIONS:
                own.setdefault(name, []).append(rounded)
            else:
                own[name] = rounded
    return found


@dataclass
class Line:
    """One line of a table: a metric by one protocol, and what each model has in it."""

    metric: str
    how: str
    values: dict[str, Number]
    differences: list[Difference] = field(default_factory=list)
    """of its models on the same samples, where their scores are at hand"""


def table(rows: Iterable[Row]) -> list[Line]:
    """Rows of several models -> a line a metric. Numbers that may not be compared are refused.

    Raises:
        ValueError: two unlike protocols of one metric, or two numbers of one model by the same one.
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
    """The data, and which part of them the numbers are over."""
    part = next((number.part for line in lines for number in line.values.values()), "")
    return f"{setting.data}, {part}" if part else setting.data


def leading(rows: Iterable[Row]) -> list[Row]:
    """Without the numbers over seen samples and over all where there is one over those that training has not seen: what a figure shows."""
    rows = list(rows)
    apart = {(row.model, row.metric, row.setting.data) for row in rows if row.number.part.startswith(UNSEEN)}
    return [row for row in rows if row.number.part.startswith(UNSEEN) or (row.model, row.metric, row.setting.data) not in apart]


def split(rows: Sequence[Row]) -> list[tuple[Setting, list[Line]]]:
    """Rows of any protocols -> as many tables as are needed for each to hold like numbers only."""
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


PERCENT = ("exact_match", "token_f1", "bleu_", "rouge_l", "meteor", "_r@", "top_", "mean_class_accuracy", "largest_class_share", "accuracy")
"""Metrics that are shares of 1, shown as %."""


def surely_best(line: Line) -> str:
    """The model that a paired test tells from the second best of the line; "" where there is none."""
    ranking = best_first(line.metric, {model: number.value for model, number in line.values.items()})
    apart = {frozenset((each.a, each.b)) for each in line.differences if each.differs}
    return ranking[0] if len(ranking) > 1 and frozenset(ranking[:2]) in apart else ""


def titles(tables: Sequence[tuple[Setting, Sequence[Line]]], rows: Iterable[Row]) -> list[str]:
    """What stands above each table: set, size, precision, how many; of models whose name stands for several weights the sha256 of those in this table."""
    hashes: dict[tuple[str, Number], set[str]] = {}
    by_name: dict[str, set[str]] = {}
    for row in rows:
        hashes.setdefault((row.model, row.number), set()).add(row.model_sha256)
        by_name.setdefault(row.model, set()).add(row.model_sha256)
    made = []
    for setting, lines in tables:
        counts = sorted({number.count for line in lines for number in line.values.values()})
        which: dict[str, None] = {}
        for line in lines:
            for model, number in line.values.items():
                if len(by_name.get(model, ())) > 1:
                    which |= {f"{model} sha256 {each[:12] or 'none'}": None for each in sorted(hashes[model, number])}
        head = f"{named(setting, lines)}, {setting.resolution}, {setting.dtype}, N = {', '.join(f'{count:,}' for count in counts)}"
        made.append("; ".join([head, *which]))
    return made


def how_to_read(lines: Iterable[Line]) -> str:
    """What brackets and bold figures of tables mean; "" where there are none."""
    lines = list(lines)
    brackets = any(number.low is not None for line in lines for number in line.values.values())
    several = any(len(line.values) > 1 for line in lines)
    bold = "Bold: the best, where it differs from the second best with p < .05, paired over the same samples." if several else ""
    return " ".join(part for part in ("[95 % interval over samples]." if brackets else "", bold) if part)


def with_differences(tables: Sequence[tuple[Setting, list[Line]]], evaluations: Sequence[tuple[Sequence[Row], Scores]]) -> list[Difference]:
    """Puts the paired differences into each line of the tables, and returns them all. `evaluations` are the rows and the scores of each.

    Raises:
        ValueError: numbers of one protocol over unlike samples.
    """
    places: dict[tuple[str, Number], Scores] = {(row.model, row.number): scores for rows, scores in evaluations for row in rows}
    for _, lines in tables:
        for line in lines:
            own = {model: places[model, number] for model, number in line.values.items() if (model, number) in places}
            parts = {name: samples for scores in own.values() for name, samples in scores.parts.items()}
            columns = {model: scores.columns[model] for model, scores in own.items() if model in scores.columns}
            line.differences = differences(line.metric, line.values, columns, parts)
    return [each for _, lines in tables for line in lines for each in line.differences]


def shown(metric: str, number: Number) -> str:
    """A value with its unit and the interval over samples: 29.81 dB [29.52, 30.10], 37.9 % [30.1, 46.0]; without one, KID with its error: 0.0195 ± 0.0015."""
    if any(part in metric for part in PERCENT):
        return f"{100 * number.value:.1f} %" + _interval(number, 1, 100)
    unit, digits = {"psnr": (" dB", 2), "image_to_text_median_rank": ("", 1), "text_to_image_median_rank": ("", 1)}.get(
        metric.split(",")[0].split(" ")[0], ("", 4)
    )
    error = f" ± {number.spread:.{digits}f}" if number.spread is not None and metric.startswith("KID") else ""  # others spread over pictures
    return f"{number.value:.{digits}f}{unit}{_interval(number, digits) or error}"


def _interval(number: Number, digits: int, factor: int = 1) -> str:
    return f" [{factor * number.low:.{digits}f}, {factor * number.high:.{digits}f}]" if number.low is not None and number.high is not None else ""
