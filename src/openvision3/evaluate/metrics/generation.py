"""Scores of drawn images: gFID, sFID, Inception Score, precision and recall as guided diffusion's (ADM's) evaluator defines them, and the same
kinds of number, under other names, on networks that are here where Inception's weights are not.

    sets = [SetFeatures(extractor) for extractor in extractors]     # of the samples, and as many of the reference
    for batch in batches: each.add(batch.indices, batch.images)
    numbers, columns, missing = compare(samples.over_ranks(), reference.over_ranks(), where)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from openvision3 import distributed
from openvision3.evaluate.metrics.distances import (
    Statistics,
    frechet_distance,
    frechet_warning,
    inception_score,
    kernel_distance,
    kernel_distance_sample_shares,
    within_manifolds,
)
from openvision3.evaluate.protocol import Number, number
from openvision3.evaluate.statistics import Column, Columns
from openvision3.networks.inception import Extractor, Inception

KEPT = 10_000
"""most reference images whose features are kept, for precision, recall and KID: as many as ADM's reference files hold"""
SPLIT = 5_000
"""images of a part of the Inception Score in ADM's evaluator"""
NEIGHBOURS = 3
"""k of precision and recall"""
ADM = ("gfid", "sfid", "inception_score", "precision", "recall")
"""on Inception's features; on those of another network they carry its name"""


def random_rows(count: int, most: int, seed: int) -> list[int]:
    """`most` of `count` rows, or all where there are fewer, in order: a function of the two and the seed."""
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].tolist())


class SetFeatures:
    """What one network makes of a set of images: statistics of all, and the features of those in `keep` (None: of all).

    `nearest` see the features of every image, too.
    """

    def __init__(self, extractor: Extractor, keep: Collection[int] | None = None, nearest: Sequence[Nearest] = ()):
        self.extractor, self.keep, self.nearest = extractor, keep, nearest
        self.statistics: Statistics | None = Statistics(extractor.width)
        self.spatial: Statistics | None = Statistics(extractor.spatial_width) if isinstance(extractor, Inception) else None
        self.count = 0
        self.indices: list[int] = []
        """of the images whose features are kept"""
        self.rows = torch.zeros(0, extractor.width)
        self.logits: Tensor | None = None
        """(n, classes) of the kept images, from Inception"""
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, indices: Sequence[int], images: Tensor) -> None:
        """Images (B, 3, H, W) in [-1, 1] and their indices; each index comes once, on one rank."""
        logits = images.new_zeros(len(images), 0)
        assert self.statistics is not None
        if isinstance(self.extractor, Inception):
            features = self.extractor.features(images)
            pool, logits = features.pool.cpu(), features.logits.cpu()
            assert self.spatial is not None
            self.spatial.add(features.spatial)
        else:
            pool = self.extractor(images).float().cpu()
        self.statistics.add(pool)
        for one in self.nearest:
            one.add(indices, pool)
        kept = [row for row, index in enumerate(indices) if self.keep is None or index in self.keep]
        self.indices += [indices[row] for row in kept]
        self._parts.append((pool[kept], logits[kept]))

    def over_ranks(self) -> SetFeatures:
        """The features of all ranks' images in the order of their indices, on every rank."""
        whole = SetFeatures(self.extractor, self.keep, self.nearest)
        assert self.statistics is not None
        whole.statistics = self.statistics.over_ranks()
        whole.spatial = self.spatial.over_ranks() if self.spatial is not None else None
        whole.count = whole.statistics.count or 0
        classes = max([0, *distributed.gather_objects(max([0, *(logits.shape[1] for _, logits in self._parts)]))])
        indices = distributed.gather_rows(torch.tensor(self.indices, dtype=torch.long))
        rows = distributed.gather_rows(torch.cat([torch.zeros(0, self.extractor.width), *(pool for pool, _ in self._parts)]))
        logits = distributed.gather_rows(torch.cat([torch.zeros(0, classes), *(logits for _, logits in self._parts)]))
        order = indices.argsort()
        whole.indices, whole.rows = indices[order].tolist(), rows[order]
        whole.logits = logits[order] if classes else None
        return whole


class Nearest:
    """The images most like some samples, by the cosine of their features, kept while the images come by."""

    def __init__(self, samples: Tensor, count: int = 4):
        self.samples, self.count = F.normalize(samples.float(), dim=1), count
        self.cosines = torch.full((len(samples), count), -torch.inf)
        self.indices = torch.full((len(samples), count), -1)
        """(samples, count) of the images, the most similar first; -1 where there are fewer"""

    def add(self, indices: Sequence[int], features: Tensor) -> None:
        cosines = self.samples @ F.normalize(features.float(), dim=1).T
        self._merge(cosines, torch.tensor(indices, dtype=torch.long).expand(len(self.samples), -1))

    def _merge(self, cosines: Tensor, indices: Tensor) -> None:
        cosines, indices = torch.cat([self.cosines, cosines], 1), torch.cat([self.indices, indices], 1)
        self.cosines, places = cosines.topk(self.count, dim=1)
        self.indices = indices.gather(1, places)

    def over_ranks(self) -> Nearest:
        whole = Nearest(self.samples, self.count)
        for cosines, indices in distributed.gather_objects((self.cosines, self.indices)):
            whole._merge(cosines, indices)
        return whole


