"""Opening what a training of images reads: its data, a latent cache of them, and its held-out images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from openvision3 import distributed
from openvision3.data import openmoji
from openvision3.data.batches import evaluation_batches
from openvision3.data.identity import digest
from openvision3.data.images import ImageError
from openvision3.data.latents.read import CachedSource, LatentCache
from openvision3.data.names import DataOptions, open_source
from openvision3.data.openmoji import EmojiSource
from openvision3.data.problems import Problems, reasons_in_words
from openvision3.data.sources import Source
from openvision3.model.vae import VAE
from openvision3.progress import track
from openvision3.train.data_config import DataConfig

EVALUATED = 256
"""most images that an evaluation during training looks at"""
ROWS = 32
"""images computed at a time; no number depends on it"""


def data_options(config: DataConfig, **more: Any) -> DataOptions:
    """How `data` and `val` are read alike, and `more` of one of them."""
    return DataOptions(
        caption_keys=config.caption_keys,
        only=config.only_values,
        view=config.view,
        index=config.index,
        cache=config.cache,
        cache_gb=config.cache_gb,
        **more,
    )


def check_held_out(config: DataConfig) -> None:
    """Raises ValueError if no held-out images are named."""
    if not config.val:
        raise ValueError("val is empty: name held-out images with --val (openmoji, a folder or shards)")


def open_held_out(config: DataConfig, training: Source) -> Source:
    """EVALUATED emoji of the val side, or the source that `val` names, read as the training data are.

    Raises:
        ValueError: no usable image, or images that are trained on.
    """
    if config.val == ("openmoji",):
        return EmojiSource(openmoji.load_emoji().evaluation("val", EVALUATED))
    check_held_out(config)
    source = open_source(config.val, data_options(config, side="val"), watch=track)
    if shared := shared_files(source, training):
        more = f" and {len(shared) - 1:,} more" if len(shared) > 1 else ""
        raise ValueError(f"--val and --data share {shared[0]}{more}: evaluate on images that are not trained on")
    problems = Problems()
    if next(evaluation_batches(source, config.size, 1, problems), None) is None:
        raise ValueError(f"none of the {len(source)} held-out images in {', '.join(config.val)} can be used: {reasons_in_words(problems)}")
    return source


def shared_files(one: Source, other: Source) -> list[str]:
    """Files that both read, however their paths are spelt: the same file on disk, or the same address."""
    others = dict(_files(other))
    return [path for file, path in _files(one) if file in others]


def _files(source: Source) -> Iterator[tuple[object, str]]:
    for path in source.files():
        try:
            found = os.stat(path)
            yield (found.st_dev, found.st_ino), path
        except OSError:  # an address, or a file that is gone by now
            yield path, path


def open_data(config: DataConfig, vae: VAE, pixel_share: float) -> tuple[Source, LatentCache | None, str]:
    """The samples to train on, the latent cache if `config.latents` names one, and a line about it for the log.

    If the data are not named or not there, the cache replaces them: it has keys and captions, but no images.

    Raises:
        ValueError: no such data; a cache of another VAE, size or other views; a pixel loss without images.
    """
    cache = None
    if config.latents:
        cache = LatentCache.open(config.latents, vae_sha256=vae.sha256, scale=vae.scale, shift=vae.shift, size=config.size)
        _refuse_evaluated(cache)
        if config.mirror != cache.settings.mirror:
            raise ValueError(
                f"mirror is {config.mirror:g}, but the crops in {config.latents} are mirrored with probability {cache.settings.mirror:g}; set --mirror alike"
            )
    try:
        source = open_source(config.data, data_options(config, aliases=config.aliases, weights=config.weights), watch=track)
    except (ValueError, OSError) as error:
        if cache is None:
            raise
        if pixel_share:
            raise ValueError(
                f"{error}; the latent cache {config.latents} holds no images, and pixel_share {pixel_share:g} needs some: "
                "name the data it was made from, or train on its latents alone with --pixel-share 0"
            ) from error
        line = f"the images are missing ({error}): training on the {len(cache):,} samples of {config.latents} alone, without a pixel loss"
        return CachedSource(cache), cache, line
    if cache is None:
        return source, None, ""
    if tuple(config.crop_area) != cache.settings.crop_area:
        raise ValueError(f"crop_area is {config.crop_area}, but the crops in {config.latents} cover {cache.settings.crop_area}; set --crop-area alike")
    images = f"images are read for {pixel_share:g} of the rows" if pixel_share else "no image is read"
    return source, cache, f"the latents of {len(cache):,} samples, {cache.settings.crops} crops each, are read from {config.latents}; {images}"


def _refuse_evaluated(cache: LatentCache) -> None:
    """Raises ValueError if the cache holds emoji that are evaluated on, because it was written when OpenMoji was split otherwise."""
    emoji = openmoji.load_emoji()
    evaluated = [each.name for each in emoji.val + emoji.test if cache.find(f"openmoji/{each.key}")]
    if evaluated:
        raise ValueError(
            f"{cache.folder} holds {len(evaluated)} emoji that are evaluated on, such as {evaluated[0]}: OpenMoji was split otherwise when it was written; "
            "write the latents again with openvision3 data latents, into another folder"
        )


def data_digest(source: Source) -> str:
    """A digest of the images (see `Source.identity`) and of some captions; "" where a latent cache stands for the images."""
    if isinstance(source, CachedSource):
        return ""
    captions: list[object] = []
    for index in () if source.is_remote else source.probed():
        try:
            captions.append(tuple(source.captions(index)))
        except ImageError as error:
            captions.append(error.reason)
    return digest(source.identity(), captions)


def shared_rows(source: Source, size: int, problems: Problems) -> Iterator[tuple[list[int], list[str], Tensor, list[tuple[str, ...]]]]:
    """(indices, keys, images, captions) of up to EVALUATED images in order, the same on all ranks: an image that one rank cannot read is left out on all.

    All ranks compute the parts of a sharded model together; with different rows they would wait for each other forever.
    """
    left = EVALUATED
    for start in range(0, len(source), ROWS):
        unusable = Problems()
        indices = range(start, min(start + ROWS, len(source)))
        here, keys, images, texts = next(evaluation_batches(source, size, ROWS, unusable, indices), ([], [], torch.empty(0), []))
        everywhere = distributed.gather_objects(({index: bool(text) for index, text in zip(here, texts, strict=True)}, unusable))
        for _, theirs in everywhere:
            problems.extend(theirs)
        usable = [place for place, index in enumerate(here) if all(index in rank for rank, _ in everywhere)][:left]
        left -= len(usable)
        if usable:
            captioned = [all(rank[here[place]] for rank, _ in everywhere) for place in usable]
            yield (
                [here[p] for p in usable],
                [keys[p] for p in usable],
                images[usable],
                [texts[p] if has else () for p, has in zip(usable, captioned, strict=True)],
            )
        if not left:
            return
