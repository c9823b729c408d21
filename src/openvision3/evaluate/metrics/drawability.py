"""Drawability: how well a small flow model of fixed size learns the distribution of a model's tokens in a fixed number of steps.

A cheap proxy of generation, for comparing runs of one recipe. It is no judge alone: tokens that say less of the image are easier to draw (constant
ones best of all), so that it means something only beside reconstruction, and it cannot see how decoded samples look.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openvision3.draws import draw_seed
from openvision3.evaluate.protocol import Number, number

GAUSSIAN = math.pi / 2
"""The loss of knowing each channel's mean and variance alone: the integral of 1 / ((1 - t)^2 + t^2) over t from 0 to 1."""
LEVELS = 8
"""times at which the loss of each held-out image is taken, the middles of equal parts of [0, 1]"""


@dataclass(frozen=True)
class FlowTraining:
    """Size and training of the flow model, the same for all tokens that are compared."""

    width: int = 128
    depth: int = 2
    heads: int = 4
    steps: int = 300
    batch: int = 64
    learning_rate: float = 2e-3


class Flow(nn.Module):
    """(x_t (B, N, C), t (B,)) -> velocity (B, N, C), for x_t = (1 - t) tokens + t noise and velocity = noise - tokens.

    A transformer corrects the best guess for independent Gaussian channels, in units of that guess's error (the preconditioning of Karras et al.,
    arXiv 2206.00364). Its last layer begins at zero, so that the loss begins at GAUSSIAN whatever the tokens are.
    """

    def __init__(self, tokens: int, channels: int, training: FlowTraining):
        super().__init__()
        width = training.width
        self.enter = nn.Linear(channels, width)
        self.positions = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width))
        layer = nn.TransformerEncoderLayer(width, training.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, training.depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.leave = nn.Linear(width, channels)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, noisy: Tensor, t: Tensor) -> Tensor:
        t = t[:, None, None]
        variance = (1 - t) ** 2 + t**2
        time = self.time(torch.cat([t, t.mul(math.pi).sin(), t.mul(math.pi).cos()], -1))
        correction = self.leave(self.blocks(self.enter(noisy * variance.rsqrt()) + self.positions + time))
        return (2 * t - 1) / variance * noisy + variance.rsqrt() * correction


def evaluate_drawability(train: Tensor, held_out: Tensor, seed: int = 0, training: FlowTraining | None = None) -> Number:
    """Tokens of training images and of held-out ones, both (images, N, C) -> the flow model's held-out loss; lower is better.

    Tokens are normalised by each channel's mean and deviation over `train`. The loss is the mean squared error of the velocity, over LEVELS times of
    each held-out image. The same seed draws the same noise for any tokens of one shape.

    Raises:
        ValueError: fewer than two training images, no held-out image, or tokens of different shapes or not finite.
    """
    training = training or FlowTraining()
    if len(train) < 2 or not len(held_out) or train.shape[1:] != held_out.shape[1:]:
        raise ValueError(f"drawability of tokens {tuple(train.shape)} and held out {tuple(held_out.shape)}; give two or more training images and equal shapes")
    if not (train.isfinite().all() and held_out.isfinite().all()):
        raise ValueError("drawability cannot be measured: some tokens are not finite")
    mean, scale = train.mean((0, 1)), train.std((0, 1)).clamp_min(1e-6)
    train, held_out = (train - mean) / scale, (held_out - mean) / scale
    draws = torch.Generator().manual_seed(draw_seed("drawability", seed))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(draw_seed("flow", seed))
        flow = Flow(train.shape[1], train.shape[2], training)
        optimizer = torch.optim.AdamW(flow.parameters(), lr=training.learning_rate, weight_decay=0.0)
        for step in range(training.steps):
            optimizer.param_groups[0]["lr"] = training.learning_rate * min(1.0, (step + 1) / 20) * (1 - step / training.steps)
            rows = torch.randint(len(train), (training.batch,), generator=draws)
            loss = flow_loss(flow, train[rows], torch.rand(training.batch, generator=draws), draws).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
            optimizer.step()
    draws = torch.Generator().manual_seed(draw_seed("drawability held out", seed))
    with torch.no_grad():
        parts = held_out.split(256)
        sums = [flow_loss(flow, part, torch.full((len(part),), (level + 0.5) / LEVELS), draws).sum() for level in range(LEVELS) for part in parts]
    how = (
        f"velocity loss of a transformer of width {training.width} and depth {training.depth} after {training.steps} steps of {training.batch} on the "
        f"tokens of {len(train)} training images, normalised per channel; {LEVELS} times an image; mean and variance alone give {GAUSSIAN:.3f}"
    )
    return number("flow_loss", torch.stack(sums).sum().item() / (LEVELS * len(held_out)), len(held_out), how)


def flow_loss(flow: nn.Module, tokens: Tensor, t: Tensor, draws: torch.Generator) -> Tensor:
    """(B,) mean squared error of the velocity of each image, against noise from `draws`."""
    noise = torch.randn(tokens.shape, generator=draws)
    noisy = (1 - t[:, None, None]) * tokens + t[:, None, None] * noise
    return (flow(noisy, t) - (noise - tokens)).square().mean((1, 2))
