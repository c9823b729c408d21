"""Small real runs that several tests share: images, a config of seconds, and what must be equal between two runs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from openvision3.data.batches import TrainingBatches
from openvision3.hub import complete_checkpoints
from openvision3.train.config import PretrainConfig
from openvision3.train.recipes import tiny
from openvision3.train.run_folder import RunFolder

MEASURED = {"samples_per_second", "samples_per_second_per_device", "wait", "memory_gb"}
"""what no two runs have in common"""


class Crash(BaseException):
    """Stands for a process that dies: nothing on the way may catch it."""


def pictures(folder: Path, count: int, seed: int = 0) -> Path:
    """A folder of `count` one-coloured images, each named by two words."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for i in range(count):
        Image.new("RGB", (40, 36), tuple(draw.randrange(256) for _ in range(3))).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(" ".join(draw.choices(("red", "green", "blue", "dark", "light"), k=2)))
    return folder


def take(made: TrainingBatches, first: int, count: int) -> list[dict[str, torch.Tensor]]:
    """The first `count` micro-batches from step `first` on."""
    iterator = made.from_step(first)
    try:
        return list(islice(iterator, count))
    finally:
        iterator.close()


def small(root: Path, out: str, **changes: Any) -> PretrainConfig:
    """`tiny` at 32 px in fp32 for 7 steps, on images under `root`, into `root/out`."""
    config = tiny()
    config.data, config.val = (str(pictures(root / "train", 10)),), (str(pictures(root / "held", 3, seed=1)),)
    config.size, config.batch, config.steps, config.precision, config.out = 32, 4, 7, "fp32", str(root / out)
    config.log_every, config.save_every = 2, 3
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def crash_at(monkeypatch, step: int) -> None:
    """The run dies when `step` is done and before anything of it is written."""
    advance: Callable = RunFolder.advance

    def dying(self: RunFolder, done: int) -> None:
        if done == step:
            raise Crash
        advance(self, done)

    monkeypatch.setattr(RunFolder, "advance", dying)


def metrics(run: str | Path) -> list[dict[str, Any]]:
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in MEASURED} for line in lines]


def saved_state(checkpoint: Path) -> dict[str, Any]:
    """Everything in `state/`, flat: {path: tensor or number}."""
    whole = checkpoint.parent / f"{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint / "state", whole)
    found = _flat(torch.load(whole, weights_only=False))
    whole.unlink()
    return found


def _flat(value: Any, place: str = "") -> dict[str, Any]:
    if not isinstance(value, dict | list):
        return {place: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {name: leaf for key, inside in pairs for name, leaf in _flat(inside, f"{place}/{key}").items()}


def assert_same_run(one: str | Path, other: str | Path) -> None:
    """Weights, optimiser state, metrics and listed problems are equal bit for bit."""
    assert metrics(one) == metrics(other)
    first, second = complete_checkpoints(one)[-1], complete_checkpoints(other)[-1]
    assert first.name == second.name
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    states = saved_state(first), saved_state(second)
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]) if isinstance(value, torch.Tensor) else value == states[1][name], name
    listed = [path.read_text() if path.exists() else "" for path in (Path(one) / "skipped.jsonl", Path(other) / "skipped.jsonl")]
    assert listed[0] == listed[1]
