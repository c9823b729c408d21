"""The kinds of evaluation, for any model given as functions: one pass over the images each, and its results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvision3.data.fingerprint import near_duplicates
from openvision3.data.labelled import TEMPLATES, Labels, prompts
from openvision3.evaluate.image_set import ImageSet, Rows, on_first
from openvision3.evaluate.metrics.accuracy import Classification
from openvision3.evaluate.metrics.captioning import evaluate_captions
from openvision3.evaluate.metrics.probe import evaluate_knn, evaluate_linear_probe
from openvision3.evaluate.metrics.reconstruction import Networks, evaluate_reconstruction, metrics_of, noise_curve
from openvision3.evaluate.metrics.zeroshot import evaluate_classification, evaluate_retrieval
from openvision3.evaluate.options import Options
from openvision3.evaluate.protocol import Functions, Number, number
from openvision3.evaluate.statistics import Column, Columns
from openvision3.fetch.store import check_published, find
from openvision3.model.understanding import class_embedding
from openvision3.networks.inception import EfficientNetFeatures, Inception
from openvision3.networks.perceptual import EfficientNetDistance, Lpips

TEXTS_AT_ONCE = 256


class CannotRun(ValueError):
    """A model or a set of images lacks something that a metric needs; the message names it."""


@dataclass
class Measured:
    """The numbers of one model in one kind, the metrics that could not be measured, and material for the page."""

    numbers: list[Number] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    """(metric, what it needs)"""
    used: list[int] = field(default_factory=list)
    """indices of the images that were used"""
    labels: str = "none"
    """source of the classes, with hashes of the texts or images that represent them"""
    captions: str = "none"
    """sha256 of the reference captions"""
    left_out: dict[str, int] = field(default_factory=dict)
    """{reason: number of images left out}"""
    text: str = ""
    """one line about unknown words and truncated texts"""
    shown: dict[str, Any] = field(default_factory=dict)
    columns: Columns = field(default_factory=dict)
    """the scores of each sample by its index in the source; intervals, paired tests and numbers of subsets are computed from them"""
    alone: Callable[[Collection[int]], Measured] | None = None
    """measures these samples as a set of their own, where their scores depend on the other samples; it runs on rank 0"""


COUNTED = 10_000
"""About so many texts, evenly spaced, are checked for unknown words."""

NEEDS = {
    "reconstruction": ("reconstruct",),
    "retrieval": ("embed_images", "embed_texts"),
    "captioning": ("caption",),
    "zeroshot": ("embed_images", "embed_texts"),
    "probe": ("features",),
}
"""The functions of a model that each kind of evaluation calls."""

CANNOT = {
    "reconstruct": "rebuild images",
    "embed_images": "embed images",
    "embed_texts": "embed texts",
    "caption": "write captions",
    "features": "be probed",
}


def needs(model: Functions, kind: str) -> None:
    """Raises CannotRun if the model lacks a function that this kind of evaluation calls."""
    lacking = [CANNOT[name] for name in NEEDS[kind] if getattr(model, name) is None]
    if lacking:
        raise CannotRun(f"{model.name} cannot {' or '.join(lacking)}")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _embed_texts(model: Functions, texts: Sequence[str]) -> Tensor:
    assert model.embed_texts is not None
    return torch.cat([model.embed_texts(texts[i : i + TEXTS_AT_ONCE]).cpu().float() for i in range(0, len(texts), TEXTS_AT_ONCE)])


def _with_text(numbers: list[Number], model: Functions, texts: Sequence[str]) -> tuple[list[Number], str]:
    """Add one line about unknown words and truncated texts to `detail` of the numbers. Returns (numbers, that line)."""
    remark = str(model.count_text(texts[:: max(1, len(texts) // COUNTED)])) if model.count_text is not None else ""
    return [replace(number, detail="; ".join(filter(None, (number.detail, remark)))) for number in numbers], remark


def image_embeddings(model: Functions, images: ImageSet) -> Rows:
    """Unit vectors (N, E) of all readable images."""
    return images.collect_rows(f"{model.name}: embedding images", model.embed_images)  # type: ignore[arg-type]


OFFLINE = ("psnr", "ssim", "distance", "kid")
"""metrics that need no weights beyond those in the package"""


def reconstruction_networks(options: Options) -> Networks:
    """The networks of the metrics that `options` names, or of all metrics whose weights are present; the others are listed in `missing`.

    Raises:
        FileNotFoundError: weights of a named metric are missing; the message says where to get them and which metrics need none.
        ValueError: weights that differ from the published ones.
    """
    networks, device = Networks(), options.device
    lpips_files = options.lpips_backbone, options.lpips_linear

    def add_rfid() -> None:
        networks.extractors.append(Inception(options.inception or find("inception-2015", needed_by="rFID")).to(device))

    def add_lpips() -> None:
        asset = f"lpips-{options.lpips_net}"
        names = {"alex": ("alexnet-owt-7be5be79.pth", "alex.pth"), "vgg": ("vgg16-397923af.pth", "vgg.pth")}[options.lpips_net]
        paths = [path or find(asset, name, needed_by="LPIPS") for path, name in zip(lpips_files, names, strict=True)]
        for name, path in zip(names, paths, strict=True):
            if Path(path).is_file():  # Lpips reports a missing file
                check_published(asset, name, Path(path))
        networks.lpips = Lpips(options.lpips_net, *paths).to(device)

    def add_distance() -> None:
        networks.distance = EfficientNetDistance().to(device)

    def add_kid() -> None:
        networks.extractors.append(EfficientNetFeatures().to(device))

    add: dict[str, Callable[[], None]] = {"distance": add_distance, "kid": add_kid, "lpips": add_lpips, "rfid": add_rfid}
    named = {"lpips": any(lpips_files), "rfid": bool(options.inception)}
    for metric in [metric for metric in add if not options.metrics or metric in options.metrics]:
        try:
            add[metric]()
        except FileNotFoundError as error:
            if options.metrics or named[metric]:
                raise FileNotFoundError(f"{error}; --metrics {' '.join(OFFLINE)} needs no such file") from error
            networks.missing.append((metric, str(error)))
    return networks


def reconstruction(model: Functions, images: ImageSet, networks: Networks, options: Options, protocol: str = "") -> Measured:
    """PSNR, SSIM and the metrics of the networks, then PSNR against noise on the tokens.

    Raises:
        CannotRun: the model reconstructs no images, or none of this size.
    """
    needs(model, "reconstruction")
    if model.fixed and images.size != model.size:
        raise CannotRun(f"images of {model.size} px, the only ones that {model.name} rebuilds, not of {images.size}: --size {model.size}")

    def is_wanted(metric: str) -> bool:
        return not options.metrics or metric not in ("psnr", "ssim") or metric in options.metrics

    rows = ((batch.indices, batch.keys, batch.images) for batch in images.batches(f"{model.name}: rebuilding"))
    done = evaluate_reconstruction(rows, model.reconstruct, networks, protocol, options.seed)  # type: ignore[arg-type]
    images.share()
    columns = {name: column for name, column in done.columns.items() if is_wanted(name)}
    numbers = [entry for entry in done.numbers if is_wanted(entry.metric)]
    curve: list[tuple[float, float, int]] = []
    strengths = [sigma for sigma in options.sigmas if sigma and is_wanted("psnr")]  # sigma 0 has just been measured
    if model.reconstruct_noisy is not None and strengths:
        batches = images.batches(f"{model.name}: rebuilding from noise")
        rows = ((batch.indices, [f"{options.seed} {key}" for key in batch.keys], batch.images) for batch in batches)
        curve, scores = noise_curve(rows, model.reconstruct_noisy, strengths)
        columns |= scores
    for sigma, value, count in curve:
        numbers.append(number(f"psnr, sigma {sigma:g}", value, count, f"as psnr, N(0, I) x {sigma:g} added to the tokens, drawn from seed and key"))
    if curve and 0 in options.sigmas:
        curve = sorted([(0.0, sum(done.psnr) / len(done.psnr), len(done.psnr)), *curve])
    missing = list(networks.missing)
    if len(done.indices) < 2:
        missing += [(metric, "two images or more") for each in networks.extractors for metric in metrics_of(each)]
    return Measured(numbers, missing, done.indices, shown={"images": done, "curve": curve}, columns=columns)


def retrieval(model: Functions, embedded: Rows, *, shared: bool = True, shown: int = 12) -> Measured:
    """R@k in both directions from the embeddings of the images. Every caption is a candidate; images without a caption are left out and counted.

    `shared`: a caption is correct for every image that has an equal one, as in `evaluate_retrieval`.

    Raises:
        CannotRun: no captions.
    """
    captioned = [row for row, captions in enumerate(embedded.captions) if captions]
    if not captioned:
        raise CannotRun("none of the images has a caption; name JSON fields of the shards with --caption-keys, or put x.txt beside x.jpg")
    texts = [text for row in captioned for text in embedded.captions[row]]
    owners = [place for place, row in enumerate(captioned) for _ in embedded.captions[row]]
    images, used = embedded.values[captioned], [embedded.indices[row] for row in captioned]

    words: list[Tensor] = []  # on rank 0

    def compute() -> tuple[list[Number], list[list[int]], Columns, list[tuple[str, str]]]:
        words.append(_embed_texts(model, texts))
        nearest = (images[:shown] @ words[0].T).topk(min(5, len(texts)), dim=1).indices.tolist()
        columns: Columns = {}
        missing: list[tuple[str, str]] = []
        numbers = evaluate_retrieval(images, words[0], texts, owners, shared=shared, columns=columns, missing=missing)
        return numbers, nearest, _of_samples(columns, used), missing

    def alone(samples: Collection[int]) -> Measured:
        rows = [place for place, index in enumerate(used) if index in samples]
        place_of = {row: place for place, row in enumerate(rows)}
        own = [j for j, owner in enumerate(owners) if owner in place_of]
        columns: Columns = {}
        missing: list[tuple[str, str]] = []
        of_texts = [texts[j] for j in own], [place_of[owners[j]] for j in own]
        numbers = evaluate_retrieval(images[rows], words[0][own], *of_texts, shared=shared, columns=columns, missing=missing)
        return Measured(numbers, missing, columns=_of_samples(columns, [used[row] for row in rows]))

    numbers, nearest, columns, missing = on_first(compute)
    numbers, remark = _with_text(numbers, model, texts)
    answers = [[(texts[j], texts[j] in embedded.captions[row]) for j in line] for line, row in zip(nearest, captioned, strict=False)]
    return Measured(
        numbers,
        missing,
        used,
        captions=_hash(texts),
        left_out=_without("a caption", len(embedded.indices) - len(captioned)),
        text=remark,
        shown={"indices": used[:shown], "answers": answers},
        columns=columns,
        alone=alone,
    )


def _of_samples(columns: Columns, used: Sequence[int], prefix: str = "") -> Columns:
    """Columns by position among the used samples -> columns by index in the source, with a prefix to their names."""
    return {f"{prefix}{name}": Column([used[place] for place in column.samples], column.values) for name, column in columns.items()}


def captioning(model: Functions, images: ImageSet, tokenizer: str = "auto", shown: int = 24) -> Measured:
    """Written captions against all captions of each image. Raises CannotRun: no reference captions, or a model that writes none."""
    needs(model, "captioning")
    write: Callable[[Tensor], list[str]] = model.caption  # type: ignore[assignment]
    captions = images.collect(f"{model.name}: writing captions", lambda batch: list(zip(batch.keys, write(batch.images), batch.captions, strict=True)))
    captioned = {index: row for index, row in captions.items() if row[2]}
    if not captioned:
        raise CannotRun("none of the images has a caption to compare with")
    written, references = [row[1] for row in captioned.values()], [row[2] for row in captioned.values()]

    def compute() -> tuple[list[Number], list[str], Columns]:
        lacking: list[str] = []
        columns: Columns = {}
        return evaluate_captions(written, references, tokenizer, lacking, columns), lacking, _of_samples(columns, list(captioned))

    numbers, lacking, columns = on_first(compute)
    cards = [(index, row[1], row[2][0]) for index, row in list(captioned.items())[:shown]]
    both = {index: {"written": own, "true": list(true)} for index, (_, own, true) in captioned.items()}
    missing = [(metric, what) for line in lacking for metric, _, what in [line.partition(": ")]]
    left_out = _without("a caption", len(captions) - len(captioned))
    numbers, remark = _with_text(numbers, model, [text for texts in references for text in texts])
    return Measured(
        numbers, missing, list(captioned), captions=_hash(references), left_out=left_out, text=remark, shown={"cards": cards, "captions": both}, columns=columns
    )


def _without(what: str, count: int) -> dict[str, int]:
    return {f"without {what}": count} if count else {}


def zeroshot(model: Functions, images: ImageSet, labels: Labels, texts_of: Sequence[Sequence[str]], how: str, embedded: Rows | None = None) -> Measured:
    """Classify each image by the nearest class embedding, the mean over the texts of a class; `how` describes these texts.

    Raises:
        CannotRun: a model that embeds no texts, or no readable image with a class.
    """
    needs(model, "zeroshot")
    class_of = dict(zip(labels.indices, labels.classes, strict=True))
    embeddings = image_embeddings(model, images.subset(labels.indices)) if embedded is None else embedded
    rows = [row for row, index in enumerate(embeddings.indices) if index in class_of]
    if not rows:
        raise CannotRun("no usable image has a class")
    used = [embeddings.indices[row] for row in rows]

    def compute() -> tuple[Classification, Columns]:
        classes = class_embedding([_embed_texts(model, texts) for texts in texts_of])
        columns: Columns = {}
        done = evaluate_classification(embeddings.values[rows], classes, [class_of[index] for index in used], labels.names, how, columns)
        return done, _of_samples(columns, used, "zeroshot_")

    done, columns = on_first(compute)
    origin = f"{len(labels.names)} classes, sha256 of their texts {_hash([list(texts) for texts in texts_of])}"
    numbers, remark = _with_text(_named(done.numbers, "zeroshot"), model, [text for texts in texts_of for text in texts])
    return Measured(numbers, used=used, text=remark, labels=origin, left_out=labels.left_out, shown={"classes": done.classes}, columns=columns)


def class_texts(labels: Labels, kind: str, training: tuple[Any, Labels] | None, templates: Sequence[str] = ()) -> tuple[list[list[str]], str]:
    """(texts of each class, description of these texts). `kind` is templates, names or captions (of the training images of a class).

    `templates` replace CLIP's. Several names of a class are separated by |.

    Raises:
        CannotRun: captions without training images, or classes without names.
    """
    if kind == "captions":
        if training is None:
            raise CannotRun("prompts captions are those of training images; name these with --train")
        source, of = training
        texts: list[list[str]] = [[] for _ in labels.names]
        for index, number in zip(of.indices, of.classes, strict=True):
            texts[number] += source.captions(index)[:1]
        if not all(texts):
            raise CannotRun(f"class {labels.names[texts.index([])]!r} has no training image with a caption")
        return texts, "the mean text embedding of the first captions of its training images"
    if labels.numbered:
        raise CannotRun(f"classes are known by number only ({', '.join(labels.names[:3])} ...); name a file of class names with --classes")
    synonyms = sum("," in name for name in labels.names)
    remark = ", a line of synonyms such as OpenCV's and not CLIP's name: compare with no published number" if 2 * synonyms > len(labels.names) else ""
    named = [[name.strip() for name in line.split("|")] for line in labels.names]
    several = "names" if any(len(names) > 1 for names in named) else "name"
    if kind == "names":
        return named, f"the text embedding of its {several} alone{remark}"
    frame = f"the templates {', '.join(map(repr, templates))}" if templates else "CLIP's 80 templates"
    texts = [[text for name in names for text in prompts(name, templates or TEMPLATES)] for names in named]
    return texts, f"the mean text embedding of its {several} in {frame}{remark}"


@dataclass
class LabelledSet:
    """Images, and the classes of some of them."""

    images: ImageSet
    labels: Labels

    def features(self, model: Functions, what: str) -> tuple[Tensor, list[int], list[int]]:
        """(features (n, F), classes, indices) of the readable images with a class. Raises CannotRun."""
        class_of = dict(zip(self.labels.indices, self.labels.classes, strict=True))
        rows = self.images.subset(self.labels.indices).collect_rows(f"{model.name}: features of {what} images", model.features)  # type: ignore[arg-type]
        if not rows.indices:
            raise CannotRun(f"no usable {what} image has a class")
        return rows.values, [class_of[index] for index in rows.indices], rows.indices


def probe(model: Functions, train: LabelledSet, test: LabelledSet, k: int = 20, device: str = "cpu") -> Measured:
    """k-NN and a logistic regression on frozen features: fitted to `train` and measured on the images of `test` that are not in it. Raises CannotRun."""
    needs(model, "probe")
    labels = test.labels
    known, known_classes, trained_on = train.features(model, "training")
    seen, classes, used = test.features(model, "test")
    twice = {row for row, *_ in near_duplicates(test.images.descriptions(used), train.images.descriptions(trained_on))}
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
            except ValueError as error:  # such as fewer training images than neighbours; the other probe may still run
                missing.append((name, str(error)))
        return numbers, missing, columns

    numbers, missing, columns = on_first(compute)
    origin = f"{len(labels.names)} classes, sha256 of their names {_hash(list(labels.names))}, of the training images {train.images.digest(trained_on)[:16]}"
    left_out = labels.left_out | {f"training: {why}": count for why, count in train.labels.left_out.items()}
    if both:
        left_out["that are training images too, or near-duplicates of some"] = both
    return Measured(numbers, missing, used, labels=origin, left_out=left_out, columns=columns)


def _named(numbers: Sequence[Number], what: str) -> list[Number]:
    """Prefix the metric names: top_1 of a probe and of zero-shot are two metrics."""
    return [replace(number, metric=f"{what}_{number.metric}") for number in numbers]
