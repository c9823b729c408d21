"""Index shards, and check every sample of shards and folders, in several processes; bad ones are reported and do not stop the others."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from openvision3.data.captions import TextError
from openvision3.data.folders import FolderSource
from openvision3.data.images import ImageError, damage_seen, open_image
from openvision3.data.names import NamedData, find
from openvision3.data.shards.index import IndexFile, Problem, ShardIndex, Stamp, fresh_index, index_path, is_remote, scan, stamp_of
from openvision3.data.shards.remote import fetch, remote_stamp
from openvision3.data.shards.source import ShardSource
from openvision3.data.shards.tars import Tars, Watch, plain
from openvision3.device import cores
from openvision3.progress import track

T = TypeVar("T")


@dataclass
class Indexed:
    """What `write_index` did with one shard; `error` says why there is no index."""

    shard: str
    samples: int = 0
    bytes: int = 0
    written: bool = False
    problems: tuple[Problem, ...] = ()
    error: str = ""
    missing: bool = False


def write_indexes(names: Sequence[str], folder: str = "", again: bool = False, workers: int = 0) -> list[Indexed]:
    """Index all shards that `names` stand for, with a progress bar.

    Raises:
        ValueError: no shards, or remote ones and no `folder` for their indexes.
    """
    data = _find_data(names, "shards")
    shards, missing = (_distinct(data, kind) for kind in ("tars", "missing"))
    if not shards:
        raise ValueError(f"no shards at {', '.join(names)}; this command indexes .tar files")
    if not folder and any(map(is_remote, shards)):
        raise ValueError("indexes of remote shards need a local folder; name it with --index FOLDER here and in training")
    indexed = _map_shards(functools.partial(write_index, folder=folder, again=again), shards, workers, "indexing")
    return [*indexed, *(Indexed(shard, error="no such shard", missing=True) for shard in missing)]


def write_index(shard: str, folder: str = "", again: bool = False) -> Indexed:
    """Index a shard, unless its index fits (or `again`). A remote shard is copied for this, and its index is written into `folder`."""
    try:
        stamp = _stamp(shard)
        place = index_path(shard, folder)
        head, _ = (None, "") if again else fresh_index(place, stamp)
        index: ShardIndex | IndexFile
        if head is not None and head.count:
            index = head
        else:
            with local_copy(shard, stamp) as path:
                scanned = index = scan(path, stamp)
            if scanned.read_error:
                return Indexed(shard, error=f"{scanned.read_error}; no index is written, run the command again")
            if scanned.is_of_a_tar:
                place.parent.mkdir(parents=True, exist_ok=True)
                scanned.save(place)
        if not index.count:
            return Indexed(shard, error="no usable sample: " + "; ".join(f"{p['reason']}: {p['detail']}" for p in index.problems[:3]))
        problems = tuple({**p, "key": f"{shard} {p['key']}".rstrip()} for p in index.problems)
        return Indexed(shard, index.count, stamp.size, index is not head, problems)
    except Exception as error:  # one shard must not stop thousands, and remote file systems raise errors of any type
        return Indexed(shard, error=_on_one_line(error))


@dataclass
class Checked:
    """What the check of a shard or folder gives: its samples, how many of them can be trained on, and every problem."""

    shard: str
    samples: int = 0
    usable: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    captions: Counter[int] = field(default_factory=Counter)
    """of samples with several captions: {number of captions: samples}"""

    def add(self, reason: str, detail: str, key: str = "") -> None:
        self.problems.append({"key": key or self.shard, "reason": reason, "detail": detail})


@dataclass
class CheckReport:
    """What `check_data` gives."""

    shards: int
    folders: int
    checked: list[Checked]

    @property
    def problems(self) -> list[Problem]:
        return [problem for checked in self.checked for problem in checked.problems]

    @property
    def captions(self) -> Counter[int]:
        return sum((checked.captions for checked in self.checked), Counter())

    def total(self, name: str) -> int:
        return sum(getattr(checked, name) for checked in self.checked)


def check_data(names: Sequence[str], caption_keys: tuple[str, ...] = (), decode: bool = False, workers: int = 0) -> CheckReport:
    """Check all shards and folders that `names` stand for, with a progress bar. Raises ValueError: no such data, or OpenMoji."""
    data = _find_data(names, "data")
    if any(part.openmoji for part in data):
        raise ValueError("openmoji is part of the package and is not checked; name shards or folders of images")
    shards, folders, missing = (_distinct(data, kind) for kind in ("tars", "folders", "missing"))
    checked = _map_shards(functools.partial(check_shard, caption_keys=caption_keys, decode=decode), shards, workers, "checking")
    checked += [check_folder(folder, decode, track) for folder in folders]
    checked += [Checked(path, problems=[{"key": path, "reason": "missing", "detail": "no such shard"}]) for path in missing]
    if unused := [problem for part in data for problem in part.unused]:
        checked.append(Checked("beside the shards", problems=unused))
    return CheckReport(len(shards) + len(missing), len(folders), checked)


def check_shard(shard: str, caption_keys: tuple[str, ...] = (), decode: bool = False) -> Checked:
    """Check a shard: its tar, and of each sample the members, the JSON, the captions, and with `decode` the image."""
    checked = Checked(shard)
    label = Path(shard).name.removesuffix(".tar")
    try:
        stamp = _stamp(shard)
        with local_copy(shard, stamp) as path:
            index = scan(path)
            checked.problems = [{**p, "key": f"{label}/{p['key']}" if p["key"] else shard} for p in index.problems]
            if index.count:
                source = ShardSource(Tars([path], [label], indexes=[index]), caption_keys)
                no_caption = f"none of {', '.join(caption_keys)}" if caption_keys else "the .txt member is missing or blank"
                _check_samples(source, checked, no_caption, decode)
        checked.samples, checked.bytes = index.count, stamp.size
        return checked
    except FileNotFoundError:
        return Checked(shard, problems=[{"key": shard, "reason": "missing", "detail": "no such shard"}])
    except Exception as error:  # see write_index
        reason = error.reason if isinstance(error, ImageError) else "unreadable"
        return Checked(shard, problems=[{"key": shard, "reason": reason, "detail": _on_one_line(error)}])


def check_folder(folder: str, decode: bool = False, watch: Watch = plain) -> Checked:
    """Check a folder of images: the captions of each, with `decode` the image, and the files that are not read."""
    checked = Checked(folder)
    try:
        source = FolderSource(folder)
    except (ValueError, OSError) as error:
        checked.add("no images", _on_one_line(error))
        return checked
    checked.problems = list(source.problems)
    _check_samples(source, checked, "no text of that name, and no row in a table", decode, watch)
    checked.samples, checked.bytes = len(source), sum(os.path.getsize(path) for path in source.files() if os.path.exists(path))
    return checked


def _check_samples(source: ShardSource | FolderSource, checked: Checked, no_caption: str, decode: bool, watch: Watch = plain) -> None:
    """Add the problems of all samples to `checked`, and count those without one; `no_caption` is the detail of a sample without a caption."""
    for sample in watch(range(len(source)), "checking"):
        before, key = len(checked.problems), source.key(sample)
        try:
            if isinstance(source, ShardSource) and source.broken_json(sample):
                checked.add("broken JSON", "empty, cut off or not an object", key)
            try:
                captions = source.captions(sample)
                if len(captions) > 1:
                    checked.captions[len(captions)] += 1
                if not captions and (label := source.value(sample)) is not None:
                    checked.add("class but no caption", f"class {label:.60}: it serves zeroshot, probe and generation from labels, not pre-training", key)
                elif not captions:
                    checked.add("no caption", no_caption, key)
            except TextError as error:
                checked.add(error.reason, str(error), key)
            data = source.data(sample)
            if decode:
                open_image(data)
                if damage := damage_seen():
                    checked.add(**damage, key=key)
            elif not (data.stat().st_size if isinstance(data, Path) else len(data)):
                checked.add("empty", "the image file holds 0 bytes", key)
        except (ImageError, OSError) as error:
            checked.add(error.reason if isinstance(error, ImageError) else "unreadable", str(error), key)
        checked.usable += len(checked.problems) == before


def _stamp(shard: str) -> Stamp:
    return remote_stamp(shard) if is_remote(shard) else stamp_of(os.stat(shard))


@contextlib.contextmanager
def local_copy(shard: str, stamp: Stamp) -> Iterator[str]:
    """The path of the shard, or of a copy of a remote one, which is deleted afterwards."""
    if not is_remote(shard):
        yield shard
        return
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        fetch(shard, file.fileno(), stamp)
        yield file.name


def _on_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _find_data(names: Sequence[str], what: str) -> list[NamedData]:
    """What the names stand for. Raises ValueError for one that stands for nothing."""
    if not names:
        raise ValueError(f"no {what} named; name some, such as data/{{00000..00009}}.tar")
    return [find(name) for name in names]


def _distinct(data: list[NamedData], kind: str) -> list[str]:
    return list(dict.fromkeys(path for part in data for path in getattr(part, kind)))


def _map_shards(work: Callable[[str], T], shards: list[str], workers: int, what: str) -> list[T]:
    """`work` on every shard, in processes where there are several shards, with a progress bar."""
    workers = min(workers or cores(), len(shards))
    if workers <= 1 or len(shards) < 4:
        return list(track(map(work, shards), what, len(shards))) if shards else []
    # Forked before the bar starts its thread: a new interpreter would take seconds to import torch.
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")) as pool:
            return list(track(pool.map(work, shards), what, len(shards)))
    except BrokenProcessPool as error:
        raise ValueError(f"a process ended while {what}, most likely because memory ran out; take fewer --workers") from error
