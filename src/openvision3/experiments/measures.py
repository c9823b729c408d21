"""What is measured of each finished run of an ablation: a model's reconstruction, understanding and drawability on named sets, a generator's drawings,
the answers of a chat model.

`evaluate/run.py`, `evaluate/generation.py` and `evaluate/vqa.py` measure; the results.json of each set lies in RUN/measures/SET, and the numbers of all sets in
RUN/measures.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from openvision3 import distributed
from openvision3.data.names import DataOptions, open_source
from openvision3.data.sources import Source
from openvision3.evaluate.generation import evaluate_generation
from openvision3.evaluate.image_set import ImageSet, on_first
from openvision3.evaluate.metrics.drawability import evaluate_drawability
from openvision3.evaluate.options import GenerationOptions, Options, VqaOptions
from openvision3.evaluate.questions import QuestionSet
from openvision3.evaluate.run import evaluate
from openvision3.evaluate.subjects import Subject
from openvision3.evaluate.vqa import evaluate_vqa
from openvision3.files import write_whole
from openvision3.generate.config import GenerateConfig
from openvision3.generate.generator import load_generator
from openvision3.networks.inception import EfficientNetFeatures
from openvision3.pipeline import Pipeline, load
from openvision3.train.config import PretrainConfig
from openvision3.train.data_config import DataConfig
from openvision3.train.open_data import data_options, open_held_out
from openvision3.understand.chat import load_chat
from openvision3.understand.config import LlavaConfig

FILE = "measures.json"
DRAWN_FROM = 2048
"""most training images, evenly spaced, to whose tokens the flow model of drawability is fitted"""
BATCH = 32


@dataclass(frozen=True)
class HeldOutSet:
    """Images with captions to reconstruct and retrieve, or with classes (`train` is not empty) for zero-shot and a linear probe."""

    name: str
    data: str
    train: str = ""
    """training images with classes, to which the probe is fitted"""
    label_key: str = ""
    samples: int = 0
    """of a generator: drawings that are compared with these images; of a chat model: most questions of each kind"""

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("zeroshot", "probe") if self.train else ("reconstruction", "retrieval")


def parse_sets(measure: Sequence[str], classify: Sequence[str], label_key: str) -> list[HeldOutSet]:
    """NAME=DATA ... and NAME=TRAIN,TEST ... Raises ValueError for other text, and for a name that stands twice."""
    sets = []
    for text in measure:
        name, _, data = text.partition("=")
        if not name.strip() or not data or "/" in name:
            raise ValueError(f"measure {text!r} must look like NAME=DATA, such as 'unseen style=drawings/*-unseen_style-*.tar'")
        sets.append(HeldOutSet(name.strip(), data))
    for text in classify:
        name, _, data = text.partition("=")
        train, _, test = data.partition(",")
        if not name.strip() or not train or not test or "/" in name:
            raise ValueError(f"classify {text!r} must look like NAME=TRAIN,TEST, such as flowers=flowers/train-0000.tar,flowers/val-0000.tar")
        sets.append(HeldOutSet(name.strip(), test, train, label_key))
    names = [one.name for one in sets]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{min(twice)} names two sets; give each set of --measure and --classify a name of its own")
    return sets


def check_sets(sets: Sequence[HeldOutSet], config: DataConfig | LlavaConfig) -> None:
    """Open every set once, so that a missing one ends the command before anything is trained. Raises ValueError, FileNotFoundError."""
    if isinstance(config, LlavaConfig):
        for one in sets:
            QuestionSet("conversations", (one.data,), config.images)
        return
    drawn = tuple(one.data for one in sets if not one.train)
    for names in (drawn, *((name,) for one in sets if one.train for name in (one.data, one.train))):
        if names:
            open_source(names, _reading(config))


def is_measured(folder: Path, sets: Sequence[HeldOutSet]) -> bool:
    """Whether these sets, and no others, have been measured of the run in `folder`."""
    try:
        return not sets or json.loads((folder / FILE).read_text(encoding="utf-8"))["sets"] == [asdict(one) for one in sets]
    except (FileNotFoundError, ValueError, KeyError):  # not measured yet, or by another version: it is measured again
        return False


def read_measures(folder: Path) -> dict[str, float]:
    """{metric: value}; empty if the run has not been measured."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8"))["values"] if path.is_file() else {}


def measure_run(folder: Path, sets: Sequence[HeldOutSet], config: PretrainConfig, precision: str, device: str) -> dict[str, float]:
    """Measure the finished run in `folder` on every set and write measures.json. Metrics are called "SET: METRIC".

    A seed draws one noise for all runs, so that differences are of the runs alone. Raises ValueError, FileNotFoundError: a set that cannot be measured.
    """
    pipeline = load(distributed.from_first(str(folder)), device=device, precision=precision)
    name = str(folder)
    values: dict[str, float] = {}
    for one in sets:
        options = Options(
            model=name,
            data=(one.data,),
            out=str(folder / "measures" / one.name),
            peer=("ours",),
            size=config.size,
            batch=BATCH,
            metrics=("psnr", "kid"),
            sigmas=(0.0,),
            caption_keys=config.caption_keys,
            index=config.index,
            cache=config.cache,
            cache_gb=config.cache_gb,
            label_key=one.label_key,
            train=(one.train,) if one.train else (),
            least=1,
            prompts="templates",
            device=device,
            precision=precision,  # type: ignore[arg-type]
        )
        evaluation = evaluate(one.kinds, options, lambda _: Subject(pipeline.functions(name)))
        if distributed.rank() == 0:
            with distributed.alone():
                evaluation.save(Path(options.out))
        missing = [entry for entry in evaluation.results.not_run if entry.metric in one.kinds]
        if missing:
            raise ValueError(f"{one.name}: {missing[0].metric} cannot be measured: {missing[0].needs}")
        for row in sorted(evaluation.results.rows, key=lambda row: row.number.count):  # the row of all samples comes after those of parts
            if row.model == name and (short := _short(row.metric)):
                values[f"{one.name}: {short}"] = row.number.value
    values["flow loss"] = measure_drawability(pipeline, [one.data for one in sets if not one.train], config)
    _write(folder, sets, values)
    return values


