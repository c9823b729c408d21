"""A RunConfig and devices -> what the run will take: operations, memory, hours, disk, network, and what would make it cheaper."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openvision3.config import RunConfig
from openvision3.estimate.arithmetic import (
    FP32,
    NOTHING,
    PIXELS,
    PUBLISHED,
    Cost,
    VaeShape,
    linear,
    muon,
    perceptual,
    transformer,
    vae_decode,
    vae_encode,
    vae_shape,
)
from openvision3.estimate.devices import Devices, parse_devices

RESERVE = 0.1
"""share of a device's memory that is left to its driver, the allocator's gaps and the convolutions' workspace"""

BERT = 30_524
"""pieces of bert-base-uncased, and the begin and end marks that it lacks"""


@dataclass
class Options:
    """What `estimate` asks beside the recipe."""

    gpus: str = ""
    """such as h100:8 or 64xh100; none: what this machine has"""
    utilisation: float = 0.40
    """share of the peak that the run reaches; the share that yours reaches is in its log"""
    price_per_hour: float = 0.0
    """of one device"""
    per_node: int = 8
    """devices in one machine"""
    network: float = 0.0
    """GB/s to other machines, the share of one device, one way; none: as the device's usual machine has it"""
    text_length: int = 0
    """word pieces of a caption to contrast; none: as many as the model has positions"""
    caption_length: int = 0
    """word pieces of a caption to predict; none: as many as the model has positions"""
    samples: int = 0
    """pictures in the data, for the size of a latent cache"""
    crops: int = 1
    """crops of a picture in the latent cache"""
    cached: bool = False
    """latents come from a cache: pictures are neither decoded nor encoded"""
    json: bool = False
    """one JSON value on stdout, for scripts"""
    explain: bool = False
    """print each formula with its numbers"""

    def __post_init__(self):
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation {self.utilisation} must be above 0 and at most 1")
        for name in ("price_per_hour", "network", "text_length", "caption_length", "samples"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name.replace('_', '-')} {getattr(self, name)} must be a number that is not negative")
        if self.crops < 1:
            raise ValueError(f"crops {self.crops} must be at least 1")


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


