"""A generator of seconds for tests: its config on small images, drawing the tokens of a small model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_runs import pictures
from tiny_pipeline import make_pipeline

from openvision3.generate.config import GenerateConfig
from openvision3.generate.dit import DiTConfig
from openvision3.generate.flow import FlowConfig
from openvision3.train.optimizer import OptimizerConfig


def tokens_folder(root: Path) -> str:
    """The folder of a small model with random weights and the embedded VAE."""
    folder = root / "tokens"
    if not folder.is_dir():
        make_pipeline().save(folder)
    return str(folder)


def small_dit(**changes: Any) -> DiTConfig:
    return DiTConfig(**({"width": 64, "depth": 2, "heads": 2, "head_width": 64, "head_depth": 1, "head_heads": 2, "qk_norm": True} | changes))


def small_generator(root: Path, out: str, **changes: Any) -> GenerateConfig:
    """6 steps of 4 images of 32 px in fp32."""
    settings: dict[str, Any] = {
        "data": (str(pictures(root / "train", 10)),),
        "val": (str(pictures(root / "held", 3, seed=1)),),
        "tokens": tokens_folder(root),
        "size": 32,
        "batch": 4,
        "steps": 6,
        "statistics": 8,
        "precision": "fp32",
        "device": "cpu",
        "out": str(root / out),
        "log_every": 2,
        "save_every": 3,
        "eval_every": 3,
        "dit": small_dit(),
        "flow": FlowConfig(predict="tokens"),
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
    }
    return GenerateConfig(**(settings | changes))
