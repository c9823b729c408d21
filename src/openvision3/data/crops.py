"""Bring images to the size that a model takes: squares, random crops (decoded no larger than needed), and padding to whole tokens."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openvision3.data.images import (
    JPEG_EXTENSIONS,
    MAX_PIXELS,
    Box,
    ImageError,
    check_memory,
    check_pixels,
    decoding,
    from_uint8,
    opened,
    orientation_of,
    to_rgb,
)
from openvision3.data.view import View

PATCH = 16
"""pixels that a token spans in each direction: every height and width is a multiple of it"""

TRAINING_PIXELS = 40_000_000
"""most pixels that are decoded for a training view: 160 MB in each worker. A JPEG that is decoded at 1/2 has a quarter of its pixels."""

TRAINING_BYTES = 320 << 20
"""as images.MAX_BYTES, for a training view"""

FAST_PIXELS = 50_000_000
"""larger JPEGs are decoded by Pillow, which knows whether they are progressive; smaller ones never need more than TRAINING_BYTES"""


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """Bicubic with antialiasing (Pillow widens its filter to shrink an image)."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


def center_square(image: Image.Image, size: int) -> Image.Image:
    """The central square, resized to size x size."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return resize(image.crop((left, top, left + side, top + side)), size, size)


def adm_square(image: Image.Image, size: int) -> Image.Image:
    """The central square as cropped by guided diffusion's evaluation (Dhariwal and Nichol 2021), which published rFID and gFID on ImageNet use.

    Halved by a box filter while the short side is at least twice `size`, then bicubic down to `size`, then cropped to the centre.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if image.width * image.height * scale**2 > MAX_PIXELS:
        raise ImageError("too large", f"{image.width} x {image.height} pixels would become more than {MAX_PIXELS:,} at a short side of {size}")
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


CROPS = {"square": center_square, "adm": adm_square}
"""evaluation views: how an image becomes a square of a given size"""


