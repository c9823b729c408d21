"""Whatever a file holds, `open_image` gives an upright RGB image or an ImageError with a reason; scaling to [-1, 1] loses nothing."""

import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from image_files import REASONS, encoded, picture, pixels
from PIL import Image

from openvision3.data.images import ImageError, open_image, to_pil, to_tensor


def reason(source, **options) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(source, **options)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# --- what the web holds -------------------------------------------------------------------------------------------------


def test_cmyk_jpeg_keeps_its_colours():
    red = Image.new("RGB", (16, 16), (200, 30, 30))
    got = pixels(open_image(encoded(red.convert("CMYK"), "JPEG", quality=95)))
    assert np.abs(got - (200, 30, 30)).max() <= 12


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, mode):
    values = np.linspace(0, 65535, 64).reshape(8, 8)
    if mode == "I;16B":
        image = Image.frombytes("I;16B", (8, 8), values.astype(">u2").tobytes())
    else:
        image = Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    image.save(tmp_path / "deep.tif")
    expected = np.round(values.astype(int) / 257)
    for source in (image, tmp_path / "deep.tif"):
        assert np.abs(pixels(open_image(source))[..., 0] - expected).max() <= 1


def test_sixteen_bit_png_in_grey_and_in_colour():
    grey = np.array([0, 32768, 65535], ">u2")
    assert pixels(open_image(png(3, 1, 16, 0, b"\0" + grey.tobytes())))[0, :, 0].tolist() == [0, 128, 255]
    colour = np.array([[0, 32768, 65535], [65535, 0, 32768]], ">u2")
    assert pixels(open_image(png(2, 1, 16, 2, b"\0" + colour.tobytes())))[0].tolist() == [[0, 128, 255], [255, 0, 128]]


@pytest.mark.parametrize("largest", [1.0, 255.0, 65535.0, 1e6])
def test_float_tiff_shows_its_range_whatever_its_scale(tmp_path, largest):
    Image.fromarray(np.linspace(0, largest, 5, dtype=np.float32)[None]).save(tmp_path / "f.tif")
    assert pixels(open_image(tmp_path / "f.tif"))[0, :, 0].tolist() == [0, 64, 128, 191, 255]


def test_float_tiff_with_nan_and_infinity_keeps_the_rest():
    image = Image.fromarray(np.array([[np.nan, np.inf, -np.inf, 0.0, 0.5, 1.0]], np.float32))
    assert pixels(open_image(image))[0, :, 0].tolist() == [0, 0, 0, 0, 128, 255]


@pytest.mark.parametrize(("mode", "clear"), [("RGBA", (10, 20, 30, 0)), ("LA", (10, 0))])
def test_what_is_transparent_becomes_white(mode, clear):
    image = Image.new(mode, (4, 4), clear)
    image.putpixel((1, 1), (0,) * (len(clear) - 1) + (255,))
    got = pixels(open_image(encoded(image, "PNG")))
    assert (got[1, 1] == 0).all()
    assert (got[0, 0] == 255).all()


def test_half_transparent_is_mixed_with_white():
    assert pixels(open_image(Image.new("RGBA", (1, 1), (255, 0, 0, 128))))[0, 0].tolist() == [255, 127, 127]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_palette_transparency_becomes_white(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 100, 100, 100])
    image.putpixel((1, 0), 1)
    assert pixels(open_image(encoded(image, "PNG", transparency=transparency)))[0].tolist() == [[9, 8, 7], [255, 255, 255]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "La", "RGBa", "RGBX", "YCbCr", "HSV", "CMYK"])
def test_every_mode_of_pillow_becomes_rgb(mode):
    black_or_dark = open_image(Image.new(mode, (3, 2)))
    assert black_or_dark.mode == "RGB"
    assert black_or_dark.size == (3, 2)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_rotation_is_applied(orientation):
    from PIL import ImageOps

    image = picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = open_image(encoded(image, "PNG", exif=exif))
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}[orientation]
    assert (pixels(got.transpose(Image.Transpose[undo])) == pixels(image)).all()
    assert ImageOps.exif_transpose(got).size == got.size, "it must not be turned twice"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\xff garbage", b"Exif\0\0neither byte order"])
def test_damaged_exif_does_not_cost_the_picture(exif):
    data = encoded(picture(), "PNG", exif=exif)
    assert (pixels(open_image(data)) == pixels(picture())).all()


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_of_an_animation_the_first_frame_is_used(kind, options):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue", "green")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert (pixels(open_image(data)) == (255, 0, 0)).all()


