"""New captions for shards and folders, written by any image-to-text model of transformers; a job that is stopped can be resumed.

Each input shard becomes one output shard of the same name: all members are copied byte for byte, except the `.json`, which
gains the new caption. A job can be killed at any moment: finished shards stay, and a journal beside the unfinished one
holds every finished batch. The caption of a sample depends on the model, the wording, the seed and the sample's
name, never on the batch, the process or the number of restarts.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from openvision3.data.captions import json_object
from openvision3.data.images import ImageError
from openvision3.data.names import find
from openvision3.data.shards.index import is_remote
from openvision3.device import choose_device, cores, dtype_of
from openvision3.files import half_written, write_whole
from openvision3.recaption.files import CaptionFolder, CaptionShard, Journal, Result, journal_path
from openvision3.recaption.image_text import Answer, Identity, ImageTextModel, identify
from openvision3.recaption.job import RecaptionJob

SETTINGS = "recaption.json"
"""In the output folder: all that its captions depend on."""

Describe = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[Answer | ImageError]]
"""images and the names of their samples -> an answer to each, or why there is none; `ImageTextModel` is one"""


def settings_of(job: RecaptionJob, identity: Identity, precision: str) -> dict[str, Any]:
    """All that the captions depend on, except the images. The seed is left out when nothing is sampled."""
    wording = job.wording
    sampling = {"top_p": wording.top_p, "temperature": wording.temperature, "seed": wording.seed} if wording.is_sampled else {}
    length = {"max_new_tokens": wording.max_new_tokens, "max_words": job.max_words}
    model = {"model": identity.name, "revision": identity.revision, "prompt": wording.prompt}
    return {**model, **length, **sampling, "precision": precision, "field": job.field, "caption_key": job.caption_key}


@dataclass
class Tally:
    """What a job has done so far."""

    shards: int = 0
    """shards and folders of this process"""
    written: list[Path] = field(default_factory=list)
    standing: list[Path] = field(default_factory=list)
    """finished by an earlier run"""
    unwritten: int = 0
    samples: int = 0
    resumed: int = 0
    """samples that the journals held"""
    kept: Counter[str] = field(default_factory=Counter)
    """samples that keep their old caption, by reason"""
    cut: int = 0
    """captions that end at max_new_tokens"""
    problems: list[dict[str, str]] = field(default_factory=list)
    """{key, reason, detail}: shards that are damaged, and shards that were not written"""
    share: float = 0.0
    """of this process's bytes that are done"""
    working: str = ""
    """the name of the current shard"""
    began: float = 0.0
    began_share: float = 0.0

    def advance(self, share: float) -> None:
        """Set the share; the first call starts the clock."""
        self.share = share
        if not self.began:
            self.began, self.began_share = time.monotonic(), share

    def count(self, results: Sequence[Result]) -> None:
        self.samples += len(results)
        self.kept.update(result["kept"] for result in results if "kept" in result)
        self.cut += sum("cut" in result for result in results)

    @property
    def rate(self) -> float:
        """Samples a second since the first batch."""
        return (self.samples - self.resumed) / max(time.monotonic() - self.began, 1e-9) if self.began else 0.0

    @property
    def left(self) -> float | None:
        """Estimated seconds that are left, by bytes; None while nothing is known."""
        gained = self.share - self.began_share
        return (time.monotonic() - self.began) * (1 - self.share) / gained if self.began and gained > 0 else None


Watch = Callable[[Tally], None]
"""called after every batch and shard"""


def recaption(job: RecaptionJob, watch: Watch = lambda tally: None) -> Tally:
    """Write new captions with the model that `job` names. Raises ValueError as `write_captions`, and when there is no such model."""
    device = choose_device(job.device)
    precision = ("bf16" if device.startswith("cuda") else "fp32") if job.precision == "auto" else job.precision
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    settings = settings_of(job, identify(job.model, job.revision, job.download), precision)

    def load() -> ImageTextModel:
        return ImageTextModel(job.model, job.wording, revision=job.revision, device=device, dtype=dtype_of(precision), download=job.download)

    return write_captions(job, settings, load, watch)