def names(extractor: Extractor) -> tuple[str, str, str, str]:
    """What Frechet distance, precision, recall and KID on its features are called."""
    on = f"on {extractor.name} features"
    return ("gfid", "precision", "recall", f"KID {on}") if isinstance(extractor, Inception) else (f"FID {on}", f"precision {on}", f"recall {on}", f"KID {on}")


Compared = tuple[list[Number], Columns, list[tuple[str, str]]]


def compare(samples: SetFeatures, reference: SetFeatures, where: str, seed: int = 0, device: str = "cpu") -> Compared:
    """Numbers of the samples against the reference; the scores of single images; (metric, what it needs) for what could not be computed.

    Features of the samples are all kept. The reference may have statistics without features, or features without statistics, as ADM's files can.
    `where` says which images, and goes into every number. The columns of recall hold the indices of the reference.
    """
    extractor = samples.extractor
    fid, precision, recall, kid_name = names(extractor)
    count, kept = len(samples.rows), len(reference.rows)
    numbers: list[Number] = []
    columns: Columns = {}
    missing: list[tuple[str, str]] = []
    where = f"{extractor.preparation}; {where}"

    def add(metric: str, value: float, how: str, spread: float | None = None, used: int = count) -> None:
        numbers.append(number(metric, value, used, f"{how}; {where}", network=extractor.name, network_sha256=extractor.sha256, spread=spread))

    def frechet(metric: str, ours: Statistics | None, theirs: Statistics | None, features: str) -> None:
        if ours is None or theirs is None:
            missing.append((metric, f"statistics of {features} in the reference file, or reference images"))
            return
        try:
            value = frechet_distance(ours, theirs)
        except ValueError as error:  # fewer than two images
            missing.append((metric, str(error)))
            return
        against = f"{theirs.count:,} reference images" if theirs.count is not None else "a reference file"
        few = frechet_warning(min(count, theirs.count or count), len(ours.mean))
        add(metric, value, f"Frechet distance on {features}, against the statistics of {against}{few}")

    frechet(fid, samples.statistics, reference.statistics, "pool_3" if isinstance(extractor, Inception) else "its features")
    if isinstance(extractor, Inception):
        frechet("sfid", samples.spatial, reference.spatial, "mixed_6/conv (17 x 17 x 7)")
        assert samples.logits is not None
        splits = -(-count // SPLIT)
        value, spread = inception_score(samples.logits, splits)
        add("inception_score", value, f"Inception Score over {splits} parts in the order of the samples (spread: standard deviation over parts)", spread)
    if min(count, kept) <= NEIGHBOURS:
        what = f"more than {NEIGHBOURS} images on each side, not {count} samples and {kept} reference images"
        missing += [(metric, what) for metric in (precision, recall, kid_name)]
        return numbers, columns, missing
    near = [side.cpu().double() for side in within_manifolds(reference.rows.to(device), samples.rows.to(device), NEIGHBOURS)]
    balls = f"within the ball of some {{}} up to its neighbour number {NEIGHBOURS}, {count:,} samples and {kept:,} reference images"
    add(precision, float(near[0].mean()), "share of samples " + balls.format("reference image"))
    add(recall, float(near[1].mean()), "share of reference images " + balls.format("sample"), used=kept)
    columns |= {precision: Column(samples.indices, near[0].tolist()), recall: Column(reference.indices, near[1].tolist())}
    chosen = random_rows(count, KEPT, seed)
    theirs, ours = reference.rows.to(device), samples.rows[chosen].to(device)
    kid = kernel_distance(theirs, ours, seed=seed)
    first = f"{len(chosen):,} samples" + (f", a random choice of {count:,}," if len(chosen) < count else "")
    how = (
        f"unbiased squared MMD, kernel (x.y/d + 1)^3, of {first} and {kept:,} reference images, which the interval holds fixed "
        f"(spread: standard deviation over {kid.subsets} subsets of {kid.size})"
    )
    add(kid_name, kid.value, how, kid.spread, len(chosen))
    columns[kid_name] = Column([samples.indices[row] for row in chosen], kernel_distance_sample_shares(theirs, ours).cpu().tolist())
    return numbers, columns, missing
