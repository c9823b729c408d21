"""The answer to a question put to an index: the nearest images with their captions, as rows and as a sheet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from openvision3.data.crops import center_square
from openvision3.data.images import EXTENSIONS, ImageError, open_image
from openvision3.data.names import DataOptions, open_source
from openvision3.data.sources import Source
from openvision3.files import write_whole
from openvision3.pipeline import Pipeline
from openvision3.report import html
from openvision3.report.sheets import caption_sheet
from openvision3.search.index import SearchIndex, plain

SIDE = 180
"""pixels of an image on the sheet"""


@dataclass
class Hit:
    """One image of an answer."""

    path: str
    caption: str
    score: float
    """cosine of its embedding with the question's"""
    key: str
    position: int
    """its place in the data when it was indexed"""


def ask(index: SearchIndex, pipeline: Pipeline, question: str, count: int = 16, engine: str = "numpy") -> list[Hit]:
    """The images nearest to `question`, a text or the path of an image, nearest first.

    Raises:
        ValueError, ImageError: an empty question, a file that is no image, or fewer than one image asked for.
    """
    if count < 1:
        raise ValueError(f"-n {count}: ask for 1 image or more")
    if not question.strip():
        raise ValueError("the question is empty; give words, such as 'a red fruit', or the file of an image")
    is_file = os.path.isfile(question)
    if not is_file and question.lower().endswith(EXTENSIONS):
        raise ValueError(f"no such image: {question}")
    # an image is shown in the view that the index was made of
    query = pipeline.embed_images(center_square(open_image(Path(question)), pipeline.size)) if is_file else pipeline.embed_texts([question])
    table, rows = index.table(), index.nearest(query[0].float().cpu().numpy(), count, engine)
    return [Hit(table["image_path"][row], table["caption"][row], score, table["key"][row], table["position"][row]) for row, score in rows]


def write_sheet(path: Path, index: SearchIndex, question: str, hits: Sequence[Hit], options: DataOptions = DataOptions()) -> list[str]:
    """Write the images with score, path and caption as a PNG or an HTML page; returns a line for each image that cannot be shown any more.

    Raises:
        ValueError: another ending. OSError.
    """
    if path.suffix.lower() not in (".png", ".html"):
        raise ValueError(f"{path} must end in .png or .html")
    source = open_source(index.config.data, options)
    places = _places(source, hits)
    rows: list[tuple[Image.Image, str, str]] = []
    missing: list[str] = []
    for hit in hits:
        try:
            if hit.key not in places:
                raise ImageError("moved", "the data have changed since they were indexed; run openvision3 search index again")
            image = source.image(places[hit.key], SIDE)
        except ImageError as error:
            missing.append(f"{hit.path} is not shown: {error}")
            image = Image.new("RGB", (SIDE, SIDE), (200, 200, 200))
        rows.append((image, hit.caption or "(no caption)", f"{hit.score:.3f}  {hit.path}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".png":
        sheet = caption_sheet(rows, SIDE)
        write_whole(path, lambda file: sheet.save(file, "PNG"))
    else:
        cards = [([html.embed_image(image, caption)], f"{score}: {caption}") for image, caption, score in rows]
        html.write_page(
            path, question, f"The {len(hits)} nearest of {index.config.rows:,} images in {' '.join(index.config.data)}", [("", html.figures(cards))]
        )
    return missing


def _places(source: Source, hits: Sequence[Hit]) -> dict[str, int]:
    """{key: position} of the images of an answer, and perhaps of others: where they are now, because files come and go after they were indexed."""
    places = {hit.key: hit.position for hit in hits if hit.position < len(source) and plain(source.key(hit.position)) == hit.key}
    return places if len(places) == len(hits) else {plain(source.key(place)): place for place in range(len(source))}
