"""The settings of a training that learns to draw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from openvision3.fetch.sources import PEER
from openvision3.generate.dit import DiTConfig
from openvision3.generate.flow import FlowConfig
from openvision3.settings import PathName, check_choices, check_numbers
from openvision3.train.data_config import DataConfig
from openvision3.train.loop_config import LoopConfig

VAE_TOKENS = "vae:"
"""what a name of `tokens` begins with if the latents of a VAE are drawn, without an encoder of ours"""
PEER_TOKENS = PEER
"""what it begins with if the tokens of another model are drawn, one that can decode them"""


@dataclass
class _TokensAndNetwork(DataConfig):
    """What is drawn, on what condition, and by which network: apart from `GenerateConfig` only so that these fields come first."""

    tokens: PathName = "mini"
    """the model whose tokens are drawn: a shipped name, a model folder or a run; vae:NAME for the latents of a VAE in squares of 2 x 2
    (vae:embedded); or peer:NAME for those of a RAE of others (peer:rae-dinov2, or peer:rae-dinov2=FOLDER)"""
    condition: Literal["label", "text", "none"] = "text"
    """what an image is drawn from: a class, a text (read by the text encoder of `tokens`), or nothing"""
    captions: int = 2
    """condition text: captions of an image that one is drawn from in each step: the first and further ones"""
    label_key: str = ""
    """condition label: the JSON field or column with the class. Not set: the emoji's group, the sub-folder or the .cls member"""
    classes: PathName = ""
    """condition label: a file of class names, one a line, or their number, such as 1000. Not set: the labels of the data, all read once"""
    family_balance: float = 0.0
    """how far families (the skin tones and genders of a drawing) count alike in an epoch: 0: every sample once; 1: each family as often as any other;
    between: a family of n samples as often as n^(1 - family_balance)"""
    drop: float = 0.1
    """share of the rows that are drawn without their condition, which guidance needs; 0: no guidance"""
    statistics: int = 50_000
    """images from which mean and variance of the tokens are computed when a run starts; 0: the tokens are not normalised"""
    dit: DiTConfig = field(default_factory=DiTConfig)
    """the network"""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """noise, times and what is predicted"""


@dataclass
class GenerateConfig(LoopConfig, _TokensAndNetwork):
    """One training of a generator, complete. Its fields and those of `LoopConfig` lie flat in config.json and on the command line."""

    FREE: ClassVar[tuple[str, ...]] = (*LoopConfig.FREE, *DataConfig.DATA_FREE)
    PLACES: ClassVar[tuple[str, ...]] = ("data", "val", "latents", "tokens", "classes")
    SETTLED: ClassVar[tuple[tuple[str, Any], ...]] = (*LoopConfig.SETTLED, *DataConfig.DATA_SETTLED)

    def __post_init__(self):
        super().__post_init__()
        self.check_data(self.batch)
        check_choices(self)
        check_numbers(self, 1, "captions")
        check_numbers(self, 0, "statistics")
        if not 0 <= self.family_balance <= 1:
            raise ValueError(f"family_balance {self.family_balance} must lie between 0 and 1")
        if self.weights and self.family_balance:
            raise ValueError("weights and family_balance both order an epoch; set --family-balance 0, or leave out --weights")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop {self.drop} must be at least 0 and below 1")
        if self.dit.stored_positions and not self.init:
            raise ValueError(f"dit.stored_positions {self.dit.stored_positions} come with weights, and there are none; name a file with --init, or set 0")
        if self.condition == "text" and self.tokens.startswith((VAE_TOKENS, PEER_TOKENS)):
            raise ValueError(f"tokens {self.tokens} have no text encoder to read texts; set --condition label or none, or name a model of ours in --tokens")
