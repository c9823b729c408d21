"""Members of many shards by number: which tar, where in it, and how to get there without opening it anew each time."""

from __future__ import annotations

import bisect
import itertools
import os
from collections import OrderedDict
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
"""Descriptors kept by a process, well under the 1,024 that many systems allow."""
WINDOW = 16
"""Remote shards that are read at a time; a cache must hold as many."""

Watch = Callable[[Iterable, str], Iterable]
"""goes through items, and shows how far it is"""


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
    """All samples of some shards, numbered through. In memory stand a few numbers a shard, where the shards have indexes.

    `found` gives indexes that are at hand. A local shard without an index, or with one of another state of the tar, is scanned.
    A remote one needs an index, and a cache to be fetched into. Reading is safe in threads and after a fork.

    Raises:
        ValueError: a remote shard without an index or a cache, or a cache too small to read from.
    """

    def __init__(
        self,
        paths: list[str],
        names: list[str] | None = None,
        *,
        index: str = "",
        cache: ShardCache | None = None,
        watch: Watch = plain,
        found: list[ShardIndex] | None = None,
    ):
        self.paths = paths
        self.labels = [name.removesuffix(".tar") for name in names or labels(paths)]
        self.cache = cache
        self.remote = any(map(is_remote, paths))
        self.problems = Problems()
        self._indexes: list[ShardIndex | IndexFile] = []
        self._mapped: OrderedDict[int, ShardIndex] = OrderedDict()
        self._tars: OrderedDict[int, _OpenTar] = OrderedDict()
        self._extra: tuple[int, str, dict[str, tuple[int, int]]] = (-1, "", {})
        if index and not Path(index).is_dir():
            raise ValueError(f"no folder of indexes at {index}; make it with: openvision3 data index SHARDS --index {index}")
        with ThreadPoolExecutor(16) as pool:  # on a network file system nearly all of this is waiting
            opened = ((each, "") for each in found) if found else pool.map(lambda path: _open_index(path, index), paths)
            for path, label, (each, why) in zip(paths, self.labels, watch(opened, "opening shards"), strict=True):
                self._indexes.append(each)
                if why:
                    self.problems.add({"key": path, "reason": "stale index", "detail": f"{why}; the shard was scanned"})
                self.problems.extend({**p, "key": f"{label}/{p['key']}" if p["key"] else path} for p in each.problems)
        counts = [each.count if isinstance(each, IndexFile) else len(each) for each in self._indexes]
        self.starts: list[int] = [0, *itertools.accumulate(counts)]
        if self.remote:
            self.check_cache()

    def check_cache(self, lanes: int = 1) -> None:
        """Raises ValueError where there is no cache, or one too small for what this machine reads at a time: WINDOW shards, or one a lane."""
        if self.cache is None:
            raise ValueError(
                f"remote shards such as {next(filter(is_remote, self.paths))} are fetched whole: name a folder with --cache and its bound with --cache-gb"
            )
        sizes = sorted((found.stamp.size for path, found in zip(self.paths, self._indexes, strict=True) if is_remote(path)), reverse=True)
        at_once = max(WINDOW, lanes)
        needed = sum(sizes[:at_once])
        if needed > self.cache.limit:
            raise ValueError(
                f"cache_gb {self.cache.limit / 1e9:g} is too small: {len(sizes[:at_once])} shards are read at a time, the largest "
                f"of {sizes[0] / 1e9:.3g} GB; at least {needed / 1e9 + 0.0005:.3f} GB are needed, twice that is better"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": OrderedDict(), "_tars": OrderedDict(), "_extra": (-1, "", {})}

    def __len__(self) -> int:
        return self.starts[-1]

    def _find(self, number: int) -> tuple[int, int, ShardIndex]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = bisect.bisect_right(self.starts, number) - 1
        found = self._indexes[shard]
        return shard, number - self.starts[shard], self._map(shard, found) if isinstance(found, IndexFile) else found

    def _map(self, shard: int, head: IndexFile) -> ShardIndex:
        mapped = self._mapped.pop(shard, None)
        if mapped is None:
            try:
                mapped = head.load()
            except (OSError, ValueError) as error:
                raise ImageError("unreadable", f"the index {head.file.path} can no longer be read: {error}") from error
        self._mapped[shard] = mapped
        if len(self._mapped) > OPEN_INDEXES:
            self._mapped.popitem(last=False)
        return mapped

    def facts(self) -> list[tuple[int, int]]:
        """(bytes, samples) of each shard: what is known of all of them without reading any."""
        return [(index.stamp.size, self.starts[i + 1] - self.starts[i]) for i, index in enumerate(self._indexes)]

    def name(self, number: int) -> str:
        """Of a sample, within its shard."""
        _, sample, index = self._find(number)
        return index.name(sample)

    def key(self, number: int) -> str:
        shard, sample, index = self._find(number)
        return f"{self.labels[shard]}/{index.name(sample)}"

    def read(self, number: int, kind: str) -> bytes | None:
        """The bytes of a member, None where the sample has none of this kind.

        Raises:
            ImageError: the shard has `vanished` or `changed` since it was opened, or is `unreadable`. TextError: a text `too large`.
        """
        shard, sample, index = self._find(number)
        place = index.member(sample, kind)
        if place is None:
            return None
        if kind != "picture" and place[1] > captions.MAX_BYTES:
            raise captions.too_large(f"the .{kind} member")
        path = self.paths[shard]
        if sum(place) > index.stamp.size:
            raise ImageError("unreadable", f"the index of {path} is damaged: it names a place behind its end; run: openvision3 data index --again")
        if is_remote(path):
            assert self.cache is not None
            with self.cache.reading(path, index.stamp) as descriptor:
                return _read(descriptor, *place, path)
        return self._read_local(shard, path, index.stamp, *place)

    def extra(self, number: int, extension: str) -> bytes | None:
        """The bytes of a member that no index lists, such as `cls`, None where the sample has none.

        Its place comes from the headers of the tar, read once for all samples of a shard that are asked for in a row.

        Raises:
            ImageError: as `read`. ValueError: the shard is remote.
        """
        shard, sample, index = self._find(number)
        path = self.paths[shard]
        if is_remote(path):
            raise ValueError(f"the .{extension} members of {path} cannot be read from afar; copy the shard here, or name a JSON field")
        if self._extra[:2] != (shard, extension):
            try:
                self._extra = (shard, extension, extra_members(path, extension))
            except OSError as error:
                raise ImageError("unreadable", f"{path} cannot be read: {error}") from error
        place = self._extra[2].get(index.name(sample))
        return None if place is None else self._read_local(shard, path, index.stamp, *place)

    def _read_local(self, shard: int, path: str, stamp: Stamp, offset: int, size: int) -> bytes:
        try:
            tar = self._tars.pop(shard, None) or _OpenTar(path)
            status = os.fstat(tar.descriptor)
        except FileNotFoundError as error:
            raise ImageError("vanished", f"{path} is no longer there") from error
        except OSError as error:
            raise ImageError("unreadable", f"{path} cannot be read: {error}") from error
        if not status.st_nlink:  # deleted under our hands: what it still gives ends with the next worker
            raise ImageError("vanished", f"{path} is no longer there")
        if not stamp.matches(stamp_of(status)):
            raise ImageError("changed", f"{path} was written to since its index was made; run: openvision3 data index")
        self._tars[shard] = tar
        if len(self._tars) > OPEN_TARS:
            self._tars.popitem(last=False)
        return _read(tar.descriptor, offset, size, path)


def _read(descriptor: int, offset: int, size: int, path: str) -> bytes:
    # pread: a position of its own, so that forked workers may share the descriptor
    try:
        data = os.pread(descriptor, size, offset)
        while len(data) < size:
            more = os.pread(descriptor, size - len(data), offset + len(data))
            if not more:
                raise ImageError("unreadable", f"{path} ends at {offset + len(data):,} bytes, inside a member")
            data += more
    except OSError as error:
        raise ImageError("unreadable", f"{path} cannot be read: {error}") from error
    return data


def _open_index(path: str, folder: str) -> tuple[ShardIndex | IndexFile, str]:
    """(index, why its file is not used, if there is one). A file that does not fit the tar is written anew."""
    place = index_path(path, folder)
    if is_remote(path):
        head, why = fresh_index(place, None) if folder else (None, "")
        if head is None:
            where = folder or "FOLDER"
            raise ValueError(
                f"{path} has no index{f' in {folder}' if folder else ''}{f' ({why})' if why else ''}; "
                f"make it with: openvision3 data index SHARDS --index {where}, then name it with --index {where}"
            )
        return head, ""
    try:
        now = stamp_of(os.stat(path))
    except OSError:
        return scan(path), ""  # it says what is wrong
    head, why = fresh_index(place, now)
    if head is not None:
        return head, ""
    found = scan(path)
    if why and found.is_of_a_tar:
        try:
            found.save(place)
            why = ""
        except OSError as error:
            why = f"{why}, and cannot be written anew: {error.strerror or error}"
    return found, why


def labels(paths: list[str]) -> list[str]:
    """The shortest ends of the paths that tell unlike paths apart, for keys that do not depend on where the data lies."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    labels: list[str] = []
    for length in range(1, max(map(len, parts), default=0) + 1):
        labels = ["/".join(p[-length:]) for p in parts]
        if len(set(labels)) == len(set(parts)):
            break
    return labels
