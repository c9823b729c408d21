"""The curves of runs, in the terminal while they are written, or as a PNG: openvision3 watch RUN [RUN ...]."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from openvision3.experiments.curves import Curves, choose_metrics, describe_candidates, open_runs
from openvision3.files import write_whole
from openvision3.progress import duration

COLOURS = ("cyan", "magenta", "yellow", "green", "red", "blue")
MARKERS = "*x+o#@"
"""One a run, for terminals without colour."""

PANEL = 38
"""Least width of a panel, in characters."""

Points = Sequence[tuple[int, float]]


class Dashboard:
    """A panel a metric, in the width and height of the console at the time it is drawn; `whole` draws every panel whatever the height."""

    def __init__(self, runs: Sequence[Curves], metrics: Sequence[str], *, whole: bool = False, hint: str = ""):
        self.runs, self.metrics, self.whole, self.hint = runs, metrics, whole, hint

    def __rich_console__(self, console: Console, options: ConsoleOptions):
        has_colour = console.color_system is not None and not console.no_color
        use_braille = not options.ascii_only and (has_colour or len(self.runs) == 1)
        heads = [_head(run, i, len(self.runs) > 1, has_colour) for i, run in enumerate(self.runs)]
        width, columns = options.max_width, max(1, min(4, options.max_width // PANEL))
        rows, height = -(-len(self.metrics) // columns), 10
        if not self.whole:
            room = options.max_height - sum(len(head.wrap(console, width)) for head in heads) - 1
            height = max(8, min(14, room // max(1, rows)))
            rows = max(1, min(rows, room // height))
        shown = self.metrics[: rows * columns]
        yield from heads
        cell = width // columns
        table = Table.grid(padding=0)
        for _ in range(columns):
            table.add_column(width=cell, no_wrap=True)
        for start in range(0, len(shown), columns):
            table.add_row(*(_panel(self.runs, name, cell - 2, height - 3, use_braille) for name in shown[start : start + columns]))
        yield table
        left = len(self.metrics) - len(shown)
        more = f"{left} more with a higher terminal, or --metrics" if left else ""
        if more or self.hint:
            yield Text("; ".join(part for part in (more, self.hint) if part), style="dim")


def _head(run: Curves, index: int, is_one_of_several: bool, has_colour: bool) -> Text:
    """One line: the run, how far it is and how fast it goes."""
    key = [(f"{'━━' if has_colour else MARKERS[index % len(MARKERS)]} ", COLOURS[index % len(COLOURS)])] if is_one_of_several else []
    if not run.values:
        return Text.assemble(*key, f"{run.folder}: no numbers yet, {run.file.name} is {'empty' if run.file.exists() else 'not there'}")
    parts = [f"step {run.step:,}" + (f" of {run.steps:,}" if run.steps else "")]
    speed, wait = run.last("samples_per_second"), run.last("wait")
    if speed is not None:
        parts.append(f"{speed:,.0f} samples/s" if speed >= 10 else f"{speed:.1f} samples/s")
    if wait is not None:
        parts.append(f"wait {100 * wait:.0f}%")
    if run.is_finished:
        parts.append("finished")
    else:
        if speed and run.steps and run.batch:
            parts.append(f"left {duration((run.steps - run.step) * run.batch / speed)}")
        parts.append(f"written {duration(time.time() - run.written)} ago")
    if run.unreadable:
        parts.append(f"{run.unreadable} unreadable line{'s' * (run.unreadable > 1)}")
    return Text.assemble(*key, (str(run.folder), "bold"), "  " + "  ".join(parts))


def _panel(runs: Sequence[Curves], metric: str, width: int, height: int, use_braille: bool) -> RenderableType:
    """Title with the last values, the curves beside their largest and smallest value, the first and the last step."""
    series = [[(step, value) for step, value in run.values.get(metric, {}).items() if math.isfinite(value)] for run in runs]
    not_finite = sum(not math.isfinite(value) for run in runs for value in run.values.get(metric, {}).values())
    title = Text(metric.removeprefix("train/") + describe_candidates(runs, metric), style="bold")
    for i, points in enumerate(series):
        if points:
            title.append("  " + format_number(points[-1][1]), style=f"not bold {COLOURS[i % len(COLOURS)] if len(runs) > 1 else ''}".strip())
    if not_finite:
        title.append(f"  {not_finite} not finite", style="not bold red")
    steps, values = [step for points in series for step, _ in points], [value for points in series for _, value in points]
    if not values:
        return Group(title, Text("no finite value"), Text(""))
    labels = [format_number(max(values)), *[""] * (height - 2), format_number(min(values))]
    side = max(map(len, labels))
    plot_width = max(4, width - side - 1)
    rows = _plot(series, plot_width, height, use_braille)
    lines = [Text.assemble((f"{label:>{side}} ", "dim"), row) for label, row in zip(labels, rows, strict=True)]
    first, last = f"{min(steps):,}", f"{max(steps):,}" if max(steps) > min(steps) else ""
    axis = Text(" " * (side + 1) + first + last.rjust(max(len(last) + 1, plot_width - len(first))), style="dim")
    for line in (title, axis):
        line.truncate(width)
    return Group(title, *lines, axis, Text(""))


def format_number(value: float) -> str:
    """Short: 0.00025 -> 2.5e-04, 12345 -> 12.3k."""
    if value == 0:
        return "0"
    if abs(value) >= 1e15 or abs(value) < 1e-3:
        return f"{value:.1e}"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size * (1 - 10.0 ** (-4 - (unit == "k")) * 5):  # what would be rounded up to it
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.4g}"


_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The bits of a braille character, by row and column of the dot."""


