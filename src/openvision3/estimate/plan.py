"""A PretrainConfig and devices -> what the run will take: operations, memory, hours, disk, network, and what would make it cheaper."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openvision3.estimate.arithmetic import FP32, Cost, muon
from openvision3.estimate.devices import Devices, parse_devices
from openvision3.estimate.explain import explain
from openvision3.estimate.sizes import Options, Sizes, divisors, sample_costs
from openvision3.train.config import PretrainConfig

RESERVE = 0.1
"""share of a device's memory that is left to its driver, the allocator's gaps and the convolutions' workspace"""


@dataclass
class Part:
    """What one part of the figure costs a sample, on average over the batch."""

    name: str
    forward: float
    backward: float
    again: float
    """operations done twice: for the gradient (checkpointing, chunks) or for the negatives (micro-batches)"""
    share: float = 0.0

    @property
    def flops(self) -> float:
        return self.forward + self.backward + self.again


@dataclass
class Estimate:
    """All numbers of one run. Bytes, operations and seconds; None is unknown."""

    recipe: str
    devices: Devices
    parallel: str
    precision: str
    batch: int
    local_batch: int
    micro_batch: int
    steps: int
    parameters: dict[str, int]
    vocabulary: int
    vae: str
    parts: list[Part]
    sample_flops: float
    optimiser_flops: float
    """of one step on each device"""
    memory: dict[str, float]
    fits: bool | None
    largest_micro_batch: int | None
    """0 where not even one sample fits"""
    network: dict[str, float]
    network_seconds: float | None
    compute_seconds: float | None
    step_seconds: float | None
    hours: float | None
    cost: float | None
    disk: dict[str, float | None]
    assumptions: list[str] = field(default_factory=list)
    formulas: list[tuple[str, str, str]] = field(default_factory=list)
    """(section, formula with numbers, result)"""
    advice: list[dict[str, Any]] = field(default_factory=list)

    @property
    def memory_total(self) -> float:
        return sum(self.memory.values())


def estimate(config: PretrainConfig, recipe: str, options: Options, devices: Devices | None = None, *, advise: bool = True) -> Estimate:
    """Count everything. Nothing is loaded, and nothing runs.

    Raises:
        ValueError, FileNotFoundError: a device that is unknown, or a batch that cannot be divided so; a VAE that is not known.
    """
    run = Sizes(config, options, devices or parse_devices(options.gpus, options.per_node))
    costs = sample_costs(run)
    parts = _parts(run, costs)
    total = sum(part.flops for part in parts)
    for part in parts:
        part.share = part.flops / total
    optimiser = muon(run.matrices) if config.optimizer.kind == "muon" else 0.0
    found = Estimate(
        recipe, run.devices, run.parallel, run.precision, config.batch, run.local, run.micro, config.steps, run.parameters, run.vocabulary,
        f"{config.model.vae.name}, {run.vae.parameters / 1e6:.1f} M parameters, frozen; counted from {run.vae.source}",
        parts, total, optimiser, _memory(run, costs, run.micro), None, None, {}, None, None, None, None, None, {}, run.assumptions,
    )  # fmt: skip
    _fit(found, run, costs)
    _time(found, run)
    found.disk = _disk(run)
    found.formulas = explain(found, run, costs, 1 - RESERVE)
    if advise:
        found.advice = _advice(found, config, options)
    return found


def _parts(run: Sizes, costs: dict[str, Cost]) -> list[Part]:
    from openvision3.model.losses import CHUNK

    counts = {"VAE decode": run.config.pixel_share, "perceptual": run.config.pixel_share, "text encoder": run.config.captions}
    parts = []
    for name, one in costs.items():
        cost = one.times(counts.get(name, 1))
        again = cost.blocks if run.checkpointing else 0.0
        if run.pieces > 1 and name in ("encoder", "text encoder"):  # the pass that embeds the whole batch first
            again += cost.forward
        rows = run.micro * run.caption_length
        if (name == "vocabulary head" and rows * run.vocabulary > CHUNK) or (name == "contrast" and run.local * run.config.batch > CHUNK):
            again += cost.forward
        if cost.forward:
            parts.append(Part(name, cost.forward, cost.backward, again))
    return parts


# -- memory of one device ------------------------------------------------------------------------------------------


