"""Members of many shards by number: which tar, where in it, and how to read it without opening it each time."""

from __future__ import annotations

import bisect
import functools
import itertools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openvision3.data import captions
from openvision3.data.images import ImageError
from openvision3.data.problems import Problems
from openvision3.data.shards.index import IndexFile, ShardIndex, Stamp, extra_members, fresh_index, index_path, is_remote, scan, stamp_of
from openvision3.data.shards.remote import ShardCache

OPEN_TARS = 64
OPEN_INDEXES = 128
"""Descriptors that a process keeps, well under the 1,024 that many systems allow."""
WINDOW = 16
"""Remote shards that are read at a time; a shard cache must hold as many."""

Watch = Callable[[Iterable, str], Iterable]
"""iterates over items, and shows the progress"""


def plain(items: Iterable, what: str) -> Iterable:
    return items


class _OpenTar:
    """A descriptor that is closed when nobody uses it any more: one thread may read while another opens the next tar."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Tars:
    """All samples of some shards, numbered consecutively. Memory holds a few numbers for each shard that has an index.

    A local shard without an index that fits it is scanned, unless `indexes` gives the indexes of all shards. A remote shard needs an
    index, and a cache to be fetched into. Threads and forked processes may read at the same time.

    Raises:
        ValueError: a remote shard without an index or a cache, or a cache that is too small.
    """

    def __init__(
        self,
        paths: list[str],
        names: list[str] | None = None,
        *,
        index: str = "",
        cache: ShardCache | None = None,
        watch: Watch = plain,
        indexes: list[ShardIndex] | None = None,
    ):
        self.paths = paths
        self.labels = [name.removesuffix(".tar") for name in names or labels(paths)]
        self.cache = cache
        self.remote = any(map(is_remote, paths))
        self.problems = Problems()
        self._indexes: list[ShardIndex | IndexFile] = []
        self._open_caches()
        if index and not Path(index).is_dir():
            raise ValueError(f"no folder of indexes at {index}; write it with: openvision3 data index SHARDS --index {index}")
        with ThreadPoolExecutor(16) as pool:  # on a network file system nearly all of this is waiting
            opened = ((shard_index, "") for shard_index in indexes) if indexes else pool.map(lambda path: _open_index(path, index), paths)
            for path, label, (shard_index, why) in zip(paths, self.labels, watch(opened, "opening shards"), strict=True):
                self._indexes.append(shard_index)
                if why:
                    self.problems.add({"key": path, "reason": "stale index", "detail": f"{why}; the shard was scanned"})
                self.problems.extend({**p, "key": f"{label}/{p['key']}" if p["key"] else path} for p in shard_index.problems)
        self.starts: list[int] = [0, *itertools.accumulate(shard_index.count for shard_index in self._indexes)]
        if self.remote:
            self.check_cache()

    def _open_caches(self) -> None:
        self._open_tar = functools.lru_cache(OPEN_TARS)(_OpenTar)
        self._load_index = functools.lru_cache(OPEN_INDEXES)(IndexFile.load)
        self._scan_members = functools.lru_cache(OPEN_INDEXES)(extra_members)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open_tar", "_load_index", "_scan_members")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open_caches()

    def check_cache(self, lanes: int = 1) -> None:
        """Raises ValueError if there is no cache, or it cannot hold what this machine reads at a time: WINDOW shards, or one for each lane."""
        if self.cache is None:
            first = next(filter(is_remote, self.paths))
            raise ValueError(f"remote shards such as {first} are fetched whole: name a folder with --cache and its largest size with --cache-gb")
        sizes = sorted((index.stamp.size for path, index in zip(self.paths, self._indexes, strict=True) if is_remote(path)), reverse=True)
        at_once = sizes[: max(WINDOW, lanes)]
        if sum(at_once) > self.cache.limit:
            raise ValueError(
                f"cache_gb {self.cache.limit / 1e9:g} is too small: {len(at_once)} shards are read at a time, the largest of {sizes[0] / 1e9:.3g} GB; "
                f"at least {sum(at_once) / 1e9 + 0.0005:.3f} GB are needed, twice that is better"
            )

    def __len__(self) -> int:
        return self.starts[-1]

    def _find(self, number: int) -> tuple[int, int, ShardIndex]:
        """(shard, sample within it, index of the shard). Raises ImageError."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = bisect.bisect_right(self.starts, number) - 1
        index = self._indexes[shard]
        if isinstance(index, IndexFile):
            try:
                index = self._load_index(index)
            except (OSError, ValueError) as error:
                raise ImageError("unreadable", f"the index of {self.paths[shard]} can no longer be read: {error}") from error
        return shard, number - self.starts[shard], index

    def facts(self) -> list[tuple[int, int]]:
        """(bytes, samples) of each shard, known without reading any."""
        return [(index.stamp.size, index.count) for index in self._indexes]

    def name(self, number: int) -> str:
        """Of a sample, within its shard."""
        _, sample, index = self._find(number)
        return index.name(sample)

    def key(self, number: int) -> str:
        shard, sample, index = self._find(number)
        return f"{self.labels[shard]}/{index.name(sample)}"

    def read(self, number: int, kind: str) -> bytes | None:
        """The bytes of a member, None if the sample has none of this kind.

        Raises:
            ImageError: the shard has `vanished` or `changed` since it was opened, or is `unreadable`. TextError: a text is `too large`.
            ValueError: a remote shard whose index does not list members of this kind.
        """
        shard, sample, index = self._find(number)
        path = self.paths[shard]
        place = index.member(sample, kind) if kind in index.kinds else self._unlisted(path, index.name(sample), kind)
        if place is None:
            return None
        if kind != "image" and place[1] > captions.MAX_BYTES:
            raise captions.too_large(f"the .{kind} member")
        if sum(place) > index.stamp.size:
            raise ImageError("unreadable", f"the index of {path} is damaged: it names a place behind its end; run: openvision3 data index --again")
        if is_remote(path):
            assert self.cache is not None
            with self.cache.reading(path, index.stamp) as descriptor:
                return _read(descriptor, *place, path)
        return self._read_local(path, index.stamp, *place)

    def _unlisted(self, path: str, name: str, kind: str) -> tuple[int, int] | None:
        """(offset, size) of a member that the index does not list, None if the sample has none: from the headers of the tar, read once for many samples."""
        if is_remote(path):
            raise ValueError(
                f"the index of {path} lists no .{kind} members: name a field of the JSON with --label-key; if the shards have .{kind} members, "
                "the index is of an older version: write it again with openvision3 data index SHARDS --index FOLDER --again"
            )
        try:
            members = self._scan_members(path, kind)
            if members:
                detail = f"it does not list .{kind} members, which makes reading them slow; run: openvision3 data index --again"
                self.problems.add({"key": path, "reason": "stale index", "detail": detail})
            return members.get(name)
        except FileNotFoundError as error:
            raise ImageError("vanished", f"{path} no longer exists") from error
        except OSError as error:
            raise ImageError("unreadable", f"{path} cannot be read: {error}") from error

    def _read_local(self, path: str, stamp: Stamp, offset: int, size: int) -> bytes:
        try:
            tar = self._open_tar(path)
            status = os.fstat(tar.descriptor)
        except FileNotFoundError as error:
            raise ImageError("vanished", f"{path} no longer exists") from error
        except OSError as error:
            raise ImageError("unreadable", f"{path} cannot be read: {error}") from error
        if not status.st_nlink:  # deleted while it is open: what it still gives ends with the next worker
            self._open_tar.cache_clear()
            raise ImageError("vanished", f"{path} no longer exists")
        if not stamp.matches(stamp_of(status)):
            self._open_tar.cache_clear()
            raise ImageError("changed", f"{path} has changed since its index was written; run: openvision3 data index")
        return _read(tar.descriptor, offset, size, path)


