"""Foreign networks of the true architectures, tiny and random, saved as their authors publish them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from shapes import kl_network, tiny_network
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, SiglipConfig, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from openvision3.model.transformer import sincos_positions

PIECES = ["a", "b", "c", "d", "a</w>", "b</w>", "c</w>", "d</w>", "ab</w>", "cd</w>", "<|startoftext|>", "<|endoftext|>"]
MERGES = [("a", "b</w>"), ("c", "d</w>")]


def loud(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights wide enough that images and words matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.2, generator=generator)
            else:
                weight.add_(torch.empty_like(weight).normal_(std=0.1, generator=generator)) if weight.ndim else None
    return network.eval()


def save_vae(folder: Path, name: str) -> nn.Module:
    """flux-vae, sd-vae, sd3-vae, taesd or taef1."""
    network: Any
    if name == "sd-vae":
        network = kl_network(latent_channels=4, scaling_factor=0.18215, shift_factor=None, use_quant_conv=True, use_post_quant_conv=True)
    elif name in ("flux-vae", "sd3-vae"):
        network = kl_network(latent_channels=16, scaling_factor=0.3611 if name == "flux-vae" else 1.5305)
    else:
        network = tiny_network(channels=16 if name == "taef1" else 4)
    network.save_pretrained(folder)
    return network.eval()


def save_rae(folder: Path, encoder: str) -> diffusers.AutoencoderRAE:
    """Takes images of 28 or 32 pixels in 2 x 2 patches, gives 32."""
    patch = 14 if encoder == "dinov2" else 16
    network: Any = diffusers.AutoencoderRAE(
        encoder_type=encoder,
        encoder_hidden_size=64,
        encoder_patch_size=patch,
        encoder_num_hidden_layers=2,
        encoder_input_size=2 * patch,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        latents_mean=torch.linspace(-1, 1, 64 * 4).view(64, 2, 2),
        latents_std=torch.linspace(0.5, 2, 64 * 4).view(64, 2, 2),
        noise_tau=0.8,
    )
    loud(network.decoder)
    network.save_pretrained(folder)
    return network.eval()


def _towers(text: dict[str, Any], patch: int) -> dict[str, Any]:
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "text_config": {**common, "max_position_embeddings": 8, "vocab_size": 12, **text},
        "vision_config": {**common, "image_size": 2 * patch, "patch_size": patch},
    }


def save_clip(folder: Path, patch: int = 16, **saving) -> CLIPModel:
    marks = {"bos_token_id": 10, "eos_token_id": 11, "pad_token_id": 1, "projection_dim": 24}
    config = _towers(marks, patch)
    config["vision_config"]["projection_dim"] = 24
    model: Any = loud(CLIPModel(CLIPConfig(**config, projection_dim=24)))
    model.save_pretrained(folder, **saving)
    CLIPImageProcessorPil(size={"shortest_edge": 2 * patch}, crop_size={"height": 2 * patch, "width": 2 * patch}).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return model


def clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(PIECES)}, merges=MERGES, model_max_length=8)


def save_siglip(folder: Path) -> SiglipModel:
    """Its real tokenizer is a SentencePiece saved as tokenizer.json: here a WordLevel with the same marks (id 1 ends and pads)."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    model: Any = loud(SiglipModel(SiglipConfig(**_towers({"pad_token_id": 1, "projection_size": 32}, 16))))
    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "red": 2, "blue": 3, "heart": 4}, unk_token="<unk>"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    words.save(str(folder / "tokenizer.json"))
    return model


# -- open_clip's VisionTransformer and text transformer, as the authors' fork builds them, on torch's own attention ---


class Reference(nn.Module):
    """The forward of released_encoder.md and of OpenVision 1's text tower, with open_clip's names; independent of our blocks."""

    def __init__(self, width: int, layers: int, heads: int, gelu: str):
        super().__init__()
        self.resblocks = nn.ModuleList()
        for _ in range(layers):
            block = nn.Module()
            block.ln_1, block.ln_2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
            block.attn = nn.MultiheadAttention(width, heads, batch_first=True)
            block.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
            self.resblocks.append(block)
        self.gelu = nn.GELU(approximate=gelu)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            y = block.ln_1(x)
            x = x + block.attn(y, y, y, need_weights=False)[0]
            x = x + block.mlp["c_proj"](self.gelu(block.mlp["c_fc"](block.ln_2(x))))
        return x


