"""images <-> latents: any diffusers `AutoencoderKL` or `AutoencoderTiny`, frozen; or no VAE at all, for the ablation.

vae = hub.load_vae("embedded")       # the one in the package; or a folder, or a hub id
latents = vae.encode(images)         # (B, 3, H, W) in [-1, 1] -> (B, C, H/stride, W/stride)
images = vae.decode(latents)         # gradient flows to `latents`; the weights are frozen
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openvision3.settings import PathName

LEVELS = {"AutoencoderKL": "block_out_channels", "AutoencoderTiny": "encoder_block_out_channels"}
"""The setting of each class that lists its levels. All levels but the last halve the sides: the stride is 2^(levels - 1)."""

TILE_PIXELS = 1024 * 1024
"""Larger images are encoded and decoded in overlapping tiles."""
_TILE, _OVERLAP = 512, 64


@dataclass
class VAEConfig:
    """Which VAE encodes and decodes the images, and how its latents are scaled."""

    name: PathName = "embedded"
    """embedded, a folder in diffusers' layout, a hub id, or pixels (no VAE)"""
    shift: bool | None = None
    """subtract the VAE's shift_factor. Not set: off for AutoencoderKL, as in the paper's code, and on for AutoencoderTiny"""


class VAE(nn.Module):
    """A frozen diffusers VAE with one convention: latents = (posterior mean - shift) x scale, never sampled.

    `network` is an AutoencoderKL, an AutoencoderTiny, or None for pixels. `dtype` is bf16 or fp32, since the activations
    overflow fp16. Channels, stride, scale and shift come from the network's config.

    Raises:
        ValueError: another class of VAE, or a dtype that is not bf16 or fp32.
    """

    def __init__(self, network: nn.Module | None, *, name: str = "", shift: bool | None = None, dtype: torch.dtype = torch.float32, sha256: str = ""):
        super().__init__()
        _check_dtype(dtype)
        self.name, self.sha256 = name, sha256
        self.network = network
        if network is None:
            self.latent_channels, self.stride, self.scale, self.shift = 3, 1, 1.0, 0.0
            self.uses_shift = False
            return
        self.kind = type(network).__name__
        settings: Any = network.config
        if self.kind not in LEVELS:
            raise ValueError(f"{self.kind} is not a VAE that this model can use; choose one of {', '.join(LEVELS)}")
        self.latent_channels = int(settings.latent_channels)
        self.stride = 2 ** (len(settings[LEVELS[self.kind]]) - 1)
        self.scale = float(settings.scaling_factor)
        self.uses_shift = self.kind == "AutoencoderTiny" if shift is None else shift
        self.shift = float(settings.get("shift_factor") or 0.0) if self.uses_shift else 0.0
        network.requires_grad_(False).eval()
        nn.Module.to(network, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]  # the `to` of diffusers warns of an empty list

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.network is None else next(self.network.parameters()).dtype

    def train(self, mode: bool = True) -> VAE:
        """Frozen: stays in evaluation mode."""
        return super().train(False)

    def _apply(self, fn, recurse: bool = True):
        # half() and to(dtype) of this module, or of a module around it, arrive here
        if self.network is not None:
            _check_dtype(fn(torch.empty(0, dtype=self.dtype)).dtype)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> latents (B, C, H/stride, W/stride) in fp32.

        Raises:
            ValueError: not (B, 3, H, W) of floats, or sides that are not multiples of the stride.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images of shape {tuple(images.shape)} and {images.dtype} cannot be encoded; pass floats (B, 3, H, W) in [-1, 1]")
        if images.shape[2] % self.stride or images.shape[3] % self.stride or not images.shape[2] * images.shape[3]:
            raise ValueError(f"images of {images.shape[2]} x {images.shape[3]} cannot be encoded; sides must be multiples of {self.stride}")
        if self.network is None:
            return images.detach().float()
        latents = self._in_parts(self._encode, images, 1 / self.stride, self.latent_channels)
        return (latents - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, h, w) -> images (B, 3, h*stride, w*stride) in fp32, not clamped.

        Raises:
            ValueError: latents of another VAE (wrong number of channels).
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels or not latents.shape[2] * latents.shape[3]:
            raise ValueError(f"latents of shape {tuple(latents.shape)} do not fit this VAE; pass (B, {self.latent_channels}, h, w)")
        if not latents.is_floating_point():
            raise ValueError(f"latents of {latents.dtype} cannot be decoded; pass floats, as encode returns them")
        if self.network is None:
            return latents.float()
        return self._in_parts(self._decode, latents.float() / self.scale + self.shift, self.stride, 3)

    def _encode(self, images: Tensor) -> Tensor:
        assert self.network is not None
        result: Any = self.network.encode(images)  # type: ignore[operator]
        return result.latents if self.kind == "AutoencoderTiny" else result.latent_dist.mode()

    def _decode(self, latents: Tensor) -> Tensor:
        assert self.network is not None
        return self.network.decode(latents).sample  # type: ignore[operator]

    def _run(self, function, x: Tensor) -> Tensor:
        # The VAE computes in its own dtype, whatever an outer autocast says.
        with torch.autocast(x.device.type, enabled=False):
            return function(x.to(self.dtype).contiguous(memory_format=torch.channels_last)).float()

    def _in_parts(self, function, x: Tensor, zoom: float, channels: int) -> Tensor:
        """With a gradient all at once; without one a few images at a time, and large images in tiles."""
        height, width = (round(side * max(zoom, 1)) for side in x.shape[-2:])
        if torch.is_grad_enabled() and x.requires_grad:
            return self._run(function, x)
        if height * width > TILE_PIXELS:
            return torch.cat([self._tiled(function, row[None], zoom, channels) for row in x])
        chunk = max(1, 4 * TILE_PIXELS // (height * width))
        return torch.cat([self._run(function, part) for part in x.split(chunk)]) if len(x) > chunk else self._run(function, x)

    def _tiled(self, function, x: Tensor, zoom: float, channels: int) -> Tensor:
        """Overlapping tiles, blended by linear ramps. Tile and overlap are multiples of every stride on the large side."""
        tile, overlap = (_TILE, _OVERLAP) if zoom < 1 else (round(_TILE / zoom), round(_OVERLAP / zoom))
        height, width = x.shape[-2:]
        total = x.new_zeros(1, channels, round(height * zoom), round(width * zoom), dtype=torch.float32)
        weight = torch.zeros_like(total[:, :1])
        for top in _starts(height, tile, overlap):
            for left in _starts(width, tile, overlap):
                part = self._run(function, x[..., top : top + tile, left : left + tile])
                ramps = [_ramp(n, round(overlap * zoom), x.device) for n in part.shape[-2:]]
                mask = ramps[0][:, None] * ramps[1][None]
                rows = slice(round(top * zoom), round(top * zoom) + part.shape[-2])
                columns = slice(round(left * zoom), round(left * zoom) + part.shape[-1])
                total[..., rows, columns] += part * mask
                weight[..., rows, columns] += mask
        return total / weight


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"a VAE in {dtype} gives NaN or black images; choose torch.bfloat16 or torch.float32")


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return sorted({min(i * (tile - overlap), length - tile) for i in range(count)})


def _ramp(length: int, overlap: int, device: torch.device) -> Tensor:
    ramp = torch.ones(length, device=device)
    rise = torch.linspace(0, 1, overlap + 2, device=device)[1:-1]
    ramp[:overlap] *= rise[:length]
    ramp[-overlap:] *= rise.flip(0)[-length:]
    return ramp
