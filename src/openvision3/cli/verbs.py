"""The command line: one function per verb. Bad input is one line on stderr and exit code 2; a stopped run is 75."""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import inspect
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import tyro
from tyro.conf import Positional, arg

from openvision3 import __version__
from openvision3.cli.paths import check_apart, expand_fields, expand_value
from openvision3.files import check_writable, write_whole
from openvision3.settings import PathName

if TYPE_CHECKING:
    from openvision3.pipeline import Pipeline
    from openvision3.train.config import RunConfig

STOPPED = 75
"""Exit code of a run that a signal ended after it had saved: run the same command with --resume."""

Pictures = Positional[Annotated[tuple[PathName, ...], arg(metavar="PICTURE ...", help="files, folders and globs")]]
Runs = Positional[Annotated[tuple[PathName, ...], arg(metavar="RUN ...", help="run folders; several are drawn into the same panels")]]
Model = Annotated[PathName, arg(metavar="MODEL", help="a shipped name, a model folder or a run folder")]
Device = Annotated[str, arg(metavar="{auto,cpu,cuda,cuda:N}", help="where to compute; cuda:1 is the second GPU")]
Json = Annotated[bool, arg(help="one JSON value on stdout, for scripts")]
VaeFolder = Annotated[PathName, arg(metavar="FOLDER", help="the VAE, where the model's own is not at hand")]


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
    config = _configured(_recipe(argv), rest)
    if config.resume:  # what is not set on the command line is as the run has it
        config = _configured(name, rest, started=Path(config.out or f"runs/{name}"))
    return _train(name, config)


def _train_in_turn(name: str, rest: Sequence[str]) -> int:
    """Every phase takes the fields of the command line; the second starts from the weights of the first, in a folder beside it."""
    from openvision3.train.pretrain import pretrain_in_turn
    from openvision3.train.recipes import IN_TURN

    phases: list[tuple[str, RunConfig]] = []
    program = f"openvision3 train {name}"
    for recipe in IN_TURN[name]:
        config = _configured(recipe.__name__, rest, program)
        for field in ("size", "init"):
            if getattr(config, field) != getattr(recipe(), field):
                raise ValueError(f"{name} sets {field} for each phase; run {' and then '.join(r.__name__ for r in IN_TURN[name])} by themselves to change it")
        folder = Path(config.out or f"runs/{name}") / recipe.__name__
        if config.resume and (folder / "config.json").is_file():
            config = _configured(recipe.__name__, rest, program, started=folder)
        elif config.resume:
            config.resume = False
        config.out = str(folder)
        if phases:
            config.init, config.tokenizer = phases[-1][1].out, ""
        phases.append((recipe.__name__, config))
    for _, config in phases:
        check_apart(config.out, (*config.data, *config.val))
    return STOPPED if pretrain_in_turn(phases).status == "stopped" else 0


def _recipe(argv: Sequence[str]) -> str:
    """Raises ValueError where the first argument names no recipe."""
    from openvision3.train.recipes import IN_TURN, RECIPES

    if argv[0] not in RECIPES:
        raise unknown("recipe", argv[0], [*RECIPES, *IN_TURN])
    return argv[0]


def _configured(name: str, rest: Sequence[str], program: str = "", started: Path | None = None) -> RunConfig:
    """The recipe, or the config of a run that was `started`, with what the command line sets anew."""
    from openvision3.settings import load_config
    from openvision3.train.config import RunConfig
    from openvision3.train.recipes import RECIPES

    default = load_config(RunConfig, started / "config.json") if started and (started / "config.json").is_file() else RECIPES[name]()
    return parse(RunConfig, rest, program or f"openvision3 train {name}", default=default, description=RECIPES[name].__doc__)


def _train(name: str, config: RunConfig) -> int:
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
    from openvision3.estimate.show import show, to_json
    from openvision3.estimate.sizes import Options
    from openvision3.train.recipes import IN_TURN

    phases = [recipe.__name__ for recipe in IN_TURN[argv[0]]] if argv[0] in IN_TURN else [_recipe(argv)]
    program, rest = f"{program} {argv[0]}", list(argv[1:])
    if "-h" in rest or "--help" in rest:
        parse(Options, ["--help"], program, description=f"The fields of the run, too: openvision3 train {phases[0]} --help")
    options, rest = parse(Options, rest, program, return_unknown_args=True)
    found = [estimate(_configured(name, rest, program), name, options) for name in phases]
    if options.json:
        print(to_json(found))
    else:
        show(found, options.explain)
    return 0