def measure_drawings(folder: Path, sets: Sequence[HeldOutSet], config: GenerateConfig, precision: str, device: str) -> dict[str, float]:
    """Draw without guidance, compare with the images of every set, and write measures.json. Raises ValueError, FileNotFoundError as `measure_run`."""
    generator = load_generator(distributed.from_first(str(folder)), device=device, precision=precision, tokens=config.tokens)
    values: dict[str, float] = {}
    for one in sets:
        options = GenerationOptions(
            model=str(folder),
            data=(one.data,),
            out=str(folder / "measures" / one.name),
            count=one.samples,
            caption_keys=config.caption_keys,
            index=config.index,
            cache=config.cache,
            cache_gb=config.cache_gb,
            device=device,
            precision=precision,  # type: ignore[arg-type]
        )
        evaluation = evaluate_generation(options, lambda _: generator.functions())
        if distributed.rank() == 0:
            with distributed.alone():
                evaluation.save(Path(options.out))
        for row in evaluation.results.rows:
            for start, short in DRAWN.items():
                if row.metric == f"{start} on {EfficientNetFeatures.name} features":
                    values[f"{one.name}: {short}"] = row.number.value
        missing = [entry for entry in evaluation.results.not_run if EfficientNetFeatures.name in entry.metric]
        if missing:
            raise ValueError(f"{one.name}: {missing[0].metric} cannot be measured: {missing[0].needs}")
    _write(folder, sets, values)
    return values


DRAWN = {"KID": "KID of drawings", "precision": "precision", "recall": "recall"}
"""{beginning of a metric of `evaluate generation`: its name in the tables}"""


def measure_answers(folder: Path, sets: Sequence[HeldOutSet], config: LlavaConfig, precision: str, device: str) -> dict[str, float]:
    """Ask the questions of every set, and write measures.json: the share of right answers by kind of question. Raises ValueError, FileNotFoundError."""
    chat = load_chat(distributed.from_first(str(folder)), device=device, precision=precision, tower=config.tower, language=config.language)
    values: dict[str, float] = {}
    for one in sets:
        options = VqaOptions(
            model=str(folder),
            data=(one.data,),
            images=config.images,
            out=str(folder / "measures" / one.name),
            count=one.samples,
            max_tokens=LONGEST,
            device=device,
        )
        evaluation = evaluate_vqa("conversations", options, lambda options: chat.functions(options.model))
        if distributed.rank() == 0:
            with distributed.alone():
                evaluation.save(Path(options.out))
        right = {row.metric.rpartition(": ")[0]: row.number.value for row in evaluation.results.rows if row.metric.rpartition(": ")[2] == "accuracy"}
        for kind, value in right.items():
            if kind or len(right) == 1:
                values[f"{one.name}: {RIGHT}, {kind}" if kind else f"{one.name}: {RIGHT}"] = value
    _write(folder, sets, values)
    return values


RIGHT = "right answers"
LONGEST = 16
"""tokens of an answer"""


def _write(folder: Path, sets: Sequence[HeldOutSet], values: dict[str, float]) -> None:
    if distributed.rank() == 0:
        write_whole(folder / FILE, json.dumps({"sets": [asdict(one) for one in sets], "values": values}, indent=1) + "\n")


def _short(metric: str) -> str:
    """The name in the tables of a metric of `evaluate`; "" for one that is not judged."""
    names = {"psnr": "PSNR", "image_to_text_r@1": "image to text R@1", "text_to_image_r@1": "text to image R@1"}
    names |= {"zeroshot_top_1": "zero-shot", "linear_probe_top_1": "linear probe"}
    return "KID" if metric.startswith("KID") else names.get(metric, "")


def measure_drawability(pipeline: Pipeline, held_out: Sequence[str], config: PretrainConfig) -> float:
    """The flow model's loss on the tokens of all held-out sets together, fitted to the tokens of training images in the evaluation view."""

    def tokens(source: Source, indices: Sequence[int]) -> Tensor:
        images = ImageSet(source, config.size, BATCH, indices)
        return images.collect_rows("tokens", lambda rows: pipeline.encode(rows).cpu()).values

    training = open_source(config.data, data_options(config))
    count = min(DRAWN_FROM, len(training))
    train = tokens(training, [place * len(training) // count for place in range(count)])
    others = open_source(tuple(held_out), _reading(config)) if held_out else open_held_out(config, training)
    count = min(DRAWN_FROM, len(others))
    unseen = tokens(others, [place * len(others) // count for place in range(count)])
    return on_first(lambda: evaluate_drawability(train, unseen).value)


def _reading(config: DataConfig) -> DataOptions:
    """Held-out sets are read as the training data are, but for `only`, which chooses samples to train on."""
    return DataOptions(side="test", caption_keys=config.caption_keys, index=config.index, cache=config.cache, cache_gb=config.cache_gb)
