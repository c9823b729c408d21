"""A chat model of seconds for tests: a random language model in a folder, conversations about one-coloured images, and a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from tiny_generator import tokens_folder
from tiny_language import tiny_language

from openvision3.train.optimizer import OptimizerConfig
from openvision3.understand.config import LlavaConfig

COLOURS = {"red": (220, 30, 30), "green": (20, 160, 40), "cat": (30, 40, 220), "dog": (250, 250, 250)}
"""what the images are called, all words of `tiny_language`"""
QUESTION = "what is this ?"


def language_folder(root: Path, name: str = "language", **settings: Any) -> str:
    """The folder of a random Llama of two layers, 32 wide."""
    folder = root / name
    return str(folder if folder.is_dir() else tiny_language(folder, **settings))


def row(number: int, image: str | list[str] | None, *turns: str) -> dict[str, Any]:
    """One entry of LLaVA's JSON; the turns are of human and gpt in turn."""
    entry: dict[str, Any] = {"id": str(number)}
    if image is not None:
        entry["image"] = image
    return entry | {"conversations": [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(turns)]}


def conversations(root: Path, name: str, count: int = 8) -> str:
    """A JSON file about `count` one-coloured images beside it: one question or two each, every fourth without an image and every fifth with two."""
    folder = root / name
    (folder / "img").mkdir(parents=True, exist_ok=True)
    names, rows = list(COLOURS), []
    for i in range(count):
        colour = names[i % len(names)]
        Image.new("RGB", (40, 30 + i), COLOURS[colour]).save(folder / "img" / f"{i}.png")
        turns = [f"<image>\n{QUESTION}", colour]
        if i % 3 == 1:
            turns += ["is it red ?", "yes" if colour == "red" else "no"]
        rows.append(row(i, f"img/{i}.png", *turns))
    rows[3] = row(3, None, "is there a dog in it ?", "yes")
    rows[min(5, count - 1)] = row(5, ["img/0.png", "img/1.png"], "<image>\n<image>\nis this one of two ?", "no")
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return str(path)


def small_chat(root: Path, out: str, **changes: Any) -> LlavaConfig:
    """6 steps of 4 conversations in fp32: the projector, images of 32 px."""
    settings: dict[str, Any] = {
        "tower": tokens_folder(root),
        "language": language_folder(root),
        "data": (conversations(root, "train"),),
        "val": (conversations(root, "held", 5),),
        "size": 32,
        "length": 96,
        "batch": 4,
        "steps": 6,
        "precision": "fp32",
        "device": "cpu",
        "out": str(root / out),
        "log_every": 2,
        "save_every": 3,
        "eval_every": 3,
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.0),
    }
    return LlavaConfig(**(settings | changes))
