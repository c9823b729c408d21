"""One evaluation of a model that answers questions about images: ask, score, and save results.json.

    with distributed.started(device):
        evaluation = evaluate_vqa("pope", options, open_model)
        evaluation.save(folder)

Answers are the same for any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from openvision3 import distributed
from openvision3.draws import hash_share
from openvision3.evaluate.answering import FAILED, Asking, ask
from openvision3.evaluate.image_set import Watch, on_first, without_progress
from openvision3.evaluate.metrics.vqa import BENCHMARKS, Question, measure
from openvision3.evaluate.options import VqaOptions
from openvision3.evaluate.protocol import AnsweringFunctions, Number
from openvision3.evaluate.questions import QuestionSet
from openvision3.evaluate.results import NotRun, Results, Row, Scores, Setting
from openvision3.evaluate.statistics import Columns, with_interval
from openvision3.evaluate.tables import Table, split, with_differences
from openvision3.progress import environment


@dataclass
class VqaEvaluation:
    """One command: the model, the questions, its answers, and the numbers."""

    options: VqaOptions
    model: AnsweringFunctions
    questions: list[Question]
    set: QuestionSet
    answers: list[dict[str, Any]]
    """rows of answers.jsonl, in the order of the questions"""
    results: Results
    columns: Columns = field(default_factory=dict)

    def save(self, out: Path) -> list[Table]:
        """Write results.json. Returns the tables of its rows."""
        tables = split(self.results.rows)
        self.results.differences = with_differences(tables, [(self.results.rows, Scores({self.model.name: self.columns}))])
        self.results.save(out)
        return tables


def evaluate_vqa(
    benchmark: str,
    options: VqaOptions,
    open_model: Callable[[VqaOptions], AnsweringFunctions],
    command: str = "",
    watch: Watch = without_progress,
) -> VqaEvaluation:
    """Ask what has not been answered yet, then score.

    Raises:
        ValueError, FileNotFoundError: an input is missing or wrong (raised before anything is asked), or no question was answered.
        OSError: no space; the answers so far stay.
    """
    start = time.perf_counter()
    with distributed.together():
        questions = QuestionSet(benchmark, options.data, options.images)
        model = open_model(options)
    if options.blank:  # another model to the tables: the questions are the same
        model = replace(model, name=f"{model.name}, grey images", note="; ".join(filter(None, (model.note, "saw a grey image in place of each"))))
    asked = _draw(questions.questions, options.count, BENCHMARKS[benchmark].whole_images)
    max_tokens = options.max_tokens or BENCHMARKS[benchmark].max_tokens
    asking = Asking(model, asked, questions, max_tokens, options.batch, options.blank)
    answers = ask(asking, Path(options.out), watch if distributed.rank() == 0 else without_progress)
    results = Results(command=command, environment=environment())
    evaluation = VqaEvaluation(options, model, asked, questions, answers, results)
    answered = [(question, row["written"]) for question, row in zip(asked, answers, strict=True) if row["error"] is None]
    _count_errors(evaluation)
    with distributed.together():
        if not answered:
            raise ValueError(f"none of {len(asked):,} questions was answered: {answers[0]['error']}")

    def compute() -> tuple[list[Number], Columns, list[tuple[str, str]]]:
        numbers, columns, missing = measure(benchmark, answered, max_tokens)
        return [with_interval(one, columns) for one in numbers], columns, missing

    numbers, evaluation.columns, missing = on_first(compute)
    setting = Setting(
        ", ".join(options.data),
        hashlib.sha256(json.dumps([[row["pixels"], row["question"], row["answer"]] for row in answers if row["error"] is None]).encode()).hexdigest(),
        "of each image",
        "whole images, as the model prepares them",
        model.dtype,
        0,
    )
    results.rows = [Row(model.name, model.sha256, one, setting, model.note, model.licence) for one in numbers]
    results.not_run = [NotRun(model.name, metric, what) for metric, what in missing]
    results.seconds = time.perf_counter() - start
    return evaluation


def _draw(questions: list[Question], count: int, whole_images: bool = False) -> list[Question]:
    """COUNT questions of each part, the first by a hash of their key, or with `whole_images` of their image, in the order of the files; 0: all.

    Files are ordered by source, and yes and no may take turns, so neither the first ones nor every tenth would stand for all. The last of the whole images
    may bring more than COUNT.
    """
    if not count:
        return questions

    def drawn_by(one: Question) -> str:
        return one.image if whole_images else one.key

    parts: dict[str, list[Question]] = {}
    for one in questions:
        parts.setdefault(one.part, []).append(one)
    chosen = {drawn_by(one) for part in parts.values() for one in sorted(part, key=lambda each: hash_share(drawn_by(each)))[:count]}
    return [one for one in questions if drawn_by(one) in chosen]


def _count_errors(evaluation: VqaEvaluation) -> None:
    """Questions without an answer, by their reason, and the images that could not be read. They are in no score."""
    results = evaluation.results
    reasons: dict[str, list[str]] = {}
    for row in (row for row in evaluation.answers if row["error"] is not None):
        reason, _, detail = row["error"].partition(": ")
        reasons.setdefault(reason, []).append(detail)
        problem = {"key": row["image"], "reason": reason, "detail": detail}
        if reason != FAILED and problem not in results.skipped:
            results.skipped.append(problem)
    for reason, details in reasons.items():
        what = f"questions at which the model failed, first with {details[0]}" if reason == FAILED else f"questions whose image is {reason}"
        results.left_out.append({"model": evaluation.model.name, "of": evaluation.set.benchmark, "reason": what, "count": len(details)})
