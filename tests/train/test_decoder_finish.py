"""At the end of a run the latent decoder trains alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import Crash, assert_same_run, crash_at, metrics, saved_state, small

from openvision3.hub import complete_checkpoints
from openvision3.settings import load_config
from openvision3.train.config import PretrainConfig
from openvision3.train.pretrain import pretrain


def finishing(root: Path, out: str, **changes):
    """4 steps of all parts, 3 of the latent decoder."""
    return small(root, out, decoder_finish=0.4, log_every=3, save_every=1, keep=10, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """-> (root, a run with a finish and averaged weights)."""
    root = tmp_path_factory.mktemp("finish")
    return root, pretrain(finishing(root, "whole", ema=0.5), "tiny").folder


def test_from_there_on_only_the_latent_decoder_changes_and_it_learns_the_tokens_of_the_exported_encoder(whole):
    _, run = whole
    before, *later = complete_checkpoints(run)[3:]
    exported = [load_file(checkpoint / "model.safetensors") for checkpoint in (before, *later)]
    states = [saved_state(checkpoint) for checkpoint in later]
    for name, value in exported[0].items():
        if name.startswith("latent_decoder."):
            assert not torch.equal(value, exported[-1][name]), name
        else:
            assert all(torch.equal(value, other[name]) for other in exported), name
            assert all(torch.equal(value, state[f"/model/{name}"]) for state in states), name


def test_the_steps_before_are_those_of_a_run_without_a_finish(whole):
    root, run = whole
    plain = pretrain(small(root, "plain", log_every=1), "tiny").folder
    rows = [{row["step"]: row for row in metrics(folder) if "train/loss" in row} for folder in (plain, run)]
    assert rows[1][3]["train/loss"] == pytest.approx(sum(rows[0][step]["train/loss"] for step in (1, 2, 3)) / 3)


def test_the_losses_of_a_line_are_means_over_steps_that_had_them(whole):
    _, run = whole
    rows = {row["step"]: row for row in metrics(run) if "train/loss" in row}
    assert sorted(rows) == [3, 6, 7] and "train/caption" in rows[3] and "train/caption" not in rows[6]
    weight = load_config(PretrainConfig, run / "config.json").model.loss.omega_rec
    assert rows[6]["train/loss"] == pytest.approx(weight * (0.4 * rows[6]["train/latent"] + rows[6]["train/pixel"]), rel=1e-5)  # of steps 5 and 6 alone
    assert all("val/caption" in row for row in metrics(run) if "val/loss" in row)


@pytest.mark.parametrize("step", [5, 6])
def test_a_crash_as_the_finish_begins_or_within_it_leaves_no_trace(whole, monkeypatch, step):
    root, run = whole
    config = finishing(root, f"broken-{step}", ema=0.5)
    with monkeypatch.context() as patched, pytest.raises(Crash):
        crash_at(patched, step)
        pretrain(config, "tiny")
    assert complete_checkpoints(config.out)[-1].name == f"step-{step - 1:08d}"
    config.resume = True
    pretrain(config, "tiny")
    assert_same_run(run, config.out)


def test_micro_batches_finish_as_the_whole_batch_does(whole):
    root, run = whole
    parted = pretrain(finishing(root, "parted", ema=0.5, micro_batch=2), "tiny").folder
    for one, other in zip(metrics(run), metrics(parted), strict=True):
        assert one.get("train/loss", 0) == pytest.approx(other.get("train/loss", 0), rel=1e-4)


def test_a_finish_needs_a_loss_of_reconstruction_and_steps_before_it():
    with pytest.raises(ValueError, match=r"decoder_finish 1 must be at least 0 and below 1"):
        PretrainConfig(decoder_finish=1)
    assert PretrainConfig(steps=20, decoder_finish=0.98).finish_from == 1, "the optimiser of a checkpoint has a state for every part"
    config = PretrainConfig()
    config.model.loss.omega_rec = 0.0
    with pytest.raises(ValueError, match=r"decoder_finish 0.1 trains the latent decoder, which omega_rec 0 leaves without a loss"):
        PretrainConfig(decoder_finish=0.1, model=config.model)
