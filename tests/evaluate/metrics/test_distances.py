"""Sets of features and distances between them, each against its formula written out or an independent library."""

from __future__ import annotations

import math
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openvision3.evaluate.metrics.distances import (
    Statistics,
    frechet_distance,
    frechet_warning,
    inception_score,
    kernel_distance,
    kernel_distance_sample_shares,
    precision_recall,
)


def pictures(count: int, height: int = 64, width: int = 80, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(-1, 1)


def vectors(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- statistics -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=8), st.integers(0, 1000), st.floats(-100, 100))
def test_statistics_do_not_depend_on_chunks_or_order(chunks, seed, offset):
    rows = vectors(sum(chunks), 4, seed) + offset
    found = Statistics(4)
    for part in rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))].split(chunks):
        found.add(part)
    assert found.count == len(rows)
    if len(rows) > 0:
        torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-10, atol=1e-10)
    if len(rows) > 1:
        torch.testing.assert_close(found.covariance, rows.T.cov(), rtol=1e-10, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 100))
def test_merged_statistics_are_those_of_all(first, second, seed):
    rows = vectors(first + second, 3, seed) * 5 + 20
    merged, whole = Statistics.of(rows[:first]), Statistics.of(rows)
    merged.merge(Statistics.of(rows[first:]))
    assert merged.count == whole.count
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-10, atol=1e-10)


def test_statistics_refuse_what_does_not_fit():
    found = Statistics(3)
    with pytest.raises(ValueError, match="width 3"):
        found.add(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="not finite"):
        found.add(torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match="width 4"):
        found.merge(Statistics(4))


def test_statistics_come_back_from_a_file_as_they_went(tmp_path):
    whole = Statistics.of(vectors(9, 4))
    whole.save(tmp_path / "s.npz")
    back = Statistics.load(tmp_path / "s.npz")
    assert back.count == 9 and torch.equal(back.mean, whole.mean)
    torch.testing.assert_close(back.covariance, whole.covariance, rtol=1e-14, atol=1e-14)
    with np.load(tmp_path / "s.npz") as file:  # as ADM's evaluator reads it
        assert np.allclose(file["mu"], whole.mean) and np.allclose(file["sigma"], np.cov(vectors(9, 4).numpy(), rowvar=False))


def test_an_adm_file_gives_statistics_to_compare_with_but_not_to_add_to(tmp_path):
    rows = vectors(50, 4)
    np.savez(tmp_path / "adm.npz", mu_s=rows.mean(0).numpy().astype(np.float32), sigma_s=rows.T.cov().numpy())
    found = Statistics.load(tmp_path / "adm.npz", ("mu_s", "sigma_s"))
    assert found.count is None and frechet_distance(found, Statistics.of(rows)) < 1e-6
    with pytest.raises(ValueError, match="does not give their count"):
        found.add(rows)
    with pytest.raises(ValueError, match="does not give their count"):
        Statistics(4).merge(found)


def test_files_that_hold_no_statistics_are_one_line(tmp_path):
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.zeros((1, 1)))
    np.savez(tmp_path / "other.npz", other=np.zeros(3))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    (tmp_path / "garbage.npz").write_bytes(b"PK\x03\x04 not an archive")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "nan.npz", mu=np.zeros(2), sigma=np.full((2, 2), np.nan))
    np.savez(tmp_path / "negative.npz", mu=np.zeros(2), sigma=-np.eye(2))
    np.savez(tmp_path / "complex.npz", mu=np.zeros(2, complex), sigma=np.eye(2))
    for name in ("pickled.npz", "other.npz", "shapes.npz", "garbage.npz", "empty.npz", "array.npy", "nan.npz", "negative.npz", "complex.npz"):
        with pytest.raises(ValueError, match=name) as caught:
            Statistics.load(tmp_path / name)
        assert "\n" not in str(caught.value), name
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        Statistics.load(tmp_path / "nowhere.npz")


def test_statistics_of_another_width_are_refused_before_they_are_read(tmp_path):
    """A covariance of 200,000 x 200,000 would not fit into the memory; here its values are not even in the file."""
    with zipfile.ZipFile(tmp_path / "large.npz", "w") as archive:
        for name, shape in (("mu", (200_000,)), ("sigma", (200_000, 200_000))):
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": shape})
    with pytest.raises(ValueError, match=r"large\.npz does not hold mu and sigma .*: they are of features of width 200000, not 2048"):
        Statistics.load(tmp_path / "large.npz", width=2048)


