"""Pre-training of OpenVision 3: what is special to it, as a build of `train_run`."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvision3 import distributed, hub
from openvision3.data import fingerprint, openmoji
from openvision3.data.batches import BatchPlan, TextShape, TrainingBatches, fewer_than_a_batch
from openvision3.data.fingerprint import Fingerprint
from openvision3.data.identity import digest
from openvision3.data.images import ImageError
from openvision3.data.latents.read import CachedSource, LatentCache
from openvision3.data.prepared import rows_of_a_process
from openvision3.data.shards.source import choose_lanes
from openvision3.data.sources import Source
from openvision3.data.text import TextCount, TextTokenizer
from openvision3.device import choose_device, dtype_of
from openvision3.files import sha256_of
from openvision3.model.openvision3 import OpenVision3
from openvision3.model.vae import VAE
from openvision3.pipeline import Pipeline
from openvision3.progress import track
from openvision3.train import balance
from openvision3.train.checkpoint import RunState
from openvision3.train.config import PretrainConfig
from openvision3.train.held_out import MEASURE, quick_evaluation
from openvision3.train.loop import Training
from openvision3.train.open_data import EVALUATED, data_digest, open_data, open_held_out
from openvision3.train.optimizer import Optimizers
from openvision3.train.recipes import kept_at_another_batch
from openvision3.train.released import describe, is_released, wordless
from openvision3.train.run import Outcome, Start, train_run
from openvision3.train.run_folder import RunFolder
from openvision3.train.signals import Signals

COUNTED = 1000
"""samples in whose captions unknown and cut-off pieces are counted when a run starts"""
LEARNT_FROM = 500_000
"""most samples from whose captions a vocabulary is learnt"""


def pretrain(config: PretrainConfig, recipe: str = "run", signals: Signals | None = None) -> Outcome[Pretraining]:
    """Train OpenVision 3 as `config` says, see `train_run`; `recipe` names the run."""
    return train_run(config, functools.partial(Pretraining, recipe=recipe), Path(config.out or f"runs/{recipe}"), signals)


def pretrain_in_turn(phases: Sequence[tuple[str, PretrainConfig]]) -> Outcome[Pretraining]:
    """One run after the other, each from the weights of the one before; ends with the first that a signal stops.

    A run that is finished already is skipped.

    Raises:
        ValueError, FileNotFoundError: what would end a later phase at its start, days later, ends the first before anything is written.
    """
    outcome: Outcome | None = None
    with distributed.started(choose_device(phases[0][1].device)) as ranks, Signals() as signals:
        with distributed.together():
            for _, config in phases:
                check_start(config, ranks.world)
        for name, config in phases:
            outcome = None  # frees the memory of the model of the phase before
            outcome = pretrain(config, name, signals)
            if outcome.status == "stopped":
                break
    assert outcome is not None
    return outcome


def check_start(config: PretrainConfig, world: int) -> None:
    """Raises ValueError, FileNotFoundError for what would end a run of `world` processes at its start, if it can be known without the data."""
    rows_of_a_process(config.batch, world, config.micro_batch)
    hub.load_distance(config.model.loss)


def initial_model(config: PretrainConfig, vae: VAE, tokenizer: TextTokenizer) -> OpenVision3:
    """The model with its random weights, which depend on `config.seed` alone. Raises FileNotFoundError, ValueError: the perceptual network's files."""
    distance = hub.load_distance(config.model.loss)
    torch.manual_seed(config.seed)
    return OpenVision3(config.model, vae, len(tokenizer), tokenizer.pad_id, distance).init_weights()


