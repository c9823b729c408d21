"""Questions after objects in the shape of POPE (2305.10355): "Is there a dog in the image?", as many of answer yes as of answer no.

    questions = make_questions(images, count=500, objects=3, seed=0)     # {"random": [...], "popular": [...], "adversarial": [...]}

As POPE's authors do it: for each of an image's first objects one question of answer yes, and one of answer no after an object that the image has not and
that was not asked for yet. That object is drawn (random), the most frequent one in all images (popular), or the one that occurs most often together with
the object of the question of answer yes (adversarial); where none is left, it is drawn.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from openvision3.data.captions import read_text
from openvision3.data.images import EXTENSIONS, ImageError, open_image
from openvision3.data.names import DataOptions, open_source
from openvision3.data.pope_job import PopeJob
from openvision3.data.problems import Problems, reasons_in_words
from openvision3.data.sources import EncodedSource
from openvision3.draws import draw_seed
from openvision3.files import write_whole

SPLITS = ("random", "popular", "adversarial")
OBJECTS = Path(__file__).parents[1] / "assets" / "objects.txt"


@dataclass(frozen=True)
class Annotated:
    """An image and the objects that are known to be in it."""

    name: str
    objects: tuple[str, ...]
    group: str = ""
    """of an image with one label: labels of a group are alike, and are the adversarial ones for each other"""


def make_questions(images: Sequence[Annotated], per_image: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """{split: questions as POPE's files have them}. The adversarial split is left out where no two objects ever occur together, nor in one group.

    Raises:
        ValueError: fewer kinds of objects than the questions of an image need.
    """
    frequency = Counter(name for image in images for name in image.objects)
    together = _together(images, frequency)
    most = max(len(image.objects) for image in images)
    if len(frequency) < most + per_image:
        raise ValueError(f"{len(frequency)} kinds of objects are too few to ask {per_image} times for one that an image of {most} objects has not")
    popular = [name for name, _ in frequency.most_common()]
    names = sorted(frequency)
    splits: dict[str, list[dict[str, Any]]] = {}
    for split in SPLITS:
        if split == "adversarial" and not any(together.values()):
            continue
        questions: list[dict[str, Any]] = []
        for image in images:
            used = set(image.objects)
            for place, present in enumerate(image.objects[:per_image]):
                candidates = {"random": (), "popular": popular, "adversarial": together.get(present, ())}[split]
                absent = next((name for name in candidates if name not in used), None) or _drawn(names, used, (seed, split, image.name, place))
                used.add(absent)
                for name, label in ((present, "yes"), (absent, "no")):
                    questions.append(
                        {"question_id": len(questions) + 1, "image": image.name, "text": f"Is there {with_article(name)} in the image?", "label": label}
                    )
        splits[split] = questions
    return splits


def _together(images: Sequence[Annotated], frequency: Counter[str]) -> Mapping[str, list[str]]:
    """For each object the others that occur with it in an image, or are labels of its group: the most frequent first."""
    counts: dict[str, Counter[str]] = {}
    groups: dict[str, set[str]] = {}
    for image in images:
        for name in image.objects:
            counts.setdefault(name, Counter()).update(other for other in image.objects if other != name)
            if image.group:
                groups.setdefault(image.group, set()).add(name)
    for members in groups.values():
        for name in members:
            counts[name].update({other: frequency[other] for other in members if other != name})
    return {name: [other for other, _ in counter.most_common()] for name, counter in counts.items()}


def _drawn(names: Sequence[str], used: set[str], key: tuple[Any, ...]) -> str:
    left = [name for name in names if name not in used]
    return left[draw_seed("pope", *key) % len(left)]


def with_article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


# -- what is in an image ------------------------------------------------------------------------------------------------


def read_objects(path: str | Path = OBJECTS) -> dict[str, list[str]]:
    """{object: the words for it} of a file with a line for each object: person|man|woman. Raises ValueError."""
    objects = {words[0]: words for line in read_text(path).splitlines() if (words := [word.strip().lower() for word in line.split("|") if word.strip()])}
    if len(objects) < 2:
        raise ValueError(f"{path} names {len(objects)} objects; name one per line, with its other words behind |")
    return objects


def objects_of(captions: Iterable[str], objects: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The objects that the captions name in whole words, in the order of their first mention; a longer name hides a shorter one within it."""
    by_word = {word: name for name, words in objects.items() for word in words}
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, sorted(by_word, key=len, reverse=True))) + r")\b")
    return tuple(dict.fromkeys(by_word[word] for caption in captions for word in pattern.findall(caption.lower())))


