"""What `openvision3 evaluate` measures, for any model that is given as functions: the passes over the pictures, and what each of them gives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvision3.data.fingerprint import near_duplicates
from openvision3.data.labelled import Labels, prompts
from openvision3.evaluate.metrics.accuracy import Classification
from openvision3.evaluate.metrics.captioning import evaluate_captions
from openvision3.evaluate.metrics.probe import evaluate_knn, evaluate_linear_probe
from openvision3.evaluate.metrics.reconstruction import evaluate_reconstruction, metrics_of, noise_curve
from openvision3.evaluate.metrics.zeroshot import class_embedding, evaluate_classification, evaluate_retrieval
from openvision3.evaluate.pictures import Pictures, Rows, on_first
from openvision3.evaluate.protocol import Functions, Number, number
from openvision3.evaluate.statistics import Column, Columns
from openvision3.fetch.store import check_published, find
from openvision3.networks.inception import EfficientNetFeatures, Extractor, Inception
from openvision3.networks.perceptual import EfficientNetDistance, Lpips

TEXTS_AT_ONCE = 256


class CannotRun(ValueError):
    """A model or a set of pictures lacks what a metric needs; says what."""


@dataclass
class Measured:
    """Numbers of one model, what could not be measured, and what a page shows of it."""

    numbers: list[Number] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    """(metric, what it needs)"""
    used: list[int] = field(default_factory=list)
    """indices of the pictures that were used"""
    labels: str = "none"
    """where the classes come from, with hashes of what stands for them"""
    captions: str = "none"
    """sha256 of the captions that were compared with"""
    left_out: dict[str, int] = field(default_factory=dict)
    text: str = ""
    """what the model makes nothing of in the texts, in words"""
    """why pictures were left out: how many"""
    shown: dict[str, Any] = field(default_factory=dict)
    columns: Columns = field(default_factory=dict)
    """what each sample scored, by its index in the source: what intervals, paired tests and numbers of a subset are made of"""


COUNTED = 10_000
"""Texts of which unknown pieces are counted, about; evenly spaced among more."""

NEEDS = {
    "reconstruction": ("reconstruct",),
    "retrieval": ("embed_images", "embed_texts"),
    "captioning": ("caption",),
    "zeroshot": ("embed_images", "embed_texts"),
    "probe": ("features",),
}
"""The functions of a model that each kind of evaluation calls."""

CANNOT = {
    "reconstruct": "rebuild pictures",
    "embed_images": "embed pictures",
    "embed_texts": "embed texts",
    "caption": "write captions",
    "features": "be probed",
}


def needs(model: Functions, kind: str) -> None:
    """Raises CannotRun where the model lacks what this kind of evaluation calls."""
    lacking = [CANNOT[name] for name in NEEDS[kind] if getattr(model, name) is None]
    if lacking:
        raise CannotRun(f"{model.name} cannot {' or '.join(lacking)}")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _embed_texts(model: Functions, texts: Sequence[str]) -> Tensor:
    assert model.embed_texts is not None
    return torch.cat([model.embed_texts(texts[i : i + TEXTS_AT_ONCE]).cpu().float() for i in range(0, len(texts), TEXTS_AT_ONCE)])


def _with_text(numbers: list[Number], model: Functions, texts: Sequence[str]) -> tuple[list[Number], str]:
    """(the numbers with what the model makes nothing of in the texts that they depend on, that in words)."""
    told = str(model.count_text(texts[:: max(1, len(texts) // COUNTED)])) if model.count_text is not None else ""
    return [replace(each, detail="; ".join(filter(None, (each.detail, told)))) for each in numbers], told


def image_embeddings(model: Functions, pictures: Pictures) -> Rows:
    """Unit vectors (N, E) of all usable pictures."""
    return pictures.collect_rows(f"{model.name}: embedding pictures", model.embed_images)  # type: ignore[arg-type]


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
        FileNotFoundError: the weights of a metric that was asked for by name, with where to get them and what runs without.
        ValueError: weights that are here and are not the published ones.
    """
    found = Networks()

    def want(metric: str, build: Callable[[], None], named: bool) -> None:
        if metrics and metric not in metrics:
            return
        try:
            build()
        except FileNotFoundError as error:
            if metrics or named:
                raise FileNotFoundError(f"{error}; --metrics {' '.join(OFFLINE)} needs no such file") from error
            found.missing.append((metric, str(error)))

    def rfid() -> None:
        found.extractors.append(Inception(inception or find("inception-2015", needed_by="rFID")).to(device))

    def lpips() -> None:
        asset = f"lpips-{lpips_net}"
        names = {"alex": ("alexnet-owt-7be5be79.pth", "alex.pth"), "vgg": ("vgg16-397923af.pth", "vgg.pth")}[lpips_net]
        backbone, linear = (given or find(asset, name, needed_by="LPIPS") for given, name in zip((lpips_backbone, lpips_linear), names, strict=True))
        for name, path in zip(names, (backbone, linear), strict=True):
            if Path(path).is_file():  # Lpips says what is missing
                check_published(asset, name, Path(path))
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


