"""Bytes -> text -> captions: one door, which guesses nothing, replaces nothing and says what it refuses."""

import codecs
import csv
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from shard_files import jpeg, write_shard

from openvision3.data.batches import BatchPlan, TextShape, TrainingBatches, evaluation_batches
from openvision3.data.captions import Captions, TextError, clean_captions, decode_text, json_object, read_text, text_captions
from openvision3.data.folders import FolderSource
from openvision3.data.problems import Problems, count_reasons
from openvision3.data.shards.check import check_shard
from openvision3.data.shards.source import ShardSource
from openvision3.data.text import TextTokenizer
from openvision3.recaption.files import CaptionFolder, CaptionShard

MARKED = {
    "utf-8": "caf\u00e9 \U0001f600".encode(),
    "utf-8-sig": "caf\u00e9 \U0001f600".encode("utf-8-sig"),
    **{
        name: mark + "caf\u00e9 \U0001f600".encode(name)
        for name, mark in (
            ("utf-16-le", codecs.BOM_UTF16_LE),
            ("utf-16-be", codecs.BOM_UTF16_BE),
            ("utf-32-le", codecs.BOM_UTF32_LE),
            ("utf-32-be", codecs.BOM_UTF32_BE),
        )
    },
}
NO_TEXT = {
    "latin-1": "caf\u00e9".encode("latin-1"),
    "gbk": "\u7ea2\u8272\u7684\u5fc3".encode("gbk"),
    "UTF-16 without its mark": "a red heart".encode("utf-16-le"),
    "NUL inside": b"nul\x00inside",
    "UTF-16 cut in mid letter": codecs.BOM_UTF16_LE + "heart".encode("utf-16-le")[:-1],
    "half a character": b"a \xed\xa0\xbd",
}
NOTHING = {"empty": b"", "blank": b" \n\t", "a mark alone": codecs.BOM_UTF8, "zero width": "\u200b\u200b\ufeff".encode(), "accents": "\u0301\ufe0f".encode()}


@pytest.mark.parametrize("data", MARKED.values(), ids=MARKED)
def test_a_byte_order_mark_decides_the_encoding_and_is_no_text(data):
    assert decode_text(data) == "caf\u00e9 \U0001f600"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff")), st.sampled_from(sorted(MARKED)))
def test_any_text_comes_back_from_any_marked_encoding(text, encoding):
    mark = {"utf-16": codecs.BOM_UTF16_LE, "utf-32": codecs.BOM_UTF32_LE}
    mark |= {"utf-16-be": codecs.BOM_UTF16_BE, "utf-32-be": codecs.BOM_UTF32_BE}
    before = mark.get(encoding, mark.get(encoding.removesuffix("-le"), b"")) if "16" in encoding or "32" in encoding else b""
    assert decode_text(before + text.encode(encoding)) == text


@pytest.mark.parametrize("data", NO_TEXT.values(), ids=NO_TEXT)
def test_what_is_not_text_is_refused_with_the_reason(data):
    with pytest.raises(TextError, match=r"^x.txt (is not UTF|holds NUL)") as refused:
        decode_text(data, "x.txt")
    assert refused.value.reason == "not UTF-8"


@pytest.fixture
def places(tmp_path):
    """{data -> (a shard with it as .txt member, a folder with it as .txt file)}"""

    def make(texts: list[bytes]) -> tuple[ShardSource, FolderSource]:
        folder = tmp_path / "folder"
        folder.mkdir()
        members = {}
        for number, text in enumerate(texts):
            members |= {f"{number:03d}.jpg": jpeg(number), f"{number:03d}.txt": text}
            (folder / f"{number:03d}.jpg").write_bytes(jpeg(number))
            (folder / f"{number:03d}.txt").write_bytes(text)
        return ShardSource([write_shard(tmp_path / "s.tar", members)]), FolderSource(folder)

    return make


def test_shards_and_folders_read_text_alike(places):
    lines = [b"a heart\r\n\r\nthe red heart \n", b"a heart"]
    for source in places([*MARKED.values(), *NO_TEXT.values(), *NOTHING.values(), *lines]):
        read = []
        for index in range(len(source)):
            try:
                read.append(tuple(source.captions(index)))
            except TextError as error:
                read.append(error.reason)
        assert read == [
            *[("caf\u00e9 \U0001f600",)] * len(MARKED),
            *["not UTF-8"] * len(NO_TEXT),
            *[()] * len(NOTHING),
            ("a heart", "the red heart"),
            ("a heart",),
        ]


def test_text_that_is_not_utf_8_is_counted_in_training_and_its_image_stays_in_evaluation(places):
    words = TextTokenizer.train(["a red heart"] * 2, 100)
    for source in places([b"a red heart", *NO_TEXT.values()]):
        batches = TrainingBatches(source, words, BatchPlan(TextShape(8, 8), size=32, batch=4, seed=0))
        next(batches.from_step(0))
        assert count_reasons(batches.problems) == {"not UTF-8": len(NO_TEXT)}
        problems = Problems()
        (rows,) = evaluation_batches(source, 32, 99, problems)
        assert rows[3] == [("a red heart",), *[()] * len(NO_TEXT)] and count_reasons(problems) == {"not UTF-8": len(NO_TEXT)}


def test_check_counts_text_that_is_not_utf_8_and_tells_of_several_captions(tmp_path):
    texts = [b"a\nb\nc", *NO_TEXT.values(), *NOTHING.values()]
    members = {f"{i}.{ending}": jpeg(i) if ending == "jpg" else text for i, text in enumerate(texts) for ending in ("jpg", "txt")}
    found = check_shard(write_shard(tmp_path / "s.tar", members))
    assert count_reasons(list(found.problems)) == {"not UTF-8": len(NO_TEXT), "no caption": len(NOTHING)}
    assert (found.usable, found.captions) == (1, {3: 1})


