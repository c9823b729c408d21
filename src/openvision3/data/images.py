"""Decode images, and scale their pixels to [-1, 1] and back: the only place where pixel values are scaled.

`open_image` accepts whatever the web holds: it returns an upright RGB image, or raises `ImageError` with a short `reason` that a run can count.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError, features
from torch import Tensor

from openvision3.contents import holds

MAX_PIXELS = 89_000_000
"""larger images are refused by their header, before a pixel is decoded; just below the size at which Pillow warns"""

MAX_BYTES = 1 << 30
"""an image that needs more memory than this to be decoded whole is refused by its header; formats differ, see `_bytes_a_pixel`"""

STRIP_PIXELS = 4_000_000
"""pixels that are widened (to 64 bits, to alpha) at a time, so that a large image is never held whole in a wide form"""

_AVIF = features.check("avif")

JPEG_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".jif")

EXTENSIONS = (
    *JPEG_EXTENSIONS,
    *(".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
    *((".avif",) if _AVIF else ()),
)

UNREAD_EXTENSIONS = (
    *(".heic", ".heif", ".jp2", ".j2k", ".jpx", ".jxl", ".tga", ".svg", ".eps", ".psd", ".xcf", ".ico", ".dds", ".hdr", ".exr", ".qoi", ".pcx"),
    *(".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf"),
    *(() if _AVIF else (".avif",)),
)
"""extensions of images that are not read: files with one are reported as problems of the data"""

# EPS is left out: Pillow would run Ghostscript on it.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", *(("AVIF",) if _AVIF else ()))

# PNGs of some tools carry megabytes of text. Pillow refuses more than one; the text is not used, but it is no reason to refuse the image.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, 16 << 20)

logging.getLogger("PIL").addHandler(logging.NullHandler())  # Pillow's log goes where the user's logging sends it, not to the terminal

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels of the upright image"""

ImageSource = str | os.PathLike | bytes | Image.Image


class ImageError(ValueError):
    """An image that cannot be used. `reason` is one of a few short names, for counting."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def as_problem(self, key: str) -> dict[str, str]:
        return {"key": key, "reason": self.reason, "detail": str(self)}

    def __reduce__(self):
        return type(self), (self.reason, str(self))  # so that it can be pickled by a worker process


class _PillowWarnings(threading.local):
    """A warnings filter that ignores Pillow's warnings and records, for each thread, that there was one.

    Their texts contain numbers, so Python would show each of them: thousands of lines a day on data from the web.
    `warnings.catch_warnings` does not help: images are read in threads, and it changes the filters of all threads.
    """

    warned = False
    is_of_resource = False

    def match(self, module: str) -> bool:
        """Stands in for a compiled pattern of module names; Python calls it for each warning, after that of its text."""
        is_pillow = module.startswith("PIL.")
        self.warned = self.warned or (is_pillow and not self.is_of_resource)
        return is_pillow


class _Texts:
    """Stands in for a compiled pattern of texts. A ResourceWarning is about a file of elsewhere, and of whatever module runs when that is collected."""

    def match(self, text: str) -> bool:
        _pillow.is_of_resource = text.startswith(("unclosed ", "Implicitly cleaning up "))
        return True


_pillow = _PillowWarnings()
_FILTER = ("ignore", _Texts(), Warning, _pillow, 0)

DAMAGED = "damaged metadata (image used)"
"""the reason of images that are used although their EXIF or another block beside the pixels is damaged"""


def _ignore_warnings() -> None:
    """Put the filter first again, before each image: other code may have put filters in front of it. Warnings about earlier images are forgotten."""
    _pillow.warned = False
    filters: list = warnings.filters  # type: ignore[assignment]
    if not filters or filters[0] is not _FILTER:
        if _FILTER in filters:
            filters.remove(_FILTER)
        filters.insert(0, _FILTER)


def damage_seen() -> dict[str, str] | None:
    """The problem {reason, detail} of the last image that this thread read, if Pillow warned about it; the image can still be used."""
    warned, _pillow.warned = _pillow.warned, False
    return {"reason": DAMAGED, "detail": "its EXIF or another block beside the pixels is damaged"} if warned else None


def open_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a file, its bytes or a PIL image to upright RGB.

    EXIF rotation is applied, alpha and palette transparency go over white, 16-bit and float values are scaled
    to 8 bits (Pillow alone would clip them), and the first frame of an animation is used.

    Raises:
        ImageError: reason `missing`, `unreadable`, `empty`, `not an image`, `too large`, `truncated` or `undecodable`.
    """
    if isinstance(source, Image.Image):
        _ignore_warnings()
        return _decode(source, "the image", max_pixels)
    with opened(source, max_pixels) as (image, name):
        return _decode(image, name, max_pixels)