def test_one_pixel_is_a_picture():
    assert pixels(open_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"))).tolist() == [[[1, 2, 3]]]


# --- what must be refused -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000, 60_000])
def test_huge_pictures_are_refused_from_the_header(side, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("a pixel was decoded"))
    data = png(side, side, 8, 2, b"")
    assert len(data) < 200
    assert reason(data) == "too large"


def test_a_pixel_limit_can_be_lower():
    assert reason(encoded(picture(), "PNG"), max_pixels=40 * 24 - 1) == "too large"
    assert open_image(encoded(picture(), "PNG"), max_pixels=40 * 24).size == (40, 24)


def test_a_bomb_of_compressed_text_is_refused():
    text = b"zTXt"
    body = b"Comment\0\0" + zlib.compress(b" " * 20_000_000)
    chunk = struct.pack(">I", len(body)) + text + body + struct.pack(">I", zlib.crc32(text + body))
    assert reason(png(1, 1, 8, 2, b"\0\0\0\0", chunk)) == "undecodable"


@pytest.mark.parametrize(("kind", "keep"), [("JPEG", 0.6), ("PNG", 0.6), ("WEBP", 0.6), ("TIFF", 0.9)])
def test_a_truncated_picture_is_refused(kind, keep):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(noise, kind)
    assert reason(data[: int(len(data) * keep)]) in {"truncated", "undecodable", "not an image"}


def test_files_that_are_no_pictures_name_their_reason(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    assert reason(tmp_path / "empty.jpg") == "empty"
    assert reason(b"") == "empty"
    assert reason(tmp_path / "page.jpg") == "not an image"
    assert reason(tmp_path) == "not an image"
    assert reason(tmp_path / "none.jpg") == "missing"
    assert reason("nul\0byte.jpg") == "undecodable"


def test_a_picture_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    picture().save(tmp_path / "x.png")
    if os.geteuid():
        (tmp_path / "x.png").chmod(0)
    else:  # root may read everything

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Image, "open", refuse)
    assert reason(tmp_path / "x.png") == "unreadable"


def test_an_image_error_survives_the_way_out_of_a_worker():
    copy = pickle.loads(pickle.dumps(ImageError("too large", "x has 9 pixels")))
    assert (copy.reason, str(copy)) == ("too large", "x has 9 pixels")


def test_postscript_is_never_run():
    assert reason(encoded(picture(), "EPS")) == "not an image"


SEEDS = {
    "JPEG": encoded(picture(), "JPEG", exif=Image.Exif()),
    "PNG": encoded(picture().convert("P"), "PNG", transparency=3),
    "GIF": encoded(picture(), "GIF", save_all=True, append_images=[picture(seed=9)]),
    "WEBP": encoded(picture(), "WEBP"),
    "TIFF": encoded(picture(), "TIFF", compression="tiff_lzw"),
    "BMP": encoded(picture(), "BMP"),
    "PPM": encoded(picture(), "PPM"),
}


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=250, deadline=None)
@given(st.sampled_from(sorted(SEEDS)), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6), st.floats(0.02, 1))
def test_damaged_bytes_give_a_picture_or_an_image_error(kind, changes, keep):
    data = bytearray(SEEDS[kind])
    for where, value in changes:
        data[int(where * (len(data) - 1))] = value
    try:
        image = open_image(bytes(data[: max(1, int(len(data) * keep))]), max_pixels=1_000_000)
    except ImageError as error:
        assert error.reason in REASONS
    else:
        assert image.mode == "RGB"
        assert min(image.size) >= 1


# --- pixels in, pixels out ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12), st.just(3))))
def test_to_pil_of_to_tensor_is_the_picture_exactly(values):
    tensor = to_tensor(Image.fromarray(values))
    assert tensor.min() >= -1
    assert tensor.max() <= 1
    assert (np.asarray(to_pil(tensor)) == values).all()
    assert [(np.asarray(p) == values).all() for p in to_pil(torch.stack([tensor, tensor]))] == [True, True]


def test_black_is_minus_one_and_white_is_one():
    assert to_tensor(Image.new("RGB", (1, 1), "black")).flatten().tolist() == [-1.0] * 3
    assert to_tensor(Image.new("RGB", (1, 1), "white")).flatten().tolist() == [1.0] * 3


def test_values_beyond_the_range_are_clamped_not_wrapped():
    assert np.asarray(to_pil(torch.tensor([-9.0, 9.0, 0.0])[:, None, None])).flatten().tolist() == [0, 255, 128]


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4), (2, 1, 4, 4)])
def test_tensors_that_are_no_pictures_are_named(shape):
    with pytest.raises(ValueError, match=r"pass \(B, 3, H, W\)"):
        to_pil(torch.zeros(shape))
