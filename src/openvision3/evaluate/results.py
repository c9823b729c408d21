"""The files of one evaluation: results.json (rows of numbers with their settings) and scores.jsonl (the scores of each sample)."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openvision3.contents import holds
from openvision3.evaluate.metrics import vqa
from openvision3.evaluate.protocol import Number
from openvision3.evaluate.statistics import Column, Columns, Difference
from openvision3.files import write_whole

FORMAT = 1
UNSEEN, SEEN = "unseen in training", "seen in training"
"""prefixes of the names of these parts"""
UNSEEN_CONCEPT, UNSEEN_STYLE, SEEN_CONCEPT = DRAWING_KINDS = ("unseen concept", "unseen style", "seen concept")
"""the kinds of held-out drawing, prefixes of the names of these parts: no style of its family was trained on; its family was, but not in its style;
its family was, in its style"""
FILE = "results.json"


@dataclass(frozen=True)
class Setting:
    """What the numbers of one evaluation have in common."""

    data: str
    """the names of the data, as on the command line"""
    data_sha256: str
    """sha256 over its images as they were evaluated"""
    resolution: str
    """such as 128x128"""
    crop: str
    """how images were cropped and resized"""
    dtype: str
    seed: int
    guidance: str = "none"
    labels: str = "none"
    """source of the classes, and hashes of the texts or images that represent them"""
    captions: str = "none"
    """source of the captions, and a hash of them"""
    overlap: str = "not looked for"
    """the training data that the samples were compared with"""


@dataclass(frozen=True)
class Row:
    """One number of one model, with everything needed to repeat it or to compare it."""

    model: str
    model_sha256: str
    number: Number
    setting: Setting
    note: str = ""
    licence: str = "unknown"
    """licence of the model's weights"""

    @property
    def metric(self) -> str:
        return self.number.metric

    @property
    def protocol(self) -> tuple:
        """Key of comparable numbers: every field except model, value, library versions and names of the data."""
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
        """Raises KeyError, TypeError for a row that lacks a field or has a field of another type."""
        own = {name: values[name] for name in ("model", "model_sha256", "note", "licence")}
        values = {"low": None, "high": None, "interval": "", "part": "", "overlap": "not looked for", **values}  # earlier versions wrote no intervals
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
    """The results of one command."""

    rows: list[Row] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    """images that could not be read: {key, reason, detail}"""
    left_out: list[dict[str, Any]] = field(default_factory=list)
    """images that a metric leaves out: {model, of, reason, count}"""
    command: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    differences: list[Difference] = field(default_factory=list)
    """paired differences of two models on the same samples"""
    overlap: str = ""
    """one line about how many samples training has seen"""

    def save(self, folder: Path) -> Path:
        """Write results.json into `folder` atomically. Raises OSError."""
        path = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        values = {
            "format": FORMAT,
            "command": self.command,
            "seconds": round(self.seconds, 1),
            "environment": self.environment,
            "rows": [row.to_json() for row in self.rows],
            "differences": [asdict(one) for one in self.differences],
            "not_run": [asdict(entry) for entry in self.not_run],
            "skipped": self.skipped,
            "left_out": self.left_out,
            "overlap": self.overlap,
        }
        write_whole(path, json.dumps(values, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Load a results.json, or the one in a folder. Raises FileNotFoundError, ValueError."""
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
            not_run = [NotRun(**entry) for entry in values["not_run"]]
            differences = [Difference(**one) for one in values.get("differences", [])]
            return cls(
                rows,
                not_run,
                values["skipped"],
                values["left_out"],
                values["command"],
                values["environment"],
                values["seconds"],
                differences,
                values.get("overlap", ""),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            seen = {
                json.JSONDecodeError: f"it {holds(path)}",
                UnicodeDecodeError: f"it {holds(path)}",
                KeyError: f"it has no field {error}",
                TypeError: f"its fields have other types: {error}",
            }
            raise ValueError(f"{path} is not a results.json of `openvision3 evaluate`: {seen.get(type(error), error)}") from error


@dataclass
class Scores:
    """The scores of each sample, from one evaluation or several on the same samples: the content of scores.jsonl."""

    columns: dict[str, Columns] = field(default_factory=dict)
    """columns by model. A sample is identified by the hash of its pixels and the number of earlier samples with the same pixels"""
    parts: dict[str, set[tuple[str, int]]] = field(default_factory=dict)
    """the samples of each part, such as the unseen samples"""

    @classmethod
    def load(cls, folder: Path) -> Scores:
        """Load scores.jsonl of `folder` and its answers.jsonl; without these files the scores are empty. Raises ValueError for a damaged file."""
        scores = cls()
        if (folder / vqa.ANSWERS).is_file():
            try:
                scores.columns = vqa.load_columns(folder / vqa.ANSWERS)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{folder / vqa.ANSWERS} is not a file of answers: {type(error).__name__} {error}; evaluate again") from error
        path = folder / SCORES
        if not path.is_file():
            return scores
        seen: Counter[tuple[str, str]] = Counter()
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                if "image" not in row:  # written by an earlier version
                    continue
                sample = (row["image"], seen[row["model"], row["image"]])
                seen[row["model"], row["image"]] += 1
                for part in row["parts"]:
                    scores.parts.setdefault(part, set()).add(sample)
                for name in row.keys() - set(NOT_SCORES):
                    value = row[name]
                    column = scores.columns.setdefault(row["model"], {}).setdefault(name, Column([], []))
                    values = value if name in ROWS_OF_CAPTIONS else [value]
                    column.samples.extend([sample] * len(values))
                    column.values.extend(values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a file of scores: {type(error).__name__} {error}; remove it or evaluate again") from error
        return scores


SCORES = "scores.jsonl"
NOT_SCORES = ("model", "key", "image", "parts", "written", "true")
"""fields of a line that are not scores"""
ROWS_OF_CAPTIONS = ("text_to_image_rank", *(f"{kind}: text_to_image_rank" for kind in DRAWING_KINDS))
"""columns with one row per caption: a list for each sample"""


def scores_by_sample(columns: Columns) -> dict[Any, dict[str, Any]]:
    """{sample: {column: score}}, as written to scores.jsonl; numbers are rounded to seven digits."""
    scores: dict[Any, dict[str, Any]] = {}
    for name, column in columns.items():
        for sample, value in zip(column.samples, column.values, strict=True):
            scores_of_sample = scores.setdefault(sample, {})
            rounded = float(f"{value:.7g}") if isinstance(value, float) else value
            if name in ROWS_OF_CAPTIONS:
                scores_of_sample.setdefault(name, []).append(rounded)
            else:
                scores_of_sample[name] = rounded
    return scores
