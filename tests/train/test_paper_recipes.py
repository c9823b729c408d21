"""The paper's own recipes at full width: real steps of both phases, with a VAE of FLUX.1's shape and a vocabulary of bert's size."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from shapes import FLUX
from small_runs import metrics, pictures

from openvision3 import cli
from openvision3.cli.train import configure_run
from openvision3.data.text import TextTokenizer
from openvision3.hub import complete_checkpoints, find_folder, read_config
from openvision3.train.recipes import IN_TURN, RECIPES, base_low_res, kept_at_another_batch

BERT_WORDS = 30_522


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """What a user brings: images with two captions, `flux` in diffusers' layout (random weights), `bert.json`."""
    root = tmp_path_factory.mktemp("paper")
    pictures(root / "train", 6)
    pictures(root / "held", 2, seed=1)
    torch.manual_seed(0)
    diffusers.AutoencoderKL(**FLUX).save_pretrained(root / "flux")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "blue", "dark", "light"]
    vocabulary = {word: number for number, word in enumerate(words + [f"word{i}" for i in range(BERT_WORDS - len(words))])}
    TextTokenizer._word_piece(vocabulary).save(str(root / "bert.json"))
    return root


def fields(files: Path, out: Path, steps: int = 1) -> list[str]:
    return [
        *("--data", str(files / "train"), "--val", str(files / "held"), "--tokenizer", str(files / "bert.json")),
        *("--model.vae.name", str(files / "flux"), "--batch", "4", "--steps", str(steps), "--optimizer.warmup-steps", "1", "--log-every", "1"),
        *("--model.loss.perceptual", "efficientnet", "--workers", "0", "--precision", "fp32", "--device", "cpu", "--out", str(out)),
    ]


@pytest.mark.slow
def test_paper_base_runs_both_phases_at_full_width_the_second_from_the_weights_of_the_first(files, tmp_path):
    assert cli.main(["train", "paper_base", *fields(files, tmp_path / "run")]) == 0
    first, second = tmp_path / "run" / "base_low_res", tmp_path / "run" / "base_high_res"
    config = json.loads((second / "config.json").read_text())
    assert (config["size"], config["init"], config["model"]["loss"]["lambda_perceptual"]) == (256, str(first), 0.5)
    for run, parts in ((first, 5), (second, 6)):
        rows = [row for row in metrics(run) if "train/loss" in row]
        assert [row["step"] for row in rows] == [1]
        assert len([name for name in rows[0] if name.startswith("train/") and name != "train/grad_norm"]) == parts
    saved = read_config(complete_checkpoints(second)[-1])
    assert saved.model.encoder.size == saved.model.latent_decoder.size == "B" and saved.vae["latent_channels"] == 16
    assert saved.training["started_from"]["recipe"] == "base_low_res"


@pytest.mark.slow
def test_base_low_res_runs_in_two_sharded_processes(files, tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "openvision3", "train", "base_low_res"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*start, *fields(files, tmp_path / "run", 2)], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes, fsdp: 2 of 4 rows each" in (tmp_path / "run" / "log.txt").read_text()
    assert [row["step"] for row in metrics(tmp_path / "run") if "train/loss" in row] == [1, 2]


def test_the_papers_recipes_hold_its_table_1():
    low, high = RECIPES["base_low_res"](), RECIPES["base_high_res"]()
    assert (low.size, low.batch, low.steps, low.optimizer.warmup_steps) == (128, 8192, 625_000, 6_250)
    assert low.optimizer.learning_rate == pytest.approx(2.56e-4) and high.optimizer.learning_rate == pytest.approx(6.4e-6)
    assert (high.size, high.batch, high.steps, high.optimizer.warmup_steps) == (256, 4096, 125_000, 6_250)
    for config in (low, high):
        loss = config.model.loss
        assert (loss.beta, loss.alpha, loss.omega_rec, loss.omega_und, config.model.encoder.size) == (0.4, 1.0, 0.5, 1.0, "B")
    assert (low.model.loss.lambda_perceptual, high.model.loss.lambda_perceptual) == (0.0, 0.5)
    large = RECIPES["large_low_res"]()
    assert (large.model.encoder.size, large.model.latent_decoder.size) == ("L", "B")


def test_both_phases_have_the_same_parts_so_that_the_weights_of_the_first_fit():
    for recipes in IN_TURN.values():
        first, second = (recipe().model for recipe in recipes)
        assert (first.encoder, first.latent_decoder, first.text_encoder, first.captioner) == (
            *(second.encoder, second.latent_decoder),
            *(second.text_encoder, second.captioner),
        )


