"""Pictures with words from folders and webdataset shards, by index, so that any order can be read and resumed.

A *source* answers four questions: how many samples, the key of one, its captions, and its picture as a square of a given
size (randomly cropped when a generator is given, the evaluation view when not). Shards are read as img2dataset writes
them: `00000.tar` with members `000000000.jpg`, `.txt`, `.json`.
"""

from __future__ import annotations

import bisect
import functools
import glob
import math
import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openvision3.data import openmoji
from openvision3.data.captions import Captions, clean_captions, decode_text, json_object, read_text, text_captions
from openvision3.data.folders import Names, is_hidden, read_table, scan_folder
from openvision3.data.identity import content_key, digest
from openvision3.data.images import CROPS, EXTENSIONS, Box, ImageError, from_uint8, open_image, random_view, uint8_tensor
from openvision3.data.order import Mix, Order, ShardShuffle, Shuffle
from openvision3.data.problems import reasons_in_words
from openvision3.data.shards.index import is_remote
from openvision3.data.shards.remote import ShardCache, expand_remote
from openvision3.data.shards.tars import WINDOW, Tars, Watch, labels, plain
from openvision3.draws import draw_seed


class Source(Protocol):
    """What training and evaluation read from; `EmojiSource`, `FolderSource` and `ShardSource` are the three."""

    problems: list[dict[str, str]]
    """What was already found unusable while the source was opened: {key, reason, detail}."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The name of a sample for people, unlike those of the other samples that were opened with it."""
        ...

    def sample_key(self, index: int) -> str:
        """What names a sample wherever its file lies, whatever it is called and whatever else is named beside it: random draws and caches go by it.

        That is what its image holds (`content_key`), or the code of an emoji. Copies of an image have one key.

        Raises:
            ImageError: the image cannot be read.
        """
        ...

    def identity(self) -> str:
        """A digest that is equal for sources with the same images in the same order, wherever they lie: a run may go on with them.

        It is made without reading all of them: from the names and sizes of all images (of shards: the size and count of each), and
        from the sample keys of some.
        """
        ...

    def family(self, index: int) -> str:
        """Samples of one family are alike; a sample of its own kind is its own family."""
        ...

    def captions(self, index: int) -> Captions: ...

    def value(self, index: int, name: str = "") -> str | None:
        """What the sample says under `name`, None where it says nothing. "" is what sources of its kind say classes by.

        That is the group of an emoji, the sub-folder of a picture in a folder, the `.cls` member of a sample in a shard.
        """
        ...

    def picture(self, index: int, size: int, generator: torch.Generator | None = None) -> Image.Image: ...

    def crop(self, index: int, size: int, generator: torch.Generator) -> tuple[Image.Image, Box]:
        """A training view, and which part of the upright picture it shows; the same generator state gives the same view."""
        ...

    def view(self, index: int, size: int, generator: torch.Generator) -> Tensor:
        """The picture of `crop` as uint8 (3, size, size)."""
        ...

    def order(self, seed: int, epoch: int, lanes: int = 1) -> Order:
        """In which order an epoch goes through the samples; shards that have to be fetched are dealt to `lanes` (see `order`)."""
        ...


@dataclass
class EmojiSource:
    """OpenMoji drawings with their names; `aliases` adds the other names of an emoji as further captions to contrast."""

    emoji: tuple[openmoji.Emoji, ...]
    aliases: bool = False
    problems: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.emoji)

    def key(self, index: int) -> str:
        return f"openmoji/{self.emoji[index].key}"

    def sample_key(self, index: int) -> str:
        return self.key(index)

    def identity(self) -> str:
        return digest("openmoji", *(emoji.key for emoji in self.emoji), self.aliases)

    def family(self, index: int) -> str:
        return f"openmoji/{self.emoji[index].family or self.emoji[index].name}"

    def captions(self, index: int) -> Captions:
        sample = self.emoji[index]
        return Captions((sample.name, *sample.aliases) if self.aliases else (sample.name,))

    def value(self, index: int, name: str = "") -> str | None:
        return {"": self.emoji[index].group, "group": self.emoji[index].group, "name": self.emoji[index].name}.get(name)

    def picture(self, index: int, size: int, generator: torch.Generator | None = None) -> Image.Image:
        return openmoji.draw(self.emoji[index].character, size) if generator is None else self.crop(index, size, generator)[0]

    def crop(self, index: int, size: int, generator: torch.Generator) -> tuple[Image.Image, Box]:
        return openmoji.draw_random(self.emoji[index].character, size, generator), (0, 0, size, size)

    def view(self, index: int, size: int, generator: torch.Generator) -> Tensor:
        return uint8_tensor(self.crop(index, size, generator)[0])

    def order(self, seed: int, epoch: int, lanes: int = 1) -> Order:
        return Shuffle(len(self), seed, epoch)


