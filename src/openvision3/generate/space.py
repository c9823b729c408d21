"""The frozen space that images are drawn in: the tokens of a model of ours, or the latents of a VAE in squares; and the exact statistics of its values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision3 import distributed, hub
from openvision3.data.identity import digest
from openvision3.data.text import TextTokenizer
from openvision3.device import dtype_of
from openvision3.fetch.sources import split_peer
from openvision3.generate.config import PEER_TOKENS, VAE_TOKENS
from openvision3.model.openvision3 import OpenVision3
from openvision3.model.vae import VAE

SQUARE = 2
"""side of the squares of latents that are one token where there is no encoder"""
EPSILON = 1e-5
"""added to variances"""


class TokenSpace(nn.Module):
    """images or latents <-> tokens, and texts -> words; all of it frozen.

    `model` is None for the latents of a VAE alone. Without `reads` its text encoder is left out, because it was never trained.
    """

    def __init__(
        self,
        name: str,
        vae: VAE,
        model: OpenVision3 | None = None,
        tokenizer: TextTokenizer | None = None,
        *,
        size: int = 0,
        sha256: str = "",
        reads: bool = True,
    ):
        super().__init__()
        self.name, self.sha256, self.size = name, sha256, size
        """the name it was opened by; the sha256 of its weights; side of its training images in pixels, 0 for any"""
        self.tokenizer = tokenizer
        self.vae = vae
        self.encoder = model.encoder if model is not None else None
        self.latent_decoder = model.latent_decoder if model is not None else None
        self.text_encoder = model.text_encoder if model is not None and reads else None
        self.channels = vae.latent_channels * SQUARE**2 if model is None else model.encoder.size.width
        self.stride = vae.stride * SQUARE if model is None else 16
        self.word_width = 0 if self.text_encoder is None else self.text_encoder.embedding.embedding_dim
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> TokenSpace:
        """Frozen: stays in evaluation mode."""
        return super().train(False)

    def grid(self, size: int) -> tuple[int, int]:
        """(rows, columns) of the tokens of square images. Raises ValueError for a side that tokens do not fill."""
        if size < self.stride or size % self.stride:
            raise ValueError(f"images of {size} px are not filled by tokens of {self.stride} px; choose a multiple of {self.stride}")
        return size // self.stride, size // self.stride

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """latents (B, C, h, w) -> tokens (B, N, D)."""
        if self.encoder is not None:
            return self.encoder(latents)[0].float()
        return F.pixel_unshuffle(latents.float(), SQUARE).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens (B, N, D) of a grid -> images (B, 3, H, W), not clamped."""
        if self.latent_decoder is not None:
            return self.vae.decode(self.latent_decoder(tokens, grid).float())
        return self.vae.decode(F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), SQUARE).float())

    @torch.no_grad()
    def words(self, text_ids: Tensor) -> tuple[Tensor, Tensor]:
        """text_ids (B, T) -> features of their pieces (B, T, W), and which of them are no padding (B, T)."""
        assert self.text_encoder is not None
        return self.text_encoder.words(text_ids)


class PeerSpace(TokenSpace):
    """The tokens of an AutoencoderRAE of diffusers (evaluate/peers): its encoder and the decoder that learnt to invert it, at its one size.

    Its own normalisation is kept; ours comes on top of it.
    """

    def __init__(self, name: str, network: Any, sha256: str):
        super().__init__(name, VAE(None, name="pixels"), size=int(network.decoder_image_size), sha256=sha256)
        self.network = network
        self.channels, self.stride = int(network.config.encoder_hidden_size), int(network.decoder_patch_size)
        self.requires_grad_(False)
        self.eval()

    def grid(self, size: int) -> tuple[int, int]:
        if size != self.size:
            raise ValueError(f"{self.name} decodes images of {self.size} px only, not {size}; set --size {self.size}")
        return super().grid(size)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """images (B, 3, H, W), which are the latents without a VAE -> tokens (B, N, D)."""
        return self.network.encode(latents / 2 + 0.5).latent.float().flatten(2).transpose(1, 2)

    @torch.no_grad()
    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.network.decode(tokens.transpose(1, 2).unflatten(2, grid).contiguous()).sample.float() * 2 - 1


