"""What a person sees and what a run writes down."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from openvision3 import progress
from openvision3.data.problems import Problems
from openvision3.progress import duration, environment, track
from openvision3.train.run_folder import RunFolder, read_skipped

PROBLEMS = [{"key": str(i), "reason": "truncated", "detail": "cut off"} for i in range(4)]


def described(path, **values) -> RunFolder:
    run = RunFolder(path)
    run.describe({"steps": 3, **values}, {"torch": "2"})
    return run


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_says_what_ran_where_and_how(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["openvision3", "train", "tiny", "--data", "my images"])
    run = described(tmp_path)
    run.close()
    RunFolder(tmp_path, resume=True).describe({"steps": 4}, {})
    assert json.loads((tmp_path / "config.json").read_text()) == {"steps": 4}
    assert json.loads((tmp_path / "environment.json").read_text()) == {}
    assert (tmp_path / "command.txt").read_text() == "openvision3 train tiny --data 'my images'\n" * 2
    assert all((tmp_path / name).is_dir() for name in ("checkpoints", "samples"))


def test_a_new_run_never_writes_over_an_old_one(tmp_path):
    run = described(tmp_path)
    run.record(1, {"loss": 2.0})
    run.close()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"already holds a run; continue with --resume, or name another folder with --out"):
        RunFolder(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_there_must_be_a_run_to_go_on_with_and_the_question_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="holds no run to continue; start without --resume"):
        RunFolder(tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ValueError, match="is a file; name a folder with --out"):
            RunFolder(tmp_path / "file", resume=resume)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_start_that_died_before_its_config_was_written_can_be_repeated(tmp_path):
    RunFolder(tmp_path).close()
    described(tmp_path).close()


def test_a_config_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    run = described(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.describe({"steps": 99}, {})
    assert json.loads((tmp_path / "config.json").read_text()) == {"steps": 3}


def test_a_run_folder_that_another_process_writes_is_refused_until_that_is_gone(tmp_path):
    script = "import pathlib, sys; from openvision3.train.run_folder import lock\n"
    script += "kept = lock(pathlib.Path(sys.argv[1])); print('kept', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "kept\n"
        with pytest.raises(ValueError, match=f"is being written by process {other.pid} on .*; wait for it, end it, or name another folder with --out"):
            RunFolder(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    finally:
        other.kill()
        other.communicate()
    RunFolder(tmp_path).close()


def test_a_command_that_is_not_utf8_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["openvision3", "train", "--data", "d\udcff"])
    run = described(tmp_path)
    run.say("data d\udcff")
    run.close()
    assert b"d\xff" in (tmp_path / "command.txt").read_bytes() and b"d\\udcff" in (tmp_path / "log.txt").read_bytes()


def found(count: int, known: int = 0) -> Problems:
    problems = Problems(PROBLEMS[:known])
    for problem in PROBLEMS[:count]:
        problems.add(problem)
    return problems


def test_what_comes_after_the_checkpoint_is_forgotten_a_line_cut_off_by_a_kill_too(tmp_path):
    run = described(tmp_path)
    for step in (1, 2, 3, 4):
        run.record(step, {"loss": 1.0})
    run.list_skipped(found(3))
    run.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    run = RunFolder(tmp_path, resume=True)
    run.forget_after(2, 1)
    assert steps(tmp_path) == [1, 2]
    assert list(read_skipped(tmp_path, 9)) == PROBLEMS[:1]
    run.record(3, {"loss": 1.0})
    run.list_skipped(found(2, known=1))
    run.close()
    assert steps(tmp_path) == [1, 2, 3]
    assert list(read_skipped(tmp_path, 9)) == PROBLEMS[:2]


def test_unusable_samples_are_listed_once(tmp_path):
    run = described(tmp_path)
    problems = Problems()
    assert run.list_skipped(problems) == 0 and not (tmp_path / "skipped.jsonl").exists()
    for count in (1, 1, 3, 4):
        for problem in PROBLEMS[:count]:
            problems.add(problem)
        assert run.list_skipped(problems) == count
    assert list(read_skipped(tmp_path, 9)) == PROBLEMS


def scalars(path, name) -> list[tuple[int, float]]:
    board = EventAccumulator(str(path / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


def test_tensorboard_has_the_numbers_of_metrics_and_each_step_once_after_going_on(tmp_path):
    run = described(tmp_path)
    for step in (1, 2, 3):
        run.record(step, {"train/loss": step / 2, "note": "words"})
    run.close()
    run = RunFolder(tmp_path, resume=True)
    run.forget_after(1)
    run.record(2, {"train/loss": 7.0})
    run.close()
    assert scalars(tmp_path, "train/loss") == [(1, 0.5), (2, 7.0)]


def test_a_line_is_said_to_the_person_and_kept_in_the_log(tmp_path, capsys):
    run = described(tmp_path)
    long = "step 1  [bold]loss[/bold] " + "x" * 300
    with run.showing(10, 0):
        run.say(long)
        run.advance(1)
    run.close()
    assert capsys.readouterr().err == long + "\n"  # not wrapped, no markup, no bar, no colour
    assert (tmp_path / "log.txt").read_text().endswith(f" {long}\n")


SHOW = """
import sys
from openvision3.data.problems import Problems
from openvision3.train.run_folder import RunFolder
from openvision3.progress import track
run = RunFolder(sys.argv[1])
with run.showing(4, 1):
    run.say("a line")
    run.advance(3)