LOOKED_AT = 16
"""samples of which the content goes into the identity of a source"""

MIN_SIDE = 8
"""Pixels on each side that a picture must have to be trained on."""


class _PictureSource(ABC):
    """What a folder and a set of shards share: encoded bytes by index, and how a picture becomes a square."""

    evaluation_crop = "square"
    """one of images.CROPS: how `picture` makes a square without a generator"""

    def __init__(self, area: tuple[float, float] = (0.4, 1.0)):
        self.area = area
        self.problems: list[dict[str, str]] = []

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str: ...

    def family(self, index: int) -> str:
        return self.key(index)

    @abstractmethod
    def data(self, index: int) -> bytes | Path: ...

    def sample_key(self, index: int) -> str:
        return content_key(self.data(index))

    def _some(self) -> range:
        """About LOOKED_AT samples, evenly spaced."""
        return range(0, len(self), max(1, len(self) // LOOKED_AT))

    def _some_keys(self) -> list[str]:
        """The sample keys of some, or why an image has none."""
        found = []
        for index in self._some():
            try:
                found.append(self.sample_key(index))
            except ImageError as error:
                found.append(error.reason)
        return found

    def picture(self, index: int, size: int, generator: torch.Generator | None = None) -> Image.Image:
        if generator is None:
            return CROPS[self.evaluation_crop](open_image(self.data(index)), size)
        return self.crop(index, size, generator)[0]

    def crop(self, index: int, size: int, generator: torch.Generator) -> tuple[Image.Image, Box]:
        pixels, box = random_view(self.data(index), size, generator, self.area, MIN_SIDE)
        return from_uint8(pixels), box

    def view(self, index: int, size: int, generator: torch.Generator) -> Tensor:
        return random_view(self.data(index), size, generator, self.area, MIN_SIDE)[0]

    def order(self, seed: int, epoch: int, lanes: int = 1) -> Order:
        return Shuffle(len(self), seed, epoch)


class FolderSource(_PictureSource):
    """A plain folder: `x.jpg` beside `x.txt`, or tables `captions.csv` / `captions.jsonl` with columns `file` and `caption`.

    Sub-folders are read too; a file named in several rows has several captions. Hugging Face's `metadata.csv` / `.jsonl` are read where
    the folder has no table of its own. `label` begins the keys (the folder's name). What lies there and is not used is in `problems`.

    Raises:
        ValueError: a folder without images, or a caption table of which no row can be used.
    """

    def __init__(self, folder: str | Path, area: tuple[float, float] = (0.4, 1.0), label: str = ""):
        super().__init__(area)
        self.folder = Path(folder)
        self.label = label or self.folder.resolve().name
        contents = scan_folder(folder)
        self.names = contents.images
        if not self.names:
            unused = f" ({reasons_in_words(contents.unused)})" if contents.unused else ""
            shards = sorted({str(Path(p["key"]).parent) for p in contents.unused if p["key"].endswith(".tar")})
            advice = f"name the shards: {self.folder}/{shards[0]}/*.tar" if shards else f"choose one of {', '.join(e[1:] for e in EXTENSIONS)}"
            raise ValueError(f"{folder} holds no images that are read{unused}; {advice}")
        self.files = [self.folder / name for name in self.names]
        self.texts = Names(contents.texts)
        self._text_of = contents.texts
        self.table: dict[str, list] = {}
        self.problems += ({**problem, "key": f"{self.label}/{problem['key']}"} for problem in contents.unused)
        self._read_tables(contents.tables)

    def _read_tables(self, paths: list[str]) -> None:
        own = [path for path in paths if Path(path).name.lower().startswith("captions.")]
        present, missing = Names(self.names), 0
        for path in own or paths:
            try:
                table = read_table(self.folder, path)
            except ValueError as error:
                if own:
                    raise
                # a metadata.csv may be about anything
                self.problems.append({"key": f"{self.label}/{path}", "reason": "table without captions, which is not used", "detail": str(error)})
                continue
            self.problems += ({**problem, "key": f"{self.label}/{problem['key']}"} for problem in table.problems)
            for name, captions in table.captions.items():
                known = present.find(name)
                if known is not None:
                    self.table.setdefault(known, []).extend(captions)
                    continue
                near = present.near(name) if missing < 20 else ""  # it looks at every name
                missing += 1
                self.problems.append({"key": f"{self.label}/{name}", "reason": "missing", "detail": f"it has a caption, but there is no such image{near}"})

    def __len__(self) -> int:
        return len(self.names)

    def key(self, index: int) -> str:
        return f"{self.label}/{self.names[index]}"

    def data(self, index: int) -> Path:
        return self.files[index]

    def identity(self) -> str:
        files = [(name, path.stat().st_size) for name, path in zip(self.names, self.files, strict=True) if path.exists()]
        return digest("folder", len(self.names), files, self._some_keys())

    def captions(self, index: int) -> Captions:
        listed = clean_captions([self.table.get(self.names[index], [])])
        found = None if listed else self.texts.find(os.path.splitext(self.names[index])[0])
        if found is None:
            return listed
        text = self.folder / self._text_of[found]
        try:
            return text_captions(read_text(text))
        except OSError as error:
            raise ImageError("unreadable", f"{text} cannot be read: {error}") from error

    def value(self, index: int, name: str = "") -> str | None:
        """The first sub-folder, in which torchvision's ImageFolder layout keeps a class; nothing else is known of a file."""
        parts = self.names[index].split("/")
        return parts[0] if len(parts) > 1 and name in ("", "folder") else None


class ShardSource(_PictureSource):
    """Webdataset shards by random access, through their indexes.

    `caption_keys` names JSON fields to take captions from, in order (Recap-DataComp: `re_caption`, `org_caption`); empty:
    the `.txt` member. `only` keeps samples whose JSON has these values. A tar that is cut off gives what is whole in it,
    and says so in `problems`.

    Raises:
        ValueError: no usable sample in any shard.
    """

    def __init__(
        self,
        shards: Tars | list[str],
        caption_keys: tuple[str, ...] = (),
        only: dict[str, str] | None = None,
        area: tuple[float, float] = (0.4, 1.0),
        watch: Watch = plain,
    ):
        super().__init__(area)
        self.tars = shards if isinstance(shards, Tars) else Tars(shards)
        self.problems = self.tars.problems
        self.caption_keys = caption_keys
        self.kept: np.ndarray | None = None
        """the samples that `only` leaves, where there is a rule"""
        if only:
            matching = (i for i in watch(range(len(self.tars)), "reading JSON") if self._matches(i, only))
            self.kept = np.fromiter(matching, dtype=np.int64)
        if not len(self):
            wanted = f" with {only}" if only else ""
            why = f" ({self.problems[0]['reason']}: {self.problems[0]['detail']})" if self.problems else ""
            raise ValueError(
                f"no samples{wanted} in {len(self.paths)} shard(s), first {self.paths[0]}{why}; "
                "a sample is a picture member NAME.jpg beside NAME.txt or NAME.json"
            )

    @property
    def paths(self) -> list[str]:
        return self.tars.paths

    def _place(self, index: int) -> int:
        return index if self.kept is None else int(self.kept[index])

    def _json(self, place: int) -> dict:
        return json_object(self.tars.read(place, "json") or b"")

    def broken_json(self, index: int) -> bool:
        """Whether there is a JSON member that is no object."""
        data = self.tars.read(self._place(index), "json")
        return data is not None and not json_object(data) and data.strip() != b"{}"

    def _matches(self, place: int, only: dict[str, str]) -> bool:
        values = self._json(place)
        if not values:
            detail = f"missing, empty or not an object; {', '.join(only)} cannot be looked up"
            self.problems.append({"key": self.tars.key(place), "reason": "broken JSON", "detail": detail})
        return all(str(values.get(name)) == value for name, value in only.items())

    def __len__(self) -> int:
        return len(self.tars) if self.kept is None else len(self.kept)

    def key(self, index: int) -> str:
        return self.tars.key(self._place(index))

    def data(self, index: int) -> bytes:
        return self.tars.read(self._place(index), "picture") or b""

    def identity(self) -> str:
        kept = None if self.kept is None else digest(self.kept.tobytes())
        names = [self.tars.name(self._place(index)) for index in self._some()]
        return digest("shards", self.tars.facts(), kept, names, ["remote"] if self.tars.remote else self._some_keys())

    def captions(self, index: int) -> Captions:
        if self.caption_keys:
            values = self._json(self._place(index))
            return clean_captions([values.get(name) for name in self.caption_keys])
        return text_captions(decode_text(self.tars.read(self._place(index), "txt") or b"", "the .txt member"))

    def value(self, index: int, name: str = "") -> str | None:
        """A text or a number of the JSON under `name`; where there is none, the `.cls` member for "" and "cls".

        Raises:
            ImageError: as `Tars.read`. ValueError: the `.cls` members of a remote shard.
        """
        place = self._place(index)
        found = self._json(place).get(name) if name else None
        if isinstance(found, bool) or not isinstance(found, str | int | float):
            found = decode_text(self.tars.extra(place, "cls") or b"", "the .cls member") if name in ("", "cls") else ""
        return str(found).strip() or None

    def order(self, seed: int, epoch: int, lanes: int = 1) -> Order:
        if not self.tars.remote:
            return Shuffle(len(self), seed, epoch)
        starts = self.tars.starts if self.kept is None else np.searchsorted(self.kept, self.tars.starts).tolist()
        return ShardShuffle(starts, WINDOW, seed, epoch, lanes)


class MixedSource:
    """Several sources one after the other, as one. With `weights` an epoch holds them in these shares, see `order.Mix`.

    Raises:
        ValueError: weights that are not one positive number for each source.
    """

    def __init__(self, sources: list[Source], weights: tuple[float, ...] = ()):
        if weights and (len(weights) != len(sources) or not all(0 < weight < math.inf for weight in weights)):
            raise ValueError(f"weights {' '.join(f'{w:g}' for w in weights)}: one positive number for each of the {len(sources)} sources is needed")
        self.sources, self.weights = sources, weights
        self.starts = [0]
        for source in sources:
            self.starts.append(self.starts[-1] + len(source))
        self.problems = [p for source in sources for p in source.problems]

    def _find(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < self.starts[-1]:
            raise IndexError(index)
        number = bisect.bisect_right(self.starts, index) - 1
        return self.sources[number], index - self.starts[number]

    def __len__(self) -> int:
        return self.starts[-1]

    def key(self, index: int) -> str:
        source, local = self._find(index)
        return source.key(local)

    def sample_key(self, index: int) -> str:
        source, local = self._find(index)
        return source.sample_key(local)

    def identity(self) -> str:
        return digest("mix", *(source.identity() for source in self.sources), self.weights)

    def family(self, index: int) -> str:
        source, local = self._find(index)
        return source.family(local)

    def captions(self, index: int) -> Captions:
        source, local = self._find(index)
        return source.captions(local)

    def value(self, index: int, name: str = "") -> str | None:
        source, local = self._find(index)
        return source.value(local, name)

    def picture(self, index: int, size: int, generator: torch.Generator | None = None) -> Image.Image:
        source, local = self._find(index)
        return source.picture(local, size, generator)

    def crop(self, index: int, size: int, generator: torch.Generator) -> tuple[Image.Image, Box]:
        source, local = self._find(index)
        return source.crop(local, size, generator)

    def view(self, index: int, size: int, generator: torch.Generator) -> Tensor:
        source, local = self._find(index)
        return source.view(local, size, generator)

    def order(self, seed: int, epoch: int, lanes: int = 1) -> Order:
        if not self.weights and not _fetched(self):
            return Shuffle(len(self), seed, epoch)
        counts = [len(source) for source in self.sources]
        parts = [functools.partial(source.order, draw_seed(seed, "source", number), lanes=lanes) for number, source in enumerate(self.sources)]
        return Mix(counts, self.weights or counts, parts, seed, epoch, lanes)


def is_fetched(source: Source) -> bool:
    """Whether a source is fetched shard by shard, so that reading samples here and there is dear."""
    return bool(_fetched(source))


def _fetched(source: Source) -> list[Tars]:
    """The shards in a source that are fetched, whose cache its order has to spare."""
    if isinstance(source, MixedSource):
        return [tars for inner in source.sources for tars in _fetched(inner)]
    return [source.tars] if isinstance(source, ShardSource) and source.tars.remote else []


def choose_lanes(source: Source, batch: int, asked: int = 0, machines: int = 1) -> int:
    """The lanes of a run: 1 where nothing is fetched, else those `asked` for, or (0) the most that divide the batch and need no larger cache.

    Raises:
        ValueError: more lanes on one of the `machines` than the cache holds shards.
    """
    fetched = _fetched(source)
    if not fetched:
        return 1
    lanes = asked or max(lanes for lanes in range(1, WINDOW + 1) if batch % lanes == 0)
    for tars in fetched:
        tars.check_cache(lanes // machines + 2 * (lanes % machines > 0))  # where machines share lanes, one at each end
    return lanes


def labels_of(source: Source) -> list[str]:
    """What the keys of its samples begin with, a label for each folder and shard."""
    if isinstance(source, MixedSource):
        return [label for part in source.sources for label in labels_of(part)]
    return list(source.tars.labels) if isinstance(source, ShardSource) else [source.label] if isinstance(source, FolderSource) else []


def keep_labels(source: Source, before: list[str]) -> None:
    """Give the samples the keys that they had where they lay before: what was listed as unusable there is not met as new.

    `before` is what `labels_of` gave; a source of another number of folders and shards keeps its own.
    """
    if len(before) != len(labels_of(source)):
        return
    if isinstance(source, MixedSource):
        for part in source.sources:
            count = len(labels_of(part))
            keep_labels(part, before[:count])
            before = before[count:]
    elif isinstance(source, ShardSource):
        source.tars.labels = before
    elif isinstance(source, FolderSource):
        source.label = before[0]


def open_source(
    names: tuple[str, ...],
    *,
    side: openmoji.Side = "train",
    caption_keys: tuple[str, ...] = (),
    only: dict[str, str] | None = None,
    area: tuple[float, float] = (0.4, 1.0),
    aliases: bool = False,
    weights: tuple[float, ...] = (),
    index: str = "",
    cache: str = "",
    cache_gb: float = 0.0,
    crop: str = "square",
    watch: Watch = plain,
) -> Source:
    """Open `openmoji`, folders of pictures, folders, globs or URLs of shards, or several of them, as one source.

    Braces are understood as img2dataset users write them: `data/{00000..00009}.tar`. `side` picks the side
    of OpenMoji; folders and shards are taken as they are. `weights` mixes the names in these shares, `index` is the folder of
    the shards' indexes (none: beside each), `cache` and `cache_gb` are where remote shards are kept, `crop` is how pictures are
    evaluated (images.CROPS), `watch` shows progress.

    Raises:
        ValueError: a name that is none of these, with what was looked for.
    """
    if not names:
        raise ValueError(f"no data named; {LEGAL}")
    if crop not in CROPS:
        raise ValueError(f"crop {crop!r} is unknown; legal are {', '.join(CROPS)}")
    if weights and len(weights) != len(names):
        raise ValueError(f"{len(weights)} weights for {len(names)} sources; give one for each of: {' '.join(names)}")
    found = [find(name) for name in names]
    _each_once(names, found)
    folders = [path for each in found for path in each.folders]
    tars = [path for each in found for path in each.tars]
    folder_labels, tar_labels = dict(zip(folders, labels(folders), strict=True)), dict(zip(tars, labels(tars), strict=True))
    # Labels are given to all at once, so that keys differ between the sources of a mix too.
    kept = ShardCache(cache, cache_gb) if cache else None
    groups: list[list[Source]] = []
    for each in found if weights else [Found(any(f.openmoji for f in found), folders, tars, [])]:
        group: list[Source] = []
        if each.openmoji:
            group.append(EmojiSource(getattr(openmoji.load_emoji(), side), aliases and side == "train"))
        group += [FolderSource(folder, area, folder_labels[folder]) for folder in each.folders]
        if each.tars:
            shards = Tars(each.tars, [tar_labels[path] for path in each.tars], index=index, cache=kept, watch=watch)
            group.append(ShardSource(shards, caption_keys, only, area, watch))
        groups.append(group)
    for source in (source for group in groups for source in group):
        if isinstance(source, _PictureSource):
            source.evaluation_crop = crop
    sources = [group[0] if len(group) == 1 else MixedSource(group) for group in groups]
    source = sources[0] if len(sources) == 1 else MixedSource(sources, weights)
    source.problems += [{"key": path, "reason": "missing", "detail": "no such shard or folder"} for each in found for path in each.missing]
    source.problems += [problem for each in found for problem in each.unused]
    return source


SIBLINGS = (".parquet", "_stats.json", ".index")
"""What img2dataset and `data index` put beside shards: a glob may name it."""

LEGAL = "legal are openmoji, a folder of pictures, or shards such as data/*.tar"


@dataclass
class Found:
    """What one name of data stands for."""

    openmoji: bool
    folders: list[str]
    tars: list[str]
    missing: list[str]
    unused: list[dict[str, str]] = field(default_factory=list)
    """what lies beside the shards of a folder and is not read"""


def _each_once(names: tuple[str, ...], found: list[Found]) -> None:
    """Raises ValueError where two names stand for the same shard or folder, whose pictures would then count twice."""
    of: dict[str, str] = {}
    for name, each in zip(names, found, strict=True):
        for path in (*each.folders, *each.tars, *(["openmoji"] if each.openmoji else [])):
            place = path if "://" in path else os.path.realpath(path)
            if place in of:
                raise ValueError(f"{path} is named twice, by {of[place]} and by {name}, so that its pictures would count twice; name it once")
            of[place] = name


def find(name: str) -> Found:
    """Look up a name of data. Raises ValueError where there is nothing of that name."""
    if name == "openmoji":
        return Found(True, [], [], [])
    if not os.path.exists(name) and name.startswith("pipe:"):
        raise ValueError(f"{name}: commands are not run here; name the shards by their address, such as https://... or s3://..., or a local path")
    if not os.path.exists(name) and all(part.endswith(".tar") for part in name.split("::")) and "::" in name:
        raise ValueError(f"{name}: several shards are not joined by ::, but named apart: {' '.join(name.split('::'))}")
    if is_remote(name):
        urls = list(dict.fromkeys(url for part in _braces(name) for url in expand_remote(part)))
        if not urls:
            raise ValueError(f"no shards at {name}; {LEGAL}")
        return Found(False, [], urls, [])
    paths = expand(name)
    if not paths:
        raise ValueError(f"no such data: {name}; {LEGAL}")
    found = Found(False, [], [], [part for part in _braces(name) if not expand(part)] if not os.path.exists(name) else [])
    for path in paths:
        if Path(path).is_dir():
            inside = sorted(str(p) for p in Path(path).glob("*.tar") if not is_hidden(p.name))
            found.tars += inside
            found.folders += [] if inside else [path]
            if inside:
                found.unused += _beside_shards(path, len(inside))
        elif path.endswith(".tar"):
            found.tars.append(path)
        elif len(paths) == 1 or not path.endswith(SIBLINGS):
            raise ValueError(f"{path} is neither a folder nor a .tar shard; {LEGAL}")
    return found


def _beside_shards(folder: str, shards: int) -> list[dict[str, str]]:
    """The images in a folder of shards, which are not read, and shards in its sub-folders, which are not either."""
    contents = scan_folder(folder)
    detail = f"{folder} holds {shards} .tar, which are read in place of loose images; name the images' own folder to read them"
    unused = [{"key": f"{folder}/{name}", "reason": "image beside shards, which is not read", "detail": detail} for name in contents.images]
    inner = [problem["key"] for problem in contents.unused if problem["key"].endswith(".tar") and "/" in problem["key"]]
    reason, detail = "shard in a sub-folder, which is not read", f"name it too: {folder}/*/*.tar"
    return unused + [{"key": f"{folder}/{path}", "reason": reason, "detail": detail} for path in inner]


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
