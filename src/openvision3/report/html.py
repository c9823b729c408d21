"""HTML pages that need no other file, from the Jinja templates beside this module. Plain strings are escaped; Markup is taken as it is."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from openvision3.files import write_whole

LONG = 32
"""Characters of a word, such as a sha256 or a path, beyond which a table cell may break it anywhere."""


@functools.cache
def _templates() -> Environment:
    loader = PackageLoader("openvision3.report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, auto_reload=False)
    environment.tests["long"] = lambda content: any(len(word) > LONG for word in str(content).split())
    return environment


def _part(name: str, *values: Any) -> Markup:
    """A macro of parts.html."""
    return getattr(_templates().get_template("parts.html").module, name)(*values)


def embed_image(image: Image.Image | bytes, alt: str = "") -> Markup:
    """An image, or the bytes of a PNG, as an <img> that holds its data."""
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        image = buffer.getvalue()
    return _part("image", "data:image/png;base64," + base64.b64encode(image).decode(), alt)


def note(text: str) -> Markup:
    return Markup("<p>{}</p>").format(text)


def numbers(pairs: Sequence[tuple[str, str]]) -> Markup:
    """Boxes of (name, value)."""
    return _part("numbers", pairs)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], bold: Collection[tuple[int, int]] = ()) -> Markup:
    """`bold` are (row, column). A table wider than the page scrolls in a box of its own."""
    return _part("table", header, rows, bold)


def cards(items: Sequence[tuple[Markup, Sequence[tuple[str, str]]]]) -> Markup:
    """A small image beside lines of (text, style); the style is "right" for a correct answer, "true" for the truth, or "" for neither."""
    return _part("cards", items)


def caption_card(image: Image.Image, caption: str, truth: str, is_right: bool) -> tuple[Markup, Sequence[tuple[str, str]]]:
    """A card with the caption above the true one; a correct caption is marked."""
    return embed_image(image, truth), [(caption or "(nothing)", "right" if is_right else ""), (truth, "true")]


def figures(items: Sequence[tuple[Sequence[Markup], str]], *, wide: bool = False) -> Markup:
    """(images side by side, caption below them) for each figure."""
    return _part("figures", items, wide)


def write_page(path: str | Path, title: str, lead: str, sections: Sequence[tuple[str, str]], footer: Sequence[str] = ()) -> Path:
    """`sections` are (heading, content), `footer` is lines. Returns the path."""
    page = _templates().get_template("page.html").render(title=title, lead=lead, sections=sections, footer=footer)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.encode("utf-8", "backslashreplace"))  # a file name may hold bytes that are not UTF-8
    return path
