"""Class labels from emoji groups, sub-folders, tables, JSON fields and .cls members; nothing is left out without a word."""

import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
from shard_files import jpeg, reasons, write_shard

from openvision3.data import labelled, openmoji
from openvision3.data.folders import FolderSource
from openvision3.data.images import ImageError
from openvision3.data.labelled import TEMPLATES, Classes, LabelError, Labels, prompts, read_classes, read_labels, read_names
from openvision3.data.openmoji import EmojiSource
from openvision3.data.shards import index, tars
from openvision3.data.shards.source import ShardSource
from openvision3.data.sources import MixedSource


def folder(root: Path, classes: dict[str, int]) -> FolderSource:
    """`count` images in each sub-folder; "" is the folder itself."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i}.jpg").write_bytes(jpeg())
    return FolderSource(root)


def shard(path: Path, values: list, member: str = "json", start: int = 0) -> str:
    """A sample for each value; None leaves the member out."""
    members = {}
    for i, value in enumerate(values, start):
        members[f"{i:09d}.jpg"] = jpeg()
        if value is not None:
            members[f"{i:09d}.{member}"] = value if isinstance(value, bytes) else json.dumps(value).encode()
    return write_shard(path, members)


# -- where labels come from -------------------------------------------------------------------------------------------


def test_emoji_are_labelled_by_group():
    source = EmojiSource(openmoji.load_emoji().test)
    found = read_labels(source)
    assert found.names == tuple(sorted(found.names)) and len(found.names) == 5
    assert all(source.emoji[index].group == found.names[number] for index, number in zip(found.indices, found.classes, strict=True))
    assert all(found.classes.count(number) >= 20 for number in range(len(found.names)))
    assert len(found.indices) + sum(found.left_out.values()) == len(source)
    assert found.left_out["no label"] == sum(e.group is None for e in source.emoji)
    assert source.value(0, "name") == source.emoji[0].name and source.value(0, "colour") is None


def test_a_picture_is_of_the_first_sub_folder_however_deep_it_lies(tmp_path):
    source = folder(tmp_path, {"cat": 2, "dog": 1, "dog/puppies": 2, "": 1})
    found = read_labels(source, least=1)
    assert found.names == ("cat", "dog") and found.left_out == {"no label": 1}
    assert [found.classes.count(i) for i in range(2)] == [2, 3]
    assert [source.key(i) for i in found.indices] == [source.key(i) for i in range(len(source)) if source.value(i)]
    assert source.value(0, "category") is None


def test_a_field_of_the_json_labels_a_shard(tmp_path):
    values = [{"category": "cat"}, {"category": 7}, {"category": " dog "}, {"other": 1}, {"category": ["x"]}, {"category": None}, {"category": True}, None]
    source = ShardSource([shard(tmp_path / "0.tar", values)])
    assert [source.value(i, "category") for i in range(8)] == ["cat", "7", "dog", None, None, None, None, None]
    found = read_labels(source, "category", least=1)
    assert found.names == ("7", "cat", "dog") and found.indices == (0, 1, 2) and found.classes == (1, 0, 2) and found.left_out == {"no label": 5}


def test_cls_members_are_found_though_no_index_lists_them(tmp_path):
    paths = [shard(tmp_path / "0.tar", [b"3", b" 0\n", None], "cls"), shard(tmp_path / "1.tar", [b"1", b"3"], "CLS", start=3)]
    source = ShardSource(paths)
    assert [source.value(i) for i in range(5)] == [source.value(i, "cls") for i in range(5)] == ["3", "0", None, "1", "3"]
    again = pickle.loads(pickle.dumps(source))
    assert [again.value(i) for i in (4, 0, 4)] == ["3", "3", "3"]
    names = ["zero", "one", "two", "three"]
    found = read_labels(source, names=names, least=1)
    assert found.names == ("zero", "one", "three") and found.classes == (2, 0, 1, 2) and found.indices == (0, 1, 3, 4)


def of_an_older_version(path: str) -> str:
    """The shard, with an index beside it that does not list `.cls` members."""
    scanned = index.scan(path)
    replace(scanned, offsets=scanned.offsets[:, :3], sizes=scanned.sizes[:, :3]).save(index.index_path(path))
    return path


def test_an_index_of_an_older_version_costs_one_reading_of_the_headers_of_each_shard(tmp_path, monkeypatch):
    paths = [shard(tmp_path / f"{n}.tar", [b"%d" % n, b"7"], "cls", start=2 * n) for n in range(3)]
    read = []
    extra = tars.extra_members
    monkeypatch.setattr(tars, "extra_members", lambda path, ending: read.append(path) or extra(path, ending))
    turns = (0, 2, 4, 1, 3, 5, 0)
    new = ShardSource(paths)
    assert [new.value(i) for i in turns] == ["0", "1", "2", "7", "7", "7", "0"] and not read and reasons(new) == {}
    old = ShardSource([of_an_older_version(path) for path in paths])
    assert [old.value(i) for i in turns] == ["0", "1", "2", "7", "7", "7", "0"] and sorted(read) == paths
    assert reasons(old) == {"stale index": 3} and {p["key"] for p in old.problems} == set(paths)


def test_an_index_lists_classes_only_where_there_are_any(tmp_path):
    with_class, without = (index.scan(shard(tmp_path / f"{kind}.tar", [b"1", None], kind)) for kind in ("cls", "txt"))
    assert with_class.kinds == ("image", "txt", "json", "cls") and without.kinds == ("image", "txt", "json")
    assert with_class.member(0, "cls") and with_class.member(1, "cls") is None


def test_labels_of_samples_that_a_rule_keeps_are_theirs(tmp_path):
    source = ShardSource([shard(tmp_path / "0.tar", [{"n": i, "category": f"c{i}"} for i in range(4)])], only={"n": "2"})
    assert len(source) == 1 and source.value(0, "category") == "c2"


def test_a_mix_asks_each_source(tmp_path):
    source = MixedSource([folder(tmp_path / "a", {"cat": 1}), ShardSource([shard(tmp_path / "0.tar", [b"dog"], "cls")])])
    assert [source.value(i) for i in range(2)] == ["cat", "dog"]


def test_a_shard_that_vanishes_is_counted(tmp_path):
    path = shard(tmp_path / "0.tar", [{"category": "cat"}] * 3)
    other = shard(tmp_path / "1.tar", [{"category": "dog"}] * 2, start=3)
    source = ShardSource([path, other])
    os.unlink(path)
    with pytest.raises(ImageError):
        source.value(0, "category")
    assert read_labels(source, "category", least=1).left_out == {"vanished": 3}
    source = ShardSource([shard(tmp_path / "2.tar", [b"1"], "cls")])
    os.unlink(tmp_path / "2.tar")
    with pytest.raises(ImageError):
        source.value(0)


def table(root: Path, text: str, names=("a", "b", "c"), file="captions.csv") -> FolderSource:
    root.mkdir(exist_ok=True)
    for name in names:
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / f"{name}.jpg").write_bytes(jpeg())
    (root / file).write_text(text, encoding="utf-8")
    return FolderSource(root)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("captions.csv", "file,caption,label,kind\na.jpg,a cat,cat,7\na.jpg,one more, cat ,7\nb.jpg,a dog,,8\n"),
        ("metadata.csv", "file_name,label,kind\na.jpg,cat,7\nb.jpg,,8\n"),
        ("captions.jsonl", '{"file": "a.jpg", "label": "cat", "kind": 7}\n{"file": "b.jpg", "label": ["x"], "kind": 8}\n'),
    ],
)
def test_the_columns_of_a_table_label_a_folder(tmp_path, file, text):
    source = table(tmp_path, text, file=file)
    assert [source.value(i) for i in range(3)] == [source.value(i, "label") for i in range(3)] == ["cat", None, None]
    assert [source.value(i, "kind") for i in range(3)] == ["7", "8", None]
    assert read_labels(source, least=0).left_out == {"no label": 2}
    assert reasons(source) == {}


def test_a_label_column_goes_before_sub_folders_which_have_a_name_of_their_own(tmp_path):
    source = table(tmp_path, "file,label\nx/a.jpg,cat\n", ("x/a", "x/b"))
    assert [source.value(i) for i in range(2)] == ["cat", None] and [source.value(i, "folder") for i in range(2)] == ["x", "x"]


def test_rows_that_label_an_image_differently_are_counted_and_neither_is_taken(tmp_path):
    source = table(tmp_path, "file,label\na.jpg,cat\na.jpg,dog\na.jpg,cat\nb.jpg,dog\nb.jpg,dog\n")
    labels = read_labels(source, least=0)
    assert labels.left_out == {"several labels": 1, "no label": 1} and labels.indices == (1,) and labels.names == ("dog",)


def test_a_label_that_is_no_text_is_counted(tmp_path):
    table(tmp_path, "file\na.jpg\n")
    (tmp_path / "captions.csv").write_bytes("file,label\na.jpg,caf\u00e9\n".encode() + "b.jpg,caf\u00e9\n".encode("latin-1"))
    labels = read_labels(FolderSource(tmp_path), least=0)
    assert labels.names == ("caf\u00e9",) and labels.left_out == {"not UTF-8": 1, "no label": 1}


# -- which class it is ------------------------------------------------------------------------------------------------


def test_small_classes_are_left_out_and_counted(tmp_path):
    source = folder(tmp_path, {"ant": 2, "bee": 5, "cat": 1, "dog": 3})
    found = read_labels(source, least=3)
    assert found.names == found.values == ("bee", "dog") and found.left_out == {"class of fewer than 3 images": 3}
    assert [source.value(i) for i in found.indices] == [found.names[n] for n in found.classes]
    assert read_labels(source, names=["ant", "bee", "cat", "cow", "dog"], least=0).names == ("ant", "bee", "cat", "cow", "dog"), "all stay candidates"
    with pytest.raises(ValueError, match="no class has 20 images, the largest of 4 has 5"):
        read_labels(source)


def test_names_number_lines_and_wordnet_ids_mean_the_listed_classes(tmp_path):
    wordnet = folder(tmp_path / "w", {"n01443537": 1, "n01440764": 2})
    found = read_labels(wordnet, names=["tench", "goldfish"], least=1)
    assert found.names == ("tench", "goldfish") and found.values == ("n01440764", "n01443537")
    assert [wordnet.value(i) for i in found.indices] == [found.values[n] for n in found.classes]
    named = folder(tmp_path / "n", {"goldfish": 2, "tench": 1, "newt": 1})
    found = read_labels(named, names=["tench", "goldfish"], least=1)
    assert found.names == ("tench", "goldfish") and sorted(found.classes) == [0, 1, 1] and found.left_out == {"class not in the list": 1}
    twice = ShardSource([shard(tmp_path / "0.tar", [b"1", b"2"], "cls")])  # CLIP's list of ImageNet names "missile" and "sunglasses" twice
    assert read_labels(twice, names=["crane", "missile", "missile"], least=1).classes == (0, 1)


def test_another_set_is_read_with_the_classes_of_the_first(tmp_path):
    train = read_labels(folder(tmp_path / "train", {"n01443537": 3, "n01440764": 3, "n01484850": 1}), names=["tench", "goldfish", "shark"], least=2)
    test = read_labels(folder(tmp_path / "test", {"n01443537": 1, "n01484850": 2}), like=train)
    assert test.names == train.names == ("tench", "goldfish") and test.classes == (1,) and test.left_out == {"class not in the list": 2}
    with pytest.raises(ValueError, match=r"no image is of one of the 2 classes, such as tench; found: dog ..."):
        read_labels(folder(tmp_path / "strange", {"dog": 2}), like=train)
    numbers = [shard(tmp_path / f"{n}.tar", [str(v).encode() for v in values], "cls") for n, values in enumerate(([0, 2, 2], [2, 1]))]
    train = read_labels(ShardSource(numbers[:1]), names=["a", "b", "c"], least=0)
    assert read_labels(ShardSource(numbers[1:]), like=train).classes == (2, 1)


@pytest.mark.parametrize(
    ("classes", "names", "message"),
    [
        ({"": 2}, (), "none of the 2 images has a group, a label column, a sub-folder or a .cls member"),
        ({"cat": 1}, ("dog",), "classes are called cat ... \\(1 of them\\) and none of them is among the 1 names \\(dog ...\\)"),
        ({"5": 1}, ("a", "b"), "class number 5 has no name: the 2 names are for 0 to 1"),
        ({"n01440764": 1}, ("a", "b"), "as many WordNet ids as names"),
        ({"a": 1}, ("a", "b", "a"), "a is twice among the class names"),
    ],
)
def test_labels_that_fit_no_class_are_refused(tmp_path, classes, names, message):
    with pytest.raises(ValueError, match=message) as error:
        read_labels(folder(tmp_path, classes), names=names, least=1)
    assert "\n" not in str(error.value)


def test_a_field_that_no_sample_has_is_named(tmp_path):
    message = "none of the 1 images has a label under colour; name a field of the shards' JSON, or a column of captions.csv, with --label-key"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_labels(ShardSource([shard(tmp_path / "0.tar", [{"category": "x"}])]), "colour")


# -- the classes of a training ----------------------------------------------------------------------------------------


def numbers(classes: Classes, source) -> list[int | str]:
    """The number of each sample's class, or the reason why it has none."""

    def one(i: int) -> int | str:
        try:
            return classes.number(source, i)
        except ImageError as error:
            return error.reason

    return [one(i) for i in range(len(source))]


