"""What a latent cache is: the job that writes it, and the settings that its latents depend on. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from openvision3.data.view import View
from openvision3.settings import PathName, check_numbers, read_rules

FORMAT = "openvision3 latents 2"
OLD_FORMAT = "openvision3 latents 1"
"""Identifies a sample by its name (`Source.key`), not by its sample key; still read."""

PART = 1024
"""Samples of the source in one part: 32 MB with four crops of 8 KB each."""


@dataclass
class LatentJob:
    """All that `openvision3 data latents` is given; processes on other machines get the same."""

    data: tuple[PathName, ...]
    """openmoji, folders of images, shards such as data/{00000..00009}.tar"""
    out: PathName = "latents"
    """the folder of the cache"""
    vae: PathName = "embedded"
    """the VAE to train with: embedded, a folder in diffusers' layout, or a hub id"""
    shift: bool | None = None
    """as --model.vae.shift of the training run"""
    size: int = 128
    """side of the crops in pixels, as --size of the training run"""
    crops: int = 4
    """random crops per image; training takes them in turn"""
    crop_area: tuple[float, float] = (0.4, 1.0)
    """smallest and largest share of an image that a random crop covers"""
    mirror: float = 0.0
    """probability that a crop is mirrored left to right, as --mirror of the training run"""
    seed: int = 0
    """seed of the crops"""
    batch: int = 32
    """images to encode at once"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """precision of the VAE; auto: whichever of the two is measured to be faster"""
    device: str = "auto"
    """where to compute"""
    workers: int = 0
    """processes that decode images; 0: this process decodes them"""
    only: tuple[str, ...] = ()
    """keep only shard samples whose JSON has these values (source=clipart) or other ones (source!=stamps)"""
    caption_keys: tuple[str, ...] = ()
    """JSON fields of shards that hold captions. Not set: the .txt member"""
    aliases: bool = False
    """openmoji: keep the other names of an emoji too"""
    part_samples: int = PART
    """samples per file; use 16384 for hundreds of millions of samples"""
    index: PathName = ""
    """the folder of index files that data index has written. Not set: beside each shard"""
    cache: PathName = ""
    """the folder for copies of remote shards"""
    cache_gb: float = 100.0
    """size limit of that folder, in GB"""
    engine: Literal["local", "ray"] = "local"
    """local: this process (with torchrun or srun: its share); ray: a Ray cluster"""
    actors: int = 0
    """processes that Ray starts; 0: one for each GPU, or for each CPU if there is no GPU"""

    def __post_init__(self):
        for name, choices in (("precision", ("auto", "bf16", "fp32")), ("engine", ("local", "ray"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if self.vae == "pixels":
            raise ValueError("pixels is no VAE, and a cache would save nothing; choose another VAE with --vae")
        read_rules(self.only)

    @property
    def view(self) -> View:
        """What a crop is. Raises ValueError."""
        return View(self.crop_area, self.mirror)


@dataclass(frozen=True)
class LatentSettings:
    """What the latents of a cache depend on. `data` and `vae` are names for people and are never compared."""

    vae: str
    vae_sha256: str
    scale: float
    shift: float
    channels: int
    stride: int
    size: int
    crops: int
    crop_area: tuple[float, float]
    seed: int
    precision: str
    samples: int
    part_samples: int
    data: tuple[str, ...]
    mirror: float = 0.0
    """absent from caches of older versions"""

    def __post_init__(self):
        check_numbers(self, 1, "crops", "samples", "part_samples")
        if self.size < 16 or self.size % max(16, self.stride):
            raise ValueError(f"size {self.size} must be a positive multiple of {max(16, self.stride)}")
        _ = self.view  # raises for what is no view
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} must be a whole number from 0 to 2^63 - 1")

    @property
    def view(self) -> View:
        return View(self.crop_area, self.mirror)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the latents of one crop."""
        return self.channels, self.size // self.stride, self.size // self.stride

    @property
    def parts(self) -> int:
        return -(-self.samples // self.part_samples)

    def range(self, part: int) -> range:
        """The samples of the source in this part."""
        return range(part * self.part_samples, min((part + 1) * self.part_samples, self.samples))

    def differences(self, other: LatentSettings) -> list[str]:
        """`name: this, not that` for each setting that differs."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name} {mine[name]}, not {theirs[name]}" for name in mine if name not in ("data", "vae") and mine[name] != theirs[name]]

    @classmethod
    def read(cls, path: Path) -> LatentSettings:
        """Raises OSError; ValueError if the file does not hold settings."""
        values = read_json(path)
        if values.get("format") not in (FORMAT, OLD_FORMAT):
            raise ValueError(f"{path} is of format {values.get('format')!r}; this version reads {FORMAT!r}")
        values.setdefault("mirror", 0.0)
        if missing := [name for name in cls.__dataclass_fields__ if name not in values]:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
        values |= {name: tuple(values[name]) for name in ("crop_area", "data")}
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


def read_json(path: Path) -> dict[str, Any]:
    """Raises OSError; ValueError if the file does not hold a JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged, it holds no JSON object")
    return value
