"""The settings of a training of OpenVision 3."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from openvision3.model.openvision3 import ModelConfig
from openvision3.settings import PathName, check_numbers
from openvision3.train.data_config import DataConfig
from openvision3.train.loop_config import LoopConfig


@dataclass
class _ModelAndData(DataConfig):
    """What is trained, and on what: apart from `PretrainConfig` only so that these fields come first, in --help and in config.json."""

    captions: int = 1
    """captions per image in the contrastive loss, which is the mean over that many sets of one caption per image"""
    sentences: bool = False
    """contrast one random sentence of the caption to predict instead of the whole; with `captions` above 1 the whole caption is contrasted too"""
    families: bool = False
    """in every other epoch, put samples of one family (skin tones and genders of an emoji) into the same batches"""
    tokenizer: PathName = ""
    """a tokenizer.json. Not set: that of --init, or a WordPiece trained on the captions"""
    vocabulary: int = 4096
    """size limit of the vocabulary of a trained WordPiece"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """the model"""


@dataclass
class PretrainConfig(LoopConfig, _ModelAndData):
    """One training of OpenVision 3, complete. Its fields and those of `LoopConfig` lie flat in config.json and on the command line."""

    FREE: ClassVar[tuple[str, ...]] = (*LoopConfig.FREE, "fingerprint", *DataConfig.DATA_FREE)
    PLACES: ClassVar[tuple[str, ...]] = ("data", "val", "latents", "tokenizer", "model.vae.name", "model.loss.lpips_backbone", "model.loss.lpips_linear")
    SETTLED: ClassVar[tuple[tuple[str, Any], ...]] = (*LoopConfig.SETTLED, *DataConfig.DATA_SETTLED)

    pixel_share: float = 0.25
    """share of the batch that is decoded to pixels: 1, 1/2, 1/4 ... or 0"""
    decoder_finish: float = 0.0
    """last share of the steps, in which the latent decoder alone trains, on tokens of the encoder as it is then; 0: all parts train to the end"""
    fingerprint: int = 20_000
    """save hashes of up to this many training samples with the model, so that evaluate can tell which samples it has seen; 0: none"""

    def __post_init__(self):
        super().__post_init__()
        self.check_data(self.batch)
        check_numbers(self, 1, "captions", "vocabulary")
        check_numbers(self, 0, "fingerprint")
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
        if self.weights and self.families:
            raise ValueError("weights and families both order an epoch; set --no-families, or leave out --weights")

    @property
    def finish_from(self) -> int:
        """Steps before those that train the latent decoder alone; with `decoder_finish` one at least, so that the optimiser has a state for every part."""
        return max(self.steps - round(self.decoder_share * self.steps), 1 if self.decoder_finish else 0)

    @property
    def decoder_share(self) -> float:
        """Share of the steps that train the latent decoder alone."""
        return self.decoder_finish
