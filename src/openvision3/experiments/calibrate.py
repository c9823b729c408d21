"""Calibrate a model: save with it what its training images look like, the threshold of "unsure", and how often its answers are right.

The threshold comes from held-out images of the trained kinds alone; images of other kinds are only measured. One command, run again after each training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from openvision3.data.batches import evaluation_batches
from openvision3.data.familiarity import (
    FILE,
    Calibration,
    Familiarity,
    calibration_error,
    caption_confidence,
    fit_logistic,
    fit_sharpness,
    label_confidence,
)
from openvision3.data.names import DataOptions, open_source
from openvision3.data.openmoji import Side
from openvision3.data.problems import Problems
from openvision3.data.shards.tars import Watch, plain
from openvision3.evaluate.metrics.captioning import token_f1, words
from openvision3.files import write_whole
from openvision3.pipeline import Pipeline
from openvision3.report.plots import Line, Lines, draw
from openvision3.settings import PathName, read_rules, write_json

RIGHT = 0.5
"""a caption is right if the F1 of its words with a reference reaches this, of words that tell captions of its name apart"""
COMMON = 0.5
"""words in the captions of more than this share of a name's images tell nothing apart, such as those of "a photo of a rose" but the last"""
CHOICES = 10
"""labels that an image is classified among: its own caption, and those of nine other images"""
BATCH = 32


@dataclass
class CalibrationOptions:
    """Which data the judgements are fitted to."""

    train: tuple[PathName, ...] = ("openmoji",)
    """data like those that the model was trained on: openmoji (its training side), folders of images, or shards"""
    val: tuple[PathName, ...] = ("openmoji",)
    """held-out data of the same kinds, one kind a name (openmoji: its test side); globs in quotes, such as 'drawings/*-unseen_*.tar'"""
    outside: tuple[PathName, ...] = ()
    """images of other kinds, to measure how many are called unsure; nothing is fitted to them"""
    kinds: tuple[str, ...] = ("drawings",)
    """what the model was trained on, in words: the line for unsure images names them"""
    unsure: float = 0.08
    """the share of all held-out images that is called unsure"""
    count: int = 400
    """images of each name of --val and --outside at most, evenly spaced"""
    train_count: int = 4000
    """images of --train at most, evenly spaced"""
    caption_keys: tuple[str, ...] = ()
    """JSON fields of shards that hold captions. Not set: the .txt member"""
    only: tuple[str, ...] = ()
    """keep the shard samples whose JSON has these values (source=clipart) or other ones (source!=stamps)"""

    def __post_init__(self):
        if not 0 < self.unsure < 1:
            raise ValueError(f"unsure {self.unsure} must lie between 0 and 1")
        for name in ("count", "train_count"):
            if getattr(self, name) < 32:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 32")
        if not self.train or not self.val or not self.kinds:
            raise ValueError("calibration needs --train, --val and --kinds, each with at least one value")


class Rows(NamedTuple):
    """What the model says of the images of one name."""

    features: Tensor
    """(n, D)"""
    likely: Tensor
    """(n, 2) mean and sum of the log-probabilities of the words of its caption"""
    is_right: Tensor
    """(n,) whether the caption is right; False without references"""
    embedding: Tensor
    """(n, E)"""
    references: list[tuple[str, ...]]


@dataclass
class Result:
    """What was fitted and measured."""

    calibration: Calibration
    plot: bytes
    """PNG: confidence against the share that is right"""
    problems: Problems = field(default_factory=Problems)


def calibrate(pipeline: Pipeline, options: CalibrationOptions, watch: Watch = plain) -> Result:
    """Fit `pipeline.familiarity` and return what was measured. Confidence is measured on halves of the held-out images that it was not fitted to.

    Raises:
        ValueError: data that cannot be opened or are too few; held-out images without captions.
    """
    pipeline.check_trained("captioner")
    problems = Problems()
    training = torch.cat([*_features(pipeline, options, watch, problems)])
    familiarity = Familiarity.fit(training)
    held_out = {name: _answers(pipeline, options, name, watch, problems) for name in options.val}
    outside = {name: _answers(pipeline, options, name, watch, problems) for name in options.outside}
    scores = {name: familiarity.score(rows.features) for name, rows in (held_out | outside).items()}
    familiar = torch.cat([scores[name] for name in held_out])
    threshold = float(familiar.quantile(options.unsure))
    measured: dict = {name: {"images": len(scores[name]), "unsure": round(float((scores[name] < threshold).double().mean()), 4)} for name in scores}

    likely, is_right = (torch.cat([getattr(rows, name) for rows in held_out.values()]) for name in ("likely", "is_right"))
    captioned = torch.tensor([bool(texts) for rows in held_out.values() for texts in rows.references])
    inputs, is_right = torch.cat([likely, familiar[:, None]], 1)[captioned], is_right[captioned]
    if len(inputs) < 32:
        raise ValueError(f"{len(inputs)} held-out images with captions are too few to calibrate with; name --val data with 32 or more, or set --caption-keys")
    probabilities = _choices(pipeline, held_out)

    def fitted(rows: slice, label_rows: slice) -> Calibration:
        first = torch.zeros(len(probabilities[label_rows]), dtype=torch.long)
        bias, *slopes = fit_logistic(inputs[rows], is_right[rows])
        return Calibration(threshold, options.kinds, (bias, slopes[0], slopes[1], slopes[2]), fit_sharpness(probabilities[label_rows], first), measured)

    of_captions, of_labels = torch.zeros(len(inputs), dtype=torch.double), torch.zeros(len(probabilities), dtype=torch.double)
    for half in (0, 1):
        other, own = slice(1 - half, None, 2), slice(half, None, 2)
        of_others = fitted(other, other)
        of_captions[own] = torch.tensor([caption_confidence(of_others, *row) for row in inputs[own].tolist()], dtype=torch.double)
        of_labels[own] = torch.tensor([label_confidence(of_others, row) for row in probabilities[own].tolist()], dtype=torch.double)
    place = 0
    for name, rows in held_out.items():  # how far one fit to all names holds for each
        own = slice(place, place := place + sum(bool(texts) for texts in rows.references))
        if len(is_right[own]):
            measured[name] |= {"captions_right": round(float(is_right[own].double().mean()), 4), "confidence": round(float(of_captions[own].mean()), 4)}
    curves = {}
    for name, confidence, right in (("caption", of_captions, is_right), ("label", of_labels, probabilities.argmax(1) == 0)):
        error, table = calibration_error(confidence, right)
        measured[name] = {"answers": len(right), "right": round(float(right.double().mean()), 4), "calibration_error": round(error, 4)}
        curves[name] = Line([said for said, _, _ in table], [seen for _, seen, _ in table])
    familiarity.calibration = fitted(slice(None), slice(None))
    pipeline.familiarity = familiarity
    lines = {**curves, "perfect": Line([0, 1], [0, 1])}
    return Result(familiarity.calibration, draw([Lines("share of answers that are right", lines, "confidence", True)], [*lines], columns=1), problems)


