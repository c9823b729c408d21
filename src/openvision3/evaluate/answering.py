"""Ask a model every question of a benchmark, and keep each answer in a file of JSON lines: resumable, shared among processes.

Parts of PART questions are written while asking. A command that was killed goes on from them, and ends with the same file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from openvision3 import distributed
from openvision3.contents import short
from openvision3.data.identity import digest
from openvision3.data.images import ImageError
from openvision3.evaluate.image_set import Watch, on_first
from openvision3.evaluate.metrics.vqa import ANSWERS, BENCHMARKS, Question, read_answers
from openvision3.evaluate.parts import check_same, keeping_parts, open_parts
from openvision3.evaluate.protocol import AnsweringFunctions
from openvision3.evaluate.questions import QuestionSet
from openvision3.files import write_whole

PART = 64
"""questions in a part; it does not depend on the batch or the number of processes"""
PARTS, SETTINGS = "answers.parts", "answers.json"
OTHER = "answers by other settings"
FAILED = "failed"
"""the beginning of `error` where the model raised; otherwise the error is of the image"""
GREY = (128, 128, 128)


@dataclass(frozen=True)
class Asking:
    """Which questions are asked, of whom, and how."""

    model: AnsweringFunctions
    questions: Sequence[Question]
    set: QuestionSet
    max_tokens: int
    batch: int
    blank: bool = False
    """show a grey image of the same size in place of each"""

    def settings(self) -> dict[str, Any]:
        whole = hashlib.sha256()
        for one in self.questions:
            whole.update(json.dumps([one.key, one.image, self.prompt(one), one.answer, one.accept]).encode())
        return {
            "benchmark": self.set.benchmark,
            "questions_sha256": whole.hexdigest(),
            "model": self.model.name,
            "model_sha256": self.model.sha256,
            "note": self.model.note,
            "missing_images": digest(sorted(self.set.missing)) if self.set.missing else "",
            "dtype": self.model.dtype,
            "max_tokens": self.max_tokens,
            "blank": self.blank,
        }

    def prompt(self, question: Question) -> str:
        return BENCHMARKS[self.set.benchmark].prompt(question)


def ask(asking: Asking, out: Path, watch: Watch) -> list[dict[str, Any]]:
    """Ask what has not been answered yet, and write answers.jsonl. Returns its rows on every rank; a finished file of the same settings is only read.

    Raises:
        ValueError: the folder holds answers by other settings, the model has no memory for this batch, or it fails at each question of a whole part.
        OSError: the file cannot be written; the parts stay.
    """
    missing = on_first(lambda: _missing_parts(asking, out))
    mine = missing[distributed.rank() :: distributed.world()]
    with distributed.together():
        for first in watch(mine, f"{asking.model.name}: {asking.set.benchmark}, {PART} questions at a time", len(mine)):
            rows = _answer(asking, asking.questions[first : first + PART])
            failed = [row["error"] for row in rows if (row["error"] or "").startswith(FAILED)]
            if len(failed) == min(PART, len(asking.questions)):  # not for a last part of one question
                raise ValueError(f"{asking.model.name} answered none of {len(rows)} questions in a row: {failed[0]}")
            with keeping_parts("the answers so far"):
                write_whole(_part(out, first), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    on_first(lambda: _join(asking, out))
    return read_answers(out / ANSWERS)


def _part(out: Path, first: int) -> Path:
    return out / PARTS / f"{first:09d}.jsonl"


def _missing_parts(asking: Asking, out: Path) -> list[int]:
    """The first question of each part that is not there yet; none for a finished file."""
    settings, file = asking.settings(), out / SETTINGS
    if (out / ANSWERS).is_file():
        check_same(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}, settings, out, OTHER)
        return []
    open_parts(file, settings, OTHER)
    (out / PARTS).mkdir(exist_ok=True)
    return [first for first in range(0, len(asking.questions), PART) if not _part(out, first).is_file()]


def _join(asking: Asking, out: Path) -> None:
    """Write the file from its parts, which are then removed."""
    if not (out / ANSWERS).is_file():
        with keeping_parts("the answers so far"):
            write_whole(out / ANSWERS, b"".join(_part(out, first).read_bytes() for first in range(0, len(asking.questions), PART)))
    shutil.rmtree(out / PARTS, ignore_errors=True)


def _answer(asking: Asking, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """A row of answers.jsonl for each question."""
    images: dict[str, Image.Image] = {}
    pixels: dict[str, str] = {}
    errors: dict[str, str] = {}
    written: dict[str, str] = {}
    failed: dict[str, str] = {}
    for start in range(0, len(questions), asking.batch):
        some = questions[start : start + asking.batch]
        names = dict.fromkeys(question.image for question in some)
        images = {name: images[name] for name in names if name in images}  # large ones of a whole part would fill the memory
        for name in [name for name in names if name not in images and name not in errors]:
            try:
                images[name] = asking.set.image(name)
            except ImageError as error:
                errors[name] = f"{error.reason}: {short(error)}"
                continue
            pixels[name] = hashlib.sha256(repr(images[name].size).encode() + images[name].tobytes()).hexdigest()[:16]
            if asking.blank:
                images[name] = Image.new("RGB", images[name].size, GREY)
        batch = [question for question in some if question.image in images]
        for question, text in zip(batch, _try(asking, batch, images) if batch else (), strict=True):
            if isinstance(text, str):
                written[question.key] = text
            else:
                failed[question.key] = f"{FAILED}: {short(text)}" if type(text).__name__ == short(text) else f"{FAILED}: {type(text).__name__}, {short(text)}"
    return [
        {
            "model": asking.model.name,
            "benchmark": asking.set.benchmark,
            "key": one.key,
            "part": one.part,
            "image": one.image,
            "pixels": pixels.get(one.image, ""),
            "question": one.text,
            "choices": list(one.choices),
            "answer": one.answer,
            "accept": list(one.accept),
            "written": written.get(one.key, ""),
            "read": BENCHMARKS[asking.set.benchmark].read(written[one.key], one) if one.key in written else "",
            "error": errors.get(one.image) or failed.get(one.key),
        }
        for one in questions
    ]


def _try(asking: Asking, questions: Sequence[Question], images: dict[str, Image.Image]) -> list[str | Exception]:
    """What the model writes to each question. Where a batch fails, each question is asked alone, and the error takes the place of its answer."""
    try:
        texts = asking.model.answer([images[one.image] for one in questions], [asking.prompt(one) for one in questions], asking.max_tokens)
        if not isinstance(texts, list) or len(texts) != len(questions) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"no list of {len(questions)} texts was returned")
        return list(texts)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"out of GPU memory with --batch {asking.batch}; lower --batch or --max-tokens, or set --precision bf16") from error
    except Exception as error:  # foreign code: counted apart from wrong answers
        if len(questions) == 1:
            return [error]
    return [text for one in questions for text in _try(asking, [one], images)]
