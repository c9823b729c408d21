"""Everything that is measured on the embedded data set, given a model and its VAE as functions: emoji of the test side, white, 128 px."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from openvision3.data import openmoji
from openvision3.data.images import to_pil
from openvision3.data.labelled import read_labels
from openvision3.data.openmoji import EmojiSource
from openvision3.evaluate import suite
from openvision3.evaluate.metrics.accuracy import ClassRow
from openvision3.evaluate.pictures import Pictures
from openvision3.evaluate.protocol import Functions, Number


@dataclass
class Findings:
    """Numbers by what they are of, and the groups, pictures and captions behind them for a page."""

    results: dict[str, list[Number]]
    groups: list[ClassRow]
    without_group: int
    """emoji that zero-shot classification leaves out"""
    emoji: tuple[openmoji.Emoji, ...]
    written: list[str]
    psnr: list[float]
    vae_psnr: list[float]


def evaluate_openmoji(model: Functions, vae: Functions, size: int = 128, count: int = 256) -> Findings:
    """Reconstruction beside its VAE, retrieval, zero-shot groups and captions on the first `count` emoji of the test side.

    Zero-shot: a group's embedding is the mean text embedding of the names of its training emoji; emoji without a group are
    left out and counted. Captions by the simple tokeniser: the same numbers on every machine.
    """
    data = openmoji.load_emoji()
    emoji = data.evaluation("test", count)
    pictures = Pictures(EmojiSource(emoji), size)
    own, through_vae = (suite.reconstruction(each, pictures, suite.Networks()) for each in (model, vae))
    embedded = suite.image_embeddings(model, pictures)
    captions = suite.captioning(model, pictures, "simple", shown=len(emoji))
    training = EmojiSource(data.train)
    train_labels = read_labels(training, least=1)
    labels = read_labels(pictures.source, least=0, like=train_labels)
    texts, how = suite.class_texts(labels, "captions", (training, train_labels))
    zeroshot = suite.zeroshot(model, pictures, labels, texts, how, embedded)
    results = {
        "reconstruction": own.numbers,
        "vae_reconstruction": through_vae.numbers,
        "retrieval": suite.retrieval(model, pictures, embedded).numbers,
        "captions": captions.numbers,
        "zeroshot": zeroshot.numbers,
    }
    written = [text for _, text, _ in captions.shown["cards"]]
    psnr, vae_psnr = own.shown["pictures"].psnr, through_vae.shown["pictures"].psnr
    return Findings(results, zeroshot.shown["classes"], len(emoji) - len(labels.indices), emoji, written, psnr, vae_psnr)


def rebuilt_rows(count: int, model: Functions, vae: Functions, size: int = 128) -> list[tuple[Image.Image, ...]]:
    """(original, through the VAE alone, rebuilt from tokens) for the first emoji of the test side."""
    assert model.reconstruct is not None and vae.reconstruct is not None
    rows = []
    for batch in Pictures(EmojiSource(openmoji.load_emoji().evaluation("test", count)), size).batches("drawing"):
        columns = (batch.images, vae.reconstruct(batch.images), model.reconstruct(batch.images))
        rows += list(zip(*(to_pil(c) for c in columns), strict=True))
    return rows
