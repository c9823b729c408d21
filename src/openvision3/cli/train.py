"""The verbs around training: demo, train, estimate, watch, compare, ablate, doctor."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from openvision3.cli.common import Device, Json, make_folder_of, output_folder, parse
from openvision3.cli.paths import check_apart
from openvision3.settings import PathName, unknown

if TYPE_CHECKING:
    from openvision3.experiments.ablate import AblationOptions
    from openvision3.experiments.kinds import RunConfig
    from openvision3.generate.config import GenerateConfig
    from openvision3.train.config import PretrainConfig
    from openvision3.train.decoder_config import DecoderConfig
    from openvision3.understand.config import LlavaConfig


STOPPED = 75
"""Exit code of a run that saved and stopped at a signal. The same command with --resume continues it."""

Runs = Positional[Annotated[tuple[PathName, ...], arg(metavar="RUN ...", help="run folders; several runs share the panels")]]


def demo(minutes: float = 5.0, draw: float = 0.0, out: PathName = "demo", seed: int = 0) -> int:
    """Train the small model on OpenMoji for a few minutes and write a report.

    Args:
        minutes: training time
        draw: minutes more, in which a generator learns to draw from words; its drawings end the report. 0: none
        out: the folder for the report; an earlier demo in it is replaced
        seed: seed of every random draw
    """
    from openvision3.experiments.demo import run_demo

    return run_demo(minutes, Path(out), seed, draw)


def train(argv: Sequence[str]) -> int:
    """Train a model: openvision3 train RECIPE [--field value ...]"""
    from openvision3.generate.recipes import RECIPES as GENERATORS
    from openvision3.train.decoder_config import RECIPES as DECODERS
    from openvision3.train.recipes import IN_TURN, RECIPES
    from openvision3.understand.recipes import RECIPES as CHATS

    if not argv or argv[0] in ("-h", "--help"):
        recipes: dict[str, Any] = RECIPES | DECODERS | GENERATORS | CHATS
        lines = [f"  {name:19s} {(recipe.__doc__ or '').strip().splitlines()[0]}" for name, recipe in recipes.items()]
        lines += [f"  {name:19s} {', then '.join(recipe.__name__ for recipe in phases)}, in one command" for name, phases in IN_TURN.items()]
        print("usage: openvision3 train RECIPE [--field value ...]\n\nrecipes:\n" + "\n".join(lines) + "\n\nfields: openvision3 train RECIPE --help")
        return 0 if argv else 2
    name, rest = argv[0], list(argv[1:])
    if name in IN_TURN:
        return _train_in_turn(name, rest)
    config: Any = configure(name, rest)
    if config.resume:  # fields that the command line does not set keep the run's values
        config = configure(name, rest, started=Path(config.out or f"runs/{name}"))
    check_apart(config.out or f"runs/{name}", (*config.data, *config.val, *(config.images if name in CHATS else ())))
    if name in CHATS:
        from openvision3.understand.training import train_chat

        return STOPPED if train_chat(config, name).status == "stopped" else 0
    if name in GENERATORS:
        from openvision3.generate.training import train_generator

        return STOPPED if train_generator(config, name).status == "stopped" else 0
    if name in DECODERS:
        from openvision3.train.latent_decoder import train_decoder

        return STOPPED if train_decoder(config, name).status == "stopped" else 0
    from openvision3.train.pretrain import pretrain

    return STOPPED if pretrain(config, name).status == "stopped" else 0


def _train_in_turn(name: str, rest: Sequence[str]) -> int:
    """The fields of the command line hold for every phase. The second phase starts from the weights of the first, in a folder beside it."""
    from openvision3.train.pretrain import pretrain_in_turn
    from openvision3.train.recipes import IN_TURN

    phases: list[tuple[str, PretrainConfig]] = []
    program = f"openvision3 train {name}"
    for recipe in IN_TURN[name]:
        config = configure_run(recipe.__name__, rest, program)
        for field in ("size", "init"):
            if getattr(config, field) != getattr(recipe(), field):
                names = " and then ".join(phase.__name__ for phase in IN_TURN[name])
                raise ValueError(f"{name} sets {field} for each phase; run {names} by themselves to change it")
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


def configure(name: str, rest: Sequence[str], program: str = "", started: Path | None = None) -> Any:
    """As `configure_run`, for a recipe of any kind."""
    from openvision3.generate.recipes import RECIPES as GENERATORS
    from openvision3.train.decoder_config import RECIPES as DECODERS
    from openvision3.understand.recipes import RECIPES as CHATS

    kinds = (configure_generator, GENERATORS), (configure_decoder, DECODERS), (configure_chat, CHATS)
    return next((kind for kind, recipes in kinds if name in recipes), configure_run)(name, rest, program, started)


def configure_run(name: str, rest: Sequence[str], program: str = "", started: Path | None = None) -> PretrainConfig:
    """The recipe, or the config of a run that was `started`, with the fields that the command line sets.

    With --init, settings of the parts that the command line does not set are those of that model. Raises ValueError for an unknown recipe.
    """
    from openvision3.generate.recipes import RECIPES as GENERATORS
    from openvision3.train.config import PretrainConfig
    from openvision3.train.decoder_config import RECIPES as DECODERS
    from openvision3.train.recipes import IN_TURN, RECIPES, with_parts_of
    from openvision3.understand.recipes import RECIPES as CHATS

    if name not in RECIPES:
        others: dict[str, Any] = {"a generator": GENERATORS, "the latent decoder of a finished model": DECODERS, "a chat model": CHATS}
        if what := next((what for what, recipes in others.items() if name in recipes), None):
            raise ValueError(f"recipe {name} trains {what}, which this command does not take; choose one of {', '.join(RECIPES)}")
        raise unknown("recipe", name, [*RECIPES, *IN_TURN, *DECODERS, *GENERATORS, *CHATS])
    config = _configure(PretrainConfig, RECIPES[name], rest, program, started)
    if not config.init or config.resume or started:
        return config

    def continued() -> PretrainConfig:
        return with_parts_of(replace(RECIPES[name](), init=config.init))

    return _configure(PretrainConfig, functools.wraps(RECIPES[name])(continued), rest, program, None)


def configure_generator(name: str, rest: Sequence[str], program: str = "", started: Path | None = None) -> GenerateConfig:
    """As `configure_run`, for the recipe of a generator."""
    from openvision3.generate.config import GenerateConfig
    from openvision3.generate.recipes import RECIPES

    return _configure(GenerateConfig, RECIPES[name], rest, program, started)


def configure_chat(name: str, rest: Sequence[str], program: str = "", started: Path | None = None) -> LlavaConfig:
    """As `configure_run`, for the recipe of a chat model."""
    from openvision3.understand.config import LlavaConfig
    from openvision3.understand.recipes import RECIPES

    return _configure(LlavaConfig, RECIPES[name], rest, program, started)


def configure_decoder(name: str, rest: Sequence[str], program: str = "", started: Path | None = None) -> DecoderConfig:
    """As `configure_run`, for the recipe of a latent decoder: settings of the model are those of the model that --init names."""
    from openvision3.train.decoder_config import RECIPES, DecoderConfig

    config = _configure(DecoderConfig, RECIPES[name], rest, program, started)
    if config.resume or started:
        return config
    recipe = functools.wraps(RECIPES[name])(functools.partial(RECIPES[name], config.init))
    return _configure(DecoderConfig, recipe, rest, program, started)


def _configure(kind: Any, recipe: Callable[[], Any], rest: Sequence[str], program: str, started: Path | None) -> Any:
    from openvision3.settings import load_config

    default = load_config(kind, started / "config.json") if started and (started / "config.json").is_file() else recipe()
    return parse(kind, rest, program or f"openvision3 train {recipe.__name__}", default=default, description=recipe.__doc__)


def _parse_options(kind: Any, argv: Sequence[str], program: str, description: str) -> tuple[Any, list[str]]:
    """(the options of a verb, the words that set fields of its run)."""
    if {"-h", "--help"} & set(argv):
        parse(kind, ["--help"], program, description=description)
    return parse(kind, argv, program, return_unknown_args=True)


def estimate(argv: Sequence[str]) -> int:
    """Estimate memory, hours, disk and network of a run: openvision3 estimate RECIPE [--gpus 8xh100]"""
    program = "openvision3 estimate"
    about = "Estimate what a run takes and what would make it cheaper, without loading or training anything. Set fields of the run as for openvision3 train."
    if not argv or argv[0].startswith("-"):
        print(f"usage: {program} RECIPE [--gpus 8xh100] [--explain] [--field value ...]\n\n{about}")
        print(f"\noptions: {program} RECIPE --help; recipes and fields: openvision3 train --help")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    from openvision3.estimate.plan import estimate
    from openvision3.estimate.planned import Options
    from openvision3.estimate.show import show, to_json
    from openvision3.train.recipes import IN_TURN

    options, rest = _parse_options(Options, argv[1:], f"{program} {argv[0]}", about)
    phases = [recipe.__name__ for recipe in IN_TURN.get(argv[0], [])] or [argv[0]]
    plans = [estimate(configure(name, rest, f"{program} {argv[0]}"), name, options) for name in phases]
    if options.json:
        print(to_json(plans))
    else:
        show(plans, options.explain)
    return 0


def ablate(argv: Sequence[str]) -> int:
    """Repeat an experiment of the paper as a grid of short runs: openvision3 ablate NAME [--steps 300]"""
    from openvision3.experiments.ablate import ablate as run_grid
    from openvision3.experiments.ablations import ABLATIONS, question

    program = "openvision3 ablate"
    if not argv or argv[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:16s} {question(name)}" for name in ABLATIONS)
        print(f"usage: {program} NAME [--steps 300] [--seeds 0 1 2] [--recipe RECIPE] [--out runs/ablate] [--field value ...]\n\nablations:\n{lines}")
        print(f"\noptions: {program} NAME --help; fields of the base: openvision3 train RECIPE --help")
        return 0 if argv else 2
    options, base = configure_ablation(argv[0], argv[1:])
    output_folder(options.out, (*base.data, *base.val))
    return run_grid(argv[0], options, base)


def configure_ablation(name: str, rest: Sequence[str]) -> tuple[AblationOptions, RunConfig]:
    """The options of the ablation and the config that it forks. Raises ValueError for an unknown ablation, or a recipe that it does not change."""
    from openvision3.experiments.ablate import AblationOptions, base_config, choose_recipe
    from openvision3.experiments.ablations import ABLATIONS
    from openvision3.experiments.kinds import CHAT, GENERATOR

    if name not in ABLATIONS:
        raise unknown("ablation", name, ABLATIONS)
    program = f"openvision3 ablate {name}"
    about = re.sub(r"\n(Source|Result):", r"\n\n\1:", inspect.cleandoc(ABLATIONS[name].__doc__ or ""))  # each a paragraph of its own
    options, fields = _parse_options(AblationOptions, rest, program, about)
    kind, options.recipe = choose_recipe(name, options.recipe)
    configure = configure_generator if kind is GENERATOR else configure_chat if kind is CHAT else configure_run
    return options, base_config(options, configure(options.recipe, fields, program))


def compare(runs: Runs, out: PathName = "compare.html", json: Json = False) -> int:
    """Compare runs on one page: final scores, curves, settings that differ, samples.

    Args:
        out: the page; its numbers and curves are written beside it as .json and .png
    """
    from openvision3.experiments.compare import format_tables, list_values, read_groups, write_comparison

    if Path(out).suffix != ".html":
        raise ValueError(f"out {out} must be the name of a page, such as compare.html")
    groups = read_groups(runs)
    make_folder_of(out)
    page = write_comparison(Path(out), "Runs compared", f"{sum(len(group.runs) for group in groups)} runs.", groups)
    print(dumps(list_values(groups), indent=2) if json else f"{format_tables(groups)}\npage: {page.resolve()}")
    return 0


def watch(runs: Runs, once: bool = False, png: PathName = "", metrics: tuple[str, ...] = (), every: float = 2.0) -> int:
    """Draw the curves of runs in the terminal while they train.

    Args:
        once: draw once and exit (the default when the output is not a terminal)
        png: draw into this PNG file instead, one panel per metric
        metrics: the metrics to draw, such as --metrics 'train/*' val/psnr. Not set: losses, val/..., rate, norm, samples/s, wait, memory
        every: seconds between updates
    """
    from openvision3.experiments import watch as watching

    if png:
        make_folder_of(png)
        print(f"{png}: {watching.draw(runs, png, metrics)} panels")
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
    """Check this machine: versions, speed, what is missing. With --train, take a few training steps.

    Args:
        train: take a few steps and report losses, waits for the GPU, memory, speed and, with several processes, collectives (exit code 1 if one is wrong)
        recipe: the recipe of --train
        batch: images per step of --train, over all devices. Not set: the recipe's
        micro_batch: images that a device computes at once in --train; 0: its whole share
        precision: precision of --train
        compile: compile the blocks in --train
    """
    if train:
        return _try_training(recipe, batch, {"micro_batch": micro_batch, "device": device, "precision": precision, "compile": compile}, json)
    from openvision3.doctor import examine

    report = examine()
    if json:
        print(dumps(report, indent=2))
        return 0
    for name, value in report.items():
        if name != "problems":
            print(f"{name:18s} {(', '.join(value) or 'none') if isinstance(value, list) else value}")
    print("\n".join(f"! {problem}" for problem in report["problems"]) or "all is well")
    return 0


def _try_training(recipe: str, batch: int | None, fields: dict[str, Any], json: bool) -> int:
    from openvision3 import distributed
    from openvision3.train.trial import try_training

    config = configure_run(recipe, [])
    report = try_training(replace(config, batch=batch or config.batch, **fields))
    if distributed.Ranks.from_environment().rank == 0:
        print(dumps(report, indent=2) if json else "\n".join(lines_of_a_trial(report)))
    return 1 if report["problems"] else 0


def lines_of_a_trial(report: dict[str, Any]) -> list[str]:
    """What `doctor --train` prints."""
    waits = "not measurable on a CPU" if report["waits_per_step"] is None else f"{report['waits_per_step']:.1f} (1 is right: the log's)"
    values = {
        "device": f"{report['device']}, {report['processes']} process{'es' if report['processes'] > 1 else ''}, {report['parallel']}",
        "precision": report["precision"],
        "compile": report["compile"],
        "loss of each step": "  ".join(f"{loss:.4f}" for loss in report["losses"]),
        "waits per step": waits,
        "peak memory": f"{report['peak_memory_gb']:.2f} GB",
        "samples/s": f"{report['samples_per_second']:.1f}",
    }
    for name, collective in report["collectives"].items():
        values[name] = f"{'right' if collective['right'] else 'WRONG'}, {collective['gigabytes_per_second']:.2f} GB/s"
    lines = [f"{name:18s} {value}" for name, value in values.items()]
    return lines + ([f"! {problem}" for problem in report["problems"]] or ["all is well"])
