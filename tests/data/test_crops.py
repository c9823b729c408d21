"""Squares, random crops and padded images keep what they show; a random view is decoded small, and alike by both decoders."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import REASONS, encoded, picture, pixels
from PIL import Image

from openvision3.data import crops, images
from openvision3.data.images import ImageError, open_image, to_tensor
from openvision3.data.view import View


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 2**31), st.sampled_from([(0.4, 1.0), (0.05, 0.1), (1.0, 1.0)]))
def test_a_random_crop_lies_inside_the_picture(width, height, seed, area):
    left, top, right, bottom = crops.random_crop_box(width, height, torch.Generator().manual_seed(seed), area)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_random_crops_cover_the_shares_asked_for():
    generator = torch.Generator().manual_seed(0)
    boxes = [crops.random_crop_box(400, 400, generator, (0.2, 0.6)) for _ in range(300)]
    shares = [(r - l) * (b - t) / 160_000 for l, t, r, b in boxes]  # noqa: E741
    assert 0.19 < min(shares) < 0.25
    assert 0.55 < max(shares) < 0.61
    assert len({box[:2] for box in boxes}) > 200


def test_a_crop_keeps_what_it_cuts_out():
    image = picture(64, 64)
    assert (pixels(crops.crop_resized(image, (8, 16, 24, 32), 16)) == pixels(image.crop((8, 16, 24, 32)))).all()


def test_center_square_is_the_middle():
    image = Image.new("RGB", (90, 30), "white")
    image.paste("red", (30, 0, 60, 30))
    assert (pixels(crops.center_square(image, 10)) == (255, 0, 0)).all()


@given(st.integers(1, 100_000))
def test_padded_is_the_smallest_multiple_of_16_that_holds_it(length):
    assert crops.padded(length) % 16 == 0
    assert length <= crops.padded(length) < length + 16


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64))
def test_fit_makes_the_long_side_the_size_and_keeps_the_aspect(width, height, size):
    got = crops.fit(Image.new("RGB", (width, height)), size)
    assert max(got.size) == size
    assert abs(min(got.size) - size * min(width, height) / max(width, height)) <= 1
    assert crops.fit(got, None) is got


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_pad_keeps_the_picture_at_the_top_left_and_repeats_its_edge(height, width):
    image = torch.rand(3, height, width)
    got = crops.pad(image)
    assert got.shape == (3, crops.padded(height), crops.padded(width))
    assert torch.equal(got[:, :height, :width], image)
    assert torch.equal(got[:, :height, -1], image[:, :, -1])
    assert torch.equal(got[:, -1, :width], image[:, -1])


@pytest.mark.parametrize("pad_to", [(16, 16), (33, 48), (48, 40)])
def test_pad_to_a_grid_that_does_not_fit_says_what_to_choose(pad_to):
    with pytest.raises(ValueError, match="multiples of 16 of at least"):
        crops.pad(torch.zeros(3, 20, 40), pad_to)
    assert crops.pad(torch.zeros(3, 20, 40), (64, 48)).shape == (3, 64, 48)


# --- random views: scaled decoding, either decoder ------------------------------------------------------------------------


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(request, monkeypatch):
    """Every test that takes this runs with each decoder."""
    if request.param == "Pillow":
        monkeypatch.setattr(crops, "fast_decoder", lambda: None)
    else:
        pytest.importorskip("simplejpeg")
    return request.param


def view(data, size=32, seed=0, area=(0.4, 1.0), mirror=0.0, **options):
    return crops.random_view(data, size, torch.Generator().manual_seed(seed), View(area, mirror), **options)


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """Broad shapes, as photographs have them: JPEG keeps them at every scale."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@settings(deadline=None, max_examples=60)
@given(st.integers(8, 700), st.integers(8, 700), st.integers(0, 10_000), st.sampled_from([16, 32, 64]), st.sampled_from([(0.4, 1.0), (0.05, 0.2), (1.0, 1.0)]))
def test_both_decoders_draw_the_same_box_and_nearly_the_same_pixels(width, height, seed, size, area):
    pytest.importorskip("simplejpeg")
    data = encoded(smooth(width, height, seed), "JPEG", quality=90, subsampling=seed % 3)
    fast, box = view(data, size, seed, area)
    kept = crops.fast_decoder
    crops.fast_decoder = lambda: None
    try:
        slow, other = view(data, size, seed, area)
    finally:
        crops.fast_decoder = kept
    assert box == other
    difference = (fast.int() - slow.int()).abs()
    assert difference.max() <= 3
    assert difference.float().mean() < 0.5


