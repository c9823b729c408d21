"""The embedded VAE at 128 px: images a second and the ratio bf16 / fp32: `python benchmarks/vae_speed.py`.

Aim: at least 70 images/s decoded in bf16 on two cores with AMX.
"""

from __future__ import annotations

import statistics
import time

import torch

from openvision3.model.vae import VAE


def rate(function, count: int, runs: int = 7) -> float:
    function()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return count / statistics.median(times)


def main(batch: int = 32) -> None:
    images = torch.rand(batch, 3, 128, 128) * 2 - 1
    found: dict[tuple[str, str], float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        vae = VAE.load("embedded", dtype=dtype)
        latents = vae.encode(images)
        with torch.no_grad():
            found["encode", name] = rate(lambda vae=vae: vae.encode(images), batch)
            found["decode", name] = rate(lambda vae=vae, latents=latents: vae.decode(latents), batch)
        wanted = latents.clone().requires_grad_()
        found["decode + gradient to latents", name] = rate(lambda vae=vae, wanted=wanted: vae.decode(wanted).sum().backward(), batch)
    print(f"threads {torch.get_num_threads()}, batch {batch}, 128 px")
    for part in ("encode", "decode", "decode + gradient to latents"):
        print(f"{part:30s} bf16 {found[part, 'bf16']:7.1f} images/s   fp32 {found[part, 'fp32']:7.1f}   ratio {found[part, 'bf16'] / found[part, 'fp32']:.2f}x")


if __name__ == "__main__":
    main()
