"""openvision3 evaluate generation: from samples and a reference to tables and files, on one process or two; bad input is one line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_pipeline import photo, write_photo

from openvision3 import cli


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cli-generation")
    for index in range(10):
        write_photo(root / "data" / f"{index}.png", 48, 40, index)
    np.savez(root / "samples.npz", np.stack([np.asarray(photo(32, 32, 100 + index)) for index in range(9)]))
    return root


def argv(root: Path, out: Path, *more: str) -> list[str]:
    given = [str(root / "samples.npz"), "--data", str(root / "data"), "--out", str(out), "--shown", "2", "--device", "cpu"]
    return ["evaluate", "generation", *given, *more]


@pytest.fixture(scope="module")
def measured(root) -> Path:
    assert cli.main(argv(root, root / "out")) == 0
    return root / "out"


def rows(out: Path) -> dict[str, dict]:
    return {row["metric"]: row for row in json.loads((out / "results.json").read_text())["rows"]}


def test_samples_drawn_by_anyone_are_scored_and_shown(measured, root, tmp_path, capsys):
    assert cli.main(argv(root, tmp_path / "out", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == json.loads((measured / "results.json").read_text())["rows"]
    kid = rows(measured)["KID on EfficientNet-Lite0 features"]
    assert kid["count"] == 9 and kid["labels"] == "not recorded" and kid["note"] == "drawn by others" and kid["low"] < kid["value"] < kid["high"]
    assert {path.name for path in measured.iterdir()} == {"results.json", "report.html", "samples.png", "nearest-samples.png"}


def test_evaluations_of_drawn_images_go_on_one_page(measured, tmp_path, capsys):
    assert cli.main(["evaluate", "table", str(measured), "--out", str(tmp_path / "t.html")]) == 0
    assert "FID on EfficientNet-Lite0 features" in capsys.readouterr().out and "gFID" in (tmp_path / "t.html").read_text()


def test_two_processes_give_the_numbers_of_one(measured, root, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "openvision3", *argv(root, tmp_path, "--batch", "4")],
            env={**os.environ, **ranks, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert "report:" in told[0][0] and not told[1][0], "rank 0 alone speaks"
    one, two = rows(measured), rows(tmp_path)
    assert one.keys() == two.keys()
    for metric, row in one.items():
        floats = ("value", "spread", "low", "high")
        for name in floats:
            assert row[name] == (two[metric][name] if row[name] is None else pytest.approx(two[metric][name], rel=1e-4, abs=1e-6)), (metric, name)
        assert {name: value for name, value in row.items() if name not in floats} == {k: v for k, v in two[metric].items() if k not in floats}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generation"], "no MODEL named"),
        (["generation", "SAMPLES"], "no reference named"),
        (["generation", "SAMPLES", "--data", "DATA", "--guidance", "2"], "drawn already"),
        (["generation", "SAMPLES", "--data", "DATA", "--guidence", "2"], "Did you mean '--guidance'"),
        (["generation", "SAMPLES", "--data", "DATA", "--protocol", "rfid-val50k"], "Choose one of , gfid-adm50k"),
        (["generation", "SAMPLES", "--data", "DATA", "--protocol", "gfid-adm50k"], "openvision3 fetch inception-2015"),
        (["generation", "nothing.npz", "--data", "DATA"], "no such file of images: nothing.npz"),
        (["reconstruction", "mini", "--protocol", "gfid-adm50k"], "cannot be 'gfid-adm50k'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(root, tmp_path, words, message, capsys):
    places = {"SAMPLES": str(root / "samples.npz"), "DATA": str(root / "data")}
    assert cli.main(["evaluate", *(places.get(word, word) for word in words), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
