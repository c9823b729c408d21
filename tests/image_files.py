"""Images for tests, as files have them."""

import io

import numpy as np
from PIL import Image

REASONS = {"missing", "unreadable", "empty", "not an image", "too large", "truncated", "undecodable"}
"""of an ImageError"""


def picture(width=40, height=24, seed=0) -> Image.Image:
    """Smooth colours, so that lossy formats keep them."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + y + seed) % 256]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)
