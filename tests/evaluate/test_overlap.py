"""What training has seen is told from what it has not: by captions, images and families, whatever the data are called, and numbers of the two stand apart."""

import json
import shutil

import pytest
import torch
from PIL import Image
from shard_files import write_shard
from tiny_pipeline import NAMES, make_pipeline, write_photo

from openvision3 import cli, hub
from openvision3.data import openmoji
from openvision3.data.fingerprint import FILE, Fingerprint, recorded, take_fingerprint
from openvision3.data.folders import FolderSource
from openvision3.data.openmoji import EmojiSource
from openvision3.data.shards.source import ShardSource
from openvision3.evaluate.image_set import ImageSet
from openvision3.evaluate.overlap import Known, Overlap, recorded_training
from openvision3.evaluate.results import Results, Scores
from openvision3.evaluate.tables import leading, split, with_differences


def photos(folder, seeds, caption="photo {}"):
    for seed in seeds:
        path = write_photo(folder / f"{seed}.png", 48, 40, seed)
        path.with_suffix(".txt").write_text(caption.format(seed))
    return folder


def looked(source, *known: Fingerprint, kinds=()) -> tuple[Overlap, ImageSet]:
    pictures = ImageSet(source, 128)
    for _ in pictures.batches("looking"):
        pass
    overlap = Overlap([Known("the model", each, kinds) for each in known])
    overlap.look(pictures, range(len(source)))
    return overlap, pictures


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("overlap") / "train", range(8))


@pytest.fixture(scope="module")
def data(train, tmp_path_factory):
    """Two images of training under other names, one of them through JPEG and scaling; one with a caption of training; three that are new."""
    folder = photos(tmp_path_factory.mktemp("overlap") / "data", range(20, 24), "new photo {}")
    shutil.copy(train / "3.png", folder / "a.png")
    image = Image.open(train / "5.png")
    image.resize((96, 80), Image.Resampling.BICUBIC).save(folder / "b.jpg", quality=70)
    for name, caption in (("a", "a copy"), ("b", "another copy"), ("20", "  Photo,  2. ")):
        (folder / f"{name}.txt").write_text(caption)
    return folder


def test_copies_of_images_and_of_captions_are_seen_and_each_counts_where_it_matters(train, data):
    source = FolderSource(data)
    overlap, pictures = looked(source, take_fingerprint(FolderSource(train), ("train",)))
    names = {index: source.names[index] for index in range(len(source))}
    assert {names[i] for i in overlap.seen("reconstruction", range(6))} == {"a.png", "b.jpg"}
    assert {names[i] for i in overlap.seen("retrieval", range(6))} == {names[i] for i in overlap.seen("captioning", range(6))} == {"a.png", "b.jpg", "20.png"}
    assert overlap.counts() == {"samples": 6, "equal captions": 1, "near-duplicate images": 2, "families in common": 0, "any of these": 3}
    lines = {line["key"].split("/")[-1]: line for line in overlap.lines(pictures)}
    assert lines["a.png"]["near"] == "train/3.png" and lines["a.png"]["apart"] == 0 and lines["b.jpg"]["near"] == "train/5.png"
    assert lines["20.png"]["captions"] == ("Photo, 2.",) and lines["20.png"]["near"] is None


