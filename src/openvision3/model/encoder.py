"""latents -> tokens (patchify 2x2, positions, ViT) and the pooled embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from openvision3.model.transformer import Gelu, TransformerSize, blocks, check_gelu, init_weights, positions_on
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

    def __post_init__(self):
        named_size(self.size)
        check_gelu(self.gelu)
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
    `pooled` is LayerNorm(mean of the tokens) times a matrix, not normalised.
    """

    def __init__(self, config: EncoderConfig, latent_channels: int):
        super().__init__()
        self.config = config
        self.size = named_size(config.size)
        width = self.size.width
        self.patchify = nn.Conv2d(latent_channels, width, config.patch, config.patch, bias=False)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.blocks = blocks(self.size, config.gelu)
        self.token_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) if config.token_norm == "layernorm" else nn.Identity()
        self.pool_norm = nn.LayerNorm(width, eps=1e-6)
        self.pool_projection = nn.Linear(width, config.embed_dim, bias=False)

    def init_weights(self) -> None:
        self.apply(init_weights)
        nn.init.xavier_uniform_(self.patchify.weight.view(self.size.width, -1))
        nn.init.normal_(self.class_token, std=0.02)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Raises ValueError for latents with another number of channels, or sides that are not multiples of the patch."""
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
        positions = positions_on(x, x.shape[2], x.shape[3], x.shape[1], self.class_token.dtype)
        x = x.flatten(2).transpose(1, 2) + positions  # (B, N, D)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        tokens = self.token_norm(x[:, 1:])
        return tokens, self.pool(tokens)

    def pool(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, D) -> (B, E)."""
        return self.pool_projection(self.pool_norm(tokens.mean(1)))
