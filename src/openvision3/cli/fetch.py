"""`openvision3 fetch`: fetch, list or check files of others, for a person or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openvision3.fetch import store
from openvision3.fetch.sources import ASSETS, Asset, find_asset
from openvision3.files import check_writable

COLOURS = {"here": "green", "damaged": "red", "incomplete": "yellow"}


def run(names: Sequence[str], to: str, list_all: bool, check: bool, as_json: bool) -> int:
    """Exit code 2 where something could not be fetched or is damaged. Raises ValueError, OSError: nothing was done."""
    if list_all and check:
        raise ValueError("--list and --check exclude each other; give one of them")
    names = [name for argument in names for name in argument.split(",") if name]
    if not names and not list_all and not check:
        raise ValueError("no names given; choose from `openvision3 fetch --list`, or fetch all")
    folder = Path(to) if to else store.default_folder()
    assets = list(ASSETS.values()) if not names or "all" in names else [find_asset(name) for name in dict.fromkeys(names)]
    if check and to and not folder.is_dir():
        raise ValueError(f"{to} is not a folder; give --to the folder that the files were fetched into")
    if list_all:
        return _list(assets, folder, as_json)
    return _check(assets, folder, as_json, bool(names)) if check else _fetch(assets, folder, as_json)


def _list(assets: Sequence[Asset], folder: Path, as_json: bool) -> int:
    """A line for each asset, and below it where it is from, within the columns of the terminal."""
    entries = [store.describe(asset, folder) for asset in assets]
    if as_json:
        print(json.dumps(entries, indent=2))
        return 0
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding

    screen = Console(highlight=False)  # 80 columns where it is no terminal
    longest = max(len(asset.name) for asset in assets)
    for asset, entry in zip(assets, entries, strict=True):
        state = entry["state"]
        licence = escape(asset.licence) + (" (gated)" if asset.gated else "")
        coloured = f"[{COLOURS.get(state, 'dim')}]{state}[/]{' ' * (10 - len(state))}"
        screen.print(f"[bold]{asset.name:{longest}}[/]  {coloured}  {store.size_in_words(entry['files'])}")
        screen.print(Padding(f"licence {licence}; for {asset.needed_by}; from {asset.source.removeprefix('https://')}", (0, 0, 0, 4)))
    print(f"\nin {folder}; fetch one with: openvision3 fetch NAME; check what is here with: openvision3 fetch --check")
    return 0


def _check(assets: Sequence[Asset], folder: Path, as_json: bool, are_named: bool) -> int:
    entries: list[dict[str, Any]] = []
    for asset in assets:
        if not are_named and store.state(asset, folder) == "absent":
            continue
        problems = store.check(asset, folder)
        entries.append({"name": asset.name, "state": "damaged" if problems else store.state(asset, folder), "problems": problems})
        if not as_json:
            print(f"{asset.name}: {entries[-1]['state']}", flush=True)
        for problem in problems:
            print(f"openvision3: {problem}", file=sys.stderr)
    if as_json:
        print(json.dumps(entries, indent=2))
    elif not entries:
        print(f"nothing is in {folder}")
    return 2 if any(entry["problems"] for entry in entries) else 0


def _fetch(assets: Sequence[Asset], folder: Path, as_json: bool) -> int:
    """One after the other. Of several, one that cannot be fetched is reported on stderr; the others are still fetched."""
    entries: list[dict[str, Any]] = []
    if not folder.is_dir() or any(store.state(asset, folder) != "here" for asset in assets):
        check_writable(folder, "--to")
    for asset in assets:
        try:
            lines = store.fetch(asset, folder)
        except (ValueError, OSError) as error:
            if len(assets) == 1:
                raise
            line = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
            print(f"openvision3: {line}", file=sys.stderr, flush=True)
            continue
        entries.append(store.describe(asset, folder))
        if not as_json:
            print(f"{asset.name} -> {folder / asset.name}  ({asset.terms})", *(f"  {line}" for line in lines), sep="\n", flush=True)
            if folder != store.default_folder():
                use = f"name this one with {asset.used_by}" if asset.used_by else "copy it there to use it"
                print(f"  commands look in {store.default_folder()}; {use}")
    if as_json:
        print(json.dumps(entries, indent=2))
    failed = len(assets) - len(entries)
    if failed:
        print(f"openvision3: {failed} of {len(assets)} could not be fetched", file=sys.stderr)
    return 2 if failed else 0
