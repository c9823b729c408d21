"""The arithmetic in words: every number of an estimate with the formula that it came from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from openvision3.estimate.arithmetic import FP32, Cost
from openvision3.estimate.sizes import Sizes

if TYPE_CHECKING:
    from openvision3.estimate.plan import Estimate


def explain(found: Estimate, run: Sizes, costs: dict[str, Cost], usable: float) -> list[tuple[str, str, str]]:
    """(section, formula with numbers, result) of all that is known; `usable` is the share of a device's memory that counts as room."""
    lines: list[tuple[str, str, str]] = []

    def note(section: str, formula: str, result: str) -> None:
        lines.append((section, formula, result))

    config, device = run.config, run.devices.device
    for part in found.parts:
        for formula, value in costs[part.name].lines:
            note(part.name, formula, flops(value))
        cost, count = costs[part.name], part.forward / costs[part.name].forward
        times = f"{count:g} x " if count != 1 else ""
        back = f" + backward {flops(cost.backward)}" if cost.backward else ""
        again = f" + done again {flops(part.again)}" if part.again else ""
        note(part.name, f"{times}(forward {flops(cost.forward)}{back}){again}", flops(part.flops))
    sizes = " + ".join(f"{name} {count:,}" for name, count in run.parameters.items())
    note("parameters", f"{sizes} + temperature 1", f"{run.trainable:,}")
    shards = f" / {run.shards} shards" if run.shards > 1 else ""
    note("memory", f"weights and gradients: {run.trainable:,} x {FP32} bytes each{shards}", gigabytes(found.memory["weights"]) + " each")
    note("memory", f"optimiser ({config.optimizer.kind}): {run.optimiser_bytes:,.0f} bytes{shards}", gigabytes(found.memory["optimiser"]))
    note("memory", f"VAE: {run.vae.parameters:,.0f} x {run.width_bytes} bytes, whole on each device", gigabytes(found.memory.get("VAE", 0.0)))
    for name, value in found.memory.items():
        if name.startswith("activations: "):
            one = costs[name.removeprefix("activations: ")].saved
            note("memory", f"{name}: {value / one:g} x {one / 1e6:.2f} MB kept, in a micro-batch of {run.micro:,}", gigabytes(value))
    for name, formula in _memory_formulas(run).items():
        if name in found.memory:
            note("memory", f"{name}: {formula}", gigabytes(found.memory[name]))
    if device.memory:
        note("memory", f"room: {gigabytes(device.memory)} x {usable:g}", gigabytes(device.memory * usable))
    formulas = _network_formulas(run)
    for name, value in found.network.items():
        note("network", f"{name}: {formulas[name]}", gigabytes(value))
    if found.network and found.network_seconds is not None:
        links = f"{gigabytes(device.link or 0)}/s within a machine"
        if run.devices.nodes > 1:
            links += f", {gigabytes(run.options.network * 1e9 or device.network or 0)}/s between machines"
        note("network", f"bytes / links ({links}), were nothing overlapped", f"{found.network_seconds:.4g} s")
    if found.compute_seconds is not None:
        peak = device.bf16 if run.precision == "bf16" else device.fp32
        again = f" + {flops(found.optimiser_flops)} of the optimiser" if found.optimiser_flops else ""
        formula = f"({flops(found.sample_flops)} x {run.local} samples{again}) / ({flops(peak or 0)}/s x {run.options.utilisation:g})"
        note("time", f"computing a step: {formula}", f"{found.compute_seconds:.4g} s")
    if found.hours is not None and found.step_seconds is not None:
        note("time", f"{found.steps:,} steps x the longer of computing and network, {found.step_seconds:.4g} s", hours(found.hours))
    if found.cost is not None and found.hours is not None:
        note("cost", f"{found.hours:.2f} h x {run.devices.count} x {run.options.price_per_hour:g}", f"{found.cost:,.0f}")
    kept = f"weights {run.trainable:,} x {FP32} x 2 (state and plain model) + optimiser {run.optimiser_bytes:,.0f}"
    note("disk", f"a checkpoint: {kept} bytes", gigabytes(found.disk["one checkpoint"] or 0))
    note("disk", f"{config.keep} newest, {config.keep_best} best and one that is being written", gigabytes(found.disk["checkpoints"] or 0))
    side = config.size // run.vae.stride
    note(
        "disk",
        f"latent cache: {run.vae.latent_channels} x {side}^2 x 2 bytes x {run.options.crops} crops, a sample",
        f"{(found.disk['latent cache, a sample'] or 0) / 1e3:.1f} kB",
    )
    return lines


