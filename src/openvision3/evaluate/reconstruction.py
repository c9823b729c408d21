"""How well pictures are rebuilt: PSNR, given `reconstruct(images)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from openvision3.data.images import to_uint8

Result = dict[str, float | int | str]


def psnr(images: Tensor, images_hat: Tensor) -> Tensor:
    """(B, 3, H, W) twice in [-1, 1] -> PSNR of each pair in dB, both rounded to uint8 first; 100 dB stands for equal."""
    if images.shape != images_hat.shape:
        raise ValueError(f"pictures of {tuple(images.shape)} and {tuple(images_hat.shape)} cannot be compared; they must be of one shape")
    error = (to_uint8(images).float() - to_uint8(images_hat).float()).div(255).pow(2).mean((1, 2, 3))
    return -10 * torch.log10(error.clamp_min(1e-10))


def evaluate_reconstruction(batches: Iterable[Tensor], reconstruct: Callable[[Tensor], Tensor]) -> Result:
    """Mean PSNR over pictures, with the protocol it was measured by.

    Raises:
        ValueError: no pictures at all.
    """
    values, size = [], ""
    for images in batches:
        values.append(psnr(images, reconstruct(images).to(images.device)))
        size = f"{images.shape[2]}x{images.shape[3]}"
    if not values:
        raise ValueError("no pictures to evaluate on")
    return summary(torch.cat(values), size)


def summary(values: Tensor, size: str) -> Result:
    """PSNR of each picture -> the result."""
    return {"psnr": values.mean().item(), "count": len(values), "protocol": f"PSNR per picture on uint8, mean, {size}, sigma 0"}
