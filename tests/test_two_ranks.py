"""Two processes that share a batch are one process: the same losses, the same weights, the same end."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from small_runs import metrics

from openvision3.checkpoint import complete_checkpoints

RATE = 1e-3


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pictures of noise with captions of unequal length, one in three with a second caption."""
    folder = tmp_path_factory.mktemp("ranks")
    draw = random.Random(0)
    for name, count in (("train", 24), ("held", 3)):
        (folder / name).mkdir()
        rows = []
        for i in range(count):
            Image.frombytes("RGB", (40, 36), draw.randbytes(40 * 36 * 3)).save(folder / name / f"{i}.png")
            for _ in range(1 + (i % 3 == 0)):
                rows.append({"file": f"{i}.png", "caption": " ".join(draw.choices(("red", "green", "blue", "dark", "light"), k=1 + i % 7))})
        (folder / name / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(data: Path, out: Path, *more: str) -> list[str]:
    return [
        *("train", "tiny", "--data", str(data / "train"), "--val", str(data / "held"), "--size", "32", "--batch", "8", "--steps", "10", "--captions", "2"),
        *("--precision", "fp32", "--pixel-share", "0.5", "--model.loss.tau", "0.8", "--optimizer.kind", "adamw", "--optimizer.learning-rate", str(RATE)),
        *("--log-every", "1", "--save-every", "5", "--device", "cpu", "--out", str(out), *more),
    ]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def run(arguments: list[str], processes: int = 1) -> subprocess.CompletedProcess:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    done = subprocess.run([sys.executable, *start, "-m", "openvision3", *arguments], capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def alone(data) -> Path:
    run(command(data, data / "alone"))
    return data / "alone"


def assert_close(one: Path, other: Path, *, share_of_rate: float = 0.05) -> None:
    """Losses to 1e-5, weights to a share of the learning rate; but not key biases, whose true gradient is zero: there Adam steps on rounding."""
    rows = [metrics(one), metrics(other)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for first, second in zip(*rows, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            near = {"rel": 1e-3} if name == "train/grad_norm" else {"rel": 1e-5, "abs": 1e-7}
            assert first[name] == pytest.approx(second[name], **near), (first["step"], name)
    weights = [load_file(complete_checkpoints(run)[-1] / "model.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        difference = (value - weights[1][name]).abs()
        if name.endswith("qkv.bias"):
            width = len(value) // 3
            difference[width : 2 * width] = 0
        assert difference.max() <= share_of_rate * RATE, name


@pytest.mark.parametrize(
    "more",
    [
        ["--parallel", "replicate"],
        ["--parallel", "fsdp"],
        pytest.param(["--parallel", "fsdp", "--micro-batch", "2", "--checkpointing"], marks=pytest.mark.slow),
        pytest.param(["--parallel", "replicate", "--micro-batch", "1", "--workers", "2"], marks=pytest.mark.slow),
    ],
    ids=lambda more: "-".join(word.strip("-") for word in more),
)
def test_two_processes_train_what_one_does(data, alone, tmp_path, more):
    run(command(data, tmp_path / "two", *more), processes=2)
    assert_close(alone, tmp_path / "two")
