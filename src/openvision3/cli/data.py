"""The verbs of `openvision3 data`: what is done to pictures with words before a run."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from tyro.conf import Positional, arg

from openvision3.cli.common import Device, Json, run_verb
from openvision3.cli.paths import check_apart
from openvision3.files import write_whole
from openvision3.settings import PathName

if TYPE_CHECKING:
    from openvision3.data.sources import Found
    from openvision3.recaption.rewrite import Tally

T = TypeVar("T")

Shards = Positional[Annotated[tuple[PathName, ...], arg(metavar="SHARDS ...", help="shards, folders of them, globs, braces and URLs: data/{00000..00009}.tar")]]
Data = Positional[Annotated[tuple[PathName, ...], arg(metavar="DATA ...", help="shards, folders and globs, braces as in data/{00000..00009}.tar")]]

Pictures = Positional[Annotated[tuple[PathName, ...], arg(metavar="DATA ...", help="openmoji, folders of pictures, shards such as data/{00000..00009}.tar")]]


def index(shards: Shards, index: PathName = "", again: bool = False, workers: int = 0, json: Json = False) -> int:
    """Write what lies where in each shard, so that a run opens thousands of them at once.

    Args:
        index: the folder for the index files, for shards that are remote or may not be written beside; none: beside each shard.
        again: write anew those that fit their shard too.
        workers: processes; 0: one for each core.
    """
    from openvision3.data.shards.check import Indexed, write_index
    from openvision3.data.shards.index import is_remote

    paths, missing = _shards(shards)
    if not index and any(map(is_remote, paths)):
        raise ValueError("indexes of remote shards need a folder here; name one with --index FOLDER, and train with the same")
    done = list(_over(functools.partial(write_index, folder=index, again=again), paths, workers, "indexing"))
    failed = [each for each in done if each.error] + [Indexed(path, error="no such shard") for path in missing]
    flaws = [problem for each in done for problem in each.problems]
    samples, size, written = sum(d.samples for d in done), sum(d.bytes for d in done), sum(d.written for d in done)
    if json:
        found = {"shards": len(done), "samples": samples, "bytes": size, "written": written, "problems": flaws}
        print(dumps(found | {"failed": [{"shard": each.shard, "error": each.error} for each in failed]}, indent=2, ensure_ascii=False))
    else:
        indexed = len(done) + len(missing) - len(failed)
        fitted = f", {indexed - written:,} fitted already" if indexed > written else ""
        print(f"{indexed:,} shards, {samples:,} samples, {size / 1e9:.2f} GB: {written:,} indexes written{fitted}")
        _print_reasons(flaws)
    for each in failed:
        print(f"openvision3: {each.shard}: {each.error}", file=sys.stderr)
    return 2 if failed else 0


def check(data: Data, caption_keys: tuple[str, ...] = (), decode: bool = False, workers: int = 0, json: Json = False) -> int:
    """Look at every sample of shards and folders and count what cannot be trained on, or is not read; exit code 2 where there is something.

    Args:
        caption_keys: JSON fields that hold captions; none: the .txt member.
        decode: decode every picture too.
        workers: processes; 0: one for each core.
    """
    from openvision3.data.problems import count_reasons
    from openvision3.data.shards.check import Checked, check_folder, check_shard
    from openvision3.progress import track

    found = _found(data, "data")
    if any(each.openmoji for each in found):
        raise ValueError("openmoji comes with the package and is not checked; name shards or folders of images")
    shards, folders, missing = (list(dict.fromkeys(path for each in found for path in getattr(each, kind))) for kind in ("tars", "folders", "missing"))
    done = list(_over(functools.partial(check_shard, caption_keys=caption_keys, decode=decode), shards, workers, "checking")) if shards else []
    done += [check_folder(folder, decode, track) for folder in folders]
    done += [Checked(path, problems=({"key": path, "reason": "missing", "detail": "no such shard"},)) for path in missing]
    if beside := tuple(problem for each in found for problem in each.unused):
        done.append(Checked("beside the shards", problems=beside))
    problems = [problem for each in done for problem in each.problems]
    samples, usable, size = sum(d.samples for d in done), sum(d.usable for d in done), sum(d.bytes for d in done)
    several: Counter[int] = sum((Counter(each.captions) for each in done), Counter())
    if json:
        totals = {"shards": len(shards) + len(missing), "folders": len(folders), "samples": samples, "usable": usable, "bytes": size, "captions": several}
        totals["reasons"] = count_reasons(problems)
        print(dumps(totals | {"problems": problems, "each": [asdict(each) for each in done]}, indent=2, ensure_ascii=False))
    else:
        _print_shards([each for each in done if each.problems])
        looked = "tar, members, JSON, captions and pictures" if decode else "tar, members, JSON and captions; pictures are decoded with --decode"
        kinds = [f"{len(paths):,} {kind}" for kind, paths in (("shards", shards + missing), ("folders", folders)) if paths]
        print(f"{', '.join(kinds)}, {samples:,} samples, {size / 1e9:.2f} GB; {usable:,} samples without a flaw ({looked})")
        if several:
            each = f"{min(several)} to {max(several)}" if len(several) > 1 else f"{max(several)}"
            print(f"  {several.total():,} samples have several captions ({each}): each line of a .txt is one; join the lines of a caption that is wrapped")
        _print_reasons(problems)
    return 2 if problems else 0


def recaption(
    data: Data,
    model: PathName,
    out: PathName,
    prompt: str = "Describe this picture in one or two sentences.",
    field: str = "re_caption",
    caption_key: str = "",
    batch: int = 8,
    max_new_tokens: int = 128,
    max_words: int = 0,
    top_p: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
    device: Annotated[str, arg(metavar="{auto,cpu,cuda,cuda:N}")] = "auto",
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    shard_split: Annotated[str, arg(metavar="RANK/WORLD")] = "",
    revision: str = "",
    download: bool = False,
    replace: bool = False,
    sheet: PathName = "",
) -> int:
    """Write the captions of shards or of a folder of pictures anew, with any picture-to-text model of transformers.

    Killed at any moment, the same command goes on where it was.

    Args:
        model: a model folder, or a hub model in the local cache.
        out: the folder for the new shards, which have the names of the old ones; for a folder of pictures, of captions.jsonl.
        prompt: what the model is asked.
        field: the JSON field of the new caption; the old one is kept as org_caption.
        caption_key: the JSON field of the old caption (default: the .txt, else caption).
        batch: pictures at once.
        max_new_tokens: longest caption in the model's word pieces.
        max_words: longest caption in words; 0 is as the model ends it.
        top_p: draw words from the smallest set with this probability instead of taking the likeliest.
        temperature: flattens (> 1) or sharpens (< 1) what is drawn from.
        seed: of what is drawn.
        device: where to compute.
        precision: auto is bf16 on a GPU and fp32 elsewhere.
        shard_split: this process's share of the shards, such as 0/4 (default: RANK and WORLD_SIZE of the environment).
        revision: of a hub model: a branch, tag or commit.
        download: fetch the hub model where it is not in the local cache.
        replace: write over a field of this name that is there already.
        sheet: a PNG file with some of the pictures, their old and their new captions.
    """
    from openvision3.device import choose_device, dtype_of
    from openvision3.progress import duration
    from openvision3.recaption.image_text import ImageTextModel, Wording, identify
    from openvision3.recaption.rewrite import examples, settings_of
    from openvision3.recaption.rewrite import recaption as write_anew
    from openvision3.recaption.rewrite import shard_split as read_split
    from openvision3.report.sheets import caption_sheet

    split = read_split(shard_split)
    if sheet:
        check_apart(sheet, data, "--sheet")
    if sheet and not sheet.lower().endswith(".png"):
        raise ValueError(f"--sheet {sheet}: legal is a name that ends in .png")
    device = choose_device(device)
    chosen = ("bf16" if device.startswith("cuda") else "fp32") if precision == "auto" else precision
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    wording = Wording(prompt, max_new_tokens, top_p, temperature, seed)
    settings = settings_of(identify(model, revision, download), wording, chosen, max_words)

    def load() -> ImageTextModel:
        return ImageTextModel(model, wording, revision=revision, device=device, dtype=dtype_of(chosen), download=download)

    with _watching("recaption") as watch:
        tally = write_anew(data, out, settings, load, name=field, caption_key=caption_key, batch=batch, split=split, replace=replace, watch=watch)
    for problem in tally.problems:
        print(f"openvision3: {problem['key']}: {problem['reason']}: {problem['detail']}", file=sys.stderr)
    kept = sum(tally.kept.values())
    print(
        f"{tally.samples:,} samples: {tally.samples - kept:,} new captions, {kept:,} kept theirs"
        + (f" ({', '.join(f'{count:,} {reason}' for reason, count in tally.kept.most_common())})" if kept else "")
        + (f"; {tally.resumed:,} were done before" if tally.resumed else "")
        + (f"; {tally.cut:,} end at --max-new-tokens {max_new_tokens}" if tally.cut else "")
        + f"; {len(tally.written)} of {tally.jobs} files written to {out}"
        + (f", {len(tally.standing)} stood there" if tally.standing else "")
        + (f", {tally.unwritten} could not be read" if tally.unwritten else "")
        + (f"; {tally.rate:.3g} samples/s, {duration(time.monotonic() - tally.began)}" if tally.began else "")
    )
    if sheet:
        rows = examples(data, out, field)
        if rows:
            Path(sheet).parent.mkdir(parents=True, exist_ok=True)
            write_whole(sheet, lambda file: caption_sheet(rows).save(file, "PNG"))
    return 2 if tally.unwritten else 0


def latents(
    data: Pictures,
    out: PathName = "latents",
    vae: PathName = "embedded",
    shift: bool | None = None,
    size: int = 128,
    crops: int = 4,
    crop_area: tuple[float, float] = (0.4, 1.0),
    seed: int = 0,
    batch: int = 32,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    device: Device = "auto",
    workers: int = 0,
    only: tuple[str, ...] = (),
    caption_keys: tuple[str, ...] = (),
    aliases: bool = False,
    part_samples: int = 1024,
    index: PathName = "",
    cache: PathName = "",
    cache_gb: float = 100.0,
    engine: Literal["local", "ray"] = "local",
    actors: int = 0,
    json: Json = False,
) -> int:
    """Encode random crops of pictures with the VAE once, so that training reads latents (train ... --latents FOLDER).

    The same command goes on where it was stopped, and repairs what is damaged. Under torchrun or srun each process writes
    its share.

    Args:
        out: the folder of the cache.
        vae: embedded, a folder in diffusers' layout, or a hub id; the one to train with.
        shift: as --model.vae.shift of the run.
        size: side of the crops in pixels, that of the run.
        crops: random crops of every picture; training takes them in turn.
        crop_area: share of a picture that a crop covers.
        seed: of the crops.
        batch: pictures encoded at a time.
        precision: what the VAE computes in; auto measures.
        workers: processes that decode pictures; 0: none beside this one.
        only: keep shard samples whose JSON has these values, as in source=clipart.
        caption_keys: JSON fields of shards that hold captions; none: the .txt member.
        aliases: openmoji: keep the other names of an emoji too.
        part_samples: samples in a file; for many millions take 16384.
        index: the folder of index files, as data index wrote them; none: beside each shard.
        cache: the folder for copies of remote shards.
        cache_gb: how large it may become.
        engine: this process (or its share under torchrun), or a Ray cluster.
        actors: processes that Ray starts; 0: one a GPU, or one a CPU where there is none.
    """
    from openvision3.train.encode_latents import LatentJob, say, write_latents

    if not data:
        raise ValueError("no data named; legal are openmoji, a folder of pictures, or shards such as data/*.tar")
    check_apart(out, data)
    places = {"index": index, "cache": cache, "cache_gb": cache_gb}
    job = LatentJob(
        data,
        out,
        vae,
        shift,
        size,
        crops,
        crop_area,
        seed,
        batch,
        precision,
        device,
        workers,
        only,
        caption_keys,
        aliases,
        part_samples,
        **places,  # type: ignore[arg-type]
    )
    start = time.perf_counter()
    found = write_latents(job, engine, actors)
    if found is None:
        say(f"this process has written its parts; {out} is complete when the others have too")
        return 0
    if found["skipped"]:
        counts = ", ".join(f"{count} {reason}" for reason, count in found["skipped"].items())
        say(f"skipped: {counts}; each is listed in the part's .json file")
    if json:
        print(dumps({name: value for name, value in found.items() if name != "parts"}, indent=2))
        return 0
    gigabytes = sum(part["bytes"] for part in found["parts"]) / 1e9
    print(f"{out}: {found['entries']:,} of {found['samples']:,} samples, {gigabytes:.2f} GB, {time.perf_counter() - start:.0f} s; train with --latents {out}")
    return 0


def fingerprint(
    data: Pictures,
    out: Annotated[PathName, arg(metavar="FILE")] = "fingerprint.safetensors",
    only: tuple[str, ...] = (),
    caption_keys: tuple[str, ...] = (),
    aliases: bool = False,
    index: PathName = "",
    cache: PathName = "",
    cache_gb: float = 100.0,
    json: Json = False,
) -> int:
    """Write what these data can be recognised by (hashes of captions, 118 bytes an image): evaluate --train FILE then tells what a model has seen.

    Put into a model folder as fingerprint.safetensors, it stands for what that model was trained on. It holds no image and no caption.

    Args:
        out: the file.
        only: keep shard samples whose JSON has these values, as in source=clipart.
        caption_keys: JSON fields of shards that hold captions; none: the .txt member.
        aliases: openmoji: the other names of an emoji are captions too.
        index: the folder of index files, as data index wrote them; none: beside each shard.
        cache: the folder for copies of remote shards.
        cache_gb: how large it may become.
    """
    from openvision3.data.fingerprint import take
    from openvision3.data.problems import count_reasons
    from openvision3.data.sources import open_source
    from openvision3.files import check_writable
    from openvision3.progress import track
    from openvision3.settings import read_rules

    path = Path(out)
    if path.is_dir():
        raise ValueError(f"{out} is a folder; name a file with --out, such as {path / 'fingerprint.safetensors'}")
    check_writable(path.absolute().parent, "--out")
    source = open_source(data, only=read_rules(only), caption_keys=caption_keys, aliases=aliases, index=index, cache=cache, cache_gb=cache_gb, watch=track)
    problems = list(source.problems)
    found = take(source, data, problems, track)
    if not len(found.images):
        raise ValueError(f"none of the {len(source)} samples can be used: {', '.join(f'{n} {why}' for why, n in count_reasons(problems).items())}")
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save(path)
    counts = {"samples": found.samples, "images": len(found.images), "captions": len(found.captions), "families": len(found.families)}
    if json:
        print(dumps({"file": str(path), **counts, "bytes": path.stat().st_size, "problems": count_reasons(problems)}, indent=2))
        return 0
    print(f"{path}: {', '.join(f'{count:,} {name}' for name, count in counts.items())}, {path.stat().st_size / 1e6:.2f} MB; name it to evaluate with --train")
    _print_reasons(problems)
    return 0


VERBS: dict[str, Callable[..., int]] = {f.__name__: f for f in (index, check, recaption, latents, fingerprint)}


def data(argv: Sequence[str]) -> int:
    """Prepare pictures with words for training: openvision3 data COMMAND ..."""
    return run_verb(argv, VERBS, "openvision3 data", "usage: openvision3 data COMMAND [ARGUMENTS]")


# -- what the verbs share ------------------------------------------------------------------------------------------


def _found(names: Sequence[str], what: str) -> list[Found]:
    """What these names of data stand for. Raises ValueError where one stands for nothing."""
    from openvision3.data.sources import find

    if not names:
        raise ValueError(f"no {what} named; name some, such as data/{{00000..00009}}.tar")
    return [find(name) for name in names]


def _shards(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the shards of these names, those that a brace names and that are not there). Raises ValueError where there is none."""
    found = _found(names, "shards")
    paths = list(dict.fromkeys(path for each in found for path in each.tars))
    if not paths:
        raise ValueError(f"no shards at {', '.join(names)}; this command looks at .tar files")
    return paths, [path for each in found for path in each.missing]


