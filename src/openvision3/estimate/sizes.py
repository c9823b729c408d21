"""A config read for counting: the sizes that all formulas need, and the cost of each part at those sizes."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openvision3.estimate.arithmetic import FP32, NOTHING, PIXELS, PUBLISHED, Cost, VaeShape, linear, perceptual, transformer, vae_decode, vae_encode, vae_shape
from openvision3.estimate.devices import Devices
from openvision3.fetch.store import find_hub
from openvision3.train.config import PretrainConfig

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


class Sizes:
    """A config read for counting: the sizes that all the formulas need."""

    def __init__(self, config: PretrainConfig, options: Options, devices: Devices):
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
        if model.loss.encoder_learns_from == "nothing":
            for name, parameter in encoder.named_parameters():
                parameter.requires_grad_(name.startswith("pool_"))
        self.trainable = sum(p.numel() for part in parts.values() for p in part.parameters() if p.requires_grad) + 1
        lists = [m for part in parts.values() for m in part.modules() if isinstance(m, nn.ModuleList) and any(p.requires_grad for p in m.parameters())]
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
        self.checkpointing = config.checkpointing
        if config.batch % devices.count:
            raise ValueError(f"batch {config.batch} cannot be divided among {devices.count} devices; legal are multiples of {devices.count}")
        self.local = config.batch // devices.count
        self.micro = config.micro_batch or self.local
        if self.local % self.micro:
            legal = ", ".join(str(n) for n in divisors(self.local))
            raise ValueError(
                f"micro_batch {self.micro} does not divide the {self.local} pictures of a device (batch {config.batch} / {devices.count}); "
                f"legal are 0 and {legal}"
            )
        self.parallel = self._parallel()
        self.cached = options.cached

    def _vocabulary(self) -> int:
        """That of the tokenizer.json where it is at hand, of the run or the model that it starts from too; else bert's for the paper's captions."""
        config = self.config
        for path in (Path(config.tokenizer or " "), Path(config.init or " ") / "tokenizer.json"):
            if path.is_file():
                from openvision3.data.text import TextTokenizer

                return len(TextTokenizer.load(path))
        if config.tokenizer or "re_caption" in config.caption_keys:
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
        from openvision3.distributed import Ranks, choose_parallel

        count = self.devices.count
        return "one" if count == 1 else choose_parallel(self.config.parallel, self.trainable, Ranks(0, count, 0, self.devices.in_node))

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
    def gathers(self) -> int:
        """How often a step makes sharded weights whole: forward and backward of each piece, and the pass that embeds them all."""
        return 2 * self.pieces + (1 if self.pieces > 1 else 0)

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
    from openvision3.hub import EMBEDDED

    if name == "pixels":
        return PIXELS
    folder = EMBEDDED if name == "embedded" else Path(name)
    if name not in PUBLISHED and not folder.is_dir() and name.count("/") == 1:
        with contextlib.suppress(FileNotFoundError):
            folder = find_hub(name, (("vae/config.json",), ("config.json",)), "the VAE")
    for path in (folder / "vae" / "config.json", folder / "config.json"):
        if path.is_file():
            try:
                return vae_shape(json.loads(path.read_text()), str(path))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} is no VAE config in diffusers' layout: {error}") from error
    if name in PUBLISHED:
        return PUBLISHED[name]
    raise FileNotFoundError(f"the VAE {name} is not at hand and its config not known; name its folder, or one of embedded, pixels, {', '.join(PUBLISHED)}")


def sample_costs(run: Sizes) -> dict[str, Cost]:
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
    if model.loss.encoder_learns_from == "nothing":
        found["encoder"] = found["encoder"].without_backward()
    if model.loss.lambda_perceptual:
        found["perceptual"] = perceptual(model.loss.perceptual, config.size, b)
    return found
