"""Results -> curves, picture rows and one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from openvision3.evaluate.metrics.captioning import words
from openvision3.files import write_whole

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin-top: 2.4rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem }
.lead { opacity: .75; margin-top: 0 } img { max-width: 100%; border-radius: 6px }
.number, .card, figure { border: 1px solid var(--line); border-radius: 8px; padding: .6rem }
.numbers { display: flex; flex-wrap: wrap; gap: .8rem } .number { background: var(--soft); min-width: 9rem }
.number b { display: block; font-size: 1.5rem } .number span { font-size: .85rem; opacity: .75 }
.table { overflow-x: auto } .table + .table { margin-top: 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line) }
.long { overflow-wrap: anywhere; min-width: 9rem }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .8rem } .card { display: flex; gap: .8rem; align-items: center }
.card img { width: 72px; height: 72px; background: white } .card p { margin: 0; font-size: .9rem; min-width: 0 }
.card small { opacity: .65 } .card .right { color: #17803d }
.rows { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1rem }
figure { margin: 0 } .rows img { width: 100%; background: white } figure div { display: grid; grid-template-columns: repeat(3, 1fr); gap: .4rem }
.wide { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); gap: 1rem } .wide img { width: 100% }
.right { color: #17803d; font-weight: 600 }
figcaption { font-size: .85rem; margin-top: .3rem }
footer { margin-top: 3rem; font-size: .85rem; opacity: .75 }
"""


def embed(image: Image.Image | bytes) -> str:
    """A picture as a data address, so that the page stands alone."""
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        image = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()


def picture(image: Image.Image | bytes, alt: str = "") -> str:
    return f'<img src="{embed(image)}" alt="{html.escape(alt, quote=True)}">'


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def curves(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> bytes:
    """One small panel for each named value of metrics.jsonl that occurs, over the steps, as a PNG."""
    from matplotlib.figure import Figure  # without pyplot, which would choose a backend for the whole process

    found = [(name, points) for name in names if (points := [(r["step"], r[name]) for r in rows if name in r])]
    columns = min(4, max(1, len(found)))
    lines = max(1, -(-len(found) // columns))
    figure = Figure(figsize=(3.2 * columns, 2.5 * lines))
    panels = figure.subplots(lines, columns, squeeze=False)
    for panel in panels.flat:
        panel.set_visible(False)
    for panel, (name, points) in zip(panels.flat, found, strict=False):
        panel.set_visible(True)
        steps, values = zip(*points, strict=True)
        panel.plot(steps, values, color="#2563eb", linewidth=1.5, marker="o" if len(points) == 1 else None)
        panel.set_title(f"{name.removeprefix('train/')}: {values[-1]:.3g}", fontsize=10, loc="left")
        panel.grid(alpha=0.25)
        panel.tick_params(labelsize=8)
        panel.set_xlabel("step", fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def grid(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], gap: int = 6) -> Image.Image:
    """Rows of equally large pictures side by side under column titles, as one picture."""
    width, height = rows[0][0].size
    header = 16
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    width = max([width, *(math.ceil(ruler.textlength(title)) for title in titles)])  # titles do not run into each other
    sheet = Image.new("RGB", (len(rows[0]) * (width + gap) + gap, header + len(rows) * (height + gap) + gap), (225, 225, 225))
    pen = ImageDraw.Draw(sheet)
    for x, title in enumerate(titles):
        pen.text((gap + x * (width + gap), 2), title, fill=(20, 20, 20))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (gap + x * (width + gap), header + gap + y * (height + gap)))
    return sheet


def heat(error: Any) -> Image.Image:
    """(H, W) from 0 to 1, as a picture from black over red to white; more than 1 is white."""
    import matplotlib

    return Image.fromarray((matplotlib.colormaps["inferno"](error.clamp(0, 1).numpy())[..., :3] * 255).round().astype("uint8"))


def caption_sheet(rows: Sequence[tuple[Image.Image, str, str]], side: int = 180, columns: int = 2) -> Image.Image:
    """(picture, old caption, new caption) -> pictures with both texts beside them, as one picture to look at."""
    import matplotlib

    text = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 13)
    gap, beside, line = 12, 330, 17
    cell = (side + gap + beside, side)
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * (cell[0] + gap) + gap, lines * (cell[1] + gap) + gap), (245, 245, 245))
    pen = ImageDraw.Draw(sheet)
    for number, (image, old, new) in enumerate(rows):
        x, y = gap + number % columns * (cell[0] + gap), gap + number // columns * (cell[1] + gap)
        small = image.copy()
        small.thumbnail((side, side))
        sheet.paste(small, (x + (side - small.width) // 2, y + (side - small.height) // 2))
        place = y
        for told, colour, most in ((new or "(kept)", (20, 20, 20), 7), (old or "(no old caption)", (120, 120, 120), 3)):
            for piece in _wrapped(told, text, beside, most):
                pen.text((x + side + gap, place), piece, fill=colour, font=text)
                place += line
            place += line // 2
    return sheet


def _wrapped(told: str, text: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """At most `most` lines that fit `width`; the last one says if there was more."""
    lines = [""]
    for word in told.split():
        longer = f"{lines[-1]} {word}".strip()
        if text.getlength(longer) <= width:
            lines[-1] = longer
            continue
        while text.getlength(word) > width:
            word = word[:-1]
        lines.append(word)
    lines = [line for line in lines if line]
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1] + " ..."]


def numbers(pairs: Sequence[tuple[str, str]]) -> str:
    boxes = "".join(f'<div class="number"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>' for name, value in pairs)
    return f'<div class="numbers">{boxes}</div>'


LONG = 32
"""characters of a word, such as a sha256 or a path, that may be broken anywhere"""


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], bold: Collection[tuple[int, int]] = ()) -> str:
    """`bold` are (row, column). A table wider than the page scrolls in a box of its own."""

    def cell(tag: str, content: Any, strong: bool = False) -> str:
        text = html.escape(str(content))
        long = ' class="long"' if any(len(word) > LONG for word in str(content).split()) else ""
        return f"<{tag}{long}>{f'<b>{text}</b>' if strong else text}</{tag}>"

    head = "".join(cell("th", each) for each in header)
    body = "".join("<tr>" + "".join(cell("td", each, (y, x) in bold) for x, each in enumerate(row)) + "</tr>" for y, row in enumerate(rows))
    return f'<div class="table"><table><tr>{head}</tr>{body}</table></div>'


