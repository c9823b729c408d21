"""What the classes of both libraries share: a VAE from its settings in diffusers' layout, and half precision."""

from __future__ import annotations

import contextlib
import inspect
import json
from typing import Any

import torch
from torch import Tensor

from openvision3.model.vae import LEVELS, VAE

FLUX = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""The VAE of the paper, FLUX.1's, in diffusers' terms."""

STRIDE = 16
"""pixels that a token spans: `patch_size` for other code"""


def vae_settings(vae: VAE) -> dict[str, Any]:
    """The config of a VAE in diffusers' layout, with `_class_name`; empty for no VAE."""
    if vae.network is None:
        return {}
    taken = inspect.signature(type(vae.network).__init__).parameters  # diffusers also keeps attributes that it would not take
    values = json.loads(vae.network.to_json_string())  # type: ignore[operator]
    return {name: value for name, value in values.items() if name in taken or name == "_class_name"}


def make_vae(settings: dict[str, Any], shift: bool | None, origin: dict[str, Any], *, decoder: bool) -> VAE:
    """A VAE of these settings with fresh weights, with or without its decoder. Raises ValueError for another class of VAE."""
    name, sha256 = (str(origin.get(key, "")) for key in ("name", "sha256"))
    if not settings:
        return VAE(None, name=name)
    import diffusers

    values = dict(settings)
    kind = values.pop("_class_name", None)
    if kind not in LEVELS:
        raise ValueError(f"the config names a VAE of class {kind}; choose one of {', '.join(LEVELS)}")
    network = getattr(diffusers, kind).from_config(values)
    if not decoder:
        network.decoder = None
        if kind == "AutoencoderKL":
            network.post_quant_conv = None
    return VAE(network, name=name, shift=shift, sha256=sha256)


def precision(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Autocast where the weights are bf16 or fp16: our norms compute in fp32, and matrix products need one dtype."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def filled(module: Any, state: dict[str, Tensor]) -> Any:
    """The module, which was made on the meta device, with these tensors as its weights. Tensors of parts that it lacks are left out."""
    own = module.state_dict()
    module.load_state_dict({name: value for name, value in state.items() if name in own}, assign=True)
    return module.eval()
