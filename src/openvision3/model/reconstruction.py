"""Branch 1, reconstruction: noise on the tokens, a ViT with patch 1, a linear layer back to latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from openvision3.draws import normal, uniform
from openvision3.model.encoder import named_size
from openvision3.model.transformer import Gelu, blocks, check_gelu, init_weights, positions_on


@dataclass
class LatentDecoderConfig:
    """The ViT from tokens back to latents (paper, section 3.2)."""

    size: str = "B"
    """tiny, micro, mini, Ti, S, M, B, L, So400m or H"""
    gelu: Gelu = "exact"
    """exact, or its tanh approximation"""

    def __post_init__(self):
        named_size(self.size)
        check_gelu(self.gelu)


class LatentDecoder(nn.Module):
    """tokens (B, N, D) of a grid -> latents (B, C, h, w): each token becomes a patch x patch square of C channels."""

    def __init__(self, config: LatentDecoderConfig, token_width: int, latent_channels: int, patch: int):
        super().__init__()
        self.config = config
        self.patch = patch
        size = named_size(config.size)
        self.embed = nn.Linear(token_width, size.width)
        self.blocks = blocks(size, config.gelu)
        self.norm = nn.LayerNorm(size.width, eps=1e-6)
        self.linear = nn.Linear(size.width, latent_channels * patch * patch)

    def init_weights(self) -> None:
        self.apply(init_weights)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """`grid` is (rows, columns) of tokens. Raises ValueError if it does not hold N tokens, or if they have another width."""
        rows, columns = grid
        if tokens.ndim != 3:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)} cannot be decoded; pass (B, N, {self.embed.in_features})")
        if tokens.shape[2] != self.embed.in_features:
            raise ValueError(
                f"tokens are {tokens.shape[2]} wide, but this latent decoder was built for {self.embed.in_features}: do they come from another encoder?"
            )
        if rows * columns != tokens.shape[1]:
            raise ValueError(f"{tokens.shape[1]} tokens do not fill a grid of {rows} x {columns}; pass the size of the image they came from")
        x = self.embed(tokens)
        x = x + positions_on(x, rows, columns, x.shape[-1], self.linear.weight.dtype)  # residual sums and norms in fp32, as in Encoder
        for block in self.blocks:
            x = block(x)
        x = self.linear(self.norm(x))  # (B, N, C * patch^2)
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (rows, columns)), self.patch)


def add_noise(tokens: Tensor, tau: float, draw_key: Tensor) -> Tensor:
    """u + sigma * eps (paper, eq. 2) with sigma ~ Uniform[0, tau] and eps ~ N(0, I), both functions of the row's `draw_key`.

    So the noise of a sample does not depend on the rank, micro-batch or kind of device that holds it.
    """
    return tokens if tau == 0 else noisy(tokens, tau * uniform(draw_key, 1)[:, :, None], draw_key)


def noisy(tokens: Tensor, sigma: Tensor | float, draw_key: Tensor) -> Tensor:
    """u + sigma * eps with a given sigma: one number, or one a row as (B, 1, 1)."""
    noise = normal(draw_key ^ _NOISE_STREAM, tokens[0].numel()).view(tokens.shape)
    return tokens + (sigma * noise).to(tokens.dtype)


_NOISE_STREAM = 0x3C6EF372FE94F82B
"""Keeps the random stream of eps apart from that of sigma."""
