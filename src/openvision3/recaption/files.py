"""What recaptioning reads and writes: a shard or folder, what it becomes, and the journal of an unfinished one."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from openvision3.data.captions import MAX_BYTES, Captions, TextError, clean_captions, decode_text, json_object, text_captions, too_large
from openvision3.data.folders import FolderSource
from openvision3.data.images import ImageError, open_image
from openvision3.data.shards.members import Member, Problem, TarScan, is_image, unusable
from openvision3.recaption.job import ORIGINAL

Result = dict[str, str]
"""{"caption": ...}, with "cut" if it ends at max_new_tokens, or {"kept": why the old caption stays}"""


class CaptionShard:
    """One tar: its samples, and how it is written with new captions."""

    def __init__(self, path: str, target: Path):
        self.path, self.target = path, target
        self.size = os.path.getsize(path)
        self.is_missing_members = False
        self.problems: list[Problem] = []

    def is_source_of_target(self) -> bool:
        """Whether the finished target has the first image of this shard, which is copied as it is. True where one of them cannot be read."""
        one, other = _first_image(self.path), _first_image(self.target)
        return one is None or other is None or one == other

    def open(self, name: str, caption_key: str, replace: bool) -> None:
        """Read the headers and the JSON. Raises ValueError: captions would be overwritten."""
        self.name = name
        self.size = os.path.getsize(self.path)
        tar = TarScan(self.path).read()
        self.members, self.is_missing_members = tar.members, tar.is_missing_members
        self.samples = [(stem, members) for stem, members in tar.samples.items() if any(map(is_image, members))]
        self.problems = [p | {"key": f"{self.path} {p['key']}".rstrip()} for p in tar.problems(len(self.samples))]
        if not self.samples:
            reasons = [problem for stem, members in tar.samples.items() if (problem := unusable(stem, members))]
            self.problems += [reasons[0] | {"key": self.path}] if reasons else []
            self.problems += [] if self.problems else [{"key": self.path, "reason": "empty shard", "detail": "no members"}]
        self.values: list[dict | None] = []
        """the JSON of each sample; None if it is broken"""
        with open(self.path, "rb") as file:
            for stem, members in self.samples:
                text = _read(file, members["json"]) if "json" in members else b"{}"
                values = json_object(text)
                if name in values and not replace:
                    raise ValueError(f"{self.path}: {stem} has a {name}; choose another name with --field, or overwrite it with --replace")
                is_broken = not values and text.split() not in ([b"{}"], [b"{", b"}"])
                self.values.append(None if is_broken else values)
                if ORIGINAL in values:
                    continue
                try:
                    old = _read_old_captions(file, values, members, caption_key)
                except TextError as error:  # the member itself is copied
                    self.problems.append({"key": f"{self.path} {stem}", "reason": error.reason, "detail": f"{error}; no {ORIGINAL} is written"})
                else:
                    values |= {ORIGINAL: old[0] if len(old) == 1 else list(old)} if old else {}

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, index: int) -> str:
        return self.samples[index][0]

    def image(self, index: int) -> Image.Image:
        """Raises ImageError."""
        stem, members = self.samples[index]
        if self.values[index] is None:
            raise ImageError("broken JSON", f"{self.path}: the JSON of {stem} is not an object and cannot hold a caption")
        with naming(self.path), open(self.path, "rb") as file:
            data = _read(file, next(member for extension, member in members.items() if is_image(extension)))
        return open_image(data)

    def read_captions(self, name: str) -> list[tuple[str, str]]:
        """(old caption, new caption) of each sample of the finished target; opens both shards."""
        self.open(name, "", replace=True)
        written = CaptionShard(str(self.target), self.target)
        written.open(name, "", replace=True)
        return [(" / ".join(clean_captions([values.get(ORIGINAL)])), str(values.get(name, ""))) for values in (v or {} for v in written.values)]

    def write(self, results: Sequence[Result], by: dict[str, str], out: BinaryIO) -> None:
        """Copy all members byte for byte, but the JSON, which gains its fields; a sample without JSON gets one behind its last member."""
        new: dict[int, tuple[Member, bytes]] = {}
        """{number of a member: the JSON that replaces it or comes behind it, with the member whose header it takes}"""
        numbers = {member.start: number for number, member in enumerate(self.members)}
        for (_, members), values, result in zip(self.samples, self.values, results, strict=True):
            if values is None:
                continue
            values = {k: v for k, v in values.items() if k not in (self.name, f"{self.name}_by")}
            values |= {self.name: result["caption"]} if "caption" in result else {}
            values[f"{self.name}_by"] = by | ({"kept": result["kept"]} if "kept" in result else {})
            like = members.get("json") or next(member for extension, member in members.items() if is_image(extension))
            last = like if like.extension == "json" else max(members.values(), key=lambda member: member.start)
            new[numbers[last.start]] = like, json.dumps(values).encode()
        with open(self.path, "rb") as source, tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
            for number, member in enumerate(self.members):
                replaced = number in new and member.extension == "json"
                _copy(source, tar, member.start, member.header if replaced else member.end)
                if number in new:
                    like, data = new[number]
                    tar.addfile(_json_header(source, like, len(data)), io.BytesIO(data))


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _read_old_captions(file: BinaryIO, values: dict, members: dict[str, Member], caption_key: str) -> Captions:
    """The captions that a sample has. Raises TextError."""
    if caption_key or "txt" not in members:
        return clean_captions([values.get(caption_key or "caption")])
    if members["txt"].size > MAX_BYTES:
        raise too_large("the .txt member")
    return text_captions(decode_text(_read(file, members["txt"]), "the .txt member"))


def _first_image(path: str | Path) -> bytes | None:
    """The bytes of the first image of a tar; None if there is none, or the file cannot be read."""
    with contextlib.suppress(OSError, tarfile.TarError), tarfile.open(path, "r:") as tar:
        for info in tar:
            if info.isreg() and is_image(info.name.rpartition("/")[2].partition(".")[2].lower()) and (file := tar.extractfile(info)):
                return file.read()
    return None


def _copy(source: BinaryIO, tar: tarfile.TarFile, start: int, end: int) -> None:
    """Copy bytes of a tar as they are."""
    source.seek(start)
    padding = -(end - start) % tarfile.BLOCKSIZE  # the last member of a shard that is cut off may lack its padding
    tar.offset += end - start + padding  # type: ignore[attr-defined]
    while start < end:
        piece = source.read(min(1 << 20, end - start))
        if not piece:
            raise OSError(errno.EIO, "it has become shorter", source.name)
        tar.fileobj.write(piece)  # type: ignore[union-attr]
        start += len(piece)
    tar.fileobj.write(tarfile.NUL * padding)  # type: ignore[union-attr]


def _json_header(source: BinaryIO, like: Member, size: int) -> tarfile.TarInfo:
    """The header of a JSON of `size` bytes, with name, owner and dates of the member `like`."""
    source.seek(like.header)
    with tarfile.open(fileobj=source, mode="r:") as tar:
        info = tar.next()
    assert info is not None
    if like.extension != "json":
        info.name = info.name[: -len(like.extension)] + "json"
    info.size, info.type, info.linkname = size, tarfile.REGTYPE, ""  # a file replaces a link
    info.pax_headers = {name: value for name, value in info.pax_headers.items() if name not in ("size", "path")}
    return info


class CaptionFolder:
    """A folder of images; its new captions become one `captions.jsonl`, which `FolderSource` reads."""

    is_missing_members = False

    def __init__(self, folder: str, target: Path):
        self.path, self.target = folder, target
        self.source = FolderSource(folder)
        old = [table for table in self.source.tables if Path(table).name.lower().startswith("captions.") and Path(table).name != target.name]
        if old and target.resolve().parent == Path(folder).resolve():
            raise ValueError(
                f"{folder} has {Path(old[0]).name}, whose captions would be read beside the new ones; choose another folder with --out, "
                f"then put its {target.name} in the place of {Path(old[0]).name}"
            )
        self.size = sum(os.path.getsize(path) for path in self.source.files())
        self.problems: list[Problem] = list(self.source.problems)

    def is_source_of_target(self) -> bool:
        """Whether the finished target has a row for each image of the folder."""
        rows = self.target.read_text(encoding="utf-8").splitlines()
        return [json_object(row).get("file") for row in rows] == self.source.names

    def open(self, name: str, caption_key: str, replace: bool) -> None:
        """Read the old captions. Raises ValueError: a folder has no JSON field `caption_key`."""
        if caption_key:
            raise ValueError(f"--caption-key {caption_key} is for shards; the old captions of the folder {self.path} are its .txt files or table")
        self.old: list[list[str]] = []
        for index in range(len(self)):
            try:
                self.old.append(list(self.source.captions(index)))
            except TextError as error:
                self.old.append([])
                self.problems.append({"key": self.source.key(index), "reason": error.reason, "detail": f"{error}; no {ORIGINAL} is written"})

    def __len__(self) -> int:
        return len(self.source)

    def key(self, index: int) -> str:
        return self.source.names[index]

    def image(self, index: int) -> Image.Image:
        """Raises ImageError."""
        return open_image(self.source.data(index))

    def read_captions(self, name: str) -> list[tuple[str, str]]:
        """(old caption, new caption) of each image of the finished target."""
        rows = [json_object(line) for line in self.target.read_text(encoding="utf-8").splitlines()]
        return [(" / ".join(clean_captions([row.get(ORIGINAL)])), "" if "kept" in row.get("by", {}) else str(row.get("caption"))) for row in rows]

    def write(self, results: Sequence[Result], by: dict[str, str], out: BinaryIO) -> None:
        for index, (result, old) in enumerate(zip(results, self.old, strict=True)):
            author = by | ({"kept": result["kept"]} if "kept" in result else {})
            row = {"file": self.key(index), "caption": result.get("caption", old), ORIGINAL: old, "by": author}
            out.write(json.dumps(row).encode() + b"\n")


def journal_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.journal")


class Journal:
    """The finished results of one shard: a line for each batch, on the disk before the next batch begins. One process holds it.

    Raises:
        ValueError: another process holds it.
    """

    def __init__(self, target: Path, opening: dict[str, Any]):
        self.path = journal_path(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+b", buffering=0)  # on a full disk nothing is left to write when the file is closed
        if not _lock(self.file):
            self.file.close()
            raise ValueError(f"another process is at work on {target}; let it finish, or share the shards with --shard-split RANK/WORLD")
        self.results: list[Result] = []
        self.file.seek(0)
        head, *lines = self.file.read().splitlines(keepends=True) or [b""]
        self.restarted = head.endswith(b"\n") and json_object(head) != opening
        if not head.endswith(b"\n") or self.restarted:
            self.file.truncate(0)
            self._write(opening)
            return
        length = len(head)
        for line in lines:
            try:
                self.results += json.loads(line if line.endswith(b"\n") else b"")
            except ValueError:  # cut off by a kill or a crash of the machine: this batch is repeated
                break
            length += len(line)
        self.file.truncate(length)

    def append(self, results: list[Result]) -> None:
        self._write(results)
        self.results += results

    def _write(self, value: Any) -> None:
        line = json.dumps(value).encode() + b"\n"
        with naming(self.path):
            while line:
                line = line[self.file.write(line) :]
            os.fsync(self.file.fileno())

    def close(self, *, done: bool) -> None:
        if done:
            self.path.unlink(missing_ok=True)
        self.file.close()


def _lock(file: FileIO) -> bool:
    """Take the lock of an open file; False if another process has it."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name the file in an OSError that does not name one."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
