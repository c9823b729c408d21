"""The two kinds of run that an ablation trains and `compare` compares: of a model, and of a generator that draws in a model's tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openvision3.generate.config import GenerateConfig
from openvision3.generate.recipes import RECIPES as GENERATORS
from openvision3.generate.training import check_start as check_generator
from openvision3.generate.training import train_generator
from openvision3.settings import from_dict, read_json
from openvision3.train.config import PretrainConfig
from openvision3.train.pretrain import check_start, pretrain
from openvision3.train.recipes import RECIPES
from openvision3.train.run import Outcome

RunConfig = PretrainConfig | GenerateConfig


@dataclass(frozen=True)
class Kind:
    """A kind of run: its config, its recipes, and how one is checked and trained."""

    config: type[PretrainConfig] | type[GenerateConfig]
    recipes: dict[str, Callable[[], Any]]
    check: Callable[[Any, int], None]
    """(config, processes): raises what would end the run at its start"""
    train: Callable[..., Outcome]
    """(config, name of the run, signals)"""


PRETRAINING = Kind(PretrainConfig, RECIPES, check_start, pretrain)
GENERATION = Kind(GenerateConfig, GENERATORS, check_generator, train_generator)
KINDS = (PRETRAINING, GENERATION)


def kind_of(config: RunConfig) -> Kind:
    return next(kind for kind in KINDS if isinstance(config, kind.config))


def read_config(path: Path) -> RunConfig:
    """The config.json of a run of either kind: that of a generator names the tokens it draws. Raises FileNotFoundError, ValueError."""
    values = read_json(path)
    return from_dict(GenerateConfig if "tokens" in values else PretrainConfig, values)