def ablate(argv: Sequence[str]) -> int:
    """Repeat one of the paper's experiments as a grid of short runs: openvision3 ablate NAME [--steps 300] [--field value ...]"""
    from openvision3.experiments.ablate import ABLATIONS, AblationOptions, base_config
    from openvision3.experiments.ablate import ablate as run_grid

    program = "openvision3 ablate"
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:14s} {ablation.question}" for name, ablation in ABLATIONS.items()]
        print(f"usage: {program} NAME [--steps 300] [--seeds 0 1 2] [--recipe mini_low_res] [--out runs/ablate] [--field value ...]\n\nablations:")
        print("\n".join(lines) + f"\n\nits options: {program} NAME --help; fields of the base: openvision3 train mini_low_res --help")
        return 0 if argv else 2
    name, rest = argv[0], list(argv[1:])
    if name not in ABLATIONS:
        raise unknown("ablation", name, ABLATIONS)
    program = f"{program} {name}"
    if "-h" in rest or "--help" in rest:
        parse(AblationOptions, ["--help"], program, description=ABLATIONS[name].question)
    options, rest = parse(AblationOptions, rest, program, return_unknown_args=True)
    _recipe([options.recipe])
    base = base_config(options, _configured(options.recipe, rest, program))
    _output_folder(options.out, (*base.data, *base.val))
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


def data(argv: Sequence[str]) -> int:
    """Prepare pictures with words for training: openvision3 data COMMAND ..."""
    from openvision3.cli import data as cli_data

    return _run(argv, cli_data.VERBS, "openvision3 data", "usage: openvision3 data COMMAND [ARGUMENTS]")


def evaluate(argv: Sequence[str]) -> int:
    """Measure a model, and its peers by the same code: openvision3 evaluate WHAT [MODEL] --data DATA"""
    from openvision3.cli import evaluate as cli_evaluate

    return cli_evaluate.evaluate(argv)


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


def reconstruct(
    pictures: Pictures,
    model: Model = "mini",
    out: PathName = "reconstructed",
    size: int | None = None,
    beside: bool = False,
    device: Device = "auto",
    vae: VaeFolder = "",
    json: Json = False,
) -> int:
    """Rebuild pictures from their tokens and say how close they come.

    Args:
        out: the folder for the PNG files.
        size: long side in pixels (default: the training size; 0: as the picture is).
        beside: write original, VAE alone and rebuilt side by side.
    """
    from openvision3.data.images import pad, to_pil
    from openvision3.evaluate.metrics.reconstruction import psnr
    from openvision3.report.sheets import grid
    from openvision3.train.held_out import vae_only

    paths = _paths(pictures)
    folder = _output_folder(out, pictures)
    if any(Path(path).resolve().parent == folder.resolve() for path in paths):
        raise ValueError(f"{out} is where the pictures are, and would be written over; name another folder with --out")
    pipeline = _load(model, device, vae)
    names: dict[str, int] = {}

    def one(path: str) -> dict[str, Any]:
        original = pipeline.scaled(path, size)[0][None]
        height, width = original.shape[2:]
        rebuilt = pipeline.reconstruct(original).cpu()
        through_vae = vae_only(pipeline, pad(original[0])[None])[..., :height, :width]
        columns: list[Any] = [to_pil(images[0]) for images in (original, through_vae, rebuilt)]
        sheet = grid([columns], ("original", "VAE", "rebuilt")) if beside else columns[2]
        target = folder / f"{_unused(Path(path).stem, names)}.png"
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(target, lambda file: sheet.save(file, "PNG"))
        return {
            "picture": path,
            "file": str(target),
            "width": width,
            "height": height,
            "psnr": round(psnr(original, rebuilt).item(), 2),
            "vae_psnr": round(psnr(original, through_vae).item(), 2),
        }

    def line(r: dict[str, Any]) -> str:
        alone = f" (its VAE alone {r['vae_psnr']:.2f})" if pipeline.vae.network is not None else ""
        return f"{r['picture']} -> {r['file']}  {r['width']}x{r['height']}  PSNR {r['psnr']:.2f} dB{alone}"

    return _each(paths, one, json, line)


