"""Pictures with words from folders and webdataset shards, by index, so that any order can be read and resumed.

A *source* answers four questions: how many samples, the key of one, its captions, and its picture as a square of a given
size (randomly cropped when a generator is given, the evaluation view when not). Shards are read as img2dataset writes
them: `00000.tar` with members `000000000.jpg`, `.txt`, `.json`.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import re
import tarfile
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from openvision3.data import samples
from openvision3.data.images import EXTENSIONS, Box, ImageError, center_square, crop_resized, open_image, random_crop_box


class Source(Protocol):
    """What training and evaluation read from; `EmojiSource`, `FolderSource` and `ShardSource` are the three."""

    problems: list[dict[str, str]]
    """What was already found unusable while the source was opened: {key, reason, detail}."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def family(self, index: int) -> str:
        """Samples of one family are alike; a sample of its own kind is its own family."""
        ...

    def captions(self, index: int) -> tuple[str, ...]: ...

    def picture(self, index: int, size: int, generator: torch.Generator | None = None) -> Image.Image: ...

    def crop(self, index: int, size: int, generator: torch.Generator) -> tuple[Image.Image, Box]:
        """A training view, and which part of the upright picture it shows; the same generator state gives the same view."""
        ...


@dataclass
class EmojiSource:
    """OpenMoji drawings with their names; `aliases` adds the other names of an emoji as further captions to contrast."""

    emoji: tuple[samples.Emoji, ...]
    aliases: bool = False
    problems: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.emoji)

    def key(self, index: int) -> str:
        return f"openmoji/{self.emoji[index].key}"

    def family(self, index: int) -> str:
        return f"openmoji/{self.emoji[index].family or self.emoji[index].name}"

    def captions(self, index: int) -> tuple[str, ...]:
        sample = self.emoji[index]
        return (sample.name, *sample.aliases) if self.aliases else (sample.name,)

    def picture(self, index: int, size: int, generator: torch.Generator | None = None) -> Image.Image:
        return samples.draw(self.emoji[index].character, size) if generator is None else self.crop(index, size, generator)[0]

    def crop(self, index: int, size: int, generator: torch.Generator) -> tuple[Image.Image, Box]:
        return samples.draw_random(self.emoji[index].character, size, generator), (0, 0, size, size)


MIN_SIDE = 8
"""Pixels on each side that a picture must have to be trained on."""


class _PictureSource(ABC):
    """What a folder and a set of shards share: encoded bytes by index, and how a picture becomes a square."""

    def __init__(self, area: tuple[float, float] = (0.4, 1.0)):
        self.area = area
        self.problems: list[dict[str, str]] = []

    @abstractmethod
    def key(self, index: int) -> str: ...

    def family(self, index: int) -> str:
        return self.key(index)

    @abstractmethod
    def data(self, index: int) -> bytes | Path: ...

    def picture(self, index: int, size: int, generator: torch.Generator | None = None) -> Image.Image:
        if generator is None:
            return center_square(open_image(self.data(index)), size)
        return self.crop(index, size, generator)[0]

    def crop(self, index: int, size: int, generator: torch.Generator) -> tuple[Image.Image, Box]:
        image = open_image(self.data(index), draft=2 * size)
        if min(image.size) < MIN_SIDE:
            raise ImageError("too small", f"{image.width} x {image.height} pixels; at least {MIN_SIDE} on each side are needed to train")
        box = random_crop_box(image.width, image.height, generator, self.area)
        return crop_resized(image, box, size), box


class FolderSource(_PictureSource):
    """A plain folder: `x.jpg` beside `x.txt`, or one `captions.csv` / `captions.jsonl` with columns `file` and `caption`.

    Sub-folders are read too; a file named in several rows has several captions. `label` begins the keys (the folder's name).

    Raises:
        ValueError: a folder without pictures, or a caption table of which no row can be used.
    """

    def __init__(self, folder: str | Path, area: tuple[float, float] = (0.4, 1.0), label: str = ""):
        super().__init__(area)
        self.folder = Path(folder)
        self.label = label or self.folder.resolve().name
        self.files = sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        if not self.files:
            raise ValueError(f"{folder} holds no pictures; legal are files ending in {', '.join(EXTENSIONS)}")
        self.table: dict[str, list] = {}
        for path in (self.folder / "captions.csv", self.folder / "captions.jsonl"):
            if path.is_file():
                self._read_table(path)
        present = {str(p.relative_to(self.folder)) for p in self.files}
        for name in sorted(self.table.keys() - present):
            self.problems.append({"key": f"{self.label}/{name}", "reason": "missing", "detail": "it has a caption, but there is no such picture"})

    def _read_table(self, path: Path) -> None:
        used, seen = 0, "nothing"
        # utf-8-sig: spreadsheets begin a file with a byte order mark.
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            rows = csv.DictReader(file) if path.suffix == ".csv" else (_json_object(line) for line in file if line.strip())
            try:
                for number, row in enumerate(rows, 1):
                    name = row.get("file") or row.get("file_name")
                    if name:
                        self.table.setdefault(os.path.normpath(str(name)), []).append(row.get("caption") or row.get("text"))
                        used += 1
                    else:
                        seen = ", ".join(map(str, row)) or "no JSON object"
                        self.problems.append(
                            {"key": f"{self.label}/{path.name} row {number}", "reason": "broken caption row", "detail": f"no file named; seen: {seen}"}
                        )
            except csv.Error as error:
                raise ValueError(f"{path} is not a CSV file that can be read: {error}") from error
        if not used:
            raise ValueError(f"{path} needs the columns file and caption; seen: {seen}")

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        return f"{self.label}/{self.files[index].relative_to(self.folder)}"

    def data(self, index: int) -> Path:
        return self.files[index]

    def captions(self, index: int) -> tuple[str, ...]:
        listed = _clean(self.table.get(str(self.files[index].relative_to(self.folder)), []))
        text = self.files[index].with_suffix(".txt")
        if listed or not text.is_file():
            return listed
        try:
            return _clean([text.read_text(encoding="utf-8-sig", errors="replace")])
        except OSError as error:
            raise ImageError("unreadable", f"{text} cannot be read: {error}") from error


