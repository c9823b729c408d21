"""A config and devices -> operations, memory, hours, disk and network of the run, and what would make it cheaper.

Each number is computed beside its formula, which `--explain` prints.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openvision3.estimate.devices import Devices, parse_devices
from openvision3.estimate.planned import UNDERSTANDING, Options, PlannedPretraining, PlannedRun, divisors
from openvision3.estimate.units import FP32, flops, gigabytes, hours
from openvision3.train.config import PretrainConfig

if TYPE_CHECKING:
    from openvision3.generate.config import GenerateConfig
    from openvision3.understand.config import LlavaConfig

RESERVE = 0.1
"""share of a device's memory for its driver, gaps of the allocator and the workspace of convolutions"""


@dataclass
class Part:
    """Operations of one part of the model for a sample, on average over the batch."""

    name: str
    forward: float
    backward: float
    again: float
    """operations done a second time, for the gradient (checkpointing, chunks) or for the negatives (micro-batches)"""
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
    """0 if not even one sample fits"""
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
    extra: list[tuple[str, float, float | None]] = field(default_factory=list)
    """(what, operations, hours) of work beside the steps, which `hours` is without"""

    @property
    def memory_total(self) -> float:
        return sum(self.memory.values())


Explained = dict[str, tuple[float, str]]
"""{name: (bytes, formula)}"""


def values(explained: Explained) -> dict[str, float]:
    return {name: value for name, (value, _) in explained.items()}


def plan_run(config: PretrainConfig | GenerateConfig | LlavaConfig, options: Options, devices: Devices) -> PlannedRun:
    if isinstance(config, PretrainConfig):
        return PlannedPretraining(config, options, devices)
    from openvision3.generate.config import GenerateConfig

    if isinstance(config, GenerateConfig):
        from openvision3.estimate.drawing import PlannedGenerator

        return PlannedGenerator(config, options, devices)
    from openvision3.estimate.talking import PlannedChat

    return PlannedChat(config, options, devices)


def estimate(
    config: PretrainConfig | GenerateConfig | LlavaConfig, recipe: str, options: Options, devices: Devices | None = None, *, advise: bool = True
) -> Estimate:
    """Count everything. Nothing is loaded and nothing is computed.

    Raises:
        ValueError, FileNotFoundError: an unknown device or VAE, or a batch that cannot be divided among the devices.
    """
    run = plan_run(config, options, devices or parse_devices(options.gpus, options.per_node))
    parts = split_work(run)
    memory, network, disk = count_memory(run, run.micro), count_network(run), count_disk(run)
    vae = f"{run.vae.name or 'pixels'}, {run.vae_parameters / 1e6:.1f} M parameters, frozen; counted from {run.vae_source}"
    result = Estimate(
        recipe, run.devices, run.parallel, run.precision, config.batch, run.local, run.micro, config.steps, run.parameters, run.vocabulary, vae,
        parts, sum(part.flops for part in parts), run.optimiser_flops, values(memory), None, None, values(network), None, None, None, None, None,
        {name: value for name, (value, _) in disk.items()}, run.assumptions,
    )  # fmt: skip
    for part in parts:
        part.share = part.flops / result.sample_flops
        cost = run.costs[part.name]
        times, again = part.forward / cost.forward, f" + again {flops(part.again)}" if part.again else ""
        backward = f" + backward {flops(cost.backward)}" if cost.backward else ""
        result.formulas += [(part.name, f"{count} x {name}" if count > 1 else name, flops(value)) for name, (count, value) in cost.modules.items()]
        result.formulas.append((part.name, f"{f'{times:g} x ' if times != 1 else ''}(forward {flops(cost.forward)}{backward}){again}", flops(part.flops)))
    sizes = " + ".join(f"{name} {count:,}" for name, count in run.parameters.items())
    temperature = " + temperature 1" if "contrast" in run.costs else ""
    result.formulas.append(("parameters", f"{sizes}{temperature}, those that are trained", f"{run.trainable:,}"))
    result.formulas += [("memory", f"{name}: {formula}", gigabytes(value)) for name, (value, formula) in memory.items()]
    room = (run.devices.device.memory or 0.0) * (1 - RESERVE)
    if room:
        result.fits = result.memory_total <= room
        fitting = [micro for micro in divisors(run.local) if sum(values(count_memory(run, micro)).values()) <= room]
        result.largest_micro_batch = max(fitting, default=0)
        result.formulas.append(("memory", f"room: {gigabytes(run.devices.device.memory or 0)} x {1 - RESERVE:g}", gigabytes(room)))
    result.formulas += [("network", f"{name}: {formula}", gigabytes(value)) for name, (value, formula) in network.items()]
    _time(result, run)
    result.formulas += [("disk", f"{name}: {formula}", gigabytes(value)) for name, (value, formula) in disk.items() if value is not None and formula]
    if advise:
        result.advice = _advice(result, config, options)
    return result


