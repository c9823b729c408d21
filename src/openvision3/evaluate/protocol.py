"""What an evaluator asks of a model, and what it answers: numbers that carry how they were measured."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from openvision3 import __version__
from openvision3.data.text import TextCount
from openvision3.progress import LIBRARIES, versions


@dataclass(frozen=True)
class Number:
    """One measured value. Two of them may be compared only where metric, count, how and network are equal."""

    metric: str
    value: float
    count: int
    """pictures (or captions) it is over"""
    how: str
    """the protocol in words: what was computed from what, and how it was averaged"""
    library: str = ""
    """what computed it, with its version"""
    network: str = ""
    """the network whose features it is made of, if any"""
    network_sha256: str = ""
    """of that network's weights"""
    spread: float | None = None
    """standard deviation of the value over what `how` says, where it was measured"""
    detail: str = ""
    """what else came out, such as a setting that was chosen on training pictures: it may differ between models that are compared"""
    low: float | None = None
    high: float | None = None
    """ends of the interval over samples, where there is one"""
    interval: str = ""
    """which interval: its level and how it was made"""
    part: str = ""
    """which of the samples it is over, such as "unseen samples"; "" for all"""


def number(metric: str, value: float, count: int, how: str, *packages: str, network: str = "", network_sha256: str = "", spread: float | None = None) -> Number:
    """A Number computed by this package on torch, and by further `packages` where they are named."""
    return Number(metric, float(value), count, how, library(*packages), network, network_sha256, spread)


@functools.cache
def library(*packages: str) -> str:
    """openvision3, what its numbers may depend on as far as it is installed, and these packages, each with its version."""
    return ", ".join([f"openvision3 {__version__}", *(f"{name} {version}" for name, version in versions(*LIBRARIES, *packages).items())])


def values(numbers: Iterable[Number]) -> dict[str, float]:
    """{metric: value}, for who needs no more than that."""
    return {each.metric: each.value for each in numbers}


@dataclass
class Functions:
    """A model as functions of images (B, 3, H, W) in [-1, 1], or of texts; what it cannot do is None."""

    name: str
    size: int
    """side of the pictures it was trained for, in pixels"""
    dtype: str = "fp32"
    """what it computes in"""
    sha256: str = ""
    """of its weights"""
    licence: str = "unknown"
    reconstruct: Callable[[Tensor], Tensor] | None = None
    """images -> images"""
    reconstruct_noisy: Callable[[Tensor, Sequence[float], Sequence[str]], Iterable[Tensor]] | None = None
    """images, sigmas of the noise on the tokens, a key for each row's noise -> images for each sigma"""
    embed_images: Callable[[Tensor], Tensor] | None = None
    """images -> unit vectors (B, E)"""
    embed_texts: Callable[[Sequence[str]], Tensor] | None = None
    """texts -> unit vectors (B, E)"""
    count_text: Callable[[Sequence[str]], TextCount] | None = None
    """texts -> how much of them it does not know, or cuts off"""
    caption: Callable[[Tensor], list[str]] | None = None
    features: Callable[[Tensor], Tensor] | None = None
    """images -> what a probe sees (B, F): pooled frozen tokens"""
    note: str = ""
    """what has to be known of its rows, such as that it never ran on real weights"""
    fixed: bool = False
    """it takes squares of `size` only: others are resized to it to be embedded, and are not rebuilt"""
