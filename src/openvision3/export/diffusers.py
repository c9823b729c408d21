"""A model as a folder for diffusers: `AutoModel.from_pretrained(folder, trust_remote_code=True)` opens it where openvision3 is not installed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from openvision3.adapters.diffusers import autoencoder
from openvision3.export.folder import card, new_folder, write_legal
from openvision3.export.modules import write_modules
from openvision3.generate.space import Moments
from openvision3.pipeline import Pipeline
from openvision3.settings import read_json, write_json

USAGE = """
from diffusers import AutoModel

vae = AutoModel.from_pretrained("THIS FOLDER", trust_remote_code=True)
latents = vae.encode(images).latent  # images (B, 3, H, W) in [-1, 1] -> (B, D, H/16, W/16)
images = vae.decode(latents).sample
"""


def export(pipeline: Pipeline, out: str | Path, images: Iterable[Tensor] | None = None) -> list[str]:
    """Write encoder, latent decoder and VAE with their code -> the names of the files.

    `images` are batches (B, 3, H, W) in [-1, 1], by which `encode` normalises each channel; without them latents are the tokens as they are.

    Raises:
        ValueError: there is something of that name; fewer than two images.
    """
    mean, std = (None, None) if images is None else statistics(pipeline, images)
    network = autoencoder(pipeline, mean, std)
    with new_folder(out) as folder:
        network.save_pretrained(folder)
        auto_map = {"AutoModel": "autoencoder_openvision3.AutoencoderOpenVision3"}
        write_json(read_json(folder / "config.json") | {"auto_map": auto_map}, folder / "config.json")
        write_modules({"adapters.diffusers_model": "autoencoder_openvision3"}, folder)
        write_legal(pipeline, folder)
        text = card(pipeline, "diffusers", "OpenVision 3 tokenizer for diffusers", USAGE)
        (folder / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")
        return sorted(path.name for path in folder.iterdir())


@torch.no_grad()
def statistics(pipeline: Pipeline, images: Iterable[Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all tokens of these images (batches). Raises ValueError for fewer than two images, or NaN."""
    moments, count = Moments(1, pipeline.encoder.size.width), 0
    for batch in images:
        moments.add(pipeline.model.encode(batch.to(pipeline.device)).flatten(0, 1)[:, None])
        count += len(batch)
    if count < 2 or not moments.scatter.isfinite().all():
        raise ValueError(f"the statistics of {count} images cannot be used: give two or more, with finite tokens")
    return moments.mean[0].tolist(), (moments.scatter[0] / moments.count).sqrt().tolist()
