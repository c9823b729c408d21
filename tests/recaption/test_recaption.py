"""Recaptioning: the same text however it is batched, shared out, killed and begun again, and nothing lost of what was there."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from shard_files import recaption

from openvision3 import cli
from openvision3.data.folders import FolderSource
from openvision3.data.images import ImageError
from openvision3.data.shards.source import ShardSource
from openvision3.recaption.image_text import Answer, ImageTextModel, Wording, clean
from openvision3.recaption.job import RecaptionJob, shard_split
from openvision3.recaption.rewrite import examples

pytest.importorskip("transformers")
from tiny_image_text import save_idefics3, save_llava

SHAPES = ((40, 30), (30, 90), (96, 32), (64, 64), (20, 20), (50, 70))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Unlike images become unlike numbers of tokens, so that batches are padded."""
    return str(save_idefics3(tmp_path_factory.mktemp("models") / "idefics"))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory) -> str:
    return str(save_llava(tmp_path_factory.mktemp("models") / "llava"))


def drawing(seed: int) -> bytes:
    draw = random.Random(seed)
    image = Image.new("RGB", SHAPES[seed % len(SHAPES)], tuple(draw.randrange(256) for _ in range(3)))
    for _ in range(5):
        x, y = draw.randrange(image.width), draw.randrange(image.height)
        ImageDraw.Draw(image).rectangle((x, y, x + 20, y + 20), tuple(draw.randrange(256) for _ in range(3)))
    out = io.BytesIO()
    image.save(out, "JPEG")
    return out.getvalue()


def members(start: int, count: int) -> dict[str, bytes]:
    """What img2dataset writes: a picture, its caption, and a JSON with both and more."""
    found: dict[str, bytes] = {}
    for i in range(start, start + count):
        values = {"caption": f"old {i}", "url": f"http://example.org/{i}.jpg", "key": f"{i:09d}", "width": 20, "exif": "{}", "similarity": 0.25}
        found |= {f"{i:09d}.jpg": drawing(i), f"{i:09d}.txt": f"old {i}".encode(), f"{i:09d}.json": json.dumps(values, indent=4).encode()}
    return found


