"""Conversations about images as people have them: LLaVA's JSON, and images in folders and zip files.

    [{"id": "1", "image": "a/b.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}, ...]

`image` may be a list of names, or absent; as many <image> stand in the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from openvision3.contents import why_not
from openvision3.data.identity import content_key, digest
from openvision3.data.images import ImageError
from openvision3.data.named_images import NamedImages, places_of
from openvision3.data.problems import Problems
from openvision3.files import sha256_of

MARKER = "<image>"
"""stands in a text where an image is seen"""
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PROBED = 16
"""images that are read to recognise those of a run"""

Message = dict[str, str]
"""{"role": user, assistant or system, "content": text}, as chat templates take them"""


class ConversationError(ImageError):
    """A conversation that cannot be used. Reason `no answer`, `unknown speaker`, `images and <image> differ`, `not a conversation`, `too long`."""


class Conversation(NamedTuple):
    images: list[str]
    """names of its images, in the order of their <image>"""
    messages: list[Message]


def read_conversation(row: Any) -> Conversation:
    """One entry of LLaVA's JSON. What follows the last answer is left out, and so is an answer without a question.

    The <image> of a turn with one image is moved to its beginning, as LLaVA-1.5 does: the published data have it before or after the question.

    Raises:
        ConversationError: see there.
    """
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        raise ConversationError("not a conversation", 'it has no list "conversations" of {"from": ..., "value": text}')
    messages: list[Message] = []
    for turn in turns:
        role = SPEAKERS.get(turn.get("from"))
        if role is None:
            raise ConversationError("unknown speaker", f'"from" is {turn.get("from")!r}; choose one of {", ".join(SPEAKERS)}')
        if role == "assistant" and not any(message["role"] == "user" for message in messages):
            continue
        if messages and messages[-1]["role"] == role:
            raise ConversationError("not a conversation", f"two turns in a row are of {turn['from']}")
        messages.append({"role": role, "content": _marker_first(turn["value"]) if role == "user" else turn["value"].strip()})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise ConversationError("no answer", "nothing in it is an answer to learn")
    names = row.get("image") or row.get("images") or []
    images = [names] if isinstance(names, str) else names
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise ConversationError("not a conversation", f'"image" is {names!r}, neither a name nor a list of names')
    check_markers(messages, len(images))
    return Conversation(images, messages)


def check_markers(messages: Sequence[Message], images: int) -> None:
    """Raises ConversationError where there are more or fewer <image> than images."""
    markers = sum(message["content"].count(MARKER) for message in messages)
    if markers != images:
        raise ConversationError("images and <image> differ", f"its text has {markers} {MARKER}, and {images} images are given; write one for each image")


def _marker_first(text: str) -> str:
    if text.count(MARKER) != 1:
        return text.strip()
    return f"{MARKER}\n{text.replace(MARKER, '').strip()}".strip()


class Conversations:
    """The usable conversations of several files; `problems` lists the others. Kept as JSON: objects would need four times the memory.

    Raises:
        FileNotFoundError. ValueError: a file that is not LLaVA's JSON, or in which no conversation can be used.
    """

    def __init__(self, names: Sequence[str], images: Sequence[str] = ()):
        self.names = tuple(names)
        self.problems = Problems()
        self.sha256: list[str] = []
        self._rows: list[bytes] = []
        self._keys: list[tuple[int, int]] = []
        self._stores = [NamedImages(images or places_of(Path(name))) for name in names]
        for number, name in enumerate(names):
            before, refused = len(self._rows), ""
            for place, row in enumerate(_entries(Path(name))):
                try:
                    self._rows.append(json.dumps(read_conversation(row)).encode())
                except ConversationError as error:
                    refused = refused or str(error)
                    self.problems.add(error.as_problem(f"{name}:{place}"), everywhere=True)
                    continue
                self._keys.append((number, place))
            if len(self._rows) == before:
                raise ValueError(f"{name} holds no conversation that can be used{f': {refused}' if refused else ''}")
            self.sha256.append(sha256_of(name))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Conversation:
        return Conversation(*json.loads(self._rows[index]))

    def key(self, index: int) -> str:
        """The file, and the place of the conversation in it."""
        number, place = self._keys[index]
        return f"{self.names[number]}:{place}"

    def image(self, index: int, name: str) -> bytes | Path:
        """An image of the conversation `index`, not decoded. Raises ImageError: reason `missing` or `unreadable`."""
        return self._stores[self._keys[index][0]].read(name)

    def images_digest(self) -> str:
        """By which the images are recognised at another place: the content of some of them."""
        keys = []
        for index in range(0, len(self), max(1, len(self) // PROBED)):
            for name in self[index].images[:1]:
                try:
                    keys.append(content_key(self.image(index, name)))
                except ImageError as error:
                    keys.append(error.reason)
        return digest(keys)


def check_file(path: Path) -> None:
    """Raises FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file of conversations: {path}; name a .json or .jsonl file in LLaVA's layout")


def _entries(path: Path) -> Iterable[Any]:
    """The entries of a .json or .jsonl file. Raises FileNotFoundError; ValueError where the file is neither."""
    check_file(path)
    if path.suffix == ".jsonl":
        return _lines(path)
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {why_not(path, 'JSON', error)}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} is not LLaVA's JSON: it holds a {type(entries).__name__}, not a list of conversations")
    return entries


def _lines(path: Path) -> Iterable[Any]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
