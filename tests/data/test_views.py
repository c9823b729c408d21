"""Every view of an image, whole or cropped, shows the same upright image; none costs more memory than its limit; Pillow is quiet."""

import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from image_files import encoded
from PIL import Image, PngImagePlugin, features

from openvision3.data import crops, images
from openvision3.data.crops import random_view
from openvision3.data.images import ImageError, open_image
from openvision3.data.view import View

FORMATS = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "MPO": {"quality": 95, "subsampling": 0},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    **({"AVIF": {"quality": 100}} if features.check("avif") else {}),
}


def corners(width: int, height: int) -> Image.Image:
    """Black, with a red and a blue corner at the top: no turn or flip of it is itself."""
    image = Image.new("RGB", (width, height))
    image.paste((255, 0, 0), (0, 0, width // 2, height // 2))
    image.paste((0, 0, 255), (width // 2, 0, width, height // 2))
    return image


def view(data: bytes, size: int, seed: int) -> tuple[np.ndarray, images.Box]:
    pixels, box = random_view(data, size, torch.Generator().manual_seed(seed), View((0.3, 1.0)))
    return pixels.permute(1, 2, 0).numpy().astype(int), box


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("sides", [(96, 160), (160, 96), (64, 64)])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_training_view_is_a_part_of_the_image_that_evaluation_sees(kind, sides, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(corners(*sides), kind, exif=exif, **FORMATS[kind])
    upright = open_image(data)
    assert upright.size == (sides[::-1] if orientation >= 5 else sides)
    assert open_image(upright).size == upright.size, "what is upright is not turned again"
    for seed in range(3):
        pixels, box = view(data, 32, seed)
        assert 0 <= box[0] < box[2] <= upright.width
        assert 0 <= box[1] < box[3] <= upright.height
        assert np.abs(pixels - np.asarray(crops.crop_resized(upright, box, 32)).astype(int)).mean() < 3


def wide(mode: str) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (50, 40))
    if mode == "F":
        return Image.fromarray((values / 255).astype(np.float32))
    if mode == "I;16":
        return Image.fromarray((values * 257).astype(np.uint16))
    if mode == "I":
        return Image.fromarray((values * 200).astype(np.int32))
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 40, 4), np.uint8), "RGBA").convert(mode)


@pytest.mark.parametrize("mode", ["F", "I", "I;16", "RGBA", "LA", "P", "RGB", "L"])
def test_widening_a_part_or_in_strips_gives_the_pixels_of_the_whole(mode, monkeypatch):
    image = wide(mode)
    whole = np.asarray(images.to_rgb(image))
    monkeypatch.setattr(images, "STRIP_PIXELS", 90)
    assert (np.asarray(images.to_rgb(image)) == whole).all()
    assert (np.asarray(images.to_rgb(image, (3, 5, 31, 48))) == whole[5:48, 3:31]).all()


@pytest.mark.parametrize(("largest", "expected"), [(255, 1.0), (65535, 1.0), (100_000, 1.0)])
def test_wide_integers_are_scaled_by_their_values_as_floats_are(largest, expected):
    ramp = np.linspace(0, largest, 64).astype(np.int32).reshape(8, 8)
    shown = np.asarray(open_image(encoded(Image.fromarray(ramp), "TIFF")))[..., 0]
    assert np.abs(shown - np.linspace(0, 255, 64).reshape(8, 8)).max() <= 1


def test_sixteen_bits_that_are_dark_stay_dark():
    dark = Image.fromarray(np.full((8, 8), 200, np.uint16))
    for kind in ("PNG", "TIFF"):
        assert np.asarray(open_image(encoded(dark, kind))).max() <= 1
    assert np.asarray(open_image(b"P5 2 2 65535\n" + bytes((0, 200)) * 4)).max() <= 1


PEAK = """
import resource, sys, torch
from openvision3.data.crops import random_view
from openvision3.data.view import View
from openvision3.data.images import ImageError
data = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    random_view(data, 64, torch.Generator().manual_seed(0), View((0.4, 1.0)), 8)
except ImageError as error:
    print(error.reason, end=" ")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def peak(data: bytes) -> int:
    """MB that a training view takes on top of the process."""
    out = subprocess.run([sys.executable, "-c", PEAK], input=data, capture_output=True, check=True).stdout.decode()
    return int(out.split()[-1])


def grey_png(side: int, depth: int) -> bytes:
    """A black PNG of a few kB, whatever its side."""
    rows = zlib.compress(bytes(1 + side * depth // 8) * side, 1)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", side, side, depth, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks)


def test_an_image_of_a_few_kilobytes_takes_no_gigabytes():
    data = grey_png(5600, 16)  # 31 million pixels: widened whole to float64 and alpha they took 0.8 GB
    assert len(data) < 300_000
    assert peak(data) < 450
    with pytest.raises(ImageError, match="9400 x 9400"):
        random_view(grey_png(9400, 8), 64, torch.Generator(), View((0.4, 1.0)))


def test_a_large_jpeg_is_trained_on_where_it_is_decoded_small(monkeypatch):
    data = encoded(corners(400, 400), "JPEG")
    monkeypatch.setattr(crops, "TRAINING_PIXELS", 400 * 400 // 4)
    assert view(data, 32, 0)[0].shape == (32, 32, 3)
    for decoder in (crops.fast_decoder, lambda: None):
        monkeypatch.setattr(crops, "fast_decoder", decoder)
        with pytest.raises(ImageError, match="400 x 400 pixels"):
            view(data, 256, 0)


def test_a_png_with_megabytes_of_text_is_read():
    meta = PngImagePlugin.PngInfo()
    meta.add_text("workflow", "x" * 3_000_000, zip=True)
    data = encoded(corners(32, 32), "PNG", pnginfo=meta)
    assert (np.asarray(open_image(data)) == np.asarray(corners(32, 32))).all()
    assert view(data, 16, 0)[0].shape == (16, 16, 3)


def test_pillow_does_not_write_on_the_terminal(tmp_path):
    """Damaged EXIF and a bomb's header: in a fresh process, for pytest catches warnings itself."""
    (tmp_path / "exif.jpg").write_bytes(encoded(corners(32, 32), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x20\0\x12\x01\3\0\1\0\0\0"))
    (tmp_path / "bomb.png").write_bytes(grey_png(9500, 1))
    code = f"""
import torch
from pathlib import Path
from openvision3.data.crops import random_view
from openvision3.data.view import View
from openvision3.data.images import ImageError, open_image
for path in sorted(Path({str(tmp_path)!r}).iterdir()):
    for read in (open_image, lambda p: random_view(p, 16, torch.Generator(), View((0.4, 1.0)))):
        try:
            read(path)
        except ImageError as error:
            print(error.reason)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("too large\ntoo large\n", "")


@pytest.mark.parametrize(
    ("data", "seen"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<html>not found</html>", "web page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"<svg xmlns='x'/>", "SVG"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"no image", "'no image'; choose one of jpg"),
    ],
)
def test_what_lies_in_place_of_an_image_is_named(data, seen, tmp_path):
    (tmp_path / "x.jpg").write_bytes(data)
    for source in (data, tmp_path / "x.jpg"):
        with pytest.raises(ImageError, match=seen) as caught:
            open_image(source)
        assert caught.value.reason == "not an image"


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".jif", ".JPG"])
def test_every_ending_of_a_jpeg_is_read_alike(ending, tmp_path):
    (tmp_path / f"x{ending}").write_bytes(encoded(corners(64, 64), "JPEG"))
    assert ending.lower() in images.EXTENSIONS
    assert np.array_equal(view(tmp_path / f"x{ending}", 16, 0)[0], view(encoded(corners(64, 64), "JPEG"), 16, 0)[0])


@pytest.mark.parametrize(("kind", "options", "needed"), [("WEBP", {}, 16), ("TIFF", {}, 8), ("JPEG", {"progressive": True, "subsampling": 0}, 6)])
def test_an_image_that_takes_too_much_memory_to_decode_is_refused_from_its_header(kind, options, needed, monkeypatch):
    data = encoded(corners(64, 64), kind, **options)
    for decoder in (crops.fast_decoder, lambda: None):
        monkeypatch.setattr(crops, "fast_decoder", decoder)
        monkeypatch.setattr(crops, "FAST_PIXELS", 64 * 64 - 1)
        for module, limit, read in ((images, "MAX_BYTES", open_image), (crops, "TRAINING_BYTES", lambda data: view(data, 16, 0))):
            monkeypatch.setattr(module, limit, needed * 64 * 64)
            read(data)
            monkeypatch.setattr(module, limit, needed * 64 * 64 - 1)
            with pytest.raises(ImageError, match="MB to decode") as caught:
                read(data)
            assert caught.value.reason == "too large"


def damaged() -> bytes:
    return encoded(corners(32, 32), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x20\0\x12\x01\3\0\1\0\0\0")


def test_damaged_metadata_is_counted_and_silent_whatever_filters_stand_in_front(recwarn, capfd):
    images.damage_seen()
    for read in (open_image, lambda data: view(data, 16, 0)):
        read(damaged())
        assert images.damage_seen() == {"reason": images.DAMAGED, "detail": "its EXIF or another block beside the pixels is damaged"}
        read(encoded(corners(32, 32), "JPEG"))
        assert images.damage_seen() is None
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")
    with pytest.warns(UserWarning, match="not of Pillow"):
        warnings.warn("not of Pillow", stacklevel=1)


def test_training_evaluation_and_check_count_damaged_metadata_and_use_the_image(tmp_path):
    from openvision3.data.batches import evaluation_batches
    from openvision3.data.folders import FolderSource
    from openvision3.data.problems import Problems
    from openvision3.data.shards.check import check_folder

    (tmp_path / "a.jpg").write_bytes(damaged())
    (tmp_path / "a.txt").write_text("two corners")
    problems = Problems()
    (batch,) = evaluation_batches(FolderSource(tmp_path), 16, 4, problems)
    assert len(batch[0]) == 1
    assert [problem["reason"] for problem in problems] == [images.DAMAGED]
    assert [problem["reason"] for problem in check_folder(str(tmp_path), decode=True).problems] == [images.DAMAGED]


def test_a_file_of_elsewhere_that_is_collected_while_pillow_runs_is_no_damage_of_the_image():
    images._ignore_warnings()
    warnings.warn_explicit("unclosed file <_io.FileIO name='elsewhere'>", ResourceWarning, "Image.py", 1, module="PIL.Image")
    assert not images.damage_seen()
    warnings.warn_explicit("Corrupt EXIF data", UserWarning, "TiffImagePlugin.py", 1, module="PIL.TiffImagePlugin")
    assert images.damage_seen()


@pytest.mark.parametrize("decoder", ["simplejpeg", "Pillow"])
def test_an_orientation_is_read_alike_by_all_views_where_the_block_is_damaged_behind_it(decoder, monkeypatch):
    if decoder == "Pillow":
        monkeypatch.setattr(crops, "fast_decoder", lambda: None)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8769] = 6, "a maker", {0x9286: b"a comment"}
    whole = exif.tobytes()
    for keep in range(20, len(whole), 5):
        data = encoded(corners(120, 40), "JPEG", exif=whole[:keep])
        _, (_, _, right, bottom) = random_view(data, 16, torch.Generator().manual_seed(0), View((1.0, 1.0)))
        assert bottom <= open_image(data).height
        assert right <= open_image(data).width


def test_damage_is_said_of_the_image_that_has_it_and_not_of_the_next():
    damaged = encoded(corners(32, 32), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x20\0\x12\x01\3\0\1\0\0\0")
    open_image(damaged)
    assert images.damage_seen()
    open_image(damaged)
    open_image(encoded(corners(32, 32), "PNG"))
    assert images.damage_seen() is None
