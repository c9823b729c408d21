"""What a model knows of itself: whether an image resembles its training images, and how often answers like this one are right.

Familiarity is the negative mean distance to the nearest training images in whitened mean tokens, or the mean cosine with them. Sun et al. 2022 (arXiv
2204.06507) detect unknown images by such neighbours; whitening is that of the Mahalanobis distance (Lee et al. 2018, arXiv 1807.03888). Confidence is
calibrated as by Platt (1999) for captions, and by a temperature (Guo et al. 2017, arXiv 1706.04599) for labels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from openvision3.files import write_whole

FORMAT = "openvision3 familiarity 1"
FILE = "familiarity.safetensors"
By = Literal["distance", "cosine"]
NEIGHBOURS = 3
RIDGE = 0.05
"""share of the mean variance that is mixed into the covariance, so that a few thousand images suffice for it"""


def describe_tokens(tokens: Tensor) -> Tensor:
    """tokens (B, N, D) -> (B, D): their mean."""
    return tokens.float().mean(1)


@dataclass
class Calibration:
    """What was fitted on held-out data. A few numbers, saved with the model."""

    threshold: float
    """familiarity below which an image resembles nothing of the training"""
    kinds: tuple[str, ...]
    """what the model was trained on, in words"""
    caption: tuple[float, float, float]
    """bias and weights of (mean log-probability of a word piece, familiarity) in the log-odds that a caption is right"""
    sharpness: float
    """the power by which probabilities of labels are raised: 1 / temperature"""
    measured: dict[str, Any]
    """shares of images called unsure, errors of calibration, numbers of images"""


@dataclass
class Familiarity:
    """Statistics of the training images' features (M of them kept), and the calibration."""

    mean: Tensor
    """(D,)"""
    whiten: Tensor
    """(D, D)"""
    known: Tensor
    """(M, D)"""
    by: By = "distance"
    calibration: Calibration | None = None

    @classmethod
    def fit(cls, features: Tensor, by: By = "distance", keep: int = 2048) -> Familiarity:
        """From features (n, D) of training images. Of more than `keep`, evenly spaced ones are kept. Raises ValueError for fewer than 32 images."""
        if len(features) < 32:
            raise ValueError(f"{len(features)} training images are too few to know others by; name data with 32 or more")
        mean = features.mean(0)
        covariance = torch.cov(features.T.double())
        covariance = (1 - RIDGE) * covariance + RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.double)
        variances, directions = torch.linalg.eigh(covariance)
        whiten = (directions / variances.sqrt()).float()
        rows = features[torch.linspace(0, len(features) - 1, min(keep, len(features))).round().long()]
        return cls(mean, whiten, (rows - mean) @ whiten, by=by)

    def score(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, D) -> familiarity (B,): more is more familiar."""
        return self.score_features(describe_tokens(tokens))

    def score_features(self, features: Tensor) -> Tensor:
        """features (B, D) -> familiarity (B,)."""
        mean, whiten, known = (part.to(features.device) for part in (self.mean, self.whiten, self.known))
        white = (features - mean) @ whiten
        likeness = -torch.cdist(white, known) if self.by == "distance" else F.normalize(white, dim=-1) @ F.normalize(known, dim=-1).T
        return likeness.topk(min(NEIGHBOURS, len(known)), 1).values.mean(1)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, completely or not at all; the rows of training images in half precision. Raises OSError."""
        from safetensors.torch import save

        notes = {"format": FORMAT, "by": self.by, "calibration": json.dumps(asdict(self.calibration) if self.calibration else None)}
        tensors = {"mean": self.mean, "whiten": self.whiten, "known": self.known.half()}
        write_whole(path, save({name: value.contiguous() for name, value in tensors.items()}, notes))

    @classmethod
    def load(cls, path: str | Path) -> Familiarity:
        """Raises OSError; ValueError for a file that is none of ours."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                notes = file.metadata() or {}
                if notes.get("format") != FORMAT:
                    raise ValueError(f"it is of format {notes.get('format')!r}, this version reads {FORMAT!r}")
                mean, whiten, known = (file.get_tensor(name).float() for name in ("mean", "whiten", "known"))
            if mean.ndim != 1 or whiten.ndim != 2 or len(mean) != len(whiten) or known.shape[1:] != whiten.shape[1:]:
                raise ValueError("its tensors have other shapes")
            values = json.loads(notes["calibration"])
            calibration = None
            if values:
                calibration = Calibration(**{field.name: values[field.name] for field in fields(Calibration)})
                calibration.kinds, calibration.caption = tuple(calibration.kinds), (*calibration.caption,)
            if notes["by"] not in ("distance", "cosine"):
                raise ValueError(f"it compares by {notes['by']!r}, this version by distance or cosine")
            by: By = "cosine" if notes["by"] == "cosine" else "distance"
            return cls(mean, whiten, known, by, calibration)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read: {error}; write it again with openvision3 calibrate, or remove it") from error


def caption_confidence(calibration: Calibration, log_probability: float, familiarity: float) -> float:
    """The estimated probability that a caption is right."""
    bias, by_words, by_image = calibration.caption
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, bias + by_words * log_probability + by_image * familiarity))))


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
