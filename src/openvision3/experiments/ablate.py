"""Grids of short trainings that repeat the paper's experiments at any scale: `openvision3 ablate NAME`.

A cell is a recipe with a few fields changed, trained once a seed, each in a run folder of its own: equal seeds see equal samples in
equal order. Cells that two grids share are trained once. A grid goes on where it was, and several processes may work on one.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openvision3 import distributed
from openvision3.data.batches import rows_of_a_process
from openvision3.device import choose_device, choose_precision
from openvision3.estimate.devices import parse_devices
from openvision3.estimate.plan import estimate
from openvision3.estimate.sizes import Options
from openvision3.experiments.compare import Group, apart, as_json, column, text_table, write_comparison
from openvision3.experiments.watch import Curves
from openvision3.files import write_whole
from openvision3.hub import load_distance
from openvision3.model.encoder import SIZES
from openvision3.progress import console
from openvision3.report import html
from openvision3.settings import PathName, flat, from_dict, load_config, to_dict
from openvision3.train.checkpoint import complete_checkpoints, read_state
from openvision3.train.config import RunConfig
from openvision3.train.loop import NotFinite, Signals
from openvision3.train.pretrain import FREE, SETTLED, pretrain
from openvision3.train.recipes import IN_TURN, RECIPES


@dataclass(frozen=True)
class Cell:
    """One row of a grid: the base with these fields changed, by their names on the command line."""

    label: str
    changes: dict[str, Any]
    equal_compute: bool = False
    """as many steps as cost what the base costs, instead of as many as the base has"""
    then: dict[str, Any] | None = None
    """a second phase, from the weights of the first: what it changes in the first"""


@dataclass(frozen=True)
class Ablation:
    """A question and the cells that answer it."""

    question: str
    cells: Callable[[str, RunConfig], list[Cell]]
    claims: tuple[Claim, ...] = ()
    """what the paper says of these cells"""


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper as differences of held-out losses: (cell, the cell it is compared with, metric, whether it says "lower" or "the same")."""

    says: str
    parts: tuple[tuple[str, str, str, str], ...]

    def judge(self, groups: Sequence[Group]) -> tuple[str, list[tuple[str, str, str]], list[dict[str, Any]]] | None:
        """("holds", "fails" or "undecided"; a line for each part; the same for scripts), by paired t-tests over seeds; None where a cell is missing.

        A part that says "lower" holds or fails where the difference is below or above 0 with p < .05, and is undecided otherwise. That two are the same
        cannot be shown by a test of difference: such a part fails or is undecided. A claim holds with all of its parts and fails with any.
        """
        by_label = {group.label: group for group in groups}
        lines, kept, verdicts = [], [], []
        for cell, other, metric, says in self.parts:
            made = apart(metric, by_label[cell], by_label[other]) if {cell, other} <= by_label.keys() else None
            if made is None:
                return None
            higher, differs = made.over.difference > 0, made.over.differs
            verdict = "undecided" if not differs else "fails" if higher or says == "the same" else "holds"
            verdicts.append(verdict)
            lines.append((f"{column(metric)[0]} of {cell} - {other}: {says}?", str(made), verdict))
            kept.append(as_json(made) | {"says": says, "verdict": verdict})
        return "fails" if "fails" in verdicts else "holds" if set(verdicts) == {"holds"} else "undecided", lines, kept


BOTH, UNDERSTANDING, RECONSTRUCTION, RANDOM = "both", "only understanding", "only reconstruction", "heads on a frozen random encoder"


def _synergy(recipe: str, base: RunConfig) -> list[Cell]:
    learns = "model.loss.encoder_learns_from"
    return [
        Cell(BOTH, {}),
        Cell(UNDERSTANDING, {learns: "understanding"}),
        Cell(RECONSTRUCTION, {learns: "reconstruction"}),
        Cell(RANDOM, {learns: "nothing"}),
    ]


SYNERGY = (
    Claim(
        "Understanding alone lowers the pixel and the latent loss",
        ((UNDERSTANDING, RANDOM, "val/pixel", "lower"), (UNDERSTANDING, RANDOM, "val/latent", "lower")),
    ),
    Claim(
        "Reconstruction alone hardly moves the contrastive loss and lowers the caption loss a little",
        ((RECONSTRUCTION, RANDOM, "val/contrastive", "the same"), (RECONSTRUCTION, RANDOM, "val/caption", "lower")),
    ),
    Claim(
        "Both together beat reconstruction alone at reconstruction",
        ((BOTH, RECONSTRUCTION, "val/pixel", "lower"), (BOTH, RECONSTRUCTION, "val/latent", "lower")),
    ),
    Claim(
        "Reconstruction does not hurt understanding",
        ((BOTH, UNDERSTANDING, "val/contrastive", "lower"), (BOTH, UNDERSTANDING, "val/caption", "lower")),
    ),
)