def caption(
    pictures: Pictures,
    model: Model = "mini",
    beams: int = 1,
    top_p: float | None = None,
    temperature: float = 1.0,
    max_length: int | None = None,
    seed: int = 0,
    device: Device = "auto",
    vae: VaeFolder = "",
    json: Json = False,
) -> int:
    """Describe pictures in words.

    Args:
        beams: hypotheses of the beam search; 1 is greedy.
        top_p: draw words from the smallest set with this probability instead.
        temperature: flattens (> 1) or sharpens (< 1) what is drawn from.
        max_length: longest caption in word pieces.
        seed: of what is drawn.
    """
    paths = _paths(pictures)
    pipeline = _load(model, device, vae)
    settings: dict[str, Any] = {"beams": beams, "top_p": top_p, "temperature": temperature, "max_length": max_length, "seed": seed}
    return _each(
        paths,
        lambda path: {"picture": path, "caption": pipeline.caption(path, **settings)[0]},
        json,
        lambda r: f"{r['picture']}: {r['caption'] or '(nothing)'}",
    )


def classify(
    pictures: Pictures, labels: tuple[str, ...], model: Model = "mini", top: int = 5, device: Device = "auto", vae: VaeFolder = "", json: Json = False
) -> int:
    """Choose among labels in words, with probabilities.

    Args:
        labels: the texts to choose among, such as --labels "a cat" "a dog".
        top: how many to show.
    """
    from openvision3.data.captions import checked_text

    paths = _paths(pictures)
    if not all(map(str.strip, labels)) or not labels or top < 1:
        raise ValueError(
            f"labels {', '.join(map(repr, labels)) or 'none'} and top {top}: legal are one or more of each, such as --labels 'a cat' 'a dog' --top 1"
        )
    for label in labels:
        checked_text(label, "a label")
    pipeline = _load(model, device, vae)

    def one(path: str) -> dict[str, Any]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = pipeline.classify(path, labels)[:top]
        for line in [str(each.message) for each in told if path == paths[0]]:
            print(f"openvision3: {line}", file=sys.stderr)
        return {"picture": path, "labels": [{"label": label, "probability": round(p, 4)} for label, p in found]}

    return _each(paths, one, json, lambda r: f"{r['picture']}: " + ", ".join(f"{x['label']} {100 * x['probability']:.1f}%" for x in r["labels"]))


def encode(
    pictures: Pictures,
    model: Model = "mini",
    out: PathName = "tokens",
    size: int | None = None,
    device: Device = "auto",
    vae: VaeFolder = "",
    json: Json = False,
) -> int:
    """Write tokens and the embedding of each picture as a .safetensors file.

    Args:
        out: the folder for the files; each holds tokens (N, D), embedding (E,) and the picture's height and width.
        size: long side in pixels (default: the training size; 0: as the picture is).
    """
    import torch
    from safetensors.torch import save

    paths = _paths(pictures)
    folder = _output_folder(out, pictures)
    pipeline = _load(model, device, vae)
    names: dict[str, int] = {}

    def one(path: str) -> dict[str, Any]:
        image = pipeline.scaled(path, size)[0]
        height, width = image.shape[1:]
        with torch.no_grad():
            tokens, pooled = pipeline.encoder(pipeline.vae.encode(pipeline.prepare(image)))
        embedding = torch.nn.functional.normalize(pooled, dim=-1)[0].cpu()
        tokens = tokens[0].cpu()
        target = folder / f"{_unused(Path(path).stem, names)}.safetensors"
        data = save({"tokens": tokens.contiguous(), "embedding": embedding.contiguous()}, {"height": str(height), "width": str(width), "model": model})
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(target, data)
        return {"picture": path, "file": str(target), "tokens": list(tokens.shape), "embedding": len(embedding), "height": height, "width": width}

    return _each(paths, one, json, lambda r: f"{r['picture']} -> {r['file']}  tokens {r['tokens'][0]} x {r['tokens'][1]}")


