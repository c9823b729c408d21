"""Inception's file with random weights, the same on every machine: what features are made of is checked without the real one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from openvision3.networks import inception as extractors


def random_state() -> dict[str, torch.Tensor]:
    """Tensors with the names of the real file, scaled so that activations neither vanish nor grow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractors, "load_foreign_pickle", lambda *_: {})
        patch.setattr(extractors.Inception, "load_state_dict", lambda *_, **__: None)
        shapes = {name: value.shape for name, value in extractors.Inception(__file__).state_dict().items()}
    generator, state = torch.Generator().manual_seed(0), {}
    for name, shape in sorted(shapes.items()):
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif name.endswith(("running_var", "bn.weight")):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        elif len(shape) > 1:
            state[name] = torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
        else:
            state[name] = torch.randn(shape, generator=generator) * 0.1
    return state


def random_inception(path: Path, state: dict[str, torch.Tensor] | None = None) -> extractors.Inception:
    """Inception from a file of these tensors, with the check of its sha256 set to that file."""
    torch.save(random_state() if state is None else state, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractors, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        return extractors.Inception(path)
