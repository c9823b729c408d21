"""One evaluation of a generator: draw samples without and with guidance, or take those of a file, and score them against a reference.

    with distributed.started(device):
        evaluation = evaluate_generation(options, open_model)
        evaluation.save(folder)

The samples are the same for any number of processes, and the numbers but for rounding.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvision3 import distributed
from openvision3.data.arrays import IMAGES, ArraySource, holds_arrays
from openvision3.data.fingerprint import WIDTH, near_duplicates
from openvision3.data.names import open_source
from openvision3.data.problems import reasons_in_words
from openvision3.data.sources import Source
from openvision3.evaluate.drawing import Drawing, choose_labels, choose_texts, draw
from openvision3.evaluate.image_set import ImageSet, Watch, on_first, without_progress
from openvision3.evaluate.metrics.distances import Statistics
from openvision3.evaluate.metrics.generation import ADM, KEPT, Compared, Nearest, SetFeatures, compare, random_rows
from openvision3.evaluate.options import GenerationOptions
from openvision3.evaluate.peers.features import PeerFeatures
from openvision3.evaluate.protocol import Conditions, DrawingFunctions, Number, number
from openvision3.evaluate.results import NotRun, Results, Row, Scores, Setting
from openvision3.evaluate.run import CROPS
from openvision3.evaluate.statistics import Column, Columns, with_interval
from openvision3.evaluate.tables import Table, split, with_differences
from openvision3.fetch.store import find
from openvision3.files import sha256_of
from openvision3.networks.inception import EfficientNetFeatures, Extractor, Inception
from openvision3.progress import environment

PROTOCOL_SIZE, PROTOCOL_COUNT = 256, 50_000
"""of gfid-adm50k"""
COMPARED = 1_000
"""at most so many samples are compared with all training images, to count near-duplicates"""
TITLED = 64
"""first samples whose conditions are kept for the page"""
NOT_RECORDED = "not recorded"


@dataclass
class Samples:
    """The samples of one column of the table."""

    name: str
    images: ImageSet
    file: str
    """the name of its files, without an ending"""
    guidance: float
    titles: Sequence[str]
    """the class or text of each of the first samples"""
    sha256: str
    """of the weights of the model that drew them"""
    note: str
    licence: str
    labels: str
    """how their classes were chosen"""
    captions: str
    """how their texts were"""
    dtype: str
    nearest: Nearest | None = None
    """training images like the first samples"""


@dataclass
class Reference:
    """What the samples are compared with: images, or a file of statistics, or both."""

    data: str
    images: ImageSet | None
    file: Path | None = None
    """an .npz"""
    pool: Statistics | None = None
    spatial: Statistics | None = None
    """of Inception's features, from the file"""

    @property
    def source(self) -> Source:
        """Raises ValueError for a file of statistics alone."""
        if self.images is None:
            raise ValueError(f"{self.data} has no captions to draw from; name data with captions with --data")
        return self.images.source

    @functools.cached_property
    def sha256(self) -> str:
        """Of the file, or over the images as they were read."""
        if self.file is not None:
            return sha256_of(self.file)
        assert self.images is not None
        return self.images.digest(list(self.images.digests))


@dataclass
class Generation:
    """One command: samples, reference, and what was measured."""

    options: GenerationOptions
    samples: list[Samples]
    reference: Reference
    train: ImageSet | None
    """the images among which the nearest are looked for"""
    extractors: list[Extractor]
    results: Results
    scores: dict[str, Columns] = field(default_factory=dict)

    @property
    def compared_with(self) -> str:
        """What the images of `train` are, in words."""
        return "training images" if self.options.train else "reference images (the training images were not named with --train)"

    def save(self, out: Path) -> list[Table]:
        """Write results.json. Returns the tables of the rows, with their differences."""
        tables = split(self.results.rows)
        self.results.differences = with_differences(tables, [(self.results.rows, Scores(self.scores))])
        self.results.save(out)
        return tables