# -- Frechet --------------------------------------------------------------------------------------------------------


def gaussian(mean: torch.Tensor, covariance: torch.Tensor) -> Statistics:
    found = Statistics(len(mean))
    found.count, found.mean, found.scatter = None, mean.double(), covariance.double()
    return found


def test_the_frechet_distance_of_axis_aligned_gaussians_has_a_closed_form():
    first, second = torch.tensor([1.0, 4.0, 9.0, 0.0]), torch.tensor([4.0, 1.0, 0.0, 0.0])
    found = frechet_distance(gaussian(torch.zeros(4), first.diag()), gaussian(torch.tensor([1.0, 2.0, 0.0, 2.0]), second.diag()))
    assert found == pytest.approx(9 + (1 - 2) ** 2 + (2 - 1) ** 2 + 9, rel=1e-12)


def test_the_frechet_distance_of_rotated_gaussians_is_that_of_the_unrotated():
    turn = torch.linalg.qr(vectors(4, 4)).Q
    first, second = torch.tensor([1.0, 4.0, 9.0, 0.0]).double().diag(), torch.tensor([4.0, 1.0, 0.0, 0.0]).double().diag()
    found = frechet_distance(gaussian(torch.zeros(4), turn @ first @ turn.T), gaussian(torch.zeros(4), turn @ second @ turn.T))
    assert found == pytest.approx(11, rel=1e-10)


class Given(torch.nn.Module):
    """An extractor for torchmetrics that hands on what it is given."""

    num_features = 12

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("counts", [(200, 150), (8, 10)])
def test_the_frechet_distance_is_that_of_torchmetrics(counts):
    image = pytest.importorskip("torchmetrics.image.fid")
    mixing = vectors(12, 12, 5)
    a, b = vectors(counts[0], 12) @ mixing, vectors(counts[1], 12, 1) * 1.5 + 0.3
    theirs = image.FrechetInceptionDistance(feature=Given(), normalize=False).set_dtype(torch.float64)
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    expected = float(theirs.compute())
    assert frechet_distance(Statistics.of(a), Statistics.of(b)) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(Statistics.of(b), Statistics.of(a)) == pytest.approx(expected, rel=1e-4)


def test_a_set_has_no_frechet_distance_to_itself_even_with_fewer_rows_than_dimensions():
    found = Statistics.of(vectors(6, 200) * 10)
    assert frechet_distance(found, found) == pytest.approx(0, abs=1e-6)
    constant = Statistics.of(torch.ones(3, 4))
    assert frechet_distance(constant, constant) == 0


def test_frechet_refuses_and_warns():
    with pytest.raises(ValueError, match="width 3 and 4"):
        frechet_distance(Statistics.of(vectors(5, 3)), Statistics.of(vectors(5, 4)))
    with pytest.raises(ValueError, match="1 and 5 images"):
        frechet_distance(Statistics.of(vectors(1, 3)), Statistics.of(vectors(5, 3)))
    assert "mostly bias" in frechet_warning(2048, 2048) and frechet_warning(50_000, 2048) == ""


# -- kernel ---------------------------------------------------------------------------------------------------------


def kernel_by_loops(x, y, paired):
    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    x, y = x.tolist(), y.tolist()
    within = sum(sum(kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j) / (len(s) * (len(s) - 1)) for s in (x, y))
    pairs = [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(y) if not paired or i != j]
    return within - 2 * sum(pairs) / len(pairs)


@pytest.mark.parametrize("rows, paired", [((7, 5), False), ((6, 6), False), ((6, 6), True)])
def test_the_kernel_distance_is_that_of_plain_loops(rows, paired):
    x, y = vectors(rows[0], 4), vectors(rows[1], 4, 1) + 0.2
    assert kernel_distance(x, y, paired=paired).value == pytest.approx(kernel_by_loops(x, y, paired), rel=1e-10)


def test_what_samples_add_to_a_kernel_distance_is_its_jackknife_over_them():
    x, y = vectors(7, 4), vectors(6, 4, 1) + 0.2
    whole, shares = kernel_distance(x, y).value, kernel_distance_sample_shares(x, y, chunk=4)
    assert float(shares.mean()) == pytest.approx(whole, rel=1e-10)
    for row in range(len(y)):
        without = kernel_by_loops(x, torch.cat([y[:row], y[row + 1 :]]), False)
        assert float(shares[row]) == pytest.approx(6 * whole - 5 * without, rel=1e-9)


