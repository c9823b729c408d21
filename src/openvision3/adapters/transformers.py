"""Our model in transformers: an opened model as its classes, the processor, and the entry in its Auto classes.

register()                                    # AutoModel, AutoConfig, AutoProcessor ... know the classes
tower = vision_model(openvision3.load("mini"))    # shares the weights
"""

from __future__ import annotations

import json
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

from openvision3.adapters.transformers_config import OpenVision3Config, OpenVision3VisionConfig
from openvision3.adapters.transformers_images import OpenVision3ImageProcessor
from openvision3.adapters.transformers_model import OpenVision3Model, OpenVision3VisionModel
from openvision3.adapters.transformers_processor import OpenVision3Processor
from openvision3.data.text import TextTokenizer
from openvision3.hub import vae_licence
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
    settings: dict[str, Any] = {}
    if vae.network is not None:
        settings = {name: value for name, value in json.loads(vae.network.to_json_string()).items() if name[0] != "_" or name == "_class_name"}  # type: ignore[operator]
    return OpenVision3VisionConfig(
        encoder=asdict(pipeline.encoder.config),
        vae=settings,
        vae_shift=vae.uses_shift,
        vae_origin={"name": vae.name, "sha256": vae.sha256, "licence": vae_licence(vae.name)},
        image_size=pipeline.size,
    )


def vision_model(pipeline: Pipeline) -> OpenVision3VisionModel:
    """The encoder and the VAE's encoder of an opened model as a vision tower. It shares their weights: what trains one, trains the other."""
    model = pipeline.model
    with torch.device("meta"):
        tower = OpenVision3VisionModel(vision_config(pipeline))
    return _filled(tower, {name: value for name, value in model.state_dict().items() if name.startswith(("encoder.", "vae."))})


def dual_encoder(pipeline: Pipeline) -> OpenVision3Model:
    """Encoder and text encoder of an opened model. It shares their weights."""
    text = pipeline.model.text_encoder
    config = OpenVision3Config(
        vision_config=vision_config(pipeline),
        text_encoder=asdict(text.config),
        vocab_size=pipeline.model.vocabulary,
        pad_token_id=pipeline.model.pad_id,
    )
    with torch.device("meta"):
        model = OpenVision3Model(config)
    names = {"encoder": "vision_model.encoder", "vae": "vision_model.vae"}
    state = {names.get(name.split(".")[0], name.split(".")[0]) + name[len(name.split(".")[0]) :]: value for name, value in pipeline.model.state_dict().items()}
    return _filled(model, state)


def _filled(model: Any, state: dict[str, torch.Tensor]) -> Any:
    """The model, which was made without memory, with these tensors as its weights; those of parts that it lacks are left out."""
    own = model.state_dict()
    model.load_state_dict({name: value for name, value in state.items() if name in own}, assign=True)
    return model.eval()


def image_processor(pipeline: Pipeline, fit: str = "crop") -> OpenVision3ImageProcessor:
    """An image processor for the size at which the model was trained."""
    return OpenVision3ImageProcessor(size={"height": pipeline.size, "width": pipeline.size}, fit=fit)


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
