"""The script that makes the embedded VAE: it trains, goes on after a signal, and leaves a folder that the model can use."""

import importlib.util
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from openvision3.data import openmoji
from openvision3.data.images import to_tensor
from openvision3.data.names import DataOptions, open_source
from openvision3.hub import load_vae

SCRIPT = Path(__file__).parents[2] / "tools" / "train_embedded_vae.py"
NARROW = {
    "encoder_block_out_channels": [32] * 4,
    "decoder_block_out_channels": [32] * 4,
    "num_encoder_blocks": [0, 1, 1, 1],
    "num_decoder_blocks": [1, 1, 1, 0],
}


def start(out: Path, *more: str) -> subprocess.Popen:
    settings = ["--batch", "4", "--size", "32", "--save-every", "5", "--architecture", json.dumps(NARROW), "--out", str(out)]
    return subprocess.Popen([sys.executable, str(SCRIPT), *settings, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_texture_stands_in_for_an_unreadable_image_and_is_told_from_others(tmp_path):
    spec = importlib.util.spec_from_file_location("train_embedded_vae", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for name, data, stands_in in (("cut", whole[: len(whole) // 2], True), ("whole", whole, False)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "0.png").write_bytes(data)
        (folder / "0.txt").write_text("a red square")
        dataset = script.TrainingPictures(open_source((str(folder),), DataOptions()), [], 32, 0, 0.0)
        pixels, is_texture = dataset[0]
        assert pixels.shape == (3, 32, 32) and is_texture is stands_in


@pytest.mark.slow
def test_a_vae_that_was_stopped_goes_on_and_ends_with_latents_of_unit_variance(tmp_path):
    process = start(tmp_path, "--steps", "1000000")
    while process.poll() is None and not (tmp_path / "metrics.jsonl").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 75, said
    done = torch.load(tmp_path / "state.pt", weights_only=True)["step"]
    process = start(tmp_path, "--steps", str(done + 20), "--cooldown", "10")
    said, _ = process.communicate()
    assert process.returncode == 0 and f"going on from step {done}" in said, said

    vae = load_vae(tmp_path / "ema")
    assert (vae.latent_channels, vae.stride) == (16, 8)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == done + 20 and rows[-1]["openmoji"] > rows[0]["openmoji"]
    drawings = torch.stack([to_tensor(openmoji.draw(e.character, 32)) for e in openmoji.load_emoji().train[::60]])
    assert vae.encode(drawings).std().item() == pytest.approx(1, abs=0.3)


@pytest.mark.slow
def test_a_held_out_shard_is_not_trained_on_whichever_way_it_is_named(tmp_path):
    (tmp_path / "held" / "pictures").mkdir(parents=True)
    shard = tmp_path / "held" / "pictures" / "val-0000.tar"
    Image.new("RGB", (16, 16), "red").save(tmp_path / "0.jpg")
    with tarfile.open(shard, "w") as tar:
        tar.add(tmp_path / "0.jpg", "0.jpg")
    for data in (["openmoji", str(shard)], [str(shard.parent)]):
        process = start(tmp_path / "out", "--data", *data, "--held-out", str(tmp_path / "held"))
        said, _ = process.communicate()
        assert process.returncode == 2 and "val-0000.tar is held out and cannot be trained on" in said.splitlines()[-1], said
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--only", "source"], "only 'source' must look like name=value"),
        (["--data", "/nowhere"], "no such data: /nowhere"),
        (["--architecture", "{"], "is not a JSON object"),
        (["--batch", "0"], "batch 0"),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_written(tmp_path, settings, words):
    process = start(tmp_path / "out", *settings)
    said, _ = process.communicate()
    assert process.returncode == 2 and words in said.splitlines()[-1] and "Traceback" not in said, said
    assert not (tmp_path / "out").exists()
