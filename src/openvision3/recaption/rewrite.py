"""New captions for shards and folders, written by any picture-to-text model of transformers, and resumable.

Every input shard becomes one output shard of the same name: all members as they were, byte for byte, but for the `.json`,
which gains the new caption. A job can be killed at any moment: finished shards stand, and a journal beside the unfinished one
holds every batch that was done. What is written for a sample depends on the model, the wording, the seed and the sample's
name, never on the batch, the process or how often the job was started.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from openvision3.data.captions import clean_captions, json_object
from openvision3.data.images import ImageError
from openvision3.data.sources import expand
from openvision3.device import cores
from openvision3.files import half_written, write_whole
from openvision3.recaption.files import ORIGINAL, CaptionFolder, CaptionShard, Journal, Result
from openvision3.recaption.image_text import Answer, Identity, Wording

SETTINGS = "recaption.json"
"""In the output folder: model, wording and decoding that all its captions share."""

BESIDE = (".parquet", "_stats.json", ".index")
"""What lies beside shards, so that a glob may name it."""

Describe = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[Answer | ImageError]]
"""pictures, the names of their samples -> what a model says to each, or why it was not asked; `ImageTextModel` is one"""


def settings_of(identity: Identity, wording: Wording, precision: str, max_words: int = 0) -> dict[str, Any]:
    """All that the written text depends on, beside the pictures. What is not drawn has no seed."""
    drawn = {"top_p": wording.top_p, "temperature": wording.temperature, "seed": wording.seed} if wording.drawn else {}
    length = {"max_new_tokens": wording.max_new_tokens, "max_words": max_words}
    return {"model": identity.name, "revision": identity.revision, "prompt": wording.prompt, **length, **drawn, "precision": precision}


# -- what is captioned -------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What a run of `recaption` has done so far."""

    jobs: int = 0
    """shards and folders of this process"""
    written: list[Path] = field(default_factory=list)
    standing: list[Path] = field(default_factory=list)
    """finished by an earlier run"""
    samples: int = 0
    resumed: int = 0
    """of the samples: found finished in a journal"""
    kept: Counter[str] = field(default_factory=Counter)
    """of the samples: still with their old caption, by reason"""
    cut: int = 0
    """of the samples: captions that end at the longest length, not by themselves"""
    problems: list[dict[str, str]] = field(default_factory=list)
    """{key, reason, detail}: shards that are damaged, and shards that were not written"""
    unwritten: int = 0
    share: float = 0.0
    """of this process's bytes: done"""
    working: str = ""
    began: float = 0.0
    began_share: float = 0.0

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
        """Seconds to go, by bytes; None before there is anything to judge by."""
        gained = self.share - self.began_share
        return (time.monotonic() - self.began) * (1 - self.share) / gained if self.began and gained > 0 else None


# -- the job -----------------------------------------------------------------------------------------------------------------


def shard_split(text: str, environment: dict[str, str] | None = None) -> tuple[int, int]:
    """`2/8` -> (2, 8); empty: RANK and WORLD_SIZE of the environment, else (0, 1). Raises ValueError."""
    environment = dict(os.environ) if environment is None else environment
    told = text or (f"{environment['RANK']}/{environment['WORLD_SIZE']}" if "RANK" in environment and "WORLD_SIZE" in environment else "0/1")
    match = re.fullmatch(r"(\d+)/(\d+)", told)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f"shard split {told!r}: legal is RANK/WORLD with RANK from 0 to WORLD - 1, such as 0/4")
    return int(match[1]), int(match[2])


