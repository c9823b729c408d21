"""Folders and shards: what is whole is read, what is not is named in `problems`, and no two samples share a key."""

import json
import os
import pickle
import shutil
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_files import captions, jpeg, keys, reasons, three, write_shard
from small_runs import pictures, take

from openvision3.data import openmoji
from openvision3.data.batches import BatchPlan, TextShape, TrainingBatches
from openvision3.data.folders import FolderSource
from openvision3.data.images import ImageError, open_image
from openvision3.data.names import DataOptions, expand, open_source
from openvision3.data.openmoji import EmojiSource
from openvision3.data.problems import count_reasons
from openvision3.data.shards import tars
from openvision3.data.shards.source import ShardSource
from openvision3.data.sources import MixedSource
from openvision3.data.text import TextTokenizer
from openvision3.distributed import Ranks
from openvision3.draws import draw_seed

DATA = Path(__file__).parents[3] / "shared" / "data"


# --- shards ---------------------------------------------------------------------------------------------------------------


def test_a_shard_as_img2dataset_writes_it_is_read_whole(tmp_path):
    source = ShardSource([write_shard(tmp_path / "00000.tar", three())])
    assert keys(source) == ["00000/000000000", "00000/000000001", "00000/000000002"]
    assert captions(source) == [("caption 0",), ("caption 1",), ("caption 2",)]
    assert source.data(1) == jpeg()
    assert not source.problems


def test_equal_stems_in_several_shards_get_unlike_keys_and_their_own_pictures(tmp_path):
    paths = [
        write_shard(tmp_path / "photos" / "train-0000.tar", {"0.jpg": jpeg("red"), "0.txt": b"a"}),
        write_shard(tmp_path / "pictures" / "train-0000.tar", {"0.jpg": jpeg("blue"), "0.txt": b"b"}),
        write_shard(tmp_path / "pictures" / "train-0001.tar", {"0.jpg": jpeg("lime"), "0.txt": b"c"}),
    ]
    source = ShardSource(paths)
    assert keys(source) == ["photos/train-0000/0", "pictures/train-0000/0", "pictures/train-0001/0"]
    assert captions(source) == [("a",), ("b",), ("c",)]
    assert [max(range(3), key=source.image(i, 8).getpixel((4, 4)).__getitem__) for i in range(3)] == [0, 2, 1]


def test_keys_do_not_depend_on_where_the_data_lies(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "a" / "00000.tar", three())
    absolute = keys(ShardSource([path]))
    monkeypatch.chdir(tmp_path / "a")
    assert keys(ShardSource(["00000.tar"])) == absolute


def test_sample_keys_are_those_of_the_images_wherever_they_lie_and_whatever_is_named_beside_them(tmp_path):
    """Shards of equal names, moved, renamed, packed anew, unpacked into a folder, alone or among others."""
    images = {f"{i}.jpg": jpeg((40 * i, 99, 0)) for i in range(6)}
    for place, names in (("a", "012"), ("b", "345")):
        write_shard(tmp_path / "d" / place / "00000.tar", {f"{n}.{e}": images[f"{n}.jpg"] if e == "jpg" else b"x" for n in names for e in ("jpg", "txt")})
    write_shard(tmp_path / "again" / "all.tar", {f"in/{n}.jpg": images[f"{n}.jpg"] for n in "543210"} | {f"in/{n}.txt": b"another" for n in "543210"})
    (tmp_path / "folder").mkdir()
    for name, data in images.items():
        (tmp_path / "folder" / name).write_bytes(data)

    def sample_keys(*names: str) -> list[str]:
        source = open_source(tuple(name if name == "openmoji" else f"{tmp_path}/{name}" for name in names))
        return [source.sample_key(i) for i in range(len(source))]

    every = sample_keys("d/*/*.tar")
    assert len(set(every)) == 6
    assert sample_keys("d/a/*.tar") + sample_keys("d/b/*.tar") == every
    assert sample_keys("folder") == every and sample_keys("again")[::-1] == every
    assert sample_keys("openmoji", "d/b", "d/a")[-6:] == every[3:] + every[:3]


