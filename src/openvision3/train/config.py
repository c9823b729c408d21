"""RunConfig gathers the dataclasses that stand beside their classes: save, load, override from the command line."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from openvision3.data.images import check_size
from openvision3.model.openvision3 import ModelConfig
from openvision3.settings import PathName, read_rules
from openvision3.train.optimizer import OptimizerConfig


@dataclass
class RunConfig:
    """One training run, complete: the same config and seed give the same losses."""

    data: tuple[PathName, ...] = ("openmoji",)
    """openmoji, folders of pictures, shards such as data/{00000..00009}.tar or s3://...; several are mixed"""
    weights: tuple[float, ...] = ()
    """shares of the names in `data` in an epoch, such as 3 1; none: every sample once"""
    index: PathName = ""
    """the folder where `data index` has put the indexes of shards; none: beside each shard"""
    cache: PathName = ""
    """the folder that remote shards are fetched into"""
    cache_gb: float = 100.0
    """most that the cache holds, in GB"""
    val: tuple[PathName, ...] = ("openmoji",)
    """what is evaluated on during training, never trained on; openmoji means its val side, whose families are in no other"""
    only: tuple[str, ...] = ()
    """keep shard samples whose JSON has these values, as in source=clipart"""
    caption_keys: tuple[str, ...] = ()
    """JSON fields of shards that hold captions, the first is the one to predict; none: the .txt member"""
    captions: int = 1
    """captions a picture to contrast, each as a set of its own"""
    sentences: bool = False
    """contrast one random sentence of the caption to predict in its place; the whole caption joins where `captions` wants more"""
    aliases: bool = False
    """openmoji: other names of an emoji are captions to contrast too (with captions 2)"""
    families: bool = False
    """every other epoch puts samples of one family (skin tones and genders of an emoji) into the same batches"""
    size: int = 128
    """side of the training pictures in pixels, a multiple of 16"""
    crop_area: tuple[float, float] = (0.4, 1.0)
    """share of a picture that a random crop covers"""
    latents: PathName = ""
    """a folder of openvision3 data latents: read latents there, and open only pictures whose pixels are compared (pixel_share 0: none, data may be empty)"""
    tokenizer: PathName = ""
    """a tokenizer.json; none: that of --init, or a WordPiece trained on the captions"""
    vocabulary: int = 4096
    """largest vocabulary of a trained WordPiece"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """the model"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """the optimiser"""
    steps: int = 1000
    """optimiser steps of the whole run"""
    minutes: float = 0.0
    """fix `steps` from a measured rate so that training takes this long; 0: take `steps`"""
    batch: int = 64
    """pictures a step, over all devices: the contrast is among all of them"""
    micro_batch: int = 0
    """pictures a device computes at a time; the numbers stay those of the whole batch, for one more forward of the two encoders; 0: all of its share"""
    lanes: int = 0
    """parts of the batch that read remote shards of their own, so that up to so many machines fetch each shard once; 0: the most up to 16 that divide it"""
    pixel_share: float = 0.25
    """share of the batch that is decoded to pixels: 1, 1/2, 1/4 ... or 0"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto measures both for a moment and takes the faster"""
    device: str = "auto"
    """auto, cpu or cuda"""
    parallel: Literal["auto", "replicate", "fsdp", "hsdp"] = "auto"
    """of several processes each holds the whole model, a shard of it, or a shard within its machine; auto: by the model's size"""
    checkpointing: bool = False
    """keep no activations within blocks and compute them again in the backward pass: less memory, a third more work"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile each block; auto: on a GPU"""
    seed: int = 0
    """of the weights, the order and every random draw"""
    workers: int = 0
    """processes that prepare pictures; 0: one thread"""
    log_every: int = 10
    """steps between lines"""
    eval_every: int = 250
    """steps between evaluations and sample grids; 0: only at the end"""
    save_every: int = 250
    """steps between checkpoints; 0: only at the end"""
    keep: int = 2
    """newest checkpoints kept"""
    keep_best: int = 1
    """checkpoints of lowest val/loss kept besides, where evaluation and saving fall on the same steps"""
    track: tuple[str, ...] = ()
    """wandb, trackio or both, beside metrics.jsonl and tensorboard"""
    fingerprint: int = 20_000
    """most samples of which a fingerprint is written into the model, by which evaluate knows what it has seen; 0: never"""
    out: PathName = ""
    """the run folder; none: runs/RECIPE"""
    init: PathName = ""
    """start from the weights of a shipped model, a model folder or a run (a new optimiser)"""
    resume: bool = False
    """go on from the last checkpoint in the run folder"""

    def __post_init__(self):
        check_size(self.size)
        for name in ("steps", "batch", "captions", "vocabulary", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("eval_every", "save_every", "workers", "minutes", "micro_batch", "keep_best", "fingerprint", "lanes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must be a number that is not negative")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} must be a whole number from 0 to 2^63 - 1")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise ValueError(f"precision {self.precision!r} is unknown; legal are auto, bf16 and fp32")
        for name, legal in (("parallel", ("auto", "replicate", "fsdp", "hsdp")), ("compile", ("auto", "on", "off"))):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; legal are {', '.join(legal)}")
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} does not divide the batch of {self.batch}")
        if self.lanes and self.batch % self.lanes:
            raise ValueError(f"lanes {self.lanes} do not divide the batch of {self.batch}")
        if self.pixel_share and (not 0 < self.pixel_share <= 1 or abs(1 / self.pixel_share - round(1 / self.pixel_share)) > 1e-6):
            raise ValueError(f"pixel_share {self.pixel_share} must be 0 or one over a whole number, such as 1, 0.5, 0.25")
        if 0 < self.pixel_share * self.batch < 1 - 1e-6:
            raise ValueError(f"pixel_share {self.pixel_share} of a batch of {self.batch} is less than one picture; use at least {1 / self.batch:g}")
        if not self.pixel_share and self.model.loss.lambda_perceptual:
            raise ValueError(
                f"lambda_perceptual {self.model.loss.lambda_perceptual} needs pictures to compare, and pixel_share 0 decodes none; "
                "set --pixel-share, or --model.loss.lambda-perceptual 0"
            )
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError(f"crop_area {self.crop_area} must be two shares with 0 < first <= second <= 1")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device, re.ASCII):
            raise ValueError(f"device {self.device!r} is not supported; choose one of auto, cpu, cuda and cuda:N, such as cuda:1")
        if self.weights and (len(self.weights) != len(self.data) or not all(0 < weight < math.inf for weight in self.weights)):
            raise ValueError(f"weights {' '.join(f'{w:g}' for w in self.weights)}: give one positive number for each of the {len(self.data)} names in data")
        if self.weights and self.families:
            raise ValueError("weights and families both order an epoch; set --no-families, or leave out --weights")
        if not 0 < self.cache_gb < math.inf:
            raise ValueError(f"cache_gb {self.cache_gb} must be a positive number")
        read_rules(self.only)

    @property
    def only_values(self) -> dict[str, str]:
        return read_rules(self.only)
