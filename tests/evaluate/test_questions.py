"""Questions of each benchmark from its authors' files and from Parquet: the same questions, the same images, one line for what is wrong."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import vqa_files as files

from openvision3.data.images import ImageError
from openvision3.evaluate.metrics.vqa import BENCHMARKS
from openvision3.evaluate.questions import QuestionSet

KINDS = [*BENCHMARKS]


def names(paths) -> list[str]:
    return [str(path) for path in paths]


@pytest.fixture(params=[*files.PARQUET])
def both(request, tmp_path) -> tuple[QuestionSet, QuestionSet]:
    original = QuestionSet(request.param, names(files.ORIGINAL[request.param](tmp_path / "original")))
    return original, QuestionSet(request.param, names(files.parquet(tmp_path / "parquet", request.param)))


def test_both_kinds_of_files_ask_the_same(both):
    original, table = both
    prompt = BENCHMARKS[original.benchmark].prompt
    assert [(prompt(one), one.answer) for one in original.questions] == [(prompt(one), one.answer) for one in table.questions]
    assert not original.missing and not table.missing
    if original.benchmark != "seedbench":  # the table has no names of its dimensions
        assert [one.part for one in original.questions] == [one.part for one in table.questions]
    assert [one.image == other.image for one in original.questions for other in original.questions] == [
        one.image == other.image for one in table.questions for other in table.questions
    ]


def test_both_kinds_of_files_show_the_same_images(both):
    for one, other in zip(both[0].questions, both[1].questions, strict=True):
        image, same = both[0].image(one.image), both[1].image(other.image)
        assert image.size == same.size and np.abs(np.asarray(image, int) - np.asarray(same, int)).max() <= 4  # JPEG and PNG


def test_what_is_not_part_of_a_benchmark_is_left_out(tmp_path):
    assert len(QuestionSet("seedbench", names(files.seedbench(tmp_path / "a"))).questions) == files.COUNT  # no videos
    assert len(QuestionSet("scienceqa", names(files.scienceqa(tmp_path / "b"))).questions) == files.COUNT  # no training side, none without image


def test_of_all_questions_of_gqa_the_balanced_ones_are_asked(tmp_path):
    rows = [row | {"isBalanced": number % 3 == 0} for number, row in enumerate(files.gqa_rows())]
    (tmp_path / "table").mkdir()
    files.gqa(tmp_path)
    as_json = files.as_json(tmp_path / "testdev_all_questions.json", {row["id"]: row for row in rows})
    as_table = files.as_parquet(tmp_path / "table" / "testdev.parquet", rows)
    for path in (as_json, as_table):
        questions = QuestionSet("gqa", [str(path)], [str(tmp_path)]).questions
        assert [one.key for one in questions] == [row["id"] for row in rows if row["isBalanced"]]


@pytest.mark.parametrize("own", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_a_file_of_another_benchmark_is_refused_with_its_name(tmp_path, own, other):
    kinds = [files.ORIGINAL[own](tmp_path / "original")] + ([files.parquet(tmp_path / "parquet", own)[:1]] if own in files.PARQUET else [])
    for paths in kinds:
        if own != other:
            with pytest.raises(ValueError, match=f"is a file of {BENCHMARKS[own].title} by its fields, not of .*evaluate vqa {own}"):
                QuestionSet(other, names(paths))


def test_a_folder_of_files_stands_for_them(tmp_path):
    files.pope(tmp_path)
    assert {one.part for one in QuestionSet("pope", [str(tmp_path)]).questions} == {"random", "popular", "adversarial"}
    files.scienceqa(tmp_path / "s")
    assert len(QuestionSet("scienceqa", [str(tmp_path / "s")]).questions) == files.COUNT


def test_conversations_are_asked_question_by_question_and_descriptions_are_not(tmp_path):
    questions = QuestionSet("conversations", names(files.conversations(tmp_path)))
    assert [(one.text, one.answer, one.accept, one.part) for one in questions.questions[:2]] == [
        ("What is this?", "cat", ("kitten",), "what"), ("Is there a dog?", "no", (), "present")
    ]  # fmt: skip
    assert len(questions.questions) == 2 * files.COUNT and questions.image("s/1.png").size == (21, 16)


def test_images_are_found_in_archives_and_missing_ones_are_named(tmp_path):
    paths = names(files.pope(tmp_path))
    with zipfile.ZipFile(tmp_path / "val2014.zip", "w") as archive:
        for image in sorted((tmp_path / "val2014").iterdir())[1:]:
            archive.write(image, f"val2014/{image.name}")
    questions = QuestionSet("pope", paths, [str(tmp_path / "val2014.zip")])
    assert questions.missing == ["COCO_0.jpg"] and questions.image("COCO_1.jpg").size == (21, 16)
    with pytest.raises(ImageError, match=r"no image COCO_0.jpg in .*val2014.zip") as seen:
        questions.image("COCO_0.jpg")
    assert seen.value.reason == "missing"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question_id": 1, "text": "Is it?"}\n', "is no file of POPE: its fields are question_id, text, expected image, label, question_id, text or"),
        ('{"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "maybe"}\n', "question 1 cannot be read: .*'maybe' is neither yes nor no"),
        ("[]", "holds no questions"),
        ("[1, 2]", "is no list of questions"),
        ("Is there a dog?", "is no JSON of questions: it holds text"),
        ("", "is no JSON of questions: it holds 0 bytes"),
    ],
)
def test_a_file_that_is_no_benchmark_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message) as seen:
        QuestionSet("pope", [str(tmp_path / "a.json")])
    assert "\n" not in str(seen.value)


def test_missing_files_and_places_are_named(tmp_path):
    paths = names(files.pope(tmp_path))
    for data, images, message in (
        ([], (), "no files of POPE named"),
        (["none.json"], (), "no such file: none.json"),
        (paths, ["none"], "no such folder or archive of images: none"),
        (paths, [str(tmp_path / "coco_pope_random.json")], "is no folder, .zip or .tar of images: it holds JSON"),
        ([*paths, paths[0]], (), r"question 1 of .*_random.json is called random/0, as is question 1 of .*_random.json; name each file once"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            QuestionSet("pope", data, images)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ValueError, match=r"none of the 4 images is in .*elsewhere, such as COCO_0.jpg; name .* with --images"):
        QuestionSet("pope", paths, [str(tmp_path / "elsewhere")])


def test_a_damaged_table_is_refused_in_one_line(tmp_path):
    path = files.parquet(tmp_path, "pope")[0]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot be read as Parquet: it holds a Parquet table"):
        QuestionSet("pope", [str(path)])


def test_text_files_of_mme_without_an_answer_are_named(tmp_path):
    files.mme(tmp_path)
    with open(tmp_path / "count" / "0.txt", "a") as file:
        file.write("\n  \n")  # lines without a word are none
    assert len(QuestionSet("mme", [str(tmp_path)]).questions) == len(files.mme_rows())
    (tmp_path / "count" / "0.txt").write_text("Is this a dog?\n")
    with pytest.raises(ValueError, match=r"0.txt: 'Is this a dog\?' is no question and answer apart by a tab"):
        QuestionSet("mme", [str(tmp_path)])


def test_texts_of_mme_are_in_utf_8_or_named(tmp_path):
    files.mme(tmp_path)
    path = tmp_path / "count" / "0.txt"
    path.write_text("Is this a caf\u00e9?\tYes\nIs it?\tNo\n", encoding="utf-8-sig")
    assert [one.text for one in QuestionSet("mme", [str(tmp_path)]).questions if one.image == "count/0.jpg"] == ["Is this a caf\u00e9?", "Is it?"]
    path.write_text("Is this a caf\u00e9?\tYes\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"0.txt is no text in UTF-8: it holds"):
        QuestionSet("mme", [str(tmp_path)])


def test_a_name_in_place_of_an_image_in_a_table_opens_no_file(tmp_path):
    picture = tmp_path / "private.png"
    files.picture(0).save(picture)
    rows = [row | {"image": str(picture)} for row in files.mme_rows()]
    questions = QuestionSet("mme", [str(files.as_parquet(tmp_path / "mme.parquet", rows))])
    with pytest.raises(ImageError, match=r"count/0.jpg holds no image in .*mme.parquet") as seen:
        questions.image("count/0.jpg")
    assert seen.value.reason == "missing"


def test_a_list_in_one_json_file_is_read_as_lines_are(tmp_path):
    paths = files.pope(tmp_path)
    rows = [json.loads(line) for line in paths[0].read_text().splitlines()]
    files.as_json(paths[0], rows)
    assert len(QuestionSet("pope", names(paths[:1])).questions) == len(rows)
