"""Images by name in folders, zip archives and tars."""

from __future__ import annotations

import multiprocessing
import pickle
import tarfile
import zipfile

import pytest
from PIL import Image

from openvision3.data import named_images
from openvision3.data.images import ImageError
from openvision3.data.named_images import NamedImages


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "images/b.jpg", "images/test/7/image.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 9), (len(name), 0, 0)).save(tmp_path / name)
    return tmp_path


def archive(folder, kind: str):
    path = folder / f"images.{kind}"
    files = [path for path in sorted(folder.rglob("*.*")) if path.suffix in (".png", ".jpg")]
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as writer:
            for file in files:
                writer.write(file, file.relative_to(folder))
    else:
        with tarfile.open(path, "w") as writer:
            for file in files:
                writer.add(file, f"./{file.relative_to(folder)}")
    return path


def test_names_are_found_below_a_folder_with_or_without_their_ending(folder):
    images = NamedImages([folder])
    assert [images.open(name).size for name in ("a.png", "a", "b.jpg", "images/b.jpg", "7/image.png")] == [(8, 9)] * 5
    assert images.find("c.png") is None


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_are_found_in_archives_by_their_path_or_their_last_part(folder, kind):
    images = NamedImages([archive(folder, kind)])
    for name in ("a.png", "a", "b.jpg", "images/b.jpg", "images/test/7/image.png"):
        assert images.open(name).size == (8, 9), name
    with pytest.raises(ImageError, match=r"no image c.png in .*images") as seen:
        images.open("c.png")
    assert seen.value.reason == "missing"


def test_places_are_tried_in_turn(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    Image.new("RGB", (3, 3)).save(other / "a.png")
    assert NamedImages([other, folder]).open("a.png").size == (3, 3)
    assert NamedImages([other, folder]).open("b.jpg").size == (8, 9)


def test_what_is_no_place_of_images_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a.txt is no folder, .zip or .tar of images: it holds text"):
        NamedImages([tmp_path / "a.txt"])
    with pytest.raises(FileNotFoundError, match="no such folder or archive of images"):
        NamedImages([tmp_path / "none"])


def test_a_name_that_leads_out_of_its_folder_is_missing(folder):
    images = NamedImages([folder / "images", archive(folder, "zip")])
    for name in ("../a.png", str(folder / "a.png"), "test/../../a.png", "", f"x/{folder / 'a.png'}", "a" * 300 + ".png", "é" * 130, "\ud800.png"):
        with pytest.raises(ImageError, match="no image") as seen:
            images.open(name)
        assert seen.value.reason == "missing"


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_damaged_member_is_one_unreadable_image(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as writer:
            writer.writestr("a.png", b"hello world " * 100)
        content = bytearray(path.read_bytes())
        content[35:37] = b"\xff\xff"
        path.write_bytes(content)
    else:
        with tarfile.open(path, "w") as writer:
            link = tarfile.TarInfo("a.png")
            link.type, link.linkname = tarfile.SYMTYPE, "gone.png"
            writer.addfile(link)
    with pytest.raises(ImageError, match="cannot be unpacked") as seen:
        NamedImages([path]).open("a.png")
    assert seen.value.reason == "unreadable"


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_member_that_would_fill_the_memory_is_not_unpacked(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(named_images, "LARGEST", 1000)
    (tmp_path / "a.png").write_bytes(bytes(1001))
    path = archive(tmp_path, kind)
    with pytest.raises(ImageError, match="holds more than") as seen:
        NamedImages([path]).open("a.png")
    assert seen.value.reason == "too large"


def test_the_last_part_of_a_name_stands_for_one_member_only(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as writer:
        for name in ("coco/1.jpg", "gqa/1.jpg", "gqa/2.jpg"):
            writer.writestr(name, name)
    images = NamedImages([tmp_path / "a.zip"])
    assert images.read("2.jpg") == b"gqa/2.jpg" and images.find("1.jpg") is None and images.find("vg/2.jpg") is None


def _read_many(store: NamedImages, names: list[str], answers: multiprocessing.Queue) -> None:
    answers.put([store.read(name) for name in names])


def test_a_zip_file_is_read_by_forked_and_by_fresh_processes(tmp_path):
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for i in range(50):
            archive.writestr(f"{i}.png", bytes([i]) * 5000)
    names, wanted = [f"{i}.png" for i in range(50)], [bytes([i]) * 5000 for i in range(50)]
    store = NamedImages([str(tmp_path / "b.zip")])
    assert [pickle.loads(pickle.dumps(store)).read(name) for name in names[:2]] == wanted[:2]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    forked = [context.Process(target=_read_many, args=(store, names, answers)) for _ in range(2)]
    for process in forked:
        process.start()
    assert [store.read(name) for name in names] == wanted
    assert all(answers.get(timeout=60) == wanted for _ in forked)
    for process in forked:
        process.join()
