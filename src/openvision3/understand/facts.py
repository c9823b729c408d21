"""What is known of an image, from its caption and its pixels, as far as a question may rest on it. What is not certain is left out.

A name is the first sentence of the caption without "a photo of"; a colour is one that the caption names before a noun and that the pixels show, or one
that fills most of what stands before a plain background; a number is one that the caption writes before a plural.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from openvision3.data.openmoji import named_emoji
from openvision3.data.sources import Source

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "grey", "white")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
KINDS = {"drawing": "a drawing", "photograph": "a photograph", "clip art": "clip art"}
"""kind of image -> what an answer calls it"""

_MEDIUM = re.compile(r"^an? (photo|photograph|picture|drawing|image) of (?:an? |the )?", re.I)
_TONE = re.compile(r"[:,]? *\b(?:medium-light|medium-dark|light|medium|dark) skin tone\b")
_NOUN = r"(?!(?:and|or|with|in|on|for|from|pointed|pointing)\b)[a-z]{3,}"
_COLOUR = re.compile(rf"\b({'|'.join(COLOURS)}|gray) ({_NOUN}(?: {_NOUN})?)", re.I)
_NUMBER = re.compile(rf"(?<![\w-])({'|'.join(NUMBERS)}) ((?:[a-z]+ )?(?:[a-z]+[a-rt-z]s|men|women|people|children))\b", re.I)
_EMPTY = frozenset(
    re.findall(r"\w+", "a an the of and or with in on at to for is it no not photo photograph picture drawing image style symbol sign button waste")
)
_PEOPLE = frozenset(re.findall(r"\w+", "person people man men woman women boy boys girl girls child children adult baby family human"))
_UNCOUNTED = frozenset(re.findall(r"\w+", "waste trash milk juice yoghurt yogurt oatghurt soyghurt cream water butter rice garlic ginger tennis"))

PLAIN = 12
"""levels of 255 within which the border of an image is one colour, and the background with it"""
MOST, SHOWN = 0.6, 0.2
"""the share of the foreground that its main colour has, and that a colour named in the caption has, at the least"""


@dataclass(frozen=True)
class Facts:
    key: str
    image: str
    """the name of its file in the archive of images"""
    name: str
    """what the image shows; never empty"""
    kind: str
    """one of KINDS, or "" """
    aliases: tuple[str, ...]
    """other names of the same"""
    words: frozenset[str]
    """the words of all its captions, by which the images are known that may show the same"""
    groups: tuple[str, ...]
    """groups of images like this one, from narrow to wide"""
    colour: tuple[str, str] = ("", "")
    """a colour and what has it; what is "" for the main colour of the image"""
    number: tuple[str, str] = ("", "")
    """a number and what there are so many of"""

    @functools.cached_property
    def name_words(self) -> frozenset[str]:
        return content_words(self.name)

    @property
    def is_person(self) -> bool:
        """Whether its name says no more than that it is a person: no image with people can be said not to show it."""
        return self.name_words <= _PEOPLE

    def may_show(self, other: Facts) -> bool:
        """Whether this image may show what the other is named after, or the other what this one is."""
        return bool(self.words & other.name_words or self.name_words & other.words)


def facts_of(source: Source, index: int, pixels: Image.Image, image: str) -> Facts | None:
    """The facts of a sample, None for one whose caption gives no name. Raises ImageError, ValueError: as `Source.captions`."""
    captions = source.captions(index)
    if not captions:
        return None
    code, group = source.value(index, "member") or "", ""
    if source.drawing(index):
        group = source.value(index, "group") or _groups_of_emoji().get(code, "")
    kind = _kind(source, index, captions[0])
    names = [name_of(text) for text in (captions[0], *(text for text in captions[1:] if "," not in text and not text.endswith(" style")))]
    if kind != "drawing":  # titles write Every Word Large, names of drawings only Pisces
        names = [name.lower() for name in names]
    name = names[0]
    if not name:
        return None
    if group == "Flags" and "flag" not in name.lower():
        name = f"flag of {name}"
    key = source.key(index)
    data = re.sub(r"[-_/]?\d+$", "", key.rpartition("/")[0])  # the shard's name without its number
    group = group or source.value(index, "category") or ""
    return Facts(
        key,
        image,
        name,
        kind,
        tuple(dict.fromkeys(alias for alias in names[1:] if alias and alias != name)),
        frozenset().union(*map(content_words, (name, *(text for text in captions if not text.endswith(" style"))))),
        tuple(dict.fromkeys((f"{data} {kind} {group}", f"{kind} {group}", f"{data} {kind}", kind, "all"))),
        colour_of(name, pixels),
        next(((found[1].lower(), found[2]) for found in [_NUMBER.search(name)] if found), ("", "")),
    )


def name_of(caption: str) -> str:
    """What a caption says that the image shows; "" where that is no name of a thing, such as a number of a drawing or a long sentence."""
    sentence = _TONE.sub("", _MEDIUM.sub("", caption.split(". ")[0].rstrip(". ")))
    name = next((part for part in re.split(" +- +", sentence) if not re.search("clip ?art", part, re.I)), "").strip(" ,:")
    words = name.split()
    is_name = 0 < len(words) <= 6 and len(name) <= 48 and re.search(r"[^\W\d_]{3}", name) and not re.search(r"[\d_/\\<>{}|#*;:()\"]", name)
    is_list = "and" not in words and len(_PEOPLE & {*words}) + (len(words) - len({*words})) > 1  # kiss woman man, family man girl girl
    return name if is_name and not is_list else ""


def content_words(text: str) -> frozenset[str]:
    """Its words in lower case, a plural as its singular, without those that name nothing."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    return frozenset(word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words if word not in _EMPTY)


def main_colours(pixels: Image.Image) -> tuple[dict[str, float], bool]:
    """({colour: share of the foreground}, whether the background is plain). Without a plain background the middle of the image is the foreground."""
    small = np.asarray(pixels.convert("RGB").resize((64, 64), Image.Resampling.BOX))
    border = np.concatenate([small[0], small[-1], small[:, 0], small[:, -1]]).astype(np.int16)
    background = np.median(border, 0)
    plain = bool((np.abs(border - background).max(1) <= PLAIN).mean() >= 0.9)
    chosen = small[np.abs(small - background).max(2) > 2 * PLAIN] if plain else small[16:48, 16:48].reshape(-1, 3)
    if len(chosen) < 64 * 64 // 50:  # nothing stands out
        return {}, plain
    named = _named(chosen)
    return {colour: float((named == number).mean()) for number, colour in enumerate(COLOURS)}, plain


def _named(rgb: np.ndarray) -> np.ndarray:
    """uint8 (n, 3) -> the number in COLOURS of each pixel."""
    hue, saturation, value = np.moveaxis(np.asarray(Image.fromarray(rgb[None]).convert("HSV"), dtype=np.int16)[0], -1, 0)
    degrees = hue * (360 / 256)
    edges = np.array([14, 42, 68, 165, 258, 305, 345])  # between red, orange, yellow, green, blue, purple, pink and red again
    number = np.array([0, 1, 2, 3, 4, 5, 6, 0])[np.searchsorted(edges, degrees, side="right")]
    number = np.where((number <= 1) & (degrees >= 8) & (degrees < 60) & (value < 165), COLOURS.index("brown"), number)
    number = np.where((number == 0) & (saturation < 110) & (value > 190), COLOURS.index("pink"), number)
    number = np.where(saturation < 38, COLOURS.index("grey"), number)
    number = np.where((saturation < 26) & (value > 225), COLOURS.index("white"), number)
    return np.where(value < 56, COLOURS.index("black"), number)


def colour_of(name: str, pixels: Image.Image) -> tuple[str, str]:
    """A colour of an image of this name and what has it, as `Facts.colour`; ("", "") where none is certain."""
    shares, plain = main_colours(pixels)
    if not shares:
        return "", ""
    if named := _COLOUR.search(name):
        colour = named[1].lower().replace("gray", "grey")
        return (colour, named[2]) if shares[colour] >= SHOWN else ("", "")
    first, second = sorted(shares, key=lambda colour: -shares[colour])[:2]
    return (first, "") if plain and shares[first] >= MOST and shares[second] <= shares[first] / 3 else ("", "")


def _kind(source: Source, index: int, caption: str) -> str:
    if source.drawing(index):
        return "drawing"
    medium = _MEDIUM.match(caption)
    if medium and medium[1].lower() in ("photo", "photograph", "drawing"):
        return "drawing" if medium[1].lower() == "drawing" else "photograph"
    return "clip art" if source.value(index, "source") == "clipart" else ""


@functools.cache
def _groups_of_emoji() -> dict[str, str]:
    return {emoji.key: emoji.group or "" for emoji in named_emoji()}


def is_plural(name: str) -> bool:
    first, last = name.split()[0].lower(), name.split()[-1]
    return {first, last} & {*NUMBERS, "people", "men", "women", "children"} != set() or (last.endswith("s") and not last.endswith(("ss", "us", "is")))


def with_article(name: str) -> str:
    """The name behind a or an; a name with a capital, of several, of something uncounted or with an "and" as it is."""
    first, last = name.split()[0], name.split()[-1]
    if first == "flag":
        return f"the {name}"
    if first[:1].isupper() or is_plural(name) or last in _UNCOUNTED or " and " in name or first in ("a", "an", "the", "no"):
        return name
    vowel = first[0] in "aeiou" or first == "x-ray"
    return f"{'an' if vowel and not first.startswith(('uni', 'eu', 'one')) else 'a'} {name}"


def join(names: Sequence[str]) -> str:
    """a, b or c; a single name as it is"""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
