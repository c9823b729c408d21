"""Draw samples into one `.npz` as guided diffusion (ADM) writes them: `arr_0` (uint8, NHWC), `arr_1` (labels), and how they were drawn.

Parts of PART images are written while drawing. A command that was interrupted, or that ran out of space, keeps them and goes on from them when it is
run again; the finished file is the same, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from openvision3 import distributed
from openvision3.data.arrays import IMAGES, RECORD, ArraySource
from openvision3.data.images import ImageError, to_uint8
from openvision3.data.sources import Source
from openvision3.draws import draw_seed
from openvision3.evaluate.image_set import Watch, on_first
from openvision3.evaluate.parts import check_same, keeping_parts, open_parts
from openvision3.evaluate.protocol import Conditions
from openvision3.files import half_written, left_behind, write_whole

PART = 128
"""images in a part; it does not depend on the batch or the number of processes"""
PARTS, SETTINGS = ".parts", "drawing.json"
OTHER = "samples of another drawing"


@dataclass(frozen=True)
class Drawing:
    """Which samples are drawn, and how."""

    count: int
    size: int
    """side of the images in pixels"""
    sample: Callable[[Sequence[int], Conditions | None], Tensor]
    """numbers of samples, their conditions -> images (B, 3, size, size) in [-1, 1]; a sample does not depend on the others of its batch"""
    conditions: Conditions | None
    """of each sample; None: drawn without"""
    record: dict[str, Any]
    """what else the images depend on: model, seed, guidance, sampler; kept in the file"""

    def settings(self) -> dict[str, Any]:
        conditions = hashlib.sha256(json.dumps(list(self.conditions or ())).encode()).hexdigest()[:16]
        return {"count": self.count, "size": self.size, **self.record, "conditions_sha256": conditions}


def draw(drawing: Drawing, path: Path, batch: int, watch: Watch, what: str = "drawing") -> None:
    """Draw what is missing of `path`, shared among the ranks. A finished file of the same drawing is left as it is.

    Raises:
        ValueError: the file or its parts are of another drawing, or the images are not of this size or not finite.
        OSError: the file cannot be written; the parts stay.
    """
    missing = on_first(lambda: _missing_parts(drawing, path))
    if missing is None:
        return
    mine = missing[distributed.rank() :: distributed.world()]
    batches = [range(start, min(start + batch, end)) for first in mine for end in [min(first + PART, drawing.count)] for start in range(first, end, batch)]
    with distributed.together():
        pixels: list[np.ndarray] = []
        for indices in watch(batches, f"{what}, {batch} at a time", len(batches)):
            pixels.append(_pixels(drawing, indices))
            last = indices[-1] + 1
            if last % PART == 0 or last == drawing.count:
                with keeping_parts("the samples drawn so far"):
                    write_whole(_part(path, (last - 1) // PART * PART), np.concatenate(pixels).tobytes())
                pixels = []
    on_first(lambda: _join(drawing, path))


def _pixels(drawing: Drawing, indices: range) -> np.ndarray:
    """uint8 (B, H, W, 3)"""
    conditions = None if drawing.conditions is None else drawing.conditions[indices.start : indices.stop]
    with torch.no_grad():
        images = drawing.sample(indices, conditions)
    expected = (len(indices), 3, drawing.size, drawing.size)
    if tuple(images.shape) != expected:
        raise ValueError(f"samples {indices.start} to {indices[-1]} have shape {tuple(images.shape)}, expected {expected}")
    if not images.isfinite().all():
        raise ValueError(f"samples {indices.start} to {indices[-1]} are not finite: draw in fp32")
    return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()


def _folder(path: Path) -> Path:
    return path.with_name(path.name + PARTS)


def _part(path: Path, first: int) -> Path:
    return _folder(path) / f"{first:09d}.uint8"


def _missing_parts(drawing: Drawing, path: Path) -> list[int] | None:
    """The first sample of each part that is not there yet; None for a finished file. Writes the settings beside the parts."""
    folder, settings = _folder(path), drawing.settings()
    for unfinished in half_written(path):
        if left_behind(unfinished):
            unfinished.unlink()
    if path.is_file():
        recorded = ArraySource(path).record()
        check_same({name: value for name, value in recorded.items() if name != "texts"}, settings, path, OTHER)
        shutil.rmtree(folder, ignore_errors=True)  # the process was killed just after the file was finished
        return None
    open_parts(folder / SETTINGS, settings, OTHER)
    length = drawing.size**2 * 3
    sizes = {first: (min(first + PART, drawing.count) - first) * length for first in range(0, drawing.count, PART)}
    return [first for first, size in sizes.items() if not _part(path, first).is_file() or _part(path, first).stat().st_size != size]


def _join(drawing: Drawing, path: Path) -> None:
    """Write the file from its parts, which are then removed."""
    record = drawing.settings()
    labels = None
    if drawing.conditions is not None and all(isinstance(one, int) for one in drawing.conditions):
        labels = np.array(drawing.conditions, dtype=np.int64)
    elif drawing.conditions is not None:
        record["texts"] = list(drawing.conditions)

    def write(file: BinaryIO) -> None:
        # ZipInfo without a date, unlike np.savez: the same drawing gives the same bytes
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(zipfile.ZipInfo(f"{IMAGES}.npy"), "w", force_zip64=True) as member:
                shape = (drawing.count, drawing.size, drawing.size, 3)
                np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for first in range(0, drawing.count, PART):
                    member.write(_part(path, first).read_bytes())
            for name, array in (("arr_1", labels), (RECORD, np.frombuffer(json.dumps(record).encode(), np.uint8))):
                if array is not None:
                    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)

    with keeping_parts("the samples drawn so far"):
        write_whole(path, write)
    shutil.rmtree(_folder(path))


# -- conditions ------------------------------------------------------------------------------------------------------


def choose_labels(count: int, classes: int, mode: str, seed: int) -> list[int]:
    """The class of each sample: in turn (balanced), or drawn by seed and number (random)."""
    return [number % classes if mode == "balanced" else draw_seed(seed, "label", number) % classes for number in range(count)]


def choose_texts(source: Source, count: int, mode: str, seed: int) -> list[str]:
    """A caption of the source for each sample: evenly spaced over the source, or in turn where it has fewer samples (balanced); or drawn (random).

    The next sample's is taken in place of a missing one. Raises ValueError for a source without captions.
    """
    length, without = len(source), 0
    texts: list[str] = []
    for number in range(count):
        at = draw_seed(seed, "text", number) % length if mode == "random" else number * length // count if count < length else number % length
        for place in range(at, at + length):
            text = _caption(source, place % length)
            if text:
                texts.append(text)
                break
            without += 1
            if not texts and without >= length:
                raise ValueError(f"none of the {length:,} images of the reference has a caption to draw from; name data with captions with --data")
    return texts


def _caption(source: Source, index: int) -> str:
    try:
        return next(iter(source.captions(index)), "")
    except ImageError:  # the image itself is counted when it is read
        return ""
