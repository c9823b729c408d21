"""How an image becomes what the tower reads, and how many tokens that is: one square (LLaVA-1.5), or the whole and tiles of it (LLaVA-NeXT)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from openvision3.data.crops import PATCH, fit, resize
from openvision3.data.images import uint8_tensor

GRIDS = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
"""rows x columns of tiles: LLaVA-NeXT's image_grid_pinpoints, in their order, which decides for a small image that fits several alike. There they are
(width, height); transformers takes the same numbers for (height, width)."""
GREY = (127, 127, 127)
"""around an image that is padded to a square: the mean of the tower's pixels, as in LLaVA-1.5"""


@dataclass(frozen=True)
class ImageLayout:
    """`size` is the side of a square in pixels; with `anyres`, an image is squeezed into one and cut into up to four more."""

    size: int
    anyres: bool = False

    @property
    def pinpoints(self) -> list[list[int]]:
        """(height, width) of each grid in pixels, as transformers names them."""
        return [[rows * self.size, columns * self.size] for rows, columns in GRIDS]

    def squares(self, image: Image.Image) -> Tensor:
        """An upright RGB image -> uint8 (P, 3, size, size): P is 1, or 1 and the number of tiles."""
        if not self.anyres:
            return uint8_tensor(_centred(fit(image, self.size), self.size, self.size, GREY))[None]
        height, width = self._grid(image.width, image.height)
        scale = min(width / image.width, height / image.height)
        scaled = resize(image, min(math.ceil(image.height * scale), height), min(math.ceil(image.width * scale), width))
        large = uint8_tensor(_centred(scaled, height, width, (0, 0, 0)))
        tiles = large.unfold(1, self.size, self.size).unfold(2, self.size, self.size).permute(1, 2, 0, 3, 4).flatten(0, 1)
        return torch.cat([uint8_tensor(resize(image, self.size, self.size))[None], tiles])

    def tokens(self, width: int, height: int) -> int:
        """The number of tokens of an image of so many pixels in its conversation."""
        side = self.size // PATCH
        if not self.anyres:
            return side**2
        from transformers.models.llava_next.modeling_llava_next import unpad_image

        rows, columns = self._grid(width, height)
        _, rows, columns = unpad_image(torch.empty(1, rows // PATCH, columns // PATCH, device="meta"), (height, width)).shape
        return side**2 + rows * (columns + 1)  # each row of tiles ends with a token of its own

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        from transformers.image_processing_utils import select_best_resolution

        return select_best_resolution((height, width), self.pinpoints)


def _centred(image: Image.Image, height: int, width: int, colour: tuple[int, int, int]) -> Image.Image:
    canvas = Image.new("RGB", (width, height), colour)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas
