"""What cannot be used is counted once, and costs a run no more where it is much."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from openvision3 import distributed
from openvision3.data import problems as module
from openvision3.data.problems import Problem, Problems, count_reasons, reasons_in_words
from openvision3.train import loop as train
from openvision3.train.run_folder import RunFolder, read_skipped


def problem(number: int, reason: str = "too small") -> Problem:
    return {"key": f"shard/{number:09d}", "reason": reason, "detail": f"{number} pixels"}


def test_a_hundred_thousand_problems_are_counted_exactly_and_not_kept_once_handed_over():
    found = Problems()
    for _ in range(2):  # two epochs
        for number in range(100_000):
            found.add(problem(number, "too small" if number % 4 else "truncated"))
            if number % 1000 == 0:
                found.take_new(), found.take_own()
    assert len(found) == 100_000 and found.is_exact
    assert count_reasons(found) == {"too small": 75_000, "truncated": 25_000}
    assert not list(found), "what was handed over is not kept"
    assert reasons_in_words(found) == "75000 too small, 25000 truncated"


def test_a_log_line_writes_down_only_what_is_new(tmp_path):
    run, found, handed = RunFolder(tmp_path), Problems(), []
    whole = found.take_new
    found.take_new = lambda: handed.append(whole()) or handed[-1]  # type: ignore[method-assign,func-returns-value]
    for count in (3, 3, 5, 6):
        for number in range(count):
            found.add(problem(number))
        assert run.list_skipped(found) == count
    run.close()
    assert [len(new) for new in handed] == [3, 0, 2, 1]
    assert list(read_skipped(tmp_path, 99)) == [problem(number) for number in range(6)]


def test_ranks_tell_each_other_only_what_is_new_and_count_a_sample_once(monkeypatch):
    found, handed = Problems(), []
    others = iter([[problem(0), problem(50)], [], [problem(50), problem(51)]])

    def gather(value):
        handed.append(len(value))
        return [value, next(others)]

    monkeypatch.setattr(distributed, "gather_objects", gather)
    for count in (3, 3, 5):
        for number in range(count):
            found.add(problem(number))
        train._Loop._share_problems(SimpleNamespace(batches=SimpleNamespace(problems=found)))  # type: ignore[arg-type]
    assert handed == [3, 0, 2]
    assert found.take_new() == [problem(number) for number in (0, 1, 2, 50, 3, 4, 51)]


def test_what_a_run_had_listed_is_known_and_not_handed_over_again():
    found = Problems(problem(number) for number in range(5))
    for number in range(7):
        found.add(problem(number))
    assert len(found) == 7
    assert found.take_new() == found.take_own() == [problem(5), problem(6)]
    found.add(problem(5, "truncated"))
    assert count_reasons(found) == {"too small": 7, "truncated": 1}, "another reason is another problem"


def test_beyond_the_bound_of_what_is_known_problems_count_each_time_and_that_is_said(monkeypatch):
    monkeypatch.setattr(module, "KNOWN", 4)
    found = Problems()
    for number in (0, 1, 2, 3, 0, 3):
        found.add(problem(number))
    assert reasons_in_words(found) == "4 too small"
    for number in (4, 4, 0):
        found.add(problem(number))
    assert len(found) == 6 and not found.is_exact
    assert reasons_in_words(found) == "6 too small (those after the first 4 are counted each time they are met)"


@pytest.mark.parametrize("key", ["a\udcff", "ü", ""])
def test_any_key_is_known_again(key):
    found = Problems()
    for _ in range(2):
        found.add({"key": key, "reason": "empty", "detail": ""})
    assert len(found) == 1
