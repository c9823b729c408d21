"""Several runs on one page: where they ended, their curves, how their configs differ, and their last sample sheets."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from openvision3.evaluate.statistics import OverSeeds, best_first, over_seeds, spoken_p
from openvision3.experiments.curves import Curves, candidates, describe_candidates, is_comparable, open_runs
from openvision3.experiments.kinds import RunConfig, kind_of, read_config
from openvision3.files import sha256_of, write_whole
from openvision3.generate.config import GenerateConfig
from openvision3.hub import complete_checkpoints
from openvision3.report import html, plots
from openvision3.settings import flat, to_dict
from openvision3.train.config import PretrainConfig
from openvision3.understand.config import LlavaConfig

METRICS = (
    "val/psnr", "val/pixel", "val/latent", "val/perceptual", "val/contrastive", "val/caption", "val/image_to_text_r@1", "val/text_to_image_r@1", "val/loss",
    "val/exact",
)  # fmt: skip
"""The columns of the table, in this order."""
CURVES = (
    "train/pixel", "train/latent", "train/perceptual", "train/contrastive", "train/caption", "val/psnr", "val/pixel", "val/latent", "val/contrastive",
    "val/caption", "val/image_to_text_r@1", "train/loss", "val/loss",
)  # fmt: skip
BEST = "the best mean of a column, where it differs from the second best (paired over seeds, p < .05)."


@dataclass
class Group:
    """One row of the table: runs that differ in their seed alone."""

    label: str
    runs: list[Curves]
    all_steps: int = 0
    """Steps of all phases, if the run starts from the weights of another; 0: the steps of the run."""

    @property
    def steps(self) -> int:
        return self.all_steps or self.runs[0].step

    @cached_property
    def configs(self) -> list[RunConfig]:
        return [read_config(run.folder / "config.json") for run in self.runs]

    def values(self, metric: str) -> list[float]:
        """The last value of each run that has the metric."""
        return [value for run in self.runs if (value := run.last(metric)) is not None]

    def values_by_seed(self, metric: str) -> dict[int, float]:
        return {config.seed: value for config, run in zip(self.configs, self.runs, strict=True) if (value := run.last(metric)) is not None}


@dataclass(frozen=True)
class Difference:
    """a - b by one metric, over the seeds that both groups have."""

    metric: str
    a: str
    b: str
    over: OverSeeds

    def __str__(self) -> str:
        factor = title_and_factor(self.metric)[1]
        interval = f"[{factor * self.over.low:.3f}, {factor * self.over.high:.3f}], {spoken_p(self.over.p)}"
        return f"{factor * self.over.difference:+.3f}" + (f" {interval}" if self.over.seeds > 1 else ", one seed: no interval")

    def record(self) -> dict[str, Any]:
        """For scripts; the interval of one seed is null."""
        bounds = {name: value if math.isfinite(value) else None for name, value in (("low", self.over.low), ("high", self.over.high))}
        return {"metric": self.metric, "a": self.a, "b": self.b, "difference": self.over.difference, **bounds, "p": self.over.p, "seeds": self.over.seeds}


def read_groups(names: Sequence[str]) -> list[Group]:
    """The named runs; those that differ in their seed alone form one group. Raises ValueError: no such run, or one without numbers."""
    by_settings: dict[tuple[str, int], list[Curves]] = {}
    times: Counter[tuple[str, int]] = Counter()
    for run in open_runs(names):
        if not run.values:
            raise ValueError(f"{run.folder} has no numbers yet: {run.file} is {'empty' if run.file.exists() else 'not there'}")
        config = read_config(run.folder / "config.json")
        settings = flat(to_dict(config))
        for name in ("init", "tokens", "tower"):  # the first phase, or the model, of the same seed
            settings[name] = re.sub(r"/seed-\d+$", "", settings.get(name, ""))
        own, seed = str({name: value for name, value in settings.items() if name not in (*config.FREE, "seed")}), settings["seed"]
        by_settings.setdefault((own, times[own, seed]), []).append(run)  # a seed that comes again is a row of its own
        times[own, seed] += 1
    return [Group(str(runs[0].folder) + (f" and {len(runs) - 1} more seeds" if len(runs) > 1 else ""), runs) for runs in by_settings.values()]


# -- what may be compared ------------------------------------------------------------------------------------------


def protocol(group: Group, metric: str = "") -> tuple:
    """What must be equal for two values of `metric` to stand in one column; without a metric, for two groups to stand in one table."""
    config = group.configs[0]
    if isinstance(config, GenerateConfig):
        times = (config.flow.shift, config.flow.time_mean, config.flow.time_deviation)
        loss_of = (re.sub(r"/seed-\d+$", "", config.tokens), bool(config.statistics), *times) if metric == "val/loss" else ()
        return (config.val, config.size, config.caption_keys, config.condition, *loss_of)
    if isinstance(config, LlavaConfig):  # its losses are of words of one language model
        return (config.val, config.size, config.language, config.template)
    loss = config.model.loss
    latent, perceptual = (config.model.vae.name,), (loss.perceptual,)
    contrastive = (config.captions, config.sentences, candidates(group.runs[0], "val/contrastive"))
    caption = (_vocabulary(group),)  # cross-entropy of a word piece
    weights = tuple(getattr(loss, name) for name in ("omega_rec", "omega_und", "alpha", "beta", "lambda_perceptual"))
    by_metric: dict[str, tuple] = {
        "val/latent": latent,
        "val/perceptual": perceptual,
        "val/contrastive": contrastive,
        "val/caption": caption,
        "val/loss": weights + latent + perceptual + contrastive + caption,
    }
    return (config.val, config.size, config.caption_keys, *by_metric.get(metric, ()))


def _vocabulary(group: Group) -> str:
    """The vocabulary in which a caption loss is counted: a hash of the run's tokenizer.json."""
    for checkpoint in reversed(complete_checkpoints(group.runs[0].folder)):
        return sha256_of(checkpoint / "tokenizer.json")
    config = group.configs[0]
    assert isinstance(config, PretrainConfig)
    return str((config.tokenizer, config.init, config.vocabulary, config.data))


