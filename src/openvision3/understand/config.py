"""The settings of a training that learns to talk about images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from openvision3.data.crops import check_size
from openvision3.settings import PathName, check_choices, check_numbers
from openvision3.train.loop_config import LoopConfig


@dataclass
class _TowerAndLanguage:
    """What is connected, and on what it is trained: apart from `LlavaConfig` only so that these fields come first."""

    tower: PathName = "mini"
    """the model that sees: a shipped name, a model folder or a run. Its encoder stays frozen"""
    language: PathName = "smollm2"
    """the language model: smollm2, a folder in transformers' layout, or a hub id such as lmsys/vicuna-7b-v1.5"""
    data: tuple[PathName, ...] = ()
    """conversations: JSON files in LLaVA's layout, or .jsonl files with one conversation a line"""
    images: tuple[PathName, ...] = ()
    """folders and zip files that hold the images. Not set: the folder of each JSON file, and the .zip of its name beside it"""
    val: tuple[PathName, ...] = ()
    """held-out conversations, evaluated during training and never trained on. Not set: no evaluation"""
    size: int = 0
    """side of an image, or of a tile, in pixels, a multiple of 16; 0: the size that the tower was trained at"""
    anyres: bool = False
    """LLaVA-NeXT: an image is seen whole and in up to four tiles of this size. False: padded to one square, as in LLaVA-1.5"""
    layer: int = -1
    """the tower's output that the projector reads: -1 the final tokens, -2 those of the block before, 0 what enters the first block"""
    template: Literal["auto", "chat", "vicuna", "plain"] = "auto"
    """how a conversation is written: by the tokenizer's own template (chat), as Vicuna's, or only the answers (plain); auto: chat if there is one, or vicuna"""
    length: int = 2048
    """most tokens of a conversation, those of its images included; a longer one is cut and counted"""
    begin: Literal["random", "words"] = "random"
    """where a new projector begins: random, as LLaVA's, or words: at a ridge regression of the words of answers, which saves most of the first phase"""
    train_language: Literal["frozen", "lora", "full"] = "frozen"
    """what learns beside the projector: nothing, low-rank additions to each matrix of the language model (LoRA), or all of it"""
    lora_rank: int = 16
    """train_language lora: rank of the additions"""
    lora_alpha: float = 32.0
    """train_language lora: the additions are multiplied by this over the rank"""


@dataclass
class LlavaConfig(LoopConfig, _TowerAndLanguage):
    """One training of a chat model, complete. Its fields and those of `LoopConfig` lie flat in config.json and on the command line."""

    PLACES: ClassVar[tuple[str, ...]] = ("data", "images", "val", "tower", "language")
    SETTLED: ClassVar[tuple[tuple[str, Any], ...]] = (*LoopConfig.SETTLED, ("size", 0), ("template", "auto"))

    def __post_init__(self):
        super().__post_init__()
        check_choices(self)
        if self.size:
            check_size(self.size)
        check_numbers(self, 1, "length", "lora_rank")
        if not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha {self.lora_alpha} must be positive")
        if self.minutes:
            raise ValueError(f"minutes {self.minutes:g} are measured on a copy of the model, and a language model is not copied; set --steps")