def reconstruction(
    model: Functions,
    pictures: Pictures,
    networks: Networks,
    sigmas: Sequence[float] = (),
    seed: int = 0,
    protocol: str = "",
    metrics: Sequence[str] = (),
) -> Measured:
    """PSNR, SSIM and what the networks give, each picture's; then the error against noise on the tokens. `metrics` leaves out others; none: all.

    Raises:
        CannotRun: the model rebuilds no pictures.
    """
    needs(model, "reconstruction")
    if model.fixed and pictures.size != model.size:
        raise CannotRun(f"images of {model.size} px, the only ones that {model.name} rebuilds, not of {pictures.size}: --size {model.size}")
    rebuild: Callable[[Tensor], Tensor] = model.reconstruct  # type: ignore[assignment]
    rows = ((batch.indices, batch.keys, batch.images) for batch in pictures.batches(f"{model.name}: rebuilding"))
    told = {"extractors": networks.extractors, "distance": networks.distance, "lpips": networks.lpips, "pictures": protocol, "seed": seed}
    done = evaluate_reconstruction(rows, rebuild, **told)  # type: ignore[arg-type]
    pictures.share()
    curve: list[tuple[float, float, int]] = []
    columns = {name: column for name, column in done.columns.items() if not metrics or name not in ("psnr", "ssim") or name in metrics}
    strengths = [sigma for sigma in sigmas if sigma and (not metrics or "psnr" in metrics)]  # without noise it is what was just measured
    if model.reconstruct_noisy is not None and strengths:
        noisy = model.reconstruct_noisy
        again = ((batch.indices, [f"{seed} {key}" for key in batch.keys], batch.images) for batch in pictures.batches(f"{model.name}: rebuilding from noise"))
        curve, scores = noise_curve(again, noisy, strengths)
        columns |= scores
    numbers = [each for each in done.numbers if not metrics or each.metric not in ("psnr", "ssim") or each.metric in metrics]
    for sigma, value, count in curve:
        numbers.append(number(f"psnr, sigma {sigma:g}", value, count, f"as psnr, N(0, I) x {sigma:g} added to the tokens, drawn from seed and key"))
    if curve and 0 in sigmas:
        curve = sorted([(0.0, sum(done.psnr) / len(done.psnr), len(done.psnr)), *curve])
    missing = list(networks.missing)
    if len(done.indices) < 2:
        missing += [(metric, "two pictures or more") for each in networks.extractors for metric in metrics_of(each)]
    return Measured(numbers, missing, done.indices, shown={"pictures": done, "curve": curve}, columns=columns)