def caption_cards(items: Sequence[tuple[Image.Image, str, str]]) -> str:
    """(picture, written, true) -> cards; an exact caption is marked."""
    cards = []
    for image, written, true in items:
        mark = ' class="right"' if words(written) == words(true) else ""
        told = html.escape(written) or "(nothing)"
        cards.append(f'<div class="card">{picture(image, true)}<p><span{mark}>{told}</span><br><small>{html.escape(true)}</small></p></div>')
    return f'<div class="cards">{"".join(cards)}</div>'


def triple_rows(items: Sequence[tuple[Sequence[Image.Image], str]]) -> str:
    """((original, VAE, rebuilt), what they are) -> figures of three pictures."""
    columns = ("original", "VAE alone", "rebuilt")
    figures = [
        f"<figure><div>{''.join(picture(i, f'{name}: {what}') for i, name in zip(images, columns, strict=True))}</div>"
        f"<figcaption>{html.escape(what)}</figcaption></figure>"
        for images, what in items
    ]
    return f'<div class="rows">{"".join(figures)}</div>'


def write_page(path: str | Path, title: str, lead: str, sections: Sequence[tuple[str, str]], footer: str = "") -> Path:
    """`sections` are (heading, HTML), `footer` is HTML too; title and lead are text. Returns the path."""
    body = "".join(f"<section><h2>{html.escape(heading)}</h2>{content}</section>" for heading, content in sections)
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style>
<body><h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>
{body}
<footer>{footer}</footer></body></html>
"""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.encode("utf-8", "backslashreplace"))  # names of files may be no valid text
    return path
