"""A training step of a generator against a plain composition of the same parts, and drawing with guidance: `python benchmarks/dit_speed.py [--help]`.

`plain_error` is what a competent engineer writes first: every image through VAE and encoder in every step, and the DiT by torch's fused attention on the
same weights. Its losses equal ours. Ours also runs on cached latents. Drawing compares guidance in one batch of twice the rows with two passes. All kinds
alternate in one run; the result is the median of the ratios.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from openvision3.device import choose_device, choose_precision, dtype_of
from openvision3.draws import draw_seed, normal, uniform
from openvision3.generate import flow, rae
from openvision3.generate.dit import ROPE_BASE, Condition, DiT, DiTBlock, dit_config
from openvision3.generate.flow import Sampling
from openvision3.generate.recipes import RECIPES
from openvision3.generate.space import Moments, open_space
from openvision3.model.transformer import TransformerSize, rope_positions, rotate, sincos_positions
from openvision3.train.loop import autocast, backward
from openvision3.train.optimizer import Optimizers

CLASSES = 10


@dataclass
class Options:
    recipe: Literal["dit_tiny", "drawings_dit_tiny"] = "dit_tiny"
    """recipe of the network, drawn by label"""
    tokens: str = "mini"
    size: int = 64
    batch: int = 64
    drawn: int = 8
    """images drawn at once"""
    steps: int = 4
    """steps of the sampler"""
    runs: int = 5
    """measurements of each kind, alternating with the others"""
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"


def plain_block(block: DiTBlock, x: Tensor, condition: Tensor, rotation: Tensor) -> Tensor:
    """Modulated attention and MLP as the DiT's paper writes them."""
    a, b, c, d, e, f = block.modulation(F.silu(condition)).chunk(6, -1)
    own = block.attention
    h = F.rms_norm(x.float(), x.shape[-1:], block.norm_attention.weight, 1e-6) * (1 + b) + a
    q, k, v = own.qkv(h).unflatten(-1, (3, own.heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = rotate(own.norm_q(q), rotation).to(v.dtype), rotate(own.norm_k(k), rotation).to(v.dtype)
    x = x + c * own.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    h = F.rms_norm(x.float(), x.shape[-1:], block.norm_mlp.weight, 1e-6) * (1 + e) + d
    gate, value = block.mlp.fc_in(h).chunk(2, -1)
    return x + f * block.mlp.fc_out(F.silu(gate) * value)


def plain_dit(dit: DiT, noisy: Tensor, t: Tensor, grid: tuple[int, int], labels: Tensor) -> Tensor:
    """The network of trunk and head, drawn by label."""
    angles = 2 * math.pi * t[:, None] * dit.time.frequencies
    now = dit.time.fc_out(F.silu(dit.time.fc_in(torch.cat([angles.sin(), angles.cos()], -1))))[:, None]
    condition = F.silu(now + dit.labels(labels)[:, None])  # type: ignore[misc]
    x = dit.enter(noisy) + sincos_positions(*grid, dit.trunk_size.width, device=noisy.device)
    for block in dit.trunk:
        x = plain_block(block, x, condition, _rotation(dit.trunk_size, grid, noisy))
    if dit.head_size is not None:
        condition, x = dit.to_head(F.silu(x + now)), dit.enter_head(noisy)
        for block in dit.head:
            x = plain_block(block, x, condition, _rotation(dit.head_size, grid, noisy))
    shift, scale = dit.modulation(F.silu(condition)).chunk(2, -1)
    return dit.leave(F.rms_norm(x.float(), x.shape[-1:], dit.norm.weight, 1e-6) * (1 + scale) + shift).float()


def _rotation(size: TransformerSize, grid: tuple[int, int], x: Tensor) -> Tensor:
    return rope_positions(*grid, size.width // size.heads, ROPE_BASE, device=x.device)[:, 1:]


def plain_error(model: rae.RAE, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a batch of images, written down once."""
    with torch.no_grad():
        tokens = model.space.encode(model.space.vae.encode(batch["images"]))
        tokens = (tokens - model.statistics.mean) / (model.statistics.variance + 1e-5).sqrt()
    keys, settings = batch["draw_key"], model.config.flow
    t = flow.draw_times(keys, settings, model.shift)
    noise = normal(keys ^ rae._NOISE_STREAM, tokens[0].numel()).view(tokens.shape)
    labels = torch.where(uniform(keys ^ rae._DROP_STREAM, 1)[:, 0] < model.config.drop, model.dit.classes, batch["labels"])
    noisy = (1 - t[:, None, None]) * tokens + t[:, None, None] * noise
    prediction = plain_dit(model.dit, noisy, t, model.grid, labels)
    if settings.predict == "velocity":
        return F.mse_loss(prediction, noise - tokens)
    return ((prediction - tokens).square().mean((1, 2)) / t.clamp_min(settings.least_time).square()).mean()


def guided_in_two_passes(model: rae.RAE, noise: Tensor, condition: Condition, sampling: Sampling) -> Tensor:
    """As `RAE.draw`, with a pass for each of the two predictions."""
    alone = condition.with_dropped(torch.ones(len(noise), dtype=torch.bool, device=noise.device))

    def velocity(x: Tensor, now: float) -> Tensor:
        t = x.new_full((len(x),), now)
        return flow.guided(model._velocity(x, t, condition), model._velocity(x, t, alone), sampling.guidance)

    return model.statistics.restore(flow.integrate(velocity, noise, flow.time_grid(sampling, model.shift)))


def compare(kinds: dict[str, Callable[[], object]], images: int, runs: int, device: str) -> None:
    """One line for each kind: images/s, and the median, lowest and highest ratio to the first kind. A busy CPU is measured in processor seconds."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(runs):
        for name, kind in kinds.items():
            start = clock()
            kind()
            times[name].append(clock() - start)
    first = next(iter(times.values()))
    for name, seconds in times.items():
        ratios = sorted(one / own for one, own in zip(first, seconds, strict=True))
        print(f"{name:40s} {images / statistics.median(seconds):9.2f} {statistics.median(ratios):6.2f}x {ratios[0]:6.2f}x {ratios[-1]:6.2f}x")


def main(options: Options) -> None:
    device = choose_device(options.device)
    precision, why = choose_precision(options.precision, device)
    config = RECIPES[options.recipe]()
    config.tokens, config.size, config.condition = options.tokens, options.size, "label"
    config.dit = dit_config("tiny", qk_norm=True)  # with RAE's head, which the recipes leave out
    torch.manual_seed(0)
    model = rae.RAE(config, open_space(options.tokens, precision), CLASSES)
    model.dit.init_weights()
    for name, weight in model.dit.named_parameters():
        if name.endswith(("modulation.weight", "leave.weight")):
            torch.nn.init.normal_(weight, std=0.02)  # from zero, blocks and condition would do nothing
    model.to(device)
    images = torch.rand(options.batch, 3, options.size, options.size) * 2 - 1
    draw_key = torch.tensor([draw_seed(0, 0, row) for row in range(options.batch)])
    batch = {name: value.to(device) for name, value in {"images": images, "labels": draw_key.abs() % CLASSES, "draw_key": draw_key}.items()}
    moments = Moments(*model.statistics.mean.shape)
    moments.add(model.encode(batch))
    model.statistics.set(moments)
    cached = {name: value for name, value in batch.items() if name != "images"} | {"latents": model.space.vae.encode(batch["images"]).bfloat16()}
    optimizers = Optimizers(model, config.optimizer, dtype_of(precision))
    optimizers.set_rate(0.0)  # the weights stay, so that every step gives the same loss

    def plain() -> float:
        with autocast(device, precision):
            loss = plain_error(model, batch)
        loss.backward()
        return finish(loss)

    def ours(rows: dict[str, Tensor]) -> float:
        return finish(backward(model, iter([rows]), 1, device, precision)[1]["loss"])

    def finish(loss: Tensor) -> float:
        optimizers.step()
        optimizers.zero_grad()
        return loss.item()

    first, second = plain(), ours(batch)
    print(f"{options.recipe}, {options.tokens}, {options.size} px, {device}, {precision} ({why}), threads {torch.get_num_threads()}, {options.runs} runs")
    print(f"loss of the plain step {first:.6f}, of ours {second:.6f}")
    if abs(first - second) > (1e-4 if precision == "fp32" else 1e-2) * abs(first):
        raise SystemExit("the two steps do not compute the same loss")
    print(f"{'':40s} {'images/s':>9s} {'ratio':>7s} {'lowest':>7s} {'highest':>7s}")
    training = {"training: plain": plain, "training: ours": lambda: ours(batch), "training: ours, cached latents": lambda: ours(cached)}
    compare(training, options.batch, options.runs, device)

    noise, condition = torch.randn(options.drawn, *model.statistics.mean.shape, device=device), Condition(labels=batch["labels"][: options.drawn])
    plainly, twice = Sampling(steps=options.steps), Sampling(steps=options.steps, guidance=2.0)
    one, two = model.draw(noise, condition, twice), guided_in_two_passes(model, noise, condition, twice)
    effect = (one - model.draw(noise, condition, plainly)).abs().max()
    print(f"largest difference of guidance in one batch and in two passes: {(one - two).abs().max():.2g}, of guidance and none: {effect:.2g}")
    kinds = {
        "drawing, guided: two passes": lambda: guided_in_two_passes(model, noise, condition, twice),
        "drawing, guided: one batch (ours)": lambda: model.draw(noise, condition, twice),
        "drawing, not guided": lambda: model.draw(noise, condition, plainly),
    }
    with torch.no_grad(), autocast(device, precision):
        compare(kinds, options.drawn, options.runs, device)


if __name__ == "__main__":
    main(tyro.cli(Options, description=(Path(__file__).read_text().split('"""')[1])))
