"""The settings that every training has, and which of them must stay the same when a run is resumed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from openvision3.settings import PathName, check_choices, check_numbers, flat, to_dict
from openvision3.train.optimizer import OptimizerConfig


@dataclass
class LoopConfig:
    """The settings that every training has. The same config and seed give the same losses.

    Each kind of training derives its config from this one and may extend FREE, PLACES and SETTLED: the one list of what may differ between a run and
    the command that resumes it.
    """

    FREE: ClassVar[tuple[str, ...]] = (
        *("workers", "log_every", "eval_every", "save_every", "keep", "keep_best", "track", "out", "resume"),
        *("micro_batch", "parallel", "checkpointing", "compile"),
    )
    """fields that change no number: they may be set anew when a run is resumed"""
    PLACES: ClassVar[tuple[str, ...]] = ()
    """fields that name an input: another path may be given when a run is resumed, if it holds the same"""
    SETTLED: ClassVar[tuple[tuple[str, Any], ...]] = (("precision", "auto"),)
    """(field, value) that a run replaces by its own choice"""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """the optimiser"""
    steps: int = 1000
    """optimiser steps of the whole run"""
    minutes: float = 0.0
    """train for about this long: `steps` is computed from the measured rate; 0: train for `steps` steps"""
    batch: int = 64
    """images per step over all devices; each is contrasted with all others"""
    micro_batch: int = 0
    """images that a device computes at once, with the results of the whole batch, for one more forward pass of both encoders; 0: its whole share"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: whichever of the two is measured to be faster"""
    device: str = "auto"
    """where to compute: auto, cpu, cuda or cuda:N (cuda:1 is the second GPU)"""
    parallel: Literal["auto", "replicate", "fsdp", "hsdp"] = "auto"
    """what each process holds: the whole model (replicate), a piece of it (fsdp), or a piece of its machine's copy (hsdp); auto: by the model's size"""
    checkpointing: bool = False
    """recompute the activations of blocks in the backward pass, which takes less memory and a third more work"""
    compile: Literal["auto", "on", "off"] = "auto"
    """apply torch.compile to each block; auto: on a GPU only"""
    ema: float = 0.0
    """decay of a running mean of the weights, such as 0.999, which is evaluated, exported and read by --init instead of the last weights; 0: none"""
    seed: int = 0
    """seed of the weights, the order of samples and every random draw"""
    workers: int = 0
    """processes that prepare images; 0: one thread"""
    log_every: int = 10
    """steps between log lines"""
    eval_every: int = 250
    """steps between evaluations; 0: only at the end"""
    save_every: int = 250
    """steps between checkpoints; 0: only at the end"""
    keep: int = 2
    """newest checkpoints to keep"""
    keep_best: int = 1
    """checkpoints with the lowest val/loss to keep in addition; only steps that are both evaluated and saved count"""
    track: tuple[str, ...] = ()
    """wandb, trackio or both, in addition to metrics.jsonl and tensorboard"""
    out: PathName = ""
    """the run folder. Not set: runs/RECIPE"""
    init: PathName = ""
    """start from the weights of a shipped model, a model folder or a run, with a new optimiser. Not set: random weights"""
    resume: bool = False
    """continue from the last checkpoint in the run folder"""

    def __post_init__(self):
        check_choices(self)
        check_numbers(self, 1, "steps", "batch", "log_every", "keep")
        check_numbers(self, 0, "eval_every", "save_every", "workers", "minutes", "micro_batch", "keep_best")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema {self.ema} must be at least 0 and below 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} must be a whole number from 0 to 2^63 - 1")
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} does not divide the batch of {self.batch}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device, re.ASCII):
            raise ValueError(f"device {self.device!r} is not supported; choose one of auto, cpu, cuda and cuda:N, such as cuda:1")


def changed_settings(before: LoopConfig, now: LoopConfig, besides: Iterable[str] = ()) -> dict[str, tuple[Any, Any]]:
    """{field: (before, now)} of the settings that differ. FREE and SETTLED of the config, and the fields `besides`, do not count."""
    old, new = flat(to_dict(before)), flat(to_dict(now))
    ignored = {*now.FREE, *besides}
    return {name: (old[name], value) for name, value in new.items() if value != old[name] and name not in ignored and (name, value) not in now.SETTLED}
