"""Everything that is measured on the embedded data set, given the functions of a model: held-out emoji, white, 128 px."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from openvision3.data import samples
from openvision3.data.images import to_pil, to_tensor
from openvision3.evaluate.captioning import evaluate_captions
from openvision3.evaluate.classes import ClassRow
from openvision3.evaluate.protocol import Number, number
from openvision3.evaluate.reconstruction import psnr
from openvision3.evaluate.zeroshot import class_embedding, evaluate_classification, evaluate_retrieval


@dataclass
class Functions:
    """What is asked of a model, as functions of images (B, 3, H, W) in [-1, 1] or of texts."""

    reconstruct: Callable[[Tensor], Tensor]
    vae_reconstruct: Callable[[Tensor], Tensor]
    embed_images: Callable[[Tensor], Tensor]
    embed_texts: Callable[[Sequence[str]], Tensor]
    caption: Callable[[Tensor], list[str]]


@dataclass
class Findings:
    """Numbers by what they are of, and the groups, pictures and captions behind them for a page."""

    results: dict[str, list[Number]]
    groups: list[ClassRow]
    without_group: int
    """emoji that zero-shot classification leaves out"""
    emoji: tuple[samples.Emoji, ...]
    written: list[str]
    psnr: list[float]
    vae_psnr: list[float]


def drawings(emoji: Sequence[samples.Emoji], size: int, batch: int = 32) -> Iterator[Tensor]:
    """Evaluation drawings in batches (B, 3, size, size)."""
    for start in range(0, len(emoji), batch):
        yield torch.stack([to_tensor(samples.draw(e.character, size)) for e in emoji[start : start + batch]])


def evaluate_openmoji(model: Functions, size: int = 128, count: int = 256) -> Findings:
    """Reconstruction beside its VAE, retrieval, zero-shot groups and captions on the first `count` held-out emoji.

    Zero-shot: a group's embedding is the mean text embedding of the names of its training emoji; emoji without a group are
    left out and counted.
    """
    data = samples.load_emoji()
    emoji = data.evaluation(count)
    pictures = list(drawings(emoji, size))
    own, vae = (torch.cat([psnr(p, f(p).cpu()) for p in pictures]) for f in (model.reconstruct, model.vae_reconstruct))
    results = {"reconstruction": [psnr_number(own, size)], "vae_reconstruction": [psnr_number(vae, size)]}
    image_embedding = torch.cat([model.embed_images(p).cpu() for p in pictures])
    names = [e.name for e in emoji]
    text_embedding = model.embed_texts(names).cpu()
    results["retrieval"] = evaluate_retrieval(image_embedding, text_embedding, names, range(len(names)))
    written = [caption for p in pictures for caption in model.caption(p)]
    results["captions"] = evaluate_captions(written, [[name] for name in names], "simple")  # the same numbers on every machine

    groups = sorted({e.group for e in data.train if e.group})
    classes = class_embedding([model.embed_texts([e.name for e in data.train if e.group == g]).cpu() for g in groups])
    grouped = {i: groups.index(e.group) for i, e in enumerate(emoji) if e.group}
    without = len(emoji) - len(grouped)
    prompts = f"the mean text embedding of the names of its training emoji; {without} emoji without a group are left out"
    zeroshot = evaluate_classification(image_embedding[list(grouped)], classes, list(grouped.values()), groups, prompts)
    results["zeroshot"] = zeroshot.numbers
    return Findings(results, zeroshot.classes, without, emoji, written, own.tolist(), vae.tolist())


def psnr_number(values: Tensor, size: int) -> Number:
    """PSNR of each picture (N,) in dB -> the number of the set."""
    return number("psnr", values.mean().item(), len(values), f"PSNR per picture on uint8 in dB, mean over pictures, {size}x{size}, sigma 0")


def rebuilt_rows(emoji: Sequence[samples.Emoji], model: Functions, size: int = 128) -> list[tuple[Image.Image, ...]]:
    """(original, through the VAE alone, rebuilt from tokens) for each emoji."""
    rows = []
    for images in drawings(emoji, size):
        columns = (images, model.vae_reconstruct(images), model.reconstruct(images))
        rows += list(zip(*(to_pil(c) for c in columns), strict=True))
    return rows
