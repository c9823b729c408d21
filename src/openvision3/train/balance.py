"""The weight of reconstruction from the gradients that both branches send into the tokens (`LossConfig.gradient_ratio`).

QLIP (arXiv 2502.05178) sets the weights of its two losses by their gradients before training; here running means of the norms set one of them all along.
"""

from __future__ import annotations

import math

WINDOW = 50
"""steps that a running mean spans; as long as there were fewer, it is the plain mean"""
STEPS, RECONSTRUCTION, UNDERSTANDING = "balanced_steps", "reconstruction_gradient", "understanding_gradient"
"""what a run remembers: how many steps were measured, and the mean norms"""


def measure(memory: dict[str, float], values: dict[str, float], omega_rec: float, ranks: int) -> None:
    """Take the squares that a step with `omega_rec` has measured out of `values`, put the norms there, and move their running means in `memory`.

    The squares are means over ranks, and each rank's loss is `ranks` times its part of the global one: so the global square is the mean over `ranks`.
    """
    squares = values.pop("reconstruction_squares"), values.pop("understanding_squares")
    norms = {RECONSTRUCTION: math.sqrt(squares[0] / ranks) / omega_rec, UNDERSTANDING: math.sqrt(squares[1] / ranks)}
    running_mean(memory, STEPS, norms)
    values |= norms | {"omega_rec": omega_rec}


def running_mean(memory: dict[str, float], count: str, numbers: dict[str, float]) -> None:
    """Move the means that `memory` has of these numbers; `count` names the number of times that they were moved."""
    memory[count] = memory.get(count, 0.0) + 1
    share = max(1 / WINDOW, 1 / memory[count])
    for name, number in numbers.items():
        before = memory.get(name, number)
        memory[name] = before + share * (number - before)


def omega_rec(memory: dict[str, float], ratio: float, default: float) -> float:
    """The weight at which reconstruction's gradient is `ratio` times understanding's in the mean; `default` before anything was measured, or without it."""
    if not ratio or not memory.get(RECONSTRUCTION) or not memory.get(UNDERSTANDING):
        return default
    return ratio * memory[UNDERSTANDING] / memory[RECONSTRUCTION]