def names_file(tmp_path: Path, *names: str) -> str:
    (tmp_path / "names.txt").write_text("\n".join(names))
    return str(tmp_path / "names.txt")


def test_every_label_of_the_source_is_a_class_and_what_has_none_is_listed_at_the_start(tmp_path):
    source = folder(tmp_path, {"dog": 2, "cat": 1, "": 1})
    classes = read_classes(source)
    assert classes.names == ("cat", "dog") and numbers(classes, source) == ["no label", 0, 1, 1]
    assert [(p["reason"], p["detail"]) for p in source.problems] == [("no label", "no group, label column, sub-folder or .cls member")]
    assert numbers(pickle.loads(pickle.dumps(classes)), source) == ["no label", 0, 1, 1]


def test_the_classes_of_training_are_those_of_evaluation(tmp_path):
    for source, names in (
        (folder(tmp_path / "a", {"dog": 2, "cat": 1}), ()),
        (folder(tmp_path / "b", {"n01443537": 1, "n01440764": 2}), ("tench", "goldfish")),
    ):
        labels, classes = read_labels(source, names=names, least=0), read_classes(source, classes=names_file(tmp_path, *names) if names else "")
        assert classes.names == labels.names and numbers(classes, source) == list(labels.classes)


def test_numbers_without_names_are_classes_in_the_order_of_numbers(tmp_path):
    source = ShardSource([shard(tmp_path / "0.tar", [str(i).encode() for i in (10, 2, 0, 1, *range(3, 10))], "cls")])
    classes = read_classes(source)
    assert classes.names == tuple(map(str, range(11))) and numbers(classes, source)[:3] == [10, 2, 0]
    assert read_labels(source, least=0).names == classes.names