def write_shard(path: Path, content: dict[str, bytes], form: int = tarfile.USTAR_FORMAT, when: float = 1_700_000_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for number, (name, data) in enumerate(content.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uid, info.uname, info.mode = len(data), when + number, 1234, "bigdata", 0o444
            tar.addfile(info, io.BytesIO(data))
    return path


def read_shard(path: Path) -> dict[str, tuple[tuple, bytes]]:
    with tarfile.open(path) as tar:
        return {m.name: ((m.mtime, m.uid, m.uname, m.mode), tar.extractfile(m).read()) for m in tar}


def values(path: Path) -> dict[str, dict]:
    return {name.removesuffix(".json"): json.loads(data) for name, (_, data) in read_shard(path).items() if name.endswith(".json")}


def captions(out: Path, field: str = "re_caption") -> dict[str, str]:
    return {key: told[field] for path in sorted(out.glob("*.tar")) for key, told in values(path).items() if field in told}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(data: Path | str, out: Path, model: str, *options: str) -> int:
    return cli.main(["data", "recaption", str(data), "--model", model, "--out", str(out), "--max-new-tokens", "8", "--device", "cpu", *options])


def refused(capsys, *told, where: Path) -> str:
    before = tree(where)
    capsys.readouterr()
    assert run(*told) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("openvision3: ") and err.count("\n") == 1, err
    assert tree(where) == before, "nothing is written"
    return err


def process(data: Path, out: Path, model: str, *options: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "openvision3", "data", "recaption", str(data), "--model", model, "--out", str(out), "--max-new-tokens", "8"]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([*command, "--device", "cpu", *options], env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def says(answer):
    """A model that says `answer(picture, key)` without being one."""
    return lambda: lambda pictures, keys: [answer(picture, key) for picture, key in zip(pictures, keys, strict=True)]


def test_shards_that_are_missing_are_counted(tmp_path):
    for number in (0, 2):
        write_shard(tmp_path / "in" / f"{number:05d}.tar", members(number, 1))
    tally = recaption([f"{tmp_path}/in/{{00000..00002}}.tar"], tmp_path / "out", says(lambda picture, key: Answer("new")))
    assert tally.unwritten == 1 and [problem["reason"] for problem in tally.problems] == ["missing"] and len(tally.written) == 2


def test_another_shard_of_the_same_name_is_not_taken_for_done(tmp_path):
    for number, folder in enumerate(("a", "b")):
        write_shard(tmp_path / folder / "00000.tar", members(number, 2))
    model = says(lambda picture, key: Answer("new"))
    assert len(recaption([str(tmp_path / "a")], tmp_path / "out", model).written) == 1
    other = recaption([str(tmp_path / "b")], tmp_path / "out", model)
    assert other.unwritten == 1 and other.problems[0]["reason"] == "name is taken" and not other.standing
    assert len(recaption([str(tmp_path / "a")], tmp_path / "out", model).standing) == 1


def test_new_captions_are_not_put_beside_a_table_of_old_ones(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(drawing(0))
    (folder / "captions.csv").write_text("file,caption\na.jpg,old\n")
    before = tree(folder)
    with pytest.raises(ValueError, match=r"has captions\.csv, whose captions would be read beside the new ones"):
        recaption([str(folder)], folder, says(lambda picture, key: Answer("new")))
    assert tree(folder) == before


# -- what is written -------------------------------------------------------------------------------------------------------


def test_every_member_stays_as_it_was_and_the_json_gains_the_caption(tmp_path, model, capsys):
    shard = write_shard(tmp_path / "in" / "00000.tar", members(0, 8) | {"README": b"hello", "alone.txt": b"no image"})
    assert run(tmp_path / "in", tmp_path / "out", model, "--batch", "3", "--prompt", "the red cat") == 0
    before, after = read_shard(shard), read_shard(tmp_path / "out" / "00000.tar")
    assert list(before) == list(after), "members and their order"
    for name, (header, data) in before.items():
        assert after[name][0] == header
        if not name.endswith(".json"):
            assert after[name][1] == data
            continue
        old, new = json.loads(data), json.loads(after[name][1])
        assert new.items() >= old.items()
        assert new["org_caption"] == old["caption"] and new["re_caption"] and "\n" not in new["re_caption"]
        assert new["re_caption_by"]["model"] == "idefics" and new["re_caption_by"]["prompt"] == "the red cat" and new["re_caption_by"]["revision"]
        assert set(new) - set(old) == {"org_caption", "re_caption", "re_caption_by"}
    assert len(set(captions(tmp_path / "out").values())) > 4, "unlike images get unlike captions"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["00000.tar", "recaption.json"], "no journal is left"
    assert "8 samples: 8 new captions, 0 kept theirs" in capsys.readouterr().out


def test_a_sample_without_json_gets_one_behind_its_last_member_and_the_txt_is_its_old_caption(tmp_path):
    content = {"a.jpg": drawing(0), "a.txt": b" old\t one ", "b.jpeg": drawing(1), "c/d.jpg": drawing(2), "c/d.json": b"{}"}
    shard = write_shard(tmp_path / "in.tar", content)
    recaption([str(shard)], tmp_path / "out", says(lambda picture, key: Answer(f"new {key}")))
    told = read_shard(tmp_path / "out" / "in.tar")
    assert list(told) == ["a.jpg", "a.txt", "a.json", "b.jpeg", "b.json", "c/d.jpg", "c/d.json"]
    assert told["a.json"][0] == told["a.jpg"][0], "the new member is dated and owned as its image"
    assert {k: (v["re_caption"], v.get("org_caption")) for k, v in values(tmp_path / "out" / "in.tar").items()} == {
        "a": ("new a", "old one"),
        "b": ("new b", None),
        "c/d": ("new c/d", None),
    }


def test_columns_of_recap_datacomp_stay_and_a_json_field_may_be_the_old_caption(tmp_path):
    told = {"url": "u", "caption": "alt text", "org_caption": "the alt text", "re_caption": "an older model's", "title": "A title"}
    shard = str(write_shard(tmp_path / "00000.tar", {"0.jpg": drawing(0), "0.txt": b"alt text", "0.json": json.dumps(told).encode()}))
    model = says(lambda picture, key: Answer("new"))
    with pytest.raises(ValueError, match="has a re_caption; choose another name with --field, or overwrite it with --replace"):
        recaption([shard], tmp_path / "out", model)
    assert not (tmp_path / "out").exists()
    recaption([shard], tmp_path / "out", model, replace=True)
    (new,) = values(tmp_path / "out" / "00000.tar").values()
    assert (new["re_caption"], new["org_caption"]) == ("new", "the alt text")
    recaption([shard], tmp_path / "own", model, field="long", caption_key="title")
    (new,) = values(tmp_path / "own" / "00000.tar").values()
    assert (new["long"], new["re_caption"], new["org_caption"]) == ("new", "an older model's", "the alt text")
    del told["org_caption"]
    write_shard(tmp_path / "00001.tar", {"0.jpg": drawing(0), "0.json": json.dumps(told).encode()})
    recaption([str(tmp_path / "00001.tar")], tmp_path / "titles", model, field="long", caption_key="title")
    assert captions(tmp_path / "titles", "org_caption") == {"0": "A title"}


def test_shards_of_one_name_from_two_folders_are_told_apart_and_folders_are_mirrored(tmp_path):
    for folder in ("a", "b"):
        write_shard(tmp_path / folder / "00000.tar", members(0, 1))
    tally = recaption([str(tmp_path / "{a,b}")], tmp_path / "out", says(lambda picture, key: Answer("new")))
    assert sorted(tree(tmp_path / "out")) == ["a/00000.tar", "b/00000.tar", "recaption.json"] and tally.samples == 2


def test_shards_of_recap_datacomp_as_img2dataset_writes_them_are_read_and_written_anew(tmp_path):
    """No .txt, keys in the order of arrival, and siblings that a glob names too."""
    columns = {"re_caption": "A long caption.", "org_caption": "alt text", "status": "success", "error_message": None, "exif": "{}", "sha256": "0" * 64}
    content = {}
    for key in ("000000001", "000000003", "000000002"):
        content |= {f"{key}.jpg": drawing(int(key)), f"{key}.json": json.dumps(columns | {"key": key, "url": "http://example.org"}, indent=4).encode()}
    shard = write_shard(tmp_path / "in" / "00000.tar", content)
    for name in ("00000.parquet", "00000_stats.json"):
        (tmp_path / "in" / name).write_bytes(b"{}")
    source = ShardSource([str(shard)], ("re_caption", "org_caption"))
    assert [source.captions(i) for i in range(3)] == [("A long caption.", "alt text")] * 3
    recaption([str(tmp_path / "in" / "*")], tmp_path / "out", says(lambda picture, key: Answer("mine")), field="own_caption")
    source = ShardSource([str(tmp_path / "out" / "00000.tar")], ("own_caption", "re_caption", "org_caption"))
    assert [(source.key(i), source.captions(i)) for i in range(3)] == [(f"00000/{k[:-4]}", ("mine", "A long caption.", "alt text")) for k in list(content)[::2]]


name = st.text(st.characters(codec="utf-8", exclude_characters="/.\0"), min_size=1, max_size=120).filter(lambda text: text.strip() == text)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(name, st.sets(st.sampled_from(["txt", "json", "cls", "jpg"]), min_size=1)), min_size=1, max_size=5, unique_by=lambda s: s[0]))
def test_any_tar_keeps_all_that_is_not_json_and_is_read_back_whole(tmp_path_factory, stems):
    folder = tmp_path_factory.mktemp("any")
    content = {"jpg": drawing(3), "txt": b"old", "json": b'{"a": [1, 2.5, null]}', "cls": b"7"}
    shard = write_shard(
        folder / "s.tar", {f"{stem}.{e}": content[e] for stem, extensions in stems for e in sorted(extensions)}, tarfile.PAX_FORMAT, 1.5e9 + 0.25
    )
    tally = recaption([str(shard)], folder / "out", says(lambda picture, key: Answer("new")))
    if not any("jpg" in extensions for _, extensions in stems):  # nothing to caption
        assert tally.unwritten == 1 and not (folder / "out").exists() and tally.problems[0]["reason"] == "no image"
        return
    before, after = read_shard(shard), read_shard(folder / "out" / "s.tar")
    assert {n: v for n, v in before.items() if not n.endswith(".json")} == {n: v for n, v in after.items() if not n.endswith(".json")}
    pictures = {stem for stem, extensions in stems if "jpg" in extensions}
    assert {n.removesuffix(".json") for n, (_, data) in after.items() if n.endswith(".json") and b'"new"' in data} == pictures
    assert set(before) <= set(after)
    source = ShardSource([str(folder / "out" / "s.tar")], ("re_caption",))
    assert "damaged shard" not in {p["reason"] for p in source.problems}
    assert [source.captions(i) for i in range(len(source))] == [("new",)] * len(pictures)


# -- what it depends on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", [(), ("--top-p", "0.9", "--temperature", "1.5", "--seed", "3")])
def test_the_batch_does_not_change_what_is_written(tmp_path, model, drawn):
    shard = write_shard(tmp_path / "00000.tar", members(0, 12))
    for batch in (1, 5, 12):
        assert run(shard, tmp_path / str(batch), model, "--batch", str(batch), *drawn) == 0
    assert tree(tmp_path / "1") == tree(tmp_path / "5") == tree(tmp_path / "12")


def test_the_likeliest_words_are_those_of_a_loop_written_out_by_hand(tmp_path, model):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    shard = write_shard(tmp_path / "00000.tar", members(0, 6))
    assert run(shard, tmp_path / "out", model, "--batch", "6", "--prompt", "the dog") == 0
    network, processor = AutoModelForImageTextToText.from_pretrained(model).eval(), AutoProcessor.from_pretrained(model)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the dog"}]}], add_generation_prompt=True, tokenize=False
    )
    by_hand = {}
    for i in range(6):
        inputs = processor(text=text, images=[Image.open(io.BytesIO(drawing(i))).convert("RGB")], return_tensors="pt")
        ids, start = inputs.pop("input_ids"), inputs.pop("attention_mask").shape[1]
        while ids.shape[1] < start + 8 and ids[0, -1] != 2:
            with torch.no_grad():
                ids = torch.cat([ids, network(input_ids=ids, use_cache=False, **inputs).logits[:, -1:].argmax(-1)], 1)
        by_hand[f"{i:09d}"] = " ".join(processor.decode(ids[0, start:], skip_special_tokens=True).split())
    assert captions(tmp_path / "out") == {key: text for key, text in by_hand.items() if text}


def test_drawn_text_is_a_function_of_seed_and_sample_however_the_shards_are_cut(tmp_path, model):
    drawn = ("--top-p", "0.95", "--seed")
    write_shard(tmp_path / "one" / "00000.tar", members(0, 8))
    write_shard(tmp_path / "two" / "00000.tar", members(5, 3))
    write_shard(tmp_path / "two" / "00001.tar", members(0, 5))
    for data, out, seed in (("one", "a", "1"), ("two", "b", "1"), ("one", "c", "2")):
        assert run(tmp_path / data, tmp_path / out, model, *drawn, seed) == 0
    assert captions(tmp_path / "a") == captions(tmp_path / "b") != captions(tmp_path / "c")


def test_the_models_own_ways_to_decode_are_set_aside(tmp_path, model):
    """transformers fills what is left open from the model's own settings."""
    own = Path(shutil.copytree(model, tmp_path / "own"))
    settings = json.loads((own / "generation_config.json").read_text())
    changes = {"do_sample": True, "temperature": 9.0, "num_beams": 3, "repetition_penalty": 50.0, "no_repeat_ngram_size": 1, "min_new_tokens": 9}
    (own / "generation_config.json").write_text(json.dumps(settings | changes))
    images = [Image.open(io.BytesIO(drawing(seed))).convert("RGB") for seed in range(3)]
    plain, other = (ImageTextModel(str(folder), Wording(max_new_tokens=12))(images, ["a", "b", "c"]) for folder in (model, own))
    assert plain == other


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_words_are_drawn_as_often_as_their_probability_says(top_p):
    from openvision3.recaption.image_text import _Draws

    count, chances = 20_000, torch.tensor([0.05, 0.5, 0.15, 0.3])
    draws = _Draws(Wording(top_p=top_p), [f"key {i}" for i in range(count)])
    expected = chances if top_p == 1 else torch.tensor([0.0, 0.5, 0.0, 0.3]) / 0.8
    for _ in range(2):  # the second word is drawn anew
        scores = draws(torch.zeros(count, 1, dtype=torch.long), chances.log().expand(count, -1))
        assert (torch.isfinite(scores).sum(1) == 1).all(), "one word is left"
        assert (torch.bincount(scores.argmax(1), minlength=4) / count - expected).abs().max() < 0.015


def test_captions_end_at_so_many_words_and_an_empty_answer_keeps_the_old_caption(tmp_path, capsys):
    shard = write_shard(tmp_path / "00000.tar", members(0, 3))
    answers = {"000000000": Answer("one two three four", cut=True), "000000001": Answer(""), "000000002": Answer("one", cut=True)}
    tally = recaption([str(shard)], tmp_path / "out", says(lambda picture, key: answers[key]), max_words=3)
    assert captions(tmp_path / "out") == {"000000000": "one two three", "000000002": "one"}
    assert captions(tmp_path / "out", "org_caption") == {f"{i:09d}": f"old {i}" for i in range(3)}
    assert values(tmp_path / "out" / "00000.tar")["000000001"]["re_caption_by"]["kept"] == "empty answer"
    assert (tally.samples, tally.kept, tally.cut) == (3, Counter({"empty answer": 1}), 1)


@pytest.mark.parametrize(
    ("said", "prompt", "line"),
    [
        (" A cat.\n\nIt sits\ton a\u2003tree. ", "", "A cat. It sits on a tree."),
        ("describe THIS picture: a cat", "Describe this picture", "a cat"),
        ("Describe this pictureframe", "Describe this picture", "Describe this pictureframe"),
        ("a cat", "a", "a cat"),
        ("a cat", "<image> a cat", ""),
        ("half a letter \ufffd", "", "half a letter"),
        ("\ud83d and \x00more", "", "? and more"),
        ("  \n ", "", ""),
    ],
)
def test_an_answer_becomes_one_clean_line_without_the_prompt(said, prompt, line):
    assert clean(said, prompt) == line


def test_a_picture_that_the_processor_refuses_costs_only_itself(model, monkeypatch):
    asked = ImageTextModel(model, Wording(max_new_tokens=6))
    pictures = [Image.open(io.BytesIO(drawing(i))).convert("RGB") for i in range(4)]
    alone = asked([pictures[0], pictures[2], pictures[3]], ["0", "2", "3"])
    prepare = asked._prepare

    def refuses(images):
        if any(image.size == pictures[1].size for image in images):
            raise ValueError("absolute aspect ratio must be smaller than 2")
        return prepare(images)

    monkeypatch.setattr(asked, "_prepare", refuses)
    answers = asked(pictures, list("0123"))
    assert isinstance(answers[1], ImageError) and answers[1].reason == "refused by the processor" and "aspect ratio" in str(answers[1])
    assert [answers[0], answers[2], answers[3]] == alone


# -- kills, processes ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_begun_again_the_bytes_are_those_of_an_uninterrupted_run(tmp_path, model):
    for number in range(2):
        write_shard(tmp_path / "in" / f"0000{number}.tar", members(20 * number, 20))
    assert run(tmp_path / "in", tmp_path / "whole", model, "--batch", "2") == 0
    journal = tmp_path / "out" / ".00001.tar.journal"
    job = process(tmp_path / "in", tmp_path / "out", model, "--batch", "2")
    try:
        while job.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 4):
            time.sleep(0.002)
        assert job.poll() is None, "it was to be killed in the middle of the second shard"
    finally:
        job.send_signal(signal.SIGKILL)
        job.communicate()
    done = 2 * (journal.read_bytes().count(b"\n") - 1)
    assert not (tmp_path / "out" / "00001.tar").exists()
    again = process(tmp_path / "in", tmp_path / "out", model, "--batch", "2")
    said, err = again.communicate()
    assert again.returncode == 0, err
    assert f"20 samples: 20 new captions, 0 kept theirs; {done} were done before" in said and "1 of 2 files written" in said and "1 existed already" in said
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


