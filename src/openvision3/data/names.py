"""What a name of data stands for (openmoji, a folder, shards by path, glob, braces or URL), and opening several names as one source."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from openvision3.data import openmoji
from openvision3.data.crops import CROPS
from openvision3.data.folders import FolderSource, is_hidden, scan_folder
from openvision3.data.problems import Problem
from openvision3.data.shards.index import is_remote
from openvision3.data.shards.remote import ShardCache, expand_remote
from openvision3.data.shards.source import ShardSource
from openvision3.data.shards.tars import Tars, Watch, labels, plain
from openvision3.data.sources import MixedSource, Source
from openvision3.data.view import View

CHOICES = "choose openmoji, a folder of images, or shards such as data/*.tar"

SIBLINGS = (".parquet", "_stats.json", ".index")
"""endings of what img2dataset and `data index` put beside shards: a glob may name it"""


@dataclass(frozen=True)
class DataOptions:
    """How data are read."""

    side: openmoji.Side = "train"
    """the side of OpenMoji; folders and shards are read whole"""
    caption_keys: tuple[str, ...] = ()
    """JSON fields of shards that hold captions. Not set: the `.txt` member"""
    only: dict[str, str] | None = None
    """JSON fields and the values that samples of shards must have there"""
    aliases: bool = False
    """on the training side of OpenMoji, all names of an emoji are captions"""
    weights: tuple[float, ...] = ()
    """the share of each name in an epoch. Not set: every sample once"""
    view: View = field(default_factory=View)
    """what a training view of an image is"""
    crop: str = "square"
    """one of crops.CROPS: the evaluation view"""
    index: str = ""
    """the folder of the shards' indexes. Not set: beside each shard"""
    cache: str = ""
    cache_gb: float = 0.0
    """the folder that remote shards are kept in, and its largest size"""


def open_source(names: tuple[str, ...], options: DataOptions = DataOptions(), *, watch: Watch = plain) -> Source:
    """Open `openmoji`, folders of images, folders, globs or URLs of shards, or several of them, as one source. `watch` shows progress.

    Braces are read as img2dataset writes them: `data/{00000..00009}.tar`.

    Raises:
        ValueError: a name that is none of these, with what was looked for.
    """
    if not names:
        raise ValueError(f"no data named; {CHOICES}")
    if options.crop not in CROPS:
        raise ValueError(f"unknown crop {options.crop!r}; choose one of {', '.join(CROPS)}")
    if options.weights and len(options.weights) != len(names):
        raise ValueError(f"{len(options.weights)} weights for {len(names)} sources; give one for each of: {' '.join(names)}")
    data = [find(name) for name in names]
    _check_distinct(names, data)
    folders = [path for part in data for path in part.folders]
    tars = [path for part in data for path in part.tars]
    # Labels are chosen for all at once, so that keys differ between the sources of a mix too.
    label_of = dict(zip(folders, labels(folders), strict=True)) | dict(zip(tars, labels(tars), strict=True))
    cache = ShardCache(options.cache, options.cache_gb) if options.cache else None

    def open_parts(part: NamedData) -> Source:
        sources: list[Source] = []
        if part.openmoji:
            sources.append(openmoji.EmojiSource(getattr(openmoji.load_emoji(), options.side), options.aliases and options.side == "train", view=options.view))
        sources += [FolderSource(folder, options.view, label_of[folder], options.crop) for folder in part.folders]
        if part.tars:
            shards = Tars(part.tars, [label_of[path] for path in part.tars], index=options.index, cache=cache, watch=watch)
            sources.append(ShardSource(shards, options.caption_keys, options.only, options.view, options.crop, watch))
        return sources[0] if len(sources) == 1 else MixedSource(sources)

    merged = NamedData(any(part.openmoji for part in data), folders, tars)
    sources = [open_parts(part) for part in (data if options.weights else [merged])]
    source = sources[0] if len(sources) == 1 else MixedSource(sources, options.weights)
    for part in data:
        source.problems.extend({"key": path, "reason": "missing", "detail": "no such shard or folder"} for path in part.missing)
        source.problems.extend(part.unused)
    return source


@dataclass
class NamedData:
    """What one name of data stands for."""

    openmoji: bool = False
    folders: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """paths that braces name and that do not exist"""
    unused: list[Problem] = field(default_factory=list)
    """what lies beside the shards of a folder and is not read"""


def find(name: str) -> NamedData:
    """Look up a name of data. Raises ValueError where there is nothing of that name."""
    if name == "openmoji":
        return NamedData(openmoji=True)
    is_path = os.path.exists(name)
    if not is_path and name.startswith("pipe:"):
        raise ValueError(f"{name}: commands are not run here; name the shards by their address, such as https://... or s3://..., or a local path")
    if not is_path and "::" in name and all(part.endswith(".tar") for part in name.split("::")):
        raise ValueError(f"{name}: several shards are not joined by ::, but named apart: {' '.join(name.split('::'))}")
    if is_remote(name):
        urls = list(dict.fromkeys(url for part in _expand_braces(name) for url in expand_remote(part)))
        if not urls:
            raise ValueError(f"no shards at {name}; {CHOICES}")
        return NamedData(tars=urls)
    paths = expand(name)
    if not paths:
        raise ValueError(f"no such data: {name}; {CHOICES}")
    data = NamedData(missing=[] if is_path else [part for part in _expand_braces(name) if not expand(part)])
    for path in paths:
        if Path(path).is_dir():
            shards = sorted(str(shard) for shard in Path(path).glob("*.tar") if not is_hidden(shard.name))
            data.tars += shards
            if shards:
                data.unused += _beside_shards(path, len(shards))
            else:
                data.folders.append(path)
        elif path.endswith(".tar"):
            data.tars.append(path)
        elif len(paths) == 1 or not path.endswith(SIBLINGS):
            raise ValueError(f"{path} is neither a folder nor a .tar shard; {CHOICES}")
    return data


def _check_distinct(names: tuple[str, ...], data: list[NamedData]) -> None:
    """Raises ValueError where two names stand for the same shard or folder, whose images would then count twice."""
    name_of: dict[str, str] = {}
    for name, part in zip(names, data, strict=True):
        for path in (*part.folders, *part.tars, *(["openmoji"] if part.openmoji else [])):
            place = path if "://" in path else os.path.realpath(path)
            if place in name_of:
                raise ValueError(f"{path} is named twice, by {name_of[place]} and by {name}, so that its images would count twice; name it once")
            name_of[place] = name


def _beside_shards(folder: str, shards: int) -> list[Problem]:
    """The images in a folder of shards and the shards in its sub-folders: neither are read."""
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
    return list(dict.fromkeys(path for part in _expand_braces(pattern) for path in ([part] if os.path.exists(part) else sorted(glob.glob(part)))))


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match.group(1))
    if numbers:
        first, last = sorted(map(int, numbers.groups()))
        choices = [str(number).zfill(len(numbers.group(1))) for number in range(first, last + 1)]
    else:
        choices = match.group(1).split(",")
    return [whole for choice in choices for whole in _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])]
