"""A folder gives the images that are in it; whatever else looks like data is left out for a reason that is told."""

import json
import os
import tarfile
import unicodedata
from collections import Counter

import pytest
from PIL import Image

from openvision3 import device
from openvision3.cli import main
from openvision3.data.folders import FolderSource
from openvision3.data.images import ImageError
from openvision3.data.labelled import read_labels
from openvision3.data.names import open_source
from openvision3.pipeline import expand_images


def put(path, caption=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), "red").save(path, "JPEG" if path.suffix.lower() in (".jfif", ".heic") else None)
    if caption:
        path.with_suffix(".txt").write_text(caption)


def reasons(source) -> Counter:
    return Counter(problem["reason"] for problem in source.problems)


def test_hidden_and_system_folders_are_neither_data_nor_classes_and_are_counted(tmp_path):
    for name in ("cat/1.png", "dog/1.png", ".ipynb_checkpoints/1.png", "@eaDir/1.png", "cat/._1.png", "__MACOSX/cat/1.png", "cat/.thumbnails/1.png"):
        put(tmp_path / name)
    (tmp_path / "cat/.DS_Store").write_bytes(b"x")
    source = FolderSource(tmp_path)
    assert source.names == ["cat/1.png", "dog/1.png"]
    assert read_labels(source, least=0).names == ("cat", "dog")
    assert reasons(source) == {"hidden or of the system": 5}


def test_what_a_command_has_written_is_not_read_back(tmp_path):
    put(tmp_path / "1.png", "one")
    (tmp_path / "run/samples").mkdir(parents=True)
    put(tmp_path / "run/samples/step.png")
    (tmp_path / "run/config.json").write_text("{}")
    (tmp_path / "run/metrics.jsonl").write_text("")
    put(tmp_path / "evaluation/images/1.png")
    for name in ("results.json", "report.html"):
        (tmp_path / "evaluation" / name).write_text("{}")
    source = FolderSource(tmp_path)
    assert source.names == ["1.png"]
    assert reasons(source) == {"folder of an output": 2}
    assert FolderSource(tmp_path / "evaluation").names == ["images/1.png"], "named itself, it is read"
    assert expand_images([str(tmp_path)]) == [str(tmp_path / "1.png")]


def test_images_that_are_not_read_are_counted_by_ending(tmp_path):
    for name in ("1.jpg", "2.JFIF", "3.heic", "4.tga", "5.heic", "6.svg"):
        put(tmp_path / "x.jpg")
        (tmp_path / "x.jpg").rename(tmp_path / name)
    source = FolderSource(tmp_path)
    assert source.names == ["1.jpg", "2.JFIF"]
    assert reasons(source) == {".heic file, which is not read": 2, ".tga file, which is not read": 1, ".svg file, which is not read": 1}


def test_linked_folders_are_read_once_whatever_they_lead_to(tmp_path):
    put(tmp_path / "elsewhere/2.png")
    put(tmp_path / "data/real/1.png")
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a_loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/a_real").symlink_to(tmp_path / "data/real")
    (tmp_path / "data/gone.png").symlink_to(tmp_path / "nothing")
    source = FolderSource(tmp_path / "data")
    assert source.names == ["again/2.png", "real/1.png"]
    assert reasons(source) == {"linked folder that is read already": 3, "missing": 1}
    (tmp_path / "links").mkdir()
    (tmp_path / "links/all").symlink_to(tmp_path / "elsewhere")
    assert FolderSource(tmp_path / "links").names == ["all/2.png"]


def test_images_beside_shards_and_archives_beside_images_are_counted(tmp_path):
    put(tmp_path / "shards/1.png")
    put(tmp_path / "shards/2.png")
    put(tmp_path / "x/0.jpg", "red")
    with tarfile.open(tmp_path / "shards/0.tar", "w") as tar:
        tar.add(tmp_path / "x/0.jpg", "0.jpg")
        tar.add(tmp_path / "x/0.txt", "0.txt")
    source = open_source((str(tmp_path / "shards"),))
    assert reasons(source)["image beside shards, which is not read"] == 2
    put(tmp_path / "loose/1.png")
    (tmp_path / "loose/sub").mkdir()
    (tmp_path / "loose/sub/old.zip").write_bytes(b"PK")
    assert reasons(FolderSource(tmp_path / "loose")) == {"archive among images, which is not read": 1}