def info(model: Positional[Model] = "mini", json: Json = False) -> int:
    """Say what a model folder or a shipped model holds: parts, sizes, VAE, licence, training."""
    from openvision3.hub import find_folder, load_model
    from openvision3.settings import flat, to_dict

    folder = find_folder(model)
    network, tokenizer, config = load_model(folder)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    found = {
        "folder": str(folder),
        **to_dict(config),
        "parameters": parts,
        "grid": [config.size // 16] * 2,
        "token_width": network.encoder.size.width,
        "stride": network.vae.stride,
    }
    if json:
        print(dumps(found, indent=2))
        return 0
    side, vae = config.size // 16, network.vae
    print(f"{folder}\n  trained at {config.size} px: {side * side} tokens of {network.encoder.size.width}, embeddings of {config.model.encoder.embed_dim}")
    for name, count in parts.items():
        print(f"  {name:15s} {count / 1e6:7.2f} M parameters" + ("  (frozen)" if name == "vae" else ""))
    print(f"  VAE: {vae.name}, {vae.latent_channels} channels, stride {vae.stride}, latents x {vae.scale:g}, sha256 {vae.sha256[:12] or 'none'}")
    print(f"  licence of what it was trained on: {config.training.get('licence', 'not recorded')}; of its VAE: {config.vae.get('licence', 'not recorded')}")
    print(f"  vocabulary: {len(tokenizer)} word pieces")
    for name, value in flat(config.training).items():
        if name != "licence":
            print(f"  {name}: {value}")
    return 0


def fetch(
    names: Positional[Annotated[tuple[str, ...], arg(metavar="{NAME ...,all}", help="what to fetch, or to check")]] = (),
    to: PathName = "",
    list: bool = False,
    check: bool = False,
    json: Json = False,
) -> int:
    """Get weights, tokenizers and statistics of others, each with its source, licence and hash.

    Args:
        to: the folder that gets a sub-folder for each; none: ~/.cache/openvision3, where commands look for it.
        list: say what there is, from where, under which terms, and whether it is here.
        check: read what is here and compare it with its hashes; without names, all of it.
    """
    from openvision3.cli import fetch as cli_fetch

    return cli_fetch.run(names, to, list, check, json)


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


VERBS: dict[str, Callable[..., int]] = {
    f.__name__: f for f in (demo, train, estimate, watch, compare, ablate, evaluate, data, fetch, reconstruct, caption, classify, encode, info, doctor)
}


# -- what the verbs share ------------------------------------------------------------------------------------------


def _try_training(recipe: str, batch: int | None, fields: dict[str, Any], json: bool) -> int:
    from dataclasses import replace

    from openvision3 import distributed
    from openvision3.train.recipes import RECIPES
    from openvision3.train.trial import try_training

    config = RECIPES[_recipe([recipe])]()
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


def _load(model: str, device: str, vae: str) -> Pipeline:
    from openvision3.pipeline import load

    return load(model, device=device, vae=vae)


def _paths(patterns: Sequence[str]) -> list[str]:
    from openvision3.data.problems import reasons_in_words
    from openvision3.pipeline import expand_pictures

    if not patterns:
        raise ValueError("no pictures given; name files, folders or globs, and put them before options that take several values, such as --labels")
    unused: list[dict[str, str]] = []
    paths = expand_pictures(patterns, unused)
    if unused:
        print(f"openvision3: not used: {reasons_in_words(unused)}, such as {unused[0]['key']} ({unused[0]['detail']})", file=sys.stderr)
    return paths


def _each(paths: Sequence[str], one: Callable[[str], dict[str, Any]], json: bool, line: Callable[[dict[str, Any]], str]) -> int:
    """Do `one` for every picture; a file that cannot be read or written is reported on stderr, and makes the exit code 2. A full disk ends all."""
    from openvision3.data.images import ImageError
    from openvision3.progress import track

    results, skipped = [], 0
    for path in track(paths, "pictures") if json else paths:  # a line for each is progress enough, and a bar would take stdout over
        try:
            result = one(path)
        except (ImageError, OSError) as error:
            if len(paths) == 1 or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            skipped += 1
            print(f"openvision3: {_on_one_line(_message(error))}", file=sys.stderr)
            continue
        results.append(result)
        if not json:
            print(_on_one_line(line(result)), flush=True)
    if json:
        print(dumps(results, indent=2, ensure_ascii=False))
    if skipped:
        print(f"openvision3: {skipped} of {len(paths)} pictures skipped", file=sys.stderr)
    return 2 if skipped else 0


def _on_one_line(text: str) -> str:
    """Text with its line breaks and other control characters as \\n, \\x1b: a file's name may hold any of them."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda control: ascii(control.group())[1:-1], text)


def _output_folder(name: str, data: Sequence[str] = ()) -> Path:
    """Check that files can be written there, and that they do not become part of the `data` that are read. It is made with the first of them."""
    if not name:
        raise ValueError("--out is empty; name a folder")
    check_apart(name, data)
    folder = Path(name)
    check_writable(folder, "--out")
    return folder


def _unused(stem: str, names: dict[str, int]) -> str:
    """a, a-2, a-3: pictures of one name from several folders do not overwrite each other."""
    names[stem] = names.get(stem, 0) + 1
    return stem if names[stem] == 1 else _unused(f"{stem}-{names[stem]}", names)


def parse(target: Any, argv: Sequence[str], program: str, **settings: Any) -> Any:
    """tyro, with its boxed error as one line, and `~` expanded in paths. Raises ValueError; `--help` exits as usual."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.nullcontext() if {"-h", "--help"} & set(argv) else _wide_terminal():
            parsed = tyro.cli(target, args=list(argv), prog=program, **settings)
        made = parsed[0] if settings.get("return_unknown_args") else parsed
        if isinstance(made, functools.partial):  # a verb, by `deferred`
            hints = get_type_hints(made.func, include_extras=True)
            return functools.partial(made.func, **{name: expand_value(hints[name], value) for name, value in made.keywords.items()})
        expand_fields(made)
        return parsed
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(errors.getvalue(), program, *_options(target, settings.get("default")))) from None


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    """tyro breaks its messages at the terminal's width, and in the middle of a word; here no message is that wide."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000000"
    try:
        yield
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def _options(target: Any, default: Any) -> tuple[list[str], list[str]]:
    """The names of options, and those of arguments that stand without one: a config's fields, or a verb's parameters."""
    if default is None:
        hints = get_type_hints(target, include_extras=True)
        bare = {name for name in hints if tyro.conf.Positional in getattr(hints[name], "__metadata__", ())}
        names = list(inspect.signature(target).parameters)
    else:
        from openvision3.settings import flat, to_dict

        names, bare = [*flat(to_dict(default))], set()
    return [f"--{name.replace('_', '-')}" for name in names if name not in bare], [f"--{name.replace('_', '-')}" for name in bare]


def deferred(verb: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    """The verb with its arguments bound and not yet run: what it says on stderr while it runs must not end in `parse`."""

    @functools.wraps(verb)
    def bind(*args: Any, **named: Any) -> Callable[[], int]:
        return functools.partial(verb, **inspect.signature(verb).bind(*args, **named).arguments)

    return bind


def _one_line(box: str, program: str, options: Sequence[str] = (), bare: Sequence[str] = ()) -> str:
    """The first paragraph of tyro's error box, and for an unknown option the nearest of `options`; `bare` are arguments, which have none."""
    lines = [re.sub(r"[│╭╮╰╯]", "", line).strip() for line in box.splitlines()]
    paragraphs: list[list[str]] = [[]]
    for line in lines[1:]:
        if re.fullmatch(r"[─-]{4,}.*", line):
            paragraphs.append([])
        elif line:
            paragraphs[-1].append(line)
    filled = [p for p in paragraphs if p]
    message = " ".join(filled[0]) if filled else "wrong arguments"
    message = re.sub(r"^Error parsing [A-Za-z]\w*: ", "", message).rstrip(".")  # the name of a class means nothing to who typed this
    help_line = f"see `{program} --help`"
    if extra := re.search(r"Unrecognized options: ([^\s,]+)", message):
        word = extra.group(1).partition("=")[0]
        if word in bare:
            return f"{word[2:].upper()} is written without {word}: `{program} {word[2:].upper()}`; {help_line}"
        return str(unknown("option", word, options, help_line)) if word.startswith("-") else f"{word!r} is one argument too many; {help_line}"
    for pattern, words in TYRO_IN_WORDS.items():
        message = re.sub(pattern, words, message)
    return f"{message}; {help_line}"


