"""Classification accuracy from class scores: over images, over classes, and of always guessing the largest class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openvision3.evaluate.protocol import Number, number
from openvision3.evaluate.statistics import Column, Columns

FIRST_FEW = 5


@dataclass(frozen=True)
class ClassRow:
    """One class of a test set."""

    name: str
    count: int
    """images of this class"""
    accuracy: float
    """share of its images classified correctly"""


@dataclass(frozen=True)
class Classification:
    """The numbers, and a row for each class that occurs, in the order of the class names."""

    numbers: list[Number]
    classes: list[ClassRow]


def ranks(scores: Tensor, labels: Tensor, equal: float = 0.0) -> Tensor:
    """scores (B, C), labels (B,) -> rank of the true class, from 0. Among scores within `equal`, the class listed first ranks first.

    Constant scores therefore always predict the first class.

    Raises:
        ValueError: scores that are NaN or infinite. Nothing is larger than NaN, so it would count as correct.
    """
    if not scores.isfinite().all():
        raise ValueError("some scores of classes are NaN or infinite; look at the features or embeddings they come from")
    own = scores.gather(1, labels[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return ((scores > own + equal) | ((scores >= own - equal) & before)).sum(1)


def accuracies(
    rank: Tensor, labels: Sequence[int], names: Sequence[str], how: str, *, first_few: bool = False, columns: Columns | None = None
) -> Classification:
    """Ranks of the true classes (N,) -> top_1, mean_class_accuracy, largest_class_share, and top_5 if there are more than five classes.

    Ranks of the true class from 1 on, each with the number of the class, are added to `columns`. `how` describes the
    classifier. `first_few`: its scores rank all classes, so that top_5 is meaningful.
    """
    label, rank = torch.tensor(labels), rank.cpu()
    counts = label.bincount(minlength=len(names))
    right = label[rank == 0].bincount(minlength=len(names))
    rows = [ClassRow(name, int(n), int(r) / int(n)) for name, n, r in zip(names, counts, right, strict=True) if n]
    count = len(labels)
    if columns is not None:
        columns["rank"] = Column(list(range(count)), [[place + 1, number_of] for place, number_of in zip(rank.tolist(), labels, strict=True)])
    found = [number("top_1", (rank == 0).double().mean().item(), count, f"share of images named rightly: {how}")]
    if first_few and len(names) > FIRST_FEW:
        found.append(
            number(f"top_{FIRST_FEW}", (rank < FIRST_FEW).double().mean().item(), count, f"share of images whose class is among the first {FIRST_FEW}: {how}")
        )
    mean = sum(row.accuracy for row in rows) / len(rows)
    found.append(number("mean_class_accuracy", mean, count, f"mean over the {len(rows)} classes that occur of the share named rightly: {how}"))
    share = int(counts.max()) / count
    found.append(number("largest_class_share", share, count, f"what always naming the most frequent of {len(names)} classes would get"))
    return Classification(found, rows)


def check_labels(features: Tensor, labels: Sequence[int], names: Sequence[str], what: str) -> None:
    """Raises ValueError unless `features` is (N, F), N > 0, of finite numbers, with a label from 0 to C - 1 for each row."""
    if features.ndim != 2 or not len(labels) or len(labels) != len(features):
        raise ValueError(f"{what}: a row and a label are needed for each image; seen features of {tuple(features.shape)} and {len(labels)} labels")
    if not 0 <= min(labels) <= max(labels) < len(names):
        raise ValueError(f"{what}: labels from {min(labels)} to {max(labels)} do not fit {len(names)} class names; labels must be from 0 to {len(names) - 1}")
    if not features.isfinite().all():
        raise ValueError(f"{what}: {int((~features.isfinite()).any(1).sum())} of {len(features)} rows hold NaN or infinite numbers; look at the model in fp32")