def test_with_names_only_a_few_samples_are_read_at_the_start(tmp_path, monkeypatch):
    source = ShardSource([shard(tmp_path / "0.tar", [b"%d" % (i % 3) for i in range(100)], "cls")])
    read = []
    value = ShardSource.value
    monkeypatch.setattr(ShardSource, "value", lambda self, index, name="": read.append(index) or value(self, index, name))
    for classes in (names_file(tmp_path, "ant", "bee", "cat"), "3"):
        read.clear()
        made = read_classes(source, classes=classes)
        assert len(read) <= 20 and numbers(made, source) == [i % 3 for i in range(100)]
    assert made.names == ("0", "1", "2")
    read.clear()
    read_classes(source)
    assert len(read) == 100


def test_a_label_of_no_class_is_a_problem_of_its_sample_that_names_the_nearest(tmp_path):
    source = ShardSource([shard(tmp_path / "0.tar", [{"kind": v} for v in ("tench", "goldfsh", 1, "0002", 2, 7, "kite", True)])])
    classes = read_classes(source, "kind", names_file(tmp_path, "tench", "goldfish", "kite", "kite"))
    unknown = "class not in the list"
    assert numbers(classes, source) == [0, unknown, 1, 2, 2, unknown, unknown, "no label"]
    for sample, message in (
        (1, "class goldfsh is none of the 4 classes; nearest is goldfish"),
        (5, "class number 7 has no name: the 4 names are for 0 to 3"),
        (6, "kite is more than once among the class names; label by numbers"),
        (7, "nothing under kind"),
    ):
        with pytest.raises(LabelError, match=f"^{message}$"):
            classes.number(source, sample)


