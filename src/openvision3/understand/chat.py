"""An opened chat model: questions about images, answered as a whole, word by word, or many at a time. Decoding is greedy.

chat = load_chat("runs/chat_instruct")
chat.ask("cat.jpg", "What is this?")
chat.ask("cat.jpg", "What colour is it?", history=[("What is this?", "a cat")])
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from openvision3 import hub
from openvision3.data.familiarity import FILE as FAMILIARITY
from openvision3.data.familiarity import Familiarity
from openvision3.data.images import ImageSource, open_image, to_tensor
from openvision3.device import choose_device, choose_precision
from openvision3.evaluate.protocol import AnsweringFunctions
from openvision3.networks.text_models import decode_greedily, most_tokens
from openvision3.understand import folder
from openvision3.understand.conversations import MARKER, Message
from openvision3.understand.folder import Opened

History = Sequence[tuple[str, str]]
"""questions with their answers, the first first"""


class Chat:
    """A chat model on its device. The images of a conversation stand before its first question."""

    def __init__(self, opened: Opened, device: str = "cpu", precision: Literal["fp32", "bf16"] = "fp32"):
        self.opened, self.device, self.precision = opened, device, precision
        self.folder, self.name = opened.folder, opened.folder.resolve().name
        self.network: Any = opened.model.to(device).network
        self.prompts, self.layout = opened.prompts, opened.layout
        # The image token's logit is 0, which may be the largest.
        decode_greedily(self.network, self.prompts.tokenizer, ends=self.prompts.ends, never=[self.prompts.image_id])
        self.room = most_tokens(self.network.config.text_config)
        """tokens that the language model can read; None: any number"""

    @property
    def sha256(self) -> str:
        """The sha256 of what was trained: the projector and the language model's additions."""
        return hub.weights_sha256(self.folder)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the tower was trained on, in words; empty if it has no calibration."""
        familiarity = self.opened.pipeline.familiarity
        return familiarity.calibration.kinds if familiarity and familiarity.calibration else ()

    def in_distribution(self, image: ImageSource) -> bool | None:
        """Whether the image resembles those that the tower was trained on; None if the tower has no calibration (`openvision3 calibrate`)."""
        return self.opened.pipeline.in_distribution(open_image(image))[0] if self.kinds else None

    def ask(self, images: ImageSource | Sequence[ImageSource] | None, question: str, *, history: History = (), max_tokens: int = 64) -> str:
        """The answer to a question about an image, several or none, after the turns of `history`.

        Raises:
            ImageError: an image that cannot be read. ValueError: an empty question, or a conversation that does not fit into the language model.
        """
        return "".join(self.stream(images, question, history=history, max_tokens=max_tokens)).strip()

    def stream(self, images: ImageSource | Sequence[ImageSource] | None, question: str, *, history: History = (), max_tokens: int = 64) -> Iterator[str]:
        """The answer of `ask` in pieces, each as soon as it is written. Raises as `ask`."""
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        inputs = self._inputs([self._row(images, question, history)], max_tokens)
        pieces = TextIteratorStreamer(self.prompts.tokenizer, skip_prompt=True, skip_special_tokens=True)
        unwanted = threading.Event()
        failures: list[BaseException] = []

        def write() -> None:
            try:
                self._generate(inputs, max_tokens, streamer=pieces, stopping_criteria=StoppingCriteriaList([lambda ids, scores: unwanted.is_set()]))
            except BaseException as error:  # raised below, in the thread that asked
                failures.append(error)
                pieces.end()

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        try:
            yield from filter(None, pieces)
        finally:
            unwanted.set()  # if nobody listens any more, it stops at the next word
            writer.join()
        if failures:
            raise failures[0]

    def answer_batch(self, images: Sequence[ImageSource | Sequence[ImageSource] | None], prompts: Sequence[str], *, max_tokens: int = 64) -> list[str]:
        """The answers of `ask` to a prompt about each image, computed together. Raises as `ask`."""
        if not images:
            return []
        inputs = self._inputs([self._row(*pair, ()) for pair in zip(images, prompts, strict=True)], max_tokens)
        written = self._generate(inputs, max_tokens)[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.prompts.tokenizer.batch_decode(written, skip_special_tokens=True)]

    def functions(self, name: str) -> AnsweringFunctions:
        """What `evaluate vqa` asks: this model under its name."""
        return AnsweringFunctions(
            name, lambda images, prompts, max_tokens: self.answer_batch(images, prompts, max_tokens=max_tokens), self.precision, self.sha256
        )

    def _row(self, images: ImageSource | Sequence[ImageSource] | None, question: str, history: History) -> tuple[list[int], list[Image.Image]]:
        """(token ids of a conversation up to where its answer begins, its images)."""
        if not question.strip():
            raise ValueError("the question is empty; ask something, such as 'What is this?'")
        several = [] if images is None else [images] if isinstance(images, ImageSource) else [*images]
        opened = [open_image(image) for image in several]
        texts = [text for turn in history for text in turn] + [question]
        texts[0] = f"{MARKER}\n" * len(opened) + texts[0]
        messages: list[Message] = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
        return self.prompts.ask(messages, [self.layout.tokens(image.width, image.height) for image in opened]), opened

    def _inputs(self, rows: Sequence[tuple[list[int], list[Image.Image]]], max_tokens: int) -> dict[str, Tensor]:
        """Conversations as `generate` takes them, padded at the left: what is written follows them. Raises ValueError: they do not fit."""
        length = max(len(ids) for ids, _ in rows)
        if max_tokens < 1:
            raise ValueError(f"max_tokens {max_tokens} must be 1 or more")
        if self.room is not None and length + max_tokens > self.room:
            raise ValueError(
                f"a conversation of {length:,} tokens and an answer of {max_tokens:,} do not fit: the language model reads {self.room:,} tokens; "
                "set a smaller --max-tokens, or ask in a new conversation"
            )
        inputs = {
            "input_ids": torch.tensor([[self.prompts.pad_id] * (length - len(ids)) + ids for ids, _ in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids, _ in rows]),
        }
        if images := [image for _, several in rows for image in several]:
            inputs["pixel_values"] = to_tensor(torch.cat([self.layout.squares(image) for image in images]))
            if self.layout.anyres:
                inputs["image_sizes"] = torch.tensor([(image.height, image.width) for image in images])
        return {name: value.to(self.device) for name, value in inputs.items()}

    @torch.inference_mode()
    def _generate(self, inputs: dict[str, Tensor], max_tokens: int, **settings: Any) -> Tensor:
        kind = torch.device(self.device).type
        with torch.autocast(kind, torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext():
            return self.network.generate(**inputs, max_new_tokens=max_tokens, **settings)


def load_chat(name: str | Path = "", *, device: str = "auto", precision: str = "auto", tower: str = "", language: str = "") -> Chat:
    """Open a chat model: one that ships ("" is the first), a folder or a run. `tower` and `language` name its parts if their names are not found.

    Raises:
        FileNotFoundError, ValueError: what is missing or does not fit, in one line; a model that was trained without questions.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision {precision!r} is unknown; choose one of auto, fp32 and bf16")
    place = folder.find(name)
    if folder.read(place).template == "plain":
        raise ValueError(
            f"{place} was trained without questions (template plain), so it would not hear yours; train it on conversations with another template first, "
            f"such as openvision3 train llava15_instruct --init {name or place}"
        )
    device = choose_device(device)
    # on a processor a word is as fast in fp32, which the weights are kept in, and bf16 would first have to be measured and converted to: four seconds
    chosen = choose_precision("fp32" if precision == "auto" and device == "cpu" else precision, device)[0]  # type: ignore[arg-type]
    opened = folder.load(place, precision=chosen, tower=tower, language=language)
    if opened.pipeline.folder is not None and (opened.pipeline.folder / FAMILIARITY).is_file():
        opened.pipeline.familiarity = Familiarity.load(opened.pipeline.folder / FAMILIARITY)
    return Chat(opened, device, chosen)
