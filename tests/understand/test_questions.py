"""Questions rest on what captions and pixels say, a no is true, the same data give the same files."""

import errno
import io
import json
import os
import re
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from shard_files import write_shard

from openvision3.cli import main
from openvision3.data.images import open_image
from openvision3.data.names import DataOptions, open_source
from openvision3.understand.conversations import Conversations
from openvision3.understand.facts import COLOURS, content_words, facts_of, is_plural, main_colours, name_of, with_article
from openvision3.understand.questions import ASKERS, BRIEFLY, LETTER, write_conversations

SHADES = {"red": (220, 30, 40), "orange": (245, 150, 30), "yellow": (250, 215, 50), "green": (60, 170, 70), "blue": (40, 110, 220), "purple": (140, 60, 190),
          "pink": (240, 110, 180), "brown": (120, 75, 40), "black": (20, 20, 20), "grey": (128, 128, 130), "white": (255, 255, 255)}  # fmt: skip
THINGS = re.findall(r"\w+", "apple bear car drum egg fan goat hat ink jug kite lamp mug nut owl pan quilt rat sock tent urn van wig yak")


def disc(colour, background=(255, 255, 255)) -> Image.Image:
    image = Image.new("RGB", (80, 60), background)
    ImageDraw.Draw(image).ellipse((20, 10, 60, 50), fill=colour)
    return image


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def sample(number: int, caption: str, image: Image.Image | bytes, **fields) -> dict[str, bytes]:
    data = image if isinstance(image, bytes) else png(image)
    return {f"{number:05}.png": data, f"{number:05}.txt": caption.encode(), f"{number:05}.json": json.dumps({"caption": caption, **fields}).encode()}


def read(source, out, **settings):
    written = write_conversations(source, out, **settings)
    rows = json.loads(out.read_text(encoding="utf-8"))
    questions = [
        (row, kind, row["conversations"][2 * place]["value"].removeprefix("<image>\n"), row["conversations"][2 * place + 1]["value"])
        for row in rows
        for place, kind in enumerate(row["kinds"])
    ]
    return written, rows, questions


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """Ten drawings of each of 24 things in five colours, with tags and the name of their style."""
    folder = tmp_path_factory.mktemp("drawings")
    members = {}
    for number in range(240):
        thing, shade = THINGS[number % 24], [*SHADES][number % 5]
        captions = [f"{thing}, toy, {THINGS[(number + 1) % 24]}", f"{thing}, plain style"]
        members |= sample(number, thing, disc(SHADES[shade]), captions=captions, style="plain", family=thing)
    return open_source((write_shard(folder / "plain-00000.tar", members),), DataOptions(caption_keys=("caption", "captions")))


@pytest.mark.parametrize(
    "caption, name",
    [
        ("a photo of a dandelion", "dandelion"), ("a photo of Anjou pear", "Anjou pear"), ("Apple Juice Box. food, juice, apple", "Apple Juice Box"),
        ("pilot light skin tone", "pilot"), ("Clipart by Nicu Buculei - antenna", "antenna"), ("Various Cliparts", ""), ("kiss woman man", ""),
        ("woman and man holding hands", "woman and man holding hands"), ("sm_021", ""), ("00012", ""), ("a b", ""), ("hat - clothing", "hat"),
        ("A very long sentence that tells a whole story of a cat", ""),
    ],
)  # fmt: skip
def test_a_name_is_what_the_caption_says_that_the_image_shows(caption, name):
    assert name_of(caption) == name


@pytest.mark.parametrize("name, words", [("apple", "an apple"), ("cat", "a cat"), ("unicorn", "a unicorn"), ("two hearts", "two hearts"), ("Pisces", "Pisces"),
                                         ("scissors", "scissors"), ("glass", "a glass"), ("oat milk", "oat milk"), ("flag of Japan", "the flag of Japan"),
                                         ("man and dog", "man and dog"), ("tennis", "tennis"), ("x-ray", "an x-ray"),
                                         ("women with bunny ears", "women with bunny ears")])  # fmt: skip
