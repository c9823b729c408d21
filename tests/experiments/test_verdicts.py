"""Verdicts of levers: what is kept, what is lost, and which forks are joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from openvision3.experiments.ablations import WITHOUT_LEVERS, Fork, Parent, levers, levers_together
from openvision3.experiments.verdicts import Verdict, choose_levers, format_markdown, judge_fork, score, write_section
from openvision3.train.recipes import RECIPES

PARENT = {"PSNR": 20.0, "KID": 0.3, "image to text R@1": 0.2, "text to image R@1": 0.3, "flow loss": 1.0}
NOISE = (0.00, 0.01, -0.01)


def values(changes: dict[str, float], noise: Sequence[float] = NOISE) -> dict[int, dict[str, float]]:
    """Runs of three seeds on two sets: the parent's numbers and these changes, the same in every seed but for small noise."""
    runs = {}
    for seed, apart in enumerate(noise):
        of = {name: value + changes.get(name, 0.0) * (1 + apart) for name, value in PARENT.items()}
        runs[seed] = {
            f"{name_of_set}: {name}": value for name_of_set in ("unseen style", "unseen concept") for name, value in of.items() if name != "flow loss"
        }
        runs[seed]["flow loss"] = of["flow loss"]
    return runs


def judge(changes: dict[str, float], noise: Sequence[float] = NOISE, label: str = "lever", fields: Sequence[str] = ("ema",)) -> Verdict:
    verdict = judge_fork(Fork(label, dict.fromkeys(fields, 1)), values(changes, noise), values({}, noise))
    assert verdict is not None
    return verdict


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "not kept: wins nothing"),
        ({"PSNR": 1.0}, "kept: wins reconstruction"),
        ({"KID": -0.1}, "kept: wins reconstruction"),
        ({"KID": 0.1}, "not kept: loses reconstruction"),
        ({"flow loss": -0.2, "image to text R@1": 0.1}, "kept: wins understanding, drawability"),
        ({"flow loss": 0.2, "PSNR": 1.0}, "not kept: loses drawability, wins reconstruction"),
        ({"PSNR": 1.0, "KID": 0.1}, "not kept: loses reconstruction"),
    ],
)
def test_a_lever_is_kept_when_it_wins_an_axis_and_loses_none(changes, says):
    verdict = judge(changes)
    assert verdict.says == says and verdict.is_kept == says.startswith("kept")


def test_what_chance_can_explain_and_one_seed_decide_nothing():
    assert judge({"PSNR": 0.5}, (0.0, 2.0, -4.0)).says == "not kept: wins nothing"
    one = judge({"PSNR": 5.0}, (0.0,))
    assert one.says == "not kept: wins nothing" and "one seed" in str(one.scores[0]) and one.record()["scores"][0]["low"] is None


def test_runs_that_were_measured_on_other_sets_are_not_compared():
    parent, fork = values({}), values({"PSNR": 1.0})
    parent[0]["third: PSNR"] = 99.0
    verdict = judge_fork(Fork("lever", {"ema": 1}), fork, parent)
    assert verdict is not None and list(verdict.seeds) == [1, 2] and 0.9 < verdict.scores[0].over.difference < 1.1


def test_a_score_is_the_mean_over_sets_and_absent_where_it_was_not_measured():
    run = values({})[0] | {"flowers: zero-shot": 0.9, "flowers: linear probe": 0.8}
    assert score(run, "R@1, zero-shot and probe, %") == pytest.approx((2 * 0.2 + 2 * 0.3 + 0.9 + 0.8) / 6)
    assert score({"flow loss": 1.0}, "PSNR, dB") is None


def test_precision_is_no_score_where_recall_is_zero():
    one = {"held out: KID of drawings": 0.2, "held out: precision": 0.9, "held out: recall": 0.0}
    assert score(one, "precision, %") is None and score(one, "recall, %") == 0
    assert score(one | {"held out: recall": 0.1}, "precision, %") == 0.9
    fork, parent = {0: one, 1: one}, {0: one | {"held out: precision": 0.1}, 1: one | {"held out: precision": 0.11}}
    verdict = judge_fork(Fork("fork", {}), fork, parent)
    assert verdict is not None and [test.what for test in verdict.scores] == ["KID of drawings x 1000", "recall, %"]


def test_seeds_that_only_one_side_has_are_left_out():
    verdict = judge_fork(Fork("lever", {"ema": 0.9}), values({"PSNR": 1.0}), {seed: run for seed, run in values({}).items() if seed})
    assert verdict is not None and list(verdict.seeds) == [1, 2]
    assert judge_fork(Fork("lever", {}), {}, values({})) is None


def test_of_forks_that_change_the_same_fields_the_best_kept_one_is_joined():
    weak, strong = judge({"PSNR": 1.0}, label="weak"), judge({"PSNR": 1.0, "flow loss": -0.2}, label="strong")
    other, lost = judge({"KID": -0.1}, label="other", fields=("x", "y")), judge({"KID": 0.1}, label="lost", fields=("z",))
    assert choose_levers([verdict.record() for verdict in (weak, strong, other, lost)]) == ["strong", "other"]


def test_levers_are_judged_against_a_parent_without_those_of_its_recipe_and_joined_though_all_forks_turn_them_off():
    parent = Parent("mini", RECIPES["mini"](), ("sum of the last 2 blocks", "decoder alone at the end"))
    first, *forks = levers(parent).forks
    assert first.changes == WITHOUT_LEVERS and all(fork.equal_compute and set(WITHOUT_LEVERS) <= set(fork.changes) for fork in forks)
    won = [replace(judge({"PSNR": 1.0}), fork=fork).record() for fork in forks if fork.label in parent.levers]
    assert choose_levers(won) == list(parent.levers)
    assert levers_together(parent).forks[1].changes == {"model.encoder.sum_blocks": 2, "decoder_finish": 0.15}


def test_the_section_and_the_docs_table_show_every_measure_and_verdict():
    runs = {"parent": values({}), "lever": values({"PSNR": 1.0})}
    verdict = judge({"PSNR": 1.0})
    page, table = write_section(runs, [verdict]), format_markdown([verdict])
    assert all(name in page for name in ("unseen style: PSNR", "unseen concept: text to image R@1, %", "flow loss", "kept: wins reconstruction", "+1.000"))
    assert table.splitlines()[2].startswith("| lever | +1.000 [") and table.count("\n") == 2