def _no_vae(recipe: str, base: RunConfig) -> list[Cell]:
    """Without a VAE the pixel loss is all there is of reconstruction, and costs no decoding: every row gets it, as every row gets the latent loss."""
    pixels = {"model.vae.name": "pixels", "model.encoder.patch": 16, "model.loss.beta": 0.0, "pixel_share": 1.0}
    return [Cell(f"VAE {base.model.vae.name}", {}), Cell("no VAE, pixels", pixels)]


def _neighbours(size: str) -> list[str]:
    """One size down, this one, one up: M, B, L of the paper's base."""
    names = list(SIZES)
    place = names.index(size)
    return names[max(0, place - 1) : place + 2]


def _decoder_size(recipe: str, base: RunConfig) -> list[Cell]:
    return [Cell(f"latent decoder {size}", {"model.latent_decoder.size": size}) for size in _neighbours(base.model.latent_decoder.size)]


def _encoder_size(recipe: str, base: RunConfig) -> list[Cell]:
    return [Cell(f"encoder {size}", {"model.encoder.size": size}) for size in _neighbours(base.model.encoder.size)]


def _balance(recipe: str, base: RunConfig) -> list[Cell]:
    told = {0.5: "2 : 1 (the paper's table)", 1.0: "1 : 1", 2.0: "1 : 2 (the article's words)", 4.0: "1 : 4", 8.0: "1 : 8", 20.0: "1 : 20"}
    return [Cell(f"und : rec {name}", {"model.loss.omega_rec": rec, "model.loss.omega_und": 1.0}) for rec, name in told.items()]


def _tau(recipe: str, base: RunConfig) -> list[Cell]:
    return [Cell(f"tau {tau:g}", {"model.loss.tau": tau}) for tau in (0.0, 0.4, 0.8, 1.2)]


def _token_norm(recipe: str, base: RunConfig) -> list[Cell]:
    return [Cell("tokens end in a LayerNorm", {"model.encoder.token_norm": "layernorm"}), Cell("tokens as they are", {"model.encoder.token_norm": "none"})]


def _pixel_share(recipe: str, base: RunConfig) -> list[Cell]:
    shares = (1, 2, 4, 8)
    return [Cell(f"pixels of 1/{n}" if n > 1 else "pixels of all", {"pixel_share": 1 / n}) for n in shares] + [
        Cell(f"pixels of {'all' if n == 1 else f'1/{n}'}, equal compute", {"pixel_share": 1 / n}, equal_compute=True) for n in shares
    ]


def _two_phases(recipe: str, base: RunConfig) -> list[Cell]:
    """What the recipe of the second phase changes in that of the first: as a ratio where it is a batch, a rate or a number of steps."""
    pair = next((pair for pair in IN_TURN.values() if pair[0].__name__ == recipe), None)
    if pair is None:
        legal = ", ".join(dict.fromkeys(pair[0].__name__ for pair in IN_TURN.values()))
        raise ValueError(f"recipe {recipe} is no first phase; legal for this ablation are {legal}")
    low, high, own = (flat(to_dict(config)) for config in (pair[0](), pair[1](), base))
    ratios = ("batch", "optimizer.learning_rate")
    then = {name: high[name] for name in high if high[name] != low[name] == own[name] and name not in (*ratios, *NOT_OF_A_PHASE)}
    if "size" not in then:
        raise ValueError(f"size {base.size} is set for both phases, but the second differs from the first in its size; leave --size out")
    alone = dict(then)
    then |= {name: type(own[name])(own[name] * high[name] / low[name]) for name in ratios}
    then["steps"] = max(1, round(base.steps * high["steps"] / low["steps"]))
    return [
        Cell(f"{base.size} px, then {then['size']} px", {}, then=then),
        Cell(f"{then['size']} px alone, equal compute", alone, equal_compute=True),
    ]


NOT_OF_A_PHASE = ("steps", "minutes", "init", "out", "tokenizer", "optimizer.warmup_steps", "eval_every", "save_every", "log_every", "keep", "keep_best")


