"""How well pictures are told apart by words: retrieval and classification, given embeddings of unit length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openvision3.evaluate.reconstruction import Result


def evaluate_retrieval(image_embedding: Tensor, text_embedding: Tensor, captions: Sequence[str], ks: Sequence[int] = (1, 5)) -> Result:
    """Recall at k in both directions over N pairs, (N, E) twice. Pictures with equal captions count as each other's match.

    Raises:
        ValueError: unlike counts, or none.
    """
    count = len(captions)
    if not count or len(image_embedding) != count or len(text_embedding) != count:
        raise ValueError(f"retrieval needs as many pictures as captions; seen {len(image_embedding)} pictures, {len(text_embedding)} texts, {count} captions")
    similarity = image_embedding.float() @ text_embedding.float().T
    ids = {caption: i for i, caption in enumerate(captions)}
    label = torch.tensor([ids[c] for c in captions], device=similarity.device)
    match = label[:, None] == label[None]
    result: Result = {"count": count, "protocol": f"retrieval among {count}, equal captions are positives"}
    for name, scores in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        order = scores.argsort(dim=1, descending=True, stable=True)
        hits = match.gather(1, order)
        for k in ks:
            result[f"{name}_r@{k}"] = hits[:, :k].any(1).float().mean().item()
    return result


def class_embedding(groups: Sequence[Tensor]) -> Tensor:
    """For each class the embeddings (n, E) of its prompts -> (classes, E): their mean, of unit length."""
    return torch.nn.functional.normalize(torch.stack([g.float().mean(0) for g in groups]), dim=-1)


def evaluate_classification(image_embedding: Tensor, classes: Tensor, labels: Sequence[int], names: Sequence[str]) -> Result:
    """Top-1 accuracy of the nearest class embedding, over all pictures and as a mean of the classes that occur.

    Raises:
        ValueError: no pictures, or unlike counts.
    """
    if not labels or len(labels) != len(image_embedding) or len(names) != len(classes):
        raise ValueError(
            f"classification needs a label a picture and a name a class; seen {len(image_embedding)} pictures, {len(labels)} labels, "
            f"{len(classes)} classes, {len(names)} names"
        )
    label = torch.tensor(labels, device=image_embedding.device)
    right = ((image_embedding.float() @ classes.T).argmax(1) == label).float()
    per_class = {name: right[label == i].mean().item() for i, name in enumerate(names) if (label == i).any()}
    chance = label.bincount().max().item() / len(labels)
    return {
        "accuracy": right.mean().item(),
        "mean_class_accuracy": sum(per_class.values()) / len(per_class),
        "largest_class_share": chance,
        **{f"accuracy/{name}": value for name, value in per_class.items()},
        "count": len(labels),
        "protocol": f"nearest of {len(names)} class text embeddings",
    }
