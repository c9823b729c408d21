"""Save a run so that nothing is lost, and go on from it.

A checkpoint is a folder `RUN/checkpoints/step-00000250` with `state/` (torch.distributed.checkpoint: weights, optimiser),
`run_state.json` (progress, and the sha256 of every other file), and beside them a plain model folder that
`openvision3.load` reads. It is written under a hidden name, flushed to disk, and renamed when it is whole, and renamed back
before it is deleted: a checkpoint that can be seen is complete.

Training waits for a copy of the tensors only: a thread of rank 0 writes it while the next steps run. Shards of several ranks are
put together for that, so that any number of processes can go on.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from openvision3 import distributed
from openvision3.files import sha256_of
from openvision3.hub import complete_checkpoints
from openvision3.train.optimizer import Optimizers

FORMAT = 1

# Not strict towards the frozen parameters, which no checkpoint holds; `load_checkpoint` is strict towards all others.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


class CheckpointError(RuntimeError):
    """A save or a load that failed; the message says what is still in place."""


@dataclass
class RunState:
    """Where a run stands, beside its tensors."""

    step: int = 0
    samples: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    problems: int = 0
    """lines of skipped.jsonl: unusable samples met so far"""
    seconds: float = 0.0
    window: dict[str, float] = field(default_factory=dict)
    """sums since the last log line, so that a run that goes on logs the same means"""
    window_steps: int = 0
    val_loss: float | None = None
    """val/loss at this very step, where it was measured"""
    val_measure: int = 1
    """how val/loss is made: losses made otherwise are not compared"""


def last_good(run: str | Path) -> str:
    """What a message says about the run's checkpoints."""
    found = complete_checkpoints(run)
    return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


Export = Callable[[Path, dict[str, Tensor], RunState], None]
"""Writes the plain model folder of that state from whole weights."""


class Saver:
    """Saves a run while it goes on, one checkpoint at a time.

    Raises:
        CheckpointError: from any of its methods, once a save has failed; earlier checkpoints are untouched.
    """

    def __init__(self, run: Path, model: nn.Module, optimizers: Optimizers, export: Export, keep: int = 2, keep_best: int = 0):
        self.run, self.model, self.optimizers, self.export, self.keep, self.keep_best = run, model, optimizers, export, keep, keep_best
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: RunState) -> None:
        """Copy all tensors as they are now and begin to write them. All ranks take part in the copy; waits for the save before."""
        self.wait()
        tensors = _copied(_tensors(self.model, self.optimizers))
        if distributed.rank() == 0:
            record = RunState(**asdict(state))
            self._thread = threading.Thread(target=self._write, args=(tensors, record), name="checkpoint")
            self._thread.start()

    def _write(self, tensors: dict[str, Any], state: RunState) -> None:
        try:
            write_checkpoint(self.run, tensors, state, self.export, self.keep, self.keep_best)
        except BaseException as error:  # the training thread raises it
            self._error = error

    @property
    def failed(self) -> bool:
        """Whether the last save has failed, without waiting for it."""
        return self._error is not None

    def settle(self) -> None:
        """Until the last save is on disk, or has failed; never raises, for a run that ends with another error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Until the last save is on disk. Every rank takes part: one saves, and where it fails none goes on."""
        with distributed.together():
            self.settle()
            if self._error is not None:
                raise self._error


