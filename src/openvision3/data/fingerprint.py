"""A fingerprint of training data, by which samples are recognised: hashes of captions, families and concepts, and 118 bytes of each image.

Two images are near-duplicates if no cell of a 10 x 10 grid of brightness and a 3 x 3 grid of colour differs by more than 10 of 255. This
holds for copies that were scaled or saved in another format, and not for different images, drawings on white included
(docs/evaluation.md has the numbers).
"""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openvision3.data import openmoji
from openvision3.data.batches import evaluation_batches
from openvision3.data.images import to_uint8
from openvision3.data.problems import Problems
from openvision3.data.shards.tars import Watch, plain
from openvision3.data.sources import Source
from openvision3.files import write_whole

FORMAT = "openvision3 fingerprint 1"
FILE = "fingerprint.safetensors"

SIZE = 128
"""side of the square that is described, in pixels"""
GREY, COLOUR = 10, 3
"""cells on each side of the grids"""
WIDTH = GREY**2 + 2 * COLOUR**2
"""bytes for each image"""
CELL = 10
"""largest difference of a cell between near-duplicates"""
SQUARED = 25 * WIDTH
"""largest sum of squared differences: a root mean square of five"""
AT_A_TIME = 64
"""images that are described at a time"""
AT_ONCE = 2**22
"""distances that are in memory at a time: 16 MB"""


def normalised(caption: str) -> str:
    """In lower case, without punctuation and symbols, one space between words; a caption of punctuation only stays unchanged."""
    text = unicodedata.normalize("NFKC", caption).casefold()
    kept = "".join(" " if unicodedata.category(letter)[0] in "PSZC" else letter for letter in text)
    return " ".join(kept.split()) or " ".join(text.split())


def text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little", signed=True)


