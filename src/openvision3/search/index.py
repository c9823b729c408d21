"""An index of images: their embeddings in clip-retrieval's layout, and what is needed to bring it up to date.

    INDEX/img_emb/img_emb_0.npy            unit vectors (N, E) in float16
    INDEX/metadata/metadata_0.parquet      a row for each: image_path, caption; and key, position, size, modified, sample_key
    INDEX/image.index                      faiss's index of the same vectors, where one was asked for
    INDEX/index.json                       the model and its sha256, the data, and the sha256 of the other files; written last

Clip-retrieval (github.com/rom1504/clip-retrieval) reads the first three.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from json import dumps
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from openvision3 import hub
from openvision3.data.captions import TextError
from openvision3.data.images import ImageError
from openvision3.data.names import DataOptions, open_source
from openvision3.data.problems import Problems
from openvision3.data.sources import Source
from openvision3.files import check_writable, sha256_of, write_whole
from openvision3.pipeline import Pipeline
from openvision3.progress import track
from openvision3.settings import check_fields, from_dict, read_json, to_dict

FORMAT = 1
SETTINGS, EMBEDDINGS, METADATA, FAISS = "index.json", "img_emb/img_emb_0.npy", "metadata/metadata_0.parquet", "image.index"
COLUMNS = ("image_path", "caption", "key", "position", "size", "modified", "sample_key")
ROWS = 65_536
"""vectors that are compared at a time: 130 MB as float32 of 512 numbers"""


@dataclass
class IndexConfig:
    """What index.json holds."""

    format: int
    """version of this layout"""
    model: str
    """the name of the model that embeds"""
    model_sha256: str
    """the sha256 of its weights"""
    data: tuple[str, ...]
    """what is indexed, as it was named"""
    rows: int
    width: int
    """numbers of an embedding"""
    faiss: str
    """the description of image.index; "" where there is none"""
    sha256: dict[str, Any] = field(default_factory=dict)
    """of the other files, by name"""


@dataclass
class Built:
    """What an update of an index did."""

    rows: int
    embedded: int
    """images that are new or have changed"""
    removed: int
    """rows of images that are gone or have changed"""
    problems: Problems


class SearchIndex:
    """A complete index. Raises FileNotFoundError, ValueError: no index, or one that is damaged."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / SETTINGS).is_file():
            raise FileNotFoundError(f"{folder} is no index of images: it holds no {SETTINGS}; make one with openvision3 search index DATA --out {folder}")
        values = read_json(self.folder / SETTINGS)
        if values.get("format") != FORMAT:
            raise ValueError(f"{folder} is of format {values.get('format')}, this version of openvision3 reads format {FORMAT}; index the images again")
        files = values.pop("sha256", {})
        try:
            self.config = from_dict(IndexConfig, values)
            self.config.sha256 = check_fields(files, "sha256")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.folder / SETTINGS} cannot be used: {error}") from error
        for name, digest in self.config.sha256.items():
            path = self.folder / name
            if not path.is_file() or sha256_of(path) != digest:
                raise ValueError(f"{path} is {'damaged' if path.is_file() else 'missing'}; remove {folder} and index the images again")
        self.embeddings: np.ndarray = np.load(self.folder / EMBEDDINGS, mmap_mode="r")

    def table(self) -> dict[str, list[Any]]:
        """The metadata, {column: values}."""
        return _parquet().read_table(self.folder / METADATA).to_pydict()

    def check_model(self, pipeline: Pipeline, name: str) -> None:
        """Raises ValueError for another model than the one that embedded the images."""
        if (digest := _weights(pipeline)) != self.config.model_sha256:
            raise ValueError(
                f"{self.folder} holds embeddings of the model {self.config.model} with sha256 {self.config.model_sha256[:12]}..., "
                f"but {name} has {digest[:12]}...; name that model with --model, or index the images into another folder"
            )

    def nearest(self, query: np.ndarray, count: int, engine: str = "numpy") -> list[tuple[int, float]]:
        """The `count` rows with the largest cosines to a unit vector (E,), and these. numpy compares with every row; of equal rows the first come first.

        Raises:
            ValueError: engine faiss without its index or without the package.
        """
        count = min(count, len(self.embeddings))
        if engine == "faiss":
            if not self.config.faiss:
                raise ValueError(f"{self.folder} holds no {FAISS}; index the images with --faiss Flat, or search with --engine numpy")
            scores, rows = faiss().read_index(str(self.folder / FAISS)).search(query[None].astype(np.float32), count)
            return [(int(row), float(score)) for row, score in zip(rows[0], scores[0], strict=True) if row >= 0]
        best: list[tuple[float, int]] = []
        for start in range(0, len(self.embeddings), ROWS):
            scores = self.embeddings[start : start + ROWS].astype(np.float32) @ query.astype(np.float32)
            top = np.argsort(-scores, kind="stable")[:count]
            best = sorted([*best, *((-float(scores[row]), start + int(row)) for row in top)])[:count]
        return [(row, -score) for score, row in best]


