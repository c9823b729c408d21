"""Familiarity and calibration against plain formulas, and files that come back as they were."""

import math

import pytest
import torch

from openvision3.data.familiarity import (
    Calibration,
    Familiarity,
    calibration_error,
    caption_confidence,
    fit_logistic,
    fit_sharpness,
    label_confidence,
)

CALIBRATION = Calibration(0.25, ("drawings", "flowers"), (0.5, 2.0, 0.25, -1.0), 0.5, {"openmoji": {"images": 3, "unsure": 0.0}})


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + 1


def test_the_score_is_the_mean_cosine_with_the_three_nearest_training_images():
    training, image = rows(40), rows(1, seed=5)[0]
    cosines = sorted((float(image @ other / image.norm() / other.norm()) for other in training), reverse=True)
    assert float(Familiarity.fit(training).score(image[None])[0]) == pytest.approx(sum(cosines[:3]) / 3, abs=1e-5)


def test_of_many_training_images_evenly_spaced_ones_are_kept():
    training = rows(100)
    assert torch.equal(Familiarity.fit(training, keep=34).known, Familiarity.fit(training[::3]).known)


def test_a_saved_familiarity_gives_the_same_scores_and_judgements(tmp_path):
    known = Familiarity.fit(rows(100))
    known.calibration = CALIBRATION
    known.save(tmp_path / "f.safetensors")
    loaded = Familiarity.load(tmp_path / "f.safetensors")
    assert loaded.calibration == CALIBRATION
    assert torch.allclose(loaded.score(rows(9, 1)), known.score(rows(9, 1)), atol=5e-3)


def test_a_file_that_is_no_familiarity_is_one_clear_line(tmp_path):
    (tmp_path / "f.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"cannot be read: .*write it again with openvision3 calibrate"):
        Familiarity.load(tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match="8 training images are too few"):
        Familiarity.fit(rows(8))


def test_logistic_weights_come_back_from_answers_drawn_with_them():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20_000, 2, generator=generator) * torch.tensor([3.0, 0.5]) + torch.tensor([-1.0, 0.5])
    true = (1.0, 0.7, -2.0)
    chance = torch.sigmoid(true[0] + inputs @ torch.tensor(true[1:]))
    is_right = torch.rand(20_000, generator=generator) < chance
    assert fit_logistic(inputs, is_right) == pytest.approx(true, rel=0.15)
    assert all(map(math.isfinite, fit_logistic(inputs[:50], torch.ones(50, dtype=torch.bool))))


def test_the_sharpness_undoes_logits_that_are_too_large():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 5, generator=generator)
    right = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    assert fit_sharpness((4 * logits).softmax(-1), right) == pytest.approx(0.25, rel=0.1)


def test_confidences_are_the_formulas():
    assert caption_confidence(CALIBRATION, -1.0, -2.0, 0.5) == pytest.approx(1 / (1 + math.exp(2.5)))
    assert label_confidence(CALIBRATION, [0.64, 0.36]) == pytest.approx(0.8 / 1.4)


def test_calibration_error_is_zero_for_true_confidences_and_the_gap_otherwise():
    is_right = torch.tensor([True, False] * 50)
    assert calibration_error(torch.full((100,), 0.5), is_right)[0] == pytest.approx(0, abs=0.11)
    assert calibration_error(torch.full((100,), 0.9), is_right, bins=1) == (pytest.approx(0.4), [(pytest.approx(0.9), 0.5, 100)])