class _Run:
    """A config read for counting: the sizes that all the formulas need."""

    def __init__(self, config: RunConfig, options: Options, devices: Devices):
        import torch
        from torch import nn

        from openvision3.model.encoder import Encoder
        from openvision3.model.reconstruction import LatentDecoder
        from openvision3.model.understanding import Captioner, TextEncoder

        self.config, self.options, self.devices = config, options, devices
        self.assumptions: list[str] = []
        self.vae = find_vae(config.model.vae.name)
        model = config.model
        if model.encoder.patch * self.vae.stride != 16:
            raise ValueError(
                f"encoder.patch {model.encoder.patch} on a VAE of stride {self.vae.stride} does not span 16 pixels; "
                f"set --model.encoder.patch {max(1, 16 // self.vae.stride)}"
            )
        self.vocabulary = self._vocabulary()
        with torch.device("meta"):
            encoder = Encoder(model.encoder, self.vae.latent_channels)
            parts = {
                "encoder": encoder,
                "latent decoder": LatentDecoder(model.latent_decoder, encoder.size.width, self.vae.latent_channels, model.encoder.patch),
                "text encoder": TextEncoder(model.text_encoder, self.vocabulary, model.encoder.embed_dim),
                "captioner": Captioner(model.captioner, self.vocabulary, encoder.size.width),
            }
        self.parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        self.trainable = sum(self.parameters.values()) + 1
        lists = [m for part in parts.values() for m in part.modules() if isinstance(m, nn.ModuleList)]
        self.in_blocks = sum(p.numel() for blocks in lists for p in blocks.parameters())
        self.largest_block = max(sum(p.numel() for p in block.parameters()) for blocks in lists for block in blocks)
        self.matrices: dict[tuple[int, int], int] = {}
        for m in (m for blocks in lists for m in blocks.modules() if isinstance(m, nn.Linear)):
            shape = (m.out_features, m.in_features)
            self.matrices[shape] = self.matrices.get(shape, 0) + 1
        self.tokens = (config.size // 16) ** 2
        self.text_length = self._length("text", options.text_length, model.text_encoder.positions)
        self.caption_length = self._length("caption", options.caption_length, model.captioner.positions)
        self.precision = config.precision if config.precision != "auto" else self._precision()
        self.width_bytes = 2 if self.precision == "bf16" else FP32
        self.checkpointing = bool(getattr(config, "checkpointing", False))
        if config.batch % devices.count:
            raise ValueError(f"batch {config.batch} cannot be divided among {devices.count} devices; legal are multiples of {devices.count}")
        self.local = config.batch // devices.count
        self.micro = getattr(config, "micro_batch", 0) or self.local
        if self.local % self.micro:
            legal = ", ".join(str(n) for n in divisors(self.local))
            raise ValueError(
                f"micro_batch {self.micro} does not divide the {self.local} pictures of a device (batch {config.batch} / {devices.count}); "
                f"legal are 0 and {legal}"
            )
        self.parallel = self._parallel()
        self.cached = options.cached

    def _vocabulary(self) -> int:
        config = self.config
        if config.tokenizer and Path(config.tokenizer).is_file():
            from openvision3.data.text import TextTokenizer

            return len(TextTokenizer.load(config.tokenizer))
        if config.tokenizer or (not config.data and not config.val):
            self.assumptions.append(f"{config.tokenizer or 'the tokenizer'} is not at hand and counted as bert-base-uncased, {BERT:,} pieces")
            return BERT
        return config.vocabulary

    def _length(self, what: str, asked: int, positions: int) -> int:
        if asked > positions:
            raise ValueError(f"{what}-length {asked} is more than the model's {positions} positions")
        if not asked:
            self.assumptions.append(f"{what}s fill all {positions} positions: shorter ones cost less, see --{what}-length")
        return asked or positions

    def _precision(self) -> str:
        device = self.devices.device
        return "bf16" if device.bf16 is None or device.bf16 > (device.fp32 or 0) else "fp32"

    def _parallel(self) -> str:
        asked = getattr(self.config, "parallel", "auto")
        if self.devices.count == 1:
            return "one"
        if asked != "auto":
            return asked
        return "replicate" if self.trainable < 100e6 else "fsdp" if self.devices.nodes == 1 else "hsdp"

    @property
    def shards(self) -> int:
        """Devices that one copy of the weights is spread over."""
        return {"fsdp": self.devices.count, "hsdp": self.devices.in_node}.get(self.parallel, 1)

    @property
    def optimiser_bytes(self) -> float:
        """Two moments in fp32, and one for the matrices that Muon steps."""
        matrices = sum(rows * columns * count for (rows, columns), count in self.matrices.items())
        return FP32 * (2 * self.trainable - (matrices if self.config.optimizer.kind == "muon" else 0))

    @property
    def pieces(self) -> int:
        return self.local // self.micro


def divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def find_vae(name: str) -> VaeShape:
    """Its config.json where it is at hand, else the published one.

    Raises:
        FileNotFoundError: neither. ValueError: another class of VAE.
    """
    from openvision3.model.vae import EMBEDDED

    if name == "pixels":
        return PIXELS
    folder = EMBEDDED if name == "embedded" else Path(name)
    for path in (folder / "vae" / "config.json", folder / "config.json"):
        if path.is_file():
            try:
                return vae_shape(json.loads(path.read_text()), str(path))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} is no VAE config in diffusers' layout: {error}") from error
    if name in PUBLISHED:
        return PUBLISHED[name]
    raise FileNotFoundError(f"the VAE {name} is not at hand and its config not known; name its folder, or one of embedded, pixels, {', '.join(PUBLISHED)}")


def estimate(config: RunConfig, recipe: str, options: Options, devices: Devices | None = None, *, advise: bool = True) -> Estimate:
    """Count everything. Nothing is loaded, and nothing runs.

    Raises:
        ValueError, FileNotFoundError: a device that is unknown, or a batch that cannot be divided so; a VAE that is not known.
    """
    run = _Run(config, options, devices or parse_devices(options.gpus, options.per_node))
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
    _explain(found, run, costs)
    if advise:
        found.advice = _advice(found, config, options)
    return found


