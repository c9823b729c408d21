"""What a latent cache costs and spares, with the mini recipe: `python benchmarks/latents_speed.py DATA ...`.

Writing: images/s and bytes. Reading: samples/s of cached entries against decoding, cropping and encoding. Training: steps with and
without the cache, in turn, so that a busy machine disturbs both alike. Wall-clock and processor time; ratios are of medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from tyro.conf import Positional

from openvision3.data.batches import BatchPlan, TextShape, TrainingBatches, to_device
from openvision3.data.images import to_tensor
from openvision3.data.latents.files import draw_crop
from openvision3.data.latents.read import LatentCache
from openvision3.data.latents.settings import LatentJob
from openvision3.data.latents.write import LatentWriter
from openvision3.data.names import open_source
from openvision3.data.sources import Source
from openvision3.data.text import TextTokenizer
from openvision3.hub import load_vae
from openvision3.model.openvision3 import OpenVision3
from openvision3.model.vae import VAE
from openvision3.train.config import PretrainConfig
from openvision3.train.encode_latents import settings_of
from openvision3.train.loop import backward
from openvision3.train.recipes import mini

CROPS, PART, BATCH, ROUNDS = 2, 64, 32, 3


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """(wall-clock, processor) seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - processor


def main(data: Positional[tuple[str, ...]], samples: int = 256) -> None:
    config, source, vae = mini(), open_source(data), load_vae("embedded")
    source.samples = source.samples[:samples]  # type: ignore[attr-defined]  # the first of the shards are enough
    with tempfile.TemporaryDirectory() as folder:
        job = LatentJob(data, folder, size=config.size, crops=CROPS, crop_area=config.crop_area, part_samples=PART)
        settings = settings_of(job, vae, "fp32", len(source))
        writer = LatentWriter(folder, source, vae.encode, settings)
        wall, processor = timed(lambda: list(writer.write(range(settings.parts))))
        writer.finish()
        cache = LatentCache.open(folder)
        images, size = len(cache) * CROPS, sum(path.stat().st_size for path in Path(folder).iterdir())
        print(f"threads {torch.get_num_threads()}, {len(cache)} samples, {CROPS} crops of {config.size} px, fp32")
        print(f"write: {images / wall:.1f} images/s ({images / processor:.1f} a processor second), {size / images:,.0f} bytes a crop, all files counted")

        keys = [key for key in map(source.key, range(len(source))) if cache.find(key)]
        wall, processor = timed(lambda: [cache.read(key, crop) for key in keys for crop in range(CROPS)])
        print(f"read: {images / wall:,.0f} samples/s ({images / processor:,.0f} a processor second), each checked against its checksum")

        def online() -> None:
            for start in range(0, 64, 32):
                vae.encode(torch.stack([to_tensor(draw_crop(source, i, config.size, 0, 0)[0]) for i in range(start, start + 32)]))

        decode = timed(lambda: [draw_crop(source, i, config.size, 0, 0) for i in range(64)])
        both = timed(online)
        print(f"without: decoded and cropped {64 / decode[0]:,.0f} samples/s ({64 / decode[1]:,.0f}), encoded too {64 / both[0]:.1f} ({64 / both[1]:.1f})")
        for share in (1 / 4, 1 / 8):
            compare_steps(config, source, vae, cache, share)


def compare_steps(config: PretrainConfig, source: Source, vae: VAE, cache: LatentCache, share: float) -> None:
    words = TextTokenizer.train([text for i in range(len(source)) for text in source.captions(i)], config.vocabulary)
    torch.manual_seed(0)
    model = OpenVision3(config.model, vae, len(words), words.pad_id).init_weights()
    shape = TextShape(config.model.text_encoder.positions, config.model.captioner.positions, config.captions, config.sentences)
    kinds = {
        name: TrainingBatches(source, words, BatchPlan(shape, config.size, BATCH, seed=0, pixel_share=share), latents=used)
        for name, used in (("online", None), ("cached", cache))
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for number in range(1 + ROUNDS):
        for name, batches in kinds.items():

            def step(batches: TrainingBatches = batches, number: int = number) -> None:
                made = batches[number]
                if isinstance(made, Exception):
                    raise made
                backward(model, [to_device(batches.add_draws(made[0], *batches._place(number)), "cpu")], 1, "cpu", "fp32")
                model.zero_grad()

            times[name].append(timed(step))
    wall, processor = ({name: statistics.median(row[kind] for row in rows[1:]) for name, rows in times.items()} for kind in (0, 1))
    rates = ", ".join(f"{name} {BATCH / wall[name]:.2f} samples/s ({BATCH / processor[name]:.2f} a processor second)" for name in kinds)
    print(f"step at pixel_share {share:g}: {rates}; ratio {wall['online'] / wall['cached']:.2f}x (processor {processor['online'] / processor['cached']:.2f}x)")


if __name__ == "__main__":
    tyro.cli(main, description=Path(__file__).read_text().split('"""')[1])
