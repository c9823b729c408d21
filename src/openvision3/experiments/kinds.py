"""The kinds of run that an ablation trains and `compare` compares: of a model, of a generator that draws in its tokens, of a chat model that sees by it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openvision3 import hub
from openvision3.data.prepared import rows_of_a_process
from openvision3.generate.config import PEER_TOKENS, VAE_TOKENS, GenerateConfig
from openvision3.generate.flow import dimension_shift
from openvision3.generate.recipes import RECIPES as GENERATORS
from openvision3.generate.space import open_space
from openvision3.generate.training import train_generator
from openvision3.settings import from_dict, read_json
from openvision3.train.config import PretrainConfig
from openvision3.train.open_data import check_held_out
from openvision3.train.pretrain import check_start, pretrain
from openvision3.train.recipes import RECIPES
from openvision3.train.run import Outcome
from openvision3.understand.config import LlavaConfig
from openvision3.understand.recipes import RECIPES as CHATS
from openvision3.understand.training import check_conversations, train_chat

RunConfig = PretrainConfig | GenerateConfig | LlavaConfig

SEED = "{seed}"
"""in the tokens of a generator or the tower of a chat model: the seed of its run, so that each seed draws or sees by another model"""


@dataclass(frozen=True)
class Kind:
    """A kind of run: its config, its recipes, and how one is checked and trained."""

    what: str
    """what its recipes train"""
    config: type[PretrainConfig] | type[GenerateConfig] | type[LlavaConfig]
    recipes: dict[str, Callable[[], Any]]
    check: Callable[[Any, int], None]
    """(config, number of processes): raises ValueError, FileNotFoundError for what would end the run at its start"""
    train: Callable[..., Outcome]
    """(config, name of the run, signals)"""
    held_out: str
    """what it is evaluated on during training"""
    evaluated: str
    """on how much, and how"""
    sheet: str
    """what its sample sheets show"""


def _check_generator(config: GenerateConfig, world: int) -> None:
    check_held_out(config)
    rows_of_a_process(config.batch, world, config.micro_batch)
    if not config.tokens.startswith((VAE_TOKENS, PEER_TOKENS)):
        hub.find_folder(config.tokens)


def _check_chat(config: LlavaConfig, world: int) -> None:
    check_conversations(config)
    rows_of_a_process(config.batch, world, config.micro_batch)
    hub.find_folder(config.tower)


MODEL = Kind(
    "a model", PretrainConfig, RECIPES, check_start, pretrain, "images", "at most 256 images, sigma 0", "Original | VAE | rebuilt, the first images of the set"
)
GENERATOR = Kind(
    "a generator", GenerateConfig, GENERATORS, _check_generator, train_generator, "images", "at eight times", "Drawn from the first conditions of the set"
)
CHAT = Kind("a chat model", LlavaConfig, CHATS, _check_chat, train_chat, "conversations", "at most 256 conversations", "Sheets")
KINDS = (MODEL, GENERATOR, CHAT)


def kind_of(config: RunConfig) -> Kind:
    return next(kind for kind in KINDS if isinstance(config, kind.config))


def to_config(values: dict[str, Any]) -> RunConfig:
    """The config of a run of any kind: that of a generator names the tokens it draws, that of a chat model its language model. Raises ValueError."""
    kind: type[RunConfig] = GenerateConfig if "tokens" in values else LlavaConfig if "language" in values else PretrainConfig
    return from_dict(kind, values)


def read_config(path: Path) -> RunConfig:
    """Raises FileNotFoundError, ValueError."""
    return to_config(read_json(path))


def shift_by_size(config: GenerateConfig) -> float:
    """The shift of times that the size of images and tokens asks for. Opens the model whose tokens are drawn. Raises FileNotFoundError, ValueError."""
    space = open_space(config.tokens, "fp32")
    rows, columns = space.grid(config.size)
    return dimension_shift(rows * columns * space.channels)


def seeded(config: RunConfig, seed: int) -> RunConfig:
    """A copy of the config for the run of this seed, which draws in the tokens of the model of this seed, or sees by it."""
    config = copy.deepcopy(config)
    config.seed = seed
    if isinstance(config, GenerateConfig):
        config.tokens = config.tokens.replace(SEED, str(seed))
    if isinstance(config, LlavaConfig):
        config.tower = config.tower.replace(SEED, str(seed))
    return config
