"""One image encoder whose tokens serve both to rebuild an image and to understand it: OpenVision 3 (arXiv 2601.15369), the whole system.

import openvision3 as ov3
model = ov3.load("mini")
tokens = model.encode("image.jpg")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openvision3.data.images import to_pil as to_pil
    from openvision3.generate.flow import Sampling as Sampling
    from openvision3.generate.generator import Generator as Generator
    from openvision3.generate.generator import load_generator as load_generator
    from openvision3.model.openvision3 import OpenVision3 as OpenVision3
    from openvision3.pipeline import Pipeline as Pipeline
    from openvision3.pipeline import load as load
    from openvision3.understand.chat import Chat as Chat
    from openvision3.understand.chat import load_chat as load_chat

__version__ = "0.1.0"
__all__ = ["Chat", "Generator", "OpenVision3", "Pipeline", "Sampling", "__version__", "load", "load_chat", "load_generator", "to_pil"]

_HOMES = {
    "load": "pipeline",
    "Pipeline": "pipeline",
    "OpenVision3": "model.openvision3",
    "to_pil": "data.images",
    "load_generator": "generate.generator",
    "Generator": "generate.generator",
    "Sampling": "generate.flow",
    "load_chat": "understand.chat",
    "Chat": "understand.chat",
}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that the command line's help does not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'openvision3' has no attribute {name!r}")
    return getattr(import_module(f"openvision3.{_HOMES[name]}"), name)