@pytest.mark.parametrize("missing, named", [("--tokenizer", "bert-base-uncased"), ("--model.vae.name", "FLUX.1-schnell")])
def test_the_papers_recipes_name_the_file_that_they_lack(tmp_path, capsys, monkeypatch, missing, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    TextTokenizer.train(["red green"], 100).save(tmp_path / "bert.json")
    pictures(tmp_path / "train", 3)
    pictures(tmp_path / "held", 2)
    given = {"--tokenizer": "bert.json", "--model.vae.name": "embedded"}
    del given[missing]
    command = ["train", "base_low_res", "--data", "train", "--val", "held", "--batch", "2", "--steps", "1", "--device", "cpu"]
    assert cli.main([*command, *(word for pair in given.items() for word in pair)]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_size_for_both_phases_is_refused(capsys):
    assert cli.main(["train", "paper_base", "--size", "224"]) == 2
    assert "run base_low_res and then base_high_res by themselves" in capsys.readouterr().err


def test_what_would_end_the_second_phase_ends_the_first_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TextTokenizer.train(["red green"], 100).save(tmp_path / "bert.json")
    pictures(tmp_path / "train", 3)
    pictures(tmp_path / "held", 2)
    command = ["train", "paper_base", "--data", "train", "--val", "held", "--batch", "4", "--steps", "1", "--device", "cpu"]
    assert cli.main([*command, "--tokenizer", "bert.json", "--model.vae.name", "embedded"]) == 2
    assert "vgg16-397923af.pth" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("high_res")])
def test_high_res_starts_from_low_res_and_names_the_run_that_it_lacks(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "train", 3)
    pictures(tmp_path / "held", 2)
    command = ["train", name, "--data", "train", "--val", "held", "--batch", "8", "--micro-batch", "0", "--device", "cpu"]
    command += ["--model.vae.name", "embedded", "--model.loss.lambda-perceptual", "0", "--model.encoder.size", "tiny"]
    assert cli.main(command) == 2
    assert f"runs/{name.replace('high', 'low')}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_other_size_of_high_res_is_one_field(tmp_path):
    config = configure_run("base_high_res", ["--size", "224"])
    assert (config.size, config.batch, config.init) == (224, 4096, "runs/base_low_res")


def test_the_command_that_is_shown_for_the_paper_fits_its_devices(capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    [devices, micro_batch] = re.findall(r"nproc-per-node (\d+) .*paper_base .*--micro-batch (\d+)", readme)[0]
    for gpus in (f"{devices}xh100", "64xh100"):
        assert cli.main(["estimate", "paper_base", "--gpus", gpus, "--micro-batch", micro_batch, "--json"]) == 0
        for phase in json.loads(capsys.readouterr().out):
            assert phase["fits"], (phase["recipe"], gpus, phase["memory_total"])


def test_another_batch_says_what_stays_as_the_recipe_has_it_and_nothing_that_was_set():
    config = base_low_res()
    assert not kept_at_another_batch("base_low_res", config)
    config.batch = 4096
    line = kept_at_another_batch("base_low_res", config)
    assert line.startswith("batch 4,096, while base_low_res has 8,192;")
    assert line.endswith("rate 0.000256 (--optimizer.learning-rate), warm-up of 6,250 steps (--optimizer.warmup-steps), 625,000 steps (--steps)")
    config.steps *= 2
    config.optimizer.learning_rate /= 2
    assert kept_at_another_batch("base_low_res", config).endswith("its own batch: warm-up of 6,250 steps (--optimizer.warmup-steps)")
    config.optimizer.warmup_steps *= 2
    assert not kept_at_another_batch("base_low_res", config)
    assert not kept_at_another_batch("of one's own", config)


def test_a_run_from_a_model_has_the_parts_of_that_model_where_the_command_line_does_not_set_them():
    saved = read_config(find_folder("mini")).model
    recipe = RECIPES["tiny"]()
    config = configure_run("tiny", ["--init", "mini", "--model.encoder.size", "tiny"])
    assert config.model.encoder == replace(saved.encoder, size="tiny") and config.model.text_encoder == saved.text_encoder != recipe.model.text_encoder
    assert (config.model.loss, config.model.vae, config.model.captioner.token_share) == (recipe.model.loss, recipe.model.vae, 1.0)
    assert configure_run("tiny", ["--init", "runs/not_there_yet"]).model == recipe.model  # the run says that it is missing