def test_articles(name, words):
    assert with_article(name) == words


@pytest.mark.parametrize("background", [(255, 255, 255), (190, 200, 230)])
@pytest.mark.parametrize("colour", COLOURS)
def test_the_main_colour_of_a_drawing_is_the_one_it_is_painted_in(colour, background):
    shares, plain = main_colours(disc(SHADES[colour], background))
    if colour == "white" and background == (255, 255, 255):
        assert plain and not shares
    else:
        assert plain and max(shares, key=shares.get) == colour and shares[colour] > 0.8


def only_colour(tmp_path, caption, image):
    source = open_source((write_shard(tmp_path / "x.tar", sample(0, caption, image)),))
    return facts_of(source, 0, image, "x.png").colour


def test_a_colour_is_asked_for_where_it_is_certain_alone(tmp_path):
    two = disc(SHADES["red"])
    two.paste(SHADES["blue"], (40, 10, 60, 50))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    cases = (
        ("ball", disc(SHADES["red"]), ("red", "")),
        ("ball", two, ("", "")),  # neither is the main one
        ("ball", noise, ("", "")),
        ("blue ball", two, ("blue", "ball")),  # named, and there
        ("green ball", two, ("", "")),  # named, but not there
        ("orange", disc(SHADES["orange"]), ("orange", "")),  # a fruit
        ("ball", Image.new("RGB", (60, 60)), ("", "")),  # nothing stands out
        ("red triangle pointed down", disc(SHADES["red"]), ("red", "triangle")),
        ("red apple with leaf", disc(SHADES["red"]), ("red", "apple")),
        ("red with leaf", disc(SHADES["red"]), ("red", "")),  # names no thing
    )
    for caption, image, colour in cases:
        assert only_colour(tmp_path, caption, image) == colour, caption


def test_a_number_is_asked_for_where_the_caption_counts(tmp_path):
    for caption, number in (("two hearts", ("two", "hearts")), ("two-hump camel", ("", "")), ("three men rowing", ("three", "men")), ("one pin", ("", "")),
                            ("two oclock", ("", "")), ("four red apples", ("four", "red apples"))):  # fmt: skip
        source = open_source((write_shard(tmp_path / "x.tar", sample(0, caption, disc("red"))),))
        assert facts_of(source, 0, disc("red"), "x.png").number == number, caption


