"""k-NN against a plain loop, the linear probe against its optimality condition and Newton's method."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openvision3.evaluate.metrics import probe
from openvision3.evaluate.metrics.probe import evaluate_knn, evaluate_linear_probe, fit, gradient, held_out, objective, standard
from openvision3.evaluate.protocol import values

NAMES = ["a", "b", "c"]


def clusters(count: int, seed: int, spread: float = 1.0, width: int = 6) -> tuple[torch.Tensor, list[int]]:
    """Points around one centre a class, in three classes of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 0, 0, 1, 1, 2])[torch.randint(0, 6, (count,), generator=generator)]
    centres = torch.randn(3, width, generator=torch.Generator().manual_seed(99))
    return centres[labels] + spread * torch.randn(count, width, generator=generator), labels.tolist()


# -- nearest neighbours -----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 25), st.integers(1, 5), st.sampled_from([0.07, 1.0]), st.integers(0, 1000), st.sampled_from([1, 60, 2**24]))
def test_knn_is_that_of_a_plain_loop_whatever_the_chunk(count, k, temperature, seed, at_once):
    train, train_labels = clusters(count, seed)
    test, test_labels = clusters(9, seed + 1)
    right = []
    for row, label in zip(test.tolist(), test_labels, strict=True):
        scored = []
        for place, other in enumerate(train.tolist()):
            dot = sum(a * b for a, b in zip(row, other, strict=True))
            scored.append((-dot / math.hypot(*row) / math.hypot(*other), place))
        votes = dict.fromkeys(range(3), 0.0)
        for score, place in sorted(scored)[:k]:
            votes[train_labels[place]] += math.exp(-score / temperature)
        right.append(max(votes, key=votes.__getitem__) == label)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "SCORES_AT_ONCE", at_once)
        numbers = evaluate_knn(train, train_labels, test, test_labels, NAMES, k, temperature)
    found = values(numbers)
    assert found["top_1"] == pytest.approx(np.mean(right))
    per_class = [np.mean([r for r, true in zip(right, test_labels, strict=True) if true == i]) for i in sorted(set(test_labels))]
    assert found["mean_class_accuracy"] == pytest.approx(np.mean(per_class))
    assert found["largest_class_share"] == max(map(test_labels.count, range(3))) / 9


