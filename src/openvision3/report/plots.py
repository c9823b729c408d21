"""Every figure of pages and documents: one palette, one style, and panels of lines, bars, intervals or histograms. Matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c8c8c")
"""The colours of Okabe and Ito, which colour-blind readers can tell apart; grey stands for their yellow, which is too light on white."""
DASHES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
"""styles of lines: of the first names, of those after all colours have been used, and so on"""


class Look(NamedTuple):
    """How a name is drawn, in every panel alike."""

    colour: str
    dash: Literal["-", "--", ":"] = "-"


@dataclass(frozen=True)
class Line:
    """y over x, with a band from `low` to `high` where they are given."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Lines:
    """A panel of lines, by name."""

    title: str
    lines: Mapping[str, Line]
    x_label: str = "step"
    points: bool = False
    """mark every point"""

    def draw(self, axes: Axes, looks: Mapping[str, Look]) -> None:
        for name, line in self.lines.items():
            marker = "o" if self.points or len(line.x) == 1 else None
            axes.plot(line.x, line.y, color=looks[name].colour, linestyle=looks[name].dash, linewidth=1.5, marker=marker, markersize=4)
            if len(line.low):
                axes.fill_between(line.x, line.low, line.high, color=looks[name].colour, alpha=0.15, linewidth=0)
        axes.set_xlabel(self.x_label, fontsize=8)
        axes.grid(alpha=0.25)


@dataclass(frozen=True)
class Histogram:
    """A panel of how often values occur, by name, in bins that all names share."""

    title: str
    values: Mapping[str, Sequence[float]]
    bins: int = 40

    def draw(self, axes: Axes, looks: Mapping[str, Look]) -> None:
        from matplotlib.ticker import MaxNLocator

        low, high = min(map(min, self.values.values())), max(map(max, self.values.values()))
        for name, values in self.values.items():
            axes.hist(values, bins=self.bins, range=(low, high if high > low else low + 1), alpha=0.5, color=looks[name].colour)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)


@dataclass(frozen=True)
class Bar:
    """A value, with the ends of its interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Bars:
    """A panel of groups of bars: (label below the group, bars by name). Without a group it shows `otherwise`."""

    title: str
    groups: Sequence[tuple[str, Mapping[str, Bar]]]
    otherwise: str = ""

    def draw(self, axes: Axes, looks: Mapping[str, Look]) -> None:
        if not self.groups:
            axes.text(0.5, 0.5, self.otherwise, ha="center", va="center", fontsize=9, transform=axes.transAxes)
            axes.set_axis_off()
            return
        names = [name for name in looks if any(name in bars for _, bars in self.groups)]
        width = 1 / (len(names) + 1)
        for number, name in enumerate(names):
            for place, bar in [(group + number * width, bars[name]) for group, (_, bars) in enumerate(self.groups) if name in bars]:
                axes.bar(place, bar.value, width=0.9 * width, color=looks[name].colour)
                if bar.low is not None and bar.high is not None:
                    axes.vlines(place, bar.low, bar.high, color="#444444", linewidth=1)
        centres = [group + (len(names) - 1) / 2 * width for group in range(len(self.groups))]
        crowded = len(self.groups) > 4
        axes.set_xticks(centres, [chart_label(label) for label, _ in self.groups], fontsize=7, rotation=90 if crowded else 0)


@dataclass(frozen=True)
class Intervals:
    """A panel of differences about zero, one below the other: (label, difference in the colour of its name)."""

    title: str
    rows: Sequence[tuple[str, str, Bar]]
    """(label, name, difference)"""
    labelled: bool = True
    """write the labels; panels beside the first one share them"""

    def draw(self, axes: Axes, looks: Mapping[str, Look]) -> None:
        axes.axvline(0, color="#444444", linewidth=0.8)
        for place, (_, name, bar) in enumerate(self.rows):
            if bar.low is not None and bar.high is not None:
                axes.hlines(-place, bar.low, bar.high, color=looks[name].colour, linewidth=2)
            axes.plot([bar.value], [-place], "o" if bar.low is not None else "x", color=looks[name].colour, markersize=5)
        axes.set_yticks([-place for place in range(len(self.rows))], [chart_label(label) if self.labelled else "" for label, *_ in self.rows])
        axes.set_ylim(0.6 - len(self.rows), 0.4)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", alpha=0.25)


Panel = Lines | Histogram | Bars | Intervals


def draw(panels: Sequence[Panel], names: Sequence[str], *, width: float = 3.6, height: float = 2.6, columns: int = 4) -> bytes:
    """A PNG of all panels in rows of `columns`, each `width` x `height` inches.

    `names` are those of lines, values and bars: the same name has the same colour in every panel, and the legend shows all but "".
    """
    from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the whole process
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    looks = {name: Look(PALETTE[i % len(PALETTE)], DASHES[i // len(PALETTE) % len(DASHES)]) for i, name in enumerate(names)}
    labels = {name: chart_label(name) for name in names if name}
    columns = max(1, min(columns, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    legend_columns = max(1, min(len(labels), int(columns * width * 12 / (max(map(len, labels.values()), default=0) + 6))))
    legend_rows = -(-len(labels) // legend_columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.2 * legend_rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flat
    for axes in places:
        axes.set_visible(False)
    for axes, panel in zip(figure.axes, panels, strict=False):
        axes.set_visible(True)
        panel.draw(axes, looks)
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.tick_params(axis="y", labelsize=8)
        if not isinstance(panel, Bars):
            axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    if labels:
        is_dashed = any(look.dash != "-" for look in looks.values())  # then a patch would not tell them apart
        handles = [
            Line2D([], [], color=looks[name].colour, linestyle=looks[name].dash, linewidth=2.5, label=label)
            if is_dashed
            else Patch(color=looks[name].colour, label=label)
            for name, label in labels.items()
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=legend_columns, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def chart_label(name: str) -> str:
    """A name for Matplotlib, which takes `$` for mathematics, leaves out of a legend what begins with `_`, and fails on what is not UTF-8."""
    text = name.encode(errors="backslashreplace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
