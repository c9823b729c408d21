"""The card of a generator draws the same unpicked images for everyone, and says what its results files and training data say."""

import importlib.util
import sys
from pathlib import Path

import pytest
from PIL import Image
from shard_files import write_shard
from tiny_generator import small_generator
from tiny_pipeline import write_photo

from openvision3 import cli
from openvision3.draws import hash_share
from openvision3.evaluate.results import Results
from openvision3.evaluate.tables import shown
from openvision3.generate.training import train_generator

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))  # as for a script: it imports its neighbour
spec = importlib.util.spec_from_file_location("generator_card", TOOLS / "generator_card.py")
generator_card = importlib.util.module_from_spec(spec)
sys.modules["generator_card"] = generator_card
spec.loader.exec_module(generator_card)
sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("generator_card")
    config = small_generator(root, "run")
    train_generator(config, "small")
    held = {}
    for number, word in enumerate(("apple", "boat", "cat")):
        held |= {f"{number}.png": write_photo(root / "x.png", 40, 40, number).read_bytes(), f"{number}.json": f'{{"caption": "a {word}"}}'.encode()}
    shard = str(write_shard(root / "held.tar", held))
    results = root / "drawn"
    arguments = ["--data", shard, "--caption-keys", "caption", "--count", "4", "--steps", "2", "--shown", "1", "--out", str(results), "--device", "cpu"]
    assert cli.main(["evaluate", "generation", str(root / "run"), *arguments]) == 0
    options = generator_card.Options(
        (results,), "the terms", "mit", str(root / "run"), (f"held out={shard}",), (shard,), count=2, images=root / "images", out=root / "card" / "README.md",
        strip=root / "strip.png",
    )  # fmt: skip
    generator_card.main(options)
    return root, shard, options.out.read_text()


def test_the_numbers_and_the_terms_are_those_of_the_results_and_the_data(written):
    root, _, text = written
    for row in Results.load(root / "drawn").rows:
        assert f"| {row.metric} | {shown(row.metric, row.number)} |" in text
    assert "the terms. Code: Apache-2.0." in text and "license: mit" in text and "| not recorded | not recorded | 3 |" in text


def test_the_captions_are_the_first_by_a_hash_and_every_sheet_is_where_the_card_says(written):
    root, shard, text = written
    assert generator_card.captions(shard, 2) == sorted(["a apple", "a boat", "a cat"], key=hash_share)[:2]
    links = [line.rpartition("(")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    sheets = [Image.open(root / "card" / link) for link in links]
    assert len(sheets) == 2 and sheets[0].width == sheets[1].width and sheets[0].height > sheets[1].height
    assert (root / "strip.png").read_bytes() == (root / "images" / "drawn-held-out.png").read_bytes(), "it is shorter than two rows"


def test_the_card_says_which_of_the_tried_names_no_training_drawing_has(written, tmp_path):
    _, shard, text = written
    assert "no training drawing has the name a yellow star, a red apple, pizza, " in text
    assert generator_card.never_trained(["the Boat", "cat", "a red cat", "an apple"], (shard,)) == ["a red cat"], "the captions say: a apple, a boat, a cat"


def test_data_without_a_name_are_refused(written):
    with pytest.raises(ValueError, match="must look like NAME=DATA"):
        generator_card.main(generator_card.Options((), "x", "y", str(written[0] / "run"), ("no name",)))
