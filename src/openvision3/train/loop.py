"""The loop, for anything whose `forward(batch)` gives (loss, parts). It has not heard of OpenVision3.

It sets the rate, steps, and every so often logs, evaluates and saves, on one device or many. SIGINT, SIGTERM and SIGUSR1 to any
rank let the step end on all, save, and come back as `stopped`. A loss or gradient that is not finite costs its step: the weights
stay as they are, the step is counted and the module that first gave the bad number is named; after a few in a row the run ends
with its last checkpoint in place.
"""

from __future__ import annotations

import contextlib
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from openvision3 import distributed
from openvision3.data.batches import to_device
from openvision3.data.problems import Problems
from openvision3.data.workers import WaitGivenUp
from openvision3.progress import duration
from openvision3.train.checkpoint import Export, RunState, Saver, last_good, not_written
from openvision3.train.optimizer import OptimizerConfig, Optimizers, rate_at
from openvision3.train.run_folder import RunFolder

NOT_FINITE_LIMIT = 5

NOWHERE = "the loss itself"
"""No module's output is the first that is not finite."""


class NotFinite(RuntimeError):
    """Several steps in a row gave no finite loss."""


class NoBatch(RuntimeError):
    """The data, or the processes that read them, give no batch any more; what was trained is saved."""


class Batches(Protocol):
    """Where micro-batches come from, `pieces` of them a step; `batch` counts the rows of a step on all ranks."""

    problems: Problems
    batch: int
    pieces: int

    def from_step(self, first_step: int) -> Iterator[dict[str, Tensor]]: ...


@dataclass
class Loop:
    """How long, how often, how precise."""

    steps: int
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    keep: int = 2
    keep_best: int = 0
    device: str = "cpu"
    precision: str = "fp32"
    state: RunState = field(default_factory=RunState)


def eager() -> contextlib.AbstractContextManager:
    """Compiled blocks run as they are written here: what is called once is not worth compiling again for."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def autocast(device: str, precision: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def fit(
    model: nn.Module,
    batches: Batches,
    optimizers: Optimizers,
    settings: OptimizerConfig,
    loop: Loop,
    run: RunFolder,
    *,
    export: Export,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    signals: Signals | None = None,
) -> str:
    """Train from `loop.state` to `loop.steps`; returns `finished`, or `stopped` where a signal asked for it.

    `export(folder, weights)` writes the plain model; `evaluate(step)` gives named numbers, the same on all ranks; `signals` has
    watched since the run was set up.

    Raises:
        NotFinite: the loss stayed non-finite. CheckpointError: the run folder could not be written. NoBatch: the data gave out.
        OtherRankFailed: another rank could not go on.
    """
    state = loop.state
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.train()
    clock = _Clock()
    first, skipped = state.step, state.skipped_steps
    source = batches.from_step(first)
    saver = Saver(run.path, model, optimizers, export, loop.keep, loop.keep_best)

    with _ending(state, run, saver), run.showing(loop.steps, state.step), Signals(signals, interrupt=True) as heard, contextlib.closing(source):  # type: ignore[type-var]
        while state.step < loop.steps:
            rate = rate_at(state.step, settings, loop.steps)
            optimizers.set_rate(rate)
            fetched, missing = _fetch(source, batches.pieces, clock)
            if distributed.on_any(missing is not None):
                return _without_a_batch(missing, batches, loop, run, saver, heard, clock, trained=state.step > first)
            pieces, losses = backward(model, _pieces(fetched, loop.device), batches.pieces, loop.device, loop.precision)
            norm = distributed.full(torch.nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None]))
            flags = {"stop": norm.new_full((), bool(heard.asked)), "failed": norm.new_full((), saver.failed)}  # filled there: a copy could be waited for
            values = _numbers(losses | {"grad_norm": norm} | flags)
            stop, failed = values.pop("stop") > 0, values.pop("failed") > 0
            state.step += 1
            state.samples += batches.batch
            clock.steps += 1
            if all(map(math.isfinite, values.values())):
                if values["grad_norm"] > settings.clip:
                    torch._foreach_mul_([p.grad for p in trainable if p.grad is not None], settings.clip / values["grad_norm"])
                optimizers.step()
                state.skipped_in_a_row = 0
                _add(state, values)
            else:
                _skip(model, pieces, values, loop, run, saver)
            optimizers.zero_grad()

            run.advance(state.step)
            last_step = state.step == loop.steps
            evaluating = evaluate is not None and (last_step or (loop.eval_every > 0 and state.step % loop.eval_every == 0))
            saving = last_step or stop or (loop.save_every > 0 and state.step % loop.save_every == 0)
            logging = last_step or state.step % loop.log_every == 0
            if logging or evaluating or saving:
                _share_problems(batches)
            if logging:
                _log(run, loop, batches, state, rate, clock)
            state.val_loss = None
            if evaluating and evaluate is not None:
                model.eval()
                with clock.apart(), torch.no_grad(), autocast(loop.device, loop.precision), eager(), distributed.whole(model):
                    found = evaluate(state.step)
                model.train()
                state.val_loss = found.get("loss")
                run.record(state.step, {f"val/{name}": value for name, value in found.items()})
                run.say(f"step {state.step}: " + "  ".join(f"val/{name} {value:.4g}" for name, value in found.items()))
            if failed:
                saver.wait()  # raises: on the rank that could not save its error, on the others that it failed
            if saving:
                state.problems = run.list_skipped(batches.problems)
                state.seconds += clock.lap()
                with clock.apart():
                    saver.save(state)
            if stop and not last_step:
                return _stopped(loop, run, saver, heard)
        saver.wait()
    if state.step > first and state.skipped_steps - skipped == state.step - first:
        raise NotFinite(
            f"all {state.step - first} steps since step {first} were skipped as not finite, so nothing was trained; "
            f"start another run with --init from a checkpoint before, and a lower --optimizer.learning-rate or --precision fp32"
        )
    return "finished"


def backward(
    model: nn.Module, pieces: Iterable[dict[str, Tensor]], count: int, device: str, precision: str
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """One step's gradient on every rank from `count` micro-batches -> (the micro-batches, this rank's share of the loss and its parts).

    A model that is to take several has to have `prepare(micro_batches)`, which lets each know what it must of the others.
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


