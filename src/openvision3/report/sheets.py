"""Sheets of images: rows under column titles, captions beside images, maps of an error."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor


def grid(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], gap: int = 6) -> Image.Image:
    """Rows of images of one size, side by side under column titles."""
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


def heat(error: Tensor) -> Image.Image:
    """(H, W) in [0, 1] as an image from black over red to light yellow; a larger error is drawn as 1."""
    import matplotlib

    return Image.fromarray((matplotlib.colormaps["inferno"](error.clamp(0, 1).numpy())[..., :3] * 255).round().astype("uint8"))


def caption_sheet(rows: Sequence[tuple[Image.Image, str, str]], side: int = 180, columns: int = 2) -> Image.Image:
    """(image, old caption, new caption) -> one image with both captions beside each image, the new one first."""
    import matplotlib

    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 13)
    gap, text_width, line_height = 12, 330, 17
    cell = (side + gap + text_width, side)
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * (cell[0] + gap) + gap, lines * (cell[1] + gap) + gap), (245, 245, 245))
    pen = ImageDraw.Draw(sheet)
    for number, (image, old, new) in enumerate(rows):
        x, y = gap + number % columns * (cell[0] + gap), gap + number // columns * (cell[1] + gap)
        small = image.copy()
        small.thumbnail((side, side))
        sheet.paste(small, (x + (side - small.width) // 2, y + (side - small.height) // 2))
        top = y
        for caption, colour, most_lines in ((new or "(kept)", (20, 20, 20), 7), (old or "(no old caption)", (120, 120, 120), 3)):
            for line in textwrap.wrap(caption, 46, max_lines=most_lines, placeholder=" ..."):
                pen.text((x + side + gap, top), line, fill=colour, font=font)
                top += line_height
            top += line_height // 2
    return sheet
