"""Safetensors files read in place: the header says where each tensor lies, then bytes are read at offsets, or mapped.

The safetensors library reads the same files; it is not used here because a slice of it takes three to ten times as long (docs/design.md).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DTYPES = {"U8": "u1", "I32": "<i4", "U32": "<u4", "I64": "<i8", "U64": "<u8", "BF16": "<u2"}
"""The types that our files hold, and the numpy type that a tensor is mapped as."""


@dataclass(frozen=True)
class TensorPlace:
    """One tensor of a file. `start` is its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int


class TensorFile:
    """A safetensors file whose header has been read; it is not kept open.

    Raises:
        OSError; ValueError: the file is cut off, or is no such file.
    """

    def __init__(self, path: str | Path):
        self.path = path
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            try:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > self.size - 8:
                    raise ValueError("its header is cut off")
                header = json.loads(file.read(length))
                self.metadata: dict[str, str] = header.pop("__metadata__", {})
                self.places: dict[str, TensorPlace] = {}
                end = 8 + length
                for name, entry in header.items():
                    dtype, shape = entry["dtype"], tuple(map(int, entry["shape"]))
                    start, stop = (8 + length + int(offset) for offset in entry["data_offsets"])
                    if start < 8 + length or min(shape, default=0) < 0 or stop - start != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
                        raise ValueError(f"{name} does not fit")
                    self.places[name] = TensorPlace(dtype, shape, start)
                    end = max(end, stop)
                if end != self.size:
                    raise ValueError("it is not as long as its header says")
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, struct.error) as error:
                raise ValueError(f"{path} is not a whole safetensors file: {error or type(error).__name__}") from error

    def map(self) -> dict[str, np.ndarray]:
        """{name: read-only array}, mapped and not loaded. Raises OSError; ValueError: the file has become shorter."""
        with open(self.path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(data) < self.size:
            raise ValueError(f"{self.path} has become shorter")
        return {name: np.frombuffer(data, DTYPES[place.dtype], math.prod(place.shape), place.start).reshape(place.shape) for name, place in self.places.items()}