@contextlib.contextmanager
def opened(source: str | os.PathLike | bytes, max_pixels: int) -> Iterator[tuple[Image.Image, str]]:
    """Open an image and read its header -> (image, its name in messages). Raises ImageError."""
    name = "the image" if isinstance(source, bytes) else os.fspath(source)
    _ignore_warnings()
    try:
        if not isinstance(source, bytes) and Path(source).is_dir():
            raise ImageError("not an image", f"{name} is a folder; name an image in it, or use a glob such as {name}/*.jpg")
        if not (len(source) if isinstance(source, bytes) else os.path.getsize(source)):
            raise ImageError("empty", f"{name} holds 0 bytes")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS) as image:
            yield image, name
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError("missing", f"no such image: {name}") from error
    except PermissionError as error:
        raise ImageError("unreadable", f"no permission to read {name}") from error
    except UnidentifiedImageError as error:
        contents = holds(source)
        advice = "" if ":" in contents else f"; choose one of {', '.join(extension[1:] for extension in EXTENSIONS)}"
        raise ImageError("not an image", f"{name} {contents}{advice}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too large", f"{name} has too many pixels; at most {max_pixels:,} are decoded, scale it down first") from error
    except Exception as error:  # on damaged files Pillow raises KeyError, IndexError, struct.error and more
        raise ImageError("undecodable", f"{name} cannot be decoded: {error or type(error).__name__}") from error


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    check_pixels(image, name, max_pixels)
    check_memory(image, name, MAX_BYTES)
    with decoding(name):
        image.load()
        transposition = _TRANSPOSITIONS[orientation_of(image)]
        rgb = to_rgb(image)
        rgb.info.clear()  # its orientation no longer holds
        return rgb if transposition is None else rgb.transpose(transposition)


def check_pixels(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too large", f"{name} has {width} x {height} pixels; at most {max_pixels:,} are decoded, scale it down first")
    if width == 0 or height == 0:
        raise ImageError("undecodable", f"{name} is {width} x {height} pixels, which is empty")


def check_memory(image: Image.Image, name: str, most: int) -> None:
    needed = image.width * image.height * _bytes_a_pixel(image)
    if needed > most:
        what = f"{image.format}, {image.mode}, {image.width} x {image.height} pixels"
        raise ImageError("too large", f"{name} ({what}) needs {needed / 1e6:,.0f} MB to decode; at most {most / 1e6:,.0f} MB are allowed, scale it down first")


def _bytes_a_pixel(image: Image.Image) -> float:
    """Memory that Pillow needs to decode an image, per pixel (measured on images of 16 million pixels)."""
    own = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}.get(image.mode, 4)
    if image.format in ("JPEG", "MPO"):
        layers = [across * down for _, across, down, *_ in getattr(image, "layer", ())]
        # The coefficients of all pixels are kept at any scale; the size of the decoded image is checked after its scale is chosen.
        return 2 * sum(layers) / max(layers) if image.info.get("progressive") and layers else 0.0
    if image.format == "WEBP":
        return 12 + own  # the animation reader holds two canvases and a copy
    return 2 * own if image.format == "TIFF" else own  # a strip of a TIFF may be the whole image


