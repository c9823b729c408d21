"""Questions with answers made from images with captions, in LLaVA's JSON: `openvision3 data conversations`.

Every draw depends on (seed, sample key, kind of question); what is said not to be in an image is taken from images of its own group, as often as they
are there, so that neither the question nor the name of the thing says whether the answer is yes.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, BinaryIO

from PIL import Image

from openvision3.data.images import ImageError, open_image
from openvision3.data.shards.tars import Watch, plain
from openvision3.data.sources import Source
from openvision3.draws import draw_seed
from openvision3.files import write_whole
from openvision3.settings import unknown
from openvision3.understand.facts import KINDS, Facts, facts_of, is_plural, join, with_article

BRIEFLY = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
"""what the benchmarks of LLaVA-1.5 (arXiv 2310.03744, table 7) append: a part of the questions ends with it"""


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str
    accept: tuple[str, ...] = ()
    """other answers that are right"""


class Others:
    """Finds images that show something else, in the narrowest group that has some."""

    def __init__(self, samples: Sequence[Facts]):
        self.samples = samples
        self.groups: dict[str, list[int]] = defaultdict(list)
        for number, sample in enumerate(samples):
            for group in sample.groups:
                self.groups[group].append(number)

    def draw(self, sample: Facts, count: int, random: Random) -> list[Facts]:
        """`count` samples with other names, none of which this one may show; empty where there are fewer."""
        drawn: list[Facts] = []
        for group in sample.groups:
            members = self.groups[group]
            for _ in range(min(40, 4 * len(members))):
                other = self.samples[random.choice(members)]
                if not (other.is_person or sample.may_show(other) or any(other.name_words & one.name_words for one in drawn)):
                    drawn.append(other)
                    if len(drawn) == count:
                        return drawn
        return []


def ask_what(sample: Facts, others: Others, random: Random) -> Question | None:
    text = random.choice(("What is this?", "What does the image show?", "What is in the image?", "What can you see?"))
    return Question("what", text, sample.name, sample.aliases)


def ask_colour(sample: Facts, others: Others, random: Random) -> Question | None:
    colour, what = sample.colour
    if not colour:
        return None
    mainly = random.choice(("What is the main colour?", "What colour is it mainly?"))
    return Question("colour", f"What colour {'are' if is_plural(what) else 'is'} the {what}?" if what else mainly, colour)


def ask_present(sample: Facts, others: Others, random: Random) -> Question | None:
    if sample.is_person:  # no image is denied to show a person, so the name alone would say yes
        return None
    other = others.draw(sample, 1, random)  # drawn for a yes, too: an image that nothing can be denied of is not asked at all
    if not other:
        return None
    is_there = random.random() < 0.5
    name = (sample if is_there else other[0]).name
    there = "Are there {} in the image?" if is_plural(name) else "Is there {} in the image?"
    text = random.choice((there, "Does the image show {}?", "Can you see {}?")).format(with_article(name))
    return Question("present", text, "yes" if is_there else "no")


def ask_which(sample: Facts, others: Others, random: Random) -> Question | None:
    if sample.is_person:  # a person is never a wrong choice
        return None
    choices = [sample, *others.draw(sample, 3, random)]
    if len(choices) < 4:
        return None
    random.shuffle(choices)
    names = [choice.name for choice in choices]
    if random.random() < 0.7:
        return Question("which", f"{random.choice(('Which of these is in the image', 'What is this'))}: {join(names)}?", sample.name)
    lines = "\n".join(f"{letter}. {name}" for letter, name in zip("ABCD", names, strict=True))
    return Question("which", f"Which of these is in the image?\n{lines}\n{LETTER}", "ABCD"[choices.index(sample)])


def ask_count(sample: Facts, others: Others, random: Random) -> Question | None:
    number, things = sample.number
    return Question("count", f"How many {things} are there?", number) if number else None


def ask_describe(sample: Facts, others: Others, random: Random) -> Question | None:
    opening = {"drawing": "A drawing of ", "photograph": "A photograph of ", "clip art": "Clip art of "}.get(sample.kind, "The image shows ")
    colour, what = sample.colour
    text = random.choice(("Describe the image.", "Describe it.", "What is in this image? Answer in a sentence."))
    return Question("describe", text, f"{opening}{with_article(sample.name)}." + (f" It is mainly {colour}." if colour and not what else ""))


def ask_image(sample: Facts, others: Others, random: Random) -> Question | None:
    if not sample.kind:
        return None
    text = random.choice(("What kind of image is this?", f"What kind of image is this: {join([*KINDS.values()])}?"))
    return Question("image", text, KINDS[sample.kind], (KINDS[sample.kind].removeprefix("a "),))


ASKERS: dict[str, Callable[[Facts, Others, Random], Question | None]] = {
    "what": ask_what, "colour": ask_colour, "present": ask_present, "which": ask_which, "count": ask_count, "describe": ask_describe, "image": ask_image
}  # fmt: skip


def ask(sample: Facts, others: Others, kinds: Sequence[str], seed: int = 0) -> list[Question]:
    """The questions of a sample, one of each kind that it has facts for, in a random order."""
    questions = []
    for kind in kinds:
        random = Random(draw_seed("question", seed, sample.key, kind))
        question = ASKERS[kind](sample, others, random)
        if question and kind in ("what", "colour", "present", "count") and random.random() < 0.2:
            question = Question(kind, f"{question.text}\n{BRIEFLY}", question.answer, question.accept)
        questions += [question] if question else []
    Random(draw_seed("order", seed, sample.key)).shuffle(questions)
    return questions


def conversation(sample: Facts, questions: Sequence[Question], number: int) -> dict[str, Any]:
    """One row of LLaVA's JSON, with the kind of each question and all its right answers beside it."""
    turns = []
    for place, question in enumerate(questions):
        turns += [{"from": "human", "value": "<image>\n" * (place == 0) + question.text}, {"from": "gpt", "value": question.answer}]
    row = {"id": f"{sample.key}-{number}", "image": sample.image, "conversations": turns}
    return row | {"kinds": [question.kind for question in questions], "accept": [[question.answer, *question.accept] for question in questions]}


