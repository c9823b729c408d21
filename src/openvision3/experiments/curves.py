"""What runs have written to their metrics.jsonl so far: one `Curves` a run. Imports no torch, so that watching starts at once."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ORDER = (
    "train/loss", "train/pixel", "train/latent", "train/perceptual", "train/contrastive", "train/caption", "val/psnr", "val/loss", "val/*",
    "rate", "train/grad_norm", "samples_per_second", "wait", "memory_gb",
)  # fmt: skip
"""The metrics shown by default, in this order."""

CANDIDATES = "val/contrastive_candidates"


@dataclass
class Curves:
    """The metrics of one run; `read` adds what is new."""

    folder: Path
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    """{metric: {step: value}}; of a step written twice, the last value"""
    unreadable: int = 0
    """lines that are no rows"""
    written: float = 0.0
    """when the file last changed, in seconds since the epoch"""
    steps: int = 0
    batch: int = 0
    _offset: int = 0
    _head: bytes = b""

    @property
    def file(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def step(self) -> int:
        return max((next(reversed(points)) for points in self.values.values()), default=0)

    @property
    def is_finished(self) -> bool:
        return 0 < self.steps <= self.step

    def last(self, metric: str) -> float | None:
        points = self.values.get(metric)
        return next(reversed(points.values())) if points else None

    def read(self) -> Curves:
        """Read the new whole lines; a half-written line waits for its end, and a file that was started anew is read from its beginning."""
        try:
            with open(self.file, "rb") as file:
                status = os.fstat(file.fileno())
                self.written = status.st_mtime
                if status.st_size < self._offset or file.read(len(self._head)) != self._head:
                    self.values, self.unreadable, self._offset, self._head = {}, 0, 0, b""
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return self
        lines, _, _ = new.rpartition(b"\n")
        if lines:
            if not self._offset:
                self._head = lines.partition(b"\n")[0][:256]
            self._offset += len(lines) + 1
            for line in lines.split(b"\n"):
                self._add_row(line)
            self._read_config()
        return self

    def _add_row(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            row = json.loads(line)
            step = int(row.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            self.unreadable += 1
            return
        for name, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                points = self.values.setdefault(name, {})
                if points and step <= next(reversed(points)):  # the run was resumed from a checkpoint before its last row
                    for later in [s for s in points if s >= step]:
                        del points[later]
                points[step] = float(value)

    def _read_config(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):  # metrics can be watched without a config
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            self.steps, self.batch = int(config.get("steps", 0)), int(config.get("batch", 0))


def open_runs(names: Sequence[str]) -> list[Curves]:
    """The named run folders, or their metrics.jsonl. Raises ValueError if there is no such folder."""
    if not names:
        raise ValueError("no run given; name one or more run folders, such as runs/mini")
    folders = []
    for name in names:
        path = Path(name)
        path = path.parent if path.name == "metrics.jsonl" else path
        if not path.is_dir():
            raise ValueError(f"no such run folder: {name}")
        folders.append(path)
    return [Curves(folder).read() for folder in folders]


def choose_metrics(runs: Sequence[Curves], patterns: Sequence[str] = ()) -> list[str]:
    """The metrics of these runs that fit the patterns, or ORDER without any. Raises ValueError for a pattern that fits no metric."""
    names = list(dict.fromkeys(name for run in runs for name in run.values))
    for pattern in patterns:
        if names and not fnmatch.filter(names, pattern):
            raise ValueError(f"no metric fits {pattern!r}; choose from {', '.join(names)}")
    chosen = dict.fromkeys(name for pattern in patterns or ORDER for name in fnmatch.filter(names, pattern))
    return [name for name in chosen if patterns or name != CANDIDATES]  # the title of the loss says it


def candidates(run: Curves, metric: str) -> int | None:
    """The number of images that a contrastive loss chooses among. None: the metric is no contrastive loss, or the number is unknown."""
    if metric == "train/contrastive":
        return run.batch or None
    count = run.last(CANDIDATES) if metric == "val/contrastive" else None
    return int(count) if count else None


def describe_candidates(runs: Sequence[Curves], metric: str) -> str:
    """What a title adds to a contrastive loss: " of 256 (chance 5.55)", where chance is the loss of guessing, log 256; "" for any other metric."""
    counts = sorted({candidates(run, metric) or 0 for run in runs if metric in run.values}) if metric.endswith("/contrastive") else []
    if not counts:
        return ""
    numbers = " and ".join(f"{count:,}" if count else "an unknown number" for count in counts)
    if len(counts) > 1:
        return f" of {numbers}: not comparable"
    return f" of {numbers}" + (f" (chance {math.log(counts[0]):.2f})" if counts[0] else "")


def is_comparable(runs: Sequence[Curves], metric: str) -> bool:
    """Whether the metric means the same in all runs: contrastive losses over different numbers of images are not comparable."""
    return not metric.endswith("/contrastive") or len({candidates(run, metric) for run in runs if metric in run.values}) <= 1