def split_work(run: PlannedRun) -> list[Part]:
    """Operations of each part, which may see only a share of the samples or see some twice."""
    repeated, parts = run.repeated(), []
    for name, cost in run.costs.items():
        share = run.passes.get(name, 1) * (run.understood if name in UNDERSTANDING else 1)
        if share:
            again = cost.again + cost.forward * repeated.get(name, 0.0)
            parts.append(Part(name, cost.forward * share, cost.backward * share, again * share))
    return parts


def count_memory(run: PlannedRun, micro: int) -> Explained:
    """Bytes of one device at the fullest moment, the start of the backward pass, in micro-batches of `micro`."""
    from openvision3.model.losses import CHUNK

    config, b, costs, pieces = run.config, run.width_bytes, run.costs, run.local // micro
    shards = f" / {run.shards} shards" if run.shards > 1 else ""
    weights = FP32 * run.trainable / run.shards, f"{run.trainable:,} x {FP32} bytes{shards}"
    memory = {
        "weights": weights,
        "gradients": weights,
        "optimiser": (run.optimiser_bytes / run.shards, f"{run.optimiser_bytes:,.0f} bytes of {config.optimizer.kind}{shards}"),
        "averaged weights": (weights[0] if config.ema else 0.0, weights[1]),
        "frozen parts": (run.frozen_bytes, f"{run.frozen:,} x {run.frozen_bytes / max(1, run.frozen):g} bytes, whole on each device"),
        "VAE": (run.vae_parameters * b, f"{run.vae_parameters:,} x {b} bytes, whole on each device"),
    }
    outside = run.trainable - run.in_blocks
    if run.shards > 1:  # blocks come and go two at a time; the rest is whole from the forward pass to the end of the backward pass
        gathered = 2 * FP32 * outside + 2 * run.largest_block * (b + FP32)
        formula = f"2 x {FP32} x {outside:,} outside of blocks + 2 blocks x {run.largest_block:,} x ({b} + {FP32})"
        memory["gathered weights and gradients"] = gathered, formula
    elif run.precision == "bf16":  # autocast's copies, until the end of the step
        memory["weights in bf16"] = 2.0 * run.in_blocks, f"{run.in_blocks:,} in blocks x 2"
    rows = {name: micro * run.passes.get(name, 1.0) for name in costs if name not in ("VAE encode", "vocabulary head", "contrast")}
    for name, cost in costs.items():
        if name in rows and cost.saved:
            memory[f"activations: {name}"] = rows[name] * cost.saved, f"{rows[name]:g} x {cost.saved / 1e6:.2f} MB kept, in a micro-batch of {micro:,}"
    if head := costs.get("vocabulary head"):
        width, logits = 3 * FP32 + (b if b != FP32 else 0), min(CHUNK, micro * run.caption_length * run.vocabulary)
        formula = f"min({CHUNK:,} at a time, {micro} x {run.caption_length} x {run.vocabulary:,}) x {width} bytes, and their features"
        memory["logits"] = logits * width + micro * head.saved, formula
    kept = sum(value for name, (value, _) in memory.items() if name.startswith(("activations", "logits")))
    backward = 3 * max(rows[name] * costs[name].largest for name in rows if name != "text encoder")
    encoding = 4 * micro * costs["VAE encode"].largest - kept if "VAE encode" in costs else 0.0  # comes first, when nothing is kept yet
    memory["workspace"] = (
        max(backward, encoding),
        "three of the largest outputs in the backward pass; or four of those of the VAE's encoder, less what is kept later",
    )
    image, latent = 3 * config.size**2 * FP32, run.vae.latent_channels * (config.size // run.vae.stride) ** 2 * FP32
    # one step's images as they come, or, in pieces, its latents and the images that are compared
    whole = micro * (latent if run.options.cached else image + latent)
    memory["images"] = (
        run.local * (run.kept_numbers * FP32 + image * run.pixel_share) + micro * image if pieces > 1 else whole,
        f"of a {'step' if pieces > 1 else 'batch'}, and their latents or tokens",
    )
    if isinstance(config, PretrainConfig) and "contrast" in costs and (run.devices.count > 1 or pieces > 1):
        numbers = (1 + config.captions) * config.model.encoder.embed_dim
        formula = f"2 x {FP32} x {config.batch:,} x {1 + config.captions} x {config.model.encoder.embed_dim}"
        memory["embeddings of all pairs"] = 2.0 * FP32 * config.batch * numbers, formula
    return {name: entry for name, entry in memory.items() if entry[0]}


def count_network(run: PlannedRun) -> Explained:
    """Bytes that each device sends in a step: an all-gather or a reduce-scatter of n bytes among k devices is n (k - 1) / k, an all-reduce twice that.

    Within a machine all devices pass everything on through their links; between machines those of one machine share its network cards.
    """
    config, n, local, nodes = run.config, run.devices.count, run.devices.in_node, run.devices.nodes
    if n == 1:
        return {}
    outside = run.trainable - run.in_blocks
    inside: Explained = {}
    between: Explained = {}

    def send(name: str, size: float, formula: str, members: int, machines: int) -> None:
        inside[f"{name} within a machine"] = size * (members - 1) / members, f"{formula} x {members - 1}/{members}"
        if machines > 1:
            between[f"{name} between machines"] = size * (machines - 1) / machines / local, f"{formula} x {machines - 1}/{machines} / {local} devices"

    gradients = f"{FP32} x {run.trainable:,}"
    if run.parallel == "replicate":
        send("gradients", 2.0 * FP32 * run.trainable, f"2 x {gradients}", n, nodes)
    else:
        machines = 1 if run.parallel == "hsdp" else nodes
        blocks = run.gathers * run.in_blocks + run.embedding_blocks
        weights = f"({run.width_bytes} x {blocks:,} of blocks + {FP32} x {outside:,} x {run.outside_gathers})"
        send("weights", float(run.width_bytes * blocks + FP32 * outside * run.outside_gathers), weights, run.shards, machines)
        send("gradients", float(FP32 * run.trainable), gradients, run.shards, machines)
        if run.parallel == "hsdp" and nodes > 1:  # each machine's shard meets its counterparts
            formula = f"2 x {gradients} / {run.shards} shards x {nodes - 1}/{nodes}"
            between["gradients between machines"] = 2 * FP32 * run.trainable / run.shards * (nodes - 1) / nodes, formula
    if isinstance(config, PretrainConfig) and "contrast" in run.costs:
        embed_dim, sets = config.model.encoder.embed_dim, 1 + config.captions  # gathered, and their gradients summed
        send("embeddings", 3.0 * FP32 * config.batch * sets * embed_dim, f"3 x {FP32} x {config.batch:,} x {sets} x {embed_dim}", n, nodes)
    return inside | between


def count_disk(run: PlannedRun) -> dict[str, tuple[float | None, str]]:
    config = run.config
    copies = ("state", "plain model", *(("average",) if config.ema else ()))  # of the weights
    frozen = FP32 * run.frozen_saved
    checkpoint = run.optimiser_bytes + len(copies) * FP32 * run.trainable + frozen
    side, has_cache = config.size // run.vae.stride, hasattr(config, "latents")
    sample = 2.0 * run.vae.latent_channels * side * side * run.options.crops
    weights = f"weights {run.trainable:,} x {FP32} x {len(copies)} ({', '.join(copies)})" + (f" + frozen parts {frozen:,} bytes" if frozen else "")
    return {
        "one checkpoint": (checkpoint, f"{weights} + optimiser {run.optimiser_bytes:,.0f} bytes"),
        "checkpoints": (checkpoint * (config.keep + config.keep_best + 1), f"{config.keep} newest, {config.keep_best} best and one that is being written"),
        "latent cache, a sample": (sample if has_cache else None, f"{run.vae.latent_channels} x {side}^2 x 2 bytes x {run.options.crops} crops"),
        "latent cache": (sample * run.options.samples if has_cache and run.options.samples else None, f"{run.options.samples:,} samples"),
        "data": (_data_bytes((*config.data, *getattr(config, "images", ()))), ""),
    }


def _data_bytes(data: tuple[str, ...]) -> float | None:
    """The files that are here now, without those of the package; None if something is missing."""
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


def _time(result: Estimate, run: PlannedRun) -> None:
    """Seconds of computing, and of the network without overlap; the longer one sets the pace."""
    devices, config, options = run.devices, run.config, run.options
    device = devices.device
    link, outside = device.link, options.network * 1e9 or device.network
    if devices.count == 1:
        result.network_seconds = 0.0
    elif link is None or (devices.nodes > 1 and outside is None):
        run.assumptions.append("the link between these devices is unknown: no network time" + ("; give --network" if link is not None else ""))
    else:
        between = sum(value for name, value in result.network.items() if name.endswith("between machines"))
        links = f"{gigabytes(link)}/s within a machine" + (f", {gigabytes(outside or 0)}/s between machines" if devices.nodes > 1 else "")
        result.network_seconds = (sum(result.network.values()) - between) / link + (between / outside if outside else 0.0)
        result.formulas.append(("network", f"bytes / links ({links}), without overlap", f"{result.network_seconds:.4g} s"))
    peak = device.bf16 if run.precision == "bf16" else device.fp32
    if peak is None:
        run.assumptions.append(f"the peak of {device.name} is unknown: no hours")
        result.extra = [(name, operations, None) for name, operations in run.extra_work().items()]
        return
    result.compute_seconds = (result.sample_flops * run.local + result.optimiser_flops) / (peak * options.utilisation)
    result.step_seconds = max(result.compute_seconds, result.network_seconds or 0.0)
    if config.minutes:
        result.steps = max(1, round(config.minutes * 60 / result.step_seconds))
        run.assumptions.append(f"--minutes {config.minutes:g} sets the steps: {result.steps:,} at this speed")
    result.hours = result.steps * result.step_seconds / 3600
    result.cost = result.hours * devices.count * options.price_per_hour if options.price_per_hour else None
    for name, operations in run.extra_work().items():
        reached = peak * options.utilisation * devices.count
        result.extra.append((name, operations, operations / reached / 3600))
        formula = f"{name}: {flops(operations)} / ({devices.count} x {flops(peak)}/s x {options.utilisation:g})"
        result.formulas.append(("beside the steps", formula, hours(operations / reached / 3600)))
    optimiser = f" + {flops(result.optimiser_flops)} of the optimiser" if result.optimiser_flops else ""
    computing = f"({flops(result.sample_flops)} x {run.local} samples{optimiser}) / ({flops(peak)}/s x {options.utilisation:g})"
    result.formulas.append(("time", f"computing a step: {computing}", f"{result.compute_seconds:.4g} s"))
    pace = f"{result.steps:,} steps x the longer of computing and network, {result.step_seconds:.4g} s"
    result.formulas.append(("time", pace, hours(result.hours)))
    if result.cost is not None:
        result.formulas.append(("cost", f"{result.hours:.2f} h x {devices.count} x {options.price_per_hour:g}", f"{result.cost:,.0f}"))


def _advice(result: Estimate, config: PretrainConfig | GenerateConfig | LlavaConfig, options: Options) -> list[dict[str, Any]]:
    """Changes that would help, each with the new totals."""
    advice: list[dict[str, Any]] = []

    def consider(what: str, how: str, *, cached: bool = options.cached, **fields: Any) -> Estimate:
        changed, changed_options = copy.deepcopy(config), copy.copy(options)
        changed_options.cached = cached
        for name, value in fields.items():
            setattr(changed, name, value)
        new = estimate(changed, result.recipe, changed_options, result.devices, advise=False)
        row = {"what": what, "set": how, "sample_flops": new.sample_flops, "hours": new.hours, "memory": new.memory_total, "fits": new.fits}
        advice.append(row | {"largest_micro_batch": new.largest_micro_batch})
        return new

    shares = [s for s in (1 / 2, 1 / 4, 1 / 8) if isinstance(config, PretrainConfig) and s < config.pixel_share and s * config.batch >= 1]
    for share in shares:
        consider(f"decode 1/{round(1 / share)} of the batch to pixels", f"--pixel-share {share:g}", pixel_share=share)
    if hasattr(config, "latents") and any(part.name == "VAE encode" for part in result.parts):
        consider("read latents from a cache", "openvision3 data latents", cached=True)
        if shares:
            consider(f"both: cached latents, 1/{round(1 / shares[-1])} to pixels", f"--pixel-share {shares[-1]:g}", cached=True, pixel_share=shares[-1])
    if result.fits is False:
        if result.largest_micro_batch:
            micro = result.largest_micro_batch
            consider("compute the batch in pieces that fit", f"--micro-batch {micro}", micro_batch=micro)
        if not config.checkpointing:
            new = consider("compute activations again instead of keeping them", "--checkpointing", checkpointing=True)
            if not new.fits and new.largest_micro_batch:
                advice.pop()
                micro = new.largest_micro_batch
                what = "checkpointing, and the largest pieces that fit then"
                consider(what, f"--checkpointing --micro-batch {micro}", checkpointing=True, micro_batch=micro)
    elif isinstance(config, PretrainConfig) and result.micro_batch < result.local_batch and result.largest_micro_batch == result.local_batch:
        consider("the whole batch fits at once: no second pass", "--micro-batch 0", micro_batch=0)
    return advice