def test_names_that_are_other_numbers_are_no_line_numbers(tmp_path):
    source = ShardSource([shard(tmp_path / "0.tar", [b"20", b"10", b"0"], "cls")])
    assert numbers(read_classes(source, classes=names_file(tmp_path, "10", "20")), source) == [1, 0, "class not in the list"]


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ({"": 2}, "", "none of the 2 images has a group, a label column, a sub-folder or a .cls member"),
        ({"": 2}, "10", "none of the 2 images has a group"),
        ({"cat": 1}, ("dog",), "classes are called cat ... \\(1 of them\\) and none of them is among the 1 names"),
        ({"5": 1}, ("a", "b"), "class number 5 has no name: the 2 names are for 0 to 1"),
        ({"n01440764": 1}, ("a", "b"), "as many WordNet ids as names"),
        ({"cat": 1}, "0", "classes 0 is not from 1 to 100,000; give the number of classes, or a file of class names"),
        ({"cat": 1}, "none.txt", "no file of class names at none.txt"),
    ],
)
def test_labels_that_fit_no_class_end_a_training_at_its_start(tmp_path, labels, classes, message):
    source = folder(tmp_path / "data", labels)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        read_classes(source, classes=names_file(tmp_path, *classes) if isinstance(classes, tuple) else classes)
    assert "\n" not in str(error.value)


