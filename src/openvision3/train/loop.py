"""The loop of any training: set the rate, step, and every so often log, evaluate and save, on one device or many.

It knows a `Training` and nothing of what that trains. SIGINT, SIGTERM or SIGUSR1 to any rank lets the step end on all ranks, saves, and returns
`stopped`. A loss or gradient that is not finite costs its step: the weights stay as they are, the step is counted, and the module that first gave
the bad number is named; after a few such steps in a row the run ends with its last checkpoint in place.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from openvision3 import distributed
from openvision3.data.batches import to_device
from openvision3.data.problems import Problems
from openvision3.data.workers import WaitGivenUp
from openvision3.progress import duration
from openvision3.train.checkpoint import RunState, Saver, last_good, not_written
from openvision3.train.loop_config import LoopConfig
from openvision3.train.optimizer import Optimizers, rate_at
from openvision3.train.run_folder import RunFolder
from openvision3.train.signals import Signals

NOT_FINITE_LIMIT = 5

NOWHERE = "the loss itself"
"""No module's output is the first that is not finite."""


class NotFinite(RuntimeError):
    """Several steps in a row gave no finite loss."""


class NoBatch(RuntimeError):
    """The data, or the processes that read them, give no more batches; what was trained is saved."""


class Batches(Protocol):
    """Where micro-batches come from, `pieces` of them a step; `batch` counts the rows of a step on all ranks."""

    problems: Problems
    batch: int
    pieces: int

    def from_step(self, first_step: int) -> Iterator[dict[str, Tensor]]: ...


class Training:
    """What is special to one kind of training: the trainable, its batches, its evaluation and its export. `train_run` does the rest."""

    model: nn.Module
    """`forward(batch) -> (loss, parts)`; parameters with `requires_grad=False` are frozen. For micro-batches it also needs `prepare(micro_batches)`.
    `resting`, if it has it, lists trained parameters that get no gradient now, on any rank"""
    batches: Batches
    facts: Mapping[str, Any] = {}
    """{name: value} of what must be the same on every rank"""
    val_measure = 1
    """how val/loss is computed: after a change, earlier values are not compared"""

    def begin(self, run: RunFolder) -> None:
        """Write what the run folder needs from this training, and say what it trains on. Called before the first step of a new or resumed run."""

    def before_step(self, state: RunState, optimizers: Optimizers) -> None:
        """Set what the next step depends on beside its batch, from `state` alone, so that a resumed run takes the same step."""

    def after_step(self, state: RunState, values: dict[str, float]) -> None:
        """Called with the numbers of each step, if they are finite; `values` is then logged. What later steps depend on belongs in `state.memory`."""

    def evaluate(self, step: int, run: RunFolder) -> dict[str, float]:
        """Numbers on held-out data, the same on all ranks; `loss` decides which checkpoint is the best. {}: no evaluation."""
        return {}

    def export(self, folder: Path, weights: dict[str, Tensor], state: RunState) -> None:
        """Create `folder` and write the plain model into it, from whole `weights`. Called on rank 0, in a thread, while training continues."""
        raise NotImplementedError

    def finish(self, state: RunState) -> None:
        """Called when the run has finished or stopped, at `state`."""