def test_the_same_data_give_the_same_files_and_another_seed_other_questions(drawings, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_conversations(drawings, tmp_path / f"{name}.json", seed=seed)
    for suffix in ("json", "zip"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    assert (tmp_path / "a.json").read_bytes() != (tmp_path / "c.json").read_bytes()


def test_rows_are_llavas_with_a_kind_and_answers_for_each_question(drawings, tmp_path):
    written, rows, questions = read(drawings, tmp_path / "a.json", turns=3)
    assert written.images == 240 and written.conversations == len(rows) and {kind for _, kind, _, _ in questions} == {*ASKERS} - {"count"}
    assert written.answers["present"].total() == 240
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        for row in rows:
            turns = row["conversations"]
            assert 2 <= len(turns) <= 6 and [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert turns[0]["value"].startswith("<image>\n") and "".join(turn["value"] for turn in turns).count("<image>") == 1
            assert len(row["kinds"]) == len(row["accept"]) == len(turns) // 2
            assert [accept[0] for accept in row["accept"]] == [turn["value"] for turn in turns[1::2]]
            Image.open(io.BytesIO(archive.read(row["image"]))).verify()
    assert len({row["id"] for row in rows}) == len(rows)
    singles = read(drawings, tmp_path / "b.json", turns=1)[2]
    assert [rest for _, *rest in singles] == [rest for _, *rest in questions]


def test_training_reads_every_row_and_image(drawings, tmp_path):
    rows = read(drawings, tmp_path / "a.json")[1]
    conversations = Conversations([str(tmp_path / "a.json")], [str(tmp_path / "a.zip")])
    assert len(conversations) == len(rows) and not len(conversations.problems)
    for index, row in enumerate(rows):
        assert [message["content"] for message in conversations[index].messages] == [turn["value"] for turn in row["conversations"]]
        assert open_image(conversations.image(index, row["image"])).size == (80, 60)


def test_a_no_is_true_a_yes_is_not_the_rule_and_no_thing_says_which(drawings, tmp_path):
    rows = read(drawings, tmp_path / "a.json", kinds=("what", "present"))[2]
    shown = {row["id"][:-2]: answer for row, kind, _, answer in rows if kind == "what"}
    tagged = {thing: {thing, THINGS[(number + 1) % 24]} for number, thing in enumerate(THINGS)}
    said: dict[str, Counter] = defaultdict(Counter)
    for row, kind, text, answer in rows:
        if kind == "present":
            thing = re.search(rf"\b({'|'.join(THINGS)})\b", text)[1]
            own = shown[row["id"][:-2]]
            assert (thing == own) if answer == "yes" else (thing not in tagged[own] and own not in tagged[thing])
            said[thing][answer] += 1
    total = sum(said.values(), Counter())
    assert abs(total["yes"] - 120) < 30
    assert sum(bool(counts["yes"] and counts["no"]) for counts in said.values()) >= 20


def test_a_person_is_never_denied_and_therefore_never_asked_for(tmp_path):
    members = {}
    for number in range(60):
        members |= sample(number, [*THINGS, "woman", "man"][number % 26], disc(SHADES["red"]), style="plain")
    questions = read(open_source((write_shard(tmp_path / "x.tar", members),)), tmp_path / "a.json")[2]
    assert {"woman", "man"} <= {answer for _, kind, _, answer in questions if kind == "what"}
    asked = [text for _, kind, text, _ in questions if kind in ("present", "which")]
    assert len(asked) > 60 and not [text for text in asked if re.search(r"\b(wo)?man\b", text)]


def test_one_of_four_choices_is_there(drawings, tmp_path):
    letters = 0
    for row, kind, text, answer in read(drawings, tmp_path / "a.json", turns=10)[2]:
        if kind != "which":
            continue
        own = row["accept"][row["kinds"].index("what")][0]
        choices = re.findall(r"\b[a-z]{3,}\b", text.partition("\n")[2] if LETTER in text else text.partition(":")[2])
        named = [word for word in choices if word in THINGS]
        assert len({*named}) == 4 and named.count(own) == 1
        assert answer == ("ABCD"[named.index(own)] if LETTER in text else own)
        letters += LETTER in text
    assert 40 < letters < 110


def test_a_few_questions_ask_for_a_short_answer_as_benchmarks_do(drawings, tmp_path):
    asked = Counter(text.endswith(BRIEFLY) for _, kind, text, _ in read(drawings, tmp_path / "a.json")[2] if kind in ("what", "present"))
    assert 0.1 < asked[True] / asked.total() < 0.3


def test_what_cannot_be_asked_about_is_counted_and_the_kind_is_that_of_the_caption(tmp_path):
    """Also: another caption is another right answer, and the same in large letters is not."""
    members = sample(0, "a photo of an apple", disc("red"), captions=["a photo of an Apple", "a photo of a fruit"])
    members |= sample(1, "Teddy Bear. toy", disc("blue"), source="clipart") | sample(2, "cat", b"\x89PNG no")
    members |= sample(3, "00031", disc("red")) | sample(4, "some kite", disc("red"))
    source = open_source((write_shard(tmp_path / "x.tar", members),), DataOptions(caption_keys=("caption", "captions")))
    written, _, questions = read(source, tmp_path / "a.json", turns=9)
    assert (written.images, written.unnamed) == (3, 1) and source.problems.counts.total() == 1
    assert [answer for _, kind, _, answer in questions if kind == "image"] == ["a photograph", "clip art"]
    described = [answer for _, kind, _, answer in questions if kind == "describe"]
    assert described == ["A photograph of an apple. It is mainly red.", "Clip art of a teddy bear. It is mainly blue.",
                         "The image shows a some kite. It is mainly red."]  # fmt: skip
    assert next(row["accept"][row["kinds"].index("what")] for row, kind, _, _ in questions if kind == "what") == ["apple", "fruit"]
    assert not [kind for _, kind, _, _ in questions if kind == "which"]  # two others are too few


def test_an_image_that_cannot_be_read_is_counted_and_a_full_disk_ends_the_command(tmp_path, capsys, monkeypatch):
    (tmp_path / "data").mkdir()
    for number, name in enumerate(("apple", "bear", "car")):
        disc([*SHADES.values()][number]).save(tmp_path / "data" / f"{name}.png")
        (tmp_path / "data" / f"{name}.txt").write_text(f"a photo of a {name}")
    read_bytes = Path.read_bytes

    def refuse(path):
        if path.name == "bear.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    out = tmp_path / "out" / "a.json"
    assert main(["data", "conversations", str(tmp_path / "data"), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "on 2 images" in shown and "1 unreadable, such as" in shown and "Permission denied" in shown

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    assert main(["data", "conversations", str(tmp_path / "data"), "--out", str(tmp_path / "full" / "a.json")]) == 2
    error = capsys.readouterr().err
    assert "full/a.zip: No space left on device; make room" in error and error.count("\n") == 1 and not [*(tmp_path / "full").iterdir()]


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys):
    shard = write_shard(tmp_path / "data" / "x.tar", sample(0, "00031", disc("red")))
    out = str(tmp_path / "a.json")
    for options, words in (
        ([], "none of 1 images has a caption that names what it shows"),
        (["--kinds", "colours"], "unknown kind of question 'colours'. Did you mean 'colour'?"),
        (["--turns", "0"], "turns 0 must be 1 or more"),
        (["--out", str(tmp_path / "a.txt")], "does not end in .json"),
        (["--out", str(tmp_path / "data" / "a" / "b.json")], ""),
    ):
        assert main(["data", "conversations", shard, "--out", out, *options]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".zip", ".making")]


def test_kinds_that_nothing_can_be_asked_of_leave_no_files(drawings, tmp_path, capsys):
    assert main(["data", "conversations", drawings.files()[0], "--out", str(tmp_path / "a.json"), "--kinds", "count"]) == 2
    assert "none of 240 images has a question of the kinds count; choose others with --kinds" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_command_that_is_refused_or_finds_no_space_keeps_what_an_earlier_one_wrote(drawings, tmp_path, capsys, monkeypatch):
    command = ["data", "conversations", drawings.files()[0], "--out", str(tmp_path / "a.json")]
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main([*command, "--kinds", "count"]) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def no_space(self, *arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("zipfile.ZipFile.writestr", no_space)
    assert main(command) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_command_tells_what_it_wrote(drawings, tmp_path, capsys):
    out = tmp_path / "held" / "a.json"
    assert main(["data", "conversations", drawings.files()[0], "--out", str(out), "--kinds", "present", "what", "--turns", "1"]) == 0
    shown = capsys.readouterr().out
    assert "480 conversations on 240 images" in shown and "a.zip" in shown and "present" in shown
    assert main(["data", "conversations", drawings.files()[0], "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["images"] == 240 and told["kinds"]["image"] == {"questions": 240, "commonest": {"a drawing": 240}} and told["problems"] == []


def test_words_and_plurals():
    assert content_words("The Two Hats of a cat, bus") == {"two", "hat", "cat", "bus"} == content_words("two hat cat bus")
    assert is_plural("hats") and is_plural("women with hats") and not is_plural("glass") and not is_plural("hat")
