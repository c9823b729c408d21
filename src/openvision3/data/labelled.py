"""Images with class labels, the names of classes, and the prompts for a class in zero-shot classification."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from openvision3.data.captions import read_text
from openvision3.data.images import ImageError
from openvision3.data.shards.tars import Watch, plain
from openvision3.data.sources import Source

TEMPLATES = tuple((Path(__file__).parents[1] / "assets" / "imagenet_templates.txt").read_text(encoding="utf-8").splitlines())
"""The 80 templates of CLIP's ImageNet evaluation (Radford et al. 2021; notebooks/Prompt_Engineering_for_ImageNet.ipynb of
github.com/openai/CLIP), unchanged ("a origami" included), because they are the protocol."""


def prompts(class_name: str, templates: Sequence[str] = TEMPLATES) -> list[str]:
    """The class name in each template, with spaces for underscores."""
    return [template.replace("{}", class_name.replace("_", " ")) for template in templates]


MOST_CLASSES = 1000
"""more labels than this are no classes where most samples have their own"""
MOST_NUMBERED = 100_000
"""classes given by their number alone"""


@dataclass(frozen=True)
class Labels:
    """The classes of a source's images. Image `indices[i]` is of class `names[classes[i]]`."""

    names: tuple[str, ...]
    values: tuple[str, ...]
    """the label of each class in the source: its name, a number or an id"""
    indices: tuple[int, ...]
    classes: tuple[int, ...]
    left_out: dict[str, int] = field(default_factory=dict)
    """reason -> number of images left out"""

    @property
    def numbered(self) -> bool:
        """Whether all class names are numbers or WordNet ids, which no text encoder understands."""
        return all(re.fullmatch(r"\d+|n\d{8}", name) for name in self.names)


class LabelError(ImageError):
    """A sample cannot be trained on with labels. Reason `no label` or `class not in the list`."""


@dataclass(frozen=True)
class Classes:
    """The classes of the samples of a training, each with a number, which is its place in `names`."""

    names: tuple[str, ...]
    numbers: dict[str, int]
    """label in the source -> number of its class"""
    key: str = ""
    """the field that holds the label, see `Source.value`"""
    by_line: bool = False
    """whether other labels are numbers of classes"""

    def number(self, source: Source, index: int) -> int:
        """The number of the class of a sample, looked up when the sample is read.

        Raises:
            LabelError: it has no label, or one of no class. ImageError, ValueError: as `Source.value`.
        """
        label = _label(source, index, self.key)
        number = self._number(label)
        if number is None:
            raise LabelError("class not in the list", self._why_unknown(label))
        return number

    def _number(self, label: str) -> int | None:
        number = self.numbers.get(label)
        if number is None and self.by_line and label.isdecimal() and int(label) < len(self.names):
            return int(label)
        return number

    def _why_unknown(self, label: str) -> str:
        if label in self.names:
            return f"{label} is more than once among the class names; label by numbers"
        count = len(self.names)
        if label.isdecimal() and self.by_line:
            return f"class number {label:.60} has no name: the {count} names are for 0 to {count - 1}"
        near = difflib.get_close_matches(label[:100], self.names, 1)
        return f"class {label:.60} is none of the {count} classes" + (f"; nearest is {near[0]}" if near else f", such as {self.names[0]}")


