"""The verbs of `openvision3 data`: what is done to pictures with words before a run."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from json import dumps
from typing import Annotated, TypeVar

from tyro.conf import Positional, arg

from openvision3.cli import Json

T = TypeVar("T")

Shards = Positional[Annotated[tuple[str, ...], arg(metavar="SHARDS ...", help="shards, folders of them, globs, braces and URLs: data/{00000..00009}.tar")]]


def index(shards: Shards, index: str = "", again: bool = False, workers: int = 0, json: Json = False) -> int:
    """Write what lies where in each shard, so that a run opens thousands of them at once.

    Args:
        index: the folder for the index files, for shards that are remote or may not be written beside; none: beside each shard.
        again: write anew those that fit their shard too.
        workers: processes; 0: one for each core.
    """
    from openvision3.data.check import Indexed, write_index
    from openvision3.data.index import is_remote

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


def check(shards: Shards, caption_keys: tuple[str, ...] = (), decode: bool = False, workers: int = 0, json: Json = False) -> int:
    """Look at every sample of shards and count what cannot be trained on; exit code 2 where something is wrong.

    Args:
        caption_keys: JSON fields that hold captions; none: the .txt member.
        decode: decode every picture too.
        workers: processes; 0: one for each core.
    """
    from openvision3.data.check import Checked, check_shard
    from openvision3.data.shards import count_reasons

    paths, missing = _shards(shards)
    done = list(_over(functools.partial(check_shard, caption_keys=caption_keys, decode=decode), paths, workers, "checking"))
    done += [Checked(path, problems=({"key": path, "reason": "missing", "detail": "no such shard"},)) for path in missing]
    problems = [problem for each in done for problem in each.problems]
    samples, usable, size = sum(d.samples for d in done), sum(d.usable for d in done), sum(d.bytes for d in done)
    if json:
        found = {"shards": len(done), "samples": samples, "usable": usable, "bytes": size, "reasons": count_reasons(problems)}
        print(dumps(found | {"problems": problems, "each": [asdict(each) for each in done]}, indent=2, ensure_ascii=False))
    else:
        _print_shards([each for each in done if each.problems])
        looked = "tar, members, JSON, captions and pictures" if decode else "tar, members, JSON and captions; pictures are decoded with --decode"
        print(f"{len(done):,} shards, {samples:,} samples, {size / 1e9:.2f} GB; {usable:,} samples without a flaw ({looked})")
        _print_reasons(problems)
    return 2 if problems else 0


VERBS: dict[str, Callable[..., int]] = {f.__name__: f for f in (index, check)}


# -- what the verbs share ------------------------------------------------------------------------------------------


def _shards(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the shards of these names, those that a brace names and that are not there). Raises ValueError where there is none."""
    from openvision3.data.shards import find

    if not names:
        raise ValueError("no shards named; name some, such as data/{00000..00009}.tar")
    found = [find(name) for name in names]
    paths = list(dict.fromkeys(path for each in found for path in each.tars))
    if not paths:
        raise ValueError(f"no shards at {', '.join(names)}; this command looks at .tar files")
    return paths, [path for each in found for path in each.missing]


def _over(work: Callable[[str], T], paths: list[str], workers: int, what: str) -> Iterator[T]:
    """`work` on every shard, in processes where there are several shards, with a bar."""
    from openvision3.progress import track

    workers = min(workers or os.cpu_count() or 1, len(paths))
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

    from openvision3.data.shards import count_reasons

    if not flawed:
        return
    table = Table("shard", "samples", "usable", "what is wrong", header_style="bold")
    for column in (1, 2):
        table.columns[column].justify = "right"
    shown = sorted(flawed, key=lambda each: -len(each.problems))[:20]
    for each in shown:
        reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(list(each.problems)).items())
        table.add_row(each.shard, f"{each.samples:,}", f"{each.usable:,}", reasons)
    screen = Console(markup=False, highlight=False)
    screen.print(table)
    if len(flawed) > len(shown):
        print(f"and {len(flawed) - len(shown):,} more shards; all of them with --json")


def _print_reasons(problems: list[dict[str, str]]) -> None:
    from openvision3.data.shards import count_reasons

    for reason, count in count_reasons(problems).items():
        first = next(problem for problem in problems if problem["reason"] == reason)
        print(f"  {count:,} {reason}, such as {first['key']}: {first['detail']}")
