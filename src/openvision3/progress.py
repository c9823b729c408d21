"""What a person sees while something runs, and what a run writes down.

On a terminal a rich bar with the last line above it, elsewhere plain lines; `metrics.jsonl`, `log.txt` and tensorboard
always, wandb and trackio where they are asked for. A run folder also holds the resolved config, the environment and the exact command.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


QUIET = 30.0
"""seconds between two lines of progress where there is no terminal for a bar"""


def console() -> Console:
    return Console(stderr=True, highlight=False)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Go through `items` with a bar on a terminal; elsewhere with a line every half minute."""
    screen = console()
    if not screen.is_terminal:
        start = told = time.perf_counter()
        for done, item in enumerate(items, 1):
            yield item
            now = time.perf_counter()
            if now - told >= QUIET:
                told = now
                left = f" of {total:,}, left {duration((now - start) / done * (total - done))}" if total else ""
                screen.print(f"{what}: {done:,}{left}", markup=False)
        return
    with Progress(TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=screen, transient=True) as bar:
        yield from bar.track(items, total=total)


@contextlib.contextmanager
def counting(what: str, unit: str, total: int, *, silent: bool = False, every: float = QUIET) -> Iterator[Callable[[int], None]]:
    """Call what this gives with how many more are done: a bar with speed and time left on a terminal, elsewhere a line every half minute."""
    screen, start, done = console(), time.perf_counter(), 0
    told = start

    def speed() -> float:
        return done / max(time.perf_counter() - start, 1e-9)

    if silent or not screen.is_terminal:

        def count(more: int) -> None:
            nonlocal done, told
            done += more
            if not silent and time.perf_counter() - told >= every:
                told = time.perf_counter()
                screen.print(f"{what}: {done:,} of {total:,} {unit}, {speed():,.0f} {unit}/s, left {duration((total - done) / max(speed(), 1e-9))}")

        yield count
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task(what, total=total, rate="")

        def advance(more: int) -> None:
            nonlocal done
            done += more
            bar.update(task, completed=done, rate=f"{speed():,.0f} {unit}/s")

        yield advance


LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "pillow")
"""on whose versions numbers may depend: networks and VAEs, words, how images are decoded and resized"""


def versions(*packages: str) -> dict[str, str]:
    """{name: version} of those that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def environment() -> dict[str, Any]:
    """Versions and machine, for the run folder and `doctor`."""
    import torch

    from openvision3 import __version__

    return {
        "openvision3": __version__,
        "python": platform.python_version(),
        **versions(*LIBRARIES),
        "torch": torch.__version__,
        "system": platform.platform(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def duration(seconds: float) -> str:
    """90 -> 1m30s, 7260 -> 2h01m."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
