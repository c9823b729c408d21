"""Questions in POPE's shape: half yes, half no, negatives as POPE's authors choose them, and never an object of the image."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from PIL import Image

from openvision3.data.pope import Annotated, label_text, make_questions, objects_of, read_objects, with_article, write_pope
from openvision3.data.pope_job import PopeJob

IMAGES = [
    Annotated("1", ("person", "dog", "ball")),
    Annotated("2", ("person", "dog")),
    Annotated("3", ("person", "car")),
    Annotated("4", ("car", "bus", "apple")),
    Annotated("5", ("apple", "table")),
]


def pairs(questions) -> list[tuple[str, str, str]]:
    """(image, object of the answer yes, object of the answer no)"""
    assert [question["label"] for question in questions] == ["yes", "no"] * (len(questions) // 2)
    assert [question["question_id"] for question in questions] == list(range(1, len(questions) + 1))
    names = [question["text"].removeprefix("Is there an ").removeprefix("Is there a ").removesuffix(" in the image?") for question in questions]
    return [(questions[place]["image"], names[place], names[place + 1]) for place in range(0, len(names), 2)]


def test_negatives_are_never_in_the_image_nor_asked_twice():
    for split in make_questions(IMAGES, 2, seed=0).values():
        for image in IMAGES:
            asked = [absent for name, _, absent in pairs(split) if name == image.name]
            assert len(asked) == len(set(asked)) == 2 and not set(asked) & set(image.objects)


def test_popular_negatives_are_the_most_frequent_objects_that_the_image_has_not():
    frequency = Counter(name for image in IMAGES for name in image.objects)
    for name, _, absent in pairs(make_questions(IMAGES, 1, seed=0)["popular"]):
        image = next(one for one in IMAGES if one.name == name)
        assert frequency[absent] == max(count for other, count in frequency.items() if other not in image.objects)


def test_adversarial_negatives_occur_most_often_with_the_object_of_the_answer_yes():
    found = {(name, present): absent for name, present, absent in pairs(make_questions(IMAGES, 1, seed=0)["adversarial"])}
    assert found["2", "person"] == "ball"  # dog is in the image; ball and car occur with a person once, ball first
    assert found["3", "person"] == "dog"  # twice with a person
    assert found["5", "apple"] in ("car", "bus")


def test_random_negatives_depend_on_the_seed_and_the_image_alone():
    whole = pairs(make_questions(IMAGES, 1, seed=0)["random"])
    assert whole == pairs(make_questions(IMAGES, 1, seed=0)["random"]) != pairs(make_questions(IMAGES, 1, seed=1)["random"])
    assert set(pairs(make_questions(IMAGES[::-1], 1, seed=0)["random"])) == set(whole)


def test_labels_of_a_group_are_adversarial_for_each_other_and_without_groups_there_is_no_such_split():
    labels = [Annotated(str(n), (name,), group) for n, (name, group) in enumerate((("red apple", "apple"), ("green apple", "apple"), ("milk", "carton")))]
    splits = make_questions(labels, 1, seed=0)
    assert [absent for _, _, absent in pairs(splits["adversarial"])][:2] == ["green apple", "red apple"]
    assert "adversarial" not in make_questions([Annotated(one.name, one.objects) for one in labels], 1, seed=0)


def test_too_few_kinds_of_objects_are_refused():
    with pytest.raises(ValueError, match="3 kinds of objects are too few to ask 2 times"):
        make_questions(IMAGES[:2], 2, seed=0)


def test_objects_are_whole_words_and_the_longest_name_counts():
    objects = {"person": ["person", "man"], "hot dog": ["hot dog"], "dog": ["dog", "dogs"]}
    assert objects_of(["A man eats a hot dog.", "Two DOGS watch"], objects) == ("person", "hot dog", "dog")
    assert objects_of(["A manual of dogma"], objects) == ()


def test_the_list_of_objects_that_ships_names_each_word_once():
    words = [word for words in read_objects().values() for word in words]
    assert len(words) == len(set(words)) > 100


@pytest.mark.parametrize(("name", "text"), [("apple", "an apple"), ("Orange", "an Orange"), ("dog", "a dog")])
def test_articles(name, text):
    assert with_article(name) == text


def test_class_names_become_words():
    assert label_text("Alpro-Blueberry_Soyghurt") == "Alpro Blueberry Soyghurt"


@pytest.fixture
def folder(tmp_path):
    captions = ("A man with a dog and a ball", "A dog near a car", "A car and a bus", "Nothing", "A boat and a bird")
    for number, caption in enumerate(captions):
        Image.new("RGB", (32, 24), (50 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(caption)
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    (tmp_path / "broken.txt").write_text("A dog and a cat")
    return tmp_path


def test_questions_and_images_are_written_from_a_folder_with_captions(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    counts, problems = write_pope((str(folder),), PopeJob(str(out), per_image=2))
    assert set(counts.values()) == {16} and len(counts) == 3 and [one["reason"] for one in problems] == ["not an image"]
    for path in out.glob("*_pope_*.json"):
        questions = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(questions) == 16 and all((out / "images" / question["image"]).is_file() for question in questions)
    assert len(list((out / "images").iterdir())) == 4
    assert (out / "images" / questions[0]["image"]).read_bytes() in [path.read_bytes() for path in folder.glob("*.png")]  # not encoded again


def test_images_whose_names_become_one_keep_files_of_their_own(tmp_path):
    (tmp_path / "data").mkdir()
    for place, name in enumerate(("a b.png", "a_b.png", "1.jpg", "1.webp")):
        Image.new("RGB", (32, 24), (60 * place, 0, 0)).save(tmp_path / "data" / name)
    (tmp_path / "data" / "captions.csv").write_text(
        "file,caption\na b.png,A man with a dog\na_b.png,A car and a bus\n1.jpg,A bird on a boat\n1.webp,A cat on a bed\n"
    )
    out = tmp_path / "out"
    write_pope((str(tmp_path / "data"),), PopeJob(str(out), per_image=2))
    questions = [json.loads(line) for path in out.glob("*.json") for line in path.read_text().splitlines()]
    shown = {place: set() for place in range(4)}
    for question in questions:
        red = Image.open(out / "images" / question["image"]).convert("RGB").getpixel((0, 0))[0]
        if question["label"] == "yes":
            shown[round(red / 60)] |= {animal for animal in ("dog", "bus", "bird", "cat") if animal in question["text"]}
    assert shown == {0: {"dog"}, 1: {"bus"}, 2: {"bird"}, 3: {"cat"}}


def test_data_without_objects_are_refused_in_one_line(folder, tmp_path):
    with pytest.raises(ValueError, match=r"none of 6 images of .* has 9 objects named in its captions; see --label-key"):
        write_pope((str(folder),), PopeJob(str(tmp_path / "out"), per_image=9))
    with pytest.raises(ValueError, match="has a value under colour"):
        write_pope((str(folder),), PopeJob(str(tmp_path / "out"), label_key="colour"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="name folders of images or shards, of one kind"):
        write_pope(("openmoji",), PopeJob(str(tmp_path / "out")))


def test_a_group_without_labels_is_refused():
    with pytest.raises(ValueError, match="group_key is used with label_key only"):
        PopeJob("out", group_key="coarse")
