"""Pictures with class labels, the names of classes, and the prompts that stand for a class in zero-shot classification."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from openvision3.data.captions import read_text
from openvision3.data.images import ImageError
from openvision3.data.shards.tars import Watch, plain
from openvision3.data.sources import Source

TEMPLATES = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)
"""The 80 templates of CLIP's ImageNet evaluation (Radford et al. 2021; notebooks/Prompt_Engineering_for_ImageNet.ipynb of
github.com/openai/CLIP, "a origami" and all): they are the protocol, so that every one of them stands here as it is there."""


def prompts(class_name: str, templates: Sequence[str] = TEMPLATES) -> list[str]:
    """The class in each template; what folder names join by underscores are words here."""
    return [template.replace("{}", class_name.replace("_", " ")) for template in templates]


@dataclass(frozen=True)
class Labels:
    """Which pictures of a source are of which class. Picture `indices[i]` is of class `names[classes[i]]`."""

    names: tuple[str, ...]
    values: tuple[str, ...]
    """what the source says for each class: the same as its name, a number or an id"""
    indices: tuple[int, ...]
    classes: tuple[int, ...]
    left_out: dict[str, int] = field(default_factory=dict)
    """why pictures are left out: how many"""

    @property
    def numbered(self) -> bool:
        """Whether all that is known of the classes is numbers or WordNet ids, which no text encoder understands."""
        return all(re.fullmatch(r"\d+|n\d{8}", name) for name in self.names)


def read_names(path: str | Path) -> tuple[str, ...]:
    """Class names from a text file, one a line, in the order that numbers stand for.

    Raises:
        ValueError, FileNotFoundError: no such file, no text, or no names in it.
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
    """The class of each picture that says one under `key`; "" is the emoji's group, the sub-folder or the `.cls` member.

    Without `names` each value is a class, in sorted order. With `names`, values are names of the list, or numbers of its lines
    from 0 on, or WordNet ids (n01440764): as many as names, which then are in the ids' order, as ImageNet's are. Classes with fewer
    than `least` pictures are left out, from the names too; 0 keeps every name. `like` takes the classes of another reading, such
    as those of the training set.

    Raises:
        ValueError: no picture with a class, names that the values do not fit, or no class large enough.
    """
    left_out: Counter[str] = Counter()
    said: dict[int, str] = {}
    for index in watch(range(len(source)), "reading labels"):
        try:
            value = source.value(index, key)
        except ImageError as error:
            left_out[error.reason] += 1
            continue
        if value is None:
            left_out["no label"] += 1
        else:
            said[index] = value
    if not said:
        what = f"a label under {key}" if key else "a group, a sub-folder or a .cls member to take its class from"
        raise ValueError(
            f"none of the {len(source)} pictures has {what}; name a field of the shards' JSON with --label-key, or put pictures into a folder a class"
        )
    if like is not None:
        names, place = like.names, {value: i for i, value in enumerate(like.values)}
    else:
        names, place = _numbered(said, names)
    of = {index: place[value] for index, value in said.items() if value in place}
    if len(of) < len(said):
        left_out["class not in the list"] = len(said) - len(of)
    if not of:
        raise ValueError(
            f"no picture is of one of the {len(names)} classes asked for, such as {names[0]}; seen: {', '.join(sorted(set(said.values()))[:3])} ..."
        )
    counts = Counter(of.values())
    kept = list(range(len(names))) if like is not None or least <= 0 else [i for i in range(len(names)) if counts[i] >= least]
    if not kept:
        raise ValueError(
            f"no class has {least} pictures, the largest of {len(counts)} has {max(counts.values())}; give more pictures or ask for fewer with least"
        )
    renumbered = {old: new for new, old in enumerate(kept)}
    small = sum(counts[i] for i in counts if i not in renumbered)
    if small:
        left_out[f"class of fewer than {least} pictures"] = small
    indices = tuple(index for index, number in of.items() if number in renumbered)
    value_of = {number: value for value, number in place.items()}
    values = like.values if like is not None else tuple(value_of.get(i, names[i]) for i in kept)
    return Labels(tuple(names[i] for i in kept), values, indices, tuple(renumbered[of[index]] for index in indices), dict(left_out))


def _numbered(said: dict[int, str], names: Sequence[str]) -> tuple[Sequence[str], dict[str, int]]:
    """(class names, what a source says -> number of the class). Raises ValueError where the values do not fit the names."""
    seen = sorted(set(said.values()))
    if not names:
        return seen, {value: i for i, value in enumerate(seen)}
    twice = {name for name, times in Counter(names).items() if times > 1}
    listed = {name: i for i, name in enumerate(names)}
    if any(value in listed for value in seen):
        if twice & set(seen):
            raise ValueError(f"{min(twice & set(seen))} stands twice among the class names; label by numbers, or by WordNet ids in order")
        return names, listed
    if all(value.isdecimal() for value in seen):
        if int(max(seen, key=int)) >= len(names):
            raise ValueError(f"class number {max(seen, key=int)} has no name: {len(names)} names are given, for 0 to {len(names) - 1}")
        return names, {str(i): i for i in range(len(names))} | {value: int(value) for value in seen}
    if all(re.fullmatch(r"n\d{8}", value) for value in seen) and len(seen) == len(names):
        return names, {value: i for i, value in enumerate(seen)}
    raise ValueError(
        f"classes are called {', '.join(seen[:3])} ... ({len(seen)} of them) and none is among the {len(names)} names ({names[0]} ...); "
        "legal are the names, numbers of lines from 0, or as many WordNet ids as names"
    )
