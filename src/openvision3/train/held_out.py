"""The evaluation of a run's held-out images during training by losses, PSNR and retrieval."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from openvision3 import distributed
from openvision3.data.batches import Sample, TrainingBatches, to_device
from openvision3.data.images import to_pil
from openvision3.data.problems import Problems
from openvision3.data.sources import Source
from openvision3.draws import draw_seed
from openvision3.evaluate import protocol
from openvision3.evaluate.metrics.reconstruction import psnr
from openvision3.evaluate.metrics.zeroshot import evaluate_retrieval
from openvision3.model import losses
from openvision3.model.reconstruction import noisy
from openvision3.pipeline import Pipeline
from openvision3.report.sheets import grid
from openvision3.train.open_data import shared_rows

MEASURE = 2
"""how val/loss is computed: all images as one batch. 1 was the mean over batches of 32"""


@torch.no_grad()
def quick_evaluation(pipeline: Pipeline, source: Source, batches: TrainingBatches, sheet: Path | None, noise: float | None = None) -> dict[str, float]:
    """Losses, PSNR (of the model and of its VAE) and retrieval, the same on all ranks; a sheet original | VAE | rebuilt is written to `sheet`, if given.

    With `noise` the losses are of noisy tokens, as in training, and there is one more PSNR and column, of tokens with noise of that standard deviation.
    The noise of an image is the same in every evaluation.

    The losses are those of all images as one batch: each term over its own count, the contrast over all `contrastive_candidates` images with a caption
    (guessing gives the logarithm of that number); of reconstruction alone where the batches hold no text. An image that any rank cannot use is left out on
    all, counted, and added to the problems of the run.
    """
    values, vae_values = [], []
    captions: list[str] = []
    problems = Problems()
    rows: list[tuple] = []
    noisy_values: list[Tensor] = []
    held_out = Losses(pipeline)
    pipeline.model.eval()
    for _, keys, images, texts in shared_rows(source, batches.size, problems):
        with distributed.alone():
            tokens, size = pipeline.encode(images), (images.shape[2], images.shape[3])
            images_hat = pipeline.decode(tokens, size).cpu()
            vae_hat = pipeline.reconstruct_by_vae(images)
            values.append(psnr(images, images_hat))
            vae_values.append(psnr(images, vae_hat))
            columns = [images, vae_hat, images_hat]
            draw_key = torch.tensor([draw_seed("sigma", key) for key in keys])
            if noise is not None:
                columns.append(pipeline.decode(noisy(tokens, noise, draw_key.to(tokens.device)), size).cpu())
                noisy_values.append(psnr(images, columns[-1]))
            if batches.tokenizer is None:
                texts = [("",)] * len(keys)  # they are not read
            counted = [i for i, t in enumerate(texts) if t]
            if counted:
                batch, _ = batches.collate([Sample(keys[i], images[i], texts[i][0], texts[i][: batches.shape.captions], []) for i in counted])
                if noise is not None:
                    batch["draw_key"] = draw_key[counted]
                held_out.add(to_device(batch, pipeline.device))
                captions += [texts[i][0] for i in counted]
        if not rows:
            rows = list(zip(*(to_pil(column[:8]) for column in columns), strict=True))
    batches.problems.extend(problems, everywhere=True)
    if not values:  # the images were there when the run began; it continues without them
        return {"skipped": len(problems)}
    if sheet is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        grid(rows, ("original", "VAE", "rebuilt", f"with noise {noise}")[: len(rows[0])]).save(sheet)
    results = {"psnr": torch.cat(values).mean().item(), "vae_psnr": torch.cat(vae_values).mean().item()}
    if noisy_values:
        results["noisy_psnr"] = torch.cat(noisy_values).mean().item()
    if problems:
        results["skipped"] = len(problems)
    if captions:
        with distributed.alone():
            results |= held_out.values()
    if held_out.texts:
        image_embedding, text_embedding = torch.cat(held_out.images), torch.cat(held_out.texts)[:, 0]
        if image_embedding.isfinite().all() and text_embedding.isfinite().all():  # with NaN there is no ranking, and the losses show it
            retrieval = evaluate_retrieval(image_embedding, text_embedding, captions, range(len(captions)), ks=(1, 5))
            results |= {name: value for name, value in protocol.values(retrieval).items() if "_r@" in name}
    return results


class Losses:
    """The loss of several batches of any size, as if their rows were one batch."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline, self.model = pipeline, pipeline.model
        self.sums: dict[str, float] = {}
        self.counts = torch.zeros(3, dtype=torch.long)
        self.images: list[Tensor] = []
        self.texts: list[Tensor] = []
        self.present: list[Tensor] = []

    def add(self, batch: dict[str, Tensor]) -> None:
        counts = self.model.counts(batch)
        _, parts = self.model(batch | {"counts": torch.ones_like(counts)})  # a mean over a count of one is the sum
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double().item()
        self.counts += counts.cpu()
        if "text_ids" not in batch:
            return
        text_embedding, present = self.model.embed_captions(batch)
        self.images.append(self.pipeline.embed_images(batch["images"]).cpu())
        self.texts.append(text_embedding.cpu())
        self.present.append(present.cpu())

    def values(self) -> dict[str, float]:
        """The loss, its parts, and how many captions of the first set each image was contrasted with."""
        counts = dict(zip(("latent", "pixel", "caption"), self.counts.tolist(), strict=True))
        counts["perceptual"] = counts["pixel"]
        parts = {name: torch.tensor(value / max(1, counts[name])) for name, value in self.sums.items() if name != "contrastive"}
        candidates = {}
        if self.texts:
            present, log_temperature = torch.cat(self.present), distributed.full(self.model.log_temperature).cpu()
            parts["contrastive"] = losses.contrastive_loss(torch.cat(self.images), torch.cat(self.texts), log_temperature, present)
            candidates = {"contrastive_candidates": int(present[:, 0].sum())}
        named = {"loss": self.model.weigh(parts), **parts}
        return {name: value.item() for name, value in named.items()} | candidates
