"""UniTok and VILA-U: unified tokenizers that exist as their authors' code only, run from a local checkout with its weights in it.

Code of the checkout is imported and run: name only one that you trust. Both were run on the real repositories with random weights; see docs/peers.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from openvision3.contents import short
from openvision3.networks.perceptual import load_foreign_pickle


@dataclass(frozen=True)
class Checkout:
    """A tokenizer on `device`: images (B, 3, 256, 256) in [-1, 1] to images, and to one vector each."""

    reconstruct: Callable[[Tensor], Tensor]
    features: Callable[[Tensor], Tensor]
    dtype: str = "fp32"
    """what its authors run it in"""


def unitok(folder: Path, weights: Path, device: str) -> Checkout:
    """`models/unitok.py` and `utils/config.py` of github.com/FoundationVision/UniTok, with unitok_tokenizer.pth.

    Uses `UniTok(args)`, `img_to_idx(images) -> ids`, `idx_to_img(ids) -> images` and `encode_image(images) -> (B, E)`.

    Raises:
        ValueError: the code or the weights are not UniTok's, or a package that it needs is not installed.
    """
    with imported_checkout("unitok", folder):
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
    """The vision tower in the package `vila_u` of github.com/mit-han-lab/vila-u, with the `vision_tower` folder of its weights.

    Uses `RQVAESIGLIPTransformer.from_pretrained(folder).rqvaesiglip`, and of it `encode_image(images) -> (ids, z)` with z (B, h, w, D) and
    `decode(z) -> images`. All in bf16, as the authors run it: their decoder casts to bf16 in every upsampling and fails in fp32.

    Raises:
        ValueError: the code or the weights are not VILA-U's, or a package that it needs is not installed.
    """
    with imported_checkout("vila-u", folder):
        from vila_u.model.multimodal_encoder.rqvaesigliptransformer import RQVAESIGLIPTransformer

        network: Any = RQVAESIGLIPTransformer.from_pretrained(str(weights), torch_dtype=torch.bfloat16)
    tower = network.rqvaesiglip.to(device, torch.bfloat16).eval().requires_grad_(False)

    def quantised(images: Tensor) -> Tensor:
        return tower.encode_image(images.to(torch.bfloat16))[1]

    return Checkout(lambda images: tower.decode(quantised(images)), lambda images: quantised(images).float().mean((1, 2)), "bf16")


TOWER = "vila_u.model.multimodal_encoder"
"""the package that holds VILA-U's vision tower. The `__init__.py` of its parents would import the whole of VILA-U's training stack"""


@contextlib.contextmanager
def imported_checkout(name: str, folder: Path) -> Iterator[None]:
    """Put the checkout first on the path, without downloads, and forget its modules afterwards (`models` and `utils` are anybody's names).

    VILA-U was written for Python 3.10. Later versions refuse a dataclass as the default of a field unless it can be hashed: so all can meanwhile.

    Raises:
        ValueError: whatever the checkout's code raises, in one line.
    """
    from huggingface_hub import constants

    names = {path.stem for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"}
    hidden = {module: sys.modules.pop(module) for module in list(sys.modules) if module.split(".")[0] in names}
    for package in itertools.accumulate(TOWER.split("."), "{}.{}".format) if name == "vila-u" else ():
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(folder / package.replace(".", "/"))]
    hashable = functools.partial(dataclasses.dataclass, unsafe_hash=True)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        with mock.patch.object(constants, "HF_HUB_OFFLINE", True), contextlib.ExitStack() as stack:
            if name == "vila-u":
                import transformers.modeling_utils  # noqa: F401  # its own dataclasses stay as they are

                stack.enter_context(mock.patch.object(dataclasses, "dataclass", hashable))
            yield
    except ImportError as error:
        raise ValueError(f"the checkout of {name} in {folder} cannot be imported: {short(error)}; install what it needs, or name another folder") from error
    except Exception as error:  # whatever foreign code raises
        raise ValueError(f"{name} cannot be loaded from {folder}: {type(error).__name__}: {short(error)}") from error
    finally:
        sys.path.remove(str(folder))
        for module in [module for module in sys.modules if module.split(".")[0] in names]:
            del sys.modules[module]
        sys.modules.update(hidden)
