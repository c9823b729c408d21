"""The card of a model says what its results files, data and training record say, and shows unseen samples only."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from shard_files import write_shard
from tiny_pipeline import make_pipeline, write_photo

from openvision3 import cli, hub
from openvision3.data.fingerprint import FILE, take_fingerprint
from openvision3.data.shards.source import ShardSource
from openvision3.evaluate.overlap import Known
from openvision3.evaluate.results import Results
from openvision3.evaluate.tables import shown

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))  # as for a script: it imports its neighbour
spec = importlib.util.spec_from_file_location("card", TOOLS / "card.py")
card = importlib.util.module_from_spec(spec)
sys.modules["card"] = card
spec.loader.exec_module(card)
sys.path.remove(str(TOOLS))


def shard(folder, name, rows):
    """Drawings of made-up styles and families: the VAE of the tests is the shipped one, which has seen the real ones."""
    members = {}
    for seed, style, family in rows:
        fields = {"style": style, "family": family, "source": f"{style} 1.0: {family}", "licence": "MIT", "attribution": f"{family} by somebody"}
        data = write_photo(folder / "image.png", 48, 48, seed).read_bytes()
        members |= {f"{seed:03d}.png": data, f"{seed:03d}.txt": f"{family} {seed}".encode(), f"{seed:03d}.json": json.dumps(fields).encode()}
    return write_shard(folder / f"{name}.tar", members)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    train = shard(folder, "train", [(1, "chalk", "zapple"), (2, "ink", "zilot"), (3, "chalk", "zlama")])
    held_out = [(20, "chalk", "zapple"), (21, "chalk", "zilot"), (22, "chalk", "zizza"), (23, "chalk", "zite"), (24, "chalk", "zell"), (3, "oil", "zlama")]
    return train, shard(folder, "held_out", held_out)


def test_of_each_kind_the_first_by_content_are_shown_and_no_copy_of_a_training_image(data, tmp_path):
    train, held_out = data
    known = [Known("it", take_fingerprint(ShardSource([train]), ()))]
    chosen = card.choose(ShardSource([held_out]), make_pipeline(), known, 2)
    assert {kind: len(indices) for kind, indices in chosen.items()} == {"unseen concept": 2, "unseen style": 1, "seen concept": 1}
    assert chosen["seen concept"] == [0] and chosen["unseen style"] == [1] and set(chosen["unseen concept"]) < {2, 3, 4}
    backwards = shard(tmp_path, "another_name", [(24, "chalk", "zell"), (23, "chalk", "zite"), (22, "chalk", "zizza")])
    again = card.choose(ShardSource([backwards]), make_pipeline(), known, 2)["unseen concept"]
    assert [4 - index for index in again] == chosen["unseen concept"]


@pytest.fixture(scope="module")
def written(data, tmp_path_factory):
    train, held_out = data
    folder = tmp_path_factory.mktemp("written")
    pipeline = make_pipeline()
    pipeline.fingerprint = take_fingerprint(ShardSource([train]), ("train",))
    pipeline.save(folder / "model")
    assert (folder / "model" / FILE).is_file()
    for kind in ("retrieval", "reconstruction"):
        arguments = ["--data", held_out, "--metrics", "psnr", "--sigmas", "0", "--out", str(folder / kind)]
        assert cli.main(["evaluate", kind, str(folder / "model"), *arguments]) == 0
    options = card.Options(
        (folder / "retrieval", folder / "reconstruction"), "the terms", "mit", str(folder / "model"), (f"drawings={held_out}",), (train,), count=32,
        images=folder / "images", out=folder / "out" / "card.md", vae_out=folder / "out" / "vae.md", strip=folder / "strip.png",
    )  # fmt: skip
    card.main(options)
    return folder, options.out.read_text()


def test_the_numbers_of_the_card_are_those_of_the_results(written):
    folder, text = written
    of_kind = [row for row in Results.load(folder / "retrieval").rows if row.number.part == "unseen concept" and row.metric == "image_to_text_r@1"]
    line = next(line for line in text.splitlines() if line.startswith("| retrieval | unseen concept | 3 |"))
    assert len(of_kind) == 1 and f"| {shown(of_kind[0].metric, of_kind[0].number)} |" in line
    psnr = {row.model.startswith("VAE "): row for row in Results.load(folder / "reconstruction").rows if not row.number.part and row.metric == "psnr"}
    line = next(line for line in text.splitlines() if line.startswith("| reconstruction | all | 6 |"))
    assert f"| {shown('psnr', psnr[False].number)} | {shown('psnr', psnr[True].number)} |" in line


def test_the_card_shows_its_images_with_licences_and_credits_and_counts_the_training_data(written):
    folder, text = written
    links = [line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(links) == 3 and all(Image.open(folder / "out" / link).size[0] > 900 for link in links)
    assert "From 3 chalk 1.0 MIT." in text and "- zizza by somebody" in text and "- zlama by somebody" not in text
    credits = ["zapple by somebody", "zilot by somebody", "zlama by somebody"]  # of the training data, not of the shown images
    assert (folder / "out" / "CREDITS.txt").read_text().splitlines() == credits and "3 of these images are credited one by one" in text
    assert "| chalk 1.0 | MIT | 2 |" in text and "| ink 1.0 | MIT | 1 |" in text and "license: mit" in text


def test_the_card_of_the_vae_has_its_numbers_and_the_command_of_every_stage(written):
    folder, _ = written
    text = (folder / "out" / "vae.md").read_text()
    psnr = next(row for row in Results.load(folder / "reconstruction").rows if not row.number.part and row.metric == "psnr" and row.model.startswith("VAE "))
    assert f"| reconstruction | all | 6 | {shown('psnr', psnr.number)} |" in text
    stage = json.loads((hub.EMBEDDED / "training.json").read_text())
    while stage:
        assert stage["command"] in text
        stage = stage.get("started_from")


def test_what_a_model_cannot_do_is_what_its_numbers_are_low_in(written):
    folder, _ = written
    results = Results.load(folder / "retrieval")
    model = str(folder / "model")
    low = [row for row in results.rows if row.metric == "image_to_text_r@1" and row.number.value < 0.25 and row.number.part.startswith(card.LEAD)]
    assert len(card.limits({"a": results}, model)) == len(low)


def test_results_of_another_model_are_refused_before_anything_is_written(written, tmp_path):
    folder, _ = written
    with pytest.raises(ValueError, match="no results of mini in retrieval; name folders that openvision3 evaluate wrote"):
        card.main(card.Options((folder / "retrieval",), "the terms", "mit", images=tmp_path / "images", out=tmp_path / "card.md"))
    assert list(tmp_path.iterdir()) == []


def test_terms_stand_where_the_samples_hold_no_licence_and_nowhere_else(data, tmp_path):
    members = {"0.png": write_photo(tmp_path / "x.png", 40, 40, 1).read_bytes(), "0.txt": b"a boat", "0.json": b'{"source": "clipart"}'}
    bare = write_shard(tmp_path / "bare.tar", members)
    table, _ = card.training_table((str(bare), data[0]), terms=("clipart=public domain", "chalk 1.0=secret"))
    assert "| clipart | public domain | 1 |" in table and "| chalk 1.0 | MIT | 2 |" in table
