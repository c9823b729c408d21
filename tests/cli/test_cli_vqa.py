"""`openvision3 evaluate vqa` and `openvision3 data pope` from the command line: tables, files, one line for what is wrong."""

from __future__ import annotations

import json

import pytest
import vqa_files as files

from openvision3.cli import main
from openvision3.evaluate.metrics.vqa import BENCHMARKS
from openvision3.evaluate.protocol import AnsweringFunctions

OWN = """
from openvision3.evaluate.protocol import AnsweringFunctions

def model(device, precision):
    return AnsweringFunctions("dogs", lambda images, prompts, max_tokens: ["Yes" if "dog" in prompt else "no" for prompt in prompts])

def nothing(device, precision):
    return 3
"""


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path / 'own.py'}:model"


def test_a_benchmark_is_asked_scored_and_put_on_a_page(tmp_path, own, capsys):
    files.pope(tmp_path / "pope")
    out = tmp_path / "out"
    assert main(["evaluate", "vqa", "pope", own, "--data", str(tmp_path / "pope"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "random: f1" in printed and "100.0 %" in printed and "answers:" in printed
    results = json.loads((out / "results.json").read_text())
    found = {row["metric"]: row for row in results["rows"]}
    assert found["all: accuracy"]["value"] == 1 and found["all: accuracy"]["count"] == 24 and "sha256" in found["all: accuracy"]["note"]
    page = (out / "report.html").read_text()
    assert "Right answers" in page and "Is there a dog in the image?" in page and (out / "parts.png").is_file()
    assert main(["evaluate", "table", str(out), "--out", str(tmp_path / "table.html")]) == 0
    assert "random: f1" in capsys.readouterr().out


def test_results_are_printed_as_json_for_scripts(tmp_path, own, capsys):
    files.mme(tmp_path / "mme")
    assert main(["evaluate", "vqa", "mme", own, "--data", str(tmp_path / "mme"), "--out", str(tmp_path / "out"), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert {row["metric"] for row in results["rows"]} >= {"artwork: score", "count: accuracy_plus"}
    assert {one["metric"] for one in results["not_run"]} == {"perception", "cognition"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pop", "m"], "unknown benchmark 'pop'. Did you mean 'pope'?"),
        (["pope"], "no MODEL named"),
        (["pope", "OWN"], "no files of POPE named; name them with --data"),
        (["mme", "OWN", "--data", "DATA"], "is a file of POPE by its fields, not of MME; run `openvision3 evaluate vqa pope`"),
        (["pope", "OWN", "--data", "DATA", "--batch", "0"], "batch 0 must be at least 1"),
        (["pope", "none.py:model", "--data", "DATA"], "no such file: none.py"),
        (["pope", "NOTHING", "--data", "DATA"], "returned a int; return openvision3.evaluate.protocol.AnsweringFunctions"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, own, capsys, arguments, message):
    files.pope(tmp_path / "pope")
    names = {"OWN": own, "NOTHING": own.replace(":model", ":nothing"), "DATA": str(tmp_path / "pope" / "coco_pope_random.json")}
    assert main(["evaluate", "vqa", *(names.get(word, word) for word in arguments), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_chat_model_is_opened_as_it_is_asked_for(tmp_path, capsys, monkeypatch):
    class Stands:
        """In place of a Chat; tests/understand/test_chat.py has the real one."""

        def functions(self, name):
            return AnsweringFunctions(name, lambda images, prompts, longest: [f"no, {image.width} {longest}" for image in images], "fp32", "abc")

    opened = []
    monkeypatch.setattr("openvision3.understand.chat.load_chat", lambda name, **more: opened.append((name, more)) or Stands())
    files.pope(tmp_path / "pope")
    arguments = ["--data", str(tmp_path / "pope"), "--out", str(tmp_path / "out"), "--max-tokens", "7", "--device", "cpu", "--tower", "t"]
    assert main(["evaluate", "vqa", "pope", "runs/chat", *arguments]) == 0
    assert opened == [("runs/chat", {"device": "cpu", "precision": "fp32", "tower": "t", "language": ""})]
    row = json.loads((tmp_path / "out" / "answers.jsonl").read_text().splitlines()[0])
    assert row["written"] == "no, 20 7" and row["model"] == "runs/chat" and row["read"] == "no"


def test_answers_are_not_kept_when_the_code_of_a_model_changes(tmp_path, own, capsys):
    command = ["evaluate", "vqa", "pope", own, "--data", str(tmp_path / "pope"), "--out", str(tmp_path / "out")]
    files.pope(tmp_path / "pope")
    assert main(command) == main(command) == 0
    (tmp_path / "own.py").write_text(OWN + "# another answer\n")
    assert main(command) == 2 and "holds answers by other settings" in capsys.readouterr().err


def test_benchmarks_are_listed(capsys):
    assert main(["evaluate", "vqa", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "usage: openvision3 evaluate vqa BENCHMARK MODEL" in printed
    assert all(f"  {name:13s} {benchmark.title}" in printed for name, benchmark in BENCHMARKS.items())


def test_questions_in_popes_shape_are_written_and_asked(tmp_path, own, capsys):
    for number, caption in enumerate(("A man with a dog", "A dog near a car", "A car and a bus", "A bird on a boat")):
        files.save(tmp_path / "data" / f"{number}.png", number)
        (tmp_path / "data" / f"{number}.txt").write_text(caption)
    out = str(tmp_path / "questions")
    assert main(["data", "pope", str(tmp_path / "data"), "--out", out, "--per-image", "2"]) == 0
    assert "16 random, 16 popular, 16 adversarial questions" in capsys.readouterr().out
    assert main(["evaluate", "vqa", "pope", own, "--data", out, "--out", str(tmp_path / "out")]) == 0
    assert "adversarial: yes_ratio" in capsys.readouterr().out
    assert main(["data", "pope", str(tmp_path / "data"), "--out", str(tmp_path / "data" / "inside")]) == 2
    assert "lies within" in capsys.readouterr().err
