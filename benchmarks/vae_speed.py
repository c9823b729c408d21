"""The embedded VAE at 128 px: images a second, compared with TAESD's shape: `python benchmarks/vae_speed.py`.

Aim: at least 70 images/s decoded in bf16 on two cores with AMX. bf16 is left out where the processor only imitates it
(then it is many times slower than fp32).
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import diffusers
import torch
import tyro

from openvision3.device import choose_precision
from openvision3.hub import load_vae
from openvision3.model.vae import VAE


def taesd_shape(dtype: torch.dtype) -> VAE:
    """TAESD with 16 latent channels, random weights: the yardstick of one run."""
    return VAE(diffusers.AutoencoderTiny(latent_channels=16), dtype=dtype)


def rate(function, count: int, runs: int = 5) -> float:
    function()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return count / statistics.median(times)


def main(batch: int = 32) -> None:
    images = torch.rand(batch, 3, 128, 128) * 2 - 1
    fastest, why = choose_precision("auto", "cpu")
    print(f"threads {torch.get_num_threads()}, batch {batch}, 128 px; {why}")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if name == "bf16" and fastest == "fp32":
            print("bf16: not measured, this processor has no instructions for it")
            continue
        rates: dict[str, dict[str, float]] = {}
        for shape, vae in (("embedded", load_vae("embedded", dtype=dtype)), ("TAESD's shape", taesd_shape(dtype))):
            latents = vae.encode(images)
            wanted = latents.clone().requires_grad_()
            rates[shape] = {
                "encode": rate(lambda vae=vae: vae.encode(images), batch),
                "decode": rate(lambda vae=vae, latents=latents: vae.decode(latents), batch),
                "decode + gradient to latents": rate(lambda vae=vae, wanted=wanted: vae.decode(wanted).sum().backward(), batch),
            }
        for part, value in rates["embedded"].items():
            other = rates["TAESD's shape"][part]
            print(f"{name} {part:30s} {value:7.1f} images/s   TAESD's shape {other:7.1f}   ratio {value / other:.2f}x")


if __name__ == "__main__":
    tyro.cli(main, description=Path(__file__).read_text().split('"""')[1])
