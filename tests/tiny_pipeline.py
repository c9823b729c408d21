"""A small pipeline with every part in it, shared by the tests of what uses a trained model: random weights from a seed."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from shapes import tiny_vae

from openvision3.data.text import TextTokenizer
from openvision3.hub import load_vae
from openvision3.model.openvision3 import OpenVision3
from openvision3.model.vae import VAE
from openvision3.pipeline import Pipeline
from openvision3.train.recipes import small_model

NAMES = ("red heart", "blue heart", "grinning face", "cat face", "dog face", "red apple", "green apple", "black cat")
SIZE = 64


def make_pipeline(vae: VAE | None = None, seed: int = 0) -> Pipeline:
    tokenizer = TextTokenizer.train(NAMES * 2, 200)
    torch.manual_seed(seed)
    model = OpenVision3(small_model("tiny", "tiny", 64), vae or load_vae("embedded"), len(tokenizer), tokenizer.pad_id).init_weights()
    return Pipeline(model, tokenizer, SIZE, training={"recipe": "tiny", "steps": 3})


@functools.cache
def pipeline() -> Pipeline:
    """With the embedded VAE. Not to be changed by a test."""
    return make_pipeline()


def without_vae() -> Pipeline:
    """On pixels, with rotary positions, normalised queries and keys, and tokens summed over two blocks."""
    tokenizer = TextTokenizer.train(NAMES * 2, 200)
    config = small_model("tiny", "tiny", 64)
    config.encoder.patch, config.loss.beta = 16, 0.0
    config.encoder.positions, config.encoder.qk_norm, config.encoder.sum_blocks = "rope", True, 2
    torch.manual_seed(0)
    return Pipeline(OpenVision3(config, VAE(None, name="pixels"), len(tokenizer), tokenizer.pad_id).init_weights(), tokenizer, SIZE)


def foreign_vae(**changes) -> VAE:
    vae = tiny_vae(**changes)
    vae.name = "my/vae"
    return vae


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth coloured image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_photo(path: Path, width: int = 60, height: int = 40, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(width, height, seed).save(path)
    return path
