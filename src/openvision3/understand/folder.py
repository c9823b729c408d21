"""A chat model as a folder: config.json, model.safetensors (projector, and what was trained of the language model), README.md.

It names tower and language model, with the sha256 of their weights, and is refused with others. Loads are strict.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvision3 import hub
from openvision3.device import dtype_of
from openvision3.hub import CHAT
from openvision3.pipeline import Pipeline
from openvision3.settings import flat
from openvision3.understand.language import language_sha256, open_language
from openvision3.understand.llava import LANGUAGE, NEWLINE, Llava, connect, trained_tensors
from openvision3.understand.prompts import Prompts
from openvision3.understand.tiles import ImageLayout

FORMAT = 1
SHIPPED = hub.ASSETS / "chats"


@dataclass
class ChatConfig:
    """What config.json holds."""

    format: int
    """version of this layout"""
    tower: str
    """the name of the model that sees"""
    tower_sha256: str
    """the sha256 of its weights"""
    language: str
    """the name of the language model"""
    language_sha256: str
    """the sha256 of its weights"""
    size: int
    """side of an image, or of a tile, in pixels"""
    anyres: bool
    """whether images are also seen in tiles"""
    layer: int
    """the tower's output that the projector reads"""
    template: str
    """how a conversation is written"""
    length: int
    """most tokens of a conversation in training"""
    train_language: str
    """what was trained of the language model: frozen, lora or full"""
    lora_rank: int
    """rank of LoRA's additions"""
    lora_alpha: float
    """LoRA's additions are multiplied by this over the rank"""
    training: dict[str, Any] = field(default_factory=dict)
    """recipe, steps, samples, data and precision of the training"""
    model_type: str = CHAT
    """tells other programs which model this is"""


@dataclass
class Opened:
    """A chat model, ready to answer: `model.network` is transformers' class."""

    model: Llava
    pipeline: Pipeline
    prompts: Prompts
    layout: ImageLayout
    config: ChatConfig
    folder: Path


def shipped() -> list[str]:
    """Names of chat models that come with the package."""
    return hub.shipped_in(SHIPPED)


def save(path: Path, config: ChatConfig, weights: dict[str, Tensor], *, dtype: torch.dtype | None = None) -> None:
    """Write the folder of a chat model from what was trained, by its names in transformers' class. `dtype` torch.bfloat16 halves it.

    A folder that is not finished is removed.
    """
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in weights.items()}
    hub.write_folder(path, config, state, card(config))


def find(name: str | Path) -> Path:
    """A shipped chat model ("" is the first), the folder of one, or a run -> the folder with config.json. Raises FileNotFoundError."""
    return hub.find_or_first(name, "chat model", SHIPPED)


def read(folder: Path) -> ChatConfig:
    """Raises FileNotFoundError; ValueError for another kind of model, or another version."""
    return hub.read_config_of(folder, ChatConfig, CHAT, FORMAT)


def open_tower(name: str, precision: str) -> Pipeline:
    """The model that sees, whose VAE computes in `precision`. Raises FileNotFoundError, ValueError."""
    folder = hub.find_folder(name)
    model, tokenizer, config = hub.load_model(folder, vae_dtype=dtype_of(precision))
    pipeline = Pipeline(model, tokenizer, config.size, precision=precision, training=config.training)
    pipeline.folder = folder
    return pipeline


def load(name: str | Path, *, precision: str = "fp32", tower: str = "", language: str = "") -> Opened:
    """Read a chat model strictly, with its tower and its language model; `tower` and `language` name these, if the names in its config are not found.

    Raises:
        FileNotFoundError, ValueError: one line on what is missing or does not fit.
    """
    folder = find(name)
    config = read(folder)
    parts = {"tower": (tower or config.tower, config.tower_sha256), "language": (language or config.language, config.language_sha256)}
    for part, (place, recorded) in parts.items():
        try:
            seen = hub.weights_sha256(hub.find_folder(place)) if part == "tower" else language_sha256(place)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"the {part} of {folder} is not found: {error}; name it with --{part}") from error
        if seen != recorded:
            raise ValueError(
                f"{folder} was trained with the {part} {getattr(config, part)} of sha256 {recorded[:12]}..., but {place} has {seen[:12]}... now; "
                f"name the one of its training with --{part}"
            )
    pipeline = open_tower(parts["tower"][0], precision)
    model, tokenizer = open_language(parts["language"][0], dtype_of(precision))
    prompts = Prompts(tokenizer, config.template, config.length)
    network = connect(config, pipeline, model, prompts)
    path = folder / "model.safetensors"
    hub.copy_tensors({name: value.data for name, value in trained_tensors(network).items()}, hub.read_tensors(path), path)
    network.requires_grad_(False)
    if config.train_language == "full":  # it was trained in fp32
        for part in (network.model.language_model, network.lm_head):
            part.to(dtype_of(precision))
    return Opened(Llava(network).eval(), pipeline, prompts, ImageLayout(config.size, config.anyres), config, folder)


def start_from(network: Any, name: str, config: ChatConfig) -> str:
    """Copy what another training has learned into a network that is to be trained further -> a line for the log.

    The projector must fit. What was trained of the language model must be trained here, too. The token that ends a row of tiles may be new.

    Raises:
        FileNotFoundError. ValueError: another tower or language model, layer, or part trained.
    """
    folder = find(name)
    before = read(folder)
    for part in ("tower_sha256", "language_sha256", "layer"):
        if getattr(before, part) != getattr(config, part):
            what = part.removesuffix("_sha256")
            raise ValueError(f"{folder} was trained with --{what} {getattr(before, what)}, not {getattr(config, what)}: its projector would mean another thing")
    own = {name: value.data for name, value in trained_tensors(network).items()}
    path = folder / "model.safetensors"
    state = hub.read_tensors(path)
    if before.train_language != "frozen":
        for part in ("train_language", *(("lora_rank", "lora_alpha") if before.train_language == "lora" else ())):
            if getattr(before, part) != getattr(config, part):
                raise ValueError(f"{folder} was trained with {part} {getattr(before, part)}; set --{part.replace('_', '-')} {getattr(before, part)}")
    else:
        own = {name: value for name, value in own.items() if not name.startswith((LANGUAGE, "lm_head."))}
    fresh = NEWLINE in own and NEWLINE not in state
    unused = [NEWLINE] if NEWLINE in state and NEWLINE not in own else []
    hub.copy_tensors({name: value for name, value in own.items() if not (fresh and name == NEWLINE)}, state, path, unused)
    return f"starting from {folder}: {len(state) - len(unused)} tensors" + ("; the token that ends a row of tiles is new" if fresh else "")


def card(config: ChatConfig) -> str:
    """A hub model card: what it is made of, how it was trained."""
    training = "\n".join(f"- {name}: {value}" for name, value in flat(config.training).items()) or "- not recorded"
    learned = {"frozen": "", "lora": f", and low-rank additions to the language model (LoRA, rank {config.lora_rank})", "full": ", and the language model"}
    return f"""---
library_name: openvision3
pipeline_tag: image-text-to-text
license: other
---
# A chat model for images of {config.size} px

The projector between the tower `{config.tower}` (sha256 `{config.tower_sha256}`) and the language model `{config.language}` (sha256
`{config.language_sha256}`){learned[config.train_language]}, as in {"LLaVA-NeXT" if config.anyres else "LLaVA-1.5 (arXiv 2310.03744)"}, saved by `openvision3`.

    openvision3 chat IMAGE "What is this?" --model "THIS FOLDER"

## Training
{training}
"""