def test_a_table_with_rows_in_another_encoding_loses_only_these(tmp_path):
    for name in "ab":
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.jpg")
    (tmp_path / "captions.csv").write_bytes("file,caption\na.jpg,caf\u00e9\n".encode() + "b.jpg,caf\u00e9\n".encode("latin-1"))
    source = FolderSource(tmp_path)
    assert source.captions(0) == ("caf\u00e9",)
    with pytest.raises(TextError):
        source.captions(1)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl"])
def test_tables_in_any_marked_encoding_are_read(tmp_path, name, encoding):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.jpg")
    with open(tmp_path / name, "w", encoding=encoding, newline="") as file:
        if name.endswith("csv"):
            csv.writer(file).writerows([["file", "caption"], ["a.jpg", "caf\u00e9"], ["a.jpg", "tea"]])
        else:
            file.write(json.dumps({"file": "a.jpg", "caption": ["caf\u00e9", "tea"]}, ensure_ascii=False) + "\n")
    captions = FolderSource(tmp_path).captions(0)
    assert captions == ("caf\u00e9", "tea") and captions.alike == 2


def test_half_a_character_in_json_is_refused_not_replaced(tmp_path):
    path = write_shard(tmp_path / "s.tar", {"0.jpg": jpeg(), "0.json": b'{"caption": "a \\ud83d half"}'})
    with pytest.raises(TextError, match="half a character"):
        ShardSource([path], ("caption",)).captions(0)


def test_a_text_of_many_mebibytes_is_skipped_and_counted_without_being_read(tmp_path, monkeypatch):
    monkeypatch.setattr("openvision3.data.captions.MAX_BYTES", 1000)
    members = {"0.jpg": jpeg(), "0.txt": b"a heart " * 1000, "1.jpg": jpeg(1), "1.txt": b"a heart"}
    source = ShardSource([write_shard(tmp_path / "s.tar", members)])
    sizes = []
    read = source.tars.read
    monkeypatch.setattr(source.tars, "read", lambda *args: sizes.append(len(data := read(*args) or b"")) or data)
    batches = TrainingBatches(source, TextTokenizer.train(["a heart"] * 2, 50), BatchPlan(TextShape(8, 8), size=32, batch=2, seed=0))
    next(batches.from_step(0))
    assert count_reasons(batches.problems) == {"too large": 1}
    (tmp_path / "big.txt").write_bytes(b"a" * 1001)
    with pytest.raises(TextError) as refused:
        read_text(tmp_path / "big.txt")
    assert refused.value.reason == "too large"
    assert all(size < 8000 for size in sizes)


def test_recaption_stores_no_replacement_characters(places):
    """The old caption of a sample is stored as it is, all lines of it, or not at all, and what was left out is told."""
    shard, folder = places([*MARKED.values(), *NO_TEXT.values(), b"one\ntwo"])
    job = CaptionShard(shard.files()[0], folder.folder / "out.tar")
    job.open("re_caption", "", False)
    old = [value.get("org_caption") for value in job.values]
    assert old == [*["caf\u00e9 \U0001f600"] * len(MARKED), *[None] * len(NO_TEXT), ["one", "two"]]
    assert count_reasons(job.problems) == {"not UTF-8": len(NO_TEXT)}
    beside = CaptionFolder(str(folder.folder), folder.folder / "captions.jsonl")
    beside.open("re_caption", "", False)
    with open(folder.folder / "captions.jsonl", "w+b") as file:
        beside.write([{"kept": "x"}] * len(folder), {}, file)
        file.seek(0)
        rows = [json_object(line) for line in file]
    assert [row["org_caption"] for row in rows] == [list(captions) for captions in beside.old]
    assert sum(not captions for captions in beside.old) == len(NO_TEXT) == len(beside.problems)


# -- several captions ------------------------------------------------------------------------------------------------------


def test_values_of_the_first_field_are_alike_and_those_of_others_follow():
    captions = clean_captions([None, ["one", 7, ["two"]], "three"])
    assert captions == ("one", "two", "three") and captions.alike == 2
    assert pickle.loads(pickle.dumps(captions)).alike == 2
    assert clean_captions(["long", "short"]).alike == 1 and text_captions("a\nb\x0b\n c ").alike == 3


@given(st.lists(st.text(min_size=1), min_size=1, max_size=6), st.integers(1, 6), st.integers(0, 2**63))
def test_drawing_the_first_caption_loses_none(texts, alike, draw):
    captions = Captions(texts, alike)
    led = captions.led_by(draw)
    assert sorted(led) == sorted(captions) and led[captions.alike :] == captions[captions.alike :]


def test_each_of_several_captions_is_predicted_in_some_epoch_whatever_the_rank_and_worker(places):
    words = TextTokenizer.train(["one two three four five"] * 2, 100)
    for source in places([b"one\ntwo\nthree\nfour\nfive"]):
        batches = TrainingBatches(source, words, BatchPlan(TextShape(8, 8), size=32, batch=1, seed=0))
        predicted = [batches.sample(epoch)[2] for epoch in range(40)]
        assert set(predicted) == {"one", "two", "three", "four", "five"}
        assert predicted == [batches.sample(epoch)[2] for epoch in range(40)]
        assert all(batches.sample(epoch)[3] == (batches.sample(epoch)[2],) for epoch in range(5)), "and is the one that is contrasted"
        torch.testing.assert_close(batches.collate([batches.sample(3)])[0]["text_ids"], batches.collate([batches.sample(3)])[0]["text_ids"])
