"""One evaluation of a generator: here functions that draw noise, or, where they are guided, copies of the reference."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_inception import Inception8
from tiny_pipeline import photo

from openvision3.data.images import to_tensor
from openvision3.evaluate import generation
from openvision3.evaluate.generation import Generation, evaluate_generation
from openvision3.evaluate.generation_page import write_generation_report
from openvision3.evaluate.metrics.distances import Statistics
from openvision3.evaluate.options import GenerationOptions
from openvision3.evaluate.protocol import DrawingFunctions
from openvision3.evaluate.results import Results
from openvision3.networks.inception import EfficientNetFeatures

COUNT, SIZE = 12, 32
CLASSES = ("circle", "square", "star")
FID, KID = "FID on EfficientNet-Lite0 features", "KID on EfficientNet-Lite0 features"


def draw(indices, conditions, guidance):
    """Noise; with guidance, copies of the images of the reference in their order."""
    if guidance != 1:
        return torch.stack([to_tensor(photo(SIZE, SIZE, index % COUNT)) for index in indices])
    return torch.stack([torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(index)) * 2 - 1 for index in indices])


def generator(**changes) -> DrawingFunctions:
    given = {"sample": draw, "condition": "label", "label_names": CLASSES, "can_guide": True, "sampler": {"steps": 3}, "guiding": {"interval": [0, 1]}}
    return DrawingFunctions("tiny", SIZE, **{**given, "sha256": "3" * 64, **changes})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("generation")
    (root / "data").mkdir()
    pixels = [np.asarray(photo(SIZE, SIZE, index)) for index in range(COUNT)]
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(root / "data" / f"{index:02d}.png")
        (root / "data" / f"{index:02d}.txt").write_text(f"photo {index}")
    np.savez(root / "images.npz", np.stack(pixels))
    np.savez(root / "oblong.npz", np.stack(pixels)[:, :16])
    np.savez(root / "none.npz", np.stack(pixels)[:0])
    np.savez(root / "large.npz", np.zeros((5, 64, 64, 3), np.uint8))
    np.savez(root / "nothing.npz", other=np.zeros(3))
    Statistics.of(torch.randn(20, 8)).save(root / "statistics.npz")
    return root


def options(root: Path, out: Path, **changes) -> GenerationOptions:
    settings = {"model": "tiny", "data": (str(root / "data"),), "out": str(out), "count": 16, "shown": 3, "batch": 5, "device": "cpu"}
    return GenerationOptions(**{**settings, **changes})


def evaluate(options: GenerationOptions, model: DrawingFunctions | None = None) -> Generation:
    return evaluate_generation(options, lambda _: model or generator(), "openvision3 evaluate generation")


@pytest.fixture(scope="module")
def both(root) -> tuple[Generation, Path]:
    """Unguided and guided samples, with their page."""
    out = root / "both"
    evaluation = evaluate(options(root, out, guidance=(4.0, 1.0, 2.0)))
    write_generation_report(out, evaluation, evaluation.save(out))
    return evaluation, out


def values(evaluation: Generation, metric: str) -> dict[str, float]:
    return {row.model: row.number.value for row in evaluation.results.rows if row.metric == metric}


def test_the_unguided_column_is_the_first_and_copies_of_the_reference_score_as_copies(both):
    evaluation, out = both
    assert [column.name for column in evaluation.samples] == ["tiny", "tiny, guidance 4", "tiny, guidance 2"]
    for metric in (FID, KID):
        assert values(evaluation, metric)["tiny, guidance 4"] < values(evaluation, metric)["tiny"] / 3
    assert values(evaluation, "near_duplicates") == {"tiny": 0, "tiny, guidance 4": 1, "tiny, guidance 2": 1}
    assert values(evaluation, "recall on EfficientNet-Lite0 features")["tiny, guidance 2"] == 1
    tables = evaluation.save(out)
    assert len(tables) == 1 and all(next(iter(line.values)) == "tiny" for line in tables[0][1]), "side by side in one table"
    assert {one.metric for one in evaluation.results.differences} >= {KID, "near_duplicates"}


def test_training_images_that_were_copied_are_the_nearest(both):
    evaluation, _ = both
    nearest = evaluation.samples[-1].nearest
    assert nearest.indices[:, 0].tolist() == [0, 1, 2] and nearest.cosines[:, 0].tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert evaluation.samples[0].nearest.cosines[:, 0].max() < 0.999 and evaluation.samples[1].nearest is None


def test_what_samples_are_compared_with_is_named_for_what_it_is(both, root, tmp_path):
    """Held-out images are no training images: a generator that copies these would look innocent."""
    held = both[0]
    trained = evaluate(options(root, tmp_path / "out", train=(str(root / "data"),), count=4))
    for evaluation, words in ((held, "reference images (the training images were not named with --train)"), (trained, "training images")):
        how = next(row.number.how for row in evaluation.results.rows if row.metric == "near_duplicates")
        assert how.partition(f"one of {COUNT} ")[2].startswith(f"{words}, by")
    page = write_generation_report(tmp_path / "page", held, held.save(tmp_path / "page")).read_text()
    assert "each beside the reference images" in page and "each beside the training images" not in page


def test_every_number_says_what_it_is_and_gfid_is_not_among_them_without_inception(both):
    results = Results.load(both[1])
    assert {row.metric for row in results.rows} == {
        *(f"{what} on EfficientNet-Lite0 features" for what in ("FID", "KID", "precision", "recall")),
        "near_duplicates",
    }
    assert [(each.model, each.metric) for each in results.not_run] == [("tiny", metric) for metric in generation.ADM]
    assert all("openvision3 fetch" in each.needs for each in results.not_run)
    for row in results.rows:
        assert row.setting.labels == "balanced over 3 classes" and row.setting.resolution == "32x32" and row.model_sha256 == "3" * 64
        assert "steps 3" in row.note and ("interval" in row.note) == ("guidance" in row.model)
        assert row.metric == FID or (row.number.low <= row.number.value <= row.number.high)


def test_the_page_and_its_sheets_show_samples_curve_and_training_images(both):
    _, out = both
    page = (out / "report.html").read_text()
    for heading in ("Over guidance", "tiny: the first samples, unpicked", "tiny, guidance 2: samples, each beside the reference images", "sample 1 (square): "):
        assert heading in page
    assert not re.search(r"src=.https?:", page)
    assert {path.name for path in out.iterdir()} == {
        *("results.json", "report.html", "guidance.png", "nearest-samples.png", "nearest-samples-guidance-2.png"),
        *(f"samples{guidance}.{ending}" for guidance in ("", "-guidance-2", "-guidance-4") for ending in ("npz", "png")),
    }


def test_samples_that_are_there_are_scored_again_without_drawing(both, root):
    evaluation, out = both

    def fail(*_):
        raise AssertionError("nothing is left to draw")

    again = evaluate(options(root, out), generator(sample=fail))
    assert values(again, FID)["tiny"] == pytest.approx(values(evaluation, FID)["tiny"], rel=1e-6)


def test_a_file_of_our_samples_scores_as_the_generator_and_keeps_how_it_was_drawn(both, root, tmp_path):
    evaluation, out = both
    name = str(out / "samples-guidance-2.npz")
    alone = evaluate(options(root, tmp_path, model=name))
    assert values(alone, FID)[name] == pytest.approx(values(evaluation, FID)["tiny, guidance 2"], abs=1e-3)
    row = alone.results.rows[0]
    assert row.setting.labels == "balanced over 3 classes" and row.model_sha256 == "3" * 64 and "guidance 2" in row.note and "seed 0" in row.note
    assert row.setting == evaluation.results.rows[0].setting, "they may stand in one table"


def test_texts_of_samples_are_captions_of_the_reference(root, tmp_path, monkeypatch):
    seen: list[str] = []
    model = generator(condition="text", sample=lambda indices, texts, guidance: seen.extend(texts) or draw(indices, None, guidance))
    evaluation = evaluate(options(root, tmp_path, count=4), model)
    assert seen == ["photo 0", "photo 3", "photo 6", "photo 9"]
    assert evaluation.results.rows[0].setting.captions == "balanced, first captions of the reference"
    monkeypatch.setattr(generation, "_extractors", lambda _: ([EfficientNetFeatures(), Inception8()], []))
    with pytest.raises(ValueError, match=r"statistics\.npz has no captions to draw from"):
        evaluate(options(root, tmp_path / "x", data=(str(root / "statistics.npz"),)), model)


def test_a_reference_in_an_npz_scores_as_its_images_in_a_folder(both, root, tmp_path):
    evaluation, out = both
    other = evaluate(options(root, tmp_path, model=str(out / "samples.npz"), data=(str(root / "images.npz"),)))
    assert values(other, FID)[str(out / "samples.npz")] == pytest.approx(values(evaluation, FID)["tiny"], rel=1e-6)


OWN = """
import torch
from openvision3.evaluate.protocol import Functions

