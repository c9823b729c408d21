"""The settings of a training of OpenVision 3."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from openvision3.data.crops import check_size
from openvision3.model.openvision3 import ModelConfig
from openvision3.settings import PathName, check_numbers, read_rules
from openvision3.train.loop_config import LoopConfig


@dataclass
class _ModelAndData:
    """What is trained, and on what: apart from `PretrainConfig` only so that these fields come first, in --help and in config.json."""

    data: tuple[PathName, ...] = ("openmoji",)
    """openmoji, folders of images, or shards such as data/{00000..00009}.tar or s3://...; several names are mixed"""
    weights: tuple[float, ...] = ()
    """relative share of each name of `data` in an epoch, such as 3 1. Not set: every sample once"""
    index: PathName = ""
    """the folder of index files that data index has written. Not set: beside each shard"""
    cache: PathName = ""
    """the folder for copies of remote shards"""
    cache_gb: float = 100.0
    """size limit of that folder, in GB"""
    val: tuple[PathName, ...] = ("openmoji",)
    """held-out images, evaluated during training and never trained on; openmoji: its val side, which shares no family with the others"""
    only: tuple[str, ...] = ()
    """keep only shard samples whose JSON has these values (source=clipart) or other ones (source!=stamps)"""
    caption_keys: tuple[str, ...] = ()
    """JSON fields of shards that hold captions; the first is the one to predict. Not set: the .txt member"""
    captions: int = 1
    """captions per image in the contrastive loss, which is the mean over that many sets of one caption per image"""
    sentences: bool = False
    """contrast one random sentence of the caption to predict instead of the whole; with `captions` above 1 the whole caption is contrasted too"""
    aliases: bool = False
    """openmoji: contrast the other names of an emoji too (with captions 2)"""
    families: bool = False
    """in every other epoch, put samples of one family (skin tones and genders of an emoji) into the same batches"""
    size: int = 128
    """side of the training images in pixels, a multiple of 16"""
    crop_area: tuple[float, float] = (0.4, 1.0)
    """smallest and largest share of an image that a random crop covers"""
    latents: PathName = ""
    """a latent cache written by data latents; only images whose pixels are compared are then decoded (none with pixel_share 0, where data may be empty)"""
    tokenizer: PathName = ""
    """a tokenizer.json. Not set: that of --init, or a WordPiece trained on the captions"""
    vocabulary: int = 4096
    """size limit of the vocabulary of a trained WordPiece"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """the model"""


@dataclass
class PretrainConfig(LoopConfig, _ModelAndData):
    """One training of OpenVision 3, complete. Its fields and those of `LoopConfig` lie flat in config.json and on the command line."""

    FREE: ClassVar[tuple[str, ...]] = (*LoopConfig.FREE, "fingerprint", "index", "cache", "cache_gb")
    PLACES: ClassVar[tuple[str, ...]] = ("data", "val", "latents", "tokenizer", "model.vae.name", "model.loss.lpips_backbone", "model.loss.lpips_linear")
    SETTLED: ClassVar[tuple[tuple[str, Any], ...]] = (*LoopConfig.SETTLED, ("lanes", 0))

    lanes: int = 0
    """parts of the batch with remote shards of their own: up to that many machines fetch each shard once; 0: the most up to 16 that divide the batch"""
    pixel_share: float = 0.25
    """share of the batch that is decoded to pixels: 1, 1/2, 1/4 ... or 0"""
    decoder_finish: float = 0.0
    """last share of the steps, in which the latent decoder alone trains, on tokens of the encoder as it is then; 0: all parts train to the end"""
    fingerprint: int = 20_000
    """save hashes of up to this many training samples with the model, so that evaluate can tell which samples it has seen; 0: none"""

    def __post_init__(self):
        super().__post_init__()
        check_size(self.size)
        check_numbers(self, 1, "captions", "vocabulary")
        check_numbers(self, 0, "fingerprint", "lanes")
        if self.lanes and self.batch % self.lanes:
            raise ValueError(f"lanes {self.lanes} do not divide the batch of {self.batch}")
        if self.pixel_share and (not 0 < self.pixel_share <= 1 or abs(1 / self.pixel_share - round(1 / self.pixel_share)) > 1e-6):
            raise ValueError(f"pixel_share {self.pixel_share} must be 0 or one over a whole number, such as 1, 0.5, 0.25")
        if 0 < self.pixel_share * self.batch < 1 - 1e-6:
            raise ValueError(f"pixel_share {self.pixel_share} of a batch of {self.batch} is less than one image; use at least {1 / self.batch:g}")
        if not self.pixel_share and self.model.loss.lambda_perceptual:
            raise ValueError(
                f"lambda_perceptual {self.model.loss.lambda_perceptual} needs images to compare, and pixel_share 0 decodes none; "
                "set --pixel-share, or --model.loss.lambda-perceptual 0"
            )
        if not 0 <= self.decoder_finish < 1:
            raise ValueError(f"decoder_finish {self.decoder_finish} must be at least 0 and below 1")
        if self.decoder_finish and not self.model.loss.omega_rec:
            raise ValueError(f"decoder_finish {self.decoder_finish} trains the latent decoder, which omega_rec 0 leaves without a loss")
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError(f"crop_area {self.crop_area} must be two shares with 0 < first <= second <= 1")
        if self.weights and (len(self.weights) != len(self.data) or not all(0 < weight < math.inf for weight in self.weights)):
            raise ValueError(f"weights {' '.join(f'{w:g}' for w in self.weights)}: give one positive number for each of the {len(self.data)} names in data")
        if self.weights and self.families:
            raise ValueError("weights and families both order an epoch; set --no-families, or leave out --weights")
        if not 0 < self.cache_gb < math.inf:
            raise ValueError(f"cache_gb {self.cache_gb} must be a positive number")
        read_rules(self.only)

    @property
    def finish_from(self) -> int:
        """Steps before those that train the latent decoder alone."""
        return self.steps - round(self.decoder_finish * self.steps)

    @property
    def only_values(self) -> dict[str, str]:
        return read_rules(self.only)
