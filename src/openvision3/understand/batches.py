"""Batches of conversations: the order and the replacement of what cannot be used depend on (seed, epoch, position) only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openvision3.data.images import ImageError, damage_seen, open_image
from openvision3.data.order import Shuffle
from openvision3.data.prepared import Collated, PreparedBatches
from openvision3.data.problems import Problem
from openvision3.draws import draw_seed
from openvision3.understand.conversations import Conversations
from openvision3.understand.prompts import Prompts, Tokens
from openvision3.understand.tiles import ImageLayout

TRIES = 256
"""conversations tried for one row, as in `data.batches`"""
CUT = "longer than the allowed tokens (cut)"
"""the reason of conversations that are used without their end"""


class Example(NamedTuple):
    """One row of a batch."""

    tokens: Tokens
    squares: list[Tensor]
    """of each image, uint8 (P, 3, S, S)"""
    sizes: list[tuple[int, int]]
    """(height, width) of each image"""
    problems: list[Problem]


def read_example(conversations: Conversations, index: int, prompts: Prompts, layout: ImageLayout) -> Example:
    """A conversation with its images, as token ids. Raises ImageError: an image that is missing or damaged, or a conversation that cannot be used."""
    conversation, key = conversations[index], conversations.key(index)
    problems: list[Problem] = []
    squares, sizes = [], []
    for name in conversation.images:
        image = open_image(conversations.image(index, name))
        if damage := damage_seen():
            problems.append({"key": f"{key} {name}", **damage})
        squares.append(layout.squares(image))
        sizes.append((image.height, image.width))
    tokens = prompts.encode(conversation.messages, [layout.tokens(width, height) for height, width in sizes])
    if tokens.cut:
        problems.append({"key": key, "reason": CUT, "detail": f"its end after token {prompts.length} is left out"})
    return Example(tokens, squares, sizes, problems)


def collate(rows: Sequence[Example], layout: ImageLayout, pad_id: int) -> dict[str, Tensor]:
    """Rows -> a batch of `llava.Llava`, padded at the right to the longest; images stay uint8."""
    longest = max(len(row.tokens.ids) for row in rows)
    batch = {
        "input_ids": torch.tensor([row.tokens.ids + [pad_id] * (longest - len(row.tokens.ids)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row.tokens.ids) + [0] * (longest - len(row.tokens.ids)) for row in rows]),
    }
    learned = torch.tensor([row.tokens.answers + [False] * (longest - len(row.tokens.ids)) for row in rows])
    learned[:, 0] = False  # nothing comes before the first word
    places = learned.flatten().nonzero()[:, 0]
    squares = [one for row in rows for one in row.squares]
    return batch | {
        "answer_positions": places - 1,
        "answer_ids": batch["input_ids"].flatten()[places],
        "pixel_values": torch.cat(squares) if squares else torch.empty(0, 3, layout.size, layout.size, dtype=torch.uint8),
        "image_sizes": torch.tensor([size for row in rows for size in row.sizes], dtype=torch.long).view(-1, 2),
    }


class ConversationBatches(PreparedBatches):
    """Micro-batches of conversations.

    Raises:
        ValueError: a batch that cannot be divided; while iterating, 256 conversations in a row that cannot be used.
    """

    def __init__(self, conversations: Conversations, prompts: Prompts, layout: ImageLayout, seed: int, batch: int, micro_batch: int = 0, **settings: Any):
        super().__init__(batch, micro_batch, **settings)
        self.conversations, self.prompts, self.layout, self.seed = conversations, prompts, layout, seed
        self.problems.extend(conversations.problems, everywhere=True)

    def index(self, position: int) -> int:
        epoch, within = divmod(position, len(self.conversations))
        return Shuffle(len(self.conversations), self.seed, epoch).place(within)[0]

    def sample(self, position: int) -> Example:
        """The conversation at `position` of the run; if it cannot be used, the first usable one of its replacements."""
        problems: list[Problem] = []
        for attempt in range(TRIES):
            index = self.index(position) if not attempt else draw_seed(self.seed, "instead", position, attempt) % len(self.conversations)
            try:
                example = read_example(self.conversations, index, self.prompts, self.layout)
            except ImageError as error:
                problems.append(error.as_problem(self.conversations.key(index)))
                continue
            return example._replace(problems=problems + example.problems)
        last = problems[-1]
        raise ValueError(
            f"{TRIES} conversations in a row cannot be used, the last because of: {last['reason']} ({last['key']}: {last['detail']}); check the data"
        )

    def collate(self, rows: list[Example]) -> Collated:
        return collate(rows, self.layout, self.prompts.pad_id), [problem for row in rows for problem in row.problems]