def save_checkpoint(run: Path, model: nn.Module, optimizers: Optimizers, state: RunState, export: Export, keep: int = 2, keep_best: int = 0) -> Path:
    """One save, waited for. Raises CheckpointError."""
    saver = Saver(run, model, optimizers, export, keep, keep_best)
    saver.save(state)
    saver.wait()
    return _folder(run, state.step)


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def write_checkpoint(run: Path, tensors: dict[str, Any], state: RunState, export: Export, keep: int, keep_best: int) -> None:
    """Write the checkpoint of `state.step`, then drop all but the newest `keep` and the `keep_best` of lowest val/loss.

    `tensors` holds whole tensors on the CPU, as `Saver` copies them.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    folder = _folder(run, state.step)
    making = run / "checkpoints" / f".making-{state.step:08d}"
    if (folder / "run_state.json").is_file():
        return
    try:
        _sweep(making.parent)
        making.parent.mkdir(parents=True, exist_ok=True)
        export(making, tensors["model"], state)
        with _alone():
            dcp.save(tensors, checkpoint_id=str(making / "state"), no_dist=True)
        record = {"format": FORMAT, "files": _sums(making), **asdict(state)}
        (making / "run_state.json").write_text(json.dumps(record) + "\n")
        for path in (*making.rglob("*"), making):
            _flush(path)
        os.replace(making, folder)
        _flush(folder.parent)
        for old in _superfluous(run, keep, keep_best, state.val_measure):
            os.replace(old, old.with_name(f".old-{old.name}"))
        _sweep(making.parent)
    except (Exception, CheckpointException) as error:
        _sweep(making.parent)
        cause = _os_error(error)
        if cause is None:
            if isinstance(error, Exception):
                raise
            raise CheckpointError(f"the checkpoint of step {state.step} could not be written: {' '.join(str(_cause(error) or error).split())}") from error
        raise not_written(cause, run, state.step) from error


def _superfluous(run: Path, keep: int, keep_best: int, val_measure: int) -> list[Path]:
    """Neither among the newest nor among the best. A checkpoint whose loss cannot be read, or was made otherwise, is not among the best."""
    older = complete_checkpoints(run)[:-keep]
    measured = [(loss, path) for path in complete_checkpoints(run) if (loss := _val_loss(path, val_measure)) is not None and math.isfinite(loss)]
    best = {path for _, path in sorted(measured)[:keep_best]}
    return [path for path in older if path not in best]


def _val_loss(checkpoint: Path, val_measure: int) -> float | None:
    try:
        record = json.loads((checkpoint / "run_state.json").read_text())
        return record.get("val_loss") if record.get("val_measure", 1) == val_measure else None
    except (OSError, ValueError, AttributeError):
        return None


def not_written(error: OSError, run: Path, step: int) -> CheckpointError:
    """What the file system refused, and what there is to go on from."""
    why, what = ("no space left on the disk", "make room") if error.errno == errno.ENOSPC else (error.strerror or str(error), "put that right")
    # of an error of two files the first was read
    where = error.filename2 or (run if error.errno == errno.ENOSPC else error.filename) or run
    return CheckpointError(f"{where}: {why} at step {step}; {last_good(run)}; {what} and go on with --resume")


def read_state(folder: Path) -> RunState:
    """The progress of a checkpoint whose files are all as they were written.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    try:
        record = json.loads((folder / "run_state.json").read_text())
        seen, files = record.pop("format", None), record.pop("files", {})
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(folder, f"run_state.json cannot be read ({error})") from error
    if seen != FORMAT:
        raise CheckpointError(f"{folder} is of checkpoint format {seen}, this version of openvision3 reads {FORMAT}; go on with the version that wrote it")
    try:
        whole = any("/" in name for name in files)  # older checkpoints name the files of state/ alone
        (folder / "state").stat()
        found = _sums(folder if whole else folder / "state")
        state = RunState(**record)
    except (OSError, TypeError) as error:
        raise _damaged(folder, str(error)) from error
    wrong = sorted(name for name in (files.keys() if whole else files.keys() | found.keys()) if files.get(name) != found.get(name))
    if wrong:
        raise _damaged(folder, f"{'' if whole else 'state/'}{wrong[0]} is not as it was written")
    return state


def load_checkpoint(folder: Path, model: nn.Module, optimizers: Optimizers, state: RunState | None = None) -> RunState:
    """Put the weights and the optimiser of a checkpoint in place, strictly: no tensor may be missing, foreign or of another shape.

    Every rank reads what it needs, however many had written it. `state` is what `read_state` gave where the files have been looked at before.

    Raises:
        CheckpointError: it is damaged, of another version, or of another model.
    """
    state = state or read_state(folder)
    tensors = _tensors(model, optimizers)
    try:
        names = dcp.FileSystemReader(str(folder / "state")).read_metadata().state_dict_metadata
        foreign = {name for name in names if name.startswith("model.")} - {f"model.{name}" for name in tensors["model"]}
        if foreign:
            raise ValueError(f"it holds {min(foreign)}, which this model has not")
        with _alone():
            dcp.load(tensors, checkpoint_id=str(folder / "state"), no_dist=True)
        fused = [[group.get("fused") for group in optimizer.param_groups] for optimizer in optimizers.all]
        set_state_dict(model, optimizers.all, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"], options=_OPTIONS)
        for optimizer, values in zip(optimizers.all, fused, strict=True):  # of this device, not of the one that had saved
            for group, value in zip(optimizer.param_groups, values, strict=True):
                if "fused" in group:
                    group["fused"] = value
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{folder} does not fit this run: {' '.join(str(_cause(error) or error).split())}") from error
    return state


def _damaged(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{folder} is damaged: {why}; delete it to go on from the checkpoint before it")


def _tensors(model: nn.Module, optimizers: Optimizers) -> dict:
    weights, optimizer = get_state_dict(model, optimizers.all, options=_OPTIONS)
    return {"model": weights, "optimizer": optimizer}


def _copied(value: Any) -> Any:
    """Whole tensors on the CPU, apart from those that go on being trained; all ranks take part, rank 0 keeps them."""
    if isinstance(value, dict):
        return {name: _copied(inside) for name, inside in value.items()}
    if isinstance(value, list):
        return [_copied(inside) for inside in value]
    if not isinstance(value, Tensor):
        return value
    together = distributed.full(value)
    return together.detach().to("cpu", copy=True) if distributed.rank() == 0 else None


def _sums(folder: Path) -> dict[str, str]:
    """{file: sha256}: torch's reader takes a flipped bit for a weight."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "run_state.json":
            found[path.relative_to(folder).as_posix()] = sha256_of(path)
    return found


def _alone() -> warnings.catch_warnings:
    """One process is what is wanted: torch need not warn of it."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def _sweep(checkpoints: Path) -> None:
    """Remove what an interrupted save or deletion left behind."""
    for path in checkpoints.glob(".*"):
        shutil.rmtree(path, ignore_errors=True)


def _cause(error: BaseException) -> BaseException | None:
    """The error behind an error. DCP's, which is no `Exception`, keeps it by rank."""
    if isinstance(error, CheckpointException):
        return next((failure for failure, _ in error.failures.values()), None)
    return error.__cause__ or error.__context__


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an error of a library, if there is one: safetensors and DCP wrap it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError):
            return error
        if "No space left on device" in str(error) or "os error 28" in str(error):
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        error = _cause(error)
    return None


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
