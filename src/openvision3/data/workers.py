"""Items prepared ahead by worker processes, in order. A worker that dies is replaced, and no wait is endless.

Each item depends on its number only, so the items of a dead worker are prepared again and nothing changes. Processes come from the
standard library's pool, which reports a death to the caller; torch's DataLoader raises it in a signal handler, in the middle of a step.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.multiprocessing  # tensors travel through shared memory

from openvision3.progress import console

T = TypeVar("T", covariant=True)

SHARED_MEMORY = Path("/dev/shm")
AHEAD = 2
"""items that each worker prepares ahead"""
DEATHS = 3
"""so many workers may die within DEATHS_WITHIN items; the next death ends the run"""
DEATHS_WITHIN = 100
PATIENCE = 15 * 60.0
"""longest wait for an item, in seconds; less than the other processes of a run wait for this one"""
REPORT_AFTER = 60.0
"""a wait of so many seconds is reported once"""
STOP_AFTER = 5.0
"""longest wait for an item, in seconds, after the run was asked to stop"""
INTERVAL = 0.2
"""seconds between two checks of a wait"""


class WorkersFailed(RuntimeError):
    """Workers died repeatedly, gave nothing, or could not hand over an item."""


class WaitGivenUp(RuntimeError):
    """The run was asked to stop while it waited for an item."""


class Items(Protocol[T]):
    def __getitem__(self, number: int, /) -> T: ...


_items: Any = None
"""the items that a worker process prepares"""


class Workers:
    """`count` processes that prepare `items`; `deaths` counts those that had to be replaced."""

    def __init__(self, items: Items[T], count: int, stopping: Callable[[], object] = lambda: False):
        self.items, self.count, self.stopping = items, count, stopping
        self.deaths = 0
        self._died_at: deque[int] = deque(maxlen=DEATHS + 1)

    def make(self, numbers: Iterable[int]) -> Generator[T, None, None]:
        """The items of these numbers, in order.

        Raises:
            WorkersFailed, WaitGivenUp.
        """
        left, pool, given, patience = iter(numbers), self._pool(), 0, 5.0
        pending: deque[list[Any]] = deque()  # [number, future of its item]
        try:
            while True:
                pending.extend([number, None] for number in itertools.islice(left, AHEAD * self.count - len(pending)))
                if not pending:
                    return
                try:
                    for entry in pending:
                        entry[1] = entry[1] or pool.submit(_make, entry[0])
                    item = wait(lambda seconds: _result(pending[0][1], seconds), self.stopping)
                except BrokenProcessPool:
                    processes = _processes(pool)
                    for process in processes:  # also those alive, which would end at any time
                        if process.is_alive():
                            with contextlib.suppress(ProcessLookupError):  # it ended just now
                                os.kill(process.pid, signal.SIGALRM)
                    pool.shutdown(cancel_futures=True)
                    for entry in pending:
                        entry[1] = entry[1] if _is_whole(entry[1]) else None
                    self._died([process.exitcode for process in processes], given)
                    pool = self._pool()
                    continue
                except (WorkersFailed, WaitGivenUp):
                    patience = 0.0
                    raise
                except (RuntimeError, OSError) as error:
                    if "shared memory" not in str(error) and "No space left" not in str(error):
                        raise
                    raise WorkersFailed(f"a worker could not hand over an item: {_no_room(_free())}") from error
                pending.popleft()
                given += 1
                yield item
        finally:
            _close(pool, patience)

    def _pool(self) -> concurrent.futures.ProcessPoolExecutor:
        # the default start method, as in torch's DataLoader: a fork copies nothing
        return concurrent.futures.ProcessPoolExecutor(self.count, multiprocessing.get_context(), initializer=_begin, initargs=(self.items, os.getpid()))

    def _died(self, codes: list[int | None], given: int) -> None:
        """Count and report a death after `given` items. Raises WorkersFailed if it is one too many."""
        first = next((code for code in codes if code not in (None, 0, -signal.SIGTERM, -signal.SIGALRM)), 0)
        how = f"killed by {signal.Signals(-first).name}" if first < 0 else f"lost (exit code {first})" if first else "lost"
        died = f"a worker was {how}{', most likely because memory ran out' if first == -signal.SIGKILL else ''}"
        self.deaths += 1
        self._died_at.append(given)
        if len(self._died_at) > DEATHS and given - self._died_at[0] < DEATHS_WITHIN:
            raise WorkersFailed(f"{died}, for the {self.deaths}th time; take fewer --workers or a smaller --micro-batch")
        console().print(f"{died}: workers are restarted at the same batch ({self.deaths} so far)", markup=False, soft_wrap=True)


def wait(get: Callable[[float], T], stopping: Callable[[], object]) -> T:
    """The result of `get(seconds)`, which raises queue.Empty if it has none in that time.

    Raises:
        WaitGivenUp: the run was asked to stop meanwhile. WorkersFailed: no result in PATIENCE seconds.
    """
    start = running = time.monotonic()
    reported = False
    while True:
        with contextlib.suppress(queue.Empty):
            return get(INTERVAL)
        now = time.monotonic()
        if not stopping():
            running = now
        elif now - running > STOP_AFTER:
            raise WaitGivenUp(f"asked to stop after waiting {now - start:.0f} s for a batch")
        if now - start > PATIENCE:
            raise WorkersFailed(
                f"no batch for {PATIENCE / 60:.0f} minutes, though the workers are alive; check the disk or the network that the data come from"
            )
        if now - start > REPORT_AFTER and not reported:
            reported = True
            console().print(f"still waiting for a batch after {REPORT_AFTER:.0f} s", markup=False)


def _processes(pool: concurrent.futures.ProcessPoolExecutor) -> list[Any]:
    return list((pool._processes or {}).values())


def _close(pool: concurrent.futures.ProcessPoolExecutor, patience: float) -> None:
    """End the processes of a pool; those that have not ended after `patience` seconds are killed.

    The pool's own thread waits for them, not this one: of two that wait for one process, the later cannot tell that it has ended.
    """
    processes, manager = _processes(pool), cast(threading.Thread | None, pool._executor_manager_thread)  # the stubs name another class
    pool.shutdown(wait=False, cancel_futures=True)
    if manager is None:  # nothing was asked of it
        return
    manager.join(patience)
    if manager.is_alive():
        for process in processes:
            process.kill()
        manager.join(5)


def _result(made: concurrent.futures.Future, seconds: float) -> Any:
    concurrent.futures.wait([made], seconds)
    if not made.done():
        raise queue.Empty
    return made.result()


def _is_whole(made: concurrent.futures.Future | None) -> bool:
    return made is not None and made.done() and not made.cancelled() and made.exception() is None


def _begin(items: Any, parent: int) -> None:
    """Initialise a worker: one thread; it outlives signals to the process group, but not its parent."""
    global _items
    _items = items
    torch.set_num_threads(1)
    outlive_signals()
    threading.Thread(target=_end_with, args=(parent,), name="watchdog", daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def _make(number: int) -> Any:
    return _items[number]


def outlive_signals(worker: int = 0) -> None:
    """Let a worker survive signals to its process group for a while, since the run has to save first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(5))  # the alarm ends it unless the run has


def check_shared_memory(item: int, workers: int, held: int = 1, processes: int = 1) -> None:
    """Check that the items prepared ahead fit into shared memory: `item` bytes each, `held` more in use, in each of `processes`.

    Raises:
        ValueError: they do not.
    """
    free, need = _free(), item * (AHEAD * workers + held) * processes
    if workers and free is not None and need > free:
        raise ValueError(
            f"{workers} workers{f' of each of {processes} processes' if processes > 1 else ''} need {_megabytes(need)} of shared memory "
            f"({_megabytes(item)} a batch): {_no_room(free, need)}"
        )


def _no_room(free: int | None, need: int = 0) -> str:
    size = f"={max(1, -(-need // 2**30))}g" if need else ""
    there = f"{_megabytes(free)} are free in {SHARED_MEMORY}" if free is not None else f"{SHARED_MEMORY} is full"
    return f"{there}; start the container with --shm-size{size}, or take fewer --workers or a smaller --micro-batch"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count / 1e6:.2f} MB"


def _free() -> int | None:
    """Free bytes of shared memory; None if unknown."""
    try:
        disk = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize
