"""Index each shard once, so that opening thousands of them is fast: where each member lies, in a file beside the tar.

An index is a safetensors file: arrays that are mapped, not loaded, and a header that says which tar it belongs to. About 45
bytes a sample and its key: 5 GB on disk for 100 million samples, and next to nothing in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from openvision3.data.shards.members import NAMED, Problem, TarScan, is_image, unusable
from openvision3.data.tensor_file import TensorFile
from openvision3.files import write_whole

FORMAT = "openvision3 shard index 2"
KINDS = ("image", "txt", "json", "cls")
"""The members of a sample that are read; its image is the first member with an image's extension. The index of a shard without `.cls` members
lacks their column, as do indexes of older versions, which did not list them."""


@dataclass(frozen=True)
class Stamp:
    """The state of a tar that an index describes. `etag` is the version as a remote place gives it."""

    size: int
    mtime_ns: int = 0
    etag: str = ""

    def matches(self, now: Stamp) -> bool:
        """Whether the sizes are equal, and each other value that both have."""
        return self.size == now.size and all(not a or not b or a == b for a, b in ((self.mtime_ns, now.mtime_ns), (self.etag, now.etag)))


def stamp_of(status: os.stat_result) -> Stamp:
    return Stamp(status.st_size, status.st_mtime_ns)


@dataclass
class ShardIndex:
    """The samples of one shard in the order of the tar.

    `offsets` and `sizes`, (N, 4) or (N, 3), say where the members of KINDS lie; offset 0 means that there is none. Sample i has the name
    `names[name_ends[i - 1]:name_ends[i]]`. The keys of `problems` lack the shard's label.
    """

    stamp: Stamp
    offsets: np.ndarray
    sizes: np.ndarray
    name_ends: np.ndarray
    names: np.ndarray
    problems: list[Problem] = field(default_factory=list)
    read_error: str = ""
    """why the disk did not give all of the tar; such an index is not saved"""

    def __len__(self) -> int:
        return self.count

    @property
    def count(self) -> int:
        return len(self.offsets)

    def name(self, sample: int) -> str:
        start = int(self.name_ends[sample - 1]) if sample else 0
        return bytes(self.names[start : int(self.name_ends[sample])]).decode("utf-8", "surrogateescape")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The members that it lists."""
        return KINDS[: self.offsets.shape[1]]

    def member(self, sample: int, kind: str) -> tuple[int, int] | None:
        """(offset, size) of a member, None if the sample has none, or none that is listed."""
        column = KINDS.index(kind)
        offset = int(self.offsets[sample, column]) if kind in self.kinds else 0
        return (offset, int(self.sizes[sample, column])) if offset else None

    @property
    def is_of_a_tar(self) -> bool:
        """Whether the file was a tar, and not a web page or another archive under a name that ends in .tar."""
        return not self.read_error and (len(self) > 0 or not any(problem["reason"] == "damaged shard" for problem in self.problems))

    def save(self, path: str | Path) -> None:
        """Raises OSError; then no file is left."""
        from safetensors.numpy import save

        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in ARRAYS}
        head = {FORMAT: json.dumps({"stamp": asdict(self.stamp), "problems": self.problems})}  # one entry, because safetensors keeps no order of several
        write_whole(path, save(arrays, head))


ARRAYS = {"offsets": "U64", "sizes": "U32", "name_ends": "U32", "names": "U8"}
"""The arrays of an index file, with their safetensors types."""


@dataclass(frozen=True, eq=False)
class IndexFile:
    """An index file of which only the header has been read."""

    file: TensorFile
    count: int
    stamp: Stamp
    problems: list[Problem]

    def load(self) -> ShardIndex:
        """Map the arrays. Raises OSError, ValueError."""
        arrays = self.file.map()
        return ShardIndex(self.stamp, arrays["offsets"], arrays["sizes"], arrays["name_ends"], arrays["names"], self.problems)


