"""UniTok and VILA-U: unified tokenizers that exist as their authors' code only, run from a local checkout with its weights in it.

A checkout's code is imported and run: name only one that you trust. Written from the public code and tested on stand-ins with the
same call signatures; never run on the real checkouts, whose dependencies (timm, open_clip and torchvision; transformers 4) are not ours.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from openvision3.contents import short
from openvision3.networks.perceptual import load_foreign_pickle


@dataclass(frozen=True)
class Checkout:
    """A tokenizer on `device`: pictures (B, 3, 256, 256) in [-1, 1] to pictures, and to one vector each."""

    reconstruct: Callable[[Tensor], Tensor]
    features: Callable[[Tensor], Tensor]


def unitok(folder: Path, weights: Path, device: str) -> Checkout:
    """`models/unitok.py` and `utils/config.py` of github.com/FoundationVision/UniTok, with unitok_tokenizer.pth.

    Called are `UniTok(args)`, `img_to_idx(images) -> ids`, `idx_to_img(ids) -> images` and `encode_image(images) -> (B, E)`.

    Raises:
        ValueError: code or weights that are not UniTok's, or a package that it needs and that is not here.
    """
    with _loading("unitok", folder):
        from models.unitok import UniTok
        from utils.config import Args

        saved: Any = load_foreign_pickle(weights)
        settings = Args()
        settings.load_state_dict(saved["args"])
        network: Any = UniTok(settings)
        network.load_state_dict(saved["trainer"]["unitok"])
    network = network.to(device).eval().requires_grad_(False)
    return Checkout(lambda images: network.idx_to_img(network.img_to_idx(images)), network.encode_image)


def vila_u(folder: Path, weights: Path, device: str) -> Checkout:
    """The package `vila_u` of github.com/mit-han-lab/vila-u, with the `vision_tower` folder of its weights.

    Called are `RQVAESIGLIPTransformer.from_pretrained(folder).rqvaesiglip` and of it `encode_image(images) -> (ids, z)` with z (B, h, w, D)
    and `decode(z) -> images`, which computes in bf16 whatever it is given.

    Raises:
        ValueError: code or weights that are not VILA-U's, or a package that it needs and that is not here.
    """
    with _loading("vila-u", folder):
        from vila_u.model.multimodal_encoder.rqvaesigliptransformer import RQVAESIGLIPTransformer

        network: Any = RQVAESIGLIPTransformer.from_pretrained(str(weights))
    tower = network.rqvaesiglip.to(device).float().eval().requires_grad_(False)
    return Checkout(lambda images: tower.decode(tower.encode_image(images)[1]), lambda images: tower.encode_image(images)[1].float().mean((1, 2)))


@contextlib.contextmanager
def _loading(name: str, folder: Path) -> Iterator[None]:
    """The checkout first on the path and its modules forgotten afterwards (`models` and `utils` are anybody's names); no downloads."""
    from huggingface_hub import constants

    names = {path.stem for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"}
    hidden = {module: sys.modules.pop(module) for module in list(sys.modules) if module.split(".")[0] in names}
    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    except ImportError as error:
        raise ValueError(f"the checkout of {name} in {folder} cannot be imported: {short(error)}; install what it needs, or name another folder") from error
    except Exception as error:  # whatever foreign code raises
        raise ValueError(f"{name} cannot be loaded from {folder}: {type(error).__name__}: {short(error)}") from error
    finally:
        sys.path.remove(str(folder))
        constants.HF_HUB_OFFLINE = offline
        for module in [module for module in sys.modules if module.split(".")[0] in names]:
            del sys.modules[module]
        sys.modules.update(hidden)
