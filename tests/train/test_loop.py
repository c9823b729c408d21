"""The loop, on models of three weights: what it steps, skips, logs and leaves behind."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import metrics, saved_state
from torch import Tensor, nn

from openvision3.data.problems import Problems
from openvision3.data.workers import WaitGivenUp
from openvision3.distributed import wrap_blocks
from openvision3.hub import complete_checkpoints
from openvision3.train import loop
from openvision3.train.checkpoint import CheckpointError, RunState, load_checkpoint
from openvision3.train.loop import NOT_FINITE_LIMIT, NotFinite, Training, fit
from openvision3.train.loop_config import LoopConfig
from openvision3.train.optimizer import OptimizerConfig, Optimizers, rate_at
from openvision3.train.run_folder import RunFolder

SETTINGS = OptimizerConfig(learning_rate=0.05, warmup_steps=3, weight_decay=0.0)


class Divide(nn.Module):
    """x / (1 - fault): not finite where the batch says so."""

    def forward(self, x: Tensor, fault: Tensor) -> Tensor:
        return x / (1 - fault)


class Root(nn.Module):
    """Zero where the batch says so, and there of infinite slope."""

    def forward(self, x: Tensor, fault: Tensor) -> Tensor:
        return (x.square() * (1 - fault)).sum().sqrt()


class Line(nn.Module):
    """Learns y = 2x + 1. `first` is frozen, faults are in `middle` (forward) or in `root` (backward)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(1, 1).requires_grad_(False)
        self.line = nn.Linear(1, 1)
        self.middle = Divide()
        self.hidden = nn.Linear(1, 3)
        self.root = Root()
        self.after = nn.Linear(1, 1)
        self.seen_modes: list[bool] = []

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen_modes.append(self.training)
        fit = (self.middle(self.line(batch["x"]), batch["fault"]) - batch["y"]).square().mean()
        root = self.root(self.hidden(batch["x"]), batch["steep"])
        extra = self.after(batch["x"]).square().mean()
        return fit + 0.01 * root + 0.01 * extra, {"fit": fit.detach(), "root": root.detach()}


class Points:
    """Batch `step` of 4 points; `at` maps a step (from 1) to what is wrong with it, or to a function that is called."""

    batch, pieces = 4, 1

    def __init__(self, at: dict[int, str | Callable[[], Any]] | None = None):
        self.at = at or {}
        self.problems = Problems()
        self.closed = False
        self.watch: Callable[[int], None] = lambda step: None

    def from_step(self, first_step: int) -> Iterator[dict[str, Tensor]]:
        try:
            step = first_step
            while True:
                step += 1
                self.watch(step)
                fault = self.at.get(step)
                if callable(fault):
                    fault()
                x = torch.linspace(-1, 1, 4)[:, None] + 0.1 * step % 1
                yield {"x": x, "y": 2 * x + 1, "fault": torch.tensor(float(fault == "loss")), "steep": torch.tensor(float(fault == "gradient"))}
        finally:
            self.closed = True


class Lines(Training):
    """A training of `model` on `points`, with an evaluation if there is one."""

    def __init__(self, model: Line, points: Points, scores: Callable[[int], dict[str, float]] | None):
        self.model, self.batches, self.scores = model, points, scores

    def evaluate(self, step: int, run: RunFolder) -> dict[str, float]:
        return self.scores(step) if self.scores else {}

    def export(self, folder: Path, weights: dict[str, Tensor], state: RunState) -> None:
        folder.mkdir()


