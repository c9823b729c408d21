"""Write a latent cache: K random crops of every image, encoded once.

Processes write their parts independently; the last one to finish writes the summary. Crop c of the sample with the sample key `key`
is drawn from the seed (seed, "crop", key, c), so that the same view can be drawn again from the image.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from openvision3.data.images import Box, ImageError, to_tensor
from openvision3.data.latents.files import CACHE, KEYS, SETTINGS, Part, checksum, draw_crop, find_damage, mark_name, part_name, read_mark, to_json
from openvision3.data.latents.settings import FORMAT, LatentSettings, read_json
from openvision3.data.shards.index import Problem
from openvision3.data.sources import Source
from openvision3.data.workers import Workers, check_shared_memory
from openvision3.draws import draw_seed
from openvision3.files import left_behind, write_whole


class _Crops(NamedTuple):
    """All crops of one sample, or the problem with it."""

    name: str
    """`Source.key`, for people"""
    key: str = ""
    words: bytes = b""
    images: Tensor | None = None
    boxes: Sequence[Box] = ()
    problem: Problem | None = None


class _Samples:
    """Source index -> _Crops: the work of the decoding processes."""

    def __init__(self, source: Source, settings: LatentSettings):
        self.source, self.settings = source, settings

    def __getitem__(self, index: int) -> _Crops:
        name, settings = self.source.key(index), self.settings
        try:
            key = self.source.sample_key(index)
            captions, family = self.source.captions(index), self.source.family(index)
            crops = [draw_crop(self.source, index, key, settings.size, settings.seed, crop) for crop in range(settings.crops)]
        except ImageError as error:
            return _Crops(name, problem=error.as_problem(name))
        words: dict[str, Any] = {"name": name, "captions": captions}
        words |= ({"alike": captions.alike} if captions.alike > 1 else {}) | ({"family": family} if family != name else {})
        return _Crops(name, key, json.dumps(words).encode(), torch.stack([image for image, _ in crops]), [box for _, box in crops])


class LatentWriter:
    """Writes parts of a cache into `folder`, each whole or not at all; a part depends on the source and the settings alone.

    `encode` maps images (n, 3, size, size) to latents, `batch` at a time; `workers` processes decode.

    Raises:
        ValueError: the folder holds a cache with other settings, or something else. OSError: it cannot be written.
    """

    def __init__(self, folder: str | Path, source: Source, encode: Callable[[Tensor], Tensor], settings: LatentSettings, *, batch: int = 32, workers: int = 0):
        if batch < 1 or workers < 0:
            raise ValueError(f"batch {batch} must be at least 1, and workers {workers} not negative")
        if settings.samples != len(source):
            raise ValueError(f"the settings are of {settings.samples} samples, but the source has {len(source)}")
        self.folder, self.source, self.encode, self.batch, self.workers = Path(folder), source, encode, batch, workers
        self.settings = claim(self.folder, settings)

    def is_complete(self, part: int) -> bool:
        """Whether `part` exists, byte for byte as it was written.

        Raises:
            ValueError: it exists, but with other samples than the source has now.
        """
        mark = read_mark(self.folder, part)
        if mark is None:
            return False
        if find_damage(self.folder, mark, hashed=True):
            (self.folder / mark_name(part)).unlink(missing_ok=True)  # or another process would take the part for complete
            return False
        with Part(self.folder, part, self.settings).open() as reader:
            written = {reader.words(row)["name"] for row in range(reader.part.count)} | {problem["key"] for problem in mark["skipped"]}
        current = {self.source.key(index) for index in self.settings.range(part)}
        if written != current:
            raise ValueError(
                f"{self.folder / part_name(part)} holds other samples than the data have now, such as {min(written ^ current)}; "
                "restore the old data, or choose another folder with --out"
            )
        return True

    def write(self, parts: Sequence[int]) -> Iterator[int]:
        """Write these parts in turn; yields the number of further samples that are done.

        Raises:
            OSError: no room, or no permission; complete parts stay.
        """
        if not parts:
            return
        indices, items = itertools.chain.from_iterable(map(self.settings.range, parts)), _Samples(self.source, self.settings)
        first = items[self.settings.range(parts[0])[0]].images
        check_shared_memory(0 if first is None else first.nbytes, self.workers, held=self.batch)
        samples = Workers(items, self.workers).make(indices) if self.workers else map(items.__getitem__, indices)
        for part in parts:
            yield from self._write_part(part, samples)

    def _write_part(self, part: int, samples: Iterator[_Crops]) -> Iterator[int]:
        settings = self.settings
        usable: list[_Crops] = []
        problems: list[Problem] = []
        waiting: list[Tensor] = []
        encoded: list[Tensor] = []

        def encode(images: list[Tensor]) -> None:
            encoded.append(self.encode(to_tensor(torch.stack(images))).to("cpu", torch.bfloat16))

        for _ in settings.range(part):
            crops = next(samples)
            yield 1
            if crops.images is None:
                problems.append(cast(Problem, crops.problem))
                continue
            usable.append(crops._replace(images=None))
            waiting.extend(crops.images)
            while len(waiting) >= self.batch:
                encode(waiting[: self.batch])
                del waiting[: self.batch]
        if waiting:
            encode(waiting)
        shape = (len(usable), settings.crops, *settings.shape)
        latents = torch.cat(encoded).reshape(shape) if encoded else torch.empty(shape, dtype=torch.bfloat16)
        finite = torch.isfinite(latents).flatten(1).all(1)
        detail = f"the VAE gives no finite numbers in {settings.precision}"
        problems += [{"key": usable[row].name, "reason": "latents not finite", "detail": detail} for row in (~finite).nonzero().flatten().tolist()]
        rows = finite.nonzero().flatten()
        data = _serialise(settings, part, [usable[row] for row in rows.tolist()], latents[rows])
        write_whole(self.folder / part_name(part), data)
        mark = {**_entry(part_name(part), data), "samples": len(rows), "skipped": problems}
        write_whole(self.folder / mark_name(part), to_json(mark))

    def finish(self) -> dict[str, Any] | None:
        """Write `keys.safetensors` and then `cache.json`, and return the latter; None while some parts are not complete.

        Every process calls this; all write the same.
        """
        marks = [mark for part in range(self.settings.parts) if (mark := read_mark(self.folder, part)) and not find_damage(self.folder, mark)]
        if len(marks) < self.settings.parts:
            return None
        skipped = Counter(problem["reason"] for problem in (*self.source.problems, *(p for mark in marks for p in mark["skipped"])))
        if not any(mark["samples"] for mark in marks):
            raise ValueError(f"none of the {self.settings.samples} samples can be used: {', '.join(f'{n} {why}' for why, n in skipped.most_common())}")
        keys = self._serialise_keys([mark["samples"] for mark in marks])
        write_whole(self.folder / KEYS, keys)
        summary = {
            "format": FORMAT,
            **asdict(self.settings),
            "entries": sum(mark["samples"] for mark in marks),
            "skipped": dict(sorted(skipped.items())),
            "keys": _entry(KEYS, keys),
            "parts": [{name: mark[name] for name in ("file", "bytes", "sha256", "samples")} for mark in marks],
        }
        write_whole(self.folder / CACHE, to_json(summary))
        for file in self.folder.glob(".part-*"):
            if left_behind(file):
                file.unlink(missing_ok=True)
        return summary

    def _serialise_keys(self, counts: list[int]) -> bytes:
        """`keys.safetensors`; for copies of an image it names the first."""
        from safetensors.numpy import save

        hashes = []
        for number, count in enumerate(counts):
            with Part(self.folder, number, self.settings).open() as part:
                hashes.append(np.frombuffer(part.read("key_hashes", 0, 8 * count), "<i8"))
        parts = np.repeat(np.arange(len(counts), dtype="<i4"), counts)
        rows = np.concatenate([np.arange(count, dtype="<i4") for count in counts])
        distinct, first = np.unique(np.concatenate(hashes), return_index=True)
        return save({"hashes": distinct, "parts": parts[first], "rows": rows[first]})


def claim(folder: Path, settings: LatentSettings) -> LatentSettings:
    """Write `settings` into a new folder, or check that the folder has equal ones; returns those in the folder.

    Raises:
        ValueError: it has other settings, or holds other files. OSError: it cannot be written.
    """
    path = folder / SETTINGS
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder with --out")
    if not path.exists():
        if folder.exists() and (others := sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))):
            if not path.exists():  # and another process has not written it just now
                raise ValueError(f"{folder} holds other files, such as {others[0]}; name a new folder with --out")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, to_json({"format": FORMAT, **asdict(settings)}), first_wins=True)
    existing = LatentSettings.read(path)
    if read_json(path)["format"] != FORMAT:
        raise ValueError(f"{folder} was written by an older version; it can be trained on but not continued: choose another folder with --out")
    if differences := settings.differences(existing):
        raise ValueError(f"{folder} was begun with other settings: {'; '.join(differences)}; use the same settings, or choose another folder with --out")
    return existing


def _entry(file: str, data: bytes) -> dict[str, Any]:
    return {"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _serialise(settings: LatentSettings, part: int, samples: list[_Crops], latents: Tensor) -> bytes:
    from safetensors.torch import save

    keys = [crops.key.encode("utf-8", "surrogateescape") for crops in samples]
    boxes = torch.tensor([crops.boxes for crops in samples], dtype=torch.int32).reshape(len(samples), settings.crops, 4)
    checksums = [
        [checksum(key, boxes[row, crop].numpy().tobytes(), latents[row, crop].view(torch.int16).numpy().tobytes()) for crop in range(settings.crops)]
        for row, key in enumerate(keys)
    ]
    tensors = {
        "latents": latents.contiguous(),
        "boxes": boxes,
        "checksums": torch.tensor(checksums, dtype=torch.int64).reshape(len(samples), settings.crops),
        "key_hashes": torch.tensor([draw_seed(crops.key) for crops in samples], dtype=torch.int64),
        **_strings("key", keys),
        **_strings("word", [crops.words for crops in samples]),
    }
    # One entry, because safetensors keeps no order of several.
    return save(tensors, {"openvision3": json.dumps({"format": FORMAT, "part": part, **asdict(settings)})})


def _strings(name: str, values: list[bytes]) -> dict[str, Tensor]:
    ends = np.cumsum([len(value) for value in values], dtype=np.int64)
    return {f"{name}s": torch.from_numpy(np.frombuffer(b"".join(values), np.uint8).copy()), f"{name}_ends": torch.from_numpy(ends)}
