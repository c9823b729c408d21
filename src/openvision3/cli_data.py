"""The verbs of `openvision3 data`: what is done to pictures with words before a run."""

from __future__ import annotations

from collections.abc import Callable

VERBS: dict[str, Callable[..., int]] = {}
