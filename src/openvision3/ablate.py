"""Grids of short trainings that repeat the paper's experiments at any scale: `openvision3 ablate NAME`.

A cell is a recipe with a few fields changed, trained once a seed, each in a run folder of its own: equal seeds see equal samples in
equal order. Cells that two grids share are trained once. A grid goes on where it was, and several processes may work on one.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openvision3 import distributed
from openvision3.compare import Group, text_table, write_comparison
from openvision3.config import RunConfig, flat, from_dict, load_config, save_config, to_dict
from openvision3.doctor import choose_device
from openvision3.estimate.devices import parse_devices
from openvision3.estimate.plan import estimate
from openvision3.estimate.sizes import Options
from openvision3.evaluate import report
from openvision3.model.encoder import SIZES
from openvision3.pretrain import FREE, pretrain
from openvision3.progress import console
from openvision3.recipes import IN_TURN
from openvision3.watch import Curves


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


def _synergy(recipe: str, base: RunConfig) -> list[Cell]:
    learns = "model.loss.encoder_learns_from"
    return [
        Cell("both", {}),
        Cell("only understanding", {learns: "understanding"}),
        Cell("only reconstruction", {learns: "reconstruction"}),
        Cell("heads on a frozen random encoder", {learns: "nothing"}),
    ]


def _no_vae(recipe: str, base: RunConfig) -> list[Cell]:
    return [Cell(f"VAE {base.model.vae.name}", {}), Cell("no VAE, pixels", {"model.vae.name": "pixels", "model.encoder.patch": 16, "model.loss.beta": 0.0})]


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
    told = {0.5: " (the paper's table)", 2.0: " (the article's words)"}
    return [
        Cell(f"und : rec 1 : {rec:g}" if rec >= 1 else f"und : rec {1 / rec:g} : 1", {"model.loss.omega_rec": rec, "model.loss.omega_und": 1.0})
        if rec not in told
        else Cell(
            (f"und : rec 1 : {rec:g}" if rec >= 1 else f"und : rec {1 / rec:g} : 1") + told[rec], {"model.loss.omega_rec": rec, "model.loss.omega_und": 1.0}
        )
        for rec in (0.5, 1.0, 2.0, 4.0, 8.0, 20.0)
    ]


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
    pair = next((pair for pair in IN_TURN.values() if pair[0].__name__ == recipe), None)
    if pair is None:
        legal = ", ".join(dict.fromkeys(pair[0].__name__ for pair in IN_TURN.values()))
        raise ValueError(f"recipe {recipe} is no first phase; legal for this ablation are {legal}")
    low, high = (flat(to_dict(phase())) for phase in pair)
    own = {"init", "out", "steps", "optimizer.warmup_steps", "tokenizer", "eval_every", "save_every", "log_every", "keep"}
    then = {name: value for name, value in high.items() if value != low[name] and name not in own}
    then["steps"] = max(1, round(base.steps * high["steps"] / low["steps"]))
    alone = {name: value for name, value in then.items() if name not in ("steps", "batch") and not name.startswith("optimizer.")}
    return [
        Cell(f"{base.size} px, then {then['size']} px", {}, then=then),
        Cell(f"{then['size']} px alone, equal compute", alone, equal_compute=True),
    ]


ABLATIONS = {
    "synergy": Ablation("does each branch help the other?", _synergy),
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
    out: str = "runs/ablate"
    """the folder of all cells and pages; grids of one base share it"""
    draw: bool = False
    """train nothing: the pages anew from the runs that are there"""

    def __post_init__(self):
        if self.steps < 1 or not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"steps {self.steps}, seeds {self.seeds}: legal are one step or more, and one seed or more, each once")


def base_config(options: AblationOptions, config: RunConfig) -> RunConfig:
    """The recipe with the fields of the command line, as long as the options say; at most a tenth of it is the warm-up."""
    config = copy.deepcopy(config)
    config.steps = options.steps
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, max(1, options.steps // 10))
    config.eval_every, config.save_every, config.minutes = max(1, options.steps // 4), max(1, options.steps // 2), 0.0
    config.log_every, config.keep, config.keep_best = max(1, min(10, options.steps // 10)), 1, 0
    return config


def ablate(name: str, options: AblationOptions, base: RunConfig) -> int:
    """Train what is missing of the grid and write NAME.html, NAME.json and NAME.png into the folder; 75 where a signal stopped it.

    Raises:
        ValueError: an unknown name, a folder of another base; and what a run raises.
    """
    if name not in ABLATIONS:
        raise ValueError(f"unknown ablation {name}; legal are {', '.join(ABLATIONS)}")
    cells = ABLATIONS[name].cells(options.recipe, base)
    out = Path(options.out)
    plans = [(cell, phases(cell, base, options.recipe)) for cell in cells]
    with distributed.started(choose_device(base.device)) as ranks:
        with distributed.together():
            if ranks.rank == 0:
                _same_base(out, base)
        taken = 0
        for seed in () if options.draw else options.seeds:
            for cell, runs in plans:
                status = _train(out, cell, runs, seed, ranks.rank)
                if status == "stopped":
                    return 75
                taken += status == "taken"
        if ranks.rank == 0:
            if taken:
                console().print(f"{taken} runs are being trained by another process; run this again when it has ended", markup=False)
            _write(name, out, plans, options, base)
    return 0


def phases(cell: Cell, base: RunConfig, recipe: str) -> list[tuple[str, RunConfig]]:
    """The runs of a cell as (folder, config), without a seed; the folder says what they change in the base."""
    config = changed(base, cell.changes)
    if cell.equal_compute:
        config.steps = max(1, round(base_cost(cell, base, recipe) / sample_flops(config, recipe) / config.batch))
        config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, max(1, config.steps // 10))
    found = [(difference(base, config), config)]
    if cell.then:
        second = changed(config, cell.then)
        second.optimizer.warmup_steps = min(second.optimizer.warmup_steps, max(1, second.steps // 10))
        found.append((f"{found[0][0]},then,{difference(config, second)}", second))
    return found


def base_cost(cell: Cell, base: RunConfig, recipe: str) -> float:
    """Operations of what the cell must cost: the base's, and of a comparison with two phases both of them."""
    pair = [c for c in _two_phases(recipe, base) if c.then] if "size" in cell.changes else []
    return operations(phases(pair[0], base, recipe) if pair else [("", base)], recipe)


