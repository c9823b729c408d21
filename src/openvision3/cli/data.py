"""The verbs of `openvision3 data`: what is done to images with captions before a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from openvision3.cli.common import Device, Json, parse
from openvision3.cli.paths import check_apart
from openvision3.data.latents.settings import LatentJob
from openvision3.data.pope_job import PopeJob
from openvision3.recaption.job import RecaptionJob
from openvision3.settings import PathName

if TYPE_CHECKING:
    from openvision3.data.problems import Problem
    from openvision3.data.shards.check import Checked
    from openvision3.recaption.rewrite import Tally

Shards = Positional[
    Annotated[tuple[PathName, ...], arg(metavar="SHARDS ...", help="shards, folders of shards, globs and URLs, such as data/{00000..00009}.tar")]
]
Data = Positional[Annotated[tuple[PathName, ...], arg(metavar="DATA ...", help="shards, folders and globs, such as data/{00000..00009}.tar")]]
Images = Positional[Annotated[tuple[PathName, ...], arg(metavar="DATA ...", help="openmoji, folders of images, or shards such as data/{00000..00009}.tar")]]


def index(shards: Shards, index: PathName = "", again: bool = False, workers: int = 0, json: Json = False) -> int:
    """Index each shard, so that opening thousands of them is fast.

    Args:
        index: the folder for the index files, for shards that are remote or read-only. Not set: beside each shard
        again: also rewrite the indexes that still fit their shards
        workers: number of processes; 0: one per core
    """
    from openvision3.data.shards.check import write_indexes

    indexed = write_indexes(shards, index, again, workers)
    failed = [shard for shard in indexed if shard.error]
    problems = [problem for shard in indexed for problem in shard.problems]
    samples, size, written = (sum(getattr(shard, name) for shard in indexed) for name in ("samples", "bytes", "written"))
    if json:
        totals = {"shards": sum(not shard.missing for shard in indexed), "samples": samples, "bytes": size, "written": written, "problems": problems}
        print(dumps(totals | {"failed": [{"shard": shard.shard, "error": shard.error} for shard in failed]}, indent=2, ensure_ascii=False))
    else:
        count = len(indexed) - len(failed)
        kept = f", {count - written:,} fitted already" if count > written else ""
        print(f"{count:,} shards, {samples:,} samples, {size / 1e9:.2f} GB: {written:,} indexes written{kept}")
        _print_reasons(problems)
    for shard in failed:
        print(f"openvision3: {shard.shard}: {shard.error}", file=sys.stderr)
    return 2 if failed else 0


def check(data: Data, caption_keys: tuple[str, ...] = (), decode: bool = False, workers: int = 0, json: Json = False) -> int:
    """Check every sample of shards and folders, and count those that cannot be used for training (exit code 2 if there are any).

    Args:
        caption_keys: JSON fields that hold captions. Not set: the .txt member
        decode: also decode every image
        workers: number of processes; 0: one per core
    """
    from openvision3.data.problems import count_reasons
    from openvision3.data.shards.check import check_data

    report = check_data(data, caption_keys, decode, workers)
    problems, several = report.problems, report.captions
    samples, usable, size = map(report.total, ("samples", "usable", "bytes"))
    if json:
        totals = {"shards": report.shards, "folders": report.folders, "samples": samples, "usable": usable, "bytes": size, "captions": several}
        details = {"reasons": count_reasons(problems), "problems": problems, "each": [vars(checked) for checked in report.checked]}
        print(dumps(totals | details, indent=2, ensure_ascii=False))
    else:
        _print_checked([checked for checked in report.checked if checked.problems])
        scope = "tar, members, JSON, captions and images" if decode else "tar, members, JSON and captions; images are decoded with --decode"
        kinds = [f"{count:,} {kind}" for kind, count in (("shards", report.shards), ("folders", report.folders)) if count]
        print(f"{', '.join(kinds)}, {samples:,} samples, {size / 1e9:.2f} GB; {usable:,} samples without a flaw ({scope})")
        if several:
            counts = f"{min(several)} to {max(several)}" if len(several) > 1 else f"{max(several)}"
            print(f"  {several.total():,} samples have several captions ({counts}): each line of a .txt is one; join the lines of a caption that is wrapped")
        _print_reasons(problems)
    return 2 if problems else 0


@dataclass
class RecaptionOptions(RecaptionJob):
    """Write new captions for shards or a folder of images, with any image-to-text model of transformers.

    The same command continues a job that was stopped.
    """

    data: Data
    device: Device = "auto"


def recaption(argv: Sequence[str]) -> int:
    """Write new captions for shards or a folder of images, with any image-to-text model of transformers."""
    job = parse(RecaptionOptions, argv, "openvision3 data recaption")
    from openvision3.progress import duration
    from openvision3.recaption import rewrite

    if job.sheet:
        check_apart(job.sheet, job.data, "--sheet")
    with _show_progress("recaption") as watch:
        tally = rewrite.recaption(job, watch)
    for problem in tally.problems:
        print(f"openvision3: {problem['key']}: {problem['reason']}: {problem['detail']}", file=sys.stderr)
    kept = sum(tally.kept.values())
    print(
        f"{tally.samples:,} samples: {tally.samples - kept:,} new captions, {kept:,} kept theirs"
        + (f" ({', '.join(f'{count:,} {reason}' for reason, count in tally.kept.most_common())})" if kept else "")
        + (f"; {tally.resumed:,} were done before" if tally.resumed else "")
        + (f"; {tally.cut:,} end at --max-new-tokens {job.max_new_tokens}" if tally.cut else "")
        + f"; {len(tally.written)} of {tally.shards} files written to {job.out}"
        + (f", {len(tally.standing)} existed already" if tally.standing else "")
        + (f", {tally.unwritten} could not be read" if tally.unwritten else "")
        + (f"; {tally.rate:.3g} samples/s, {duration(time.monotonic() - tally.began)}" if tally.began else "")
    )
    if job.sheet:
        rewrite.write_sheet(job)
    return 2 if tally.unwritten else 0


@dataclass
class LatentOptions(LatentJob):
    """Encode random crops of images with the VAE once, so that training reads latents (train ... --latents FOLDER).

    The same command continues where it was stopped, and repairs damaged files. With torchrun or srun each process writes its share.
    """

    data: Images = ()
    device: Device = "auto"
    json: Json = False


def latents(argv: Sequence[str]) -> int:
    """Encode random crops of images with the VAE once, so that training reads latents (train ... --latents FOLDER)."""
    job = parse(LatentOptions, argv, "openvision3 data latents")
    from openvision3.train.encode_latents import say, write_latents

    if not job.data:
        raise ValueError("no data named; choose openmoji, a folder of images, or shards such as data/*.tar")
    check_apart(job.out, job.data)
    start = time.perf_counter()
    cache = write_latents(job)
    if cache is None:
        say(f"this process has written its parts; {job.out} is complete when the other processes have written theirs")
        return 0
    if cache["skipped"]:
        counts = ", ".join(f"{count} {reason}" for reason, count in cache["skipped"].items())
        say(f"skipped: {counts}; samples are listed in the .json file of their part")
    if job.json:
        print(dumps({name: value for name, value in cache.items() if name != "parts"}, indent=2))
        return 0
    gigabytes = sum(part["bytes"] for part in cache["parts"]) / 1e9
    seconds = time.perf_counter() - start
    print(f"{job.out}: {cache['entries']:,} of {cache['samples']:,} samples, {gigabytes:.2f} GB, {seconds:.0f} s; train with --latents {job.out}")
    return 0


def fingerprint(
    data: Images,
    out: Annotated[PathName, arg(metavar="FILE")] = "fingerprint.safetensors",
    only: tuple[str, ...] = (),
    caption_keys: tuple[str, ...] = (),
    aliases: bool = False,
    index: PathName = "",
    cache: PathName = "",
    cache_gb: float = 100.0,
    json: Json = False,
) -> int:
    """Write hashes of images and captions (118 bytes an image), so that evaluate --train FILE can tell what a model has seen.

    In a model folder, fingerprint.safetensors describes what the model was trained on. It holds no image and no caption.

    Args:
        out: the file to write
        only: keep only shard samples whose JSON has these values (source=clipart) or other ones (source!=stamps)
        caption_keys: JSON fields of shards that hold captions. Not set: the .txt member
        aliases: openmoji: count the other names of an emoji as captions too
        index: the folder of index files that data index has written. Not set: beside each shard
        cache: the folder for copies of remote shards
        cache_gb: size limit of that folder, in GB
    """
    from openvision3.data.fingerprint import take_fingerprint
    from openvision3.data.names import DataOptions, open_source
    from openvision3.data.problems import count_reasons
    from openvision3.files import check_writable
    from openvision3.progress import track
    from openvision3.settings import read_rules

    path = Path(out)
    if path.is_dir():
        raise ValueError(f"{out} is a folder; name a file with --out, such as {path / 'fingerprint.safetensors'}")
    check_writable(path.absolute().parent, "--out")
    options = DataOptions(only=read_rules(only), caption_keys=caption_keys, aliases=aliases, index=index, cache=cache, cache_gb=cache_gb)
    source = open_source(data, options, watch=track)
    hashes = take_fingerprint(source, data, source.problems, track)
    problems = list(source.problems)
    if not len(hashes.images):
        raise ValueError(f"none of the {len(source)} samples can be used: {', '.join(f'{n} {why}' for why, n in count_reasons(problems).items())}")
    path.parent.mkdir(parents=True, exist_ok=True)
    hashes.save(path)
    counts = {"samples": hashes.samples, "images": len(hashes.images), "captions": len(hashes.captions), "families": len(hashes.families)}
    if json:
        print(dumps({"file": str(path), **counts, "bytes": path.stat().st_size, "problems": count_reasons(problems)}, indent=2))
        return 0
    print(f"{path}: {', '.join(f'{count:,} {name}' for name, count in counts.items())}, {path.stat().st_size / 1e6:.2f} MB; name it to evaluate with --train")
    _print_reasons(problems)
    return 0


@dataclass
class PopeOptions(PopeJob):
    """Write questions after objects in the shape of POPE, from captions or labels: openvision3 evaluate vqa pope asks them."""

    data: Images = ()


def pope(argv: Sequence[str]) -> int:
    """Write questions after objects in the shape of POPE, from captions or labels: openvision3 evaluate vqa pope asks them."""
    job = parse(PopeOptions, argv, "openvision3 data pope")
    from openvision3.data.pope import write_pope

    if not job.data:
        raise ValueError("no data named; name folders of images, or shards such as data/*.tar")
    check_apart(job.out, job.data)
    counts, problems = write_pope(job.data, job)
    print(f"{job.out}: {', '.join(f'{count:,} {split}' for split, count in counts.items())} questions; ask them with evaluate vqa pope MODEL --data {job.out}")
    if "adversarial" not in counts:
        print("no adversarial questions: no two objects occur in one image; --group-key names a field of labels that are alike", file=sys.stderr)
    _print_reasons(list(problems))
    return 0


def conversations(
    data: Images,
    out: Annotated[PathName, arg(metavar="FILE.json")] = "conversations.json",
    turns: int = 3,
    kinds: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    caption_keys: tuple[str, ...] = (),
    seed: int = 0,
    json: Json = False,
) -> int:
    """Make questions with answers from images with captions, in LLaVA's JSON, to train and to measure openvision3 chat.

    The images are written beside it, as FILE.zip. Each question has its kind and its right answers in the row's fields kinds and accept.

    Args:
        out: the JSON file to write
        turns: most questions in one conversation; 1 where each answer is to be measured by itself
        kinds: kinds of questions: what, colour, present, which, count, describe, image. Not set: all
        only: keep only shard samples whose JSON has these values (source=clipart) or other ones (source!=stamps)
        caption_keys: JSON fields of shards that hold captions: the first names the image, all say what may not be denied. Not set: the .txt member
        seed: seed of all draws
    """
    from openvision3.data.names import DataOptions, open_source
    from openvision3.files import check_writable
    from openvision3.progress import track
    from openvision3.settings import read_rules
    from openvision3.understand.questions import write_conversations

    path = Path(out)
    if path.suffix != ".json":
        raise ValueError(f"{out} does not end in .json; name a file with --out, such as questions.json")
    check_apart(out, data)
    check_writable(path.absolute().parent, "--out")
    source = open_source(data, DataOptions(only=read_rules(only), caption_keys=caption_keys), watch=track)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = write_conversations(source, path, turns=turns, kinds=kinds, seed=seed, watch=track)
    problems = list(source.problems)
    if json:
        counts = {kind: {"questions": answers.total(), "commonest": dict(answers.most_common(3))} for kind, answers in written.answers.items()}
        totals = {"images": written.images, "unnamed": written.unnamed, "conversations": written.conversations, "kinds": counts, "problems": problems}
        print(dumps({"file": out, "archive": str(path.with_suffix(".zip"))} | totals, indent=2, ensure_ascii=False))
        return 0
    print(f"{out}: {written.conversations:,} conversations on {written.images:,} images, which are in {path.with_suffix('.zip')}")
    for kind, answers in written.answers.items():
        [(answer, count)] = answers.most_common(1)
        print(f"  {kind:8s} {answers.total():7,} questions; the commonest answer, {answer!r}, is {100 * count / answers.total():.1f}%")
    if written.unnamed:
        print(f"  {written.unnamed:,} images are left out: their captions give no name")
    _print_reasons(problems)
    return 0


VERBS: dict[str, Callable[..., int]] = {f.__name__: f for f in (index, check, recaption, latents, fingerprint, conversations, pope)}


# -- what the verbs print ------------------------------------------------------------------------------------------


def _print_checked(flawed: list[Checked]) -> None:
    """A row for each flawed shard; of many, the worst."""
    from rich.console import Console
    from rich.table import Table

    from openvision3.data.problems import reasons_in_words

    if not flawed:
        return
    table = Table("shard", "samples", "usable", "what is wrong", header_style="bold")
    table.columns[0].overflow = "fold"  # a name that is cut names nothing
    for column in (1, 2):
        table.columns[column].justify, table.columns[column].no_wrap = "right", True
    shown = sorted(flawed, key=lambda checked: -len(checked.problems))[:20]
    for checked in shown:
        table.add_row(checked.shard, f"{checked.samples:,}", f"{checked.usable:,}", reasons_in_words(checked.problems))
    Console(markup=False, highlight=False).print(table)
    if len(flawed) > len(shown):
        print(f"and {len(flawed) - len(shown):,} more shards; --json lists all")


def _print_reasons(problems: list[Problem]) -> None:
    from openvision3.data.problems import count_reasons

    for reason, count in count_reasons(problems).items():
        first = next(problem for problem in problems if problem["reason"] == reason)
        print(f"  {count:,} {reason}, such as {first['key']}: {first['detail']}")


@contextmanager
def _show_progress(what: str, every: float = 10.0) -> Iterator[Callable[[Tally], None]]:
    """Show a bar on a terminal, elsewhere a line every few seconds."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    from openvision3.progress import console, duration

    def status(tally: Tally) -> str:
        left = f", {duration(tally.left)} left" if tally.left is not None else ""
        return f"{tally.working}  {tally.samples:,} samples, {tally.rate:.3g}/s{left}"

    screen = console()
    if screen.is_terminal:
        with Progress(TextColumn(what), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[status]}"), console=screen, transient=True) as bar:
            task = bar.add_task(what, total=1.0, status="")
            yield lambda tally: bar.update(task, completed=tally.share, status=status(tally))
        return
    last = time.monotonic()

    def print_line(tally: Tally) -> None:
        nonlocal last
        if time.monotonic() - last >= every:
            last = time.monotonic()
            screen.print(f"{what} {100 * tally.share:.1f}%  {status(tally)}", markup=False, soft_wrap=True)

    yield print_line
