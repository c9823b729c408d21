"""Benchmarks of questions about images: the prompt of each question, how a written answer is read, and the scores.

Rules and where they come from:
- POPE: `evaluate.py` of its authors (2305.10355), which LLaVA's `eval_pope.py` repeats: an answer is "no" if its first sentence has the word
  No, no or not, and "yes" otherwise, even if it is empty.
- MME: `calculation.py` of its authors' eval_tool (2306.13394): yes or no within the first four characters in lower case. The score of a subtask is
  accuracy plus accuracy+ (both questions of an image right), in %; perception and cognition are sums of subtasks.
- SEED-Bench (2307.16125), the part with images: LLaVA lets the model write the letter and compares it as it is (`convert_seed_for_submission.py`).
- ScienceQA-IMG (2209.09513): LLaVA's `eval_science_qa.py` takes "B", "B. ..." and one "The answer is B."
- GQA testdev-balanced (1902.09506): exact match in lower case without a full stop at the end (LLaVA's `convert_gqa_for_eval.py`, then GQA's eval.py).
- conversations (ours): each question of `openvision3 data conversations` by itself, in its own words. An answer is right if it equals one of the right
  ones but for case, punctuation at its ends and an article; of yes and no, the first word counts.
Prompts are those of LLaVA's docs/Evaluation.md; the context of ScienceQA precedes its question.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openvision3.evaluate.protocol import Number, number
from openvision3.evaluate.statistics import Column, Columns

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJ"
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
ALL = "all"
ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Question:
    """One question about one image, with the answer that is right."""

    key: str
    """names it within its benchmark"""
    image: str
    """the name of its image; several questions may share one"""
    text: str
    answer: str
    """yes or no, a letter, or a word in lower case"""
    part: str
    """split, subtask, dimension, subject or kind"""
    choices: tuple[str, ...] = ()
    hint: str = ""
    accept: tuple[str, ...] = ()
    """further answers that are right"""


# -- prompts and how answers are read -----------------------------------------------------------------------------------


def _short_prompt(question: Question) -> str:
    return f"{question.text.strip()}\n{SHORT}"


def _mme_prompt(question: Question) -> str:
    return f"{question.text.replace('Please answer yes or no.', '').strip()}\n{SHORT}"


def _choice_prompt(question: Question) -> str:
    context = f"Context: {question.hint.strip()}\n" if question.hint.strip() else ""
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False))
    return f"{context}{question.text.strip()}\n{options}\n{LETTER}"


def _read_pope(written: str, question: Question) -> str:
    words = written.strip().partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & {*words} else "yes"


def _says_yes_or_no(written: str, question: Question) -> bool:
    return bool(re.search(r"\b(yes|no|not)\b", written.partition(".")[0].lower()))


def _read_mme(written: str, question: Question) -> str:
    beginning = written.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in beginning), "")


def _read_letter(written: str, question: Question) -> str:
    letter = written.strip()
    return letter if len(letter) == 1 and letter in LETTERS[: len(question.choices)] else ""


def _read_scienceqa(written: str, question: Question) -> str:
    text = written.strip()
    letters = LETTERS[: min(5, len(question.choices))]
    if len(text) >= 3 and text[1:3] == ". " and text[0] in LETTERS[:5]:
        text = text[0]
    elif not (len(text) == 1 and text in LETTERS[:5]):
        named = re.findall(r"The answer is ([A-Z]).", text)
        text = named[0] if len(named) == 1 else ""
    return text if text and text in letters else ""


def _read_own(written: str, question: Question) -> str:
    """The right answer if what is written equals one of the right ones, else what is written, both plain."""
    plain = _plain(written)
    if question.answer in ("yes", "no"):
        return plain.split(" ")[0].strip(",.;:!")
    return question.answer if plain in {_plain(one) for one in (question.answer, *question.accept)} else plain


def _plain(text: str) -> str:
    words = text.strip().strip(".,;:!?'\"()").lower().split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


def _as_it_is(question: Question) -> str:
    return question.text


def _read_gqa(written: str, question: Question) -> str:
    return written.strip().rstrip(".").lower()


# -- scores -------------------------------------------------------------------------------------------------------------


@dataclass
class Scores:
    """Metrics of a benchmark by name: (value, number of questions, what it is), and the columns behind them."""

    values: dict[str, tuple[float, int, str]] = field(default_factory=dict)
    columns: Columns = field(default_factory=dict)
    missing: list[tuple[str, str]] = field(default_factory=list)
    """(metric, what it needs)"""

    def mean(self, name: str, rows: Iterable[tuple[Any, float]], count: int, what: str) -> None:
        """The mean of (image, value)."""
        images, values = zip(*rows, strict=True)
        self.values[name] = (sum(values) / len(values), count, what)
        self.columns[name] = Column(list(images), list(values))

    def ratio(self, name: str, rows: Iterable[tuple[Any, float, float]], count: int, what: str) -> None:
        """The sum of the second over the sum of the third of (image, numerator, denominator); 0 where there is nothing to divide by."""
        images, above, below = zip(*rows, strict=True)
        self.values[name] = (sum(above) / sum(below) if sum(below) else 0.0, count, what)
        self.columns[name] = Column(list(images), [[one, other] for one, other in zip(above, below, strict=True)])


Judged = tuple[Question, str, str, bool]
"""a question, the answer that was written, how it is read, and whether it says what was asked for"""


def _by_part(judged: Sequence[Judged]) -> dict[str, list[Judged]]:
    parts: dict[str, list[Judged]] = {}
    for one in judged:
        parts.setdefault(one[0].part, []).append(one)
    return parts


def _add_shared(scores: Scores, judged: Sequence[Judged], what: str) -> None:
    """How many answers are in no expected form, and the floor: always the commonest right answer of each part."""
    scores.mean("unmatched", [(one.image, float(not is_read)) for one, _, _, is_read in judged], len(judged), f"share of answers that are {what}")
    commonest = sum(max(Counter(one.answer for one, *_ in part).values()) for part in _by_part(judged).values())
    scores.values["commonest_answer"] = (commonest / len(judged), len(judged), "share of the questions whose answer is the commonest of its part: a floor")


def _score_pope(judged: Sequence[Judged]) -> Scores:
    scores, parts = Scores(), _by_part(judged)
    for name, part in ({**parts, ALL: judged} if len(parts) > 1 else parts).items():
        rows = [(one.image, read == "yes", one.answer == "yes") for one, _, read, _ in part]
        scores.mean(f"{name}: accuracy", [(image, float(yes == true)) for image, yes, true in rows], len(part), "share of right answers")
        for metric, above, below, what in (
            ("precision", 1, lambda yes, true: yes, "share of answers yes that are right"),
            ("recall", 1, lambda yes, true: true, "share of questions of answer yes that are answered yes"),
            ("f1", 2, lambda yes, true: yes + true, "harmonic mean of precision and recall of yes"),
        ):
            scores.ratio(f"{name}: {metric}", [(image, float(above * (yes and true)), float(below(yes, true))) for image, yes, true in rows], len(part), what)
        scores.mean(f"{name}: yes_ratio", [(image, float(yes)) for image, yes, _ in rows], len(part), "share of answers yes; 0.5 is right")
    _add_shared(scores, judged, "neither yes nor no; the rule of POPE takes them for yes")
    return scores


def _score_mme(judged: Sequence[Judged]) -> Scores:
    scores = Scores()
    totals: dict[str, list[tuple[str, float]]] = {}
    complete: list[Judged] = []
    for name, part in _by_part(judged).items():
        pairs: dict[str, list[Judged]] = {}
        for one in part:
            pairs.setdefault(one[0].image, []).append(one)
        pairs = {image: pair for image, pair in pairs.items() if len(pair) == 2}
        if not pairs:
            scores.missing.append((f"{name}: score", "images with two questions that were both answered"))
            continue
        right = {image: [one.answer == read for one, _, read, _ in pair] for image, pair in pairs.items()}
        complete += [one for pair in pairs.values() for one in pair]
        count = 2 * len(pairs)
        totals[name] = [(f"{name}/{image}", 100 * (sum(both) / 2 + all(both))) for image, both in right.items()]
        scores.mean(f"{name}: score", totals[name], count, "accuracy + accuracy+, in %: 0 to 200; always yes has 50")
        scores.mean(f"{name}: accuracy", [(image, float(one)) for image, both in right.items() for one in both], count, "share of right answers")
        scores.mean(
            f"{name}: accuracy_plus", [(image, float(all(both))) for image, both in right.items()], count, "share of images whose two answers are right"
        )
    for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if lacking := [subtask for subtask in subtasks if subtask not in totals]:
            scores.missing.append((name, f"all its subtasks; --data lacks {', '.join(lacking)}"))
            continue
        rows = [(image, [value, place]) for place, subtask in enumerate(subtasks) for image, value in totals[subtask]]
        value = sum(sum(score for _, score in totals[subtask]) / len(totals[subtask]) for subtask in subtasks)
        scores.values[name] = (value, 2 * len(rows), f"sum of the scores of {len(subtasks)} subtasks, at most {200 * len(subtasks)}")
        scores.columns[name] = Column([image for image, _ in rows], [pair for _, pair in rows])
    if complete:
        _add_shared(scores, complete, "neither yes nor no: wrong by the rule of MME")
    return scores


def _score_accuracy(judged: Sequence[Judged]) -> Scores:
    scores, parts = Scores(), _by_part(judged)
    for name, part in {"": judged, **(parts if len(parts) > 1 else {})}.items():
        rows = [(one.image, float(one.answer == read)) for one, _, read, _ in part]
        scores.mean(f"{name}: accuracy" if name else "accuracy", rows, len(part), "share of right answers")
    _add_shared(scores, judged, "in no form that the rule can read, or empty: wrong")
    return scores


# -- the benchmarks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: what is asked, how answers are read, and what is computed."""

    title: str
    prompt: Callable[[Question], str]
    read: Callable[[str, Question], str]
    """the written answer -> yes or no, a letter, a word; "" if the rule reads nothing in it"""
    score: Callable[[Sequence[Judged]], Scores]
    rules: str
    max_tokens: int = 128
    """as in LLaVA's scripts"""
    says: Callable[[str, Question], bool] | None = None
    """whether an answer is in the form that was asked for. None: where `read` returns something"""
    whole_images: bool = False
    """whether a score needs every question of an image, so that no part of them may be drawn"""

    def judge(self, question: Question, written: str) -> Judged:
        says = self.says(written, question) if self.says else bool(self.read(written, question))
        return question, written, self.read(written, question), says