class Pretraining(Training):
    """OpenVision 3, its data, its held-out images and its tokenizer, opened as `config` says."""

    val_measure = MEASURE
    noise: float | None = None
    """standard deviation of the noise on the tokens in one more evaluation"""
    model: OpenVision3
    batches: TrainingBatches
    untrained: tuple[str, ...]
    """parts of the first model that were never trained, and are not now"""

    def __init__(self, config: PretrainConfig, start: Start, *, recipe: str = "run"):
        self.config, self.start, self.recipe = config, start, recipe
        ranks, checkpoint = start.ranks, start.checkpoint
        with distributed.together():
            vae = hub.load_vae(config.model.vae.name, shift=config.model.vae.shift, dtype=dtype_of(start.precision))
            self.source, self.cache, self.about_cache = open_data(config, vae, config.pixel_share)
            self.held_out = open_held_out(config, self.source)
            self.source.problems.extend(self.held_out.problems)
            tokenizer = _tokenizer(config, self.source, checkpoint or start.out) if ranks.rank == 0 or not config.init else None
        tokenizer = distributed.from_first(tokenizer) if config.init else tokenizer
        assert tokenizer is not None
        self.tokenizer = tokenizer
        if checkpoint:
            _check_same(config, start, vae, len(self.source), self.cache)
        with distributed.together():
            self.started_from = _started_from(config, checkpoint) if ranks.rank == 0 else {}
        self.started_from = distributed.from_first(self.started_from)
        self.untrained = tuple(self.started_from.get("untrained", ()))
        if self.untrained and not config.decoder_share == 1:
            raise ValueError(
                f"{config.init} has no trained {' and '.join(self.untrained)} to go on from; openvision3 train latent_decoder trains the rest of it"
            )
        recorded = start.check_inputs(config, lambda: self._identities(vae))
        if checkpoint and recorded:
            self.source.relabel(recorded[LABELS]["data"])
            self.held_out.relabel(recorded[LABELS]["val"])
        self.model = self.create_model(vae, tokenizer)
        if checkpoint:
            hub.load_weights(self.model, checkpoint)
        elif config.init and ranks.rank == 0:  # the first rank's weights are sent to all
            self.start_from_init()
        self.shape = TextShape(
            config.model.text_encoder.positions, config.model.captioner.positions, config.captions, config.sentences, whole=len(config.caption_keys) < 2
        )
        wanted = config.lanes or (1 if start.before else 0)  # a run from before there were lanes has one
        self.lanes = choose_lanes(self.source, config.batch, wanted, math.ceil(ranks.world / ranks.local_world))
        config.lanes = wanted or self.lanes
        self.batches = TrainingBatches(
            self.source,
            tokenizer if self.reads_texts else None,
            BatchPlan(
                self.shape,
                config.size,
                config.batch,
                config.seed,
                pixel_share=config.pixel_share,
                micro_batch=config.micro_batch,
                families=config.families,
                lanes=self.lanes,
            ),
            ranks=ranks,
            latents=self.cache,
            workers=config.workers,
            pinned=start.device == "cuda",
            stopping=start.stopping,
        )
        self.batches.check_room(ranks.local_world)  # raises where no sample can be used, before anything is written
        self.facts = {
            "samples": (len(self.source), self.source.key(0), self.source.key(len(self.source) - 1)),
            "held-out images": len(self.held_out),
            "vocabulary": _tokenizer_sha256(tokenizer),
            "VAE": vae.sha256,
            "latent cache": self.cache.sha256 if self.cache is not None else "",
        }
        self.pipeline = Pipeline(self.model, tokenizer, config.size, precision=start.precision)

    @property
    def reads_texts(self) -> bool:
        """Whether a part that is trained reads them; otherwise samples need no caption."""
        return not self.untrained

    def create_model(self, vae: VAE, tokenizer: TextTokenizer) -> OpenVision3:
        """The model that is trained, before the weights of `init` or of a checkpoint are loaded."""
        return initial_model(self.config, vae, tokenizer)

    def start_from_init(self) -> None:
        """Copy the weights of `init` into the model. Raises FileNotFoundError, ValueError."""
        hub.start_from(self.model, hub.find_folder(self.config.init))

    def begin(self, run: RunFolder) -> None:
        config, source = self.config, self.source
        if run.writes and not (run.path / "tokenizer.json").is_file():
            self.tokenizer.save(run.path / "tokenizer.json")
        run.say(f"{self.recipe}: {len(source):,} samples, vocabulary {len(self.tokenizer)}")
        if run.writes and self.reads_texts and (lost := _lost_text(source, self.tokenizer, self.shape)):
            run.say(f"captions: {lost}")
        if self.about_cache:
            run.say(self.about_cache)
        for name, dropped in openmoji.load_emoji().dropped.items() if "openmoji" in config.data else ():
            run.say(f"openmoji: {dropped} emoji left out: {name}")
        if len(source) < config.batch:
            run.say(fewer_than_a_batch(len(source), config.batch))
        if config.lanes > self.lanes:
            run.say(f"lanes {config.lanes} are for remote shards, and there are none: the order is that of local data")
        if config.decoder_finish:
            run.say(f"in the last {config.steps - config.finish_from} of {config.steps} steps the latent decoder trains alone")
        if not config.resume and (line := kept_at_another_batch(self.recipe, config)):
            run.say(line)
        self.pipeline.fingerprint = _fingerprint(config, source, self.held_out, run) if run.writes else None

    def before_step(self, state: RunState, optimizers: Optimizers) -> None:
        loss = self.config.model.loss
        self.model.omega_rec = balance.omega_rec(state.memory, loss.gradient_ratio, loss.omega_rec)
        if self.config.decoder_finish and state.step == self.config.finish_from:
            optimizers.adopt_average()  # the latent decoder must learn the tokens of the encoder that is exported
        self.model.finishing = state.step >= self.config.finish_from

    def after_step(self, state: RunState, values: dict[str, float]) -> None:
        if "reconstruction_squares" in values:
            balance.measure(state.memory, values, self.model.omega_rec, self.start.ranks.world)

    def evaluate(self, step: int, run: RunFolder) -> dict[str, float]:
        sheet = run.path / "samples" / f"step-{step:08d}.png" if run.writes else None
        scores = quick_evaluation(self.pipeline, self.held_out, self.batches, sheet, self.noise)
        if sheet is not None and "psnr" in scores:
            run.image(step, "val/sheet", sheet)
        return scores

    def export(self, folder: Path, weights: dict[str, Tensor], state: RunState) -> None:
        hub.save_model(folder, self.model, self.tokenizer, self.config.size, training=self._record(state), weights=weights)
        if self.pipeline.fingerprint is not None:
            self.pipeline.fingerprint.save(folder / fingerprint.FILE)

    def finish(self, state: RunState) -> None:
        self.pipeline.training = self._record(state)
        self.model.eval()

    def _record(self, state: RunState) -> dict[str, Any]:
        """How the model was trained, for its config.json and its model card."""
        config, cache = self.config, self.cache
        data = config.data or (cache.settings.data if cache is not None else ())
        return {
            "recipe": self.recipe,
            "steps": state.step,
            "samples_seen": state.samples,
            "data": list(data),
            "only": list(config.only),
            "training_samples": len(self.source),
            "seconds": round(state.seconds),
            "precision": self.start.precision,
            "seed": config.seed,
            "licence": "; ".join(f"{name}: {'CC BY-SA 4.0' if name == 'openmoji' else 'unknown'}" for name in data),
            **({"latents": cache.sha256} if cache is not None else {}),
            **({"started_from": self.started_from} if self.started_from else {}),
        }

    def _identities(self, vae: VAE) -> dict[str, Any]:
        """{field of PLACES: digest}, "" for what is not read; and the labels that the keys of samples begin with, which are in no digest.

        The run keeps its own copy of the tokenizer: only a tokenizer under another path is read, and the old one may be gone.
        """
        config, before, loss = self.config, self.start.before, self.config.model.loss
        lpips = bool(loss.lambda_perceptual) and loss.perceptual.startswith("lpips")

        def weights(path: str) -> str:
            return sha256_of(path) if lpips and Path(path).is_file() else ""  # the network says what is missing

        tokenizer = _tokenizer_sha256(self.tokenizer)
        if isinstance(before, PretrainConfig) and before.tokenizer != config.tokenizer:
            tokenizer = _tokenizer_sha256(TextTokenizer.load(config.tokenizer)) if config.tokenizer else ""
        return {
            "data": data_digest(self.source),
            "val": data_digest(self.held_out),
            "latents": self.cache.sha256 if self.cache is not None else "",
            "tokenizer": tokenizer,
            "model.vae.name": digest(vae.sha256, vae.scale, vae.shift),
            "model.loss.lpips_backbone": weights(loss.lpips_backbone),
            "model.loss.lpips_linear": weights(loss.lpips_linear),
            LABELS: {"data": self.source.labels, "val": self.held_out.labels},
        }