def evaluate_generation(
    options: GenerationOptions,
    open_model: Callable[[GenerationOptions], DrawingFunctions],
    command: str = "",
    watch: Watch = without_progress,
) -> Generation:
    """Draw what is not there yet, then measure one column after the other; results.json is written after each.

    Raises:
        ValueError, FileNotFoundError: an input is missing or wrong (raised before anything is drawn), or nothing could be measured.
        OSError: no space; what is drawn stays.
    """
    start = time.perf_counter()
    watch = watch if distributed.rank() == 0 else without_progress
    with distributed.together():
        if options.precision == "fp32":  # cuDNN would use TF32
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        extractors, missing = _extractors(options)
        model = None if options.is_drawn else open_model(options)
        size = _side(ArraySource(options.model), options.model) if model is None else model.size
        _check(options, model, size)
        reference = _open_reference(options, size, extractors, watch)
        if reference.images is None and missing and not options.train:
            raise ValueError(f"{reference.data} holds statistics of Inception's features alone: {missing[0][1]}; or name reference images with --data")
        train = ImageSet(open_source(options.train, options.data_options()), size, options.batch, watch=watch) if options.train else reference.images
    samples = [_of_file(options, watch)] if model is None else _draw_all(options, model, reference, watch)
    results = Results(not_run=[NotRun(samples[0].name, metric, what) for metric, what in missing], command=command, environment=environment())
    evaluation = Generation(options, samples, reference, train, extractors, results)
    for column in {id(one): one for one in (samples[0], samples[-1])}.values() if train is not None else ():
        shown = column.images.subset(range(min(options.shown, len(column.images.chosen))))
        column.nearest = Nearest(shown.collect_rows(f"{column.name}: features of the samples shown", extractors[0]).values)
    of_reference = _read_reference(evaluation)
    for column in samples:
        _measure(evaluation, column, of_reference)
        results.seconds = time.perf_counter() - start
        if distributed.rank() == 0:
            with distributed.alone():
                results.save(Path(options.out))
    with distributed.together():
        if not results.rows:
            raise ValueError("; ".join(dict.fromkeys(entry.needs for entry in results.not_run)))
    return evaluation


# -- what is compared with what ---------------------------------------------------------------------------------------


def _extractors(options: GenerationOptions) -> tuple[list[Extractor], list[tuple[str, str]]]:
    """The networks that are here, the one that ships first, and (metric, what it needs) for the others.

    Raises:
        FileNotFoundError: one was named and is not here. ValueError: two of one name, or a peer without features.
    """
    extractors: list[Extractor] = [EfficientNetFeatures().to(options.device), *(PeerFeatures(peer, options.device) for peer in options.extractors)]
    names = [extractor.name for extractor in extractors]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise ValueError(f"two extractors are called {twice}; name each once, and give your own another name in its Functions")
    try:
        extractors.append(Inception(options.inception or find("inception-2015", needed_by="gFID")).to(options.device))
    except FileNotFoundError as error:
        if options.inception or options.protocol:
            raise
        return extractors, [(metric, str(error)) for metric in ADM]
    return extractors, []


def _side(source: ArraySource, name: str) -> int:
    """The side of its images. Raises ValueError for a file without images, or with oblong ones."""
    if not len(source):
        raise ValueError(f"{name} holds no images: {IMAGES} has 0 rows")
    if source.height != source.width:
        raise ValueError(f"{name} holds images of {source.height}x{source.width}; they must be square")
    return source.height


def _check(options: GenerationOptions, model: DrawingFunctions | None, size: int) -> None:
    if options.guidance and model is None:
        raise ValueError(f"{options.model} holds samples that are drawn already; leave out --guidance, or name a generator")
    if options.guidance and model is not None and not model.can_guide:
        why = "it draws without a condition" if model.condition == "none" else "it was trained without dropped conditions"
        raise ValueError(f"guidance {options.guidance[0]:g} cannot be used with {model.name}: {why}; leave out --guidance")
    if options.weaker and not options.guidance:
        raise ValueError(f"weaker {options.weaker} guides nothing without a scale; add one, such as --guidance 1.5")
    count = options.count if model is not None else len(ArraySource(options.model))
    if options.protocol and (size, count) != (PROTOCOL_SIZE, PROTOCOL_COUNT):
        raise ValueError(f"protocol {options.protocol} needs {PROTOCOL_COUNT:,} samples of {PROTOCOL_SIZE} px; {options.model} has {count:,} of {size} px")


