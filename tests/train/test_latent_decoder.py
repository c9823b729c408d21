"""Only the latent decoder of a finished model trains on; a discriminator trains beside it and leaves no trace in the model."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shapes import PAD, VOCABULARY, batch, tiny_config, tiny_vae
from small_runs import Crash, assert_same_run, crash_at, metrics, pictures, saved_state, small

import openvision3
from openvision3.cli import main
from openvision3.data import fingerprint
from openvision3.data.familiarity import FILE as FAMILIARITY
from openvision3.data.familiarity import Familiarity
from openvision3.hub import complete_checkpoints, read_config
from openvision3.model.reconstruction import add_noise
from openvision3.networks.discriminator import FeatureDiscriminator
from openvision3.settings import load_config
from openvision3.train import latent_decoder as module
from openvision3.train.adversarial import AdversarialConfig
from openvision3.train.decoder_config import DecoderConfig, latent_decoder
from openvision3.train.latent_decoder import NoisyDecoding, train_decoder
from openvision3.train.pretrain import pretrain


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """With a finished model in `base`, which has a calibration."""
    root = tmp_path_factory.mktemp("decoder")
    outcome = pretrain(small(root, "run", steps=2), "tiny")
    pipeline = outcome.training.pipeline
    pipeline.fingerprint = fingerprint.recorded(complete_checkpoints(outcome.folder)[-1])
    pipeline.familiarity = Familiarity.fit(torch.randn(40, 8))
    pipeline.save(root / "base")
    pictures(root / "more", 9, seed=5)
    return root


def decoding(root: Path, out: str, **changes) -> DecoderConfig:
    """7 steps at 32 px: the adversarial loss begins at step 3."""
    config = latent_decoder(str(root / "base"))
    config.data, config.val = (str(root / "more"),), (str(root / "held"),)
    config.size, config.batch, config.steps, config.precision, config.out = 32, 4, 7, "fp32", str(root / out)
    config.log_every, config.save_every, config.eval_every, config.pixel_share = 1, 3, 4, 0.5
    config.optimizer.warmup_steps = 2
    config.adversarial = AdversarialConfig(weight=0.5, warmup=0.4, ramp=0.3)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.fixture(scope="module")
def whole(root) -> Path:
    return train_decoder(decoding(root, "whole", ema=0.5)).folder


def test_only_the_latent_decoder_changes_and_the_model_holds_no_discriminator(root, whole):
    last = complete_checkpoints(whole)[-1]
    before, after = load_file(root / "base" / "model.safetensors"), load_file(last / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) != name.startswith("latent_decoder."), name
    state = saved_state(last)
    assert any(name.startswith("/model/discriminator.heads.") for name in state)
    assert all(name.startswith(("/model/latent_decoder.", "/model/discriminator.heads.")) for name in state if name.startswith("/model/"))
    image = torch.zeros(1, 3, 32, 32)
    one, other = openvision3.load(root / "base", device="cpu"), openvision3.load(whole, device="cpu")
    assert torch.equal(one.encode(image), other.encode(image)) and not torch.equal(one.reconstruct(image), other.reconstruct(image))


def test_the_exported_model_says_where_it_comes_from_and_keeps_what_stays_valid(root, whole):
    last = complete_checkpoints(whole)[-1]
    record = read_config(last).training
    assert record["trained"] == "the latent decoder alone" and record["tau"] == 0.8
    assert record["adversarial"] == {"weight": 0.5, "from_step": 3}
    assert record["started_from"] == {"name": str(root / "base"), **read_config(root / "base").training}
    assert (last / FAMILIARITY).read_bytes() == (root / "base" / FAMILIARITY).read_bytes()
    joined = fingerprint.recorded(last)
    assert joined is not None and joined.samples == 19 and joined.data == (str(root / "train"), str(root / "more"))


def test_the_losses_are_logged_as_the_stages_come(whole):
    rows = [row for row in metrics(whole) if "train/loss" in row]
    assert all("train/discriminator" in row for row in rows)
    assert [row.get("train/adversarial_factor", 0.0) > 0 for row in rows] == [False] * 3 + [True] * 4
    assert not any(name.endswith(("squares", "caption", "contrastive")) for row in rows for name in row)
    for row in rows:
        reconstruction = row["train/pixel"] + 0.4 * row["train/latent"] + 0.5 * row["train/perceptual"]
        players = row.get("train/discriminator", 0.0) + row.get("train/adversarial_factor", 0.0) * row.get("train/adversarial", 0.0)
        assert row["train/loss"] == pytest.approx(reconstruction + players, rel=1e-4)
    assert all(row["val/noisy_psnr"] < row["val/psnr"] + 1 for row in metrics(whole) if "val/psnr" in row)


def test_images_without_captions_train_it_as_those_with_captions_do(root, whole):
    """ImageNet has classes alone, and nothing that trains here reads a text."""
    for name in ("more", "held"):
        for path in (root / name).rglob("*.png"):
            copy = root / "no words" / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    wordless = train_decoder(decoding(root, "wordless", ema=0.5, data=(str(root / "no words" / "more"),), val=(str(root / "no words" / "held"),))).folder
    one, other = (load_file(complete_checkpoints(run)[-1] / "model.safetensors") for run in (whole, wordless))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert [row["val/noisy_psnr"] for row in metrics(wordless) if "val/noisy_psnr" in row]


@pytest.mark.parametrize("step", [2, 5])
def test_a_crash_before_the_adversarial_loss_or_with_it_leaves_no_trace_though_the_first_model_has_moved(root, whole, monkeypatch, step):
    base = shutil.copytree(root / "base", root / f"base-{step}")
    config = decoding(root, f"broken-{step}", ema=0.5, init=str(base), save_every=1 if step == 2 else 3)
    with monkeypatch.context() as patched, pytest.raises(Crash):
        crash_at(patched, step)
        train_decoder(config)
    shutil.rmtree(base)
    config.resume = True
    train_decoder(config)
    if step == 5:
        assert_same_run(whole, config.out)
    last = complete_checkpoints(config.out)[-1]
    assert (last / "model.safetensors").read_bytes() == (complete_checkpoints(whole)[-1] / "model.safetensors").read_bytes()
    assert (last / FAMILIARITY).is_file() and fingerprint.recorded(last).samples == 19  # type: ignore[union-attr]


def test_micro_batches_play_as_the_whole_batch_does(root, whole):
    """Of micro-batches of one row, half have no image for the discriminator. Adam makes steps of rounding where a gradient is near zero."""
    parted = train_decoder(decoding(root, "parted", ema=0.5, micro_batch=1)).folder
    for one, other in zip(metrics(whole), metrics(parted), strict=True):
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=0.1 if name == "train/grad_norm" else 5e-3, abs=1e-5), name


def test_in_the_warm_up_the_latent_decoder_learns_nothing_from_the_discriminator(root):
    runs = []
    for name, weight in (("plain", 0.0), ("warm", 0.5)):
        config = decoding(root, name, steps=2, adversarial=AdversarialConfig(weight=weight, warmup=0.9))
        config.optimizer.clip = 1e9  # one norm of both players' gradients is clipped
        runs.append(train_decoder(config).folder)
    one, other = (load_file(complete_checkpoints(run)[-1] / "model.safetensors") for run in runs)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert "adversarial" not in read_config(complete_checkpoints(runs[0])[-1]).training
    assert not any("discriminator" in name for row in metrics(runs[0]) for name in row)


def noisy_decoding(**loss) -> NoisyDecoding:
    config = tiny_config(lambda_perceptual=0.5, omega_und=0.0, encoder_learns_from="nothing", **loss)
    torch.manual_seed(0)
    model = NoisyDecoding(config, tiny_vae(), VOCABULARY, PAD, module.hub.load_distance(config.loss), FeatureDiscriminator())
    model.init_weights()
    model.discriminating = model.measuring = True
    return model.train()


def test_one_backward_pass_gives_both_players_their_own_gradients():
    model, rows = noisy_decoding(), batch()
    model.adversarial_factor = 3.0
    model(rows)[0].backward()
    both = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[0] for name in both} == {"latent_decoder", "discriminator"}
    model.zero_grad()
    model.adversarial_factor = 0.0
    model(rows)[0].backward()
    alone = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    for name in both:
        assert torch.allclose(both[name], alone[name], rtol=1e-4, atol=1e-7) == name.startswith("discriminator."), name
    rebuilt = model.vae.decode(model.latent_decoder(_noisy_tokens(model, rows), (2, 2)))
    (adversarial,) = torch.autograd.grad(model.discriminator(rows["images"], rebuilt, torch.tensor(4))[1], model.latent_decoder.linear.weight)
    name = "latent_decoder.linear.weight"
    torch.testing.assert_close(both[name], alone[name] + 3 * adversarial, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size", [2, 1])
def test_gradients_and_measured_squares_of_micro_batches_add_up_to_those_of_the_batch(size):
    model = noisy_decoding()
    model.adversarial_factor = 3.0
    rows = batch() | {"pixel_rows": torch.tensor([0, 2])}
    loss, parts = model(rows)
    loss.backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    pieces = [{name: value[i : i + size] for name, value in batch().items()} for i in range(0, 4, size)]
    for number, piece in enumerate(pieces):
        piece["pixel_rows"] = torch.tensor([row - number * size for row in (0, 2) if row // size == number], dtype=torch.long)
    sums = dict.fromkeys(parts, 0.0)
    for piece in model.prepare(pieces):
        loss, of_piece = model(piece)
        loss.backward()
        assert of_piece.keys() == parts.keys()
        sums = {name: total + of_piece[name].item() for name, total in sums.items()}
    assert sums == pytest.approx({name: value.item() for name, value in parts.items()}, rel=1e-4)
    for name, parameter in model.named_parameters():
        if name in whole:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-3, atol=1e-6, msg=name)


def test_the_measured_squares_are_those_of_the_gradients_on_the_rebuilt_latents():
    model, rows = noisy_decoding(), batch()
    _, parts = model(rows)
    x = rows["images"]
    z = model.vae.encode(x)
    z_hat = model.latent_decoder(_noisy_tokens(model, rows), (2, 2)).detach().requires_grad_()
    x_hat = model.vae.decode(z_hat)
    reconstruction = (x - x_hat).abs().mean() + 0.4 * (z - z_hat).abs().mean() + 0.5 * model._distance[0](x, x_hat)
    reconstruction = model.config.loss.omega_rec * reconstruction
    for name, loss in (("reconstruction", reconstruction), ("adversarial", model.discriminator(x, x_hat, torch.tensor(4))[1])):
        (gradient,) = torch.autograd.grad(loss, z_hat, retain_graph=True)
        assert parts[f"{name}_squares"].item() == pytest.approx(gradient.square().sum().item(), rel=1e-3), name


def _noisy_tokens(model: NoisyDecoding, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return add_noise(model.encode(rows["images"]), model.config.loss.tau, rows["draw_key"])


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_stage_that_diverges_is_given_up_once_and_training_continues(root, monkeypatch):
    monkeypatch.setattr("openvision3.train.adversarial.LEAST", 1)
    stage = AdversarialConfig(weight=1e4, largest=1e6, warmup=0.15, ramp=0.0, limit=1.01)
    config = decoding(root, "diverging", adversarial=stage, steps=9)
    config.optimizer.learning_rate = 0.1
    folder = train_decoder(config).folder
    log = (folder / "log.txt").read_text()
    assert log.count("training continues without the discriminator") == 1 and "the reconstruction loss rose from" in log
    ended = read_config(complete_checkpoints(folder)[-1]).training["adversarial"]["ended_at_step"]
    rows = [row for row in metrics(folder) if "train/loss" in row]
    assert ["train/discriminator" in row for row in rows] == [step < ended for step in range(9)] and ended < 9


def test_a_discriminator_that_is_not_finite_costs_three_steps_and_not_the_run(root, monkeypatch):
    forward = FeatureDiscriminator.forward
    monkeypatch.setattr(FeatureDiscriminator, "forward", lambda self, *inputs: tuple(loss * torch.nan for loss in forward(self, *inputs)))
    outcome = train_decoder(decoding(root, "nan", steps=9))
    rows = [row for row in metrics(outcome.folder) if "skipped_steps" in row]
    assert (outcome.status, rows[-1]["skipped_steps"]) == ("finished", 3)
    log = (outcome.folder / "log.txt").read_text()
    assert log.count("3 steps in a row were not finite; training continues without the discriminator") == 1
    config = decoding(root, "nan", steps=9, resume=True)
    shutil.rmtree(complete_checkpoints(config.out)[-1])
    assert train_decoder(config).steps == 9  # from a checkpoint of a discriminator that never learnt


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--init", ""], "the model whose latent decoder is trained is not named; name a shipped model"),
        (["--decoder-finish", "0.2"], "decoder_finish 0.2: the latent decoder trains alone in all steps; leave it at 0"),
        (["--pixel-share", "0", "--model.loss.lambda-perceptual", "0", "--adversarial.weight", "1"], "adversarial.weight 1 needs images to compare"),
        (["--noise", "-1"], "noise -1.0 must be a number that is not negative"),
        (["--model.latent-decoder.size", "B"], "was trained with latent_decoder.size tiny, not B: its weights mean something else here"),
        (["--init", "minni"], "Did you mean 'mini'?"),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_written(root, tmp_path, capsys, words, line):
    data = ["--data", str(root / "more"), "--val", str(root / "held"), "--size", "32"]
    assert main(["train", "latent_decoder", "--init", str(root / "base"), *data, "--out", str(tmp_path / "run"), *words]) == 2
    said = capsys.readouterr().err
    assert line in said and not (tmp_path / "run").exists()


def test_the_recipe_takes_the_settings_of_the_model_that_init_names(root):
    config = latent_decoder(str(root / "base"))
    saved = read_config(root / "base")
    assert (config.model.encoder, config.model.latent_decoder, config.size) == (saved.model.encoder, saved.model.latent_decoder, saved.size)
    with pytest.raises(ValueError, match="name a shipped model, a model folder, a run or peer:NAME with --init"):
        DecoderConfig()


# -- real processes ------------------------------------------------------------------------------------------------------

DRIVER = """
import os, signal, sys
from openvision3 import cli
from openvision3.train.run_folder import RunFolder
step, argv = int(sys.argv[1]), sys.argv[2:]
sys.argv = ["openvision3", *argv]
advance = RunFolder.advance
def at_step(self, done):
    if done == step:
        os.kill(os.getpid(), signal.SIGKILL)
    advance(self, done)
