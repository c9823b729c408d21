"""The folder of one run: config, environment, command, metrics, log, samples, checkpoints, and the lock on it."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from openvision3.data.problems import Problem, Problems
from openvision3.files import write_whole
from openvision3.progress import console
from openvision3.train.trackers import Trackers

REQUEUE = "REQUEUE"
"""the file in a run folder that says: a signal stopped the run, it has saved, start it again with --resume"""
LOCK = ".lock"
"""the file in a run folder that its process has locked"""


class RunFolder:
    """The folder of a new run or, with `resume`, of one that continues. One rank `writes`; on the others nothing is printed or written.

    Raises:
        ValueError: a new run would overwrite an old one, there is nothing to resume, or another process writes into the folder.
    """

    def __init__(self, path: str | Path, *, resume: bool = False, writes: bool = True):
        self.path, self.writes = Path(path), writes
        self._first_step = 0
        self._board: Any = None
        self._trackers: Trackers | None = None
        self._sent: set[tuple[int, str]] = set()
        self.bar: Progress | None = None
        self._task: Any = None
        self._lock: IO[str] = open(os.devnull, "w")
        self._log = self._metrics = open(os.devnull, "w")
        if not writes:
            return
        self.check(self.path, resume)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.path)
        for name in ("checkpoints", "samples"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        self._log = open(self.path / "log.txt", "a", encoding="utf-8", errors="backslashreplace")
        self._metrics = open(self.path / "metrics.jsonl", "a" if resume else "w", encoding="utf-8")
        (self.path / REQUEUE).unlink(missing_ok=True)

    @staticmethod
    def check(path: Path, resume: bool) -> None:
        """Raises ValueError where the folder cannot be used; writes nothing."""
        used = (path / "config.json").exists()
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file; name a folder with --out")
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{str(path)!a} is not UTF-8, and TensorBoard needs the name of a run folder to be; name another with --out") from None
        if used and not resume:
            raise ValueError(f"{path} already holds a run; continue with --resume, or name another folder with --out")
        if resume and not used:
            raise ValueError(f"{path} holds no run to continue; start without --resume")

    def describe(self, config: dict, environment: dict) -> None:
        """Write the resolved config, the environment, and the exact command (appended on every start)."""
        if not self.writes:
            return
        write_whole(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")
        with open(self.path / "command.txt", "a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(shlex.join(sys.argv) + "\n")
        write_whole(self.path / "config.json", json.dumps(config, indent=2) + "\n")  # last: it makes the folder a run

    def forget_after(self, step: int, problems: int = 0) -> None:
        """Drop the metrics after `step` and all but the first `problems` of skipped.jsonl: a run that continues from a checkpoint writes them again."""
        if not self.writes:
            return
        self._metrics.close()
        kept = []
        for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line cut off by a kill
                row = json.loads(line)
                if row["step"] <= step:
                    kept.append(line + "\n")
                else:
                    self._sent.add(_row_key(row["step"], row))
        write_whole(self.path / "metrics.jsonl", "".join(kept))
        self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")
        if (self.path / "skipped.jsonl").is_file():
            with open(self.path / "skipped.jsonl", "r+b") as file:
                for _ in itertools.islice(file, problems):
                    pass
                file.truncate(file.tell())
        self._first_step = step + 1

    def track(self, names: Sequence[str], config: dict[str, Any]) -> None:
        """Send records and images to these trackers too, from now on."""
        if names and self.writes:
            self._trackers = Trackers(names, self.path, config, self.say)

    def say(self, line: str) -> None:
        """Print a line, and append it to log.txt."""
        if not self.writes:
            return
        self._log.write(f"{datetime.now():%H:%M:%S} {line}\n")
        self._log.flush()
        (self.bar.console if self.bar else console()).print(line, markup=False, soft_wrap=True)

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl; numbers go to tensorboard and the trackers too."""
        if not self.writes:
            return
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        if self._board is None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=self._first_step or None)
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)
        if self._trackers is not None and _row_key(step, values) not in self._sent:  # repeated steps have the same numbers
            self._trackers.log(step, values)

    def image(self, step: int, name: str, path: Path) -> None:
        """Send an image that the run has written to the trackers."""
        if self._trackers is not None and (step, name.partition("/")[0]) not in self._sent:
            self._trackers.image(step, name, path)

    def list_skipped(self, problems: Problems) -> int:
        """Append the new ones of the run's `problems` to skipped.jsonl; returns how many lines it has then."""
        new = problems.take_new()
        if self.writes and new:
            with open(self.path / "skipped.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps(problem) + "\n" for problem in new)
        return len(problems)

    @contextlib.contextmanager
    def showing(self, steps: int, done: int) -> Iterator[None]:
        """Show a progress bar while the loop runs, if the output is a terminal."""
        if not (self.writes and console().is_terminal):
            yield
            return
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns, console=console()) as self.bar:
            self._task = self.bar.add_task("train", total=steps, completed=done)
            try:
                yield
            finally:
                self.bar.stop()
                self.bar = None

    def advance(self, done: int) -> None:
        if self.bar is not None:
            self.bar.update(self._task, completed=done)

    def ask_for_requeue(self) -> None:
        """Write the file by which a launch script knows that the run has saved and is to be started again."""
        if self.writes:
            write_whole(self.path / REQUEUE, "saved after a signal; start the same command with --resume\n")

    def close(self) -> None:
        if self._trackers is not None:
            self._trackers.close()
        for file in (self._log, self._metrics, self._board, self._lock):
            if file is not None:
                with contextlib.suppress(OSError):  # a full disk has been reported already
                    file.close()


def lock(folder: Path) -> IO[str]:
    """Reserve a run folder for this process until the returned file is closed or the process ends, however it ends.

    On a disk without locks (some network disks) nothing is reserved.

    Raises:
        ValueError: another process has reserved it.
    """
    file = open(folder / LOCK, "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a lock of the process alone: its workers do not hold it after its end
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise ValueError(f"{folder} is being written by {owner}; wait for it, end it, or name another folder with --out") from error
    except OSError:
        return file
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def _row_key(step: int, row: dict[str, Any]) -> tuple[int, str]:
    """Distinguishes a training row of metrics.jsonl from an evaluation of the same step."""
    return step, next((name.partition("/")[0] for name in row if name != "step"), "")


def read_skipped(run: Path, count: int) -> Iterator[Problem]:
    """The first `count` unusable samples that a run has listed."""
    if count:
        with open(run / "skipped.jsonl", encoding="utf-8") as file:
            yield from map(json.loads, itertools.islice(file, count))
