"""Write thousands of named colour drawings, in a dozen styles, as ordinary shards.

    npm pack @iconify-json/noto @iconify-json/twemoji ... cldr-annotations-full       # the package files, see docs/data.md
    python tools/named_drawings.py PACKAGES --out drawings

PACKAGES is the folder of those `.tgz` files. Nothing else is read, and nothing is downloaded. The same packages and options give the same bytes, and
after a kill the same command goes on with the next shard. A shard is named by its style and kind: `noto-train-00000.tar`,
`noto-unseen_concept-00000.tar`. Each sample is a PNG, its name as `.txt`, and a JSON with `caption`, `phrase` (the caption with an article), `coloured`
(the phrase with the main colour of the drawing, where it has one), `captions` (further ones), `style`, `family`, `source` and `licence`.

Some drawings are held out of training, of three kinds. Families (the concept; of people, whatever the gender and skin tone) are the same over all
styles and OpenMoji:

    unseen concept   no style of the family is in training
    unseen style     the family is in training, but not in this style
    seen concept     the family is in training in this style; this gender or skin tone of it is not

With `--recolour 2`, `noto-recoloured-00000.tar` holds each training drawing of one main colour in two further ones: "an orange apple", "a purple apple"
of a green apple. What the hash of families holds out, such as the red apple, is not made this way either.

With `--everyday` the training drawings of everyday things (apple, car, dog, house ...) lie in shards of their own, `noto-train-everyday-00000.tar`, so
that a training can show them more often than the other four in five.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import re
import sys
import tarfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openvision3.data import openmoji
from openvision3.draws import hash_share
from openvision3.evaluate.results import DRAWING_KINDS, SEEN_CONCEPT, UNSEEN_CONCEPT, UNSEEN_STYLE
from openvision3.files import sha256_of, write_whole
from openvision3.progress import track
from openvision3.understand.facts import colour_of, with_article

if TYPE_CHECKING:
    from PIL import Image

SHARD = 1000
"""drawings in a shard"""
KINDS = ("train", *DRAWING_KINDS)
HELD_STYLE, HELD_MEMBER = 0.05, 0.05
"""shares of the families of a style that are held out as `unseen style`, and of the genders and skin tones held out as `seen concept`"""
KEYWORDS = 6
"""most keywords in one caption"""
ANNOTATIONS = "package/annotations/en/annotations.json"
WHITE = "#ffffff"
RECOLOURED = "recoloured"
HUES = {"red": (0, 1.0), "orange": (28, 1.0), "yellow": (52, 1.0), "green": (120, 1.0), "blue": (215, 1.0), "purple": (280, 1.0), "pink": (335, 0.6)}
"""what a drawing is recoloured to: degrees of hue, and the share of the saturation that stays"""
HUE_WIDTH = 35
"""degrees of hue around that of the main colour that change with it"""

EVERYDAY = frozenset(
    re.findall(
        "[a-z]+",
        "apple baby ball bear bed bell bird boat box bread cake car cat chair chicken coat corn cow dog doll door duck egg eye fire fish flower grass hill "
        "home horse house kitty leg milk money nest paper pig rabbit rain ring robin santa school seed sheep shoe snow squirrel stick sun table toy tree watch "
        "water window wood",
    )
)
"""the nouns of things that can be drawn among the 95 that a child reads first (E. W. Dolch, A Basic Sight Vocabulary, 1936), without people"""
EVERYDAY_WORDS = 3
"""most words of a name that is of an everyday thing: a dog face, but no cat face with tears of joy"""

_FILLER = {"alternate", "alt", "color", "colour", "svg"}


@dataclass(frozen=True)
class Drawing:
    """One icon of a package, with its words."""

    style: str
    icon: str
    caption: str
    captions: tuple[str, ...]
    family: str
    member: str
    """names it within its family: other genders and skin tones have other members"""


@dataclass(frozen=True)
class Package:
    """The parts of an icon package that are used (Iconify's JSON: https://iconify.design/docs/types/iconify-json.html)."""

    style: str
    version: str
    sha256: str
    licence: str
    author: str
    url: str
    icons: dict[str, dict[str, Any]]
    width: float
    height: float
    characters: dict[str, str]
    """{icon: its emoji}"""


def read_members(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """The JSON members of a package file under these names; absent ones are left out.

    Raises:
        ValueError: the file is no package, or a member no JSON.
    """
    wanted = set(names)
    members: dict[str, Any] = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                if member.name in wanted and member.isfile():
                    data = tar.extractfile(member)
                    assert data is not None
                    members[member.name] = json.loads(data.read())
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not a whole npm package ({error}); fetch it again with npm pack") from error
    return members


def read_package(path: Path) -> Package | None:
    """An icon package; None for a package without icons."""
    parts = ("package.json", "icons.json", "info.json", "chars.json")
    members = {name.removeprefix("package/"): value for name, value in read_members(path, [f"package/{part}" for part in parts]).items()}
    if "icons.json" not in members or "info.json" not in members:
        return None
    icons, info = members["icons.json"], members["info.json"]
    try:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", icons["prefix"]):
            raise ValueError(f"its prefix {icons['prefix']!r} is no name of a style")
        characters = {icon: _character(codes) for codes, icon in members.get("chars.json", {}).items()}
        return Package(
            style=icons["prefix"],
            version=members["package.json"]["version"],
            sha256=sha256_of(path),
            licence=info["license"].get("spdx") or info["license"]["title"],
            author=info["author"]["name"],
            url=info["author"].get("url", ""),
            icons=icons["icons"],
            width=icons.get("width", 16),
            height=icons.get("height", 16),
            characters=characters,
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no icon package of Iconify's layout: {error!r}") from error


def _character(codes: str) -> str:
    return "".join(chr(int(code, 16)) for code in codes.split("-"))


def read_packages(folder: Path) -> tuple[list[Package], dict[str, list[str]]]:
    """All icon packages of a folder by style, and CLDR's keywords of each emoji.

    Raises:
        ValueError: no icon package, two of one style, or no annotations.
    """
    packages: dict[str, Package] = {}
    keywords: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.tgz")):
        if package := read_package(path):
            if package.style in packages:
                raise ValueError(f"{path} is a second package of the style {package.style}; keep one of them in {folder}")
            packages[package.style] = package
        elif annotations := read_members(path, [ANNOTATIONS]):
            entries = annotations[ANNOTATIONS]["annotations"]["annotations"]
            keywords = {_plain(character): entry.get("default", []) for character, entry in entries.items()}
    if not packages:
        raise ValueError(f"{folder} holds no icon package; fetch some into it, such as: npm pack @iconify-json/noto")
    if not keywords:
        raise ValueError(f"{folder} holds no keywords of emoji; fetch them into it: npm pack cldr-annotations-full")
    return [packages[style] for style in sorted(packages)], keywords


def _plain(character: str) -> str:
    return character.replace("\ufe0f", "")


def _squeezed(name: str) -> str:
    """A name as a key: lower case, letters and digits only."""
    text = unicodedata.normalize("NFKD", name.lower())
    return "".join(c for c in text if c.isalnum())


@functools.cache
def emoji_by_character() -> dict[str, openmoji.Emoji]:
    return {_plain(each.character): each for each in openmoji.named_emoji()}


@functools.cache
def emoji_by_name() -> dict[str, openmoji.Emoji]:
    """Emoji by every name they go by: their own, aliases, Unicode's, and with or without "skin tone", "flag" and "button"."""
    names: dict[str, openmoji.Emoji] = {}
    for each in reversed(openmoji.named_emoji()):  # of two with one alias the first wins
        for alias in each.aliases:
            names[_squeezed(alias)] = each
        if len(_plain(each.character)) == 1:
            names[_squeezed(unicodedata.name(_plain(each.character), each.name))] = each
    for each in reversed(openmoji.named_emoji()):
        for name in (each.name, each.name.replace(" skin tone", "")):
            names[_squeezed(name)] = each
            if each.group == "Flags":
                names[_squeezed(f"flag for {name}")] = names[_squeezed(f"flag {name}")] = each
    return names


@functools.cache
def symbol_names() -> dict[str, str]:
    """Squeezed -> spelt name of every pictograph in Unicode that is no emoji."""
    codes = (*range(0x2190, 0x2C00), *range(0x1F000, 0x1FB00))
    names = [unicodedata.name(chr(code), "").lower() for code in codes]
    return {_squeezed(name): name.replace("-", " ") for name in names if name}


def cleaned(icon: str) -> str:
    """The words of an icon's name: without numbers at its end (a size, a variant) and words that name no thing; "" if none are left."""
    words = icon.replace("_", "-").split("-")
    while words and words[-1].isdigit():
        words.pop()
    return " ".join(word for word in words if word and word not in _FILLER)


def runs_together(package: Package) -> bool:
    """Whether the names of a package have nothing between their words; a name that no table knows then has no words."""
    return sum("-" in icon for icon in package.icons) < len(package.icons) / 20


def has_sizes(package: Package) -> bool:
    """Whether every name ends in the size it is drawn for, so that an icon comes at several sizes."""
    return all(re.search(r"-\d+$", icon) for icon in package.icons)


def _size_apart(icon: str) -> tuple[str, int]:
    base, _, size = icon.rpartition("-")
    return base, int(size)


def some_keywords(keywords: list[str]) -> list[str]:
    """Captions of up to KEYWORDS keywords each: short texts cost little to train on, and an emoji has up to twenty keywords."""
    parts = max(1, -(-len(keywords) // KEYWORDS))
    return [", ".join(keywords[part::parts]) for part in range(parts) if keywords]


def draw_words(package: Package, keywords: dict[str, list[str]]) -> tuple[list[Drawing], Counter[str]]:
    """The drawings of a package with caption and family; icons that are left out are counted by reason.

    An emoji is called as OpenMoji calls it, whatever the package calls it; its other names and CLDR's keywords become further captions.
    """
    left_out: Counter[str] = Counter()
    joined, sized = runs_together(package), has_sizes(package)
    drawings: dict[str, Drawing] = {}
    sizes: dict[str, int] = {}
    for icon, body in package.icons.items():
        if body.get("hidden"):
            left_out["hidden in the package"] += 1
            continue
        emoji = emoji_by_character().get(_plain(package.characters.get(icon, ""))) or emoji_by_name().get(_squeezed(cleaned(icon)))
        if emoji:
            caption, family, member = emoji.name, emoji.family or emoji.name, emoji.key
            others = [*emoji.aliases, *some_keywords(keywords.get(_plain(emoji.base), []))]
        else:
            caption = symbol_names().get(_squeezed(icon)) or cleaned(icon)
            family, member, others = caption, caption, []
            if not caption or (joined and caption == icon):
                left_out["no name in words"] += 1
                continue
        base, size = _size_apart(icon) if sized else (icon, 0)
        if base in drawings:  # the largest is the most detailed
            left_out["the same icon at another size"] += 1
            if size <= sizes[base]:
                continue
        captions = tuple(dict.fromkeys(text for text in (*others, with_style(caption, package.style)) if text and text != caption))
        drawings[base], sizes[base] = Drawing(package.style, icon, caption, captions, family, member), size
    return list(drawings.values()), left_out


def with_style(caption: str, style: str) -> str:
    return f"{caption}, {style.replace('-', ' ')} style"


def with_colour(caption: str, png: bytes) -> str:
    """A yellow star for a star that is drawn in yellow; the phrase alone where the name has a colour already, or the drawing no main colour."""
    from PIL import Image

    colour, what = colour_of(caption, Image.open(io.BytesIO(png)))
    phrase = with_article(caption)
    return with_article(f"{colour} {caption}") if colour and not what and phrase != caption else phrase


@functools.cache
def families_of_people() -> frozenset[str]:
    return frozenset(each.family or each.name for each in openmoji.named_emoji() if each.group == "People & Body")


def is_everyday(drawing: Drawing) -> bool:
    """Whether one of its names is that of an everyday thing."""
    names = [text.lower().split() for text in (drawing.caption, *drawing.captions) if "," not in text]
    return drawing.family not in families_of_people() and any(len(words) <= EVERYDAY_WORDS and not EVERYDAY.isdisjoint(words) for words in names)


def other_colours(drawing: Drawing, png: bytes, count: int, held: frozenset[str]) -> Iterator[tuple[Drawing, bytes]]:
    """The drawing in up to `count` further colours, with the names that it then has, each a family of its own.

    A drawing of people, of several main colours, in grey, or that does not show the new colour afterwards (a dark one in yellow) has none; so has a name that
    is held out: one of `held`, or by the hash of families.
    """
    from PIL import Image

    image = Image.open(io.BytesIO(png))
    colour, what = colour_of(drawing.caption, image)
    if not colour or drawing.family in families_of_people() or (not what and with_article(drawing.caption) == drawing.caption):
        return
    made = 0
    for other in sorted(HUES, key=lambda each: _share("colour", drawing.style, drawing.icon, each)):
        name = re.sub(rf"\b{colour}\b", other, drawing.caption, count=1) if what else f"{other} {drawing.caption}"
        if made == count or other == colour or name == drawing.caption or name in held or concept_share(name) < openmoji.UNSEEN_CONCEPT_SHARE:
            continue
        changed = recoloured(image, other)
        if changed and colour_of(name, changed)[0] == other:
            made += 1
            data = io.BytesIO()
            changed.save(data, "PNG")
            yield replace(drawing, caption=name, captions=(with_style(name, drawing.style),), family=name), data.getvalue()


def recoloured(image: Image.Image, colour: str) -> Image.Image | None:
    """The image with its main hue, and those near it, turned to that of a colour; None for an image in grey. Other hues and the alpha stay."""
    import numpy as np
    from PIL import Image

    hue, saturation, value = np.moveaxis(np.asarray(image.convert("RGB").convert("HSV"), dtype=np.float64), -1, 0)
    degrees = hue * 360 / 256
    counts = np.bincount((degrees[saturation > 64] / 15).astype(int), minlength=24)
    if not counts.any():
        return None
    around = counts + np.roll(counts, 1) + np.roll(counts, -1)
    away = (degrees - 15 * around.argmax() - 7.5 + 180) % 360 - 180
    main = away[(np.abs(away) < 22.5) & (saturation > 64)].mean()
    target, kept = HUES[colour]
    changes = (np.abs(away - main) <= HUE_WIDTH) & (saturation > 8)
    hue = np.where(changes, ((target + away - main) % 360) * 256 / 360, hue)
    saturation = np.where(changes, saturation * kept, saturation)
    changed = Image.fromarray(np.stack([hue, saturation, value], -1).round().astype(np.uint8), "HSV").convert("RGB")
    if image.mode == "RGBA":
        changed.putalpha(image.getchannel("A"))
    return changed


def _share(*texts: str) -> float:
    return hash_share("/".join(texts))


@functools.cache
def emoji_shares() -> dict[str, float]:
    return openmoji.family_shares(openmoji.named_emoji())


def concept_share(family: str) -> float:
    """Where the hash of a family lies in [0, 1): the one that OpenMoji's split goes by, so that a concept is held out in all styles alike."""
    return emoji_shares().get(family, _share(family))


def kind_of(drawing: Drawing, styles: dict[str, set[str]]) -> str:
    """The kind of a drawing; `styles` are those that draw each family.

    `unseen style` holds a family out of a single style, the first by its hash, so that the others still show it.
    """
    if concept_share(drawing.family) < openmoji.UNSEEN_CONCEPT_SHARE:
        return UNSEEN_CONCEPT
    others = styles[drawing.family]
    if len(others) > 1 and _share("style", drawing.family) < HELD_STYLE * len(others) and drawing.style == min(others, key=lambda s: _share(s, drawing.family)):
        return UNSEEN_STYLE
    if drawing.member != simplest_member(drawing) and _share("member", drawing.style, drawing.member) < HELD_MEMBER:
        return SEEN_CONCEPT
    return "train"


@functools.cache
def _simplest_members() -> dict[str, str]:
    members: dict[str, str] = {}
    for each in openmoji.named_emoji():
        family = each.family or each.name
        members[family] = min(members.get(family, each.key), each.key, key=lambda key: (len(key), key))
    return members


def simplest_member(drawing: Drawing) -> str:
    """The member of a family that is always trained on."""
    return _simplest_members().get(drawing.family, drawing.member)


def svg(package: Package, icon: str) -> str:
    """The icon as an SVG file: its body on a canvas of its own size."""
    body = package.icons[icon]
    left, top = body.get("left", 0), body.get("top", 0)
    width, height = body.get("width", package.width), body.get("height", package.height)
    box = f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box}>{body["body"]}</svg>'


def background_of(drawing: Drawing, kind: str, background: str) -> str | None:
    """A colour, or None for a transparent background. `mixed`: white for what is held out and for two drawings in three, else a plain colour."""
    code = int(_share("background", drawing.style, drawing.icon) * 0x1000000)
    plain = "#" + "".join(f"{128 + (code >> shift & 255) // 2:02x}" for shift in (16, 8, 0))  # light: many drawings are black lines
    if background == "mixed":
        background = "plain" if kind == "train" and _share("mixed", drawing.style, drawing.icon) < 1 / 3 else "white"
    return {"white": WHITE, "plain": plain, "transparent": None}[background]


def render(package: Package, drawing: Drawing, size: int, background: str | None) -> bytes:
    """The drawing as a PNG of `size` x `size` pixels: it fills 92 % of the longer side. Raises ValueError: resvg cannot read it."""
    import resvg_py
    from PIL import Image

    inner = round(size * 0.92)
    body = package.icons[drawing.icon]
    wide = body.get("width", package.width) >= body.get("height", package.height)
    drawn = resvg_py.svg_to_bytes(svg_string=svg(package, drawing.icon), width=inner if wide else None, height=None if wide else inner)
    image = Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")
    canvas = Image.new("RGBA", (size, size), background or (0, 0, 0, 0))
    canvas.alpha_composite(image, ((size - image.width) // 2, (size - image.height) // 2))
    data = io.BytesIO()
    (canvas.convert("RGB") if background else canvas).save(data, "PNG")
    return data.getvalue()


@dataclass(frozen=True)
class Shard:
    """What one worker writes."""

    path: Path
    package: Package
    drawings: tuple[Drawing, ...]
    kind: str
    size: int
    background: str
    recolour: int = 0
    """of a shard of kind `recoloured`: most further colours of a drawing"""
    held: frozenset[str] = frozenset()
    """and the names that it must not get: they are held out, in all styles or in this one"""


def write_shard(shard: Shard) -> tuple[str, list[str]]:
    """Write a shard whole or not at all -> its name, and the icons that cannot be rendered."""
    failed: list[str] = []
    partial = shard.path.with_suffix(".partial")
    with tarfile.open(partial, "w") as tar:
        for number, drawing in enumerate(shard.drawings):
            try:
                image = render(shard.package, drawing, shard.size, background_of(drawing, shard.kind, shard.background))
            except ValueError as error:
                failed.append(f"{drawing.style}:{drawing.icon} ({error})")
                continue
            if shard.kind == RECOLOURED:
                for other, (changed, other_image) in enumerate(other_colours(drawing, image, shard.recolour, shard.held)):
                    add_drawing(tar, f"{shard.path.stem}-{number:05d}-{other}", shard, changed, other_image)
            else:
                add_drawing(tar, f"{shard.path.stem}-{number:05d}", shard, drawing, image)
        empty = not tar.getmembers()
    if empty:  # of its drawings none has another colour
        partial.unlink()
    else:
        partial.replace(shard.path)
    return shard.path.name, failed


def add_drawing(tar: tarfile.TarFile, key: str, shard: Shard, drawing: Drawing, image: bytes) -> None:
    package = shard.package
    values = asdict(drawing) | {
        "phrase": with_article(drawing.caption),
        "coloured": with_colour(drawing.caption, image),
        "kind": shard.kind,
        "source": f"@iconify-json/{package.style} {package.version}: {drawing.icon}",
        "licence": package.licence,
        "author": f"{package.author}, {package.url}".strip(", "),
    }
    for suffix, data in (("png", image), ("txt", drawing.caption.encode()), ("json", json.dumps(values, ensure_ascii=False).encode())):
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def plan_shards(
    packages: list[Package], keywords: dict[str, list[str]], out: Path, size: int, background: str, recolour: int = 0, everyday: bool = False
) -> tuple[list[Shard], dict[str, dict[str, Any]]]:
    """The shards to write, and what each style holds, for the record."""
    words = {package.style: draw_words(package, keywords) for package in packages}
    styles: dict[str, set[str]] = defaultdict(set)
    for style, (drawings, _) in words.items():
        for drawing in drawings:
            styles[drawing.family].add(style)
    unseen = {name for drawings, _ in words.values() for each in drawings if kind_of(each, styles) == UNSEEN_CONCEPT for name in (each.caption, each.family)}
    shards: list[Shard] = []
    record: dict[str, dict[str, Any]] = {}
    for package in packages:
        drawings, left_out = words[package.style]
        by_kind: dict[str, list[Drawing]] = {kind: [] for kind in KINDS}
        for drawing in sorted(drawings, key=lambda each: _share("order", each.style, each.icon)):
            by_kind[kind_of(drawing, styles)].append(drawing)
        held = frozenset(unseen.union(*((each.caption, each.family) for each in by_kind[UNSEEN_STYLE])))
        groups = {kind.replace(" ", "_"): (kind, members) for kind, members in by_kind.items()}
        if everyday:
            groups["train"] = ("train", [each for each in by_kind["train"] if not is_everyday(each)])
            groups["train-everyday"] = ("train", [each for each in by_kind["train"] if is_everyday(each)])
        for group, (kind, members) in groups.items():
            for number, start in enumerate(range(0, len(members), SHARD)):
                path = out / f"{package.style}-{group}-{number:05d}.tar"
                shards.append(Shard(path, package, tuple(members[start : start + SHARD]), kind, size, background))
                if recolour and kind == "train":
                    path = out / f"{package.style}-{group.replace('train', RECOLOURED)}-{number:05d}.tar"
                    shards.append(replace(shards[-1], path=path, kind=RECOLOURED, recolour=recolour, held=held))
        record[package.style] = {
            "package": f"@iconify-json/{package.style} {package.version}",
            "sha256": package.sha256,
            "licence": package.licence,
            "author": f"{package.author}, {package.url}".strip(", "),
            "drawings": {kind: len(members) for kind, members in by_kind.items()},
            "left out": dict(left_out),
        }
    return shards, record


def write_all(shards: list[Shard], workers: int) -> Iterator[tuple[str, list[str]]]:
    if workers == 1:
        yield from map(write_shard, shards)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(write_shard, shards)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="the folder of the package files (*.tgz)")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the shards")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    choices = ["mixed", "white", "plain", "transparent"]
    parser.add_argument("--background", default="mixed", choices=choices, help="plain: one colour a drawing; mixed: white, and plain for a third of training")
    parser.add_argument("--recolour", type=int, default=0, help="further colours of each training drawing that has one main colour")
    parser.add_argument("--everyday", action="store_true", help="put the training drawings of everyday things into shards of their own")
    parser.add_argument("--workers", type=int, default=2, help="processes that render")
    args = parser.parse_args()
    try:
        run(args.packages, args.out, args.size, args.background, args.workers, args.recolour, args.everyday)
    except (ValueError, OSError, ImportError) as error:
        print(f"named_drawings: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def run(folder: Path, out: Path, size: int = 256, background: str = "mixed", workers: int = 2, recolour: int = 0, everyday: bool = False) -> None:
    """Write the shards that are not there yet, and `drawings.json`, the record of what they hold.

    Raises:
        ValueError: packages that cannot be used, or a folder of shards made from other packages or with other options.
    """
    if size < 16 or workers < 1:
        raise ValueError(f"size {size} must be at least 16 pixels, and workers {workers} at least 1")
    if not 0 <= recolour < len(HUES):
        raise ValueError(f"recolour {recolour} must lie between 0 and {len(HUES) - 1}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name the one that holds the package files (*.tgz)")
    packages, keywords = read_packages(folder)
    shards, record = plan_shards(packages, keywords, out, size, background, recolour, everyday)
    settings: dict[str, Any] = {"size": size, "background": background, "styles": record}
    settings |= {name: value for name, value in (("recolour", recolour), ("everyday", everyday)) if value}
    out.mkdir(parents=True, exist_ok=True)
    recorded = out / "drawings.json"
    if recorded.is_file() and json.loads(recorded.read_text()) != settings:
        raise ValueError(f"{out} holds drawings of other packages or options, see {recorded}; choose another --out, or remove the folder")
    if not recorded.is_file() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no drawings.json; choose another --out")
    write_whole(recorded, json.dumps(settings, indent=1) + "\n")
    missing = [shard for shard in shards if not shard.path.is_file()]
    if len(missing) < len(shards):
        print(f"{len(shards) - len(missing)} of {len(shards)} shards are there already")
    failed = [icon for _, icons in track(write_all(missing, workers), "rendering", total=len(missing)) for icon in icons]
    for icon in failed:
        print(f"not rendered: {icon}")
    for style, row in record.items():
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in row["drawings"].items())
        reasons = ", ".join(f"{count} {reason}" for reason, count in row["left out"].items())
        print(f"{style}: {kinds}; left out: {reasons or 'none'}")
    if recolour:
        print(f"in further colours: {out}/*-{RECOLOURED}-*.tar")
    drawn = sum(len(shard.drawings) for shard in shards if shard.kind != RECOLOURED)
    print(f"{drawn:,} drawings in {out}; train on {out}/*-train-*.tar with --caption-keys caption captions")


if __name__ == "__main__":
    main()