def _open_reference(options: GenerationOptions, size: int, extractors: Sequence[Extractor], watch: Watch) -> Reference:
    """Raises ValueError: no reference, one without images, or an .npz of another size or with statistics of other features."""
    if not options.data:
        raise ValueError("no reference named; name data, or an .npz of statistics or images, with --data")
    file = next((name for name in options.data if name.endswith(".npz")), "")
    if not file:
        if options.protocol:
            raise ValueError(
                f"protocol {options.protocol} compares with the statistics of ADM's reference file; name VIRTUAL_imagenet256_labeled.npz with --data"
            )
        source = open_source(options.data, options.data_options())
        if not len(source):
            raise ValueError(f"the reference {', '.join(options.data)} holds no images")
        images = ImageSet(source, size, options.batch, watch=watch)
        images.problems.extend(source.problems)
        return Reference(", ".join(options.data), images)
    if len(options.data) > 1:
        raise ValueError(f"{file} is a reference by itself; name it alone with --data")
    if not Path(file).is_file():
        raise FileNotFoundError(f"no such file: {file}")
    has_statistics = holds_arrays(file, "mu", "sigma")
    if options.protocol and not (has_statistics and holds_arrays(file, "mu_s", "sigma_s")):
        raise ValueError(f"protocol {options.protocol} needs mu, sigma, mu_s and sigma_s, and {file} lacks some; name ADM's reference file with --data")
    pool = spatial = None
    if (inception := next((one for one in extractors if isinstance(one, Inception)), None)) is not None:
        pool = Statistics.load(file, ("mu", "sigma"), inception.width) if has_statistics else None
        spatial = Statistics.load(file, ("mu_s", "sigma_s"), inception.spatial_width) if holds_arrays(file, "mu_s", "sigma_s") else None
    if has_statistics and not holds_arrays(file, IMAGES):
        return Reference(file, None, Path(file), pool, spatial)
    source = ArraySource(file)
    if (side := _side(source, file)) != size:
        raise ValueError(f"{file} holds images of {side}x{side}, and the samples are of {size}x{size}; choose a reference of their size")
    return Reference(file, ImageSet(source, size, options.batch, watch=watch), Path(file), pool, spatial)


# -- samples ----------------------------------------------------------------------------------------------------------


def _draw_all(options: GenerationOptions, model: DrawingFunctions, reference: Reference, watch: Watch) -> list[Samples]:
    """Draw the samples of every column, the unguided ones first."""
    conditions, titles, labels, captions = _conditions(options, model, reference)
    columns = []
    for guidance in (1.0, *options.guidance):
        sampler = {**model.sampler, **(model.guiding if guidance != 1 else {})}
        record = {"model_sha256": model.sha256, "dtype": model.dtype, "seed": options.seed, "guidance": guidance, "sampler": sampler}
        record |= {"labels": labels, "captions": captions}
        name = model.name if guidance == 1 else f"{model.name}, guidance {guidance:g}"
        path = Path(options.out) / f"{file_name(guidance)}.npz"
        sample = functools.partial(_sample, model, guidance)
        draw(Drawing(options.count, model.size, sample, conditions, record), path, options.batch, watch, f"{name}: drawing")
        with distributed.together():
            images = ImageSet(ArraySource(path), model.size, options.batch, watch=watch)
        columns.append(_samples(name, images, record, titles, model.licence))
    return columns


def _sample(model: DrawingFunctions, guidance: float, indices: Sequence[int], conditions: Conditions | None) -> Tensor:
    return model.sample(indices, conditions, guidance)


def _conditions(options: GenerationOptions, model: DrawingFunctions, reference: Reference) -> tuple[Conditions | None, Sequence[str], str, str]:
    """(the condition of each sample, those of the first ones in words, how labels were chosen, how captions were)."""
    if model.condition == "label":
        labels = choose_labels(options.count, len(model.label_names), options.labels, options.seed)
        return labels, [model.label_names[label] for label in labels[:TITLED]], f"{options.labels} over {len(model.label_names)} classes", "none"
    if model.condition == "text":
        texts = on_first(lambda: choose_texts(reference.source, options.count, options.labels, options.seed))
        return texts, texts[:TITLED], "none", f"{options.labels}, first captions of the reference"
    return None, (), "none", "none"


def _of_file(options: GenerationOptions, watch: Watch) -> Samples:
    """Samples that were drawn before, by us or by anyone."""
    source = ArraySource(options.model)
    return _samples(options.model, ImageSet(source, source.height, options.batch, watch=watch), source.record())


def _samples(name: str, images: ImageSet, record: dict[str, Any], titles: Sequence[str] = (), licence: str = "unknown") -> Samples:
    """A column of the table, as the record of its drawing has it."""
    labels, captions, dtype = (str(record.get(key, NOT_RECORDED)) for key in ("labels", "captions", "dtype"))
    guidance = float(record.get("guidance", 1.0))
    settings = [*record.get("sampler", {}).items(), *([("guidance", f"{guidance:g}"), ("seed", record.get("seed"))] if record else [])]
    note = ", ".join(f"{key} {value}" for key, value in settings) or "drawn by others"
    sha256 = str(record.get("model_sha256", ""))
    return Samples(name, images, file_name(guidance), guidance, titles, sha256, note, licence, labels, captions, dtype)


def file_name(guidance: float) -> str:
    """The name of the files of these samples, without an ending."""
    return "samples" if guidance == 1 else f"samples-guidance-{guidance:g}"


# -- measuring --------------------------------------------------------------------------------------------------------


