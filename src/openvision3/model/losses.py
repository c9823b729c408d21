"""The losses of the paper's section 3.4 as pure functions: pixel and latent, contrastive and caption. All in fp32.

With several ranks each function returns this rank's share: the mean of the shares over ranks is the loss of the global batch, and the
averaged gradients are its gradient. The perceptual term is a network, which is handed to `OpenVision3`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openvision3 import distributed
from openvision3.model.understanding import temperature

IGNORED = -100
"""Target without a loss: the ignore_index of `cross_entropy`."""

CHUNK = 2**24
"""Most logits in memory at a time (64 MB in fp32): neither batch x vocabulary nor batch x batch is ever held whole."""


def with_gradient_squares(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The same tokens, and a number to which the backward pass adds the squared norm of the gradient that reaches them here."""
    same, squares = tokens.view_as(tokens), torch.zeros((), device=tokens.device)

    def measure(gradient: Tensor) -> None:
        squares.add_(gradient.float().square().sum())

    same.register_hook(measure)
    return same, squares


def pixel_loss(images: Tensor, images_hat: Tensor, count: Tensor) -> Tensor:
    """Mean |x - x^| over pixels and channels, images in [-1, 1]; `count` is the number of images compared in the global batch."""
    return _mean_absolute(images - images_hat.float(), count)


def latent_loss(latents: Tensor, latents_hat: Tensor, count: Tensor) -> Tensor:
    """Mean |z - z^|; `count` is the number of rows of the global batch."""
    return _mean_absolute(latents - latents_hat.float(), count)


def _mean_absolute(difference: Tensor, count: Tensor) -> Tensor:
    return distributed.share(difference.float().abs().flatten(1).mean(1).sum(), count)


def contrastive_loss(image_embedding: Tensor, text_embedding: Tensor, log_temperature: Tensor, present: Tensor, text_hash: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE over the global batch (Radford et al. 2021), temperature clamped at 100; the mean over K sets of captions.

    image_embedding (B, E) and text_embedding (B, K, E) have unit length, present is (B, K). In set k, a row without a caption is
    neither a pair nor a negative. A set that is empty on all ranks is left out; if all sets are empty, the loss is zero. Each rank
    scores its own rows against the rows of all ranks. With `text_hash` (B, K), rows of one hash are no negatives of each other.
    """
    with torch.autocast(image_embedding.device.type, enabled=False):  # bf16 would round logits of up to 100 to quarters
        images, texts = image_embedding.float(), text_embedding.float()
        scale = temperature(log_temperature)
        own = distributed.rank() * len(images) if distributed.world() > 1 else 0
        pairs = torch.arange(own, own + len(images), device=images.device)
        all_images, all_texts, everywhere = distributed.gather(images), distributed.gather(texts), distributed.gather(present.byte()).bool()
        hashes = None if text_hash is None else distributed.gather(text_hash)
        loss = images.sum() * 0.0
        for k in range(texts.shape[1]):
            targets = pairs.masked_fill(~present[:, k], IGNORED)
            absent = ~everywhere[:, k]
            same = None if hashes is None else hashes[:, k]
            of_images = _rows_against(images, all_texts[:, k], scale, targets, absent, same)
            both = of_images + _rows_against(texts[:, k], all_images, scale, targets, absent, same)
            loss = loss + distributed.share(both, 2 * everywhere[:, k].sum())
        return loss / everywhere.any(0).sum().clamp_min(1)


def _rows_against(rows: Tensor, columns: Tensor, scale: Tensor, targets: Tensor, absent: Tensor, hashes: Tensor | None) -> Tensor:
    def score(some: Tensor, their_targets: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
        logits = (scale * some @ columns.T).masked_fill(absent, -torch.inf)
        if hashes is not None:
            own = their_targets.clamp_min(0)[:, None]
            logits = logits.masked_fill((hashes[own] == hashes).scatter(1, own, False), -torch.inf)
        return F.cross_entropy(logits, their_targets, reduction="sum")

    return _in_chunks(score, rows, targets, len(columns), columns, scale)


def hash_texts(text_ids: Tensor, pad_id: int) -> Tensor:
    """text_ids (..., T) -> (...) int64: equal for equal texts, however they are padded; unlike texts differ but for one pair in 2^64."""
    powers = torch.full((text_ids.shape[-1],), _HASH_FACTOR, device=text_ids.device).cumprod(0)  # wraps around
    return ((text_ids + 1).masked_fill(text_ids == pad_id, 0) * powers).sum(-1)


_HASH_FACTOR = 0x5851F42D4C957F2D
"""An odd number, so that its powers are odd, too."""


def caption_loss(features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, count: Tensor) -> Tensor:
    """Mean cross-entropy of the next word; features are (M, W), targets (M,) are word ids or IGNORED.

    The logits are features x weight (V, W) + bias (V,), if there is one. `count` is the number of scored words in the global batch.
    """

    def score(some: Tensor, their_targets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.cross_entropy(F.linear(some, weight, bias).float(), their_targets, reduction="sum")

    return distributed.share(_in_chunks(score, features, targets, len(weight), weight, bias), count)


def _in_chunks(score, rows: Tensor, targets: Tensor, columns: int, *others: Tensor | None) -> Tensor:
    """The sum of score(rows, targets) over pieces of at most CHUNK logits, which the backward pass computes again."""
    size = max(1, CHUNK // max(1, columns))
    if len(rows) <= size:
        return score(rows, targets, *others)
    pieces = zip(rows.split(size), targets.split(size), strict=True)
    return torch.stack([checkpoint(score, *piece, *others, use_reentrant=False, preserve_rng_state=False) for piece in pieces]).sum()