def run(out: Path, points: Points | None = None, *, model: Line | None = None, steps: int = 8, evaluate=None, state: RunState | None = None, **loop):
    """-> (status, model, optimizers, the loop's state)."""
    model = model or Line()
    optimizers = Optimizers(model, SETTINGS)
    every = {"precision": "fp32", "log_every": 1, "eval_every": 0, "save_every": 0, "keep_best": 0, **loop}
    config = LoopConfig(SETTINGS, steps, batch=4, **every)
    state, folder = state or RunState(), RunFolder(out)
    try:
        status = fit(Lines(model, points or Points(), evaluate), optimizers, config, state, folder)
    finally:
        folder.close()
    return status, model, optimizers, state


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_loop_learns_and_leaves_what_is_frozen(tmp_path):
    before = weights(Line())
    status, model, *_ = run(tmp_path, steps=200)
    losses = [row["train/fit"] for row in metrics(tmp_path)]
    assert status == "finished" and losses[-1] < 0.1 * losses[0]
    assert torch.equal(model.first.weight, before["first.weight"]) and not torch.equal(model.line.weight, before["line.weight"])


def test_every_step_has_the_rate_of_the_schedule(tmp_path):
    run(tmp_path)
    assert [row["rate"] for row in metrics(tmp_path)] == [rate_at(step, SETTINGS, 8) for step in range(8)]


def test_the_gradient_that_is_stepped_with_is_clipped(tmp_path, monkeypatch):
    norms = []
    step = Optimizers.step

    def watched(self: Optimizers) -> None:
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for o in self.all for g in o.param_groups for p in g["params"])))
        step(self)

    monkeypatch.setattr(Optimizers, "step", watched)
    run(tmp_path)
    before = [row["train/grad_norm"] for row in metrics(tmp_path)]
    assert max(before) > SETTINGS.clip
    assert norms == pytest.approx([min(n, SETTINGS.clip) for n in before], rel=1e-4)


def test_a_line_is_the_mean_over_its_steps_and_the_last_step_has_one(tmp_path):
    run(tmp_path / "each", steps=7)
    run(tmp_path / "three", steps=7, log_every=3)
    each, three = metrics(tmp_path / "each"), metrics(tmp_path / "three")
    assert [row["step"] for row in three] == [3, 6, 7]
    for row, inside in zip(three, (each[:3], each[3:6], each[6:]), strict=True):
        for name in ("train/loss", "train/fit", "train/grad_norm"):
            assert row[name] == pytest.approx(sum(r[name] for r in inside) / len(inside))
        assert row["samples"] == 4 * row["step"]


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, fault):
    model = Line()
    points = Points({5: fault})
    before: dict[int, dict[str, Tensor]] = {}
    points.watch = lambda step: before.update({step: weights(model)})
    status, *_, state = run(tmp_path, points, model=model)
    assert status == "finished" and state.skipped_steps == 1
    assert equal(before[5], before[6])
    assert not equal(before[4], before[5]) and not equal(before[6], before[7])
    rows = metrics(tmp_path)
    assert [row["skipped_steps"] for row in rows] == [0] * 4 + [1] * 4
    assert "train/loss" not in rows[4] and all(math.isfinite(value) for row in rows for value in row.values())


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_the_optimizer_does_not_see_a_step_that_is_not_finite(tmp_path, fault):
    """Steps 1, 2, bad, bad: the saved moments and counts are those of step 2."""
    model = Line()
    run(tmp_path / "bad", Points({3: fault, 4: fault}), model=model, steps=4, save_every=2, keep=9)
    two, four = (saved_state(p) for p in complete_checkpoints(tmp_path / "bad"))
    assert [name for name in two if "/step" in name]
    for name in two:
        if "/lr" not in name:
            assert torch.equal(two[name], four[name]) if isinstance(two[name], Tensor) else two[name] == four[name], name


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("loss", "step 2: the loss fit is not finite, first in middle; the step is skipped (1 so far)"),
        ("gradient", "step 2: the gradient is not finite, first in hidden.bias; the step is skipped (1 so far)"),
    ],
)
def test_the_place_where_a_number_stops_being_finite_is_named(tmp_path, fault, said):
    run(tmp_path, Points({2: fault}))
    assert said in (tmp_path / "log.txt").read_text()


