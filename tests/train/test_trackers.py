"""wandb (offline) and trackio (local) for real: what they hold afterwards, and that they never end a run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_runs import Crash, crash_at, metrics, pictures, small

from openvision3.train import trackers
from openvision3.train.pretrain import pretrain
from openvision3.train.run_folder import RunFolder
from openvision3.train.trackers import Page, Trackers, check_trackers

wandb_is_here = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
trackio_is_here = pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))  # of processes started here
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    # WANDB_SERVICE: a process started here would use the helper process of a run that was made here
    for name in ("WANDB_SERVICE", "WANDB_API_KEY", "WANDB_PROJECT", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)


def wandb_records(run: Path) -> list[Any]:
    """All records of a run's offline files, oldest first. They are LevelDB logs: blocks of 32 KB, pieces with a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        data, at, whole = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            whole += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last piece
                record = wandb_internal_pb2.Record()
                record.ParseFromString(whole)
                found.append(record)
                whole = b""
    return found


def wandb_rows(run: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for record in wandb_records(run):
        if record.WhichOneof("record_type") == "history":
            values: dict[str, Any] = {}
            for item in record.history.item:
                name, *inside = list(item.nested_key) or [item.key]
                if inside:  # an image
                    values.setdefault(name, {})[inside[0]] = json.loads(item.value_json)
                elif not name.startswith("_"):
                    values[name] = json.loads(item.value_json)
            rows.append((record.history.step.num, values))
    return rows


def trackio_rows(database: Path) -> list[tuple[str, int, dict[str, Any]]]:
    with sqlite3.connect(database) as connection:
        return [(name, step, json.loads(values)) for name, step, values in connection.execute("select run_name, step, metrics from metrics order by id")]


def numbers_by_step(rows: list[tuple[int, dict[str, Any]]]) -> dict[int, dict[str, float]]:
    """Pictures apart; fails where a number of a step was sent twice."""
    found: dict[int, dict[str, float]] = {}
    for step, values in rows:
        for name, value in values.items():
            if not isinstance(value, dict):
                assert name not in found.setdefault(step, {}), f"{name} of step {step} twice"
                found[step][name] = value
    return found


def expected(run: Path) -> dict[int, dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return numbers_by_step([(row.pop("step"), row) for row in rows])


@pytest.mark.slow
@wandb_is_here
def test_wandb_offline_holds_the_numbers_steps_config_and_sheets_of_the_run(tmp_path):
    run = pretrain(small(tmp_path, "sweep/one", track=("wandb",), eval_every=3)).folder
    rows = wandb_rows(run)
    assert numbers_by_step(rows) == expected(run)
    assert [step for step, values in rows if "val/sheet" in values] == [3, 6, 7]
    sheets = list(run.glob("wandb/offline-run-*/files/media/images/**/*.png"))
    assert {p.read_bytes() for p in sheets} == {p.read_bytes() for p in (run / "samples").glob("*.png")}
    [started] = [r.run for r in wandb_records(run) if r.WhichOneof("record_type") == "run"]
    assert (started.project, started.display_name, started.run_id) == ("sweep", "one", json.loads((run / "trackers.json").read_text())["wandb"])
    config = {update.key: json.loads(update.value_json) for update in started.config.update}
    assert config["batch"] == 4 and config["model"]["encoder"]["size"] == "tiny"


@trackio_is_here
def test_trackio_s_database_holds_the_numbers_steps_config_and_sheets_of_the_run(tmp_path, trackio_folder):
    run = pretrain(small(tmp_path, "sweep/one", track=("trackio",), eval_every=3)).folder
    rows = trackio_rows(trackio_folder / "sweep.db")
    assert numbers_by_step([(step, values) for _, step, values in rows]) == expected(run)
    assert {name for name, *_ in rows} == {f"one-{json.loads((run / 'trackers.json').read_text())['trackio']}"}
    sheets = [trackio_folder / "media" / values["val/sheet"]["file_path"] for _, _, values in rows if "val/sheet" in values]
    assert [p.read_bytes() for p in sheets] == [p.read_bytes() for p in sorted((run / "samples").glob("*.png"))]
    with sqlite3.connect(trackio_folder / "sweep.db") as connection:
        [config] = [json.loads(c) for (c,) in connection.execute("select config from configs")]
    assert config["batch"] == 4 and config["model"]["encoder"]["size"] == "tiny"


@pytest.fixture
def trackio_folder(tmp_path, monkeypatch):
    """trackio reads TRACKIO_DIR where it is imported."""
    folder = tmp_path / "trackio"
    monkeypatch.setenv("TRACKIO_DIR", str(folder))
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "trackio"}
    for name in before:
        del sys.modules[name]
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        del sys.modules[name]
    sys.modules.update(before)


@wandb_is_here
@trackio_is_here
def test_a_run_that_goes_on_continues_its_pages_and_sends_nothing_twice(tmp_path, monkeypatch, trackio_folder):
    with monkeypatch.context() as patch:
        crash_at(patch, 6)  # steps 4 and 5 have been done, and sent, after the checkpoint of step 3
        with pytest.raises(Crash):
            pretrain(small(tmp_path, "sweep/one", track=("wandb", "trackio"), log_every=1))
    before = json.loads((tmp_path / "sweep/one/trackers.json").read_text())
    run = pretrain(small(tmp_path, "sweep/one", track=("wandb", "trackio"), log_every=1, resume=True)).folder
    log = (run / "log.txt").read_text()
    assert "could not" not in log and "did not take" not in log, log
    assert json.loads((run / "trackers.json").read_text()) == before
    assert len(list(run.glob("wandb/offline-run-*"))) == 2
    assert {r.run.run_id for r in wandb_records(run) if r.WhichOneof("record_type") == "run"} == {before["wandb"]}
    rows = trackio_rows(trackio_folder / "sweep.db")
    assert {name for name, *_ in rows} == {f"one-{before['trackio']}"}
    for name, sent in (("wandb", numbers_by_step(wandb_rows(run))), ("trackio", numbers_by_step([(step, values) for _, step, values in rows]))):
        assert sent.keys() == expected(run).keys() == set(range(1, 8)), f"{name}: {log}"
        assert {s: v.get("train/loss") for s, v in sent.items()} == {s: v.get("train/loss") for s, v in expected(run).items()}


KILLED = """
import os, signal, subprocess, sys
from pathlib import Path
from small_runs import small
from openvision3.train.run_folder import RunFolder
from openvision3.train.pretrain import pretrain

advance = RunFolder.advance

def killing(self, done):
    if done == 3:
        listed = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True).stdout
        service = [int(line.split()[0]) for line in listed.splitlines() if "wandb-core" in line and f"--pid {os.getpid()}" in line.replace("=", " ")]
        assert service
        for pid in service:
            os.kill(pid, signal.SIGKILL)
    advance(self, done)

RunFolder.advance = killing
print(pretrain(small(Path(sys.argv[1]), "sweep/one", track=("wandb",))).status)
"""


@pytest.mark.slow
@wandb_is_here
def test_a_tracker_whose_process_is_killed_is_told_of_once_and_the_run_ends_as_without_it(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "finished\n"), done.stderr
    log = (tmp_path / "sweep/one/log.txt").read_text()
    assert log.count("wandb did not take a record") == 1
    assert re.search(r"wandb did not take [45] of 6 records and images; metrics.jsonl has everything", log)  # the first may still fit into a pipe
    assert metrics(tmp_path / "sweep/one") == metrics(pretrain(small(tmp_path, "plain")).folder)


@pytest.mark.slow
@wandb_is_here
def test_a_tracker_that_cannot_start_does_not_keep_the_run_from_starting(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")  # and nobody is logged in
    code = "import sys; from pathlib import Path; from small_runs import small; from openvision3.train.pretrain import pretrain\n"
    code += "pretrain(small(Path(sys.argv[1]), 'one', track=('wandb',)))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.DEVNULL, capture_output=True, check=True)
    run = tmp_path / "one"
    assert "wandb could not start (No API key configured" in (run / "log.txt").read_text()
    assert metrics(run)[-1]["step"] == 7
    assert not (run / "trackers.json").exists()


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"track trackio needs a package that is not installed: pip install 'openvision3\[trackio\]'"):
        pretrain(small(tmp_path, "one", track=("trackio",)))
    assert not (tmp_path / "one").exists()


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ValueError, match="track 'mlflow' is unknown; choose from wandb, trackio"):
        check_trackers(["mlflow"])