def test_sources_are_identical_where_their_images_are_the_same_in_the_same_order(tmp_path):
    def identity(*names: str, **more) -> str:
        return open_source(tuple(str(tmp_path / name) if name != "openmoji" else name for name in names), DataOptions(**more)).identity()

    write_shard(tmp_path / "a" / "0.tar", three())
    write_shard(tmp_path / "a" / "1.tar", three(3))
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    write_shard(tmp_path / "other" / "0.tar", three() | {"000000001.jpg": jpeg("blue")})
    write_shard(tmp_path / "other" / "1.tar", three(3))
    assert identity("a") == identity("moved") == identity("a/0.tar", "moved/1.tar")
    assert (
        len({identity("a"), identity("other"), identity("a/1.tar", "a/0.tar"), identity("a/0.tar"), identity("a", only={"n": "1"}), identity("openmoji")}) == 6
    )
    pictures(tmp_path / "p", 3)
    shutil.copytree(tmp_path / "p", tmp_path / "q" / "renamed")
    assert identity("p") == identity("q/renamed") and identity("p", "a") == identity("q/renamed", "moved")
    shutil.copy(tmp_path / "p" / "1.png", tmp_path / "p" / "2.png")
    assert identity("p") != identity("q/renamed")


def test_pictures_in_folders_inside_a_shard_are_told_apart(tmp_path):
    members = {"./cats/1.jpg": jpeg(), "./cats/1.txt": b"cat", "dogs.v2/1.jpg": jpeg(), "dogs.v2/1.txt": b"dog"}
    source = ShardSource([write_shard(tmp_path / "s.tar", members)])
    assert keys(source) == ["s/cats/1", "s/dogs.v2/1"]
    assert captions(source) == [("cat",), ("dog",)]


@pytest.mark.parametrize("cut", ["in an image", "in a header", "between members"])
def test_a_cut_off_shard_gives_what_is_whole_and_says_so(tmp_path, cut):
    path = Path(write_shard(tmp_path / "s.tar", three()))
    with tarfile.open(path) as tar:
        second = tar.getmember("000000001.jpg")
    at = {"in an image": second.offset_data + 100, "in a header": second.offset + 100, "between members": second.offset}[cut]
    path.write_bytes(path.read_bytes()[:at])
    source = ShardSource([str(path)])
    assert captions(source) == [("caption 0",)]
    assert reasons(source) == {"damaged shard": 1}


def test_a_broken_header_in_mid_shard_is_not_taken_for_the_end(tmp_path):
    path = Path(write_shard(tmp_path / "s.tar", three()))
    with tarfile.open(path) as tar:
        at = tar.getmember("000000001.jpg").offset
    data = bytearray(path.read_bytes())
    data[at : at + 512] = b"x" * 512
    path.write_bytes(data)
    source = ShardSource([str(path)])
    assert len(source) == 1
    assert reasons(source) == {"damaged shard": 1}


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1))
def test_a_cut_anywhere_never_crashes_and_is_never_silent(tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("cut")
    whole = write_shard(folder / "whole.tar", three())
    with tarfile.open(whole) as tar:
        members_end = tar.getmembers()[-1].offset_data + 512
    data = Path(whole).read_bytes()
    (folder / "cut.tar").write_bytes(data[: int(share * members_end)])
    source = ShardSource([whole, str(folder / "cut.tar")])
    assert len(source) >= 3
    assert "damaged shard" in reasons(source)


def test_shards_that_are_empty_or_no_tar_are_counted_and_the_rest_is_read(tmp_path):
    good = write_shard(tmp_path / "good.tar", three())
    (tmp_path / "zero.tar").write_bytes(b"")
    (tmp_path / "page.tar").write_text("<html>404</html>" * 100)
    empty = write_shard(tmp_path / "empty.tar", {})
    source = ShardSource([good, str(tmp_path / "zero.tar"), str(tmp_path / "page.tar"), empty, str(tmp_path / "none.tar")])
    assert len(source) == 3
    assert reasons(source) == {"damaged shard": 3, "empty shard": 1}


def test_shards_without_one_sample_are_an_error_that_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"no samples in 1 shard.*empty shard"):
        ShardSource([write_shard(tmp_path / "empty.tar", {})])


def test_members_without_a_picture_are_counted(tmp_path):
    source = ShardSource([write_shard(tmp_path / "s.tar", three() | {"README": b"hello", "9.txt": b"alone", "8.mp4": b"film"})])
    assert len(source) == 3
    assert reasons(source) == {"no image": 3}


