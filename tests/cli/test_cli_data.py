"""`data index` and `data check` as a person and a script see them."""

import json
import os
import signal
from pathlib import Path

import pytest
from shard_files import jpeg, three, write_shard

from openvision3 import cli
from openvision3.data.shards import check


@pytest.fixture
def folder(tmp_path) -> Path:
    for i in range(2):
        write_shard(tmp_path / "data" / f"{i:05d}.tar", three(3 * i))
    (tmp_path / "data" / "00000.parquet").touch()
    (tmp_path / "data" / "00000_stats.json").write_text("{}")
    return tmp_path / "data"


def run(capsys, *argv) -> tuple[int, str, str]:
    code = cli.main(["data", *map(str, argv)])
    return code, *capsys.readouterr()


def test_index_writes_beside_the_shards_and_only_what_is_needed(folder, capsys):
    code, out, error = run(capsys, "index", folder)
    assert (code, error) == (0, "")
    assert out == "2 shards, 6 samples, 0.00 GB: 2 indexes written\n"
    assert sorted(p.name for p in folder.glob("*.index")) == ["00000.tar.index", "00001.tar.index"]
    write_shard(folder / "00001.tar", three(3) | three(9))
    assert run(capsys, "index", f"{folder}/*")[1] == "2 shards, 9 samples, 0.00 GB: 1 indexes written, 1 fitted already\n"
    assert run(capsys, "index", folder, "--again")[1].endswith("2 indexes written\n")


def test_index_of_many_shards_in_several_processes_is_the_same(folder, capsys):
    for i in range(2, 9):
        write_shard(folder / f"{i:05d}.tar", three(3 * i))
    assert run(capsys, "index", folder, "--workers", 1)[0] == 0
    alone = {p.name: p.read_bytes() for p in folder.glob("*.index")}
    code, out, _ = run(capsys, "index", folder, "--workers", 3, "--again", "--json")
    found = json.loads(out)
    assert (code, found["shards"], found["samples"], found["written"], found["failed"]) == (0, 9, 27, 9, [])
    assert {p.name: p.read_bytes() for p in folder.glob("*.index")} == alone


def test_index_names_what_it_cannot_do_and_does_the_rest(folder, capsys, tmp_path):
    (folder / "00001.tar").write_bytes((folder / "00001.tar").read_bytes()[:2000])
    code, out, error = run(capsys, "index", f"{folder}/{{00000..00002}}.tar", "--index", tmp_path / "indexes")
    assert code == 2
    assert "2 indexes written" in out
    assert "1 damaged shard" in out
    assert error == f"openvision3: {folder}/00002.tar: no such shard\n"
    assert len(list((tmp_path / "indexes").iterdir())) == 2
    code, _, error = run(capsys, "index", "https://example.invalid/0.tar")
    assert code == 2
    assert "need a local folder; name it with --index FOLDER" in error
    (tmp_path / "file").touch()
    code, _, error = run(capsys, "index", folder, "--index", tmp_path / "file")
    assert code == 2
    assert "00000.tar" in error


def test_check_of_whole_shards_says_so(folder, capsys):
    code, out, error = run(capsys, "check", folder, "--decode")
    assert (code, error) == (0, "")
    assert out == "2 shards, 6 samples, 0.00 GB; 6 samples without a flaw (tar, members, JSON, captions and images)\n"


def test_check_counts_by_reason_and_leaves_with_two(folder, capsys):
    write_shard(folder / "00002.tar", three() | {"x.jpg": b"<html>", "x.txt": b"a", "y.jpg": jpeg(), "z.txt": b"alone"})
    (folder / "00003.tar").write_bytes(b"")
    names = f"{folder}/{{00000..00004}}.tar"
    code, out, _ = run(capsys, "check", names, "--decode", "--json")
    found = json.loads(out)
    assert code == 2
    assert found["reasons"] == {"no image": 1, "not an image": 1, "no caption": 1, "damaged shard": 1, "missing": 1}
    assert (found["shards"], found["samples"], found["usable"]) == (5, 11, 9)
    assert {p["key"] for p in found["problems"]} >= {"00002/x", "00002/y", "00002/z", f"{folder}/00004.tar"}
    code, out, _ = run(capsys, "check", names)
    assert code == 2
    assert "│" in out
    assert "1 no image, such as 00002/z: only txt" in out
    assert "00000.tar" not in out.split("5 shards")[0], "whole shards take no row"


def test_samples_with_several_captions_are_told_as_json(folder, capsys):
    write_shard(folder / "00000.tar", {"0.jpg": jpeg(), "0.txt": b"a\nb"})
    code, out, _ = run(capsys, "check", folder / "00000.tar", "--json")
    found = json.loads(out)
    assert code == 0 and found["captions"] == {"2": 1} == found["each"][0]["captions"]


def test_a_process_that_is_killed_is_one_line(folder, capsys, monkeypatch):
    for i in range(2, 5):
        write_shard(folder / f"{i:05d}.tar", three(3 * i))
    monkeypatch.setattr(check, "check_shard", killed)
    code, _, error = run(capsys, "check", folder, "--workers", "2")
    assert code == 2 and error.count("\n") == 1 and "a process ended while" in error and "--workers" in error


def killed(*_, **__):
    """Stands for a process that the system ends for its memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_check_takes_captions_where_training_takes_them(folder, capsys):
    write_shard(folder / "00000.tar", {"0.jpg": jpeg(), "0.json": json.dumps({"re_caption": "a"}).encode()})
    assert run(capsys, "check", folder / "00000.tar")[0] == 2
    assert run(capsys, "check", folder / "00000.tar", "--caption-keys", "re_caption", "org_caption")[0] == 0


@pytest.mark.parametrize("verb", ["index", "check"])
def test_what_is_no_shard_is_one_line_and_two(tmp_path, capsys, verb):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    no_shards = [(tmp_path, "indexes .tar files")] if verb == "index" else []  # a folder of images can be checked
    for name, message in ((tmp_path / "none", "no such data"), *no_shards, (tmp_path / "a.jpg", "neither a folder nor")):
        code, out, error = run(capsys, verb, name)
        assert (code, out, error.count("\n")) == (2, "", 1)
        assert message in error
    assert run(capsys, verb)[0] == 2


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_shards_can_be_told_apart_however_narrow_the_terminal(columns, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(columns))
    names = [f"a_folder_with_a_long_name/of_shards-{i:05d}.tar" for i in range(2)]
    for name in names:
        write_shard(Path(name), {"a.txt": b"no image"})
    code, out, _ = run(capsys, "check", *names)
    rows = [line.split("│")[1:-1] or line.split("┃")[1:-1] for line in out.splitlines()]
    cells = "".join(row[0].strip() for row in rows if len(row) == 4)
    assert code == 2 and all(name in cells for name in names) and "…" not in out
    assert all(len(line) <= columns for line in out.splitlines()[:-2])


def test_a_class_is_told_from_no_caption_at_all_in_shards_and_folders(tmp_path, capsys):
    write_shard(tmp_path / "0.tar", {"a.jpg": jpeg(), "a.cls": b"3", "b.jpg": jpeg()})
    (tmp_path / "images/cat").mkdir(parents=True)
    for name in ("images/cat/1.jpg", "images/2.jpg"):
        (tmp_path / name).write_bytes(jpeg())
    for data in (tmp_path / "0.tar", tmp_path / "images"):
        code, out, _ = run(capsys, "check", data, "--json")
        assert (code, json.loads(out)["reasons"]) == (2, {"class but no caption": 1, "no caption": 1})
