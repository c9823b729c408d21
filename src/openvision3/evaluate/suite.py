"""What `openvision3 evaluate` measures, for any model that is given as functions: the passes over the pictures, and what each of them gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from openvision3.data.labelled import Labels, prompts
from openvision3.evaluate.captioning import evaluate_captions
from openvision3.evaluate.classes import ClassRow
from openvision3.evaluate.pictures import Pictures
from openvision3.evaluate.probe import evaluate_knn, evaluate_linear_probe
from openvision3.evaluate.protocol import Functions, Number
from openvision3.evaluate.zeroshot import class_embedding, evaluate_classification, evaluate_retrieval

TEXTS_AT_ONCE = 256


class CannotRun(ValueError):
    """A model or a set of pictures lacks what a metric needs; says what."""


@dataclass
class Measured:
    """Numbers of one model, what could not be measured, and what a page shows of it."""

    numbers: list[Number] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    """(metric, what it needs)"""
    keys: list[str] = field(default_factory=list)
    """of the pictures that were used"""
    shown: dict[str, Any] = field(default_factory=dict)


def needs(model: Functions, *names: str) -> None:
    """Raises CannotRun where the model has no such function."""
    lacking = [name for name in names if getattr(model, name) is None]
    if lacking:
        raise CannotRun(f"{model.name} cannot {' and '.join(lacking)}" + (f" ({model.note})" if model.note else ""))


def _rows(found: dict[int, Any]) -> Tensor:
    return torch.stack([torch.as_tensor(row) for row in found.values()])


def _embed_texts(model: Functions, texts: Sequence[str]) -> Tensor:
    assert model.embed_texts is not None
    return torch.cat([model.embed_texts(texts[i : i + TEXTS_AT_ONCE]).cpu().float() for i in range(0, len(texts), TEXTS_AT_ONCE)])


def image_embeddings(model: Functions, pictures: Pictures) -> dict[int, tuple[str, Any, tuple[str, ...]]]:
    """{index: (key, unit vector, captions)} of all usable pictures. Raises CannotRun."""
    needs(model, "embed_images")
    embed: Callable[[Tensor], Tensor] = model.embed_images  # type: ignore[assignment]
    return pictures.collect(
        f"{model.name}: embedding pictures", lambda batch: list(zip(batch.keys, embed(batch.images).float().cpu().numpy(), batch.captions, strict=True))
    )


def retrieval(model: Functions, pictures: Pictures, embedded: dict | None = None, shown: int = 12) -> Measured:
    """R@k both ways; every caption of a picture is a candidate. Pictures without a caption are left out and counted.

    Raises:
        CannotRun: no captions, or a model that embeds no texts.
    """
    needs(model, "embed_images", "embed_texts")
    found = image_embeddings(model, pictures) if embedded is None else embedded
    captioned = {index: row for index, row in found.items() if row[2]}
    if not captioned:
        raise CannotRun("none of the pictures has a caption; name JSON fields of the shards with --caption-keys, or put x.txt beside x.jpg")
    texts = [text for _, _, captions in captioned.values() for text in captions]
    owners = [row for row, (_, _, captions) in enumerate(captioned.values()) for _ in captions]
    images, words = _rows({index: row[1] for index, row in captioned.items()}), _embed_texts(model, texts)
    numbers = evaluate_retrieval(images, words, texts, owners)
    best = (images[:shown] @ words.T).topk(min(5, len(texts)), dim=1)
    answers = [[(texts[j], texts[j] in row[2]) for j in line] for line, row in zip(best.indices.tolist(), captioned.values(), strict=False)]
    return Measured(
        numbers,
        keys=[row[0] for row in captioned.values()],
        shown={"indices": list(captioned)[:shown], "answers": answers, "left_out": len(found) - len(captioned)},
    )


def captioning(model: Functions, pictures: Pictures, tokenizer: str = "auto", shown: int = 24) -> Measured:
    """Written captions against all those of each picture. Raises CannotRun: no captions to compare with, or a model that writes none."""
    needs(model, "caption")
    write: Callable[[Tensor], list[str]] = model.caption  # type: ignore[assignment]
    found = pictures.collect(f"{model.name}: writing captions", lambda batch: list(zip(batch.keys, write(batch.images), batch.captions, strict=True)))
    captioned = {index: row for index, row in found.items() if row[2]}
    if not captioned:
        raise CannotRun("none of the pictures has a caption to compare with")
    lacking: list[str] = []
    written, references = [row[1] for row in captioned.values()], [row[2] for row in captioned.values()]
    numbers = evaluate_captions(written, references, tokenizer, lacking)
    cards = [(index, row[1], row[2][0]) for index, row in list(captioned.items())[:shown]]
    missing = [(metric, what) for line in lacking for metric, _, what in [line.partition(": ")]]
    return Measured(numbers, missing, [row[0] for row in captioned.values()], {"cards": cards, "left_out": len(found) - len(captioned)})


def zeroshot(model: Functions, pictures: Pictures, labels: Labels, texts_of: Sequence[Sequence[str]], how: str, embedded: dict | None = None) -> Measured:
    """The nearest class embedding, each made of the texts of that class; `how` says what these are.

    Raises:
        CannotRun: a model without texts, or no usable picture with a class.
    """
    needs(model, "embed_images", "embed_texts")
    class_of = dict(zip(labels.indices, labels.classes, strict=True))
    found = image_embeddings(model, pictures.subset(labels.indices)) if embedded is None else embedded
    used = {index: row for index, row in found.items() if index in class_of}
    if not used:
        raise CannotRun("no usable picture has a class")
    classes = class_embedding([_embed_texts(model, texts) for texts in texts_of])
    done = evaluate_classification(_rows({i: row[1] for i, row in used.items()}), classes, [class_of[i] for i in used], labels.names, how)
    return Measured(_named(done.numbers, "zeroshot"), keys=[row[0] for row in used.values()], shown={"classes": done.classes, "left_out": labels.left_out})


def class_texts(labels: Labels, kind: str, training: tuple[Any, Labels] | None) -> tuple[list[list[str]], str]:
    """(texts of each class, what they are). `kind` is templates, names, or captions: those of the training pictures of a class.

    Raises:
        CannotRun: captions without training pictures, or classes of which only numbers are known.
    """
    if kind == "captions":
        if training is None:
            raise CannotRun("prompts captions are those of training pictures; name these with --train")
        source, of = training
        texts: list[list[str]] = [[] for _ in labels.names]
        for index, number in zip(of.indices, of.classes, strict=True):
            texts[number] += source.captions(index)[:1]
        if not all(texts):
            raise CannotRun(f"class {labels.names[texts.index([])]!r} has no training picture with a caption")
        return texts, "the mean text embedding of the first captions of its training pictures"
    if labels.numbered:
        raise CannotRun(f"classes are known by number only ({', '.join(labels.names[:3])} ...); name a file of class names with --classes")
    if kind == "names":
        return [[name] for name in labels.names], "the text embedding of its name alone"
    return [prompts(name) for name in labels.names], "the mean text embedding of its name in CLIP's 80 templates"


def features(model: Functions, pictures: Pictures, labels: Labels, what: str) -> tuple[Tensor, list[int], list[str]]:
    """(features (n, F), classes, keys) of the usable pictures with a class. Raises CannotRun."""
    needs(model, "features")
    see: Callable[[Tensor], Tensor] = model.features  # type: ignore[assignment]
    class_of = dict(zip(labels.indices, labels.classes, strict=True))
    found = pictures.subset(labels.indices).collect(
        f"{model.name}: features of {what} pictures", lambda batch: list(zip(batch.keys, see(batch.images).float().cpu().numpy(), strict=True))
    )
    if not found:
        raise CannotRun(f"no usable {what} picture has a class")
    return _rows({i: row[1] for i, row in found.items()}), [class_of[i] for i in found], [row[0] for row in found.values()]


def probe(model: Functions, train: Pictures, train_labels: Labels, pictures: Pictures, labels: Labels, k: int = 20) -> Measured:
    """k-NN and a logistic regression on frozen features: fitted on the one set, measured on the other. Raises CannotRun, ValueError."""
    known, known_classes, _ = features(model, train, train_labels, "training")
    seen, classes, keys = features(model, pictures, labels, "test")
    numbers = _named(evaluate_knn(known, known_classes, seen, classes, labels.names, k), "knn")
    numbers += _named(evaluate_linear_probe(known, known_classes, seen, classes, labels.names), "linear_probe")
    return Measured(numbers, keys=keys, shown={"left_out": labels.left_out, "training_left_out": train_labels.left_out})


def _named(numbers: Sequence[Number], what: str) -> list[Number]:
    """top_1 of the probe and top_1 of zero-shot are two metrics."""
    return [replace(each, metric=f"{what}_{each.metric}") for each in numbers]


__all__ = ["CannotRun", "ClassRow", "Measured", "captioning", "class_texts", "probe", "retrieval", "zeroshot"]
