"""The questions of a benchmark from its authors' files, or from lmms-lab's Parquet files on the hub, which hold their images.

A file of another benchmark is recognised by its fields and refused with the benchmark's name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from openvision3.contents import holds, short
from openvision3.data.images import ImageError, open_image
from openvision3.data.named_images import NamedImages, places_of
from openvision3.evaluate.metrics.vqa import BENCHMARKS, LETTERS, Question

EXTRA = "pyarrow is not installed; pip install 'openvision3[parquet]' to read Parquet files"
Row = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """One kind of file: the fields by which it is recognised, and how a row of it becomes a question (None: not part of the benchmark)."""

    benchmark: str
    fields: frozenset[str]
    question: Callable[[Row, Path], Question | None]


def _pope(row: Row, path: Path) -> Question:
    split = path.stem.rpartition("pope_")[2].removeprefix("seem_") or "all"
    return Question(f"{split}/{row['question_id']}", row["image"], row["text"], _yes_or_no(row["label"]), split)


def _pope_parquet(row: Row, path: Path) -> Question:
    split = row["category"]
    return Question(f"{split}/{row['question_id']}", str(row["image_source"]), row["question"], _yes_or_no(row["answer"]), split)


def _mme(row: Row, path: Path) -> Question:
    return Question(f"{row['question_id']}: {row['question']}", row["question_id"], row["question"], _yes_or_no(row["answer"]), row["category"])


def _seedbench(row: Row, path: Path) -> Question | None:
    if str(row.get("data_type", "image")).lower() != "image":
        return None
    dimension = str(row.get("question_type") or f"dimension {row['question_type_id']}")
    choices = tuple(str(row[f"choice_{letter}"]) for letter in "abcd")
    return Question(str(row["question_id"]), str(row["data_id"]), row["question"], row["answer"].strip().upper(), dimension, choices)


def _scienceqa(row: Row, path: Path) -> Question | None:
    """A row of problems.json, whose images lie in a folder of its number, or of a table, which has no number."""
    side = row.get("split") or ("other" if path.stem.startswith(("train", "val")) else "test")  # a table has its side in its name
    if not row.get("image") or side != "test":
        return None
    image = f"{row['id']}/{row['image']}" if isinstance(row["image"], str) else row["id"]
    return Question(row["id"], image, row["question"], LETTERS[row["answer"]], row.get("subject") or "all", tuple(row["choices"]), row.get("hint") or "")


def _gqa(row: Row, path: Path) -> Question | None:
    if row.get("isBalanced") is False:  # files of all questions; GQA's eval.py scores the balanced ones
        return None
    kind = (row.get("types") or {}).get("structural") or "all"
    return Question(str(row["id"]), str(row["imageId"]), row["question"], row["answer"].strip().lower(), kind)


def _own(row: Row, path: Path) -> Question | None:
    """A question of `openvision3 data conversations`; descriptions have no one right answer."""
    if row["kind"] == "describe":
        return None
    answer, *accept = row["accept"]
    return Question(row["id"], row["image"], row["text"], answer, row["kind"], accept=tuple(accept))


def _yes_or_no(value: str) -> str:
    answer = value.strip().lower().rstrip(".")
    if answer not in ("yes", "no"):
        raise ValueError(f"the answer {value!r} is neither yes nor no")
    return answer


LAYOUTS = (
    Layout("pope", frozenset({"question_id", "image", "text", "label"}), _pope),
    Layout("pope", frozenset({"question_id", "question", "answer", "image_source", "category"}), _pope_parquet),
    Layout("seedbench", frozenset({"question_id", "question", "answer", "choice_a", "choice_d", "data_id", "question_type_id"}), _seedbench),
    Layout("scienceqa", frozenset({"question", "choices", "answer", "hint", "image"}), _scienceqa),
    Layout("gqa", frozenset({"question", "answer", "imageId"}), _gqa),
    Layout("conversations", frozenset({"id", "image", "text", "kind", "accept"}), _own),
    Layout("mme", frozenset({"question_id", "question", "answer", "category"}), _mme),
)
"""The first that fits is taken: MME's fields are some of POPE's."""


class QuestionSet:
    """The questions of a benchmark, and their images by name.

    Raises:
        ValueError: no files, a file of another benchmark or of none, two questions of one name, images that are all missing.
    """

    def __init__(self, benchmark: str, files: Sequence[str], images: Sequence[str] = ()):
        if not files:
            raise ValueError(f"no files of {BENCHMARKS[benchmark].title} named; name them with --data")
        self.benchmark, self.questions = benchmark, list[Question]()
        self.tables = TableImages()
        paths = [path for name in files for path in _files(Path(name), benchmark)]
        found: dict[str, str] = {}  # {key of a question: where it stands}
        for path in paths:
            self._read(path, found)
        if not self.questions:
            raise ValueError(f"{', '.join(files)}: no question with an image of {BENCHMARKS[benchmark].title}")
        self.files = NamedImages(images or list(dict.fromkeys(place for path in paths for place in places_of(path))))
        self.missing = [name for name in dict.fromkeys(one.image for one in self.questions) if name not in self.tables and self.files.find(name) is None]
        if len(self.missing) == len({question.image for question in self.questions}):
            places = ", ".join(map(str, self.files.places))
            raise ValueError(f"none of the {len(self.missing):,} images is in {places}, such as {self.missing[0]}; name their folder or archive with --images")

    def image(self, name: str) -> Image.Image:
        """Upright RGB. Raises ImageError."""
        return self.tables.open(name) if name in self.tables else self.files.open(name)

    def _read(self, path: Path, found: dict[str, str]) -> None:
        number = 0
        layout: Layout | None = None
        for number, (row, place) in enumerate(_rows(path), start=1):
            if layout is None or not layout.fields <= row.keys():
                layout = _layout_of(row, path, self.benchmark)
                if layout is None:  # a table of images alone, as GQA's
                    self.tables.add(str(row["id"]), place)
                    continue
            try:
                question = layout.question(row, path)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise ValueError(f"{path}: question {number} cannot be read: {type(error).__name__} {short(error)}") from error
            if question is None:
                continue
            if question.key in found:
                raise ValueError(
                    f"question {number} of {path} is called {question.key}, as is {found[question.key]}; name each file once, and evaluate different ones apart"
                )
            found[question.key] = f"question {number} of {path}"
            self.questions.append(question)
            if place is not None and row.get("image"):
                self.tables.add(question.image, place)
        if not number:
            raise ValueError(f"{path} holds no questions: it {holds(path)}")


def _layout_of(row: Row, path: Path, benchmark: str) -> Layout | None:
    layout = next((one for one in LAYOUTS if one.fields <= row.keys()), None)
    if layout is None and benchmark == "gqa" and row.keys() == {"id", "image"}:
        return None
    if layout is None:
        expected = " or ".join(", ".join(sorted(one.fields)) for one in LAYOUTS if one.benchmark == benchmark)
        raise ValueError(f"{path} is no file of {BENCHMARKS[benchmark].title}: its fields are {', '.join(sorted(row))}, expected {expected}")
    if layout.benchmark != benchmark:
        raise ValueError(
            f"{path} is a file of {BENCHMARKS[layout.benchmark].title} by its fields, not of {BENCHMARKS[benchmark].title}; "
            f"run `openvision3 evaluate vqa {layout.benchmark}`"
        )
    return layout


def _files(path: Path, benchmark: str) -> list[Path]:
    """The files that a name stands for: itself, or for a folder its files of questions (MME's folder of subtasks is read as a whole)."""
    if not path.exists():
        raise ValueError(f"no such file: {path}")
    if not path.is_dir() or any(path.glob("*/questions_answers_YN")) or (benchmark == "mme" and any(path.glob("*/*.txt"))):
        return [path]
    files = sorted(one for one in path.iterdir() if one.suffix in (".json", ".jsonl", ".parquet") and one.name != "pid_splits.json")
    if not files:
        raise ValueError(f"{path} holds no .json, .jsonl or .parquet of questions; name the files of {BENCHMARKS[benchmark].title} with --data")
    return files


Place = tuple[Path, int, int]
"""a Parquet file, the row group, and the row in it"""


def _rows(path: Path) -> Iterator[tuple[Row, Place | None]]:
    """The rows of a file; those of a table with where their images lie."""
    if path.is_dir():
        yield from ((row, None) for row in _mme_rows(path))
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        yield from ((row, None) for row in _json_rows(path))


def _json_rows(path: Path) -> list[Row]:
    """JSON lines, a list, a dictionary of questions by their number, or SEED-Bench's list with the names of its dimensions."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        first = text.lstrip()[:1]
        lines = text.strip().split("\n")
        if first == "{" and len(lines) > 1 and all(line.startswith("{") and line.endswith("}") for line in lines[:2]):
            values: Any = [json.loads(line) for line in lines if line.strip()]
        else:
            values = json.loads(text)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no JSON of questions: it {holds(path)}") from error
    if isinstance(values, dict) and isinstance(values.get("questions"), list):
        names = {number: name for name, number in (values.get("question_type") or {}).items()}
        values = [{**row, "question_type": names.get(row.get("question_type_id"))} for row in values["questions"] if isinstance(row, dict)]
    elif isinstance(values, dict) and values and all(isinstance(row, dict) for row in values.values()):
        values = [{"id": key, **row} for key, row in values.items()]
    elif isinstance(values, dict):
        values = [values]
    if not isinstance(values, list) or not all(isinstance(row, dict) for row in values):
        raise ValueError(f"{path} is no list of questions: it {holds(path)}")
    return [question for row in values for question in (_turns(row) if {"conversations", "kinds", "accept"} <= row.keys() else [row])]


def _turns(row: Row) -> list[Row]:
    """The questions of a conversation of LLaVA's JSON whose kinds and right answers stand beside it."""
    texts = [turn["value"].replace("<image>", "").strip() for turn in row["conversations"] if turn["from"] == "human"]
    questions = zip(texts, row["kinds"], row["accept"], strict=True)
    return [
        {"id": f"{row['id']}/{place}", "image": row["image"], "text": text, "kind": kind, "accept": accept}
        for place, (text, kind, accept) in enumerate(questions)
    ]


def _mme_rows(folder: Path) -> Iterator[Row]:
    """MME's release: a folder for each subtask, in it a .txt for each image with two lines, question and answer apart by a tab."""
    for subtask in sorted(one for one in folder.iterdir() if one.is_dir()):
        texts = subtask / "questions_answers_YN"
        images = subtask / "images"
        named = {image.stem: image for image in (images if images.is_dir() else subtask).iterdir() if image.suffix.lower() in (".jpg", ".jpeg", ".png")}
        for path in sorted((texts if texts.is_dir() else subtask).glob("*.txt")):
            image = named.get(path.stem)
            try:
                lines = path.read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is no text in UTF-8: it {holds(path)}") from error
            for line in filter(str.strip, lines):
                question, tab, answer = line.strip().rpartition("\t")
                if not tab:
                    raise ValueError(f"{path}: {line[:60]!r} is no question and answer apart by a tab, as MME has them")
                name = str(image.relative_to(folder)) if image else f"{subtask.name}/{path.stem}"
                yield {"question_id": name, "question": question.strip(), "answer": answer, "category": subtask.name}


def _parquet_rows(path: Path) -> Iterator[tuple[Row, Place]]:
    parquet = _pyarrow_parquet()
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            leaves = [file.schema.column(place).path for place in range(len(file.schema))]
            light = next((leaf for leaf in leaves if leaf.startswith("image.") and leaf.endswith(".path")), "image")  # tells whether there is an image
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=[name for name in names if name != "image"])
                images = file.read_row_group(group, columns=[light]).column(0).is_valid().to_pylist() if "image" in names else [False] * table.num_rows
                for place, (row, has_image) in enumerate(zip(table.to_pylist(), images, strict=True)):
                    yield {"id": f"{path.stem}/{group}/{place}", **row, "image": has_image or None}, (path, group, place)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise ValueError(f"{path} cannot be read as Parquet: it {holds(path)}") from error


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(EXTRA) from error
    return parquet


class TableImages:
    """Images within Parquet files, by name. The row group that was read last is kept: questions are asked in the order of the file."""

    def __init__(self) -> None:
        self._places: dict[str, Place] = {}
        self._last: tuple[tuple[Path, int], list[Any]] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def add(self, name: str, place: Place | None) -> None:
        if place is not None:
            self._places.setdefault(name, place)

    def open(self, name: str) -> Image.Image:
        """Raises ImageError."""
        path, group, place = self._places[name]
        if self._last is None or self._last[0] != (path, group):
            with _pyarrow_parquet().ParquetFile(path) as file:
                self._last = (path, group), file.read_row_group(group, columns=["image"]).column(0).to_pylist()
        value = self._last[1][place]
        value = value[0] if isinstance(value, list) and value else value  # SEED-Bench has a list of frames
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes) or not data:  # a name would be opened as a file
            raise ImageError("missing", f"{name} holds no image in {path}")
        return open_image(data)
