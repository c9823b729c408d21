"""What `openvision3 evaluate` measures, for any model that is given as functions: the passes over the pictures, and what each of them gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from openvision3.data.labelled import Labels, prompts
from openvision3.evaluate.captioning import evaluate_captions
from openvision3.evaluate.features import EfficientNetFeatures, Extractor, Inception
from openvision3.evaluate.pictures import Pictures
from openvision3.evaluate.probe import evaluate_knn, evaluate_linear_probe
from openvision3.evaluate.protocol import Functions, Number, number
from openvision3.evaluate.reconstruction import evaluate_reconstruction, noise_curve
from openvision3.evaluate.zeroshot import class_embedding, evaluate_classification, evaluate_retrieval
from openvision3.fetch import find
from openvision3.model.perceptual import EfficientNetDistance, Lpips

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


@dataclass
class Networks:
    """What pictures are compared by, beside their pixels; None where it was not asked for or is not here."""

    extractors: list[Extractor] = field(default_factory=list)
    distance: EfficientNetDistance | None = None
    lpips: Lpips | None = None
    missing: list[tuple[str, str]] = field(default_factory=list)
    """(metric, what it needs)"""


OFFLINE = ("psnr", "ssim", "distance", "kid")
"""what needs no weights but those that come with the package"""


def reconstruction_networks(
    metrics: Sequence[str], inception: str = "", lpips_net: str = "alex", lpips_backbone: str = "", lpips_linear: str = "", device: str = "cpu"
) -> Networks:
    """The networks of `metrics`; of none: of all whose weights are here, the others in `missing`.

    Raises:
        FileNotFoundError, ValueError: the weights of a metric that was asked for by name, with where to get them and what runs without.
    """
    found = Networks()

    def want(metric: str, build: Callable[[], None], named: bool) -> None:
        if metrics and metric not in metrics:
            return
        try:
            build()
        except FileNotFoundError as error:
            if metrics or named:
                raise FileNotFoundError(f"{error}; without it run --metrics {' '.join(OFFLINE)}") from error
            found.missing.append((metric, str(error)))

    def rfid() -> None:
        found.extractors.append(Inception(inception or find("inception-2015", needed_by="rFID")).to(device))

    def lpips() -> None:
        asset = f"lpips-{lpips_net}"
        names = {"alex": ("alexnet-owt-7be5be79.pth", "alex.pth"), "vgg": ("vgg16-397923af.pth", "vgg.pth")}[lpips_net]
        backbone, linear = (given or find(asset, name, needed_by="LPIPS") for given, name in zip((lpips_backbone, lpips_linear), names, strict=True))
        found.lpips = Lpips(lpips_net, backbone, linear).to(device)

    def distance() -> None:
        found.distance = EfficientNetDistance().to(device)

    def kid() -> None:
        found.extractors.append(EfficientNetFeatures().to(device))

    want("distance", distance, False)
    want("kid", kid, False)
    want("lpips", lpips, bool(lpips_backbone or lpips_linear))
    want("rfid", rfid, bool(inception))
    return found


def reconstruction(model: Functions, pictures: Pictures, networks: Networks, sigmas: Sequence[float] = (), seed: int = 0) -> Measured:
    """PSNR, SSIM and what the networks give, each picture's; then the error against noise on the tokens. Raises CannotRun."""
    needs(model, "reconstruct")
    rebuild: Callable[[Tensor], Tensor] = model.reconstruct  # type: ignore[assignment]
    rows = ((batch.indices, batch.keys, batch.images) for batch in pictures.batches(f"{model.name}: rebuilding"))
    done = evaluate_reconstruction(rows, rebuild, extractors=networks.extractors, distance=networks.distance, lpips=networks.lpips)
    pictures.share_problems()
    curve: list[tuple[float, float, int]] = []
    if model.reconstruct_noisy is not None and sigmas:
        noisy = model.reconstruct_noisy
        again = ((batch.indices, [f"{seed} {key}" for key in batch.keys], batch.images) for batch in pictures.batches(f"{model.name}: rebuilding from noise"))
        curve = noise_curve(again, noisy, sigmas)
    numbers = list(done.numbers)
    for sigma, value, count in curve:
        if sigma:
            numbers.append(number(f"psnr, sigma {sigma:g}", value, count, f"as psnr, N(0, I) x {sigma:g} added to the tokens, drawn from seed and key"))
    return Measured(numbers, list(networks.missing), done.keys, {"pictures": done, "curve": curve})


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
    told = [{"key": key, "written": own, "true": list(true)} for key, own, true in captioned.values()]
    missing = [(metric, what) for line in lacking for metric, _, what in [line.partition(": ")]]
    return Measured(numbers, missing, [row[0] for row in captioned.values()], {"cards": cards, "captions": told, "left_out": len(found) - len(captioned)})


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
