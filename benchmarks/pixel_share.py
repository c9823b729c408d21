"""What it costs to compare the pixels of a share of the batch only: `python benchmarks/pixel_share.py [--help]`.

Trains the mini model with its embedded VAE at shares 1 to 1/16, twice: with equal samples, and with equal compute (the operations of the
run at 1/4, counted by torch in a real step; a cheaper step buys more samples). Every run is a run folder and goes on where it was; a
table, `results.json` and `pixel_share.png` are made from those that are finished.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import torch
import tyro
from step_speed import VOCABULARY, a_batch, a_model, flops

from openvision3.config import RunConfig
from openvision3.model.vae import VAE
from openvision3.pretrain import pretrain
from openvision3.recipes import RECIPES
from openvision3.train import backward

SHARES = (1, 2, 4, 8, 16)
"""one over the share"""

REFERENCE = 4


@dataclass
class Options:
    recipe: str = "mini_low_res"
    steps: int = 150
    """of every run with equal samples, and of the one at 1/4 whose compute the others get"""
    batch: int = 0
    """another than the recipe's"""
    seeds: tuple[int, ...] = (0,)
    out: str = "runs/pixel_share"
    data: tuple[str, ...] = ("openmoji",)
    precision: Literal["auto", "bf16", "fp32"] = "auto"


def operations(config: RunConfig, share: int) -> float:
    """Of one sample."""
    vocabulary = VOCABULARY["mini"]
    model = a_model(config, VAE.load("embedded"), vocabulary, "cpu")
    batch = a_batch(config, vocabulary, config.batch, config.size)
    batch["pixel_rows"] = torch.arange(0, config.batch, share)
    return flops(lambda: backward(model, iter([batch]), 1, "cpu", "fp32")) / config.batch


def trained(config: RunConfig, out: Path) -> dict[str, float]:
    """The last evaluation of this run, which is begun, gone on with, or read. Its warm-up is a tenth of it, however short it is."""
    config = copy.deepcopy(config)
    config.out, config.resume = str(out), (out / "config.json").exists()
    config.optimizer.warmup_steps = config.steps // 10
    if not (out / "done.json").exists():
        if pretrain(config, "pixel_share").status == "stopped":
            raise SystemExit(75)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        last = {name: value for row in rows for name, value in row.items()}
        (out / "done.json").write_text(json.dumps(last) + "\n")
    return json.loads((out / "done.json").read_text())


def main(options: Options) -> None:
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    base = RECIPES[options.recipe]()
    base.data, base.precision, base.eval_every, base.save_every, base.steps = options.data, options.precision, 0, 50, options.steps
    base.batch = options.batch or base.batch
    cost = {share: operations(base, share) for share in SHARES}
    results = []
    for seed in options.seeds:
        for share in SHARES:
            for equal in ("samples", "compute"):
                config = copy.deepcopy(base)
                config.seed, config.pixel_share = seed, 1 / share
                if equal == "compute":
                    config.steps = round(options.steps * cost[REFERENCE] / cost[share])
                name = f"share-{share}-steps-{config.steps}-seed-{seed}"
                found = trained(config, out / name)
                results.append({"equal": equal, "share": share, "seed": seed, "steps": config.steps, "gflop": cost[share] / 1e9, **found})
                (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
                print(
                    f"equal {equal:8s} share 1/{share:<3d} {config.steps:5d} steps  {cost[share] / 1e9:6.2f} GFLOP a sample  PSNR {found['val/psnr']:6.2f} dB  "
                    f"loss {found['val/loss']:.3f}  R@1 {100 * found['val/image_to_text_r@1']:.1f} %",
                    flush=True,
                )
    draw(results, out / "pixel_share.png")


def draw(results: list[dict], path: Path) -> None:
    metrics = {"val/psnr": ("PSNR, dB", 1), "val/image_to_text_r@1": ("R@1 of 256, %", 100), "val/loss": ("loss on held-out pictures", 1)}
    figure, axes = plt.subplots(1, len(metrics), figsize=(13, 4), layout="constrained")
    for axis, (name, (label, factor)) in zip(axes, metrics.items(), strict=True):
        for equal, style in (("samples", "o-"), ("compute", "s--")):
            shares = sorted({row["share"] for row in results if row["equal"] == equal})
            values = [[factor * row[name] for row in results if row["equal"] == equal and row["share"] == share] for share in shares]
            axis.plot(shares, [sum(v) / len(v) for v in values], style, label=f"equal {equal}")
            axis.fill_between(shares, [min(v) for v in values], [max(v) for v in values], alpha=0.15)
        axis.set_xscale("log", base=2)
        axis.set_xticks(SHARES, [f"1/{share}" if share > 1 else "1" for share in SHARES])
        axis.set_xlabel("share of the batch with a pixel loss")
        axis.set_title(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Options, description=Path(__file__).read_text().split('"""')[1]))