LABELS = "labels"
"""in identities.json: what the keys of samples began with when the run was started"""


def _tokenizer_sha256(tokenizer: TextTokenizer) -> str:
    return hashlib.sha256(tokenizer.tokenizer.to_str().encode()).hexdigest()


def _fingerprint(config: PretrainConfig, source: Source, held_out: Source, run: RunFolder) -> Fingerprint | None:
    """The fingerprint of the training data and of those of the model that the run starts from; None, with a line in the log, where there can be none.

    It is kept in the run folder, so that a resumed run need not take it again.
    """
    path = run.path / fingerprint.FILE
    if path.is_file():
        return Fingerprint.load(path)
    try:
        before = fingerprint.recorded(hub.find_folder(config.init)) if config.init and not is_released(config.init) else None
    except FileNotFoundError:
        if not config.resume:
            raise
        before = None  # the first model may have moved: a run that goes on has its weights
    if config.init and before is None:
        run.say(f"no fingerprint of the training data is written: {config.init}, which this run starts from, has none; name the data to evaluate with --train")
        return None
    if isinstance(source, CachedSource) or len(source) > config.fingerprint:
        why = "their images are missing" if isinstance(source, CachedSource) else f"they are more than {config.fingerprint:,} samples (--fingerprint)"
        run.say(f"no fingerprint of the training data is written: {why}; openvision3 data fingerprint DATA --out FILE writes one for evaluate --train FILE")
        return None
    own = fingerprint.take_fingerprint(source, config.data, watch=track)
    duplicates = list(own.nearest(torch.from_numpy(fingerprint.take_fingerprint(held_out, config.val, count=EVALUATED).images)))
    if duplicates:
        example = own.keys[duplicates[0][1]]
        run.say(f"{len(duplicates)} of the first {min(len(held_out), EVALUATED)} val images are near-duplicates of training images, such as {example}")
    joined = Fingerprint.joined([each for each in (before, own) if each is not None])
    joined.save(path)
    return joined