ABLATIONS = {
    "synergy": Ablation("does each branch help the other?", _synergy, SYNERGY),
    "no_vae": Ablation("what does the VAE bring?", _no_vae),
    "decoder_size": Ablation("how large must the latent decoder be?", _decoder_size),
    "encoder_size": Ablation("what does a larger encoder bring?", _encoder_size),
    "balance": Ablation("omega_und : omega_rec, how much of each branch?", _balance),
    "tau": Ablation("how much noise on the tokens?", _tau),
    "token_norm": Ablation("do the tokens need a norm at their end?", _token_norm),
    "pixel_share": Ablation("how many pictures of a batch must be compared pixel by pixel?", _pixel_share),
    "two_phases": Ablation("low_res then high_res, or high_res alone for the same compute?", _two_phases),
}


@dataclass
class AblationOptions:
    """Which recipe is the base, and how long, how often."""

    recipe: str = "mini_low_res"
    """the recipe that every cell changes"""
    steps: int = 300
    """optimiser steps of the base"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """each cell is trained once for each"""
    out: PathName = "runs/ablate"
    """the folder of all cells and pages; grids of one base share it"""
    draw: bool = False
    """train nothing: the pages anew from the runs that are there"""

    def __post_init__(self):
        if self.steps < 1 or not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"steps {self.steps}, seeds {self.seeds}: legal are one step or more, and one seed or more, each once")


def base_config(options: AblationOptions, config: RunConfig) -> RunConfig:
    """The recipe with the fields of the command line, as long as the options say."""
    config = copy.deepcopy(config)
    if config.seed != RECIPES[options.recipe]().seed:
        raise ValueError(f"seed {config.seed}: an ablation trains each cell once a seed; name them with --seeds")
    config.steps, config.minutes, config.keep, config.keep_best, config.resume = options.steps, 0.0, 1, 0, False
    return paced(config)


def paced(config: RunConfig) -> RunConfig:
    """At most a tenth is warm-up; four evaluations, two saves and ten lines, however short it is."""
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, max(1, config.steps // 10))
    config.eval_every, config.save_every = max(1, config.steps // 4), max(1, config.steps // 2)
    config.log_every = max(1, min(10, config.steps // 10))
    return config


def ablate(name: str, options: AblationOptions, base: RunConfig) -> int:
    """Train what is missing of the grid and write NAME.html, NAME.json and NAME.png into the folder; 75 where a signal stopped it.

    A cell whose loss does not stay finite is named on the page, and the grid goes on.

    Raises:
        ValueError, FileNotFoundError: an unknown name, a folder of another base, and what would end any of the runs at its start.
    """
    if name not in ABLATIONS:
        raise ValueError(f"unknown ablation {name}; legal are {', '.join(ABLATIONS)}")
    cells = ABLATIONS[name].cells(options.recipe, base)
    out = Path(options.out)
    plans = [(cell, phases(cell, base, options.recipe)) for cell in cells]
    device = choose_device(base.device)
    with distributed.started(device) as ranks, Signals() as signals:
        with distributed.together():
            for _, runs in plans:
                for _, config in runs:
                    rows_of_a_process(config.batch, ranks.world, config.micro_batch)
                    load_distance(config.model.loss)
                operations(runs, options.recipe)  # raises where the VAE is not at hand
            precision = _same_base(out, base, device, options.draw) if ranks.rank == 0 else ""
        precision = distributed.from_first(precision)
        taken = 0
        for seed in () if options.draw else options.seeds:
            for cell, runs in plans:
                status = _train(out, cell, runs, seed, precision, signals)
                if status == "stopped" or any(distributed.gather_objects(bool(signals.asked))):
                    return 75
                taken += status == "taken"
        if ranks.rank == 0:
            if taken:
                console().print(f"{taken} runs are being trained by another process; run this again when it has ended", markup=False)
            _write(name, out, plans, options, base, taken)
    return 0


def phases(cell: Cell, base: RunConfig, recipe: str) -> list[tuple[str, RunConfig]]:
    """The runs of a cell as (folder, config), without a seed; the folder says what they change in the base."""
    config = changed(base, cell.changes)
    if cell.equal_compute:
        config.steps = max(1, round(base_cost(cell, base, recipe) / step_operations(config, recipe)))
    found = [(difference(base, config), paced(config))]
    if cell.then:
        second = paced(changed(config, cell.then))
        found.append((f"{found[0][0]},then,{difference(config, second)}", second))
    return found


def base_cost(cell: Cell, base: RunConfig, recipe: str) -> float:
    """Operations of what the cell must cost: the base's, and of a comparison with two phases both of them."""
    pair = [c for c in _two_phases(recipe, base) if c.then] if "size" in cell.changes else []
    return operations(phases(pair[0], base, recipe) if pair else [("", base)], recipe)


