"""One training step against a plain composition of the same parts: `python benchmarks/step_speed.py [--help]`.

`reference_step` is what a competent engineer writes first: diffusers' VAE without changes, every image encoded and decoded in every step, one
matrix of logits for each loss. Its losses equal ours. Ours also runs with its levers: the pixel loss on a share of the batch, latents from a
cache. All steps alternate in one run; the result is the median of the ratios, beside its ceiling: the ratio of the operations that torch
counts in both steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import diffusers
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from openvision3.device import choose_device, choose_precision, dtype_of
from openvision3.draws import draw_seed
from openvision3.estimate.planned import FLUX
from openvision3.hub import load_distance, load_vae
from openvision3.model.openvision3 import OpenVision3
from openvision3.model.reconstruction import add_noise
from openvision3.model.vae import VAE
from openvision3.train.config import PretrainConfig
from openvision3.train.loop import autocast, backward
from openvision3.train.optimizer import Optimizers
from openvision3.train.recipes import RECIPES

VOCABULARY = {"base_low_res": 30_524, "mini": 2_474}


@dataclass
class Options:
    recipe: Literal["base_low_res", "mini"] = "mini"
    """recipe of the model; base_low_res has a VAE of FLUX.1's shape with random weights, mini the embedded one"""
    vae: Literal["", "flux", "embedded"] = ""
    """a VAE other than the recipe's"""
    batch: int = 16
    size: int = 128
    runs: int = 5
    """measurements of each step, alternating with the others"""
    shares: tuple[int, ...] = (1, 2, 4, 8)
    """the inverse of the share of the batch with a pixel loss"""
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    micro_batch: int = 0
    compile: bool = False


def flux_shaped() -> diffusers.AutoencoderKL:
    """FLUX.1's autoencoder by its published config, with random weights."""
    return diffusers.AutoencoderKL.from_config(FLUX | {"scaling_factor": 0.3611, "shift_factor": 0.1159})


def a_model(config: PretrainConfig, vae: VAE, vocabulary: int, device: str) -> OpenVision3:
    torch.manual_seed(0)
    return OpenVision3(config.model, vae, vocabulary, distance=load_distance(config.model.loss)).init_weights().to(device).train()


