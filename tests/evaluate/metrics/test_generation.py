"""Scores of drawn images, each against its formula written out; networks are replaced by fixed projections of pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openvision3.data.images import to_uint8
from openvision3.evaluate.metrics import generation
from openvision3.evaluate.metrics.distances import Statistics
from openvision3.evaluate.metrics.generation import Nearest, SetFeatures, compare, random_rows
from openvision3.evaluate.statistics import best_first
from openvision3.networks.inception import Inception, InceptionFeatures


class Projections(Inception):
    """In the place of Inception: its features are fixed projections of the pixels."""

    width, spatial_width, sha256, preparation = 5, 4, "1" * 64, "as they are"

    def __init__(self):
        torch.nn.Module.__init__(self)

    def features(self, images):
        pixels = to_uint8(images).float().flatten(1)
        matrix = torch.randn(pixels.shape[1], 16, generator=torch.Generator().manual_seed(0))
        pool, spatial, logits = (pixels @ matrix / 1000).split([5, 4, 7], 1)
        return InceptionFeatures(pool, spatial, logits)


class Other:
    """Another network than Inception."""

    name, width, sha256, preparation = "Other", 5, "2" * 64, "as they are"

    def __call__(self, images):
        return Projections().features(images).pool


def images(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return (torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 1.6 - 1 + shift).clamp(-1, 1)


def seen(pixels: torch.Tensor, extractor=None, chunk: int = 7, order=None, keep=None) -> SetFeatures:
    features = SetFeatures(extractor or Projections(), keep)
    for indices in torch.tensor(order if order is not None else range(len(pixels))).split(chunk):
        features.add(indices.tolist(), pixels[indices])
    return features.over_ranks()


REAL, FAKE = images(30, 0), images(24, 1, 0.3)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The trace of the root of S1 S2 is the sum of the roots of its eigenvalues."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(first @ second).astype(complex)).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second) - 2 * roots.sum())


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def share_within(points: np.ndarray, balls: np.ndarray, k: int = 3) -> np.ndarray:
    radii = [sorted(np.linalg.norm(balls - centre, axis=1))[k] for centre in balls]
    return np.array([any(np.linalg.norm(point - centre) <= radius for centre, radius in zip(balls, radii, strict=True)) for point in points])


def kid(x: np.ndarray, y: np.ndarray) -> float:
    within = [np.mean([(a @ b / 5 + 1) ** 3 for i, a in enumerate(side) for j, b in enumerate(side) if i != j]) for side in (x, y)]
    return float(sum(within) - 2 * np.mean([[(a @ b / 5 + 1) ** 3 for a in x] for b in y]))


def test_every_score_is_the_formula_of_adms_evaluator():
    numbers, columns, missing = compare(seen(FAKE), seen(REAL), "4x4")
    values = {one.metric: one.value for one in numbers}
    (real, real_spatial, _), (fake, fake_spatial, logits) = (
        [part.double().numpy() for part in vars(Projections().features(side)).values()] for side in (REAL, FAKE)
    )
    assert not missing and list(values) == ["gfid", "sfid", "inception_score", "precision", "recall", "KID on Inception-2015 features"]
    assert values["gfid"] == pytest.approx(frechet(real, fake), rel=1e-4)
    assert values["sfid"] == pytest.approx(frechet(real_spatial, fake_spatial), rel=1e-4)
    shares = softmax(logits)
    assert values["inception_score"] == pytest.approx(np.exp((shares * (np.log(shares) - np.log(shares.mean(0)))).sum(1).mean()), rel=1e-5)
    assert values["precision"] == share_within(fake, real).mean() and values["recall"] == share_within(real, fake).mean()
    assert columns["precision"].values == share_within(fake, real).tolist() and columns["recall"].values == share_within(real, fake).tolist()
    assert values["KID on Inception-2015 features"] == pytest.approx(kid(real, fake), rel=1e-4)
    assert np.mean(columns["KID on Inception-2015 features"].values) == pytest.approx(kid(real, fake), rel=1e-4)
    assert {one.count for one in numbers if one.metric != "recall"} == {24} and all("4x4" in one.how and one.network_sha256 for one in numbers)


def test_the_inception_score_has_parts_of_5000_in_the_order_of_the_samples(monkeypatch):
    monkeypatch.setattr(generation, "SPLIT", 8)
    [score] = [one for one in compare(seen(FAKE), seen(REAL), "")[0] if one.metric == "inception_score"]
    parts = [softmax(Projections().features(part).logits.double().numpy()) for part in FAKE.split(8)]
    scores = [np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()) for p in parts]
    assert (score.value, score.spread) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-5) and "over 3 parts" in score.how


def test_scores_on_another_network_carry_its_name_and_never_the_published_ones():
    numbers, _, _ = compare(seen(FAKE, Other()), seen(REAL, Other()), "")
    assert [one.metric for one in numbers] == [f"{what} on Other features" for what in ("FID", "precision", "recall", "KID")]


def test_features_do_not_depend_on_order_or_batches():
    order = torch.randperm(24, generator=torch.Generator().manual_seed(5)).tolist()
    one, other = seen(FAKE), seen(FAKE, chunk=1, order=order)
    assert one.indices == other.indices
    for ours, theirs in ((one.rows, other.rows), (one.logits, other.logits)):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(one.statistics.covariance, other.statistics.covariance, rtol=1e-5, atol=1e-5)


def test_statistics_are_of_all_images_and_features_of_those_that_are_kept():
    features = seen(REAL, keep={3, 20, 4})
    assert features.count == 30 and features.indices == [3, 4, 20] and torch.allclose(features.rows, seen(REAL).rows[[3, 4, 20]])


def test_a_reference_of_statistics_alone_leaves_out_what_needs_images_and_says_so():
    reference = SetFeatures(Projections())
    reference.statistics, reference.spatial = Statistics.of(seen(REAL).rows), None
    numbers, columns, missing = compare(seen(FAKE), reference, "")
    assert [one.metric for one in numbers] == ["gfid", "inception_score"] and not columns
    assert numbers[0].value == pytest.approx(compare(seen(FAKE), seen(REAL), "")[0][0].value, rel=1e-6)
    needs = dict(missing)
    assert needs.keys() == {"sfid", "precision", "recall", "KID on Inception-2015 features"}
    assert "in the reference file" in needs["sfid"] and "0 reference images" in needs["recall"]


def test_few_samples_are_told_of():
    numbers, _, missing = compare(seen(FAKE[:3]), seen(REAL), "")
    assert "mostly bias" in numbers[0].how and "precision" in dict(missing)
    assert dict(compare(seen(FAKE[:1]), seen(REAL), "")[2])["gfid"].startswith("statistics of 1 and 30")


def test_small_distances_large_scores_and_few_copies_are_the_best():
    best = {metric: best_first(metric, {"small": 1.0, "large": 2.0})[0] for metric in (*generation.ADM, "FID on Other features", "near_duplicates")}
    assert [metric for metric, model in best.items() if model == "large"] == ["inception_score", "precision", "recall"]


def test_a_random_choice_is_a_function_of_count_and_seed_and_not_periodic():
    rows = random_rows(1000, 100, 0)
    assert rows == random_rows(1000, 100, 0) == sorted(set(rows)) and len(rows) == 100 and rows != random_rows(1000, 100, 1)
    assert len({row % 10 for row in rows}) == 10, "labels in turn: every class is among the chosen"
    assert random_rows(5, 100, 0) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("chunk", [1, 4, 30])
def test_the_nearest_images_are_those_of_the_largest_cosines(chunk):
    real, fake = seen(REAL).rows, seen(FAKE[:3]).rows
    nearest = Nearest(fake, 4)
    for indices in torch.arange(30).split(chunk):
        nearest.add(indices.tolist(), real[indices])
    cosines = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in real.numpy()] for a in fake.numpy()])
    whole = nearest.over_ranks()
    assert whole.indices.tolist() == np.argsort(-cosines, axis=1)[:, :4].tolist()
    assert whole.cosines.numpy() == pytest.approx(np.sort(cosines, axis=1)[:, ::-1][:, :4], abs=1e-6)
    few = Nearest(fake, 4)
    few.add([8, 9], real[:2])
    assert set(few.indices[0].tolist()) == {8, 9, -1}
