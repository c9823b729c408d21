"""How well pictures are described: exact match and token F1 of written captions against the true ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from openvision3.evaluate.reconstruction import Result


def words(caption: str) -> list[str]:
    """Lower-case runs of letters and digits: "Man: light skin" and "man light skin" are the same words."""
    return re.findall(r"\w+", caption.lower())


def token_f1(written: str, true: str) -> float:
    """Harmonic mean of precision and recall over words, counted with repeats; 1 when both are empty."""
    a, b = Counter(words(written)), Counter(words(true))
    if not a and not b:
        return 1.0
    shared = sum((a & b).values())
    return 2 * shared / (sum(a.values()) + sum(b.values()))


def evaluate_captions(written: Sequence[str], true: Sequence[str]) -> Result:
    """Share of captions whose words are exactly the true ones in order, and mean token F1.

    Raises:
        ValueError: unlike counts, or none.
    """
    if not true or len(written) != len(true):
        raise ValueError(f"captions must be compared pair by pair; seen {len(written)} written and {len(true)} true")
    return {
        "exact_match": sum(words(a) == words(b) for a, b in zip(written, true, strict=True)) / len(true),
        "token_f1": sum(token_f1(a, b) for a, b in zip(written, true, strict=True)) / len(true),
        "count": len(true),
        "protocol": "one caption a picture, lower-case words",
    }
