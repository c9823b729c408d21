"""What training data are recognised by: copies of an image are found through JPEG and scaling, other images are not, and a file holds no caption."""

import io
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from safetensors.numpy import save_file

from openvision3 import cli
from openvision3.data import fingerprint, openmoji
from openvision3.data.fingerprint import CELL, WIDTH, Fingerprint, describe, near_duplicates, normalised, take_fingerprint, text_hash
from openvision3.data.folders import FolderSource
from openvision3.data.images import to_tensor
from openvision3.data.openmoji import EmojiSource


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def scaled(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)


def photo(seed: int) -> Image.Image:
    """Something with shades and colours, as photographs have: noise of a few pixels, enlarged."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((128, 128), Image.Resampling.BICUBIC)


def described(images: list[Image.Image]) -> torch.Tensor:
    return describe(torch.stack([to_tensor(image) for image in images]))


@pytest.fixture(scope="module")
def drawings() -> list[Image.Image]:
    return [openmoji.draw(e.character, 128) for e in openmoji.load_emoji().evaluation("test", 96)]


COPIES = {
    "JPEG 75": lambda image: jpeg(image, 75),
    "JPEG 40": lambda image: jpeg(image, 40),
    "half as large": lambda image: scaled(image, 64),
    "half as large, then JPEG": lambda image: jpeg(scaled(image, 64), 60),
    "twice as large": lambda image: scaled(image, 256),
}


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_of_an_image_is_its_near_duplicate_be_it_a_drawing_or_a_photograph(copy, drawings):
    originals = [*drawings, *map(photo, range(32))]
    found = list(near_duplicates(described([COPIES[copy](image) for image in originals]), described(originals)))
    apart = {row: place for row, place, _ in found}
    assert len(found) >= 0.97 * len(originals)
    alike = described(originals).float()
    assert all((alike[row] - alike[place]).abs().max() <= 2 * CELL for row, place in apart.items())


def test_drawings_of_two_families_and_two_photographs_are_no_near_duplicates(drawings):
    emoji = openmoji.load_emoji().evaluation("test", 96)
    marks = described(drawings)
    pairs = {
        frozenset((emoji[a].family, emoji[b].family))
        for a, b in itertools.combinations(range(96), 2)
        if emoji[a].family != emoji[b].family and list(near_duplicates(marks[a : a + 1], marks[b : b + 1]))
    }
    assert not pairs
    assert not list(near_duplicates(described(list(map(photo, range(40)))), described(list(map(photo, range(40, 80))))))


def test_one_stroke_more_in_a_drawing_on_white_is_another_drawing(drawings):
    changed = drawings[0].copy()
    ImageDraw.Draw(changed).line((40, 84, 88, 84), fill="black", width=5)
    assert not list(near_duplicates(described([changed]), described([drawings[0]])))


def test_images_of_any_size_have_the_cells_of_their_area():
    ramp = torch.linspace(-1, 1, 640).expand(1, 3, 640, 640)
    small = torch.nn.functional.interpolate(ramp, (128, 128), mode="area")
    assert (describe(ramp).int() - describe(small).int()).abs().max() <= 1
    expected = (torch.arange(10) + 0.5) / 10 * 255
    assert (describe(ramp)[0, :10].float() - expected).abs().max() <= 1
    assert describe(torch.ones(2, 3, 17, 33))[1].tolist() == [255] * 100 + [128] * 18


def test_near_duplicates_are_those_of_plain_loops_whatever_is_in_memory_at_a_time(monkeypatch):
    draw = np.random.default_rng(0)
    known = torch.from_numpy(draw.integers(0, 256, (50, WIDTH), dtype=np.uint8))
    images = known[torch.tensor([7, 3, 3, 49])].int()
    images[0] += torch.from_numpy(draw.integers(-4, 5, WIDTH))
    images[1, 5] += 11 if images[1, 5] < 200 else -11
    images = torch.cat([images.clamp(0, 255), torch.from_numpy(draw.integers(0, 256, (3, WIDTH)))]).to(torch.uint8)
    apart = (images[:, None].int() - known.int()).abs().amax(2)
    expected = [(row, int(apart[row].argmin()), int(apart[row].min())) for row in range(len(images)) if apart[row].min() <= CELL]
    assert [row for row, *_ in expected] == [0, 2, 3]
    for at_once in (1, 40, 2**22):
        monkeypatch.setattr(fingerprint, "AT_ONCE", at_once)
        assert list(near_duplicates(images, known)) == expected
    assert list(near_duplicates(images[:0], known)) == [] and list(near_duplicates(images, known[:0])) == []


@pytest.mark.parametrize(
    "one, other, equal",
    [
        ("A red  Heart!", "a red heart", True),
        ("\u201cSun-flower\u201d, yellow", "sun flower yellow", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("STRASSE", "stra\u00dfe", True),
        ("a red heart", "a heart red", False),
        ("man 1", "man 2", False),
        ("!!!", "???", False),
        ("\U0001f600", "\U0001f601", False),
    ],
)
def test_captions_are_equal_but_for_case_punctuation_and_blanks(one, other, equal):
    assert (normalised(one) == normalised(other)) == equal


@given(st.text())
def test_a_caption_is_normal_once_and_for_all(text):
    assert normalised(normalised(text)) == normalised(text)


@pytest.fixture(scope="module")
def taken() -> tuple[EmojiSource, Fingerprint]:
    source = EmojiSource(openmoji.load_emoji().train[:70], aliases=True)
    return source, take_fingerprint(source, ("openmoji",))


def test_a_fingerprint_knows_its_captions_families_and_images_and_no_others(taken):
    source, found = taken
    assert found.samples == len(found.images) == len(found.keys) == 70
    assert all(found.has_caption(caption.upper()) for i in range(70) for caption in source.captions(i))
    assert all(found.has_family(source.family(i)) for i in range(70))
    test = EmojiSource(openmoji.load_emoji().evaluation("test", 100))
    assert not any(found.has_family(test.family(i)) for i in range(100))
    assert not found.has_caption("no emoji has this name")
    assert [row for row, *_ in found.nearest(torch.from_numpy(found.images))] == list(range(70))


def test_a_file_gives_it_back_and_holds_no_caption_and_few_bytes_an_image(taken, tmp_path):
    source, found = taken
    found.save(tmp_path / "f.safetensors")
    again = Fingerprint.load(tmp_path / "f.safetensors")
    assert (again.data, again.samples, again.keys) == (("openmoji",), 70, [])
    assert again.captions.tolist() == found.captions.tolist() and again.families.tolist() == found.families.tolist()
    assert again.concepts.tolist() == found.concepts.tolist()
    assert {row.tobytes() for row in again.images} == {row.tobytes() for row in found.images}
    content = (tmp_path / "f.safetensors").read_bytes()
    assert source.captions(0)[0].encode() not in content and len(content) < 70 * WIDTH + 8 * (len(found.captions) + 70 + 70) + 600


def test_a_file_without_concepts_knows_those_of_openmoji_by_its_families(taken, tmp_path):
    source, found = taken
    tensors = {"images": found.images, "captions": found.captions, "families": found.families}
    save_file(tensors, tmp_path / "f.safetensors", {"format": fingerprint.FORMAT, "data": '["openmoji"]', "samples": "70"})
    old = Fingerprint.load(tmp_path / "f.safetensors")
    assert len(old.concepts) == 0 and all(old.has_concept(source.drawing(i)[1]) for i in range(70)) and not old.has_concept("no such concept")


def test_several_are_joined_to_one_of_all(taken, tmp_path):
    _, found = taken
    other = take_fingerprint(EmojiSource(openmoji.load_emoji().train[60:80]), ("more",))
    both = Fingerprint.joined([found, other])
    assert (both.data, both.samples, len(both.images), len(both.keys)) == (("openmoji", "more"), 90, 90, 90)
    assert set(both.captions) == set(found.captions) | set(other.captions) and (np.diff(both.captions) > 0).all()
    assert set(both.concepts) == set(found.concepts) | set(other.concepts)


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_file_that_is_none_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "f.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"f\.safetensors is not a readable fingerprint: .*; write it again with openvision3 data fingerprint") as error:
        Fingerprint.load(tmp_path / "f.safetensors")
    assert "\n" not in str(error.value)


def test_the_command_counts_what_cannot_be_used(tmp_path, capsys):
    folder = tmp_path / "pics"
    folder.mkdir()
    for i in range(3):
        photo(i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"photo {i}")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    out = tmp_path / "new" / "f.safetensors"
    assert cli.main(["data", "fingerprint", str(folder), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "4 samples, 3 images, 3 captions, 0 families" in told and "  1 " in told and "broken.jpg" in told
    found = Fingerprint.load(out)
    assert found.has_caption("Photo 2") and found.data == (str(folder),)
    assert len(list(found.nearest(torch.from_numpy(take_fingerprint(FolderSource(folder), ()).images)))) == 3


@pytest.mark.parametrize(
    "arguments, said", [([], "no data named"), (["nowhere"], "no such data: nowhere"), (["openmoji", "--out", "."], "is a folder; name a file")]
)
def test_the_command_refuses_in_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "fingerprint", *arguments]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_hashes_are_the_same_on_every_machine():
    assert text_hash("a red heart") == -8805622758103247948


def test_the_same_data_twice_count_once_and_other_data_add_up(tmp_path):
    emoji = openmoji.load_emoji().train
    one, other = (take_fingerprint(EmojiSource(part), (name,)) for part, name in ((emoji[:8], "one"), (emoji[8:12], "other")))
    one.save(tmp_path / "one.safetensors")
    both = Fingerprint.joined([one, Fingerprint.load(tmp_path / "one.safetensors"), other])
    assert (both.samples, len(both.images), both.data) == (12, 12, ("one", "other"))