def eager() -> contextlib.AbstractContextManager:
    """Run compiled blocks uncompiled: a single call with other shapes is not worth a compilation."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def autocast(device: str, precision: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def device_of(model: nn.Module) -> str:
    """cpu or cuda."""
    return next(model.parameters()).device.type


def fit(training: Training, optimizers: Optimizers, config: LoopConfig, state: RunState, run: RunFolder, signals: Signals | None = None) -> str:
    """Train from `state` to `config.steps` in `config.precision` (bf16 or fp32); returns `finished`, or `stopped` after a signal.

    `signals` has listened since the run was set up.

    Raises:
        NotFinite: the loss stayed non-finite. CheckpointError: the run folder could not be written. NoBatch: the data gave no more batches.
        OtherRankFailed: another rank could not continue.
    """
    return _Loop(training, optimizers, config, state, run).go(signals)


class _Loop:
    def __init__(self, training: Training, optimizers: Optimizers, config: LoopConfig, state: RunState, run: RunFolder):
        self.training, self.optimizers, self.config, self.state, self.run = training, optimizers, config, state, run
        self.model, self.batches, self.device = training.model, training.batches, device_of(training.model)
        self.saver = Saver(run.path, self.model, optimizers, training.export, config.keep, config.keep_best)
        self.clock = _Clock()

    def go(self, signals: Signals | None) -> str:
        model, config, state, run = self.model, self.config, self.state, self.run
        model.train()
        first, skipped = state.step, state.skipped_steps
        source = self.batches.from_step(first)

        with self._ending(), run.showing(config.steps, state.step), Signals(signals, interrupt=True) as heard, contextlib.closing(source):  # type: ignore[type-var]
            while state.step < config.steps:
                rate = rate_at(state.step, config.optimizer, config.steps)
                self.optimizers.set_rate(rate)
                fetched, missing = self._fetch(source)
                if distributed.on_any(missing is not None):
                    return self._end_without_a_batch(missing, heard, trained=state.step > first)
                self.training.before_step(state, self.optimizers)
                pieces, values = take_step(model, self.optimizers, fetched, config, {"stop": bool(heard.received), "failed": self.saver.failed})
                stop, failed = values.pop("stop") > 0, values.pop("failed") > 0
                state.step += 1
                state.samples += self.batches.batch
                self.clock.steps += 1
                if all(map(math.isfinite, values.values())):
                    state.skipped_in_a_row = 0
                    self.training.after_step(state, values)
                    if values.keys() != state.window.keys():  # a mean is over steps that have the number
                        state.window, state.window_steps = {}, 0
                    for name, number in values.items():
                        state.window[name] = state.window.get(name, 0.0) + number
                    state.window_steps += 1
                else:
                    self._skip(pieces, values)
                self.optimizers.zero_grad()

                run.advance(state.step)
                last = state.step == config.steps
                logging = last or self._due(config.log_every)
                evaluating = last or self._due(config.eval_every)
                saving = last or stop or self._due(config.save_every)
                if logging or evaluating or saving:
                    self._share_problems()
                if logging:
                    self._log(rate)
                state.val_loss = self._evaluate() if evaluating else None
                if failed:
                    self.saver.wait()  # raises: on the rank that could not save its error, on the others that it failed
                if saving:
                    self._save()
                if stop and not last:
                    return self._stop(heard)
            self.saver.wait()
        if state.step > first and state.skipped_steps - skipped == state.step - first:
            raise NotFinite(
                f"all {state.step - first} steps since step {first} were skipped as not finite, so nothing was trained; "
                f"start another run with --init from an earlier checkpoint, and a lower --optimizer.learning-rate or --precision fp32"
            )
        return "finished"

    def _due(self, every: int) -> bool:
        return every > 0 and self.state.step % every == 0

    def _fetch(self, source: Iterator[dict[str, Tensor]]) -> tuple[list[dict[str, Tensor]], Exception | None]:
        """The micro-batches of the next step, or why there are none."""
        try:
            with self.clock.waiting():
                return [next(source) for _ in range(self.batches.pieces)], None
        except Exception as error:
            return [], error

    def _evaluate(self) -> float | None:
        """Record the evaluation of this step; returns val/loss."""
        self.model.eval()
        computing = autocast(self.device, self.config.precision), eager(), distributed.whole(self.model)
        with contextlib.ExitStack() as within:
            for context in (self.clock.apart(), torch.no_grad(), self.optimizers.averaged(), *computing):
                within.enter_context(context)
            scores = self.training.evaluate(self.state.step, self.run)
        self.model.train()
        if scores:
            self.run.record(self.state.step, {f"val/{name}": value for name, value in scores.items()})
            self.run.say(f"step {self.state.step}: " + "  ".join(f"val/{name} {value:.4g}" for name, value in scores.items()))
        return scores.get("loss")

    def _save(self) -> None:
        self.state.problems = self.run.list_skipped(self.batches.problems)
        self.state.seconds += self.clock.lap()
        with self.clock.apart():
            self.saver.save(self.state)

    def _stop(self, heard: Signals) -> str:
        """The end of a run that a signal asked for, once the save that has begun is on disk."""
        self.saver.wait()
        with distributed.together():  # no rank ends before the file is there: a launcher may then kill the others
            self.run.ask_for_requeue()
        received = next(filter(None, distributed.gather_objects(heard.received)))
        done = f"saved at step {self.state.step} of {self.config.steps}" if self.state.step else "stopped before the first step, nothing to save"
        self.run.say(f"{received}: {done}; continue with --resume")
        return "stopped"

    def _end_without_a_batch(self, missing: Exception | None, heard: Signals, *, trained: bool) -> str:
        """The end of a run where a rank has no batch: saves what was trained; returns `stopped` where a signal was the reason.

        Raises:
            NoBatch, or the rank's own error where nothing was trained yet.
        """
        if trained:
            self._share_problems()
            self._save()
        self.saver.wait()
        with distributed.together():
            if missing is not None and not isinstance(missing, WaitGivenUp):
                raise NoBatch(f"step {self.state.step + 1}: {missing}; {last_good(self.run.path)}; continue with --resume") if trained else missing
        return self._stop(heard)

    def _share_problems(self) -> None:
        """Tell every rank what each has found unusable since the last time."""
        for rank, problems in enumerate(distributed.gather_objects(self.batches.problems.take_own())):
            for problem in problems if rank != distributed.rank() else ():
                self.batches.problems.add(problem, everywhere=True)

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """No end before the last save is on disk; an error of the file system becomes one line."""
        try:
            yield
        except OSError as error:
            self.saver.settle()
            raise not_written(error, self.run.path, self.state.step) from error
        finally:
            self.saver.settle()

    def _skip(self, pieces: list[dict[str, Tensor]], values: dict[str, float]) -> None:
        """Count a step whose numbers are not finite and name where they come from.

        Raises:
            NotFinite: it is one too many in a row.
        """
        state = self.state
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if math.isfinite(values["loss"]):
            where = f"the gradient is not finite, first in {_bad_gradient(self.model)}"
        else:
            parts = [name for name in bad if name not in ("loss", "grad_norm")]
            where = f"the loss{' ' + ', '.join(parts) if parts else ''} is not finite, first in {_first_bad(self.model, pieces, self.config.precision)}"
        self.run.say(f"step {state.step}: {where}; the step is skipped ({state.skipped_steps} so far)")
        if state.skipped_in_a_row >= NOT_FINITE_LIMIT:
            self.saver.settle()
            raise NotFinite(
                f"step {state.step}: {where}, the {NOT_FINITE_LIMIT}th step in a row; {last_good(self.run.path)}; "
                f"start another run with --init {self.run.path} and a lower --optimizer.learning-rate or --precision fp32"
            )

    def _log(self, rate: float) -> None:
        """One row of metrics and one line: means since the last one."""
        state, batches, world = self.state, self.batches, distributed.world()
        means = {name: total / max(1, state.window_steps) for name, total in state.window.items()}
        state.window, state.window_steps = {}, 0
        elapsed, waited, steps = self.clock.window()
        speed = batches.batch * steps / max(elapsed, 1e-9)
        left = duration((self.config.steps - state.step) * elapsed / max(1, steps))
        row: dict[str, Any] = {f"train/{name}": value for name, value in means.items()}
        row |= {"lost_workers": lost} if (lost := getattr(batches, "lost_workers", 0)) else {}
        row |= {"rate": rate, "samples": state.samples, "skipped_steps": state.skipped_steps, "skipped_samples": len(batches.problems)}
        row |= {"samples_per_second": speed, "samples_per_second_per_device": speed / world}
        row |= {"wait": waited / max(elapsed, 1e-9), "memory_gb": peak_memory(self.device) / 1e9}
        self.run.record(state.step, row)
        self.run.list_skipped(batches.problems)
        losses = "  ".join(f"{name} {value:.4f}" for name, value in means.items() if name != "grad_norm")
        skipped = f"  skipped {len(batches.problems)}" if batches.problems else ""
        self.run.say(
            f"step {state.step}/{self.config.steps}  {losses}  norm {means.get('grad_norm', math.nan):.2f}  rate {rate:.2e}  "
            f"{speed:.0f} samples/s  wait {100 * row['wait']:.0f}%  {row['memory_gb']:.1f} GB  left {left}{skipped}"
        )


class _Clock:
    """Time of the loop: in all, since the last log line, and how much of it was spent waiting for data."""

    def __init__(self):
        self.started = self.marked = time.perf_counter()
        self.waited = 0.0
        self.steps = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Time that is not training, such as an evaluation."""
        start = time.perf_counter()
        yield
        self.marked += time.perf_counter() - start

    def window(self) -> tuple[float, float, int]:
        """(seconds, seconds of waiting, steps) since the last call."""
        now = time.perf_counter()
        window = now - self.marked, self.waited, self.steps
        self.marked, self.waited, self.steps = now, 0.0, 0
        return window

    def lap(self) -> float:
        """Seconds in all since the last call."""
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        return seconds