def split_into_tables(groups: Sequence[Group]) -> list[tuple[str, list[str], list[Group]]]:
    """(evaluation set, metrics, groups): one table for each set and size, with only the columns that mean the same in every row."""
    by_set: dict[tuple, list[Group]] = {}
    for group in groups:
        by_set.setdefault(protocol(group), []).append(group)
    made = []
    for (val, size, *_), members in by_set.items():
        present = [name for name in METRICS if any(group.values(name) for group in members)]
        columns = [name for name in present if len({protocol(group, name) for group in members}) == 1]
        made.append((f"held-out {kind_of(members[0].configs[0]).held_out} of {', '.join(val)}, {size}x{size}", columns, members))
    return made


def rank_groups(metric: str, groups: Sequence[Group]) -> list[int]:
    """Places of the groups that have the metric, the best mean first."""
    means = {str(place): statistics.mean(values) for place, group in enumerate(groups) if (values := group.values(metric))}
    return [int(place) for place in best_first(metric, means)]


def measure_difference(metric: str, a: Group, b: Group) -> Difference | None:
    """a - b, paired by seed; None if no seed has both."""
    one, other = a.values_by_seed(metric), b.values_by_seed(metric)
    seeds = [seed for seed in one if seed in other]
    return Difference(metric, a.label, b.label, over_seeds([one[s] for s in seeds], [other[s] for s in seeds])) if seeds else None


def measure_differences(metrics: Sequence[str], groups: Sequence[Group]) -> list[Difference]:
    """By each metric the first group against all others, and the best against the second best."""
    made = []
    for metric in metrics:
        ranking = rank_groups(metric, groups)
        first, *others = sorted(ranking)
        pairs = [(first, other) for other in others] + ([(ranking[0], ranking[1])] if others else [])
        once = {frozenset(pair): pair for pair in reversed(pairs)}.values()
        made += [one for a, b in once if (one := measure_difference(metric, groups[a], groups[b])) is not None]
    return made