def test_a_view_is_decoded_small_but_never_smaller_than_it_is_shown(decoder, monkeypatch):
    seen = []
    resized = crops._resized
    monkeypatch.setattr(crops, "_resized", lambda pixels, size: seen.append(pixels.shape[:2]) or resized(pixels, size))
    data = encoded(smooth(1203, 907), "JPEG")
    for seed in range(40):
        for size in (32, 64, 128):
            _, (left, top, right, bottom) = view(data, size, seed)
            short = min(seen[-1])
            assert short >= size
            scale = max(s for s in (1, 2, 4, 8) if s == 1 or min(right - left, bottom - top) // s >= size)
            assert short <= min(right - left, bottom - top) / scale + 1, "and no larger than it must be"


@settings(deadline=None, max_examples=40)
@given(st.integers(8, 500), st.integers(8, 500), st.integers(1, 8), st.integers(0, 1000), st.sampled_from(["JPEG", "PNG"]))
def test_the_box_is_where_the_view_lies_in_the_upright_picture(width, height, orientation, seed, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(width, height, seed), kind, exif=exif, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    pixels, box = view(data, 24, seed)
    upright = open_image(data)
    left, top, right, bottom = box
    assert 0 <= left < right <= upright.width
    assert 0 <= top < bottom <= upright.height
    cut = upright.crop(box).resize((24, 24), Image.Resampling.BICUBIC)
    difference = (pixels.permute(1, 2, 0).int() - torch.from_numpy(np.array(cut)).int()).abs()
    assert difference.float().mean() < 3, "scaled decoding filters otherwise"
    assert difference.max() < 40


def test_a_box_goes_into_the_file_and_back():
    for orientation in range(1, 9):
        stored_size = (50, 30)
        upright = stored_size[::-1] if orientation >= 5 else stored_size
        box = (3, 4, 20, 25)
        assert crops.upright_box(crops.stored(box, *upright, orientation), *stored_size, orientation) == box


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_jpegs_of_other_colours_are_seen_alike(decoder, mode):
    data = encoded(smooth(300, 200).convert(mode), "JPEG", quality=95)
    pixels, box = view(data, 64)
    cut = open_image(data).crop(box).resize((64, 64), Image.Resampling.BICUBIC)
    assert (pixels.permute(1, 2, 0).int() - torch.from_numpy(np.array(cut)).int()).abs().float().mean() < 2


@settings(deadline=None, max_examples=20)
@given(st.integers(30, 300), st.integers(30, 300), st.integers(0, 1000), st.sampled_from(["JPEG", "PNG"]))
def test_a_mirrored_view_is_the_same_box_from_right_to_left(width, height, seed, kind):
    data = encoded(smooth(width, height, seed), kind)
    plain, box = view(data, 24, seed)
    mirrored, same = view(data, 24, seed, mirror=1.0)
    assert box == same and torch.equal(mirrored.flip(2), plain) and not torch.equal(mirrored, plain)


def test_about_the_share_that_mirror_names_is_mirrored():
    data = encoded(smooth(90, 60), "PNG")
    plain = view(data, area=(1.0, 1.0))[0]
    views = [view(data, seed=seed, area=(1.0, 1.0), mirror=0.25)[0] for seed in range(200)]
    mirrored = [torch.equal(pixels, plain.flip(2)) for pixels in views]
    assert all(is_mirrored or torch.equal(pixels, plain) for pixels, is_mirrored in zip(views, mirrored, strict=True))
    assert 30 <= sum(mirrored) <= 70


def test_without_mirror_a_view_draws_its_box_only():
    """Captions are drawn with the same generator afterwards: those of earlier versions must not change."""
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    crops.random_view(encoded(smooth(90, 60), "PNG"), 32, one, View())
    crops.random_crop_box(90, 60, other, (0.4, 1.0))
    assert torch.equal(one.get_state(), other.get_state())


def test_a_view_of_what_is_no_picture_names_the_reason(decoder, tmp_path):
    noise = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(noise[:-100])
    (tmp_path / "folder.jpg").mkdir()
    cases = {"truncated": noise[: len(noise) // 2], "empty": b"", "not an image": b"\xff\xd8 is all there is of it", "missing": tmp_path / "none.jpg"}
    for expected, source in [*cases.items(), ("truncated", tmp_path / "cut.jpg"), ("not an image", tmp_path / "folder.jpg")]:
        with pytest.raises(ImageError) as caught:
            view(source)
        assert caught.value.reason == expected
    with pytest.raises(ImageError) as caught:
        view(encoded(smooth(7, 100), "JPEG"), min_side=8)
    assert caught.value.reason == "too small"


def test_the_limit_on_pixels_holds_for_views(decoder, monkeypatch):
    monkeypatch.setattr(crops, "MAX_PIXELS", 40 * 24 - 1)
    with pytest.raises(ImageError) as caught:
        view(encoded(picture(), "JPEG"))
    assert caught.value.reason == "too large"


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4), st.floats(0.02, 1))
def test_the_decoders_refuse_the_same_damaged_bytes(changes, keep):
    pytest.importorskip("simplejpeg")
    data = bytearray(encoded(smooth(90, 70), "JPEG", quality=80))
    for where, value in changes:
        data[int(where * (len(data) - 1))] = value
    data = bytes(data[: max(1, int(len(data) * keep))])

    def outcome():
        try:
            return view(data, 16)[1]
        except ImageError as error:
            assert error.reason in REASONS
            return error.reason

    fast, kept = outcome(), crops.fast_decoder
    crops.fast_decoder = lambda: None
    try:
        assert outcome() == fast
    finally:
        crops.fast_decoder = kept


def test_the_resize_is_pillows_to_within_rounding():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (237, 301, 3), np.uint8))
    for size in (16, 128, 400):
        ours = pixels(crops.crop_resized(image, (0, 0, 301, 237), size))
        assert np.abs(ours - pixels(image.resize((size, size), Image.Resampling.BICUBIC))).max() <= 2


def test_tensor_and_picture_of_a_view_are_one():
    values = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    assert torch.equal(images.uint8_tensor(images.from_uint8(values)), values)
    assert torch.equal(to_tensor(images.from_uint8(values)), to_tensor(values))


@pytest.mark.parametrize("layout", ["fill byte", "behind the frame header"])
def test_a_rotation_is_found_wherever_a_jpeg_may_say_it(layout):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(smooth(300, 200, 0), "JPEG", exif=exif)
    start = data.index(b"\xff\xe1")
    length = 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    segment, rest = data[start : start + length], data[:start] + data[start + length :]
    place = start if layout == "fill byte" else rest.index(b"\xff\xda")
    moved = rest[:place] + (b"\xff" if layout == "fill byte" else b"") + segment + rest[place:]
    assert open_image(moved).size == (200, 300)
    views = [crops.random_view(each, 64, torch.Generator().manual_seed(1), View((0.5, 1.0))) for each in (data, moved)]
    assert views[0][1] == views[1][1]
    assert torch.equal(torch.as_tensor(views[0][0]), torch.as_tensor(views[1][0]))
