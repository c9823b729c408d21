"""One evaluation: load the models, measure every kind on the same images, and save the results.

    with distributed.started(device):
        evaluation = evaluate(("reconstruction", "probe"), options, open_model)
        evaluation.save(folder)

The numbers are the same for any number of processes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from openvision3 import distributed
from openvision3.data.fingerprint import Fingerprint, take_fingerprint
from openvision3.data.labelled import Labels, read_labels, read_names
from openvision3.data.names import open_source
from openvision3.data.openmoji import EmojiSource, load_emoji
from openvision3.data.problems import reasons_in_words
from openvision3.data.sources import Source
from openvision3.evaluate import overlap, suite
from openvision3.evaluate.image_set import ImageSet, Rows, Watch, on_first, without_progress
from openvision3.evaluate.options import KINDS, PROTOCOL_COUNTS, Options
from openvision3.evaluate.overlap import Known, Overlap
from openvision3.evaluate.protocol import Functions, Number
from openvision3.evaluate.results import SCORES, NotRun, Results, Row, Scores, Setting
from openvision3.evaluate.statistics import Columns, subset_numbers, with_interval
from openvision3.evaluate.subjects import Say, Subject, Subjects, choose_subjects, load_subjects, silent
from openvision3.evaluate.suite import Measured
from openvision3.evaluate.tables import Table, split, with_differences
from openvision3.files import write_whole
from openvision3.progress import environment


@dataclass
class Evaluation:
    """One command: the models, the images, and what was measured."""

    options: Options
    models: list[Functions]
    images: ImageSet
    results: Results
    networks: suite.Networks
    """networks that compare reconstructions with their originals"""
    say: Say
    embeddings: dict[str, Rows] = field(default_factory=dict)
    """image embeddings by model, computed once for all kinds that use them"""
    measured: dict[tuple[str, str], Measured] = field(default_factory=dict)
    """results by (kind, model)"""
    resized: dict[int, ImageSet] = field(default_factory=dict)
    """the same images at the sizes of models that take one size only"""
    overlap: Overlap | None = None
    """which samples training has seen; on rank 0 only"""
    parts: dict[str, set[int]] = field(default_factory=dict)
    """indices of the samples of each part with rows of its own"""
    broken: str = ""
    """why a published protocol does not hold"""

    def images_for(self, model: Functions, kind: str) -> ImageSet:
        """The images at this model's own size if it takes one size only and --size is not given. Reconstruction compares all models at one size."""
        if not model.fixed or self.options.size or kind == "reconstruction" or model.size == self.images.size:
            return self.images
        return self.resized.setdefault(model.size, self.images.resized(model.size))

    def scores(self) -> Scores:
        """The scores of each sample, by model."""
        columns: dict[str, Columns] = {}
        for (_, model), done in self.measured.items():
            columns.setdefault(model, {}).update(done.columns)
        return Scores(columns, self.parts)  # type: ignore[arg-type]

    def save(self, out: Path) -> list[Table]:
        """Write results.json, and overlap.jsonl if training data are known, into `out`. Returns the tables of the rows, with their differences."""
        tables = split(self.results.rows)
        self.results.differences = with_differences(tables, [(self.results.rows, self.scores())])
        if self.overlap is not None:
            out.mkdir(parents=True, exist_ok=True)
            lines = self.overlap.lines(self.images)
            write_whole(out / overlap.FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            self.results.overlap = self.overlap.in_words(str(out / overlap.FILE))
        self.results.save(out)
        return tables


def evaluate(
    kinds: Sequence[str],
    options: Options,
    open_model: Callable[[Options], Subject],
    command: str = "",
    say: Say = silent,
    watch: Watch = without_progress,
) -> Evaluation:
    """Measure these kinds one after the other. results.json is written after each, so that an interruption loses one kind at most.

    Raises:
        ValueError, FileNotFoundError: an input is missing or wrong (raised before anything is measured), or nothing could be measured.
    """
    start = time.perf_counter()
    with distributed.together():
        evaluation = prepare(kinds, options, open_model, command, *((say, watch) if distributed.rank() == 0 else (silent, without_progress)))
    results, images = evaluation.results, evaluation.images
    for place, kind in enumerate(kinds, 1):
        measure(evaluation, kind)
        results.skipped = list(images.problems)
        results.seconds = time.perf_counter() - start
        if distributed.rank() == 0 and kinds[place:] and results.rows:
            later = [NotRun(model.name, rest, "not measured yet: stopped before") for rest in kinds[place:] for model in evaluation.models]
            with distributed.alone():
                (Path(options.out) / SCORES).unlink(missing_ok=True)  # of an earlier evaluation; those of this one are written at its end
                replace(results, not_run=[*results.not_run, *later]).save(Path(options.out))
    with distributed.together():
        if not results.rows:
            raise ValueError(_why_nothing(evaluation))
    _check_protocol(evaluation)
    return evaluation


def prepare(
    kinds: Sequence[str],
    options: Options,
    open_model: Callable[[Options], Subject],
    command: str = "",
    say: Say = silent,
    watch: Watch = without_progress,
) -> Evaluation:
    """Open every model, network and data set, so that a missing file is reported before anything is measured."""
    if options.precision == "fp32":  # cuDNN would use TF32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    networks = suite.Networks()
    if "reconstruction" in kinds:
        networks = suite.reconstruction_networks(options)
    names, not_run = choose_subjects(options, kinds)
    subjects = load_subjects(options, names, open_model, "reconstruction" in kinds, say)
    source: Source
    if options.data == ("openmoji",):
        source = EmojiSource(load_emoji().evaluation("test", options.count or 1_000_000))
    else:
        source = open_source(options.data, options.data_options("test"))
    images = ImageSet(source, subjects.size, options.batch, range(min(options.count or len(source), len(source))), watch)
    images.problems.extend(source.problems)
    if options.protocol:
        count, which = PROTOCOL_COUNTS[options.protocol]
        if len(images.chosen) != count:
            raise ValueError(f"protocol {options.protocol} needs {which}, {count:,} of them; --data has {len(images.chosen):,}")
    results = Results(not_run=not_run, command=command, environment=environment())
    seen = _known_training(options, kinds, subjects, images) if distributed.rank() == 0 else None
    return Evaluation(options, subjects.models, images, results, networks, say, overlap=seen)


def _known_training(options: Options, kinds: Sequence[str], subjects: Subjects, images: ImageSet) -> Overlap:
    """The known training data: those recorded with MODEL and its VAE if these are measured, and those named with --train."""
    known = [one for one in subjects.known if not one.kinds or set(one.kinds) & set(kinds)]  # the VAE's data matter for reconstruction alone
    unknown = list(subjects.unknown)
    files, names = options.training_data()
    named = [Known("--train", Fingerprint.joined([Fingerprint.load(file) for file in files]))] if files else []
    if names and tuple(kinds) != ("probe",):  # a probe removes near-duplicates of them itself
        source = open_source(names, options.data_options())
        images.problems.extend(source.problems)
        taken = take_fingerprint(source, names, images.problems, lambda items, what: images.watch(items, what, len(source)))
        named.append(Known("--train", taken, tuple(kind for kind in KINDS if kind != "probe")))
    if named:
        known += named
        unknown = [owner for owner in unknown if owner != options.model]
    return Overlap(known, tuple(unknown))


def _why_nothing(evaluation: Evaluation) -> str:
    """The reason why no number was measured."""
    images = evaluation.images
    if images.problems and not any(set(images.chosen) & set(view.digests) for view in (images, *evaluation.resized.values())):
        return f"none of {len(images.chosen)} images can be read: {reasons_in_words(images.problems)}; `openvision3 data check` names them"
    return "; ".join(dict.fromkeys(entry.needs for entry in evaluation.results.not_run)) or "nothing could be measured"


def _check_protocol(evaluation: Evaluation) -> None:
    """If images of a published protocol are unreadable, state in `broken` and in its rows that it does not hold."""
    name, results = evaluation.options.protocol, evaluation.results
    count, which = PROTOCOL_COUNTS.get(name, (0, ""))
    counts = sorted({len(done.used) for (kind, _), done in evaluation.measured.items() if kind == "reconstruction"} - {count})
    if not name or not counts:
        return
    held, broken = f"protocol {name}", f"NOT protocol {name}, of which images are missing"
    results.rows = [replace(row, number=replace(row.number, how=row.number.how.replace(held, broken))) for row in results.rows]
    measured_on = ", ".join(f"{n:,}" for n in counts)
    evaluation.broken = f"protocol {name} needs {which}, {count:,} of them; measured on {measured_on}: the rows state that the protocol does not hold"


# -- each kind -----------------------------------------------------------------------------------------------------


def measure(evaluation: Evaluation, kind: str) -> None:
    """Measure every model in one kind. A model that cannot be measured is listed in `not_run` with what it needs; the others are still measured."""
    results = evaluation.results
    lacking = ""
    try:
        measure_model = MEASURES[kind](evaluation)
    except (ValueError, OSError) as error:  # data without classes, or without training images
        lacking = str(error)
    lacking = next(filter(None, distributed.gather_objects(lacking)), "")  # if one rank lacks data, none measures
    for model in evaluation.models:
        try:
            if lacking:
                raise suite.CannotRun(lacking)
            done = measure_model(model)
            done.numbers = on_first(lambda measured=done: [with_interval(number, measured.columns) for number in measured.numbers])  # type: ignore[misc]
        except (ValueError, distributed.OtherRankFailed) as error:
            results.not_run.append(NotRun(model.name, kind, str(error)))
            continue
        evaluation.measured[kind, model.name] = done
        if done.text:
            evaluation.say(f"{kind} of {model.name}: {done.text}")
        results.rows += _rows(evaluation, model, kind, done)
        results.not_run += [NotRun(model.name, metric, what) for metric, what in done.missing]
        results.left_out += [{"model": model.name, "of": kind, "reason": reason, "count": count} for reason, count in done.left_out.items()]
    evaluation.images.share()


def _rows(evaluation: Evaluation, model: Functions, kind: str, done: Measured) -> list[Row]:
    """Numbers -> rows with their setting: over samples unseen in training, over seen samples, over each kind of held-out drawing, and over all."""
    options, images, known = evaluation.options, evaluation.images_for(model, kind), evaluation.overlap
    drawn = "emoji drawn at this size, white, 0.77 of the side"
    crop = "; ".join(([drawn] if "openmoji" in options.data else []) + ([CROPS[options.crop]] if set(options.data) - {"openmoji"} else []))
    keys = ", ".join(options.caption_keys) or "of the set"
    labelled = f"JSON field {options.label_key}" if options.label_key else "emoji group, sub-folder or .cls member"
    setting = Setting(
        ", ".join(f"{name} test" if name == "openmoji" else name for name in options.data),
        images.digest(done.used),
        f"{images.size}x{images.size}",
        crop,
        model.dtype,
        options.seed,
        labels="none" if done.labels == "none" else f"{labelled}; {done.labels}",
        captions="none" if done.captions == "none" else f"{keys}, sha256 {done.captions}",
        overlap=known.compared_with(kind) if known is not None else overlap.NOT_KNOWN,
    )
    numbers: list[tuple[list[Number], Setting]] = []
    parts: dict[str, set[int]] = {}
    if known is not None:
        known.look(images, done.used)
        parts = known.parts(kind, done.used)
        for part, samples in parts.items():
            evaluation.parts[part] = evaluation.parts.get(part, set()) | samples
            if len(parts) > 1:
                of_part = replace(setting, data_sha256=images.digest(sorted(samples)))
                numbers.append((subset_numbers(done.numbers, done.columns, samples, part), of_part))
        for part, samples in known.drawing_kinds(kind, done.used).items():
            evaluation.parts[part] = evaluation.parts.get(part, set()) | samples
            numbers.append((_of_drawings(done, samples, part), replace(setting, data_sha256=images.digest(sorted(samples)))))
    only_part = next(iter(parts)) if len(parts) == 1 else ""
    numbers.append(([replace(number, part=only_part) for number in done.numbers], setting))
    return [Row(model.name, model.sha256, number, of, model.note, model.licence) for group, of in numbers for number in group]


def _of_drawings(done: Measured, samples: set[int], part: str) -> list[Number]:
    """The numbers over one kind of held-out drawing; in retrieval these samples are the candidates, too."""
    if done.alone is None:
        return subset_numbers(done.numbers, done.columns, samples, part)
    alone = done.alone(samples)
    done.columns |= {f"{part}: {name}": column for name, column in alone.columns.items()}
    done.missing += [(f"{metric}, {part}", what) for metric, what in alone.missing]
    how = f"; queries and candidates are {len(samples):,} of {len(done.used):,} samples: {part}"
    return [with_interval(replace(number, how=number.how + how, part=part), alone.columns) for number in alone.numbers]


CROPS = {
    "square": "the central square, resized by Pillow's bicubic with antialias",
    "adm": "ADM: halved by a box filter while twice as large, bicubic to the shorter side, central square",
}

Measure = Callable[[Functions], Measured]


def _reconstruction(evaluation: Evaluation) -> Measure:
    options = evaluation.options
    protocol = f"protocol {options.protocol} (of its count, crop and size; that these are its images is not checked)" if options.protocol else ""
    return lambda model: suite.reconstruction(model, evaluation.images, evaluation.networks, options, protocol)


def _retrieval(evaluation: Evaluation) -> Measure:
    def measure_model(model: Functions) -> Measured:
        suite.needs(model, "retrieval")
        embedded = suite.image_embeddings(model, evaluation.images_for(model, "retrieval"))
        evaluation.embeddings[model.name] = embedded
        return suite.retrieval(model, embedded, shared=evaluation.options.equal_captions == "shared")

    return measure_model


def _captioning(evaluation: Evaluation) -> Measure:
    return lambda model: suite.captioning(model, evaluation.images, evaluation.options.tokenizer)


def _zeroshot(evaluation: Evaluation) -> Measure:
    options = evaluation.options
    prompts = options.prompts
    if prompts == "auto":
        prompts = "captions" if options.data == ("openmoji",) and not options.label_key and not options.template else "templates"
    training = _training(options, least=1) if prompts == "captions" else None
    labels = _labels(evaluation, training[1] if training else None)
    texts, how = suite.class_texts(labels, prompts, training, options.template)
    return lambda model: suite.zeroshot(model, evaluation.images_for(model, "zeroshot"), labels, texts, how, evaluation.embeddings.get(model.name))


def _probe(evaluation: Evaluation) -> Measure:
    options, images = evaluation.options, evaluation.images
    source, train_labels = _training(options, options.least)
    labels = _labels(evaluation, train_labels)
    train = replace(images, source=source, indices=None, digests={}, described={})
    images.problems.extend(source.problems)

    def measure_model(model: Functions) -> Measured:
        test = evaluation.images_for(model, "probe")
        fitted = suite.LabelledSet(train if test.size == train.size else train.resized(test.size), train_labels)
        return suite.probe(model, fitted, suite.LabelledSet(test, labels), options.k, options.device)

    return measure_model


MEASURES: dict[str, Callable[[Evaluation], Measure]] = {
    "reconstruction": _reconstruction,
    "retrieval": _retrieval,
    "captioning": _captioning,
    "zeroshot": _zeroshot,
    "probe": _probe,
}


def _labels(evaluation: Evaluation, like: Labels | None) -> Labels:
    """The classes of the chosen images, numbered as in the training set if there is one."""
    options, images = evaluation.options, evaluation.images
    labels = read_labels(images.source, options.label_key, () if like else _class_names(options), least=0, like=like)
    chosen = set(images.chosen)
    kept = [(index, number) for index, number in zip(labels.indices, labels.classes, strict=True) if index in chosen]
    return replace(labels, indices=tuple(i for i, _ in kept), classes=tuple(n for _, n in kept))


def _training(options: Options, least: int) -> tuple[Any, Labels]:
    """The labelled training data. Raises ValueError if none are named or they have no classes."""
    names = options.training_data()[1] or (("openmoji",) if options.data == ("openmoji",) else ())
    if not names:
        raise ValueError("training images with classes are needed; name them with --train")
    source = open_source(names, options.data_options())
    return source, read_labels(source, options.label_key, _class_names(options), least=least)


def _class_names(options: Options) -> tuple[str, ...]:
    return read_names(options.classes) if options.classes else ()