def test_a_weight_that_is_not_finite_names_its_module(tmp_path):
    model = Line()
    nn.init.constant_(model.hidden.weight, math.nan)
    with pytest.raises(NotFinite, match="the loss root is not finite, first in hidden, the 5th step in a row; there is no checkpoint yet"):
        run(tmp_path, model=model)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_several_in_a_row_end_the_run_with_the_last_good_checkpoint_in_place(tmp_path, fault):
    bad = range(4, 4 + NOT_FINITE_LIMIT)
    with pytest.raises(NotFinite) as stopped:
        run(tmp_path, Points(dict.fromkeys(bad, fault)), steps=100, save_every=3)
    last = complete_checkpoints(tmp_path)[-1]
    assert f"the last good checkpoint is {last};" in str(stopped.value) and "\n" not in str(stopped.value)
    assert last.name == "step-00000006"
    model = Line()
    load_checkpoint(last, model, Optimizers(model, SETTINGS))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert metrics(tmp_path)[-1]["step"] == bad[-2]


def test_a_good_step_starts_the_count_anew(tmp_path):
    faults: dict[int, Any] = dict.fromkeys([2, 3, 4, 5, 7, 8, 9, 10], "loss")
    status, *_, state = run(tmp_path, Points(faults), steps=12)
    assert (status, state.skipped_steps, state.skipped_in_a_row) == ("finished", 8, 0)


def test_the_count_in_a_row_outlives_the_process(tmp_path):
    with pytest.raises(NotFinite):
        run(tmp_path, Points({3: "loss"}), state=RunState(step=2, skipped_in_a_row=NOT_FINITE_LIMIT - 1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_end_then_saves_and_stops(tmp_path, number):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    points = Points({5: lambda: os.kill(os.getpid(), number)})
    status, model, *_ = run(tmp_path, points, steps=100)
    assert status == "stopped" and points.closed
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000005"]
    loaded = Line()
    load_checkpoint(complete_checkpoints(tmp_path)[-1], loaded, Optimizers(loaded, SETTINGS))
    assert equal(weights(model), weights(loaded))
    assert f"{signal.Signals(number).name}: saved at step 5 of 100; continue with --resume" in (tmp_path / "log.txt").read_text()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Points({3: lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]}))
    assert complete_checkpoints(tmp_path) == []


def test_a_signal_in_the_last_step_finds_the_run_finished(tmp_path):
    assert run(tmp_path, Points({8: _stop}))[0] == "finished"


def test_an_evaluation_happens_when_due_and_disturbs_nothing(tmp_path):
    _, plain, *_ = run(tmp_path / "plain", steps=7)
    called = []

    def evaluate(step: int) -> dict[str, float]:
        called.append((step, model.training, torch.is_grad_enabled()))
        return {"score": step / 2}

    model = Line()
    run(tmp_path / "evaluated", model=model, steps=7, eval_every=3, evaluate=evaluate)
    assert called == [(3, False, False), (6, False, False), (7, False, False)]
    assert equal(weights(plain), weights(model)) and all(model.seen_modes)
    assert [(row["step"], row["val/score"]) for row in metrics(tmp_path / "evaluated") if "val/score" in row] == [(3, 1.5), (6, 3.0), (7, 3.5)]


def test_a_checkpoint_holds_the_evaluation_of_its_step(tmp_path):
    """Were it saved first, a run that dies in the evaluation would go on without that row."""

    def evaluate(step: int) -> dict[str, float]:
        assert complete_checkpoints(tmp_path) == []
        return {"score": 0.0}

    run(tmp_path, steps=4, eval_every=4, save_every=4, evaluate=evaluate)
    assert complete_checkpoints(tmp_path)


def losses_at(values: dict[int, float]) -> Callable[[int], dict[str, float]]:
    return lambda step: {"loss": values[step]}


def test_the_newest_checkpoint_and_the_one_of_lowest_loss_are_kept(tmp_path):
    run(tmp_path, steps=4, eval_every=1, save_every=1, keep=1, keep_best=1, evaluate=losses_at({1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0}))
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]


