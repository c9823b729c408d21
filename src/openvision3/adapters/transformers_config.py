"""Configs of the transformers classes: a vision tower, and image and text encoder together.

transformers writes and reads them as config.json. `encoder_settings` and `text_settings` hold the fields of our own parts' dataclasses, `vae_settings`
the VAE's diffusers config. What other code reads of a tower, such as `hidden_size`, is derived from these.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from openvision3.adapters.parts import FLUX, STRIDE
from openvision3.model.encoder import EncoderConfig, named_size
from openvision3.model.understanding import TextEncoderConfig
from openvision3.settings import from_dict


class OpenVision3VisionConfig(PreTrainedConfig):
    """Settings of the tower: VAE encoder, then ViT.

    Args:
        encoder_settings: the fields of EncoderConfig
        vae_settings: the config of the VAE in diffusers' layout, with `_class_name`; empty: no VAE
        vae_shift: whether the latents are shifted by the VAE's shift_factor; None: as VAEConfig.shift
        vae_origin: name, sha256 and licence of the VAE, for the record
        image_size: side of the training images in pixels; any multiple of 16 can be used

    Raises:
        ValueError: an unknown field or a bad value in `encoder_settings`; a derived field, such as hidden_size, that does not fit it.
    """

    model_type = "openvision3_vision"
    base_config_key = "vision_config"

    encoder_settings: dict | None = None
    vae_settings: dict | None = None
    vae_shift: bool | None = None
    vae_origin: dict | None = None
    image_size: int = 256

    def __post_init__(self, **kwargs: Any):
        parts = from_dict(EncoderConfig, self.encoder_settings or {}, "encoder_settings.")
        self.encoder_settings = asdict(parts)
        self.vae_settings = dict(FLUX) if self.vae_settings is None else self.vae_settings
        self.vae_origin = self.vae_origin or {}
        size = named_size(parts.size)
        derived = {
            "hidden_size": size.width,
            "num_hidden_layers": size.depth,
            "num_attention_heads": size.heads,
            "intermediate_size": size.mlp,
            "projection_dim": parts.embed_dim,
            "patch_size": STRIDE,
            "num_channels": 3,
        }
        _check_derived(derived, kwargs)
        super().__post_init__(**kwargs)
        for name, value in derived.items():
            setattr(self, name, value)


class OpenVision3Config(PreTrainedConfig):
    """Settings of the dual encoder: the tower and the text encoder, whose embeddings share a space.

    Args:
        vision_config: an OpenVision3VisionConfig or its fields
        text_settings: the fields of TextEncoderConfig
        vocab_size: number of word pieces, special tokens included
        pad_token_id: id of [PAD]

    Raises:
        ValueError: as OpenVision3VisionConfig; and for the config.json of a folder that `openvision3` itself saved.
    """

    model_type = "openvision3"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {"vision_config": OpenVision3VisionConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_settings: dict | None = None
    vocab_size: int = 30522
    pad_token_id: int = 0

    def __post_init__(self, **kwargs: Any):
        if "format" in kwargs:
            raise ValueError(
                "this is a model folder of openvision3 itself; open it with openvision3.load, or write it for transformers: "
                "openvision3 export transformers MODEL --out FOLDER"
            )
        self.text_settings = asdict(from_dict(TextEncoderConfig, self.text_settings or {}, "text_settings."))
        super().__post_init__(**kwargs)

    @property
    def projection_dim(self) -> int:
        return self.vision_config.projection_dim  # type: ignore[union-attr]


def _check_derived(derived: dict[str, Any], given: dict[str, Any]) -> None:
    for name, value in derived.items():
        if given.pop(name, value) != value:
            raise ValueError(f"{name} is {value}, the encoder's; it cannot be set by itself, choose another size or embed_dim")
