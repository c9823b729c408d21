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
from openvision3.evaluate.reconstruction import Result, psnr, summary
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
    """Named results, and the pictures and captions behind them for a page."""

    results: dict[str, Result]
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
    results: dict[str, Result] = {"reconstruction": summary(own, f"{size}x{size}"), "vae_reconstruction": summary(vae, f"{size}x{size}")}
    image_embedding = torch.cat([model.embed_images(p).cpu() for p in pictures])
    names = [e.name for e in emoji]
    text_embedding = model.embed_texts(names).cpu()
    results["retrieval"] = evaluate_retrieval(image_embedding, text_embedding, names)
    written = [caption for p in pictures for caption in model.caption(p)]
    results["captions"] = evaluate_captions(written, names)

    groups = sorted({e.group for e in data.train if e.group})
    classes = class_embedding([model.embed_texts([e.name for e in data.train if e.group == g]).cpu() for g in groups])
    grouped = {i: groups.index(e.group) for i, e in enumerate(emoji) if e.group}
    zeroshot = evaluate_classification(image_embedding[list(grouped)], classes, list(grouped.values()), groups)
    results["zeroshot"] = {**zeroshot, "left_out_without_group": len(emoji) - len(grouped)}
    return Findings(results, emoji, written, own.tolist(), vae.tolist())


def rebuilt_rows(emoji: Sequence[samples.Emoji], model: Functions, size: int = 128) -> list[tuple[Image.Image, ...]]:
    """(original, through the VAE alone, rebuilt from tokens) for each emoji."""
    rows = []
    for images in drawings(emoji, size):
        columns = (images, model.vae_reconstruct(images), model.reconstruct(images))
        rows += list(zip(*(to_pil(c) for c in columns), strict=True))
    return rows
