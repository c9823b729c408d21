"""Identify samples and data sets by their content, never by how a path is spelt or what else is named with it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from openvision3.data.images import ImageError

WHOLE = 128 << 10
"""images of up to so many bytes are hashed whole; of longer ones, BLOCKS blocks of BLOCK bytes, evenly spaced from the first to the last byte"""
BLOCKS, BLOCK = 16, 8 << 10


def digest(*parts: object) -> str:
    """A hash (32 hex digits) of the `repr` of these parts."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def content_key(image: bytes | Path) -> str:
    """A key of the bytes of an image: their number and a hash of them (of a long image, of some of them).

    Raises:
        ImageError: reason `missing`, `unreadable` or `empty`.
    """
    if isinstance(image, bytes):
        return _key(len(image), [image] if len(image) <= WHOLE else [image[at : at + BLOCK] for at in _places(len(image))])
    with reading(image), open(image, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE:
            return _key(size, [file.read()])
        return _key(size, [os.pread(file.fileno(), BLOCK, at) for at in _places(size)])


@contextlib.contextmanager
def reading(image: Path) -> Iterator[None]:
    """What the system says of a file that the block reads, as an ImageError: reason `missing` or `unreadable`."""
    try:
        yield
    except FileNotFoundError as error:
        raise ImageError("missing", f"{image} does not exist") from error
    except OSError as error:
        raise ImageError("unreadable", f"{image} cannot be read: {error.strerror or error}") from error


def _places(size: int) -> list[int]:
    return [(size - BLOCK) * block // (BLOCKS - 1) for block in range(BLOCKS)]


def _key(size: int, blocks: list[bytes]) -> str:
    if not size:
        raise ImageError("empty", "the image holds 0 bytes")
    return f"{size}-{hashlib.blake2b(b''.join(blocks), digest_size=12).hexdigest()}"