def update(
    data: Sequence[str],
    out: str | Path,
    pipeline: Pipeline,
    model: str,
    *,
    options: DataOptions = DataOptions(),
    batch: int = 32,
    faiss_index: str = "",
) -> Built:
    """Index `data` into the folder `out`, or bring the index there up to date: files of the same size and time, and images of the same bytes, keep their row.

    `faiss_index` describes an index as faiss's factory does (Flat, HNSW32); "" keeps what there is. What is embedded when the process is interrupted is kept.

    Raises:
        ValueError, OSError: bad input; `out` holds something else, or the index of other data or of another model.
    """
    if batch < 1:
        raise ValueError(f"batch {batch} must be at least 1")
    _parquet()
    folder, data = Path(out), [_placed(name) for name in data]
    check_writable(folder, "--out")
    before = _begun(folder, data, pipeline, model)
    faiss_index = faiss_index or (before.config.faiss if before else "")
    if faiss_index:
        _describe(faiss_index, pipeline.model.config.encoder.embed_dim)
    source = open_source(tuple(data), options, watch=track)
    problems = Problems()
    problems.extend(source.problems)
    rows, vectors, todo, kept = _compare(source, before, problems)
    try:
        for start in track(range(0, len(todo), batch), "embeddings"):
            _embed(source, pipeline, [rows[place] for place in todo[start : start + batch]], vectors, problems)
    finally:  # an interrupted run keeps what it has
        complete = [row for row in rows if row["position"] in vectors]
        if complete:
            _write(folder, complete, vectors, pipeline, model, data, faiss_index)
    if not complete:
        raise ValueError(f"none of the {len(source)} images in {', '.join(data)} can be used, such as {next(iter(problems), {}).get('detail', '')}")
    return Built(len(complete), len(todo) - (len(rows) - len(complete)), (before.config.rows if before else 0) - kept, problems)


def _placed(name: str) -> str:
    """A name of data that is found from any working folder."""
    return name if name == "openmoji" or "://" in name else os.path.abspath(name)