def retrieval(model: Functions, pictures: Pictures, embedded: Rows | None = None, shown: int = 12, shared: bool = True) -> Measured:
    """R@k both ways; every caption of a picture is a candidate. Pictures without a caption are left out and counted.

    `shared`: equal captions are right for each other's pictures, as `evaluate_retrieval` has it.

    Raises:
        CannotRun: no captions, or a model that embeds no texts.
    """
    needs(model, "retrieval")
    found = image_embeddings(model, pictures) if embedded is None else embedded
    captioned = [row for row, captions in enumerate(found.captions) if captions]
    if not captioned:
        raise CannotRun("none of the pictures has a caption; name JSON fields of the shards with --caption-keys, or put x.txt beside x.jpg")
    texts = [text for row in captioned for text in found.captions[row]]
    owners = [place for place, row in enumerate(captioned) for _ in found.captions[row]]
    images = found.values[captioned]

    used = [found.indices[row] for row in captioned]

    def compute() -> tuple[list[Number], list[list[int]], Columns, list[tuple[str, str]]]:
        words = _embed_texts(model, texts)
        nearest = (images[:shown] @ words.T).topk(min(5, len(texts)), dim=1).indices.tolist()
        columns: Columns = {}
        missing: list[tuple[str, str]] = []
        numbers = evaluate_retrieval(images, words, texts, owners, shared=shared, columns=columns, missing=missing)
        return numbers, nearest, _of_samples(columns, used), missing

    numbers, nearest, columns, missing = on_first(compute)
    numbers, lost = _with_text(numbers, model, texts)
    answers = [[(texts[j], texts[j] in found.captions[row]) for j in line] for line, row in zip(nearest, captioned, strict=False)]
    return Measured(
        numbers,
        missing,
        used,
        captions=_hash(texts),
        left_out=_without("a caption", len(found.indices) - len(captioned)),
        text=lost,
        shown={"indices": used[:shown], "answers": answers},
        columns=columns,
    )


def _of_samples(columns: Columns, used: Sequence[int], prefix: str = "") -> Columns:
    """Columns by place among the samples that were used -> by their index in the source, their names with what they are of."""
    return {f"{prefix}{name}": Column([used[place] for place in column.samples], column.values) for name, column in columns.items()}


def captioning(model: Functions, pictures: Pictures, tokenizer: str = "auto", shown: int = 24) -> Measured:
    """Written captions against all those of each picture. Raises CannotRun: no captions to compare with, or a model that writes none."""
    needs(model, "captioning")
    write: Callable[[Tensor], list[str]] = model.caption  # type: ignore[assignment]
    found = pictures.collect(f"{model.name}: writing captions", lambda batch: list(zip(batch.keys, write(batch.images), batch.captions, strict=True)))
    captioned = {index: row for index, row in found.items() if row[2]}
    if not captioned:
        raise CannotRun("none of the pictures has a caption to compare with")
    written, references = [row[1] for row in captioned.values()], [row[2] for row in captioned.values()]

    def compute() -> tuple[list[Number], list[str], Columns]:
        lacking: list[str] = []
        columns: Columns = {}
        return evaluate_captions(written, references, tokenizer, lacking, columns), lacking, _of_samples(columns, list(captioned))

    numbers, lacking, columns = on_first(compute)
    cards = [(index, row[1], row[2][0]) for index, row in list(captioned.items())[:shown]]
    told = {index: {"written": own, "true": list(true)} for index, (_, own, true) in captioned.items()}
    missing = [(metric, what) for line in lacking for metric, _, what in [line.partition(": ")]]
    left_out = _without("a caption", len(found) - len(captioned))
    numbers, lost = _with_text(numbers, model, [text for texts in references for text in texts])
    return Measured(
        numbers, missing, list(captioned), captions=_hash(references), left_out=left_out, text=lost, shown={"cards": cards, "captions": told}, columns=columns
    )


def _without(what: str, count: int) -> dict[str, int]:
    return {f"without {what}": count} if count else {}


