"""One run of any training: its folder and lock, resuming, precision, agreement of ranks, sharding, signals, trackers, evaluation and export.

`train_run(config, build, out)` does all that is true of any training. `build(config, start)` opens the inputs and returns a `Training`, which holds
what is special to one kind. Pre-training (`pretrain.Pretraining`) is such a build, and so is the trial of `openvision3 doctor --train`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from openvision3 import distributed
from openvision3.data.problems import Problems, reasons_in_words
from openvision3.device import choose_compile, choose_device, choose_precision, dtype_of
from openvision3.distributed import Parallel, Ranks
from openvision3.files import write_whole
from openvision3.hub import latest_checkpoint
from openvision3.progress import console, duration, environment
from openvision3.settings import load_config, to_dict
from openvision3.train import identities
from openvision3.train.checkpoint import RunState, load_checkpoint, read_state
from openvision3.train.loop import Training, first_steps, fit
from openvision3.train.loop_config import LoopConfig, changed_settings
from openvision3.train.optimizer import Optimizers
from openvision3.train.run_folder import RunFolder, read_skipped
from openvision3.train.signals import Signals
from openvision3.train.trackers import check_trackers

TIMED = 3
"""steps that are timed to find out how many fill `config.minutes`"""

C = TypeVar("C", bound=LoopConfig)
T = TypeVar("T", bound=Training)


@dataclass
class Start:
    """What a build gets beside its config."""

    out: Path
    ranks: Ranks = field(default_factory=Ranks)
    device: str = "cpu"
    """cpu or cuda, which then means the current GPU"""
    precision: str = "fp32"
    why: str = ""
    """why this precision was chosen"""
    stopping: Callable[[], object] = bool
    """true once a signal has asked the run to stop: a wait for data then ends"""
    before: LoopConfig | None = None
    """the config that a resumed run was started with"""
    checkpoint: Path | None = None
    """what a resumed run continues from. The run loads trained weights and optimiser after the build; frozen weights are for the build to load"""
    identities: dict[str, Any] = field(default_factory=dict)
    """what `known` of `check_inputs` returned, to be written to identities.json"""
    moved: list[str] = field(default_factory=list)
    """a line for each input that has another path now"""

    def check_inputs(self, config: LoopConfig, known: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Compare the inputs of a resumed run with those it was started with; returns what was recorded then ({} for a new run).

        A build calls this once its inputs are open. `known` returns {field of config.PLACES: digest of what lies there, "" for an input that is not
        read}, and any other JSON values that the build needs when it is resumed. Only rank 0 calls `known`.

        Raises:
            ValueError: an input holds something else than when the run was started.
        """
        recorded = identities.recorded_identities(self.out) if self.before else {}
        if self.ranks.rank == 0:
            self.identities = known()
            if self.before:
                inputs = identities.compare_inputs(self.before, config, recorded, self.identities)
                identities.refuse_others(self.out, inputs)
                self.moved = [str(each) for each in inputs if each.moved]
        return recorded


Build = Callable[[C, Start], T]
"""Opens the inputs and returns the `Training`; all ranks call it together. If it communicates between ranks, it wraps what may fail before that in
`distributed.together()`."""


@dataclass
class Outcome(Generic[T]):
    """A run that has ended: `status` is finished or stopped."""

    status: str
    folder: Path
    training: T
    steps: int
    precision: str


@dataclass
class Setup(Generic[T]):
    """A training on its devices, ready for its first step."""

    training: T
    optimizers: Optimizers
    parallel: Parallel
    trained: int
    """number of trained parameters"""
    compiled: bool
    not_compiled: str
    """why not, if compiling was wanted"""


