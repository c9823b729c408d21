"""Conversations as the token ids of a language model, and which of them are answers: the one place where text is written for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from openvision3.settings import unknown
from openvision3.understand.conversations import MARKER, ConversationError, Message, check_markers

TEMPLATES = ("auto", "chat", "vicuna", "plain")
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""what every conversation of Vicuna 1.1 and of LLaVA-1.5 begins with"""
_PROBE: list[Message] = [
    {"role": "user", "content": "What?"},
    {"role": "assistant", "content": "This."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "That."},
]


class Tokens(NamedTuple):
    """A conversation of T tokens."""

    ids: list[int]
    answers: list[bool]
    """which of them the model learns to write"""
    cut: bool
    """whether it was longer than allowed"""


class Prompts:
    """Writes conversations for one language model, with a token for images that is added to its tokenizer if that has none.

    chat: the tokenizer's own template. vicuna: Vicuna 1.1's words. plain: the images and then the answer, without the question, as LLaVA-1.5's first
    phase learns captions. auto: chat if the tokenizer has a template, otherwise vicuna.

    Raises:
        ValueError: an unknown template, or one of the tokenizer that cannot write a conversation turn by turn.
    """

    def __init__(self, tokenizer: Any, template: str = "auto", length: int = 2048):
        if template not in TEMPLATES:
            raise unknown("chat template", template, TEMPLATES)
        self.tokenizer, self.length = tokenizer, length
        has_own = bool(tokenizer.chat_template)
        self.template = ("chat" if has_own else "vicuna") if template == "auto" else template
        if self.template == "chat" and not has_own:
            raise ValueError("the tokenizer of this language model has no chat template of its own; set --template vicuna")
        if tokenizer.convert_tokens_to_ids(MARKER) in (None, tokenizer.unk_token_id):
            tokenizer.add_tokens([MARKER], special_tokens=True)
        self.image_id: int = tokenizer.convert_tokens_to_ids(MARKER)
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        self._answers_in(_PROBE, self.text(_PROBE))

    def text(self, messages: Sequence[Message], asking: bool = False) -> str:
        """The text of a conversation; `asking` ends it where the next answer begins."""
        if self.template == "chat":
            from jinja2 import TemplateError

            try:
                return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asking)
            except TemplateError as error:
                raise ConversationError("not a conversation", f"the chat template of the language model refuses it: {error}") from error
        if self.template == "plain":
            return "".join(f"{message['content']}\n" if message["role"] == "assistant" else MARKER * message["content"].count(MARKER) for message in messages)
        system = next((message["content"] for message in messages if message["role"] == "system"), VICUNA)
        end = self.tokenizer.eos_token or ""
        spoken = {"user": "USER: {} ", "assistant": f"ASSISTANT: {{}}{end}"}
        text = "".join(spoken[message["role"]].format(message["content"]) for message in messages if message["role"] in spoken)
        return f"{system} {text}{'ASSISTANT:' if asking else ''}"

    def encode(self, messages: Sequence[Message], images: Sequence[int]) -> Tokens:
        """A conversation to learn from. `images` has the number of tokens of each image.

        Raises:
            ConversationError: more or fewer <image> than images; no answer, or not all of an image, within the allowed length.
        """
        check_markers(messages, len(images))
        text = self.text(messages)
        spans = self._answers_in(messages, text)
        ids, offsets = self._tokenise(text)
        inside = [any(first < span[1] and last > span[0] for span in spans) for first, last in offsets]
        ids, inside = self._with_images(ids, inside, images)
        cut = len(ids) > self.length
        if self.image_id in ids[self.length :]:
            raise ConversationError("too long", f"its images end after token {self.length}; set a larger --length")
        ids, inside = ids[: self.length], inside[: self.length]
        if not any(inside[1:]):
            raise ConversationError("too long", f"its first answer begins after token {self.length}; set a larger --length")
        return Tokens(ids, inside, cut)

    def ask(self, messages: Sequence[Message], images: Sequence[int]) -> list[int]:
        """A conversation that ends with a question, up to where its answer begins. Raises ConversationError: more or fewer <image> than images."""
        check_markers(messages, len(images))
        ids, _ = self._tokenise(self.text(messages, asking=True))
        return self._with_images(ids, [False] * len(ids), images)[0]

    @property
    def ends(self) -> list[int]:
        """Ids that end an answer: of the tokenizer's end, and of the end of a turn in its chat template."""
        after = self.text(_PROBE).rpartition(_PROBE[-1]["content"])[2]
        ids = [*self._tokenise(after.strip() or after)[0][-1:], self.tokenizer.eos_token_id]
        return [i for i in dict.fromkeys(ids) if i is not None]

    def _answers_in(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """From where to where in the text each answer reaches, with what ends it. Raises ValueError: the template changes earlier turns."""
        spans = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self.text(messages[:place], asking=True), self.text(messages[: place + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError("the chat template of this language model rewrites earlier turns, so its answers cannot be told apart; set --template vicuna")
            spans.append((len(before), len(after.rstrip() if self.template == "chat" else after)))
        return spans

    def _tokenise(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.tokenizer(text, add_special_tokens=self.template != "chat", return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        if ids and self.template != "chat" and ids[-1] == self.tokenizer.eos_token_id and not text.endswith(self.tokenizer.eos_token):
            ids.pop()  # a tokenizer that ends every text by itself
        return ids, [tuple(pair) for pair in encoded["offset_mapping"]][: len(ids)]

    def _with_images(self, ids: list[int], inside: list[bool], images: Sequence[int]) -> tuple[list[int], list[bool]]:
        """Each image's token as often as the image has tokens."""
        if ids.count(self.image_id) != len(images):
            raise ConversationError("images and <image> differ", f"{len(images)} images became {ids.count(self.image_id)} places in the text")
        left = iter(images)
        times = [next(left) if token == self.image_id else 1 for token in ids]
        return (
            [token for token, count in zip(ids, times, strict=True) for _ in range(count)],
            [flag for flag, count in zip(inside, times, strict=True) for _ in range(count)],
        )
