"""Grids of short trainings that repeat the paper's experiments at any scale: `openvision3 ablate NAME`.

A fork of the parent is trained once a seed, each in a run folder of its own; equal seeds see equal samples in equal order.
Forks that two grids share are trained once. A grid continues where it was, and several processes may work on one.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openvision3 import distributed
from openvision3.device import choose_device, choose_precision
from openvision3.estimate.devices import parse_devices
from openvision3.estimate.plan import estimate
from openvision3.estimate.planned import Options
from openvision3.experiments.ablations import (
    ABLATIONS,
    OF_CHATS,
    OF_GENERATORS,
    WITHOUT_LEVERS,
    Claim,
    Fork,
    Parent,
    levers,
    levers_together,
    question,
    two_phases,
)
from openvision3.experiments.compare import Group, format_tables, measure_difference, title_and_factor, write_comparison
from openvision3.experiments.curves import Curves
from openvision3.experiments.kinds import CHAT, GENERATOR, MODEL, Kind, RunConfig, kind_of, read_config, seeded, to_config
from openvision3.experiments.measures import HeldOutSet, check_sets, is_measured, measure_answers, measure_drawings, measure_run, parse_sets, read_measures
from openvision3.experiments.verdicts import choose_levers, draw_verdicts, format_markdown, judge_fork, write_section
from openvision3.files import write_whole
from openvision3.generate.config import GenerateConfig
from openvision3.hub import complete_checkpoints
from openvision3.progress import console
from openvision3.report import html
from openvision3.settings import PathName, flat, from_dict, to_dict, unknown
from openvision3.train.checkpoint import read_state
from openvision3.train.config import PretrainConfig
from openvision3.train.loop import NotFinite
from openvision3.train.loop_config import changed_settings
from openvision3.train.recipes import RECIPES
from openvision3.train.signals import Signals
from openvision3.understand.config import LlavaConfig

DIVERGED = "DIVERGED"
"""The file in a run folder that says why the run could not continue."""


@dataclass
class AblationOptions:
    """Which recipe is the base, and how long, how often."""

    recipe: str = ""
    """the recipe that every row of the grid changes. Not set: mini_low_res, of a generator dit_tiny, of a chat model chat_instruct"""
    steps: int = 300
    """optimiser steps of the base"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """every row is trained once for each seed"""
    out: PathName = "runs/ablate"
    """the folder of all runs and pages; grids of one base share it"""
    draw: bool = False
    """train nothing; redraw the page from the finished runs"""
    measure: tuple[PathName, ...] = ()
    """after each run, measure reconstruction, retrieval and drawability on these held-out sets: NAME=DATA ... Not set: nothing; levers: --val.
    A generator is measured by the KID, precision and recall of its drawings, against these sets; a chat model by its answers to these conversations
    (of `data conversations --turns 1`); not set: --val"""
    classify: tuple[PathName, ...] = ()
    """after each run, measure zero-shot and a linear probe on these sets with classes: NAME=TRAIN,TEST ..."""
    label_key: str | None = None
    """JSON field with the class: of the images of --classify (not set: category); of a generator's --data (not set: as in openvision3 train)"""
    samples: int = 500
    """of a generator: images drawn for each set of --measure; of a chat model: most questions of each kind"""
    levers: tuple[str, ...] = ()
    """levers_together: labels of the forks of levers to join. Not set: those that levers has kept in the same folder"""

    def __post_init__(self):
        self.sets()
        if self.samples < 2:
            raise ValueError(f"samples {self.samples} must be at least 2")
        if self.steps < 1 or not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"steps {self.steps}, seeds {self.seeds}: choose at least one step, and at least one seed, each once")

    def sets(self) -> list[HeldOutSet]:
        """Those of --measure and --classify. Raises ValueError: words that name none."""
        return parse_sets(self.measure, self.classify, "category" if self.label_key is None else self.label_key)


def choose_recipe(name: str, recipe: str) -> tuple[Kind, str]:
    """What the ablation changes, and the recipe that it forks. Raises ValueError: a recipe that trains something else."""
    kind, usual = (GENERATOR, "dit_tiny") if name in OF_GENERATORS else (CHAT, "chat_instruct") if name in OF_CHATS else (MODEL, "mini_low_res")
    recipe = recipe or usual
    if kind is not MODEL and recipe not in kind.recipes:
        raise ValueError(f"the ablation {name} changes {kind.what}, and recipe {recipe} trains none; choose one of {', '.join(kind.recipes)}")
    return kind, recipe


