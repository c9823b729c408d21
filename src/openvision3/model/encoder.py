"""latents -> tokens (patchify 2x2, positions, ViT) and the pooled embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from openvision3.model.transformer import Gelu, Positions, TransformerSize, blocks, check_gelu, check_positions, init_weights, positions_on, rotation_on
from openvision3.settings import unknown

SIZES = {
    "tiny": TransformerSize(64, 2, 2, 256),
    "micro": TransformerSize(256, 4, 4, 1024),
    "mini": TransformerSize(256, 6, 4, 1024),
    "Ti": TransformerSize(192, 12, 3, 768),
    "S": TransformerSize(384, 12, 6, 1536),
    "M": TransformerSize(512, 12, 8, 2048),
    "B": TransformerSize(768, 12, 12, 3072),
    "L": TransformerSize(1024, 24, 16, 4096),
    "So400m": TransformerSize(1152, 27, 16, 4304),
    "H": TransformerSize(1280, 32, 16, 5120),
}
"""Sizes of encoder and latent decoder: the paper's table and three of ours, `mini` and its decoder `micro` for two cores, `tiny` for tests."""


@dataclass
class EncoderConfig:
    """The ViT on VAE latents (paper, section 3.1)."""

    size: str = "B"
    """tiny, micro, mini, Ti, S, M, B, L, So400m or H"""
    patch: int = 2
    """side of a token in latent pixels: 2 on a VAE of stride 8, 16 without a VAE"""
    embed_dim: int = 768
    """dimension of the contrastive embedding"""
    token_norm: Literal["layernorm", "none"] = "layernorm"
    """the last layer: a LayerNorm without affine, or none, as in the released encoders"""
    gelu: Gelu = "exact"
    """exact, as in the released encoders, or its tanh approximation"""
    positions: Positions = "sincos"
    """sincos: a table added to the patches, as in the released encoders; rope: queries and keys are rotated by their place (arXiv 2403.13298)"""
    qk_norm: bool = False
    """a LayerNorm on the queries and keys of every head (arXiv 2302.05442)"""
    sum_blocks: int = 1
    """the tokens are the sum of what the last so many blocks return, normalised by token_norm (arXiv 2605.18324); 1: the last block alone"""

    def __post_init__(self):
        size = named_size(self.size)
        check_gelu(self.gelu)
        check_positions(self.positions, size)
        if not (isinstance(self.sum_blocks, int) and 1 <= self.sum_blocks <= size.depth):
            raise ValueError(f"sum_blocks {self.sum_blocks!r} must be from 1 to {size.depth}, the number of blocks of size {self.size}")
        if self.token_norm not in ("layernorm", "none"):
            raise unknown("token_norm", str(self.token_norm), ("layernorm", "none"))
        if not (isinstance(self.patch, int) and isinstance(self.embed_dim, int) and self.patch > 0 and self.embed_dim > 0):
            raise ValueError(f"patch {self.patch!r} and embed_dim {self.embed_dim!r} must be positive whole numbers")


def named_size(name: str, sizes: dict[str, TransformerSize] = SIZES) -> TransformerSize:
    """Raises ValueError for a name that is not in the table."""
    if not isinstance(name, str) or name not in sizes:
        raise unknown("size", str(name), sizes)
    return sizes[name]


class Encoder(nn.Module):
    """latents (B, C, h, w) -> tokens (B, N, D), pooled (B, E); N = (h / patch)(w / patch).

    As in the released encoders, a class token passes through the blocks and is in neither the tokens nor the pooling.
    `pooled` is LayerNorm(mean of the tokens) times a matrix, not normalised. It is a function of the tokens alone, with `sum_blocks` too.
    """

    def __init__(self, config: EncoderConfig, latent_channels: int):
        super().__init__()
        self.config = config
        self.size = named_size(config.size)
        width = self.size.width
        self.patchify = nn.Conv2d(latent_channels, width, config.patch, config.patch, bias=False)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.blocks = blocks(self.size, config.gelu, config.qk_norm)
        self.token_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) if config.token_norm == "layernorm" else nn.Identity()
        self.pool_norm = nn.LayerNorm(width, eps=1e-6)
        self.pool_projection = nn.Linear(width, config.embed_dim, bias=False)

    def init_weights(self) -> None:
        self.apply(init_weights)
        nn.init.xavier_uniform_(self.patchify.weight.view(self.size.width, -1))
        nn.init.normal_(self.class_token, std=0.02)

    def forward(self, latents: Tensor, layers: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """`layers` collects what enters the first block, and what each block returns, without the class token: (B, N, D) each.

        Raises ValueError for latents with another number of channels, or sides that are not multiples of the patch.
        """
        if latents.ndim != 4:
            raise ValueError(f"latents of shape {tuple(latents.shape)} cannot be encoded; pass (B, {self.patchify.in_channels}, h, w)")
        _, channels, height, width = latents.shape
        patch = self.config.patch
        if channels != self.patchify.in_channels:
            raise ValueError(f"latents have {channels} channels, but this encoder was built for {self.patchify.in_channels}: is it the right VAE?")
        if height % patch or width % patch:
            raise ValueError(f"latents of {height} x {width} cannot be cut into patches of {patch}; the sides of images must be multiples of 16 pixels")
        x = self.patchify(latents)  # (B, D, h', w')
        # In the precision of the weights: x is bf16 here under autocast, while residual sums and norms stay in fp32.
        rows, columns = x.shape[2:]
        x, rotation = x.flatten(2).transpose(1, 2).to(self.class_token.dtype), None  # (B, N, D)
        if self.config.positions == "rope":
            rotation = rotation_on(x, rows, columns, self.size)
        else:
            x = x + positions_on(x, rows, columns, x.shape[2], x.dtype)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        first, summed = len(self.blocks) - self.config.sum_blocks + 1, x
        if layers is not None:
            layers.append(x[:, 1:])
        for number, block in enumerate(self.blocks, 1):
            x = block(x, rotation=rotation)
            if layers is not None:
                layers.append(x[:, 1:])
            summed = summed + x if number > first else x  # of the blocks from `first` on
        tokens = self.token_norm(summed[:, 1:])
        return tokens, self.pool(tokens)

    def pool(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, D) -> (B, E)."""
        return self.pool_projection(self.pool_norm(tokens.mean(1)))
