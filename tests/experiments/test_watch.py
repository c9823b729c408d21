"""Curves of runs that are written, cut off, started anew or not there yet."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from small_runs import pictures

from openvision3 import cli
from openvision3.experiments.curves import ORDER, Curves, choose_metrics, open_runs
from openvision3.experiments.watch import MARKERS, Dashboard, draw, format_number, watch


def write(folder: Path, rows: list[dict], mode: str = "w", end: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", mode) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + end)
    return folder


def row(step: int, **values: float) -> dict:
    return {"step": step, **({"train/loss": 10.0 / step} | {name.replace("__", "/"): value for name, value in values.items()})}


def drawn(runs, *, width: int = 100, height: int = 40, terminal: bool = False, whole: bool = True, **settings) -> str:
    screen = Console(file=io.StringIO(), width=width, height=height, force_terminal=terminal, highlight=False, **settings)
    screen.print(Dashboard(runs, choose_metrics(runs), whole=whole))
    return screen.file.getvalue()  # type: ignore[attr-defined]


# -- reading -------------------------------------------------------------------------------------------------------


def test_a_half_written_line_is_read_when_it_is_whole(tmp_path):
    run = open_runs([str(write(tmp_path, [row(1), row(2)], end='{"step": 3, "train/lo'))])[0]
    assert list(run.values["train/loss"]) == [1, 2]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('ss": 7.0}\n')
    assert run.read().values["train/loss"] == {1: 10.0, 2: 5.0, 3: 7.0}
    assert run.unreadable == 0


def test_only_what_is_new_is_read(tmp_path):
    run = open_runs([str(write(tmp_path, [row(1)]))])[0]
    run.values["train/loss"][1] = -1.0  # would be put right by reading again
    write(tmp_path, [row(2)], "a")
    assert run.read().values["train/loss"] == {1: -1.0, 2: 5.0}


@pytest.mark.parametrize("again", [1, 5, 9])
def test_a_file_that_starts_anew_is_read_anew_however_long_it_is(tmp_path, again):
    run = open_runs([str(write(tmp_path, [row(step) for step in range(1, 6)]))])[0]
    write(tmp_path, [row(step, train__loss=3.0) for step in range(1, again + 1)])
    assert run.read().values["train/loss"] == dict.fromkeys(range(1, again + 1), 3.0)


def test_a_run_that_goes_on_from_an_earlier_step_forgets_what_came_after_it(tmp_path):
    rows = [row(1), row(2), row(3), row(2, train__loss=4.0)]
    assert open_runs([str(write(tmp_path, rows))])[0].values["train/loss"] == {1: 10.0, 2: 4.0}


def test_lines_that_are_no_rows_are_counted_and_said(tmp_path):
    run = open_runs([str(write(tmp_path, [row(1), row(2)], end='nonsense\n[1]\n{"loss": 1}\n\n'))])[0]
    assert (run.unreadable, list(run.values["train/loss"])) == (3, [1, 2])
    assert "3 unreadable lines" in drawn([run], width=200)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 400), max_size=6))
def test_in_whatever_pieces_a_file_arrives_it_is_read_as_if_whole(tmp_path_factory, cuts):
    data = "".join(json.dumps(row(step, val__psnr=float(step))) + "\n" for step in range(1, 8))
    folder = tmp_path_factory.mktemp("run")
    run = Curves(folder)
    (folder / "metrics.jsonl").write_text("")
    for end in [*sorted(cut for cut in cuts if cut < len(data)), len(data)]:
        (folder / "metrics.jsonl").write_text(data[:end])
        run.read()
    assert run.values == Curves(write(folder, [row(step, val__psnr=float(step)) for step in range(1, 8)])).read().values
    assert run.unreadable == 0


# -- drawing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda f: f.mkdir(), lambda f: write(f, [])])
def test_a_run_without_numbers_is_one_clear_line(tmp_path, make, capsys):
    make(tmp_path / "new")
    assert cli.main(["watch", str(tmp_path / "new"), "--once"]) == 0
    out = capsys.readouterr().out.replace("\n", " ").split()
    assert " ".join(out) == f"{tmp_path / 'new'}: no numbers yet, metrics.jsonl is {'empty' if (tmp_path / 'new/metrics.jsonl').exists() else 'not there'}"


def test_a_run_that_is_not_there_is_refused(tmp_path, capsys):
    assert cli.main(["watch", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"openvision3: no such run folder: {tmp_path / 'none'}\n"
    assert cli.main(["watch"]) == 2
    assert "no run given" in capsys.readouterr().err


def test_metrics_are_shown_in_their_order_and_chosen_by_pattern(tmp_path):
    runs = open_runs([str(write(tmp_path, [row(1, wait=0.1, val__psnr=20.0, strange=1.0, train__pixel=0.1)]))])
    assert choose_metrics(runs) == ["train/loss", "train/pixel", "val/psnr", "wait"]
    assert choose_metrics(runs, ["strange", "train/*"]) == ["strange", "train/loss", "train/pixel"]
    with pytest.raises(ValueError, match="no metric fits 'foo'; choose from train/loss, wait, val/psnr, strange, train/pixel"):
        choose_metrics(runs, ["foo"])
    assert len(set(ORDER)) == len(ORDER)


def test_a_falling_curve_falls_from_the_top_left_to_the_bottom_right(tmp_path):
    runs = open_runs([str(write(tmp_path, [row(step, train__loss=100.0 - step) for step in range(1, 101)]))])
    lines = drawn(runs, width=40).splitlines()
    title = next(i for i, line in enumerate(lines) if line.startswith("loss  0"))
    plot = lines[title + 1 : title + 8]
    places = [min(i for i, c in enumerate(line) if 0x2800 < ord(c) < 0x2900) for line in plot]
    assert places == sorted(places) and places[-1] - places[0] > 20
    assert (plot[0].split()[0], plot[-1].split()[0], lines[title + 8].split()) == ("99", "0", ["1", "100"])


def test_several_runs_share_a_panel_each_with_its_colour_or_its_own_mark(tmp_path):
    runs = open_runs([str(write(tmp_path / name, [row(s, train__loss=high - s) for s in range(1, 30)])) for name, high in (("a", 50.0), ("b", 90.0))])
    coloured = drawn(runs, terminal=True, color_system="standard")
    assert "\x1b[36m" in coloured and "\x1b[35m" in coloured
    plain = drawn(runs, no_color=True)
    assert "\x1b" not in plain
    assert all(mark in plain for mark in MARKERS[:2]) and not any(0x2800 < ord(c) < 0x2900 for c in plain)


def test_a_terminal_without_unicode_gets_plain_characters(tmp_path):
    write(tmp_path / "a", [row(s) for s in range(1, 30)])
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "60"}
    done = subprocess.run([sys.executable, "-m", "openvision3", "watch", "a", "--once"], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert b"*" in done.stdout and done.stdout.isascii()


@pytest.mark.parametrize("width", [20, 33, 60, 200])
@pytest.mark.parametrize("height", [5, 12, 60])
def test_it_fits_into_any_terminal(tmp_path, width, height):
    rows = [row(s, val__psnr=1e-9, wait=0.0, rate=123456.0, memory_gb=-1.0, train__caption=s**20.0) for s in range(1, 60)]
    runs = open_runs([str(write(tmp_path / "a-run-with-a-rather-long-name", rows))])
    lines = drawn(runs, width=width, height=height, whole=False).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("loss"))
    assert max(map(len, lines)) <= width
    assert len(lines) <= max(height, head + 8 + 3)  # never less than one row of panels, and the hint


def test_values_that_are_not_finite_are_counted_and_left_out(tmp_path):
    rows = [row(1), row(2, train__loss=float("nan")), row(3, train__loss=float("inf")), row(4)]
    assert "2 not finite" in drawn(open_runs([str(write(tmp_path / "a", rows))]))
    assert "no finite value" in drawn(open_runs([str(write(tmp_path / "b", [row(1, train__loss=float("nan"))]))]))


def test_the_head_says_how_far_and_how_fast_the_run_is(tmp_path):
    folder = write(tmp_path / "a", [row(50, samples_per_second=8.0, wait=0.25)])
    (folder / "config.json").write_text(json.dumps({"steps": 100, "batch": 16}))
    old = time.time() - 90
    os.utime(folder / "metrics.jsonl", (old, old))
    assert "step 50 of 100  8.0 samples/s  wait 25%  left 1m40s  written 1m30s ago" in drawn(open_runs([str(folder)]), width=200)
    write(folder, [row(100)], "a")
    assert "step 100 of 100" in drawn(open_runs([str(folder)]), width=200) and "finished" in drawn(open_runs([str(folder)]), width=200)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0, "0"), (0.00025, "2.5e-04"), (0.1234567, "0.1235"), (9999.0, "9999"), (12345.0, "12.3k"), (-2.5e6, "-2.5M"), (1e20, "1.0e+20")),
        *((999_600.0, "1M"), (9999.99, "10k")),
    ],
)
def test_numbers_are_short(value, text):
    assert format_number(value) == text


def test_where_there_is_no_terminal_it_draws_once_and_ends(tmp_path, capsys):
    write(tmp_path / "a", [row(s) for s in range(1, 9)])
    assert cli.main(["watch", str(tmp_path / "a")]) == 0
    assert "loss  1.25" in capsys.readouterr().out


def test_it_looks_again_while_a_run_writes_and_ends_with_it(tmp_path):
    folder = write(tmp_path / "a", [row(1)])
    (folder / "config.json").write_text(json.dumps({"steps": 3, "batch": 1}))
    screen = Console(file=io.StringIO(), width=60, height=30, force_terminal=True, highlight=False)
    watching = threading.Thread(target=watch, args=([str(folder)],), kwargs={"every": 0.1, "screen": screen})
    watching.start()
    write(folder, [row(2)], "a")
    time.sleep(0.3)
    write(folder, [row(3)], "a")
    watching.join(60)
    assert not watching.is_alive()
    assert "step 3 of 3" in screen.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_real_run_can_be_watched(tmp_path):
    pictures(tmp_path / "train", 10), pictures(tmp_path / "held", 3, 1)
    fields = "--data train --val held --size 32 --batch 4 --steps 6 --log-every 2 --save-every 0 --precision fp32 --out run"
    openvision3 = [sys.executable, "-m", "openvision3"]
    subprocess.run([*openvision3, "train", "tiny", *fields.split()], cwd=tmp_path, capture_output=True, check=True)
    done = subprocess.run([*openvision3, "watch", "run", "--once"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "step 6 of 6" in done.stdout and "val/psnr" in done.stdout and "caption" in done.stdout


# -- as a PNG ------------------------------------------------------------------------------------------------------


def test_the_png_has_a_panel_a_metric_and_replaces_the_old_one_whole(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write(tmp_path / name, [row(s, val__psnr=float(s), rate=0.1, wait=0.0, memory_gb=1.0) for s in range(1, 9)])
    target = tmp_path / "curves.png"
    assert draw([str(tmp_path / "a"), str(tmp_path / "b")], target) == 5
    with Image.open(target) as image:
        assert image.format == "PNG" and image.size[0] > 1000 and len(image.convert("RGB").getcolors(1 << 20)) > 50
    before = target.read_bytes()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **_: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw([str(tmp_path / "a")], target)
    assert target.read_bytes() == before and not list(tmp_path.glob(".*.making"))


def test_nothing_to_draw_is_refused(tmp_path, capsys):
    write(tmp_path / "a", [])
    assert cli.main(["watch", str(tmp_path / "a"), "--png", str(tmp_path / "x.png")]) == 2
    assert "nothing to draw" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def test_a_png_that_cannot_be_written_is_one_line(tmp_path, capsys):
    write(tmp_path / "a", [row(1)])
    assert cli.main(["watch", str(tmp_path / "a"), "--png", str(tmp_path / "new/x.png")]) == 0 and (tmp_path / "new/x.png").is_file()
    capsys.readouterr()
    assert cli.main(["watch", str(tmp_path / "a"), "--png", str(tmp_path / "new/x.png/x.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_watching_needs_no_torch(tmp_path):
    write(tmp_path / "a", [row(1), row(2)])
    code = "import sys; from openvision3 import cli; cli.main(['watch', sys.argv[1], '--once']); print({'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a home that nobody can write to is needed, root included")
def test_a_home_that_cannot_be_written_to_costs_no_words(tmp_path):
    write(tmp_path / "a", [row(1), row(2)])
    command = [sys.executable, "-m", "openvision3", "watch", "a", "--png", "a.png"]
    surroundings = {name: value for name, value in os.environ.items() if name not in ("MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=surroundings | {"HOME": "/proc/nobody"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "a.png: 1 panels\n", "") and (tmp_path / "a.png").is_file()


def test_any_name_of_a_run_can_stand_on_a_chart(tmp_path):
    names = ["_a", "$x^{$", "a$b", "<b>[red]", os.fsdecode(b"r\xff")]
    for name in names:
        write(tmp_path / name, [row(1), row(2)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw([str(tmp_path / name) for name in names], tmp_path / "a.png") == 1