def operations(runs: Sequence[tuple[str, RunConfig]], recipe: str) -> float:
    """Of training them all, the optimiser's included."""
    return sum(config.steps * step_operations(config, recipe) for _, config in runs)


def step_operations(config: RunConfig, recipe: str) -> float:
    """Of one step, by formula: the same whichever device is named, and a GPU need not be timed first."""
    found = estimate(config, recipe, Options(cached=bool(config.latents)), parse_devices("h100"), advise=False)
    return config.batch * found.sample_flops + found.optimiser_flops


def changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The config with these fields, checked anew."""
    values = to_dict(config)
    for name, value in changes.items():
        *path, last = name.split(".")
        place = values
        for step in path:
            place = place[step]
        place[last] = value
    return from_dict(RunConfig, values)


def difference(base: RunConfig, config: RunConfig) -> str:
    """What differs, as a folder's name: base, tau=0.8, encoder.size=L, size=128,steps=30. Where files lie is no difference."""
    before, after = flat(to_dict(base)), flat(to_dict(config))
    names = [name for name in before if before[name] != after[name] and name not in (*FREE, "optimizer.warmup_steps") and "lpips_" not in name]
    parts = [f"{_shortest(name, before)}={after[name]}" for name in names]
    return re.sub(r"[^\w.,=+-]", "-", ",".join(parts)) or "base"


def _shortest(name: str, names: Iterable[str]) -> str:
    """The shortest end of a dotted name that no other has: omega_rec, but encoder.size."""
    parts = name.split(".")
    ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
    return next(end for end in ends if end == name or sum(other == end or other.endswith(f".{end}") for other in names) == 1)


def _same_base(out: Path, base: RunConfig, device: str, draw: bool) -> str:
    """The precision of all cells, which the first command settles; raises ValueError where `out` holds cells of another base."""
    path = out / "base.json"
    if not path.is_file():
        if draw:
            raise ValueError(f"{out} holds no ablation: nothing to draw")
        out.mkdir(parents=True, exist_ok=True)
        precision, why = choose_precision(base.precision, device)
        console().print(f"all cells in {precision} ({why})", markup=False)
        base = changed(base, {"precision": precision})
        write_whole(path, json.dumps(to_dict(base), indent=2) + "\n", first_wins=True)
    kept = load_config(RunConfig, path)
    before, now = flat(to_dict(kept)), flat(to_dict(base))
    for name, value in now.items():
        if name not in (*FREE, "device") and before[name] != value and (name, value) != ("precision", "auto"):
            raise ValueError(f"{out} holds an ablation with {name} {before[name]!r}, not {value!r}; name another folder with --out")
    return kept.precision


def _train(out: Path, cell: Cell, runs: list[tuple[str, RunConfig]], seed: int, precision: str, signals: Signals) -> str:
    """finished, diverged, stopped, or taken: another process is at it."""
    first = ""
    for folder, config in runs:
        place = out / folder / f"seed-{seed}"
        with _claimed(place) as mine:
            if not mine:
                return "taken"
            config = copy.deepcopy(config)
            config.seed, config.out, config.init, config.precision = seed, str(place), first or config.init, precision  # type: ignore[assignment]
            if first:
                config.tokenizer = ""
            with distributed.together():  # rank 0 looks: others may see an older state of a shared disk
                state = _state(place, config) if distributed.rank() == 0 else ""
            state = distributed.from_first(state)
            config.resume = state == "begun"
            if state in ("new", "begun"):
                if distributed.rank() == 0:
                    console().print(f"{cell.label}, seed {seed}: {place}", markup=False)
                try:
                    if pretrain(config, "ablation", signals).status == "stopped":
                        return "stopped"
                except NotFinite as error:  # on all ranks alike: such as a latent decoder that is too large
                    if distributed.rank() == 0:
                        write_whole(place / DIVERGED, f"{error}\n")
                        console().print(f"{cell.label}, seed {seed}: {error}", markup=False)
                    return "diverged"
            elif state == "diverged":
                return state
            first = str(place)
    return "finished"


DIVERGED = "DIVERGED"
"""The file in a run folder that says why it could not go on."""


def _state(place: Path, config: RunConfig) -> str:
    """new, begun, finished or diverged. Raises ValueError where the folder holds a run of another config."""
    if not (place / "config.json").is_file():
        return "new"
    kept, asked = (flat(to_dict(each)) for each in (load_config(RunConfig, place / "config.json"), config))
    free = (*FREE, "device", "init")
    apart = [name for name, value in asked.items() if kept[name] != value and name not in free and (name, value) not in SETTLED]
    if apart:
        raise ValueError(f"{place} holds a run with {apart[0]} {kept[apart[0]]!r}, not {asked[apart[0]]!r}; name another folder with --out")
    if (place / DIVERGED).is_file():
        return "diverged"
    return "finished" if finished(place) else "begun"


