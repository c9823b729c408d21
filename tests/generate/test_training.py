"""Training a generator: the run, the loop and the ranks are those of any training, and what is special to it holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from public_dit import public_state
from safetensors.torch import load_file, save_file
from small_runs import Crash, assert_same_run, crash_at, metrics, pictures
from tiny_generator import small_dit, small_generator, tokens_folder
from tiny_inception import Inception8

from openvision3.cli import main
from openvision3.generate.flow import FlowConfig
from openvision3.generate.generator import load_generator
from openvision3.generate.public import read_public
from openvision3.generate.recipes import imagenet_dit_b
from openvision3.generate.space import Moments
from openvision3.generate.training import Generation, train_generator
from openvision3.hub import complete_checkpoints
from openvision3.networks.inception import EfficientNetFeatures
from openvision3.train.run import Start


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generator")
    tokens_folder(folder)
    return folder


@pytest.fixture(scope="module")
def whole(root) -> Path:
    train_generator(small_generator(root, "whole", ema=0.9))
    return root / "whole"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(complete_checkpoints(run)[-1] / "model.safetensors")


def test_a_run_that_dies_goes_on_bit_for_bit(root, whole, monkeypatch):
    with pytest.raises(Crash), monkeypatch.context() as dying:
        crash_at(dying, 5)
        train_generator(small_generator(root, "broken", ema=0.9))
    assert [path.name for path in complete_checkpoints(root / "broken")] == ["step-00000003"]
    train_generator(small_generator(root, "broken", ema=0.9, resume=True))
    assert_same_run(whole, root / "broken")


def test_the_model_folder_holds_the_averaged_network_the_statistics_and_nothing_that_is_frozen(whole):
    saved = weights(whole)
    assert all(name.startswith(("dit.", "statistics.")) for name in saved) and int(saved["statistics.count"]) == 8
    config = json.loads((complete_checkpoints(whole)[-1] / "config.json").read_text())
    assert config["model_type"] == "openvision3-generator" and config["training"]["steps"] == 6


def test_what_is_evaluated_is_the_averaged_network(root):
    """The average lags behind the weights, and so does its held-out loss."""
    train_generator(small_generator(root, "still", ema=0.999999, eval_every=1, log_every=6))
    losses = [row["val/loss"] for row in metrics(root / "still") if "val/loss" in row]
    train_generator(small_generator(root, "moving", eval_every=1, log_every=6))
    others = [row["val/loss"] for row in metrics(root / "moving") if "val/loss" in row]
    assert max(losses) - min(losses) < max(others) - min(others)
    assert others[-1] != losses[-1]


def test_with_compiled_blocks_too_the_averaged_network_is_evaluated_and_saved(root, whole, monkeypatch):
    """The public code evaluated the online weights after compilation. Backend eager: graphs are captured, and nothing needs a C++ compiler."""
    compiled: list[torch.nn.Module] = []

    def compile_eagerly(block: torch.nn.Module) -> None:
        compiled.append(block)
        block._compiled_call_impl = torch.compile(block._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    monkeypatch.setattr("openvision3.train.run.choose_compile", lambda *_: (True, ""))
    train_generator(small_generator(root, "compiled", ema=0.9, compile="on"))
    assert len(compiled) == 3, "two blocks of the trunk, one of the head"
    for one, other in zip(metrics(whole), metrics(root / "compiled"), strict=True):
        assert all(name not in one or one[name] == pytest.approx(other[name], rel=1e-5) for name in ("train/loss", "val/loss"))
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(root / "compiled")[name], value, rtol=0, atol=1e-5)


def test_micro_batches_add_up_to_the_gradient_of_the_batch(root, whole):
    train_generator(small_generator(root, "in parts", ema=0.9, micro_batch=1))
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(root / "in parts")[name], value, rtol=0, atol=5e-4)


def test_a_signal_saves_a_run_that_goes_on_to_the_same_bits(root, whole, monkeypatch):
    real = Generation.before_step

    def signalled(self, state, optimizers):
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, state, optimizers)

    with monkeypatch.context() as once:
        once.setattr(Generation, "before_step", signalled)
        outcome = train_generator(small_generator(root, "signalled", ema=0.9))
    assert outcome.status == "stopped" and outcome.steps < 6
    train_generator(small_generator(root, "signalled", ema=0.9, resume=True))
    for name, value in weights(whole).items():
        assert torch.equal(weights(root / "signalled")[name], value), name


def test_a_network_that_is_narrower_than_a_token_is_told_that_its_loss_has_a_floor(root):
    narrow = small_dit(width=32, head_width=48, heads=2, head_heads=2)
    train_generator(small_generator(root, "narrow", steps=1, dit=narrow))
    assert "no part of the network is as wide as the 64 channels of a token" in (root / "narrow" / "log.txt").read_text()
    train_generator(small_generator(root, "wide", steps=1, dit=replace(narrow, head_width=64)))
    assert "no part of the network" not in (root / "wide" / "log.txt").read_text()


def test_statistics_are_exact_and_of_the_images_that_the_run_begins_with(root):
    config = small_generator(root, "statistics", statistics=7)
    training = Generation(config, Start(root / "statistics"))
    moments = Moments(4, 64)
    for position in range(7):
        batch, _ = training.batches.collate([training.batches.sample(position)])
        moments.add(training.model.encode({"images": batch["images"].float() / 127.5 - 1}))
    statistics = training.model.statistics
    assert int(statistics.count) == 7
    torch.testing.assert_close(statistics.mean, moments.mean.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.variance, (moments.scatter / 7).float(), rtol=1e-4, atol=1e-6)


def test_noise_time_and_dropping_are_functions_of_the_rows_key(root):
    """Rows in another order, or in other company, have the same errors: a sample never learns from the draws of its neighbour."""
    training = Generation(small_generator(root, "draws", drop=0.5), Start(root / "draws"))
    for parameter in training.model.dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = next(training.batches.from_step(0))
    batch["images"] = batch["images"].float() / 127.5 - 1
    with torch.no_grad():
        together = training.model(batch)[0]
        apart = [training.model({name: value[i : i + 1] for name, value in batch.items() if name != "word_positions"})[0] for i in (3, 1, 0, 2)]
    torch.testing.assert_close(together, torch.stack(apart).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("predict", ["velocity", "tokens"])
def test_a_generator_learns(root, predict):
    """One image with one caption: the held-out loss of that image falls far below that of knowing nothing."""
    one = str(pictures(root / "one", 1))
    config = small_generator(
        root, f"learns-{predict}", data=(one,), val=(str(root / "held"),), steps=60, statistics=0, drop=0.0, flow=FlowConfig(predict=predict), eval_every=0
    )
    config.optimizer.learning_rate, config.optimizer.kind = 3e-3, "muon"
    train_generator(config)
    losses = [row["train/loss"] for row in metrics(root / f"learns-{predict}") if "train/loss" in row]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.slow
def test_micro_batches_and_two_processes_train_what_one_does(root, whole):
    def start(*more: str, processes: int = 1) -> None:
        out = Path(more[-1])
        config = small_generator(root, out.name, ema=0.9)
        words = ["train", "drawings_dit_tiny", "--data", *config.data, "--val", *config.val, "--tokens", config.tokens, "--size", "32", "--batch", "4"]
        words += ["--steps", "6", "--statistics", "8", "--precision", "fp32", "--device", "cpu", "--log-every", "2", "--save-every", "3", "--eval-every", "3"]
        words += ["--dit.width", "64", "--dit.depth", "2", "--dit.heads", "2", "--dit.head-width", "64", "--dit.head-depth", "1", "--dit.head-heads", "2"]
        words += ["--optimizer.kind", "adamw", "--optimizer.learning-rate", "1e-3", "--optimizer.warmup-steps", "2", "--optimizer.weight-decay", "0.2"]
        words += ["--ema", "0.9", "--crop-area", "0.4", "1", "--no-aliases", "--family-balance", "0", "--dit.head-mlp", "0", *more[:-1], "--out", str(out)]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, *launcher, "-m", "openvision3", *words], capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]

    start("--micro-batch", "1", str(root / "micro"))
    start(str(root / "copies"), processes=2)
    start("--parallel", "fsdp", "--micro-batch", "1", "--checkpointing", str(root / "shards"), processes=2)
    for name in ("micro", "copies", "shards"):
        for one, other in zip(metrics(whole), metrics(root / name), strict=True):
            for metric in ("train/loss", "val/loss"):
                assert metric not in one or one[metric] == pytest.approx(other[metric], rel=1e-3), (name, one["step"], metric)
        for tensor, value in weights(whole).items():
            assert (value.float() - weights(root / name)[tensor].float()).abs().max() < 5e-4, (name, tensor)


def test_latents_of_a_cache_train_as_their_images_would(root):
    config = small_generator(root, "of images", crop_area=(1.0, 1.0))
    words = ["--size", "32", "--crops", "1", "--crop-area", "1", "1", "--precision", "fp32", "--out", str(root / "latents")]
    assert main(["data", "latents", *config.data, *words]) == 0
    train_generator(config)
    train_generator(small_generator(root, "cached", crop_area=(1.0, 1.0), latents=str(root / "latents")))
    assert "no image is read" in (root / "cached" / "log.txt").read_text()
    images, cached = ([row["train/loss"] for row in metrics(root / name) if "train/loss" in row] for name in ("of images", "cached"))
    assert len(images) == 3 and images == pytest.approx(cached, rel=2e-2)


def from_public_weights(root: Path, out: str, **changes):
    """A run by label that starts from a file in the layout of RAE's weights."""
    for name in "abcd":
        pictures(root / "classes" / name, 3, seed=ord(name))
        pictures(root / "held classes" / name, 1, seed=2 * ord(name))
    if not (root / "stage2.safetensors").is_file():
        save_file(public_state(64, 2, 2, 64, 2, grid=2, channels=64), root / "stage2.safetensors")
    settings = {
        "data": (str(root / "classes"),),
        "val": (str(root / "held classes"),),
        "condition": "label",
        "init": str(root / "stage2.safetensors"),
        "flow": FlowConfig(),
    }
    return small_generator(root, out, **(settings | {"dit": replace(read_public(root / "stage2.safetensors").config)} | changes))