def _stopped(loop: Loop, run: RunFolder, saver: Saver, heard: Signals) -> str:
    """The end of a run that a signal asked for, once the save that was begun is through."""
    saver.wait()
    with distributed.together():  # no rank ends before the mark is there: a launcher may kill the others then
        run.ask_for_requeue()
    asked = next(filter(None, distributed.gather_objects(heard.asked)))
    run.say(f"{asked}: saved at step {loop.state.step} of {loop.steps}; go on with --resume")
    return "stopped"


def _fetch(source: Iterator[dict[str, Tensor]], count: int, clock: _Clock) -> tuple[list[dict[str, Tensor]], Exception | None]:
    """The micro-batches of the next step, or why they cannot be had."""
    try:
        with clock.waiting():
            return [next(source) for _ in range(count)], None
    except Exception as error:
        return [], error


def _without_a_batch(
    missing: Exception | None, batches: Batches, loop: Loop, run: RunFolder, saver: Saver, heard: Signals, clock: _Clock, *, trained: bool
) -> str:
    """The end of a run where a rank has no batch: what was trained is saved first; returns `stopped` where a signal was the reason.

    Raises:
        NoBatch, or what the rank met where nothing was trained yet.
    """
    state = loop.state
    if trained:
        _share_problems(batches)
        state.problems = run.list_skipped(batches.problems)
        state.seconds += clock.lap()
        saver.save(state)
    saver.wait()
    with distributed.together():
        if missing is not None and not isinstance(missing, WaitGivenUp):
            raise NoBatch(f"step {state.step + 1}: {missing}; {last_good(run.path)}; go on with --resume") if trained else missing
    return _stopped(loop, run, saver, heard)


def _pieces(fetched: list[dict[str, Tensor]], device: str) -> Iterator[dict[str, Tensor]]:
    """Micro-batches on the device, one at a time."""
    while fetched:
        yield to_device(fetched.pop(0), device)


def _share_problems(batches: Batches) -> None:
    """What each rank has found unusable since the last time is known to all."""
    for rank, found in enumerate(distributed.gather_objects(batches.problems.take_own())):
        for problem in found if rank != distributed.rank() else ():
            batches.problems.add(problem, everywhere=True)


@contextlib.contextmanager
def _ending(state: RunState, run: RunFolder, saver: Saver) -> Iterator[None]:
    """No end before the last save is through; and an error of the file system, while lines or pictures are written, in one line."""
    try:
        yield
    except OSError as error:
        saver.settle()
        raise not_written(error, run.path, state.step) from error
    finally:
        saver.settle()


def _numbers(values: dict[str, Tensor]) -> dict[str, float]:
    """The means over ranks, the same on all, so that all decide alike."""
    device = values["loss"].device
    stacked = torch.stack([value.detach().float().reshape(()).to(device, non_blocking=True) for value in values.values()])
    numbers = (distributed.total(stacked) / distributed.world()).tolist()  # the step's one wait for the device
    return dict(zip(values, numbers, strict=True))


def _add(state: RunState, values: dict[str, float]) -> None:
    for name, number in values.items():
        state.window[name] = state.window.get(name, 0.0) + number
    state.window_steps += 1


