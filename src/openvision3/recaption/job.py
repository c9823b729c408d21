"""What a recaptioning job is: its data, its model, how the model is prompted, and where the new captions go. Imports no torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from openvision3.settings import PathName, check_numbers

if TYPE_CHECKING:
    from openvision3.recaption.image_text import Wording

ORIGINAL = "org_caption"
"""The JSON field that keeps the old caption, as in Recap-DataComp-1B."""


@dataclass
class RecaptionJob:
    """One recaptioning job; processes that share its shards have equal ones."""

    data: tuple[PathName, ...]
    """shards, folders and globs"""
    model: PathName
    """a model folder, or a hub model in the local cache"""
    out: PathName
    """the folder for the new shards, which keep their names; for a folder of images, the folder for captions.jsonl"""
    prompt: str = "Describe this picture in one or two sentences."
    """the prompt that the model completes"""
    field: str = "re_caption"
    """the JSON field of the new caption; the old caption is kept in org_caption"""
    caption_key: str = ""
    """the JSON field of the old caption. Not set: the .txt member, else the field caption"""
    batch: int = 8
    """images per batch"""
    max_new_tokens: int = 128
    """longest caption in tokens of the model"""
    max_words: int = 0
    """longest caption in words; 0: no limit"""
    top_p: float | None = None
    """sample from the smallest set of tokens with this probability. Not set: greedy decoding"""
    temperature: float | None = None
    """sampling temperature. Not set: greedy decoding, or 1 with --top-p"""
    seed: int = 0
    """seed of the sampling"""
    device: str = "auto"
    """where to compute"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU, fp32 elsewhere"""
    shard_split: str = ""
    """the share of this process, such as 0/4 for the first of four. Not set: RANK and WORLD_SIZE of the environment"""
    revision: str = ""
    """branch, tag or commit of a hub model. Not set: its main branch"""
    download: bool = False
    """download the hub model if it is not in the local cache"""
    replace: bool = False
    """overwrite a field of this name if there is one"""
    sheet: PathName = ""
    """a PNG file for a sample of the images with their old and new captions"""

    def __post_init__(self):
        check_numbers(self, 1, "batch")
        if self.max_words < 0:
            raise ValueError(f"max_words {self.max_words} must not be negative")
        if self.field in (ORIGINAL, self.caption_key, "caption", "") or self.field.endswith("_by"):
            raise ValueError(f"field {self.field!r} would overwrite the old caption; choose another name, such as re_caption")
        if self.sheet and not self.sheet.lower().endswith(".png"):
            raise ValueError(f"sheet {self.sheet}: the name must end in .png")
        _ = self.wording, self.split

    @property
    def wording(self) -> Wording:
        """How the model is prompted. Raises ValueError."""
        from openvision3.recaption.image_text import Wording

        return Wording(self.prompt, self.max_new_tokens, self.top_p, self.temperature, self.seed)

    @property
    def split(self) -> tuple[int, int]:
        """(rank, world): this process captions every world-th shard from number `rank` on. Raises ValueError."""
        return shard_split(self.shard_split)


def shard_split(text: str, environment: dict[str, str] | None = None) -> tuple[int, int]:
    """`2/8` -> (2, 8); empty: RANK and WORLD_SIZE of the environment, else (0, 1). Raises ValueError."""
    environment = dict(os.environ) if environment is None else environment
    if not text and "RANK" in environment and "WORLD_SIZE" in environment:
        text = f"{environment['RANK']}/{environment['WORLD_SIZE']}"
    match = re.fullmatch(r"(\d+)/(\d+)", text or "0/1")
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f"shard split {text!r} must be RANK/WORLD with RANK from 0 to WORLD - 1, such as 0/4")
    return int(match[1]), int(match[2])