def test_positions_of_public_weights_stay_with_a_run_that_dies_and_with_its_model(root, monkeypatch):
    train_generator(from_public_weights(root, "public"))
    expected = load_file(root / "stage2.safetensors")["pos_embed"][0]
    assert torch.equal(weights(root / "public")["dit.stored_positions"], expected)
    assert load_generator(root / "public", device="cpu").label_names == tuple("abcd")
    with pytest.raises(Crash), monkeypatch.context() as dying:
        crash_at(dying, 5)
        train_generator(from_public_weights(root, "public-broken"))
    train_generator(from_public_weights(root, "public-broken", resume=True))
    assert_same_run(root / "public", root / "public-broken")


def test_public_weights_are_refused_by_a_run_in_which_they_mean_something_else(root):
    with pytest.raises(ValueError, match=r"was trained with flow\.predict velocity, not tokens; set --flow\.predict velocity"):
        train_generator(from_public_weights(root, "other", flow=FlowConfig(predict="tokens")))


def test_a_sheet_shows_the_rows_that_have_a_caption(root):
    held = pictures(root / "few captions", 40, seed=3)
    for number, path in enumerate(sorted(held.glob("*.txt"))):
        if 3 <= number < 32:
            path.unlink()
    train_generator(small_generator(root, "few", val=(str(held),), steps=1, eval_every=1))
    assert (root / "few" / "samples" / "step-00000001.png").is_file()