def random_crop_box(width: int, height: int, generator: torch.Generator, area: tuple[float, float], aspect: tuple[float, float] = (3 / 4, 4 / 3)) -> Box:
    """A box (left, top, right, bottom) covering a random share `area` of the image at a random aspect ratio.

    After ten failed tries, the largest centred box within `aspect`, as in the usual random resized crop. An `area` of (1, 1) is the central square.
    """
    if area == (1.0, 1.0):
        side = min(width, height)
        return (width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2
    for _ in range(10):
        share, stretch, x, y = torch.rand(4, generator=generator).tolist()
        target = width * height * (area[0] + (area[1] - area[0]) * share)
        ratio = math.exp(math.log(aspect[0]) + (math.log(aspect[1]) - math.log(aspect[0])) * stretch)
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w = max(1, min(width, round(height * aspect[1])))
    h = max(1, min(height, round(width / aspect[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def crop_resized(image: Image.Image, box: Box, size: int) -> Image.Image:
    """Crop `box` and resize it to size x size with antialiasing."""
    return from_uint8(_resized(np.asarray(image.crop(box)), size))


def _resized(pixels: np.ndarray, size: int) -> Tensor:
    """uint8 (H, W, 3) -> uint8 (3, size, size): bicubic with antialiasing, equal to Pillow's to within rounding, in a third of the time."""
    planes = torch.from_numpy(np.require(pixels, requirements=("C", "W"))).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(planes, size=(size, size), mode="bicubic", antialias=True)[0]


def mirror_at_random(pixels: Tensor, generator: torch.Generator, probability: float) -> Tensor:
    """Pixels (..., W), mirrored left to right with this probability. A probability of 0 draws no random number: later draws stay as they were."""
    return pixels.flip(-1) if probability and torch.rand(1, generator=generator).item() < probability else pixels


def random_view(source: bytes | os.PathLike, size: int, generator: torch.Generator, view: View, min_side: int = 1) -> tuple[Tensor, Box]:
    """A random `view` of an image as uint8 (3, size, size), and the box of the upright image that it shows, mirrored or not.

    Raises:
        ImageError: as `open_image`, and `too small` for a side of less than `min_side` pixels.
    """
    pixels, box = _random_crop(source, size, generator, view.area, min_side)
    return mirror_at_random(pixels, generator, view.mirror), box


def _random_crop(source: bytes | os.PathLike, size: int, generator: torch.Generator, area: tuple[float, float], min_side: int) -> tuple[Tensor, Box]:
    """`random_view` before it is mirrored.

    The box is drawn on the full size in the header. A JPEG is then decoded at 1/8, 1/4 or 1/2 if the box still has `size`
    pixels on each side; its edges move outwards to whole pixels of that scale. simplejpeg decodes JPEGs if it is installed and
    supports them, otherwise Pillow does: boxes and errors are the same, pixels differ by rounding.
    """
    box: Box | None = None
    if not isinstance(source, bytes) and Path(source).suffix.lower() in JPEG_EXTENSIONS:
        with contextlib.suppress(OSError):  # Pillow, below, reports it
            source = Path(source).read_bytes()
    width, height, scale = 0, 0, 1
    if isinstance(source, bytes) and (plain := _plain_jpeg(source)):
        width, height = plain
        if min(width, height) >= min_side and width * height <= MAX_PIXELS:
            box, scale = _snapped(random_crop_box(width, height, generator, area), width, height, size)
            pixels = _decode_fast(source, width, height, scale) if width * height <= min(TRAINING_PIXELS * scale**2, FAST_PIXELS) else None
            if pixels is not None:
                left, top, right, bottom = _scaled(box, scale)
                return _resized(pixels[top:bottom, left:right], size), box
    with opened(source, MAX_PIXELS) as (image, name):
        check_pixels(image, name, MAX_PIXELS if image.format == "JPEG" else TRAINING_PIXELS)
        check_memory(image, name, TRAINING_BYTES)
        if min(image.size) < min_side:
            raise ImageError("too small", f"{image.width} x {image.height} pixels; at least {min_side} on each side are needed to train")
        if box and (width, height) != image.size:
            raise ImageError("undecodable", f"{name} cannot be decoded: its headers disagree about its size")
        with decoding(name):
            if image.format != "JPEG":
                image.load()  # loading a TIFF turns it upright: size and orientation are final only then
            orientation = 1 if box else orientation_of(image)
            width, height = image.size
            if box is None:
                upright = (height, width) if orientation >= 5 else (width, height)
                box = stored(random_crop_box(*upright, generator, area), *upright, orientation)
                if image.format == "JPEG":
                    box, scale = _snapped(box, width, height, size)
            if scale > 1:
                image.draft("RGB", (width // scale, height // scale))
                if image.size != (math.ceil(width / scale), math.ceil(height / scale)):
                    scale = 1  # not every JPEG can be decoded smaller
            check_pixels(image, name, TRAINING_PIXELS)
            image.load()
            pixels = np.asarray(to_rgb(image, _scaled(box, scale)))
    return _turned(_resized(pixels, size), orientation), upright_box(box, width, height, orientation)


def _snapped(box: Box, width: int, height: int, size: int) -> tuple[Box, int]:
    """The box on whole pixels of the scale it is decoded at, and that scale: one decoded pixel for 1, 2, 4 or 8 of the image.

    A last decoded row or column that lies only partly in the image is left out; at least `size` of them remain.
    """
    left, top, right, bottom = box
    scale = next((s for s in (8, 4, 2) if min(right - left, bottom - top) >= s * size), 1)
    right, bottom = min(width // scale, -(-right // scale)), min(height // scale, -(-bottom // scale))
    return (left // scale * scale, top // scale * scale, right * scale, bottom * scale), scale


def _scaled(box: Box, scale: int) -> Box:
    left, top, right, bottom = (edge // scale for edge in box)
    return left, top, right, bottom


def _flips(orientation: int) -> tuple[bool, bool, bool]:
    """From the file to the upright image: (swap rows and columns, then flip left and right, then flip top and bottom)."""
    return orientation >= 5, orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)


def _turned(pixels: Tensor, orientation: int) -> Tensor:
    swap, across, down = _flips(orientation)
    pixels = pixels.transpose(1, 2) if swap else pixels
    dimensions = [dimension for dimension, wanted in ((2, across), (1, down)) if wanted]
    return pixels.flip(dimensions) if dimensions else pixels


def stored(box: Box, width: int, height: int, orientation: int) -> Box:
    """A box of an upright image of this width and height -> the box in its file."""
    swap, across, down = _flips(orientation)
    left, top, right, bottom = box
    left, right = (width - right, width - left) if across else (left, right)
    top, bottom = (height - bottom, height - top) if down else (top, bottom)
    return (top, left, bottom, right) if swap else (left, top, right, bottom)


def upright_box(box: Box, width: int, height: int, orientation: int) -> Box:
    """A box of a file of this width and height -> the box in the upright image."""
    swap, across, down = _flips(orientation)
    left, top, right, bottom = box
    if swap:
        left, top, right, bottom, width, height = top, left, bottom, right, height, width
    left, right = (width - right, width - left) if across else (left, right)
    top, bottom = (height - bottom, height - top) if down else (top, bottom)
    return left, top, right, bottom


@functools.cache
def fast_decoder() -> ModuleType | None:
    """simplejpeg, or None if it is not installed (the extra `fast`)."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG that the fast decoder reads as Pillow does: grey or YCbCr, without EXIF; None for any other."""
    decoder = fast_decoder()
    if decoder is None or data[:2] != b"\xff\xd8":
        return None
    place = 2
    while True:  # the segments before the image data
        marker = data[place + 1] if data[place : place + 1] == b"\xff" and place + 4 <= len(data) else 0
        if marker == 0xFF:  # a fill byte
            place += 1
        elif marker == 0xDA:
            break
        elif marker < 0xC0 or 0xD0 <= marker <= 0xD8 or marker == 0xE1:  # EXIF or XMP, or no valid segment: left to Pillow
            return None
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    try:
        height, width, colours, _ = decoder.decode_jpeg_header(data)
    except ValueError:
        return None
    return (width, height) if colours in ("YCbCr", "Gray") else None


def _decode_fast(data: bytes, width: int, height: int, scale: int) -> np.ndarray | None:
    """(H, W, 3); None if something is wrong, which Pillow then reports."""
    decoder = fast_decoder()
    assert decoder is not None
    wanted = (math.ceil(height / scale), math.ceil(width / scale))
    smallest = {"min_height": wanted[0], "min_width": wanted[1], "min_factor": scale} if scale > 1 else {}
    try:
        pixels = decoder.decode_jpeg(data, **smallest)
    except ValueError:
        return None
    return pixels if pixels.shape[:2] == wanted else None


def check_size(size: int) -> None:
    """Raises ValueError for an image side that is not a whole number of tokens."""
    if size < PATCH or size % PATCH:
        raise ValueError(f"size {size} must be a multiple of {PATCH}, such as {max(PATCH, round(size / PATCH) * PATCH)}")


def padded(length: int) -> int:
    """The smallest multiple of 16 that holds `length` pixels."""
    return math.ceil(length / PATCH) * PATCH


def fit(image: Image.Image, size: int | None) -> Image.Image:
    """Scale the long side to `size` and keep the aspect ratio (None: return the image unchanged)."""
    if size is None:
        return image
    scale = size / max(image.size)
    return resize(image, max(1, round(image.height * scale)), max(1, round(image.width * scale)))


def pad(image: Tensor, pad_to: tuple[int, int] | None = None) -> Tensor:
    """Pad (3, H, W) at the bottom and right to multiples of 16, or to `pad_to`, by repeating the last row and column."""
    height, width = image.shape[-2:]
    target_height, target_width = pad_to or (padded(height), padded(width))
    if target_height % PATCH or target_width % PATCH or target_height < height or target_width < width:
        raise ValueError(
            f"pad_to={target_height, target_width} does not fit an image of {height, width}; "
            f"choose multiples of {PATCH} of at least {padded(height), padded(width)}"
        )
    extra = (0, target_width - width, 0, target_height - height)
    return torch.nn.functional.pad(image[None], extra, mode="replicate")[0] if any(extra) else image
