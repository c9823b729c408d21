"""Flow matching between tokens and noise: path, target, times, grids, samplers and guidance, as functions of tensors.

t = 0 is data and t = 1 is noise: x_t = (1 - t) tokens + t noise, and the velocity is noise - tokens. As in RAE (arXiv 2510.11690), times of training are
logit-normal and then shifted towards noise, because more values an image hide it longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from openvision3.draws import normal
from openvision3.settings import check_choices, check_numbers

REFERENCE_VALUES = 4096
"""values of an image for which times are not shifted"""
LAST = 0.999
"""the noisiest time of training, before the shift"""
RAE_END = 0.001
"""where RAE's sampler stops, before the shift"""
_TIME_STREAM = 0x2545F4914F6CDD1D
"""Keeps the random stream of times apart from other draws of a row."""

Velocity = Callable[[Tensor, float], Tensor]
"""(x_t (B, N, C), t of all rows) -> velocity (B, N, C); t is a number of the host, which then decides by it without waiting for a device"""


@dataclass
class FlowConfig:
    """How noisy tokens are made in training, and what the network predicts."""

    predict: Literal["velocity", "tokens"] = "velocity"
    """velocity, as in the paper; or tokens: the clean ones, with the loss in velocity space (arXiv 2605.27102)"""
    shift: float = 0.0
    """shift of times: t -> shift t / (1 + (shift - 1) t); 1: none; 0: by the number of values, sqrt(values / 4096), and at least 1"""
    time_mean: float = 0.0
    """mean of the normal whose sigmoid is t"""
    time_deviation: float = 1.0
    """its standard deviation"""
    least_time: float = 0.05
    """predict tokens: the loss divides by t, or by this where t is smaller"""

    def __post_init__(self):
        check_choices(self)
        check_numbers(self, 0, "shift")
        if not (math.isfinite(self.time_mean) and 0 < self.time_deviation < math.inf):
            raise ValueError(f"time_mean {self.time_mean} must be a number, and time_deviation {self.time_deviation} a positive one")
        if not 0 < self.least_time < 1:
            raise ValueError(f"least_time {self.least_time} must lie between 0 and 1")


@dataclass(frozen=True)
class Sampling:
    """How images are drawn."""

    steps: int = 50
    """steps of the sampler from noise to tokens; heun computes the velocity twice in each"""
    method: Literal["euler", "heun"] = "euler"
    """euler, as in the paper; heun is more exact for the same number of steps"""
    grid: Literal["full", "rae49"] = "full"
    """full: the steps end at t = 0; rae49: RAE's 50 times, which take 49 steps and end before 0"""
    guidance: float = 1.0
    """how far to go from the prediction without the condition towards the one with it, and beyond; 1: no guidance"""
    interval: tuple[float, float] = (0.0, 1.0)
    """the times, from and to, at which guidance applies; 0 is data, 1 is noise"""
    seed: int = 0
    """seed of the noise; sample number i of a seed is the same in any batch"""

    def __post_init__(self):
        check_choices(self)
        check_numbers(self, 1, "steps")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} must be a whole number from 0 to 2^63 - 1")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance {self.guidance} must be a number that is not negative; 1 is none")
        if not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"interval {self.interval} must be two times with 0 <= first <= second <= 1")
        if self.grid == "rae49" and self.steps not in (49, 50):
            raise ValueError(f"grid rae49 has 49 steps, not {self.steps}; leave out --steps")


# -- training ------------------------------------------------------------------------------------------------------


def dimension_shift(values: int) -> float:
    """The shift for images of so many values (tokens x channels): 1 up to REFERENCE_VALUES, then the square root of the ratio."""
    return max(1.0, math.sqrt(values / REFERENCE_VALUES))


def shift_time(t: Tensor, shift: float) -> Tensor:
    return shift * t / (1 + (shift - 1) * t)


def draw_times(draw_key: Tensor, config: FlowConfig, shift: float) -> Tensor:
    """(B,) times, functions of the keys: sigmoid of a normal, at most LAST, then shifted."""
    t = torch.sigmoid(config.time_mean + config.time_deviation * normal(draw_key ^ _TIME_STREAM, 1)[:, 0])
    return shift_time(t.clamp_max(LAST), shift)


def interpolate(tokens: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of tokens and noise (B, N, C) at t (B,)."""
    t = t[:, None, None]
    return (1 - t) * tokens + t * noise


def velocity_of(prediction: Tensor, noisy: Tensor, t: Tensor, config: FlowConfig) -> Tensor:
    """What the network predicts -> velocity (B, N, C) at t (B,) above 0."""
    return prediction if config.predict == "velocity" else (noisy - prediction) / t[:, None, None]


def squared_errors(prediction: Tensor, tokens: Tensor, noise: Tensor, t: Tensor, config: FlowConfig) -> Tensor:
    """(B,) mean squared errors of the velocity, from a prediction at `interpolate(tokens, noise, t)`.

    Clean tokens are compared over the same denominator on both sides, so that an exact prediction has error 0 at any t.
    """
    if config.predict == "velocity":
        return (prediction - (noise - tokens)).square().mean((1, 2))
    return (prediction - tokens).square().mean((1, 2)) / t.clamp_min(config.least_time).square()


# -- drawing -------------------------------------------------------------------------------------------------------


def time_grid(sampling: Sampling, shift: float) -> list[float]:
    """The times of the sampler, from 1 downwards: steps + 1 of them."""
    end, steps = (RAE_END, 49) if sampling.grid == "rae49" else (0.0, sampling.steps)
    return shift_time(torch.linspace(1, end, steps + 1, dtype=torch.float64), shift).tolist()


def guided(conditional: Tensor, other: Tensor, guidance: float) -> Tensor:
    """From the velocity of no condition (Ho and Salimans, arXiv 2207.12598), or of a weaker model (AutoGuidance, arXiv 2406.02507), through the
    conditional one, and beyond it for a guidance above 1."""
    return other + guidance * (conditional - other)


@torch.no_grad()
def integrate(velocity: Velocity, x: Tensor, times: Sequence[float], method: str = "euler", each: Callable[[int, Tensor], object] | None = None) -> Tensor:
    """Follow the velocity from noise x (B, N, C) at times[0] to times[-1].

    `each` is called after every step with its number from 1 and the clean tokens that the velocity promises from there. Heun ends with a step of Euler
    where the last time is 0, as the velocity is not learnt there.
    """
    for number, (now, then) in enumerate(pairwise(times), 1):
        slope = velocity(x, now)
        promised = x - now * slope
        if method == "heun" and then > 0:
            end = velocity(x + (then - now) * slope, then)
            slope = (slope + end) / 2
        x = x + (then - now) * slope
        if each is not None:
            each(number, promised if then > 0 else x)
    return x