TYRO_IN_WORDS = {
    r"^invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)$": r"\2 cannot be '\1'. Choose one of \3",
    r"^Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)$": r"\1 must be a whole number, not \2",
    r"^Error parsing (\S+): could not convert string to float: (.*)$": r"\1 must be a number, not \2",
    r"^Error parsing (\S+): no type matching \{None\}\|INT could be instantiated from \[(.*?)\]\. Got errors: .*$": r"\1 must be a whole number, not \2",
    r"^Error parsing (\S+): no type matching \{None\}\|FLOAT could be instantiated from \[(.*?)\]\. Got errors: .*$": r"\1 must be a number, not \2",
    r"^Error parsing (\S+): Could not parse arguments \[(.*)\] into .*$": r"\1 cannot be \2",
    r"^Error parsing (\S+): ": r"\1: ",
    r"^Missing from .*?: (--[\w.-]+).*$": r"\1 is missing",
    r"^Missing value for argument '(\S+)'\. Expected 1 values$": r"\1 needs a value",
    r"^Missing value for argument '(\S+)'\. Expected (\S+) values$": r"\1 needs \2 values",
}
"""What tyro says of values, and what is said in its place."""


def unknown(what: str, name: str, choices: Iterable[str], choose: str = "") -> ValueError:
    """One line on a name that is none of `choices`: the most similar one, and all of them or where to find them."""
    keys = {key: choice for choice in reversed([*choices]) for key in (choice.rpartition(".")[2].lstrip("-"), choice.lstrip("-"))}
    near = difflib.get_close_matches(name.lstrip("-"), keys, 1, cutoff=0.5)
    choose = choose or f"Choose one of {', '.join(choices)}"
    return ValueError(f"unknown {what} {name!r}. " + (f"Did you mean {keys[near[0]]!r}? " if near else "") + choose[0].upper() + choose[1:])