def test_the_kernel_distance_is_that_of_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = vectors(1500, 16), vectors(1500, 16, 1) * 1.2
    assert kernel_distance(x, y, subsets=1).value == pytest.approx(float(kid.poly_mmd(x, y)), rel=1e-8)


def test_subsets_are_drawn_by_the_seed_and_tell_the_spread():
    x, y = vectors(300, 8), vectors(300, 8, 1) + 0.5
    found = kernel_distance(x, y, subsets=40, size=50)
    assert found == kernel_distance(x, y, subsets=40, size=50) != kernel_distance(x, y, subsets=40, size=50, seed=1)
    assert (found.subsets, found.size) == (40, 50) and found.spread > 0
    assert abs(found.mean - found.value) < 4 * found.spread / math.sqrt(40) + 0.05
    assert kernel_distance(x[:7], y[:9]).size == 3


def test_samples_of_one_distribution_have_a_kernel_distance_about_zero():
    found = kernel_distance(vectors(400, 8), vectors(400, 8, 1), subsets=50, size=100)
    assert abs(found.mean) < 2 * found.spread and abs(found.value) < found.spread


def test_kernel_distance_refuses_what_cannot_be_compared():
    for x, y, paired, told in (
        (vectors(3, 2), vectors(3, 4), False, "cannot be compared"),
        (vectors(1, 2), vectors(3, 2), False, "at least 2"),
        (vectors(2, 2), vectors(3, 2), True, "as many on both"),
    ):
        with pytest.raises(ValueError, match=told):
            kernel_distance(x, y, paired=paired)


# -- precision and recall -------------------------------------------------------------------------------------------


def precision_recall_by_loops(real, fake, k):
    def covered(points, manifold):
        radii = [sorted(math.dist(a, b) for j, b in enumerate(manifold) if j != i)[k - 1] for i, a in enumerate(manifold)]
        return sum(any(math.dist(p, m) <= r for m, r in zip(manifold, radii, strict=True)) for p in points) / len(points)

    return covered(fake, real), covered(real, fake)


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 30), st.integers(5, 30), st.integers(1, 4), st.floats(0, 3), st.integers(0, 100), st.sampled_from([1, 4, 1000]))
def test_precision_and_recall_are_those_of_plain_loops(n, m, k, shift, seed, chunk):
    real, fake = vectors(n, 3, seed), vectors(m, 3, seed + 1) * 0.8 + shift
    assert precision_recall(real, fake, k, chunk) == pytest.approx(precision_recall_by_loops(real.tolist(), fake.tolist(), k))


def test_precision_falls_with_strays_and_recall_with_a_missing_mode():
    left, right = vectors(40, 2), vectors(40, 2, 1) + 100
    both = torch.cat([left, right])
    assert precision_recall(both, both) == (1, 1)
    assert precision_recall(both, left) == (1, 0.5)
    assert precision_recall(left, both) == (0.5, 1)
    assert precision_recall(left, right) == (0, 0)


def test_features_far_from_the_origin_lose_no_neighbours_in_fp32():
    real, fake = vectors(60, 4), vectors(60, 4, 1)
    assert precision_recall((real + 1000).float(), (fake + 1000).float()) == pytest.approx(precision_recall(real, fake), abs=0.02)


def test_precision_and_recall_refuse_too_few_samples():
    with pytest.raises(ValueError, match="at least 4 are needed"):
        precision_recall(vectors(3, 2), vectors(9, 2))
    with pytest.raises(ValueError, match="cannot be compared"):
        precision_recall(vectors(9, 2), vectors(9, 3))


# -- inception score ------------------------------------------------------------------------------------------------


def test_the_inception_score_is_1_for_one_class_and_their_number_for_all_of_them():
    assert inception_score(torch.zeros(20, 7))[0] == pytest.approx(1)
    assert inception_score(torch.tensor([[50.0, 0, 0]]).repeat(20, 1)) == pytest.approx((1, 0), abs=1e-9)
    sharp = (torch.eye(5) * 1e4).repeat(4, 1)
    assert inception_score(sharp, splits=2) == pytest.approx((5, 0), abs=1e-6)


def test_the_inception_score_is_its_formula():
    logits = vectors(30, 6)
    scores = []
    for part in logits.softmax(1).split(10):
        marginal = part.mean(0)
        scores.append(math.exp(sum(float(p * math.log(p / q)) for row in part for p, q in zip(row, marginal, strict=True)) / 10))
    assert inception_score(logits, 3) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)
    with pytest.raises(ValueError, match="3 images cannot be split into 10"):
        inception_score(logits[:3])
