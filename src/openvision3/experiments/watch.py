"""The curves of runs, in the terminal while they are written, or as a picture: openvision3 watch RUN [RUN ...]."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from openvision3.files import write_whole
from openvision3.progress import duration

COLOURS = ("cyan", "magenta", "yellow", "green", "red", "blue")
MARKS = "*x+o#@"
"""one a run, where there is no colour to tell them apart"""

ORDER = (
    "train/loss", "train/pixel", "train/latent", "train/perceptual", "train/contrastive", "train/caption", "val/psnr", "val/loss", "val/*",
    "rate", "train/grad_norm", "samples_per_second", "wait", "memory_gb",
)  # fmt: skip
"""What is shown, and in which order; other names follow where they are asked for."""

PANEL = 38
"""least width of a panel, in characters"""


@dataclass
class Curves:
    """What one run has written so far; `read` takes in what is new."""

    folder: Path
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    """{metric: {step: value}}; a step that is written twice counts as last written"""
    unreadable: int = 0
    restarts: int = 0
    written: float = 0.0
    """when the file last changed"""
    steps: int = 0
    batch: int = 0
    _offset: int = 0
    _head: bytes = b""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def file(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def step(self) -> int:
        return max((step for points in self.values.values() for step in (next(reversed(points)),)), default=0)

    @property
    def finished(self) -> bool:
        return 0 < self.steps <= self.step

    def read(self) -> Curves:
        """Whole new lines only: one that is half written is read when it is whole. A file that starts anew is read anew."""
        try:
            with open(self.file, "rb") as file:
                self.written = os.fstat(file.fileno()).st_mtime
                size = os.fstat(file.fileno()).st_size
                if size < self._offset or file.read(len(self._head)) != self._head:
                    self.values, self.unreadable, self._offset, self._head = {}, 0, 0, b""
                    self.restarts += 1
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return self
        whole, _, _ = new.rpartition(b"\n")
        if whole:
            if not self._offset:
                self._head = whole.partition(b"\n")[0][:256]
            self._offset += len(whole) + 1
            for line in whole.split(b"\n"):
                self._take(line)
            self._settings()
        return self

    def _take(self, line: bytes) -> None:
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
                if points and step <= next(reversed(points)):  # a run that went on from a checkpoint before its last line
                    for later in [s for s in points if s >= step]:
                        del points[later]
                points[step] = float(value)

    def _settings(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            self.steps, self.batch = int(config.get("steps", 0)), int(config.get("batch", 0))

    def last(self, name: str) -> float | None:
        points = self.values.get(name)
        return next(reversed(points.values())) if points else None


CANDIDATES = "val/contrastive_candidates"


def candidates(run: Curves, name: str) -> int | None:
    """Over how many images at once a contrastive loss of the run is taken: guessing gives the logarithm of that. None: it is another metric, or unknown."""
    if name == "train/contrastive":
        return run.batch or None
    count = run.last(CANDIDATES) if name == "val/contrastive" else None
    return int(count) if count else None


def of_candidates(runs: Sequence[Curves], name: str) -> str:
    """What has to stand beside the name of a contrastive loss: " of 256 (chance 5.55)"; "" beside any other."""
    counts = sorted({candidates(run, name) or 0 for run in runs if name in run.values}) if name.endswith("/contrastive") else []
    if not counts:
        return ""
    told = " and ".join(f"{count:,}" if count else "an unknown number" for count in counts)
    return f" of {told}" + (f" (chance {math.log(counts[0]):.2f})" if len(counts) == 1 and counts[0] else ": not comparable" if len(counts) > 1 else "")


def open_runs(names: Sequence[str]) -> list[Curves]:
    """Raises ValueError where there is no such folder."""
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


def chosen(runs: Sequence[Curves], patterns: Sequence[str] = ()) -> list[str]:
    """The metrics to show that occur, in order. Raises ValueError for a pattern that fits none of those there are."""
    there = list(dict.fromkeys(name for run in runs for name in run.values))
    found = list(dict.fromkeys(name for pattern in patterns or ORDER for name in there if fnmatch.fnmatchcase(name, pattern)))
    found = [name for name in found if patterns or name != CANDIDATES]  # it stands in the title of the loss
    for pattern in patterns:
        if there and not fnmatch.filter(there, pattern):
            raise ValueError(f"no metric fits {pattern!r}; there are {', '.join(there)}")
    return found


# -- in the terminal -----------------------------------------------------------------------------------------------


class Picture:
    """All panels, as wide and as high as the console is when it is drawn; `whole` draws them all whatever the height."""

    def __init__(self, runs: Sequence[Curves], metrics: Sequence[str], *, whole: bool = False, hint: str = ""):
        self.runs, self.metrics, self.whole, self.hint = runs, metrics, whole, hint

    def __rich_console__(self, console: Console, options: ConsoleOptions):
        coloured = console.color_system is not None and not console.no_color
        heads = [_head(run, i, len(self.runs) > 1, coloured) for i, run in enumerate(self.runs)]
        width, columns = options.max_width, max(1, min(4, options.max_width // PANEL))
        room = options.max_height - sum(len(head.wrap(console, width)) for head in heads) - 1 if not self.whole else 0
        rows = -(-len(self.metrics) // columns)
        height = 10
        if not self.whole:
            height = max(8, min(14, room // max(1, rows)))
            rows = max(1, min(rows, room // height))
        shown = self.metrics[: rows * columns]
        yield from heads
        cell = width // columns
        table = Table.grid(padding=0)
        for _ in range(columns):
            table.add_column(width=cell, no_wrap=True)
        for start in range(0, len(shown), columns):
            panels = [_panel(self.runs, name, cell - 2, height - 3, coloured, options.ascii_only) for name in shown[start : start + columns]]
            table.add_row(*panels)
        yield table
        left = len(self.metrics) - len(shown)
        more = f"{left} more with a higher terminal, or --metrics" if left > 0 else ""
        if more or self.hint:
            yield Text("; ".join(part for part in (more, self.hint) if part), style="dim")


def _head(run: Curves, index: int, several: bool, coloured: bool) -> Text:
    mark = [(f"{'━━' if coloured else MARKS[index % len(MARKS)]} ", COLOURS[index % len(COLOURS)])] if several else []
    if not run.values:
        return Text.assemble(*mark, f"{run.folder}: no numbers yet, {run.file.name} is {'empty' if run.file.exists() else 'not there'}")
    parts = [f"step {run.step:,}" + (f" of {run.steps:,}" if run.steps else "")]
    speed, wait = run.last("samples_per_second"), run.last("wait")
    if speed is not None:
        parts.append(f"{speed:,.0f} samples/s" if speed >= 10 else f"{speed:.1f} samples/s")
    if wait is not None:
        parts.append(f"wait {100 * wait:.0f}%")
    if run.finished:
        parts.append("finished")
    else:
        if speed and run.steps and run.batch:
            parts.append(f"left {duration((run.steps - run.step) * run.batch / speed)}")
        parts.append(f"written {duration(time.time() - run.written)} ago")
    if run.unreadable:
        parts.append(f"{run.unreadable} unreadable line{'s' * (run.unreadable > 1)}")
    return Text.assemble(*mark, (str(run.folder), "bold"), "  " + "  ".join(parts))


def _panel(runs: Sequence[Curves], name: str, width: int, height: int, coloured: bool, plain: bool) -> RenderableType:
    series = [[(step, value) for step, value in run.values.get(name, {}).items() if math.isfinite(value)] for run in runs]
    bad = sum(not math.isfinite(value) for run in runs for value in run.values.get(name, {}).values())
    title = Text(name.removeprefix("train/") + of_candidates(runs, name), style="bold")
    for i, points in enumerate(series):
        if points:
            title.append("  " + number(points[-1][1]), style=f"not bold {COLOURS[i % len(COLOURS)] if len(runs) > 1 else ''}".strip())
    if bad:
        title.append(f"  {bad} not finite", style="not bold red")
    everything = [point for points in series for point in points]
    if not everything:
        return Group(title, Text("no finite value"), Text(""))
    low, high = min(y for _, y in everything), max(y for _, y in everything)
    first, last = min(x for x, _ in everything), max(x for x, _ in everything)
    labels = [number(high), *[""] * (height - 2), number(low)] if height > 1 else [number(high)]
    side = max(map(len, labels))
    plot = max(4, width - side - 1)
    marks = plain or (len(runs) > 1 and not coloured)
    rows = (_marked if marks else _dotted)(series, plot, height, (first, last), (low, high))
    lines = [Text.assemble((f"{label:>{side}} ", "dim"), row) for label, row in zip(labels, rows, strict=True)]
    ends = f"{first:,}", f"{last:,}" if last > first else ""
    axis = Text(" " * (side + 1) + ends[0] + ends[1].rjust(max(len(ends[1]) + 1, plot - len(ends[0]))), style="dim")
    for line in (title, axis):
        line.truncate(width)
    return Group(title, *lines, axis, Text(""))


def number(value: float) -> str:
    """Short: 0.00025 -> 2.5e-04, 12345 -> 12.3k."""
    if value == 0:
        return "0"
    if abs(value) >= 1e15 or abs(value) < 1e-3:
        return f"{value:.1e}"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.4g}"


def _pixels(points: Sequence[tuple[int, float]], width: int, height: int, x_range: tuple[int, int], y_range: tuple[float, float]) -> set[tuple[int, int]]:
    """Points joined by lines, on a grid with its origin top left; of the points in one column only the extremes and the ends count."""
    x_size, y_size = max(1, x_range[1] - x_range[0]), (y_range[1] - y_range[0]) or 1.0
    flat = y_range[1] == y_range[0]
    columns: dict[int, list[int]] = {}
    for x, y in points:
        column = round((x - x_range[0]) / x_size * (width - 1))
        row = (height - 1) // 2 if flat else round((y_range[1] - y) / y_size * (height - 1))
        columns.setdefault(column, []).append(row)
    lit: set[tuple[int, int]] = set()
    before: tuple[int, int] | None = None
    for column, rows in columns.items():
        lit |= {(column, row) for row in range(min(rows), max(rows) + 1)}
        if before is not None:
            length = max(abs(column - before[0]), abs(rows[0] - before[1]), 1)
            lit |= {(before[0] + round((column - before[0]) * i / length), before[1] + round((rows[0] - before[1]) * i / length)) for i in range(length)}
        before = column, rows[-1]
    return lit


_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""of a braille character's dots, by row and column"""


