"""The one scanner of tars: their members, those that are left out and why, and what follows the end of the archive.

A tar ends in blocks of zeros. Another tar may follow (`cat one.tar two.tar`): it is read too, as `tar -i` does; anything else is
reported. A hard link is read as the file that it names; symbolic links, sparse files and hidden files are left out and counted.
"""

from __future__ import annotations

import mmap
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from openvision3.contents import contents
from openvision3.data.folders import is_hidden
from openvision3.data.images import EXTENSIONS, UNREAD_EXTENSIONS
from openvision3.data.problems import Problem

NAMED = 100
LISTED = 5
"""A message shows NAMED characters of a name, and LISTED names."""

HINTS = {
    "hidden file": "hidden or system files, left out",
    "link": "links and no files; pack with tar -h",
    "sparse member": "members are stored with holes and cannot be read; pack without tar -S",
}


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a tar; `offset` is 0 if it is left out."""

    start: int
    """where it begins, with all that precedes its headers, such as global headers"""
    header: int
    """where its own headers begin"""
    end: int
    """where the next member may begin"""
    stem: str
    extension: str
    offset: int
    """where its bytes begin: for a hard link, those of the file that it names"""
    size: int


class TarScan:
    """The members of a tar, once `read`. Memory holds the names and places of all members, and no headers."""

    def __init__(self, path: str | Path):
        self.path = path
        self.members: list[Member] = []
        self.samples: dict[str, dict[str, Member]] = {}
        """{name of a sample: {extension: its last member of this extension}}, in the order of the tar"""
        self.duplicates: list[Problem] = []
        self.status: os.stat_result | None = None
        """of the open file"""
        self.damage = ""
        """why not all of the file is read"""
        self.is_missing_members = False
        """whether members lie behind the damage and cannot be found"""
        self._left_out: dict[str, tuple[int, str]] = {}
        self._between = ""

    def read(self) -> TarScan:
        """Read all headers. Raises OSError; what was read until then is kept."""
        files: dict[str, Member] = {}
        start: int | None = 0
        with open(self.path, "rb") as file:
            self.status = os.fstat(file.fileno())
            self.size = self.status.st_size
            while start is not None:
                at = start
                try:
                    file.seek(start)
                    with tarfile.open(fileobj=file, mode="r:") as tar:
                        while (info := tar.next()) is not None:
                            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                            if info.offset_data + (info.size if info.isreg() and info.sparse is None else 0) > self.size:
                                raise tarfile.ReadError("unexpected end of data")
                            at = self._add(info, at, min(tar.offset, self.size), files)
                    start = self._next_archive(file, tar.offset)
                except tarfile.TarError as error:
                    self.damage = str(error)
                    if not at:
                        file.seek(0)
                        self.damage = f"it holds {contents(file.read(4096))}" if self.size else "it holds 0 bytes"
                    break
        return self

    def _add(self, info: tarfile.TarInfo, start: int, end: int, files: dict[str, Member]) -> int:
        """Add one member; `files` are those before it by name, for hard links. Returns `end`."""
        name = info.name.removeprefix("./")
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        offset = size = 0
        if is_hidden(name):
            if not info.isdir():
                self._leave_out("hidden file", name)
        elif info.sparse is not None:
            self._leave_out("sparse member", name)
        elif info.isreg():
            offset, size = info.offset_data, info.size
        elif info.islnk() and (target := files.get(info.linkname.removeprefix("./"))):
            offset, size = target.offset, target.size
        elif info.islnk() or info.issym():
            self._leave_out("link", f"{short(name)} -> {info.linkname}")
        member = Member(start, info.offset, end, folder + slash + stem, extension.lower(), offset, size)
        self.members.append(member)
        if offset:
            files[name] = member
            of_sample = self.samples.setdefault(member.stem, {})
            if member.extension in of_sample:
                self.duplicates.append(_problem(member.stem, "duplicate", f"{short(info.name)} comes twice; the last one is used"))
            of_sample[member.extension] = member
        return end

    def _leave_out(self, reason: str, name: str) -> None:
        count, first = self._left_out.get(reason, (0, name))
        self._left_out[reason] = count + 1, first

    def _next_archive(self, file: BinaryIO, end: int) -> int | None:
        """Where another tar begins behind the end mark at `end`; None if nothing follows. Raises ReadError."""
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        if block != tarfile.NUL * tarfile.BLOCKSIZE:  # tarfile ends quietly at a header that is cut off or broken
            self.is_missing_members = len(block) == tarfile.BLOCKSIZE
            raise tarfile.ReadError("no end mark, the shard is cut off or broken here")
        position = file.tell()
        while not (chunk := file.read(1 << 20)).strip(tarfile.NUL):
            if not chunk:
                return None
            position += len(chunk)
        position += len(chunk) - len(chunk.lstrip(tarfile.NUL))
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            for begins in self._beginnings(whole, end, position):
                if _is_header(whole[begins : begins + tarfile.BLOCKSIZE]):
                    if begins > position:
                        self._between = f"{begins - position:,} bytes between two tars ({contents(whole[position:begins])})"
                    return begins
            raise tarfile.ReadError(f"{self.size - position:,} bytes after the end mark ({contents(whole[position : position + 4096])})")

    @staticmethod
    def _beginnings(whole: mmap.mmap, end: int, position: int) -> Iterator[int]:
        """Where a header may begin: at the next whole block, or anywhere behind other data."""
        yield position - (position - end) % tarfile.BLOCKSIZE
        place = whole.find(b"ustar", position)
        while place >= 0:
            if place - 257 >= position:
                yield place - 257
            place = whole.find(b"ustar", place + 1)

    def problems(self, samples: int) -> list[Problem]:
        """The problems with the tar itself; `samples` were read before the damage."""
        problems = [_problem("", reason, f"{count:,} {HINTS[reason]}, such as {short(first)}") for reason, (count, first) in self._left_out.items()]
        if self._between:
            problems.append(_problem("", "damaged shard", self._between))
        if self.damage:
            problems.append(_problem("", "damaged shard", f"{self.damage}; {samples} samples before the damage"))
        return problems


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def short(name: str) -> str:
    return name if len(name) <= NAMED else f"{name[: NAMED - 3]}..."


def is_image(extension: str) -> bool:
    return f".{extension}" in EXTENSIONS


def unusable(stem: str, members: Mapping[str, Any]) -> Problem | None:
    """Why these members (by extension) are no sample, or which of several images is used; None if there is one image."""
    images = [extension for extension in members if is_image(extension)]
    if len(images) == 1:
        return None
    if images:
        return _problem(stem, "duplicate", f"{len(images)} images of this name: {_listed(images)}; the first one is used")
    others = [extension for extension in members if any(f".{extension}".endswith(known) for known in (*EXTENSIONS, *UNREAD_EXTENSIONS))]
    detail = f"only {_listed(list(members))}"
    if split := next((extension for extension in others if is_image(extension.rpartition(".")[2])), ""):
        base = stem.rpartition("/")[2]
        detail += f"; names end at their first dot, so {short(f'{base}.{split}')} has the ending .{short(split)}: rename it to NAME.{split.rpartition('.')[2]}"
    elif others:
        detail += f"; .{short(others[0])} is not read: choose one of {', '.join(EXTENSIONS)}"
    return _problem(stem, "no image", detail)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(map(short, names[:LISTED])) + more


def _problem(key: str, reason: str, detail: str) -> Problem:
    return {"key": key, "reason": reason, "detail": detail}