def _run(argv: Sequence[str], verbs: dict[str, Callable[..., int]], program: str, head: str) -> int:
    """Run the verb that `argv` begins with, or show what there is."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:12s} {(f.__doc__ or '').strip().splitlines()[0]}" for name, f in verbs.items()]
        print(head + "\n\ncommands:\n" + "\n".join(lines) + f"\n\nhelp on one: {program} COMMAND --help")
        return 0 if argv else 2
    verb = argv[0]
    if verb not in verbs:
        raise unknown("command", verb, verbs, f"Run `{program} --help` for all commands")
    if verbs[verb] in (train, estimate, ablate, evaluate, data):  # recipes and verbs have help of their own
        return verbs[verb](argv[1:])
    return parse(deferred(verbs[verb]), argv[1:], f"{program} {verb}")()


def help_text() -> str:
    return f"openvision3 {__version__}: one visual encoder for rebuilding, naming and describing pictures\n\nusage: openvision3 COMMAND [ARGUMENTS]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be no valid text
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it takes another folder where the home cannot be written to, and says so in four lines
    if argv[:1] == ["--version"]:
        print(__version__)
        return 0
    try:
        return _run(argv, VERBS, "openvision3", help_text())
    except KeyboardInterrupt:
        print("openvision3: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError:
        print("openvision3: not enough memory for pictures of this size; use a smaller --size, or fewer at once", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _out_of_memory(error):
            print(f"openvision3: not enough memory ({_message(error)[:120]}); use a smaller --size or --batch", file=sys.stderr)
            return 2
        if isinstance(error, RuntimeError) and not type(error).__module__.startswith("openvision3"):
            raise
        if type(error).__name__ == "OtherRankFailed":
            return 2  # that one says why
        print(f"openvision3: {_on_one_line(_message(error))}", file=sys.stderr)
        return 1 if type(error).__name__ == "NotFinite" else 2


def _out_of_memory(error: RuntimeError) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        hint = {28: "make room", 13: "name a place you may write to or read from"}.get(error.errno or 0, "")
        return f"{error.filename}: {error.strerror}" + (f"; {hint}" if hint else "")
    return " ".join(str(error).split()) or type(error).__name__