def test_a_field_of_which_each_sample_has_its_own_value_is_no_class(tmp_path, monkeypatch):
    monkeypatch.setattr(labelled, "MOST_CLASSES", 5)
    source = ShardSource([shard(tmp_path / "0.tar", [{"url": f"u{i}", "kind": i % 5, "pair": i // 2} for i in range(12)])])
    with pytest.raises(ValueError, match="12 samples have 12 labels under url, such as u0: these are no classes; name another field with --label-key"):
        read_classes(source, "url")
    assert len(read_classes(source, "kind").names) == 5 and len(read_classes(source, "pair").names) == 6


def test_numbers_alone_are_no_words():
    assert Labels(("0", "12"), ("0", "12"), (0, 1), (0, 1)).numbered and Labels(("n01440764",), ("n01440764",), (0,), (0,)).numbered
    assert not Labels(("0", "cat"), ("0", "cat"), (0, 1), (0, 1)).numbered


def test_class_names_are_one_a_line(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\ufefftench\r\n great  white shark \nkite (bird of prey)\n\n", encoding="utf-8")
    assert read_names(path) == ("tench", "great white shark", "kite (bird of prey)")
    for text, message in (("a\n\nb\n", "empty line 2"), ("\n", "is empty")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_names(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-16 text"):
        read_names(path)
    with pytest.raises(FileNotFoundError, match="one name a line"):
        read_names(tmp_path / "none.txt")


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_the_templates_are_clips_eighty():
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 80 and all(t.count("{}") == 1 and t.endswith(".") for t in TEMPLATES)
    assert {"a photo of a {}.", "itap of my {}.", "a origami {}.", "a {} in a video game.", "a photo of many {}."} < set(TEMPLATES)
    # All but four come with "a" and with "the", so that a slip in one of them would leave its partner alone.
    assert {t for t in TEMPLATES if _other(t) not in TEMPLATES} == {"a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}."}


def _other(template: str) -> str:
    """With the article of the class changed: the last "a" or "the" before it, leaving "a photo of" alone."""
    before, after = template.split("{}")
    found = list(re.finditer(r"\b(a|the)\b", before))
    if not found:
        return ""
    last = found[-1]
    return before[: last.start()] + ("the" if last[1] == "a" else "a") + before[last.end() :] + "{}" + after


def test_prompts_put_the_class_into_each_template_and_underscores_are_spaces():
    assert prompts("golden_retriever")[0] == "a bad photo of a golden retriever." and len(prompts("x")) == 80
    assert prompts("odd {0} name", ("a {}.", "the {}.")) == ["a odd {0} name.", "the odd {0} name."]
