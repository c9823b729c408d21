"""Bytes -> text -> the captions of a sample: every text is read here, from shards, folders, tables and lists of class names.

No encoding is guessed and no character replaced: what is not text raises `TextError`, which a run counts by its reason.
"""

from __future__ import annotations

import codecs
import json
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from openvision3.data.images import ImageError

MAX_BYTES = 4 << 20
"""longer texts and JSON members are not read but counted: reading one would take seconds each time"""

_BYTE_ORDER_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class TextError(ImageError):
    """The text of a sample cannot be used, though its image may be usable. Reason `not UTF-8` or `too large`."""


class Captions(tuple[str, ...]):
    """The captions of a sample. The first `alike` of them are interchangeable, so that any of them may be the one to predict:
    the lines of one text, the list in one JSON field, the rows of a table for one image.
    """

    alike: int

    def __new__(cls, texts: Iterable[str] = (), alike: int = 1) -> Captions:
        captions = super().__new__(cls, texts)
        captions.alike = min(alike, len(captions))
        return captions

    def led_by(self, draw: int) -> Captions:
        """The same captions with another one first: the random number `draw` chooses it among the interchangeable ones."""
        if self.alike < 2:
            return self
        chosen = draw % self.alike
        return Captions((self[chosen], *self[:chosen], *self[chosen + 1 :]), self.alike)


def encoding_of(head: bytes) -> str:
    """The encoding of the byte-order mark at the start, else UTF-8; the codec of that name drops the mark."""
    return next((encoding for mark, encoding in _BYTE_ORDER_MARKS if head.startswith(mark)), "utf-8-sig")


def decode_text(data: bytes, name: str = "the text") -> str:
    """Decode a text by its byte-order mark (UTF-8, UTF-16, UTF-32), else as UTF-8, and drop the mark.

    NULs at the end are dropped as padding. `name` is the name of the text in error messages.

    Raises:
        TextError: reason `not UTF-8`, also for NULs inside the text: most often it is UTF-16 without a byte-order mark.
    """
    encoding = encoding_of(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        kind = encoding.removesuffix("-sig").upper()
        raise TextError("not UTF-8", f"{name} is not {kind} text ({error.reason} {data[error.start : error.start + 1]!r}); save it as UTF-8") from error
    return _without_nuls(text.rstrip("\0"), name)


def checked_text(text: str, name: str = "the text") -> str:
    """Return the text unchanged. Command lines and JSON can contain surrogates (halves of characters), which no tokenizer accepts.

    Raises:
        TextError: reason `not UTF-8`.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError("not UTF-8", f"{name} is not UTF-8 text: {text!a:.60} holds half a character at {error.start}") from error
    return text


def _without_nuls(text: str, name: str) -> str:
    if "\0" in text:
        raise TextError("not UTF-8", f"{name} holds NUL bytes, as UTF-16 without a byte-order mark does; save it as UTF-8")
    return text


def read_text(path: str | Path) -> str:
    """Read the text of a file, see `decode_text`. Raises OSError, TextError (also for more than MAX_BYTES)."""
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise too_large(str(path))
    return decode_text(data, str(path))


def too_large(name: str) -> TextError:
    return TextError("too large", f"{name} holds more than {MAX_BYTES >> 20} MiB of text")


def text_captions(text: str) -> Captions:
    """The captions in one `.txt` file or member: each line that is not blank is one, as in CLIP_benchmark's retrieval shards."""
    return clean_captions([text.splitlines()])


def clean_captions(values: Iterable[object]) -> Captions:
    """The captions among these values, each on one line. Lists are flattened; numbers, nulls and blank captions are left out.

    The captions of the first value that has any are interchangeable, see `Captions`.

    Raises:
        TextError: surrogates or NULs in a caption.
    """
    groups = [
        [line for text in _texts(value) if (line := " ".join(_without_nuls(checked_text(text, "the caption"), "the caption").split())) and is_visible(line)]
        for value in values
    ]
    return Captions([line for group in groups for line in group], alike=next((len(group) for group in groups if group), 1))


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def is_visible(text: str) -> bool:
    """Whether a text has a letter, a digit or a symbol: tokenizers drop zero-width characters, accents and spaces on their own."""
    return any(unicodedata.category(letter)[0] in "LNPS" and letter != "\ufffd" for letter in text)


def field_text(value: object) -> str | None:
    """The text of one field of JSON or of a table; numbers are texts too. None for blanks, truth values, lists and objects."""
    return str(value).strip() or None if isinstance(value, str | int | float) and not isinstance(value, bool) else None


def json_object(text: str | bytes) -> dict:
    """The JSON object in `text`; {} if it is not JSON or not an object. The encoding of bytes is detected as the JSON standard says."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
