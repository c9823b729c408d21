"""Reconstruction metrics, given `reconstruct(images)`: PSNR, SSIM, feature distances, LPIPS, rFID and KID.

All of it is measured on images rounded to uint8, each image by itself and, for rFID and KID, the set of them. Every rank
brings its own rows and all get the same answer, which depends neither on how many ranks there are nor on the batch size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openvision3 import distributed
from openvision3.data.images import to_tensor, to_uint8
from openvision3.evaluate.metrics.distances import Statistics, frechet_distance, frechet_warning, kernel_distance, kernel_distance_shares
from openvision3.evaluate.protocol import Number, number
from openvision3.evaluate.statistics import Column, Columns
from openvision3.networks.inception import Extractor, Inception
from openvision3.networks.perceptual import EFFICIENTNET_SHA256, EfficientNetDistance, Lpips

Rows = tuple[Sequence[int], Sequence[str], Tensor]
"""(place of each image in the whole set, its key, images (B, 3, H, W) in [-1, 1])"""

KID_IMAGES = 10_000

WINDOW, SIGMA = 11, 1.5
"""SSIM's Gaussian window: size and sigma in pixels."""


# -- one pair of images -------------------------------------------------------------------------------------------


def psnr(images: Tensor, images_hat: Tensor) -> Tensor:
    """(B, 3, H, W) twice in [-1, 1] -> PSNR of each pair in dB, both rounded to uint8 first; 100 dB for equal images."""
    _check(images, images_hat)
    error = (to_uint8(images).float() - to_uint8(images_hat).float()).div(255).pow(2).mean((1, 2, 3))
    return -10 * torch.log10(error.clamp_min(1e-10))


def ssim(images: Tensor, images_hat: Tensor) -> Tensor:
    """(B, 3, H, W) twice in [-1, 1] -> SSIM of each pair, both rounded to uint8 first.

    Wang et al. 2004, equation 13, with K1 = 0.01, K2 = 0.03 and range 1: a Gaussian window of 11 pixels and sigma 1.5 about every
    pixel, the image mirrored at its edges, on each colour by itself; mean over pixels and colours. As torchmetrics has it;
    scikit-image leaves out windows that reach beyond an edge.

    Raises:
        ValueError: unlike shapes, or a side of less than 11 pixels.
    """
    _check(images, images_hat)
    height, width = images.shape[2:]
    if min(height, width) < WINDOW:
        raise ValueError(f"images of {height}x{width} have no SSIM; its window needs {WINDOW} pixels on each side")
    down, across = (_windows(length, images.device) for length in (height, width))
    # About mid-grey, which variances do not see, so that little is lost where a square is taken from a square.
    x, y = (to_uint8(side).float() / 255 - 0.5 for side in (images, images_hat))
    mean_x, mean_y, xx, yy, xy = (down @ part @ across.T for part in (x, y, x * x, y * y, x * y))
    variance_x, variance_y, covariance = (xx - mean_x**2).clamp_min(0), (yy - mean_y**2).clamp_min(0), xy - mean_x * mean_y
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    light = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variance_x + variance_y + 0.03**2)
    return (light * structure).mean((1, 2, 3))


def _windows(length: int, device: torch.device) -> Tensor:
    """(length, length): row i weighs the pixels of the window about pixel i; beyond an edge lies the mirror of the image."""
    offsets = torch.arange(WINDOW) - WINDOW // 2
    weights = torch.exp(-offsets.double().square() / (2 * SIGMA**2))
    places = (torch.arange(length)[:, None] + offsets).abs()
    places = torch.where(places < length, places, 2 * (length - 1) - places)
    found = torch.zeros(length, length, dtype=torch.float64)
    found.scatter_add_(1, places, (weights / weights.sum()).expand(length, -1))
    return found.float().to(device)


def _check(images: Tensor, images_hat: Tensor) -> None:
    if images.shape != images_hat.shape:
        raise ValueError(f"images of {tuple(images.shape)} and {tuple(images_hat.shape)} cannot be compared; they must be of one shape")


# -- a set of images, on any number of ranks ----------------------------------------------------------------------


