"""The weight of reconstruction follows the gradients of both branches."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import Crash, assert_same_run, crash_at, metrics, small

from openvision3.train import balance
from openvision3.train.pretrain import pretrain


def balanced(root: Path, out: str, ratio: float = 0.3, **changes):
    config = small(root, out, log_every=1, **changes)
    config.model.loss.gradient_ratio = ratio
    return config


def test_the_weight_brings_the_mean_norms_to_the_ratio():
    memory: dict[str, float] = {}
    assert balance.omega_rec(memory, 3.0, 0.5) == 0.5
    rec, und, weight = [4.0, 2.0, 3.0], [1.0, 5.0, 3.0], 0.5
    for one, other in zip(rec, und, strict=True):
        values = {"reconstruction_squares": 2 * (weight * one) ** 2, "understanding_squares": 2 * other**2}  # of two ranks
        balance.measure(memory, values, weight, ranks=2)
        assert values == pytest.approx({"reconstruction_gradient": one, "understanding_gradient": other, "omega_rec": weight})
        weight = balance.omega_rec(memory, 3.0, 0.5)
    assert weight * sum(rec) / sum(und) == pytest.approx(3.0)


def test_a_gradient_of_zero_leaves_the_weight_as_it_was_given():
    memory: dict[str, float] = {}
    balance.measure(memory, {"reconstruction_squares": 0.0, "understanding_squares": 1.0}, 0.5, ranks=1)
    assert balance.omega_rec(memory, 1.0, 0.5) == 0.5


def test_each_step_has_the_weight_of_the_steps_before_and_a_crash_leaves_no_trace(tmp_path, monkeypatch):
    whole, broken = balanced(tmp_path, "whole"), balanced(tmp_path, "broken")
    pretrain(whole, "tiny")
    rows = [row for row in metrics(whole.out) if "train/loss" in row]
    rec, und = ([row[f"train/{name}_gradient"] for row in rows] for name in ("reconstruction", "understanding"))
    weights = [row["train/omega_rec"] for row in rows]
    assert weights[0] == whole.model.loss.omega_rec
    assert weights[1:] == pytest.approx([0.3 * sum(und[:i]) / sum(rec[:i]) for i in range(1, len(rows))])
    with monkeypatch.context() as patched, pytest.raises(Crash):
        crash_at(patched, 5)
        pretrain(broken, "tiny")
    broken.resume = True
    pretrain(broken, "tiny")
    assert_same_run(whole.out, broken.out)


def test_micro_batches_have_the_weights_of_the_whole_batch(tmp_path):
    runs = [balanced(tmp_path, f"in-{size}", micro_batch=size) for size in (0, 1)]
    whole, parted = ([row for row in metrics(pretrain(config, "tiny").folder) if "train/loss" in row] for config in runs)
    for one, other in zip(whole, parted, strict=True):
        assert one["train/omega_rec"] == pytest.approx(other["train/omega_rec"], rel=1e-4)
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4)
