"""Write the cards of the shipped VAE and mini from what `make results` measured; `--ship RUN` first puts a run into the package.

    python tools/measure_assets.py --ship runs/mini
    make results DATA=FOLDER
    python tools/measure_assets.py --results results

`--demo FOLDER`, an evaluation of a demo's model on OpenMoji, adds its captions beside those of the shipped mini.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path

import torch

from openvision3 import hub
from openvision3.config import flat
from openvision3.evaluate.protocol import Number
from openvision3.evaluate.results import Results
from openvision3.model.vae import EMBEDDED
from openvision3.pipeline import load

MINI = hub.ASSETS / "mini"
EXAMPLES = 32
SETS = ("openmoji", "pictures", "photos")

TERMS = """Trained from random weights on OpenMoji drawings (CC BY-SA 4.0) and Open Clip Art (public domain){more}; photographs and
stamps served only to measure. Whether weights derive from training pictures is not settled; to be safe these are offered under
CC BY-SA 4.0, attribution "OpenMoji - the open-source emoji and icon project". Code: Apache-2.0."""


class Measured:
    """One evaluation's numbers of the model and of its VAE, and the captions it wrote."""

    def __init__(self, folder: Path):
        results = Results.load(folder)
        self.command = results.command
        self.own: dict[str, Number] = {}
        self.vae: dict[str, Number] = {}
        for row in results.rows:
            (self.vae if row.model.startswith("VAE ") else self.own)[row.metric] = row.number
        lines = [json.loads(line) for line in (folder / "pictures.jsonl").read_text(encoding="utf-8").splitlines()]
        self.captions = [(line["true"][0], line["written"]) for line in lines if "written" in line]


def ship(run: Path) -> None:
    """The run's newest checkpoint as assets/mini: bf16, without the VAE, which has a folder of its own."""
    pipeline = load(run)
    earlier = (MINI / "command.txt").read_text() if pipeline.training.get("started_from", {}).get("name") == "mini" else ""
    for record in (pipeline.training, pipeline.training.get("started_from", {})):
        record["data"] = [f"DATA/pictures/{Path(name).name}" if name.endswith(".tar") else name for name in record.get("data", [])]
    pipeline.training["licence"] = "CC BY-SA 4.0 (trained on OpenMoji, CC BY-SA 4.0, and Open Clip Art, public domain)"
    with tempfile.TemporaryDirectory(dir=MINI.parent) as made:  # whole, before the old one gives way
        pipeline.save(Path(made) / "mini", dtype=torch.bfloat16, with_vae=False)
        shutil.rmtree(MINI, ignore_errors=True)
        (Path(made) / "mini").rename(MINI)
    command = re.sub(r"\S*/([^/ ]+\.tar)", r"DATA/pictures/\1", (run / "command.txt").read_text().splitlines()[0]).split()
    (MINI / "command.txt").write_text(earlier + " ".join(["openvision3", *command[1:]]) + "\n")


def percent(number: Number) -> str:
    return f"{100 * number.value:.1f}"