def test_of_equally_near_ones_the_earlier_are_neighbours():
    scores = torch.tensor([[1.0, 2.0, 1.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert probe._nearest(scores, 3).tolist() == [[0, 1, 3], [0, 1, 2]]


def test_knn_says_what_it_was_measured_with():
    train, labels = clusters(30, 0)
    how = {n.metric: n.how for n in evaluate_knn(train, labels, *clusters(5, 1), NAMES)}["top_1"]
    assert all(told in how for told in ("20 nearest of 30 training images", "cosine / 0.07", "3 classes"))


def test_features_that_say_nothing_score_as_one_class():
    train, labels = clusters(40, 0)
    test, test_labels = clusters(60, 1)
    found = values(evaluate_knn(torch.ones_like(train), labels, torch.ones_like(test), test_labels, NAMES))
    assert found["top_1"] in {test_labels.count(i) / 60 for i in range(3)} and found["top_1"] <= found["largest_class_share"]
    found = values(evaluate_linear_probe(torch.ones_like(train), labels, torch.ones_like(test), test_labels, NAMES))
    assert found["top_1"] <= found["largest_class_share"]


# -- the linear probe -------------------------------------------------------------------------------------------------


def newton(features: np.ndarray, labels: list[int], classes: int, l2: float) -> np.ndarray:
    """The minimum of the same objective by Newton's method with its full Hessian, in numpy: (F + 1, C), the bias last.

    Equal biases for all classes change nothing, so that the Hessian is singular there: least squares gives the smallest step.
    """
    n, width = features.shape
    x, y = np.hstack([features, np.ones((n, 1))]), np.eye(classes)[labels]
    penalty = np.diag(np.repeat([*[l2] * width, 0.0], classes))
    weight = np.zeros((width + 1, classes))
    for _ in range(50):
        logits = x @ weight
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        slope = (x.T @ (p - y) / n).ravel() + penalty @ weight.ravel()
        curvature = penalty + sum(np.kron(np.outer(row, row), np.diag(q) - np.outer(q, q)) for row, q in zip(x, p, strict=True)) / n
        step = np.linalg.lstsq(curvature, slope, rcond=1e-12)[0]
        weight -= step.reshape(weight.shape)
        if abs(step).max() < 1e-12:
            break
    return weight


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_a_fit_is_where_newtons_method_ends(l2):
    features, labels = clusters(40, 0, spread=1.5)
    mean, scale = standard(features.double())
    features, label = (features.double() - mean) / scale, torch.tensor(labels)
    found = fit(features, label, torch.zeros(7, 3, dtype=torch.float64), l2)
    assert gradient(features, label, found, l2).abs().max() <= probe.SMALL, "the optimality condition of a convex problem"
    exact = torch.from_numpy(newton(features.numpy(), labels, 3, l2))
    assert torch.allclose(found[:-1], exact[:-1], atol=1e-7 / l2)
    assert torch.allclose(found[-1] - found[-1].mean(), exact[-1] - exact[-1].mean(), atol=1e-7 / l2)
    assert objective(features, label, found, l2).item() == pytest.approx(objective(features, label, exact, l2).item(), abs=1e-11)


@pytest.mark.parametrize("l2", probe.GRID)
def test_every_fit_of_the_grid_ends_at_its_minimum_from_wherever_it_began(l2):
    """Separable classes, a feature that is always the same and one on another scale: what the grid meets in practice."""
    features, labels = clusters(60, 3, spread=0.1)
    features = torch.cat([features * torch.tensor([1e4, 1, 1, 1, 1, 1e-4]), torch.full((60, 1), 7.0)], 1).double()
    mean, scale = standard(features)
    features, label = (features - mean) / scale, torch.tensor(labels)
    zero = torch.zeros(8, 3, dtype=torch.float64)
    first, second = fit(features, label, zero, l2), fit(features, label, zero + torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), l2)
    for found in (first, second):
        assert gradient(features, label, found, l2).abs().max() <= probe.SMALL
    assert (features @ first[:-1] + first[-1]).argmax(1).equal((features @ second[:-1] + second[-1]).argmax(1))


def test_the_probe_chooses_l2_on_a_fifth_and_fits_all_with_it():
    train, labels = clusters(120, 0, spread=1.6)
    test, test_labels = clusters(200, 1, spread=1.6)
    numbers = evaluate_linear_probe(train, labels, test, test_labels, NAMES)
    chosen = float(re.search(r"L2 ([^,]+)", numbers[0].detail)[1])

    held = held_out(labels)
    mean, scale = standard(train[~held].double())
    inside, outside = (train[~held].double() - mean) / scale, (train[held].double() - mean) / scale
    scores = {}
    for l2 in probe.GRID:
        weight = torch.from_numpy(newton(inside.numpy(), torch.tensor(labels)[~held].tolist(), 3, l2))
        logits = outside @ weight[:-1] + weight[-1]
        truth = torch.tensor(labels)[held]
        scores[l2] = (-(logits.argmax(1) == truth).double().mean().item(), round(torch.nn.functional.cross_entropy(logits, truth).item(), 9))
    assert scores[chosen] == min(scores.values())

    mean, scale = standard(train.double())
    weight = torch.from_numpy(newton(((train.double() - mean) / scale).numpy(), labels, 3, chosen))
    right = ((((test.double() - mean) / scale) @ weight[:-1] + weight[-1]).argmax(1) == torch.tensor(test_labels)).double().mean().item()
    assert values(numbers)["top_1"] == pytest.approx(right) and right > values(numbers)["largest_class_share"]
    assert all(told in numbers[0].how for told in ("standardised features of 120 training images", "3 classes", f"on {int(held.sum())} of them"))


def test_the_probe_does_not_see_the_scale_of_features_and_repeats_itself():
    train, labels = clusters(60, 0, spread=1.5)
    test, test_labels = clusters(60, 1, spread=1.5)
    found = evaluate_linear_probe(train, labels, test, test_labels, NAMES)
    assert found == evaluate_linear_probe(train, labels, test, test_labels, NAMES)
    other = torch.tensor([1000.0, 0.001, 1, 1, 5, 1])
    assert values(evaluate_linear_probe(train * other + 3, labels, test * other + 3, test_labels, NAMES)) == values(found)


def test_a_choice_at_the_edge_of_the_grid_and_a_fit_that_did_not_end_are_said(monkeypatch):
    train, labels = clusters(60, 0, spread=0.1)
    assert "at the edge of the grid" in evaluate_linear_probe(train, labels, train, labels, NAMES, grid=(10.0, 1.0))[0].detail
    monkeypatch.setattr(probe, "MOST", 2)
    assert "not at its end: gradient" in evaluate_linear_probe(train, labels, train, labels, NAMES)[0].detail


@given(st.lists(st.integers(0, 4), max_size=60))
def test_a_fifth_of_each_class_is_held_out(labels):
    held = held_out(labels)
    assert held.equal(held_out(labels)) and len(held) == len(labels)
    for i in set(labels):
        count = labels.count(i)
        assert held[[label == i for label in labels]].sum() == (0 if count == 1 else max(1, count // 5))


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluate", [evaluate_knn, evaluate_linear_probe])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"train_labels": [0, 1]}, "training set: a row and a label are needed for each image; seen features of \\(24, 6\\) and 2 labels"),
        ({"test": torch.zeros(0, 6), "test_labels": []}, "test set: .* 0 labels"),
        ({"test_labels": [0, 1, 5]}, "test set: labels from 0 to 5 do not fit 3 class names"),
        ({"test": torch.full((3, 6), math.inf)}, "test set: 3 of 3 rows hold NaN or infinite numbers"),
        ({"test": torch.zeros(3, 5)}, "training features of width 6 and test features of width 5"),
    ],
)
def test_what_has_no_answer_is_refused(evaluate, change, told):
    train, labels = clusters(24, 0)
    given = {"train": train, "train_labels": labels, "test": torch.zeros(3, 6), "test_labels": [0, 1, 2], "classes": NAMES} | change
    with pytest.raises(ValueError, match=told) as error:
        evaluate(**given)
    assert "\n" not in str(error.value)


def test_options_out_of_range_are_refused():
    train, labels = clusters(12, 0)
    with pytest.raises(ValueError, match="k 20 must be from 1 to the 12 training images"):
        evaluate_knn(train, labels, train, labels, NAMES)
    with pytest.raises(ValueError, match="temperature 0"):
        evaluate_knn(train, labels, train, labels, NAMES, k=3, temperature=0)
    with pytest.raises(ValueError, match="more than 0"):
        evaluate_linear_probe(train, labels, train, labels, NAMES, grid=(0.0, 1.0))
    with pytest.raises(ValueError, match="no class has two training images"):
        evaluate_linear_probe(train[:2], [0, 1], train, labels, NAMES)
