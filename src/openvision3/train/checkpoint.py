"""Save a run so that nothing is lost, and load it again.

A checkpoint is a folder `RUN/checkpoints/step-00000250` with `state/` (torch.distributed.checkpoint: weights, optimiser, averaged weights if the
run has them), `run_state.json` (progress, and the sha256 of every other file), and a plain model folder that `openvision3.load` reads. It is written
under a hidden name, flushed to disk and renamed when it is whole; before it is deleted it is renamed back. So a visible checkpoint is complete.

Training waits only until the tensors are copied: a thread of rank 0 writes them while the next steps run. The pieces of several ranks are put
together first, so that any number of processes can continue.
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
from openvision3.hub import complete_checkpoints, latest_checkpoint
from openvision3.train.optimizer import Optimizers

FORMAT = 1

# Not strict: a checkpoint has no frozen parameters. `load_checkpoint` is strict about all others.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


class CheckpointError(RuntimeError):
    """A save or a load has failed; the message says which checkpoint is left."""


@dataclass
class RunState:
    """Progress of a run: all of its state but the tensors."""

    step: int = 0
    samples: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    problems: int = 0
    """unusable samples so far, the lines of skipped.jsonl"""
    seconds: float = 0.0
    window: dict[str, float] = field(default_factory=dict)
    """sums since the last log line, so that a resumed run logs the same means"""
    window_steps: int = 0
    memory: dict[str, float] = field(default_factory=dict)
    """what the training itself remembers from step to step (`Training.after_step`)"""
    val_loss: float | None = None
    """val/loss, if it was measured at this very step"""
    val_measure: int = 1
    """how val/loss is computed (`Training.val_measure`): only losses of one kind are compared"""


def last_good(run: str | Path) -> str:
    """Which checkpoint is left, for error messages."""
    last = latest_checkpoint(run)
    return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"


Export = Callable[[Path, dict[str, Tensor], RunState], None]
"""(folder, whole weights, state): creates the folder and writes the plain model into it."""


class Saver:
    """Saves a run while training continues, one checkpoint at a time.

    Raises:
        CheckpointError: from `save` and `wait`, once a save has failed; earlier checkpoints are untouched.
    """

    def __init__(self, run: Path, model: nn.Module, optimizers: Optimizers, export: Export, keep: int = 2, keep_best: int = 0):
        self.run, self.model, self.optimizers, self.export, self.keep, self.keep_best = run, model, optimizers, export, keep, keep_best
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: RunState) -> None:
        """Wait for the previous save, copy all tensors (all ranks take part), and start to write them."""
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
        """Wait until the last save is on disk or has failed; never raises, so that a run can end with its own error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Wait until the last save is on disk. All ranks take part: if the one that saves fails, all stop."""
        with distributed.together():
            self.settle()
            if self._error is not None:
                raise self._error


def write_checkpoint(run: Path, tensors: dict[str, Any], state: RunState, export: Export, keep: int, keep_best: int) -> None:
    """Write the checkpoint of `state.step`, then delete all but the newest `keep` and the `keep_best` with the lowest val/loss.

    `tensors`: whole tensors on the CPU, as `Saver` copies them.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    folder = run / "checkpoints" / f"step-{state.step:08d}"
    making = run / "checkpoints" / f".making-{state.step:08d}"
    if (folder / "run_state.json").is_file():
        return
    try:
        _sweep(making.parent)
        making.parent.mkdir(parents=True, exist_ok=True)
        export(making, tensors["model"] | {name: value for name, value in tensors.get("average", {}).items() if name in tensors["model"]}, state)
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
    """Those neither among the newest nor among the best. A loss that cannot be read, or was computed otherwise, is not among the best."""
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
    """The error of the file system in one line, and the checkpoint to continue from."""
    why, what = ("no space left on the disk", "make room") if error.errno == errno.ENOSPC else (error.strerror or str(error), "put that right")
    # if the error names two files, the first was being read
    where = error.filename2 or (run if error.errno == errno.ENOSPC else error.filename) or run
    return CheckpointError(f"{where}: {why} at step {step}; {last_good(run)}; {what} and continue with --resume")


