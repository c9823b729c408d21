"""The card of a chat model shows answers that anyone can repeat, its scores beside their floors, and credits every author."""

import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from shard_files import write_shard
from tiny_chat import COLOURS, small_chat
from tiny_pipeline import write_photo

from openvision3 import cli
from openvision3.data.identity import content_key
from openvision3.draws import hash_share
from openvision3.evaluate.results import Results
from openvision3.evaluate.tables import shown
from openvision3.understand.training import train_chat

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))  # as for a script: it imports its neighbour
spec = importlib.util.spec_from_file_location("chat_card", TOOLS / "chat_card.py")
chat_card = importlib.util.module_from_spec(spec)
sys.modules["chat_card"] = chat_card
spec.loader.exec_module(chat_card)
sys.path.remove(str(TOOLS))


def talk(root: Path, name: str, numbers: range) -> tuple[str, Path]:
    """(a shard of named and credited images, the conversations about them)."""
    members = {}
    for number in numbers:
        fields = {"source": "chalk", "licence": "CC BY 2.0", "attribution": f"{number}.jpg by somebody"}
        members |= {f"{number}.png": write_photo(root / "x.png", 40, 40, number).read_bytes(), f"{number}.json": json.dumps(fields).encode()}
        members[f"{number}.txt"] = f"a photo of a {[*COLOURS][number % 3]}".encode()
    shard = str(write_shard(root / f"{name}.tar", members))
    assert cli.main(["data", "conversations", shard, "--out", str(root / f"{name}.json"), "--kinds", "what", "image"]) == 0
    return shard, root / f"{name}.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat_card")
    (shard, train), (held_shard, held) = talk(root, "train", range(6)), talk(root, "held", range(4, 10))
    train_chat(small_chat(root, "run", data=(str(train),), images=(str(train.with_suffix(".zip")),), val=(), eval_every=0, steps=2))
    for name, more in (("scores", []), ("blank", ["--blank"])):
        arguments = ["--data", str(held), "--max-tokens", "4", "--device", "cpu", "--out", str(root / name), *more]
        assert cli.main(["evaluate", "vqa", "conversations", str(root / "run"), *arguments]) == 0
    (root / "credits.txt").write_text("".join(f"{number}.jpg by somebody\n" for number in range(6)))
    options = chat_card.Options(
        (root / "scores", root / "blank"), "the terms", "mit", str(root / "run"), (f"held out={held}",), (shard,), images=root / "images",
        out=root / "card" / "README.md", strip=root / "strip.png", talk=(train,), held_out=(held_shard,), credits=root / "credits.txt",
    )  # fmt: skip
    chat_card.main(options)
    return root, options, options.out.read_text()


def test_the_scores_stand_beside_those_without_looking_and_of_the_commonest_answer(written):
    root, _, text = written
    own, blank = (next(row for row in Results.load(root / name).rows if row.metric == "what: accuracy").number for name in ("scores", "blank"))
    assert f"| what | 6 | {shown('accuracy', own)} | {shown('accuracy', blank)} | 33.3 % |" in text
    assert "| image | 6 |" in text and "| 100.0 % |" in text, "each image is a photograph"
    assert "- " + str(root / "held.json") + ", image: not surely above the better floor" in text
    assert "--blank" in text and "the terms. The language model" in text and "license: mit" in text


def test_the_first_images_by_a_hash_are_shown_and_none_that_training_has_seen(written):
    root, _, text = written
    seen = chat_card.contents([root / "train.json"])
    chosen = chat_card.choose(str(root / "held.json"), 9, seen)
    assert len(chosen) == 4 and len(chat_card.choose(str(root / "held.json"), 9, set())) == 6
    names = [row["image"] for row in json.loads((root / "held.json").read_text())]
    with zipfile.ZipFile(root / "held.zip") as archive:
        first = min((name for name in names if content_key(archive.read(name)) not in seen), key=hash_share)
        assert chosen[0][0] == archive.read(first)
    assert {question for _, turns in chosen for question, _ in turns} and all(right for _, turns in chosen for _, right in turns)
    [link] = [line.rpartition("(")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert Image.open(root / "card" / link).width == Image.open(root / "strip.png").width
    with pytest.raises(ValueError, match="training has seen every image"):
        chat_card.choose(str(root / "train.json"), 9, seen)


def test_authors_of_training_images_are_in_the_list_that_ships_and_those_of_shown_ones_on_the_card(written):
    root, _, text = written
    assert "| chalk | CC BY 2.0 | 6 |" in text and "The authors of 6 of these images are credited one by one in [CREDITS.txt](../credits.txt)" in text
    assert "From 4 chalk CC BY 2.0." in text and "- 9.jpg by somebody" in text and "- 4.jpg by somebody" not in text
    (root / "short.txt").write_text("0.jpg by somebody\n")
    with pytest.raises(ValueError, match=r"5 of 6 authors are not credited in .*short.txt, such as: 1.jpg by somebody"):
        chat_card.check_credits([f"{number}.jpg by somebody" for number in range(6)], root / "short.txt")


def test_results_of_another_model_and_those_without_a_floor_are_refused(written):
    root, options, _ = written
    with pytest.raises(ValueError, match="holds no results of this model"):
        chat_card.read_scores(options.results, "another")
    sha256 = json.loads((root / "scores" / "answers.json").read_text())["model_sha256"]
    with pytest.raises(ValueError, match="name the results on the same questions with and without --blank"):
        chat_card.read_scores(options.results[:1], sha256)