@pytest.mark.parametrize("ending", [".txt", ".TXT", ".Txt"])
def test_a_text_is_found_whatever_the_case_of_its_ending(ending, tmp_path):
    put(tmp_path / "IMG_0.JPG")
    (tmp_path / f"IMG_0{ending}").write_text("a red square")
    assert FolderSource(tmp_path).captions(0) == ("a red square",)


DECOMPOSED = unicodedata.normalize("NFD", "café.png")


@pytest.mark.parametrize(("on_disk", "in_table"), [(DECOMPOSED, "café.png"), ("café.png", DECOMPOSED), ("sub/b.png", "sub\\b.png"), ("Cat.PNG", "cat.png")])
@pytest.mark.parametrize("table", ["captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl"])
def test_a_table_names_the_image_that_file_systems_take_for_the_same(table, on_disk, in_table, tmp_path):
    put(tmp_path / on_disk)
    row = {"file_name": in_table, "text": "red"}
    text = json.dumps(row) if table.endswith("jsonl") else f"file_name,text\n{in_table},red\n"
    (tmp_path / table).write_text(text, encoding="utf-8")
    source = FolderSource(tmp_path)
    assert source.captions(0) == ("red",)
    assert not source.problems


def test_a_name_that_fits_two_images_is_matched_with_neither_and_both_are_named(tmp_path):
    put(tmp_path / "Cat.png")
    put(tmp_path / "CAT.png")
    put(tmp_path / "dog1.png")
    (tmp_path / "captions.csv").write_text("file,caption\ncat.png,a\ndog.png,b\nCAT.png,c\n")
    source = FolderSource(tmp_path)
    assert [source.captions(i) for i in range(3)] == [("c",), (), ()]
    details = [problem["detail"] for problem in source.problems]
    assert "similar are CAT.png and Cat.png" in details[0]
    assert "similar is dog1.png" in details[1]


def test_tables_in_sub_folders_name_files_beside_them(tmp_path):
    put(tmp_path / "train/1.png")
    (tmp_path / "train/metadata.jsonl").write_text('{"file_name": "1.png", "text": "red"}\n')
    assert FolderSource(tmp_path).captions(0) == ("red",)


def test_a_metadata_table_about_something_else_is_told_of_and_costs_nothing(tmp_path):
    put(tmp_path / "1.png", "red")
    (tmp_path / "metadata.csv").write_text("camera,lens\nx,y\n")
    source = FolderSource(tmp_path)
    assert source.captions(0) == ("red",)
    assert reasons(source)["table without captions, which is not used"] == 1


def test_data_check_looks_at_a_folder_as_at_shards(tmp_path, capsys):
    put(tmp_path / "data/1.png", "red")
    put(tmp_path / "data/2.png")
    put(tmp_path / "data/3.jpg", "red")
    (tmp_path / "data/3.jpg").write_bytes((tmp_path / "data/3.jpg").read_bytes()[:200])
    put(tmp_path / "data/.hidden/4.png")
    assert main(["data", "check", str(tmp_path / "data"), "--json"]) == 2
    looked = json.loads(capsys.readouterr().out)
    assert (looked["folders"], looked["samples"], looked["usable"]) == (1, 3, 2)
    assert looked["reasons"] == {"hidden or of the system": 1, "no caption": 1}
    assert main(["data", "check", str(tmp_path / "data"), "--decode"]) == 2
    shown = capsys.readouterr().out
    assert "1 folders, 3 samples" in shown
    assert "1 samples without a flaw" in shown
    put(tmp_path / "good/1.png", "red")
    assert main(["data", "check", str(tmp_path / "good"), "--decode"]) == 0


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert device.cores() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(device.Path, "read_text", lambda self: "150000 100000\n")
    assert device.cores() == 2
    monkeypatch.setattr(device.Path, "read_text", lambda self: "max 100000\n")
    assert device.cores() == 64


def test_a_folder_of_sub_folders_is_expanded_and_an_empty_one_says_what_it_holds(tmp_path):
    put(tmp_path / "nest/a/1.png")
    put(tmp_path / "nest/b/2.png")
    assert expand_images([str(tmp_path / "nest")]) == [str(tmp_path / "nest/a/1.png"), str(tmp_path / "nest/b/2.png")]
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone/1.heic").write_bytes(b"")
    (tmp_path / "phone/s").mkdir()
    (tmp_path / "phone/s/0.tar").write_bytes(b"")
    with pytest.raises(ImageError, match=r"1 \.heic file, which is not read"):
        expand_images([str(tmp_path / "phone")])
    with pytest.raises(ValueError, match=r"name the shards: .*phone/s/\*\.tar"):
        FolderSource(tmp_path / "phone")
