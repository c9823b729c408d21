"""Which sample is this, which data are these: known by what they hold, never by how a path is spelt or what is named beside it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from openvision3.data.images import ImageError

WHOLE = 128 << 10
"""bytes of an image that are hashed whole; of a longer one BLOCKS blocks of BLOCK bytes, evenly spaced from its first to its last byte"""
BLOCKS, BLOCK = 16, 8 << 10


def digest(*parts: object) -> str:
    """32 hex digits of these parts, which are spelt as `repr` spells them."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def content_key(image: bytes | Path) -> str:
    """A key of the bytes of an image: its length and a hash of all of them, or of a long one of parts.

    Raises:
        ImageError: reason `missing`, `unreadable` or `empty`.
    """
    if isinstance(image, bytes):
        return _key(len(image), [image] if len(image) <= WHOLE else [image[at : at + BLOCK] for at in _places(len(image))])
    try:
        with open(image, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= WHOLE:
                return _key(size, [file.read()])
            return _key(size, [os.pread(file.fileno(), BLOCK, at) for at in _places(size)])
    except FileNotFoundError as error:
        raise ImageError("missing", f"{image} is not there") from error
    except OSError as error:
        raise ImageError("unreadable", f"{image} cannot be read: {error.strerror or error}") from error


def _places(size: int) -> list[int]:
    return [(size - BLOCK) * block // (BLOCKS - 1) for block in range(BLOCKS)]


def _key(size: int, blocks: list[bytes]) -> str:
    if not size:
        raise ImageError("empty", "the image holds 0 bytes")
    return f"{size}-{hashlib.blake2b(b''.join(blocks), digest_size=12).hexdigest()}"
