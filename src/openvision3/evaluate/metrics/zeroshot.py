"""Retrieval and zero-shot classification from embeddings of unit length.

Protocol of CLIP (Radford et al. 2021, section 3.1) for classes, and of Karpathy and Fei-Fei (2015) for retrieval, where one
image has several captions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from openvision3.evaluate.metrics.accuracy import Classification, accuracies, check_labels, ranks
from openvision3.evaluate.protocol import Number, number
from openvision3.evaluate.statistics import Column, Columns

SCORES_AT_ONCE = 2**24
"""similarities in memory at a time: 64 MB"""
EQUAL = 1e-6
"""Cosines this close are a tie, because matrix products differ in the last bits. In retrieval a tie counts
against the model, so that constant embeddings score nothing; among classes the first one is taken."""


def evaluate_retrieval(
    image_embedding: Tensor,
    text_embedding: Tensor,
    texts: Sequence[str],
    owners: Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
    shared: bool = True,
    columns: Columns | None = None,
    missing: list[tuple[str, str]] | None = None,
) -> list[Number]:
    """(N, E) images, (M, E) texts, text j of image owners[j] -> image_to_text_r@k and text_to_image_r@k, and the median rank each way.

    A string that several images have is right for all of them; with `shared` False, as in CLIP_benchmark, only the texts that an image was given
    itself are right, though others read the same. Of several right ones the best placed counts. Its rank is one more than the number of wrong
    candidates that are as similar or more (within EQUAL). The ranks are added to `columns`, by the place of the image.

    R@k is measured where a model could miss: with fewer than k wrong candidates for each query any model has 100 %, which is added to `missing`.

    Raises:
        ValueError: unlike counts, none, owners out of range, an image without a text, or embeddings with NaN or infinite numbers.
    """
    images, count = len(image_embedding), len(texts)
    if not count or len(text_embedding) != count or len(owners) != count:
        raise ValueError(f"retrieval needs an embedding and an image for each text; seen {count} texts, {len(text_embedding)} embeddings, {len(owners)} owners")
    if set(owners) != set(range(images)):
        strange = sorted(set(owners) ^ set(range(images)))
        raise ValueError(f"retrieval needs a text for each of the {images} images, and an image for each text; first that is not so: {strange[0]}")
    for embedding, what in ((image_embedding, "image"), (text_embedding, "text")):
        if not embedding.isfinite().all():
            raise ValueError(f"some {what} embeddings hold NaN or infinite numbers; look at the model in fp32")
    image, text = image_embedding.float(), text_embedding.float().to(image_embedding.device)
    unlike = len(dict.fromkeys(texts))
    names: Sequence[Hashable] = texts if shared else list(zip(texts, owners, strict=True))  # equal texts of two images are then two
    numbered = {name: i for i, name in enumerate(dict.fromkeys(names))}
    string, owner = torch.tensor([numbered[name] for name in names], device=image.device), torch.tensor(owners, device=image.device)

    def texts_of(start: int, stop: int) -> Tensor:
        """Which texts are right for images start to stop: (stop - start, M)."""
        own = (owner >= start) & (owner < stop)
        has = torch.zeros(stop - start, len(numbered), dtype=torch.bool, device=image.device)
        has[owner[own] - start, string[own]] = True
        return has[:, string]

    def images_of(start: int, stop: int) -> Tensor:
        """Which images are right for texts start to stop: (stop - start, N)."""
        asked, row = string[start:stop].unique(return_inverse=True)
        same = torch.isin(string, asked)
        has = torch.zeros(len(asked), images, dtype=torch.bool, device=image.device)
        has[torch.searchsorted(asked, string[same]), owner[same]] = True
        return has[row]

    found = []
    rule = "equal texts are right for every image that has one" if shared else "only an image's own texts are right for it"
    rule += ", the best placed right one counts, ties count against"
    for way, (rank, last), what, asking in (
        ("image_to_text", _best_ranks(image, text, texts_of), f"{count} texts ({unlike} unlike ones)", range(images)),
        ("text_to_image", _best_ranks(text, image, images_of), f"{images} images", owners),
    ):
        if columns is not None:
            columns[f"{way}_rank"] = Column(list(asking), rank.tolist())
        for k in ks:
            how = f"share with a right one among the first {k} of {what} by cosine; {rule}"
            if k < last:
                found.append(number(f"{way}_r@{k}", (rank <= k).double().mean().item(), len(rank), how))
            elif missing is not None:
                missing.append((f"{way}_r@{k}", f"more candidates: R@{k} of {what} is 100 % for any model"))
        middle = rank.double().quantile(0.5).item()
        found.append(number(f"{way}_median_rank", middle, len(rank), f"median place of the best placed right one among {what} by cosine, from 1; {rule}"))
    return found


def _best_ranks(queries: Tensor, candidates: Tensor, right_for: Callable[[int, int], Tensor]) -> tuple[Tensor, int]:
    """For each query the rank of its best correct candidate, from 1, and the worst possible rank.

    In chunks of SCORES_AT_ONCE. `right_for` gives (chunk, candidates).
    """
    chunk, found = max(1, SCORES_AT_ONCE // len(candidates)), []
    last = 1
    for start in range(0, len(queries), chunk):
        stop = min(start + chunk, len(queries))
        scores, right = queries[start:stop] @ candidates.T, right_for(start, stop)
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        found.append(1 + ((scores >= best - EQUAL) & ~right).sum(1))
        last = max(last, 1 + int((~right).sum(1).max()))
    return torch.cat(found), last


def evaluate_classification(
    image_embedding: Tensor,
    classes: Tensor,
    labels: Sequence[int],
    names: Sequence[str],
    prompts: str = "the mean text embedding of its prompts",
    columns: Columns | None = None,
) -> Classification:
    """(N, E) images of class labels[i] against (C, E) class embeddings -> accuracy of the nearest class, and that of each class.

    `prompts` says what a class embedding was made of; ranks are added to `columns`. Of equally near classes (within EQUAL) the first named is taken.

    Raises:
        ValueError: no images, unlike counts, or embeddings with NaN or infinite numbers.
    """
    if len(names) != len(classes):
        raise ValueError(f"classification needs a name for each class; seen {len(classes)} classes, {len(names)} names")
    check_labels(image_embedding, labels, names, "classification")
    label, found = torch.tensor(labels, device=image_embedding.device), []
    chunk = max(1, SCORES_AT_ONCE // len(classes))
    for start in range(0, len(labels), chunk):
        scores = image_embedding[start : start + chunk].float() @ classes.float().to(image_embedding.device).T
        found.append(ranks(scores, label[start : start + chunk], EQUAL))
    how = f"zero-shot, the nearest of {len(names)} classes by cosine, a class is {prompts}"
    return accuracies(torch.cat(found), labels, names, how, first_few=True, columns=columns)