def test_a_caption_that_cannot_be_read_costs_no_evaluation(train, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    (folder / "21.txt").write_bytes(b"caf\xe9")
    source = FolderSource(folder)
    overlap, _ = looked(source, take_fingerprint(FolderSource(train), ()))
    assert overlap.counts()["any of these"] == 3


def test_the_parts_have_every_sample_once_the_unseen_first(train, data):
    overlap, _ = looked(FolderSource(data), take_fingerprint(FolderSource(train), ()))
    parts = overlap.parts("retrieval", range(6))
    assert [name.split(" (")[0] for name in parts] == ["unseen in training", "seen in training"]
    assert [len(part) for part in parts.values()] == [3, 3] and set.union(*parts.values()) == set(range(6))
    everything, _ = looked(FolderSource(train), take_fingerprint(FolderSource(train), ()))
    assert [name.split(" (")[0] for name in everything.parts("probe", range(8))] == ["seen in training"]
    nothing, _ = looked(FolderSource(data), take_fingerprint(EmojiSource(openmoji.load_emoji().train[:3]), ()))
    assert [name.split(" (")[0] for name in nothing.parts("retrieval", range(6))] == ["unseen in training"]
    unknown, _ = looked(FolderSource(data), take_fingerprint(FolderSource(train), ()), kinds=("reconstruction",))
    assert unknown.parts("retrieval", range(6)) == {} and len(unknown.parts("reconstruction", range(6))) == 2


def test_an_emoji_is_seen_where_its_family_is():
    emoji = {e.name: e for e in openmoji.load_emoji().every}
    known = take_fingerprint(EmojiSource((emoji["man firefighter"],)), ())
    source = EmojiSource((emoji["woman firefighter dark skin tone"], emoji["pizza"]))
    overlap, _ = looked(source, known)
    assert overlap.seen("reconstruction", (0, 1)) == {0} and overlap.counts()["families in common"] == 1


def test_what_a_vae_has_seen_counts_for_rebuilding_alone(train):
    overlap, _ = looked(FolderSource(train), take_fingerprint(FolderSource(train), ()), kinds=("reconstruction",))
    assert overlap.seen("reconstruction", range(8)) == set(range(8)) and overlap.seen("retrieval", range(8)) == set()
    assert overlap.compared_with("retrieval") == "not known; name the training data with --train"


def test_kinds_that_count_other_data_as_seen_share_no_name_of_a_part(train, data):
    fingerprint = take_fingerprint(FolderSource(train), ())
    pictures = ImageSet(FolderSource(data), 128)
    for _ in pictures.batches("looking"):
        pass
    overlap = Overlap([Known("m", Fingerprint.joined([take_fingerprint(FolderSource(data), ())])), Known("--train", fingerprint, ("zeroshot", "retrieval"))])
    overlap.look(pictures, range(6))
    parts = {kind: overlap.parts(kind, range(6)) for kind in ("reconstruction", "retrieval", "captioning", "zeroshot", "probe")}
    names = [name for of_kind in parts.values() for name in of_kind]
    for kind, of_kind in parts.items():
        assert kind in ("retrieval", "captioning") or not [name for name in of_kind if names.count(name) > 1], kind


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overlap") / "model"
    make_pipeline().save(folder)
    return folder


def measured(out, kind, model, data, *more) -> Results:
    assert cli.main(["evaluate", kind, str(model), "--data", str(data), "--size", "32", "--sigmas", "0", "--metrics", "psnr", "--out", str(out), *more]) == 0
    return Results.load(out)


def test_numbers_of_unseen_samples_lead_and_are_means_of_theirs_alone(model, train, data, tmp_path, capsys):
    results = measured(tmp_path / "out", "reconstruction", model, data, "--train", str(train))
    ours = [row.number for row in results.rows if row.model == str(model) and row.metric == "psnr"]
    assert [(number.part.split(" (")[0], number.count) for number in ours] == [("unseen in training", 4), ("seen in training", 2), ("", 6)]
    lines = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    scores = {line["key"].split("/")[-1]: line["psnr"] for line in lines if line["model"] == str(model)}
    seen = [scores.pop(name) for name in ("a.png", "b.jpg")]
    assert ours[1].value == pytest.approx(sum(seen) / 2, abs=1e-3) and ours[0].value == pytest.approx(sum(scores.values()) / 4, abs=1e-3)
    out = capsys.readouterr().out
    assert (
        out.index("unseen in training (") < out.index("seen in training (image")
        and "seen in training: 3 of 6 samples (1 equal captions, 2 near-duplicate images" in out
    )
    assert all("compared with the training data of" in row.setting.overlap for row in results.rows)
    assert {row.number.part.split(" (")[0] for row in leading(results.rows)} == {"unseen in training"}
    listed = {json.loads(line)["key"].split("/")[-1] for line in (tmp_path / "out" / "overlap.jsonl").read_text().splitlines()}
    assert listed == {"a.png", "b.jpg", "20.png"}


def test_without_any_training_data_that_are_known_the_protocol_says_so(model, data, tmp_path, capsys):
    results = measured(tmp_path / "out", "retrieval", model, data)
    assert {row.number.part for row in results.rows} == {""}
    assert {row.setting.overlap for row in results.rows} == {"not known; name the training data with --train"}
    assert results.overlap == "overlap with the training data is not known; name the training data with --train"
    assert results.overlap in capsys.readouterr().out


def test_what_the_vae_has_seen_is_not_told_of_where_it_does_not_matter(train, data, tmp_path):
    pipeline = make_pipeline()
    pipeline.save(tmp_path / "model")
    take_fingerprint(FolderSource(train), ("train",)).save(tmp_path / "model" / "vae" / FILE)
    assert measured(tmp_path / "out", "retrieval", tmp_path / "model", data).overlap.startswith("overlap with the training data is not known")
    assert measured(tmp_path / "rebuilt", "reconstruction", tmp_path / "model", data).overlap.startswith("seen in training: ")


def test_a_fingerprint_beside_data_to_fit_a_probe_to_counts_as_seen(model, train, data, tmp_path):
    for number, path in enumerate(sorted((*train.glob("*.png"), *data.glob("*.png"), *data.glob("*.jpg")))):
        place = tmp_path / ("train" if path.parent == train else "data") / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / f"{number}{path.suffix}")
    take_fingerprint(FolderSource(data), ("seen",)).save(tmp_path / "seen.safetensors")
    argv = ["--data", str(tmp_path / "data"), "--train", str(tmp_path / "train"), str(tmp_path / "seen.safetensors"), "--least", "1", "--k", "1"]
    assert cli.main(["evaluate", "probe", str(model), *argv, "--size", "32", "--out", str(tmp_path / "out")]) == 0
    assert any(row.number.part.startswith("seen in training") for row in Results.load(tmp_path / "out").rows)


