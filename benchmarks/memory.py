"""Peak memory of real steps, each in a fresh process: `python benchmarks/memory.py [--help]`.

- contrast: one step of the mini model on 8,192 pairs in micro-batches, every pair against all others (aim: within 4 GB resident).
- base: what one more sample takes in the forward and backward pass at the paper's base size with a VAE of FLUX.1's shape, at 128 px (low_res)
  and 256 px (high_res, with a perceptual term): half of peak(batch 4) - peak(batch 2), so that weights and gradients fall out. On a GPU the
  peak is what torch has allocated, elsewhere the resident size of the process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import tyro
from step_speed import VOCABULARY, a_batch, a_model, flux_shaped, levers
from torch import Tensor

from openvision3.device import choose_device, choose_precision, dtype_of
from openvision3.hub import load_vae
from openvision3.model.vae import VAE
from openvision3.train.loop import backward, peak_memory
from openvision3.train.optimizer import Optimizers
from openvision3.train.recipes import RECIPES


@dataclass
class Options:
    what: Literal["all", "contrast", "base"] = "all"
    pairs: int = 8192
    micro_batch: int = 64
    size: int = 128
    """side of the images of `contrast`"""
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    checkpointing: bool = False
    """of `base`: blocks without kept activations"""
    child: str = ""
    """one measurement, in this process; set by the script itself"""
    batch: int = 1


def pieces(options: Options, batch: dict[str, Tensor], count: int) -> Iterator[dict[str, Tensor]]:
    """Micro-batches as from a cache of latents, made one at a time; every one with other rows."""
    config = RECIPES["mini"]()
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        rows = {name: value[torch.randperm(len(value), generator=generator)] for name, value in batch.items()}
        latents = torch.randn(len(rows["images"]), 16, options.size // 8, options.size // 8, generator=generator).bfloat16()
        yield levers(rows, latents, round(1 / config.pixel_share))


def contrast(options: Options, device: str, precision: str) -> dict[str, float]:
    config = RECIPES["mini"]()
    model = a_model(config, load_vae("embedded", dtype=dtype_of(precision)), VOCABULARY["mini"], device)
    optimizers = Optimizers(model, config.optimizer, dtype_of(precision))
    count = options.pairs // options.micro_batch
    batch = a_batch(config, VOCABULARY["mini"], options.micro_batch, options.size)
    before, start = peak_memory(device), time.perf_counter()
    batches = ({name: value.to(device) for name, value in piece.items()} for piece in pieces(options, batch, count))
    _, losses = backward(model, batches, count, device, precision)
    optimizers.step()
    return {"before": before, "peak": peak_memory(device), "seconds": time.perf_counter() - start, "contrastive": losses["contrastive"].item()}


def base(options: Options, device: str, precision: str) -> dict[str, float]:
    from openvision3.distributed import wrap_blocks

    config = RECIPES["base_low_res"]()
    if options.size == 256:
        config.model.loss.lambda_perceptual = 0.5  # the network that needs no file; VGG's activations are about twice as large
    model = a_model(config, VAE(flux_shaped(), dtype=dtype_of(precision)), VOCABULARY["base_low_res"], device)
    wrap_blocks(model, options.checkpointing, False)
    batch = {name: value.to(device) for name, value in a_batch(config, VOCABULARY["base_low_res"], options.batch, options.size).items()}
    backward(model, iter([batch]), 1, device, precision)
    return {"peak": peak_memory(device)}


def measure(options: Options, child: str, size: int, batch: int = 1) -> dict[str, float]:
    """In a fresh process."""
    words = [f"--child={child}", f"--size={size}", f"--batch={batch}"]
    words += [f"--{f.name.replace('_', '-')}={getattr(options, f.name)}" for f in fields(options) if f.name in ("pairs", "micro_batch", "device", "precision")]
    words += ["--checkpointing"] if options.checkpointing else []
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(options: Options) -> None:
    device = choose_device(options.device)
    precision, why = choose_precision(options.precision, device)
    if options.child:
        print(json.dumps({"contrast": contrast, "base": base}[options.child](options, device, precision)))
        return
    options.precision = precision
    print(f"{device}, {precision} ({why})", flush=True)
    if options.what in ("all", "contrast"):
        result = measure(options, "contrast", options.size)
        print(
            f"{options.pairs:,} pairs at mini scale, micro-batches of {options.micro_batch}, {options.size} px: peak {result['peak'] / 1e9:.2f} GB "
            f"({result['before'] / 1e9:.2f} before the step), {result['seconds']:.0f} s, contrastive loss {result['contrastive']:.3f}",
            flush=True,
        )
    if options.what in ("all", "base"):
        for size in (128, 256):
            two, four = (measure(options, "base", size, batch)["peak"] for batch in (2, 4))
            print(f"base at {size} px: {(four - two) / 2e9:.2f} GB a sample, {two / 1e9:.2f} GB with two", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=Path(__file__).read_text().split('"""')[1]))