def _skip(model: nn.Module, pieces: list[dict[str, Tensor]], values: dict[str, float], loop: Loop, run: RunFolder, saver: Saver) -> None:
    """Count a step whose numbers are not finite and name where they come from.

    Raises:
        NotFinite: it is one too many in a row.
    """
    state = loop.state
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad == ["grad_norm"]:
        where = f"the gradient is not finite, first in {_bad_gradient(model)}"
    else:
        parts = [name for name in bad if name not in ("loss", "grad_norm")]
        where = f"the loss{' ' + ', '.join(parts) if parts else ''} is not finite, first in {_first_bad(model, pieces, loop)}"
    run.say(f"step {state.step}: {where}; the step is skipped ({state.skipped_steps} so far)")
    if state.skipped_in_a_row >= NOT_FINITE_LIMIT:
        saver.settle()
        raise NotFinite(
            f"step {state.step}: {where}, the {NOT_FINITE_LIMIT}th step in a row; {last_good(run.path)}; "
            f"start another run with --init {run.path} and a lower --optimizer.learning-rate or --precision fp32"
        )


def peak_memory(device: str) -> int:
    """Bytes that were held at most since the process began: by tensors on its GPU, or by the whole process on a CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _log(run: RunFolder, loop: Loop, batches: Batches, state: RunState, rate: float, clock: _Clock) -> None:
    means = {name: total / max(1, state.window_steps) for name, total in state.window.items()}
    state.window, state.window_steps = {}, 0
    elapsed, waited, steps = clock.window()
    speed = batches.batch * steps / max(elapsed, 1e-9)
    left = duration((loop.steps - state.step) * elapsed / max(1, steps))
    memory = peak_memory(loop.device)
    row: dict[str, Any] = {f"train/{name}": value for name, value in means.items()}
    row |= {"lost_workers": lost} if (lost := getattr(batches, "lost_workers", 0)) else {}
    row |= {"rate": rate, "samples": state.samples, "skipped_steps": state.skipped_steps, "skipped_samples": len(batches.problems)}
    row |= {
        "samples_per_second": speed,
        "samples_per_second_per_device": speed / distributed.world(),
        "wait": waited / max(elapsed, 1e-9),
        "memory_gb": memory / 1e9,
    }
    run.record(state.step, row)
    run.list_skipped(batches.problems)
    losses = "  ".join(f"{name} {value:.4f}" for name, value in means.items() if name != "grad_norm")
    skipped = f"  skipped {len(batches.problems)}" if batches.problems else ""
    run.say(
        f"step {state.step}/{loop.steps}  {losses}  norm {means.get('grad_norm', math.nan):.2f}  rate {rate:.2e}  "
        f"{speed:.0f} samples/s  wait {100 * row['wait']:.0f}%  {row['memory_gb']:.1f} GB  left {left}{skipped}"
    )


def _bad_gradient(model: nn.Module) -> str:
    """The last parameter with a bad gradient: it spreads from there to all that came before. Every rank takes part, for each has a shard."""
    named = [(name, p.grad) for name, p in reversed(list(model.named_parameters())) if p.grad is not None]
    bad = distributed.total(torch.stack([(~torch.isfinite(distributed.local(gradient)).all()).float() for _, gradient in named]))
    found = next((name for (name, _), some in zip(named, bad.tolist(), strict=True) if some), "no single parameter (the norm overflowed)")
    return found.replace("_checkpoint_wrapped_module.", "")


def _first_bad(model: nn.Module, pieces: list[dict[str, Tensor]], loop: Loop) -> str:
    """Over all ranks and micro-batches; every rank takes part."""
    named = [name_bad_module(model, piece, loop) for piece in pieces]
    return next((name for found in distributed.gather_objects(named) for name in found if name != NOWHERE), NOWHERE)


@torch.no_grad()
def name_bad_module(model: nn.Module, batch: dict[str, Tensor], loop: Loop) -> str:
    """Run the batch once more and name the first module whose output is not finite though its input is."""
    found: list[str] = []

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not _finite(output):
                found.append(name if _finite(inputs) else f"the input of {name}")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with autocast(loop.device, loop.precision), eager():
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else NOWHERE


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, list | tuple):
        return all(_finite(v) for v in value)
    return True


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
        now = time.perf_counter()
        found = now - self.marked, self.waited, self.steps
        self.marked, self.waited, self.steps = now, 0.0, 0
        return found

    def lap(self) -> float:
        now = time.perf_counter()
        found, self.started = now - self.started, now
        return found


class Signals:
    """SIGTERM and SIGUSR1 (sent by SLURM before the end) as a wish to stop, and in the loop SIGINT too; a second Ctrl-C interrupts at once.

    Whoever sets a run up holds one, so that a signal in the meantime stops the loop at its first step; the loop's own goes on
    from it (`after`) and hands back what it was asked. Outside the main thread: no change.
    """

    def __init__(self, after: Signals | None = None, *, interrupt: bool = False):
        self.after, self.interrupt = after, interrupt
        self.asked = ""

    def __enter__(self) -> Signals:
        self.asked = self.after.asked if self.after else self.asked
        self._old: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, *([signal.SIGINT] if self.interrupt else [])):
                self._old[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        if self.after:  # at once: a wait for a batch looks there
            self.after.asked = self.asked

    def __exit__(self, *_: object) -> None:
        if self.after:
            self.after.asked = self.asked
        for number, handler in self._old.items():
            signal.signal(number, handler)