def label_text(value: str) -> str:
    """A class name as words: Alpro-Blueberry-Soyghurt -> Alpro Blueberry Soyghurt."""
    return " ".join(re.split(r"[\s_-]+", value)).strip()


def write_pope(data: tuple[str, ...], job: PopeJob) -> tuple[dict[str, int], Problems]:
    """Write the questions and the images that they are about. Returns ({split: questions}, images that cannot be used).

    Raises:
        ValueError: data without captions or labels, or too few kinds of objects.
    """
    source = open_source(data, DataOptions(caption_keys=job.caption_keys))
    if not isinstance(source, EncodedSource):
        raise ValueError(f"{', '.join(data)}: name folders of images or shards, of one kind")
    objects = read_objects(job.objects or OBJECTS)
    annotated: list[tuple[int, Annotated]] = []
    for index in range(len(source)):
        try:
            one = _annotated(source, index, job, objects)
        except ImageError as error:
            source.problems.add(error.as_problem(source.key(index)))
            continue
        if len(one.objects) >= job.per_image:
            annotated.append((index, one))
    times = Counter(_stem(one.name) for _, one in annotated)
    annotated = [(index, replace(one, name=f"{_stem(one.name)}-{index}") if times[_stem(one.name)] > 1 else one) for index, one in annotated]
    if not annotated:
        what = f"a value under {job.label_key}" if job.label_key else f"{job.per_image} objects named in its captions"
        raise ValueError(f"none of {len(source):,} images of {', '.join(data)} has {what}; see --label-key, --caption-keys, --objects and --per-image")
    chosen = sorted(annotated, key=lambda pair: draw_seed("pope", job.seed, pair[1].name))[: job.count]
    (Path(job.out) / "images").mkdir(parents=True, exist_ok=True)
    kept = []
    for index, one in sorted(chosen, key=lambda pair: pair[0]):
        try:
            kept.append(replace(one, name=_copy_image(source, index, Path(job.out) / "images", one.name)))
        except ImageError as error:
            source.problems.add(error.as_problem(source.key(index)))
    if not kept:
        raise ValueError(f"none of {len(chosen):,} images of {', '.join(data)} can be read: {reasons_in_words(source.problems)}")
    splits = make_questions(kept, job.per_image, job.seed)
    name = re.sub(r"\W+", "-", Path(data[0]).stem) or "images"
    for split, questions in splits.items():
        write_whole(Path(job.out) / f"{name}_pope_{split}.json", "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions))
    return {split: len(questions) for split, questions in splits.items()}, source.problems


def _annotated(source: EncodedSource, index: int, job: PopeJob, objects: Mapping[str, Sequence[str]]) -> Annotated:
    name = re.sub(r"[^\w.-]+", "_", source.key(index))
    if not job.label_key:
        return Annotated(name, objects_of(source.captions(index), objects))
    label = source.value(index, job.label_key)
    group = source.value(index, job.group_key) if job.group_key else None
    return Annotated(name, (label_text(label),) if label else (), group or "")


def _copy_image(source: EncodedSource, index: int, folder: Path, name: str) -> str:
    """Copy the image as it is, once it has been decoded. Returns the name of its file. Raises ImageError."""
    data = source.data(index)
    open_image(data)
    content = data if isinstance(data, bytes) else data.read_bytes()
    name = _stem(name) + (".png" if content.startswith(b"\x89PNG") else ".jpg")
    write_whole(folder / name, content)
    return name


def _stem(name: str) -> str:
    """The name of an image without the ending of its format."""
    return str(PurePosixPath(name).with_suffix("")) if name.lower().endswith(EXTENSIONS) else name