def _memory(run: Sizes, costs: dict[str, Cost], micro: int) -> dict[str, float]:
    """Bytes at the fullest moment, the start of the backward pass."""
    from openvision3.model.losses import CHUNK

    config, shards, b = run.config, run.shards, run.width_bytes
    found = {
        "weights": FP32 * run.trainable / shards,
        "gradients": FP32 * run.trainable / shards,
        "optimiser": run.optimiser_bytes / shards,
        "VAE": run.vae.parameters * b,
    }
    outside = run.trainable - run.in_blocks
    if shards > 1:  # blocks come and go two at a time, what stands outside of them is whole from the forward to the end of the backward
        found["gathered weights and gradients"] = 2 * FP32 * outside + 2 * run.largest_block * (b + FP32)
    elif run.precision == "bf16":
        found["weights in bf16"] = 2.0 * run.in_blocks  # autocast's copies, until the step's end
    chosen = micro * config.pixel_share
    for name in ("encoder", "latent decoder", "text encoder", "captioner", "VAE decode", "perceptual"):
        if name in costs:
            count = chosen if name in ("VAE decode", "perceptual") else micro * config.captions if name == "text encoder" else micro
            found[f"activations: {name}"] = count * costs[name].saved
    logits = min(CHUNK, micro * run.caption_length * run.vocabulary)
    found["logits"] = logits * (3 * FP32 + (b if b != FP32 else 0)) + micro * costs["vocabulary head"].saved
    workspace = max(3 * chosen * costs["VAE decode"].largest, 3 * micro * max(costs[n].largest for n in ("encoder", "latent decoder", "captioner")))
    forward_only = 0.0 if run.cached else 4 * micro * costs["VAE encode"].largest
    saved = sum(value for name, value in found.items() if name.startswith(("activations", "logits")))
    found["workspace"] = max(workspace, forward_only - saved)  # encoding comes first, when nothing is kept yet
    picture, latent = 3 * config.size**2 * FP32, run.vae.latent_channels * (config.size // run.vae.stride) ** 2 * FP32
    pieces = run.local // micro
    # one step's pictures as they come, or, in pieces, its latents and the pictures that are compared
    found["pictures"] = (
        run.local * (latent + picture * config.pixel_share) + micro * picture if pieces > 1 else micro * (latent if run.cached else picture + latent)
    )
    found["embeddings of all pairs"] = (
        2 * FP32 * config.batch * (1 + config.captions) * config.model.encoder.embed_dim if run.devices.count > 1 or pieces > 1 else 0.0
    )
    return {name: value for name, value in found.items() if value}


def _fit(found: Estimate, run: Sizes, costs: dict[str, Cost]) -> None:
    memory = run.devices.device.memory
    if memory is None:
        return
    room = memory * (1 - RESERVE)
    found.fits = found.memory_total <= room
    fitting = [m for m in divisors(run.local) if sum(_memory(run, costs, m).values()) <= room]
    found.largest_micro_batch = max(fitting, default=0)


# -- time, network, disk -------------------------------------------------------------------------------------------


def _time(found: Estimate, run: Sizes) -> None:
    device, config, options = run.devices.device, run.config, run.options
    found.network, found.network_seconds = _network(run)
    peak = device.bf16 if run.precision == "bf16" else device.fp32
    if peak is None:
        run.assumptions.append(f"the peak of {device.name} is unknown: no hours")
        return
    found.compute_seconds = (found.sample_flops * run.local + found.optimiser_flops) / (peak * options.utilisation)
    found.step_seconds = max(found.compute_seconds, found.network_seconds or 0.0)
    if config.minutes:
        found.steps = max(1, round(config.minutes * 60 / found.step_seconds))
        run.assumptions.append(f"--minutes {config.minutes:g} sets the steps: {found.steps:,} at this speed")
    found.hours = found.steps * found.step_seconds / 3600
    found.cost = found.hours * run.devices.count * options.price_per_hour if options.price_per_hour else None


def _network(run: Sizes) -> tuple[dict[str, float], float | None]:
    """Bytes that each device sends a step, by kind, and the seconds they take if nothing overlaps them; None: a link is unknown.

    Within a machine all devices pass on through their links, between machines those of one machine share its network cards.
    """
    devices, b = run.devices, run.width_bytes
    n, local, nodes = devices.count, devices.in_node, devices.nodes
    if n == 1:
        return {}, 0.0
    trainable, outside = run.trainable, run.trainable - run.in_blocks
    gathered = b * run.in_blocks + FP32 * outside
    inside: dict[str, float] = {}
    between: dict[str, float] = {}

    def collective(name: str, size: float, members: int, machines: int) -> None:
        """One pass of `size` bytes around `members`: an all-gather or a reduce-scatter, half an all-reduce."""
        inside[name] = inside.get(name, 0.0) + size * (members - 1) / members
        if machines > 1:
            between[name] = between.get(name, 0.0) + size * (machines - 1) / machines / local

    if run.parallel == "replicate":
        collective("gradients", 2 * FP32 * trainable, n, nodes)
    else:
        shards, machines = run.shards, 1 if run.parallel == "hsdp" else nodes
        collective("weights", gathered * run.gathers, shards, machines)
        collective("gradients", FP32 * trainable, shards, machines)
        if run.parallel == "hsdp" and nodes > 1:  # each machine's shard meets its counterparts
            between["gradients"] = 2 * FP32 * trainable / shards * (nodes - 1) / nodes
    embeddings = FP32 * run.config.batch * (1 + run.config.captions) * run.config.model.encoder.embed_dim
    collective("embeddings", 3 * embeddings, n, nodes)  # gathered, and their gradients summed
    sent = {f"{name} within a machine": value for name, value in inside.items()} | {f"{name} between machines": value for name, value in between.items()}
    link, network = devices.device.link, run.options.network * 1e9 or devices.device.network
    if link is None or (nodes > 1 and network is None):
        run.assumptions.append("the link between these devices is unknown: no network time" + ("; give --network" if link is not None else ""))
        return sent, None
    return sent, sum(inside.values()) / link + (sum(between.values()) / network if nodes > 1 and network else 0.0)


def _disk(run: Sizes) -> dict[str, float | None]:
    config = run.config
    one = run.optimiser_bytes + 2 * FP32 * run.trainable  # weights twice: in the state, and as a plain model
    side = config.size // run.vae.stride
    sample = 2.0 * run.vae.latent_channels * side * side * run.options.crops
    return {
        "one checkpoint": one,
        "checkpoints": one * (config.keep + config.keep_best + 1),
        "latent cache, a sample": sample,
        "latent cache": sample * run.options.samples if run.options.samples else None,
        "data": _data_bytes(config.data),
    }


def _data_bytes(data: tuple[str, ...]) -> float | None:
    """What lies there now, without what ships with the package; None where something is not at hand."""
    from openvision3.data.names import expand

    total = 0.0
    for name in data:
        if name == "openmoji":
            continue
        paths = [Path(p) for p in expand(name)]
        if not paths or not all(p.exists() for p in paths):
            return None
        total += sum(f.stat().st_size for p in paths for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file())
    return total if data else None


# -- what follows -------------------------------------------------------------------------------------------------


def _advice(found: Estimate, config: PretrainConfig, options: Options) -> list[dict[str, Any]]:
    """Changes that would pay, each with the new totals."""
    advice: list[dict[str, Any]] = []

    def consider(what: str, how: str, *, cached: bool = options.cached, **fields: Any) -> Estimate:
        changed, asked = copy.deepcopy(config), copy.copy(options)
        asked.cached = cached
        for name, value in fields.items():
            setattr(changed, name, value)
        new = estimate(changed, found.recipe, asked, found.devices, advise=False)
        row = {"what": what, "set": how, "sample_flops": new.sample_flops, "hours": new.hours, "memory": new.memory_total, "fits": new.fits}
        advice.append(row | {"largest_micro_batch": new.largest_micro_batch})
        return new

    shares = [s for s in (1 / 2, 1 / 4, 1 / 8) if s < config.pixel_share and s * config.batch >= 1]
    for share in shares:
        consider(f"decode 1/{round(1 / share)} of the batch to pixels", f"--pixel-share {share:g}", pixel_share=share)
    if not options.cached and found.vae.split(",")[0] != "pixels":
        consider("read latents from a cache", "openvision3 data latents", cached=True)
        if shares:
            consider(f"both: cached latents, 1/{round(1 / shares[-1])} to pixels", f"--pixel-share {shares[-1]:g}", cached=True, pixel_share=shares[-1])
    if found.fits is False:
        if found.largest_micro_batch:
            consider("compute the batch in pieces that fit", f"--micro-batch {found.largest_micro_batch}", micro_batch=found.largest_micro_batch)
        if not config.checkpointing:
            new = consider("make activations again instead of keeping them", "--checkpointing", checkpointing=True)
            if not new.fits and new.largest_micro_batch:
                advice.pop()
                consider(
                    "checkpointing, and the largest pieces that fit then",
                    f"--checkpointing --micro-batch {new.largest_micro_batch}",
                    checkpointing=True,
                    micro_batch=new.largest_micro_batch,
                )
    elif found.micro_batch < found.local_batch and found.largest_micro_batch == found.local_batch:
        consider("the whole batch fits at once: no second pass", "--micro-batch 0", micro_batch=0)
    return advice