def find_clear_best(metric: str, groups: Sequence[Group]) -> int | None:
    """The place of the group that a paired t-test over seeds tells from the second best; None if there is none."""
    ranking = rank_groups(metric, groups)
    ahead = measure_difference(metric, groups[ranking[0]], groups[ranking[1]]) if len(ranking) > 1 else None
    return ranking[0] if ahead is not None and ahead.over.differs else None


# -- as text, JSON and a page --------------------------------------------------------------------------------------


def title_and_factor(metric: str) -> tuple[str, float]:
    """(title with its unit, factor to that unit)."""
    name = metric.removeprefix("val/").removeprefix("train/")
    if "_r@" in name:
        return f"{name.replace('_', ' ').replace('r@', 'R@')}, %", 100.0
    return {"psnr": ("PSNR, dB", 1.0), "exact": ("exact answers, %", 100.0)}.get(name, (name, 1.0))


def heading(metric: str, groups: Sequence[Group]) -> str:
    """The title of a column or panel, with the number of candidates of a contrastive loss."""
    return title_and_factor(metric)[0] + describe_candidates([run for group in groups for run in group.runs], metric)


def format_mean(values: Sequence[float], factor: float = 1.0) -> str:
    mean = statistics.mean(values) * factor
    digits = 2 if abs(mean) >= 10 else 3
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(values) * factor:.{digits}f}" if len(values) > 1 else "")


def make_table(metrics: Sequence[str], groups: Sequence[Group]) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """(header, a row a group, the (row, column) of clearly best means)."""
    header = ["", "runs", "steps", *(heading(metric, groups) for metric in metrics)]
    rows = [[group.label, str(len(group.runs)), f"{group.steps:,}"] for group in groups]
    for metric in metrics:
        for row, group in zip(rows, groups, strict=True):
            row.append(format_mean(values, title_and_factor(metric)[1]) if (values := group.values(metric)) else "not measured")
    return header, rows, {(best, 3 + column) for column, metric in enumerate(metrics) if (best := find_clear_best(metric, groups)) is not None}