def finished(place: Path) -> bool:
    """Whether the run there has its last evaluation and its last checkpoint. What another process is writing just now counts as not finished."""
    try:
        steps = load_config(RunConfig, place / "config.json").steps
        found = complete_checkpoints(place)
        return bool(found) and read_state(found[-1]).step >= steps and Curves(place).read().step >= steps
    except (ValueError, OSError):
        return False


@contextlib.contextmanager
def _claimed(place: Path) -> Iterator[bool]:
    """Hold the run for as long as the block lasts, for all ranks; False where another process of this machine holds it."""
    with contextlib.ExitStack() as held:
        mine = True
        with distributed.together():
            if distributed.rank() == 0:
                place.parent.mkdir(parents=True, exist_ok=True)
                lock = held.enter_context(open(place.parent / f".{place.name}.lock", "w"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    mine = False
        yield distributed.from_first(mine)


# -- the page ------------------------------------------------------------------------------------------------------


def _write(name: str, out: Path, plans: Sequence[tuple[Cell, list[tuple[str, RunConfig]]]], options: AblationOptions, base: RunConfig, taken: int) -> None:
    """The page of what is finished; says what is not. Rows hold the seeds that all of them have, where there is such a seed."""
    done = {cell.label: [seed for seed in options.seeds if finished(out / runs[-1][0] / f"seed-{seed}")] for cell, runs in plans}
    lost = [
        f"{cell.label}, seed {seed}" for cell, runs in plans for seed in options.seeds if any((out / f / f"seed-{seed}" / DIVERGED).is_file() for f, _ in runs)
    ]
    there = [seeds for seeds in done.values() if seeds]
    if not there:
        if taken:
            return
        raise ValueError(f"no run of {name} is finished in {out}: nothing to draw")
    common = set.intersection(*map(set, there))
    groups = []
    for cell, runs in plans:
        seeds = [seed for seed in done[cell.label] if seed in common or not common]
        if seeds:
            steps = sum(config.steps for _, config in runs)
            groups.append(Group(cell.label, [Curves(out / runs[-1][0] / f"seed-{seed}").read() for seed in seeds], steps))
    missing = [f"{cell.label}, seed {seed}" for cell, _ in plans for seed in options.seeds if seed not in done[cell.label]]
    costs = [
        (cell.label, " then ".join(f"{config.steps:,} x {config.batch} at {config.size} px" for _, config in runs), f"{operations(runs, options.recipe):.3g}")
        for cell, runs in plans
    ]
    about = html.table(("", "steps x pictures", "operations of training"), costs)
    if lost:
        about += html.note(f"Ended early, for their loss did not stay finite: {'; '.join(lost)}.")
    left = [each for each in missing if each not in lost]
    if left:
        about += html.note(f"Not finished, and not in the numbers: {'; '.join(left)}.")
    used = ", ".join(map(str, sorted(common))) or "unlike ones in each row"
    lead = f"{ABLATIONS[name].question} Base: {options.recipe}, {base.steps} steps of {base.batch} at {base.size} px on {', '.join(base.data)}; seeds {used}."
    judged = [(claim, found) for claim in ABLATIONS[name].claims if (found := claim.judge(groups)) is not None]
    sections, more = [("Cells", about)], {"claims": [{"claim": claim.says, "verdict": verdict, "parts": kept} for claim, (verdict, _, kept) in judged]}
    if judged:
        rows = [(claim.says if not i else "", verdict if not i else "", *line) for claim, (verdict, lines, _) in judged for i, line in enumerate(lines)]
        note = html.note("By differences of runs of one seed: mean [95 % interval of Student's t], p of the paired t-test; undecided where p is .05 or more.")
        sections.append(("What the paper says, here", note + html.table(("claim", "here", "part", "difference", "part alone"), rows)))
    page = write_comparison(out / f"{name}.html", f"Ablation: {name}", lead, groups, sections, more if judged else None)
    print(text_table(groups))
    for claim, (verdict, lines, _) in judged:
        print(f"{verdict}: {claim.says} ({'; '.join(f'{part} {value}' for part, value, _ in lines)})")
    for told, which in (("are not finished; the same command goes on", left), ("ended early, for their loss did not stay finite", lost)):
        if which:
            console().print(f"{len(which)} runs {told}: {'; '.join(which)}", markup=False)
    print(f"page: {page.resolve()}")
