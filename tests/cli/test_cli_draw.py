"""From labelled images to scored samples by the commands of docs/generation.md: the paper's protocol on a tiny set."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_generator import tokens_folder

from openvision3.cli import main


def images(root, name: str, count: int):
    from PIL import Image

    for number, label in enumerate(("apple", "banana", "cherry")):
        (root / name / label).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 36), (80 * number, 20 * i, 100)).save(root / name / label / f"{i}.png")
    return str(root / name)


@pytest.mark.slow
def test_a_generator_of_the_papers_recipe_is_trained_by_label_drawn_from_and_scored(tmp_path, capsys):
    train, val = images(tmp_path, "train", 8), images(tmp_path, "val", 2)
    run, scores = str(tmp_path / "run"), tmp_path / "scores"
    network = ["--dit.width", "64", "--dit.depth", "2", "--dit.heads", "2", "--dit.head-width", "64", "--dit.head-depth", "1", "--dit.head-heads", "2"]
    short = ["--size", "32", "--batch", "4", "--steps", "3", "--workers", "0", "--statistics", "12", "--precision", "fp32", "--device", "cpu"]
    assert main(["train", "imagenet_dit_b", "--tokens", tokens_folder(tmp_path), "--data", train, "--val", val, *network, *short, "--out", run]) == 0
    assert main(["generate", "--label", "banana", "2", "--model", run, "--steps", "3", "--out", str(tmp_path / "drawn.png")]) == 0
    evaluate = ["evaluate", "generation", run, "--data", val, "--train", train, "--count", "7", "--steps", "3", "--guidance", "2", "--out", str(scores)]
    assert main(evaluate) == 0
    told = capsys.readouterr().out
    assert "KID on EfficientNet-Lite0 features" in told and "guidance 2" in told
    with np.load(scores / "samples.npz") as samples:
        assert samples["arr_0"].shape == (7, 32, 32, 3) and samples["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (record["condition"], record["flow"]["predict"], record["ema"], record["optimizer"]["schedule"]) == ("label", "velocity", 0.9995, "flat")
