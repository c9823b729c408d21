"""One command calibrates a model: what it measures is what the saved model then says."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_pipeline import NAMES, photo, pipeline

import openvision3 as ov3
from openvision3 import cli
from openvision3.experiments.calibrate import judge


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A model, and folders of images with captions: known and held out."""
    root = tmp_path_factory.mktemp("calibrate")
    pipeline().save(root / "model")
    for name, first in (("train", 0), ("val", 100)):
        (root / name).mkdir()
        for i in range(40):
            photo(64, 64, first + i).save(root / name / f"{i}.png")
            (root / name / f"{i}.txt").write_text(f"{NAMES[i % len(NAMES)]} {'abcde'[i // len(NAMES)]}")
    shutil.copytree(root / "train", root / "outside")
    return root


def test_the_saved_model_calls_those_images_unsure_that_were_counted(folders, capsys):
    argv = ["calibrate", str(folders / "model"), "--train", str(folders / "train"), "--val", str(folders / "val"), "--unsure", "0.2"]
    assert cli.main([*argv, "--outside", str(folders / "outside"), "--out", str(folders / "out"), "--json", "--device", "cpu"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert {path.name for path in (folders / "out").iterdir()} == {"calibration.json", "reliability.png"}
    model = ov3.load(str(folders / "model"), device="cpu")
    for name in ("val", "outside"):
        known = model.in_distribution([folders / name / f"{i}.png" for i in range(40)])
        found = measured[str(folders / name)]
        assert found["images"] == 40 and found["unsure"] == pytest.approx(known.count(False) / 40, abs=0.03)  # rows are saved in half precision
        assert ("confidence" in found) == ("captions_right" in found) == (name == "val")
    assert measured[str(folders / "val")]["unsure"] == 0.2 > measured[str(folders / "outside")]["unsure"], "the outside images here are the training images"
    assert measured["caption"]["answers"] == 40 and 0 <= measured["label"]["calibration_error"] <= 1


def test_words_that_all_captions_of_a_set_share_make_no_caption_right():
    flowers = ["a photo of a rose", "a photo of a tulip", "a photo of a daisy"]
    references = [(text,) for text in flowers]
    assert judge(flowers, references) == [True, True, True]
    assert judge(["a photo of a lemon", "a photo", "daisy"], references) == [False, False, True]
    assert judge(["red heart", "heart", "blue heart"], [("red heart",), ("red heart",), ("big red star", "blue heart")]) == [True, True, True]
    assert judge(["a cat", "a dog"], [("a cat",), ("a cat",)]) == [True, True], "captions that are all alike have no other words"
    assert judge(["star"], [()]) == [False]


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--unsure", "1.5"], "unsure 1.5 must lie between 0 and 1"), (["--count", "3"], "count 3 must be at least 32"), (["--val", "nowhere"], "nowhere")],
)
def test_settings_that_cannot_be_used_are_refused_in_one_line(folders, capsys, options, said):
    before = sorted((folders / "model").iterdir())
    assert cli.main(["calibrate", str(folders / "model"), "--train", str(folders / "train"), "--out", str(folders / "no"), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and sorted((folders / "model").iterdir()) == before and not (folders / "no").exists()
