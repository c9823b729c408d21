"""The verbs around a training: the demo, a run, its cost, its curves, several runs on one page, grids of short runs, and the machine."""

from __future__ import annotations

from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from openvision3.cli.common import Device, Json, output_folder, parse
from openvision3.cli.paths import check_apart
from openvision3.settings import PathName, unknown

if TYPE_CHECKING:
    from openvision3.train.config import PretrainConfig


STOPPED = 75
"""Exit code of a run that a signal ended after it had saved: run the same command with --resume."""

Runs = Positional[Annotated[tuple[PathName, ...], arg(metavar="RUN ...", help="run folders; several are drawn into the same panels")]]


def demo(minutes: float = 5.0, out: PathName = "demo", seed: int = 0) -> int:
    """Train the small model on OpenMoji for a few minutes and write a report of what it learned.

    Args:
        minutes: how long to train.
        out: the folder of the report; an earlier demo in it is replaced.
        seed: of everything random.
    """
    from openvision3.experiments.demo import run_demo

    return run_demo(minutes, Path(out), seed)


def train(argv: Sequence[str]) -> int:
    """Train from a recipe: openvision3 train RECIPE --field value ..."""
    from openvision3.train.recipes import IN_TURN, RECIPES

    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:16s} {(recipe.__doc__ or '').strip().splitlines()[0]}" for name, recipe in RECIPES.items()]
        lines += [f"  {name:16s} {' and then '.join(recipe.__name__ for recipe in recipes)}, in one command" for name, recipes in IN_TURN.items()]
        print("usage: openvision3 train RECIPE [--field value ...]\n\nrecipes:\n" + "\n".join(lines) + "\n\nfields: openvision3 train RECIPE --help")
        return 0 if argv else 2
    name, rest = argv[0], list(argv[1:])
    if name in IN_TURN:
        return _train_in_turn(name, rest)
    config = configure_run(check_recipe(argv), rest)
    if config.resume:  # what is not set on the command line is as the run has it
        config = configure_run(name, rest, started=Path(config.out or f"runs/{name}"))
    return _train(name, config)


def _train_in_turn(name: str, rest: Sequence[str]) -> int:
    """Every phase takes the fields of the command line; the second starts from the weights of the first, in a folder beside it."""
    from openvision3.train.pretrain import pretrain_in_turn
    from openvision3.train.recipes import IN_TURN

    phases: list[tuple[str, PretrainConfig]] = []
    program = f"openvision3 train {name}"
    for recipe in IN_TURN[name]:
        config = configure_run(recipe.__name__, rest, program)
        for field in ("size", "init"):
            if getattr(config, field) != getattr(recipe(), field):
                raise ValueError(f"{name} sets {field} for each phase; run {' and then '.join(r.__name__ for r in IN_TURN[name])} by themselves to change it")
        folder = Path(config.out or f"runs/{name}") / recipe.__name__
        if config.resume and (folder / "config.json").is_file():
            config = configure_run(recipe.__name__, rest, program, started=folder)
        elif config.resume:
            config.resume = False
        config.out = str(folder)
        if phases:
            config.init, config.tokenizer = phases[-1][1].out, ""
        phases.append((recipe.__name__, config))
    for _, config in phases:
        check_apart(config.out, (*config.data, *config.val))
    return STOPPED if pretrain_in_turn(phases).status == "stopped" else 0


def check_recipe(argv: Sequence[str]) -> str:
    """Raises ValueError where the first argument names no recipe."""
    from openvision3.train.recipes import IN_TURN, RECIPES

    if argv[0] not in RECIPES:
        raise unknown("recipe", argv[0], [*RECIPES, *IN_TURN])
    return argv[0]


def configure_run(name: str, rest: Sequence[str], program: str = "", started: Path | None = None) -> PretrainConfig:
    """The recipe, or the config of a run that was `started`, with what the command line sets anew."""
    from openvision3.settings import load_config
    from openvision3.train.config import PretrainConfig
    from openvision3.train.recipes import RECIPES

    default = load_config(PretrainConfig, started / "config.json") if started and (started / "config.json").is_file() else RECIPES[name]()
    return parse(PretrainConfig, rest, program or f"openvision3 train {name}", default=default, description=RECIPES[name].__doc__)