def recaption(
    data: Sequence[str],
    out: str | Path,
    settings: Mapping[str, Any],
    load: Callable[[], Describe],
    *,
    name: str = "re_caption",
    caption_key: str = "",
    batch: int = 8,
    split: tuple[int, int] = (0, 1),
    replace: bool = False,
    watch: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Write shards (folders, globs and braces of them) and a folder of pictures anew under `out`, with captions by the model that `load` gives.

    `settings` (`settings_of`) is what all captions under `out` share; `load` is called when there is something to do. The new
    caption is the JSON field `name`. The old one is kept as `org_caption`: the JSON field `caption_key` where given, else the
    `.txt`, else the JSON's `caption`. This process does every WORLD-th shard from RANK on, `split` = (RANK, WORLD).
    A shard that stands under `out` is done; one that is half done goes on. `watch` is called after every batch and shard.

    Raises:
        ValueError: nothing to do it with, `out` is in the way, holds captions of another model or wording, or other files.
    """
    if batch < 1 or int(settings.get("max_words", 0)) < 0:
        raise ValueError(f"batch {batch}, max_words {settings.get('max_words', 0)}: legal are 1 or more, and 0 or more")
    if name in (ORIGINAL, caption_key, "caption", "") or name.endswith("_by"):
        raise ValueError(f"field {name!r} would write over the old caption; name another one, such as re_caption")
    out = Path(out)
    tally = Tally()
    jobs = list(_jobs(data, out))
    settings = {**settings, "field": name, "caption_key": caption_key}
    known = _agree(out, settings)
    if known is None and (there := [job.target for job in jobs if job.target.exists()]):
        raise ValueError(f"{there[0]} is there already, and was not written by recaption; name another folder with --out")
    by = {part: str((known or settings)[part]) for part in ("model", "revision", "prompt") if (known or settings).get(part)}
    jobs = jobs[split[0] :: split[1]]
    describe: Describe | None = None
    tally.jobs = len(jobs)
    total = max(1, sum(job.size for job in jobs))
    done = 0
    for job in jobs:
        tally.working = job.target.name
        if job.target.exists():
            tally.standing.append(job.target)
            _hidden(job.target, "journal").unlink(missing_ok=True)  # of a run that was killed between the shard and its journal
        else:
            try:
                job.open(name, caption_key, replace)
                tally.problems += job.problems
                if job.is_missing_members or not len(job):  # a copy that lacks members would be taken for the shard
                    tally.unwritten += 1
                else:
                    describe = describe or load()  # before anything is written
                    _agree(out, settings, settle=True)
                    captions = functools.partial(_captions, job, describe, batch, int(settings.get("max_words", 0)))
                    _do(job, captions, by, tally, done / total, job.size / total, watch)
            except OSError as error:
                if error.filename != job.path:
                    raise
                tally.unwritten += 1
                tally.problems.append({"key": job.path, "reason": "unreadable shard", "detail": error.strerror or str(error)})
        done += job.size
        tally.share = done / total
        watch(tally)
    return tally


def _do(
    job: CaptionShard | CaptionFolder,
    captions: Callable[[int], Iterator[list[Result]]],
    by: dict[str, str],
    tally: Tally,
    before: float,
    worth: float,
    watch: Callable[[Tally], None],
) -> None:
    """One shard from where its journal ends, with `captions` from a sample on; `before` and `worth` are shares of this process's bytes."""
    journal = Journal(job.target, {"bytes": job.size, "samples": len(job)})
    done = False
    try:
        if job.target.exists():  # another process was faster, and is gone with its journal
            done = True
            tally.standing.append(job.target)
            return
        if journal.restarted:
            tally.problems.append({"key": job.path, "reason": "changed shard", "detail": "it is not what it was when it was begun, so it was begun anew"})
        first = len(journal.results)
        tally.resumed += first
        tally.count(journal.results)
        if not tally.began:
            tally.began, tally.began_share = time.monotonic(), before + worth * first / max(1, len(job))
        for results in captions(first):
            journal.append(results)
            tally.count(results)
            tally.share = before + worth * len(journal.results) / len(job)
            watch(tally)
        for left in half_written(job.target):  # by a run that was killed: the journal is held by this one
            left.unlink(missing_ok=True)
        write_whole(job.target, lambda file: job.write(journal.results, by, file))
        done = True
        tally.written.append(job.target)
    finally:
        journal.close(done=done)


def _captions(job: CaptionShard | CaptionFolder, describe: Describe, batch: int, max_words: int, first: int) -> Iterator[list[Result]]:
    """Results in the order of the samples, a batch at a time; the next batch is decoded while the model writes."""

    def decode(index: int) -> Image.Image | ImageError:
        try:
            return job.picture(index)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(min(batch, 8, cores()), "decode") as pool:
        batches = [range(start, min(start + batch, len(job))) for start in range(first, len(job), batch)]
        waiting = pool.map(decode, batches[0]) if batches else iter(())
        for number, indices in enumerate(batches):
            decoded = list(waiting)
            waiting = pool.map(decode, batches[number + 1]) if number + 1 < len(batches) else iter(())
            images = [picture for picture in decoded if isinstance(picture, Image.Image)]
            keys = [job.key(index) for index, picture in zip(indices, decoded, strict=True) if isinstance(picture, Image.Image)]
            answers = iter(describe(images, keys) if images else [])
            yield [_result(picture if isinstance(picture, ImageError) else next(answers), max_words) for picture in decoded]


def _result(answer: Answer | ImageError, max_words: int) -> Result:
    if isinstance(answer, ImageError):
        return {"kept": answer.reason}
    words = answer.text.split()
    if not words:
        return {"kept": "empty answer"}
    short = bool(max_words) and len(words) > max_words
    return {"caption": " ".join(words[:max_words] if short else words), **({"cut": "length"} if answer.cut and not short else {})}


def _jobs(data: Sequence[str], out: Path) -> Iterator[CaptionShard | CaptionFolder]:
    """The shards and the folder named, in order, each with the file that it becomes."""
    legal = "legal are a folder of pictures, or shards such as data/*.tar"
    tars: list[str] = []
    folders: list[str] = []
    for told in data:
        found = expand(told)
        if not found:
            raise ValueError(f"no such data: {told}; {legal}")
        for path in found:
            inside = sorted(str(p) for p in Path(path).glob("*.tar") if not p.name.startswith(".")) if Path(path).is_dir() else []
            if path.endswith(BESIDE) and len(found) > 1:
                continue
            if not Path(path).is_dir() and not path.endswith(".tar"):
                raise ValueError(f"{path} is neither a folder nor a .tar shard; {legal}")
            tars += inside or ([] if Path(path).is_dir() else [path])
            folders += [path] if Path(path).is_dir() and not inside else []
    if not tars and not folders:
        raise ValueError(f"no data named; {legal}")
    if len(folders) > 1:
        raise ValueError(f"{len(folders)} folders of pictures ({folders[0]}, {folders[1]}): legal is one at a time, its captions go into one captions.jsonl")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder with --out")
    tars = list(dict.fromkeys(map(os.path.abspath, tars)))
    above = os.path.commonpath([os.path.dirname(path) for path in tars]) if tars else ""
    for path in tars:
        target = out / os.path.relpath(path, above)
        if target.resolve() == Path(path).resolve():
            raise ValueError(f"{out} is where the shards are, and would be written over; name another folder with --out")
        yield CaptionShard(path, target)
    for folder in folders:
        yield CaptionFolder(folder, out / "captions.jsonl")


def _hidden(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}")


def _agree(out: Path, settings: dict[str, Any], *, settle: bool = False) -> dict[str, Any] | None:
    """The settings that `out` was begun with, None where it was not; `settle` writes them down. Raises ValueError where they differ.

    A model is known by its revision, or by what its files hold: it may have been moved.
    """
    path = out / SETTINGS
    if settle and not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(settings, indent=2) + "\n", first_wins=True)  # one of several processes is first
    if not path.is_file():
        return None
    known = json_object(path.read_text(encoding="utf-8"))
    parts = dict.fromkeys([*settings, *known])
    unlike = [part for part in parts if part != "model" and known.get(part) != settings.get(part)]
    if unlike:
        told, asked = ("; ".join(_told(part, values) for part in unlike) for values in (known, settings))
        raise ValueError(f"{out} was begun with {told}, not {asked}; go on as it was begun, or name another folder with --out")
    return known