def _read_reference(evaluation: Generation) -> list[SetFeatures]:
    """What each network makes of the reference; statistics of the file replace those of its images. Finds the training images next to the samples shown."""
    options, reference, train = evaluation.options, evaluation.reference, evaluation.train
    nearest = [column.nearest for column in evaluation.samples if column.nearest is not None]
    sets = [SetFeatures(extractor, ()) for extractor in evaluation.extractors]
    if reference.images is not None:
        kept = set(random_rows(len(reference.images.source), KEPT, options.seed))
        own = nearest if train is reference.images else []
        sets = _extract(reference.images, evaluation.extractors, "reference", kept, own)
        if not sets[0].count:
            with distributed.together():
                why = reasons_in_words(reference.images.problems)
                raise ValueError(f"none of the {len(reference.images.source)} images of {reference.data} can be read: {why}")
    if train is not None and train is not reference.images:
        _extract(train, evaluation.extractors[:1], "training images", (), nearest)
    for column in evaluation.samples:
        if column.nearest is not None:
            column.nearest = column.nearest.over_ranks()
    for one in sets:
        if reference.images is None:
            one.statistics = one.spatial = None
        if isinstance(one.extractor, Inception):
            one.statistics, one.spatial = reference.pool or one.statistics, reference.spatial or one.spatial
    evaluation.results.skipped = list({(one["key"], one["reason"]): one for images in (reference.images, train) if images for one in images.problems}.values())
    return sets


def _extract(images: ImageSet, extractors: Sequence[Extractor], what: str, keep: Collection[int] | None, nearest: Sequence[Nearest] = ()) -> list[SetFeatures]:
    """Features of these images of all ranks, by each network; `nearest` take those of the first."""
    sets = [SetFeatures(extractor, keep, () if place else nearest) for place, extractor in enumerate(extractors)]
    with distributed.together():
        for batch in images.batches(f"{what}: features"):
            for one in sets:
                one.add(batch.indices, batch.images)
    images.share()
    return [one.over_ranks() for one in sets]


def _measure(evaluation: Generation, column: Samples, of_reference: Sequence[SetFeatures]) -> None:
    """Add the rows of one column."""
    options, reference, results = evaluation.options, evaluation.reference, evaluation.results
    size = column.images.size
    held = f"protocol {options.protocol} (of its count and size; that the reference is ADM's of ImageNet is not checked), " if options.protocol else ""
    where = f"{held}{size}x{size}, rounded to uint8"
    sets = _extract(column.images, evaluation.extractors, column.name, None)
    if len(sets[0].rows) < len(column.images.source):
        with distributed.together():
            raise ValueError(f"{column.images.source.key(0)} and others: {reasons_in_words(column.images.problems)}; draw these samples again")

    def compute() -> Compared:
        numbers: list[Number] = []
        columns: Columns = {}
        missing: list[tuple[str, str]] = []
        for ours, theirs in zip(sets, of_reference, strict=True):
            new, scores, lacking = compare(ours, theirs, where, options.seed, options.device)
            numbers, columns, missing = numbers + new, columns | scores, missing + lacking
        if evaluation.train is not None:
            new, scores = _count_duplicates(column.images, evaluation.train, evaluation.compared_with)
            numbers, columns = numbers + new, columns | scores
        else:
            missing.append(("near_duplicates", "training images; name them with --train"))
        return [with_interval(one, columns) for one in numbers], columns, missing

    numbers, evaluation.scores[column.name], missing = on_first(compute)
    crop = "as the file has them" if reference.file else CROPS[options.crop]
    setting = Setting(
        reference.data,
        reference.sha256,
        f"{size}x{size}",
        f"reference images: {crop}",
        column.dtype,
        options.seed,
        "none, unless the column says so",
        column.labels,
        column.captions,
    )
    results.rows += [Row(column.name, column.sha256, one, setting, column.note, column.licence) for one in numbers]
    results.not_run += [NotRun(column.name, metric, what) for metric, what in missing]


def _count_duplicates(samples: ImageSet, train: ImageSet, what: str) -> tuple[list[Number], Columns]:
    """The share of samples that are near-duplicates of an image of `train`, as far as these have been read; `what` names them."""
    chosen = [index for index in samples.chosen if index in samples.described][:COMPARED]
    known = list(train.described)
    twice = {row for row, *_ in near_duplicates(samples.descriptions(chosen), train.descriptions(known))}
    how = f"share of the first {len(chosen):,} samples that are near-duplicates of one of {len(known):,} {what}, by {WIDTH} bytes of each"
    scores = [float(row in twice) for row in range(len(chosen))]
    return [number("near_duplicates", len(twice) / len(chosen), len(chosen), how)], {"near_duplicates": Column(chosen, scores)}