def read_classes(source: Source, key: str = "", classes: str = "", *, watch: Watch = plain) -> Classes:
    """The classes to train on: names from the file `classes`, or so many numbers (`classes` = "1000"); not set: every label of the source.

    With names, labels are names from the list, or line numbers from 0; then only a few samples are read, and none of a remote source. If
    these samples have other labels, or without names, the labels of all samples of a local source are read once. They are sorted, and
    WordNet ids are as many as names, as in `read_labels`. Samples without a label that are met are added to `source.problems`.

    Raises:
        ValueError, FileNotFoundError: no such file, no labels, labels that fit no name, or remote data without names.
    """
    names = _named(classes) if classes else ()
    if names:
        known = _by_name_or_line(names, key)
        if source.is_remote or any(isinstance(label, str) and known._number(label) is not None for _, label in _labels(source, key, source.probed())):
            return known
    elif source.is_remote:
        raise ValueError("remote shards are not searched for their classes; name a file of class names with --classes, or their number: --classes 1000")
    counts: Counter[str] = Counter()
    for index, label in _labels(source, key, watch(range(len(source)), "reading labels")):
        if isinstance(label, str):
            counts[label] += 1
        else:
            source.problems.add(label.as_problem(source.key(index)))
    if not counts:
        raise _no_labels(source, key)
    if not names and len(counts) > max(MOST_CLASSES, counts.total() // 2):
        raise ValueError(
            f"{counts.total():,} samples have {len(counts):,} labels{f' under {key}' if key else ''}, such as {min(counts):.60}: these are no classes; "
            "name another field with --label-key"
        )
    found, numbers = _number_classes(counts, names)
    return Classes(tuple(found), numbers, key)


def _named(classes: str) -> tuple[str, ...]:
    if not classes.isdecimal() or Path(classes).exists():
        return read_names(classes)
    if not 0 < int(classes) <= MOST_NUMBERED:
        raise ValueError(f"classes {classes} is not from 1 to {MOST_NUMBERED:,}; give the number of classes, or a file of class names")
    return tuple(map(str, range(int(classes))))


def _by_name_or_line(names: Sequence[str], key: str) -> Classes:
    """Labels are names or line numbers; where names are numbers themselves, only if these are the same."""
    twice = {name for name, times in Counter(names).items() if times > 1}
    by_line = all(not name.isdecimal() or int(name) == line for line, name in enumerate(names))
    return Classes(tuple(names), {name: line for line, name in enumerate(names) if name not in twice}, key, by_line)


def _label(source: Source, index: int, key: str) -> str:
    label = source.value(index, key)
    if label is None:
        raise LabelError("no label", f"nothing under {key}" if key else "no group, label column, sub-folder or .cls member")
    return label


def _labels(source: Source, key: str, indices: Iterable[int]) -> Iterator[tuple[int, str | ImageError]]:
    """(index, label, or why there is none)."""
    for index in indices:
        try:
            yield index, _label(source, index, key)
        except ImageError as error:
            yield index, error


def _no_labels(source: Source, key: str) -> ValueError:
    what = f"a label under {key}" if key else "a group, a label column, a sub-folder or a .cls member to take its class from"
    return ValueError(
        f"none of the {len(source)} images has {what}; name a field of the shards' JSON, or a column of captions.csv, with --label-key, "
        "or use one folder per class"
    )


def read_names(path: str | Path) -> tuple[str, ...]:
    """Read class names from a text file, one per line; the number of a line is the number of its class.

    Raises:
        ValueError, FileNotFoundError: no such file, or one without text or names.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file of class names at {path}; it holds one name a line")
    lines = read_text(path).splitlines()
    names = [" ".join(line.split()) for line in lines]
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        raise ValueError(
            f"{path} {'has an empty line ' + str(names.index('') + 1) if names else 'is empty'}; class names are one a line, and a line is a number"
        )
    return tuple(names)


def read_labels(source: Source, key: str = "", names: Sequence[str] = (), *, least: int = 20, like: Labels | None = None, watch: Watch = plain) -> Labels:
    """Read the class of each image from the field `key`; "" is the emoji's group, the table's label, the sub-folder or the
    `.cls` member.

    Without `names`, each label is a class, in sorted order. With `names`, labels are names from the list, or line numbers from 0, or
    as many WordNet ids (n01440764) as names, which are then in the order of the ids, as ImageNet's are. Classes with fewer than
    `least` images are left out, also from the names; 0 keeps every name. `like` takes the classes of other labels, such as those of
    the training set.

    Raises:
        ValueError: no image has a class, the labels do not fit the names, or no class is large enough.
    """
    left_out: Counter[str] = Counter()
    label_of: dict[int, str] = {}
    for index, label in _labels(source, key, watch(range(len(source)), "reading labels")):
        if isinstance(label, str):
            label_of[index] = label
        else:
            left_out[label.reason] += 1
    if not label_of:
        raise _no_labels(source, key)
    if like is not None:
        names, place = like.names, {value: i for i, value in enumerate(like.values)}
    else:
        names, place = _number_classes(label_of.values(), names)
    class_of = {index: place[value] for index, value in label_of.items() if value in place}
    if len(class_of) < len(label_of):
        left_out["class not in the list"] = len(label_of) - len(class_of)
    if not class_of:
        raise ValueError(f"no image is of one of the {len(names)} classes, such as {names[0]}; found: {', '.join(sorted(set(label_of.values()))[:3])} ...")
    counts = Counter(class_of.values())
    kept = list(range(len(names))) if like is not None or least <= 0 else [i for i in range(len(names)) if counts[i] >= least]
    if not kept:
        raise ValueError(f"no class has {least} images, the largest of {len(counts)} has {max(counts.values())}; add images or set a smaller least")
    renumbered = {old: new for new, old in enumerate(kept)}
    small = sum(counts[i] for i in counts if i not in renumbered)
    if small:
        left_out[f"class of fewer than {least} images"] = small
    indices = tuple(index for index, number in class_of.items() if number in renumbered)
    value_of = {number: value for value, number in place.items()}
    values = like.values if like is not None else tuple(value_of.get(i, names[i]) for i in kept)
    return Labels(tuple(names[i] for i in kept), values, indices, tuple(renumbered[class_of[index]] for index in indices), dict(left_out))


def _number_classes(values: Iterable[str], names: Sequence[str]) -> tuple[Sequence[str], dict[str, int]]:
    """(class names, label -> number of its class). Raises ValueError if the labels do not fit the names."""
    labels = sorted(set(values))
    if not names:
        if all(label.isdecimal() for label in labels):
            labels.sort(key=int)
        return labels, {value: i for i, value in enumerate(labels)}
    twice = {name for name, times in Counter(names).items() if times > 1}
    listed = {name: i for i, name in enumerate(names)}
    if any(value in listed for value in labels):
        if twice & set(labels):
            raise ValueError(f"{min(twice & set(labels))} is twice among the class names; label by numbers, or by WordNet ids in order")
        return names, listed
    if all(value.isdecimal() for value in labels):
        if int(max(labels, key=int)) >= len(names):
            raise ValueError(f"class number {max(labels, key=int)} has no name: the {len(names)} names are for 0 to {len(names) - 1}")
        return names, {str(i): i for i in range(len(names))} | {value: int(value) for value in labels}
    if all(re.fullmatch(r"n\d{8}", value) for value in labels) and len(labels) == len(names):
        return names, {value: i for i, value in enumerate(labels)}
    raise ValueError(
        f"classes are called {', '.join(labels[:3])} ... ({len(labels)} of them) and none of them is among the {len(names)} names ({names[0]} ...); "
        "choose the names, line numbers from 0, or as many WordNet ids as names"
    )