@contextlib.contextmanager
def decoding(name: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # as in `opened`
        reason = "truncated" if "truncated" in str(error).lower() or isinstance(error, EOFError) else "undecodable"
        raise ImageError(reason, f"{name} cannot be decoded: {error or type(error).__name__}") from error


def to_rgb(image: Image.Image, box: Box | None = None) -> Image.Image:
    """Convert `box` of a decoded image (None: all of it) to RGB; equal to that box of the whole image in RGB."""
    span = _span(image)
    left, top, right, bottom = box or (0, 0, *image.size)
    rows = max(1, STRIP_PIXELS // (right - left))
    if bottom - top <= rows:
        return _widened(image.crop((left, top, right, bottom)), span)
    rgb = Image.new("RGB", (right - left, bottom - top))
    for start in range(top, bottom, rows):
        rgb.paste(_widened(image.crop((left, start, right, min(bottom, start + rows))), span), (0, start - top))
    return rgb


def _span(image: Image.Image) -> float:
    """The value of white. 16-bit modes define it; for wider integers and floats it is guessed from the largest value."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return 65535.0
    if image.mode not in ("I", "F"):
        return 255.0
    rows = max(1, STRIP_PIXELS // image.width)
    strips = (image.crop((0, top, image.width, min(image.height, top + rows))) for top in range(0, image.height, rows))
    largest = max(float(np.nan_to_num(np.asarray(strip), posinf=0.0, neginf=0.0).max(initial=0)) for strip in strips)
    spans = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    return next((s for s in spans if largest <= s), largest)


def _widened(image: Image.Image, span: float) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
        image = Image.fromarray((values / span * 255.0).clip(0, 255).round().astype(np.uint8))
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


def to_tensor(image: Image.Image | Tensor) -> Tensor:
    """One image, or uint8 (..., 3, H, W) -> (..., 3, H, W) float32 in [-1, 1]; equal to the last bit on every device."""
    pixels = image if isinstance(image, Tensor) else uint8_tensor(image)
    # Divide by a tensor: to divide by a Python number, a GPU multiplies by its reciprocal, which rounds differently.
    return pixels.float().div_(torch.full((), 127.5, device=pixels.device)).sub_(1.0)


def uint8_tensor(image: Image.Image) -> Tensor:
    """One image -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def from_uint8(pixels: Tensor) -> Image.Image:
    """uint8 (3, H, W) -> one PIL image."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def to_uint8(images: Tensor) -> Tensor:
    """images (B, 3, H, W) in [-1, 1] -> rounded uint8, the form that every metric takes."""
    return images.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(images: Tensor) -> list[Image.Image] | Image.Image:
    """images (B, 3, H, W) in [-1, 1] -> a list of PIL images; a single (3, H, W) -> one PIL image."""
    return pil_images(images[None])[0] if images.ndim == 3 else pil_images(images)


def pil_images(images: Tensor) -> list[Image.Image]:
    """images (B, 3, H, W) in [-1, 1] -> PIL images. Raises ValueError for other shapes and for whole numbers."""
    if not images.is_floating_point():
        raise ValueError(f"images of {images.dtype} cannot be used; pass floats in [-1, 1] (from 0..255: images / 127.5 - 1)")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images of shape {tuple(images.shape)} cannot become PIL images; pass (B, 3, H, W) or (3, H, W)")
    return [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in to_uint8(images.detach().cpu())]


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # only the EXIF block is damaged: the image is not turned
        return 1
    return int(orientation) if orientation in range(1, 9) else 1


_TRANSPOSITIONS = [None, None, *(Image.Transpose[name] for name in ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE"))]
_TRANSPOSITIONS += [Image.Transpose[name] for name in ("ROTATE_270", "TRANSVERSE", "ROTATE_90")]
"""by orientation: the transposition that makes the image upright"""