def write_cards(found: dict[str, Measured], demo: Measured | None) -> None:
    pipeline = load("mini")
    rebuilt = ["| held-out set | pictures | VAE alone, dB | mini, dB | gap, dB | SSIM, VAE / mini |", "|---|---|---|---|---|---|"]
    for name, each in found.items():
        own, vae = each.own["psnr"], each.vae["psnr"]
        ssim = f"{each.vae['ssim'].value:.3f} / {each.own['ssim'].value:.3f}"
        rebuilt.append(f"| {name} | {own.count} | {vae.value:.2f} | {own.value:.2f} | {vae.value - own.value:.2f} | {ssim} |")
    recalled = ["| held-out set | candidates | picture to text R@1 / R@5 / R@10 | text to picture R@1 / R@5 / R@10 |", "|---|---|---|---|"]
    for name, each in [*found.items(), *([("demo model on openmoji", demo)] if demo else [])]:
        cells = [" / ".join(percent(each.own[f"{way}_r@{k}"]) for k in (1, 5, 10)) for way in ("image_to_text", "text_to_image")]
        recalled.append(f"| {name} | {each.own['image_to_text_r@1'].count} | {cells[0]} % | {cells[1]} % |")
    captions = ["| model | exact name, % | token F1, % | CIDEr |", "|---|---|---|---|"]
    for title, each in (("shipped mini", found["openmoji"]), *([("demo model", demo)] if demo else [])):
        captions.append(f"| {title} | {percent(each.own['exact_match'])} | {percent(each.own['token_f1'])} | {each.own['cider'].value:.3f} |")
    columns = ["| true name | mini |" + (" demo model |" if demo else ""), "|---|---|" + ("---|" if demo else "")]
    for i, (true, written) in enumerate(found["openmoji"].captions[:EXAMPLES]):
        columns.append(f"| {true} | {written} |" + (f" {demo.captions[i][1]} |" if demo else ""))
    zeroshot = found["openmoji"].own
    parameters = sum(p.numel() for name, p in pipeline.model.named_parameters() if not name.startswith("vae.")) / 1e6

    config = hub.read_config(MINI)
    training = "\n".join(f"- {name}: {value}" for name, value in flat(config.training).items())
    (MINI / "README.md").write_text(
        f"""---
library_name: openvision3
pipeline_tag: image-feature-extraction
license: cc-by-sa-4.0
tags: [openvision3, feature-extraction, image-captioning, zero-shot, reconstruction]
---
# openvision3 mini

One small encoder for rebuilding, naming and describing pictures, trained on two CPU cores: 128 px, 64 tokens of
{pipeline.encoder.size.width}, {parameters:.1f} M parameters beside the frozen
embedded VAE. A first version; drawings and icons are its world, photographs are not.

```python
import openvision3 as ov3

model = ov3.load("mini")
```

## Training
```
{(MINI / "command.txt").read_text().strip()}
```
{training}

## Licence
{TERMS.format(more="")}

## Scores
Measured by `make results DATA=FOLDER` (the OpenMoji rows by `make results` anywhere); sigma 0, fp32, one seed; resized to 128 px with antialias.
PSNR and SSIM per picture on uint8, mean. Every number with its protocol: docs/results.md.

{chr(10).join(rebuilt)}

{chr(10).join(recalled)}

Equal captions count as positives. "pictures" are Open Clip Art and stamps with titles and tags as captions; the class names of "photos" were
never seen in training. Chance is {100 / 256:.1f} % for R@1 among 256.

Zero-shot over the nine emoji groups (a group is the mean text embedding of its training names): {percent(zeroshot["zeroshot_top_1"])} % of
{zeroshot["zeroshot_top_1"].count} emoji with a group (always naming the largest group gives {percent(zeroshot["zeroshot_largest_class_share"])} %).

Captions on the same 256 held-out emoji, greedy; lower-case words, CIDEr by the {found["openmoji"].own["cider"].how.split(",")[1].strip()}:

{chr(10).join(captions)}

The first {EXAMPLES} of the 256, not chosen:

{chr(10).join(columns)}
"""
    )
    vae = json.loads((EMBEDDED / "config.json").read_text())
    parameters = sum(p.numel() for p in pipeline.vae.parameters()) / 1e6
    log = json.loads((EMBEDDED / "training.json").read_text())
    lines = [f"| {name} | {each.vae['psnr'].count} | {each.vae['psnr'].value:.2f} | {each.vae['ssim'].value:.3f} |" for name, each in found.items()]
    (EMBEDDED / "README.md").write_text(
        f"""---
library_name: diffusers
license: cc-by-sa-4.0
---
# The embedded VAE

`AutoencoderTiny` of diffusers, {vae["latent_channels"]} latent channels, 8x, {parameters:.2f} M parameters in bf16; encoder blocks
{vae["num_encoder_blocks"]} and decoder blocks {vae["num_decoder_blocks"]} at width 64: the depth stands at low resolution, where a block costs little.
Latents have about unit variance (`scaling_factor` {vae["scaling_factor"]}, measured on training pictures). sha256 of the weights: `{pipeline.vae.sha256}`.

## Training
```
{log["command"]}
```
{log["steps"]} steps of {log["batch"]}, {log["minutes"]:.0f} minutes on {log["machine"]}, seed {log["seed"]}. L1 + squared error + 0.1 x EfficientNet-Lite0
feature distance + 0.1 x (channel mean^2 + (channel deviation - 1)^2); Muon on the convolutions, AdamW elsewhere; averaged weights.

## Licence
{TERMS.format(more=" and pictures computed from random numbers")}

## Scores
PSNR and SSIM per picture on uint8, mean, 128 px, measured by `make results DATA=FOLDER`:

| held-out set | pictures | dB | SSIM |
|---|---|---|---|
{chr(10).join(lines)}
"""
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), help="the folder that make results has filled")
    parser.add_argument("--demo", type=Path, help="the folder of an evaluation of a demo's model, for the comparison of captions")
    parser.add_argument("--ship", type=Path, help="a run folder whose newest checkpoint becomes assets/mini; no card is written")
    args = parser.parse_args()
    if args.ship:
        ship(args.ship)
        return
    write_cards({name: Measured(args.results / name) for name in SETS if (args.results / name).is_dir()}, Measured(args.demo) if args.demo else None)
    print((MINI / "README.md").read_text())
    print((EMBEDDED / "README.md").read_text())


if __name__ == "__main__":
    main()
