"""What a foreign file holds, by its first bytes: for error messages on files of another kind than expected."""

from __future__ import annotations

import contextlib
import os
import re
import zipfile
from collections.abc import Callable

HEAD = 4096
"""number of bytes that are read of a file"""

_UNPACK = "unpack it first"
_RENDER = "render or convert it to PNG or JPEG first"

# Signature, its offset, and what the bytes are; behind a colon, what the user can do.
_SIGNATURES: tuple[tuple[bytes, int, str], ...] = (
    (b"version https://git-lfs.github.com", 0, "a git-lfs pointer and not the file itself: run `git lfs pull` in its repository"),
    (b"\x1f\x8b", 0, f"gzip: {_UNPACK}, with gunzip"),
    (b"BZh", 0, f"bzip2: {_UNPACK}, with bunzip2"),
    (b"\xfd7zXZ\0", 0, f"xz: {_UNPACK}, with unxz"),
    (b"\x28\xb5\x2f\xfd", 0, f"Zstandard: {_UNPACK}, with unzstd"),
    (b"\x04\x22\x4d\x18", 0, f"LZ4: {_UNPACK}, with unlz4"),
    (b"7z\xbc\xaf\x27\x1c", 0, f"a 7z archive: {_UNPACK}"),
    (b"Rar!\x1a\x07", 0, f"a RAR archive: {_UNPACK}"),
    (b"ustar", 257, "a tar archive"),
    (b"\xff\xd8\xff", 0, "a JPEG image"),
    (b"\x89PNG\r\n\x1a\n", 0, "a PNG image"),
    (b"GIF8", 0, "a GIF image"),
    (b"II*\0", 0, "a TIFF image"),
    (b"MM\0*", 0, "a TIFF image"),
    (b"II+\0", 0, f"a BigTIFF image: {_RENDER}"),
    (b"MM\0+", 0, f"a BigTIFF image: {_RENDER}"),
    (b"WEBP", 8, "a WebP image"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", 0, f"a JPEG 2000 image: {_RENDER}"),
    (b"\xff\x4f\xff\x51", 0, f"a JPEG 2000 image: {_RENDER}"),
    (b"\xff\x0a", 0, f"a JPEG XL image: {_RENDER}"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", 0, f"a JPEG XL image: {_RENDER}"),
    (b"8BPS", 0, f"a Photoshop document: {_RENDER}"),
    (b"gimp xcf", 0, f"a GIMP document: {_RENDER}"),
    (b"\0\0\1\0", 0, f"a Windows icon: {_RENDER}"),
    (b"\x76\x2f\x31\x01", 0, f"an OpenEXR image: {_RENDER}"),
    (b"#?RADIANCE", 0, f"a Radiance HDR image: {_RENDER}"),
    (b"DDS ", 0, f"a DDS texture: {_RENDER}"),
    (b"qoif", 0, f"a QOI image: {_RENDER}"),
    (b"%PDF-", 0, f"a PDF document: {_RENDER}"),
    (b"%!PS", 0, f"PostScript: {_RENDER}"),
    (b"\xd7\xcd\xc6\x9a", 0, f"a Windows metafile: {_RENDER}"),
    (b"\0\x05\x16\x07", 0, "macOS metadata (AppleDouble, a ._ file) and not the file itself: delete it"),
    (b"RIFF", 0, "a RIFF file, such as a WAV or an AVI"),
    (b"ID3", 0, "an MP3 recording"),
    (b"OggS", 0, "an Ogg recording"),
    (b"\x1aE\xdf\xa3", 0, "a Matroska or WebM video"),
    (b"\x89HDF\r\n\x1a\n", 0, "an HDF5 file"),
    (b"\x93NUMPY", 0, "a NumPy array (.npy)"),
    (b"GGUF", 0, "a GGUF model"),
    (b"PAR1", 0, "a Parquet table"),
    (b"ARROW1", 0, "an Arrow table"),
    (b"SQLite format 3\0", 0, "an SQLite database"),
    (b"\x7fELF", 0, "a Linux program or library"),
    (b"MZ", 0, "a Windows program"),
)

_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "an AVIF image"),
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"), f"a HEIC image (an iPhone's format): {_RENDER}"),
    b"crx ": f"a raw photograph (CR3): {_RENDER}",
}
"""Kinds of ISO media files that are images; the others are videos."""


def contents(source: bytes | str | os.PathLike) -> str:
    """What a file (or its first bytes) holds, in a few words such as "a web page"; behind a colon, what to do.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(source, bytes):
        head = source[:HEAD]
    else:
        with open(source, "rb") as file:
            head = file.read(HEAD)
    if not head:
        return "0 bytes"
    if not head.strip(b"\0"):
        return "zero bytes alone, as a broken download or copy leaves them: fetch it again"
    if head[4:8] == b"ftyp":
        brands = [head[8:12], *(head[place : place + 4] for place in range(16, min(len(head), int.from_bytes(head[:4], "big")), 4))]
        return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), "a video (ISO media)")
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return _zip(head, source)
    for signature, place, phrase in _SIGNATURES:
        if head.startswith(signature, place):
            return phrase
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "a Python pickle, perhaps an old PyTorch checkpoint: convert it to safetensors"
    if head[:2] == b"BM" and head[6:10] == b"\0\0\0\0":
        return "a BMP image"
    if re.match(rb"P[1-7][\s#]", head):
        return "a Netpbm image"
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "safetensors"
    return _text(head)


def holds(source: bytes | str | os.PathLike) -> str:
    """`contents` as a verb: "holds a web page"; for a file that cannot be read, "cannot be read (reason)"."""
    try:
        return f"holds {contents(source)}"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def why_not(path: str | os.PathLike, wanted: str, error: Exception) -> str:
    """Why a file could not be read as `wanted` (a prefix of what `contents` returns): what it holds instead, or else the reader's own message."""
    seen = holds(path)
    return " ".join(str(error).split()) or type(error).__name__ if seen.startswith(f"holds {wanted}") else f"it {seen}"


def _zip(head: bytes, source: bytes | str | os.PathLike) -> str:
    names: list[str] = []
    if not isinstance(source, bytes):
        with contextlib.suppress(Exception), zipfile.ZipFile(source) as archive:
            names = archive.namelist()
    if b"data.pkl" in head or any(name.endswith("data.pkl") for name in names):
        return "a PyTorch checkpoint (a pickle in a zip): convert it to safetensors"
    if b".npy" in head[:64] or any(name.endswith(".npy") for name in names):
        return "NumPy arrays (.npz)"
    if b"[Content_Types].xml" in head or "[Content_Types].xml" in names:
        return "an Office document"
    return f"a zip archive: {_UNPACK}"


_MARKUP: tuple[tuple[Callable[[str], bool], str], ...] = (
    (
        lambda text: text.startswith(("<!doctype html", "<html", "<head", "<body")) or "<html" in text[:1024],
        "a web page (HTML), perhaps of a login or an error",
    ),
    (lambda text: "<svg" in text and text.startswith("<"), f"SVG, a vector drawing: {_RENDER}"),
    (lambda text: text.startswith("<?xml") or bool(re.match(r"<[a-z]+[\s>]", text)), "XML"),
)


def _text(head: bytes) -> str:
    """HTML, SVG, JSON, other text and its beginning, or an unknown format and its first bytes."""
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = head.decode(encoding, errors="ignore").strip()
    readable = sum(letter.isprintable() or letter.isspace() for letter in text)
    if len(text) * 4 < len(head) or readable < 0.9 * len(text):
        return f"bytes of an unknown format, which begin with {head[:8].hex(' ')}"
    lowered = text.lower()
    for is_one, phrase in _MARKUP:
        if is_one(lowered):
            return phrase
    beginning = " ".join(text[:60].split())
    if text[:1] in ("{", "["):
        return f"JSON text, which begins with {beginning!r}"
    return f"text, which begins with {beginning!r}"


def short(error: BaseException) -> str:
    """The message of an error of foreign code, in one line of at most 200 characters."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 200 else line[:199] + "…"
