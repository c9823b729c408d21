"""Numbers of held-out images do not depend on how many are computed at a time, nor on those that cannot be used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_pipeline import SIZE, make_pipeline

from openvision3 import distributed
from openvision3.data.batches import BatchPlan, Sample, TextShape, TrainingBatches, evaluation_batches
from openvision3.data.names import open_source
from openvision3.data.problems import Problems
from openvision3.data.sources import Source
from openvision3.pipeline import Pipeline
from openvision3.train import open_data
from openvision3.train.held_out import quick_evaluation
from openvision3.train.open_data import shared_files

TERMS = ("loss", "latent", "pixel", "contrastive", "caption")
CAPTIONS = 2
"""of each image, one in three has a second"""


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return make_pipeline()


def noise(folder: Path, count: int) -> Source:
    """Images of noise, with captions of unequal length."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    for i in range(count):
        Image.fromarray(torch.randint(0, 256, (SIZE, SIZE, 3), generator=draw, dtype=torch.uint8).numpy()).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text("red heart " * (1 + i % 5) + ("\nblue apple" if i % 3 == 0 else ""))
    return open_source((str(folder),))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Source:
    return noise(tmp_path_factory.mktemp("held") / "out", 40)


def batches_of(pipeline: Pipeline, source: Source) -> TrainingBatches:
    return TrainingBatches(source, pipeline.tokenizer, BatchPlan(TextShape(32, 32, CAPTIONS), size=SIZE, batch=8, seed=0))


@torch.no_grad()
def in_one_batch(pipeline: Pipeline, source: Source, count: int) -> dict[str, float]:
    batches = batches_of(pipeline, source)
    _, keys, images, texts = next(evaluation_batches(source, SIZE, count, Problems()))
    batch, _ = batches.collate([Sample(key, image, text[0], text[:CAPTIONS], []) for key, image, text in zip(keys, images, texts, strict=True)])
    loss, parts = pipeline.model.eval()(batch)
    return {name: value.item() for name, value in {"loss": loss, **parts}.items()}


@pytest.mark.parametrize(("count", "rows"), [(32, 32), (33, 32), (40, 32), (40, 7), (33, 64)])
def test_held_out_losses_are_those_of_one_batch_however_many_rows_are_computed_at_a_time(pipeline, images, monkeypatch, count, rows):
    monkeypatch.setattr(open_data, "ROWS", rows)
    monkeypatch.setattr(open_data, "EVALUATED", count)
    found = quick_evaluation(pipeline, images, batches_of(pipeline, images), None)
    assert {name: found[name] for name in TERMS} == pytest.approx(in_one_batch(pipeline, images, count), rel=1e-4)
    assert found["contrastive_candidates"] == count


def test_a_broken_held_out_image_changes_no_number_of_the_others(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(open_data, "ROWS", 4)
    source = noise(tmp_path / "held", 9)
    whole = quick_evaluation(pipeline, source, batches_of(pipeline, source), None)
    (tmp_path / "held" / "003a.png").write_bytes(b"no image")
    source = open_source((str(tmp_path / "held"),))
    broken = quick_evaluation(pipeline, source, batches_of(pipeline, source), None)
    assert broken.pop("skipped") == 1
    assert broken == pytest.approx(whole, rel=1e-4)


def test_what_one_rank_cannot_read_is_left_out_on_all(pipeline, tmp_path, monkeypatch):
    """The parts of a sharded model are computed together: unlike rows would make ranks wait for each other without end."""
    monkeypatch.setattr(open_data, "ROWS", 4)
    source = noise(tmp_path / "held", 9)
    elsewhere = {"key": "held/005.png", "reason": "unreadable", "detail": "Input/output error"}

    def gather(of_this_rank):
        readable, problems = of_this_rank
        if 5 not in readable:
            return [of_this_rank, of_this_rank]
        captioned = {index: has and index != 6 for index, has in readable.items() if index != 5}
        return [of_this_rank, (captioned, [*problems, elsewhere])]

    monkeypatch.setattr(distributed, "gather_objects", gather)
    batches = batches_of(pipeline, source)
    found = quick_evaluation(pipeline, source, batches, None)
    assert found["skipped"] == 1 and list(batches.problems) == [elsewhere]
    assert found["contrastive_candidates"] == 7  # nor has it a caption for 6


def test_held_out_files_that_are_trained_on_are_found_however_their_path_is_spelt(tmp_path):
    held, train = noise(tmp_path / "held", 3), tmp_path / "train"
    (train / "inside").mkdir(parents=True)
    for folder, name in ((train, "a.png"), (train / "inside", "b.png")):
        Image.new("RGB", (SIZE, SIZE)).save(folder / name)
    apart = open_source((str(train),))
    assert not shared_files(held, apart)
    (tmp_path / "link").symlink_to(train)
    for other in (f"{tmp_path}/held/../train", str(tmp_path / "link"), str(train / "inside")):
        assert shared_files(open_source((other,)), apart), other
    os.link(tmp_path / "held" / "001.png", train / "c.png")
    assert [Path(path).name for path in shared_files(held, open_source((str(train),)))] == ["001.png"]
