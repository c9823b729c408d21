"""The interface between evaluators and models: `Functions` of a model go in, `Number`s with their protocol come out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from openvision3 import __version__
from openvision3.data.text import TextCount
from openvision3.progress import LIBRARIES, versions


@dataclass(frozen=True)
class Number:
    """One measured value. Two numbers can be compared only if metric, count, how and network are equal."""

    metric: str
    value: float
    count: int
    """images (or captions) it was computed from"""
    how: str
    """the protocol in words: what was computed from what, and how it was averaged"""
    library: str = ""
    """what computed it, with its version"""
    network: str = ""
    """the network whose features it is computed from, if any"""
    network_sha256: str = ""
    """sha256 of that network's weights"""
    spread: float | None = None
    """standard deviation of the value over what `how` names; None if it was not measured"""
    detail: str = ""
    """further results, such as a setting chosen on training images; it may differ between compared models"""
    low: float | None = None
    high: float | None = None
    """ends of the interval over samples, if it has one"""
    interval: str = ""
    """level and method of the interval"""
    part: str = ""
    """the samples it was computed from, such as "unseen samples"; "" for all"""


def number(metric: str, value: float, count: int, how: str, *packages: str, network: str = "", network_sha256: str = "", spread: float | None = None) -> Number:
    """A Number computed by this package on torch and by the named `packages`."""
    return Number(metric, float(value), count, how, library(*packages), network, network_sha256, spread)


@functools.cache
def library(*packages: str) -> str:
    """The versions of openvision3, of the installed libraries that its numbers may depend on, and of these packages."""
    return ", ".join([f"openvision3 {__version__}", *(f"{name} {version}" for name, version in versions(*LIBRARIES, *packages).items())])


def values(numbers: Iterable[Number]) -> dict[str, float]:
    """{metric: value} of these numbers."""
    return {number.metric: number.value for number in numbers}


@dataclass
class Functions:
    """A model as functions of images (B, 3, H, W) in [-1, 1] or of texts. A function that the model lacks is None."""

    name: str
    size: int
    """side of the images that the model was trained on, in pixels"""
    dtype: str = "fp32"
    """precision of its computation"""
    sha256: str = ""
    """sha256 of its weights"""
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
    """texts -> how many words the tokenizer does not know and how many texts it truncates"""
    caption: Callable[[Tensor], list[str]] | None = None
    features: Callable[[Tensor], Tensor] | None = None
    """images -> the features of a probe (B, F): pooled frozen tokens"""
    note: str = ""
    """a remark for all its rows, such as that it has never run on real weights"""
    fixed: bool = False
    """the model takes squares of `size` only: other images are resized to be embedded, and are not reconstructed"""


Conditions = Sequence[int] | Sequence[str]
"""classes by number, or texts: one for each sample"""


@dataclass
class DrawingFunctions:
    """A model that draws, as a function of numbers of samples."""

    name: str
    size: int
    """side of its images in pixels"""
    sample: Callable[[Sequence[int], Conditions | None, float], Tensor]
    """numbers of samples, their conditions, the guidance scale (1: none) -> images (B, 3, size, size) in [-1, 1]. A sample depends on its number, its
    condition and the guidance alone"""
    condition: str = "none"
    """what an image is drawn from: label, text or none"""
    label_names: Sequence[str] = ()
    """of its classes, by number"""
    can_guide: bool = False
    sampler: dict[str, Any] = field(default_factory=dict)
    """the settings of its sampler, which the images depend on, too"""
    guiding: dict[str, Any] = field(default_factory=dict)
    """further settings that only guided images depend on"""
    dtype: str = "fp32"
    sha256: str = ""
    """sha256 of its weights"""
    licence: str = "unknown"


@dataclass
class AnsweringFunctions:
    """A model that answers questions about images, as one function."""

    name: str
    answer: Callable[[Sequence[Any], Sequence[str], int], list[str]]
    """upright RGB images of any sizes, a prompt for each, the largest number of tokens -> what it writes, decoded greedily. An answer does not depend on
    the others of its batch"""
    dtype: str = "fp32"
    sha256: str = ""
    """sha256 of its weights"""
    licence: str = "unknown"
    note: str = ""
    """a remark for all its rows"""