def take_step(
    model: nn.Module, optimizers: Optimizers, fetched: list[dict[str, Tensor]], config: LoopConfig, flags: Mapping[str, bool] | None = None
) -> tuple[list[dict[str, Tensor]], dict[str, float]]:
    """One optimiser step from this rank's micro-batches -> (the micro-batches on the device, the numbers of the step, the same on all ranks).

    `fetched` is emptied. `flags` are averaged with the numbers: the share of ranks that have set them. If a number is not finite, weights and optimiser
    stay as they are. The gradients stay until `zero_grad`, so that a bad one can be named.
    """
    device = device_of(model)
    pieces, losses = backward(model, _pieces(fetched, device), len(fetched), device, config.precision)
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    norm = distributed.full(torch.nn.utils.get_total_norm(gradients))
    raised = {name: norm.new_full((), flag) for name, flag in (flags or {}).items()}  # filled on the device: a copy might make the host wait
    values = _numbers(losses | {"grad_norm": norm} | raised)
    if all(map(math.isfinite, values.values())):
        if values["grad_norm"] > config.optimizer.clip:
            torch._foreach_mul_(gradients, config.optimizer.clip / values["grad_norm"])
        optimizers.step()
    return pieces, values


def first_steps(training: Training, model: nn.Module, optimizers: Optimizers, config: LoopConfig) -> Iterator[dict[str, float]]:
    """Take the steps of a run from its first on, without logging or saving -> the numbers of each; `model` is the training's own or a copy."""
    with contextlib.closing(training.batches.from_step(0)) as source:  # type: ignore[type-var]
        for step in itertools.count():
            optimizers.set_rate(rate_at(step, config.optimizer, config.steps))
            _, values = take_step(model, optimizers, [next(source) for _ in range(training.batches.pieces)], config)
            optimizers.zero_grad()
            yield values


