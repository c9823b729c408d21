"""Tiny models and batches that several tests share: random weights, but drawn from a seed of their own."""

from __future__ import annotations

import diffusers
import torch
from torch import Tensor, nn

from openvision3.hub import load_distance
from openvision3.model.encoder import EncoderConfig
from openvision3.model.openvision3 import LossConfig, ModelConfig, OpenVision3
from openvision3.model.reconstruction import LatentDecoderConfig
from openvision3.model.transformer import Block
from openvision3.model.understanding import CaptionerConfig, TextEncoderConfig
from openvision3.model.vae import VAE

PAD, CLASS, BEGIN, END, FIRST_WORD = 0, 2, 3, 4, 5
VOCABULARY = 24

PAPER = {
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
}
"""Width, depth, mlp, heads: the paper's table once more, typed from it."""

FLUX = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "norm_num_groups": 32,
    "sample_size": 1024,
}
"""The config of FLUX.1's `vae` folder, as diffusers' AutoencoderKL reads it."""


def kl_network(**changes) -> diffusers.AutoencoderKL:
    """FLUX.1's shape with 4 levels of 8 channels: stride 8."""
    torch.manual_seed(1)
    tiny = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    return diffusers.AutoencoderKL(**{**FLUX, **tiny, **changes})


def tiny_network(levels: int = 4, width: int = 8, channels: int = 4, **changes) -> diffusers.AutoencoderTiny:
    """TAESD's shape, narrow: stride 2^(levels - 1)."""
    torch.manual_seed(2)
    widths = (width,) * levels
    network = diffusers.AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(0, *(1,) * (levels - 1)),
        num_decoder_blocks=(*(1,) * (levels - 1), 0),
        latent_channels=channels,
        **changes,
    )
    for module in network.modules():  # torch's own start lets images fade to a constant on their way
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return network


def tiny_vae() -> VAE:
    return VAE(tiny_network(), name="tiny")


def tiny_config(patch: int = 2, gelu: str = "exact", token_norm: str = "layernorm", **loss) -> ModelConfig:
    return ModelConfig(
        encoder=EncoderConfig(size="tiny", patch=patch, embed_dim=32, gelu=gelu, token_norm=token_norm),
        latent_decoder=LatentDecoderConfig(size="tiny", gelu=gelu),
        text_encoder=TextEncoderConfig(size="tiny", positions=12),
        captioner=CaptionerConfig(size="tiny", positions=16),
        loss=LossConfig(**loss),
    )


def tiny_model(vae: VAE | None = None, seed: int = 0, **config) -> OpenVision3:
    vae = vae or tiny_vae()
    settings = tiny_config(**config)
    distance = load_distance(settings.loss)
    torch.manual_seed(seed)
    return OpenVision3(settings, vae, VOCABULARY, PAD, distance).init_weights()


def smooth_images(rows: int = 2, height: int = 32, width: int = 48, seed: int = 0) -> Tensor:
    """(rows, 3, height, width) in [-1, 1]."""
    coarse = torch.rand(rows, 3, 3, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")


def captions(count: int, length: int, generator: torch.Generator) -> Tensor:
    """(count, length) ids of words, no marks."""
    return torch.randint(FIRST_WORD, VOCABULARY, (count, length), generator=generator)


def batch(rows: int = 4, height: int = 32, width: int = 32, sets: int = 1, seed: int = 3) -> dict[str, Tensor]:
    """One training batch as the data side makes it: smooth images, captions of differing length, all present."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(rows, 3, 2, 2, generator=generator) * 2 - 1
    images = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    text_ids = torch.full((rows, sets, 8), PAD)
    caption_ids = torch.full((rows, 10), PAD)
    for row in range(rows):
        length = 2 + row % 5
        for k in range(sets):
            text_ids[row, k, : length + 1] = torch.cat([captions(1, length, generator)[0], torch.tensor([CLASS])])
        caption_ids[row, : length + 2] = torch.cat([torch.tensor([BEGIN]), captions(1, length, generator)[0], torch.tensor([END])])
    return {
        "images": images,
        "text_ids": text_ids,
        "text_present": torch.ones(rows, sets, dtype=torch.bool),
        "caption_ids": caption_ids,
        "draw_key": torch.arange(rows) + 100,
    }


def fitted_network(images: Tensor, steps: int = 200) -> diffusers.AutoencoderTiny:
    """A `tiny_network` that has learnt to rebuild these few images, its latents of unit variance."""
    network = tiny_network(width=16, channels=8)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (network.decode(network.encode(images).latents).sample - images).abs().mean().backward()
        optimizer.step()
    with torch.no_grad():
        network.register_to_config(scaling_factor=1 / network.encode(images).latents.std().item())
    return network


def torchs_layer(block: Block, gelu: str = "exact") -> nn.TransformerEncoderLayer:
    """torch's own pre-norm layer with the weights of our block: the independent implementation that ours is held against."""
    width, hidden, heads = block.attention.out.in_features, block.mlp.fc_in.out_features, block.attention.heads
    activation = nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
    layer = nn.TransformerEncoderLayer(width, heads, hidden, dropout=0.0, activation=activation, layer_norm_eps=1e-6, batch_first=True, norm_first=True)
    pairs = {
        layer.self_attn.in_proj_weight: block.attention.qkv.weight,
        layer.self_attn.in_proj_bias: block.attention.qkv.bias,
        layer.self_attn.out_proj.weight: block.attention.out.weight,
        layer.self_attn.out_proj.bias: block.attention.out.bias,
        layer.norm1.weight: block.norm_attention.weight,
        layer.norm1.bias: block.norm_attention.bias,
        layer.norm2.weight: block.norm_mlp.weight,
        layer.norm2.bias: block.norm_mlp.bias,
        layer.linear1.weight: block.mlp.fc_in.weight,
        layer.linear1.bias: block.mlp.fc_in.bias,
        layer.linear2.weight: block.mlp.fc_out.weight,
        layer.linear2.bias: block.mlp.fc_out.bias,
    }
    assert len(pairs) == len(list(block.parameters())) == len(list(layer.parameters()))
    with torch.no_grad():
        for to, source in pairs.items():
            to.copy_(source)
    return layer
