"""A few training steps on this machine, looked at closely: `openvision3 doctor --train` takes them before a long run does.

They are the steps of a run (`run.set_up`, `loop.take_step`), with its batches, optimiser, precision, compiled blocks and sharding. Nothing is written.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvision3 import distributed, hub
from openvision3.data.batches import BatchPlan, TextShape, TrainingBatches
from openvision3.data.images import ImageError
from openvision3.data.names import open_source
from openvision3.data.text import TextTokenizer
from openvision3.device import choose_device, dtype_of
from openvision3.train.config import PretrainConfig
from openvision3.train.loop import Training, first_steps, peak_memory
from openvision3.train.pretrain import initial_model
from openvision3.train.run import Setup, Start, set_up, settle_precision

STEPS, WARM = 6, 3
"""steps of the trial, and how many of them warm up: the first ones compile and fill caches"""
LEARNT_FROM = 512
"""samples from whose captions the vocabulary is learnt"""
NUMBERS = 2**20
"""numbers that each rank sends when a collective is timed (4 MB)"""


class Trial(Training):
    """OpenVision 3 on the data of `config`, or on OpenMoji, which is shipped, if it names none."""

    def __init__(self, config: PretrainConfig, start: Start):
        source = open_source(config.data or ("openmoji",))
        captions: list[str] = []
        for index in range(min(len(source), LEARNT_FROM)):
            with contextlib.suppress(ImageError):  # it is counted when a batch needs it
                captions += source.captions(index)
        tokenizer = TextTokenizer.train(captions, config.vocabulary)
        shape = TextShape(config.model.text_encoder.positions, config.model.captioner.positions, config.captions, config.sentences)
        plan = BatchPlan(shape, config.size, config.batch, config.seed, pixel_share=config.pixel_share, micro_batch=config.micro_batch)
        self.batches = TrainingBatches(source, tokenizer, plan, ranks=start.ranks, workers=config.workers, pinned=start.device == "cuda")
        vae = hub.load_vae(config.model.vae.name, shift=config.model.vae.shift, dtype=dtype_of(start.precision))
        self.model = initial_model(config, vae, tokenizer)


def try_training(config: PretrainConfig) -> dict[str, Any]:
    """Take STEPS steps of `config` -> what they were like; `problems`, the same on all ranks, lists what is wrong.

    Raises:
        ValueError, FileNotFoundError: bad input, before the first step.
    """
    device = choose_device(config.device)
    with distributed.started(device) as ranks:
        start = Start(Path(), ranks, torch.device(device).type)
        config = replace(config, minutes=0.0)
        settle_precision(config, start)
        collectives = check_collectives(start.device)
        setup = set_up(config, Trial, start)
        report = {
            "device": torch.cuda.get_device_name() if start.device == "cuda" else start.device,
            "processes": ranks.world,
            "precision": f"{start.precision} ({start.why})",
            "compile": "on" if setup.compiled else setup.not_compiled or "off",
            "parallel": setup.parallel,
            **_steps(config, setup, start.device),
            "collectives": collectives,
        }
        of_ranks = distributed.gather_objects(_problems(report, start.device))
        report["problems"] = list(dict.fromkeys(problem for problems in of_ranks for problem in problems))
        return report


def _steps(config: PretrainConfig, setup: Setup[Trial], device: str) -> dict[str, Any]:
    """The losses and gradient norms of all steps; after the warm-up also waits of the host, speed and memory."""
    model = setup.training.model.train()
    losses, norms = [], []
    waits: Counter[str] = Counter()
    start = time.perf_counter()
    with contextlib.closing(first_steps(setup.training, model, setup.optimizers, config)) as steps:  # type: ignore[type-var]
        for step in range(STEPS):
            if step == WARM:
                start = time.perf_counter()
            with waits_of_the_host(device if step >= WARM else "cpu") as seen:
                values = next(steps)
            waits += seen
            losses.append(values["loss"])
            norms.append(values["grad_norm"])
        rate = (STEPS - WARM) / (time.perf_counter() - start)
    return {
        "losses": losses,
        "gradient_norms": norms,
        "samples_per_second": config.batch * rate,
        "peak_memory_gb": peak_memory(device) / 1e9,
        "waits_per_step": waits.total() / (STEPS - WARM) if device == "cuda" else None,
        "waits": dict(waits),
    }


@contextlib.contextmanager
def waits_of_the_host(device: str) -> Iterator[Counter[str]]:
    """Where the host waits for a GPU, counted by line, as torch warns of it: once a step is right, for the numbers. Nothing on a CPU."""
    waits: Counter[str] = Counter()
    if device != "cuda":
        yield waits
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            waits[f"{warning.filename.rpartition('/openvision3/')[2]}:{warning.lineno}"] += 1
        elif "prototype" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def check_collectives(device: str) -> dict[str, Any]:
    """Run each collective of a training on numbers whose result is known -> {name: {right, gigabytes_per_second}}; {} for one process."""
    import torch.distributed as dist

    world, rank = distributed.world(), distributed.rank()
    if world == 1:
        return {}
    own = torch.full((NUMBERS,), float(rank + 1), device=device)
    all_rows = torch.empty(world * NUMBERS, device=device)
    part = torch.empty(NUMBERS, device=device)
    whole = torch.arange(1.0, world + 1, device=device).repeat_interleave(NUMBERS)
    total = world * (world + 1) / 2
    kinds: dict[str, tuple[Any, Tensor, Tensor]] = {
        "all_reduce": (lambda: dist.all_reduce(part.copy_(own)), part, torch.full_like(part, total)),
        "all_gather": (lambda: dist.all_gather_into_tensor(all_rows, own), all_rows, whole),
        "reduce_scatter": (lambda: dist.reduce_scatter_tensor(part, whole), part, torch.full_like(part, world * (rank + 1.0))),
    }
    results = {}
    for name, (send, result, expected) in kinds.items():
        send()
        right = torch.equal(result, expected)
        seconds = min(_timed(send, device) for _ in range(3))
        sent = NUMBERS * 4 * (world - 1) * (2 / world if name == "all_reduce" else 1)
        results[name] = {"right": right, "gigabytes_per_second": sent / seconds / 1e9}
    return results


def _timed(function: Any, device: str) -> float:
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _problems(report: dict[str, Any], device: str) -> list[str]:
    problems = []
    for name, values in (("loss", report["losses"]), ("norm of the gradient", report["gradient_norms"])):
        bad = [step for step, value in enumerate(values, 1) if not math.isfinite(value)]
        if bad:
            problems.append(f"the {name} is not finite in step {bad[0]}; try --precision fp32")
    for name, collective in report["collectives"].items():
        if not collective["right"]:
            problems.append(f"{name} gives wrong numbers in process {distributed.rank()}: check the network and NCCL before training")
    if device == "cuda" and report["waits_per_step"] > 1:
        lines = ", ".join(f"{line} ({count})" for line, count in Counter(report["waits"]).most_common(3))
        problems.append(f"the host waits for the GPU {report['waits_per_step']:.1f} times a step, and should once, for the log: {lines}")
    return problems
