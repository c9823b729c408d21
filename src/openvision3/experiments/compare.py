"""Several runs on one page: what they end at, their curves, what they differ in, and their last sheets."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from openvision3.evaluate.statistics import OverSeeds, best_first, over_seeds, spoken_p
from openvision3.experiments.curves import Curves, candidates, describe_candidates, is_comparable, open_runs
from openvision3.files import sha256_of, write_whole
from openvision3.hub import complete_checkpoints
from openvision3.report import html, plots
from openvision3.settings import flat, load_config, to_dict
from openvision3.train.config import PretrainConfig

METRICS = (
    "val/psnr",
    "val/pixel",
    "val/latent",
    "val/perceptual",
    "val/contrastive",
    "val/caption",
    "val/image_to_text_r@1",
    "val/text_to_image_r@1",
    "val/loss",
)
"""What the table holds, in this order."""
CURVES = ("train/pixel", "train/latent", "train/perceptual", "train/contrastive", "train/caption", "val/psnr", "val/pixel", "val/latent", "val/contrastive",
          "val/caption", "val/image_to_text_r@1", "train/loss")  # fmt: skip
NOT_SETTINGS = ("out", "resume", "workers", "track", "index", "cache", "cache_gb", "log_every", "eval_every", "save_every", "keep", "keep_best", "seed")


@dataclass
class Group:
    """One row of the table: runs that differ in their seed alone."""

    label: str
    runs: list[Curves]
    all_steps: int = 0
    """of all phases, where the run goes on from the weights of another; 0: of the run"""

    @property
    def steps(self) -> int:
        return self.all_steps or self.runs[0].step

    @property
    def config(self) -> PretrainConfig:
        return load_config(PretrainConfig, self.runs[0].folder / "config.json")

    def by_seed(self, metric: str) -> dict[int, float]:
        """{seed: where the run ended}."""
        seeds = {load_config(PretrainConfig, run.folder / "config.json").seed: run for run in self.runs}
        return {seed: value for seed, run in seeds.items() if (value := run.last(metric)) is not None}

    def values(self, metric: str) -> list[float]:
        """Where each run that has it ended."""
        return [value for run in self.runs if (value := run.last(metric)) is not None]


def read_groups(names: Sequence[str]) -> list[Group]:
    """The named runs; those that differ in their seed alone make one group. Raises ValueError: no such run, or one without numbers."""
    found: dict[str, list[Curves]] = {}
    for run in open_runs(names):
        if not run.values:
            raise ValueError(f"{run.folder} has no numbers yet: {run.file} is {'empty' if run.file.exists() else 'not there'}")
        settings = flat(to_dict(load_config(PretrainConfig, run.folder / "config.json")))
        settings["init"] = re.sub(r"/seed-\d+$", "", settings["init"])  # the first phase of the same seed
        found.setdefault(str({name: value for name, value in settings.items() if name not in NOT_SETTINGS}), []).append(run)
    return [Group(str(runs[0].folder) + (f" and {len(runs) - 1} more seeds" if len(runs) > 1 else ""), runs) for runs in found.values()]


def protocol(group: Group, metric: str = "") -> tuple:
    """What must be equal for two numbers of `metric` to stand in one column."""
    config = group.config
    where = (config.val, config.size, config.caption_keys)
    loss = config.model.loss
    latent, perceptual = (config.model.vae.name,), (loss.perceptual,)
    over = candidates(group.runs[0], "val/contrastive")
    contrastive, caption = (config.captions, config.sentences, over), (_words(group),)  # cross-entropies: of K sets of captions; of a word piece
    weights = tuple(to_dict(loss)[name] for name in ("omega_rec", "omega_und", "alpha", "beta", "lambda_perceptual"))
    parts = {"val/latent": latent, "val/perceptual": perceptual, "val/contrastive": contrastive, "val/caption": caption}
    return (*where, *(weights + latent + perceptual + contrastive + caption if metric == "val/loss" else parts.get(metric, ())))


def _words(group: Group) -> str:
    """The vocabulary in which a caption loss is counted: a hash of the run's tokenizer.json."""
    for checkpoint in reversed(complete_checkpoints(group.runs[0].folder)):
        return sha256_of(checkpoint / "tokenizer.json")
    return str((group.config.tokenizer, group.config.init, group.config.vocabulary, group.config.data))


def tables(groups: Sequence[Group]) -> list[tuple[str, list[str], list[Group]]]:
    """(what was evaluated on, metrics, groups): one table for each set and size, and in each only columns that mean the same in every row."""
    found: dict[tuple, list[Group]] = {}
    for group in groups:
        found.setdefault(protocol(group), []).append(group)
    made = []
    for (val, size, _), members in found.items():
        there = [name for name in METRICS if any(group.values(name) for group in members)]
        columns = [name for name in there if len({protocol(group, name) for group in members}) == 1]
        made.append((f"held-out pictures of {', '.join(val)}, {size}x{size}", columns, members))
    return made