def open_space(name: str, precision: str = "fp32", folder: Path | None = None) -> TokenSpace:
    """`vae:NAME`, `peer:NAME` or `peer:NAME=FOLDER`, or a model of ours by its name; `folder` is where that lies, if it is known already.

    Raises:
        FileNotFoundError, ValueError: what is missing or wrong, in one line.
    """
    if name.startswith(VAE_TOKENS):
        vae = hub.load_vae(name.removeprefix(VAE_TOKENS), dtype=dtype_of(precision))
        return TokenSpace(name, vae, sha256=digest(vae.sha256, vae.scale, vae.shift))
    if name.startswith(PEER_TOKENS):
        from openvision3.evaluate.peers.table import open_rae

        return PeerSpace(name, *open_rae(*split_peer(name)))
    folder = folder or hub.find_folder(name)
    model, tokenizer, config = hub.load_model(folder, vae_dtype=dtype_of(precision))
    reads = "text encoder" not in config.training.get("untrained", ())
    return TokenSpace(name, model.vae, model, tokenizer if reads else None, size=config.size, sha256=hub.weights_sha256(folder), reads=reads)


class TokenStatistics(nn.Module):
    """Mean and variance of each channel at each position, (N, C) in fp32, from exact sums in float64; saved with the network's weights.

    A count of 0 leaves tokens as they are.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, tokens: int, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(tokens, channels))
        self.register_buffer("variance", torch.ones(tokens, channels))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))

    def normalise(self, tokens: Tensor) -> Tensor:
        """Whether there are statistics is decided where they lie: the host would wait for the answer in every step."""
        return (tokens - self.mean) * torch.where(self.count > 0, (self.variance + EPSILON).rsqrt(), 1.0)

    def restore(self, tokens: Tensor) -> Tensor:
        return tokens * torch.where(self.count > 0, (self.variance + EPSILON).sqrt(), 1.0) + self.mean

    def is_like(self, other: TokenStatistics, most: float = 0.1) -> bool:
        """Whether both normalise tokens nearly alike: means and deviations differ by less than this share of a deviation, in the mean over values."""
        if bool(self.count > 0) != bool(other.count > 0):
            return False
        own, theirs = ((each.variance + EPSILON).sqrt() for each in (self, other))
        apart = ((self.mean - other.mean) / own).square().mean().sqrt(), (own / theirs).log().square().mean().sqrt()
        return bool(max(apart) < most)

    def set(self, moments: Moments) -> None:
        """Raises ValueError: tokens that are not finite, or fewer than two images."""
        if moments.count < 2 or not (moments.mean.isfinite().all() and moments.scatter.isfinite().all()):
            raise ValueError(f"the statistics of {moments.count} images cannot be used: give two or more, with finite tokens")
        self.mean.copy_(moments.mean)
        self.variance.copy_(moments.scatter / moments.count)
        self.count.fill_(moments.count)


class Moments:
    """Count, mean and sum of squares about the mean of tokens (N, C) in float64, batch by batch (Chan, Golub and LeVeque 1979)."""

    def __init__(self, tokens: int, channels: int):
        self.count = 0
        self.mean = torch.zeros(tokens, channels, dtype=torch.float64)
        self.scatter = torch.zeros(tokens, channels, dtype=torch.float64)

    def add(self, tokens: Tensor) -> None:
        """tokens (B, N, C)."""
        rows = tokens.detach().cpu().double()
        mean = rows.mean(0)
        self._merge(len(rows), mean, (rows - mean).square().sum(0))

    def over_ranks(self) -> Moments:
        """The moments of all ranks' tokens, on every rank."""
        joined = Moments(*self.mean.shape)
        for count, mean, scatter in distributed.gather_objects((self.count, self.mean, self.scatter)):
            joined._merge(count, mean, scatter)
        return joined

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not count:
            return
        before, step = self.count, mean - self.mean
        self.count += count
        self.mean = self.mean + step * (count / self.count)
        self.scatter = self.scatter + scatter + step.square() * (before * count / self.count)
