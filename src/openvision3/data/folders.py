"""Folders of images: a scan of the images, texts and tables in them, with everything else and why it is not used; and a folder as a source."""

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
from openvision3.data.captions import Captions, checked_text, clean_captions, decode_text, encoding_of, field_text, json_object, read_text, text_captions
from openvision3.data.identity import digest
from openvision3.data.images import EXTENSIONS, UNREAD_EXTENSIONS, ImageError
from openvision3.data.problems import Problem, reasons_in_words
from openvision3.data.sources import EncodedSource
from openvision3.data.view import View

TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
"""tables of captions: this project's, and those of Hugging Face's imagefolder"""

_SYSTEM = {"__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "lost+found", "system volume information"}
"""folders that operating systems leave on shared disks and in archives"""


def is_hidden(path: str) -> bool:
    """Whether a path within a folder or a tar belongs to an operating system or an editor and is no data."""
    return any((part.startswith(".") and part not in (".", "..")) or part.lower() in _SYSTEM for part in path.split("/"))


def is_output(folder: Path) -> bool:
    """Whether a folder was written by a run or an evaluation of this project, so that its images are no data."""
    is_run = (folder / "config.json").exists() and ((folder / "metrics.jsonl").exists() or (folder / "checkpoints").is_dir())
    return is_run or ((folder / "results.json").exists() and (folder / "report.html").exists())


@dataclass
class Contents:
    """The images of a folder and its sub-folders: sorted paths relative to the folder, with slashes. `unused` lists what else is there."""

    folder: Path
    images: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    """path without its extension -> the text file (`.txt` in any case)"""
    tables: list[str] = field(default_factory=list)
    unused: list[Problem] = field(default_factory=list)

    def leave_out(self, path: str, reason: str, detail: str) -> None:
        self.unused.append({"key": path, "reason": reason, "detail": detail})


def scan_folder(folder: str | Path) -> Contents:
    """Scan a folder and its sub-folders, also linked ones (each once). Raises OSError if the folder itself cannot be read."""
    contents = Contents(Path(folder))
    seen = {_identity(os.stat(folder))}
    links: list[tuple[str, os.stat_result]] = []
    _scan(contents, "", seen, links)
    while links:  # after all real folders, so that a link to one of them is the one left out
        path, stat = links.pop(0)
        if _identity(stat) in seen:
            contents.leave_out(path, "linked folder that is read already", f"it links to {os.path.realpath(contents.folder / path)}")
            continue
        seen.add(_identity(stat))
        _scan(contents, path, seen, links)
    contents.images.sort(key=lambda path: path.split("/"))
    contents.tables.sort()
    return contents


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _scan(contents: Contents, start: str, seen: set[tuple[int, int]], links: list[tuple[str, os.stat_result]]) -> None:
    """Add what lies under `start`, except linked folders, which are appended to `links`."""
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
                    contents.leave_out(path, "hidden or of the system", "names that begin with a dot, __MACOSX and @eaDir are not data")
            elif not entry.is_dir():
                _take_file(contents, path, entry)
            elif is_output(contents.folder / path):
                contents.leave_out(path, "folder of an output", "it was written by a run or an evaluation of openvision3; name this folder to read it")
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
    """Finds paths by name: exactly as spelt, else ignoring the differences that file systems ignore.

    macOS writes é as e and an accent, Windows writes backslashes, and neither distinguishes upper and lower case: such a name
    matches if only one path fits.
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

    def suggest(self, name: str) -> str:
        """The end of an error message: the path most similar to a name that does not exist, or ""."""
        several = self._alike.get(_spelling(name), [])
        close = several or difflib.get_close_matches(name, list(self.paths)[:20_000], 1, 0.7)
        return f"; similar are {' and '.join(close[:3])}" if len(several) > 1 else f"; similar is {close[0]}" if close else ""


def _spelling(path: str) -> str:
    return unicodedata.normalize("NFC", os.path.normpath(path.replace("\\", "/"))).casefold()


@dataclass
class Table:
    """The captions of a table, by path of the image; `problems` lists rows that name no file."""

    captions: dict[str, list[Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_table(folder: Path, path: str) -> Table:
    """Read columns `file` (or `file_name`) and `caption` (or `text`) of CSV or JSON lines. Paths are relative to the table.

    Raises:
        ValueError: no row names a file.
    """
    table, used, columns = Table(), 0, "nothing"
    place = folder / path
    for number, (named, row) in enumerate(_read_rows(folder, path), 1):
        if named:
            table.captions.setdefault(named, []).append(row.get("caption") or row.get("text"))
            used += 1
        else:
            columns = ", ".join(map(str, row)) or "no JSON object"
            table.problems.append({"key": f"{path} row {number}", "reason": "broken caption row", "detail": f"it names no file; its columns: {columns:.200}"})
    if not used:
        decode_text(columns.encode("utf-8", "surrogateescape"), str(place))
        contents = f"; it {holds(place)}" if not columns.isprintable() else ""
        raise ValueError(f"{place} needs the columns file and caption; it has: {columns:.200}{contents}")
    return table


def _read_rows(folder: Path, path: str) -> Iterator[tuple[str, dict]]:
    """(path of the image, "" if it names none; the row) of a table. Raises ValueError: it is no CSV, or no text."""
    place = folder / path
    with open(place, "rb") as file:
        encoding = encoding_of(file.read(4))
    inside = str(PurePosixPath(path).parent)
    # Bytes that are not in this encoding become surrogates, which `clean_captions` and `checked_text` refuse for the images concerned.
    with open(place, newline="", encoding=encoding, errors="surrogateescape") as lines:
        rows: Iterator[dict] = iter(csv.DictReader(lines)) if place.suffix.lower() == ".csv" else (json_object(line) for line in lines if line.strip())
        try:
            for row in rows:
                name = row.get("file") or row.get("file_name")
                yield os.path.normpath(os.path.join(inside, str(name))) if name else "", row
        except csv.Error as error:
            raise ValueError(f"{place} is not a CSV file that can be read: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{place} is not {encoding.upper()} text ({error.reason}); save it as UTF-8") from error


SEVERAL = ""
"""stands for the texts of rows that differ"""


class FolderSource(EncodedSource):
    """A folder of images: `x.jpg` beside `x.txt`, or tables `captions.csv` / `captions.jsonl` with columns `file` and `caption`.

    Sub-folders are read too; a file in several rows has several captions; `value` reads other columns. Hugging Face's `metadata.csv` /
    `.jsonl` are read if the folder has no such table. Keys begin with `label` (default: the folder's name). `problems` lists the files that are not used.

    Raises:
        ValueError: the folder has no images, or no row of a caption table can be used.
    """

    def __init__(self, folder: str | Path, view: View = View(), label: str = "", crop: str = "square"):
        super().__init__(view, crop)
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
        self.tables: list[str] = []
        self._columns: dict[str, dict[str, str] | None] = {}
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
                # a metadata.csv may hold anything
                self._add_problems([{"key": path, "reason": "table without captions, which is not used", "detail": str(error)}])
                continue
            self.tables.append(path)
            self._add_problems(table.problems)
            for name, captions in table.captions.items():
                known = present.find(name)
                if known is not None:
                    self.table.setdefault(known, []).extend(captions)
                    continue
                near = present.suggest(name) if missing < 20 else ""  # slow: it compares all names
                missing += 1
                self._add_problems([{"key": name, "reason": "missing", "detail": f"it has a caption, but there is no such image{near}"}])

    def __len__(self) -> int:
        return len(self.names)

    def key(self, index: int) -> str:
        return f"{self.labels[0]}/{self.names[index]}"

    def data(self, index: int) -> Path:
        return self.folder / self.names[index]

    def file(self, index: int) -> Path:
        return self.data(index)

    def identity(self) -> str:
        files = [(name, path.stat().st_size) for name in self.names if (path := self.folder / name).exists()]
        return digest("folder", len(self.names), files, self.probed_keys())

    def captions(self, index: int) -> Captions:
        listed = clean_captions([self.table.get(self.names[index], [])])
        stem = None if listed else self.texts.find(os.path.splitext(self.names[index])[0])
        if stem is None:
            return listed
        text = self.folder / self._text_of[stem]
        try:
            return text_captions(read_text(text))
        except OSError as error:
            raise ImageError("unreadable", f"{text} cannot be read: {error}") from error

    def value(self, index: int, name: str = "") -> str | None:
        """The text in the column `name` of the tables ("": `label`). Where there is no such column, "" and "folder" are the first sub-folder,
        which is the class in torchvision's ImageFolder layout.

        Raises:
            ImageError: reason `several labels` if the rows of the image differ, or `not UTF-8`.
        """
        path, column = self.names[index], name or "label"
        if column not in self._columns:
            self._columns[column] = self._read_column(column)
        texts = self._columns[column]
        if texts is not None:
            text = texts.get(path)
            if text == SEVERAL:
                raise ImageError("several labels", f"the rows of {path} differ in the column {column}")
            return checked_text(text, f"the {column} of {path}") if text else None
        parts = path.split("/")
        return parts[0] if len(parts) > 1 and name in ("", "folder") else None

    def _read_column(self, column: str) -> dict[str, str] | None:
        """{path of an image: its text in this column of the tables, or SEVERAL}; None if no table has the column."""
        texts: dict[str, str] = {}
        has_column, present = False, Names(self.names if self.tables else ())
        for path in self.tables:
            for named, row in _read_rows(self.folder, path):
                has_column = has_column or column in row
                known, text = present.find(named), field_text(row.get(column))
                if known is not None and text is not None:
                    texts[known] = text if texts.get(known, text) == text else SEVERAL
        return texts if has_column else None

    def files(self) -> list[str]:
        return [str(self.folder / name) for name in self.names]
