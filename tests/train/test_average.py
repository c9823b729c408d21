"""Averaged weights: the formula, what is computed with them, and that a run which dies goes on with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import Crash, assert_same_run, crash_at, metrics, saved_state, small
from torch import nn

from openvision3.hub import complete_checkpoints
from openvision3.settings import load_config
from openvision3.train.average import WeightAverage
from openvision3.train.config import PretrainConfig
from openvision3.train.optimizer import Optimizers
from openvision3.train.pretrain import pretrain


def test_the_mean_weighs_each_step_by_the_product_of_the_later_decays():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    average = WeightAverage(model, 0.3)
    seen = [model.weight.detach().clone()]
    for _ in range(6):
        nn.init.normal_(model.weight)
        seen.append(model.weight.detach().clone())
        average.update()
    decays = [2 / 11, 3 / 12, 0.3, 0.3, 0.3, 0.3]  # (1 + n) / (10 + n) until it exceeds 0.3
    shares = [1.0, *(1 - decay for decay in decays)]
    for i, decay in enumerate(decays):
        shares[: i + 1] = [share * decay for share in shares[: i + 1]]
    assert sum(shares) == pytest.approx(1)
    expected = sum(share * weight for share, weight in zip(shares, seen, strict=True))
    torch.testing.assert_close(average.state["weight"], expected)


def test_within_applied_the_model_has_the_means_and_afterwards_its_own_weights_to_the_last_bit():
    model = nn.Linear(3, 2)
    average = WeightAverage(model, 0.9)
    nn.init.normal_(model.weight)
    own, mean = model.weight.detach().clone(), average.state["weight"].clone()
    with pytest.raises(Crash), average.applied():
        assert torch.equal(model.weight, mean)
        raise Crash
    assert torch.equal(model.weight, own) and torch.equal(average.state["weight"], mean)


def test_frozen_weights_have_no_mean():
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    assert {"1.weight", "1.bias"} == {name for name in WeightAverage(model, 0.9).state if name != "updates"}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """-> (a run without averages, the same with, the root of both)."""
    root = tmp_path_factory.mktemp("average")
    return pretrain(small(root, "plain"), "tiny"), pretrain(small(root, "averaged", ema=0.9), "tiny"), root


def test_the_average_changes_no_step_but_what_is_evaluated_and_exported(averaged):
    plain, with_average, _ = averaged
    rows = [[{k: v for k, v in row.items() if k.startswith("train/")} for row in metrics(run.folder)] for run in (plain, with_average)]
    assert rows[0] == rows[1]
    losses = [[row["val/loss"] for row in metrics(run.folder) if "val/loss" in row] for run in (plain, with_average)]
    assert losses[0] != losses[1]
    last = complete_checkpoints(with_average.folder)[-1]
    state, exported = saved_state(last), load_file(last / "model.safetensors")
    for name, value in exported.items():
        assert torch.equal(value, state[f"/average/{name}"]), name
    assert torch.equal(state["/model/encoder.class_token"], saved_state(complete_checkpoints(plain.folder)[-1])["/model/encoder.class_token"])
    assert not torch.equal(exported["encoder.class_token"], state["/model/encoder.class_token"])


def test_the_model_of_a_finished_run_is_the_exported_one(averaged):
    _, run, _ = averaged
    exported = load_file(complete_checkpoints(run.folder)[-1] / "model.safetensors")
    assert all(torch.equal(value, exported[name]) for name, value in run.training.model.trained_state().items())


def test_a_run_that_starts_from_another_starts_from_its_average(averaged, monkeypatch):
    _, run, root = averaged
    starts = []
    with monkeypatch.context() as patched:
        make = Optimizers.__init__
        patched.setattr(
            Optimizers, "__init__", lambda self, model, *more: [starts.append(model.encoder.class_token.detach().clone()), make(self, model, *more)][1]
        )
        pretrain(small(root, "next", init=str(run.folder), steps=1), "tiny")
    exported = load_file(complete_checkpoints(run.folder)[-1] / "model.safetensors")
    assert torch.equal(starts[0], exported["encoder.class_token"])


def test_a_crash_leaves_no_trace_in_the_average(averaged, monkeypatch):
    _, whole, root = averaged
    config = small(root, "broken", ema=0.9)
    with monkeypatch.context() as patched, pytest.raises(Crash):
        crash_at(patched, 5)
        pretrain(config, "tiny")
    config.resume = True
    pretrain(config, "tiny")
    assert_same_run(whole.folder, Path(config.out))


def test_a_config_from_before_there_were_averages_has_none(averaged):
    plain, _, root = averaged
    text = (plain.folder / "config.json").read_text()
    assert '"ema": 0.0' in text
    (root / "old.json").write_text(text.replace('"ema": 0.0,', ""))
    assert load_config(PretrainConfig, root / "old.json").ema == 0.0


def test_a_decay_of_one_is_refused_for_it_never_learns():
    with pytest.raises(ValueError, match=r"ema 1.0 must be at least 0 and below 1"):
        PretrainConfig(ema=1.0)