class ReferenceVision(nn.Module):
    def __init__(self, channels: int, side: int, patch: int, width: int = 32, embed: int = 24):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width).normal_())
        self.positional_embedding = nn.Parameter(torch.empty((side // patch) ** 2 + 1, width).normal_())
        self.transformer = Reference(width, 2, 2, "none")
        self.ln_post = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Parameter(torch.empty(width, embed).normal_())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv1(x).reshape(len(x), self.conv1.out_channels, -1).permute(0, 2, 1)
        x = torch.cat([self.class_embedding.view(1, 1, -1).repeat(len(x), 1, 1), x], 1) + self.positional_embedding
        x = self.transformer(x)
        return self.ln_post(x[:, 1:].mean(1)) @ self.proj, x[:, 1:]


class ReferenceCLIP(nn.Module):
    """OpenVision 1: the text tower's keys stand beside `visual.`, as in open_clip's CLIP."""

    def __init__(self, side: int = 32, patch: int = 16, vocabulary: int = 120, positions: int = 12):
        super().__init__()
        self.visual = ReferenceVision(3, side, patch)
        self.token_embedding = nn.Embedding(vocabulary, 16)
        self.positional_embedding = nn.Parameter(torch.empty(positions, 16).normal_())
        self.transformer = Reference(16, 2, 2, "tanh")
        self.ln_final = nn.LayerNorm(16, eps=1e-6)
        self.text_projection = nn.Parameter(torch.empty(16, 24).normal_())
        self.logit_scale = nn.Parameter(torch.ones([]))

    def encode_text(self, ids: Tensor) -> Tensor:
        x = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding))
        return x[:, -1] @ self.text_projection


VISION_CFG = {
    "image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True,
    "norm_kwargs": {"eps": 1e-06}, "head_width": 16,
}  # fmt: skip
TEXT_CFG = {
    "context_length": 12, "vocab_size": 120, "hf_tokenizer_name": "bert-base-uncased", "tokenizer_kwargs": {"strip_sep_token": True}, "width": 16,
    "heads": 2, "layers": 2, "pool_type": "last", "no_causal_mask": True, "act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-06},
}  # fmt: skip
PREPROCESS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bilinear", "resize_mode": "squash"}
"""What openvision-vit-base-patch16-224.json of the authors' repository says, with smaller numbers."""


def write_openvision(folder: Path, state: dict[str, Tensor], model_cfg: dict[str, Any], preprocess: dict[str, Any] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": model_cfg} | ({"preprocess_cfg": preprocess} if preprocess else {})
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(state, folder / "open_clip_pytorch_model.bin")


def save_openvision1(folder: Path) -> ReferenceCLIP:
    model: Any = loud(ReferenceCLIP())
    write_openvision(folder, model.state_dict(), {"embed_dim": 24, "vision_cfg": VISION_CFG, "text_cfg": TEXT_CFG}, PREPROCESS)
    pieces = ["[PAD]", "[bos]", "[eos]", *(f"[unused{i}]" for i in range(97)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "heart", "##s", "blue", "&"]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    return model


def save_openvision2(folder: Path) -> ReferenceVision:
    model: Any = loud(ReferenceVision(3, 28, 14))
    write_openvision(folder, model.state_dict(), {"embed_dim": 24, "vision_cfg": {**VISION_CFG, "image_size": 28, "patch_size": 14, "output_tokens": True}})
    return model


def save_openvision3(folder: Path, width: int = 32, side: int = 32) -> tuple[ReferenceVision, nn.Module]:
    """The encoder, with keys that begin with `module.visual.`, and the VAE beside it. Positions of the patches are those of the released files."""
    model: Any = loud(ReferenceVision(16, side, 2, width))
    with torch.no_grad():
        model.positional_embedding[1:] = sincos_positions(side // 2, side // 2, width)
    cfg = {**VISION_CFG, "image_size": side, "patch_size": 2, "in_channels": 16, "width": width, "head_width": width // 2, "output_tokens": True}
    write_openvision(folder, {f"module.visual.{key}": value for key, value in model.state_dict().items()}, {"embed_dim": 24, "vision_cfg": cfg})
    return model, save_vae(folder / "vae", "flux-vae")


# -- checkouts: the call signatures of the authors' code over something trivial ----------------------------------------

UNITOK = """
import torch
from models.parts import doubled


class UniTok(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.levels = args.levels
        self.mix = torch.nn.Conv2d(3, 3, 1)

    def img_to_idx(self, img):
        assert img.shape[1:] == (3, 256, 256)
        return doubled((self.mix(img) * self.levels).round().long())

    def idx_to_img(self, indices):
        return (indices / 2 / self.levels).clamp_(-1, 1)

    def encode_image(self, image, normalize=False):
        return self.mix(image).mean((2, 3))
"""
CONFIG = """
class Args:
    levels = 1

    def load_state_dict(self, d):
        for k in d:
            setattr(self, k, d[k])
"""
VILA = """
from dataclasses import dataclass

import torch


@dataclass
class Part:
    width: int = 16


@dataclass
class Config:
    part: Part = Part()


class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Conv2d(3, 3, 1)

    def encode_image(self, image):
        assert image.shape[1:] == (3, 256, 256)
        z = torch.nn.functional.avg_pool2d(self.mix(image), Config().part.width).permute(0, 2, 3, 1)
        return (z * 100).long(), z

    def decode(self, z_q):
        z = torch.nn.functional.interpolate(z_q.permute(0, 3, 1, 2).float(), scale_factor=16).to(torch.bfloat16)
        return self.mix(z)


class RQVAESIGLIPTransformer:
    @classmethod
    def from_pretrained(cls, path, torch_dtype):
        from safetensors.torch import load_file

        model = cls()
        model.rqvaesiglip = Tower().to(torch_dtype)
        model.rqvaesiglip.load_state_dict(load_file(path + "/model.safetensors"))
        return model
"""
"""As in the real repository, a dataclass is the default of a field, which Python 3.11 refuses, and decoding fails in fp32."""


def save_unitok(folder: Path) -> nn.Conv2d:
    for name, text in {"models/__init__": "", "models/unitok": UNITOK, "models/parts": "def doubled(x):\n    return 2 * x\n", "utils/config": CONFIG}.items():
        (folder / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text(text)
    mix = nn.Conv2d(3, 3, 1)
    state = {f"mix.{key}": value for key, value in mix.state_dict().items()}
    torch.save({"args": {"levels": 16}, "trainer": {"unitok": state}}, folder / "unitok_tokenizer.pth")
    return mix


def save_vila(folder: Path) -> nn.Conv2d:
    from safetensors.torch import save_file

    package = folder / "vila_u" / "model" / "multimodal_encoder" / "rqvaesigliptransformer"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(VILA)
    (folder / "vila_u" / "__init__.py").write_text("import a_training_stack_that_nobody_has\n")
    (folder / "vision_tower").mkdir()
    mix = nn.Conv2d(3, 3, 1)
    save_file({f"mix.{key}": value.bfloat16() for key, value in mix.state_dict().items()}, folder / "vision_tower" / "model.safetensors")
    return mix
