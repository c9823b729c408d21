"""AdamW groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass
class OptimizerConfig:
    """How the weights are changed (paper, table 1 and appendix; what is silent there: see docs/paper.md)."""

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw, as the paper; or Muon on the matrices of the blocks (Jordan et al. 2024) with AdamW on the rest"""
    learning_rate: float = 2.56e-4
    """peak rate, reached after the warm-up"""
    warmup_steps: int = 100
    """steps of linear rise from zero"""
    beta1: float = 0.9
    """AdamW's first decay"""
    beta2: float = 0.95
    """AdamW's second decay"""
    eps: float = 1e-8
    """AdamW's epsilon"""
    weight_decay: float = 0.2
    """on matrices only: not on biases, norms, embeddings, positions, temperature"""
    clip: float = 1.0
    """largest norm of the whole gradient"""

    def __post_init__(self):
        if self.kind not in ("adamw", "muon"):
            raise ValueError(f"optimizer kind {self.kind!r} is unknown; legal are adamw and muon")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate {self.learning_rate} must be a positive number")
        for name in ("warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must be a number that is not negative")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 0 and below 1")
        for name in ("eps", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters -> `decayed` (weights of linear layers and convolutions), `plain` (all others).

    Frozen parameters (`requires_grad=False`) are in neither.
    """
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    groups: dict[str, list[nn.Parameter]] = {"decayed": [], "plain": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups["decayed" if id(parameter) in matrices else "plain"].append(parameter)
    return groups


class Optimizers:
    """One or two torch optimizers behind one face: step, zero_grad, rate, state."""

    def __init__(self, model: nn.Module, config: OptimizerConfig):
        groups = parameter_groups(model)
        adam = [{"params": groups["decayed"], "weight_decay": config.weight_decay}, {"params": groups["plain"], "weight_decay": 0.0}]
        self.all: list[torch.optim.Optimizer] = []
        if config.kind == "muon":
            hidden = {id(m.weight) for blocks in _block_lists(model) for m in blocks.modules() if isinstance(m, nn.Linear)}
            matrices = [p for p in groups["decayed"] if id(p) in hidden]
            adam[0]["params"] = [p for p in groups["decayed"] if id(p) not in hidden]
            muon = torch.optim.Muon(matrices, lr=config.learning_rate, weight_decay=config.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
            self.all.append(muon)
        groups_used = [g for g in adam if g["params"]]
        self.all.append(torch.optim.AdamW(groups_used, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps))

    def set_rate(self, rate: float) -> None:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def step(self) -> None:
        for optimizer in self.all:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)


def _block_lists(model: nn.Module) -> Iterable[nn.ModuleList]:
    return (m for m in model.modules() if isinstance(m, nn.ModuleList))


def rate_at(step: int, config: OptimizerConfig, steps: int) -> float:
    """The rate of step 0, 1, ... : linear warm-up, then half a cosine that reaches zero after the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