def _begun(folder: Path, data: Sequence[str], pipeline: Pipeline, model: str) -> SearchIndex | None:
    """The index that is brought up to date; None where there is none. Raises ValueError."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    if not (folder / SETTINGS).is_file():
        raise ValueError(f"{folder} holds something else, such as {next(folder.iterdir()).name}; name another folder with --out")
    before = SearchIndex(folder)
    before.check_model(pipeline, model)
    if before.config.data != tuple(data):
        raise ValueError(f"{folder} is the index of {' '.join(before.config.data)}; name the same data, or another folder with --out")
    return before


def _compare(source: Source, before: SearchIndex | None, problems: Problems) -> tuple[list[dict[str, Any]], dict[int, np.ndarray], list[int], int]:
    """(the rows of all samples, {position: vector} of those that need no embedding, places of the rows that do, old rows that are used again)."""
    table = before.table() if before else {name: [] for name in COLUMNS}
    named = {key: row for row, key in enumerate(table["key"])}
    same = {key: row for row, key in reversed([*enumerate(table["sample_key"])])}
    rows: list[dict[str, Any]] = []
    vectors: dict[int, np.ndarray] = {}
    todo: list[int] = []
    used: set[int] = set()
    for position in track(range(len(source)), "comparing files") if before else range(len(source)):
        key = source.key(position)
        try:
            file = source.file(position)
            found = file.stat() if file is not None else None
            size, modified = (found.st_size, found.st_mtime_ns) if found else (0, 0)
            old = named.get(plain(key))
            if old is None or file is None or (table["size"][old], table["modified"][old]) != (size, modified):
                sample_key = source.sample_key(position)
                old = old if old is not None and table["sample_key"][old] == sample_key else same.get(sample_key)
            else:
                sample_key = table["sample_key"][old]
            try:
                caption = next(iter(source.captions(position)), "")
            except TextError as error:
                problems.add(error.as_problem(key))
                caption = ""
        except ImageError as error:
            problems.add(error.as_problem(key))
            continue
        except OSError as error:
            problems.add({"key": key, "reason": "unreadable", "detail": str(error)})
            continue
        if old is not None and before is not None:
            vectors[position] = before.embeddings[old]
            used.add(old)
        else:
            todo.append(len(rows))
        rows.append(dict(zip(COLUMNS, (plain(str(file or key)), plain(caption), plain(key), position, size, modified, sample_key), strict=True)))
    return rows, vectors, todo, len(used)


def plain(text: str) -> str:
    """Text that UTF-8 can hold: a file name may hold bytes that it cannot."""
    return text.encode("utf-8", "backslashreplace").decode()


def _embed(source: Source, pipeline: Pipeline, rows: Sequence[dict[str, Any]], vectors: dict[int, np.ndarray], problems: Problems) -> None:
    """Add the vectors of these rows by position."""
    images, positions = [], []
    for row in rows:
        try:
            images.append(source.image(row["position"], pipeline.size))
            positions.append(row["position"])
        except ImageError as error:
            problems.add(error.as_problem(row["key"]))
    if images:
        vectors.update(zip(positions, pipeline.embed_images(images).float().cpu().numpy().astype(np.float16), strict=True))


def _write(
    folder: Path, rows: Sequence[dict[str, Any]], vectors: dict[int, np.ndarray], pipeline: Pipeline, model: str, data: Sequence[str], faiss_index: str
) -> None:
    import pyarrow as pa

    stacked = np.stack([vectors[row["position"]] for row in rows])  # copies what lies in the file that is replaced
    table = pa.table(
        {name: [row[name].encode("utf-8", "backslashreplace").decode() if isinstance(row[name], str) else row[name] for row in rows] for name in COLUMNS}
    )
    contents: dict[str, Any] = {EMBEDDINGS: lambda file: np.save(file, stacked), METADATA: lambda file: _parquet().write_table(table, file)}
    refused: ValueError | None = None
    if faiss_index:
        try:
            contents[FAISS] = _faiss_index(faiss_index, stacked)
        except ValueError as error:  # what is embedded is kept
            refused, faiss_index = error, ""
    for name, content in contents.items():  # all are whole before the first takes the place of an old one
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{name}.new", content)
    digests = {name: sha256_of(folder / f"{name}.new") for name in contents}
    for name in contents:
        os.replace(folder / f"{name}.new", folder / name)
    if not faiss_index:
        (folder / FAISS).unlink(missing_ok=True)  # of other vectors: whatever reads the folder would take it for theirs
    recorded = model if model in hub.shipped() else str(Path(str(pipeline.folder)).resolve())
    config = IndexConfig(FORMAT, recorded, _weights(pipeline), tuple(data), len(rows), stacked.shape[1], faiss_index, digests)
    write_whole(folder / SETTINGS, dumps(to_dict(config), indent=2) + "\n")
    if refused is not None:
        raise refused


def _faiss_index(description: str, vectors: np.ndarray) -> bytes:
    """faiss's index of the vectors. Raises ValueError: they are too few to train it."""
    built, values = _describe(description, vectors.shape[1]), vectors.astype(np.float32)
    try:
        if not built.is_trained:
            built.train(values)
        built.add(values)
    except RuntimeError as error:
        raise ValueError(f"faiss cannot make {description!r} of {len(vectors):,} images, which are indexed without it; choose Flat or HNSW32") from error
    return faiss().serialize_index(built).tobytes()


def _describe(description: str, width: int) -> Any:
    """An empty index of faiss. Raises ValueError."""
    library = faiss()
    try:
        return library.index_factory(width, description, library.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"faiss knows no index {description!r}; choose one such as Flat (exact), HNSW32 or IVF1024,Flat") from error


def _weights(pipeline: Pipeline) -> str:
    assert pipeline.folder is not None
    return hub.weights_sha256(pipeline.folder)


def _parquet() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"an index of images needs an extra that is not installed ({error}); pip install 'openvision3[search]'") from error
    return pyarrow.parquet


def faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ValueError(f"faiss is an extra that is not installed ({error}); pip install 'openvision3[search]', or use numpy") from error
    return faiss