@pytest.mark.parametrize("text", [None, b"", b" \n\t "])
def test_a_missing_or_blank_txt_is_no_caption(tmp_path, text):
    members = {"0.jpg": jpeg()} | ({} if text is None else {"0.txt": text})
    assert ShardSource([write_shard(tmp_path / "s.tar", members)]).captions(0) == ()


def test_captions_come_on_one_line_each(tmp_path):
    members = {"0.jpg": jpeg(), "0.txt": b"  a \t red\t heart ", "0.json": b'{"c": "a \\n red heart"}'}
    path = write_shard(tmp_path / "s.tar", members)
    assert ShardSource([path]).captions(0) == ("a red heart",)
    assert ShardSource([path], ("c",)).captions(0) == ("a red heart",)


def test_caption_keys_name_json_fields_in_order(tmp_path):
    values = [{"re": "long", "org": "short"}, {"org": "short"}, {"re": None, "org": ""}, {"re": 7, "org": ["a", "b", None]}]
    members = {}
    for i, value in enumerate(values):
        members |= {f"{i}.jpg": jpeg(), f"{i}.json": json.dumps(value).encode(), f"{i}.txt": b"unused"}
    source = ShardSource([write_shard(tmp_path / "s.tar", members)], ("re", "org"))
    assert captions(source) == [("long", "short"), ("short",), (), ("a", "b")]


@pytest.mark.parametrize("text", [b"{", b"[1]", b"\xff\xfe", b"", b"[" * 100_000])
def test_broken_json_is_no_caption_and_is_counted_by_the_filter(tmp_path, text):
    members = {"0.jpg": jpeg(), "0.json": text, "1.jpg": jpeg(), "1.json": b'{"source": "clipart", "c": "x"}'}
    path = write_shard(tmp_path / "s.tar", members)
    assert captions(ShardSource([path], ("c",))) == [(), ("x",)]
    filtered = ShardSource([path], ("c",), {"source": "clipart"})
    assert captions(filtered) == [("x",)]
    assert reasons(filtered) == {"broken JSON": 1}


def test_the_filter_keeps_exactly_the_samples_with_the_value(tmp_path):
    path = write_shard(tmp_path / "s.tar", three())
    assert keys(ShardSource([path], only={"n": "1"})) == ["s/000000001"]
    with pytest.raises(ValueError, match="no samples with"):
        ShardSource([path], only={"n": "7"})


def test_a_shard_that_vanishes_during_the_run_is_an_image_error(tmp_path):
    path = write_shard(tmp_path / "s.tar", three())
    source = ShardSource([path])
    Path(path).unlink()
    for read in (source.captions, lambda i: source.image(i, 8)):
        with pytest.raises(ImageError) as caught:
            read(0)
        assert caught.value.reason == "vanished"


def test_reading_many_shards_keeps_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "OPEN_TARS", 5)
    source = ShardSource([write_shard(tmp_path / f"{i}.tar", three()) for i in range(20)])
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else pytest.skip("no /proc here to count open files")
    for i in range(len(source)):
        source.image(i, 8)
    assert len(os.listdir("/proc/self/fd")) == before + 5
    del source
    assert len(os.listdir("/proc/self/fd")) == before


# --- folders --------------------------------------------------------------------------------------------------------------


def test_a_folder_with_txt_beside_the_pictures(tmp_path):
    (tmp_path / "cats" / "in").mkdir(parents=True)
    for name in ("cats/a.jpg", "cats/in/b.JPG", "cats/c.jpeg"):
        (tmp_path / name).write_bytes(jpeg())
    (tmp_path / "cats/a.txt").write_text("\ufeffa cat\n", encoding="utf-8")
    (tmp_path / "cats/in/b.txt").write_text("another")
    source = FolderSource(tmp_path / "cats")
    assert keys(source) == ["cats/a.jpg", "cats/c.jpeg", "cats/in/b.JPG"]
    assert captions(source) == [("a cat",), (), ("another",)]


