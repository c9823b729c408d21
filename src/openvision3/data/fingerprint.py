"""What training data can be recognised by, without holding them: hashes of their captions and families, and 118 bytes of each image.

Two images are near-duplicates where no cell of a 10 x 10 grid of brightness and a 3 x 3 grid of colour differs by more than 10 of 255: copies
through JPEG, scaling and other formats do not, and other images, drawings on white among them, do. docs/evaluation.md has the numbers.
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

from openvision3.data.batches import evaluation_batches
from openvision3.data.images import to_uint8
from openvision3.data.problems import Problems
from openvision3.data.shards.tars import Watch, plain
from openvision3.data.sources import Source
from openvision3.files import write_whole

FORMAT = "openvision3 fingerprint 1"
FILE = "fingerprint.safetensors"

SIZE = 128
"""side of the view that is described, in pixels"""
GREY, COLOUR = 10, 3
"""cells a side"""
WIDTH = GREY**2 + 2 * COLOUR**2
"""bytes of one image"""
CELL = 10
"""most that a cell of a near-duplicate differs"""
SQUARED = 25 * WIDTH
"""most that all of them differ, squared and added up: five a cell on average"""
AT_A_TIME = 64
"""images described at a time"""
AT_ONCE = 2**22
"""distances in memory at a time: 16 MB"""


def normalised(caption: str) -> str:
    """In small letters, without punctuation and symbols, one space between words; of a caption of nothing else, itself."""
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
    """(count, size): the mean over each of `count` equal cells, of pixels that lie on an edge with their share."""
    edges = torch.arange(count + 1) * size / count
    left, right = edges[:-1, None], edges[1:, None]
    pixels = torch.arange(size)
    return (torch.minimum(right, pixels + 1) - torch.maximum(left, pixels)).clamp_min(0) * count / size


@dataclass
class Fingerprint:
    """Of some data: what an evaluation compares its own samples with."""

    data: tuple[str, ...]
    """their names, for people"""
    samples: int
    """how many they hold, those that cannot be used among them"""
    images: np.ndarray
    """(N, WIDTH) uint8"""
    captions: np.ndarray
    """int64, sorted: hashes of the normalised captions"""
    families: np.ndarray
    """int64, sorted: hashes of the families of samples that have relatives"""
    keys: list[str] = field(default_factory=list)
    """of the images, where the data are at hand: no file holds them"""

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all. Raises OSError."""
        from safetensors.numpy import save

        told = {"format": FORMAT, "data": json.dumps(self.data), "samples": str(self.samples)}
        tensors = {"images": np.unique(self.images, axis=0), "captions": self.captions, "families": self.families}
        write_whole(path, save(tensors, metadata=told))

    @classmethod
    def load(cls, path: str | Path) -> Fingerprint:
        """Raises OSError; ValueError where the file is none of ours."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "numpy") as file:
                told = file.metadata() or {}
                if told.get("format") != FORMAT:
                    raise ValueError(f"it is of format {told.get('format')!r}, this version reads {FORMAT!r}")
                images, captions, families = (file.get_tensor(name) for name in ("images", "captions", "families"))
            if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != WIDTH or {captions.dtype, families.dtype} != {np.dtype(np.int64)}:
                raise ValueError("its tensors have other shapes")
            return cls(tuple(json.loads(told["data"])), int(told["samples"]), images, captions, families)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no fingerprint that can be read: {error}; write it anew with openvision3 data fingerprint DATA --out {path}"
            ) from error

    @classmethod
    def joined(cls, parts: Sequence[Fingerprint]) -> Fingerprint:
        """Of all these data."""
        names = tuple(dict.fromkeys(name for part in parts for name in part.data))
        keys = [key for part in parts for key in (part.keys or [""] * len(part.images))]
        images = np.concatenate([part.images for part in parts])
        captions, families = (np.unique(np.concatenate([getattr(part, name) for part in parts])) for name in ("captions", "families"))
        return cls(names, sum(part.samples for part in parts), images, captions, families, keys)

    def has_caption(self, caption: str) -> bool:
        return _holds(self.captions, text_hash(normalised(caption)))

    def has_family(self, family: str) -> bool:
        return _holds(self.families, text_hash(family))

    def nearest(self, images: Tensor) -> Iterator[tuple[int, int, int]]:
        """`near_duplicates` among these."""
        return near_duplicates(images, torch.from_numpy(self.images))


def near_duplicates(images: Tensor, known: Tensor) -> Iterator[tuple[int, int, int]]:
    """Both (n, WIDTH) uint8: (which image has a near-duplicate among the known, the place of the nearest, how much their most unlike cell differs)."""
    asked = images.float() - 128
    left = torch.cat([asked, (asked**2).sum(1, keepdim=True), torch.ones(len(asked), 1)], 1)
    best: dict[int, tuple[int, int]] = {}
    width = max(1, AT_ONCE // max(1, len(images)))
    for start in range(0, len(known), width):
        part = known[start : start + width].float() - 128
        right = torch.cat([-2 * part, torch.ones(len(part), 1), (part**2).sum(1, keepdim=True)], 1)
        rows, columns = (left @ right.T <= SQUARED + 4).nonzero(as_tuple=True)  # of squared distances, by one product; rounding is below 4
        apart = (asked[rows] - part[columns]).abs().amax(1) if len(rows) else torch.zeros(0)
        for row, column, cell in zip(rows.tolist(), columns.tolist(), apart.int().tolist(), strict=True):
            if cell <= CELL and (row not in best or cell < best[row][1]):
                best[row] = (start + column, cell)
    for row in sorted(best):
        yield row, *best[row]


def recorded(folder: str | Path) -> Fingerprint | None:
    """That which lies in a model folder, of what the model was trained on; None where there is none. Raises OSError; ValueError for a broken one."""
    path = Path(folder) / FILE
    return Fingerprint.load(path) if path.is_file() else None


def _holds(values: np.ndarray, wanted: int) -> bool:
    place = int(np.searchsorted(values, wanted))
    return place < len(values) and int(values[place]) == wanted


def take_fingerprint(source: Source, names: Sequence[str], problems: Problems | None = None, watch: Watch = plain, count: int | None = None) -> Fingerprint:
    """Of every usable sample of a source, or of the first `count`; what cannot be used is listed in `problems`. About 2 ms an image on one core."""
    images, keys, captions, families = [], [], set(), set()
    for indices, of, pictures, texts in evaluation_batches(
        source, SIZE, AT_A_TIME, Problems() if problems is None else problems, watch(range(len(source))[:count], "taking the fingerprint")
    ):
        images.append(describe(pictures).numpy())
        keys += of
        captions |= {text_hash(normalised(text)) for each in texts for text in each}
        families |= {text_hash(source.family(index)) for index, key in zip(indices, of, strict=True) if source.family(index) != key}
    in_order = [np.array(sorted(each), dtype=np.int64) for each in (captions, families)]
    return Fingerprint(tuple(names), len(source), np.concatenate([np.zeros((0, WIDTH), np.uint8), *images]), in_order[0], in_order[1], keys)