def sample_costs(run: _Run) -> dict[str, Cost]:
    """Of one sample that goes through everything, whatever share of the batch does."""
    config, model, b = run.config, run.config.model, run.width_bytes
    shared: dict[str, Any] = {"width_bytes": b, "fused": run.devices.device.fused, "checkpointing": run.checkpointing}
    from openvision3.model.encoder import SIZES
    from openvision3.model.understanding import TEXT_SIZES

    encoder, decoder, text, captioner = (
        SIZES[model.encoder.size],
        SIZES[model.latent_decoder.size],
        TEXT_SIZES[model.text_encoder.size],
        TEXT_SIZES[model.captioner.size],
    )
    n, t, length, patch = run.tokens, run.text_length, run.caption_length, model.encoder.patch**2 * run.vae.latent_channels
    width = encoder.width
    ends = 2 * n * width * FP32  # the norm behind the blocks
    found = {
        "VAE encode": NOTHING if run.cached else vae_encode(run.vae, config.size, b),
        "encoder": linear(n, patch, width, "patchify", backward=1, saved=n * patch * b)
        + transformer(encoder, n + 1, "ViT", **shared)
        + linear(1, width, model.encoder.embed_dim, "pooled projection", saved=ends),
        "latent decoder": linear(n, width, decoder.width, "embed", saved=n * width * b)
        + transformer(decoder, n, "ViT", **shared)
        + linear(n, decoder.width, patch, "to latents", saved=n * decoder.width * (FP32 + b) + n * patch * FP32),
        "VAE decode": vae_decode(run.vae, config.size, b),
        "text encoder": (
            transformer(text, t, "transformer", **shared) + linear(1, text.width, model.encoder.embed_dim, "projection", saved=3 * text.width * FP32)
        ),
        "captioner": linear(n, width, captioner.width, "embed tokens", saved=n * width * b) + transformer(captioner, n + length, "transformer", **shared),
        "vocabulary head": linear(
            length - 1, captioner.width, run.vocabulary, "words x vocabulary", saved=2 * length * captioner.width * FP32 + length * captioner.width * b
        ),
        "contrast": linear(2 * config.captions, model.encoder.embed_dim, config.batch, "rows x all pairs, both ways"),
    }
    pixels = Cost(saved=3 * config.size**2 * 2 * FP32)  # the difference, and the rebuilt picture
    found["VAE decode"] = found["VAE decode"] + pixels
    if model.loss.lambda_perceptual:
        found["perceptual"] = perceptual(model.loss.perceptual, config.size, b)
    return found


def _parts(run: _Run, costs: dict[str, Cost]) -> list[Part]:
    CHUNK = _chunk()

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


def _chunk() -> int:
    from openvision3.model import losses

    return getattr(losses, "CHUNK", 2**24)


# -- memory of one device ------------------------------------------------------------------------------------------


def _memory(run: _Run, costs: dict[str, Cost], micro: int) -> dict[str, float]:
    """Bytes at the fullest moment, the start of the backward pass."""
    CHUNK = _chunk()

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


def _fit(found: Estimate, run: _Run, costs: dict[str, Cost]) -> None:
    memory = run.devices.device.memory
    if memory is None:
        return
    room = memory * (1 - RESERVE)
    found.fits = found.memory_total <= room
    fitting = [m for m in divisors(run.local) if sum(_memory(run, costs, m).values()) <= room]
    found.largest_micro_batch = max(fitting, default=0)


# -- time, network, disk -------------------------------------------------------------------------------------------


def _time(found: Estimate, run: _Run) -> None:
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


def _network(run: _Run) -> tuple[dict[str, float], float | None]:
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
        passes = 2 * run.pieces + (1 if run.pieces > 1 else 0)
        collective("weights", gathered * passes, shards, machines)
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


def _disk(run: _Run) -> dict[str, float | None]:
    config = run.config
    one = run.optimiser_bytes + 2 * FP32 * run.trainable  # weights twice: in the state, and as a plain model
    side = config.size // run.vae.stride
    sample = 2.0 * run.vae.latent_channels * side * side * run.options.crops
    return {
        "one checkpoint": one,
        "checkpoints": one * (config.keep + 1),
        "latent cache, a sample": sample,
        "latent cache": sample * run.options.samples if run.options.samples else None,
        "data": _data_bytes(config.data),
    }


