"""The page and the sheets of an evaluation of drawn images: numbers, the curve over guidance, samples, and training images like them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from openvision3.data.images import to_pil
from openvision3.evaluate.generation import Generation, Samples
from openvision3.evaluate.image_set import ImageSet
from openvision3.evaluate.metrics.generation import names
from openvision3.evaluate.page import differences, left_out, machine, numbers_and_needs, protocols, published_numbers
from openvision3.evaluate.protocol import Number
from openvision3.evaluate.results import Setting
from openvision3.evaluate.tables import Line
from openvision3.files import write_whole
from openvision3.networks.inception import Inception
from openvision3.report import html, plots, sheets

UNPICKED, ACROSS = 32, 8
"""The sheet of a column: the first so many samples, in rows of so many."""


def write_generation_report(out: Path, evaluation: Generation, tables: Sequence[tuple[Setting, Sequence[Line]]]) -> Path:
    """Write report.html and the sheets as PNG into `out`. Returns the path of the page."""
    results, options = evaluation.results, evaluation.options
    sections = [("Numbers", numbers_and_needs(tables, results.rows, results.not_run) + left_out([results])), *differences(tables)]
    if drawn := guidance_curve(evaluation):
        write_whole(out / "guidance.png", drawn)
        sections.append(("Over guidance (1: none)", html.embed_image(drawn, "scores over guidance")))
    for column in evaluation.samples:
        sheet = _sheet(column)
        _save(sheet, out / f"{column.file}.png")
        sections.append((f"{column.name}: the first samples, unpicked", html.embed_image(sheet, column.name)))
    for column in evaluation.samples:
        sections += _like_training(evaluation, column, out)
    sections += published_numbers(results.rows)
    sections.append(("How it was measured", protocols(results.rows)))
    count = len(evaluation.samples[0].images.chosen)
    lead = f"{count:,} samples of {', '.join(column.name for column in evaluation.samples)}, compared with {', '.join(options.data)}."
    footer = (results.command, f"{machine(results.environment)}, {results.seconds:.0f} s")
    return html.write_page(out / "report.html", "Evaluation of drawn images", lead, sections, footer)


def guidance_curve(evaluation: Generation) -> bytes:
    """Every score over the guidance scale, with its interval. PNG; empty without guidance."""
    if len(evaluation.samples) < 2:
        return b""
    columns = sorted(evaluation.samples, key=lambda column: column.guidance)
    values: dict[str, list[tuple[float, Number]]] = {}
    for column in columns:
        for row in evaluation.results.rows:
            if row.model == column.name:
                values.setdefault(row.metric, []).append((column.guidance, row.number))
    panels = []
    for extractor in evaluation.extractors[::-1]:  # Inception first
        fid, precision, recall, kid = names(extractor)
        groups = [[fid], [kid], [precision, recall]] + ([["sfid"], ["inception_score"]] if isinstance(extractor, Inception) else [])
        for group in groups:
            lines = {("precision", "recall")[place] if len(group) > 1 else "": _line(values[name]) for place, name in enumerate(group) if name in values}
            title = group[0].replace("precision", "precision and recall")
            if lines:
                panels.append(plots.Lines(title.replace(" features", ""), lines, x_label="guidance", points=True))
    return plots.draw(panels, ["", "precision", "recall"], columns=3) if panels else b""


def _line(points: Sequence[tuple[float, Number]]) -> plots.Line:
    x, values = zip(*points, strict=True)
    ends = [(one.low, one.high) for one in values if one.low is not None and one.high is not None]
    low, high = zip(*ends, strict=True) if len(ends) == len(values) else ((), ())
    return plots.Line(x, [one.value for one in values], low, high)


def _images(images: ImageSet, indices: Sequence[int]) -> dict[int, Image.Image]:
    shown: dict[int, Image.Image] = {}
    for batch in images.subset(indices).batches("drawing the page"):
        shown |= dict(zip(batch.indices, to_pil(batch.images), strict=True))  # type: ignore[arg-type]
    return shown


def _sheet(column: Samples) -> Image.Image:
    first = range(min(UNPICKED, len(column.images.chosen)))
    shown = list(_images(column.images, first).values())
    across = min(ACROSS, len(shown))
    blank = Image.new("RGB", shown[0].size, "white")
    shown += [blank] * (-len(shown) % across)
    return sheets.grid([shown[start : start + across] for start in range(0, len(shown), across)], [""] * across)


def _like_training(evaluation: Generation, column: Samples, out: Path) -> list[tuple[str, Markup]]:
    """The first samples beside their nearest training images, with the cosines below; also written as a sheet."""
    near, train = column.nearest, evaluation.train
    if near is None or train is None:
        return []
    samples = _images(column.images, range(len(near.samples)))
    images = _images(train, sorted({index for index in near.indices.flatten().tolist() if index >= 0}))
    blank = Image.new("RGB", next(iter(samples.values())).size, "white")
    rows, figures = [], []
    for number, (indices, cosines) in enumerate(zip(near.indices.tolist(), near.cosines.tolist(), strict=True)):
        rows.append([samples[number], *(images.get(index, blank) for index in indices)])
        like = ", ".join(f"{train.source.key(index)} {cosine:.3f}" for index, cosine in zip(indices, cosines, strict=True) if index >= 0)
        title = f" ({column.titles[number]})" if number < len(column.titles) else ""
        figures.append(([html.embed_image(image) for image in rows[-1]], f"sample {number}{title}: {like}"))
    _save(sheets.grid(rows, ["sample", "nearest", *(str(place) for place in range(2, near.count + 1))]), out / f"nearest-{column.file}.png")
    heading = f"{column.name}: samples, each beside the {evaluation.compared_with} whose {evaluation.extractors[0].name} features are the most similar (cosine)"
    return [(heading, html.figures(figures, wide=True))]


def _save(image: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    write_whole(path, buffer.getvalue())
