"""The verb chat: questions about an image, answered word by word."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from json import dumps
from typing import Annotated

from tyro.conf import Positional, arg

from openvision3.cli.common import Device, Json, on_one_line
from openvision3.settings import PathName


def chat(
    image: Positional[Annotated[PathName, arg(metavar="IMAGE", help="the image to talk about")]],
    questions: Positional[Annotated[tuple[str, ...], arg(metavar="QUESTION ...", help="asked in one conversation. Not set: read from the terminal")]] = (),
    model: Annotated[PathName, arg(metavar="CHAT", help="a folder or run of a chat model. Not set: the one that ships")] = "",
    max_tokens: int = 64,
    tower: PathName = "",
    language: PathName = "",
    device: Device = "auto",
    precision: Annotated[str, arg(metavar="{auto,fp32,bf16}", help="auto: bf16 on a GPU that has it")] = "auto",
    json: Json = False,
) -> int:
    """Answer questions about an image: openvision3 chat IMAGE "What is this?"

    Args:
        max_tokens: longest answer, in tokens of the language model
        tower: the model that sees, if the one that the chat model names is not found
        language: the language model, if the one that the chat model names is not found
    """
    from openvision3.data.images import open_image

    asks_here = not questions
    if asks_here and (json or not sys.stdin.isatty()):
        raise ValueError('no question given; ask one, such as "What is this?" (without one, questions are read from a terminal)')
    if not all(question.strip() for question in questions):
        raise ValueError("a question is empty; ask something, such as 'What is this?'")
    if max_tokens < 1:
        raise ValueError(f"max_tokens {max_tokens} must be 1 or more")
    opened = open_image(image)  # before the model, which takes seconds
    from openvision3.understand.chat import load_chat

    talker = load_chat(model, device=device, precision=precision, tower=tower, language=language)
    is_known = talker.in_distribution(opened)
    if is_known is False and not json:
        print(f"unsure: this looks like nothing that the model was trained on ({', '.join(talker.kinds)}); its guess:", flush=True)
    history: list[tuple[str, str]] = []
    for question in _typed() if asks_here else questions:
        if len(questions) > 1 and not json:
            print(f"> {on_one_line(question)}", flush=True)
        answer = ""
        for piece in talker.stream(opened, question, history=history, max_tokens=max_tokens):
            answer += piece
            if not json:
                print(_shown(piece), end="", flush=True)
        history.append((question, answer.strip()))
        if not json:
            print(flush=True)
    if json:
        turns = [{"question": question, "answer": answer} for question, answer in history]
        print(dumps({"image": image, "turns": turns, "in_distribution": is_known}, indent=2, ensure_ascii=False))
    return 0


def _typed() -> Iterator[str]:
    """Questions typed at a prompt, until an empty line or the end of input."""
    print("Ask about the image; an empty line ends.", file=sys.stderr)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        if not question:
            return
        yield question


def _shown(text: str) -> str:
    """Text with control characters escaped, line breaks apart: what a model writes does not steer a terminal."""
    return "\n".join(map(on_one_line, text.split("\n")))
