"""Write a latent cache from a source of images and a VAE: in this process, in one of several, or on a Ray cluster.

A part depends on the data and the settings alone, so all three write the same files.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from openvision3.data.latents.files import SETTINGS, mark_name
from openvision3.data.latents.settings import LatentJob, LatentSettings
from openvision3.data.latents.write import LatentWriter
from openvision3.data.names import DataOptions, open_source
from openvision3.device import choose_device, choose_precision, dtype_of
from openvision3.distributed import Ranks
from openvision3.hub import load_vae
from openvision3.model.vae import VAE
from openvision3.progress import console, counting, track
from openvision3.settings import read_rules


def open_writer(job: LatentJob, local_rank: int = 0) -> LatentWriter:
    """Open the data and the VAE of `job`. Precision auto is that of a cache that has been begun, else the faster one here.

    Raises:
        ValueError, FileNotFoundError, OSError: bad input, or a folder that cannot be written or is of another job.
    """
    device = choose_device(job.device)
    options = DataOptions(
        caption_keys=job.caption_keys,
        only=read_rules(job.only),
        aliases=job.aliases,
        view=job.view,
        index=job.index,
        cache=job.cache,
        cache_gb=job.cache_gb,
    )
    source = open_source(job.data, options, watch=track)
    begun = Path(job.out) / SETTINGS
    precision: str = job.precision
    if precision == "auto":
        precision = LatentSettings.read(begun).precision if begun.is_file() else choose_precision("auto", device)[0]
    place = torch.device(f"cuda:{local_rank % torch.cuda.device_count()}" if device == "cuda" else device)

    def open_with(precision: str) -> LatentWriter:
        vae = load_vae(job.vae, shift=job.shift, dtype=dtype_of(precision)).to(place)
        settings = settings_of(job, vae, precision, len(source))
        return LatentWriter(job.out, source, lambda images: vae.encode(images.to(place)), settings, batch=job.batch, workers=job.workers)

    try:
        return open_with(precision)
    except ValueError:  # perhaps another process was first, and had measured the other precision
        if job.precision != "auto" or not begun.is_file() or (first := LatentSettings.read(begun).precision) == precision:
            raise
        return open_with(first)


def settings_of(job: LatentJob, vae: VAE, precision: str, samples: int) -> LatentSettings:
    """What the latents of `job` depend on, for a source of so many samples."""
    network = {"vae": vae.name, "vae_sha256": vae.sha256, "scale": vae.scale, "shift": vae.shift, "channels": vae.latent_channels, "stride": vae.stride}
    shared = {name: getattr(job, name) for name in ("size", "crops", "crop_area", "mirror", "seed", "part_samples", "data")}
    return LatentSettings(**network, **shared, precision=precision, samples=samples)  # type: ignore[arg-type]


def write_latents(job: LatentJob) -> dict[str, Any] | None:
    """Write the missing and damaged parts of the cache; returns `cache.json`, None while other processes have parts to write.

    As one of WORLD_SIZE processes (torchrun, srun), this one writes every WORLD_SIZE-th part.

    Raises:
        ValueError, FileNotFoundError, OSError: bad input, a full disk; complete parts stay.
    """
    ranks = Ranks.from_environment()
    if job.engine == "ray" and ranks.world > 1:
        raise ValueError(f"engine ray starts processes itself; start it once, not as one of {ranks.world}")
    cpus, gpus = _start_ray() if job.engine == "ray" else (0, 0)
    if job.engine == "ray" and job.precision == "auto" and gpus and not (Path(job.out) / SETTINGS).is_file():
        job = dataclasses.replace(job, precision="bf16")  # a measurement here would say nothing about the GPUs there
    writer = open_writer(job, ranks.local_rank)
    settings = writer.settings
    own = range(ranks.rank, settings.parts, ranks.world)
    crop_bytes = 2 * math.prod(settings.shape)
    if ranks.rank == 0:
        size = settings.samples * settings.crops * crop_bytes / 1e9
        say(f"{settings.samples:,} samples, {settings.crops} crops of {settings.size} px, {crop_bytes:,} bytes each: {size:.2f} GB in {settings.parts} parts")
        say(f"VAE {settings.vae}, {settings.precision}, into {job.out}")
        for problem in writer.source.problems:  # of whole shards and of what is no image; those of samples are in the files of the parts
            say(f"{problem['key']}: {problem['reason']}: {problem['detail']}")
    todo = [part for part in own if not writer.is_complete(part)]
    if ranks.rank == 0 and len(todo) < len(own):
        say(f"{len(own) - len(todo)} of {len(own)} parts are complete")
    written = _write_on_ray(job, settings, todo, job.actors or gpus or cpus, gpus > 0) if job.engine == "ray" else writer.write(todo)
    try:
        with counting("latents", "images", sum(len(settings.range(part)) for part in todo) * settings.crops, silent=ranks.rank > 0) as count:
            for samples in written:
                count(samples * settings.crops)
        return writer.finish()
    except OSError as error:
        complete = sum((writer.folder / mark_name(part)).is_file() for part in range(settings.parts))
        message = f"{error.strerror or error}; {complete} of {settings.parts} parts are complete and stay, the same command writes the others"
        raise OSError(error.errno, message, error.filename or job.out) from error


def say(line: str) -> None:
    console().print(line, markup=False, soft_wrap=True)


# -- Ray -----------------------------------------------------------------------------------------------------------


def _start_ray() -> tuple[int, int]:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine; returns its CPUs and GPUs. Sends no usage statistics."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(f"engine ray needs an extra that is not installed ({error}); pip install 'openvision3[ray]', or use --engine local") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not ray.is_initialized():
        # "local": not a cluster that happens to run on this machine
        place: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"address": "local", "include_dashboard": False}
        ray.init(**place, log_to_driver=False, logging_level=logging.ERROR)
    resources = ray.cluster_resources()
    return int(resources.get("CPU", 1)), int(resources.get("GPU", 0))


def _write_on_ray(job: LatentJob, settings: LatentSettings, parts: list[int], actors: int, gpu: bool) -> Iterator[int]:
    import ray.data

    if not parts:
        return
    for name in ("ray.data", "ray.data._internal.util"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    absolute = tuple(name if name == "openmoji" or "://" in name else os.path.abspath(os.path.expanduser(name)) for name in job.data)
    job = dataclasses.replace(job, data=absolute, out=os.path.abspath(job.out), precision=settings.precision)  # type: ignore[arg-type]
    if Path(job.vae).expanduser().is_dir():
        job.vae = os.path.abspath(os.path.expanduser(job.vae))
    for name in ("index", "cache"):
        if (path := getattr(job, name)) and "://" not in path:
            setattr(job, name, os.path.abspath(os.path.expanduser(path)))

    class PartWriter:
        """One process of the cluster: opens the data and the VAE once, then writes parts."""

        def __init__(self):
            self.writer: LatentWriter | None = None

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            """Errors come back as values: Ray would wrap an exception in a page of its own."""
            try:
                self.writer = self.writer or open_writer(job)  # here, where a machine that lacks the data can say so
                return {"samples": sum(self.writer.write([int(row["item"])])), "error": "", "errno": 0, "place": ""}
            except ValueError as error:
                return {"samples": 0, "error": str(error), "errno": -1, "place": ""}
            except OSError as error:
                return {"samples": 0, "error": error.strerror or str(error), "errno": error.errno or 0, "place": str(error.filename or "")}

    pool = ray.data.ActorPoolStrategy(size=max(1, min(actors, len(parts))))
    written = ray.data.from_items(parts, override_num_blocks=len(parts)).map(PartWriter, compute=pool, num_cpus=1, num_gpus=1 if gpu else 0)  # type: ignore[arg-type]
    for row in written.iter_rows():
        if row["errno"] < 0:
            raise ValueError(row["error"])
        if row["error"]:
            raise OSError(row["errno"], row["error"], row["place"])
        yield row["samples"]
