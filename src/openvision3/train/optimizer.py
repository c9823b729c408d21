"""AdamW groups, Muon for the matrices of blocks, and the learning rate as a function of the step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from openvision3.distributed import block_lists, full, like
from openvision3.settings import check_choices, check_numbers
from openvision3.train.average import WeightAverage


@dataclass
class OptimizerConfig:
    """How the weights are updated (paper, table 1 and appendix; docs/paper.md says where the paper is silent)."""

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw, as in the paper; or muon (Jordan et al. 2024) for the matrices of the blocks, with AdamW for the rest"""
    learning_rate: float = 2.56e-4
    """peak learning rate, reached after the warm-up"""
    warmup_steps: int = 100
    """steps over which the learning rate rises linearly from zero"""
    schedule: Literal["cosine", "flat"] = "cosine"
    """after the warm-up, the learning rate falls to zero as half a cosine; or stays, for runs whose weights are averaged"""
    beta1: float = 0.9
    """decay of AdamW's first moment"""
    beta2: float = 0.95
    """decay of AdamW's second moment"""
    eps: float = 1e-8
    """AdamW's epsilon"""
    weight_decay: float = 0.2
    """weight decay of matrices; biases, norms, embeddings, positions and the temperature have none"""
    clip: float = 1.0
    """largest norm of the whole gradient; a larger gradient is scaled down to it"""

    def __post_init__(self):
        check_choices(self)
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate {self.learning_rate} must be a positive number")
        check_numbers(self, 0, "warmup_steps", "weight_decay")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 0 and below 1")
        for name in ("eps", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters -> `decayed` (weights of linear layers and convolutions) and `plain` (all others); frozen ones are in neither."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    groups: dict[str, list[nn.Parameter]] = {"decayed": [], "plain": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups["decayed" if id(parameter) in matrices else "plain"].append(parameter)
    return groups


class Muon(torch.optim.Optimizer):
    """Momentum that is made nearly orthogonal before it is applied (Jordan et al. 2024), for 2-D parameters.

    Updates are scaled by 0.2 sqrt(longer side), so that learning rates mean the same as for AdamW (Liu et al. 2025). `torch.optim.Muon` always computes
    in bf16, which processors without bf16 instructions emulate thirty times slower than fp32; here `dtype` decides. Matrices of one shape form a batch.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float, momentum: float = 0.95, dtype: torch.dtype = torch.float32
    ):
        super().__init__(parameters, {"lr": learning_rate, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                # A piece of a matrix is not enough: all ranks put it together, and each updates its own piece.
                updates = orthogonal(torch.stack([full(self._momentum(p, group["momentum"])) for p in parameters]), self.dtype)
                scale = 0.2 * math.sqrt(max(shape))
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(like(update, parameter), alpha=-group["lr"] * scale)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov momentum: the gradient, moved towards its running mean."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean = state["momentum_buffer"]
        assert parameter.grad is not None
        mean.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(mean, momentum)


def orthogonal(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(count, rows, columns) -> the same with singular values near 1, by five Newton-Schulz steps in `dtype`.

    The quintic's coefficients are those of Jordan et al. (2024): steepest at zero rather than exact at one.
    """
    x = matrices.to(dtype)
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.transpose(1, 2)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x if wide else x.transpose(1, 2)).to(matrices.dtype)


class Optimizers:
    """AdamW, or Muon and AdamW, used as one optimizer. `dtype` is what Muon computes in; `ema` is the decay of `average`, 0 for none."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, dtype: torch.dtype = torch.float32, ema: float = 0.0):
        self.average = WeightAverage(model, ema) if ema else None
        groups = parameter_groups(model)
        adam = [{"params": groups["decayed"], "weight_decay": config.weight_decay}, {"params": groups["plain"], "weight_decay": 0.0}]
        self.all: list[torch.optim.Optimizer] = []
        if config.kind == "muon":
            hidden = {id(m.weight) for blocks in block_lists(model) for m in blocks.modules() if isinstance(m, nn.Linear)}
            matrices = [p for p in groups["decayed"] if id(p) in hidden]
            adam[0]["params"] = [p for p in groups["decayed"] if id(p) not in hidden]
            self.all.append(Muon(matrices, learning_rate=config.learning_rate, weight_decay=config.weight_decay, dtype=dtype))
        groups_used = [g for g in adam if g["params"]]
        fused = True if any(p.is_cuda for p in groups["decayed"]) else None
        self.all.append(torch.optim.AdamW(groups_used, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused))

    def set_rate(self, rate: float) -> None:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def step(self) -> None:
        for optimizer in self.all:
            optimizer.step()
        if self.average is not None:
            self.average.update()

    def averaged(self) -> contextlib.AbstractContextManager:
        """Within, the model computes with the averaged weights, if there are any."""
        return self.average.applied() if self.average is not None else contextlib.nullcontext()

    def adopt_average(self) -> None:
        """Set the weights to their average, if there is one."""
        if self.average is not None:
            self.average.adopt()

    def zero_grad(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)


def rate_at(step: int, config: OptimizerConfig, steps: int) -> float:
    """The learning rate of step 0, 1, ...: linear warm-up, then half a cosine that reaches zero after the last step, or no change."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "flat":
        return config.learning_rate
    share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
