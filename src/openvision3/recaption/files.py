"""What recaptioning reads and writes: a shard or folder, what it becomes, and the journal of the one that is half done."""

from __future__ import annotations

import copy
import errno
import json
import os
import sys
import tarfile
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from openvision3.data.captions import MAX_BYTES, Captions, TextError, clean_captions, decode_text, json_object, text_captions, too_large
from openvision3.data.images import ImageError, open_image
from openvision3.data.shards.members import Member, Problem, TarMembers, is_picture, unusable
from openvision3.data.sources import FolderSource

ORIGINAL = "org_caption"
"""Where the old caption goes, as in Recap-DataComp-1B."""

Result = dict[str, str]
"""{"caption": ...}, with "cut" where the model was still talking, or {"kept": why the old caption stays}"""


class CaptionShard:
    """One tar: its samples, and how it is written with new captions."""

    def __init__(self, path: str, target: Path):
        self.path, self.target = path, target
        self.size = os.path.getsize(path)
        self.damage, self.lost = "", False
        self.problems: list[Problem] = []

    def open(self, name: str, caption_key: str, replace: bool) -> None:
        """Read the headers and the JSON. Raises ValueError: captions would be written over."""
        self.size = os.path.getsize(self.path)
        found: dict[str, dict[str, Member]] = {}
        with open(self.path, "rb") as file:
            tar = TarMembers(file, self.path)
            self.members = list(tar)
            self.damage, self.lost = tar.damage, tar.lost
        for member in self.members:
            if member.offset:
                found.setdefault(member.stem, {})[member.extension] = member
        self.samples = [(stem, parts) for stem, parts in found.items() if any(map(is_picture, parts))]
        self.problems = [p | {"key": f"{self.path} {p['key']}".rstrip()} for p in tar.problems(len(self.samples))]
        if not self.samples:
            told = [problem for stem, parts in found.items() if (problem := unusable(stem, parts))]
            self.problems += [told[0] | {"key": self.path}] if told else []
            self.problems += [] if self.problems else [{"key": self.path, "reason": "empty shard", "detail": "no members"}]
        self.name = name
        self.values: list[dict | None] = []
        with open(self.path, "rb") as file:
            for stem, parts in self.samples:
                text = self._data(file, parts["json"]) if "json" in parts else b"{}"
                values = json_object(text)
                if name in values and not replace:
                    raise ValueError(f"{self.path}: {stem} has a {name} already; name another with --field, or write over it with --replace")
                broken = not values and text.split() not in ([b"{}"], [b"{", b"}"])
                self.values.append(None if broken else values)
                if ORIGINAL not in values:
                    try:
                        old = self._old(file, values, parts, caption_key)
                    except TextError as error:  # its bytes stay where they are; nothing is made up in their place
                        self.problems.append({"key": f"{self.path} {stem}", "reason": error.reason, "detail": f"{error}; no {ORIGINAL} is written"})
                    else:
                        values |= {ORIGINAL: old[0] if len(old) == 1 else list(old)} if old else {}

    def _old(self, file: BinaryIO, values: dict, parts: dict[str, Member], caption_key: str) -> Captions:
        """The captions that a sample has. Raises TextError."""
        if caption_key or "txt" not in parts:
            return clean_captions([values.get(caption_key or "caption")])
        if parts["txt"].size > MAX_BYTES:
            raise too_large("the .txt member")
        return text_captions(decode_text(self._data(file, parts["txt"]), "the .txt member"))

    @staticmethod
    def _data(file: BinaryIO, member: Member) -> bytes:
        file.seek(member.offset)
        return file.read(member.size)

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, index: int) -> str:
        return self.samples[index][0]

    def picture(self, index: int) -> Image.Image:
        """Raises ImageError."""
        if self.values[index] is None:
            raise ImageError("broken JSON", f"{self.path}: the JSON of {self.key(index)} is no object, there is no place for a caption")
        member = next(m for extension, m in self.samples[index][1].items() if is_picture(extension))
        with named(Path(self.path)), open(self.path, "rb") as file:
            data = self._data(file, member)
        return open_image(data)

    def write(self, results: Sequence[Result], by: dict[str, str], out: BinaryIO) -> None:
        """All members as they were, the JSON with its new fields; a sample without JSON gets one behind its last member."""
        new: dict[int, bytes] = {}
        behind: dict[int, tarfile.TarInfo] = {}
        place = {id(member): number for number, member in enumerate(self.members)}
        for (_, parts), values, result in zip(self.samples, self.values, results, strict=True):
            if values is None:
                continue
            told = {k: v for k, v in values.items() if k not in (self.name, f"{self.name}_by")}
            told |= {self.name: result["caption"]} if "caption" in result else {}
            told[f"{self.name}_by"] = by | ({"kept": result["kept"]} if "kept" in result else {})
            number = place[id(parts["json"])] if "json" in parts else max(place[id(m)] for m in parts.values())
            new[number] = json.dumps(told).encode()
            if "json" not in parts:
                picture = next(m for extension, m in parts.items() if is_picture(extension))
                behind[number] = copy.copy(picture.info)
                behind[number].name = picture.info.name[: -len(picture.extension)] + "json"
        with open(self.path, "rb") as source:
            for number, member in enumerate(self.members):
                if number in new and number not in behind:
                    _copy(source, out, member.start, member.info.offset)
                    _put(out, member.info, new[number])
                else:
                    _copy(source, out, member.start, member.end)
                    if number in behind:
                        _put(out, behind[number], new[number])
        out.write(tarfile.NUL * 2 * tarfile.BLOCKSIZE)
        out.write(tarfile.NUL * (-out.tell() % tarfile.RECORDSIZE))


