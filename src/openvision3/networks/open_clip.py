"""OpenVision 1 and 2, and the released encoders of 3: open_clip's file layout on our own blocks.

vit = OpenClipViT(model_cfg)                 # the `model_cfg` of open_clip_config.json
vit.load_open_clip(state)                    # the keys of open_clip_pytorch_model.bin
pooled, tokens = vit(images)                 # or latents, for OpenVision 3

Structure and key names follow the authors' fork of open_clip (UCSC-VLAA/OpenVision, src/convert_upload/open_clip); nothing of it is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from openvision3.model.transformer import Gelu, LayerNorm, TransformerSize, blocks

NAMES = {
    "transformer.resblocks.": "blocks.",
    ".ln_1.": ".norm_attention.",
    ".ln_2.": ".norm_mlp.",
    ".attn.in_proj_": ".attention.qkv.",
    ".attn.out_proj.": ".attention.out.",
    ".mlp.c_fc.": ".mlp.fc_in.",
    ".mlp.c_proj.": ".mlp.fc_out.",
}
"""open_clip's name of a part of a block -> ours; all other names are the same."""


class _Tower(nn.Module):
    def load_open_clip(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        """Load an open_clip state dict strictly; keys without `prefix` belong to other networks and are ignored.

        Raises:
            ValueError: weights are missing, unknown to this tower, or of another shape.
        """
        weights = {_our_name(key.removeprefix(prefix)): value for key, value in state.items() if key.startswith(prefix)}
        own = self.state_dict()
        misfits = [f"{key} missing" for key in own if key not in weights] + [f"{key} unknown" for key in weights if key not in own]
        for key in own:
            if key in weights and weights[key].shape != own[key].shape:
                misfits.append(f"{key} of shape {tuple(weights[key].shape)}, not {tuple(own[key].shape)}")
        if misfits:
            raise ValueError(f"{len(misfits)} weights do not fit open_clip_config.json; the first is {misfits[0]}")
        self.load_state_dict(weights)


class OpenClipViT(_Tower):
    """images or latents (B, C, S, S) -> pooled (B, E), not of unit length, and the last block's tokens (B, N, D).

    Raises:
        ValueError: `model_cfg` describes another kind of network than OpenVision's.
    """

    def __init__(self, model_cfg: Mapping[str, Any]):
        super().__init__()
        config = dict(model_cfg["vision_cfg"])
        _check_kind(config, "vision_cfg", no_ln_pre=True, pool_type="avg", final_ln_after_pool=True)
        self.channels, self.image_size, self.patch = int(config.get("in_channels", 3)), int(config["image_size"]), int(config["patch_size"])
        self.size = size = _size(config, int(config["width"]) // int(config.get("head_width", 64)))
        self.gelu = _gelu(config)
        self.conv1 = nn.Conv2d(self.channels, size.width, self.patch, self.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(size.width))
        self.positional_embedding = nn.Parameter(torch.empty((self.image_size // self.patch) ** 2 + 1, size.width))
        self.blocks = blocks(size, self.gelu)
        self.ln_post = LayerNorm(size.width, eps=1e-6)
        self.proj = nn.Parameter(torch.empty(size.width, int(model_cfg["embed_dim"])))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv1(images).flatten(2).transpose(1, 2)  # (B, N, D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        for block in self.blocks:
            x = block(x)
        tokens = x[:, 1:]
        return self.ln_post(tokens.mean(1)) @ self.proj, tokens


class OpenClipText(_Tower):
    """text_ids (B, T) -> (B, E), not of unit length. The class token is last and padding is not masked, as OpenVision 1 was trained.

    Raises:
        ValueError: `model_cfg` describes another kind of network than OpenVision 1's.
    """

    KEYS = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
    """how the keys of the text tower begin, which have no prefix in the state dict"""

    def __init__(self, model_cfg: Mapping[str, Any]):
        super().__init__()
        config = dict(model_cfg["text_cfg"])
        _check_kind(config, "text_cfg", no_causal_mask=True, pool_type="last")
        size = _size(config, int(config["heads"]))
        self.positions = int(config["context_length"])
        self.token_embedding = nn.Embedding(int(config["vocab_size"]), size.width)
        self.positional_embedding = nn.Parameter(torch.empty(self.positions, size.width))
        self.blocks = blocks(size, _gelu(config))
        self.ln_final = LayerNorm(size.width, eps=1e-6)
        self.text_projection = nn.Parameter(torch.empty(size.width, int(model_cfg["embed_dim"])))

    def forward(self, text_ids: Tensor) -> Tensor:
        x = self.token_embedding(text_ids) + self.positional_embedding[: text_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.ln_final(x[:, -1]) @ self.text_projection


def _our_name(key: str) -> str:
    for theirs, name in NAMES.items():
        key = key.replace(theirs, name)
    return key


def _check_kind(config: Mapping[str, Any], where: str, **expected: Any) -> None:
    """Raises ValueError for a network that these towers do not build: it would load under the same keys and compute something else."""
    expected |= {"timm_model_name": None, "attentional_pool": False, "ls_init_value": None, "hf_model_name": None, "proj_bias": False}
    absent = {"no_ln_pre": False, "final_ln_after_pool": False, "no_causal_mask": False, "pool_type": "unset"}
    for name, value in expected.items():
        seen = config.get(name, absent.get(name, value))
        if seen != value:
            raise ValueError(f"{name} {seen!r} in {where} is not of an OpenVision encoder, which has {value!r}")
    if (config.get("norm_kwargs") or {}).get("eps", 1e-6) != 1e-6:
        raise ValueError(f"norm_kwargs {config['norm_kwargs']!r} in {where} is not of an OpenVision encoder, which has eps 1e-06")


def _size(config: Mapping[str, Any], heads: int) -> TransformerSize:
    width = int(config["width"])
    return TransformerSize(width, int(config["layers"]), heads, int(width * float(config.get("mlp_ratio", 4.0))))


def _gelu(config: Mapping[str, Any]) -> Gelu:
    return "tanh" if (config.get("act_kwargs") or {}).get("approximate") == "tanh" else "exact"