def _train(name: str, config: PretrainConfig) -> int:
    from openvision3.train.pretrain import pretrain

    check_apart(config.out or f"runs/{name}", (*config.data, *config.val))
    return STOPPED if pretrain(config, name).status == "stopped" else 0


def estimate(argv: Sequence[str]) -> int:
    """Say what a run will take before it runs: openvision3 estimate RECIPE [--gpus h100:8] [--field value ...]"""
    program = "openvision3 estimate"
    if not argv or argv[0] in ("-h", "--help"):
        print(ESTIMATE_HELP)
        return 0 if argv else 2
    from openvision3.estimate.plan import estimate
    from openvision3.estimate.planned import Options
    from openvision3.estimate.show import show, to_json
    from openvision3.train.recipes import IN_TURN

    phases = [recipe.__name__ for recipe in IN_TURN[argv[0]]] if argv[0] in IN_TURN else [check_recipe(argv)]
    program, rest = f"{program} {argv[0]}", list(argv[1:])
    if "-h" in rest or "--help" in rest:
        parse(Options, ["--help"], program, description=f"The fields of the run, too: openvision3 train {phases[0]} --help")
    options, rest = parse(Options, rest, program, return_unknown_args=True)
    found = [estimate(configure_run(name, rest, program), name, options) for name in phases]
    if options.json:
        print(to_json(found))
    else:
        show(found, options.explain)
    return 0


ESTIMATE_HELP = """usage: openvision3 estimate RECIPE [--gpus h100:8] [--field value ...]

Operations, memory, hours, disk and network of a run, and what would make it cheaper; nothing is loaded, nothing runs.

  --gpus h100:8             devices: h100, h200, a100, a100-40gb, b200, l40s, 4090, cpu, 64xh100; none: this machine's
  --utilisation 0.40        share of the devices' peak that the run reaches
  --price-per-hour 2.5      of one device
  --cached                  latents come from a cache (openvision3 data latents)
  --explain                 print each formula with its numbers
  --json                    one JSON value
  --field value             any field of the run: the same as for openvision3 train RECIPE

all options: openvision3 estimate RECIPE --help; recipes: openvision3 train --help"""


def ablate(argv: Sequence[str]) -> int:
    """Repeat one of the paper's experiments as a grid of short runs: openvision3 ablate NAME [--steps 300] [--field value ...]"""
    from openvision3.experiments.ablate import AblationOptions, base_config
    from openvision3.experiments.ablate import ablate as run_grid
    from openvision3.experiments.ablations import ABLATIONS, question

    program = "openvision3 ablate"
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:14s} {question(name)}" for name in ABLATIONS]
        print(f"usage: {program} NAME [--steps 300] [--seeds 0 1 2] [--recipe mini_low_res] [--out runs/ablate] [--field value ...]\n\nablations:")
        print("\n".join(lines) + f"\n\nits options: {program} NAME --help; fields of the base: openvision3 train mini_low_res --help")
        return 0 if argv else 2
    name, rest = argv[0], list(argv[1:])
    if name not in ABLATIONS:
        raise unknown("ablation", name, ABLATIONS)
    program = f"{program} {name}"
    if "-h" in rest or "--help" in rest:
        parse(AblationOptions, ["--help"], program, description=question(name))
    options, rest = parse(AblationOptions, rest, program, return_unknown_args=True)
    check_recipe([options.recipe])
    base = base_config(options, configure_run(options.recipe, rest, program))
    output_folder(options.out, (*base.data, *base.val))
    return run_grid(name, options, base)


def compare(runs: Runs, out: PathName = "compare.html", json: Json = False) -> int:
    """Put several runs on one page: where they ended, their curves, what they differ in, and their pictures.

    Args:
        out: the page; its numbers and curves stand beside it as .json and .png.
    """
    from openvision3.experiments.compare import as_rows, read_groups, text_table, write_comparison

    groups = read_groups(runs)
    if Path(out).suffix != ".html":
        raise ValueError(f"out {out} must be the name of a page, such as compare.html")
    page = write_comparison(Path(out), "Runs compared", f"{sum(len(group.runs) for group in groups)} runs.", groups)
    print(dumps(as_rows(groups), indent=2) if json else f"{text_table(groups)}\npage: {page.resolve()}")
    return 0


