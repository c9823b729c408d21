"""Numbers as people read them: operations, bytes and hours."""

from __future__ import annotations

import math

FP32 = 4
"""bytes of a number"""


def flops(value: float) -> str:
    """2.06e12 -> 2.06 TFLOP."""
    power = min(5, max(0, math.floor(math.log10(value) / 3))) if value >= 1 else 0
    return f"{value / 1000**power:.4g} {('', 'k', 'M', 'G', 'T', 'P')[power]}FLOP"


def gigabytes(value: float) -> str:
    """Bytes as kB, MB, GB or TB."""
    if value < 1e5:
        return f"{value / 1e3:.1f} kB"
    return f"{value / 1e12:.2f} TB" if value >= 1e12 else f"{value / 1e9:.2f} GB" if value >= 1e7 else f"{value / 1e6:.2f} MB"


def hours(value: float) -> str:
    return f"{value * 60:.1f} min" if value < 1 else f"{value:.1f} h" if value < 100 else f"{value:,.0f} h ({value / 24:.1f} days)"