print(list(track([1, 2], "images")))
run.close()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals on Windows")
def test_a_terminal_shows_a_bar_below_the_lines(tmp_path):
    import pty

    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", SHOW, str(tmp_path)], stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # how Linux says that the other side is closed
            break
        if not part:
            break
        seen += part
    out = process.communicate(timeout=60)[0]
    os.close(ours)
    assert process.returncode == 0 and out == b"[1, 2]\n"
    text = seen.decode()
    assert "a line" in text and "3/4" in text and "\x1b[" in text and "━" in text


def test_without_a_terminal_going_through_items_is_silent(capsys):
    assert list(track(range(3), "pictures")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_closing_is_quiet_on_a_full_disk(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    run = described(tmp_path)
    run._metrics = open("/dev/full", "w")
    with pytest.raises(OSError):
        run.record(1, {"loss": 1.0})
    run.close()


def test_the_environment_names_versions_and_machine():
    found = environment()
    assert {"openvision3", "python", "torch", "system", "processor", "threads", "gpu"} <= found.keys()
    assert found["processor"] and found["threads"] >= 1
    json.dumps(found)


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0s"), (0.4, "0s"), (59.6, "1m00s"), (90, "1m30s"), (3599.7, "1h00m"), (7260, "2h01m")])
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_off_a_terminal_a_long_loop_tells_how_far_it_is_and_a_short_one_nothing(monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=False, width=160)
    monkeypatch.setattr(progress, "console", lambda: screen)
    assert list(progress.track(range(3), "[a] images", 3)) == [0, 1, 2] and screen.file.getvalue() == ""  # type: ignore[attr-defined]
    monkeypatch.setattr(progress, "QUIET", 0.0)
    assert list(progress.track(range(3), "[a] images", 3)) == [0, 1, 2]
    assert re.fullmatch(r"\[a\] images: 1 of 3, \S+/s, left \S+\n.*\n\[a\] images: 3 of 3, \S+/s, left 0s\n", screen.file.getvalue())  # type: ignore[attr-defined]


def test_counting_says_how_fast_and_how_long_on_and_off_a_terminal(monkeypatch):
    for terminal in (True, False):
        screen = Console(file=io.StringIO(), force_terminal=terminal, width=160)
        monkeypatch.setattr(progress, "console", lambda screen=screen: screen)
        with progress.counting("latents", "images", 2000, every=0.0) as count:
            count(400)
            count(600)
        shown = screen.file.getvalue()  # type: ignore[attr-defined]
        assert re.search(r"[\d,]+ images/s", shown) and "left" in shown and ("1000/2000" if terminal else "1,000 of 2,000 images") in shown
        with progress.counting("latents", "images", 2000, silent=True, every=0.0) as count:
            count(1)
        assert screen.file.getvalue() == shown  # type: ignore[attr-defined]
