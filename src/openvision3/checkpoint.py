"""Save a run so that nothing is lost, and go on from it.

A checkpoint is a folder `RUN/checkpoints/step-00000250` with `state/` (torch.distributed.checkpoint: weights, optimiser),
`run_state.json` (progress, and the sha256 of every file in `state/`), and beside them a plain model folder that
`openvision3.load` reads. It is written under a hidden name, flushed to disk, and renamed when it is whole, and renamed back
before it is deleted: a checkpoint that can be seen is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from openvision3.optimizer import Optimizers

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


def complete_checkpoints(run: str | Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(p for p in (Path(run) / "checkpoints").glob("step-*") if (p / "run_state.json").is_file())


def last_good(run: str | Path) -> str:
    """What a message says about the run's checkpoints."""
    found = complete_checkpoints(run)
    return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def save_checkpoint(run: Path, model: nn.Module, optimizers: Optimizers, state: RunState, export: Callable[[Path], None], keep: int) -> Path:
    """Write the checkpoint of `state.step`, then drop all but the newest `keep`. `export` writes the plain model folder.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    folder = run / "checkpoints" / f"step-{state.step:08d}"
    making = run / "checkpoints" / f".making-{state.step:08d}"
    if (folder / "run_state.json").is_file():
        return folder
    try:
        _sweep(making.parent)
        making.parent.mkdir(parents=True, exist_ok=True)
        export(making)
        with _alone():
            dcp.save(_tensors(model, optimizers), checkpoint_id=str(making / "state"), no_dist=True)
        record = {"format": FORMAT, "files": _sums(making / "state"), **asdict(state)}
        (making / "run_state.json").write_text(json.dumps(record) + "\n")
        for path in (*making.rglob("*"), making):
            _flush(path)
        os.replace(making, folder)
        _flush(folder.parent)
        for old in complete_checkpoints(run)[:-keep]:
            os.replace(old, old.with_name(f".old-{old.name}"))
        _sweep(making.parent)
    except (Exception, CheckpointException) as error:
        _sweep(making.parent)
        cause = _os_error(error)
        if cause is None:
            raise
        raise not_written(cause, run, state.step) from error
    return folder


def not_written(error: OSError, run: Path, step: int) -> CheckpointError:
    """What the file system refused, and what there is to go on from."""
    why, what = ("no space left on the disk", "make room") if error.errno == errno.ENOSPC else (error.strerror or str(error), "put that right")
    return CheckpointError(f"{error.filename or run}: {why} at step {step}; {last_good(run)}; {what} and go on with --resume")


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
        found = _sums(folder / "state")
        state = RunState(**record)
    except (OSError, TypeError) as error:
        raise _damaged(folder, str(error)) from error
    if found != files:
        wrong = sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name))
        raise _damaged(folder, f"state/{wrong[0]} is not as it was written")
    return state


def load_checkpoint(folder: Path, model: nn.Module, optimizers: Optimizers) -> RunState:
    """Put the weights and the optimiser of a checkpoint in place, strictly: no tensor may be missing, foreign or of another shape.

    Raises:
        CheckpointError: it is damaged, of another version, or of another model.
    """
    state = read_state(folder)
    tensors = _tensors(model, optimizers)
    try:
        names = dcp.FileSystemReader(str(folder / "state")).read_metadata().state_dict_metadata
        foreign = {name for name in names if name.startswith("model.")} - {f"model.{name}" for name in tensors["model"]}
        if foreign:
            raise ValueError(f"it holds {min(foreign)}, which this model has not")
        with _alone():
            dcp.load(tensors, checkpoint_id=str(folder / "state"), no_dist=True)
        set_state_dict(model, optimizers.all, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"], options=_OPTIONS)
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{folder} does not fit this run: {' '.join(str(_cause(error) or error).split())}") from error
    return state


def _damaged(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{folder} is damaged: {why}; delete it to go on from the checkpoint before it")


def _tensors(model: nn.Module, optimizers: Optimizers) -> dict:
    weights, optimizer = get_state_dict(model, optimizers.all, options=_OPTIONS)
    return {"model": weights, "optimizer": optimizer}


def _sums(folder: Path) -> dict[str, str]:
    """{file: sha256}: torch's reader takes a flipped bit for a weight."""
    found = {}
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
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
