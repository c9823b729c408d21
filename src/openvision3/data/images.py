"""Pictures in, pixels out, and back: the only place where pixel values are scaled.

Everything after this file is a tensor in [-1, 1]. `open_image` accepts what the web holds and either
returns an upright RGB picture or raises `ImageError` with a short `reason` that a run can count.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError, features
from torch import Tensor

from openvision3.contents import holds

MAX_PIXELS = 89_000_000
"""Larger images are refused from their header, before a pixel is decoded. Just under the size at which Pillow warns."""

TRAINING_PIXELS = 40_000_000
"""What a training view may decode, for every worker holds its own: 160 MB at four bytes a pixel. A JPEG that is decoded at 1/2 has a quarter of its pixels."""

MAX_BYTES = 1 << 30
"""An image that takes more memory than this while it is decoded whole is refused from its header: formats differ, see `_bytes_a_pixel`."""

TRAINING_BYTES = 320 << 20
"""As MAX_BYTES, for a training view."""

STRIP_PIXELS = 4_000_000
"""Pixels that are widened (to 64 bits, to alpha) at a time, so that a large image is never whole in a wide form."""

FAST_PIXELS = 50_000_000
"""Larger JPEGs are left to Pillow, which says whether they are progressive: below, none of them takes more than TRAINING_BYTES."""

PATCH = 16
"""Pixels a token spans in each direction: every height and width is a multiple of it."""

_AVIF = features.check("avif")

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
    *((".avif",) if _AVIF else ()),
)

UNREAD_EXTENSIONS = (
    *(".heic", ".heif", ".jp2", ".j2k", ".jpx", ".jxl", ".tga", ".svg", ".eps", ".psd", ".xcf", ".ico", ".dds", ".hdr", ".exr", ".qoi", ".pcx"),
    *(".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf"),
    *(() if _AVIF else (".avif",)),
)
"""Endings of images that are not read: where they lie among data they are counted and told of."""

# No EPS among them: Pillow would run Ghostscript on it.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", *(("AVIF",) if _AVIF else ()))

# A PNG of a workflow tool carries megabytes of text, which Pillow refuses beyond one: it is not wanted, but no reason to refuse the image.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, 16 << 20)

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what Pillow logs goes where the user's logging sends it, not to the terminal

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


class _PillowWarnings(threading.local):
    """A filter of `warnings` that ignores those of Pillow and remembers, for each thread, that there was one.

    They have numbers in their text, so that Python shows each anew: thousands of lines a day on data from the web.
    `warnings.catch_warnings` is of no use here: images are read in threads, and it changes what other threads do with their warnings.
    """

    seen = False

    def match(self, module: str) -> bool:
        """As a compiled pattern of module names would; Python calls it for each warning."""
        is_pillow = module.startswith("PIL.")
        self.seen = self.seen or is_pillow
        return is_pillow


_pillow = _PillowWarnings()
_FILTER = ("ignore", None, Warning, _pillow, 0)

DAMAGED = "damaged metadata (image used)"
"""the reason by which images are counted that are read although their EXIF or another block beside the pixels is damaged"""


def _ignore_warnings() -> None:
    """Done at each image, for others put filters in front: Pillow's own warnings never reach the terminal. What it said of earlier images is forgotten."""
    _pillow.seen = False
    filters: list = warnings.filters  # type: ignore[assignment]
    if not filters or filters[0] is not _FILTER:
        if _FILTER in filters:
            filters.remove(_FILTER)
        filters.insert(0, _FILTER)


def damage_seen() -> dict[str, str] | None:
    """Reason and detail of a problem where Pillow has warned of the last image that this thread has read; it may be used all the same."""
    seen, _pillow.seen = _pillow.seen, False
    return {"reason": DAMAGED, "detail": "its EXIF or another block beside the pixels is damaged"} if seen else None


