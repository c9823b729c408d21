"""Results on the terminal, and `openvision3 evaluate table`: those of several evaluations, like beside like."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from openvision3.cli.common import output_folder, parse
from openvision3.settings import PathName

if TYPE_CHECKING:
    from openvision3.evaluate.results import NotRun, Results, Row


def print_tables(tables: Sequence[tuple[Any, Sequence[Any]]], rows: Sequence[Row], not_run: Sequence[NotRun]) -> None:
    """A line a metric and a column a model; what was not run below, with what it needs."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from openvision3.evaluate.peers import published
    from openvision3.evaluate.results import by_need, how_to_read, shown, surely_best, titles

    screen = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    only_published = list(dict.fromkeys(each.model for each in not_run if each.model in published.ONLY))
    for title, (_, lines) in zip(titles(tables, rows), tables, strict=True):
        models = list(dict.fromkeys(model for line in lines for model in line.values))
        screen.print(title, markup=False, style="italic", soft_wrap=True)  # no name is markup, and a title of the table would be broken to its width
        made = Table(box=None, pad_edge=False)
        made.add_column("", overflow="fold")  # in a narrow terminal nothing is cut
        for model in models:
            made.add_column(Text(model), justify="right", overflow="fold")
        columns = [column for model in (*models, *only_published) for column in published.beside(model, [line.metric for line in lines]).items()]
        for heading, _ in columns:
            made.add_column(Text(heading), justify="right", style="dim", overflow="fold")
        for line in lines:
            best = surely_best(line)
            measured = [Text(shown(line.metric, line.values[m]) if m in line.values else "", "bold" if m == best else "") for m in models]
            made.add_row(Text(line.metric), *measured, *(Text(values.get(line.metric, "")) for _, values in columns))
        screen.print(made)
    if told := how_to_read(line for _, lines in tables for line in lines):
        screen.print(told, markup=False, style="dim", soft_wrap=True)
    for what, who in by_need(not_run):
        screen.print(f"not run: {', '.join(who)}: {what}", markup=False, style="dim", soft_wrap=True)


def tell_left_out(results: Results, of: str = "") -> None:
    """What training has seen, what a metric leaves out, and on stderr what could not be read; `of` names the evaluation where there are several."""
    from openvision3.data.problems import reasons_in_words

    where = f"{of}: " if of else ""
    if results.overlap:
        print(f"{where}{results.overlap}")
    for each in results.left_out:
        print(f"{where}left out: {each['of']} of {each['model']}: {each['count']} {each['reason']}")
    if results.skipped:
        print(f"openvision3: {where}{len(results.skipped)} pictures skipped: {reasons_in_words(results.skipped)}", file=sys.stderr)


def table(argv: Sequence[str]) -> int:
    """Results of several evaluations on one page, like beside like."""
    from openvision3.evaluate.page import write_summary
    from openvision3.evaluate.results import Results, Scores, split, with_differences

    options = parse(TableOptions, argv, "openvision3 evaluate table")
    if not options.results:
        raise ValueError("no results named; give folders that openvision3 evaluate wrote, or their results.json")
    output_folder(str(Path(options.out).parent))
    given = list({os.path.realpath(path): path for path in options.results}.values())
    found = [Results.load(path) for path in given]
    all_rows = list(dict.fromkeys(row for each in found for row in each.rows))
    not_run = list(dict.fromkeys(one for each in found for one in each.not_run))
    tables = split(all_rows)
    try:
        folders = [Path(path) if Path(path).is_dir() else Path(path).parent for path in given]
        with_differences(tables, [(each.rows, Scores.load(folder)) for each, folder in zip(found, folders, strict=True)])
    except ValueError as error:
        print(f"openvision3: no differences between models: {error}", file=sys.stderr)
    page = write_summary(Path(options.out), tables, not_run, found)
    if options.json:
        print(dumps([row.to_json() for row in all_rows], indent=1, ensure_ascii=False))
    else:
        print_tables(tables, all_rows, not_run)
        for path, each in zip(given, found, strict=True):
            tell_left_out(each, path)
        print(f"page: {page.resolve()}")
    return 0


@dataclass
class TableOptions:
    """Which results, and where the page goes."""

    results: Positional[Annotated[tuple[PathName, ...], arg(metavar="RESULTS ...", help="folders of openvision3 evaluate, or their results.json")]] = ()
    out: PathName = "evaluations.html"
    """the page"""
    json: bool = False
    """all rows on stdout instead of the tables"""