class Killed(BaseException):
    """Stands for a process that dies: nothing on the way may catch it."""


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10), st.floats(0, 1), st.integers(1, 4), st.integers(1, 4))
def test_a_journal_torn_anywhere_loses_one_batch_at_most_and_changes_nothing(tmp_path_factory, after, torn, batch, second_batch):
    folder = tmp_path_factory.mktemp("torn")
    shard = str(write_shard(folder / "00000.tar", members(0, 10)))
    asked: list[str] = []

    def answer(picture, key):
        if len(asked) == after:
            raise Killed
        asked.append(key)
        return Answer(f"{key} ü\u2028 é")

    for out, limit in (("whole", 99), ("out", after)):
        after, asked[:] = limit, []
        try:
            recaption([shard], folder / out, says(answer), batch=batch)
        except Killed:
            journal = folder / "out" / ".00000.tar.journal"
            lines = journal.read_bytes().splitlines(keepends=True)
            kept = len(lines) - 1
            if kept:  # the last line was being written
                journal.write_bytes(b"".join(lines[:-1]) + lines[-1][: int(torn * len(lines[-1]))])
                kept -= torn < 1
            after, asked[:] = 99, []
            tally = recaption([shard], folder / "out", says(answer), batch=second_batch)
            assert tally.resumed == kept * batch and asked == [f"{i:09d}" for i in range(kept * batch, 10)]
    assert tree(folder / "out") == tree(folder / "whole")