def read_head(path: str | Path) -> IndexFile:
    """Read the header of an index file. Raises OSError; ValueError if it is no whole index."""
    file = TensorFile(path)
    try:
        if FORMAT not in file.metadata:
            raise ValueError(f"it is of another version: {', '.join(file.metadata)[:NAMED]}, not {FORMAT}")
        notes = json.loads(file.metadata[FORMAT])
        if {name: place.dtype for name, place in file.places.items()} != ARRAYS:
            raise ValueError("its arrays are of another kind")
        (count,) = file.places["name_ends"].shape
        shape = file.places["offsets"].shape
        if shape not in ((count, len(KINDS)), (count, len(KINDS) - 1)) or file.places["sizes"].shape != shape:
            raise ValueError("its arrays differ in length")
        return IndexFile(file, count, Stamp(**notes["stamp"]), notes["problems"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole shard index ({error or type(error).__name__})") from error


def index_path(shard: str, folder: str = "") -> Path:
    """The index of `shard`: beside it, or in `folder` under a name that no other shard has."""
    if not folder:
        return Path(shard + ".index")
    where = shard if is_remote(shard) else os.path.abspath(shard)
    return Path(folder) / f"{Path(shard).name}.{hashlib.blake2b(os.fsencode(where), digest_size=6).hexdigest()}.index"


def is_remote(path: str) -> bool:
    return "://" in path


def scan(path: str | Path, stamp: Stamp | None = None) -> ShardIndex:
    """Index a tar from its headers. Of a tar that is cut off, the whole samples are indexed, and `problems` says so.

    `path` may be a copy of the tar that `stamp` describes.
    """
    tar, read_error = TarScan(path), ""
    try:
        tar.read()
    except OSError as error:
        tar.damage = read_error = str(error)
    problems = [*tar.duplicates, *tar.problems(len(tar.samples))]
    if not tar.samples and not problems:
        problems.append({"key": "", "reason": "empty shard", "detail": "no members"})
    rows: list[list[tuple[int, int]]] = []
    names: list[bytes] = []
    for stem, members in tar.samples.items():
        if problem := unusable(stem, members):
            problems.append(problem)
        images = [extension for extension in members if is_image(extension)]
        if not images:
            continue
        row = [(member.offset, member.size) if member else (0, 0) for member in (members[images[0]], *map(members.get, KINDS[1:]))]
        if max(length for _, length in row) >= 2**32:
            problems.append({"key": stem, "reason": "too large", "detail": "a member of 4 GiB or more"})
            continue
        rows.append(row)
        names.append(stem.encode("utf-8", "surrogateescape"))
    table = np.array(rows, dtype=np.uint64).reshape(len(rows), len(KINDS), 2)
    if not table[:, -1].any():
        table = table[:, :-1]
    ends = np.cumsum([len(name) for name in names], dtype=np.uint32)
    joined = np.frombuffer(b"".join(names), np.uint8)
    stamp = stamp or (stamp_of(tar.status) if tar.status else Stamp(0))
    return ShardIndex(stamp, table[..., 0], table[..., 1].astype(np.uint32), ends, joined, problems, read_error)


def extra_members(path: str | Path, extension: str) -> dict[str, tuple[int, int]]:
    """{sample name: (offset, size)} of the members of this extension, which no index lists, from the headers of a tar. Raises OSError."""
    return {stem: (members[extension].offset, members[extension].size) for stem, members in TarScan(path).read().samples.items() if extension in members}


def fresh_index(path: str | Path, now: Stamp | None) -> tuple[IndexFile | None, str]:
    """(the index file, "") if it is whole and describes this state of the tar (any state if `now` is None), else (None, why not).

    The reason is "" if there is no such file.
    """
    try:
        head = read_head(path)
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, str(error)
    if now is not None and not head.stamp.matches(now):
        return None, f"{path} was written for another state of the shard ({head.stamp.size:,} bytes then, {now.size:,} now)"
    return head, ""