def spread(values: Sequence[float], factor: float = 1.0) -> str:
    """mean, and the standard deviation over seeds where there are several."""
    mean = statistics.mean(values) * factor
    digits = 2 if abs(mean) >= 10 else 3
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(values) * factor:.{digits}f}" if len(values) > 1 else "")


def column(metric: str) -> tuple[str, float]:
    """(title with its unit, factor)."""
    name = metric.removeprefix("val/")
    if "_r@" in name:
        return f"{name.replace('_', ' ')}, %", 100.0
    return {"psnr": "PSNR, dB"}.get(name, name), 1.0


@dataclass(frozen=True)
class Apart:
    """What two groups differ in by one metric, over the seeds that both have."""

    metric: str
    a: str
    b: str
    over: OverSeeds

    def __str__(self) -> str:
        factor, digits = column(self.metric)[1], 3
        low, high = (f"{factor * end:.{digits}f}" for end in (self.over.low, self.over.high))
        interval = f" [{low}, {high}], {spoken_p(self.over.p)}" if self.over.seeds > 1 else ", one seed: no interval"
        return f"{factor * self.over.difference:+.{digits}f}{interval}"


def apart(metric: str, a: Group, b: Group) -> Apart | None:
    """a minus b, paired by seed; None where no seed has both."""
    one, other = a.by_seed(metric), b.by_seed(metric)
    seeds = [seed for seed in one if seed in other]
    return Apart(metric, a.label, b.label, over_seeds([one[s] for s in seeds], [other[s] for s in seeds])) if seeds else None


def all_apart(columns: Sequence[str], groups: Sequence[Group]) -> list[Apart]:
    """By each metric the first group against all others, and the best against the second best."""
    found = []
    for metric in columns:
        named = {str(i): group for i, group in enumerate(groups) if group.values(metric)}
        ranking = best_first(metric, {name: statistics.mean(group.values(metric)) for name, group in named.items()})
        pairs = [(next(iter(named)), other) for other in list(named)[1:]] + ([(ranking[0], ranking[1])] if len(ranking) > 1 else [])
        unlike = {frozenset(pair): pair for pair in reversed(pairs)}.values()
        found += [made for a, b in unlike if (made := apart(metric, named[a], named[b])) is not None]
    return found


def surely_best(metric: str, groups: Sequence[Group]) -> int | None:
    """The place of the group that a paired t-test over seeds tells from the second best; None where there is none."""
    means = {str(i): statistics.mean(values) for i, group in enumerate(groups) if (values := group.values(metric))}
    ranking = best_first(metric, means)
    made = apart(metric, groups[int(ranking[0])], groups[int(ranking[1])]) if len(ranking) > 1 else None
    return int(ranking[0]) if made is not None and made.over.differs else None


def as_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The numbers of all groups, each run's, for scripts."""
    return [
        {
            "label": group.label,
            "runs": [str(run.folder) for run in group.runs],
            "seeds": [load_config(PretrainConfig, run.folder / "config.json").seed for run in group.runs],
            "steps": group.steps,
            "evaluated_on": {"val": list(group.config.val), "size": group.config.size},
            "values": {name: group.values(name) for name in METRICS if group.values(name)},
        }
        for group in groups
    ]


def curves(groups: Sequence[Group], names: Sequence[str] = CURVES) -> bytes:
    """A panel a metric, a line a group: the mean over its seeds, and the span of them as a band. PNG."""
    runs = [run for group in groups for run in group.runs]
    shown = [name for name in names if any(name in run.values for run in runs)]
    if len({protocol(group, "val/loss") for group in groups}) > 1:  # sums with unlike weights
        shown = [name for name in shown if not name.endswith("/loss")]
    shown = [name for name in shown if is_comparable(runs, name)]
    panels = []
    for name in shown:
        factor = column(name)[1]
        lines = {group.label: line for group in groups if (line := _line([run.values[name] for run in group.runs if name in run.values], factor))}
        title = heading(name, groups).removeprefix("train/") + (", training" if name.startswith("train/") else ", held out")
        panels.append(plots.Lines(title, lines))
    return plots.draw(panels, [group.label for group in groups])


def _line(series: Sequence[Mapping[int, float]], factor: float) -> plots.Line | None:
    """Mean and span over seeds at the steps that all of them have; None without such a step."""
    steps = sorted(set.intersection(*(set(values) for values in series))) if series else []
    low, middle, high = ([function([values[step] for values in series]) * factor for step in steps] for function in (min, statistics.mean, max))
    return plots.Line(steps, middle, low, high) if steps else None


def _table(columns: Sequence[str], groups: Sequence[Group]) -> Markup:
    """The best mean of each column is bold where it differs from the second best over seeds."""
    header = ("", "runs", "steps", *(heading(name, groups) for name in columns))
    rows = [[group.label, str(len(group.runs)), f"{group.steps:,}"] for group in groups]
    bold = set()
    for x, name in enumerate(columns, start=len(rows[0])):
        for y, group in enumerate(groups):
            rows[y].append(spread(values, column(name)[1]) if (values := group.values(name)) else "not measured")
        if (best := surely_best(name, groups)) is not None:
            bold.add((best, x))
    return html.table(header, rows, bold)


