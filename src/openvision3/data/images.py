"""Pictures in, pixels out, and back: the only place where pixel values are scaled.

Everything after this file is a tensor in [-1, 1]. `open_image` accepts what the web holds and either
returns an upright RGB picture or raises `ImageError` with a short `reason` that a run can count.
"""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 89_000_000
"""Larger pictures are refused from their header, before a pixel is decoded. Just under the size at which Pillow warns."""

PATCH = 16
"""Pixels a token spans in each direction: every height and width is a multiple of it."""

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")

# No EPS among them: Pillow would run Ghostscript on it.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels of the upright picture"""

ImageSource = str | os.PathLike | bytes | Image.Image


class ImageError(ValueError):
    """A picture that cannot be used. `reason` is one of a few short names, for counting."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):
        return type(self), (self.reason, str(self))  # so that it can leave a worker process


def open_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, draft: int = 0) -> Image.Image:
    """Decode a file, its bytes or a PIL picture to upright RGB.

    EXIF rotation is applied, alpha and palette transparency go over white, 16-bit and float values are scaled
    to 8 bits (Pillow alone would clip them), and of an animation the first frame is used. `draft` > 0 lets a
    JPEG decoder skip detail beyond that many pixels on the short side; the result is never smaller.

    Raises:
        ImageError: reason `missing`, `unreadable`, `empty`, `not an image`, `too large`, `truncated` or `undecodable`.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "the picture", max_pixels, 0)
    name = "the picture" if isinstance(source, bytes) else os.fspath(source)
    try:
        if not isinstance(source, bytes) and Path(source).is_dir():
            raise ImageError("not an image", f"{name} is a folder; name a picture in it, or use a glob such as {name}/*.jpg")
        if not (len(source) if isinstance(source, bytes) else os.path.getsize(source)):
            raise ImageError("empty", f"{name} holds 0 bytes")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS) as image:
            return _decode(image, name, max_pixels, draft)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError("missing", f"no such picture: {name}") from error
    except PermissionError as error:
        raise ImageError("unreadable", f"no permission to read {name}") from error
    except UnidentifiedImageError as error:
        raise ImageError("not an image", f"{name} is not a picture that can be read; legal are {', '.join(EXTENSIONS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too large", f"{name} has too many pixels; at most {max_pixels:,} are decoded, scale it down first") from error
    except Exception as error:  # Pillow's readers of damaged files let through KeyError, IndexError, struct.error and more
        raise ImageError("undecodable", f"{name} cannot be decoded: {error or type(error).__name__}") from error


def _decode(image: Image.Image, name: str, max_pixels: int, draft: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too large", f"{name} has {width} x {height} pixels; at most {max_pixels:,} are decoded, scale it down first")
    if width == 0 or height == 0:
        raise ImageError("undecodable", f"{name} is {width} x {height} pixels, which is empty")
    try:
        if draft and image.format == "JPEG" and min(width, height) > 2 * draft:
            # A JPEG draft keeps at least the size asked for.
            scale = draft / min(width, height)
            image.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))
        image.load()
        return _to_rgb(_upright(image))
    except Exception as error:  # see open_image
        reason = "truncated" if "truncated" in str(error).lower() or isinstance(error, EOFError) else "undecodable"
        raise ImageError(reason, f"{name} cannot be decoded: {error or type(error).__name__}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # only the EXIF block is damaged: the picture stays as it lies
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
        # Integers here are 16-bit or wider; floats come as 0..1, 0..255 or 0..65535, and only their values tell which.
        spans = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
        largest = values.max(initial=0)
        span = next((s for s in spans if largest <= s), largest)
        image = Image.fromarray((values / span * 255.0).clip(0, 255).round().astype(np.uint8))
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """One RGB picture -> (3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"), copy=True))
    return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """images (B, 3, H, W) in [-1, 1] -> the same as rounded uint8, the form in which every metric sees them."""
    return images.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(images: Tensor) -> list[Image.Image] | Image.Image:
    """images (B, 3, H, W) in [-1, 1] -> a list of PIL pictures; a single (3, H, W) -> one picture."""
    if images.ndim == 3:
        return to_pil(images[None])[0]  # type: ignore[index]
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images of shape {tuple(images.shape)} cannot become pictures; legal is (B, 3, H, W) or (3, H, W)")
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in to_uint8(images.detach().cpu())]


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """Bicubic with antialias (Pillow widens its filter when it shrinks a picture)."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


def center_square(image: Image.Image, size: int) -> Image.Image:
    """The central square, resized to size x size: how pictures of unlike shapes are evaluated together."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return resize(image.crop((left, top, left + side, top + side)), size, size)


def random_crop_box(width: int, height: int, generator: torch.Generator, area: tuple[float, float], aspect: tuple[float, float] = (3 / 4, 4 / 3)) -> Box:
    """A box (left, top, right, bottom) covering a random share `area` of the picture at a random aspect ratio.

    Ten tries, then the largest centred box of a legal aspect, as random resized crop is usually defined.
    """
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
    """Cut `box` and scale it to size x size with antialias."""
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def padded(length: int) -> int:
    """The smallest multiple of 16 that holds `length` pixels."""
    return math.ceil(length / PATCH) * PATCH


def fit(image: Image.Image, size: int | None) -> Image.Image:
    """Keep the aspect and scale the long side to `size` (None: leave the picture as it is)."""
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
            f"pad_to={target_height, target_width} does not fit a picture of {height, width}; "
            f"legal are multiples of {PATCH} that are at least {padded(height), padded(width)}"
        )
    extra = (0, target_width - width, 0, target_height - height)
    return torch.nn.functional.pad(image[None], extra, mode="replicate")[0] if any(extra) else image