def _copy(source: BinaryIO, out: BinaryIO, start: int, end: int) -> None:
    source.seek(start)
    while start < end:
        piece = source.read(min(1 << 20, end - start))
        if not piece:
            raise OSError(errno.EIO, "it became shorter while it was read", source.name)
        out.write(piece)
        start += len(piece)
    out.write(tarfile.NUL * (-out.tell() % tarfile.BLOCKSIZE))  # the last member of a shard that is cut off may lack its filling


def _put(out: BinaryIO, info: tarfile.TarInfo, data: bytes) -> None:
    info = copy.copy(info)
    info.size, info.type, info.linkname = len(data), tarfile.REGTYPE, ""  # in place of a link there is a file
    info.pax_headers = {name: value for name, value in info.pax_headers.items() if name not in ("size", "path")}
    out.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
    out.write(data)
    out.write(tarfile.NUL * (-len(data) % tarfile.BLOCKSIZE))


class CaptionFolder:
    """A plain folder of pictures; its new captions become one `captions.jsonl`, as `FolderSource` reads it."""

    damage, lost = "", False

    def __init__(self, folder: str, target: Path):
        self.path, self.target = folder, target
        self.source = FolderSource(folder)
        self.size = sum(path.stat().st_size for path in self.source.files)
        self.problems: list[Problem] = []

    def open(self, name: str, caption_key: str, replace: bool) -> None:
        if caption_key:
            raise ValueError(f"--caption-key {caption_key} is for shards; the old captions of the folder {self.path} are its .txt files or table")
        self.olds: list[list[str]] = []
        for index in range(len(self)):
            try:
                self.olds.append(list(self.source.captions(index)))
            except TextError as error:
                self.olds.append([])
                self.problems.append({"key": self.source.key(index), "reason": error.reason, "detail": f"{error}; no {ORIGINAL} is written"})

    def __len__(self) -> int:
        return len(self.source)

    def key(self, index: int) -> str:
        return str(self.source.files[index].relative_to(self.source.folder))

    def picture(self, index: int) -> Image.Image:
        return open_image(self.source.data(index))

    def write(self, results: Sequence[Result], by: dict[str, str], out: BinaryIO) -> None:
        for index, result in enumerate(results):
            old = self.olds[index]
            row = {
                "file": self.key(index),
                "caption": result.get("caption", old),
                ORIGINAL: old,
                "by": by | ({"kept": result["kept"]} if "kept" in result else {}),
            }
            out.write(json.dumps(row).encode() + b"\n")


class Journal:
    """What is finished of one shard: a line for each batch, on the disk before the next batch begins. Held by one process."""

    def __init__(self, target: Path, opening: dict[str, Any]):
        self.path = target.with_name(f".{target.name}.journal")
        target.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+b", buffering=0)  # on a full disk nothing waits to be written when it is closed
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
            except ValueError:  # cut off by a kill, or a crash of the machine: it is done again
                break
            length += len(line)
        self.file.truncate(length)

    def append(self, results: list[Result]) -> None:
        self._write(results)
        self.results += results

    def _write(self, value: Any) -> None:
        line = json.dumps(value).encode() + b"\n"
        with named(self.path):
            while line:
                line = line[self.file.write(line) :]
            os.fsync(self.file.fileno())

    def close(self, *, done: bool) -> None:
        if done:
            self.path.unlink(missing_ok=True)
        self.file.close()


def _lock(file: FileIO) -> bool:
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class named:
    """Errors of writing name the file that was being written."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError) and error.errno and not error.filename:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