def heading(metric: str, groups: Sequence[Group]) -> str:
    """The title of a column, with what a contrastive loss is taken over."""
    return column(metric)[0] + describe_candidates([run for group in groups for run in group.runs], metric)


def _differences_over_seeds(columns: Sequence[str], groups: Sequence[Group]) -> Markup:
    """A line a pair and metric."""
    rows = [(column(each.metric)[0], f"{each.a} - {each.b}", str(each), each.over.seeds) for each in all_apart(columns, groups)]
    note = html.note("Differences of runs of one seed: mean [95 % interval of Student's t], two-sided p, not corrected for the number of comparisons.")
    return note + html.table(("", "rows", "difference", "seeds"), rows) if rows else Markup()


def differences(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """(field, its value in each group) for the fields in which they differ."""
    settings = [flat(to_dict(group.config)) for group in groups]
    names = [name for name in settings[0] if name not in NOT_SETTINGS]
    return [(name, [str(each[name]) for each in settings]) for name in names if any(each[name] != settings[0][name] for each in settings)]


def sheet(run: Curves) -> Image.Image | None:
    """The last sheet original | VAE | rebuilt of a run."""
    found = sorted((run.folder / "samples").glob("step-*.png"))
    if not found:
        return None
    with Image.open(found[-1]) as image:
        return image.convert("RGB")


BOLD = "Bold: the best mean of a column, where it differs from the second best (paired over seeds, p < .05)."


def as_json(each: Apart) -> dict[str, Any]:
    """A difference for scripts; of one seed the interval is null."""
    bounds = {name: value if math.isfinite(value) else None for name, value in (("low", each.over.low), ("high", each.over.high))}
    return {"metric": each.metric, "a": each.a, "b": each.b, "difference": each.over.difference, **bounds, "p": each.over.p, "seeds": each.over.seeds}


def write_comparison(
    path: Path, title: str, lead: str, groups: Sequence[Group], sections: Sequence[tuple[str, str]] = (), more: dict[str, Any] | None = None
) -> Path:
    """The page at `path` and its numbers beside it as .json (with what is `more`) and .png; `sections` come first. Returns the path.

    Raises:
        OSError: they cannot be written.
    """
    made = tables(groups)
    numbers = Markup()
    for where, columns, members in made:
        several = "; mean ± standard deviation over seeds" if any(len(group.runs) > 1 for group in members) else ""
        numbers += html.note(f"Last evaluation, {where}, at most 256 pictures, sigma 0{several}. {BOLD}") + _table(columns, members)
        numbers += _differences_over_seeds(columns, members)
        left_out = [name for name in METRICS if name not in columns and any(group.values(name) for group in members)]
        if left_out:
            numbers += html.note(f"Not in one table, for it means something else in each row: {', '.join(column(name)[0] for name in left_out)}.")
    drawn = curves(groups)
    sheets = [(group.label, found) for group in groups if (found := sheet(group.runs[0])) is not None]
    shown = html.figures([([html.picture(image, label)], label) for label, image in sheets]) if sheets else html.note("no sheets")
    settings = html.table(("field", *(group.label for group in groups)), [(name, *found) for name, found in differences(groups)])
    folders = html.table(("", "runs"), [(group.label, ", ".join(str(run.folder) for run in group.runs)) for group in groups])
    all_sections = [
        *sections,
        ("Numbers", numbers),
        ("Curves", html.picture(drawn, "curves of all runs")),
        ("Original | VAE | rebuilt, the first pictures of the set, first seed", shown),
        ("What differs", settings),
        ("Runs", folders),
    ]
    write_whole(path.with_suffix(".png"), drawn)
    apart_of_all = [as_json(each) for _, columns, members in made for each in all_apart(columns, members)]
    written = {"title": title, "groups": as_rows(groups), "differences": apart_of_all, **(more or {})}
    write_whole(path.with_suffix(".json"), json.dumps(written, indent=1) + "\n")
    return html.write_page(path, title, lead, all_sections)


def text_table(groups: Sequence[Group]) -> str:
    """The tables in plain text, one line a group."""
    lines = []
    for where, columns, members in tables(groups):
        rows = [("", "runs", *(heading(name, members) for name in columns))]
        best = {name: surely_best(name, members) for name in columns}
        rows += [
            (
                group.label,
                str(len(group.runs)),
                *(spread(values, column(name)[1]) + " *" * (best[name] == y) if (values := group.values(name)) else "-" for name in columns),
            )
            for y, group in enumerate(members)
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns) + 2)]
        lines += [where, *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows), ""]
        if any(place is not None for place in best.values()):
            lines[-1:] = [BOLD.replace("Bold", "*"), ""]
    return "\n".join(lines).rstrip()