def _check_same(config: PretrainConfig, start: Start, vae: VAE, count: int, cache: LatentCache | None) -> None:
    """Raises ValueError if the VAE, the data or the latent cache under an old path are no longer those that the run was started with."""
    before, checkpoint, out = start.before, start.checkpoint, start.out
    assert isinstance(before, PretrainConfig) and checkpoint is not None
    saved = hub.read_config(checkpoint)
    samples = saved.training["training_samples"]
    if config.model.vae.name == before.model.vae.name and (line := hub.other_vae(saved, vae)):
        raise ValueError(f"{out} was started {line}; put the old one back")
    if cache is not None and config.latents == before.latents and saved.training.get("latents") != cache.sha256:
        raise ValueError(f"{cache.folder} is not the latent cache that {out} was started with; put the old one back, or start a new run with --init {out}")
    if config.data == before.data and samples != count:
        raise ValueError(f"{out} was started on {samples} samples, but its data hold {count} now; put the old data back, or start a new run with --init {out}")


def _tokenizer(config: PretrainConfig, source: Source, out: Path) -> TextTokenizer:
    if config.resume and (out / "tokenizer.json").is_file():
        return TextTokenizer.load(out / "tokenizer.json")
    if config.tokenizer:
        return TextTokenizer.load(config.tokenizer)
    if is_released(config.init):
        return wordless()
    if config.init:  # its word embeddings belong to its own words
        return TextTokenizer.load(hub.find_folder(config.init) / "tokenizer.json")
    captions = _some_captions(source)
    if not captions:
        raise ValueError(
            f"none of the {len(source)} images in {', '.join(config.data)} has a caption; put x.txt beside x.jpg, or a captions.csv into the folder"
        )
    return TextTokenizer.train(captions, config.vocabulary)


def _some_captions(source: Source) -> list[str]:
    """All captions, or those of the first LEARNT_FROM samples of an epoch, so that of remote shards only the first are fetched.

    Samples that cannot be read are added to the problems of the source.
    """
    order = source.order(0, 0)
    captions: list[str] = []
    for position in track(range(len(source))[:LEARNT_FROM], "reading captions"):
        index = order.place(position)[0]
        try:
            captions += source.captions(index)
        except ImageError as error:
            source.problems.add(error.as_problem(source.key(index)))
    return captions


def _lost_text(source: Source, tokenizer: TextTokenizer, shape: TextShape) -> str:
    """What the tokenizer does not know and the model cuts off in the captions of the first COUNTED samples of an epoch; "" if there is nothing."""
    order = source.order(0, 0)
    counts = TextCount()
    for position in range(min(len(source), COUNTED)):
        with contextlib.suppress(ImageError):  # training reports it
            counts.add(tokenizer.count(source.captions(order.place(position)[0])[:1], shape.caption_positions - 2))
    hint = "; train a tokenizer on the captions with --tokenizer ''" if counts.unknown > counts.pieces / 20 else ""
    return f"{counts}{hint}" if str(counts) else ""


def _started_from(config: PretrainConfig, checkpoint: Path | None) -> dict[str, Any]:
    """How the weights that --init names were trained: part of this run's own record."""
    if not config.init:
        return {}
    kept = hub.read_config(checkpoint).training.get("started_from") if checkpoint else None
    if not kept and is_released(config.init):
        return describe(config.init)
    return kept or {"name": config.init, **hub.read_config(hub.find_folder(config.init)).training}