@pytest.mark.slow
def test_two_processes_share_the_shards_and_write_what_one_writes(tmp_path, model):
    for number in range(3):
        write_shard(tmp_path / "in" / f"0000{number}.tar", members(4 * number, 4))
    jobs = [process(tmp_path / "in", tmp_path / "two", model, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    said = [job.communicate() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert "8 samples" in said[0][0] and "4 samples" in said[1][0]
    assert run(tmp_path / "in", tmp_path / "one", model) == 0
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_a_shard_that_another_process_holds_is_refused(tmp_path):
    shard = str(write_shard(tmp_path / "00000.tar", members(0, 2)))

    def answer(picture, key):
        with pytest.raises(ValueError, match=r"another process is at work on .*00000\.tar; let it finish, or share the shards with --shard-split"):
            recaption([shard], tmp_path / "out", says(lambda picture, key: Answer("other")))
        return Answer("mine")

    recaption([shard], tmp_path / "out", says(answer))
    assert set(captions(tmp_path / "out").values()) == {"mine"}


def test_a_finished_job_is_done_at_once_without_its_model(tmp_path):
    shard = str(write_shard(tmp_path / "00000.tar", members(0, 2)))
    recaption([shard], tmp_path / "out", says(lambda picture, key: Answer("new")))
    before = tree(tmp_path / "out")
    (tmp_path / "out" / ".00000.tar.journal").write_bytes(b"of a run that was killed when all was written\n")
    tally = recaption([shard], tmp_path / "out", lambda: pytest.fail("the model was loaded"))
    assert tree(tmp_path / "out") == before and len(tally.standing) == 1


def test_the_share_of_a_process_comes_from_the_option_or_the_environment():
    assert shard_split("1/4", {"RANK": "0", "WORLD_SIZE": "2"}) == (1, 4)
    assert shard_split("", {"RANK": "1", "WORLD_SIZE": "2"}) == (1, 2)
    assert shard_split("", {}) == (0, 1)
    for bad in ("2/2", "x", "1", "-1/2", "0/0"):
        with pytest.raises(ValueError, match="must be RANK/WORLD with RANK from 0 to WORLD - 1"):
            shard_split(bad, {})


# -- damage ----------------------------------------------------------------------------------------------------------------


def test_unusable_samples_are_kept_with_their_old_caption_and_counted_by_reason(tmp_path):
    content = members(0, 5)
    content["000000001.jpg"] = b"<html>404</html>"
    content["000000002.jpg"] = content["000000002.jpg"][:-200]
    content["000000003.json"] = b'{"caption": "cut'
    shard = write_shard(tmp_path / "00000.tar", content)
    strange = ImageError("refused by the processor", "too long a line")
    tally = recaption([str(shard)], tmp_path / "out", says(lambda picture, key: strange if key.endswith("4") else Answer("new")), batch=2)
    assert tally.kept == {"not an image": 1, "truncated": 1, "broken JSON": 1, "refused by the processor": 1} and tally.samples == 5
    after = read_shard(tmp_path / "out" / "00000.tar")
    assert {name: data for name, (_, data) in after.items() if not name.endswith(".json") or "3.json" in name} == {
        name: data for name, data in content.items() if not name.endswith(".json") or "3.json" in name
    }
    told = {name: json.loads(data) for name, (_, data) in after.items() if name.endswith(".json") and "3.json" not in name}
    assert [name for name, value in told.items() if "re_caption" in value] == ["000000000.json"]
    assert told["000000001.json"]["re_caption_by"]["kept"] == "not an image" and told["000000001.json"]["org_caption"] == "old 1"


def test_of_a_shard_that_is_cut_off_the_whole_part_is_written_and_the_rest_reported(tmp_path, model, capsys):
    shard = write_shard(tmp_path / "in" / "00000.tar", members(0, 4))
    with tarfile.open(shard) as tar:
        cut = tar.getmember("000000002.jpg").offset_data + 100
    shard.write_bytes(shard.read_bytes()[:cut])
    write_shard(tmp_path / "in" / "00001.tar", members(4, 2))
    assert run(tmp_path / "in", tmp_path / "out", model) == 0
    out, err = capsys.readouterr()
    assert "4 samples" in out and "damaged shard: unexpected end of data; 2 samples before the damage" in err and err.count("\n") == 1
    source = ShardSource([str(tmp_path / "out" / f"0000{i}.tar") for i in range(2)], ("org_caption",))
    assert [source.captions(i)[0] for i in range(len(source))] == ["old 0", "old 1", "old 4", "old 5"] and not source.problems


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1))
def test_a_cut_anywhere_gives_a_whole_shard_or_none_and_is_never_silent(tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("cut")
    shard = write_shard(folder / "00000.tar", members(0, 3))
    with tarfile.open(shard) as tar:
        end = tar.getmember("000000002.json").offset_data
    shard.write_bytes(shard.read_bytes()[: int(share * end)])
    tally = recaption([str(shard)], folder / "out", says(lambda picture, key: Answer("new")))
    assert [p["reason"] for p in tally.problems] == ["damaged shard"]
    assert tally.unwritten == (not (folder / "out" / "00000.tar").exists())
    if not tally.unwritten:
        source = ShardSource([str(folder / "out" / "00000.tar")], ("re_caption",))
        assert len(source) == tally.samples and "damaged shard" not in {p["reason"] for p in source.problems}


def test_shards_that_cannot_be_read_are_reported_the_others_written_and_the_exit_code_is_2(tmp_path, model, capsys):
    write_shard(tmp_path / "in" / "00001.tar", members(0, 2))
    (tmp_path / "in" / "00000.tar").write_text("<html>404</html>")
    (tmp_path / "in" / "00002.tar").write_bytes(b"")
    assert run(tmp_path / "in", tmp_path / "out", model) == 2
    out, err = capsys.readouterr()
    assert "2 samples" in out and "1 of 3 files written" in out and "2 could not be read" in out and err.count("damaged shard") == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["00001.tar", "recaption.json"]


def test_a_shard_that_vanishes_in_mid_run_is_reported_and_the_next_one_done(tmp_path):
    first, second = write_shard(tmp_path / "in" / "00000.tar", members(0, 6)), write_shard(tmp_path / "in" / "00001.tar", members(6, 2))

    def answer(picture, key):
        first.unlink(missing_ok=True)
        return Answer("new")

    tally = recaption([str(first), str(second)], tmp_path / "out", says(answer), batch=1)
    assert [p["reason"] for p in tally.problems] == ["unreadable shard"] and tally.unwritten == 1
    assert tally.written == [tmp_path / "out" / "00001.tar"]


def test_a_shard_that_changed_since_it_was_begun_is_begun_anew(tmp_path):
    shard = write_shard(tmp_path / "00000.tar", members(0, 4))

    def dies(picture, key):
        if key.endswith("2"):
            raise Killed
        return Answer("of the old one")

    with pytest.raises(Killed):
        recaption([str(shard)], tmp_path / "out", says(dies), batch=1)
    write_shard(shard, members(7, 5))
    tally = recaption([str(shard)], tmp_path / "out", says(lambda picture, key: Answer("new")))
    assert set(captions(tmp_path / "out").values()) == {"new"} and len(captions(tmp_path / "out")) == 5
    assert [p["reason"] for p in tally.problems] == ["changed shard"]


def test_on_a_full_disk_one_line_is_said_finished_shards_stay_and_with_room_it_goes_on(tmp_path, capsys):
    for number in range(3):
        write_shard(tmp_path / "in" / f"0000{number}.tar", members(60 * number, 60))
    size = (tmp_path / "in" / "00000.tar").stat().st_size
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", str(disk)], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no small disk can be mounted: {mount.stderr.strip()}")
    try:
        new = says(lambda picture, key: Answer("new words " * 10))
        with pytest.raises(OSError, match="No space left on device") as caught:
            recaption([str(tmp_path / "in")], disk / "out", new)
        assert str(caught.value.filename).startswith(str(disk / "out"))
        assert len(captions(disk / "out")) == 60 and not list((disk / "out").glob(".*making*"))
        subprocess.run(["mount", "-o", f"remount,size={size * 4}", str(disk)], check=True)
        recaption([str(tmp_path / "in")], disk / "out", new)
        recaption([str(tmp_path / "in")], tmp_path / "whole", new)
        assert tree(disk / "out") == tree(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# -- refusals --------------------------------------------------------------------------------------------------------------


def test_another_model_or_wording_in_the_same_folder_is_refused_and_the_difference_named(tmp_path, model, other_model, capsys):
    shard = write_shard(tmp_path / "00000.tar", members(0, 2))
    out = tmp_path / "out"
    assert run(shard, out, model, "--prompt", "the cat") == 0
    assert "begun with prompt 'the cat', not prompt 'the dog'" in refused(capsys, shard, out, model, "--prompt", "the dog", where=tmp_path)
    said = refused(capsys, shard, out, other_model, "--prompt", "the cat", where=tmp_path)
    assert "begun with model idefics (sha256:" in said and "not model llava (sha256:" in said
    said = refused(capsys, shard, out, model, "--prompt", "the cat", "--top-p", "0.9", where=tmp_path)
    assert "begun with no top_p" in said and "not top_p 0.9" in said
    assert "max_words 0, not max_words 4" in refused(capsys, shard, out, model, "--prompt", "the cat", "--max-words", "4", where=tmp_path)
    assert "field 're_caption', not field 'long'" in refused(capsys, shard, out, model, "--prompt", "the cat", "--field", "long", where=tmp_path)


def test_a_model_that_was_moved_is_the_same_model(tmp_path, model):
    shard = write_shard(tmp_path / "00000.tar", members(0, 2))
    assert run(shard, tmp_path / "out", model) == 0
    (tmp_path / "moved").symlink_to(model)
    assert run(shard, tmp_path / "out", str(tmp_path / "moved")) == 0


def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, model, other_model, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    shard = write_shard(tmp_path / "in" / "00000.tar", members(0, 2))
    out = tmp_path / "out"
    (tmp_path / "notes.txt").write_text("no shard")
    for told, message in (
        ((shard, shard.parent, model), "is where the shards are, and they would be overwritten"),
        ((shard, tmp_path / "notes.txt", model), "is a file; name a folder with --out"),
        ((tmp_path / "none", out, model), "no such data"),
        ((tmp_path / "notes.txt", out, model), "neither a folder nor a .tar shard"),
        ((shard, out, "no-such/model"), "neither a folder nor in the local cache"),
        ((shard, out, str(tmp_path / "in")), "cannot be opened"),
        ((shard, out, other_model, "--prompt", "the cat"), "it has no chat template, so put its image token into --prompt: '<image> ...'"),
        ((shard, out, model, "--batch", "0"), "batch 0"),
        ((shard, out, model, "--top-p", "1.5"), "top_p 1.5"),
        ((shard, out, model, "--field", "org_caption"), "would overwrite the old caption"),
        ((shard, out, model, "--shard-split", "2/2"), "must be RANK/WORLD"),
        ((shard, out, model, "--sheet", "a.jpg"), "must end in .png"),
        ((shard, out, model, "--promt", "a"), "Did you mean '--prompt'?"),
    ):
        assert message in refused(capsys, *told, where=tmp_path), told
    write_shard(tmp_path / "mine" / "00000.tar", members(0, 1))
    assert "was not written by recaption" in refused(capsys, shard, tmp_path / "mine", model, where=tmp_path)
    assert run(shard, out, other_model, "--prompt", "<image> the cat") == 0, "a prompt that was refused is not remembered"


def test_without_transformers_the_extra_is_named(tmp_path, model, capsys, monkeypatch):
    shard = write_shard(tmp_path / "00000.tar", members(0, 2))
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'openvision3[transformers]'" in refused(capsys, shard, tmp_path / "out", model, where=tmp_path)


def test_a_model_with_weights_missing_is_refused(tmp_path, model, capsys):
    from safetensors.torch import load_file, save_file

    shard = write_shard(tmp_path / "00000.tar", members(0, 2))
    folder = tmp_path / "half"
    folder.mkdir()
    for path in Path(model).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "layers.1.mlp" in name)
    save_file({name: value for name, value in weights.items() if name != gone}, folder / "model.safetensors", {"format": "pt"})
    assert "lacks 1 of the model's weights" in refused(capsys, shard, tmp_path / "out", str(folder), where=tmp_path)


# -- what comes after ------------------------------------------------------------------------------------------------------


def test_the_new_shards_are_trained_on(tmp_path, model):
    write_shard(tmp_path / "in" / "00000.tar", members(0, 12))
    write_shard(tmp_path / "in" / "00001.tar", members(12, 4))
    assert run(tmp_path / "in", tmp_path / "out", model) == 0
    source = ShardSource([str(tmp_path / "out" / "00000.tar")], ("re_caption", "org_caption"))
    told = [source.captions(i) for i in range(len(source))]
    assert [t[-1] for t in told] == [f"old {i}" for i in range(12)] and sum(len(t) == 2 for t in told) > 6
    data, val = (str(tmp_path / "out" / f"0000{number}.tar") for number in range(2))
    size = ("--steps", "2", "--batch", "4", "--size", "32", "--precision", "fp32", "--device", "cpu", "--log-every", "1")
    keys = ("--caption-keys", "re_caption", "org_caption", "--captions", "2")
    assert cli.main(["train", "tiny", "--data", data, "--val", val, "--out", str(tmp_path / "run"), *size, *keys]) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2


@pytest.mark.parametrize("beside", [True, False])
def test_a_folder_of_pictures_gets_a_table_that_is_read_with_it(tmp_path, model, beside, capsys):
    folder = tmp_path / "mine"
    (folder / "more").mkdir(parents=True)
    for i in range(4):
        (folder / ("more" if i % 2 else "") / f"{i}.jpg").write_bytes(drawing(i))
        (folder / ("more" if i % 2 else "") / f"{i}.txt").write_text(f"old {i}")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "broken.txt").write_text("old and broken")
    out = folder if beside else tmp_path / "out"
    assert run(folder, out, model, "--sheet", str(tmp_path / "sheet.png")) == 0
    assert "5 samples: 4 new captions, 1 kept theirs (1 not an image)" in capsys.readouterr().out
    rows = {row["file"]: row for row in map(json.loads, (out / "captions.jsonl").read_text().splitlines())}
    assert rows["broken.jpg"]["caption"] == ["old and broken"] and rows["more/1.jpg"]["org_caption"] == ["old 1"]
    assert Image.open(tmp_path / "sheet.png").width > 500
    if not beside:
        (folder / "captions.jsonl").write_bytes((out / "captions.jsonl").read_bytes())
    source = FolderSource(folder)
    assert {source.key(i).removeprefix("mine/"): source.captions(i) for i in range(len(source))} == {
        name: (row["caption"],) if isinstance(row["caption"], str) else ("old and broken",) for name, row in rows.items()
    }
    before = tree(folder)
    assert run(folder, out, model) == 0 and tree(folder) == before, "done is done"


