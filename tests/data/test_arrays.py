"""Images in an .npz as a source: pixel for pixel those of the array, in any order, and one line for what is no such file."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

from openvision3.data.arrays import ArraySource, holds_arrays

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("crop", ["square", "adm"])
def test_images_of_an_adm_file_are_read_one_by_one_in_any_order(tmp_path, save, crop):
    save(tmp_path / "p.npz", arr_0=PIXELS, arr_1=np.zeros(5))
    source = ArraySource(tmp_path / "p.npz", crop)
    assert len(source) == 5 and (source.height, source.width) == (32, 32)
    for index in (0, 3, 4, 1, 1, 0):
        assert np.array_equal(np.asarray(source.image(index, 32)), PIXELS[index])
    assert source.key(3) == "p.npz/3" and source.captions(3) == () and source.record() == {}
    with pytest.raises(IndexError):
        source.data(5)


def test_files_of_equal_images_are_equal_data_and_others_are_not(tmp_path):
    for name, pixels in (("a", PIXELS), ("b", PIXELS), ("c", PIXELS[::-1])):
        np.savez(tmp_path / f"{name}.npz", pixels)
    a, b, c = (ArraySource(tmp_path / f"{name}.npz").identity() for name in "abc")
    assert a == b != c


def test_files_that_hold_no_images_are_one_line(tmp_path):
    np.savez(tmp_path / "floats.npz", np.zeros((1, 2, 2, 3)))
    np.savez(tmp_path / "objects.npz", np.array([{}], dtype=object))
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    (tmp_path / "garbage.npz").write_bytes(b"nothing")
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (3, 2, 2, 3)})
        member.write(bytes(30))
    np.savez(tmp_path / "whole.npz", np.zeros((1, 2, 2, 3), np.uint8))
    locked = bytearray((tmp_path / "whole.npz").read_bytes())
    for head, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[locked.index(head) + flags] |= 1
    (tmp_path / "locked.npz").write_bytes(locked)
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (1, 60_000, 60_000, 3)})
    for name in ("floats", "objects", "other", "garbage", "short", "locked", "huge"):
        with pytest.raises(ValueError, match=rf"{name}\.npz is not a file of images, which is arr_0") as caught:
            ArraySource(tmp_path / f"{name}.npz")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="it ends before image 3 of 3"):
        ArraySource(tmp_path / "short.npz")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ArraySource(tmp_path / "nowhere.npz")
    assert holds_arrays(tmp_path / "other.npz", "mu") and not holds_arrays(tmp_path / "other.npz", "mu", "sigma")
    assert not holds_arrays(tmp_path / "garbage.npz", "mu")
    damaged = (tmp_path / "other.npz").read_bytes().replace(b"PK\x01\x02", b"PKxx")
    (tmp_path / "damaged.npz").write_bytes(damaged)
    assert not holds_arrays(tmp_path / "damaged.npz", "mu")


@pytest.mark.parametrize("record", [np.frombuffer(b'{"a": ', np.uint8), np.frombuffer(b"[1]", np.uint8), np.array([{}], dtype=object)])
def test_a_damaged_record_of_a_drawing_is_one_line_that_names_the_file(tmp_path, record):
    np.savez(tmp_path / "p.npz", arr_0=PIXELS, drawing=record)
    with pytest.raises(ValueError, match=r"p\.npz: the array 'drawing', which says how its images were drawn, cannot be read: [^\n]*; draw them again"):
        ArraySource(tmp_path / "p.npz").record()