def train_run(config: C, build: Build[C, T], out: Path, signals: Signals | None = None) -> Outcome[T]:
    """Train what `build` returns as `config` says, into the run folder `out`; with `config.resume`, continue from its last checkpoint.

    Started by torchrun or srun, each process takes its share of every batch. SIGTERM and SIGUSR1 end the run at a step, whenever they come; `signals` has
    watched since before. `config` stays as it is.

    Raises:
        ValueError, FileNotFoundError: bad input, before anything is written. And what `fit` raises.
    """
    device = choose_device(config.device)
    with distributed.started(device) as ranks, Signals(signals) as heard:
        start = Start(out, ranks, torch.device(device).type, stopping=lambda: heard.received)  # of several GPUs the current one
        config, state = _open(config, start)
        setup = set_up(config, build, start)
        training, was_measured = setup.training, state.val_measure
        state.val_measure = training.val_measure
        with distributed.together():
            if start.checkpoint:
                training.batches.problems = Problems(read_skipped(out, state.problems))
                load_checkpoint(start.checkpoint, training.model, setup.optimizers, state)
        with distributed.together():
            run = RunFolder(out, resume=config.resume, writes=ranks.rank == 0)
        try:
            with distributed.together():
                if run.writes and config.resume and latest_checkpoint(out) != start.checkpoint:
                    raise ValueError(f"another process has written to {out} since this one read it; start again with --resume")
                if run.writes and not (config.resume and (out / identities.FILE).is_file()):
                    write_whole(out / identities.FILE, json.dumps(start.identities, indent=2) + "\n")
                run.describe(to_dict(config), environment())
            if config.resume:
                run.forget_after(state.step, state.problems)
            run.track(config.track, to_dict(config))
            _introduce(run, config, start, setup)
            if start.checkpoint and was_measured != training.val_measure and config.keep_best:
                run.say("val/loss was computed otherwise until now: the best checkpoint is chosen among new ones only (--keep-best)")
            training.begin(run)
            status = fit(training, setup.optimizers, config, state, run, heard)
            problems = f"; skipped samples: {reasons_in_words(training.batches.problems)}" if training.batches.problems else ""
            skipped = f"; {state.skipped_steps} steps skipped as not finite" if state.skipped_steps else ""
            run.say(f"{status} at step {state.step} after {duration(state.seconds)}: {latest_checkpoint(out) or out}{problems}{skipped}")
            setup.optimizers.adopt_average()
            training.finish(state)
            return Outcome(status, out, training, state.step, start.precision)
        finally:
            run.close()


def _open(config: C, start: Start) -> tuple[C, RunState]:
    """Read the run folder, without writing -> (the settled config, a copy; the progress of the run)."""
    out, first = start.out, start.ranks.rank == 0
    with distributed.together():
        if first or not config.resume:
            RunFolder.check(out, config.resume)
    if config.resume:
        with distributed.together():
            _refuse_blind_ranks(out, out / "config.json")
    with distributed.together():
        check_trackers(config.track)
        start.before = before = load_config(type(config), out / "config.json") if config.resume else None
        config = _resumed(before, config, out) if before else copy.deepcopy(config)
        checkpoint = latest_checkpoint(out) if config.resume and first else None
        state = read_state(checkpoint) if checkpoint else None  # its files are many GB: one rank reads them all
    settle_precision(config, start)
    if name := distributed.from_first(checkpoint and checkpoint.name):
        start.checkpoint = out / "checkpoints" / name
        with distributed.together():
            _refuse_blind_ranks(out, start.checkpoint / "run_state.json")
    return config, distributed.from_first(state) or RunState()


def settle_precision(config: LoopConfig, start: Start) -> None:
    """Rank 0 chooses the precision for all ranks, which might measure differently."""
    with distributed.together():
        chosen = choose_precision(config.precision, start.device) if start.ranks.rank == 0 else None
    start.precision, start.why = distributed.from_first(chosen)  # type: ignore[misc]
    config.precision = start.precision  # type: ignore[assignment]