def _told(part: str, values: Mapping[str, Any]) -> str:
    if part == "revision":
        return f"model {values.get('model')} ({values.get('revision')})"
    return f"{part} {values[part]!r}" if part in values else f"no {part}"


def examples(data: Sequence[str], out: str | Path, name: str = "re_caption", count: int = 12) -> list[tuple[Image.Image, str, str]]:
    """(picture, old caption, new caption), evenly spaced through what `recaption` has written of `data` under `out`."""
    jobs = [job for job in _jobs(data, Path(out)) if job.target.exists()]
    jobs = jobs[:: max(1, len(jobs) // 4)][:4]
    found: list[tuple[Image.Image, str, str]] = []
    for job in jobs:
        each = -(-count // len(jobs))
        for index, old, new in _spaced(job, name, each):
            try:
                found.append((job.picture(index), old, new))
            except ImageError as error:
                found.append((Image.new("RGB", (64, 64), "gray"), old, f"({error.reason})"))
    return found[:count]


def _spaced(job: CaptionShard | CaptionFolder, name: str, count: int) -> Iterator[tuple[int, str, str]]:
    if isinstance(job, CaptionFolder):
        rows = [json_object(line) for line in job.target.read_text(encoding="utf-8").splitlines()]
        told = [(" / ".join(clean_captions([row.get(ORIGINAL)])), "" if "kept" in row.get("by", {}) else str(row.get("caption"))) for row in rows]
    else:
        done = CaptionShard(str(job.target), job.target)
        done.open(name, "", replace=True)
        job.open(name, "", replace=True)
        told = [(" / ".join(clean_captions([(values or {}).get(ORIGINAL)])), str((values or {}).get(name, ""))) for values in done.values]
    for index in range(0, len(told), max(1, len(told) // count)):
        yield index, *told[index]
