"""Our model in transformers: an opened model as its classes, the processor, and the entry in its Auto classes.

register()                                    # AutoModel, AutoConfig, AutoProcessor ... know the classes
tower = vision_model(openvision3.load("mini"))    # shares the weights
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from tokenizers import Tokenizer, processors
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from openvision3.adapters.parts import filled, vae_settings
from openvision3.adapters.transformers_config import OpenVision3Config, OpenVision3VisionConfig
from openvision3.adapters.transformers_images import OpenVision3ImageProcessor
from openvision3.adapters.transformers_model import OpenVision3Model, OpenVision3VisionModel
from openvision3.adapters.transformers_processor import OpenVision3Processor
from openvision3.data.text import TextTokenizer
from openvision3.hub import vae_origin
from openvision3.pipeline import Pipeline


def register() -> None:
    """Make the Auto classes of transformers know ours. May be called any number of times."""
    for config, model in ((OpenVision3VisionConfig, OpenVision3VisionModel), (OpenVision3Config, OpenVision3Model)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoImageProcessor.register(config, image_processor_classes={"pil": OpenVision3ImageProcessor}, exist_ok=True)
    AutoModelForZeroShotImageClassification.register(OpenVision3Config, OpenVision3Model, exist_ok=True)
    AutoTokenizer.register(OpenVision3Config, tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
    AutoProcessor.register(OpenVision3Config, OpenVision3Processor, exist_ok=True)


def vision_config(pipeline: Pipeline) -> OpenVision3VisionConfig:
    """The config of the tower of an opened model."""
    vae = pipeline.vae
    return OpenVision3VisionConfig(
        encoder_settings=asdict(pipeline.encoder.config),
        vae_settings=vae_settings(vae),
        vae_shift=vae.uses_shift,
        vae_origin=vae_origin(vae),
        image_size=pipeline.size,
    )


def vision_model(pipeline: Pipeline) -> OpenVision3VisionModel:
    """The encoder and the VAE's encoder of an opened model as a vision tower. It shares their weights: what trains one, trains the other."""
    model = pipeline.model
    with torch.device("meta"):
        tower = OpenVision3VisionModel(vision_config(pipeline))
    return filled(tower, model.state_dict())


def dual_encoder(pipeline: Pipeline) -> OpenVision3Model:
    """Encoder and text encoder of an opened model. It shares their weights. Raises ValueError if the text encoder was never trained."""
    pipeline.check_trained("text encoder")
    text = pipeline.model.text_encoder
    config = OpenVision3Config(
        vision_config=vision_config(pipeline),
        text_settings=asdict(text.config),
        vocab_size=pipeline.model.vocabulary,
        pad_token_id=pipeline.model.pad_id,
    )
    with torch.device("meta"):
        model = OpenVision3Model(config)
    state = pipeline.model.state_dict()
    return filled(model, {f"vision_model.{name}" if name.startswith(("encoder.", "vae.")) else name: value for name, value in state.items()})


def image_processor(pipeline: Pipeline, fit: str = "crop") -> OpenVision3ImageProcessor:
    """An image processor for the size at which the model was trained."""
    settings: dict[str, Any] = {"size": {"height": pipeline.size, "width": pipeline.size}, "fit": fit}
    return OpenVision3ImageProcessor(**settings)


def text_tokenizer(tokenizer: TextTokenizer, positions: int) -> PreTrainedTokenizerFast:
    """Our tokenizer as transformers': the same ids as `TextTokenizer.text_ids` for a text encoder with so many positions."""
    copy = Tokenizer.from_str(tokenizer.tokenizer.to_str())
    name = copy.id_to_token(tokenizer.class_id)
    copy.post_processor = processors.TemplateProcessing(single=f"$A {name}", special_tokens=[(name, tokenizer.class_id)])
    return PreTrainedTokenizerFast(
        tokenizer_object=copy,
        pad_token=copy.id_to_token(tokenizer.pad_id),
        cls_token=name,
        unk_token=None if tokenizer.unknown_id is None else copy.id_to_token(tokenizer.unknown_id),
        model_max_length=positions,
        padding_side="right",
        truncation_side="right",
        split_special_tokens=True,
        model_input_names=["input_ids", "attention_mask"],
    )


def processor(pipeline: Pipeline, fit: str = "crop") -> OpenVision3Processor:
    """Image processor and tokenizer of an opened model in one."""
    return OpenVision3Processor(image_processor(pipeline, fit), text_tokenizer(pipeline.tokenizer, pipeline.model.text_encoder.config.positions))
