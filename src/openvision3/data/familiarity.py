"""What a model knows of itself: whether an image resembles its training images, and how often answers like this one are right.

Familiarity is the mean cosine with the nearest training images, in features that the caller computes (Sun et al. 2022, arXiv 2204.06507, detect unknown
images by their neighbours). Confidence is calibrated as by Platt (1999) for captions, and by a temperature (Guo et al. 2017, arXiv 1706.04599) for labels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openvision3.files import write_whole

FORMAT = "openvision3 familiarity 2"
FILE = "familiarity.safetensors"
NEIGHBOURS = 3


@dataclass
class Calibration:
    """What was fitted on held-out data. A few numbers, saved with the model."""

    threshold: float
    """familiarity below which an image resembles nothing of the training"""
    kinds: tuple[str, ...]
    """what the model was trained on, in words"""
    caption: tuple[float, float, float, float]
    """bias and weights of (mean and sum of the log-probabilities of word pieces, familiarity) in the log-odds that a caption is right"""
    sharpness: float
    """the power by which probabilities of labels are raised: 1 / temperature"""
    measured: dict[str, Any]
    """shares of images called unsure, errors of calibration, numbers of images"""


@dataclass
class Familiarity:
    """The features of training images, as directions, and the calibration."""

    known: Tensor
    """(M, D) of unit length"""
    calibration: Calibration | None = None

    @classmethod
    def fit(cls, features: Tensor, keep: int = 2048) -> Familiarity:
        """From features (n, D) of training images. Of more than `keep`, evenly spaced ones are kept. Raises ValueError for fewer than 32 images."""
        if len(features) < 32:
            raise ValueError(f"{len(features)} training images are too few to know others by; name data with 32 or more")
        rows = torch.linspace(0, len(features) - 1, min(keep, len(features))).round().long()
        return cls(F.normalize(features[rows].float(), dim=-1))

    def score(self, features: Tensor) -> Tensor:
        """features (B, D) -> familiarity (B,): more is more familiar."""
        likeness = F.normalize(features.float(), dim=-1) @ self.known.to(features.device).T
        return likeness.topk(min(NEIGHBOURS, len(self.known)), 1).values.mean(1)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, completely or not at all: each row in whole numbers up to 127 times its own scale. Raises OSError."""
        from safetensors.torch import save

        notes = {"format": FORMAT, "calibration": json.dumps(asdict(self.calibration) if self.calibration else None)}
        scale = self.known.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        write_whole(path, save({"known": (self.known / scale).round().to(torch.int8).contiguous()}, notes))

    @classmethod
    def load(cls, path: str | Path) -> Familiarity:
        """Raises OSError; ValueError for a file that is none of ours."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                notes = file.metadata() or {}
                if notes.get("format") != FORMAT:
                    raise ValueError(f"it is of format {notes.get('format')!r}, this version reads {FORMAT!r}")
                known = file.get_tensor("known")
            if known.ndim != 2 or known.dtype != torch.int8 or not known.numel():
                raise ValueError(f"its tensor is of shape {tuple(known.shape)} and {known.dtype}")
            values = json.loads(notes["calibration"])
            calibration = None
            if values:
                calibration = Calibration(**{field.name: values[field.name] for field in fields(Calibration)})
                calibration.kinds, calibration.caption = tuple(calibration.kinds), (*calibration.caption,)
            return cls(F.normalize(known.float(), dim=-1), calibration)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read: {error}; remove it, and write it again with openvision3 calibrate") from error


def caption_confidence(calibration: Calibration, mean: float, total: float, familiarity: float) -> float:
    """The estimated probability that a caption of these log-probabilities is right."""
    bias, by_mean, by_total, by_image = calibration.caption
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, bias + by_mean * mean + by_total * total + by_image * familiarity))))


def label_confidence(calibration: Calibration, probabilities: Sequence[float]) -> float:
    """The calibrated probability of the most likely label; probabilities of all labels that were to choose from."""
    powers = [probability**calibration.sharpness for probability in probabilities]
    return max(powers) / sum(powers)


def fit_logistic(inputs: Tensor, is_right: Tensor) -> tuple[float, ...]:
    """inputs (n, k), is_right (n,) -> bias and k weights of the likeliest log-odds, with a slight pull to zero (on inputs of unit variance)."""
    mean, scale = inputs.double().mean(0), inputs.double().std(0).clamp_min(1e-9)
    x = torch.cat([torch.ones(len(inputs), 1, dtype=torch.double), (inputs.double() - mean) / scale], 1)
    weights = torch.zeros(x.shape[1], dtype=torch.double)
    pull = torch.eye(len(weights), dtype=torch.double)
    for _ in range(50):  # Newton's method; the pull keeps it finite where all are right or all wrong
        p = torch.sigmoid(x @ weights)
        gradient = x.T @ (p - is_right.double()) + pull @ weights
        step = torch.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + pull, gradient)
        weights = weights - step
        if step.abs().max() < 1e-9:
            break
    slopes = weights[1:] / scale
    return (float(weights[0] - slopes @ mean), *slopes.tolist())


def fit_sharpness(probabilities: Tensor, right: Tensor) -> float:
    """probabilities (n, classes), right (n,) -> the power that gives the right labels the highest likelihood."""
    powers = torch.logspace(-1.5, 0.5, 81, dtype=torch.double)
    logs = probabilities.double().clamp_min(1e-300).log()
    losses = torch.stack([F.cross_entropy(logs * power, right) for power in powers])
    return float(powers[losses.argmin()])


def calibration_error(confidence: Tensor, is_right: Tensor, bins: int = 10) -> tuple[float, list[tuple[float, float, int]]]:
    """Expected calibration error, and for each bin of equally many answers (mean confidence, share right, count), from low to high."""
    order = confidence.argsort()
    parts = [rows for rows in order.tensor_split(min(bins, len(order))) if len(rows)]
    table = [(confidence[rows].double().mean().item(), is_right[rows].double().mean().item(), len(rows)) for rows in parts]
    return sum(abs(said - seen) * count for said, seen, count in table) / max(1, len(confidence)), table