BENCHMARKS: Mapping[str, Benchmark] = {
    "pope": Benchmark(
        "POPE", _short_prompt, _read_pope, _score_pope, "POPE's evaluate.py: no if the first sentence has No, no or not, else yes", says=_says_yes_or_no
    ),
    "mme": Benchmark(
        "MME", _mme_prompt, _read_mme, _score_mme, "MME's calculation.py: yes or no in the first four characters, in lower case", whole_images=True
    ),
    "seedbench": Benchmark("SEED-Bench, images", _choice_prompt, _read_letter, _score_accuracy, "LLaVA's convert_seed_for_submission.py: the letter alone"),
    "scienceqa": Benchmark(
        "ScienceQA-IMG", _choice_prompt, _read_scienceqa, _score_accuracy, "LLaVA's eval_science_qa.py: B, B. ..., or one The answer is B.", 1024
    ),
    "gqa": Benchmark("GQA testdev-balanced", _short_prompt, _read_gqa, _score_accuracy, "exact match in lower case without a full stop at the end"),
    "conversations": Benchmark(
        "our own conversations", _as_it_is, _read_own, _score_accuracy, "ours: one of the right answers, but for case, article and punctuation"
    ),
}


def measure(name: str, answered: Sequence[tuple[Question, str]], max_tokens: int) -> tuple[list[Number], Columns, list[tuple[str, str]]]:
    """Questions with written answers -> numbers, their columns (by image), and (metric, what it needs) of what cannot be measured."""
    benchmark = BENCHMARKS[name]
    scores = benchmark.score([benchmark.judge(question, written) for question, written in answered])
    how = f"{benchmark.title}; {benchmark.rules}; greedy, at most {max_tokens} tokens"
    numbers = [number(metric, value, count, f"{what}; {how}") for metric, (value, count, what) in scores.values.items()]
    return numbers, scores.columns, scores.missing


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The rows of an answers.jsonl. Raises OSError, ValueError."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]  # splitlines also splits at U+2028 in an answer


def load_columns(path: Path) -> dict[str, Columns]:
    """{model: columns} of an answers.jsonl. Raises ValueError, KeyError, TypeError for a damaged file."""
    rows = read_answers(path)
    by_model: dict[tuple[str, str], list[tuple[Question, str]]] = {}
    for row in rows:
        if row["error"] is None:
            question = Question(row["key"], row["image"], row["question"], row["answer"], row["part"], tuple(row["choices"]), accept=tuple(row["accept"]))
            by_model.setdefault((row["model"], row["benchmark"]), []).append((question, row["written"]))
    return {model: measure(benchmark, answered, 0)[1] for (model, benchmark), answered in by_model.items()}