def _plot(series: Sequence[Points], width: int, height: int, use_braille: bool) -> list[Text]:
    """Lines of characters: braille of 2 x 4 dots each in the run's colour, or the run's marker. Where runs cross, the later one is seen."""
    across, down = (2, 4) if use_braille else (1, 1)
    every = [point for points in series for point in points]
    bits: dict[tuple[int, int], int] = {}
    owner: dict[tuple[int, int], int] = {}
    for index, points in enumerate(series):
        for x, y in _pixels(points, every, across * width, down * height):
            cell = x // across, y // down
            bits[cell] = bits.get(cell, 0) | _DOTS[y % 4][x % 2]
            owner[cell] = index
    rows = []
    for y in range(height):
        row = Text()
        for x in range(width):
            index = owner.get((x, y), -1)
            character = " " if index < 0 else chr(0x2800 + bits[x, y]) if use_braille else MARKERS[index % len(MARKERS)]
            row.append(character, style=COLOURS[index % len(COLOURS)] if index >= 0 else "")
        rows.append(row)
    return rows


def _pixels(points: Points, every: Points, width: int, height: int) -> set[tuple[int, int]]:
    """The pixels of points joined by lines, origin top left, scaled to the range of `every` point of the panel.

    Of the points in one column of pixels only the ends and the extremes count, so that a long run is drawn as fast as a short one.
    """
    first, last = min(x for x, _ in every), max(x for x, _ in every)
    low, high = min(y for _, y in every), max(y for _, y in every)
    columns: dict[int, list[int]] = {}
    for x, y in points:
        row = (height - 1) // 2 if high == low else round((high - y) / (high - low) * (height - 1))
        columns.setdefault(round((x - first) / max(1, last - first) * (width - 1)), []).append(row)
    pixels: set[tuple[int, int]] = set()
    before: tuple[int, int] | None = None
    for column, rows in columns.items():
        pixels |= {(column, row) for row in range(min(rows), max(rows) + 1)}
        if before is not None:
            length = max(abs(column - before[0]), abs(rows[0] - before[1]), 1)
            pixels |= {(before[0] + round((column - before[0]) * i / length), before[1] + round((rows[0] - before[1]) * i / length)) for i in range(length)}
        before = column, rows[-1]
    return pixels


def watch(names: Sequence[str], *, once: bool = False, metrics: Sequence[str] = (), every: float = 2.0, screen: Console | None = None) -> None:
    """Draw the curves: once, or on a terminal every `every` seconds until all runs have finished or Ctrl-C.

    Raises:
        ValueError: no such run folder, or a pattern of metrics that fits none.
    """
    if not 0.1 <= every < math.inf:
        raise ValueError(f"every {every} must be at least 0.1 seconds")
    runs = open_runs(names)
    screen = screen or Console(highlight=False)
    if not once and screen.is_terminal:
        hint = "Ctrl-C stops watching, not the run"
        with contextlib.suppress(KeyboardInterrupt), Live(console=screen, screen=True, auto_refresh=False) as live:
            while True:
                live.update(Dashboard(runs, choose_metrics(runs, metrics), hint=hint), refresh=True)
                if all(run.is_finished for run in runs):
                    break
                time.sleep(every)
                for run in runs:
                    run.read()
    screen.print(Dashboard(runs, choose_metrics(runs, metrics), whole=True))


def draw(names: Sequence[str], path: str | Path, metrics: Sequence[str] = ()) -> int:
    """Write a PNG of one panel a metric, all runs in each; returns the number of panels.

    Raises:
        ValueError: no such run folder, or nothing to draw. OSError: `path` cannot be written.
    """
    from openvision3.report import plots

    runs = open_runs(names)
    shown = choose_metrics(runs, metrics)
    if not shown:
        raise ValueError(f"no numbers yet in {', '.join(str(run.file) for run in runs)}: nothing to draw")
    labels = [str(run.folder) for run in runs] if len(runs) > 1 else [""]
    panels = []
    for metric in shown:
        value = f": {format_number(runs[0].last(metric) or 0.0)}" if len(runs) == 1 else ""
        lines = {label: plots.Line(list(points), list(points.values())) for label, run in zip(labels, runs, strict=True) if (points := run.values.get(metric))}
        panels.append(plots.Lines(metric.removeprefix("train/") + describe_candidates(runs, metric) + value, lines))
    write_whole(path, plots.draw(panels, labels))
    return len(shown)