def test_a_run_goes_on_with_another_generators_network_at_another_size(root, whole):
    train_generator(small_generator(root, "larger", size=64, init=str(whole), steps=1, eval_every=0))
    saved = weights(root / "larger")
    assert saved["statistics.mean"].shape == (16, 64) and saved["dit.enter.weight"].shape == weights(whole)["dit.enter.weight"].shape
    assert (saved["dit.enter.weight"] - weights(whole)["dit.enter.weight"]).abs().max() < 0.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dit": small_dit(width=32)}, "was trained with dit.width 64, not 32; set --dit.width 64"),
        ({"dit": small_dit(qk_norm=False)}, "set --dit.qk-norm"),
        ({"flow": FlowConfig()}, "was trained with flow.predict tokens, not velocity"),
        ({"tokens": "mini"}, "draws the tokens of"),
        ({"condition": "none"}, "was trained with condition text, not none"),
        ({"statistics": 0}, "was trained on normalised tokens; set --statistics 50000"),
        ({"statistics": 0, "dit": small_dit(width=32)}, "with dit.width 64, not 32 and on normalised tokens; set --dit.width 64 --statistics 50000"),
    ],
)
def test_weights_that_would_mean_something_else_are_refused(root, whole, changes, words):
    with pytest.raises(ValueError, match=words):
        train_generator(small_generator(root, "other", init=str(whole), **changes))
    assert not (root / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--drop", "1"], "drop 1.0 must be at least 0 and below 1"),
        (["--family-balance", "2"], "family_balance 2.0 must lie between 0 and 1"),
        (["--family-balance", "0.5", "--weights", "1"], "weights and family_balance both order an epoch"),
        (["--tokens", "vae:embedded"], "no text encoder to read texts"),
        (["--tokens", "nowhere"], "unknown model 'nowhere'"),
        (["--dit.stored-positions", "9"], "come with weights"),
        (["--size", "40"], "multiple of 16"),
        (["--init", "nowhere"], "unknown generator 'nowhere'"),
        (["--dit.depht", "3"], "Did you mean '--dit.depth'"),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_written(root, tmp_path, capsys, arguments, words):
    config = small_generator(root, "bad")
    code = main(["train", "drawings_dit_tiny", "--data", *config.data, "--val", *config.val, "--out", str(tmp_path / "run"), *arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and words in lines[0] and not (tmp_path / "run").exists()


def classes(root: Path, name: str, count: int, labels: tuple[str, ...]) -> str:
    """`count` images of one colour a class, in a folder each."""
    from PIL import Image

    for number, label in enumerate(labels):
        (root / name / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (40, 36), (80 * number, 20 * i, 100)).save(root / name / label / f"{i}.png")
    return str(root / name)


def test_by_label_of_vae_latents_without_captions_and_an_image_of_another_class_is_counted(root):
    data, val = classes(root, "by class", 4, ("apple", "banana", "cherry")), classes(root, "held by class", 1, ("banana", "durian"))
    common = {"data": (data,), "val": (val,), "condition": "label", "tokens": "vae:embedded", "steps": 2, "save_every": 2, "eval_every": 2}
    train_generator(small_generator(root, "labels", **common))
    config = json.loads((complete_checkpoints(root / "labels")[-1] / "config.json").read_text())
    assert config["label_names"] == ["apple", "banana", "cherry"] and config["tokens"] == "vae:embedded"
    assert metrics(root / "labels")[-1]["val/skipped"] == 1
    assert "class durian is none of the 3 classes" in (root / "labels" / "skipped.jsonl").read_text()
    assert (root / "labels" / "samples" / "step-00000002.png").is_file()


def test_labels_reach_the_network_by_their_row(root):
    data = classes(root, "by class", 4, ("apple", "banana", "cherry"))
    val = classes(root, "held by class", 1, ("banana", "durian"))
    config = small_generator(root, "rows", data=(data,), val=(val,), condition="label", tokens="vae:embedded")
    training = Generation(config, Start(root / "rows"))
    batch = next(training.batches.from_step(0))
    names = [training.source.key(training.batches.index(row)).split("/")[-2] for row in range(4)]
    assert [training.label_names[label] for label in batch["labels"].tolist()] == names and "text_ids" not in batch


def test_the_papers_protocol_runs_from_labelled_images_to_gfid_without_and_with_guidance(root, monkeypatch, capsys):
    """Its network, path and sampler at a small size; eight features of the network that ships stand in Inception's place."""
    monkeypatch.setattr("openvision3.evaluate.generation._extractors", lambda _: ([EfficientNetFeatures(), Inception8()], []))
    data, val = classes(root, "by class", 4, ("apple", "banana", "cherry")), classes(root, "held by class", 1, ("banana", "cherry"))
    paper = replace(imagenet_dit_b(), dit=small_dit(qk_norm=False))
    settings = {name: getattr(paper, name) for name in ("flow", "dit", "ema", "drop", "condition", "crop_area", "mirror", "optimizer")}
    train_generator(small_generator(root, "paper", data=(data,), val=(val,), **settings))
    argv = ["evaluate", "generation", str(root / "paper"), "--data", data, "--count", "12", "--steps", "4", "--guidance", "1.5", "--device", "cpu"]
    assert main([*argv, "--grid", "full", "--out", str(root / "scores"), "--json"]) == 0
    rows = json.loads((root / "scores" / "results.json").read_text())["rows"]
    measured = {(row["model"], row["metric"]) for row in rows}
    columns = {row["model"] for row in rows}
    assert len(columns) == 2 and {name for name in columns if name.endswith("guidance 1.5")}
    assert all((model, metric) in measured for model in columns for metric in ("gfid", "sfid", "inception_score", "precision", "recall"))
    assert {row["labels"] for row in rows} == {"balanced over 3 classes"}
    samples = np.load(root / "scores" / "samples.npz")["arr_0"]
    assert samples.shape == (12, 32, 32, 3) and samples.dtype == np.uint8
    (root / "scores" / "results.json").unlink()
    drawn = (root / "scores" / "samples-guidance-1.5.npz").read_bytes()
    capsys.readouterr()
    assert main([*argv, "--grid", "full", "--out", str(root / "scores")]) == 0
    assert (root / "scores" / "samples-guidance-1.5.npz").read_bytes() == drawn and "gfid" in capsys.readouterr().out