RunFolder.advance = at_step
sys.exit(cli.main(argv))
"""


def command(root: Path, out: str, *more: str) -> list[str]:
    return [
        *("train", "latent_decoder", "--init", str(root / "base"), "--data", str(root / "more"), "--val", str(root / "held"), "--size", "32"),
        *("--batch", "4", "--steps", "7", "--precision", "fp32", "--pixel-share", "0.5", "--log-every", "1", "--save-every", "3", "--eval-every", "4"),
        *("--adversarial.weight", "0.5", "--adversarial.warmup", "0.4", "--adversarial.ramp", "0.3"),
        *("--optimizer.warmup-steps", "2", "--device", "cpu", "--out", str(root / out), *more),
    ]


def run(words: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_a_killed_process_that_goes_on_equals_one_that_was_not(root):
    whole = run(["-m", "openvision3", *command(root, "process")])
    assert whole.returncode == 0, whole.stderr[-3000:]
    killed = run(["-c", DRIVER, "5", *command(root, "killed")])
    assert killed.returncode == -signal.SIGKILL
    resumed = run(["-m", "openvision3", "train", "latent_decoder", "--out", str(root / "killed"), "--resume"])
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert_same_run(root / "process", root / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--parallel", "replicate"], ["--parallel", "fsdp", "--micro-batch", "1"]], ids=["copies", "shards"])
def test_two_processes_play_as_one_does(root, more):
    out = f"two-{more[1]}"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for words in (["-m", "openvision3", *command(root, f"one-{more[1]}")], [*torchrun, "-m", "openvision3", *command(root, out, *more)]):
        done = run(words)
        assert done.returncode == 0, done.stderr[-3000:]
    for one, other in zip(metrics(root / f"one-{more[1]}"), metrics(root / out), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=0.1 if name == "train/grad_norm" else 5e-3, abs=1e-5), (one["step"], name)
    config = load_config(DecoderConfig, root / out / "config.json")
    assert config.adversarial.weight == 0.5