def test_a_fingerprint_stands_for_the_data_in_the_model_folder_or_named(model, train, data, tmp_path):
    assert cli.main(["data", "fingerprint", str(train), "--out", str(tmp_path / FILE)]) == 0
    named = measured(tmp_path / "named", "retrieval", model, data, "--train", str(tmp_path / FILE))
    with_it = shutil.copytree(model, tmp_path / "model")
    shutil.copy(tmp_path / FILE, with_it)
    inside = measured(tmp_path / "inside", "retrieval", with_it, data)
    parts = [[(row.metric, row.number.part, row.number.value) for row in results.rows] for results in (named, inside)]
    assert parts[0] == parts[1] and {part.split(" (")[0] for _, part, _ in parts[0]} == {"unseen in training", "seen in training", ""}
    again = tmp_path / "again"
    from openvision3 import load

    load(with_it).save(again)
    assert recorded(again).captions.tolist() == recorded(with_it).captions.tolist()


def test_a_fingerprint_is_no_data_to_fit_a_probe_to(model, train, tmp_path, capsys):
    assert cli.main(["data", "fingerprint", str(train), "--out", str(tmp_path / FILE)]) == 0
    assert cli.main(["evaluate", "probe", str(model), "--data", str(train), "--train", str(tmp_path / FILE), "--out", str(tmp_path / "out")]) == 2
    assert "training images with classes are needed; name them with --train" in capsys.readouterr().err


def test_the_shipped_mini_and_its_vae_know_what_they_were_trained_on():
    known, unknown = recorded_training("mini", hub.find_folder("mini"), [hub.EMBEDDED])
    assert unknown == [] and [each.of for each in known] == ["mini", "the VAE of mini"]
    test = openmoji.load_emoji().evaluation("test")
    source = EmojiSource(test)
    of_mini, of_vae = (each.fingerprint for each in known)
    assert of_mini.samples == 31_325 and len(of_mini.images) > 31_000
    assert of_vae.samples == 31_325 + 7_755 and len(of_vae.images) > len(of_mini.images)  # the VAE's first stage had data of its own, and an earlier split
    assert [sum(one.has_family(source.family(i)) for i in range(len(test))) for one in (of_mini, of_vae)] == [0, 154]
    assert all("/" not in name or name.split("/")[0] in ("DATA", "DRAWINGS") for one in (of_mini, of_vae) for name in one.data)
    drawn = take_fingerprint(EmojiSource(openmoji.load_emoji().train[:40]), ())
    assert len(list(known[0].fingerprint.nearest(torch.from_numpy(drawn.images)))) >= 35


def drawings(folder, name, rows):
    """A shard of named drawings: (seed of the image, style, family) of each; captions are of words that the tokenizer knows."""
    members = {}
    for seed, style, family in rows:
        path = write_photo(folder / "image.png", 48, 48, seed)
        members |= {f"{seed:03d}.png": path.read_bytes(), f"{seed:03d}.txt": f"{NAMES[seed % 8]} {family}".encode()}
        members[f"{seed:03d}.json"] = json.dumps({"style": style, "family": family}).encode()
    return write_shard(folder / f"{name}.tar", members)