@dataclass(frozen=True)
class _Member:
    tar: int
    offset: int
    size: int


class ShardSource(_PictureSource):
    """Webdataset shards by random access: one scan of the tar headers, then reads at offsets.

    `caption_keys` names JSON fields to take captions from, in order (Recap-DataComp: `re_caption`, `org_caption`); empty:
    the `.txt` member. `only` keeps samples whose JSON has these values. A tar that is cut off gives what is whole in it,
    and says so in `problems`.

    Raises:
        ValueError: no usable sample in any shard.
    """

    def __init__(
        self,
        paths: list[str],
        caption_keys: tuple[str, ...] = (),
        only: dict[str, str] | None = None,
        area: tuple[float, float] = (0.4, 1.0),
    ):
        super().__init__(area)
        self.paths = paths
        self.caption_keys = caption_keys
        self.samples: list[tuple[str, dict[str, _Member]]] = []
        for number, (path, label) in enumerate(zip(paths, _labels(paths), strict=True)):
            self._scan(number, path, label.removesuffix(".tar"))
        if only:
            self.samples = [s for s in self.samples if self._matches(*s, only)]
        if not self.samples:
            wanted = f" with {only}" if only else ""
            why = f" ({self.problems[0]['reason']}: {self.problems[0]['detail']})" if self.problems else ""
            raise ValueError(
                f"no samples{wanted} in {len(paths)} shard(s), first {paths[0]}{why}; a sample is a picture member NAME.jpg beside NAME.txt or NAME.json"
            )

    def _scan(self, number: int, path: str, label: str) -> None:
        found: dict[str, dict[str, _Member]] = {}
        try:
            size = os.path.getsize(path)
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError("unexpected end of data")
                    folder, slash, base = member.name.removeprefix("./").rpartition("/")
                    stem, _, extension = base.partition(".")
                    found.setdefault(folder + slash + stem, {})[extension.lower()] = _Member(number, member.offset_data, member.size)
                # tarfile ends quietly at a header that is cut off or broken; a whole archive ends in a block of zeros.
                with open(path, "rb") as file:
                    file.seek(tar.offset)
                    if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                        raise tarfile.ReadError("no end mark, the shard is cut off or broken here")
        except (tarfile.TarError, OSError) as error:
            self.problems.append({"key": path, "reason": "damaged shard", "detail": f"{error}; {len(found)} samples before the damage"})
        else:
            if not found:
                self.problems.append({"key": path, "reason": "empty shard", "detail": "no members"})
        for stem, members in found.items():
            if any(f".{extension}" in EXTENSIONS for extension in members):
                self.samples.append((f"{label}/{stem}", members))
            else:
                self.problems.append({"key": f"{label}/{stem}", "reason": "no picture", "detail": f"only {', '.join(members)}"})

    def _read(self, member: _Member) -> bytes:
        # Opened anew each time: thousands of shards would exhaust the descriptors of a process, and workers must not share a position.
        try:
            with open(self.paths[member.tar], "rb") as file:
                file.seek(member.offset)
                return file.read(member.size)
        except OSError as error:
            raise ImageError("unreadable", f"{self.paths[member.tar]} cannot be read: {error}") from error

    def _json(self, members: dict[str, _Member]) -> dict:
        return _json_object(self._read(members["json"])) if "json" in members else {}

    def _matches(self, key: str, members: dict[str, _Member], only: dict[str, str]) -> bool:
        values = self._json(members)
        if not values:
            self.problems.append({"key": key, "reason": "broken JSON", "detail": f"missing, empty or not an object; {', '.join(only)} cannot be looked up"})
        return all(str(values.get(name)) == value for name, value in only.items())

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, index: int) -> str:
        return self.samples[index][0]

    def data(self, index: int) -> bytes:
        members = self.samples[index][1]
        return self._read(next(m for extension, m in members.items() if f".{extension}" in EXTENSIONS))

    def captions(self, index: int) -> tuple[str, ...]:
        members = self.samples[index][1]
        if self.caption_keys:
            values = self._json(members)
            return _clean([values.get(name) for name in self.caption_keys])
        return _clean([self._read(members["txt"]).decode("utf-8", "replace")]) if "txt" in members else ()