def test_a_folder_with_captions_csv_as_a_spreadsheet_saves_it(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(jpeg())
    rows = 'file,caption\r\na.jpg,"red, round"\r\na.jpg,second\r\n./b.jpg,\r\nghost.jpg,boo\r\n,nothing\r\n'
    (tmp_path / "captions.csv").write_text(rows, encoding="utf-8-sig", newline="")
    (tmp_path / "b.txt").write_text("from txt")
    source = FolderSource(tmp_path)
    assert captions(source) == [("red, round", "second"), ("from txt",), ()]
    assert reasons(source) == {"broken caption row": 1, "missing": 1}


def test_a_folder_with_captions_jsonl_survives_broken_lines(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(jpeg())
    lines = ['{"file_name": "a.jpg", "text": "one"}', "{broken", "", "[1]", '{"file": "b.jpg", "caption": null}']
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    source = FolderSource(tmp_path)
    assert captions(source) == [("one",), ()]
    assert reasons(source) == {"broken caption row": 2}


def test_a_table_with_other_columns_is_an_error_that_names_them(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "captions.csv").write_text("picture,words\na.jpg,hello\n")
    with pytest.raises(ValueError, match=r"columns file and caption; it has: picture, words"):
        FolderSource(tmp_path)


def test_a_folder_without_pictures_is_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no images that are read; choose one of jpg, "):
        FolderSource(tmp_path)


def test_pictures_too_small_to_train_on_are_refused_but_can_be_evaluated(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg("red", (1, 1)))
    source = FolderSource(tmp_path)
    with pytest.raises(ImageError) as caught:
        source.crop(0, 16, torch.Generator())
    assert caught.value.reason == "too small"
    assert source.image(0, 16).getpixel((8, 8))[0] > 200


def test_the_training_view_is_a_function_of_its_generator_and_the_evaluation_view_is_fixed(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    source = FolderSource(tmp_path)
    views = [source.crop(0, 16, torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)]
    assert (views[0] == views[1]).all()
    assert (views[0] != views[2]).any()
    whole = Image.fromarray(noise[:, 8:72]).resize((16, 16), Image.Resampling.BICUBIC)
    assert (np.asarray(source.image(0, 16)) == np.asarray(whole)).all()


# --- names of data --------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30))
def test_braces_are_the_numbers_between_with_their_zeros(tmp_path_factory, a, b):
    folder = tmp_path_factory.mktemp("braces")
    first, last = sorted((a, b))
    for i in range(40):
        (folder / f"{i:05d}.tar").touch()
    found = expand(f"{folder}/{{{first:05d}..{last:05d}}}.tar")
    assert [Path(p).name for p in found] == [f"{i:05d}.tar" for i in range(first, last + 1)]


def test_braces_and_globs_combine_and_name_each_path_once(tmp_path):
    for name in ("a/0.tar", "a/1.tar", "b/0.tar", "c/0.tar", "[x].tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(Path(p).relative_to(tmp_path)) for p in expand(f"{tmp_path}/{{a,b,a}}/*.tar")] == ["a/0.tar", "a/1.tar", "b/0.tar"]
    assert expand(f"{tmp_path}/[x].tar") == [f"{tmp_path}/[x].tar"], "a path that exists stands for itself"
    assert expand(f"{tmp_path}/none-*.tar") == []


def test_a_hole_in_a_brace_range_is_reported_not_swallowed(tmp_path):
    for i in (0, 2):
        write_shard(tmp_path / f"{i}.tar", three())
    source = open_source((f"{tmp_path}/{{0..2}}.tar",))
    assert len(source) == 6
    assert [(Path(p["key"]).name, p["reason"]) for p in source.problems] == [("1.tar", "missing")]


def test_several_sources_are_one_with_unlike_keys(tmp_path):
    for folder in ("x/pics", "y/pics"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jpg").write_bytes(jpeg())
        (tmp_path / folder / "a.txt").write_text(folder)
    write_shard(tmp_path / "shards" / "00000.tar", three())
    source = open_source(("openmoji", f"{tmp_path}/x/pics", f"{tmp_path}/y/pics", f"{tmp_path}/shards"))
    emoji = len(openmoji.load_emoji().train)
    assert len(source) == emoji + 5
    assert len(set(keys(source))) == len(source)
    assert [source.key(emoji), source.key(emoji + 1)] == ["x/pics/a.jpg", "y/pics/a.jpg"]
    assert [source.captions(emoji + i)[0] for i in range(5)] == ["x/pics", "y/pics", "caption 0", "caption 1", "caption 2"]
    assert source.image(emoji + 4, 8).getpixel((4, 4))[0] > 200
    with pytest.raises(IndexError):
        source.key(len(source))


def test_problems_of_every_source_are_kept(tmp_path):
    first = ShardSource([write_shard(tmp_path / "a.tar", three() | {"README": b""})])
    second = ShardSource([write_shard(tmp_path / "b.tar", three() | {"x.mp4": b""})])
    assert reasons(MixedSource([first, second])) == {"no image": 2}


def test_the_sides_of_openmoji_are_three_sources_without_a_family_in_common():
    train, val, test = (open_source(("openmoji",), DataOptions(side=side, aliases=True)) for side in ("train", "val", "test"))
    assert isinstance(val, EmojiSource) and isinstance(test, EmojiSource)
    families = [{source.family(i) for i in range(len(source))} for source in (train, val, test)]
    assert not families[0] & families[1] and not families[0] & families[2] and not families[1] & families[2]
    assert train.aliases and not val.aliases and not test.aliases, "evaluation names are fixed"


@pytest.mark.parametrize("names", [(), ("no/such/place",), ("no/such/{0..3}.tar",), (__file__,)])
def test_a_name_that_is_no_data_says_what_to_choose_from(names):
    with pytest.raises(ValueError, match=r"choose openmoji, a folder of images, or shards"):
        open_source(names)


def test_reasons_are_counted_most_frequent_first():
    problems = [{"key": str(i), "reason": r, "detail": ""} for i, r in enumerate(["a", "b", "b"])]
    assert list(count_reasons(problems).items()) == [("b", 2), ("a", 1)]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the development images are not here ({DATA})")
def test_the_development_shards_are_read_without_a_problem():
    source = open_source((f"{DATA}/pictures/val-*.tar", f"{DATA}/photos/val-*.tar"))
    assert len(source) == 432
    assert len(set(keys(source))) == 432
    assert not source.problems
    assert all(captions(source))
    assert {source.image(i, 128).size for i in range(0, 432, 40)} == {(128, 128)}
    clipart = open_source((f"{DATA}/pictures/val-*.tar",), DataOptions(only={"source": "clipart"}))
    assert 0 < len(clipart) < 332


# --- mixes by weight ------------------------------------------------------------------------------------------------------


def mixed(tmp_path, **options):
    for place, count in (("a", 4), ("b", 2)):
        for i in range(count):
            write_shard(tmp_path / place / f"{i}.tar", three(3 * i))
    return open_source((f"{tmp_path}/a/*.tar", f"{tmp_path}/b"), DataOptions(**options))


def test_weights_set_the_share_of_each_name_in_every_epoch(tmp_path):
    source = mixed(tmp_path, weights=(1.0, 3.0))
    assert len(source) == 18
    assert len(set(keys(source))) == 18
    for epoch in range(3):
        order = source.order(0, epoch)
        from_a = sum(source.key(order.place(i)[0]).startswith("a/") for i in range(18))
        assert from_a in (4, 5), "a quarter of 18"


def test_batches_of_a_mix_depend_on_the_step_alone(tmp_path):
    words = TextTokenizer.train(["caption one two"], 50)

    def made(**options):
        return TrainingBatches(mixed(tmp_path, weights=(1.0, 3.0)), words, BatchPlan(TextShape(8, 8), size=16, batch=6, seed=3), **options)

    whole = take(made(), 0, 9)
    for workers, first in ((0, 4), (2, 4)):
        assert all(torch.equal(a["images"], b["images"]) for a, b in zip(whole[4:], take(made(workers=workers), first, 5), strict=True))
    ranks = [take(made(ranks=Ranks(rank, 2)), 0, 9) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([ranks[0][step]["sample_key"], ranks[1][step]["sample_key"]]), batch["sample_key"])


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, 2.0, 3.0)])
def test_weights_that_do_not_fit_the_names_are_refused(tmp_path, weights):
    with pytest.raises(ValueError, match=r"weights"):
        mixed(tmp_path, weights=weights)


# --- Recap-DataComp: two captions -----------------------------------------------------------------------------------------


def test_re_caption_is_predicted_and_a_sentence_of_it_and_org_caption_are_contrasted(tmp_path):
    long = "A red heart lies on a table. Two people look at it."
    values = [{"re_caption": long, "org_caption": "heart IMG_1.jpg"}, {"re_caption": long, "org_caption": None}, {"re_caption": long}]
    members = {}
    for i, value in enumerate(values):
        members |= {f"{i}.jpg": jpeg((80 * i, 0, 0)), f"{i}.json": json.dumps(value).encode()}
    source = ShardSource([write_shard(tmp_path / "s.tar", members)], ("re_caption", "org_caption"))
    words = TextTokenizer.train([long, "heart IMG_1.jpg"], 200)
    shape = TextShape(64, 64, captions=2, sentences=True, whole=False)
    made = TrainingBatches(source, words, BatchPlan(shape, size=16, batch=3, seed=0))
    order = {draw_seed(source.sample_key(i)): i for i in range(3)}
    seen = set()
    for batch in take(made, 0, 12):
        for row, key in enumerate(batch["sample_key"].tolist()):
            first, second = (words.text(ids.tolist()) for ids in batch["text_ids"][row])
            assert words.text(batch["caption_ids"][row].tolist()) == words.text(words.ids(long))
            seen.add(first)
            assert batch["text_present"][row].tolist() == [True, order[key] == 0]
            assert (second == words.text(words.ids("heart IMG_1.jpg"))) == (order[key] == 0)
    assert seen == {words.text(words.ids(text)) for text in ("A red heart lies on a table", "Two people look at it")}


# --- faults in mid-run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("fault", "reason"), [("deleted", "vanished"), ("cut off", "changed"), ("written over", "changed")])
def test_a_run_goes_on_without_a_shard_that_is_lost_under_it(tmp_path, workers, fault, reason):
    paths = [write_shard(tmp_path / f"{i}.tar", three(3 * i) | {f"{n:09d}.jpg": jpeg((20 * n, 0, 0)) for n in range(3 * i, 3 * i + 3)}) for i in range(4)]
    words = TextTokenizer.train(["caption one two"], 50)
    lost = {draw_seed(ShardSource(paths).sample_key(i)) for i in range(3, 6)}
    made = TrainingBatches(ShardSource(paths), words, BatchPlan(TextShape(8, 8), size=16, batch=4, seed=0), workers=workers)
    iterator = made.from_step(0)
    next(iterator)
    match fault:
        case "deleted":
            Path(paths[1]).unlink()
        case "cut off":
            os.truncate(paths[1], 2000)
        case "written over":
            Path(paths[1]).write_bytes(b"x" * 20_000)
    batches = list(islice(iterator, 30))
    iterator.close()
    assert all(len(batch["images"]) == 4 for batch in batches)
    assert count_reasons(made.problems) == {reason: 3}
    assert {p["key"].split("/")[0] for p in made.problems} == {"1"}
    assert not lost & {int(key) for batch in batches[-10:] for key in batch["sample_key"]}


def test_when_all_shards_are_gone_the_run_stops_with_the_reason(tmp_path):
    path = write_shard(tmp_path / "0.tar", three())
    made = TrainingBatches(ShardSource([path]), TextTokenizer.train(["a caption"], 50), BatchPlan(TextShape(8, 8), size=16, batch=2, seed=0))
    Path(path).unlink()
    with pytest.raises(ValueError, match=r"256 samples in a row cannot be used, the last because of: vanished \(.*0\.tar no longer exists\)"):
        take(made, 0, 1)


def test_a_glob_over_what_img2dataset_writes_takes_the_shards_alone(tmp_path):
    write_shard(tmp_path / "00000.tar", three())
    for name in ("00000.parquet", "00000_stats.json", "00000.tar.index"):
        (tmp_path / name).write_bytes(b"")
    assert captions(open_source((f"{tmp_path}/*",)))[0] == ("caption 0",)
    with pytest.raises(ValueError, match="neither a folder nor a"):
        open_source((f"{tmp_path}/00000.parquet",))


def test_a_source_survives_the_way_into_a_spawned_worker(tmp_path):
    source = ShardSource([write_shard(tmp_path / "0.tar", three())])
    source.captions(0)
    assert captions(pickle.loads(pickle.dumps(source))) == captions(source)


def test_an_encoded_image_is_the_file_and_a_drawing_is_a_png(tmp_path):
    shard = write_shard(tmp_path / "a.tar", three())
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.jpg").write_bytes(jpeg("blue"))
    (tmp_path / "photos" / "x.txt").write_text("blue")
    mix = open_source(("openmoji", shard, str(tmp_path / "photos")), DataOptions(side="val", weights=(1, 1, 1)))
    drawn, count = open_image(mix.encoded(0)), len(mix)
    assert drawn.size == (256, 256) and np.array_equal(np.asarray(drawn), np.asarray(mix.image(0, 256)))
    assert mix.encoded(count - 2) == jpeg() and mix.encoded(count - 1) == jpeg("blue")