def _read(descriptor: int, offset: int, size: int, path: str) -> bytes:
    try:
        data = os.pread(descriptor, size, offset)  # pread has no position, so that forked workers may share the descriptor
        while len(data) < size:
            more = os.pread(descriptor, size - len(data), offset + len(data))
            if not more:
                raise ImageError("unreadable", f"{path} ends at {offset + len(data):,} bytes, inside a member")
            data += more
    except OSError as error:
        raise ImageError("unreadable", f"{path} cannot be read: {error}") from error
    return data


def _open_index(path: str, folder: str) -> tuple[ShardIndex | IndexFile, str]:
    """(index, why its file is not used, if there is one). A file that does not fit the tar is replaced."""
    place = index_path(path, folder)
    if is_remote(path):
        head, why = fresh_index(place, None) if folder else (None, "")
        if head is None:
            raise ValueError(
                f"{path} has no index{f' in {folder}' if folder else ''}{f' ({why})' if why else ''}; "
                f"write it with: openvision3 data index SHARDS --index {folder or 'FOLDER'}, then name it with --index {folder or 'FOLDER'}"
            )
        return head, ""
    try:
        now = stamp_of(os.stat(path))
    except OSError:
        return scan(path), ""  # which reports what is wrong
    head, why = fresh_index(place, now)
    if head is not None:
        return head, ""
    index = scan(path)
    if why and index.is_of_a_tar:
        try:
            index.save(place)
            why = ""
        except OSError as error:
            why = f"{why}, and cannot be replaced: {error.strerror or error}"
    return index, why


def labels(paths: list[str]) -> list[str]:
    """The shortest ends of the paths that differ for different paths, so that keys do not depend on where the data are."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    labels: list[str] = []
    for length in range(1, max(map(len, parts), default=0) + 1):
        labels = ["/".join(p[-length:]) for p in parts]
        if len(set(labels)) == len(set(parts)):
            break
    return labels