def set_up(config: C, build: Build[C, T], start: Start) -> Setup[T]:
    """Build the training and distribute its model over the devices of all ranks.

    Raises:
        ValueError, FileNotFoundError: bad input, or ranks that have not opened the same.
    """
    with distributed.together():
        training = build(config, start)
        trained = sum(p.numel() for p in training.model.parameters() if p.requires_grad)
        parallel = distributed.choose_parallel(config.parallel, trained, start.ranks)
        if parallel != "replicate" and config.minutes and not config.resume:
            raise ValueError(f"minutes {config.minutes:g} are measured on a copy of the model, which a sharded one does not allow; set --steps")
        compiled, not_compiled = choose_compile(config.compile, start.device)
        training.model.to(start.device)
    across = f"{parallel}, {start.ranks.local_world} processes a machine" if parallel == "hsdp" else parallel
    with distributed.together():
        _agree({"checkpoint": start.checkpoint.name if start.checkpoint else "none", **training.facts, "compiled": compiled, "parallel": across})
    if config.minutes and not config.resume:
        if start.ranks.rank == 0:
            console().print(f"measuring how many steps fill {config.minutes:g} minutes ...")
        config.steps, rate = distributed.from_first(measure_steps(training, config, compiled))
        start.why += f"; {rate:.2f} steps/s: {config.steps} steps fill {config.minutes:g} minutes"
        config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, max(1, config.steps // 10))
    distributed.wrap_blocks(training.model, config.checkpointing, compiled)
    distributed.spread(training.model, parallel, start.ranks, start.device, start.precision)
    optimizers = Optimizers(training.model, config.optimizer, dtype_of(start.precision), config.ema)
    return Setup(training, optimizers, parallel, trained, compiled, not_compiled)


def measure_steps(training: Training, config: LoopConfig, compiled: bool) -> tuple[int, float]:
    """Time a few real steps on a copy of the model, set up as the run will be -> (steps that fill `config.minutes`, steps a second)."""
    trial = copy.deepcopy(training.model).train()
    distributed.wrap_blocks(trial, config.checkpointing, compiled)
    optimizers = Optimizers(trial, config.optimizer, dtype_of(config.precision), config.ema)
    with contextlib.closing(first_steps(training, trial, optimizers, config)) as steps:  # type: ignore[type-var]
        for _ in range(3 if compiled else 1):  # warm up
            next(steps)
        start = time.perf_counter()
        for _ in range(TIMED):
            next(steps)
        rate = TIMED / (time.perf_counter() - start)
    return max(1, round(config.minutes * 60 * rate)), rate


def _introduce(run: RunFolder, config: LoopConfig, start: Start, setup: Setup) -> None:
    """Print how the run is set up; all ranks take part."""
    ranks, batches = start.ranks, setup.training.batches
    run.say(f"device {start.device}, precision {start.precision} ({start.why}); {setup.trained / 1e6:.1f} M parameters to train")
    if blind := _blind_ranks(run.path / "config.json"):
        run.say(
            f"{blind} not see {run.path}, which is on a disk of process 0's machine: training and saving work, but --resume and later commands need it "
            "where every process sees it, on a shared disk or copied to each machine"
        )
    if setup.not_compiled:
        run.say(setup.not_compiled)
    if ranks.world > 1:
        run.say(f"{ranks.world} processes, {setup.parallel}: {config.batch // ranks.world} of {config.batch} rows each")
    if batches.pieces > 1:
        run.say(f"each step is {batches.pieces} micro-batches of {config.micro_batch} in each process, with the numbers of a batch of {config.batch}")
    if run.list_skipped(batches.problems):
        run.say(f"{len(batches.problems)} problems in the data, listed in {run.path}/skipped.jsonl: {reasons_in_words(batches.problems)}")
    if (warmup := config.optimizer.warmup_steps) >= config.steps:
        run.say(
            f"the warm-up of {warmup} steps is not over after {config.steps} steps: the rate reaches {config.steps / warmup:.0%} of its value and never falls; "
            "see --optimizer.warmup-steps"
        )
    if config.resume:
        run.say(f"continuing from {start.checkpoint.name}" if start.checkpoint else "no checkpoint yet: starting over")
        for line in start.moved:
            run.say(line)


def _blind_ranks(path: Path) -> str:
    """'process 1 does' or 'processes 1, 2 do': the ranks that do not see a file; '' if all see it. All ranks take part."""
    blind = [str(rank) for rank, sees in enumerate(distributed.gather_objects(path.is_file())) if not sees]
    return f"process{'es' if len(blind) > 1 else ''} {', '.join(blind)} do{'es' if len(blind) == 1 else ''}" if blind else ""


def _refuse_blind_ranks(out: Path, path: Path) -> None:
    """Raises ValueError if a rank does not see a file that a run continues from, because all ranks read it. All ranks take part."""
    if blind := _blind_ranks(path):
        raise ValueError(
            f"{blind} not see {path}, and every process reads what a run continues from: "
            f"put {out} on a disk that all machines share, or copy it to each, then --resume again"
        )


def _agree(facts: dict[str, Any]) -> None:
    """Raises ValueError if two ranks have not opened the same: a machine without one of the shards would silently train in another order."""
    of_ranks = distributed.gather_objects(facts)
    for name, value in of_ranks[0].items():
        other = next((rank for rank, theirs in enumerate(of_ranks) if theirs[name] != value), None)
        if other is not None:
            raise ValueError(f"the processes have not opened the same {name}: {value} in process 0, {of_ranks[other][name]} in process {other}")


def _resumed(before: C, config: C, out: Path) -> C:
    """The config that the run was started with. Only FREE fields may change, and PLACES if the run has recorded what lay there.

    Raises:
        ValueError: another field has another value now.
    """
    places = config.PLACES if (out / identities.FILE).is_file() else ()
    measured = ("steps", "optimizer.warmup_steps") if before.minutes else ()  # the run itself set these
    for name, (value, asked) in changed_settings(before, config, (*places, *measured)).items():
        why = ": an older version started it, and did not record what lay there (name the old path, or link it)" if name in config.PLACES else ""
        raise ValueError(f"{name} was {value!r} when {out} was started and cannot become {asked!r}{why}; start a new run with --init {out}")
    resumed = copy.deepcopy(before)
    for name in (*config.FREE, *places):
        *parents, last = name.split(".")
        setattr(functools.reduce(getattr, parents, resumed), last, functools.reduce(getattr, name.split("."), config))
    resumed.resume = True
    return resumed