@dataclass
class Networks:
    """The networks that compare images, in addition to pixel metrics."""

    extractors: list[Extractor] = field(default_factory=list)
    """KID on the features of each, and rFID on those of Inception"""
    distance: EfficientNetDistance | None = None
    lpips: Lpips | None = None
    missing: list[tuple[str, str]] = field(default_factory=list)
    """(metric, what it needs) for networks that are not here"""


@dataclass
class Reconstruction:
    """The scores of each image, in the order of their places, and the numbers over all of them."""

    indices: list[int]
    keys: list[str]
    numbers: list[Number]
    columns: Columns
    """the scores of each image by metric; of KID its share of the estimate"""

    @property
    def psnr(self) -> list[float]:
        """dB"""
        return self.columns["psnr"].values

    def worst(self, count: int = 8) -> list[int]:
        """Positions in these lists of the images with the lowest PSNR, the worst first."""
        return sorted(range(len(self.psnr)), key=lambda i: (self.psnr[i], i))[:count]

    def best(self, count: int = 8) -> list[int]:
        """Positions of those with the highest PSNR, the best first."""
        return sorted(range(len(self.psnr)), key=lambda i: (-self.psnr[i], i))[:count]


def evaluate_reconstruction(
    batches: Iterable[Rows], reconstruct: Callable[[Tensor], Tensor], networks: Networks | None = None, protocol: str = "", seed: int = 0
) -> Reconstruction:
    """Measure the images of all ranks; each rank brings its own. Every rank has to call it.

    PSNR and SSIM always, the rest by `networks`; rFID and KID need two images or more. `protocol` goes into every number: which set, how cropped.
    `seed` is that of KID's subsets. `reconstruct` must not wait for other ranks, because some may have fewer images: a sharded model is called
    within `distributed.whole`.

    Raises:
        ValueError: no images, a place that comes twice, or images that cannot be measured.
        OtherRankFailed: another rank failed; it reports the cause.
    """
    networks = networks or Networks()
    rows = _Rows(networks)
    sets = [_Set(extractor) for extractor in networks.extractors]
    with distributed.together(), torch.no_grad():
        for indices, keys, images in batches:
            places = [int(i) for i in indices]
            if not len(places) == len(keys) == len(images):
                raise ValueError(f"a batch has {len(places)} places, {len(keys)} keys and {len(images)} images; there must be as many of each")
            images_hat = reconstruct(images).to(images.device)
            if not (finite := images_hat.isfinite().flatten(1).all(1)).all():
                raise ValueError(f"the reconstruction of {keys[int(finite.int().argmin())]} is not finite: compute in fp32 or bf16, not fp16")
            rows.add(places, keys, images, images_hat)
            for each in sets:
                each.add(places, images, images_hat)
    indices, keys, table, sizes = rows.over_ranks()
    where = ", ".join(part for part in (protocol, _sizes(sizes), "both sides rounded to uint8") if part)
    numbers = []
    for place, (metric, (what, network, sha256)) in enumerate(rows.metrics.items()):
        values = table[:, place]
        how = f"{what} of each image, mean over images (spread: standard deviation over images); {where}"
        spread = values.std(correction=0).item()
        numbers.append(number(metric, values.mean().item(), len(values), how, network=network, network_sha256=sha256, spread=spread))
    columns = {metric: Column(indices, values) for metric, values in zip(rows.metrics, table.T.tolist(), strict=True)}
    for each in sets if len(indices) > 1 else ():
        set_numbers, shares = each.numbers(indices, where, seed)
        numbers += set_numbers
        columns |= shares
    return Reconstruction(indices, keys, numbers, columns)