@dataclass
class Written:
    """What `write_conversations` has written."""

    images: int = 0
    conversations: int = 0
    unnamed: int = 0
    """images whose caption gives no name"""
    answers: dict[str, Counter[str]] = field(default_factory=dict)
    """{kind of question: {answer: count}}"""


def write_conversations(source: Source, out: Path, *, turns: int = 3, kinds: Sequence[str] = (), seed: int = 0, watch: Watch = plain) -> Written:
    """Write `out` (JSON) and its images, an archive of the same name with .zip, each whole or not at all; what was there stays until both can be written.
    Images that cannot be read go to source.problems.

    Raises:
        ValueError: an unknown kind of question, or no image to ask about. OSError: the disk.
    """
    if turns < 1:
        raise ValueError(f"turns {turns} must be 1 or more questions in a conversation")
    for kind in kinds:
        if kind not in ASKERS:
            raise unknown("kind of question", kind, ASKERS)
    written = Written()
    samples: list[Facts] = []
    rows: list[dict[str, Any]] = []

    def pack(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for index in watch(range(len(source)), "reading images"):
                try:
                    data = source.encoded(index)
                    image = open_image(data)
                    name = f"{source.key(index)}.{_extension(data)}"
                    facts = facts_of(source, index, image, name)
                except ImageError as error:
                    source.problems.add(error.as_problem(source.key(index)))
                    continue
                if facts is None:
                    written.unnamed += 1
                    continue
                member = zipfile.ZipInfo(name)  # of 1980, so that the same data give the same archive
                archive.writestr(member, data)
                samples.append(facts)
        if not samples:
            raise ValueError(f"none of {len(source)} images has a caption that names what it shows; name the fields of captions with --caption-keys")
        others = Others(samples)
        for sample in samples:
            questions = ask(sample, others, kinds or [*ASKERS], seed)
            for question in questions:
                written.answers.setdefault(question.kind, Counter())[question.answer] += 1
            rows.extend(conversation(sample, questions[start : start + turns], start // turns) for start in range(0, len(questions), turns))
        if not rows:
            raise ValueError(f"none of {len(samples):,} images has a question of the kinds {', '.join(kinds)}; choose others with --kinds")

    write_whole(out.with_suffix(".zip"), pack)
    write_whole(out, "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")
    written.images, written.conversations = len({row["image"] for row in rows}), len(rows)
    return written


def _extension(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        return {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}.get(image.format or "", (image.format or "png").lower())
