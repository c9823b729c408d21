"""Writing a cache of VAE latents: K random crops of every picture, encoded once.

Any number of processes write parts side by side without a word between them; whichever ends last writes the rest.
Crop c of the sample with the sample key `key` is drawn from the seed (seed, "crop", key, c), so that who has the pictures can draw the same view again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from openvision3.data.images import Box, ImageError, to_tensor
from openvision3.data.latents.files import CACHE, KEYS, SETTINGS, Part, as_long, checksum, draw_crop, mark_name, part_name, read_mark, to_json, unchanged
from openvision3.data.latents.settings import FORMAT, LatentSettings, read_json
from openvision3.data.shards.index import Problem
from openvision3.data.sources import Source
from openvision3.data.workers import Workers, check_shared_memory
from openvision3.draws import draw_seed
from openvision3.files import left_behind, write_whole


class _Views(NamedTuple):
    """All crops of one sample, or why there are none."""

    name: str
    """for people"""
    key: str
    words: bytes
    images: Tensor | None
    boxes: list[Box]
    problem: Problem | None


class _Samples:
    """Source index -> _Views: what the processes of a loader do."""

    def __init__(self, source: Source, settings: LatentSettings):
        self.source, self.settings = source, settings

    def __getitem__(self, index: int) -> _Views:
        name, settings = self.source.key(index), self.settings
        try:
            key = self.source.sample_key(index)
            captions, family = self.source.captions(index), self.source.family(index)
            words: dict[str, Any] = {"name": name, "captions": captions}
            words |= ({"alike": captions.alike} if captions.alike > 1 else {}) | ({"family": family} if family != name else {})
            drawn = [draw_crop(self.source, index, key, settings.size, settings.seed, crop) for crop in range(settings.crops)]
        except ImageError as error:
            return _Views(name, "", b"", None, [], {"key": name, "reason": error.reason, "detail": str(error)})
        images = torch.stack([image for image, _ in drawn])
        return _Views(name, key, json.dumps(words).encode(), images, [box for _, box in drawn], None)


class LatentWriter:
    """Writes parts of a cache into `folder`, each whole or not at all; a part is a function of the source and the settings alone.

    `encode` takes images (n, 3, size, size) to latents; `batch` is how many at once, `workers` how many processes decode.

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

    def complete(self, part: int) -> bool:
        """Whether `part` is there, byte for byte as it was written.

        Raises:
            ValueError: it is, but of other samples than the source has there now.
        """
        found = read_mark(self.folder, part)
        if found is None:
            return False
        if not unchanged(self.folder / part_name(part), found):
            (self.folder / mark_name(part)).unlink(missing_ok=True)  # or another process would take it for complete
            return False
        with Part(self.folder, part, self.settings).open() as there:
            names = [json.loads(there.string("word", row))["name"] for row in range(there.count)]
        written = {*names, *(problem["key"] for problem in found["skipped"])}
        wanted = {self.source.key(index) for index in self.settings.range(part)}
        if written != wanted:
            raise ValueError(
                f"{self.folder / part_name(part)} holds other samples than the data have there now, such as {min(written ^ wanted)}; "
                "put the old data back, or name another folder with --out"
            )
        return True

    def write(self, parts: Sequence[int]) -> Iterator[int]:
        """Write these parts in turn; gives the number of samples done each time there are some more.

        Raises:
            OSError: no room, or no permission; what is complete stays.
        """
        if not parts:
            return
        numbers, items = itertools.chain.from_iterable(map(self.settings.range, parts)), _Samples(self.source, self.settings)
        first = items[self.settings.range(parts[0])[0]].images
        check_shared_memory(0 if first is None else first.nbytes, self.workers, held=self.batch)
        samples = Workers(items, self.workers).make(numbers) if self.workers else map(items.__getitem__, numbers)
        for part in parts:
            yield from self._write_part(part, samples)

    def _write_part(self, part: int, samples: Iterator[_Views]) -> Iterator[int]:
        settings = self.settings
        usable: list[_Views] = []
        problems: list[Problem] = []
        waiting: list[Tensor] = []
        encoded: list[Tensor] = []

        def encode(images: Tensor) -> None:
            encoded.append(self.encode(to_tensor(images)).to("cpu", torch.bfloat16))

        for _ in settings.range(part):
            views = next(samples)
            yield 1
            if views.problem is not None:
                problems.append(views.problem)
                continue
            usable.append(views._replace(images=None))
            assert views.images is not None
            waiting.extend(views.images)
            while len(waiting) >= self.batch:
                encode(torch.stack(waiting[: self.batch]))
                del waiting[: self.batch]
        if waiting:
            encode(torch.stack(waiting))
        shape = (len(usable), settings.crops, *settings.shape)
        latents = torch.cat(encoded).reshape(shape) if encoded else torch.empty(shape, dtype=torch.bfloat16)
        finite = [bool(torch.isfinite(rows).all()) for rows in latents]
        for views, fine in zip(usable, finite, strict=True):
            if not fine:
                problems.append({"key": views.name, "reason": "latents not finite", "detail": f"the VAE gives no finite numbers in {settings.precision}"})
        data = _serialise(settings, part, [v for v, fine in zip(usable, finite, strict=True) if fine], latents[torch.tensor(finite, dtype=torch.bool)])
        write_whole(self.folder / part_name(part), data)
        mark = {"file": part_name(part), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "samples": sum(finite), "skipped": problems}
        write_whole(self.folder / mark_name(part), to_json(mark))

    def finish(self) -> dict[str, Any] | None:
        """Once all parts are complete: write what finds a sample, and last `cache.json`, which is returned; None as long as some are not.

        Everyone may call this; all write the same.
        """
        marks = [read_mark(self.folder, part) for part in range(self.settings.parts)]
        whole = [mark for part, mark in enumerate(marks) if mark is not None and as_long(self.folder / part_name(part), mark)]
        if len(whole) < len(marks):
            return None
        skipped = Counter(problem["reason"] for problem in (*self.source.problems, *(p for mark in whole for p in mark["skipped"])))
        if not any(mark["samples"] for mark in whole):
            raise ValueError(f"none of the {self.settings.samples} samples can be used: {', '.join(f'{n} {why}' for why, n in skipped.most_common())}")
        index = self._index([mark["samples"] for mark in whole])
        write_whole(self.folder / KEYS, index)
        found = {
            "format": FORMAT,
            **asdict(self.settings),
            "entries": sum(mark["samples"] for mark in whole),
            "skipped": dict(sorted(skipped.items())),
            "keys": {"file": KEYS, "bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()},
            "parts": [{name: mark[name] for name in ("file", "bytes", "sha256", "samples")} for mark in whole],
        }
        write_whole(self.folder / CACHE, to_json(found))
        for left in self.folder.glob(".part-*"):
            if left_behind(left):
                left.unlink(missing_ok=True)
        return found

    def _index(self, counts: list[int]) -> bytes:
        """`keys.safetensors`; of copies of an image it names the first."""
        from safetensors.torch import save

        hashes, parts, rows = [], [], []
        for number, count in enumerate(counts):
            with Part(self.folder, number, self.settings).open() as part:
                hashes.append(np.frombuffer(part.read("key_hashes", 0, 8 * count), "<i8"))
            parts.append(np.full(count, number, "<i4"))
            rows.append(np.arange(count, dtype="<i4"))
        found, first = np.unique(np.concatenate(hashes), return_index=True)
        arrays = {"hashes": found, "parts": np.concatenate(parts)[first], "rows": np.concatenate(rows)[first]}
        return save({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()})


def claim(folder: Path, settings: LatentSettings) -> LatentSettings:
    """Make `folder` one of these settings, or see that it is; returns those written down there.

    Raises:
        ValueError: it has other settings, or holds other things. OSError: it cannot be written.
    """
    path = folder / SETTINGS
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder with --out")
    if not path.exists():
        if folder.exists() and (other := sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))):
            if not path.exists():  # and has not come just now, from another process
                raise ValueError(f"{folder} holds other things, such as {other[0]}; name a new folder with --out")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, to_json({"format": FORMAT, **asdict(settings)}), first_wins=True)
    there = LatentSettings.read(path)
    if read_json(path)["format"] != FORMAT:
        raise ValueError(f"{folder} was written by an older version, which can still be trained on but not written to; name another folder with --out")
    if differences := settings.differences(there):
        raise ValueError(f"{folder} was begun with other settings, and cannot go on with {'; '.join(differences)}; name another folder with --out")
    return there