class _Rows:
    """The scores of each image."""

    def __init__(self, networks: Networks):
        self.networks = [network for network in (networks.distance, networks.lpips) if network is not None]
        self.metrics = {
            "psnr": ("PSNR in dB over all colours, 100 for equal images,", "", ""),
            "ssim": ("SSIM (Gaussian window 11, sigma 1.5, mirrored edges, range 1, mean over colours)", "", ""),
        }
        """{metric: (how it is computed, its network, sha256 of the network)}, a column of the scores each"""
        if (distance := networks.distance) is not None:
            what = f"channel-normalised squared difference of the first {distance.stages} stages, at the images' own size,"
            self.metrics[distance.name] = (what, "EfficientNet-Lite0", EFFICIENTNET_SHA256)
        if (lpips := networks.lpips) is not None:
            self.metrics["lpips"] = (f"LPIPS v0.1 ({lpips.net}), at the images' own size,", f"LPIPS {lpips.net}", lpips.sha256())
        self.places: list[int] = []
        self.keys: list[str] = []
        self.scores: list[Tensor] = []
        self.sizes: set[tuple[int, int]] = set()

    def add(self, places: Sequence[int], keys: Sequence[str], images: Tensor, images_hat: Tensor) -> None:
        scores = [psnr(images, images_hat), ssim(images, images_hat)]
        for network in self.networks:
            device = next(network.parameters()).device
            scores.append(network.per_image(*(to_tensor(to_uint8(side)).to(device) for side in (images, images_hat))))
        self.places += places
        self.keys += keys
        self.scores.append(torch.stack([column.double().cpu() for column in scores], 1))
        self.sizes.add((images.shape[2], images.shape[3]))

    def over_ranks(self) -> tuple[list[int], list[str], Tensor, set[tuple[int, int]]]:
        """Places in order, keys, scores (N, metrics) and sizes of all ranks' images."""
        places = distributed.gather_rows(torch.tensor(self.places, dtype=torch.long))
        keys = [key for part in distributed.gather_objects(self.keys) for key in part]
        scores = distributed.gather_rows(torch.cat([torch.zeros(0, len(self.metrics), dtype=torch.float64), *self.scores]))
        sizes = set().union(*distributed.gather_objects(self.sizes))
        if not len(places):
            raise ValueError("no images to evaluate on")
        order = places.argsort(stable=True)
        places = places[order]
        twice = places[1:][places[1:] == places[:-1]]
        if len(twice):
            raise ValueError(f"image {int(twice[0])} came twice ({len(twice)} did): each belongs to one batch of one rank")
        return places.tolist(), [keys[i] for i in order.tolist()], scores[order], sizes


def metrics_of(extractor: Extractor) -> list[str]:
    """What is measured on its features."""
    kid = f"KID on {extractor.name} features"
    return ["rfid", kid] if isinstance(extractor, Inception) else [kid]