def _dotted(series: Sequence[Sequence[tuple[int, float]]], width: int, height: int, x_range: tuple[int, int], y_range: tuple[float, float]) -> list[Text]:
    """Two by four dots a character; where runs cross, the later one lends its colour."""
    dots: dict[tuple[int, int], int] = {}
    owner: dict[tuple[int, int], int] = {}
    for index, points in enumerate(series):
        for x, y in _pixels(points, 2 * width, 4 * height, x_range, y_range):
            place = x // 2, y // 4
            dots[place] = dots.get(place, 0) | _BITS[y % 4][x % 2]
            owner[place] = index
    return [_row([(chr(0x2800 + dots[x, y]) if (x, y) in dots else " ", owner.get((x, y))) for x in range(width)]) for y in range(height)]


def _marked(series: Sequence[Sequence[tuple[int, float]]], width: int, height: int, x_range: tuple[int, int], y_range: tuple[float, float]) -> list[Text]:
    """A character of its own for each run."""
    cells: dict[tuple[int, int], int] = {}
    for index, points in enumerate(series):
        cells |= dict.fromkeys(_pixels(points, width, height, x_range, y_range), index)
    return [_row([(MARKS[cells[x, y] % len(MARKS)] if (x, y) in cells else " ", cells.get((x, y))) for x in range(width)]) for y in range(height)]