def save(pipeline: Pipeline, result: Result, folder: Path, out: Path) -> None:
    """Write the calibration into the model folder; calibration.json and reliability.png into `out`. Raises OSError."""
    assert pipeline.familiarity is not None
    out.mkdir(parents=True, exist_ok=True)
    write_json({"threshold": result.calibration.threshold, **result.calibration.measured}, out / "calibration.json")
    write_whole(out / "reliability.png", result.plot)
    pipeline.familiarity.save(folder / FILE)


def _batches(
    pipeline: Pipeline, options: CalibrationOptions, names: Sequence[str], count: int, side: Side, watch: Watch, problems: Problems
) -> Iterator[tuple[Tensor, list[tuple[str, ...]]]]:
    """(images, captions) of at most `count` evenly spaced samples."""
    source = open_source(tuple(names), DataOptions(side=side, caption_keys=options.caption_keys, only=read_rules(options.only)))
    indices: Iterable[int] = torch.linspace(0, len(source) - 1, min(count, len(source))).round().long().tolist()
    for _, _, images, captions in evaluation_batches(source, pipeline.size, BATCH, problems, watch(indices, f"reading {' '.join(names)}")):
        yield images, captions


def _features(pipeline: Pipeline, options: CalibrationOptions, watch: Watch, problems: Problems) -> Iterator[Tensor]:
    for images, _ in _batches(pipeline, options, options.train, options.train_count, "train", watch, problems):
        yield pipeline.describe(images.to(pipeline.device)).cpu()


def _answers(pipeline: Pipeline, options: CalibrationOptions, name: str, watch: Watch, problems: Problems) -> Rows:
    """What the model says of the images of `name`. Raises ValueError if there are none."""
    features, likely, written, embedding = [], [], [], []
    references: list[tuple[str, ...]] = []
    for images, captions in _batches(pipeline, options, (name,), options.count, "test", watch, problems):
        answers = pipeline.answer(images)
        features.append(pipeline.describe(images.to(pipeline.device)).cpu())
        likely += [(answer.log_probability, answer.total_log_probability) for answer in answers]
        written += [answer.caption for answer in answers]
        embedding.append(pipeline.embed_images(images).cpu())
        references += captions
    if not references:
        raise ValueError(f"{name} holds no usable image; name other data")
    return Rows(torch.cat(features), torch.tensor(likely), torch.tensor(judge(written, references)), torch.cat(embedding), references)


def judge(written: Sequence[str], references: Sequence[Sequence[str]]) -> list[bool]:
    """Whether each caption is right by one of its references: by the words that tell these references apart, or by all where a reference has no other."""
    counts = Counter(word for texts in references for word in {word for text in texts for word in words(text)})
    common = {word for word, count in counts.items() if count > COMMON * len(references)}

    def telling(text: str) -> str:
        return " ".join(word for word in words(text) if word not in common)

    def is_right(caption: str, text: str) -> bool:
        return token_f1(telling(caption), telling(text)) >= RIGHT if telling(text) else token_f1(caption, text) >= RIGHT

    return [any(is_right(caption, text) for text in texts) for caption, texts in zip(written, references, strict=True)]


def _choices(pipeline: Pipeline, held_out: dict[str, Rows]) -> Tensor:
    """(n, CHOICES) probabilities of each held-out image's first caption, which stands first, and of those of other images of its name."""
    probabilities = []
    for rows in held_out.values():
        owners = [i for i, texts in enumerate(rows.references) if texts]
        texts = [rows.references[i][0] for i in owners]
        distinct = [*dict.fromkeys(texts)]
        if len(distinct) < CHOICES:
            continue
        embedding = torch.cat([pipeline.embed_texts(distinct[start : start + 256]).cpu() for start in range(0, len(distinct), 256)])
        step = len(distinct) // CHOICES
        place = {text: i for i, text in enumerate(distinct)}
        for owner, text in zip(owners, texts, strict=True):
            choices = [(place[text] + step * i) % len(distinct) for i in range(CHOICES)]
            probabilities.append((pipeline.model.temperature.cpu() * rows.embedding[owner] @ embedding[choices].T).softmax(-1))
    if not probabilities:
        raise ValueError(f"no name of --val has {CHOICES} different captions to classify among; name data with more")
    return torch.stack(probabilities).detach()
