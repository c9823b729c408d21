"""Sets of features, and distances between them: FID, sFID, KID, precision and recall, Inception Score.

Everything takes features (N, D) or their `Statistics` and computes in float64. The networks are in `networks/`.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openvision3 import distributed
from openvision3.data.arrays import read_header
from openvision3.files import write_whole


class Statistics:
    """Count, mean (D,) and covariance (D, D) of features, in float64, fed chunk by chunk in any order.

    `count` is None for statistics from a file without a count: these can be compared but not extended.
    """

    def __init__(self, width: int):
        self.count: int | None = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)
        """sum of squares about the mean; the covariance itself where the count is not known"""

    @property
    def covariance(self) -> Tensor:
        """Divided by count - 1; zeros for fewer than two."""
        return self.scatter if self.count is None else self.scatter / max(self.count - 1, 1)

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        found = cls(features.shape[1])
        found.add(features)
        return found

    def add(self, features: Tensor) -> None:
        """Add features (B, D). Raises ValueError for features of another width or with non-finite values."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features of shape {tuple(features.shape)} cannot join statistics of width {len(self.mean)}")
        if not len(features):
            return
        if not features.isfinite().all():
            raise ValueError("features are not finite: look for NaN in the images or for fp16 in the network")
        rows = features.detach().cpu().double()
        mean = rows.mean(0)
        self._move(len(rows), mean)
        rows = rows - mean
        self.scatter.addmm_(rows.T, rows)

    def merge(self, other: Statistics) -> None:
        """Add the features of another `Statistics`."""
        if len(other.mean) != len(self.mean):
            raise ValueError(f"statistics of width {len(other.mean)} cannot join those of width {len(self.mean)}")
        count = other._known()
        if count:
            self._move(count, other.mean)
            self.scatter += other.scatter

    def _move(self, count: int, mean: Tensor) -> None:
        """Count and mean with `count` more about `mean`, and what the distance of the two means adds to the scatter (Chan, Golub and LeVeque 1979)."""
        before = self._known()
        self.count, step = before + count, mean - self.mean
        self.scatter.addr_(step, step, alpha=before * count / self.count)
        self.mean = self.mean + step * (count / self.count)

    def _known(self) -> int:
        if self.count is None:
            raise ValueError("statistics from a file that does not give their count cannot be merged with others, only compared")
        return self.count

    def over_ranks(self) -> Statistics:
        """The statistics over all ranks, on every rank."""
        if distributed.world() == 1:
            return self
        count = self._known()
        found = Statistics(len(self.mean))
        found.count = int(distributed.total(torch.tensor(count)))
        found.mean = distributed.total(self.mean * count) / max(found.count, 1)
        step = self.mean - found.mean
        found.scatter = distributed.total(self.scatter + torch.outer(step, step) * count)
        return found

    def save(self, path: str | Path) -> None:
        """`mu` and `sigma` as ADM's evaluator reads them, and `count`, which it leaves alone."""
        count = {} if self.count is None else {"count": np.array(self.count)}
        write_whole(path, lambda file: np.savez(file, mu=self.mean.numpy(), sigma=self.covariance.numpy(), **count))  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path, names: tuple[str, str] = ("mu", "sigma"), width: int = 0) -> Statistics:
        """Read an ADM reference file; ("mu_s", "sigma_s") are the spatial ones of sFID. Of another `width`, unless it is 0, they are refused unread.

        Raises:
            FileNotFoundError, ValueError: no such file, or not statistics of such features.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                headers = [read_header(file.zip.open(f"{name}.npy")) for name in names]
                (of_mean, *_), (of_covariance, *_) = headers
                if of_mean != of_covariance[:1] or of_covariance != 2 * of_mean:
                    raise ValueError(f"their shapes are {of_mean} and {of_covariance}, and must be (D,) and (D, D)")
                if width not in (0, *of_mean):
                    raise ValueError(f"they are of features of width {of_mean[0]}, not {width}")
                if strange := next((str(kind) for _, _, kind in headers if kind.kind not in "fiu"), ""):
                    raise ValueError(f"they are of {strange}")
                mean, covariance = (torch.from_numpy(file[name].astype(np.float64)) for name in names)
                count = int(file["count"]) if "count" in file.files else None
            if not (mean.isfinite().all() and covariance.isfinite().all() and (covariance.diagonal() >= 0).all()):
                raise ValueError("a value is not finite, or a variance below 0")
        except FileNotFoundError:
            raise FileNotFoundError(f"no such file of statistics: {path}") from None
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, zlib.error, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} does not hold {names[0]} and {names[1]} as ADM's reference files do: {' '.join(str(error).split())}") from error
        found = cls(0)
        found.count, found.mean, found.scatter = count, mean, covariance * (1 if count is None else max(count - 1, 1))
        return found


# -- distances ------------------------------------------------------------------------------------------------------


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)): FID where the features are Inception's pool_3, sFID where its spatial ones.

    With R R^T = S1 the eigenvalues of S1 S2 are those of the symmetric R^T S2 R. R keeps the directions in which S1 is more
    than rounding, so that a covariance of fewer images than dimensions, which is allowed, adds no noise.

    Raises:
        ValueError: statistics of unlike width, or of fewer than two images.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features of width {len(a.mean)} and {len(b.mean)} cannot be compared; both sides need one network")
    if min(count for count in (a.count, b.count, 2) if count is not None) < 2:
        raise ValueError(f"statistics of {a.count} and {b.count} images; a covariance needs at least 2, a steady distance some 10,000")
    few, many = (b, a) if b.count is not None and (a.count is None or b.count < a.count) else (a, b)
    values, vectors = torch.linalg.eigh(few.covariance)
    kept = values > values[-1].clamp_min(0) * len(values) * torch.finfo(torch.float64).eps
    root = vectors[:, kept] * values[kept].sqrt()
    shared = torch.linalg.eigvalsh(root.T @ many.covariance @ root).clamp_min(0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return float(((a.mean - b.mean).square().sum() + traces - 2 * shared).clamp_min(0))


def frechet_warning(count: int, width: int) -> str:
    """The warning for a Frechet distance of few images; empty for many."""
    return f"; {count} images for features of width {width}: mostly bias, compare with nothing" if count <= width else ""


@dataclass(frozen=True)
class KernelDistance:
    """KID: the squared maximum mean discrepancy, unbiased, so that it may be a little below zero."""

    value: float
    """over all samples at once"""
    mean: float
    """over subsets, as it is usually given"""
    spread: float
    """standard deviation over subsets"""
    subsets: int
    size: int
    """samples of each side in a subset"""


def kernel_distance(x: Tensor, y: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0, paired: bool = False) -> KernelDistance:
    """KID of features (N, D) and (M, D) with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401).

    Subsets are drawn without replacement from each side, `size` of it or half a side where that is fewer. With `paired`, row i of
    both belongs to one image (an original and what was made of it): then an image is not compared with its own copy
    (the U-statistic for as many x as y beside lemma 6 of Gretton et al. 2012), otherwise the estimate would be biased. Identical sets give 0.

    Raises:
        ValueError: unlike widths, or fewer than two samples a side; with `paired`, unlike counts.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features of shape {tuple(x.shape)} and {tuple(y.shape)} cannot be compared; they must be (N, D) and (M, D)")
    if min(len(x), len(y)) < 2 or (paired and len(x) != len(y)):
        raise ValueError(f"{len(x)} and {len(y)} samples; at least 2 are needed on each side, and as many on both where they are paired")
    x, y = x.detach().double(), y.detach().double()
    size = min(size, max(2, min(len(x), len(y)) // 2))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(subsets):
        first = torch.randperm(len(x), generator=generator)[:size].to(x.device)
        second = first if paired else torch.randperm(len(y), generator=generator)[:size].to(y.device)
        found.append(_squared_discrepancy(x[first], y[second], paired))
    drawn = torch.tensor(found, dtype=torch.float64)
    return KernelDistance(_squared_discrepancy(x, y, paired), float(drawn.mean()), float(drawn.std(correction=0)), subsets, size)


def kernel_distance_shares(x: Tensor, y: Tensor, chunk: int = 256) -> Tensor:
    """Paired features (N, D) twice, N > 2 -> what each sample adds to `kernel_distance(x, y, paired=True)` (N,).

    The pseudo-values of the jackknife: N times the estimate less N - 1 times that without the sample. Their mean is the estimate, and their spread is
    that of a statistic of pairs, which drawing samples with repeats would not have: a sample would meet its own copy.
    """
    x, y = x.detach().double(), y.detach().double()
    count = len(x)
    rows = []
    for start in range(0, count, chunk):
        a, b = x[start : start + chunk], y[start : start + chunk]
        pairs = _kernel(a, x) + _kernel(b, y) - _kernel(a, y) - _kernel(b, x)
        pairs[torch.arange(len(a)), start + torch.arange(len(a))] = 0
        rows.append(pairs.sum(1))
    by_row = torch.cat(rows)
    total = by_row.sum()
    return total / (count - 1) - (total - 2 * by_row) / (count - 2)


def kernel_distance_sample_shares(x: Tensor, y: Tensor, chunk: int = 256) -> Tensor:
    """Features (N, D) of a reference that is held fixed and (M, D) of samples, M > 2 -> what each sample adds to `kernel_distance(x, y)` (M,).

    The pseudo-values of the jackknife over the samples, as in `kernel_distance_shares`: their mean is the estimate.
    """
    x, y = x.detach().double(), y.detach().double()
    count = len(y)
    of_pairs = torch.cat([_kernel(rows, y).sum(1) - _kernel(rows, rows).diagonal() for rows in y.split(chunk)])
    between = torch.cat([_kernel(rows, x).sum(1) for rows in y.split(chunk)])
    total = of_pairs.sum()
    return _within(x, chunk) + total / (count - 1) - (total - 2 * of_pairs) / (count - 2) - 2 * between / len(x)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1).pow(3)


def _within(a: Tensor, chunk: int) -> float:
    """Mean of the kernel over pairs of two different rows, each computed once."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for start in range(0, len(a), chunk):
        block = _kernel(a[start : start + chunk], a[start:])
        total += block[:, :chunk].triu(1).sum() + block[:, chunk:].sum()
    return float(total) * 2 / (len(a) * (len(a) - 1))


def _squared_discrepancy(x: Tensor, y: Tensor, paired: bool, chunk: int = 256) -> float:
    between = sum(float(_kernel(rows, y).sum()) for rows in x.split(chunk))
    if paired:
        between -= float(((x * y).sum(1) / x.shape[1] + 1).pow(3).sum())
    return _within(x, chunk) + _within(y, chunk) - 2 * between / (len(x) * (len(y) - paired))


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, chunk: int = 2048) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991) of features (N, D) and (M, D), as ADM's evaluator has it.

    Precision is the share of fakes that lie in the ball of some real image up to its k-th nearest other real one; recall the
    share of reals within the balls of fakes. Raises ValueError as `within_manifolds`.
    """
    precise, recalled = within_manifolds(real, fake, k, chunk)
    return precise.double().mean().item(), recalled.double().mean().item()


def within_manifolds(real: Tensor, fake: Tensor, k: int = 3, chunk: int = 2048) -> tuple[Tensor, Tensor]:
    """Features (N, D) and (M, D) -> which fakes lie within a ball of the reals (M,), and which reals within one of the fakes (N,).

    Distances are taken chunk by chunk about the mean of the reals, in the dtype and on the device of `real`.

    Raises:
        ValueError: unlike widths, or a side with no more than k samples.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features of shape {tuple(real.shape)} and {tuple(fake.shape)} cannot be compared; they must be (N, D) and (M, D)")
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"{len(real)} and {len(fake)} samples have no {k} neighbours each; at least {k + 1} are needed on each side")
    real = real.detach() if real.dtype == torch.float64 else real.detach().float()
    centre = real.mean(0)
    real, fake = real - centre, fake.detach().to(real) - centre
    radii = [_radii(side, k, chunk) for side in (real, fake)]
    in_real, in_fake = [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for start in range(0, len(fake), chunk):
        rows = slice(start, start + chunk)
        distance = _squared_distances(fake[rows], real)
        in_real.append((distance <= radii[0]).any(1))
        in_fake |= (distance <= radii[1][rows, None]).any(0)
    return torch.cat(in_real), in_fake


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)


def _radii(features: Tensor, k: int, chunk: int) -> Tensor:
    """(N, D) -> (N,): the squared distance to the k-th nearest other one."""
    found = []
    for start in range(0, len(features), chunk):
        rows = features[start : start + chunk]
        distance = _squared_distances(rows, features)
        places = torch.arange(len(rows), device=rows.device)
        distance[places, start + places] = torch.inf  # not itself
        found.append(distance.kthvalue(k, dim=1).values)
    return torch.cat(found)


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """IS (Salimans et al. 2016) of logits (N, classes): mean and standard deviation over `splits` parts in the order given.

    ADM's evaluator has parts of 5,000 images, which is 10 of 50,000. Images sorted by class have to be shuffled first.
    """
    if splits < 1 or len(logits) < splits:
        raise ValueError(f"{len(logits)} images cannot be split into {splits} parts; every part needs at least one")
    scores = []
    for part in logits.detach().double().tensor_split(splits):
        log = part.log_softmax(1)
        marginal = log.exp().mean(0, keepdim=True)
        scores.append((log.exp() * (log - marginal.log())).nan_to_num(0).sum(1).mean().exp())
    found = torch.stack(scores)
    return float(found.mean()), float(found.std(correction=0))