def _row(cells: Sequence[tuple[str, int | None]]) -> Text:
    text = Text()
    for character, index in cells:
        text.append(character, style=COLOURS[index % len(COLOURS)] if index is not None else "")
    return text


def watch(names: Sequence[str], *, once: bool = False, metrics: Sequence[str] = (), every: float = 2.0, screen: Console | None = None) -> None:
    """Draw the curves now, or on a terminal again and again until all runs have ended or Ctrl-C.

    Raises:
        ValueError: no such run folder, or a pattern of metrics that fits none.
    """
    if not 0.1 <= every < math.inf:
        raise ValueError(f"every {every} must be at least 0.1 seconds")
    runs = open_runs(names)
    screen = screen or Console(highlight=False)
    if once or not screen.is_terminal:
        screen.print(Picture(runs, chosen(runs, metrics), whole=True))
        return
    hint = "Ctrl-C ends watching, not the run"
    with contextlib.suppress(KeyboardInterrupt), Live(console=screen, screen=True, auto_refresh=False) as live:
        while True:
            live.update(Picture(runs, chosen(runs, metrics), hint=hint), refresh=True)
            if all(run.finished for run in runs):
                break
            time.sleep(every)
            for run in runs:
                run.read()
    screen.print(Picture(runs, chosen(runs, metrics), whole=True))


# -- as a picture --------------------------------------------------------------------------------------------------


def draw(names: Sequence[str], path: str | Path, metrics: Sequence[str] = ()) -> int:
    """One panel a metric, all runs in each, written to `path` whole or not at all; returns how many panels.

    Raises:
        ValueError: no such run folder, or nothing to draw. OSError: `path` cannot be written.
    """
    from openvision3.report import plots

    runs = open_runs(names)
    shown = chosen(runs, metrics)
    if not shown:
        raise ValueError(f"no numbers yet in {', '.join(str(run.file) for run in runs)}: nothing to draw")
    labels = [str(run.folder) for run in runs] if len(runs) > 1 else [""]
    panels = []
    for name in shown:
        single = f": {number(value)}" if len(runs) == 1 and (value := runs[0].last(name)) is not None else ""
        lines = {label: plots.Line(list(points), list(points.values())) for label, run in zip(labels, runs, strict=True) if (points := run.values.get(name))}
        panels.append(plots.Lines(name.removeprefix("train/") + of_candidates(runs, name) + single, lines))
    write_whole(path, plots.draw(panels, labels))
    return len(shown)