def test_the_sheet_shows_pictures_spread_over_the_shards_with_both_captions(tmp_path):
    for number in range(5):
        write_shard(tmp_path / "in" / f"0000{number}.tar", members(10 * number, 10))
    recaption([str(tmp_path / "in")], tmp_path / "out", says(lambda picture, key: Answer(f"new {int(key)}")))
    rows = examples(RecaptionJob((str(tmp_path / "in"),), "none", str(tmp_path / "out")))
    assert len(rows) == 12 and len({new[4:] for _, _, new in rows}) == 12
    for picture, old, new in rows:
        assert old.removeprefix("old ") == new.removeprefix("new ") and picture.size == SHAPES[int(new[4:]) % len(SHAPES)]


def test_progress_is_one_line_every_few_seconds_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    from openvision3.cli import data as cli_data
    from openvision3.recaption.rewrite import Tally

    with cli_data._show_progress("recaption", every=0) as watch:
        watch(Tally(samples=1200, share=0.25, working="00000.tar", began=time.monotonic() - 10))
    said = capsys.readouterr().err
    assert said.startswith("recaption 25.0%  00000.tar  1,200 samples, 120/s, 30s left") and said.count("\n") == 1


def test_what_a_kill_left_half_written_is_gone_when_its_shard_is_done(tmp_path):
    write_shard(tmp_path / "in" / "00000.tar", {"a.jpg": drawing(0), "a.txt": b"old"})
    (tmp_path / "out").mkdir()
    left = tmp_path / "out" / ".00000.tar.elsewhere-1.making"
    left.write_bytes(b"half")
    recaption([str(tmp_path / "in")], tmp_path / "out", says(lambda picture, key: Answer("new")))
    assert captions(tmp_path / "out") == {"a": "new"}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["00000.tar", "recaption.json"]