def _memory_formulas(run: Sizes) -> dict[str, str]:
    from openvision3.model.losses import CHUNK

    outside, b, model = run.trainable - run.in_blocks, run.width_bytes, run.config.model
    logits = (
        f"min({CHUNK:,} at a time, {run.micro} x {run.caption_length} x {run.vocabulary:,}) x {3 * FP32 + (b if b != FP32 else 0)} bytes, and their features"
    )
    return {
        "gathered weights and gradients": f"2 x {FP32} x {outside:,} outside of blocks + 2 blocks x {run.largest_block:,} x ({b} + {FP32})",
        "weights in bf16": f"{run.in_blocks:,} in blocks x 2",
        "logits": logits,
        "workspace": "three of the largest maps of the backward pass; or four of the encoding, less what is kept later",
        "pictures": f"of {'a step' if run.pieces > 1 else 'a batch'}, and their latents",
        "embeddings of all pairs": f"2 x {FP32} x {run.config.batch:,} x {1 + run.config.captions} x {model.encoder.embed_dim}",
    }


def _network_formulas(run: Sizes) -> dict[str, str]:
    """What each device sends a step: an all-reduce of n bytes among k devices is 2 n (k - 1) / k, a gather or a scatter half of it."""
    devices, config, outside = run.devices, run.config, run.trainable - run.in_blocks
    n, nodes, local, shards = devices.count, devices.nodes, devices.in_node, run.shards
    weights = f"({run.width_bytes} x {run.in_blocks:,} + {FP32} x {outside:,}) x {run.gathers} gathers"
    gradients = f"{'2 x ' if run.parallel == 'replicate' else ''}{FP32} x {run.trainable:,}"
    embeddings = f"3 x {FP32} x {config.batch:,} x {1 + config.captions} x {config.model.encoder.embed_dim}"
    members = n if run.parallel == "replicate" else shards
    inside, between = f"x {members - 1}/{members}", f"x {nodes - 1}/{nodes} / {local} devices"
    copies = f"2 x {FP32} x {run.trainable:,} / {shards} shards x {nodes - 1}/{nodes}"
    return {
        "weights within a machine": f"{weights} {inside}",
        "gradients within a machine": f"{gradients} {inside}",
        "embeddings within a machine": f"{embeddings} x {n - 1}/{n}",
        "weights between machines": f"{weights} {between}",
        "gradients between machines": copies if run.parallel == "hsdp" else f"{gradients} {between}",
        "embeddings between machines": f"{embeddings} {between}",
    }


def flops(value: float) -> str:
    """2.06e12 -> 2.06 TFLOP."""
    power = min(5, max(0, math.floor(math.log10(value) / 3))) if value >= 1 else 0
    return f"{value / 1000**power:.4g} {('', 'k', 'M', 'G', 'T', 'P')[power]}FLOP"


def gigabytes(value: float) -> str:
    return f"{value / 1e12:.2f} TB" if value >= 1e12 else f"{value / 1e9:.2f} GB" if value >= 1e7 else f"{value / 1e6:.2f} MB"


def hours(value: float) -> str:
    return f"{value * 60:.1f} min" if value < 1 else f"{value:.1f} h" if value < 100 else f"{value:,.0f} h ({value / 24:.1f} days)"
