"""The adversarial stage of a training of the latent decoder: how strong the adversarial loss is in each step, and when the stage is given up.

All of it is a function of the step and of what the run remembers (`RunState.memory`), so that a resumed run takes the same steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from openvision3.settings import check_numbers
from openvision3.train.balance import running_mean

EVERY = 4
"""steps between two measurements of the gradients, which take two more passes back through the VAE"""
LEAST = 10
"""steps of the stage after which its reconstruction loss is compared"""
NOT_FINITE = 3
"""steps in a row without a finite loss or gradient that end the stage: fewer than those that end a run"""
REBUILDING, ADVERSARIAL = "reconstruction_gradient", "adversarial_gradient"
"""what a run remembers: mean norms of the gradients on the rebuilt latents"""
SQUARES = {REBUILDING: "reconstruction_squares", ADVERSARIAL: "adversarial_squares"}
"""{remembered norm: the part of a step that has its square}"""
_BEFORE, _WITH, _ENDED = "reconstruction_before", "reconstruction_with", "adversarial_ended"


@dataclass
class AdversarialConfig:
    """A discriminator on frozen features that the latent decoder learns to deceive (hinge loss)."""

    weight: float = 0.0
    """norm of the adversarial gradient on the rebuilt latents, as a multiple of reconstruction's, such as 0.5; 0: no discriminator"""
    largest: float = 100.0
    """largest factor of the adversarial loss that may be needed for that"""
    warmup: float = 0.3
    """first share of the steps, in which the discriminator learns without the latent decoder learning from it"""
    ramp: float = 0.1
    """share of the steps over which the adversarial loss then gets its full weight"""
    limit: float = 1.5
    """if the mean reconstruction loss rises above this multiple of what it was before the adversarial loss began, training continues without it"""

    def __post_init__(self):
        check_numbers(self, 0, "weight", "largest", "ramp")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"adversarial.warmup {self.warmup:g} must be at least 0 and below 1")
        if not 1 < self.limit < math.inf:
            raise ValueError(f"adversarial.limit {self.limit:g} must be above 1")


class Stage:
    """The stage in a run of `steps` steps; `memory` is what the run remembers, and is changed."""

    def __init__(self, config: AdversarialConfig, steps: int, memory: dict[str, float]):
        self.config, self.memory = config, memory
        self.join = max(1, round(config.warmup * steps))  # one step at least, that later ones are compared with
        """the first step in which the latent decoder learns from the discriminator"""
        self.ramp = max(1, round(config.ramp * steps))

    @property
    def runs(self) -> bool:
        """Whether the discriminator learns."""
        return self.config.weight > 0 and _ENDED not in self.memory

    def measures(self, step: int) -> bool:
        """Whether this step measures the gradients."""
        return self.runs and (step % EVERY == 0 or ADVERSARIAL not in self.memory)

    def factor(self, step: int) -> float:
        """The factor of the adversarial loss in this step."""
        if not self.runs or step < self.join or not self.memory.get(ADVERSARIAL):
            return 0.0
        wanted = self.config.weight * self.memory[REBUILDING] / self.memory[ADVERSARIAL]
        return min(1.0, (step - self.join + 1) / self.ramp) * min(self.config.largest, wanted)

    def remember(self, step: int, values: dict[str, float], reconstruction: float, ranks: int) -> None:
        """Note the reconstruction loss of a step in which the discriminator learnt, and the gradients that it has measured, taken out of `values`.

        Their squares are means over ranks, and each rank's loss is `ranks` times its part of the global one: so the global square is the mean over `ranks`.
        """
        norms = {norm: math.sqrt(values.pop(part) / ranks) for norm, part in SQUARES.items() if part in values}
        if norms:
            running_mean(self.memory, "adversarial_measured", norms)
        name = _BEFORE if step < self.join else _WITH
        running_mean(self.memory, f"{name}_steps", {name: reconstruction})

    def diverged(self, skipped_in_a_row: int) -> str:
        """Why the stage must end; "" as long as it need not."""
        before, now = self.memory.get(_BEFORE, math.inf), self.memory.get(_WITH, 0.0)
        if skipped_in_a_row >= NOT_FINITE:
            return f"{skipped_in_a_row} steps in a row were not finite"
        if self.memory.get(f"{_WITH}_steps", 0) >= LEAST and now > self.config.limit * before:
            return f"the reconstruction loss rose from {before:.4g} to {now:.4g}"
        return ""

    def end(self, step: int) -> None:
        """Train without the stage from this step on."""
        self.memory[_ENDED] = step

    def record(self, step: int) -> dict[str, float | int]:
        """How a model of this step was trained; {} before the adversarial loss."""
        if not self.config.weight or step <= self.join:
            return {}
        return {"weight": self.config.weight, "from_step": self.join} | ({"ended_at_step": int(self.memory[_ENDED])} if _ENDED in self.memory else {})
