"""The adversarial stage as a function of the step and of what a run remembers."""

from __future__ import annotations

import pytest

from openvision3.train.adversarial import LEAST, NOT_FINITE, AdversarialConfig, Stage


def stage(memory: dict[str, float] | None = None, **changes) -> Stage:
    """Of 100 steps: the adversarial loss begins at step 30 and has its full weight after 10 steps."""
    return Stage(AdversarialConfig(**{"weight": 0.5, **changes}), 100, {} if memory is None else memory)


def measured(reconstruction: float, adversarial: float, ranks: int = 1) -> dict[str, float]:
    return {"reconstruction_squares": ranks * reconstruction**2, "adversarial_squares": ranks * adversarial**2}


def test_the_adversarial_loss_begins_after_the_warm_up_and_rises():
    memory: dict[str, float] = {}
    stage(memory).remember(20, measured(3.0, 2.0), 1.0, 1)
    factors = [stage(memory).factor(step) for step in range(100)]
    assert factors[:30] == [0.0] * 30
    assert factors[30:41] == pytest.approx([0.75 * n / 10 for n in range(1, 11)] + [0.75])  # 0.5 x 3 / 2
    assert factors[41:] == pytest.approx([0.75] * 59)
    assert stage().runs and not stage(weight=0.0).runs and not stage(weight=0.0).measures(0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_factor_brings_the_mean_norms_to_the_ratio(ranks):
    """Squares come as means over ranks, each of which has computed `ranks` times its share."""
    memory: dict[str, float] = {}
    pairs = [(4.0, 1.0), (2.0, 5.0), (3.0, 3.0)]
    for step, (reconstruction, adversarial) in enumerate(pairs, 20):
        values = measured(reconstruction, adversarial, ranks) | {"pixel": 0.1}
        stage(memory).remember(step, values, 1.0, ranks)
        assert values == {"pixel": 0.1}
    assert stage(memory).factor(99) * sum(b for _, b in pairs) / sum(a for a, _ in pairs) == pytest.approx(0.5)


def test_the_factor_is_clamped_and_zero_before_anything_was_measured():
    memory: dict[str, float] = {}
    assert stage(memory).factor(50) == 0.0 and stage(memory).measures(50) and stage(memory).measures(51)
    stage(memory).remember(20, measured(1.0, 1e-9), 1.0, 1)
    assert stage(memory, largest=7.0).factor(50) == 7.0
    assert not stage(memory).measures(51)
    memory.clear()
    stage(memory).remember(20, measured(1.0, 0.0), 1.0, 1)
    assert stage(memory).factor(50) == 0.0


def test_it_diverges_where_the_reconstruction_loss_stays_above_the_limit():
    memory: dict[str, float] = {}
    for step in range(20, 30):
        stage(memory).remember(step, {}, 0.2, 1)
    for step in range(30, 30 + LEAST):
        assert stage(memory).diverged(0) == ""
        stage(memory).remember(step, {}, 0.29, 1)
    assert stage(memory).diverged(0) == ""  # 1.45 times what it was
    for step in range(30 + LEAST, 60):
        stage(memory).remember(step, {}, 0.32, 1)
    assert stage(memory).diverged(0) == f"the reconstruction loss rose from 0.2 to {(LEAST * 0.29 + (30 - LEAST) * 0.32) / 30:.4g}"


def test_without_a_warm_up_the_first_step_is_what_later_ones_are_compared_with():
    memory: dict[str, float] = {}
    stage(memory, warmup=0.0).remember(0, {}, 0.2, 1)
    for step in range(1, LEAST + 1):
        stage(memory, warmup=0.0).remember(step, {}, 0.9, 1)
    assert stage(memory, warmup=0.0).diverged(0) == "the reconstruction loss rose from 0.2 to 0.9"


def test_it_diverges_after_a_few_steps_that_are_not_finite():
    assert stage().diverged(NOT_FINITE - 1) == "" and stage().diverged(NOT_FINITE) == f"{NOT_FINITE} steps in a row were not finite"


def test_once_ended_it_stays_ended_and_is_recorded():
    memory: dict[str, float] = {}
    stage(memory).remember(20, measured(1.0, 1.0), 1.0, 1)
    assert stage(memory).record(30) == {} and stage(memory).record(31) == {"weight": 0.5, "from_step": 30}
    stage(memory).end(44)
    assert not stage(memory).runs and stage(memory).factor(99) == 0.0
    assert stage(memory).record(99) == {"weight": 0.5, "from_step": 30, "ended_at_step": 44}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"warmup": 1.0}, r"adversarial.warmup 1 must be at least 0 and below 1"),
        ({"limit": 1.0}, r"adversarial.limit 1 must be above 1"),
        ({"weight": -1.0}, r"weight -1.0 must be a number that is not negative"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes, line):
    with pytest.raises(ValueError, match=line):
        AdversarialConfig(**changes)
