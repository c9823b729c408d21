"""Random numbers by key: each draw is a function of its purpose, never of a rank, a worker or earlier draws."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def draw_seed(*parts: object) -> int:
    """A 63-bit seed that depends only on `parts`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def hash_share(text: str) -> float:
    """Where the hash of a text lies in [0, 1): splits data, and orders what is shown or asked without a choice."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def random_bits(keys: Tensor, count: int) -> Tensor:
    """keys (B,) int64 -> (B, count) of 64 random bits each: number i of a row is the splitmix64 hash of (key, i).

    Such a generator needs no state and no loop over rows, and never waits for the device.
    """
    x = keys[:, None] + torch.arange(1, count + 1, device=keys.device) * -0x61C8864680B583EB  # wraps around, like all sums here
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Tensor, places: int) -> Tensor:
    """Shift to the right and fill with zeros; torch's own shift fills with the sign."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def uniform(keys: Tensor, count: int) -> Tensor:
    """keys (B,) -> (B, count) from (0, 1) in fp32."""
    return ((_shift(random_bits(keys, count), 40).float() + 0.5) * 2.0**-24).clamp_max(1 - 2.0**-24)  # the largest number would be rounded to 1


def normal(keys: Tensor, count: int) -> Tensor:
    """keys (B,) -> (B, count) from N(0, 1) in fp32, by the Box-Muller transform."""
    bits = random_bits(keys, (count + 1) // 2)
    radius = (((_shift(bits, 40).float() + 0.5) * 2.0**-24).log() * -2).sqrt()
    angle = (_shift(bits << 24, 40).float()) * (2 * math.pi * 2.0**-24)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count]
