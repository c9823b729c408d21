"""What a random training view of an image is. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    """How a training view is drawn from an image. The fields of configs that describe it are called `crop_area` and `mirror`.

    Raises:
        ValueError: numbers that are no shares.
    """

    area: tuple[float, float] = (0.4, 1.0)
    """smallest and largest share of the image that it shows; (1, 1): the central square"""
    mirror: float = 0.0
    """the probability that left and right are exchanged"""

    def __post_init__(self):
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"crop_area {self.area} must be two shares with 0 < first <= second <= 1")
        if not 0 <= self.mirror <= 1:
            raise ValueError(f"mirror {self.mirror} must be a probability from 0 (never) to 1 (always)")
