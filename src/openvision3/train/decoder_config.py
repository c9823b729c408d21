"""The settings of a training that makes the latent decoder of a finished model robust to noise, and its recipe."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from openvision3 import hub
from openvision3.model.openvision3 import ModelConfig
from openvision3.train.adversarial import AdversarialConfig
from openvision3.train.config import PretrainConfig
from openvision3.train.optimizer import OptimizerConfig
from openvision3.train.released import is_released, read_settings


@dataclass
class DecoderConfig(PretrainConfig):
    """A training of the latent decoder alone, from a finished model. What belongs to the other parts is as that model has it."""

    noise: float = 0.4
    """standard deviation of the noise on the tokens in evaluations during training (val/noisy_psnr)"""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """the discriminator"""

    def __post_init__(self):
        super().__post_init__()
        if not self.init:
            raise ValueError("the model whose latent decoder is trained is not named; name a shipped model, a model folder, a run or peer:NAME with --init")
        if self.decoder_finish:
            raise ValueError(f"decoder_finish {self.decoder_finish}: the latent decoder trains alone in all steps; leave it at 0")
        if not self.noise >= 0:
            raise ValueError(f"noise {self.noise} must be a number that is not negative")
        if self.adversarial.weight and not self.pixel_share:
            raise ValueError(f"adversarial.weight {self.adversarial.weight:g} needs images to compare, and pixel_share 0 decodes none; set --pixel-share")

    @property
    def decoder_share(self) -> float:
        return 1.0


def latent_decoder(init: str = "mini") -> DecoderConfig:
    """Train only the latent decoder of a finished model, on noisy tokens, as drawn tokens are not exact (RAE, arXiv 2510.11690).

    openvision3 train latent_decoder --init mini --data openmoji SHARDS [--adversarial.weight 0.5]
    Two CPU cores for the shipped mini, about 60 minutes (5 samples/s). Expected: PSNR rises at noise above the model's own tau and falls without noise.
    Encoder, VAE, text encoder and captioner stay as they are; --model.loss.tau is the largest noise.
    --init peer:openvision3-b2-256 (or =FOLDER) gives a released encoder, which has none, a new latent decoder of the paper's size: see docs/training.md.
    """
    model, size = _settings_of(init)
    loss = replace(model.loss, omega_rec=1.0, omega_und=0.0, gradient_ratio=0.0, encoder_learns_from="nothing")
    loss = replace(loss, tau=0.8, lambda_perceptual=0.5, perceptual="efficientnet", lpips_backbone="", lpips_linear="")
    return DecoderConfig(
        init=init,
        model=replace(model, loss=loss),
        size=size,
        steps=1000,
        batch=32,
        pixel_share=0.25,
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=50, weight_decay=0.0),
    )


def _settings_of(init: str) -> tuple[ModelConfig, int]:
    """(the settings of the model that `init` names, the side of its images). Raises FileNotFoundError, ValueError."""
    if is_released(init):
        return read_settings(init)
    saved = hub.read_config(hub.find_folder(init))
    return saved.model, saved.size


RECIPES = {latent_decoder.__name__: latent_decoder}
