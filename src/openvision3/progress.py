"""Progress on stderr: a bar on a terminal, plain lines elsewhere; and the versions and the machine that results and runs record."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


QUIET = 30.0
"""seconds between two lines of progress where there is no terminal"""


def console() -> Console:
    return Console(stderr=True, highlight=False)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Go through `items` with a bar on a terminal; elsewhere with a line every half minute."""
    with counting(what, "", len(items) if total is None and isinstance(items, Sized) else total) as count:
        for item in items:
            yield item
            count(1)


@contextlib.contextmanager
def counting(what: str, unit: str, total: int | None, *, silent: bool = False, every: float | None = None) -> Iterator[Callable[[int], None]]:
    """Gives a function to be called with how many more are done: a bar with speed and time left on a terminal, elsewhere a line every half minute."""
    screen, start, done = console(), time.perf_counter(), 0
    last, every = start, QUIET if every is None else every
    unit = f" {unit}" if unit else ""

    def speed() -> float:
        return done / max(time.perf_counter() - start, 1e-9)

    if silent or not screen.is_terminal:

        def count(more: int) -> None:
            nonlocal done, last
            done += more
            if not silent and time.perf_counter() - last >= every:
                last = time.perf_counter()
                left = f" of {total:,}{unit}, {speed():,.1f}{unit}/s, left {duration((total - done) / max(speed(), 1e-9))}" if total else ""
                screen.print(f"{what}: {done:,}{left}", markup=False)

        yield count
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task(what, total=total, rate="")

        def advance(more: int) -> None:
            nonlocal done
            done += more
            bar.update(task, completed=done, rate=f"{speed():,.1f}{unit}/s")

        yield advance


LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "pillow")
"""numbers may depend on their versions: networks and VAEs, tokenizing, decoding and resizing of images"""


def versions(*packages: str) -> dict[str, str]:
    """{name: version} of those packages that are installed."""
    installed = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


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