def read_state(folder: Path) -> RunState:
    """The progress that a checkpoint records, after checking all its files against their sha256.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another version.
    """
    try:
        record = json.loads((folder / "run_state.json").read_text())
        seen, files = record.pop("format", None), record.pop("files", {})
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(folder, f"run_state.json cannot be read ({error})") from error
    if seen != FORMAT:
        raise CheckpointError(f"{folder} has checkpoint format {seen}, and this version of openvision3 reads {FORMAT}; continue with the version that wrote it")
    try:
        whole = any("/" in name for name in files)  # older checkpoints name the files of state/ alone
        (folder / "state").stat()
        sums = _sums(folder if whole else folder / "state")
        state = RunState(**record)
    except (OSError, TypeError) as error:
        raise _damaged(folder, str(error)) from error
    wrong = sorted(name for name in (files.keys() if whole else files.keys() | sums.keys()) if files.get(name) != sums.get(name))
    if wrong:
        raise _damaged(folder, f"{'' if whole else 'state/'}{wrong[0]} is not as it was written")
    return state


def load_checkpoint(folder: Path, model: nn.Module, optimizers: Optimizers, state: RunState | None = None) -> RunState:
    """Load the weights and the optimiser of a checkpoint, strictly: no tensor may be missing, unknown or of another shape.

    Every rank reads what it needs, however many ranks saved. `state`: what `read_state` returned, if it has checked the files already.

    Raises:
        CheckpointError: the checkpoint is damaged, of another version, or of another model.
    """
    state = state or read_state(folder)
    tensors = _tensors(model, optimizers)
    try:
        names = dcp.FileSystemReader(str(folder / "state")).read_metadata().state_dict_metadata
        foreign = {name for name in names if name.startswith("model.")} - {f"model.{name}" for name in tensors["model"]}
        if foreign:
            raise ValueError(f"it holds {min(foreign)}, which this model does not have")
        with _alone():
            dcp.load(tensors, checkpoint_id=str(folder / "state"), no_dist=True)
        fused = [[group.get("fused") for group in optimizer.param_groups] for optimizer in optimizers.all]
        set_state_dict(model, optimizers.all, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"], options=_OPTIONS)
        for optimizer, values in zip(optimizers.all, fused, strict=True):  # as on this device, not as on the one that saved
            for group, value in zip(optimizer.param_groups, values, strict=True):
                if "fused" in group:
                    group["fused"] = value
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{folder} does not fit this run: {' '.join(str(_cause(error) or error).split())}") from error
    return state


def _damaged(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{folder} is damaged: {why}; delete it to continue from the checkpoint before it")


def _tensors(model: nn.Module, optimizers: Optimizers) -> dict:
    weights, optimizer = get_state_dict(model, optimizers.all, options=_OPTIONS)
    average = {"average": optimizers.average.state} if optimizers.average is not None else {}
    return {"model": weights, "optimizer": optimizer, **average}


def _copied(value: Any) -> Any:
    """Copies of whole tensors on the CPU; all ranks take part, rank 0 keeps them."""
    if isinstance(value, dict):
        return {name: _copied(inside) for name, inside in value.items()}
    if isinstance(value, list):
        return [_copied(inside) for inside in value]
    if not isinstance(value, Tensor):
        return value
    whole = distributed.full(value)
    return whole.detach().to("cpu", copy=True) if distributed.rank() == 0 else None


def _sums(folder: Path) -> dict[str, str]:
    """{file: sha256}; torch's reader would take a flipped bit for a weight."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "run_state.json")
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def _alone() -> warnings.catch_warnings:
    """Silences torch's warning that a single process saves or loads."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def _sweep(checkpoints: Path) -> None:
    """Remove what an interrupted save or deletion left behind."""
    for path in checkpoints.glob(".*"):
        shutil.rmtree(path, ignore_errors=True)


def _cause(error: BaseException) -> BaseException | None:
    """The error behind an error. DCP's `CheckpointException`, which is no `Exception`, keeps one for each rank."""
    if isinstance(error, CheckpointException):
        return next((failure for failure, _ in error.failures.values()), None)
    return error.__cause__ or error.__context__


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind the error of a library, if there is one: safetensors and DCP wrap it."""
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