class Recorder:
    """A tracker that fails on the steps it is told to."""

    def __init__(self):
        self.rows: list[tuple[int, dict]] = []
        self.bad, self.finishes, self.started = set(), True, []

    def open_page(self, name, folder, project, identity, config) -> Page:
        self.started.append((folder.name, project, identity))
        return Page(self, self, "somewhere")

    def log(self, values, step):
        if step in self.bad:
            raise ConnectionResetError("Connection lost")
        self.rows.append((step, values))

    def finish(self):
        if not self.finishes:
            raise TimeoutError("no answer")


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(trackers, "open_page", recorder.open_page)
    return recorder


def test_failures_are_counted_told_once_and_the_next_record_is_tried(tmp_path, recorder):
    recorder.bad, recorder.finishes, said = {2, 3}, False, []
    tracked = Trackers(["wandb"], tmp_path, {}, said.append)
    for step in (1, 2, 3, 4):
        tracked.log(step, {"train/loss": 1.0, "words": "no number"})
    tracked.close()
    assert recorder.rows == [(1, {"train/loss": 1.0}), (4, {"train/loss": 1.0})]
    assert said == [
        "wandb: somewhere",
        "wandb did not take a record (Connection lost); the run continues, metrics.jsonl has everything",
        "wandb could not finish (no answer)",
        "wandb did not take 2 of 4 records and images; metrics.jsonl has everything",
    ]