def open_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a file, its bytes or a PIL picture to upright RGB.

    EXIF rotation is applied, alpha and palette transparency go over white, 16-bit and float values are scaled
    to 8 bits (Pillow alone would clip them), and of an animation the first frame is used.

    Raises:
        ImageError: reason `missing`, `unreadable`, `empty`, `not an image`, `too large`, `truncated` or `undecodable`.
    """
    if isinstance(source, Image.Image):
        _ignore_warnings()
        return _decode(source, "the picture", max_pixels)
    with _opened(source, max_pixels) as (image, name):
        return _decode(image, name, max_pixels)


@contextlib.contextmanager
def _opened(source: str | os.PathLike | bytes, max_pixels: int) -> Iterator[tuple[Image.Image, str]]:
    """(the picture of which the header has been read, its name in messages). Raises ImageError."""
    name = "the picture" if isinstance(source, bytes) else os.fspath(source)
    _ignore_warnings()
    try:
        if not isinstance(source, bytes) and Path(source).is_dir():
            raise ImageError("not an image", f"{name} is a folder; name a picture in it, or use a glob such as {name}/*.jpg")
        if not (len(source) if isinstance(source, bytes) else os.path.getsize(source)):
            raise ImageError("empty", f"{name} holds 0 bytes")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS) as image:
            yield image, name
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError("missing", f"no such picture: {name}") from error
    except PermissionError as error:
        raise ImageError("unreadable", f"no permission to read {name}") from error
    except UnidentifiedImageError as error:
        seen = holds(source)
        advice = "" if ":" in seen else f"; choose one of {', '.join(extension[1:] for extension in EXTENSIONS)}"
        raise ImageError("not an image", f"{name} {seen}{advice}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too large", f"{name} has too many pixels; at most {max_pixels:,} are decoded, scale it down first") from error
    except Exception as error:  # Pillow's readers of damaged files let through KeyError, IndexError, struct.error and more
        raise ImageError("undecodable", f"{name} cannot be decoded: {error or type(error).__name__}") from error


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _check_size(image, name, max_pixels)
    _check_bytes(image, name, MAX_BYTES)
    with _decoding(name):
        image.load()
        turned = _TRANSPOSITIONS[_orientation(image)]
        rgb = _to_rgb(image)
        rgb.info.clear()  # how the file lies is no longer true of these pixels
        return rgb if turned is None else rgb.transpose(turned)


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too large", f"{name} has {width} x {height} pixels; at most {max_pixels:,} are decoded, scale it down first")
    if width == 0 or height == 0:
        raise ImageError("undecodable", f"{name} is {width} x {height} pixels, which is empty")


def _check_bytes(image: Image.Image, name: str, most: int) -> None:
    needed = image.width * image.height * _bytes_a_pixel(image)
    if needed > most:
        what = f"{image.format}, {image.mode}, {image.width} x {image.height} pixels"
        raise ImageError("too large", f"{name} ({what}) takes {needed / 1e6:,.0f} MB to decode; at most {most / 1e6:,.0f} MB are given, scale it down first")


def _bytes_a_pixel(image: Image.Image) -> float:
    """Memory that Pillow takes to decode an image, for each pixel of it (measured on images of 16 million pixels)."""
    own = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}.get(image.mode, 4)
    if image.format in ("JPEG", "MPO"):
        layers = [across * down for _, across, down, *_ in getattr(image, "layer", ())]
        # The coefficients of all pixels are kept, at whichever scale they are decoded; where the image itself is decoded small, that is checked later.
        return 2 * sum(layers) / max(layers) if image.info.get("progressive") and layers else 0.0
    if image.format == "WEBP":
        return 12 + own  # two canvases of its reader of animations, and a copy
    return 2 * own if image.format == "TIFF" else own  # a strip of a TIFF may be all of it


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # see _opened
        reason = "truncated" if "truncated" in str(error).lower() or isinstance(error, EOFError) else "undecodable"
        raise ImageError(reason, f"{name} cannot be decoded: {error or type(error).__name__}") from error


def _to_rgb(image: Image.Image, box: Box | None = None) -> Image.Image:
    """RGB of a part of a decoded image (None: of all), the same as that part of the whole would be."""
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
    """What is white in an image of more than 8 bits. 16 bits say so themselves; of wider integers and floats only their values tell."""
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
    """One RGB picture, or uint8 (..., 3, H, W) -> (..., 3, H, W) float32 in [-1, 1]; the same numbers on every device, to the last bit."""
    pixels = image if isinstance(image, Tensor) else uint8_tensor(image)
    # Divided by a tensor: a GPU multiplies by the reciprocal of a number instead, which rounds otherwise.
    return pixels.float().div_(torch.full((), 127.5, device=pixels.device)).sub_(1.0)


def uint8_tensor(image: Image.Image) -> Tensor:
    """One picture -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def from_uint8(pixels: Tensor) -> Image.Image:
    """uint8 (3, H, W) -> a picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def to_uint8(images: Tensor) -> Tensor:
    """images (B, 3, H, W) in [-1, 1] -> the same as rounded uint8, the form in which every metric sees them."""
    return images.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(images: Tensor) -> list[Image.Image] | Image.Image:
    """images (B, 3, H, W) in [-1, 1] -> a list of PIL pictures; a single (3, H, W) -> one picture."""
    if images.ndim == 3:
        return to_pil(images[None])[0]  # type: ignore[index]
    if not images.is_floating_point():
        raise ValueError(f"images of {images.dtype} cannot be used; legal is [-1, 1] in floats (for 0..255: images / 127.5 - 1)")
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


def adm_square(image: Image.Image, size: int) -> Image.Image:
    """The central square as guided diffusion's evaluation cuts it (Dhariwal and Nichol 2021), by which rFID and gFID on ImageNet are published.

    Halved by a box filter while the short side is at least twice `size`, then bicubic until it is `size`, then the centre.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if image.width * image.height * scale**2 > MAX_PIXELS:
        raise ImageError("too large", f"{image.width} x {image.height} pixels become more than {MAX_PIXELS:,} with a short side of {size}")
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


