"""Probes of frozen features: k nearest neighbours and a linear classifier.

k-NN is the weighted vote of Wu et al. 2018 (Unsupervised feature learning via non-parametric instance discrimination, section
3.4) with k and temperature of DINO (Caron et al. 2021). The linear probe is CLIP's (Radford et al. 2021, section 3.2): a
multinomial logistic regression whose L2 weight is chosen on a held-out part of the training set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from openvision3.evaluate.metrics.accuracy import accuracies, check_labels, ranks
from openvision3.evaluate.protocol import Number
from openvision3.evaluate.statistics import Columns

SCORES_AT_ONCE = 2**24
GRID = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)
"""L2 weights to try, from strong to weak; each fit starts from the previous one"""
SMALL = 1e-7
"""a fit has converged when no part of the gradient is larger"""
MOST = 2000
"""maximum iterations of a fit"""
AT_ONCE = 100
"""iterations before the history of L-BFGS is reset"""
HELD_OUT = 5
"""one in so many training images of each class chooses L2"""


def evaluate_knn(
    train: Tensor,
    train_labels: Sequence[int],
    test: Tensor,
    test_labels: Sequence[int],
    classes: Sequence[str],
    k: int = 20,
    temperature: float = 0.07,
    columns: Columns | None = None,
) -> list[Number]:
    """Features (n, F) and (m, F) -> top_1, mean_class_accuracy, largest_class_share of the vote of the k nearest by cosine.

    A neighbour votes with exp(cosine / temperature). Ties between neighbours go to the earlier one, ties between votes to the first class.

    Raises:
        ValueError: unlike counts, labels without a class, features that are no numbers, k or temperature out of range.
    """
    check_labels(train, train_labels, classes, "k-NN, training set")
    check_labels(test, test_labels, classes, "k-NN, test set")
    _check_width(train, test)
    if not 1 <= k <= len(train):
        raise ValueError(f"k {k} must be from 1 to the {len(train)} training images")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature:g} must be more than 0")
    known, asked = normalize(train.float(), dim=1), normalize(test.float().to(train.device), dim=1)
    votes_for = torch.tensor(train_labels, device=train.device)
    label, chunk, found = torch.tensor(test_labels, device=train.device), max(1, SCORES_AT_ONCE // len(train)), []
    for start in range(0, len(asked), chunk):
        cosine = asked[start : start + chunk] @ known.T
        nearest = _nearest(cosine, k)
        weights = torch.exp((cosine.gather(1, nearest).double() - 1) / temperature)  # a factor for all changes nothing, and 1 is the most
        votes = torch.zeros(len(cosine), len(classes), dtype=torch.float64, device=train.device).scatter_add_(1, votes_for[nearest], weights)
        found.append(ranks(votes, label[start : start + chunk]))
    how = f"vote of the {k} nearest of {len(train)} training images by cosine, weights exp(cosine / {temperature:g}), {len(classes)} classes"
    return accuracies(torch.cat(found), test_labels, classes, how, columns=columns).numbers


def _nearest(scores: Tensor, k: int) -> Tensor:
    """(B, n) -> places (B, k) of the k largest, of equal ones the earlier: topk alone leaves open which."""
    least = scores.topk(k, dim=1).values[:, -1:]
    above, equal = scores > least, scores == least
    room = k - above.sum(1, keepdim=True)
    taken = above | (equal & (equal.cumsum(1) <= room))
    return taken.nonzero()[:, 1].view(len(scores), k)


def evaluate_linear_probe(
    train: Tensor,
    train_labels: Sequence[int],
    test: Tensor,
    test_labels: Sequence[int],
    classes: Sequence[str],
    grid: Sequence[float] = GRID,
    columns: Columns | None = None,
) -> list[Number]:
    """Features (n, F) and (m, F) -> top_1, mean_class_accuracy, largest_class_share of a logistic regression on standardised features.

    float64 throughout, on the device of `train`. A fifth of each class chooses L2 from `grid`: the most right ones there, of equal
    ones the smaller cross entropy. Then all of `train` is fitted with it.

    Raises:
        ValueError: unlike counts, labels without a class, features that are no numbers, no class of two images to hold one out.
    """
    check_labels(train, train_labels, classes, "linear probe, training set")
    check_labels(test, test_labels, classes, "linear probe, test set")
    _check_width(train, test)
    if not grid or min(grid) <= 0:
        raise ValueError(f"grid {list(grid)} must hold L2 weights of more than 0")
    strong_to_weak = sorted(set(grid), reverse=True)
    features, label = train.double(), torch.tensor(train_labels, device=train.device)
    held = held_out(train_labels).to(train.device)
    if not held.any():
        raise ValueError(f"no class has two training images, so that none can be held out to choose L2; seen {len(train)} images of {len(classes)} classes")
    mean, scale = standard(features[~held])
    inside, outside = (features[~held] - mean) / scale, (features[held] - mean) / scale
    weight = torch.zeros(features.shape[1] + 1, len(classes), dtype=torch.float64, device=train.device)
    scores = []
    for l2 in strong_to_weak:
        weight = fit(inside, label[~held], weight, l2)
        logits = _logits(outside, weight)
        scores.append((-(logits.argmax(1) == label[held]).double().mean().item(), cross_entropy(logits, label[held]).item()))
    chosen = strong_to_weak[min(range(len(scores)), key=scores.__getitem__)]

    mean, scale = standard(features)
    features = (features - mean) / scale
    weight = fit(features, label, torch.zeros_like(weight), chosen)
    left = gradient(features, label, weight, chosen).abs().max().item()
    rank = ranks(_logits((test.double().to(train.device) - mean) / scale, weight), torch.tensor(test_labels, device=train.device))
    edge = ", at the edge of the grid" if len(strong_to_weak) > 1 and chosen in (strong_to_weak[0], strong_to_weak[-1]) else ""
    end = "" if left <= SMALL else f", not at its end: gradient {left:.1e} after {MOST} iterations"
    how = (
        f"logistic regression on standardised features of {len(train)} training images, {len(classes)} classes, L2 "
        f"chosen from {strong_to_weak[0]:g} to {strong_to_weak[-1]:g} ({len(strong_to_weak)}) on {int(held.sum())} of them"
    )
    detail = f"{train.shape[1]} features, L2 {chosen:g}{edge}{end}"
    return [replace(each, detail=detail) for each in accuracies(rank, test_labels, classes, how, columns=columns).numbers]


def held_out(labels: Sequence[int]) -> Tensor:
    """Labels of n images -> (n,) bool: of each class one in HELD_OUT, at least one where there are two, in the order of a hash of the row."""
    by_class: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        by_class.setdefault(label, []).append(row)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for rows in by_class.values():
        rows.sort(key=lambda row: hashlib.sha256(str(row).encode()).digest())
        held[rows[: max(len(rows) // HELD_OUT, int(len(rows) > 1))]] = True
    return held


def standard(features: Tensor) -> tuple[Tensor, Tensor]:
    """(n, F) -> mean and standard deviation of each feature, both (F,); a feature that is always the same is divided by 1."""
    mean = features.mean(0)
    scale = (features - mean).pow(2).mean(0).sqrt()
    return mean, torch.where(scale > 1e-12 * mean.abs().clamp_min(1e-12), scale, 1.0)


def fit(features: Tensor, label: Tensor, weight: Tensor, l2: float) -> Tensor:
    """Minimise mean cross entropy + l2 / 2 x the squares of the weights, bias free, from `weight` (F + 1, C), last row the bias, on.

    Convex, so where L-BFGS ends (gradient under SMALL, or MOST iterations) does not depend on where it began. It searches in coordinates in which
    the bound on the Hessian of Boehning 1992 (half the second moments of the features, plus l2) is the unit matrix: some 50 steps instead of 2,000.
    """
    ones = torch.cat([features, features.new_ones(len(features), 1)], 1)
    bound = ones.T @ ones / (2 * len(ones))
    bound.diagonal()[:-1] += l2
    root = torch.linalg.cholesky(bound)
    moved = (root.T @ weight).requires_grad_()
    small = SMALL / root.abs().sum(1).max().item()  # of the gradient in these coordinates, so that in those of the weights it is under SMALL

    def closure() -> Tensor:
        moved.grad = None
        loss = objective(features, label, torch.linalg.solve_triangular(root.T, moved, upper=True), l2)
        loss.backward()
        return loss

    for _ in range(MOST // AT_ONCE):  # near the end its history misleads it for thousands of steps: a new one ends in tens
        optimizer = torch.optim.LBFGS([moved], max_iter=AT_ONCE, tolerance_grad=small, tolerance_change=0.0, history_size=20, line_search_fn="strong_wolfe")
        with torch.enable_grad():
            optimizer.step(closure)  # type: ignore[arg-type]
        if moved.grad is not None and moved.grad.abs().max() <= small:
            break
    return torch.linalg.solve_triangular(root.T, moved.detach(), upper=True)


def objective(features: Tensor, label: Tensor, weight: Tensor, l2: float) -> Tensor:
    return cross_entropy(_logits(features, weight), label) + l2 / 2 * weight[:-1].pow(2).sum()


def gradient(features: Tensor, label: Tensor, weight: Tensor, l2: float) -> Tensor:
    """Of the objective at `weight`: zero at its one minimum."""
    with torch.enable_grad():
        weight = weight.clone().requires_grad_()
        return torch.autograd.grad(objective(features, label, weight, l2), weight)[0]


def _logits(features: Tensor, weight: Tensor) -> Tensor:
    return torch.addmm(weight[-1], features, weight[:-1])


def _check_width(train: Tensor, test: Tensor) -> None:
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"training features of width {train.shape[1]} and test features of width {test.shape[1]} are of unlike models")