def colours(device, precision):
    return Functions("colours", 16, features=lambda images: images.mean((2, 3)))

def colours_again(device, precision):
    return Functions("colours", 16, features=lambda images: images.mean((2, 3)))

def none(device, precision):
    return Functions("none", 16, caption=lambda images: [""] * len(images))
"""


def test_images_are_compared_by_the_features_of_ones_own_network(root, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    evaluation = evaluate(options(root, tmp_path / "out", guidance=(2.0,), extractors=(f"{tmp_path / 'own.py'}:colours",)))
    measured = {row.metric: row.number for row in evaluation.results.rows if row.model == "tiny"}
    pixels = [torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2).float() for path in (tmp_path / "out" / "samples.npz", root / "images.npz")]
    shrunk = [torch.nn.functional.interpolate(x, size=(16, 16), mode="bicubic", antialias=True).clamp(0, 255) for x in pixels]
    ours, theirs = ((x / 127.5 - 1).mean((2, 3)).double().numpy() for x in shrunk)
    root_trace = np.sqrt(np.linalg.eigvals(np.cov(ours.T) @ np.cov(theirs.T)).real.clip(0)).sum()
    expected = ((ours.mean(0) - theirs.mean(0)) ** 2).sum() + np.trace(np.cov(ours.T) + np.cov(theirs.T)) - 2 * root_trace
    assert measured["FID on colours features"].value == pytest.approx(expected, rel=1e-3)
    assert {"KID on colours features", "precision on colours features", "recall on colours features"} <= measured.keys()
    copies = {row.metric: row.number.value for row in evaluation.results.rows if row.model != "tiny"}
    assert copies["FID on colours features"] < measured["FID on colours features"].value / 10, "guided samples are copies of the reference here"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["none"], "none gives no features to compare images by"),
        (["colours", "colours_again"], "two extractors are called colours"),
        (["colour"], "defines no function 'colour'; choose one of colours"),
    ],
)
def test_an_extractor_that_cannot_be_used_is_one_line(root, tmp_path, names, message):
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(ValueError, match=message) as caught:
        evaluate(options(root, tmp_path / "out", extractors=tuple(f"{tmp_path / 'own.py'}:{name}" for name in names)))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_statistics_of_an_adm_file_take_the_place_of_those_of_its_images(root, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "_extractors", lambda _: ([EfficientNetFeatures(), Inception8()], []))
    plain = evaluate(options(root, tmp_path / "a"))
    other = Statistics.of(torch.randn(50, 8, generator=torch.Generator().manual_seed(1)))
    with np.load(root / "images.npz") as images:
        pixels = images["arr_0"]
    np.savez(tmp_path / "adm.npz", arr_0=pixels, mu=other.mean.numpy(), sigma=other.covariance.numpy())
    adm = evaluate(options(root, tmp_path / "a", data=(str(tmp_path / "adm.npz"),)))
    assert values(adm, "gfid")["tiny"] != pytest.approx(values(plain, "gfid")["tiny"], rel=0.01)
    for metric in ("sfid", "inception_score", "precision", "recall", FID, KID):
        assert values(adm, metric) == pytest.approx(values(plain, metric), rel=1e-5), metric
    alone = evaluate(options(root, tmp_path / "a", data=(str(root / "statistics.npz"),)))
    assert {row.metric for row in alone.results.rows} == {"gfid", "inception_score"} and alone.train is None
    assert ("near_duplicates", "training images; name them with --train") in {(each.metric, each.needs) for each in alone.results.not_run}
    assert "the statistics of 20 reference images" in next(row.number.how for row in alone.results.rows if row.metric == "gfid")


def test_the_published_protocol_is_refused_for_anything_else(root, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "_extractors", lambda _: ([EfficientNetFeatures(), Inception8()], []))
    wanted = options(root, tmp_path / "out", protocol="gfid-adm50k")
    assert wanted.count == 50_000
    with pytest.raises(ValueError, match="needs 50,000 samples of 256 px; tiny has 50,000 of 32 px"):
        evaluate(wanted)
    with pytest.raises(ValueError, match=r"needs 50,000 samples of 256 px; .*large\.npz has 5 of 64 px"):
        evaluate(replace(wanted, model=str(root / "large.npz")))
    with pytest.raises(ValueError, match="compares with the statistics of ADM's reference file"):
        evaluate(wanted, replace(generator(), size=256))
    with pytest.raises(ValueError, match="needs mu, sigma, mu_s and sigma_s"):
        evaluate(replace(wanted, data=(str(root / "statistics.npz"),)), replace(generator(), size=256))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    [
        ({"data": ("large.npz",)}, {}, r"large\.npz holds images of 64x64, and the samples are of 32x32"),
        ({"data": ("oblong.npz",)}, {}, r"oblong\.npz holds images of 16x32; they must be square"),
        ({"data": ("none.npz",)}, {}, r"none\.npz holds no images"),
        ({"model": "none.npz"}, {}, r"none\.npz holds no images"),
        ({"data": ("nothing.npz",)}, {}, r"nothing\.npz is not a file of images"),
        ({"data": ("nowhere.npz",)}, {}, r"no such file: .*nowhere\.npz"),
        ({"data": ("images.npz", "data")}, {}, "is a reference by itself"),
        ({"data": ()}, {}, "no reference named"),
        ({"guidance": (2.0,)}, {"can_guide": False}, "guidance 2 cannot be used with tiny: it was trained without dropped conditions"),
        ({"guidance": (2.0,)}, {"can_guide": False, "condition": "none"}, "guidance 2 cannot be used with tiny: it draws without a condition"),
        ({"guidance": (2.0,), "model": "images.npz"}, {}, "holds samples that are drawn already"),
        ({"data": ("statistics.npz",)}, {}, r"statistics\.npz holds statistics of Inception's features alone: .*openvision3 fetch.*; or name reference images"),
    ],
)
def test_bad_input_is_one_line(root, tmp_path, changes, model, message):
    here = {name: str(root / value) if name == "model" else tuple(str(root / one) for one in value) for name, value in changes.items() if name != "guidance"}
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        evaluate(options(root, tmp_path / "out", **{**changes, **here}), generator(**model))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [("mu", "sigma"), ("mu_s", "sigma_s")])
@pytest.mark.parametrize("pixels", [{}, {"arr_0": np.zeros((5, SIZE, SIZE, 3), np.uint8)}])
def test_a_reference_with_statistics_of_other_features_is_refused_before_anything_is_drawn(root, tmp_path, monkeypatch, names, pixels):
    monkeypatch.setattr(generation, "_extractors", lambda _: ([EfficientNetFeatures(), Inception8()], []))
    whole = {"mu": np.zeros(8), "sigma": np.eye(8)}
    np.savez(tmp_path / "other.npz", **{**whole, **pixels, names[0]: np.zeros(5), names[1]: np.eye(5)})
    with pytest.raises(ValueError, match=f"does not hold {names[0]} and {names[1]} .*: they are of features of width 5, not 8"):
        evaluate(options(root, tmp_path / "out", data=(str(tmp_path / "other.npz"),)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": (-1.0,)}, "guidance -1 must be numbers from 0"),
        ({"interval": (0.5, 0.2)}, "interval 0.5 0.2 must be two times from 0 to 1"),
        ({"count": 0}, "count 0 must be at least 1"),
        ({"protocol": "gfid-adm50k", "precision": "bf16"}, "needs fp32"),
    ],
)
def test_options_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GenerationOptions("tiny", **changes)


def test_a_reference_without_a_readable_image_says_why(root, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"none of the 1 images of .* can be read: 1 not an image"):
        evaluate(options(root, tmp_path / "out", data=(str(tmp_path / "data"),)))