def write_captions(job: RecaptionJob, settings: Mapping[str, Any], load: Callable[[], Describe], watch: Watch = lambda tally: None) -> Tally:
    """Write the shards and the folder of `job` anew, with captions by the model that `load` returns.

    `settings` (`settings_of`) is the same for all captions under `job.out`. The model is loaded when the first shard needs it.
    A shard that exists under `job.out` is finished; one with a journal is continued.

    Raises:
        ValueError: there is nothing to caption, or `job.out` holds other files or captions of another model or wording.
    """
    out = Path(job.out)
    shards = list(_list_shards(job))
    known = _agree(out, settings)
    if known is None and (existing := [shard.target for shard in shards if shard.target.exists()]):
        raise ValueError(f"{existing[0]} exists and was not written by recaption; choose another folder with --out")
    by = {name: str((known or settings)[name]) for name in ("model", "revision", "prompt") if (known or settings).get(name)}
    rank, world = job.split
    shards = shards[rank::world]
    tally = Tally(len(shards))
    if rank == 0:
        _tell_of_the_missing(job, tally)
    total = max(1, sum(shard.size for shard in shards))
    done = 0
    describe: Describe | None = None
    for shard in shards:
        tally.working = shard.target.name
        if shard.target.exists() and not shard.is_source_of_target():
            tally.unwritten += 1
            detail = f"{shard.target} was written from other images; choose another folder with --out, or delete it"
            tally.problems.append({"key": shard.path, "reason": "name is taken", "detail": detail})
        elif shard.target.exists():
            tally.standing.append(shard.target)
            journal_path(shard.target).unlink(missing_ok=True)  # a kill between writing the shard and this leaves one
        else:
            try:
                shard.open(job.field, job.caption_key, job.replace)
                tally.problems += shard.problems
                if shard.is_missing_members or not len(shard):  # a copy that lacks members would be taken for the shard
                    tally.unwritten += 1
                else:
                    describe = describe or load()  # before anything is written
                    _agree(out, settings, settle=True)
                    for share in _write_shard(shard, job, describe, by, tally):
                        tally.advance((done + share * shard.size) / total)
                        watch(tally)
            except OSError as error:
                if error.filename != shard.path:
                    raise
                tally.unwritten += 1
                tally.problems.append({"key": shard.path, "reason": "unreadable shard", "detail": error.strerror or str(error)})
        done += shard.size
        tally.share = done / total
        watch(tally)
    return tally


def _tell_of_the_missing(job: RecaptionJob, tally: Tally) -> None:
    """Count shards that are not there, and list what names no image."""
    for data in map(find, job.data):
        tally.problems += [{"key": path, "reason": "missing", "detail": "no such shard"} for path in data.missing]
        tally.problems += data.unused
        tally.unwritten += len(data.missing)
        tally.shards += len(data.missing)


def _write_shard(shard: CaptionShard | CaptionFolder, job: RecaptionJob, describe: Describe, by: dict[str, str], tally: Tally) -> Iterator[float]:
    """Write one shard, starting where its journal ends; yields the share of its samples that are done, first before the first batch."""
    journal = Journal(shard.target, {"bytes": shard.size, "samples": len(shard)})
    is_finished = shard.target.exists()  # another process was faster, and has removed its journal
    try:
        if is_finished:
            tally.standing.append(shard.target)
            return
        if journal.restarted:
            tally.problems.append({"key": shard.path, "reason": "changed shard", "detail": "it has changed since it was begun, so it is begun anew"})
        tally.resumed += len(journal.results)
        tally.count(journal.results)
        yield len(journal.results) / len(shard)
        for results in _caption(shard, job, describe, len(journal.results)):
            journal.append(results)
            tally.count(results)
            yield len(journal.results) / len(shard)
        for file in half_written(shard.target):  # left by a run that was killed: this process holds the journal
            file.unlink(missing_ok=True)
        write_whole(shard.target, lambda file: shard.write(journal.results, by, file))
        is_finished = True
        tally.written.append(shard.target)
    finally:
        journal.close(done=is_finished)


def _caption(shard: CaptionShard | CaptionFolder, job: RecaptionJob, describe: Describe, first: int) -> Iterator[list[Result]]:
    """Results from sample `first` on, a batch at a time; the next batch is decoded while the model writes."""

    def decode(index: int) -> Image.Image | ImageError:
        try:
            return shard.image(index)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(min(job.batch, 8, cores()), "decode") as pool:
        batches = [range(start, min(start + job.batch, len(shard))) for start in range(first, len(shard), job.batch)]
        waiting = pool.map(decode, batches[0]) if batches else iter(())
        for number, indices in enumerate(batches):
            decoded = list(waiting)
            waiting = pool.map(decode, batches[number + 1]) if number + 1 < len(batches) else iter(())
            keys = [shard.key(index) for index, image in zip(indices, decoded, strict=True) if isinstance(image, Image.Image)]
            images = [image for image in decoded if isinstance(image, Image.Image)]
            answers = iter(describe(images, keys) if images else [])
            yield [_result(image if isinstance(image, ImageError) else next(answers), job.max_words) for image in decoded]