CROPS = {"square": center_square, "adm": adm_square}
"""How a picture becomes a square of a given size where it is evaluated."""


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
    return from_uint8(_resized(np.asarray(image.crop(box)), size))


def _resized(pixels: np.ndarray, size: int) -> Tensor:
    """uint8 (H, W, 3) -> uint8 (3, size, size): bicubic with antialias as in Pillow, to within rounding, in a third of the time."""
    planes = torch.from_numpy(np.require(pixels, requirements=("C", "W"))).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(planes, size=(size, size), mode="bicubic", antialias=True)[0]


def random_view(source: bytes | os.PathLike, size: int, generator: torch.Generator, area: tuple[float, float], min_side: int = 1) -> tuple[Tensor, Box]:
    """A random crop of a picture as uint8 (3, size, size), and which box of the upright picture it shows.

    The box is drawn on the full size from the header. A JPEG is then decoded at 1/8, 1/4 or 1/2 where the box still has `size`
    pixels on each side; its edges move outwards to whole pixels of that scale. JPEGs are decoded by simplejpeg where it is
    installed and can, otherwise by Pillow: the same boxes and refusals, and pixels that differ by rounding.

    Raises:
        ImageError: as `open_image`, and `too small` for a side of less than `min_side` pixels.
    """
    box: Box | None = None
    if not isinstance(source, bytes) and Path(source).suffix.lower() in (".jpg", ".jpeg", ".jpe", ".jfif", ".jif"):
        with contextlib.suppress(OSError):  # Pillow, below, says what is wrong
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
    with _opened(source, MAX_PIXELS) as (image, name):
        _check_size(image, name, MAX_PIXELS if image.format == "JPEG" else TRAINING_PIXELS)
        _check_bytes(image, name, TRAINING_BYTES)
        if min(image.size) < min_side:
            raise ImageError("too small", f"{image.width} x {image.height} pixels; at least {min_side} on each side are needed to train")
        if box and (width, height) != image.size:
            raise ImageError("undecodable", f"{name} cannot be decoded: its headers disagree about its size")
        with _decoding(name):
            if image.format != "JPEG":
                image.load()  # a TIFF turns upright while it is loaded: only then its size, and how it lies, are what they will be
            orientation = 1 if box else _orientation(image)
            width, height = image.size
            if box is None:
                upright = (height, width) if orientation >= 5 else (width, height)
                box = stored(random_crop_box(*upright, generator, area), *upright, orientation)
                if image.format == "JPEG":
                    box, scale = _snapped(box, width, height, size)
            if scale > 1:
                image.draft("RGB", (width // scale, height // scale))
                if image.size != (math.ceil(width / scale), math.ceil(height / scale)):
                    scale = 1  # not every JPEG can be
            _check_size(image, name, TRAINING_PIXELS)
            image.load()
            pixels = np.asarray(_to_rgb(image, _scaled(box, scale)))
    return _turned(_resized(pixels, size), orientation), upright_box(box, width, height, orientation)


def _snapped(box: Box, width: int, height: int, size: int) -> tuple[Box, int]:
    """The box on whole pixels of the scale it is decoded at, and that scale: 1, 2, 4 or 8 pixels of the picture for one.

    A last row or column of the decoder that is only partly in the picture is left out; `size` of them remain all the same.
    """
    left, top, right, bottom = box
    scale = next((s for s in (8, 4, 2) if min(right - left, bottom - top) >= s * size), 1)
    right, bottom = min(width // scale, -(-right // scale)), min(height // scale, -(-bottom // scale))
    return (left // scale * scale, top // scale * scale, right * scale, bottom * scale), scale


def _scaled(box: Box, scale: int) -> Box:
    left, top, right, bottom = (edge // scale for edge in box)
    return left, top, right, bottom


def _orientation(image: Image.Image) -> int:
    """1 to 8 as EXIF counts: how the picture lies in its file."""
    try:
        found = image.getexif().get(0x0112, 1)
    except Exception:  # only the EXIF block is damaged: the picture stays as it lies
        return 1
    return int(found) if found in range(1, 9) else 1


_TRANSPOSITIONS = [None, None, *(Image.Transpose[name] for name in ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE"))]
_TRANSPOSITIONS += [Image.Transpose[name] for name in ("ROTATE_270", "TRANSVERSE", "ROTATE_90")]
"""By orientation: what makes the image upright."""


def _flips(orientation: int) -> tuple[bool, bool, bool]:
    """(rows and columns change places, then left and right do, then top and bottom do) from the file to the upright picture."""
    return orientation >= 5, orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)


def _turned(pixels: Tensor, orientation: int) -> Tensor:
    swap, across, down = _flips(orientation)
    pixels = pixels.transpose(1, 2) if swap else pixels
    dimensions = [dimension for dimension, wanted in ((2, across), (1, down)) if wanted]
    return pixels.flip(dimensions) if dimensions else pixels


def stored(box: Box, width: int, height: int, orientation: int) -> Box:
    """A box of the upright picture of this width and height -> where it lies in the file."""
    swap, across, down = _flips(orientation)
    left, top, right, bottom = box
    left, right = (width - right, width - left) if across else (left, right)
    top, bottom = (height - bottom, height - top) if down else (top, bottom)
    return (top, left, bottom, right) if swap else (left, top, right, bottom)


def upright_box(box: Box, width: int, height: int, orientation: int) -> Box:
    """A box of the file, whose picture has this width and height -> where it lies in the upright picture."""
    swap, across, down = _flips(orientation)
    left, top, right, bottom = box
    if swap:
        left, top, right, bottom, width, height = top, left, bottom, right, height, width
    left, right = (width - right, width - left) if across else (left, right)
    top, bottom = (height - bottom, height - top) if down else (top, bottom)
    return left, top, right, bottom


@functools.cache
def fast_decoder() -> ModuleType | None:
    """simplejpeg, where it is installed (the extra `fast`)."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG that the fast decoder reads as Pillow does: grey or YCbCr, and without a word on how it lies."""
    decoder = fast_decoder()
    if decoder is None or data[:2] != b"\xff\xd8":
        return None
    place = 2
    while True:  # the segments before the image itself
        marker = data[place + 1] if data[place : place + 1] == b"\xff" and place + 4 <= len(data) else 0
        if marker == 0xFF:  # a byte that fills
            place += 1
        elif marker == 0xDA:
            break
        elif marker < 0xC0 or 0xD0 <= marker <= 0xD8 or marker == 0xE1:  # EXIF or XMP, or no segment at all: Pillow looks into it
            return None
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    try:
        height, width, colours, _ = decoder.decode_jpeg_header(data)
    except ValueError:
        return None
    return (width, height) if colours in ("YCbCr", "Gray") else None


def _decode_fast(data: bytes, width: int, height: int, scale: int) -> np.ndarray | None:
    """(H, W, 3); None where something is wrong, for Pillow to say what."""
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
    """Raises ValueError for a side of pictures that tokens do not fill."""
    if size < PATCH or size % PATCH:
        raise ValueError(f"size {size} must be a multiple of {PATCH}, such as {max(PATCH, round(size / PATCH) * PATCH)}")


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
