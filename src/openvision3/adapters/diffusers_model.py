"""The tokenizer as a diffusers autoencoder: images <-> tokens as a grid of latents, normalised by per-channel statistics that its config holds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, EncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from openvision3.adapters.parts import FLUX, make_vae, precision
from openvision3.model.encoder import Encoder, EncoderConfig
from openvision3.model.reconstruction import LatentDecoder, LatentDecoderConfig
from openvision3.settings import from_dict

EPSILON = 1e-5
"""added to the standard deviations, as in diffusers' AutoencoderRAE"""


class AutoencoderOpenVision3(ModelMixin, AutoencoderMixin, ConfigMixin):
    """images (B, 3, H, W) in [-1, 1] <-> latents (B, D, H/16, W/16), with the methods of diffusers' AutoencoderRAE.

    Args:
        encoder_settings, latent_decoder_settings: the fields of EncoderConfig and LatentDecoderConfig
        vae_settings: the config of the VAE in diffusers' layout, with `_class_name`; empty: no VAE
        vae_shift: whether its latents are shifted; None: as VAEConfig.shift
        vae_origin: name, sha256 and licence of the VAE, for the record
        image_size: side of the training images in pixels; any multiple of 16 can be used
        latents_mean, latents_std: statistics of the D channels, with which `encode` normalises and `decode` restores; None: as they are
        scaling_factor: `encode` multiplies by it, `decode` divides

    Raises:
        ValueError: bad settings, or statistics of another number of channels.
    """

    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules = ["vae"]  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        encoder_settings: dict | None = None,
        latent_decoder_settings: dict | None = None,
        vae_settings: dict | None = None,
        vae_shift: bool | None = None,
        vae_origin: dict | None = None,
        image_size: int = 256,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        encodes = from_dict(EncoderConfig, encoder_settings or {}, "encoder_settings.")
        decodes = from_dict(LatentDecoderConfig, latent_decoder_settings or {}, "latent_decoder_settings.")
        network = make_vae(dict(FLUX) if vae_settings is None else vae_settings, vae_shift, vae_origin or {}, decoder=True)
        self.encoder = Encoder(encodes, network.latent_channels)  # first: `dtype` is that of the first parameter
        width = self.encoder.size.width
        self.latent_decoder = LatentDecoder(decodes, width, network.latent_channels, encodes.patch)
        self.vae = network
        for name, values in (("latents_mean", latents_mean), ("latents_std", latents_std)):
            if values is not None and len(values) != width:
                raise ValueError(f"{name} has {len(values)} values, but the latents have {width} channels")
        self.register_to_config(encoder_settings=asdict(encodes), latent_decoder_settings=asdict(decodes))
        self.use_slicing = False

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[Tensor]:
        """images -> latents, without noise. Raises ValueError for sides that are not multiples of 16."""
        latents = torch.cat([self._encode(part) for part in self._parts(x)])
        return EncoderOutput(latent=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """latents -> images, not clamped."""
        images = torch.cat([self._decode(part) for part in self._parts(z)])
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """images -> the same images through the tokens."""
        return self.decode(self.encode(sample, return_dict=False)[0], return_dict=return_dict)

    def _parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(1) if self.use_slicing else (rows,)

    def _encode(self, images: Tensor) -> Tensor:
        with precision(self.device, self.dtype):
            tokens, _ = self.encoder(self.vae.encode(images))
        grid = (images.shape[2] // 16, images.shape[3] // 16)
        mean, scale = self._statistics(tokens)
        return ((tokens.transpose(1, 2).unflatten(2, grid) - mean) / scale * self.config["scaling_factor"]).to(self.dtype)

    def _decode(self, latents: Tensor) -> Tensor:
        mean, scale = self._statistics(latents)
        tokens = (latents / self.config["scaling_factor"] * scale + mean).flatten(2).transpose(1, 2)
        with precision(self.device, self.dtype):
            latents_hat = self.latent_decoder(tokens, (latents.shape[2], latents.shape[3]))
        return self.vae.decode(latents_hat.float()).to(self.dtype)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the channels, (D, 1, 1) in fp32."""
        settings: Any = self.config
        mean, std = settings.latents_mean or [0.0], settings.latents_std
        scale = torch.tensor(std or [1.0], device=like.device)[:, None, None]
        return torch.tensor(mean, device=like.device)[:, None, None], scale + EPSILON if std else scale
