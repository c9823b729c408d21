"""An index of images: its layout, what is embedded again, what is refused, and answers that are the nearest by an independent formula."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_files import write_shard
from tiny_pipeline import make_pipeline, write_photo

import openvision3 as ov3
from openvision3.cli import main
from openvision3.search.answer import ask, write_sheet
from openvision3.search.index import SearchIndex, update

parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    make_pipeline().save(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(model):
    return ov3.load(model, device="cpu")


def photos(folder: Path, count: int = 5) -> Path:
    for number in range(count):
        write_photo(folder / f"{number}.png", 80, 64, seed=number)
        (folder / f"{number}.txt").write_text(f"photo {number}")
    return folder


def vectors(folder: Path) -> np.ndarray:
    return np.load(folder / "img_emb" / "img_emb_0.npy")


def test_the_folder_has_clip_retrievals_layout_and_holds_the_embeddings_of_the_model(tmp_path, pipeline, model):
    data = photos(tmp_path / "pics")
    built = update([str(data)], tmp_path / "index", pipeline, str(model), batch=2)
    assert (built.rows, built.embedded, built.removed, len(built.problems)) == (5, 5, 0, 0)
    table = parquet.read_table(tmp_path / "index" / "metadata" / "metadata_0.parquet").to_pydict()
    assert table["caption"] == [f"photo {number}" for number in range(5)] and table["image_path"] == [str(data / f"{number}.png") for number in range(5)]
    stored = vectors(tmp_path / "index")
    assert stored.dtype == np.float16
    squares = [Image.open(data / f"{number}.png").crop((8, 0, 72, 64)) for number in range(5)]
    expected = np.concatenate([pipeline.embed_images(square).numpy() for square in squares])
    np.testing.assert_allclose(stored, expected, atol=2e-3)


def test_only_new_and_changed_images_are_embedded_again(tmp_path, pipeline, model, monkeypatch):
    data, out = photos(tmp_path / "pics"), tmp_path / "index"
    run = lambda: update([str(data)], out, pipeline, str(model))  # noqa: E731
    run()
    whole = vectors(out)
    assert run().embedded == 0 and (vectors(out) == whole).all()
    os.utime(data / "0.png")  # the same bytes
    (data / "1.png").rename(data / "renamed.png")
    write_photo(data / "2.png", 80, 64, seed=22)
    (data / "3.png").unlink()
    write_photo(data / "new.png", 80, 64, seed=9)
    built = run()
    assert (built.rows, built.embedded, built.removed) == (5, 2, 2)
    shutil.rmtree(tmp_path / "anew", ignore_errors=True)
    update([str(data)], tmp_path / "anew", pipeline, str(model))
    np.testing.assert_allclose(vectors(out), vectors(tmp_path / "anew"), atol=2e-3)
    changed = SearchIndex(out).table()
    assert [Path(path).name for path in changed["image_path"]] == ["0.png", "2.png", "4.png", "new.png", "renamed.png"]


@pytest.mark.parametrize("seed", range(2))
def test_whatever_happens_to_the_files_an_update_gives_the_index_that_is_made_anew(tmp_path, pipeline, model, seed):
    chance, data, out = random.Random(seed), photos(tmp_path / "pics", 4), tmp_path / "index"
    update([str(data)], out, pipeline, str(model))
    for step in range(3):
        for _ in range(3):
            one, other = data / f"{chance.randrange(6)}.png", data / f"{chance.randrange(6)}.png"
            what = chance.choice(("write", "touch", "delete", "rename", "copy", "caption"))
            if what == "write" or not one.is_file():
                write_photo(one, 80, 64, seed=chance.randrange(5))
            elif what == "touch":
                os.utime(one, (step, step))
            elif what == "delete":
                one.unlink()
            elif what == "rename":
                one.rename(other)
            elif what == "copy" and one != other:
                shutil.copyfile(one, other)
            elif what == "caption":
                one.with_suffix(".txt").write_text(f"caption of step {step}")
        write_photo(data / "always.png", 80, 64)
        built = update([str(data)], out, pipeline, str(model))
        update([str(data)], tmp_path / f"anew{step}", pipeline, str(model))
        index, anew = SearchIndex(out), SearchIndex(tmp_path / f"anew{step}")
        assert index.table() == anew.table() and built.rows == len(anew.table()["key"])
        np.testing.assert_allclose(index.embeddings, anew.embeddings, atol=2e-3)


def test_an_interrupted_index_keeps_what_it_has(tmp_path, pipeline, model, monkeypatch):
    data, out = photos(tmp_path / "pics"), tmp_path / "index"
    real, calls = pipeline.embed_images, []

    def interrupted(images):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(images)

    monkeypatch.setattr(pipeline, "embed_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        update([str(data)], out, pipeline, str(model), batch=2)
    monkeypatch.setattr(pipeline, "embed_images", real)
    assert SearchIndex(out).config.rows == 2
    assert update([str(data)], out, pipeline, str(model)).embedded == 3


def test_answers_are_the_rows_of_the_largest_cosines(tmp_path, pipeline, model, monkeypatch):
    data = photos(tmp_path / "pics", 7)
    write_shard(tmp_path / "0.tar", {"a.png": write_photo(tmp_path / "x.png", seed=50).read_bytes(), "a.txt": b"in a shard"})
    update([str(data), str(tmp_path / "0.tar")], tmp_path / "index", pipeline, str(model))
    index = SearchIndex(tmp_path / "index")
    monkeypatch.setattr("openvision3.search.index.ROWS", 3)
    query = pipeline.embed_texts(["red heart"])[0].numpy()
    cosines = vectors(tmp_path / "index").astype(np.float64) @ query
    hits = ask(index, pipeline, "red heart", 4)
    assert [hit.position for hit in hits] == np.argsort(-cosines)[:4].tolist()
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(cosines)[::-1][:4], atol=1e-5)
    first = ask(index, pipeline, str(data / "3.png"), 1)[0]
    assert first.path == str(data / "3.png") and first.score > 0.999
    assert len(ask(index, pipeline, "red heart", 100)) == 8


def test_faiss_finds_the_same_rows(tmp_path, pipeline, model):
    pytest.importorskip("faiss")
    data, out = photos(tmp_path / "pics", 6), tmp_path / "index"
    update([str(data)], out, pipeline, str(model), faiss_index="Flat")
    assert [hit.path for hit in ask(SearchIndex(out), pipeline, "red heart", 3, "faiss")] == [
        hit.path for hit in ask(SearchIndex(out), pipeline, "red heart", 3)
    ]
    write_photo(data / "new.png", 80, 64, seed=9)
    update([str(data)], out, pipeline, str(model))
    assert len(ask(SearchIndex(out), pipeline, "red heart", 20, "faiss")) == 7, "an update keeps the kind of index"


def test_the_command_prints_rows_and_writes_a_sheet(tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "pics", 3)
    assert main(["search", "index", "pics", "--out", "idx", "--model", str(model), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "idx: 3 images, 3 of them embedded now; 0 rows removed\n"
    (tmp_path / "pics" / "1.png").unlink()
    assert main(["search", "idx", "red heart", "-n", "3", "--out", "found.png", "--device", "cpu", "--json"]) == 0
    told = capsys.readouterr()
    assert len(json.loads(told.out)["images"]) == 3 and "1.png is not shown" in told.err
    assert Image.open("found.png").width > 180
    assert main(["search", "idx", str(tmp_path / "pics" / "2.png"), "--out", "new/found.html", "--device", "cpu"]) == 0
    assert (tmp_path / "new" / "found.html").read_text().count("<img") == 3


def test_files_that_come_and_go_after_indexing_leave_the_others_on_the_sheet(tmp_path, pipeline, model):
    data = photos(tmp_path / "pics", 4)
    update([str(data)], tmp_path / "index", pipeline, str(model))
    index = SearchIndex(tmp_path / "index")
    hits = ask(index, pipeline, "red heart", 4)
    sheet = lambda: write_sheet(tmp_path / "sheet.png", index, "red heart", hits)  # noqa: E731
    assert sheet() == []
    whole = (tmp_path / "sheet.png").read_bytes()
    write_photo(data / "000.png", 80, 64, seed=9)  # before all others
    assert sheet() == [] and (tmp_path / "sheet.png").read_bytes() == whole
    (data / "2.png").unlink()
    assert [line.split(" is not shown")[0] for line in sheet()] == [str(data / "2.png")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "red"], "nowhere is no index of images: it holds no index.json; make one with openvision3 search index DATA --out nowhere"),
        (["idx", " "], "the question is empty"),
        (["idx", "cat.jpg"], "no such image: cat.jpg"),
        (["idx", "red", "-n", "0"], "ask for 1 image or more"),
        (["idx", "red", "--out", "found.jpg"], "must end in .png or .html"),
        (["idx", "red", "--out", "pics/found.png"], "lies within"),
        (["idx", "red", "--engine", "faiss"], "holds no image.index"),
        (["idx", "red", "--model", "OTHER"], "holds embeddings of the model"),
        (["index", "pics", "--out", "pics2", "--model", "OTHER"], "holds embeddings of the model"),
        (["index", "other", "--out", "idx"], "is the index of"),
        (["index", "pics", "--out", "other"], "holds something else, such as 0.png"),
        (["index", "pics", "--out", "fresh", "--faiss", "Flatt"], "faiss knows no index 'Flatt'"),
        (["index", "pics", "--out", "fresh", "--batch", "0"], "batch 0 must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(tmp_path_factory, model, pipeline, capsys, monkeypatch, arguments, words):
    place = tmp_path_factory.getbasetemp() / "bad"
    if not place.is_dir():
        photos(place / "pics", 2)
        write_photo(place / "other" / "0.png")
        make_pipeline(seed=1).save(place / "model")
        for out in ("idx", "pics2"):
            update([str(place / "pics")], place / out, pipeline, str(model))
    monkeypatch.chdir(place)
    state = lambda: sorted((str(path), path.is_file() and path.stat().st_mtime_ns) for path in place.rglob("*"))  # noqa: E731
    before = state()
    named = [str(place / "model") if word == "OTHER" else word for word in arguments]
    if arguments[0] == "index" and "OTHER" not in arguments:
        named += ["--model", str(model)]
    assert main(["search", *named, "--device", "cpu"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0]
    assert state() == before


def test_words_that_the_model_does_not_know_are_told_in_one_line(tmp_path, pipeline, model, capsys, monkeypatch):
    update([str(photos(tmp_path / "pics"))], tmp_path / "idx", pipeline, str(model))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["search", "idx", "\u65e5\u672c\u8a9e", "--device", "cpu"]) == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("openvision3: ") and "unknown" in errors[0]


def test_what_is_embedded_is_kept_when_faiss_cannot_be_trained_or_the_disk_is_full(tmp_path, pipeline, model, monkeypatch):
    pytest.importorskip("faiss")
    data, out = photos(tmp_path / "pics"), tmp_path / "index"
    with pytest.raises(ValueError, match="faiss cannot make 'IVF64,Flat' of 5 images, which are indexed without it"):
        update([str(data)], out, pipeline, str(model), faiss_index="IVF64,Flat")
    assert SearchIndex(out).config.rows == 5
    before = vectors(out)
    (out / "image.index").write_bytes(b"of more images")
    with pytest.raises(ValueError, match="faiss cannot make"):
        update([str(data)], out, pipeline, str(model), faiss_index="IVF64,Flat")
    assert not (out / "image.index").exists(), "an index of other vectors would be taken for one of these"

    def full(*_):
        raise OSError(28, "No space left on device")

    write_photo(data / "new.png", 80, 64, seed=9)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(parquet, "write_table", full)
        update([str(data)], out, pipeline, str(model))
    assert SearchIndex(out).config.rows == 5 and np.array_equal(vectors(out), before)
    assert update([str(data)], out, pipeline, str(model)).rows == 6


def test_of_two_equal_files_a_touched_one_stays_a_row(tmp_path, pipeline, model):
    data = photos(tmp_path / "pics", 2)
    shutil.copyfile(data / "0.png", data / "copy.png")
    update([str(data)], tmp_path / "index", pipeline, str(model))
    os.utime(data / "copy.png", (1, 1))
    again = update([str(data)], tmp_path / "index", pipeline, str(model))
    assert (again.rows, again.embedded, again.removed) == (3, 0, 0)


def test_a_damaged_index_is_refused(tmp_path, pipeline, model):
    update([str(photos(tmp_path / "pics", 2))], tmp_path / "index", pipeline, str(model))
    file = tmp_path / "index" / "img_emb" / "img_emb_0.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"img_emb_0\.npy is damaged"):
        SearchIndex(tmp_path / "index")
