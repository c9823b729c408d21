"""A rehearsal for the GPU on a machine without one: what would mix devices, and where the host would wait."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_device import DEVICE, FakeDevice, fake_device
from shapes import tiny_vae
from tiny_pipeline import NAMES, make_pipeline
from torch import Tensor

from openvision3.data.batches import to_device
from openvision3.data.problems import Problems
from openvision3.data.text import TextTokenizer
from openvision3.hub import load_distance
from openvision3.model import transformer
from openvision3.model.openvision3 import OpenVision3
from openvision3.train import loop
from openvision3.train.checkpoint import RunState
from openvision3.train.loop_config import LoopConfig
from openvision3.train.optimizer import OptimizerConfig, Optimizers
from openvision3.train.recipes import small_model
from openvision3.train.run_folder import RunFolder

STEPS = 2
LOG = "copy from the device train/loop.py:_numbers"


class Rows:
    """Micro-batches as the loader makes them for a GPU: images as uint8, all of it pinned."""

    batch, problems = 4, Problems()

    def __init__(self, device: FakeDevice, kind: str, pieces: int = 1):
        self.device, self.kind, self.pieces = device, kind, pieces

    def from_step(self, first_step: int) -> Iterator[dict[str, Tensor]]:
        words = TextTokenizer.train(NAMES * 2, 200)
        while True:
            caption_ids = words.caption_ids(NAMES[:4], 16)
            batch = {
                "images": torch.zeros(4, 3, 32, 32, dtype=torch.uint8),
                "text_ids": words.text_ids(NAMES, 12).unflatten(0, (4, 2)),
                "text_present": torch.ones(4, 2, dtype=torch.bool),
                "caption_ids": caption_ids,
                "word_positions": (caption_ids[:, 1:] != words.pad_id).flatten().nonzero()[:, 0],
                "sample_key": torch.arange(4),
                "draw_key": torch.arange(4),
            }
            if self.kind != "whole":
                batch["pixel_rows"] = torch.tensor([1, 3])
            if self.kind == "cache":
                del batch["images"]
                batch |= {"latents": torch.zeros(4, 4, 4, 4, dtype=torch.bfloat16), "pixel_images": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}
            yield self.device.pin(batch)


def make_model(perceptual: bool = False) -> OpenVision3:
    config = small_model("tiny", "tiny", 64)
    config.loss.lambda_perceptual = 0.5 * perceptual
    return OpenVision3(config, tiny_vae(), 200, distance=load_distance(config.loss)).init_weights()


class Unsaved:
    """Stands for the saver: what a save reads is not a step's."""

    failed = False

    def __init__(self, *_: Any):
        pass

    def save(self, state: Any) -> None:
        pass

    wait = settle = lambda self: None


def numbers(values: Tensor) -> Tensor:
    """Of what the log reads: losses and norm are 2, so that the gradient is clipped, and nobody asks to stop."""
    read = torch.full_like(values, 2.0)
    read[-2:] = 0
    return read


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The optimizer of a GPU is the fused one."""
    monkeypatch.setattr(loop, "Saver", Unsaved)
    monkeypatch.setattr(importlib.import_module("torch.optim.optimizer"), "_get_fused_kernels_supported_devices", lambda: [DEVICE])
    real = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, *, fused, **options: real(groups, fused=True, **options))
    transformer._kept_positions.cache_clear()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("whole", {}),
        ("share", {"optimizer": "muon"}),
        ("share", {"perceptual": True}),
        ("cache", {"optimizer": "muon"}),
        ("share", {"pieces": 2, "optimizer": "muon"}),
        ("cache", {"pieces": 2}),
    ],
)
def test_a_training_step_waits_for_the_device_once_and_mixes_no_devices(as_on_a_gpu, tmp_path, kind, options):
    model = make_model(options.get("perceptual", False)).to(DEVICE)
    if options.get("perceptual"):
        model._distance[0].to(DEVICE)  # which a run does in its first step
    settings = OptimizerConfig(options.get("optimizer", "adamw"), warmup_steps=1)
    run = RunFolder(tmp_path / "run")
    with fake_device(numbers) as device:
        optimizers = Optimizers(model, settings)
        training, state = loop.Training(), RunState()
        training.model, training.batches = model, Rows(device, kind, options.get("pieces", 1))
        status = loop.fit(training, optimizers, LoopConfig(settings, STEPS, precision="fp32", log_every=1, eval_every=0, save_every=0), state, run)
    run.close()
    assert status == "finished" and state.skipped_steps == 0
    assert device.operations > STEPS * 500, "the step was not seen"
    assert not device.mixed
    assert dict(device.waits) == {LOG: STEPS}


def test_the_fake_device_sees_each_kind_of_wait():
    batch = {"x": torch.arange(3.0)}
    with fake_device() as device:
        x = torch.ones(3, device=DEVICE)
        for wait in (
            lambda: x.tolist(),
            lambda: x.cpu(),
            lambda: x.sum().item(),
            lambda: bool((x > 0).all()),
            lambda: x[x > 0],
            lambda: x.nonzero(),
            lambda: torch.zeros(3).to(DEVICE),
            lambda: torch.zeros(3).to(DEVICE, non_blocking=True),
            lambda: torch.tensor([1.0], device=DEVICE),
            lambda: x.new_tensor(1.0),
            lambda: x.copy_(torch.zeros(3)),
        ):
            before = device.waits.total()
            wait()
            assert device.waits.total() == before + 1
        before = device.waits.total()
        to_device(device.pin(batch), DEVICE)
        x.new_full((), 3), torch.full((), 3.0, device=DEVICE), x[torch.ones(2, dtype=torch.long, device=DEVICE)]
        assert device.waits.total() == before and not device.mixed
        with pytest.raises(RuntimeError):
            x + torch.ones(3)
        assert device.mixed.total() == 1


def test_inference_waits_where_a_number_is_needed_and_nowhere_else():
    pipeline = make_pipeline()
    pipeline.model.to(DEVICE)
    images, words = torch.zeros(2, 3, 64, 64), ["red heart", "blue heart"]

    def waits(call: functools.partial) -> dict[str, int]:
        with fake_device(torch.zeros_like) as device:
            call()
        assert not device.mixed and device.operations
        return dict(device.waits)

    to = "blocking copy to the device pipeline.py:"
    for _ in range(2):  # the second time the positions are there; the first did not wait for them either
        assert waits(functools.partial(pipeline.encode, images)) == {f"{to}prepare": 1}
    assert waits(functools.partial(pipeline.embed_images, images)) == {f"{to}prepare": 1}
    assert waits(functools.partial(pipeline.embed_texts, words)) == {f"{to}_embed": 1}
    tokens = torch.zeros(2, 16, 64, device=DEVICE)
    assert waits(functools.partial(pipeline.decode, tokens)) == {}
    classified = waits(functools.partial(pipeline.classify, images[0], words))
    assert classified == {f"{to}prepare": 1, f"{to}_embed": 1, "copy from the device pipeline.py:classify": 1}