def _serialise(settings: LatentSettings, part: int, usable: list[_Views], latents: Tensor) -> bytes:
    from safetensors.torch import save

    keys, words = [views.key.encode("utf-8", "surrogateescape") for views in usable], [views.words for views in usable]
    boxes = torch.tensor([views.boxes for views in usable], dtype=torch.int32).reshape(len(usable), settings.crops, 4)
    checks = [
        [checksum(key, boxes[row, crop].numpy().tobytes(), latents[row, crop].view(torch.int16).numpy().tobytes()) for crop in range(settings.crops)]
        for row, key in enumerate(keys)
    ]
    tensors = {
        "latents": latents.contiguous(),
        "boxes": boxes,
        "checksums": torch.tensor(checks, dtype=torch.int64).reshape(len(usable), settings.crops),
        "key_hashes": torch.tensor([draw_seed(views.key) for views in usable], dtype=torch.int64),
        **_strings("key", keys),
        **_strings("word", words),
    }
    # One entry: the order of several is not the same from one process to the next.
    return save(tensors, {"openvision3": json.dumps({"format": FORMAT, "part": part, **asdict(settings)})})


def _strings(name: str, values: list[bytes]) -> dict[str, Tensor]:
    ends = np.cumsum([len(value) for value in values], dtype=np.int64)
    return {f"{name}s": torch.from_numpy(np.frombuffer(b"".join(values), np.uint8).copy()), f"{name}_ends": torch.from_numpy(ends)}
