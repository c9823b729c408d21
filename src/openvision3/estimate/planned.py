"""A config and devices -> the model on the meta device, its costs, and how the batch is divided."""

from __future__ import annotations

import contextlib
import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openvision3.estimate.devices import Devices
from openvision3.estimate.units import FP32
from openvision3.settings import check_numbers
from openvision3.train.config import PretrainConfig

if TYPE_CHECKING:
    from torch import nn

    from openvision3.estimate.counts import Cost, Shapes
    from openvision3.generate.config import GenerateConfig
    from openvision3.model.openvision3 import OpenVision3
    from openvision3.model.vae import VAE
    from openvision3.understand.config import LlavaConfig

BERT = 30_524
"""word pieces of bert-base-uncased and the two special tokens that it lacks: begin and end"""

FLUX = {
    "_class_name": "AutoencoderKL", "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
"""FLUX.1's published config, so that no download is needed; `ae_params` of its repository say the same."""
PUBLISHED = dict.fromkeys(("black-forest-labs/FLUX.1-schnell", "black-forest-labs/FLUX.1-dev"), FLUX)

UNDERSTANDING = ("text encoder", "captioner", "vocabulary head", "contrast")
"""parts that steps of the latent decoder alone leave out"""


@dataclass
class Options:
    """Options of `estimate` in addition to the fields of the run."""

    gpus: str = ""
    """the devices, such as 8xh100. Not set: this machine's device"""
    utilisation: float = 0.40
    """share of the peak speed that the run reaches; a run's log shows its samples/s"""
    price_per_hour: float = 0.0
    """price of one device per hour"""
    per_node: int = 8
    """devices per machine"""
    network: float = 0.0
    """GB/s to other machines, per device and direction; 0: as in the maker's own machine"""
    text_length: int = 0
    """word pieces of a caption to contrast, 0: all positions of the model; of a conversation besides its images, 0: measured on the data"""
    caption_length: int = 0
    """word pieces of a caption to predict, 0: all positions of the model; of the answers of a conversation, 0: measured on the data"""
    samples: int = 0
    """samples in the data, to compute the size of a latent cache"""
    crops: int = 1
    """crops per image in the latent cache"""
    cached: bool = False
    """assume that latents are read from a cache, so that images are neither decoded nor encoded"""
    json: bool = False
    """one JSON value on stdout, for scripts"""
    explain: bool = False
    """print how each number is computed"""

    def __post_init__(self):
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation {self.utilisation} must be above 0 and at most 1")
        for name in ("price_per_hour", "network", "text_length", "caption_length", "samples"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name.replace('_', '-')} {getattr(self, name)} must be a number that is not negative")
        check_numbers(self, 1, "crops")


class PlannedRun(ABC):
    """What all numbers of an estimate are computed from. Each kind of training counts its own model, in `_count_model`.

    Raises:
        ValueError, FileNotFoundError: the batch cannot be divided so, the VAE is unknown, or a length exceeds the model's positions.
    """

    config: PretrainConfig | GenerateConfig | LlavaConfig
    vae: VAE
    vae_source: str
    vocabulary = 0
    """word pieces; 0: no texts are read"""
    caption_length = 0
    pixel_share = 0.0
    """share of the images that are decoded to pixels"""
    parameters: dict[str, int]
    """of each trained part"""
    frozen = 0
    """parameters of frozen parts, without the VAE's"""
    frozen_bytes = 0.0
    """what these take; set where they are not all in fp32"""
    frozen_saved = 0
    """those of them that every checkpoint holds"""
    in_blocks: int
    largest_block: int
    costs: dict[str, Cost]
    passes: dict[str, float]
    """{part: passes through it for each sample}, of a step that trains everything"""
    kept_numbers: int
    """of a sample whose batch is computed in pieces, from the first pass to its own piece"""
    understood = 1.0
    """share of the steps that train more than the latent decoder"""

    def __init__(self, config: PretrainConfig | GenerateConfig | LlavaConfig, options: Options, devices: Devices):
        from openvision3.distributed import Ranks, choose_parallel

        self.config, self.options, self.devices = config, options, devices
        self.assumptions: list[str] = []
        bf16, fp32 = devices.device.bf16, devices.device.fp32
        self.precision = config.precision if config.precision != "auto" else "bf16" if bf16 is None or bf16 > (fp32 or 0) else "fp32"
        self.width_bytes = 2 if self.precision == "bf16" else FP32
        self.trainable, self.optimiser_flops, self.optimiser_bytes = 0, 0.0, 0.0
        self._divide()
        self._count_model()
        self.frozen_bytes = self.frozen_bytes or float(FP32 * self.frozen)
        self.vae_parameters = sum(p.numel() for p in self.vae.parameters())
        if options.cached:
            self.costs.pop("VAE encode", None)
        count = devices.count
        ranks = Ranks(0, count, 0, devices.in_node)
        self.parallel = "one" if count == 1 else choose_parallel(config.parallel, self.trainable, ranks)
        self.shards = {"fsdp": count, "hsdp": devices.in_node}.get(self.parallel, 1)
        """devices that one copy of the weights is spread over"""

    @abstractmethod
    def _count_model(self) -> None:
        """Set everything that is declared above, and call `_count_trained`."""

    def repeated(self) -> dict[str, float]:
        """{part: share of its forward pass that is computed twice}."""
        return {}

    def extra_work(self) -> dict[str, float]:
        """{what: operations} of work beside the steps, of all devices together."""
        return {}

    def _count_trained(self, model: nn.Module) -> None:
        """Trained parameters, their blocks and their optimiser."""
        from openvision3.distributed import block_lists
        from openvision3.estimate.counts import count_muon

        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        blocks = [sum(p.numel() for p in block.parameters()) for blocks in block_lists(model) for block in blocks]
        self.in_blocks, self.largest_block = sum(blocks), max(blocks, default=0)
        self.optimiser_flops, self.optimiser_bytes = 0.0, 2.0 * FP32 * self.trainable
        if self.config.optimizer.kind == "muon":
            self.optimiser_flops, self.optimiser_bytes = count_muon(model, self.config.optimizer)

    def _shapes(self, text_length: int, caption_length: int) -> Shapes:
        from openvision3.estimate.counts import Shapes

        config = self.config
        return Shapes(config.size, text_length, caption_length, self.precision == "bf16", self.devices.device.name == "cpu", config.checkpointing)

    def _build_model(self, name: str) -> tuple[OpenVision3, int]:
        """(a finished model on the meta device, the side of its images), from its config if that is here, otherwise the paper's."""
        import torch

        from openvision3 import hub
        from openvision3.data.text import TextTokenizer
        from openvision3.model.openvision3 import OpenVision3

        try:
            folder = hub.find_folder(name)
        except FileNotFoundError:
            from openvision3.train.recipes import base_high_res

            paper = base_high_res()
            model, size, vocabulary = paper.model, paper.size, BERT
            self.assumptions.append(f"the model {name} is not here and is taken for the paper's: encoder B on {model.vae.name}")
        else:
            config = hub.read_config(folder)
            model, size, vocabulary = config.model, config.size, len(TextTokenizer.load(folder / "tokenizer.json"))
        self._build_vae(model.vae.name)
        with torch.device("meta"):
            return OpenVision3(model, self.vae, vocabulary), size

    def _build_vae(self, name: str) -> None:
        import torch

        self.vae, self.vae_source = build_vae(name, torch.bfloat16 if self.precision == "bf16" else torch.float32)

    def _divide(self) -> None:
        config, count = self.config, self.devices.count
        if config.batch % count:
            raise ValueError(f"batch {config.batch} cannot be divided among {count} devices; choose a multiple of {count}")
        self.local = config.batch // count
        self.micro = config.micro_batch or self.local
        if self.local % self.micro:
            raise ValueError(
                f"micro_batch {self.micro} does not divide the {self.local} images of a device (batch {config.batch} / {count}); "
                f"choose one of 0, {', '.join(map(str, divisors(self.local)))}"
            )
        self.pieces = self.local // self.micro
        # Sharded blocks are made whole in forward and backward of each piece; the rest once for both.
        self.gathers, self.outside_gathers, self.embedding_blocks = 2 * self.pieces, self.pieces, 0

    def _length(self, what: str, length: int, positions: int) -> int:
        if length > positions:
            raise ValueError(f"{what}-length {length} is more than the model's {positions} positions")
        if not length:
            self.assumptions.append(f"{what}s fill all {positions} positions (shorter ones cost less, see --{what}-length)")
        return length or positions


class PlannedPretraining(PlannedRun):
    """A training of our model, whole or its latent decoder alone."""

    config: PretrainConfig

    def _count_model(self) -> None:
        import torch

        from openvision3.distributed import block_lists
        from openvision3.estimate.counts import count_parts
        from openvision3.model.openvision3 import OpenVision3

        config, options = self.config, self.options
        self._build_vae(config.model.vae.name)
        self.vocabulary = self._vocabulary()
        self.text_length = self._length("text", options.text_length, config.model.text_encoder.positions)
        self.caption_length = self._length("caption", options.caption_length, config.model.captioner.positions)
        with torch.device("meta"):
            model = OpenVision3(config.model, self.vae, self.vocabulary)
        parts = {"encoder": model.encoder, "latent decoder": model.latent_decoder, "text encoder": model.text_encoder, "captioner": model.captioner}
        self.pixel_share, self.understood = config.pixel_share, 1 - config.decoder_share
        self.passes = dict.fromkeys(("VAE decode", "perceptual", "discriminator"), config.pixel_share) | {"text encoder": config.captions}
        self.kept_numbers = self.vae.latent_channels * (config.size // self.vae.stride) ** 2
        decoder_alone = config.decoder_share == 1
        if decoder_alone:
            model.requires_grad_(False)
            model.latent_decoder.requires_grad_(True)
            parts = {"latent decoder": model.latent_decoder}
            self.frozen = self.frozen_saved = sum(p.numel() for name, p in model.named_parameters() if not p.requires_grad and not name.startswith("vae."))
        if self.pieces > 1:  # a pass embeds all pieces first
            self.outside_gathers += 1
            lists = [blocks for part in (model.encoder, model.text_encoder) for blocks in block_lists(part)]
            self.embedding_blocks = self.pieces * sum(p.numel() for blocks in lists for p in blocks.parameters())
        self.parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        self._count_trained(model)
        shapes = self._shapes(self.text_length, self.caption_length)
        self.costs = count_parts(model, shapes, config.captions, config.batch)
        if config.decoder_share:
            encoder, all_train = self.costs["encoder"], self.understood
            saved = 0.0 if decoder_alone else encoder.saved
            self.costs["encoder"] = replace(encoder, backward=encoder.backward * all_train, again=encoder.again * all_train, saved=saved)
        if decoder_alone:
            self.costs = {name: cost for name, cost in self.costs.items() if name not in UNDERSTANDING}
            self._add_discriminator(shapes)
        elif config.decoder_share:
            self.assumptions.append(f"the last {config.decoder_share:.0%} of the steps train the latent decoder alone: operations are means over all steps")

    def repeated(self) -> dict[str, float]:
        from openvision3.model.losses import CHUNK

        chunked = {
            "vocabulary head": self.micro * self.caption_length * self.vocabulary > CHUNK,
            "contrast": self.local * self.config.batch > CHUNK,
            "encoder": self.pieces > 1,  # the pass that embeds the whole batch first
            "text encoder": self.pieces > 1,
        }
        return {name: self.understood if name == "encoder" else 1.0 for name, twice in chunked.items() if twice}

    def _add_discriminator(self, shapes: Shapes) -> None:
        """Its operations, and those of the VAE that measure the gradients."""
        from openvision3.estimate.counts import count_discriminator
        from openvision3.train.adversarial import EVERY
        from openvision3.train.decoder_config import DecoderConfig

        if not isinstance(self.config, DecoderConfig) or not self.config.adversarial.weight:
            return
        parameters, cost = count_discriminator(shapes)
        self.parameters["discriminator"] = parameters
        self.trainable += parameters
        self.optimiser_bytes += 2.0 * FP32 * parameters
        self.costs["discriminator"] = cost
        if decode := self.costs.get("VAE decode"):
            self.costs["VAE decode"] = replace(decode, again=decode.again + 2 / EVERY * decode.backward)

    def _vocabulary(self) -> int:
        """Of the tokenizer.json of the run or of the model it starts from; if it is not here, bert's for the paper's captions."""
        config = self.config
        for path in (Path(config.tokenizer or " "), Path(config.init or " ") / "tokenizer.json"):
            if path.is_file():
                from openvision3.data.text import TextTokenizer

                return len(TextTokenizer.load(path))
        if config.tokenizer or "re_caption" in config.caption_keys:
            self.assumptions.append(f"{config.tokenizer or 'the tokenizer'} is missing here and is taken for bert-base-uncased, {BERT:,} pieces")
            return BERT
        return config.vocabulary


def divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def build_vae(name: str, dtype: Any) -> tuple[Any, str]:
    """The VAE on the meta device from its config.json, or from the published config if that is not here; and where the config is from.

    Raises:
        FileNotFoundError: no config. ValueError: another class of VAE, or a damaged config.
    """
    import torch

    from openvision3 import hub
    from openvision3.fetch.store import find_hub
    from openvision3.model.vae import LEVELS, VAE

    if name == "pixels":
        return VAE(None), "no VAE"
    folder = hub.EMBEDDED if name == "embedded" else Path(name)
    if name not in PUBLISHED and not folder.is_dir() and name.count("/") == 1:
        with contextlib.suppress(FileNotFoundError):
            folder = find_hub(name, (("vae/config.json",), ("config.json",)), "the VAE")
    path = next((path for path in (folder / "vae" / "config.json", folder / "config.json") if path.is_file()), None)
    if path is None and name not in PUBLISHED:
        raise FileNotFoundError(f"the VAE {name} is not here and its config is unknown; name its folder, or one of embedded, pixels, {', '.join(PUBLISHED)}")
    source = str(path) if path else f"https://huggingface.co/{name}/blob/main/vae/config.json"
    try:
        config = json.loads(path.read_text()) if path else PUBLISHED[name]
        kind = config.get("_class_name")
        if kind not in LEVELS:
            raise ValueError(f"it is a {kind}; choose one of {', '.join(LEVELS)}")
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        with torch.device("meta"):
            return VAE(getattr(diffusers, kind).from_config(config), name=name, dtype=dtype), source
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source} is not a VAE config in diffusers' layout: {error}") from error
