"""The script that makes the embedded VAE: it trains, goes on after a signal, and leaves a folder that the model can use."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from openvision3.model.vae import VAE

SCRIPT = Path(__file__).parent.parent / "tools" / "train_embedded_vae.py"
NARROW = {
    "encoder_block_out_channels": [32] * 4,
    "decoder_block_out_channels": [32] * 4,
    "num_encoder_blocks": [0, 1, 1, 1],
    "num_decoder_blocks": [1, 1, 1, 0],
}


def start(out: Path, *more: str) -> subprocess.Popen:
    settings = ["--batch", "4", "--size", "32", "--save-every", "5", "--architecture", json.dumps(NARROW), "--out", str(out)]
    return subprocess.Popen([sys.executable, str(SCRIPT), *settings, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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

    vae = VAE.load(tmp_path / "ema")
    assert (vae.latent_channels, vae.stride) == (16, 8)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == done + 20 and rows[-1]["openmoji"] > rows[0]["openmoji"]
    unscaled = float(said.rsplit("std ", 1)[1].split(";")[0])
    assert vae.scale * unscaled == pytest.approx(1, abs=0.01)
