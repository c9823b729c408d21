"""The page of an evaluation of questions about images: numbers by part, wrong and right answers beside their images, protocols."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from openvision3.evaluate.metrics.vqa import ALL
from openvision3.evaluate.page import left_out, machine, numbers_and_needs, protocols, published_numbers
from openvision3.evaluate.results import Setting
from openvision3.evaluate.tables import Line
from openvision3.evaluate.vqa import VqaEvaluation
from openvision3.files import write_whole
from openvision3.report import html, plots

SHOWN, SIDE = 24, 192
"""A page shows so many wrong answers and so many right ones, evenly spaced, with images of at most this side."""


def write_vqa_report(out: Path, evaluation: VqaEvaluation, tables: Sequence[tuple[Setting, Sequence[Line]]]) -> Path:
    """Write report.html, and the accuracy of the parts as parts.png, into `out`. Returns the path of the page."""
    results = evaluation.results
    sections = [("Numbers", numbers_and_needs(tables, results.rows, results.not_run) + left_out([results]))]
    if drawn := parts_chart(evaluation):
        write_whole(out / "parts.png", drawn)
        sections.append(("Accuracy by part", html.embed_image(drawn, "accuracy of each part")))
    answered = [row for row in evaluation.answers if row["error"] is None]
    for title, is_right in (("Wrong answers", False), ("Right answers", True)):
        rows = [row for row in answered if (row["read"] == row["answer"]) == is_right]
        if rows:
            shown = [rows[place * len(rows) // SHOWN] for place in range(SHOWN)] if len(rows) > SHOWN else rows
            sections.append((f"{title}: {len(shown)} of {len(rows):,}", html.cards([_card(evaluation, row, is_right) for row in shown])))
    if failed := [row for row in evaluation.answers if row["error"] is not None]:
        lines = [(row["key"], row["image"], row["error"]) for row in failed[:100]]
        sections.append((f"Without an answer: {len(failed):,}, in no score", html.table(("question", "image", "why"), lines)))
    sections += [*published_numbers(results.rows), ("How it was measured", protocols(results.rows))]
    lead = f"{evaluation.model.name}: {len(answered):,} of {len(evaluation.questions):,} questions of {', '.join(evaluation.options.data)}."
    footer = (results.command, f"{machine(results.environment)}, {results.seconds:.0f} s")
    return html.write_page(out / "report.html", "Questions about images", lead, sections, footer)


def parts_chart(evaluation: VqaEvaluation) -> bytes:
    """A bar for the accuracy of each part, with its interval. PNG; empty for a benchmark of one part."""
    numbers = {row.metric.removesuffix(": accuracy"): row.number for row in evaluation.results.rows if row.metric.endswith(": accuracy")}
    numbers.pop(ALL, None)
    if len(numbers) < 2:
        return b""
    name = evaluation.model.name
    bars = [(part, {name: plots.Bar(100 * one.value, *(end if end is None else 100 * end for end in (one.low, one.high)))}) for part, one in numbers.items()]
    return plots.draw([plots.Bars("accuracy, %", bars, "not run")], [name], width=max(4.0, 0.9 * len(bars)), height=3.2)


def _card(evaluation: VqaEvaluation, row: dict[str, Any], is_right: bool) -> tuple[Markup, Sequence[tuple[str, str]]]:
    image = evaluation.set.image(row["image"])
    image.thumbnail((SIDE, SIDE))
    choices = " ".join(f"{letter}. {choice}" for letter, choice in zip("ABCDEFGHIJ", row["choices"], strict=False))
    lines = [(f"{row['part']}: {row['question']} {choices}".strip(), ""), (row["written"][:200] or "(nothing)", "right" if is_right else "")]
    return html.embed_image(image, row["question"]), [*lines, (f"right: {row['answer']}", "true")]
