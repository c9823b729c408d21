"""Paths on the command line: `~` is the home folder in every option that takes a path, and in no text."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from tiny_pipeline import pipeline, write_photo

from openvision3 import cli
from openvision3.cli import calibrate as cli_calibrate
from openvision3.cli import common, train
from openvision3.cli import data as cli_data
from openvision3.cli import evaluate as cli_evaluate
from openvision3.cli import search as cli_search
from openvision3.cli.evaluate import print_tables
from openvision3.cli.paths import check_apart, expand_home, expand_value
from openvision3.data.text import TextTokenizer
from openvision3.evaluate.protocol import Number
from openvision3.evaluate.results import Row, Setting
from openvision3.evaluate.tables import split
from openvision3.experiments.ablate import AblationOptions
from openvision3.files import write_whole
from openvision3.hub import ASSETS
from openvision3.train.run_folder import RunFolder

TEXTS = {
    *("labels", "prompt", "field", "caption_key", "caption_keys", "label_key", "only", "metrics", "names", "peer", "gpus", "recipe"),
    *("device", "precision", "revision", "shard_split", "track", "size", "compile", "levers", "kinds", "template", "texts", "label", "method", "group_key"),
    *("questions", "faiss"),
}
"""Options that hold words, names or numbers in words. A new option of type str is a path, with the hint `PathName`, or stands here."""


class Parsed(Exception):
    pass


def targets(monkeypatch) -> dict[str, Any]:
    """What each command hands to `common.parse`: a dataclass or a verb. Commands with help of their own are asked by a name that they know."""
    seen: dict[str, Any] = {}
    real = common.parse

    def parse(target: Any, argv: Any, program: str, **settings: Any) -> Any:
        seen[f"{program} {target.__name__}"] = target
        if settings.get("return_unknown_args"):
            return real(target, argv, program, **settings)
        raise Parsed

    for module in (common, train, cli_data, cli_evaluate, cli_calibrate, cli_search):
        monkeypatch.setattr(module, "parse", parse)
    inner = {
        "train": ["tiny"],
        "estimate": ["tiny"],
        "search": ["index", ""],
        "export": ["transformers", "diffusers"],
        "ablate": ["synergy"],
        "evaluate": ["reconstruction", "generation", "vqa pope", "table"],
        "data": [*cli_data.VERBS],
    }
    for verb in cli.verbs():
        for rest in inner.get(verb, [""]):
            with pytest.raises(Parsed):
                common.run_verb([verb, *rest.split()], cli.verbs(), "openvision3", "")
    return seen


def holds_strings(hint: Any) -> bool:
    return hint is str or (get_origin(hint) is not Literal and any(map(holds_strings, get_args(hint))))


def strings(target: Any) -> dict[str, Any]:
    """{name: hint} of the fields that hold strings, those of inner dataclasses by their names on the command line."""
    hints = get_type_hints(target, include_extras=True)
    hints.pop("return", None)
    if dataclasses.is_dataclass(target):  # without what belongs to the class
        hints = {field.name: hints[field.name] for field in dataclasses.fields(target)}
    inner = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    found = {name: hint for name, hint in hints.items() if name not in inner and holds_strings(hint)}
    return found | {f"{name}.{field}": hint for name, kind in inner.items() for field, hint in strings(kind).items()}


def test_every_option_of_every_command_expands_the_tilde_or_holds_words(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = targets(monkeypatch)
    assert len(seen) >= 19, sorted(seen)
    wrong = []
    for program, target in seen.items():
        for name, hint in strings(target).items():
            is_path = expand_value(hint, "~/x") == f"{tmp_path}/x" or expand_value(hint, "name=~/x") == f"name={tmp_path}/x"
            if is_path == (name.rpartition(".")[2] in TEXTS):
                wrong.append(f"{program}: {name}")
    assert not wrong, f"give these the hint PathName, or name them in TEXTS: {wrong}"


def parsed(verb: str, *argv: str) -> dict[str, Any]:
    """The arguments that a verb gets."""
    return common.parse(common.deferred(cli.verbs()[verb]), argv, f"openvision3 {verb}").keywords


def test_the_tilde_is_expanded_behind_an_equals_sign_in_globs_and_behind_a_name_and_nowhere_in_words(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = parsed("classify", "~/a/*.png", "x~/b.png", "--model=~/m", "--vae", "~/v", "--labels", "~/not a path", "~")
    assert found["images"] == (f"{tmp_path}/a/*.png", "x~/b.png") and found["model"] == f"{tmp_path}/m" and found["vae"] == f"{tmp_path}/v"
    assert found["labels"] == ("~/not a path", "~")
    argv = ["~/{0..3}.tar", "--model=~/m", "--out=~/new", "--prompt", "~/x", "--sheet=~/s.png"]
    job = common.parse(cli_data.RecaptionOptions, argv, "openvision3 data recaption")
    assert [job.data, job.model, job.out, job.prompt, job.sheet] == [
        (f"{tmp_path}/{{0..3}}.tar",),
        f"{tmp_path}/m",
        f"{tmp_path}/new",
        "~/x",
        f"{tmp_path}/s.png",
    ]
    options = common.parse(cli_evaluate.Options, ["--peer-folder", "flux-vae=~/w", "--data", "~/a", "b", "--out=~/o"], "openvision3 evaluate")
    assert options.peer_folder == (f"flux-vae={tmp_path}/w",) and options.data == (f"{tmp_path}/a", "b") and options.out == f"{tmp_path}/o"
    argv = ["--measure", "held out=~/held/*.tar", "--classify", "flowers=~/train.tar,~/val.tar"]
    grid = common.parse(AblationOptions, argv, "openvision3 ablate")
    assert grid.measure == (f"held out={tmp_path}/held/*.tar",) and grid.classify == (f"flowers={tmp_path}/train.tar,{tmp_path}/val.tar",)
    config = train.configure_run("tiny", ["--model.vae.name=~/vae", "--val=~/v", "--tokenizer=~/t.json", "--init", "~"])
    assert (config.model.vae.name, config.val, config.tokenizer, config.init) == (f"{tmp_path}/vae", (f"{tmp_path}/v",), f"{tmp_path}/t.json", str(tmp_path))


def test_a_home_that_is_not_known_is_refused_and_a_file_with_a_tilde_in_its_name_is_read(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^~nobody-here/x: the home folder ~nobody-here is unknown; write the whole path, or \./~nobody-here"):
        expand_home("~nobody-here/x")
    write_photo(tmp_path / "~lock.png")
    (tmp_path / "~kept").mkdir()
    assert [expand_home(path) for path in ("~lock.png", "~kept/x", "./~nobody-here/x", "a~b", "")] == [
        "~lock.png",
        "~kept/x",
        "./~nobody-here/x",
        "a~b",
        "",
    ]


def test_no_command_makes_a_folder_called_tilde(monkeypatch, tmp_path, capsys):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_photo(Path("home/a.png"))
    assert cli.main(["encode", "~/a.png", "--out=~/tokens"]) == 0
    assert os.listdir(tmp_path) == ["home"] and (tmp_path / "home" / "tokens" / "a.safetensors").is_file()


def test_what_a_command_writes_never_lies_in_the_data_that_it_reads(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    write_photo(Path("inside/sub/a.png"))
    write_photo(Path("inside/b.png"))
    Path("inside/sub/a.txt").write_text("a photo")
    Path("link").symlink_to("inside")
    pictures, data = ["inside"], ["--data", "inside", "--val", "inside"]
    for argv in (
        ["reconstruct", *pictures, "--out", "inside/new"],
        ["reconstruct", *pictures, "--out", "link/sub/../new/deep"],
        ["encode", "inside/sub", "--out", "inside/sub"],
        ["evaluate", "reconstruction", "--data", "link", "--out", "inside/new"],
        ["evaluate", "probe", "--data", "openmoji", "--train", "inside", "--out", "inside/new"],
        ["train", "tiny", *data, "--out", "inside/run"],
        ["train", "paper_mini", *data, "--out", "inside/run"],
        ["train", "tiny", "--data", "openmoji", "--val", "~/link", "--out=~/inside/run"],
        ["ablate", "tau", "--recipe", "tiny", *data, "--out", "inside/run"],
        ["data", "latents", "inside", "--out", "inside/latents"],
        ["data", "recaption", "inside", "--model", "m", "--out", "new", "--sheet", "inside/sheet.png"],
    ):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cli.main(argv) == 2, argv
        out, err = capsys.readouterr()
        assert ", and would be read as data; choose another folder with --" in err and err.count("\n") == 1 and not out, argv
        assert {str(p) for p in Path("inside").rglob("*")} == {"inside/b.png", "inside/sub", "inside/sub/a.png", "inside/sub/a.txt"}
    assert sorted(os.listdir()) == ["inside", "link"]
    check_apart("inside2", ["inside", "openmoji", "s3://bucket/inside2/*.tar", "nowhere"])
    check_apart("inside", ["inside/sub"])


def test_paths_and_words_that_are_not_utf8_are_one_line_or_work_and_never_a_traceback(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    odd = os.fsdecode(b"\xff")
    write_photo(Path(f"{odd}/{odd}.png"))
    shutil.copytree(ASSETS / "mini", f"m{odd}")
    assert cli.main(["encode", odd, "--out", f"o{odd}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["file"] == f"o{odd}/{odd}.safetensors"
    for argv, expected in (
        (["classify", odd, "--labels", f"{odd} cat", "dog"], r"a label is not UTF-8 text: '\udcff cat' holds half a character at 0"),
        (["train", "tiny", "--out", f"r{odd}"], r"'r\udcff' is not UTF-8, and TensorBoard needs the name of a run folder to be; name another with --out"),
        (["info", f"m{odd}"], r"m\udcff/model.safetensors' is not UTF-8, which safetensors needs of a path; give the folder another name"),
        (["info", f"n{odd}"], "unknown model 'n"),
        (["fetch", odd], "unknown file to fetch '"),
        (["data", "check", f"n{odd}"], "no such data: n"),
        ([odd], r"unknown command '\udcff'. Run `openvision3 --help` for all commands"),
    ):
        assert cli.main(argv) == 2, argv
        out, err = capsys.readouterr()
        assert expected in err and err.count("\n") == 1 and not out, argv
    write_whole("page.html", f"<p>{odd}</p>")
    assert Path("page.html").read_text() == r"<p>\udcff</p>"
    tokenizer = pipeline().tokenizer
    tokenizer.save(f"{odd}/tokenizer.json")
    assert len(TextTokenizer.load(f"{odd}/tokenizer.json")) == len(tokenizer)
    log = RunFolder(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["openvision3", "train", odd])
    log.describe({}, {})
    log.say(f"data {odd}")
    log.close()
    assert (tmp_path / "run" / "command.txt").read_bytes().endswith(b"train '\xff'\n")
    assert r"data \udcff" in (tmp_path / "run" / "log.txt").read_text()


def test_no_value_is_cut_from_a_table_of_results_in_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    setting = Setting("pics", "0" * 64, "64x64", "square", "fp32", 0)
    names = ("a/run/with/a/long/name", "another/run/with/a/long/name")
    rows = [Row(name, "1" * 64, Number("psnr", 12.345, 8, "how", "library"), setting) for name in names]
    print_tables(split(rows), rows, [])
    out = capsys.readouterr().out
    assert "…" not in out and out.count("12.3") == 2
