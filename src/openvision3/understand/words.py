"""Where the projector begins: at the best linear guess of the words that the answers about an image hold.

A random projector says nothing to a frozen language model, and thousands of conversations pass before it does. A ridge regression from the tower's tokens
to the word embeddings of answers takes a minute: what the language model then sees in place of an image is near the words that it shall write.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openvision3.data.images import to_tensor
from openvision3.understand.batches import Example

EXAMPLES = 4096
"""most conversations that the guess is fitted to"""
TOKENS = 16
"""most tokens of a square that are looked at, evenly spaced"""
RIDGE = 1e-3
"""the penalty, as a share of the mean square of a hidden value"""
SQUARES = 32
"""squares that the tower reads at a time"""


@torch.no_grad()
def begin_with_words(network: Any, examples: Sequence[Example], layer: int) -> float | None:
    """Fit the projector's second layer, with the first as it was drawn -> the share of the targets' variance that it explains.

    An image's target is the mean word embedding of its answers, rare words counting more (by the logarithm of how few conversations have them), less the
    mean over images, for what all answers share says nothing of one. The fit has the size of word embeddings, which the language model expects.
    Conversations without an image, or with several, are left out; with fewer than two others nothing is fitted, and None returned.
    """
    rows = [(one, own) for one in examples if len(one.squares) == 1 and (own := _answer_words(one))]
    if len(rows) < 2:
        return None
    embedding, projector = network.get_input_embeddings().weight, network.model.multi_modal_projector
    seen = Counter(word for _, words in rows for word in words)
    targets = torch.stack([_mean_embedding(words, seen, len(rows), embedding) for _, words in rows])
    targets -= targets.mean(0)
    squares = torch.cat([one.squares[0] for one, _ in rows])
    of_square = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(one.squares[0]) for one, _ in rows]))
    hidden = torch.cat([_hidden(network, projector, part, layer) for part in squares.split(SQUARES)])  # (P, N, H)
    tokens = hidden.shape[1]
    x, y = hidden.flatten(0, 1).double(), targets[of_square].repeat_interleave(tokens, 0).double()
    mean = x.mean(0)
    x -= mean
    moments = x.T @ x / len(x)
    penalty = RIDGE * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
    weights = torch.linalg.solve(moments + penalty, x.T @ y / len(x))  # (H, W)
    guess = x @ weights
    explained = 1 - float((y - guess).square().mean() / y.square().mean())
    weights *= embedding.float().square().mean().sqrt() / guess.square().mean().sqrt()
    projector.linear_2.weight.copy_(weights.T)
    projector.linear_2.bias.copy_(-mean @ weights)
    return explained


def _answer_words(example: Example) -> set[int]:
    """The different word pieces of the answers."""
    return {word for word, learned in zip(example.tokens.ids, example.tokens.answers, strict=True) if learned}


def _mean_embedding(words: set[int], seen: Counter[int], conversations: int, embedding: Tensor) -> Tensor:
    own = sorted(words)
    weights = torch.tensor([math.log(conversations / seen[word]) for word in own])
    return weights @ embedding[own].float() / weights.sum().clamp_min(1e-6)


def _hidden(network: Any, projector: Any, squares: Tensor, layer: int) -> Tensor:
    """uint8 (P, 3, S, S) -> (P, N, H): what the projector's second layer reads of up to TOKENS tokens."""
    states = network.model.vision_tower(to_tensor(squares), output_hidden_states=True).hidden_states[layer]
    chosen = states[:, torch.linspace(0, states.shape[1] - 1, min(TOKENS, states.shape[1])).round().long()]
    return projector.act(projector.linear_1(chosen.float()))