def operations(runs: Sequence[tuple[str, RunConfig]], recipe: str) -> float:
    """Of training them all."""
    return sum(config.steps * config.batch * sample_flops(config, recipe) for _, config in runs)


def sample_flops(config: RunConfig, recipe: str) -> float:
    """Operations of a sample, forward and backward, by formula: the same whichever device is named, and a GPU need not be timed first."""
    return estimate(config, recipe, Options(), parse_devices("h100"), advise=False).sample_flops


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
    """What differs, as a folder's name: base, tau=0.8, size=128,steps=30."""
    before, after = flat(to_dict(base)), flat(to_dict(config))
    parts = [f"{name.rpartition('.')[2]}={after[name]}" for name in before if before[name] != after[name] and name not in (*FREE, "optimizer.warmup_steps")]
    return ",".join(parts).replace("/", "-").replace(" ", "") or "base"


def _same_base(out: Path, base: RunConfig) -> None:
    path = out / "base.json"
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        save_config(base, path)
        return
    before, now = flat(to_dict(load_config(RunConfig, path))), flat(to_dict(base))
    for name, value in now.items():
        if name not in FREE and name not in ("device", "precision") and before[name] != value:
            raise ValueError(f"{out} holds an ablation with {name} {before[name]!r}, not {value!r}; name another folder with --out")


def _train(out: Path, cell: Cell, runs: list[tuple[str, RunConfig]], seed: int, rank: int) -> str:
    """finished, stopped, or taken: another process is at it."""
    first = ""
    for folder, config in runs:
        place = out / folder / f"seed-{seed}"
        with _claimed(place, rank) as mine:
            if not distributed.from_first(mine):
                return "taken"
            config = copy.deepcopy(config)
            config.seed, config.out, config.init = seed, str(place), first or config.init
            if first:
                config.tokenizer = ""
            config.resume = (place / "config.json").is_file()
            if not finished(place):
                if rank == 0:
                    console().print(f"{cell.label}, seed {seed}: {place}", markup=False)
                if pretrain(config, "ablation").status == "stopped":
                    return "stopped"
            first = str(place)
    return "finished"


def finished(place: Path) -> bool:
    """Whether the run there has its last evaluation and its last checkpoint."""
    return (place / "config.json").is_file() and Curves(place).read().finished and bool(_last_checkpoint(place))


def _last_checkpoint(place: Path) -> bool:
    from openvision3.checkpoint import complete_checkpoints, read_state

    found = complete_checkpoints(place)
    return bool(found) and read_state(found[-1]).step >= load_config(RunConfig, place / "config.json").steps


@contextlib.contextmanager
def _claimed(place: Path, rank: int) -> Iterator[bool]:
    """Hold the run for as long as the block lasts; False where another process of this machine holds it."""
    if rank:
        yield True
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place.parent / f".{place.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


# -- the page ------------------------------------------------------------------------------------------------------


def _write(name: str, out: Path, plans: Sequence[tuple[Cell, list[tuple[str, RunConfig]]]], options: AblationOptions, base: RunConfig) -> None:
    """The page of what is finished; says what is not."""
    groups, missing = [], []
    for cell, runs in plans:
        places = [out / runs[-1][0] / f"seed-{seed}" for seed in options.seeds]
        done = [place for place in places if finished(place)]
        missing += [str(place) for place in places if place not in done]
        if done:
            groups.append(Group(cell.label, [Curves(place).read() for place in done]))
    if not groups:
        raise ValueError(f"no run of {name} is finished in {out}: nothing to draw")
    costs = [
        (cell.label, " then ".join(f"{config.steps:,} x {config.batch} at {config.size} px" for _, config in runs), f"{operations(runs, options.recipe):.3g}")
        for cell, runs in plans
    ]
    about = report.table(("", "steps x pictures", "operations of training"), costs)
    if missing:
        about += f"<p>Not finished, and not in the numbers: {', '.join(missing)}</p>"
    seeds = ", ".join(map(str, options.seeds))
    lead = f"{ABLATIONS[name].question} Base: {options.recipe}, {base.steps} steps of {base.batch} at {base.size} px on {', '.join(base.data)}; seeds {seeds}."
    page = write_comparison(out / f"{name}.html", f"Ablation: {name}", lead, groups, [("Cells", about)])
    print(text_table(groups))
    if missing:
        console().print(f"{len(missing)} runs are not finished; the same command goes on", markup=False)
    print(f"page: {page.resolve()}")
