"""The settings of the data that any training of images reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from openvision3.data.crops import check_size
from openvision3.data.view import View
from openvision3.settings import PathName, check_numbers, read_rules


@dataclass
class DataConfig:
    """Which images with words are trained on and evaluated, and how they are read. Derived before `LoopConfig`, so that these fields come first."""

    DATA_FREE: ClassVar[tuple[str, ...]] = ("index", "cache", "cache_gb")
    """fields that change no number"""
    DATA_SETTLED: ClassVar[tuple[tuple[str, Any], ...]] = (("lanes", 0),)
    """(field, value) that a run replaces by its own choice"""

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
    aliases: bool = False
    """openmoji: contrast the other names of an emoji too (with captions 2)"""
    size: int = 128
    """side of the training images in pixels, a multiple of 16"""
    crop_area: tuple[float, float] = (0.4, 1.0)
    """smallest and largest share of an image that a random crop covers; 1 1: the central square"""
    mirror: float = 0.0
    """probability that a training image is mirrored left to right, such as 0.5"""
    latents: PathName = ""
    """a latent cache written by data latents; only images whose pixels are compared are then decoded (none with pixel_share 0, where data may be empty)"""
    lanes: int = 0
    """parts of the batch with remote shards of their own: up to that many machines fetch each shard once; 0: the most up to 16 that divide the batch"""

    def check_data(self, batch: int) -> None:
        """Raises ValueError for the first of these fields that cannot be used in steps of `batch` images."""
        check_size(self.size)
        check_numbers(self, 0, "lanes")
        if self.lanes and batch % self.lanes:
            raise ValueError(f"lanes {self.lanes} do not divide the batch of {batch}")
        _ = self.view  # raises for what is no view
        if self.weights and (len(self.weights) != len(self.data) or not all(0 < weight < math.inf for weight in self.weights)):
            raise ValueError(f"weights {' '.join(f'{w:g}' for w in self.weights)}: give one positive number for each of the {len(self.data)} names in data")
        if not 0 < self.cache_gb < math.inf:
            raise ValueError(f"cache_gb {self.cache_gb} must be a positive number")
        read_rules(self.only)

    @property
    def view(self) -> View:
        """What a training view is. Raises ValueError."""
        return View(tuple(self.crop_area), self.mirror)  # type: ignore[arg-type]

    @property
    def only_values(self) -> dict[str, str]:
        return read_rules(self.only)
