"""What lies in a folder of images: the images, their texts and tables by name, and everything that is there and not used, with the reason."""

from __future__ import annotations

import csv
import difflib
import os
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from openvision3.contents import holds
from openvision3.data.captions import Captions, clean_captions, decode_text, encoding_of, json_object, read_text, text_captions
from openvision3.data.identity import digest
from openvision3.data.images import EXTENSIONS, UNREAD_EXTENSIONS, ImageError
from openvision3.data.problems import Problem, reasons_in_words
from openvision3.data.sources import EncodedSource

TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
"""Tables of captions: of this project, and of Hugging Face's imagefolder."""

_SYSTEM = {"__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "lost+found", "system volume information"}
"""Folders of operating systems, as they lie on shared disks and in archives."""


def is_hidden(path: str) -> bool:
    """Whether a path within a folder or a tar is an operating system's or an editor's, and no data."""
    return any((part.startswith(".") and part not in (".", "..")) or part.lower() in _SYSTEM for part in path.split("/"))


def is_output(folder: Path) -> bool:
    """Whether this folder is a run or an evaluation of ours, whose images are no data."""
    is_run = (folder / "config.json").exists() and ((folder / "metrics.jsonl").exists() or (folder / "checkpoints").is_dir())
    return is_run or ((folder / "results.json").exists() and (folder / "report.html").exists())


@dataclass
class Contents:
    """The images of a folder and of its sub-folders, sorted, as paths from the folder with slashes; `unused` says what else is there."""

    folder: Path
    images: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    """path without its ending -> the text file, `.txt` in any case"""
    tables: list[str] = field(default_factory=list)
    unused: list[Problem] = field(default_factory=list)

    def leave_out(self, path: str, reason: str, detail: str) -> None:
        self.unused.append({"key": path, "reason": reason, "detail": detail})


def scan_folder(folder: str | Path) -> Contents:
    """Look into a folder and its sub-folders, linked ones too (each once). Raises OSError where the folder itself cannot be read."""
    contents = Contents(Path(folder))
    seen = {_identity(os.stat(folder))}
    links: list[tuple[str, os.stat_result]] = []
    _scan(contents, "", seen, links)
    while links:  # after the folders themselves, so that a link to one of them is what is left out
        path, stat = links.pop(0)
        if _identity(stat) in seen:
            contents.leave_out(path, "linked folder that is read already", f"it leads to {os.path.realpath(contents.folder / path)}")
            continue
        seen.add(_identity(stat))
        _scan(contents, path, seen, links)
    contents.images.sort(key=lambda path: path.split("/"))
    contents.tables.sort()
    return contents


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _scan(contents: Contents, start: str, seen: set[tuple[int, int]], links: list[tuple[str, os.stat_result]]) -> None:
    """Take what lies under `start`, all but linked folders, which are put on the list."""
    waiting = [start]
    while waiting:
        inside = waiting.pop()
        try:
            entries = sorted(os.scandir(contents.folder / inside), key=lambda entry: entry.name)
        except OSError as error:
            if not inside:
                raise
            contents.leave_out(inside, "unreadable folder", f"it cannot be read: {error.strerror}")
            continue
        for entry in entries:
            path = f"{inside}/{entry.name}" if inside else entry.name
            if is_hidden(entry.name):
                if entry.is_dir() or _ending(entry.name) in EXTENSIONS:
                    contents.leave_out(path, "hidden or of the system", "names that begin with a dot, __MACOSX and @eaDir are no data")
            elif not entry.is_dir():
                _take_file(contents, path, entry)
            elif is_output(contents.folder / path):
                contents.leave_out(path, "folder of an output", "a run or an evaluation of openvision3; name it itself to read it")
            elif entry.is_symlink():
                links.append((path, entry.stat()))
            else:
                seen.add(_identity(entry.stat()))
                waiting.append(path)


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _take_file(contents: Contents, path: str, entry: os.DirEntry) -> None:
    ending = _ending(entry.name)
    if ending in EXTENSIONS:
        if entry.is_file():
            contents.images.append(path)
        else:
            contents.leave_out(path, "missing", "a link to a file that is not there" if entry.is_symlink() else "neither a file nor a folder")
    elif ending in UNREAD_EXTENSIONS:
        contents.leave_out(path, f"{ending} file, which is not read", "convert it to PNG or JPEG")
    elif ending == ".txt":
        stem = path[: -len(ending)]
        if stem not in contents.texts or path.endswith(".txt"):
            contents.texts[stem] = path
    elif entry.name.lower() in TABLES:
        contents.tables.append(path)
    elif ending in (".tar", ".zip", ".tgz", ".gz", ".7z", ".rar"):
        contents.leave_out(path, "archive among images, which is not read", "shards are read from a folder that holds them itself; unpack other archives")


class Names:
    """Finds a path among those that are there: as it is spelt, else by what file systems take for the same name.

    A Mac writes é as e and an accent, Windows writes backslashes, and neither tells capitals from small letters: such a name is
    matched where only one path fits.
    """

    def __init__(self, paths: Iterable[str]):
        self.paths = {path: path for path in paths}
        self._alike: dict[str, list[str]] = {}
        for path in self.paths:
            self._alike.setdefault(_spelling(path), []).append(path)

    def find(self, name: str) -> str | None:
        if name in self.paths:
            return name
        alike = self._alike.get(_spelling(name), [])
        return alike[0] if len(alike) == 1 else None

    def near(self, name: str) -> str:
        """What is nearest to a name that is not there, for a message; empty where nothing is near."""
        several = self._alike.get(_spelling(name), [])
        close = several or difflib.get_close_matches(name, list(self.paths)[:20_000], 1, 0.7)
        return f"; near are {' and '.join(close[:3])}" if len(several) > 1 else f"; near is {close[0]}" if close else ""


def _spelling(path: str) -> str:
    return unicodedata.normalize("NFC", os.path.normpath(path.replace("\\", "/"))).casefold()


@dataclass
class Table:
    """The captions of one table by the image's path; rows that name no file are problems."""

    captions: dict[str, list[Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_table(folder: Path, path: str) -> Table:
    """Rows of `file` (or `file_name`) and `caption` (or `text`), CSV or JSON lines; files are named from where the table lies.

    Raises:
        ValueError: not one row names a file.
    """
    table, used, seen = Table(), 0, "nothing"
    place = folder / path
    with open(place, "rb") as file:
        encoding = encoding_of(file.read(4))
    inside = str(PurePosixPath(path).parent)
    # What is not of this encoding stays as surrogates, which `clean_captions` refuses for the images concerned.
    with open(place, newline="", encoding=encoding, errors="surrogateescape") as lines:
        rows: Iterator[dict] = iter(csv.DictReader(lines)) if place.suffix.lower() == ".csv" else (json_object(line) for line in lines if line.strip())
        try:
            for number, row in enumerate(rows, 1):
                name = row.get("file") or row.get("file_name")
                if name:
                    named = os.path.normpath(os.path.join(inside, str(name)))
                    table.captions.setdefault(named, []).append(row.get("caption") or row.get("text"))
                    used += 1
                else:
                    seen = ", ".join(map(str, row)) or "no JSON object"
                    table.problems.append({"key": f"{path} row {number}", "reason": "broken caption row", "detail": f"no file named; seen: {seen:.200}"})
        except csv.Error as error:
            raise ValueError(f"{place} is not a CSV file that can be read: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{place} is not {encoding.upper()} text ({error.reason}); save it as UTF-8") from error
    if not used:
        decode_text(seen.encode("utf-8", "surrogateescape"), str(place))
        found = f"; it {holds(place)}" if not seen.isprintable() else ""
        raise ValueError(f"{place} needs the columns file and caption; seen: {seen:.200}{found}")
    return table


class FolderSource(EncodedSource):
    """A plain folder: `x.jpg` beside `x.txt`, or tables `captions.csv` / `captions.jsonl` with columns `file` and `caption`.

    Sub-folders are read too; a file named in several rows has several captions. Hugging Face's `metadata.csv` / `.jsonl` are read where
    the folder has no table of its own. `label` begins the keys (the folder's name). What lies there and is not used is in `problems`.

    Raises:
        ValueError: a folder without images, or a caption table of which no row can be used.
    """

    def __init__(self, folder: str | Path, area: tuple[float, float] = (0.4, 1.0), label: str = "", crop: str = "square"):
        super().__init__(area, crop)
        self.folder = Path(folder)
        self.labels = [label or self.folder.resolve().name]
        contents = scan_folder(folder)
        self.names = contents.images
        if not self.names:
            unused = f" ({reasons_in_words(contents.unused)})" if contents.unused else ""
            shards = sorted({str(Path(p["key"]).parent) for p in contents.unused if p["key"].endswith(".tar")})
            advice = f"name the shards: {self.folder}/{shards[0]}/*.tar" if shards else f"choose one of {', '.join(e[1:] for e in EXTENSIONS)}"
            raise ValueError(f"{folder} holds no images that are read{unused}; {advice}")
        self.texts = Names(contents.texts)
        self._text_of = contents.texts
        self.table: dict[str, list] = {}
        self._add_problems(contents.unused)
        self._read_tables(contents.tables)

    def _add_problems(self, problems: Iterable[Problem]) -> None:
        self.problems.extend({**problem, "key": f"{self.labels[0]}/{problem['key']}"} for problem in problems)

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
                self._add_problems([{"key": path, "reason": "table without captions, which is not used", "detail": str(error)}])
                continue
            self._add_problems(table.problems)
            for name, captions in table.captions.items():
                known = present.find(name)
                if known is not None:
                    self.table.setdefault(known, []).extend(captions)
                    continue
                near = present.near(name) if missing < 20 else ""  # it looks at every name
                missing += 1
                self._add_problems([{"key": name, "reason": "missing", "detail": f"it has a caption, but there is no such image{near}"}])

    def __len__(self) -> int:
        return len(self.names)

    def key(self, index: int) -> str:
        return f"{self.labels[0]}/{self.names[index]}"

    def data(self, index: int) -> Path:
        return self.folder / self.names[index]

    def identity(self) -> str:
        files = [(name, path.stat().st_size) for name in self.names if (path := self.folder / name).exists()]
        return digest("folder", len(self.names), files, self.probed_keys())

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

    def files(self) -> list[str]:
        return [str(self.folder / name) for name in self.names]