def watch(runs: Runs, once: bool = False, png: PathName = "", metrics: tuple[str, ...] = (), every: float = 2.0) -> int:
    """Draw the curves of runs in the terminal while they are written.

    Args:
        once: draw them as they are now, all of them, and end; so it is where there is no terminal, too.
        png: draw them into this file instead, one panel a metric.
        metrics: which, as in --metrics 'train/*' val/psnr; none: losses, val/..., rate, norm, samples/s, wait, memory.
        every: seconds between looks.
    """
    from openvision3.experiments import watch as watching

    if png:
        count = watching.draw(runs, png, metrics)
        print(f"{png}: {count} panels")
    else:
        watching.watch(runs, once=once, metrics=metrics, every=every)
    return 0


def doctor(
    json: Json = False,
    train: bool = False,
    recipe: str = "tiny",
    batch: int | None = None,
    micro_batch: int = 0,
    device: Device = "auto",
    precision: Annotated[str, arg(metavar="{auto,bf16,fp32}")] = "auto",
    compile: Annotated[str, arg(metavar="{auto,on,off}")] = "auto",
) -> int:
    """Look at this machine: versions, what is fast, what is missing and what to do; with --train, a few steps on it.

    Args:
        train: take a few steps and report losses, waits for the GPU, memory, speed, and between processes the collectives (exit code 1: one is wrong).
        recipe: whose model and batch the steps of --train take.
        batch: images a step of --train, over all devices (default: the recipe's).
        micro_batch: images a device computes at a time in --train; 0 is all of its share.
        precision: of --train.
        compile: whether --train compiles the blocks.
    """
    if train:
        return _try_training(recipe, batch, {"micro_batch": micro_batch, "device": device, "precision": precision, "compile": compile}, json)
    from openvision3.doctor import examine

    found = examine()
    if json:
        print(dumps(found, indent=2))
    else:
        for name, value in found.items():
            if name != "problems":
                print(f"{name:16s} {', '.join(value) if isinstance(value, list) else value}")
        for problem in found["problems"]:
            print(f"! {problem}")
        if not found["problems"]:
            print("all is well")
    return 0


def _try_training(recipe: str, batch: int | None, fields: dict[str, Any], json: bool) -> int:
    from dataclasses import replace

    from openvision3 import distributed
    from openvision3.train.recipes import RECIPES
    from openvision3.train.trial import try_training

    config = RECIPES[check_recipe([recipe])]()
    config = replace(config, batch=batch or config.batch, **fields)
    found = try_training(config)
    if distributed.Ranks.from_environment().rank == 0:
        if json:
            print(dumps(found, indent=2))
        else:
            for line in lines_of_a_trial(found):
                print(line)
    return 1 if found["problems"] else 0


def lines_of_a_trial(found: dict[str, Any]) -> list[str]:
    """What `doctor --train` prints."""
    waits = "not measurable on a CPU" if found["waits_per_step"] is None else f"{found['waits_per_step']:.1f} (1 is right: the log's)"
    values = {
        "device": f"{found['device']}, {found['processes']} process{'es' if found['processes'] > 1 else ''}, {found['parallel']}",
        "precision": found["precision"],
        "compile": found["compile"],
        "loss of each step": "  ".join(f"{loss:.4f}" for loss in found["losses"]),
        "waits per step": waits,
        "peak memory": f"{found['peak_memory_gb']:.2f} GB",
        "samples/s": f"{found['samples_per_second']:.1f}",
    }
    for name, collective in found["collectives"].items():
        values[name] = f"{'right' if collective['right'] else 'WRONG'}, {collective['gigabytes_per_second']:.2f} GB/s"
    lines = [f"{name:18s} {value}" for name, value in values.items()]
    return lines + ([f"! {problem}" for problem in found["problems"]] or ["all is well"])
