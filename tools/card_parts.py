"""What the cards of models, generators and chat models share: their options, tables of the training data with licences, links, and the commands."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tyro.conf import Positional

from openvision3.data.names import DataOptions, open_source
from openvision3.data.openmoji import STYLE
from openvision3.data.sources import Source
from openvision3.settings import read_rules

CREDITS = "CREDITS.txt"
UNRECORDED = "not recorded"
OPENMOJI = ("OpenMoji", "CC BY-SA 4.0")


@dataclass
class CardOptions:
    """What a card is written from."""

    results: tuple[Path, ...]
    """folders of openvision3 evaluate; a set is called as its folder"""
    licence: str
    """the terms of the weights, in words"""
    licence_id: str
    """the terms as the hub spells them, such as cc-by-sa-4.0"""
    model: Positional[str] = ""
    """a shipped name or a folder"""
    show: tuple[str, ...] = ()
    """NAME=DATA: examples of these data are shown"""
    train: tuple[str, ...] = ()
    """the training data, whose sources and licences are counted"""
    only: tuple[str, ...] = ()
    """as --only of the training"""
    terms: tuple[str, ...] = ()
    """SOURCE=TERMS of sources whose samples hold no licence, such as 'clipart=public domain'"""
    count: int = 32
    """examples of each kind that are shown"""
    images: Path = Path("docs/card")
    """folder for the images"""
    out: Path = Path("card.md")
    strip: Path | None = None
    """also draw the first examples here"""

    def check(self) -> None:
        """Raises ValueError for a pair that is none."""
        for option, pairs, example in (("--show", self.show, "drawings=DRAWINGS/*.tar"), ("--terms", self.terms, "'clipart=public domain'")):
            if wrong := [pair for pair in pairs if "=" not in pair]:
                raise ValueError(f"{option} {wrong[0]} must look like {'NAME=DATA' if option == '--show' else 'SOURCE=TERMS'}, such as {example}")

    @property
    def shown_data(self) -> list[tuple[str, str]]:
        """(name, data) of --show."""
        return [(name, data) for name, _, data in (pair.partition("=") for pair in self.show)]

    def link(self, path: Path) -> str:
        """A path as the card links to it."""
        return Path(os.path.relpath(path, self.out.parent)).as_posix()


def markdown_line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def training_table(names: tuple[str, ...], only: tuple[str, ...] = (), terms: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    """(sources, licences and numbers of the training samples, from their JSON fields or `terms`; whom to credit for single samples)."""
    by_source = dict(pair.split("=", 1) for pair in terms)
    source = open_source(names, DataOptions(only=read_rules(only)))
    counts: Counter[tuple[str, str]] = Counter()
    credits: dict[str, None] = {}
    for index in range(len(source)):
        counts[origin(source, index)] += 1
        if credit := source.value(index, "attribution"):
            credits[credit] = None
    lines = [
        markdown_line([where, by_source.get(where, licence) if licence == UNRECORDED else licence, f"{count:,}"])
        for (where, licence), count in sorted(counts.items())
    ]
    return "\n".join([markdown_line(["source", "licence", "samples"]), "|---|---|---|", *lines]), sorted(credits)


def origin(source: Source, index: int) -> tuple[str, str]:
    """(where a sample is from, its licence)."""
    drawing = source.drawing(index)
    if drawing and drawing[0] == STYLE:
        return OPENMOJI
    where, licence = (source.value(index, name) or UNRECORDED for name in ("source", "licence"))
    return where.split(": ")[0].split("@" if where.startswith("github:") else "\n")[0], licence


def commands_of(folder: Path) -> str:
    """The commands that trained a shipped model, as tools/ship.py keeps them; "" for another one."""
    path = folder / "command.txt"
    return f"```\n{path.read_text(encoding='utf-8')}```\n\n" if path.is_file() else ""


def credits_in_words(credits: list[str] | tuple[str, ...]) -> str:
    """A list that unfolds; "" without any."""
    return f"\n\n<details><summary>Credits</summary>\n\n{chr(10).join(f'- {credit}' for credit in credits)}\n\n</details>" if credits else ""


def run(name: str, main: Callable[[Any], None], options: type, description: str | None) -> None:
    """Parse the options and write the card; what is wrong is one line, with exit code 2."""
    torch.set_grad_enabled(False)
    try:
        main(tyro.cli(options, config=(tyro.conf.OmitArgPrefixes,), description=description))
    except (ValueError, OSError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