def a_batch(config: PretrainConfig, vocabulary: int, batch: int, size: int) -> dict[str, Tensor]:
    """Random images, and captions of unlike lengths: row r lacks r of the recipe's positions, at most half of them."""
    generator = torch.Generator().manual_seed(0)
    text, caption = config.model.text_encoder.positions, config.model.captioner.positions
    text_ids = torch.randint(5, vocabulary, (batch, 2, text), generator=generator)
    caption_ids = torch.randint(5, vocabulary, (batch, caption), generator=generator)
    for row in range(batch):
        text_ids[row, :, text - row % (text // 2) :] = 0 if row % (text // 2) else text_ids[row, :, text - row % (text // 2) :]
        caption_ids[row, caption - 1 - row % (caption // 2) :] = 0
    return {
        "images": torch.rand(batch, 3, size, size, generator=generator) * 2 - 1,
        "text_ids": text_ids,
        "text_present": torch.ones(batch, 2, dtype=torch.bool),
        "caption_ids": caption_ids,
        "draw_key": torch.tensor([draw_seed(0, 0, row) for row in range(batch)]),
    }


def reference_step(model: OpenVision3, batch: dict[str, Tensor]) -> Tensor:
    """The paper's equations written down once: every row through the whole VAE, losses from whole matrices."""
    weights, network = model.config.loss, model.vae.network
    images = batch["images"]
    with torch.no_grad():
        posterior = network.encode(images.to(network.dtype))
        latents = (posterior.latent_dist.mean if hasattr(posterior, "latent_dist") else posterior.latents).float() * model.vae.scale
    tokens, pooled = model.encoder(latents)
    side = latents.shape[2] // model.config.encoder.patch
    latents_hat = model.latent_decoder(add_noise(tokens, weights.tau, batch["draw_key"]), (side, side))
    images_hat = network.decode((latents_hat.float() / model.vae.scale).to(network.dtype)).sample.float()
    reconstruction = F.l1_loss(images_hat, images) + weights.beta * F.l1_loss(latents_hat.float(), latents)

    image_embedding = F.normalize(pooled.float(), dim=-1)
    targets = torch.arange(len(images), device=images.device)
    contrastive = torch.zeros((), device=images.device)
    with torch.autocast(images.device.type, enabled=False):
        temperature = model.log_temperature.exp().clamp(max=100)
    for k in range(batch["text_ids"].shape[1]):
        text_embedding = F.normalize(model.text_encoder(batch["text_ids"][:, k]).float(), dim=-1)
        with torch.autocast(images.device.type, enabled=False):
            logits = temperature * image_embedding @ text_embedding.T
        contrastive = contrastive + (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2 / batch["text_ids"].shape[1]
    logits = model.captioner(tokens, batch["caption_ids"])[:, :-1]
    caption = F.cross_entropy(logits.flatten(0, 1).float(), batch["caption_ids"][:, 1:].flatten(), ignore_index=0)
    return weights.omega_rec * reconstruction + weights.omega_und * (caption + weights.alpha * contrastive)


def levers(batch: dict[str, Tensor], latents: Tensor, share: int) -> dict[str, Tensor]:
    """The batch as the cache and the share give it: latents for all rows, images for every share-th row."""
    rows = torch.arange(0, len(latents), share, device=latents.device)
    return {name: value for name, value in batch.items() if name != "images"} | {
        "latents": latents,
        "pixel_rows": rows,
        "pixel_images": batch["images"][rows],
    }


def flops(step: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def main(options: Options) -> None:
    """Measure, and print one line for each kind of step."""
    device = choose_device(options.device)
    precision, why = choose_precision(options.precision, device)
    config = RECIPES[options.recipe]()
    vocabulary = VOCABULARY[options.recipe]
    flux = options.vae == "flux" or (options.recipe == "base_low_res" and options.vae != "embedded")
    torch.manual_seed(0)
    vae = VAE(flux_shaped(), dtype=dtype_of(precision)) if flux else load_vae("embedded", shift=False, dtype=dtype_of(precision))
    model = a_model(config, vae, vocabulary, device)
    optimizers = Optimizers(model, config.optimizer, dtype_of(precision))
    batch = {name: value.to(device) for name, value in a_batch(config, vocabulary, options.batch, options.size).items()}
    latents = model.vae.encode(batch["images"]).bfloat16()
    print(f"{options.recipe}, VAE {'of FLUX.1s shape' if flux else 'embedded'}, {options.size} px, batch {options.batch}, {device}, {precision} ({why})")
    print(f"threads {torch.get_num_threads()}, {options.runs} runs of each in turn")

    def plain() -> float:
        with autocast(device, precision):
            loss = reference_step(model, batch)
        loss.backward()
        return _finish(loss)

    def ours(rows: dict[str, Tensor]) -> Callable[[], float]:
        def step() -> float:
            _, losses = backward(model, iter([rows]), 1, device, precision)
            return _finish(losses["loss"])

        return step

    def _finish(loss: Tensor) -> float:
        optimizers.step()
        optimizers.zero_grad()
        return loss.item()

    steps = {"reference": plain, "ours, levers off": ours(batch)}
    for share in options.shares:
        if share > 1:
            rows = torch.arange(0, options.batch, share, device=device)
            steps[f"ours, pixels 1/{share}"] = ours(batch | {"pixel_rows": rows})
        steps[f"ours, pixels 1/{share}, cached latents"] = ours(levers(batch, latents, share))

    optimizers.set_rate(0.0)  # the weights stay, so that every step gives the same loss
    first, second = steps["reference"](), steps["ours, levers off"]()
    print(f"loss of the reference {first:.6f}, of ours {second:.6f}")
    if abs(first - second) > (1e-4 if precision == "fp32" else 1e-2) * abs(first):
        raise SystemExit("the two steps do not compute the same loss")
    operations = {name: flops(step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.runs):
        print(f"turn {turn + 1} of {options.runs}", flush=True)
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    print(f"{'':38s} {'samples/s':>9s} {'ratio':>7s} {'lowest':>7s} {'highest':>7s} {'ceiling':>8s} {'reached':>8s} {'GFLOP':>8s}")
    for name, seconds in times.items():
        ratios = sorted(reference / own for reference, own in zip(times["reference"], seconds, strict=True))
        ceiling = operations["reference"] / operations[name]
        ratio = statistics.median(ratios)
        rate = options.batch / statistics.median(seconds)
        spread = f"{ratio:6.2f}x {ratios[0]:6.2f}x {ratios[-1]:6.2f}x"
        print(f"{name:38s} {rate:9.2f} {spread} {ceiling:7.2f}x {ratio / ceiling:7.0%} {operations[name] / options.batch / 1e9:8.1f}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=(Path(__file__).read_text().split('"""')[1])))
