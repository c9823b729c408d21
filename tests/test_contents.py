"""A message about a foreign file says what the file holds."""

import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from openvision3.contents import contents, holds


def image(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(out, kind)
    return out.getvalue()


def archive() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        made.writestr("a.txt", "a")
    return out.getvalue()


SEEN = {
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "web page": b"\xef\xbb\xbf\n <!DOCTYPE html><title>Log in</title>",
    "SVG": b'<?xml version="1.0"?>\n<!-- drawn --><svg xmlns="http://www.w3.org/2000/svg"/>',
    "XML": b"<Error><Code>AccessDenied</Code></Error>",
    "gzip": b"\x1f\x8b\x08\0",
    "Zstandard": b"\x28\xb5\x2f\xfd\0",
    "AVIF": image("AVIF") if "AVIF" in Image.registered_extensions().values() else b"\0\0\0\x1cftypavif\0\0\0\0",
    "HEIC": b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic",
    "video": b"\0\0\0\x18ftypisom\0\0\0\0isommp42",
    "JPEG image": image("JPEG"),
    "PNG image": image("PNG"),
    "WebP image": image("WEBP"),
    "BMP image": image("BMP"),
    "TIFF image": image("TIFF"),
    "JPEG XL": b"\xff\x0a\0\0",
    "PDF": b"%PDF-1.7",
    "tar archive": archive(),
    "zip archive": zipped(),
    "pickle": pickle.dumps({"a": 1}),
    "AppleDouble": b"\0\x05\x16\x07\0\2\0\0Mac OS X",
    "safetensors": b"\x08\0\0\0\0\0\0\0{}      ",
    "JSON": b'{"error": "not found"}',
    "'404: Not Found'": b"404: Not Found",
    "'hello'": b"\xff\xfe" + "hello".encode("utf-16-le"),
    "0 bytes": b"",
    "zero bytes": bytes(512),
    "unknown format": bytes(range(128, 255)),
}


@pytest.mark.parametrize("kind", SEEN)
def test_the_first_bytes_say_what_a_file_holds(kind, tmp_path):
    (tmp_path / "file").write_bytes(SEEN[kind])
    assert kind in contents(SEEN[kind])
    assert contents(tmp_path / "file") == contents(SEEN[kind])
    assert holds(tmp_path / "file") == f"holds {contents(SEEN[kind])}"


def test_checkpoints_and_arrays_in_zips_are_told_from_other_zips(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "model.pt")
    np.savez(tmp_path / "a.npz", a=np.zeros(2))
    assert "PyTorch checkpoint" in contents(tmp_path / "model.pt")
    assert ".npz" in contents(tmp_path / "a.npz")


def test_a_file_that_cannot_be_read_says_why(tmp_path):
    assert holds(tmp_path / "none") == "cannot be read (No such file or directory)"


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
PAGE = b"<!DOCTYPE html><html><body>Log in</body></html>"


@pytest.mark.parametrize(("data", "phrase"), [(LFS, "git lfs pull"), (PAGE, "web page"), (b"", "0 bytes")])
def test_every_reader_of_a_model_says_what_lies_in_place_of_a_file(data, phrase, tmp_path):
    from openvision3.data.text import TextTokenizer
    from openvision3.hub import load_vae, read_config, read_tensors
    from openvision3.networks.perceptual import load_foreign_pickle
    from openvision3.settings import load_config
    from openvision3.train.config import PretrainConfig

    vae = tmp_path / "vae"
    vae.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "weights.pth", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"):
        (tmp_path / name).write_bytes(data)
    readers = [
        lambda: read_config(tmp_path),
        lambda: load_config(PretrainConfig, tmp_path / "config.json"),
        lambda: read_tensors(tmp_path / "model.safetensors"),
        lambda: TextTokenizer.load(tmp_path / "tokenizer.json"),
        lambda: load_foreign_pickle(tmp_path / "weights.pth"),
        lambda: load_vae(vae),
    ]
    for read in readers:
        with pytest.raises(ValueError, match=phrase):
            read()
    (vae / "config.json").write_text('{"_class_name": "AutoencoderKL", "block_out_channels": [32], "down_block_types": ["DownEncoderBlock2D"]}')
    with pytest.raises(ValueError, match=phrase):
        load_vae(vae)


def test_a_file_of_the_right_kind_that_is_damaged_keeps_its_readers_words(tmp_path):
    from openvision3.contents import why_not

    (tmp_path / "a.json").write_text('{"a": ')
    assert why_not(tmp_path / "a.json", "JSON", ValueError("Expecting\nvalue")) == "Expecting value"
    (tmp_path / "a.safetensors").write_bytes(SEEN["safetensors"])
    assert why_not(tmp_path / "a.safetensors", "safetensors", ValueError("cut off")) == "cut off"
