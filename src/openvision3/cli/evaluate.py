"""The verb `openvision3 evaluate`: measure a model and its peers by the same code, and tables of several evaluations."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from openvision3.cli.common import make_folder_of, output_folder, parse
from openvision3.evaluate.options import GENERATION, KINDS, VQA, GenerationOptions, VqaOptions
from openvision3.evaluate.options import Options as Settings
from openvision3.settings import PathName, unknown

if TYPE_CHECKING:
    from openvision3.evaluate.protocol import AnsweringFunctions, DrawingFunctions
    from openvision3.evaluate.results import NotRun, Results, Row
    from openvision3.evaluate.subjects import Subject
    from openvision3.evaluate.tables import Table

PROGRAM = "openvision3 evaluate"


@dataclass
class Options(Settings):
    """What is measured, on which images, and how."""

    model: Positional[Annotated[PathName, arg(metavar="MODEL", help="a shipped name, a model folder or a run folder")]] = "mini"
    json: bool = False
    """print results.json on stdout instead of the table"""


@dataclass
class DrawnOptions(GenerationOptions):
    """Which samples to draw and score, and against what."""

    model: Positional[Annotated[PathName, arg(metavar="MODEL", help="a generator (a shipped name, a folder or a run), or samples in an .npz")]] = ""
    json: bool = False
    """print results.json on stdout instead of the table"""


@dataclass
class AskedOptions(VqaOptions):
    """Which questions to ask of which model."""

    model: Positional[Annotated[PathName, arg(metavar="MODEL", help="a chat model, a folder of an image-text model of transformers, or FILE.py:FUNCTION")]] = ""
    json: bool = False
    """print results.json on stdout instead of the table"""


@dataclass
class TableOptions:
    """Put the results of several evaluations on one page."""

    results: Positional[Annotated[tuple[PathName, ...], arg(metavar="RESULTS ...", help="folders of openvision3 evaluate, or their results.json")]] = ()
    out: PathName = "evaluations.html"
    """the page"""
    json: bool = False
    """print all rows on stdout instead of the tables"""


WHAT = KINDS | {
    "generation": GENERATION,
    "vqa": f"{VQA}: {PROGRAM} vqa pope MODEL --data FILES",
    "all": "everything that the data permit; what could not be run is listed with what it needs",
    "table": f"results of several evaluations on one page: {PROGRAM} table RESULTS ... --out PAGE.html",
}

HELP = (
    f"usage: {PROGRAM} WHAT [MODEL] [--data DATA ...] [--peer NAMES] [--out FOLDER]\n\nwhat:\n"
    + "\n".join(f"  {name:15s} {description}" for name, description in WHAT.items())
    + f"\n\npeers: {PROGRAM} reconstruction --peer flux-vae,sd-vae,ours\nall options: {PROGRAM} reconstruction --help"
)


def evaluate(argv: Sequence[str]) -> int:
    """Measure a model, and its peers by the same code: openvision3 evaluate WHAT [MODEL] --data DATA"""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0 if argv else 2
    kind, *rest = argv
    if kind not in WHAT:
        raise unknown("evaluation", kind, WHAT)
    if kind == "table":
        return table(parse(TableOptions, rest, f"{PROGRAM} table"))
    command = shlex.join([*PROGRAM.split(), *argv])
    if kind == "generation":
        return generation(parse(DrawnOptions, rest, f"{PROGRAM} {kind}", description=f"{kind}: {WHAT[kind]}"), command)
    if kind == "vqa":
        return ask_questions(rest, command)
    options = parse(Options, rest, f"{PROGRAM} {kind}", description=f"{kind}: {WHAT[kind]}")
    if options.protocol and kind not in ("reconstruction", "all"):
        raise ValueError(f"protocol {options.protocol} is one of reconstruction; leave it out of {kind}")
    return measure(tuple(KINDS) if kind == "all" else (kind,), options, command)


def measure(kinds: Sequence[str], options: Options, command: str) -> int:
    """Measure, print the tables, write the folder. Under torchrun the images are shared among the processes; the numbers are the same."""
    from openvision3 import distributed
    from openvision3.device import choose_device
    from openvision3.evaluate.image_set import without_progress
    from openvision3.evaluate.page import write_report
    from openvision3.evaluate.run import evaluate
    from openvision3.progress import track

    out = output_folder(options.out, (*options.data, *options.train))
    options.device = choose_device(options.device)
    with distributed.started(options.device) as ranks:
        say = lambda line: print(f"openvision3: {line}", file=sys.stderr)  # noqa: E731
        evaluation = evaluate(kinds, options, open_model, command, say, without_progress if options.json else track)
        if ranks.rank == 0:
            with distributed.alone():
                tables = evaluation.save(out)
                page = write_report(out, evaluation, tables)
                print_results(out, page, tables, evaluation.results, options.json)
        if evaluation.broken:
            raise ValueError(evaluation.broken)
    return 0


def open_model(options: Settings) -> Subject:
    """MODEL and its VAE as functions, with what is recorded of their training."""
    from openvision3 import distributed, hub
    from openvision3.evaluate.overlap import recorded_training
    from openvision3.evaluate.peers.table import vae_functions
    from openvision3.evaluate.subjects import Subject
    from openvision3.pipeline import load

    folder = Path(distributed.from_first(str(hub.find_folder(options.model))))  # one for all ranks: a run may save its next checkpoint in the meantime
    pipeline = load(folder, device=options.device, precision=options.precision, vae=options.vae)
    vae = vae_functions(pipeline.vae, f"VAE {pipeline.vae.name}", options.precision) if pipeline.vae.network is not None else None
    subject = Subject(pipeline.functions(options.model), vae)
    if distributed.rank() == 0:
        name = options.vae or pipeline.vae.name
        vae_folders = (folder / "vae", hub.EMBEDDED if name == "embedded" else Path(name), Path(name) / "vae")
        subject.known, subject.unknown = recorded_training(options.model, folder, vae_folders)
    return subject


def generation(options: DrawnOptions, command: str) -> int:
    """Draw samples (or take those of a file), score them, print the tables, write the folder. Under torchrun the processes share the work."""
    from openvision3 import distributed
    from openvision3.device import choose_device
    from openvision3.evaluate.generation import evaluate_generation
    from openvision3.evaluate.generation_page import write_generation_report
    from openvision3.evaluate.image_set import without_progress
    from openvision3.progress import track

    if not options.model:
        raise ValueError("no MODEL named; name a generator, or samples in an .npz")
    out = output_folder(options.out, (*options.data, *options.train))
    options.device = choose_device(options.device)
    with distributed.started(options.device) as ranks:
        evaluation = evaluate_generation(options, open_generator, command, without_progress if options.json else track)
        if ranks.rank == 0:
            with distributed.alone():
                tables = evaluation.save(out)
                page = write_generation_report(out, evaluation, tables)
                samples = "" if options.is_drawn else "samples: " + " ".join(str(out / f"{column.file}.npz") for column in evaluation.samples)
                print_results(out, page, tables, evaluation.results, options.json, samples)
    return 0


def open_generator(options: GenerationOptions) -> DrawingFunctions:
    """A generator as a function of the numbers of samples."""
    from openvision3.generate.flow import Sampling
    from openvision3.generate.generator import load_generator

    generator = load_generator(
        options.model, device=options.device, precision=options.precision, tokens=options.tokens, weaker=options.weaker, heads=options.heads
    )
    return generator.functions(Sampling(options.steps, options.method, options.grid, interval=options.interval, seed=options.seed))


def ask_questions(argv: Sequence[str], command: str) -> int:
    """Ask the questions of a benchmark, score the answers, print the table, write the folder. Under torchrun the processes share the questions."""
    from openvision3 import distributed
    from openvision3.device import choose_device
    from openvision3.evaluate.image_set import without_progress
    from openvision3.evaluate.metrics.vqa import ANSWERS, BENCHMARKS
    from openvision3.evaluate.vqa import evaluate_vqa
    from openvision3.evaluate.vqa_page import write_vqa_report
    from openvision3.progress import track

    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {PROGRAM} vqa BENCHMARK MODEL --data FILES [--images FOLDER] [--out FOLDER]\n\nbenchmarks:")
        print("\n".join(f"  {name:13s} {benchmark.title}" for name, benchmark in BENCHMARKS.items()) + f"\n\nall options: {PROGRAM} vqa pope --help")
        return 0 if argv else 2
    name, *rest = argv
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    options = parse(AskedOptions, rest, f"{PROGRAM} vqa {name}", description=f"{BENCHMARKS[name].title}: {BENCHMARKS[name].rules}")
    if not options.model:
        raise ValueError("no MODEL named; name a chat model, a folder of an image-text model of transformers, or FILE.py:FUNCTION")
    out = output_folder(options.out)
    options.device = choose_device(options.device)
    with distributed.started(options.device) as ranks:
        evaluation = evaluate_vqa(name, options, open_answering, command, without_progress if options.json else track)
        if ranks.rank == 0:
            with distributed.alone():
                tables = evaluation.save(out)
                page = write_vqa_report(out, evaluation, tables)
                print_results(out, page, tables, evaluation.results, options.json, f"answers: {out / ANSWERS}")
    return 0


def open_answering(options: VqaOptions) -> AnsweringFunctions:
    """MODEL as a function of images and prompts."""
    from openvision3.evaluate.peers.image_text import is_image_text, load_image_text
    from openvision3.evaluate.peers.own import is_own, load_own_answering

    if is_own(options.model):
        return load_own_answering(options.model, options.device, options.precision)
    if is_image_text(options.model):
        return load_image_text(options.model, options.device, options.precision)
    from openvision3.understand.chat import load_chat

    chat = load_chat(options.model, device=options.device, precision=options.precision, tower=options.tower, language=options.language)
    return chat.functions(options.model)


def table(options: TableOptions) -> int:
    """Results of several evaluations on one page; only comparable numbers stand side by side."""
    from openvision3.evaluate.page import write_summary
    from openvision3.evaluate.results import Results, Scores
    from openvision3.evaluate.tables import split, with_differences

    if not options.results:
        raise ValueError("no results named; give folders that openvision3 evaluate wrote, or their results.json")
    make_folder_of(options.out)
    paths = list({os.path.realpath(path): path for path in options.results}.values())
    all_results = [Results.load(path) for path in paths]
    rows = list(dict.fromkeys(row for results in all_results for row in results.rows))
    not_run = list(dict.fromkeys(each for results in all_results for each in results.not_run))
    tables = split(rows)
    try:
        folders = [Path(path) if Path(path).is_dir() else Path(path).parent for path in paths]
        with_differences(tables, [(results.rows, Scores.load(folder)) for results, folder in zip(all_results, folders, strict=True)])
    except ValueError as error:
        print(f"openvision3: no differences between models: {error}", file=sys.stderr)
    page = write_summary(Path(options.out), tables, not_run, all_results)
    if options.json:
        print(dumps([row.to_json() for row in rows], indent=1, ensure_ascii=False))
    else:
        print_tables(tables, rows, not_run)
        for path, results in zip(paths, all_results, strict=True):
            print_left_out(results, f"{path}: ")
        print(f"page: {page.resolve()}")
    return 0


# -- on the terminal -----------------------------------------------------------------------------------------------


def print_results(out: Path, page: Path, tables: Sequence[Table], results: Results, json: bool, also: str = "") -> None:
    """results.json itself, or the tables and where everything lies: `also` is a line about further files."""
    if json:
        print((out / "results.json").read_text(encoding="utf-8"), end="")
        return
    print_tables(tables, results.rows, results.not_run)
    print_left_out(results)
    print("\n".join(filter(None, (also, f"results: {out / 'results.json'}", f"report: {page.resolve()}"))))


def print_tables(tables: Sequence[tuple[Any, Sequence[Any]]], rows: Sequence[Row], not_run: Sequence[NotRun]) -> None:
    """A line a metric and a column a model; below, what was not run and what it needs."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from openvision3.evaluate.peers import published
    from openvision3.evaluate.tables import by_need, cells, how_to_read, titles

    screen = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    only_published = [name for name in dict.fromkeys(each.model for each in not_run) if name in published.ONLY]
    for title, (_, lines) in zip(titles(tables, rows), tables, strict=True):
        screen.print(title, markup=False, style="italic", soft_wrap=True)  # a title of the table would be broken to its width
        drawn = Table(box=None, pad_edge=False)
        header, body, bold, measured = cells(lines, only_published)
        for place, heading in enumerate(header):  # in a narrow terminal cells are folded and not cut; no name is markup
            drawn.add_column(Text(heading), justify="right" if place else "left", style="dim" if place > measured else "", overflow="fold")
        for y, row in enumerate(body):
            drawn.add_row(*(Text(cell, "bold" if (y, x) in bold else "") for x, cell in enumerate(row)))
        screen.print(drawn)
    if explanation := how_to_read(line for _, lines in tables for line in lines):
        screen.print(explanation, markup=False, style="dim", soft_wrap=True)
    for needs, names in by_need(not_run):
        screen.print(f"not run: {', '.join(names)}: {needs}", markup=False, style="dim", soft_wrap=True)


def print_left_out(results: Results, prefix: str = "") -> None:
    """Overlap with the training data, samples that a metric leaves out, and on stderr the images that could not be read."""
    from openvision3.data.problems import reasons_in_words

    if results.overlap:
        print(f"{prefix}{results.overlap}")
    for each in results.left_out:
        print(f"{prefix}left out: {each['of']} of {each['model']}: {each['count']} {each['reason']}")
    if results.skipped:
        print(
            f"openvision3: {prefix}{len(results.skipped)} images skipped: {reasons_in_words(results.skipped)}",
            file=sys.stderr,
        )
