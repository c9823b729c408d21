"""LLaVA's JSON as people have it is read, what cannot be used is named and counted, and images are found in folders and zip files."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from tiny_chat import row

from openvision3.data.images import ImageError
from openvision3.understand.conversations import ConversationError, Conversations, read_conversation


def write(folder: Path, rows: object, name: str = "data.json") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(rows))
    return str(folder / name)


def test_an_image_stands_before_the_question_wherever_the_file_has_it():
    before, after = (read_conversation(row(0, "a.jpg", text, "A cat.")) for text in ("<image>\nWhat?", "What?\n<image>"))
    assert before == after and before.messages[0] == {"role": "user", "content": "<image>\nWhat?"}


def test_several_images_keep_their_places_and_a_conversation_may_have_none():
    two = read_conversation(row(0, ["a.jpg", "b.jpg"], "<image> and <image>: alike?", "no"))
    assert two.images == ["a.jpg", "b.jpg"] and two.messages[0]["content"] == "<image> and <image>: alike?"
    assert read_conversation(row(0, None, "Hello", "Hi")).images == []


def test_what_follows_the_last_answer_and_an_answer_before_any_question_are_left_out():
    entry = row(0, None, "one", "two", "three")
    entry["conversations"].insert(0, {"from": "gpt", "value": "zero"})
    assert [message["content"] for message in read_conversation(entry).messages] == ["one", "two"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (row(0, None, "<image>\nWhat?", "A cat."), "images and <image> differ"),
        (row(0, "a.jpg", "What?", "A cat."), "images and <image> differ"),
        (row(0, ["a.jpg", "b.jpg"], "<image>\nWhat?", "A cat."), "images and <image> differ"),
        (row(0, None, "What?"), "no answer"),
        (row(0, None, "What?", "  "), "no answer"),
        ({"conversations": [{"from": "cow", "value": "moo"}]}, "unknown speaker"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}, "not a conversation"),
        ({"text": "no turns"}, "not a conversation"),
        ("a word", "not a conversation"),
        (row(0, 7, "What?", "A cat."), "not a conversation"),
    ],
)
def test_a_conversation_that_cannot_be_used_is_refused_by_its_reason(entry, reason):
    with pytest.raises(ConversationError) as error:
        read_conversation(entry)
    assert error.value.reason == reason and "\n" not in str(error.value)


def test_unusable_conversations_are_counted_and_named_and_the_others_keep_their_place(tmp_path):
    name = write(tmp_path, [row(0, None, "a", "b"), row(1, "x.jpg", "no mark", "b"), row(2, None, "c", "d")])
    read = Conversations([name])
    assert len(read) == 2 and read.key(1) == f"{name}:2" and read[1].messages[0]["content"] == "c"
    assert [problem["key"] for problem in read.problems] == [f"{name}:1"] and read.problems.counts == {"images and <image> differ": 1}


def test_one_conversation_a_line_is_read_as_a_list_of_them(tmp_path):
    rows = [row(0, None, "a", "b"), row(1, None, "c", "d")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    lines, whole = Conversations([str(tmp_path / "data.jsonl")]), Conversations([write(tmp_path, rows)])
    assert [lines[i] for i in range(2)] == [whole[i] for i in range(2)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("{}", "is not LLaVA's JSON: it holds a dict"),
        ("[]", "holds no conversation that can be used"),
        ('[{"id": 1}]', "holds no conversation that can be used: it has no list"),
        ("\x89PNG\r\n\x1a\n", "is not JSON"),
    ],
)
def test_a_file_that_is_no_conversations_is_one_line(tmp_path, content, words):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        Conversations([str(tmp_path / "data.json")])
    assert "\n" not in str(error.value)


def test_images_are_found_beside_the_file_in_folders_and_in_zip_files_without_their_first_folder_too(tmp_path):
    (tmp_path / "a" / "img").mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a" / "img" / "1.png")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("train/2.png", b"two")
    read = Conversations([write(tmp_path / "a", [row(0, "img/1.png", "<image>\na", "b")])])
    assert read.image(0, "img/1.png") == tmp_path / "a" / "img" / "1.png"
    read = Conversations([write(tmp_path / "a", [row(0, "coco/train/2.png", "<image>\na", "b")])], [str(tmp_path / "a"), str(tmp_path / "b.zip")])
    assert read.image(0, "coco/train/2.png") == read.image(0, "train/2.png") == b"two"
    assert read.image(0, "x/img/1.png") == tmp_path / "a" / "img" / "1.png"
    with pytest.raises(ImageError, match=r"no image 3\.png in") as error:
        read.image(0, "3.png")
    assert error.value.reason == "missing"


def test_the_archive_of_a_files_own_name_holds_its_images(tmp_path):
    names = []
    for name in ("a", "b"):  # each has its own 1.png
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr("1.png", name)
        names.append(write(tmp_path, [row(0, "1.png", "<image>\na", "b")], f"{name}.json"))
    read = Conversations(names)
    assert [read.image(index, "1.png") for index in range(2)] == [b"a", b"b"]


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of conversations"):
        Conversations([str(tmp_path / "nowhere.json")])