# made-up families: the VAE of these models is the shipped one, which has seen the real ones
HELD_OUT = [(20, "chalk", "zapple"), (21, "chalk", "zapple"), (22, "chalk", "zilot"), (23, "chalk", "zizza"), (24, "chalk", "zizza"), (25, "chalk", "zizza")]
"""zapple: trained on in this style; zilot: in another style; zizza: in no style"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawings")
    train = drawings(folder, "train", [(1, "chalk", "zapple"), (2, "ink", "zilot"), (3, "chalk", "zlama")])
    return train, drawings(folder, "held_out", [*HELD_OUT, (3, "oil", "zlama")])


def test_each_held_out_drawing_is_of_one_kind_and_a_copy_of_a_training_image_of_none(drawn):
    train, held_out = drawn
    overlap, _ = looked(ShardSource([held_out]), take_fingerprint(ShardSource([train]), ()))
    kinds = overlap.drawing_kinds("retrieval", range(7))
    assert kinds == {"unseen concept": {3, 4, 5}, "unseen style": {2}, "seen concept": {0, 1}}
    assert overlap.drawing_kinds("probe", range(7)) == {}
    assert {name.split(" (")[0]: samples for name, samples in overlap.drawing_kinds("reconstruction", range(7)).items()} == kinds
    assert "drawings: 3 unseen concept, 1 unseen style, 2 seen concept, 1 near-duplicates of training images" in overlap.in_words("it")


def test_kinds_go_by_all_training_data_that_matter_and_photographs_have_none(drawn, train, tmp_path):
    held_out = ShardSource([drawings(tmp_path, "held_out", [(seed, style, family.replace("zizza", "pizza")) for seed, style, family in HELD_OUT])])
    prints = [
        take_fingerprint(source, ()) for source in (ShardSource([drawn[0]]), EmojiSource(tuple(e for e in openmoji.load_emoji().every if e.name == "pizza")))
    ]
    assert looked(held_out, *prints)[0].drawing_kinds("retrieval", range(6)) == {"unseen style": {2, 3, 4, 5}, "seen concept": {0, 1}}
    joined = Fingerprint.joined(prints)
    assert looked(held_out, joined)[0].drawing_kinds("retrieval", range(6)) == {"unseen style": {2, 3, 4, 5}, "seen concept": {0, 1}}
    of_vae, _ = looked(held_out, prints[0], kinds=("reconstruction",))
    assert of_vae.drawing_kinds("retrieval", range(6)) == {} and of_vae.drawing_kinds("reconstruction", range(6))
    assert looked(held_out)[0].drawing_kinds("retrieval", range(6)) == {}
    assert looked(FolderSource(train), joined)[0].drawing_kinds("retrieval", range(8)) == {}


@pytest.mark.slow
def test_the_rows_of_a_kind_are_those_of_its_samples_evaluated_alone(model, drawn, tmp_path):
    train, held_out = drawn
    alone = drawings(tmp_path, "alone", HELD_OUT[3:])
    assert cli.main(["data", "fingerprint", train, "--out", str(tmp_path / FILE)]) == 0
    for kind in ("retrieval", "captioning", "reconstruction"):
        among, apart = (measured(tmp_path / kind / name, kind, model, data, "--train", str(tmp_path / FILE)) for name, data in (("a", held_out), ("b", alone)))
        rows = [{row.metric: row for row in each.rows if row.model == str(model) and row.number.part.startswith("unseen concept")} for each in (among, apart)]
        assert rows[0] and rows[0].keys() == rows[1].keys()
        for metric in rows[0].keys() - {"cider"}:  # CIDEr keeps the document frequencies of the whole set
            one, other = rows[0][metric], rows[1][metric]
            assert one.number.value == pytest.approx(other.number.value, abs=1e-4) and one.number.count == other.number.count == 3
            assert one.setting.data_sha256 == other.setting.data_sha256
        assert not any(row.number.part.startswith("unseen concept") for row in leading(among.rows))


def test_two_models_are_compared_over_a_kind_by_the_scores_among_its_samples(drawn, tmp_path):
    train, held_out = drawn
    folders = []
    for seed in (0, 3):
        make_pipeline(seed=seed).save(tmp_path / f"model{seed}")
        folders.append(tmp_path / f"results{seed}")
        measured(folders[-1], "retrieval", tmp_path / f"model{seed}", held_out, "--train", train)
    scores = [Scores.load(folder) for folder in folders]
    tables = split([row for folder in folders for row in Results.load(folder).rows])
    differences = with_differences(tables, [(Results.load(folder).rows, of) for folder, of in zip(folders, scores, strict=True)])
    chosen = {one.metric: one for one in differences if one.part == "unseen concept"}
    own = [{row.metric: row.number for row in Results.load(folder).rows if row.number.part == "unseen concept"} for folder in folders]
    assert chosen.keys() == own[0].keys() and all(one.count == 3 for one in chosen.values())
    assert {metric: one.difference for metric, one in chosen.items()} == pytest.approx({name: own[0][name].value - own[1][name].value for name in chosen})
    assert any(one.difference for one in chosen.values())