def _json_object(text: str | bytes) -> dict:
    """The object that `text` holds; {} where it is not JSON, or not an object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _clean(captions: list) -> tuple[str, ...]:
    """The captions among these values (lists are opened, numbers and nulls are none), on one line, without blank ones."""
    flat = [text for value in captions for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    # JSON can spell half of a surrogate pair, which no tokenizer takes.
    lines = (" ".join(text.encode("utf-8", "replace").decode().split()) for text in flat)
    return tuple(line for line in lines if line)


def _labels(paths: list[str]) -> list[str]:
    """The shortest ends of the paths that tell unlike paths apart, for keys that do not depend on where the data lies."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    labels: list[str] = []
    for length in range(1, max(map(len, parts), default=0) + 1):
        labels = ["/".join(p[-length:]) for p in parts]
        if len(set(labels)) == len(set(parts)):
            break
    return labels


class MixedSource:
    """Several sources one after the other, as one."""

    def __init__(self, sources: list[Source]):
        self.sources = sources
        self.starts = [0]
        for source in sources:
            self.starts.append(self.starts[-1] + len(source))
        self.problems = [p for source in sources for p in source.problems]

    def _find(self, index: int) -> tuple[Source, int]:
        for number, start in enumerate(self.starts[1:]):
            if index < start:
                return self.sources[number], index - self.starts[number]
        raise IndexError(index)

    def __len__(self) -> int:
        return self.starts[-1]

    def key(self, index: int) -> str:
        source, local = self._find(index)
        return source.key(local)

    def family(self, index: int) -> str:
        source, local = self._find(index)
        return source.family(local)

    def captions(self, index: int) -> tuple[str, ...]:
        source, local = self._find(index)
        return source.captions(local)

    def picture(self, index: int, size: int, generator: torch.Generator | None = None) -> Image.Image:
        source, local = self._find(index)
        return source.picture(local, size, generator)

    def crop(self, index: int, size: int, generator: torch.Generator) -> tuple[Image.Image, Box]:
        source, local = self._find(index)
        return source.crop(local, size, generator)


def open_source(
    names: tuple[str, ...],
    *,
    held_out: bool = False,
    caption_keys: tuple[str, ...] = (),
    only: dict[str, str] | None = None,
    area: tuple[float, float] = (0.4, 1.0),
    aliases: bool = False,
) -> Source:
    """Open `openmoji`, folders of pictures, folders or globs of shards, or several of them, as one source.

    Braces are understood as img2dataset users write them: `data/{00000..00009}.tar`. `held_out` picks the held-out side
    of OpenMoji; folders and shards are taken as they are.

    Raises:
        ValueError: a name that is none of these, with what was looked for.
    """
    legal = "legal are openmoji, a folder of pictures, or shards such as data/*.tar"
    if not names:
        raise ValueError(f"no data named; {legal}")
    sources: list[Source] = []
    folders: list[str] = []
    tars: list[str] = []
    missing: list[str] = []
    for name in names:
        if name == "openmoji":
            emoji = samples.load_emoji()
            sources.append(EmojiSource(emoji.held_out if held_out else emoji.train, aliases and not held_out))
            continue
        found = expand(name)
        if not found:
            raise ValueError(f"no such data: {name}; {legal}")
        missing += [part for part in _braces(name) if not expand(part)] if not os.path.exists(name) else []
        for path in found:
            if Path(path).is_dir():
                inside = sorted(str(p) for p in Path(path).glob("*.tar"))
                tars += inside
                folders += [] if inside else [path]
            elif path.endswith(".tar"):
                tars.append(path)
            else:
                raise ValueError(f"{path} is neither a folder nor a .tar shard; {legal}")
    sources += [FolderSource(folder, area, label) for folder, label in zip(folders, _labels(folders), strict=True)]
    if tars:
        sources.append(ShardSource(tars, caption_keys, only, area))
    source = sources[0] if len(sources) == 1 else MixedSource(sources)
    source.problems += [{"key": path, "reason": "missing", "detail": "no such shard or folder"} for path in missing]
    return source


def expand(pattern: str) -> list[str]:
    """Braces (`{0..3}`, `{a,b}`) and globs -> existing paths, sorted within each brace. A path that exists stands for itself."""
    pattern = os.path.expanduser(pattern)
    if os.path.exists(pattern):
        return [pattern]
    return list(dict.fromkeys(path for part in _braces(pattern) for path in ([part] if os.path.exists(part) else sorted(glob.glob(part)))))


def _braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match.group(1))
    if span:
        first, last = sorted(map(int, span.groups()))
        choices = [str(i).zfill(len(span.group(1))) for i in range(first, last + 1)]
    else:
        choices = match.group(1).split(",")
    return [whole for choice in choices for whole in _braces(pattern[: match.start()] + choice + pattern[match.end() :])]


def count_reasons(problems: list[dict[str, str]]) -> dict[str, int]:
    """{reason: how many}, most frequent first."""
    return dict(Counter(p["reason"] for p in problems).most_common())