def format_tables(groups: Sequence[Group]) -> str:
    """The tables in plain text; * marks what is bold on the page."""
    blocks = []
    for evaluated_on, metrics, members in split_into_tables(groups):
        header, rows, best = make_table(metrics, members)
        marked = [header, *([cell + " *" * ((y, x) in best) for x, cell in enumerate(row)] for y, row in enumerate(rows))]
        widths = [max(map(len, column)) for column in zip(*marked, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in marked]
        blocks.append("\n".join([evaluated_on, *lines, *([f"*: {BEST}"] if best else [])]))
    return "\n\n".join(blocks)


def list_values(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The values of every run, for scripts."""
    return [
        {
            "label": group.label,
            "runs": [str(run.folder) for run in group.runs],
            "seeds": [config.seed for config in group.configs],
            "steps": group.steps,
            "evaluated_on": {"val": list(group.configs[0].val), "size": group.configs[0].size},
            "values": {name: values for name in METRICS if (values := group.values(name))},
        }
        for group in groups
    ]


def draw_curves(groups: Sequence[Group]) -> bytes:
    """A PNG with a panel a metric and a line a group: the mean over its seeds, with their range as a band."""
    runs = [run for group in groups for run in group.runs]
    weights_differ = len({protocol(group, "val/loss") for group in groups}) > 1
    panels = []
    for metric in CURVES:
        if not any(metric in run.values for run in runs) or not is_comparable(runs, metric) or (metric.endswith("/loss") and weights_differ):
            continue
        factor = title_and_factor(metric)[1]
        lines = {group.label: line for group in groups if (line := _line([run.values[metric] for run in group.runs if metric in run.values], factor))}
        panels.append(plots.Lines(f"{heading(metric, groups)}, {'training' if metric.startswith('train/') else 'held out'}", lines))
    return plots.draw(panels, [group.label for group in groups])


def _line(series: Sequence[Mapping[int, float]], factor: float) -> plots.Line | None:
    """Mean and range over seeds at the steps that all of them have; None if there is no such step."""
    steps = sorted(set.intersection(*(set(values) for values in series))) if series else []
    low, middle, high = ([function([values[step] for values in series]) * factor for step in steps] for function in (min, statistics.mean, max))
    return plots.Line(steps, middle, low, high) if steps else None


def list_changed_fields(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """(field, its value in each group) for the fields in which they differ."""
    settings = [flat(to_dict(group.configs[0])) for group in groups]
    free = {*groups[0].configs[0].FREE, "seed"}
    rows = [(name, *(str(each.get(name, "")) for each in settings)) for name in settings[0] if name not in free]
    return [row for row in rows if len(set(row[1:])) > 1]


def read_last_sheet(run: Curves) -> Image.Image | None:
    """The last sample sheet of a run: original | VAE | rebuilt, or what it has drawn."""
    sheets = sorted((run.folder / "samples").glob("step-*.png"))
    if not sheets:
        return None
    with Image.open(sheets[-1]) as image:
        return image.convert("RGB")


def write_comparison(
    path: Path, title: str, lead: str, groups: Sequence[Group], sections: Sequence[tuple[str, Markup]] = (), more: dict[str, Any] | None = None
) -> Path:
    """Write the page at `path`, beginning with `sections`, and beside it its numbers (and `more`) as .json and its curves as .png. Returns the path.

    Raises:
        OSError: they cannot be written.
    """
    drawn = draw_curves(groups)
    numbers, records = Markup(), []
    for evaluated_on, metrics, members in split_into_tables(groups):
        several = "; mean ± standard deviation over seeds" if any(len(group.runs) > 1 for group in members) else ""
        header, rows, best = make_table(metrics, members)
        numbers += html.note(f"Last evaluation, {evaluated_on}, {kind_of(members[0].configs[0]).evaluated}{several}. Bold: {BEST}")
        numbers += html.table(header, [[cell.replace(" ± ", "\u00a0±\u00a0") for cell in row] for row in rows], best)
        pairs = measure_differences(metrics, members)
        records += [pair.record() for pair in pairs]
        if pairs:
            numbers += html.note("Differences of runs of one seed: mean [95 % interval of Student's t], two-sided p, not corrected for many comparisons.")
            numbers += html.table(
                ("", "rows", "difference", "seeds"),
                [(title_and_factor(pair.metric)[0], f"{pair.a} - {pair.b}", str(pair), pair.over.seeds) for pair in pairs],
            )
        left_out = [title_and_factor(name)[0] for name in METRICS if name not in metrics and any(group.values(name) for group in members)]
        if left_out:
            numbers += html.note(f"Left out, because it means something else in each row: {', '.join(left_out)}.")
    sheets = [([html.embed_image(image, group.label)], group.label) for group in groups if (image := read_last_sheet(group.runs[0])) is not None]
    shown = " and ".join(dict.fromkeys(kind_of(group.configs[0]).sheet for group in groups))
    all_sections = [
        *sections,
        ("Numbers", numbers),
        ("Curves", html.embed_image(drawn, "curves of all runs")),
        (f"{shown}, first seed", html.figures(sheets) if sheets else html.note("no sheets")),
        ("What differs", html.table(("field", *(group.label for group in groups)), list_changed_fields(groups))),
        ("Runs", html.table(("", "runs"), [(group.label, ", ".join(str(run.folder) for run in group.runs)) for group in groups])),
    ]
    write_whole(path.with_suffix(".png"), drawn)
    write_whole(path.with_suffix(".json"), json.dumps({"title": title, "groups": list_values(groups), "differences": records, **(more or {})}, indent=1) + "\n")
    return html.write_page(path, title, lead, all_sections)