def test_a_checkpoint_that_was_not_evaluated_is_never_among_the_best(tmp_path):
    """Not even where there are fewer evaluated ones than `keep_best`, nor by the loss of the step before it."""
    run(tmp_path, steps=6, eval_every=3, save_every=1, keep=1, keep_best=3, evaluate=losses_at({3: 1.0, 6: 2.0}))
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000003", "step-00000006"]
    run(tmp_path / "without", steps=4, save_every=1, keep=1, keep_best=3, evaluate=lambda step: {"psnr": 20.0})
    assert [p.name for p in complete_checkpoints(tmp_path / "without")] == ["step-00000004"]


def test_a_loss_that_is_not_finite_is_never_among_the_best(tmp_path):
    run(tmp_path, steps=3, eval_every=1, save_every=1, keep=1, keep_best=1, evaluate=losses_at({1: math.nan, 2: 1.0, 3: 2.0}))
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]


def test_a_run_whose_every_step_was_skipped_has_failed(tmp_path):
    with pytest.raises(NotFinite, match=r"all 3 steps since step 0 were skipped as not finite, so nothing was trained"):
        run(tmp_path, Points({1: "loss", 2: "loss", 3: "loss"}), steps=3)


def test_unusable_samples_are_counted_and_listed_as_they_come(tmp_path):
    points = Points()
    problem = {"key": "a", "reason": "truncated", "detail": "cut off"}
    points.at = {3: lambda: points.problems.add(problem), 5: lambda: points.problems.add({**problem, "key": "b"})}
    *_, state = run(tmp_path, points)
    assert [row["skipped_samples"] for row in metrics(tmp_path)] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert [json.loads(line)["key"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()] == ["a", "b"]
    assert state.problems == 2
    assert "skipped 2" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("place", ["record", "say", "list_skipped"])
def test_a_full_disk_under_the_log_names_the_last_good_checkpoint(tmp_path, monkeypatch, place):
    whole = getattr(RunFolder, place)

    def full(self: RunFolder, *values: Any) -> Any:
        if len(complete_checkpoints(tmp_path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(self, *values)

    monkeypatch.setattr(RunFolder, place, full)
    with pytest.raises(CheckpointError, match=r"no space left on the disk at step [4-8]; the last good checkpoint is .*step-0000000[36]; make room"):
        run(tmp_path, save_every=3)


def test_bf16_computes_in_bf16_and_keeps_weights_in_fp32(tmp_path):
    model = Line()
    seen = []
    model.line.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    run(tmp_path, model=model, precision="bf16")
    assert set(seen) == {torch.bfloat16} and {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_same_run_twice_gives_the_same_numbers(tmp_path):
    run(tmp_path / "one")
    run(tmp_path / "two")
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("linux", 1024)])
def test_memory_is_in_bytes_on_any_system(monkeypatch, platform, unit):
    monkeypatch.setattr(loop.sys, "platform", platform)
    monkeypatch.setattr(loop.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=5))
    assert loop.peak_memory("cpu") == 5 * unit


def test_a_stop_before_the_first_step_does_not_claim_to_have_saved(tmp_path):
    def stopped():
        os.kill(os.getpid(), signal.SIGTERM)
        raise WaitGivenUp("waited")

    status, *_ = run(tmp_path, Points({1: stopped}))
    said = (tmp_path / "log.txt").read_text()
    assert status == "stopped" and "stopped before the first step, nothing to save" in said and "saved at step" not in said


def test_a_module_within_a_checkpointed_block_is_named_as_in_the_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(1, 1)])

        def forward(self, batch):
            return self.blocks[0](batch["x"]).sum(), {}

    model = Model()
    model.blocks[0].weight.data.fill_(torch.nan)
    wrap_blocks(model, True, False)
    assert loop.name_bad_module(model, {"x": torch.ones(1, 1)}, "fp32") == "blocks.0"