def _data_bytes(data: tuple[str, ...]) -> float | None:
    """What lies there now; None where something is not at hand."""
    from openvision3.data.shards import expand

    total = 0.0
    for name in data:
        if name == "openmoji":
            continue
        paths = [Path(p) for p in expand(name)]
        if not paths or not all(p.exists() for p in paths):
            return None
        total += sum(f.stat().st_size for p in paths for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file())
    return total if data else None


# -- the arithmetic in words, and what follows ---------------------------------------------------------------------


def _explain(found: Estimate, run: _Run, costs: dict[str, Cost]) -> None:
    """Every number with the formula that it came from."""
    note: Callable[[str, str, str], None] = lambda section, formula, result: found.formulas.append((section, formula, result))  # noqa: E731
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
            part_name = name.removeprefix("activations: ")
            count = value / costs[part_name].saved
            note("memory", f"{part_name}: {count:g} of a micro-batch of {run.micro} x {costs[part_name].saved / 1e6:.2f} MB kept", gigabytes(value))
    if device.memory:
        note("memory", f"room: {gigabytes(device.memory)} x {1 - RESERVE:g}", gigabytes(device.memory * (1 - RESERVE)))
    if found.compute_seconds is not None:
        peak = device.bf16 if run.precision == "bf16" else device.fp32
        again = f" + {flops(found.optimiser_flops)} of the optimiser" if found.optimiser_flops else ""
        formula = f"({flops(found.sample_flops)} x {run.local} samples{again}) / ({flops(peak or 0)}/s x {run.options.utilisation:g})"
        note("time", f"computing a step: {formula}", f"{found.compute_seconds:.4g} s")
    for name, value in found.network.items():
        note("network", f"{name}: sent by each device a step", gigabytes(value))
    if found.network and found.network_seconds is not None:
        links = f"{gigabytes(device.link or 0)}/s within a machine"
        if run.devices.nodes > 1:
            links += f", {gigabytes(run.options.network * 1e9 or device.network or 0)}/s between machines"
        note("network", f"bytes / links ({links}), were nothing overlapped", f"{found.network_seconds:.4g} s")
    if found.hours is not None and found.step_seconds is not None:
        note("time", f"{found.steps:,} steps x the longer of computing and network, {found.step_seconds:.4g} s", hours(found.hours))
    if found.cost is not None and found.hours is not None:
        note("cost", f"{found.hours:.2f} h x {run.devices.count} x {run.options.price_per_hour:g}", f"{found.cost:,.0f}")
    kept = f"weights {run.trainable:,} x {FP32} x 2 (state and plain model) + optimiser {run.optimiser_bytes:,.0f}"
    note("disk", f"a checkpoint: {kept} bytes", gigabytes(found.disk["one checkpoint"] or 0))
    note("disk", f"{config.keep} kept and one that is being written", gigabytes(found.disk["checkpoints"] or 0))
    side = config.size // run.vae.stride
    note(
        "disk",
        f"latent cache: {run.vae.latent_channels} x {side}^2 x 2 bytes x {run.options.crops} crops, a sample",
        f"{(found.disk['latent cache, a sample'] or 0) / 1e3:.1f} kB",
    )


def _advice(found: Estimate, config: RunConfig, options: Options) -> list[dict[str, Any]]:
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
        if not getattr(config, "checkpointing", False):
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


def flops(value: float) -> str:
    """2.06e12 -> 2.06 TFLOP."""
    power = min(5, max(0, math.floor(math.log10(value) / 3))) if value >= 1 else 0
    return f"{value / 1000**power:.4g} {('', 'k', 'M', 'G', 'T', 'P')[power]}FLOP"


def gigabytes(value: float) -> str:
    return f"{value / 1e12:.2f} TB" if value >= 1e12 else f"{value / 1e9:.2f} GB" if value >= 1e7 else f"{value / 1e6:.2f} MB"


def hours(value: float) -> str:
    return f"{value * 60:.1f} min" if value < 1 else f"{value:.1f} h" if value < 100 else f"{value:,.0f} h ({value / 24:.1f} days)"