class _Set:
    """Features of originals and reconstructions: their statistics for rFID, and for KID those of the originals with the smallest hashes.

    These are a random sample in whatever order the set comes, such as class by class; the same one on any number of ranks and by whatever name.
    """

    def __init__(self, extractor: Extractor):
        self.extractor = extractor
        self.places: list[tuple[bytes, int]] = []
        """(sha256 of the original, place)"""
        self.kept: list[Tensor] = []
        """features (B, 2, width) of originals and reconstructions at these places, in fp32 on the CPU"""
        self.last: tuple[bytes, int] = (b"\xff" * 33, 0)
        """none beyond can be among the KID_IMAGES smallest"""
        self.statistics = [Statistics(extractor.width) for _ in range(2)] if isinstance(extractor, Inception) else []

    def add(self, places: list[int], images: Tensor, images_hat: Tensor) -> None:
        features = torch.stack([self.extractor(side).float().cpu() for side in (images, images_hat)], 1)
        for side, statistics in enumerate(self.statistics):
            statistics.add(features[:, side])
        drawn = [(hashlib.sha256(image.numpy().tobytes()).digest(), place) for image, place in zip(to_uint8(images).cpu(), places, strict=True)]
        wanted = [i for i, place in enumerate(drawn) if place <= self.last]
        self.places += [drawn[i] for i in wanted]
        self.kept.append(features[wanted])
        if len(self.places) > 2 * KID_IMAGES:
            self._forget_beyond(sorted(self.places)[KID_IMAGES - 1])

    def _forget_beyond(self, last: tuple[bytes, int]) -> None:
        wanted = [i for i, place in enumerate(self.places) if place <= last]
        self.places, self.last = [self.places[i] for i in wanted], last
        self.kept = [torch.cat([torch.zeros(0, 2, self.extractor.width), *self.kept])[wanted]]

    def numbers(self, indices: list[int], where: str, seed: int) -> tuple[list[Number], Columns]:
        """Given the places of all ranks' images: the numbers, and what each image adds to KID. Rank 0 computes, all get the answer."""
        extractor = self.extractor
        drawn = sorted(pair for part in distributed.gather_objects(self.places) for pair in part)
        self._forget_beyond(drawn[:KID_IMAGES][-1])
        places = distributed.gather_rows(torch.tensor([place for _, place in self.places], dtype=torch.long))
        order = places.argsort()
        places, kept = places[order], distributed.gather_rows(self.kept[0])[order]
        statistics = [each.over_ranks() for each in self.statistics]
        found: list[Number] = []
        shares: Columns = {}
        with distributed.together():
            if distributed.rank() == 0 or distributed.world() == 1:
                if statistics:
                    how = f"Frechet distance between originals and reconstructions on pool_3 features; {extractor.preparation}; {where}"
                    how += frechet_warning(len(indices), extractor.width)
                    found.append(self._number("rfid", frechet_distance(*statistics), len(indices), how))
                kid = kernel_distance(kept[:, 0], kept[:, 1], paired=True, seed=seed)
                first = "all" if len(kept) == len(indices) else f"{len(kept)} of {len(indices)}, those whose pixels have the smallest sha256"
                how = (
                    f"unbiased squared MMD between originals and reconstructions, kernel (x.y/d + 1)^3, over {first}, no image against its own copy "
                    f"(spread: standard deviation over {kid.subsets} subsets of {kid.size}); {extractor.preparation}; {where}"
                )
                name = metrics_of(extractor)[-1]
                found.append(self._number(name, kid.value, len(kept), how, kid.spread))
                if len(kept) > 2:
                    shares[name] = Column(places.tolist(), kernel_distance_shares(kept[:, 0], kept[:, 1]).tolist())
        return distributed.from_first((found, shares))

    def _number(self, metric: str, value: float, count: int, how: str, spread: float | None = None) -> Number:
        return number(metric, value, count, how, network=self.extractor.name, network_sha256=self.extractor.sha256, spread=spread)


def _sizes(sizes: set[tuple[int, int]]) -> str:
    seen = [f"{height}x{width}" for height, width in sorted(sizes)]
    return seen[0] if len(seen) == 1 else f"{len(seen)} sizes from {seen[0]} to {seen[-1]}"


# -- against noise on the tokens ------------------------------------------------------------------------------------


def noise_curve(
    batches: Iterable[Rows], reconstruct_noisy: Callable[[Tensor, Sequence[float], Sequence[str]], Iterable[Tensor]], sigmas: Sequence[float]
) -> tuple[list[tuple[float, float, int]], Columns]:
    """(sigma, mean PSNR in dB, images) for each strength of the noise on the tokens, over the images of all ranks; and the PSNR of each image.

    `reconstruct_noisy(images, sigmas, keys)` gives the images rebuilt at each sigma, and draws a row's noise from its key, so that no batch and no rank
    shows in the curve.

    Raises:
        ValueError: no images, or no sigma, or one that is negative or not finite.
    """
    if not sigmas or not all(0 <= sigma < float("inf") for sigma in sigmas):
        raise ValueError(f"sigmas {list(sigmas)} cannot be measured; give one or more finite numbers, each at least 0")
    here: list[int] = []
    scores = [torch.zeros(0, len(sigmas), dtype=torch.float64)]
    with distributed.together(), torch.no_grad():
        for indices, keys, images in batches:
            rebuilt = reconstruct_noisy(images, sigmas, keys)
            scores.append(torch.stack([psnr(images, images_hat.to(images.device)).double().cpu() for images_hat in rebuilt], 1))
            here += [int(i) for i in indices]
    places = distributed.gather_rows(torch.tensor(here, dtype=torch.long))
    if not len(places):
        raise ValueError("no images to evaluate on")
    order = places.argsort()
    table = distributed.gather_rows(torch.cat(scores))[order]
    columns = {f"psnr, sigma {sigma:g}": Column(places[order].tolist(), table[:, i].tolist()) for i, sigma in enumerate(sigmas)}
    return [(float(sigma), value, len(places)) for sigma, value in zip(sigmas, table.mean(0).tolist(), strict=True)], columns
