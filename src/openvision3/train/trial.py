"""A few training steps on this machine, looked at closely: `openvision3 doctor --train` runs it before a long run does.

The steps are those of the run (`train.backward`, the same batches, optimizer, precision, compiled blocks and sharding); nothing is written.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from openvision3 import distributed
from openvision3.data.batches import TextShape, TrainingBatches, to_device
from openvision3.data.sources import open_source
from openvision3.data.text import TextTokenizer
from openvision3.device import choose_compile, choose_device, choose_precision, dtype_of
from openvision3.hub import load_distance, load_vae
from openvision3.model.openvision3 import OpenVision3
from openvision3.train.config import RunConfig
from openvision3.train.loop import backward, peak_memory
from openvision3.train.optimizer import Optimizers, rate_at

STEPS, WARM = 6, 3
"""Steps that are taken, and how many of them warm up: the first compile and fill caches."""
LEARNT_FROM = 512
NUMBERS = 2**20
"""Numbers each rank sends when a collective is timed (4 MB)."""


def try_training(config: RunConfig) -> dict[str, Any]:
    """Take STEPS steps of `config` -> what was seen, the same on all ranks; `problems` lists what is wrong.

    Raises:
        ValueError, FileNotFoundError: bad input, before the first step.
    """
    device = choose_device(config.device)
    with distributed.started(device) as ranks:
        device = torch.device(device).type
        with distributed.together():
            measured = choose_precision(config.precision, device) if ranks.rank == 0 else None
        precision, why = distributed.from_first(measured)  # type: ignore[misc]
        collectives = check_collectives(device)
        with distributed.together():
            batches, words = _batches(config, ranks, device)
            vae = load_vae(config.model.vae.name, shift=config.model.vae.shift, dtype=dtype_of(precision))
            distance = load_distance(config.model.loss)
            torch.manual_seed(config.seed)
            model = OpenVision3(config.model, vae, len(words), words.pad_id, distance).init_weights().to(device)
            compiled, not_compiled = choose_compile(config.compile, device)
        parallel = distributed.choose_parallel(config.parallel, sum(p.numel() for p in model.parameters() if p.requires_grad), ranks)
        distributed.wrap_blocks(model, config.checkpointing, compiled)
        distributed.spread(model, parallel, ranks, device, precision)
        steps = _steps(config, model.train(), batches, device, precision)
        found = {
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "processes": ranks.world,
            "precision": f"{precision} ({why})",
            "compile": "on" if compiled else not_compiled or "off",
            "parallel": parallel,
            **steps,
            "collectives": collectives,
        }
        found["problems"] = [problem for problems in distributed.gather_objects(_problems(found, device)) for problem in problems]
        return found


def _batches(config: RunConfig, ranks: distributed.Ranks, device: str) -> tuple[TrainingBatches, TextTokenizer]:
    """Of OpenMoji, which ships, where the config names no data."""
    source = open_source(config.data or ("openmoji",))
    words = TextTokenizer.train([text for index in range(min(len(source), LEARNT_FROM)) for text in source.captions(index)], config.vocabulary)
    shape = TextShape(config.model.text_encoder.positions, config.model.captioner.positions, config.captions, config.sentences)
    options = {"pixel_share": config.pixel_share, "workers": config.workers, "micro_batch": config.micro_batch, "pinned": device == "cuda"}
    return TrainingBatches(
        source,
        words,
        shape,
        size=config.size,
        batch=config.batch,
        seed=config.seed,
        rank=ranks.rank,
        world=ranks.world,
        **options,  # type: ignore[arg-type]
    ), words


def _steps(config: RunConfig, model: OpenVision3, batches: TrainingBatches, device: str, precision: str) -> dict[str, Any]:
    """Losses and gradient norms, one a step; waits of the host in the steps after the warm-up; speed and memory."""
    optimizers = Optimizers(model, config.optimizer, dtype_of(precision))
    trainable = [p for p in model.parameters() if p.requires_grad]
    losses, norms = [], []
    waits: Counter[str] = Counter()
    start = time.perf_counter()
    with contextlib.closing(batches.from_step(0)) as source:  # type: ignore[type-var]
        for step in range(STEPS):
            if step == WARM:
                start = time.perf_counter()
            optimizers.set_rate(rate_at(step, config.optimizer, max(config.steps, STEPS)))
            with waits_of_the_host(device if step >= WARM else "cpu") as seen:
                pieces = (to_device(next(source), device) for _ in range(batches.pieces))
                _, parts = backward(model, pieces, batches.pieces, device, precision)
                norm = distributed.full(torch.nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None]))
                optimizers.step()
                optimizers.zero_grad()
            waits += seen
            loss, length = (distributed.total(torch.stack([parts["loss"].float(), norm.float()])) / distributed.world()).tolist()  # the step's own wait
            losses.append(loss)
            norms.append(length)
        rate = (STEPS - WARM) / (time.perf_counter() - start)
    return {
        "losses": losses,
        "gradient_norms": norms,
        "samples_per_second": batches.batch * rate,
        "peak_memory_gb": peak_memory(device) / 1e9,
        "waits_per_step": (1 + waits.total() / (STEPS - WARM)) if device == "cuda" else None,
        "waits": dict(waits),
    }


@contextlib.contextmanager
def waits_of_the_host(device: str) -> Iterator[Counter[str]]:
    """Where the host waits for a GPU, as torch warns of it, counted by line. Nothing on a CPU, which has nothing to wait for."""
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
    """Each collective of a run on numbers whose result is known -> {name: {right, gigabytes a second}}; {} for one process."""
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
    found = {}
    for name, (send, result, expected) in kinds.items():
        send()
        right = torch.equal(result, expected)
        seconds = min(_timed(send, device) for _ in range(3))
        sent = NUMBERS * 4 * (world - 1) * (2 / world if name == "all_reduce" else 1)
        found[name] = {"right": right, "gigabytes_per_second": sent / seconds / 1e9}
    return found


def _timed(function: Any, device: str) -> float:
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _problems(found: dict[str, Any], device: str) -> list[str]:
    problems = []
    for name, values in (("loss", found["losses"]), ("norm of the gradient", found["gradient_norms"])):
        bad = [step for step, value in enumerate(values, 1) if not math.isfinite(value)]
        if bad:
            problems.append(f"the {name} is not finite in step {bad[0]}; try --precision fp32")
    for name, collective in found["collectives"].items():
        if not collective["right"]:
            problems.append(f"{name} gives wrong numbers in process {distributed.rank()}: check the network and NCCL before training")
    if device == "cuda" and found["waits"]:
        lines = ", ".join(f"{line} ({count})" for line, count in Counter(found["waits"]).most_common(3))
        problems.append(f"the host waits for the GPU {found['waits_per_step']:.1f} times a step, and should once, for the log: {lines}")
    return problems
