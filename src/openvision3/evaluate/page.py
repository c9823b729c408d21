"""The page of an evaluation: numbers, then images, curves and answers, then protocols."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from openvision3.data.images import to_pil
from openvision3.data.problems import count_reasons
from openvision3.evaluate.metrics.captioning import words
from openvision3.evaluate.peers import published
from openvision3.evaluate.protocol import Number
from openvision3.evaluate.results import SCORES, NotRun, Results, Row, Setting, scores_by_sample
from openvision3.evaluate.run import Evaluation
from openvision3.evaluate.statistics import spoken_p
from openvision3.evaluate.tables import Line, by_need, cells, how_to_read, leading, split, titles
from openvision3.files import write_whole
from openvision3.report import html, plots, sheets

FIRST, EXTREME = 12, 6
"""A page shows so many first images, and so many best and worst; small sets are shown whole."""
AMPLIFIED = 4


def write_report(out: Path, evaluation: Evaluation, tables: Sequence[tuple[Setting, Sequence[Line]]]) -> Path:
    """Write report.html into `out`, and scores.jsonl (the scores of each image) if images have scores. Returns the path of the page."""
    results = evaluation.results
    sections = [("Numbers", numbers_and_needs(tables, results.rows, results.not_run) + left_out([results])), *differences(tables)]
    if scores := _scores_of_each(evaluation):
        write_whole(out / SCORES, "".join(json.dumps(row) + "\n" for row in scores))
    else:
        (out / SCORES).unlink(missing_ok=True)  # written by an earlier evaluation
    for kind, section in (("reconstruction", _rebuilt), ("retrieval", _retrieved), ("captioning", _captions), ("zeroshot", _classes)):
        sections += section(evaluation, {name: done for (which, name), done in evaluation.measured.items() if which == kind})
    sections += published_numbers(results.rows)
    sections.append(("How it was measured", protocols(results.rows)))
    skipped = f"; {len(results.skipped)} images skipped" if results.skipped else ""
    sizes = list(dict.fromkeys(row.setting.resolution for row in results.rows))
    seen = f"{len(evaluation.images.chosen):,} images of {' and '.join(sizes)} px{skipped}"
    lead = f"{', '.join(model.name for model in evaluation.models)} on {', '.join(evaluation.options.data)}: {seen}."
    footer = (results.command, f"{machine(results.environment)}, {results.seconds:.0f} s")
    return html.write_page(out / "report.html", "Evaluation", lead, sections, footer)


def machine(environment: dict[str, Any]) -> str:
    return ", ".join(f"{name} {environment[name]}" for name in ("processor", "torch", "python") if environment.get(name))


def numbers_and_needs(tables: Sequence[tuple[Setting, Sequence[Line]]], rows: Sequence[Row], not_run: Sequence[NotRun]) -> Markup:
    """One table per setting with one column per model. Metrics that were not run are listed below."""
    content = html.note(how) if (how := how_to_read(line for _, lines in tables for line in lines)) else Markup()
    for title, (_, lines) in zip(titles(tables, rows), tables, strict=True):
        header, body, bold, _ = cells(lines)
        content += html.note(title) + html.table(header, body, bold)
    if not_run:
        content += html.note("Not run:") + html.table(("", "needs"), [(", ".join(who), what) for what, who in by_need(not_run)])
    return content


def differences(tables: Sequence[tuple[Setting, Sequence[Line]]]) -> list[tuple[str, Markup]]:
    """A section with the paired differences of models, their intervals and tests; none without differences."""
    rows = [
        (one.metric, f"{one.a} - {one.b}", f"{one.difference:.4g} [{one.low:.4g}, {one.high:.4g}]", spoken_p(one.p), one.test, one.count, one.part or "all")
        for _, lines in tables
        for line in lines
        for one in line.differences
    ]
    header = ("", "models", "difference [95 %]", "p, two-sided", "test", "samples", "of")
    note = html.note("Paired over the same samples; intervals by paired bootstrap. p is not corrected for the number of comparisons.")
    return [("Differences", note + html.table(header, rows))] if rows else []


def left_out(results: Sequence[Results]) -> Markup:
    """Images that could not be read and images that a metric leaves out; for several evaluations, with the number of the evaluation."""
    rows: list[tuple[Any, ...]] = []
    for number, one in enumerate(results, start=1):
        rows += [(number, each["of"], each["model"], each["reason"], each["count"]) for each in one.left_out]
        rows += [(number, "all", "", reason, count) for reason, count in count_reasons(one.skipped).items()]
    several = len(results) > 1
    header = ("evaluation", "of", "model", "reason", "images")
    table = html.table(header if several else header[1:], rows if several else [row[1:] for row in rows])
    return html.note("Left out:") + table if rows else Markup()


def protocols(rows: Sequence[Row]) -> Markup:
    seen: dict[tuple, Row] = {}
    for row in rows:
        seen.setdefault(row.protocol, row)
    table = [
        (r.metric, f"{r.number.count:,}", r.number.how, r.number.network + (f" {r.number.network_sha256[:12]}" if r.number.network_sha256 else ""),
         r.number.interval, f"{r.setting.resolution}, {r.setting.crop}, {r.setting.dtype}, seed {r.setting.seed}, "
         f"labels: {r.setting.labels}, captions: {r.setting.captions}, overlap: {r.setting.overlap}", r.number.library)
        for r in seen.values()
    ]  # fmt: skip
    models = {row.model: row for row in rows}
    who = [(name, row.model_sha256 or "none", row.licence, row.note) for name, row in models.items()]
    head = html.table(("metric", "N", "protocol", "network", "interval", "setting", "library"), table)
    data = {(row.setting.data, row.setting.data_sha256) for row in rows}
    sets = html.table(("images", "sha256 over them"), sorted(data))
    return head + html.table(("model", "sha256 of its weights", "licence", "note"), who) + sets


def published_numbers(rows: Sequence[Row]) -> list[tuple[str, Markup]]:
    """A section with the paper's numbers for these metrics, if any. Their protocols differ from those of the numbers above."""
    header, listed = published.compact({row.metric for row in rows})
    note = html.note(f"From the paper ({published.SOURCE}), not comparable with numbers of other sets, sizes or networks.")
    return [("Published numbers, not measured here", note + html.table(header, listed))] if listed else []


