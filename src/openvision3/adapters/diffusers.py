"""An opened model as a diffusers autoencoder, and the statistics of its tokens."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from openvision3.adapters.diffusers_model import AutoencoderOpenVision3
from openvision3.adapters.parts import filled, vae_settings
from openvision3.hub import vae_origin
from openvision3.pipeline import Pipeline


def autoencoder(pipeline: Pipeline, mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderOpenVision3:
    """Encoder, latent decoder and VAE of an opened model. It shares their weights. `mean` and `std` are statistics of the tokens' channels."""
    model: Any = pipeline.model
    with torch.device("meta"):
        network = AutoencoderOpenVision3(
            encoder_settings=asdict(model.encoder.config),
            latent_decoder_settings=asdict(model.latent_decoder.config),
            vae_settings=vae_settings(model.vae),
            vae_shift=model.vae.uses_shift,
            vae_origin=vae_origin(model.vae),
            image_size=pipeline.size,
            latents_mean=mean,
            latents_std=std,
        )
    return filled(network, model.state_dict())
