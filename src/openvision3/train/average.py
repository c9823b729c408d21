"""The running mean of the weights, which is evaluated and exported in place of the weights of the last step (`LoopConfig.ema`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from openvision3.distributed import local


class WeightAverage:
    """Exponential moving average of the trained parameters (arXiv 2411.18704): in fp32 and sharded, as they are.

    After n updates the decay is the smaller of `decay` and (1 + n) / (10 + n), so that the first weights, which are random, are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        named = {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        self.state: dict[str, Tensor] = {name: p.detach().clone() for name, p in named.items()} | {UPDATES: torch.zeros((), dtype=torch.int64)}
        """the means by the names of their parameters, and the number of updates: what a checkpoint holds"""

    @property
    def means(self) -> list[Tensor]:
        """In the order of `parameters`."""
        return [value for name, value in self.state.items() if name != UPDATES]

    @torch.no_grad()
    def update(self) -> None:
        """Move the means towards the parameters: after each step of the optimiser."""
        count = int(self.state[UPDATES].add_(1))
        torch._foreach_lerp_([local(mean) for mean in self.means], [local(p) for p in self.parameters], 1 - min(self.decay, (1 + count) / (10 + count)))

    @torch.no_grad()
    def adopt(self) -> None:
        """Set the parameters to their means."""
        for parameter, mean in zip(self.parameters, self.means, strict=True):
            local(parameter).copy_(local(mean))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model computes with the means."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, mean in zip(self.parameters, self.means, strict=True):
            own, other = local(parameter), local(mean)
            before = own.clone()
            own.copy_(other)
            other.copy_(before)


UPDATES = "updates"
"""the name of the number of updates among the means; no parameter has it"""
