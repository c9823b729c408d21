"""What one evaluation measured, as files: results.json (rows of numbers with their settings) and pictures.jsonl (the scores of each sample)."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openvision3.contents import holds
from openvision3.evaluate.protocol import Number
from openvision3.evaluate.statistics import Column, Columns, Difference
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
