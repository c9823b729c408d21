"""The losses of the paper's section 3.4 as pure functions: pixel, latent | contrastive, caption. All in fp32.

The perceptual term is a network and lives in `perceptual.py`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_TEMPERATURE = 100.0


def temperature(log_temperature: Tensor) -> Tensor:
    """What cosines are multiplied by before a softmax: at most 100 (Radford et al. 2021), in fp32.

    The clamp passes the gradient on: with a plain one, a temperature that once went over its limit would never come back.
    """
    log = log_temperature.float()
    return (log + (log.clamp(max=math.log(MAX_TEMPERATURE)) - log).detach()).exp()


def pixel_loss(images: Tensor, images_hat: Tensor) -> Tensor:
    """Mean |x - x^| over pixels and channels, images in [-1, 1]."""
    return (images.float() - images_hat.float()).abs().mean()


def latent_loss(latents: Tensor, latents_hat: Tensor) -> Tensor:
    """Mean |z - z^|."""
    return (latents.float() - latents_hat.float()).abs().mean()


def contrastive_loss(image_embedding: Tensor, text_embedding: Tensor, log_temperature: Tensor, present: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE over the batch (Radford et al. 2021), temperature clamped at 100.

    Both embeddings (B, E) of unit length. Rows whose caption is not `present` (B,) take no part, neither as pairs nor
    as negatives; with no pair left the loss is zero.
    """
    pairs = torch.arange(len(image_embedding), device=image_embedding.device)
    absent = torch.zeros_like(pairs, dtype=torch.bool) if present is None else ~present
    with torch.autocast(image_embedding.device.type, enabled=False):  # bf16 would round logits of up to 100 to quarters
        logits = temperature(log_temperature) * image_embedding.float() @ text_embedding.float().T  # (B, B)
    pairs = pairs.masked_fill(absent, -100)  # cross_entropy's ignore_index
    both = [F.cross_entropy(way.masked_fill(absent, -torch.inf), pairs, reduction="sum") for way in (logits, logits.T)]
    return (both[0] + both[1]) / (2 * (~absent).sum().clamp_min(1))


def caption_loss(logits: Tensor, caption_ids: Tensor, pad_id: int = 0) -> Tensor:
    """Mean cross-entropy of the next word over all words that are not padding, the end mark included.

    logits (B, L, V) at the positions of caption_ids (B, L): position i is scored against word i + 1.
    """
    targets = caption_ids[:, 1:]
    total = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=pad_id, reduction="sum")
    return total / (targets != pad_id).sum().clamp_min(1)