def _scores_of_each(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One line per model and image: key, hash of the pixels, scores and captions."""
    rows = []
    kinds = {model: kind for kind, model in evaluation.measured}
    models = {model.name: model for model in evaluation.models}
    for model, columns in evaluation.scores().columns.items():
        digests = evaluation.images_for(models[model], kinds[model]).digests
        captions: dict[int, dict[str, Any]] = next(
            (done.shown["captions"] for (kind, name), done in evaluation.measured.items() if (kind, name) == ("captioning", model)), {}
        )
        for index, scores in sorted(scores_by_sample(columns).items()):
            parts = [name for name, samples in evaluation.parts.items() if index in samples]
            known = {"model": model, "key": evaluation.images.source.key(index), "image": digests[index][:16], "parts": parts}
            rows.append(known | scores | captions.get(index, {}))
    return rows


# -- reconstruction ------------------------------------------------------------------------------------------------


def _rebuilt(evaluation: Evaluation, measured: dict[str, Any]) -> list[tuple[str, Markup]]:
    if not measured:
        return []
    curves = {name: [(sigma, value) for sigma, value, _ in done.shown["curve"]] for name, done in measured.items() if done.shown["curve"]}
    heading = f"Reconstruction: PSNR of all images{', and against noise on the tokens' if curves else ''}"
    drawn = _spread({name: done.shown["images"].psnr for name, done in measured.items()}, curves)
    own = evaluation.options.model if evaluation.options.model in measured else next(iter(measured))  # the model whose worst and best images are shown
    scored = measured[own].shown["images"]
    if (count := len(scored.keys)) <= FIRST + 2 * EXTREME:
        places = {f"All images, from the worst of {own} to the best": scored.worst(count)}
    else:
        places = {"The first images": list(range(FIRST)), f"The worst of {own}": scored.worst(EXTREME), f"The best of {own}": scored.best(EXTREME)}
    columns = " | ".join(f"{name}, error x{AMPLIFIED}" for name in measured)
    figures = [(f"{title}: original | {columns}", _figures(evaluation, measured, which)) for title, which in places.items()]
    return [(heading, html.embed_image(drawn, heading)), *figures]


def _figures(evaluation: Evaluation, measured: dict[str, Any], places: Sequence[int]) -> Markup:
    """The originals at these positions, and for each model the reconstruction and its error."""
    import torch

    first = next(iter(measured.values())).shown["images"]
    images = torch.cat([batch.images for batch in evaluation.images.subset([first.indices[i] for i in places]).batches("drawing")])
    rebuilt = {
        model.name: torch.cat([model.reconstruct(part) for part in images.split(evaluation.options.batch)])
        for model in evaluation.models
        if model.name in measured and model.reconstruct
    }
    columns: list[Any] = [to_pil(images)]
    for images_hat in rebuilt.values():
        columns += [to_pil(images_hat.cpu()), [sheets.heat((a - b).abs().mean(0) / 2 * AMPLIFIED) for a, b in zip(images, images_hat.cpu(), strict=True)]]
    figures = []
    for row, place in enumerate(places):
        caption = ", ".join(f"{name} {done.shown['images'].psnr[place]:.1f} dB" for name, done in measured.items())
        figures.append(([html.embed_image(column[row], first.keys[place]) for column in columns], f"{first.keys[place]}: {caption}"))
    return html.figures(figures, wide=True)


def _spread(values: dict[str, Sequence[float]], curves: dict[str, list[tuple[float, float]]]) -> bytes:
    """Histogram of PSNR over the images and, if there are curves, PSNR against noise. PNG."""
    panels: list[plots.Panel] = [plots.Histogram("images, over the PSNR of each, dB", values)]
    if curves:
        lines = {name: plots.Line(*zip(*points, strict=True)) for name, points in curves.items()}
        panels.append(plots.Lines("mean PSNR, dB, over sigma of the noise on the tokens", lines, x_label="sigma", points=True))
    return plots.draw(panels, list(values), width=5, height=3)


# -- words ---------------------------------------------------------------------------------------------------------


def _images_at(evaluation: Evaluation, indices: Sequence[int]) -> list[Any]:
    return [image for batch in evaluation.images.subset(indices).batches("drawing") for image in list(to_pil(batch.images))]  # type: ignore[arg-type]


def _retrieved(evaluation: Evaluation, measured: dict[str, Any]) -> list[tuple[str, Markup]]:
    sections = []
    for name, done in measured.items():
        images = _images_at(evaluation, done.shown["indices"])
        cards = [
            (html.embed_image(image, answers[0][0]), [(text, "right" if right else "") for text, right in answers])
            for image, answers in zip(images, done.shown["answers"], strict=True)
        ]
        sections.append((f"{name}: the nearest captions of the first images, correct ones highlighted", html.cards(cards)))
    return sections


def _captions(evaluation: Evaluation, measured: dict[str, Any]) -> list[tuple[str, Markup]]:
    sections = []
    for name, done in measured.items():
        images = _images_at(evaluation, [index for index, _, _ in done.shown["cards"]])
        cards = [
            html.caption_card(image, caption, truth, words(caption) == words(truth))
            for image, (_, caption, truth) in zip(images, done.shown["cards"], strict=True)
        ]
        sections.append((f"{name}: captions of the first images (above: written, below: true)", html.cards(cards)))
    return sections


def _classes(evaluation: Evaluation, measured: dict[str, Any]) -> list[tuple[str, Markup]]:
    sections = []
    for name, done in measured.items():
        table = html.table(("class", "images", "accuracy"), [(row.name, row.count, f"{100 * row.accuracy:.1f} %") for row in done.shown["classes"]])
        sections.append((f"{name}: zero-shot by class", table))
    return sections


# -- several evaluations -------------------------------------------------------------------------------------------


def write_summary(path: Path, tables: Sequence[tuple[Setting, Sequence[Line]]], not_run: Sequence[NotRun], results: Sequence[Results]) -> Path:
    """Write one page of several results, which begins with the paper's first figure for all measured models. The figure is also written as .png."""
    results = [one for i, one in enumerate(results) if one not in results[:i]]
    rows = [row for one in results for row in one.rows]
    drawn = figure_one(rows)
    note = html.note("Bars of one protocol stand side by side; groups with the same label and different protocols are numbered in the order of the list below.")
    commands = [(i, one.command, machine(one.environment), f"{one.seconds:.0f}") for i, one in enumerate(results, start=1)]
    write_whole(path.with_suffix(".png"), drawn)
    sections = [
        (
            "Reconstruction, generation, understanding: the paper's first figure for the measured models",
            html.embed_image(drawn, "reconstruction, generation and understanding of each model") + note,
        ),
        ("Numbers", numbers_and_needs(tables, rows, not_run) + left_out(results)),
        *differences(tables),
        *published_numbers(rows),
        ("How it was measured", protocols(rows)),
        ("Commands", html.table(("evaluation", "command", "machine", "seconds"), commands)),
    ]
    return html.write_page(path, "Evaluations", f"{len(results)} evaluation{'s' if len(results) > 1 else ''}.", sections)


PANELS = (
    ("reconstruction: rFID, lower is better", "rfid", 1.0, "not run: needs Inception's weights\n(openvision3 fetch inception-2015)"),
    ("reconstruction: KID, EfficientNet-Lite0, lower is better", "KID on EfficientNet-Lite0 features", 1.0, "not run"),
    ("generation: gFID, lower is better", "gfid", 1.0, "not run: needs a trained RAE\nand Inception's weights"),
    ("understanding: R@1, image to text, %", "image_to_text_r@1", 100.0, "not run"),
)


def figure_one(rows: Sequence[Row]) -> bytes:
    """Panels for rFID, KID, gFID and understanding, with one bar per model and protocol. A panel without numbers says what it needs. PNG."""
    groups = [bar_groups([row for row in leading(rows) if row.metric == metric]) for _, metric, _, _ in PANELS]
    panels = [
        plots.Bars(title, [(label, {model: _bar(number, factor) for model, number in numbers.items()}) for label, numbers in group], otherwise)
        for (title, _, factor, otherwise), group in zip(PANELS, groups, strict=True)
    ]
    models = dict.fromkeys(model for group in groups for _, numbers in group for model in numbers)
    return plots.draw(panels, list(models), width=3.7, height=3.4)


def _bar(number: Number, factor: float) -> plots.Bar:
    return plots.Bar(*(end if end is None else end * factor for end in (number.value, number.low, number.high)))  # type: ignore[arg-type]


def bar_groups(rows: Sequence[Row]) -> list[tuple[str, dict[str, Number]]]:
    """Rows of one metric -> (label, numbers by model). A group holds comparable numbers only, as in the tables; labels are unique."""
    groups = [(_where(setting, line), line.values) for setting, [line] in split(list(dict.fromkeys(rows)))]
    labels = [label for label, _ in groups]
    return [(f"{label} ({labels[: i + 1].count(label)})" if labels.count(label) > 1 else label, numbers) for i, (label, numbers) in enumerate(groups)]


def _where(setting: Setting, line: Line) -> str:
    count = next(iter(line.values.values())).count
    return f"{_short(setting.data)} {setting.resolution}\n{setting.dtype}, N {count:,}\n{setting.data_sha256[:6]}"


def _short(data: str) -> str:
    """openmoji test -> openmoji; DATA/photos/val-000.tar -> photos."""
    first = data.split(",")[0].split(" ")[0]
    return Path(first).parent.name if first.endswith(".tar") else Path(first).name