def zeroshot(model: Functions, pictures: Pictures, labels: Labels, texts_of: Sequence[Sequence[str]], how: str, embedded: Rows | None = None) -> Measured:
    """The nearest class embedding, each made of the texts of that class; `how` says what these are.

    Raises:
        CannotRun: a model without texts, or no usable picture with a class.
    """
    needs(model, "zeroshot")
    class_of = dict(zip(labels.indices, labels.classes, strict=True))
    found = image_embeddings(model, pictures.subset(labels.indices)) if embedded is None else embedded
    rows = [row for row, index in enumerate(found.indices) if index in class_of]
    if not rows:
        raise CannotRun("no usable picture has a class")
    used = [found.indices[row] for row in rows]

    def compute() -> tuple[Classification, Columns]:
        classes = class_embedding([_embed_texts(model, texts) for texts in texts_of])
        columns: Columns = {}
        done = evaluate_classification(found.values[rows], classes, [class_of[index] for index in used], labels.names, how, columns)
        return done, _of_samples(columns, used, "zeroshot_")

    done, columns = on_first(compute)
    told = f"{len(labels.names)} classes, sha256 of their texts {_hash([list(texts) for texts in texts_of])}"
    numbers, lost = _with_text(_named(done.numbers, "zeroshot"), model, [text for texts in texts_of for text in texts])
    return Measured(numbers, used=used, text=lost, labels=told, left_out=labels.left_out, shown={"classes": done.classes}, columns=columns)


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
    synonyms = sum("," in name for name in labels.names)
    remark = ", a line of synonyms such as OpenCV's and not CLIP's name: compare with no published number" if 2 * synonyms > len(labels.names) else ""
    if kind == "names":
        return [[name] for name in labels.names], f"the text embedding of its name alone{remark}"
    return [prompts(name) for name in labels.names], f"the mean text embedding of its name in CLIP's 80 templates{remark}"


def features(model: Functions, pictures: Pictures, labels: Labels, what: str) -> tuple[Tensor, list[int], list[int]]:
    """(features (n, F), classes, indices) of the usable pictures with a class. Raises CannotRun."""
    needs(model, "probe")
    class_of = dict(zip(labels.indices, labels.classes, strict=True))
    found = pictures.subset(labels.indices).collect_rows(f"{model.name}: features of {what} pictures", model.features)  # type: ignore[arg-type]
    if not found.indices:
        raise CannotRun(f"no usable {what} picture has a class")
    return found.values, [class_of[index] for index in found.indices], found.indices


def probe(model: Functions, train: Pictures, train_labels: Labels, pictures: Pictures, labels: Labels, k: int = 20, device: str = "cpu") -> Measured:
    """k-NN and a logistic regression on frozen features: fitted on the one set, measured on those of the other that are not in it. Raises CannotRun."""
    known, known_classes, trained_on = features(model, train, train_labels, "training")
    seen, classes, used = features(model, pictures, labels, "test")
    twice = {row for row, *_ in near_duplicates(pictures.descriptions(used), train.descriptions(trained_on))}
    apart = [row for row in range(len(used)) if row not in twice]
    both = len(twice)
    if not apart:
        raise CannotRun(f"all {both} test images are training images too, or nearly so: a probe must not be measured on what it was fitted to")
    seen, classes, used = seen[apart], [classes[row] for row in apart], [used[row] for row in apart]

    def compute() -> tuple[list[Number], list[tuple[str, str]], Columns]:
        inside, outside = known.to(device), seen.to(device)
        numbers: list[Number] = []
        missing: list[tuple[str, str]] = []
        columns: Columns = {}
        tests: dict[str, Callable[[Columns], list[Number]]] = {
            "knn": lambda to: evaluate_knn(inside, known_classes, outside, classes, labels.names, k, columns=to),
            "linear_probe": lambda to: evaluate_linear_probe(inside, known_classes, outside, classes, labels.names, columns=to),
        }
        for name, test in tests.items():
            scores: Columns = {}
            try:
                numbers += _named(test(scores), name)
                columns |= _of_samples(scores, used, f"{name}_")
            except ValueError as error:  # such as fewer training pictures than neighbours: the other can do with them
                missing.append((name, str(error)))
        return numbers, missing, columns

    numbers, missing, columns = on_first(compute)
    told = f"{len(labels.names)} classes, sha256 of their names {_hash(list(labels.names))}, of the training pictures {train.digest(trained_on)[:16]}"
    left_out = labels.left_out | {f"training: {why}": count for why, count in train_labels.left_out.items()}
    if both:
        left_out["that are training images too, or near-duplicates of some"] = both
    return Measured(numbers, missing, used, labels=told, left_out=left_out, columns=columns)


def _named(numbers: Sequence[Number], what: str) -> list[Number]:
    """top_1 of the probe and top_1 of zero-shot are two metrics."""
    return [replace(each, metric=f"{what}_{each.metric}") for each in numbers]