def _result(answer: Answer | ImageError, max_words: int) -> Result:
    if isinstance(answer, ImageError):
        return {"kept": answer.reason}
    words = answer.text.split()
    if not words:
        return {"kept": "empty answer"}
    is_shortened = bool(max_words) and len(words) > max_words
    return {"caption": " ".join(words[:max_words] if is_shortened else words), **({"cut": "length"} if answer.cut and not is_shortened else {})}


def _list_shards(job: RecaptionJob) -> Iterator[CaptionShard | CaptionFolder]:
    """The shards and the folder that `job.data` names, in order, each with the file that it becomes."""
    out = Path(job.out)
    if names := [name for name in job.data if name == "openmoji" or is_remote(name)]:
        raise ValueError(f"{names[0]} cannot be captioned; choose a folder of images, or local shards such as data/*.tar")
    data = [find(name) for name in job.data]
    tars, folders = ([path for part in data for path in getattr(part, kind)] for kind in ("tars", "folders"))
    if not tars and not folders:
        raise ValueError("no data named; choose a folder of images, or shards such as data/*.tar")
    if len(folders) > 1:
        raise ValueError(f"{len(folders)} folders of images ({folders[0]}, {folders[1]}); name one at a time, its captions become one captions.jsonl")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder with --out")
    tars = list(dict.fromkeys(map(os.path.abspath, tars)))
    above = os.path.commonpath([os.path.dirname(path) for path in tars]) if tars else ""
    for path in tars:
        target = out / os.path.relpath(path, above)
        if target.resolve() == Path(path).resolve():
            raise ValueError(f"{out} is where the shards are, and they would be overwritten; choose another folder with --out")
        yield CaptionShard(path, target)
    for folder in folders:
        yield CaptionFolder(folder, out / "captions.jsonl")


def _agree(out: Path, settings: Mapping[str, Any], *, settle: bool = False) -> dict[str, Any] | None:
    """The settings that `out` was begun with, None for a new folder; `settle` writes them. Raises ValueError where they differ.

    A model is known by its revision, or by what its files hold: it may have been moved.
    """
    path = out / SETTINGS
    if settle and not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(settings, indent=2) + "\n", first_wins=True)  # one of several processes is first
    if not path.is_file():
        return None
    known = json_object(path.read_text(encoding="utf-8"))
    different = [name for name in dict.fromkeys([*settings, *known]) if name != "model" and known.get(name) != settings.get(name)]
    if different:
        before, now = ("; ".join(_in_words(name, values) for name in different) for values in (known, settings))
        raise ValueError(f"{out} was begun with {before}, not {now}; use the same settings, or choose another folder with --out")
    return known


def _in_words(name: str, values: Mapping[str, Any]) -> str:
    if name == "revision":
        return f"model {values.get('model')} ({values.get('revision')})"
    return f"{name} {values[name]!r}" if name in values else f"no {name}"


def examples(job: RecaptionJob, count: int = 12) -> list[tuple[Image.Image, str, str]]:
    """(image, old caption, new caption), evenly spaced through what is written under `job.out`."""
    shards = [shard for shard in _list_shards(job) if shard.target.exists()]
    shards = shards[:: max(1, len(shards) // 4)][:4]
    rows: list[tuple[Image.Image, str, str]] = []
    for shard in shards:
        captions = shard.read_captions(job.field)
        for index in range(0, len(captions), max(1, len(captions) // -(-count // len(shards)))):
            old, new = captions[index]
            try:
                rows.append((shard.image(index), old, new))
            except ImageError as error:
                rows.append((Image.new("RGB", (64, 64), "gray"), old, f"({error.reason})"))
    return rows[:count]


def write_sheet(job: RecaptionJob) -> None:
    """Draw `examples` into `job.sheet`, if there are any."""
    from openvision3.report.sheets import caption_sheet

    if rows := examples(job):
        Path(job.sheet).parent.mkdir(parents=True, exist_ok=True)
        write_whole(job.sheet, lambda file: caption_sheet(rows).save(file, "PNG"))
