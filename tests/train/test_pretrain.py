"""A config becomes a run: what it leaves, what it refuses, what it tells."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import assert_same_run, metrics, pictures, small

import openvision3
from openvision3 import device
from openvision3.cli import main
from openvision3.data import fingerprint
from openvision3.data.images import to_pil
from openvision3.data.names import open_source
from openvision3.data.text import TextTokenizer
from openvision3.hub import complete_checkpoints, latest_checkpoint, read_config
from openvision3.settings import load_config
from openvision3.train import pretrain as module
from openvision3.train import run as run_module
from openvision3.train.checkpoint import CheckpointError, RunState
from openvision3.train.config import PretrainConfig
from openvision3.train.held_out import MEASURE
from openvision3.train.pretrain import Outcome, pretrain, pretrain_in_turn
from openvision3.train.run_folder import REQUEUE


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[PretrainConfig, Outcome]:
    """A run of 7 steps into `run`; images under `train` and `held` beside it."""
    config = small(tmp_path_factory.mktemp("finished"), "run", eval_every=4)
    return config, pretrain(config, "tiny")


@pytest.mark.parametrize("settings", [{}, {"families": True, "pixel_share": 0.5, "micro_batch": 2}])
def test_the_batches_of_a_run_are_those_of_its_config_and_every_sample_comes_once_an_epoch(tmp_path, settings):
    config = small(tmp_path, "run", **({"families": False} | settings))
    training = module.Pretraining(config, run_module.Start(tmp_path / "run"))
    plan, count = training.batches.plan, len(training.source)
    for name in ("size", "batch", "seed", "pixel_share", "micro_batch", "families"):
        assert getattr(plan, name) == getattr(config, name), name
    assert plan.family_balance == 0 and plan.lanes == training.lanes == 1
    for epoch in range(3):
        assert sorted(training.batches.index(epoch * count + place) for place in range(count)) == list(range(count))


def load_another_vae(monkeypatch) -> None:
    """From now on the VAE of every run has another sha256."""
    load = module.hub.load_vae

    def another(*values, **named):
        vae = load(*values, **named)
        vae.sha256 = "f" * 64
        return vae

    monkeypatch.setattr(module.hub, "load_vae", another)


@pytest.fixture
def copied(finished, tmp_path) -> PretrainConfig:
    """The config of that run, resumed in a copy of its folder."""
    shutil.copytree(finished[0].out, tmp_path / "run")
    config = load_config(PretrainConfig, tmp_path / "run" / "config.json")
    config.out, config.resume = str(tmp_path / "run"), True
    return config


def test_a_run_folder_holds_all_that_is_promised(finished):
    config, outcome = finished
    folder = outcome.folder
    assert outcome.status == "finished" and outcome.steps == 7
    found = {p.name for p in folder.iterdir()}
    assert found == {
        *("config.json", "metrics.jsonl", "log.txt", "tensorboard", "samples", "checkpoints"),
        *("environment.json", "command.txt", "tokenizer.json", "fingerprint.safetensors", "identities.json", ".lock"),
    }
    assert sorted(p.name for p in (folder / "samples").iterdir()) == ["step-00000004.png", "step-00000007.png"]
    assert [p.name for p in complete_checkpoints(folder)] == ["step-00000006", "step-00000007"]
    assert load_config(PretrainConfig, folder / "config.json") == replace(config, lanes=1), "local data have one lane"


def test_the_metrics_hold_every_loss_and_the_evaluation(finished):
    rows = metrics(finished[1].folder)
    assert [row["step"] for row in rows if "train/loss" in row] == [2, 4, 6, 7]
    assert {"train/latent", "train/pixel", "train/contrastive", "train/caption", "train/grad_norm", "rate", "skipped_steps"} <= rows[0].keys()
    assert [row["step"] for row in rows if "val/psnr" in row] == [4, 7]
    assert {"val/vae_psnr", "val/loss", "val/image_to_text_r@1", "val/text_to_image_r@1"} <= rows[-1].keys()


def test_the_run_folder_loads_as_the_model_that_was_trained(finished):
    config, outcome = finished
    loaded = openvision3.load(outcome.folder, device="cpu")
    picture = str(Path(config.val[0]) / "0.png")
    assert torch.equal(loaded.encode(picture), outcome.training.pipeline.encode(picture))
    assert loaded.caption(picture) == outcome.training.pipeline.caption(picture)
    record = read_config(complete_checkpoints(outcome.folder)[-1]).training
    assert (record["recipe"], record["steps"], record["samples_seen"], record["precision"]) == ("tiny", 7, 28, "fp32")


def test_the_callers_config_is_left_alone(finished):
    assert finished[0].precision == "fp32" and not finished[0].resume
    assert finished[0].steps == 7


def test_the_same_seed_gives_the_same_run_with_any_number_of_workers_and_another_seed_another(finished, tmp_path):
    outcome = finished[1]
    again = small(tmp_path, "again", eval_every=4, workers=1)
    pretrain(again, "tiny")
    assert_same_run(outcome.folder, again.out)
    other = small(tmp_path, "other", eval_every=4, seed=1)
    pretrain(other, "tiny")
    assert metrics(other.out)[0]["train/loss"] != metrics(outcome.folder)[0]["train/loss"]


# -- bad input -------------------------------------------------------------------------------------------------------


def _no_pictures(root: Path) -> str:
    folder = pictures(root / "unusable", 3)
    for path in folder.glob("*.png"):
        path.write_bytes(b"no image")
    return str(folder)


def _no_captions(root: Path) -> str:
    folder = pictures(root / "silent", 3)
    for path in folder.glob("*.txt"):
        path.unlink()
    return str(folder)


LPIPS = [
    *("--model.loss.lambda-perceptual", "0.5", "--model.loss.perceptual", "lpips-vgg"),
    *("--model.loss.lpips-backbone", "none.pth", "--model.loss.lpips-linear", "none.pth"),
]


BAD = {
    "unknown data": (lambda root: ["--data", "nowhere"], "no such data: nowhere"),
    "no data": (lambda root: ["--data", str(pictures(root / "empty", 0))], "holds no images that are read"),
    "no usable data": (lambda root: ["--data", _no_pictures(root)], "256 samples in a row cannot be used"),
    "unknown val": (lambda root: ["--val", "nowhere"], "no such data: nowhere"),
    "no usable val": (lambda root: ["--val", _no_pictures(root)], "none of the 3 held-out images"),
    "val is data": (lambda root: ["--val", str(root / "train")], "evaluate on images that are not trained on"),
    "no tokenizer": (lambda root: ["--tokenizer", "none.json"], "no such tokenizer: none.json"),
    "no VAE": (lambda root: ["--model.vae.name", str(root / "none")], "no such VAE"),
    "not a VAE": (lambda root: ["--model.vae.name", str(root / "train")], "holds no"),
    "no init": (lambda root: ["--init", "none"], "unknown model 'none'"),
    "unfitting init": (lambda root: ["--init", "SMALL", "--model.encoder.embed-dim", "32"], "set --model.encoder.embed-dim 64"),
    "init of another architecture": (lambda root: ["--init", "SMALL", "--model.encoder.qk-norm"], "set --model.encoder.no-qk-norm"),
    "no shards match": (lambda root: ["--only", "source"], "must look like name=value"),
    "no captions": (lambda root: ["--data", _no_captions(root)], "none of the 3 images in"),
    "no LPIPS files": (lambda root: LPIPS, "no such weights file: none.pth"),
    "no pixels to compare": (lambda root: ["--model.loss.lambda-perceptual", "0.5", "--pixel-share", "0"], "pixel_share 0 decodes none"),
    "wrong size": (lambda root: ["--size", "100"], "size 100 must be a multiple of 16"),
    "nothing to resume": (lambda root: ["--resume"], "holds no run to continue"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(finished, tmp_path, capsys, what, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "train", 4)
    pictures(tmp_path / "held", 2, seed=1)
    make, seen = BAD[what]
    words = [str(finished[1].folder) if word == "SMALL" else word for word in make(tmp_path)]
    defaults = ["--data", str(tmp_path / "train"), "--val", str(tmp_path / "held"), "--size", "32", "--batch", "4", "--precision", "fp32"]
    for name in words[::2]:
        if name in defaults:
            at = defaults.index(name)
            del defaults[at : at + 2]
    assert main(["train", "tiny", *defaults, *words, "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("openvision3: ") and said.count("\n") == 1 and seen in said, said
    assert not (tmp_path / "out").exists() and not (tmp_path / "runs").exists()


def test_a_place_that_cannot_be_written_to_is_one_line(finished, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    config = finished[0]
    words = ["--data", config.data[0], "--val", config.val[0], "--size", "32", "--batch", "4", "--precision", "fp32"]
    assert main(["train", "tiny", *words, "--out", str(tmp_path / "file" / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Not a directory" in said and str(tmp_path / "file") in said


# -- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 5),
        ("batch", 16),
        ("steps", 99),
        ("size", 48),
        ("precision", "bf16"),
        ("minutes", 2.0),
        ("optimizer.learning_rate", 0.5),
        ("model.loss.tau", 0.0),
    ],
)
def test_a_run_that_goes_on_refuses_a_field_that_would_change_its_numbers(copied, field, value):
    place = copied
    *parts, name = field.split(".")
    for part in parts:
        place = getattr(place, part)
    setattr(place, name, value)
    with pytest.raises(ValueError, match=rf"^{field} was .* and cannot become {value!r}; start a new run with --init {copied.out}$"):
        pretrain(copied, "tiny")


def test_a_run_that_goes_on_takes_new_settings_that_do_not_change_its_numbers(copied):
    shutil.rmtree(complete_checkpoints(copied.out)[-1])
    copied.log_every, copied.save_every, copied.keep, copied.workers = 1, 100, 1, 1
    assert pretrain(copied, "tiny").status == "finished"
    now = load_config(PretrainConfig, Path(copied.out) / "config.json")
    assert (now.log_every, now.save_every, now.keep, now.workers) == (1, 100, 1, 1)


def test_a_run_that_goes_on_without_more_words_keeps_the_settings_it_was_started_with(copied):
    assert main(["train", "tiny", "--out", copied.out, "--resume"]) == 0
    now = load_config(PretrainConfig, Path(copied.out) / "config.json")
    assert (now.log_every, now.save_every, now.eval_every) == (2, 3, 4)


def test_a_field_set_back_to_its_recipes_value_is_refused_too(copied, capsys):
    assert main(["train", "tiny", "--out", copied.out, "--resume", "--data", "openmoji"]) == 2
    assert "data was" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_data_or_another_vae(finished, copied, tmp_path, monkeypatch):
    extra = Path(copied.data[0]) / "extra.png"
    shutil.copy(Path(copied.data[0]) / "0.png", extra)
    try:
        with pytest.raises(ValueError, match="was started on 10 samples, but its data hold 11 now"):
            pretrain(copied, "tiny")
    finally:
        extra.unlink()
    load_another_vae(monkeypatch)
    with pytest.raises(ValueError, match=r"was started with a VAE of sha256 .* has ffffffffffff\.\.\. now"):
        pretrain(copied, "tiny")


def test_a_damaged_checkpoint_is_refused_before_anything_is_written(copied):
    last = complete_checkpoints(copied.out)[-1]
    (last / "state" / ".metadata").unlink()
    before = {p: p.read_bytes() for p in Path(copied.out).rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match="is damaged"):
        pretrain(copied, "tiny")
    assert {p: p.read_bytes() for p in Path(copied.out).rglob("*") if p.is_file()} == before
    shutil.rmtree(last)  # as the message says
    assert pretrain(copied, "tiny").status == "finished"


def test_a_new_run_over_an_old_one_is_refused_before_it_is_prepared(finished, monkeypatch):
    monkeypatch.setattr(module, "open_data", None)
    with pytest.raises(ValueError, match="already holds a run"):
        pretrain(finished[0], "tiny")


def test_a_run_says_where_it_ended_where_this_process_does_not_see_its_folder(tmp_path):
    """Of several machines with disks of their own only the first sees the run folder."""
    assert latest_checkpoint(tmp_path / "elsewhere") is None


def test_a_run_does_not_go_on_where_a_process_does_not_see_its_folder(copied, monkeypatch):
    gather = run_module.distributed.gather_objects
    monkeypatch.setattr(run_module.distributed, "gather_objects", lambda value: [True, False] if value is True else gather(value))
    line = f"^process 1 does not see {copied.out}/config.json, and every process reads .*: put {copied.out} on a disk that all machines share"
    with pytest.raises(ValueError, match=line):
        pretrain(copied, "tiny")


def test_weights_are_taken_only_where_they_mean_the_same(finished, tmp_path, monkeypatch):
    """Norm, GELU, positions and VAE have no tensors of another shape: what fits by its keys may be nonsense all the same."""
    outcome = finished[1]
    changes = (
        ("token_norm", "none", "encoder.token_norm layernorm, not none"),
        ("gelu", "tanh", "encoder.gelu exact, not tanh"),
        ("positions", "rope", "encoder.positions sincos, not rope"),
        ("sum_blocks", 1, "encoder.sum_blocks 2, not 1"),
    )
    for field, value, line in changes:
        new = small(tmp_path, "new", init=str(outcome.folder))
        setattr(new.model.encoder, field, value)
        with pytest.raises(ValueError, match=f"was trained with {line}: its weights mean something else here; set --model.encoder"):
            pretrain(new, "tiny")
    load_another_vae(monkeypatch)
    with pytest.raises(ValueError, match=r"was trained with a VAE of sha256 .* has ffffffffffff\.\.\. now; set --model.vae.name"):
        pretrain(small(tmp_path, "new", init=str(outcome.folder)), "tiny")
    assert not (tmp_path / "new").exists()


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_seen(copied):
    weights = complete_checkpoints(copied.out)[-1] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 64
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not as it was written; delete it to continue from the checkpoint before it"):
        pretrain(copied, "tiny")


# -- choices ---------------------------------------------------------------------------------------------------------


def test_a_new_run_can_start_from_the_weights_of_another(finished, tmp_path, monkeypatch):
    outcome = finished[1]
    seen = {}

    def stop(training, *_):
        seen.update({name: value.clone() for name, value in training.model.trained_state().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "fit", stop)
    new = small(tmp_path, "new", init=str(outcome.folder), vocabulary=200)  # its words come with the weights
    with pytest.raises(KeyboardInterrupt):
        pretrain(new, "tiny")
    trained = outcome.training.pipeline.model.trained_state()
    assert seen.keys() == trained.keys() and all(torch.equal(value, trained[name]) for name, value in seen.items())
    assert (Path(new.out) / "tokenizer.json").read_text() == (outcome.folder / "tokenizer.json").read_text()


def test_weights_of_small_pictures_start_a_new_run_on_larger_ones(finished, tmp_path, monkeypatch):
    last, fit = complete_checkpoints(finished[1].folder)[-1], run_module.fit
    seen = {}

    def watched(training, optimizers, config, state, *more):
        seen.update({name: value.clone() for name, value in training.model.trained_state().items()})
        assert state == RunState(val_measure=MEASURE) and not any(optimizer.state for optimizer in optimizers.all)
        return fit(training, optimizers, config, state, *more)

    monkeypatch.setattr(run_module, "fit", watched)
    outcome = pretrain(small(tmp_path, "new", init=str(finished[1].folder), size=64, steps=1, batch=2, pixel_share=0.5), "tiny")
    before = load_file(last / "model.safetensors")
    assert seen.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in seen.items())
    assert metrics(outcome.folder)[0]["step"] == outcome.steps == 1
    assert outcome.training.pipeline.encode(str(Path(finished[0].val[0]) / "0.png")).shape[1] == (64 // 16) ** 2


def test_a_run_from_other_weights_keeps_the_record_of_their_training_when_it_goes_on_too(finished, tmp_path):
    first = finished[1]
    before = {"name": str(first.folder), **first.training.pipeline.training}
    new = small(tmp_path, "new", init=str(first.folder), steps=3)
    assert pretrain(new, "tiny").training.pipeline.training["started_from"] == before
    new.resume = True
    assert pretrain(new, "tiny").training.pipeline.training["started_from"] == before
    assert f"started_from.steps: {before['steps']}" in (complete_checkpoints(new.out)[-1] / "README.md").read_text()


def test_a_run_without_a_fingerprint_goes_on_where_the_model_that_it_started_from_is_gone(finished, tmp_path):
    first = shutil.copytree(finished[1].folder, tmp_path / "first")
    new = small(tmp_path, "new", init=str(first), steps=3, fingerprint=1)
    pretrain(new, "tiny")
    assert not (Path(new.out) / "fingerprint.safetensors").exists()
    shutil.rmtree(first)
    new.resume = True
    assert pretrain(new, "tiny").training.pipeline.training["steps"] == 3


def test_measuring_the_rate_leaves_the_model_and_the_batches_as_they_were(tmp_path, monkeypatch):
    measured = []
    measure_steps = run_module.measure_steps

    def watched(*values):
        measured.append(measure_steps(*values))
        return 7, measured[0][1]

    monkeypatch.setattr(run_module, "measure_steps", watched)
    timed, plain = small(tmp_path, "timed", minutes=2.0), small(tmp_path, "plain")
    timed.optimizer.warmup_steps = plain.optimizer.warmup_steps = 0
    monkeypatch.setattr(run_module, "min", lambda *_: 0, raising=False)  # no warm-up in either
    pretrain(timed, "tiny")
    pretrain(plain, "tiny")
    steps, rate = measured[0]
    assert steps == max(1, round(120 * rate)) and rate > 0
    assert_same_run(timed.out, plain.out)


def test_the_chosen_precision_is_told_and_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "measure_precision", lambda device: {"fp32": 1.0, "bf16": 3.0})
    config = small(tmp_path, "run", precision="auto", steps=2)
    outcome = pretrain(config, "tiny")
    assert outcome.precision == load_config(PretrainConfig, tmp_path / "run" / "config.json").precision == "bf16"
    assert "precision bf16 (measured: bf16 runs at 3x" in (tmp_path / "run" / "log.txt").read_text()
    assert openvision3.load(config.out, device="cpu").embed_texts("a word").isfinite().all()
    monkeypatch.setattr(device, "measure_precision", lambda device: {"fp32": 3.0, "bf16": 1.0})
    config.resume = True
    assert pretrain(config, "tiny").precision == "bf16"  # not measured anew


def test_pictures_that_cannot_be_used_are_told_counted_and_listed_on_both_sides(tmp_path, capsys):
    for folder in ("train", "held"):
        pictures(tmp_path / folder, 3)
        (tmp_path / folder / "broken.png").write_bytes(b"no image")
        (tmp_path / folder / "broken.txt").write_text("a word")
    pretrain(small(tmp_path, "run"), "tiny")
    listed = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(p["key"] for p in listed) == ["held/broken.png", "train/broken.png"]
    assert metrics(tmp_path / "run")[-1]["val/skipped"] == 1
    assert "skipped samples: 2 " in capsys.readouterr().err


def test_a_warm_up_longer_than_the_run_is_told(tmp_path, capsys):
    config = small(tmp_path, "run", steps=2)
    config.optimizer.warmup_steps = 50
    pretrain(config, "tiny")
    assert "the warm-up of 50 steps is not over after 2 steps: the rate reaches 4% of its value and never falls" in capsys.readouterr().err


def test_the_sample_sheet_shows_the_held_out_pictures(finished):
    from PIL import Image

    config, outcome = finished
    sheet = Image.open(outcome.folder / "samples" / "step-00000007.png").convert("RGB")
    original = to_pil(outcome.training.pipeline.prepare(str(Path(config.val[0]) / "0.png")))[0]
    assert sheet.getcolors(1 << 24) and {original.getpixel((16, 10))} <= {color for _, color in sheet.getcolors(1 << 24)}


def signalled(monkeypatch, name: str) -> None:
    """SIGTERM comes while `pretrain` does what `name` says, the first time that it does."""
    real, sent = getattr(module, name), []

    def doing(*arguments, **named):
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **named)

    monkeypatch.setattr(module, name, doing)


def test_a_signal_while_a_run_is_set_up_stops_it_at_its_first_step(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    signalled(monkeypatch, "open_data")
    outcome = pretrain(small(tmp_path, "run"))
    assert (outcome.status, outcome.steps) == ("stopped", 1) and (tmp_path / "run" / REQUEUE).is_file()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_at_the_end_of_one_phase_stops_the_next_at_its_first_step(tmp_path, monkeypatch):
    signalled(monkeypatch, "quick_evaluation")  # of the last step of the first phase
    phases = [(name, small(tmp_path, name, steps=2)) for name in ("first", "second")]
    phases[1][1].init = str(tmp_path / "first")
    outcome = pretrain_in_turn(phases)
    assert (outcome.status, outcome.steps, outcome.folder.name) == ("stopped", 1, "second")
    assert not (tmp_path / "first" / REQUEUE).exists() and (tmp_path / "second" / REQUEUE).is_file()


def test_held_out_pictures_that_vanish_do_not_end_a_run(tmp_path, monkeypatch):
    config = small(tmp_path, "run", eval_every=3)
    advance = module.RunFolder.advance

    def vanishing(self, done):
        if done == 2:
            shutil.rmtree(tmp_path / "held")
        advance(self, done)

    monkeypatch.setattr(module.RunFolder, "advance", vanishing)
    outcome = pretrain(config)
    assert (outcome.status, outcome.steps) == ("finished", 7)
    assert [row["val/skipped"] for row in metrics(tmp_path / "run") if "val/skipped" in row] == [3, 3, 3]


def test_processes_that_have_opened_unlike_data_are_told_apart(monkeypatch):
    monkeypatch.setattr(run_module.distributed, "gather_objects", lambda facts: [facts, facts | {"samples": (7, "a", "b")}])
    with pytest.raises(ValueError, match=r"not opened the same samples: \(8, 'a', 'b'\) in process 0, \(7, 'a', 'b'\) in process 1"):
        run_module._agree({"VAE": "x", "samples": (8, "a", "b")})


def test_a_run_records_what_its_training_data_and_those_of_its_start_are_recognised_by(finished, tmp_path, capsys):
    config, outcome = finished
    own = fingerprint.recorded(complete_checkpoints(outcome.folder)[-1])
    source = open_source(config.data)
    assert own is not None and own.data == config.data and own.samples == len(source) == 10
    assert all(own.has_caption(caption) for i in range(10) for caption in source.captions(i))
    pictures(tmp_path / "more", 5, seed=9)
    follows = small(tmp_path, "follows", steps=1, init=str(outcome.folder), data=(str(tmp_path / "more"),))
    pretrain(follows, "tiny")
    both = fingerprint.recorded(complete_checkpoints(tmp_path / "follows")[-1])
    assert both is not None and both.samples == 15 and both.data == (*config.data, *follows.data)
    capsys.readouterr()
    pretrain(small(tmp_path, "none", steps=1, fingerprint=9), "tiny")
    assert "no fingerprint of the training data is written: they are more than 9 samples" in capsys.readouterr().err
    assert fingerprint.recorded(complete_checkpoints(tmp_path / "none")[-1]) is None
    pretrain(small(tmp_path, "after", steps=1, init=str(tmp_path / "none")), "tiny")
    assert "which this run starts from, has none" in capsys.readouterr().err


def test_val_images_that_are_near_duplicates_of_training_images_are_told(tmp_path, capsys):
    config = small(tmp_path, "run", steps=1)
    shutil.copy(tmp_path / "train" / "4.png", tmp_path / "held" / "other.png")
    pretrain(config, "tiny")
    assert "of the first 4 val images are near-duplicates of training images, such as train/" in capsys.readouterr().err


def test_words_that_the_tokenizer_does_not_know_are_told_at_the_start(tmp_path):
    config = small(tmp_path, "run", steps=1)
    TextTokenizer.train(["nothing of the kind", "of the kind"] * 2, 100).save(tmp_path / "t.json")
    config.tokenizer = str(tmp_path / "t.json")
    pretrain(config)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert re.search(r"captions: \d+ % of the \d+ tokens of 10 texts are unknown to the tokenizer; train a tokenizer", log)
