"""Texts of like lengths, which a CPU computes together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from openvision3 import distributed

GROUP = 32
"""texts that a CPU computes together"""


def by_length(part: nn.Module, compute: Callable[[Tensor | slice, Tensor], Tensor], ids: Tensor, pad_id: int) -> Tensor:
    """The results (B, ...) of `compute(rows, ids of these rows)`, which calls `part`, for texts ids (B, T), in their order.

    A CPU computes texts of like lengths together, without their common padding: of 256 captions of drawings the longest has 32 pieces and the mean one
    has 7. Another device computes all at once: reading the lengths would make the host wait, and small products would not fill it; so does a
    sharded part, which gathers its weights in every call.
    """
    if ids.device.type != "cpu" or len(ids) <= GROUP or distributed.is_sharded(part):
        return compute(slice(None), ids)
    lengths = (ids != pad_id).sum(1).clamp_min(1)
    order = lengths.argsort(stable=True)
    results = [compute(rows, ids[rows, : int(lengths[rows[-1]])]) for rows in order.split(GROUP)]
    return torch.cat(results)[order.argsort()]
