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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from openvision3.data.captions import TextError
from openvision3.data.folders import FolderSource
from openvision3.data.images import ImageError, damage_seen, open_image
from openvision3.data.names import NamedData, find
from openvision3.data.shards.index import Problem, ShardIndex, Stamp, fresh_index, index_path, is_remote, scan, stamp_of
from openvision3.data.shards.remote import fetch, remote_stamp
from openvision3.data.shards.source import ShardSource
from openvision3.data.shards.tars import Tars, Watch, plain
from openvision3.device import cores
from openvision3.progress import track

T = TypeVar("T")


@dataclass
class Indexed:
    """What `write_index` did with one shard; `error` where it could not."""

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
    """Write the index of a shard, unless there is one that fits; of a remote shard into `folder`, from a copy that is deleted."""
    try:
        now = remote_stamp(shard) if is_remote(shard) else stamp_of(os.stat(shard))
        place = index_path(shard, folder)
        head, _ = (None, "") if again else fresh_index(place, now)
        if head is not None and head.count:
            return Indexed(shard, head.count, now.size, False, _named(head.problems, shard))
        with local_copy(shard, now) as path:
            found = scan(path, now)
        if not found.is_of_a_tar:
            return Indexed(shard, error=_why_none(found))
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
        found.save(place)
        if not len(found):
            return Indexed(shard, error=_why_none(found))
        return Indexed(shard, len(found), now.size, True, _named(found.problems, shard))
    except Exception as error:  # of one shard among thousands; remote places raise what they like
        return Indexed(shard, error=_line(error))


def _why_none(index: ShardIndex) -> str:
    return "no usable sample: " + "; ".join(f"{problem['reason']}: {problem['detail']}" for problem in index.problems[:3])


def _named(problems: list[Problem], shard: str) -> tuple[Problem, ...]:
    return tuple({**p, "key": f"{shard} {p['key']}".rstrip()} for p in problems)


@dataclass
class Checked:
    """What `check_shard` or `check_folder` saw: samples, how many of them can be trained on, and every problem."""

    shard: str
    samples: int = 0
    usable: int = 0
    bytes: int = 0
    problems: tuple[Problem, ...] = ()
    captions: dict[int, int] = field(default_factory=dict)
    """number of captions, where a sample has several: samples that have so many"""


@dataclass
class CheckReport:
    """What `check_data` saw."""

    shards: int
    folders: int
    checked: list[Checked]

    @property
    def problems(self) -> list[Problem]:
        return [problem for checked in self.checked for problem in checked.problems]

    @property
    def captions(self) -> Counter[int]:
        return sum((Counter(checked.captions) for checked in self.checked), Counter())

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
    checked += [Checked(path, problems=({"key": path, "reason": "missing", "detail": "no such shard"},)) for path in missing]
    if unused := tuple(problem for part in data for problem in part.unused):
        checked.append(Checked("beside the shards", problems=unused))
    return CheckReport(len(shards) + len(missing), len(folders), checked)


def check_shard(shard: str, caption_keys: tuple[str, ...] = (), decode: bool = False) -> Checked:
    """Look at every sample of a shard: the tar whole, members paired, JSON readable, captions there, with `decode` pictures too."""
    label = Path(shard).name.removesuffix(".tar")
    try:
        now = remote_stamp(shard) if is_remote(shard) else stamp_of(os.stat(shard))
        with local_copy(shard, now) as path:
            index = scan(path)
            problems = [{**p, "key": f"{label}/{p['key']}" if p["key"] else shard} for p in index.problems]
            several: Counter[int] = Counter()
            usable = 0
            if len(index):
                without = f"none of {', '.join(caption_keys)}" if caption_keys else "the .txt member is missing or blank"
                usable = _usable(ShardSource(Tars([path], [label], indexes=[index]), caption_keys), without, decode, problems, several)
        return Checked(shard, len(index), usable, now.size, tuple(problems), dict(several))
    except FileNotFoundError:
        return Checked(shard, problems=({"key": shard, "reason": "missing", "detail": "no such shard"},))
    except Exception as error:  # see write_index
        reason = error.reason if isinstance(error, ImageError) else "unreadable"
        return Checked(shard, problems=({"key": shard, "reason": reason, "detail": _line(error)},))


def check_folder(folder: str, decode: bool = False, watch: Watch = plain) -> Checked:
    """Look at every image of a folder: captions there, with `decode` images too; and what lies there and is not read."""
    try:
        source = FolderSource(folder)
    except (ValueError, OSError) as error:
        return Checked(folder, problems=({"key": folder, "reason": "no images", "detail": _line(error)},))
    problems, several = list(source.problems), Counter[int]()
    usable = _usable(source, "no text of that name, and no row in a table", decode, problems, several, watch)
    size = sum(os.path.getsize(path) for path in source.files() if os.path.exists(path))
    return Checked(folder, len(source), usable, size, tuple(problems), dict(several))


def _usable(source: ShardSource | FolderSource, without: str, decode: bool, problems: list[Problem], several: Counter[int], watch: Watch = plain) -> int:
    """How many samples have no flaw; flaws go to `problems`, `without` is the detail of one that has no caption."""
    good = 0
    for sample in watch(range(len(source)), "checking"):
        before = len(problems)

        def note(reason: str, detail: str, key: str = source.key(sample)) -> None:
            problems.append({"key": key, "reason": reason, "detail": detail})

        try:
            if isinstance(source, ShardSource) and source.broken_json(sample):
                note("broken JSON", "empty, cut off or not an object")
            try:
                captions = source.captions(sample)
                several.update([len(captions)] if len(captions) > 1 else [])
            except TextError as error:
                captions = None
                note(error.reason, str(error))
            if captions == () and (label := source.value(sample)) is not None:
                note("class but no caption", f"class {label:.60}: it serves zeroshot and probe, not training")
            elif captions == ():
                note("no caption", without)
            data = source.data(sample)
            if decode:
                open_image(data)
                if damage := damage_seen():
                    note(**damage)
            elif not (data.stat().st_size if isinstance(data, Path) else len(data)):
                note("empty", "the picture holds 0 bytes")
        except (ImageError, OSError) as error:
            note(error.reason if isinstance(error, ImageError) else "unreadable", str(error))
        good += len(problems) == before
    return good


@contextlib.contextmanager
def local_copy(shard: str, stamp: Stamp) -> Iterator[str]:
    """The shard itself, or a remote one fetched to a file that is deleted afterwards."""
    if not is_remote(shard):
        yield shard
        return
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        fetch(shard, file.fileno(), stamp)
        yield file.name


def _line(error: Exception) -> str:
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
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")) as pool:
        return list(track(pool.map(work, shards), what, len(shards)))
