"""A RunConfig becomes a run: data, text tokenizer, model and optimiser put together and handed to the loop."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvision3 import distributed, hub
from openvision3.data import fingerprint, openmoji
from openvision3.data.batches import TextShape, TrainingBatches, fewer_than_a_batch, rows_of_a_process, to_device
from openvision3.data.fingerprint import Fingerprint
from openvision3.data.images import ImageError
from openvision3.data.latents.read import CachedSource, LatentCache
from openvision3.data.problems import Problems, reasons_in_words
from openvision3.data.sources import Source, choose_lanes, open_source
from openvision3.data.text import TextCount, TextTokenizer
from openvision3.device import choose_compile, choose_device, choose_precision, dtype_of
from openvision3.files import write_whole
from openvision3.model.openvision3 import OpenVision3
from openvision3.model.vae import VAE
from openvision3.pipeline import Pipeline
from openvision3.progress import console, duration, environment, track
from openvision3.settings import flat, load_config, to_dict
from openvision3.train import identities
from openvision3.train.checkpoint import RunState, latest_checkpoint, load_checkpoint, read_state
from openvision3.train.config import RunConfig
from openvision3.train.held_out import EVALUATED, MEASURE, open_held_out, quick_evaluation
from openvision3.train.loop import Loop, Signals, backward, fit
from openvision3.train.optimizer import Optimizers
from openvision3.train.recipes import kept_at_another_batch
from openvision3.train.run_folder import RunFolder, read_skipped
from openvision3.train.trackers import check_trackers

COUNTED = 1000
"""samples of whose captions unknown and cut-off pieces are counted when a run starts"""
LEARNT_FROM = 500_000
"""samples whose captions a vocabulary is learnt from, at most"""


FREE = (
    *("workers", "log_every", "eval_every", "save_every", "keep", "keep_best", "track", "fingerprint", "out", "resume"),
    *("index", "cache", "cache_gb"),
    *("micro_batch", "parallel", "checkpointing", "compile"),
)
"""fields that a run which goes on may set anew"""


SETTLED = (("precision", "auto"), ("lanes", 0))
"""values that a run replaces by what it has chosen"""


@dataclass
class Outcome:
    """A run that has ended: `status` is finished or stopped."""

    status: str
    folder: Path
    pipeline: Pipeline
    steps: int
    precision: str


def pretrain(config: RunConfig, recipe: str = "run", signals: Signals | None = None) -> Outcome:
    """Train as `config` says; with `config.resume` go on from the run folder's last checkpoint.

    Started by torchrun or srun, each process takes its share of every batch. SIGTERM and SIGUSR1 end it at a step, whenever they come;
    `signals` has watched since before.

    Raises:
        ValueError, FileNotFoundError: bad input, before anything is written.
    """
    device = choose_device(config.device)
    with distributed.started(device) as ranks, Signals(signals) as heard:
        return _pretrain(config, recipe, torch.device(device).type, ranks, heard)  # of several GPUs the current one


def pretrain_in_turn(phases: Sequence[tuple[str, RunConfig]]) -> Outcome:
    """One run after the other, each from the weights of the one before; ends with the first that a signal stops.

    A run that is finished already is passed over.

    Raises:
        ValueError, FileNotFoundError: what would end a later phase at its start, days later, ends the first before anything is written.
    """
    outcome: Outcome | None = None
    with distributed.started(choose_device(phases[0][1].device)) as ranks, Signals() as signals:
        with distributed.together():
            for _, config in phases:
                rows_of_a_process(config.batch, ranks.world, config.micro_batch)
                hub.load_distance(config.model.loss)
        for name, config in phases:
            outcome = None  # the model of the phase before gives its memory back
            outcome = pretrain(config, name, signals)
            if outcome.status == "stopped":
                break
    assert outcome is not None
    return outcome


def _pretrain(config: RunConfig, recipe: str, device: str, ranks: distributed.Ranks, signals: Signals) -> Outcome:
    out = Path(config.out or f"runs/{recipe}")
    with distributed.together():
        if ranks.rank == 0 or not config.resume:
            RunFolder.check(out, config.resume)
    if config.resume:
        with distributed.together():
            _refuse_unseen(out, out / "config.json")
    with distributed.together():
        check_trackers(config.track)
        config = _resumed(config, out) if config.resume else copy.deepcopy(config)
        measured = choose_precision(config.precision, device) if ranks.rank == 0 else None
        checkpoint = latest_checkpoint(out) if config.resume and ranks.rank == 0 else None
        read = read_state(checkpoint) if checkpoint else None  # its files are many GB: one rank reads them all
    name = distributed.from_first(checkpoint and checkpoint.name)
    checkpoint = out / "checkpoints" / name if name else None
    if checkpoint:
        with distributed.together():
            _refuse_unseen(out, checkpoint / "run_state.json")
    state = distributed.from_first(read) or RunState()
    measured_otherwise, state.val_measure = state.val_measure != MEASURE, MEASURE
    precision, why = distributed.from_first(measured)  # type: ignore[misc]  # the ranks need not have measured alike
    with distributed.together():
        vae = hub.load_vae(config.model.vae.name, shift=config.model.vae.shift, dtype=dtype_of(precision))
        source, cache, about_cache = _open_data(config, vae)
        held_out = open_held_out(config, _places(config), source)
        source.problems += held_out.problems
        tokenizer = _tokenizer(config, source, checkpoint or out) if ranks.rank == 0 or not config.init else None
    tokenizer = distributed.from_first(tokenizer) if config.init else tokenizer
    with distributed.together():
        assert tokenizer is not None
        known = identities.of_inputs(config, source, held_out, vae, cache, tokenizer) if ranks.rank == 0 else {}
        inputs = identities.compared(out, config, known) if config.resume and ranks.rank == 0 else []
        identities.refuse_other(out, (each for each in inputs if each.moved))
        if checkpoint:
            _check_same(checkpoint, out, vae, len(source), cache)
            identities.keep_names(out, source, held_out)
        identities.refuse_other(out, inputs)
        distance = hub.load_distance(config.model.loss)  # raises where its files are missing, before anything is written
        torch.manual_seed(config.seed)
        model = OpenVision3(config.model, vae, len(tokenizer), tokenizer.pad_id, distance).init_weights()
        if checkpoint or (config.init and ranks.rank == 0):  # of a checkpoint what is frozen, the trained follows below; the first rank's are sent to all
            (hub.load_weights if checkpoint else hub.start_from)(model, checkpoint or hub.find_folder(config.init))
        started_from = _started_from(config, checkpoint) if ranks.rank == 0 else {}
        shape = TextShape(
            config.model.text_encoder.positions, config.model.captioner.positions, config.captions, config.sentences, whole=len(config.caption_keys) < 2
        )
        lanes = choose_lanes(source, config.batch, config.lanes, math.ceil(ranks.world / ranks.local_world))
        config.lanes = config.lanes or lanes
        batches = TrainingBatches(
            source,
            tokenizer,
            shape,
            size=config.size,
            batch=config.batch,
            seed=config.seed,
            pixel_share=config.pixel_share,
            workers=config.workers,
            families=config.families,
            rank=ranks.rank,
            world=ranks.world,
            micro_batch=config.micro_batch,
            lanes=lanes,
            latents=cache,
            pinned=device == "cuda",
            stopping=lambda: signals.asked,
        )
        if checkpoint:
            batches.problems = Problems(read_skipped(out, state.problems))
        batches.check_room(ranks.local_world)  # raises where no sample can be used, before anything is written
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        parallel = distributed.choose_parallel(config.parallel, trained, ranks)
        if parallel != "replicate" and config.minutes and not config.resume:
            raise ValueError(f"minutes {config.minutes:g} are measured on a copy of the model, which a sharded one does not allow; set --steps")
        compiled, not_compiled = choose_compile(config.compile, device)
        model = model.to(device)
    with distributed.together():
        _agree(
            {
                "checkpoint": checkpoint.name if checkpoint else "none",
                "samples": (len(source), source.key(0), source.key(len(source) - 1)),
                "held-out pictures": len(held_out),
                "vocabulary": identities.of_tokenizer(tokenizer),
                "VAE": vae.sha256,
                "cache of latents": cache.sha256 if cache is not None else "",
                "compiled": compiled,
            }
        )
    if config.minutes and not config.resume:
        if ranks.rank == 0:
            console().print(f"measuring how many steps fill {config.minutes:g} minutes ...")
        config.steps, rate = distributed.from_first(steps_for(config.minutes, model, batches, config, device, precision, compiled))
        why += f"; {rate:.2f} steps/s: {config.steps} steps fill {config.minutes:g} minutes"
        config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, max(1, config.steps // 10))
    distributed.wrap_blocks(model, config.checkpointing, compiled)
    distributed.spread(model, parallel, ranks, device, precision)
    optimizers = Optimizers(model, config.optimizer, dtype_of(precision))
    with distributed.together():
        if checkpoint:
            load_checkpoint(checkpoint, model, optimizers, state)
    with distributed.together():
        run = RunFolder(out, resume=config.resume, writes=ranks.rank == 0)
    try:
        config.precision = precision
        with distributed.together():
            if run.writes and not (config.resume and (out / identities.FILE).is_file()):
                write_whole(out / identities.FILE, json.dumps(known, indent=2) + "\n")
            run.describe(to_dict(config), environment())
        if config.resume:
            run.forget_after(state.step, state.problems)
        run.track(config.track, to_dict(config))
        if run.writes and not (out / "tokenizer.json").is_file():
            tokenizer.save(out / "tokenizer.json")
        run.say(f"{recipe}: {len(source):,} samples, {trained / 1e6:.1f} M parameters to train, vocabulary {len(tokenizer)}")
        run.say(f"device {device}, precision {precision} ({why})")
        if run.writes and (told := _text_told(source, tokenizer, shape)):
            run.say(f"captions: {told}")
        if unseen := _not_seeing(out / "config.json"):
            run.say(
                f"{_processes(unseen)} of {ranks.world} {'does' if len(unseen) == 1 else 'do'} not see {out}: it lies on a disk of process 0's machine; "
                "training and saving work, but --resume and later commands need it where every process sees it: a shared disk, or copied to each machine"
            )
        if not_compiled:
            run.say(not_compiled)
        if about_cache:
            run.say(about_cache)
        if ranks.world > 1:
            run.say(f"{ranks.world} processes, {parallel}: {config.batch // ranks.world} of {config.batch} pictures each")
        if batches.pieces > 1:
            run.say(f"each step is {batches.pieces} micro-batches of {config.micro_batch} a process, contrasted with all {config.batch}")
        for name, dropped in samples_dropped(config.data).items():
            run.say(f"openmoji: {dropped} emoji left out: {name}")
        if run.list_skipped(batches.problems):
            run.say(f"{len(batches.problems)} problems found in the data, listed in {out}/skipped.jsonl: {reasons_in_words(batches.problems)}")
        if len(source) < config.batch:
            run.say(fewer_than_a_batch(len(source), config.batch))
        if config.lanes > lanes:
            run.say(f"lanes {config.lanes} are for remote shards and there are none: the order is that of local data")
        if config.optimizer.warmup_steps >= config.steps:
            run.say(f"the warm-up of {config.optimizer.warmup_steps} steps is as long as the run: the rate never falls; see --optimizer.warmup-steps")
        if config.resume:
            run.say(f"going on from {checkpoint.name}" if checkpoint else "no checkpoint yet: starting over")
            for each in inputs:
                if each.moved:
                    run.say(str(each))
            if checkpoint and measured_otherwise and config.keep_best:
                run.say("val/loss was made otherwise until now and is not compared with: which checkpoint is the best is decided anew (--keep-best)")
        elif line := kept_at_another_batch(recipe, config):
            run.say(line)

        marks = _fingerprint(config, source, held_out, run) if run.writes else None
        loop = Loop(config.steps, config.log_every, config.eval_every, config.save_every, config.keep, config.keep_best, device, precision, state)
        pipeline = Pipeline(model, tokenizer, config.size, precision=precision)

        def export(folder: Path, weights: dict[str, Tensor], state: RunState) -> None:
            training = _training_record(recipe, config, state, len(source), precision, started_from, cache)
            hub.save_model(folder, model, tokenizer, config.size, training=training, weights=weights)
            if marks is not None:
                marks.save(folder / fingerprint.FILE)

        def evaluate(step: int) -> dict[str, float]:
            sheet = run.path / "samples" / f"step-{step:08d}.png" if run.writes else None
            found = quick_evaluation(pipeline, held_out, batches, sheet)
            if sheet is not None and "psnr" in found:
                run.picture(step, "val/sheet", sheet)
            return found

        status = fit(model, batches, optimizers, config.optimizer, loop, run, export=export, evaluate=evaluate, signals=signals)
        counts = f"; skipped samples: {reasons_in_words(batches.problems)}" if batches.problems else ""
        steps = f"; {loop.state.skipped_steps} steps skipped as not finite" if loop.state.skipped_steps else ""
        run.say(f"{status} at step {loop.state.step} after {duration(loop.state.seconds)}: {latest_checkpoint(out) or out}{counts}{steps}")
        pipeline.training = _training_record(recipe, config, loop.state, len(source), precision, started_from, cache)
        pipeline.fingerprint = marks
        model.eval()
        return Outcome(status, out, pipeline, loop.state.step, precision)
    finally:
        run.close()


def _not_seeing(path: Path) -> list[int]:
    """The ranks that do not see a file; every rank takes part."""
    return [rank for rank, seen in enumerate(distributed.gather_objects(path.is_file())) if not seen]


def _processes(ranks: Sequence[int]) -> str:
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _refuse_unseen(out: Path, path: Path) -> None:
    """Raises ValueError where a rank does not see what a run goes on from; every rank takes part, and reads it."""
    if unseen := _not_seeing(path):
        verb = "does" if len(unseen) == 1 else "do"
        raise ValueError(
            f"{_processes(unseen)} {verb} not see {path}, and every process reads what a run goes on from: "
            f"put {out} on a disk that all machines share, or copy it to each, then --resume again"
        )


def _agree(facts: dict[str, Any]) -> None:
    """Every rank has opened the same things: a machine that lacks a shard would see another order of the samples, and train on without a word.

    Raises:
        ValueError: two ranks differ.
    """
    seen = distributed.gather_objects(facts)
    for name, value in seen[0].items():
        other = next((rank for rank, found in enumerate(seen) if found[name] != value), None)
        if other is not None:
            raise ValueError(f"the processes have not opened the same {name}: {value} in process 0, {seen[other][name]} in process {other}")


def _resumed(config: RunConfig, out: Path) -> RunConfig:
    """The config that the run was started with; only the FREE fields, which do not change its numbers, may be set anew.

    So may those that say where something lies (identities.MOVABLE): what lies there is compared when it is open. Of a run of an older
    version, which did not record what lay there, they must be as they were.

    Raises:
        ValueError: another field has another value now.
    """
    settled_later = identities.MOVABLE if (out / identities.FILE).is_file() else ()
    old = load_config(RunConfig, out / "config.json")
    before, asked = flat(to_dict(old)), flat(to_dict(config))
    measured = ("steps", "optimizer.warmup_steps") if old.minutes else ()  # the run itself set these
    for name, value in asked.items():
        settled = name in measured or (name, value) in SETTLED
        if name not in (*FREE, *settled_later) and not settled and value != before[name]:
            why = ": an older version started it, which did not record what lay there (name the old path, or link it)" if name in identities.MOVABLE else ""
            raise ValueError(f"{name} was {before[name]!r} when {out} was started and cannot become {value!r}{why}; start a new run with --init {out}")
    for name in (*FREE, *settled_later):
        *parents, field = name.split(".")
        setattr(functools.reduce(getattr, parents, old), field, functools.reduce(getattr, name.split("."), config))
    old.lanes = old.lanes or 1  # a run from before there were lanes
    old.resume = True
    return old


def _open_data(config: RunConfig, vae: VAE) -> tuple[Source, LatentCache | None, str]:
    """The samples to train on, their cached latents where `config.latents` names some, and what to say of them.

    Where the data are not named or not there, the cache stands for them: keys and captions, but no pictures.

    Raises:
        ValueError: no such data, a cache of another VAE, size or crop area, or pixels wanted of a cache alone.
    """
    cache = None
    if config.latents:
        cache = LatentCache.open(config.latents, vae_sha256=vae.sha256, scale=vae.scale, shift=vae.shift, size=config.size)
        _refuse_evaluated(cache)
    try:
        source = open_source(config.data, area=config.crop_area, aliases=config.aliases, weights=config.weights, **_places(config))
    except (ValueError, OSError) as error:
        if cache is None:
            raise
        if config.pixel_share:
            raise ValueError(
                f"{error}; the cache {config.latents} holds no pictures, and pixel_share {config.pixel_share:g} needs some: "
                "name the data it was made from, or train on its latents alone with --pixel-share 0"
            ) from error
        return (
            CachedSource(cache),
            cache,
            f"no pictures at hand ({error}): training on the {len(cache):,} samples of {config.latents} alone, without a pixel loss",
        )
    if cache is None:
        return source, None, ""
    if tuple(config.crop_area) != cache.settings.crop_area:
        raise ValueError(f"crop_area is {config.crop_area}, but the crops in {config.latents} cover {cache.settings.crop_area}; set --crop-area alike")
    opened = f"of {config.pixel_share:g} of the rows pictures are opened too" if config.pixel_share else "no picture is opened"
    return source, cache, f"latents of {len(cache):,} samples, {cache.settings.crops} crops each, are read from {config.latents}; {opened}"


def _refuse_evaluated(cache: LatentCache) -> None:
    """Raises ValueError where the cache holds emoji that are evaluated on: it was written when OpenMoji was split otherwise."""
    emoji = openmoji.load_emoji()
    evaluated = [each.name for each in emoji.val + emoji.test if cache.find(f"openmoji/{each.key}")]
    if evaluated:
        raise ValueError(
            f"{cache.folder} holds {len(evaluated)} emoji that are evaluated on, such as {evaluated[0]}: OpenMoji was split otherwise when it was written; "
            "write the latents anew with openvision3 data latents into another folder"
        )


def _fingerprint(config: RunConfig, source: Source, held_out: Source, run: RunFolder) -> Fingerprint | None:
    """What the data, and those of the model that the run starts from, are recognised by, or None where that would be too much or too little: the run says so.

    It lies in the run folder, so that a run that goes on need not take it again.
    """
    path = run.path / fingerprint.FILE
    if path.is_file():
        return Fingerprint.load(path)
    before = fingerprint.recorded(hub.find_folder(config.init)) if config.init else None
    if config.init and before is None:
        run.say(f"no fingerprint of the training data is written, for {config.init}, which this starts from, has none; name the data to evaluate with --train")
        return None
    if isinstance(source, CachedSource) or len(source) > config.fingerprint:
        why = "their images are not at hand" if isinstance(source, CachedSource) else f"they are more than {config.fingerprint:,} samples (--fingerprint)"
        run.say(f"no fingerprint of the training data is written, for {why}; openvision3 data fingerprint DATA --out FILE writes one for evaluate --train FILE")
        return None
    own = fingerprint.take(source, config.data, [], track)
    again = list(own.nearest(torch.from_numpy(fingerprint.take(held_out, config.val, [], count=EVALUATED).images)))
    if again:
        run.say(f"{len(again)} of the first {min(len(held_out), EVALUATED)} val images are near-duplicates of training images, such as {own.keys[again[0][1]]}")
    found = Fingerprint.joined([each for each in (before, own) if each is not None])
    found.save(path)
    return found


def _check_same(checkpoint: Path, out: Path, vae: VAE, count: int, cache: LatentCache | None) -> None:
    """Raises ValueError where the VAE, the data or the cache are no longer those that the run was started with."""
    saved = hub.read_config(checkpoint)
    before = saved.training["training_samples"]
    if line := hub.other_vae(saved, vae):
        raise ValueError(f"{out} was started {line}; put the old one back")
    if cache is not None and saved.training.get("latents") != cache.sha256:
        raise ValueError(f"{cache.folder} is not the cache that {out} was started with; put the old one back, or start a new run with --init {out}")
    if before != count:
        raise ValueError(f"{out} was started on {before} samples, but its data hold {count} now; put the old data back, or start a new run with --init {out}")


def _tokenizer(config: RunConfig, source: Source, out: Path) -> TextTokenizer:
    if config.resume and (out / "tokenizer.json").is_file():
        return TextTokenizer.load(out / "tokenizer.json")
    if config.tokenizer:
        return TextTokenizer.load(config.tokenizer)
    if config.init:  # its word embeddings belong to its own words
        return TextTokenizer.load(hub.find_folder(config.init) / "tokenizer.json")
    captions = _some_captions(source)
    if not captions:
        raise ValueError(
            f"none of the {len(source)} pictures in {', '.join(config.data)} has a caption; put x.txt beside x.jpg, or a captions.csv into the folder"
        )
    return TextTokenizer.train(captions, config.vocabulary)


def _some_captions(source: Source) -> list[str]:
    """All captions; of more than LEARNT_FROM samples, those that an epoch begins with (of remote shards only the first are fetched).

    Samples that cannot be read join the problems of the source.
    """
    order = source.order(0, 0)
    found: list[str] = []
    for position in track(range(len(source))[:LEARNT_FROM], "reading captions"):
        index = order.place(position)[0]
        try:
            found += source.captions(index)
        except ImageError as error:
            source.problems.append({"key": source.key(index), "reason": error.reason, "detail": str(error)})
    return found


def _text_told(source: Source, tokenizer: TextTokenizer, shape: TextShape) -> str:
    """What the tokenizer and the model make nothing of in the captions of COUNTED samples, those that an epoch begins with; "" where nothing."""
    order = source.order(0, 0)
    counts = TextCount()
    for position in range(min(len(source), COUNTED)):
        with contextlib.suppress(ImageError):  # training meets it again, and reports it
            counts.add(tokenizer.count(source.captions(order.place(position)[0])[:1], shape.caption_positions - 2))
    hint = "; train a tokenizer on the captions with --tokenizer ''" if counts.unknown > counts.pieces / 20 else ""
    return f"{counts}{hint}" if str(counts) else ""


def _places(config: RunConfig) -> dict[str, Any]:
    """What `data` and `val` are opened with alike."""
    return {
        "caption_keys": config.caption_keys,
        "only": config.only_values,
        "index": config.index,
        "cache": config.cache,
        "cache_gb": config.cache_gb,
        "watch": track,
    }


def samples_dropped(data: Sequence[str]) -> dict[str, int]:
    return openmoji.load_emoji().dropped if "openmoji" in data else {}


def steps_for(
    minutes: float, model: OpenVision3, batches: TrainingBatches, config: RunConfig, device: str, precision: str, compiled: bool = False
) -> tuple[int, float]:
    """Time a few real steps on a copy of the model, made as the run will be -> (steps that fill the minutes, steps a second)."""
    trial = copy.deepcopy(model).train()
    distributed.wrap_blocks(trial, config.checkpointing, compiled)
    optimizers = Optimizers(trial, config.optimizer, dtype_of(precision))
    warm, timed = (3 if compiled else 1), 3
    start = time.perf_counter()
    with contextlib.closing(batches.from_step(0)) as source:  # type: ignore[type-var]
        for count in range(warm + timed):
            if count == warm:
                start = time.perf_counter()
            pieces = (to_device(next(source), device) for _ in range(batches.pieces))
            _, losses = backward(trial, pieces, batches.pieces, device, precision)
            optimizers.step()
            optimizers.zero_grad()
            losses["loss"].item()
        rate = timed / (time.perf_counter() - start)
    return max(1, round(minutes * 60 * rate)), rate


def _started_from(config: RunConfig, checkpoint: Path | None) -> dict[str, Any]:
    """How the weights that --init names were trained, kept in the record of the run that goes on from them."""
    if not config.init:
        return {}
    kept = hub.read_config(checkpoint).training.get("started_from") if checkpoint else None
    return kept or {"name": config.init, **hub.read_config(hub.find_folder(config.init)).training}


def _training_record(
    recipe: str, config: RunConfig, state: RunState, count: int, precision: str, started_from: dict[str, Any], cache: LatentCache | None = None
) -> dict[str, Any]:
    data = config.data or (cache.settings.data if cache is not None else ())
    return {
        "recipe": recipe,
        "steps": state.step,
        "samples_seen": state.samples,
        "data": list(data),
        "only": list(config.only),
        "training_samples": count,
        "seconds": round(state.seconds),
        "precision": precision,
        "seed": config.seed,
        "licence": "; ".join(f"{name}: {'CC BY-SA 4.0' if name == 'openmoji' else 'unknown'}" for name in data),
        **({"latents": cache.sha256} if cache is not None else {}),
        **({"started_from": started_from} if started_from else {}),
    }