@pytest.mark.parametrize(("folder", "project"), [("runs/mini", "openvision3"), ("ablation/seed1", "ablation")])
def test_a_page_is_named_after_the_run_folder(tmp_path, recorder, folder, project):
    (tmp_path / folder).mkdir(parents=True)
    Trackers(["wandb"], tmp_path / folder, {}, lambda line: None)
    Trackers(["wandb"], tmp_path / folder, {}, lambda line: None)
    name = folder.partition("/")[2]
    (first, second), identity = recorder.started, json.loads((tmp_path / folder / "trackers.json").read_text())["wandb"]
    assert first == second == (name, project, identity)


def test_a_damaged_list_of_pages_starts_new_ones(tmp_path, recorder):
    (tmp_path / "trackers.json").write_text('{"wandb"')
    Trackers(["wandb"], tmp_path, {}, lambda line: None)
    assert list(json.loads((tmp_path / "trackers.json").read_text())) == ["wandb"]


def test_rows_done_again_after_a_checkpoint_are_not_sent_again(tmp_path, recorder):
    run = RunFolder(tmp_path / "one")
    run.describe({}, {})
    run.track(["wandb"], {})
    for step in (1, 2, 3):
        run.record(step, {"train/loss": 1.0})
    run.record(3, {"val/psnr": 20.0})
    run.close()
    run = RunFolder(tmp_path / "one", resume=True)
    run.forget_after(1)
    run.track(["wandb"], {})
    for step in (2, 3, 4):
        run.record(step, {"train/loss": 1.0})
    run.record(3, {"val/psnr": 20.0})
    run.record(4, {"val/psnr": 20.0})
    run.close()
    assert [(step, *values) for step, values in recorder.rows] == [
        (1, "train/loss"), (2, "train/loss"), (3, "train/loss"), (3, "val/psnr"), (4, "train/loss"), (4, "val/psnr"),
    ]  # fmt: skip


def test_without_trackers_nothing_of_theirs_is_imported(tmp_path):
    pictures(tmp_path / "train", 10)
    code = (
        "import sys; from pathlib import Path; from small_runs import small; from openvision3.train.pretrain import pretrain\n"
        "pretrain(small(Path(sys.argv[1]), 'one', steps=2)); print({'wandb', 'trackio'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_sheet_of_a_repeated_step_is_not_sent_again(tmp_path):
    run, sent = RunFolder(tmp_path / "run"), []
    run._trackers = SimpleNamespace(image=lambda *given: sent.append(given))  # type: ignore[assignment]
    run._sent = {(2, "val")}
    for step in (2, 4):
        run.image(step, "val/sheet", tmp_path / "sheet.png")
    assert [step for step, *_ in sent] == [4]
