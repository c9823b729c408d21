"""The loop, for anything whose `forward(batch)` gives (loss, parts). It has not heard of OpenVision3.

It sets the rate, steps, and every so often logs, evaluates and saves. SIGINT and SIGTERM let the step end, save, and come
back as `stopped`. A loss or gradient that is not finite costs its step: the weights stay as they are, the step is counted
and the module that first gave the bad number is named; after a few in a row the run ends with its last checkpoint in place.
"""

from __future__ import annotations

import contextlib
import math
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from openvision3.checkpoint import RunState, last_good, not_written, save_checkpoint
from openvision3.optimizer import OptimizerConfig, Optimizers, rate_at
from openvision3.progress import RunFolder, duration

NOT_FINITE_LIMIT = 5


class NotFinite(RuntimeError):
    """Several steps in a row gave no finite loss."""


class Batches(Protocol):
    problems: list[dict[str, str]]
    batch: int

    def from_step(self, first_step: int) -> Iterator[dict[str, Tensor]]: ...


@dataclass
class Loop:
    """How long, how often, how precise."""

    steps: int
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    keep: int = 2
    device: str = "cpu"
    precision: str = "fp32"
    state: RunState = field(default_factory=RunState)


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
    export: Callable[[Path], None],
    evaluate: Callable[[int], dict[str, float]] | None = None,
) -> str:
    """Train from `loop.state` to `loop.steps`; returns `finished`, or `stopped` where a signal asked for it.

    `export(folder)` writes the plain model; `evaluate(step)` gives named numbers.

    Raises:
        NotFinite: the loss stayed non-finite. CheckpointError: the run folder could not be written.
    """
    state = loop.state
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.train()
    clock = _Clock()
    source = batches.from_step(state.step)

    with _full_disk(state, run), run.showing(loop.steps, state.step), _Signals() as signals, contextlib.closing(source):  # type: ignore[type-var]
        while state.step < loop.steps:
            rate = rate_at(state.step, settings, loop.steps)
            optimizers.set_rate(rate)
            with clock.waiting():
                batch = {name: value.to(loop.device, non_blocking=True) for name, value in next(source).items()}
            with autocast(loop.device, loop.precision):
                loss, parts = model(batch)
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None])
            values = _numbers({"loss": loss, **parts, "grad_norm": norm})
            state.step += 1
            state.samples += batches.batch
            if all(map(math.isfinite, values.values())):
                torch.nn.utils.clip_grads_with_norm_(trainable, settings.clip, norm)
                optimizers.step()
                state.skipped_in_a_row = 0
                _add(state, values)
            else:
                _skip(model, batch, values, loop, run)
            optimizers.zero_grad()

            run.advance(state.step)
            last_step = state.step == loop.steps
            if state.step % loop.log_every == 0 or last_step:
                _log(run, loop, batches, state, rate, clock)
            if evaluate is not None and (last_step or (loop.eval_every and state.step % loop.eval_every == 0)):
                model.eval()
                with clock.apart(), torch.no_grad(), autocast(loop.device, loop.precision):
                    found = evaluate(state.step)
                model.train()
                run.record(state.step, {f"val/{name}": value for name, value in found.items()})
                run.say(f"step {state.step}: " + "  ".join(f"val/{name} {value:.4g}" for name, value in found.items()))
            if last_step or signals.asked or (loop.save_every and state.step % loop.save_every == 0):
                state.problems = run.list_skipped(batches.problems)
                state.seconds += clock.lap()
                save_checkpoint(run.path, model, optimizers, state, export, loop.keep)
            if signals.asked and not last_step:
                run.say(f"{signals.asked}: saved at step {state.step} of {loop.steps}; go on with --resume")
                return "stopped"
    return "finished"


@contextlib.contextmanager
def _full_disk(state: RunState, run: RunFolder) -> Iterator[None]:
    """An error of the file system while the run writes lines, pictures or numbers."""
    try:
        yield
    except OSError as error:
        raise not_written(error, run.path, state.step) from error


def _numbers(values: dict[str, Tensor]) -> dict[str, float]:
    numbers = torch.stack([value.detach().float().reshape(()) for value in values.values()]).tolist()  # the step's one wait for the device
    return dict(zip(values, numbers, strict=True))


def _add(state: RunState, values: dict[str, float]) -> None:
    for name, number in values.items():
        state.window[name] = state.window.get(name, 0.0) + number
    state.window_steps += 1


def _skip(model: nn.Module, batch: dict[str, Tensor], values: dict[str, float], loop: Loop, run: RunFolder) -> None:
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
        where = f"the loss{' ' + ', '.join(parts) if parts else ''} is not finite, first in {name_bad_module(model, batch, loop)}"
    run.say(f"step {state.step}: {where}; the step is skipped ({state.skipped_steps} so far)")
    if state.skipped_in_a_row >= NOT_FINITE_LIMIT:
        raise NotFinite(
            f"step {state.step}: {where}, the {NOT_FINITE_LIMIT}th step in a row; {last_good(run.path)}; "
            f"start another run with --init {run.path} and a lower --optimizer.learning-rate or --precision fp32"
        )


def _log(run: RunFolder, loop: Loop, batches: Batches, state: RunState, rate: float, clock: _Clock) -> None:
    means = {name: total / max(1, state.window_steps) for name, total in state.window.items()}
    state.window, state.window_steps = {}, 0
    elapsed, waited, steps = clock.window()
    speed = batches.batch * steps / max(elapsed, 1e-9)
    left = duration((loop.steps - state.step) * elapsed / max(1, steps))
    memory = torch.cuda.max_memory_allocated() if loop.device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row: dict[str, Any] = {f"train/{name}": value for name, value in means.items()}
    row |= {"rate": rate, "samples": state.samples, "skipped_steps": state.skipped_steps, "skipped_samples": len(batches.problems)}
    row |= {"samples_per_second": speed, "wait": waited / max(elapsed, 1e-9), "memory_gb": memory / 1e9}
    run.record(state.step, row)
    run.list_skipped(batches.problems)
    losses = "  ".join(f"{name} {value:.4f}" for name, value in means.items() if name != "grad_norm")
    skipped = f"  skipped {len(batches.problems)}" if batches.problems else ""
    run.say(
        f"step {state.step}/{loop.steps}  {losses}  norm {means.get('grad_norm', math.nan):.2f}  rate {rate:.2e}  "
        f"{speed:.0f} samples/s  wait {100 * row['wait']:.0f}%  {row['memory_gb']:.1f} GB  left {left}{skipped}"
    )


def _bad_gradient(model: nn.Module) -> str:
    """The last parameter with a bad gradient: it spreads from there to all that came before."""
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return name
    return "no single parameter (the norm overflowed)"


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
        with autocast(loop.device, loop.precision):
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss itself"


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
        self.steps += 1

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


class _Signals:
    """SIGINT and SIGTERM as a wish to stop; a second Ctrl-C interrupts at once. Outside the main thread: no change."""

    def __enter__(self) -> _Signals:
        self.asked = ""
        self._old: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