def backward(
    model: nn.Module, pieces: Iterable[dict[str, Tensor]], count: int, device: str, precision: str
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Compute a step's gradient on every rank from `count` micro-batches -> (the micro-batches, this rank's share of the loss and its parts).

    For several micro-batches the model needs `prepare(micro_batches)`, which tells each what it must know of the others.
    """
    if count > 1:
        with autocast(device, precision):
            pieces = model.prepare(pieces)  # type: ignore[operator]
    ready = list(pieces)
    totals: dict[str, Tensor] = {}
    for number, piece in enumerate(ready):
        distributed.synchronise_last(model, number == len(ready) - 1)
        with autocast(device, precision):
            loss, parts = model(piece)
        loss.backward()
        for name, value in {"loss": loss.detach(), **parts}.items():
            totals[name] = totals[name] + value if name in totals else value
    distributed.average_gradients(model)
    return ready, totals


def _pieces(fetched: list[dict[str, Tensor]], device: str) -> Iterator[dict[str, Tensor]]:
    """Micro-batches on the device, one at a time."""
    while fetched:
        yield to_device(fetched.pop(0), device)


def _numbers(values: dict[str, Tensor]) -> dict[str, float]:
    """The means over ranks, the same on all, so that all decide alike."""
    device = values["loss"].device
    stacked = torch.stack([value.detach().float().reshape(()).to(device, non_blocking=True) for value in values.values()])
    numbers = (distributed.total(stacked) / distributed.world()).tolist()  # the step's one wait for the device
    return dict(zip(values, numbers, strict=True))


def peak_memory(device: str) -> int:
    """The most bytes held at a time since the process began: by tensors on its GPU, or by the whole process on a CPU."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# -- where a number stops being finite -----------------------------------------------------------------------------


def _bad_gradient(model: nn.Module) -> str:
    """The last parameter with a bad gradient: it spreads from there to all that came before. Every rank takes part, for each has its piece."""
    named = [(name, p.grad) for name, p in reversed(list(model.named_parameters())) if p.grad is not None]
    bad = distributed.total(torch.stack([(~torch.isfinite(distributed.local(gradient)).all()).float() for _, gradient in named]))
    first = next((name for (name, _), some in zip(named, bad.tolist(), strict=True) if some), "no single parameter (the norm overflowed)")
    return first.replace("_checkpoint_wrapped_module.", "")


def _first_bad(model: nn.Module, pieces: list[dict[str, Tensor]], precision: str) -> str:
    """The first bad module over all ranks and micro-batches; every rank takes part."""
    names = [name_bad_module(model, piece, precision) for piece in pieces]
    return next((name for of_rank in distributed.gather_objects(names) for name in of_rank if name != NOWHERE), NOWHERE)


@torch.no_grad()
def name_bad_module(model: nn.Module, batch: dict[str, Tensor], precision: str) -> str:
    """Run the batch once more and name the first module whose output is not finite though its input is."""
    bad: list[str] = []

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not bad and not _finite(output):
                bad.append(name if _finite(inputs) else f"the input of {name}")

        return hook

    names = ((name.replace("._checkpoint_wrapped_module", ""), module) for name, module in model.named_modules() if name)
    handles = [module.register_forward_hook(watch(name)) for name, module in names]
    try:
        with autocast(device_of(model), precision), eager():
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return bad[0] if bad else NOWHERE


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, list | tuple):
        return all(_finite(v) for v in value)
    return True
