"""Branch 1, reconstruction: noise on the tokens, a ViT with patch 1, a linear layer back to latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from openvision3.draws import normal, uniform
from openvision3.model.encoder import named_size
from openvision3.model.transformer import Gelu, Positions, blocks, check_gelu, check_positions, init_weights, positions_on, rotation_on


@dataclass
class LatentDecoderConfig:
    """The ViT from tokens back to latents (paper, section 3.2)."""

    size: str = "B"
    """tiny, micro, mini, Ti, S, M, B, L, So400m or H"""
    gelu: Gelu = "exact"
    """exact, or its tanh approximation"""
    positions: Positions = "sincos"
    """sincos: a table added to the tokens; rope: queries and keys are rotated by their place (arXiv 2403.13298)"""
    qk_norm: bool = False
    """a LayerNorm on the queries and keys of every head (arXiv 2302.05442)"""

    def __post_init__(self):
        size = named_size(self.size)
        check_gelu(self.gelu)
        check_positions(self.positions, size)


class LatentDecoder(nn.Module):
    """tokens (B, N, D) of a grid -> latents (B, C, h, w): each token becomes a patch x patch square of C channels."""

    def __init__(self, config: LatentDecoderConfig, token_width: int, latent_channels: int, patch: int):
        super().__init__()
        self.config = config
        self.patch = patch
        self.size = size = named_size(config.size)
        self.embed = nn.Linear(token_width, size.width)
        self.blocks = blocks(size, config.gelu, config.qk_norm)
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
        x, rotation = self.embed(tokens).to(self.linear.weight.dtype), None  # residual sums and norms in fp32, as in Encoder
        if self.config.positions == "rope":
            rotation = rotation_on(x, rows, columns, self.size)[:, 1:]  # there is no class token
        else:
            x = x + positions_on(x, rows, columns, x.shape[-1], x.dtype)
        for block in self.blocks:
            x = block(x, rotation=rotation)
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
