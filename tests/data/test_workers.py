"""Worker processes may die, hang or find no room: what they make stays the same, and no wait is without end."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from small_runs import assert_same_run, metrics, small

from openvision3.cli import main
from openvision3.data import batches, workers
from openvision3.data.workers import WaitGivenUp, Workers, WorkersFailed, check_shared_memory
from openvision3.hub import complete_checkpoints
from openvision3.train.loop import NoBatch
from openvision3.train.pretrain import pretrain

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")


class Squares:
    """Item n is n squared; the first process that comes to an item of `deadly` is killed by its signal, at `always` every one."""

    def __init__(self, folder: Path, deadly: dict[int, int], always: bool = False):
        self.folder, self.deadly, self.always = folder, deadly, always

    def __getitem__(self, number: int) -> torch.Tensor:
        mark = self.folder / str(number)
        if number in self.deadly and (self.always or not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), self.deadly[number])
        return torch.tensor(number**2)


class Hanging:
    def __getitem__(self, number: int) -> int:
        if number == 3:
            time.sleep(1000)
        return number


def test_workers_that_are_killed_are_replaced_and_no_item_is_lost_or_made_twice(tmp_path, capfd):
    pool = Workers(Squares(tmp_path, {2: signal.SIGKILL, 12: signal.SIGSEGV}), 2)
    assert [int(item) for item in pool.make(range(16))] == [n**2 for n in range(16)]
    assert pool.deaths == 2
    said = capfd.readouterr().err
    assert "a worker was killed by SIGKILL, most likely because memory ran out: workers are restarted at the same batch (1 so far)" in said
    assert "killed by SIGSEGV: workers are restarted at the same batch (2 so far)" in said
    assert not multiprocessing.active_children()


def test_the_workers_have_ended_after_the_last_item_however_slowly_their_end_is_seen(tmp_path, monkeypatch):
    waitpid = os.waitpid

    def slow(*of):
        ended = waitpid(*of)
        time.sleep(0.2 * (ended[0] != 0))
        return ended

    monkeypatch.setattr(os, "waitpid", slow)
    assert [int(item) for item in Workers(Squares(tmp_path, {}), 2).make(range(4))] == [0, 1, 4, 9]
    assert not multiprocessing.active_children()


def test_workers_that_die_again_and_again_are_one_error(tmp_path):
    pool = Workers(Squares(tmp_path, {2: signal.SIGKILL}, always=True), 1)
    with pytest.raises(WorkersFailed, match=r"killed by SIGKILL, most likely because memory ran out, for the 4th time; take fewer --workers"):
        list(pool.make(range(9)))
    assert pool.deaths == workers.DEATHS + 1


def test_a_wait_for_a_worker_ends_after_a_signal_and_when_nothing_comes_for_long(monkeypatch):
    monkeypatch.setattr(workers, "STOP_AFTER", 0.0)
    asked: list[str] = []
    made = Workers(Hanging(), 1, stopping=lambda: asked).make(range(9))
    assert list(itertools.islice(made, 3)) == [0, 1, 2]
    asked.append("SIGTERM")
    with pytest.raises(WaitGivenUp):
        next(made)
    monkeypatch.setattr(workers, "PATIENCE", 0.0)
    with pytest.raises(WorkersFailed, match="no batch for 0 minutes, though the workers are alive"):
        list(Workers(Hanging(), 1).make(range(9)))
    assert not multiprocessing.active_children()


class Unshareable:
    def __reduce__(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)")


class NoRoom:
    def __getitem__(self, number: int) -> object:
        return Unshareable() if number else number


def test_a_batch_that_finds_no_shared_memory_is_one_error_and_not_a_wait():
    with pytest.raises(WorkersFailed, match=r"could not hand over an item: .* in /dev/shm; start the container with --shm-size"):
        list(Workers(NoRoom(), 1).make(range(3)))


def test_too_little_shared_memory_is_said_before_workers_start(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(workers, "_free", lambda: 64 * 10**6)
    check_shared_memory(10 * 10**6, workers=2, held=2)
    check_shared_memory(10**12, workers=0)
    with pytest.raises(ValueError, match=r"2 workers of each of 4 processes need 400 MB .* 64 MB are free in /dev/shm; start the container with --shm-size=1g"):
        check_shared_memory(20 * 10**6, workers=2, held=1, processes=4)
    monkeypatch.setattr(workers, "_free", lambda: 1000)
    config = small(tmp_path, "run")
    words = ["--data", *config.data, "--val", *config.val, "--size", "32", "--batch", "4", "--precision", "fp32", "--workers", "1"]
    assert main(["train", "tiny", *words, "--out", config.out]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "free in /dev/shm" in said and not Path(config.out).exists()
    assert main(["data", "latents", *config.data, "--size", "32", "--workers", "1", "--precision", "fp32", "--out", str(tmp_path / "latents")]) == 2
    assert "free in /dev/shm" in capsys.readouterr().err


def test_a_run_whose_workers_die_is_the_run_of_one_whose_did_not_and_is_saved_where_they_die_again_and_again(tmp_path, monkeypatch, capfd):
    whole, broken = small(tmp_path, "whole"), small(tmp_path, "broken", workers=1)
    pretrain(whole, "tiny")
    make, parent, mark = batches.TrainingBatches.__getitem__, os.getpid(), tmp_path / "mark"

    def dying(self, number):
        if os.getpid() != parent and (number == 4 or (number == 1 and not mark.exists())):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, number)

    with monkeypatch.context() as patched, pytest.raises(NoBatch, match=r"^step 5: a worker was killed by SIGKILL.*step-00000004; continue with --resume$"):
        patched.setattr(batches.TrainingBatches, "__getitem__", dying)
        pretrain(broken, "tiny")
    assert "restarted at the same batch (1 so far)" in capfd.readouterr().err
    assert [row.pop("lost_workers") for row in metrics(broken.out)] == [1, 1]
    assert [p.name for p in complete_checkpoints(broken.out)] == ["step-00000003", "step-00000004"]
    broken.resume, broken.workers = True, 0
    pretrain(broken, "tiny")
    lines = Path(broken.out, "metrics.jsonl").read_text().replace('"lost_workers": 1, ', "")
    Path(broken.out, "metrics.jsonl").write_text(lines)
    assert_same_run(whole.out, broken.out)


def test_a_run_that_waits_for_a_batch_gives_way_to_a_signal_and_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "STOP_AFTER", 0.0)
    make, parent = batches.TrainingBatches.__getitem__, os.getpid()

    def hanging(self, number):
        if number == 4 and os.getpid() != parent:
            os.kill(parent, signal.SIGTERM)
            time.sleep(1000)
        return make(self, number)

    monkeypatch.setattr(batches.TrainingBatches, "__getitem__", hanging)
    outcome = pretrain(small(tmp_path, "run", workers=1), "tiny")
    assert (outcome.status, outcome.steps) == ("stopped", 4)
    assert [p.name for p in complete_checkpoints(outcome.folder)][-1] == "step-00000004"