def base_config(options: AblationOptions, config: RunConfig) -> RunConfig:
    """The recipe with the fields of the command line, for as many steps as the options say. A generator's average covers at most a tenth of them.

    Options that a recipe has as fields too go to the recipe as well: `steps`, and `label_key`. (`out` holds all runs.)
    """
    config = copy.deepcopy(config)
    if config.seed != kind_of(config).recipes[options.recipe]().seed:
        raise ValueError(f"seed {config.seed}: an ablation trains every row once for each of --seeds")
    config.steps, config.minutes, config.keep, config.keep_best, config.resume = options.steps, 0.0, 1, 0, False
    if isinstance(config, GenerateConfig):
        config.ema = min(config.ema, max(0.9, round(1 - 10 / config.steps, 4)))
        config.label_key = options.label_key or ""
    return set_schedule(config)


def set_schedule(config: RunConfig) -> RunConfig:
    """Warm-up for at most a tenth of the steps; four evaluations (a chat model's are slow: one), two checkpoints and ten log lines, however short the run."""
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, max(1, config.steps // 10))
    config.eval_every, config.save_every = max(1, config.steps // (1 if isinstance(config, LlavaConfig) else 4)), max(1, config.steps // 2)
    config.log_every = max(1, min(10, config.steps // 10))
    return config


@dataclass(frozen=True)
class Plan:
    """A fork and its runs, one a phase, as (folder, config) without a seed; the folder says what the phase changes in the parent."""

    fork: Fork
    runs: Sequence[tuple[str, RunConfig]]
    seed: int
    """of the run whose operations are counted"""

    def folders(self, out: Path, seed: int) -> list[Path]:
        return [out / folder / f"seed-{seed}" for folder, _ in self.runs]

    def is_finished(self, out: Path, seed: int) -> bool:
        return is_finished(self.folders(out, seed)[-1])

    def has_diverged(self, out: Path, seed: int) -> bool:
        return any((folder / DIVERGED).is_file() for folder in self.folders(out, seed))

    def operations(self) -> float:
        """Of training all phases, the optimiser's included."""
        return sum(config.steps * step_operations(config, self.seed) for _, config in self.runs)


def plan_runs(fork: Fork, parent: Parent) -> Plan:
    """Equal compute means that of the parent; of both phases where the size changes."""
    config = change_fields(parent.config, fork.changes)
    if fork.equal_compute:
        reference = two_phases(parent).forks[0] if "size" in fork.changes else Fork("", {})
        config.steps = max(1, round(plan_runs(reference, parent).operations() / step_operations(config, parent.seed)))
    runs = [(name_changes(parent.config, config), set_schedule(config))]
    if fork.then:
        second = set_schedule(change_fields(config, fork.then))
        runs.append((f"{runs[0][0]},then,{name_changes(config, second)}", second))
    return Plan(fork, runs, parent.seed)


def step_operations(config: RunConfig, seed: int) -> float:
    """Operations of one step, which depend neither on the schedule nor on the device that is named."""
    one = seeded(set_schedule(change_fields(config, {"steps": 1})), seed)
    return _step_operations(json.dumps(to_dict(one)))


@functools.cache
def _step_operations(config: str) -> float:
    parsed = to_config(json.loads(config))
    cost = estimate(parsed, "ablation", Options(cached=bool(getattr(parsed, "latents", ""))), parse_devices("h100"), advise=False)
    return parsed.batch * cost.sample_flops + cost.optimiser_flops


def ablate(name: str, options: AblationOptions, base: RunConfig) -> int:
    """Train the missing runs of the grid and write NAME.html, NAME.json and NAME.png into the folder; 75 if a signal stopped it.

    A fork whose loss does not stay finite is named on the page, and the grid continues.

    Raises:
        ValueError, FileNotFoundError: a folder of another base, and whatever would end any of the runs at its start.
    """
    parent = Parent(options.recipe, base, _levers(options) if name == levers_together.__name__ else (), options.seeds[0])
    grid = ABLATIONS[name](parent)
    sets = options.sets()
    if kind_of(base) is not MODEL and options.classify:
        raise ValueError(f"classify measures a model, and this ablation changes {kind_of(base).what}; leave it out, and name what to measure with --measure")
    if not sets and name in MEASURED:
        sets = [HeldOutSet(f"held out {place}", data) for place, data in enumerate(base.val, 1)]
    if kind_of(base) is not MODEL:
        sets = [replace(one, samples=options.samples) for one in sets]
    plans = [plan_runs(fork, parent) for fork in grid.forks]
    out = Path(options.out)
    device = choose_device(base.device)
    with distributed.started(device) as ranks, Signals() as signals:
        with distributed.together():
            for one in plans:
                for _, config in one.runs:
                    for seed in options.seeds:
                        kind_of(config).check(seeded(config, seed), ranks.world)
                one.operations()  # raises ValueError if the VAE is not there
            if not options.draw:
                check_sets(sets, base)
            precision = _same_base(out, base, device, options.draw) if ranks.rank == 0 else ""
        precision = distributed.from_first(precision)
        taken = 0
        for seed in () if options.draw else options.seeds:
            for one in plans:
                status = _train(out, one, seed, precision, signals, sets)
                if status == "stopped" or any(distributed.gather_objects(bool(signals.received))):
                    return 75
                taken += status == "taken"
        if ranks.rank == 0:
            if taken:
                console().print(f"another process is training {taken} of the runs; run this command again when it has ended", markup=False)
            _write_page(name, out, plans, grid.claims, options, base, is_shared=taken > 0)
    return 0


MEASURED = (levers.__name__, levers_together.__name__, *OF_GENERATORS, *OF_CHATS)
"""Ablations whose forks get a verdict against the first, from measures of held-out sets."""


def _levers(options: AblationOptions) -> list[str]:
    """The levers to join, as the options name them or as `levers` has kept them. Raises ValueError: unknown ones, or none."""
    forks = levers(Parent(options.recipe, RECIPES[options.recipe]())).forks[1:]
    labels = [fork.label for fork in forks]
    for label in options.levers:
        if label not in labels:
            raise unknown("lever", label, labels)
    fields: dict[str, str] = {}
    for fork in forks:
        for name, value in fork.changes.items() if fork.label in options.levers else ():
            if (name, value) not in WITHOUT_LEVERS.items() and (other := fields.setdefault(name, fork.label)) != fork.label:
                raise ValueError(f"levers {other!r} and {fork.label!r} both set {name}; name one of them")
    path = Path(options.out) / f"{levers.__name__}.json"
    if not options.levers and not path.is_file():
        raise ValueError(f"no levers have been judged in {options.out}; run `openvision3 ablate levers` there first, or name levers with --levers")
    chosen = list(options.levers) or choose_levers(json.loads(path.read_text(encoding="utf-8")).get("verdicts", []))
    if not chosen:
        raise ValueError(f"{path} keeps no lever; name levers to join with --levers: {', '.join(labels)}")
    return chosen


def change_fields(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The config with these fields; checks all fields again."""
    values = to_dict(config)
    for name, value in changes.items():
        *path, last = name.split(".")
        place = values
        for step in path:
            place = place[step]
        place[last] = value
    return from_dict(type(config), values)


def name_changes(base: RunConfig, config: RunConfig) -> str:
    """The settings that differ, as a folder name: base, tau=0.8, encoder.size=L, size=128,steps=30."""
    changes, names = changed_settings(base, config, ("optimizer.warmup_steps",)), flat(to_dict(base))
    parts = [f"{_shortest(name, names)}={after}" for name, (_, after) in changes.items() if "lpips_" not in name]
    return re.sub(r"[^\w.,=+-]", "-", ",".join(parts)) or "base"


def _shortest(name: str, names: Iterable[str]) -> str:
    """The shortest end of a dotted name that no other has: omega_rec, but encoder.size."""
    parts = name.split(".")
    ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
    return next(end for end in ends if end == name or sum(other == end or other.endswith(f".{end}") for other in names) == 1)


def _same_base(out: Path, base: RunConfig, device: str, draw: bool) -> str:
    """The precision of all forks, which the first command with a run settles. Raises ValueError if `out` holds forks of another base."""
    path = out / "base.json"
    if next(out.glob("*/seed-*/config.json"), None) is None:  # an older base.json is of a command that ended before its first run began
        if draw:
            raise ValueError(f"{out} holds no ablation: nothing to draw")
        out.mkdir(parents=True, exist_ok=True)
        precision, why = choose_precision(base.precision, device)
        console().print(f"precision of all runs: {precision} ({why})", markup=False)
        base = change_fields(base, {"precision": precision})
        write_whole(path, json.dumps(to_dict(base), indent=2) + "\n", first_wins=not path.is_file())
    kept = read_config(path)
    if type(kept) is not type(base):
        raise ValueError(f"{out} holds an ablation of {kind_of(kept).what}, not of {kind_of(base).what}; name another folder with --out")
    for name, (before, now) in changed_settings(kept, base, ("device",)).items():
        raise ValueError(f"{out} holds an ablation with {name} {before!r}, not {now!r}; name another folder with --out")
    return kept.precision


MEASURE: dict[type, Callable[..., object]] = {PretrainConfig: measure_run, GenerateConfig: measure_drawings, LlavaConfig: measure_answers}


def _train(out: Path, one: Plan, seed: int, precision: str, signals: Signals, sets: Sequence[HeldOutSet]) -> str:
    """Train what is missing of the fork, then measure it on the sets. Returns finished, diverged, stopped, or taken: another process trains it."""
    first = ""
    for folder, (_, config) in zip(one.folders(out, seed), one.runs, strict=True):
        with _claimed(folder) as is_ours:
            if not is_ours:
                return "taken"
            config = seeded(config, seed)
            config.out, config.init, config.precision = str(folder), first or config.init, precision  # type: ignore[assignment]
            if first and isinstance(config, PretrainConfig):
                config.tokenizer = ""
            with distributed.together():  # rank 0 looks: others may see an older state of a shared disk
                state = _state(folder, config) if distributed.rank() == 0 else ""
            state = distributed.from_first(state)
            if state == "diverged":
                return state
            config.resume = state == "begun"
            if state in ("new", "begun"):
                if distributed.rank() == 0:
                    console().print(f"{one.fork.label}, seed {seed}: {folder}", markup=False)
                try:
                    if kind_of(config).train(config, "ablation", signals).status == "stopped":
                        return "stopped"
                except NotFinite as error:  # on all ranks alike
                    if distributed.rank() == 0:
                        write_whole(folder / DIVERGED, f"{error}\n")
                        console().print(f"{one.fork.label}, seed {seed}: {error}", markup=False)
                    return "diverged"
            if folder == one.folders(out, seed)[-1] and not distributed.from_first(is_measured(folder, sets)):
                if distributed.rank() == 0:
                    console().print(f"measuring {one.fork.label}, seed {seed}", markup=False)
                MEASURE[type(config)](folder, sets, config, precision, choose_device(config.device))
            first = str(folder)
    return "finished"


def _state(folder: Path, config: RunConfig) -> str:
    """new, begun, finished or diverged. Raises ValueError if the folder holds a run of another config."""
    if not (folder / "config.json").is_file():
        return "new"
    for name, (before, now) in changed_settings(read_config(folder / "config.json"), config, ("device", "init")).items():
        raise ValueError(f"{folder} holds a run with {name} {before!r}, not {now!r}; name another folder with --out")
    if (folder / DIVERGED).is_file():
        return "diverged"
    return "finished" if is_finished(folder) else "begun"


def is_finished(folder: Path) -> bool:
    """Whether the run there has its last evaluation and its last checkpoint. A run that another process is writing counts as not finished."""
    try:
        steps = read_config(folder / "config.json").steps
        checkpoints = complete_checkpoints(folder)
        return bool(checkpoints) and read_state(checkpoints[-1]).step >= steps and Curves(folder).read().step >= steps
    except (ValueError, OSError):
        return False


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Lock the run folder for all ranks within the block; False if another process of this machine has locked it."""
    with contextlib.ExitStack() as held:
        is_ours = True
        with distributed.together():
            if distributed.rank() == 0:
                folder.parent.mkdir(parents=True, exist_ok=True)
                lock = held.enter_context(open(folder.parent / f".{folder.name}.lock", "w"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    is_ours = False
        yield distributed.from_first(is_ours)


def judge(claim: Claim, groups: Sequence[Group]) -> tuple[str, list[tuple[str, str, str]], list[dict[str, Any]]] | None:
    """("holds", "fails" or "undecided"; a line for each part; the same for scripts), by paired t-tests over seeds; None if a fork is missing.

    A part that expects "lower" holds or fails where the difference is below or above 0 with p < .05, and is undecided otherwise. That two are the same
    cannot be shown by a test of difference: such a part fails or is undecided. A claim holds with all of its parts and fails with any.
    """
    by_label = {group.label: group for group in groups}
    if not {claim.fork, claim.other} <= by_label.keys():
        return None
    lines, records, verdicts = [], [], []
    for metric, expected in claim.expected.items():
        pair = measure_difference(metric, by_label[claim.fork], by_label[claim.other])
        if pair is None:
            return None
        verdict = "undecided" if not pair.over.differs else "fails" if pair.over.difference > 0 or expected == "the same" else "holds"
        verdicts.append(verdict)
        lines.append((f"{title_and_factor(metric)[0]} of {pair.a} - {pair.b}: {expected}?", str(pair), verdict))
        records.append(pair.record() | {"says": expected, "verdict": verdict})
    return "fails" if "fails" in verdicts else "holds" if set(verdicts) == {"holds"} else "undecided", lines, records


def _write_page(name: str, out: Path, plans: Sequence[Plan], claims: Sequence[Claim], options: AblationOptions, base: RunConfig, *, is_shared: bool) -> None:
    """The page of the finished runs; it names the others. Rows hold the seeds that all rows have, if there is such a seed."""
    finished = {one.fork.label: [seed for seed in options.seeds if one.is_finished(out, seed)] for one in plans}
    if not any(finished.values()):
        if is_shared:
            return
        raise ValueError(f"no run of {name} is finished in {out}: nothing to draw")
    common = set.intersection(*(set(seeds) for seeds in finished.values() if seeds))
    groups = []
    for one in plans:
        seeds = [seed for seed in finished[one.fork.label] if seed in common or not common]
        if seeds:
            curves = [Curves(one.folders(out, seed)[-1]).read() for seed in seeds]
            groups.append(Group(one.fork.label, curves, sum(config.steps for _, config in one.runs)))
    runs = [(one, seed, f"{one.fork.label}, seed {seed}") for one in plans for seed in options.seeds]
    diverged = [run for one, seed, run in runs if one.has_diverged(out, seed)]
    missing = [run for one, seed, run in runs if seed not in finished[one.fork.label] and run not in diverged]
    costs = [
        (one.fork.label, " then ".join(f"{config.steps:,} x {config.batch} at {config.size} px" for _, config in one.runs), f"{one.operations():.3g}")
        for one in plans
    ]
    about = html.table(("", "steps x images", "operations of training"), costs)
    if diverged:
        about += html.note(f"Ended early, because their loss did not stay finite: {'; '.join(diverged)}.")
    if missing:
        about += html.note(f"Not finished, and not in the numbers: {'; '.join(missing)}.")
    sections = [("Forks", about)]
    verdicts = [(claim, *judged) for claim in claims if (judged := judge(claim, groups)) is not None]
    if verdicts:
        rows = [(claim.says if not i else "", verdict if not i else "", *line) for claim, verdict, lines, _ in verdicts for i, line in enumerate(lines)]
        note = html.note("By differences of runs of one seed: mean [95 % interval of Student's t], p of the paired t-test; undecided where p is .05 or more.")
        sections.append(("What the paper says, here", note + html.table(("claim", "here", "part", "difference", "part alone"), rows)))
    measured = {one.fork.label: {seed: values for seed in finished[one.fork.label] if (values := read_measures(one.folders(out, seed)[-1]))} for one in plans}
    measured = {label: values for label, values in measured.items() if values}
    parent = plans[0].fork.label
    judged_forks = []
    if name in MEASURED and parent in measured:
        judged_forks = [v for one in plans[1:] if (v := judge_fork(one.fork, measured.get(one.fork.label, {}), measured[parent])) is not None]
    if measured:
        sections.append(("Measures and verdicts" if judged_forks else "Measures", write_section(measured, judged_forks)))
    records = [{"claim": claim.says, "verdict": verdict, "parts": parts} for claim, verdict, _, parts in verdicts]
    more: dict[str, Any] = {"claims": records} if records else {}
    if measured:
        more |= {"measures": measured, "verdicts": [verdict.record() for verdict in judged_forks]}
    seeds_used = ", ".join(map(str, sorted(common))) or "different ones in each row"
    lead = f"{question(name)} Base: {options.recipe}, {base.steps} steps of {base.batch} at {base.size} px on {', '.join(base.data)}; seeds {seeds_used}."
    page = write_comparison(out / f"{name}.html", f"Ablation: {name}", lead, groups, sections, more)
    print(format_tables(groups))
    for claim, verdict, lines, _ in verdicts:
        print(f"{verdict}: {claim.says} ({'; '.join(f'{part} {value}' for part, value, _ in lines)})")
    if judged_forks:
        write_whole(out / f"{name}-verdicts.png", draw_verdicts(judged_forks))
        print(format_markdown(judged_forks))
    for why, which in (("are not finished; the same command continues them", missing), ("ended early, because their loss did not stay finite", diverged)):
        if which:
            console().print(f"{len(which)} runs {why}: {'; '.join(which)}", markup=False)
    print(f"page: {page.resolve()}")
