"""`openvision3 fetch`: what is fetched, listed and checked, as a person reads it or as JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Any

from openvision3.fetch import store as fetch
from openvision3.fetch.sources import ASSETS, Asset, named
from openvision3.files import check_writable

WIDE = 150
"""columns of a terminal from which on each asset has a row of a table; narrower ones show it in two lines or more"""
COLOURS = {"here": "green", "damaged": "red", "incomplete": "yellow"}


def run(names: Sequence[str], to: str, list_all: bool, check: bool, json: bool) -> int:
    """Exit code 2 where something could not be fetched or is damaged. Raises ValueError, OSError: nothing was done."""
    if list_all and check:
        raise ValueError("--list and --check are two commands; name one of them")
    names = [name for each in names for name in each.split(",") if name]
    if not names and not list_all and not check:
        raise ValueError("nothing named; name what to fetch, or all: openvision3 fetch --list shows what there is")
    folder = Path(to) if to else fetch.default_folder()
    assets = list(ASSETS.values()) if not names or "all" in names else [named(name) for name in dict.fromkeys(names)]
    if check and to and not folder.is_dir():
        raise ValueError(f"{to} is no folder, so nothing in it can be checked; name the folder that --to was when it was fetched")
    if list_all:
        return _list(assets, folder, json)
    return _check(assets, folder, json, bool(names)) if check else _fetch(assets, folder, json)


def _list(assets: Sequence[Asset], folder: Path, json: bool) -> int:
    found = [fetch.describe(asset, folder) for asset in assets]
    if json:
        print(dumps(found, indent=2))
        return 0
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table

    screen = Console(highlight=False)
    if not screen.is_terminal:
        screen.width = 200
    wide = screen.width >= WIDE
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("name", "state", "size", "licence", "needed by", "source"):
        table.add_column(column, overflow="fold", no_wrap=column in ("name", "state", "size"))
    longest = max(len(asset.name) for asset in assets)
    for asset, told in zip(assets, found, strict=True):
        state, size = told["state"], fetch.size_in_words(told["files"])
        coloured = f"[{COLOURS.get(state, 'dim')}]{state}[/]"
        source, licence = asset.source.removeprefix("https://"), asset.licence + (" (gated)" if asset.gated else "")
        if wide:
            table.add_row(asset.name, coloured, size, licence, asset.needed_by, source)
        else:
            screen.print(f"[bold]{asset.name:{longest}}[/]  {coloured}{' ' * (10 - len(state))}  {size}")
            screen.print(Padding(f"licence {licence}; for {asset.needed_by}; from {source}", (0, 0, 0, 4)))
    if wide:
        screen.print(table)
    print(f"\nin {folder}; get one with: openvision3 fetch NAME; read what is here with: openvision3 fetch --check")
    return 0


def _check(assets: Sequence[Asset], folder: Path, json: bool, asked: bool) -> int:
    found, damaged = [], 0
    for asset in assets:
        if not asked and fetch.state(asset, folder) == "absent":
            continue
        problems = fetch.check(asset, folder)
        state = "damaged" if problems else fetch.state(asset, folder)
        damaged += bool(problems)
        found.append({"name": asset.name, "state": state, "problems": problems})
        if not json:
            print(f"{asset.name}: {state}", flush=True)
        for problem in problems:
            print(f"openvision3: {problem}", file=sys.stderr)
    if json:
        print(dumps(found, indent=2))
    elif not found:
        print(f"nothing is in {folder}")
    return 2 if damaged else 0


def _fetch(assets: Sequence[Asset], folder: Path, json: bool) -> int:
    """One after the other; of several, those that cannot be had are named on stderr and do not keep the others from coming."""
    found: list[dict[str, Any]] = []
    failed = 0
    if not folder.is_dir() or any(fetch.state(asset, folder) != "here" for asset in assets):
        check_writable(folder, "--to")
    for asset in assets:
        try:
            told = fetch.fetch(asset, folder)
        except (ValueError, OSError) as error:
            if len(assets) == 1:
                raise
            failed += 1
            line = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
            print(f"openvision3: {line}", file=sys.stderr, flush=True)
            continue
        found.append(fetch.describe(asset, folder))
        if not json:
            print(f"{asset.name} -> {folder / asset.name}  ({asset.terms})")
            for line in told:
                print(f"  {line}", flush=True)
            if folder != fetch.default_folder():
                print(f"  commands look in {fetch.default_folder()}; {f'name this one with {asset.used_by}' if asset.used_by else 'copy it there to use it'}")
    if json:
        print(dumps(found, indent=2))
    if failed:
        print(f"openvision3: {failed} of {len(assets)} could not be fetched", file=sys.stderr)
    return 2 if failed else 0