def describe(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> (B, WIDTH) uint8: brightness and two colours, averaged over cells."""
    red, green, blue = to_uint8(images).float().unbind(1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    planes = [(grey, GREY), ((blue - grey) * 0.564 + 128, COLOUR), ((red - grey) * 0.713 + 128, COLOUR)]
    cells = [(_cells(p.shape[1], n) @ p @ _cells(p.shape[2], n).T).flatten(1) for p, n in planes]
    return torch.cat(cells, 1).round().clamp(0, 255).to(torch.uint8)


@functools.cache
def _cells(size: int, count: int) -> Tensor:
    """(count, size): weights of the mean over each of `count` equal cells; pixels on an edge count by their share."""
    edges = torch.arange(count + 1) * size / count
    left, right = edges[:-1, None], edges[1:, None]
    pixels = torch.arange(size)
    return (torch.minimum(right, pixels + 1) - torch.maximum(left, pixels)).clamp_min(0) * count / size


@dataclass
class Fingerprint:
    """The fingerprint of some data, with which an evaluation compares its samples."""

    data: tuple[str, ...]
    """the names of the data, for people"""
    samples: int
    """number of samples, unusable ones included"""
    images: np.ndarray
    """(N, WIDTH) uint8"""
    captions: np.ndarray
    """int64, sorted: hashes of the normalised captions"""
    families: np.ndarray
    """int64, sorted: hashes of the families with several members; of drawings, of style and family together (`Source.family`)"""
    keys: list[str] = field(default_factory=list)
    """of the images, if it was taken in this process; files do not hold them"""
    concepts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """int64, sorted: hashes of the families of drawings, whatever their style; files of earlier versions have none"""

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, completely or not at all. Raises OSError."""
        from safetensors.numpy import save

        notes = {"format": FORMAT, "data": json.dumps(self.data), "samples": str(self.samples)}
        tensors = {"images": np.unique(self.images, axis=0), "captions": self.captions, "families": self.families, "concepts": self.concepts}
        write_whole(path, save(tensors, metadata=notes))

    @classmethod
    def load(cls, path: str | Path) -> Fingerprint:
        """Raises OSError; ValueError for a file that is no fingerprint."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "numpy") as file:
                notes = file.metadata() or {}
                if notes.get("format") != FORMAT:
                    raise ValueError(f"it is of format {notes.get('format')!r}, this version reads {FORMAT!r}")
                images, captions, families = (file.get_tensor(name) for name in ("images", "captions", "families"))
                concepts = file.get_tensor("concepts") if "concepts" in file.keys() else np.zeros(0, dtype=np.int64)  # noqa: SIM118 (no mapping)
            hashes = {captions.dtype, families.dtype, concepts.dtype}
            if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != WIDTH or hashes != {np.dtype(np.int64)}:
                raise ValueError("its tensors have other shapes")
            return cls(tuple(json.loads(notes["data"])), int(notes["samples"]), images, captions, families, concepts=concepts)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a readable fingerprint: {error}; write it again with openvision3 data fingerprint DATA --out {path}") from error

    @classmethod
    def joined(cls, parts: Sequence[Fingerprint]) -> Fingerprint:
        """One fingerprint of all these data; the same data twice, as of two phases of training, count once."""
        parts = [part for i, part in enumerate(parts) if not any(part.is_of_the_data_of(earlier) for earlier in parts[:i])]
        names = tuple(dict.fromkeys(name for part in parts for name in part.data))
        keys = [key for part in parts for key in (part.keys or [""] * len(part.images))]
        images = np.concatenate([part.images for part in parts])
        hashes = [np.unique(np.concatenate([getattr(part, name) for part in parts])) for name in ("captions", "families", "concepts")]
        return cls(names, sum(part.samples for part in parts), images, hashes[0], hashes[1], keys, hashes[2])

    def is_of_the_data_of(self, other: Fingerprint) -> bool:
        """Whether both were taken of the same samples; names and the order of images do not count."""
        hashes = all(np.array_equal(getattr(self, name), getattr(other, name)) for name in ("captions", "families", "concepts"))
        return hashes and self.samples == other.samples and np.array_equal(np.unique(self.images, axis=0), np.unique(other.images, axis=0))

    def has_caption(self, caption: str) -> bool:
        return _holds(self.captions, text_hash(normalised(caption)))

    def has_family(self, family: str) -> bool:
        return _holds(self.families, text_hash(family))

    def has_concept(self, family: str) -> bool:
        """Whether drawings of this family were trained on in any style. Before concepts were recorded, OpenMoji was the only style."""
        return _holds(self.concepts, text_hash(family)) or self.has_family(f"{openmoji.STYLE}/{family}")

    def nearest(self, images: Tensor) -> Iterator[tuple[int, int, int]]:
        """`near_duplicates` of `images` among these."""
        return near_duplicates(images, torch.from_numpy(self.images))


def near_duplicates(images: Tensor, known: Tensor) -> Iterator[tuple[int, int, int]]:
    """Both (n, WIDTH) uint8 -> (row of an image that has a near-duplicate, row of the nearest one in `known`, largest difference of a cell)."""
    centred = images.float() - 128
    left = torch.cat([centred, (centred**2).sum(1, keepdim=True), torch.ones(len(centred), 1)], 1)
    best: dict[int, tuple[int, int]] = {}
    width = max(1, AT_ONCE // max(1, len(images)))
    for start in range(0, len(known), width):
        part = known[start : start + width].float() - 128
        right = torch.cat([-2 * part, torch.ones(len(part), 1), (part**2).sum(1, keepdim=True)], 1)
        rows, columns = (left @ right.T <= SQUARED + 4).nonzero(as_tuple=True)  # squared distances by one matrix product; rounding stays below 4
        apart = (centred[rows] - part[columns]).abs().amax(1) if len(rows) else torch.zeros(0)
        for row, column, cell in zip(rows.tolist(), columns.tolist(), apart.int().tolist(), strict=True):
            if cell <= CELL and (row not in best or cell < best[row][1]):
                best[row] = (start + column, cell)
    for row in sorted(best):
        yield row, *best[row]


def recorded(folder: str | Path) -> Fingerprint | None:
    """The fingerprint in a model folder, of the model's training data; None if there is none. Raises OSError; ValueError if it is broken."""
    path = Path(folder) / FILE
    return Fingerprint.load(path) if path.is_file() else None


def _holds(values: np.ndarray, wanted: int) -> bool:
    place = int(np.searchsorted(values, wanted))
    return place < len(values) and int(values[place]) == wanted


def take_fingerprint(source: Source, names: Sequence[str], problems: Problems | None = None, watch: Watch = plain, count: int | None = None) -> Fingerprint:
    """Take the fingerprint of a source, or of its first `count` samples; unusable ones are added to `problems`. About 2 ms an image on one core."""
    rows, keys, captions, families, concepts = [], [], set(), set(), set()
    indices = watch(range(len(source))[:count], "taking the fingerprint")
    for batch, of_batch, images, texts in evaluation_batches(source, SIZE, AT_A_TIME, Problems() if problems is None else problems, indices):
        rows.append(describe(images).numpy())
        keys += of_batch
        captions |= {text_hash(normalised(text)) for captions_of_one in texts for text in captions_of_one}
        families |= {text_hash(source.family(index)) for index, key in zip(batch, of_batch, strict=True) if source.family(index) != key}
        concepts |= {text_hash(drawing[1]) for index in batch if (drawing := source.drawing(index))}
    in_order = [np.array(sorted(hashes), dtype=np.int64) for hashes in (captions, families, concepts)]
    return Fingerprint(tuple(names), len(source), np.concatenate([np.zeros((0, WIDTH), np.uint8), *rows]), in_order[0], in_order[1], keys, in_order[2])