def _over(work: Callable[[str], T], paths: list[str], workers: int, what: str) -> Iterator[T]:
    """`work` on every shard, in processes where there are several shards, with a bar."""
    from openvision3.device import cores
    from openvision3.progress import track

    workers = min(workers or cores(), len(paths))
    if workers == 1 or len(paths) < 4:
        yield from track(map(work, paths), what, len(paths))
        return
    # Forked before the bar starts its thread: a new interpreter would take seconds to import torch.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")) as pool:
        yield from track(pool.map(work, paths), what, len(paths))


def _print_shards(flawed: list) -> None:
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
    shown = sorted(flawed, key=lambda each: -len(each.problems))[:20]
    for each in shown:
        table.add_row(each.shard, f"{each.samples:,}", f"{each.usable:,}", reasons_in_words(list(each.problems)))
    screen = Console(markup=False, highlight=False)
    screen.print(table)
    if len(flawed) > len(shown):
        print(f"and {len(flawed) - len(shown):,} more shards; all of them with --json")


def _print_reasons(problems: list[dict[str, str]]) -> None:
    from openvision3.data.problems import count_reasons

    for reason, count in count_reasons(problems).items():
        first = next(problem for problem in problems if problem["reason"] == reason)
        print(f"  {count:,} {reason}, such as {first['key']}: {first['detail']}")


@contextmanager
def _watching(what: str, every: float = 10.0) -> Iterator[Callable[[Tally], None]]:
    """What a person sees of a long job: a bar on a terminal, elsewhere a line every few seconds."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    from openvision3.progress import console, duration

    def told(tally: Tally) -> str:
        left = f", {duration(tally.left)} left" if tally.left is not None else ""
        return f"{tally.working}  {tally.samples:,} samples, {tally.rate:.3g}/s{left}"

    screen = console()
    if screen.is_terminal:
        with Progress(TextColumn(what), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[told]}"), console=screen, transient=True) as bar:
            task = bar.add_task(what, total=1.0, told="")
            yield lambda tally: bar.update(task, completed=tally.share, told=told(tally))
        return
    last = time.monotonic()

    def line(tally: Tally) -> None:
        nonlocal last
        if time.monotonic() - last >= every:
            last = time.monotonic()
            screen.print(f"{what} {100 * tally.share:.1f}%  {told(tally)}", markup=False, soft_wrap=True)

    yield line
