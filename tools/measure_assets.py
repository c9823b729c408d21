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
from collections.abc import Iterator
from pathlib import Path

import torch

from openvision3 import hub
from openvision3.evaluate.protocol import Number
from openvision3.evaluate.results import SCORES, SEEN, UNSEEN, Results
from openvision3.hub import EMBEDDED
from openvision3.pipeline import load
from openvision3.settings import flat

MINI = hub.ASSETS / "mini"
EXAMPLES = 32
SETS = ("openmoji", "pictures", "photos")

TERMS = """Trained from random weights on OpenMoji drawings (CC BY-SA 4.0) and Open Clip Art (public domain){more}; photographs and
stamps served only to measure. Whether weights derive from training pictures is not settled; to be safe these are offered under
CC BY-SA 4.0, attribution "OpenMoji - the open-source emoji and icon project". Code: Apache-2.0."""


PARTS = ("unseen", "seen", "all")
"""of the samples of a set, in the order of the tables: the first is what a number says of others"""


class Measured:
    """One evaluation's numbers of the model and of its VAE by part and metric, and the captions it wrote of samples that training has not seen."""

    def __init__(self, folder: Path):
        results = Results.load(folder)
        self.overlap = re.sub(r", listed in [^;)]*", "", results.overlap)
        self.own: dict[str, dict[str, Number]] = {part: {} for part in PARTS}
        self.vae: dict[str, dict[str, Number]] = {part: {} for part in PARTS}
        for row in results.rows:
            part = next((name for name, begins in (("unseen", UNSEEN), ("seen", SEEN)) if row.number.part.startswith(begins)), "all")
            (self.vae if row.model.startswith("VAE ") else self.own)[part][row.metric] = row.number
        lines = [json.loads(line) for line in (folder / SCORES).read_text(encoding="utf-8").splitlines()]
        captioned = [line for line in lines if "written" in line]
        unseen = [line for line in captioned if any(part.startswith(UNSEEN) and "caption" in part for part in line["parts"])]
        self.captions = [(line["true"][0], line["written"]) for line in unseen or captioned]

    def rows(self, *metrics: str) -> Iterator[tuple[str, dict[str, Number], dict[str, Number]]]:
        """(part, numbers of the model, of the VAE) for each part that has all of these metrics."""
        for part in PARTS:
            if all(metric in self.own[part] for metric in metrics):
                yield part, self.own[part], self.vae[part]


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


def cell(number: Number, factor: float = 100, digits: int = 1) -> str:
    """37.5 [31.8, 43.6]: a value with its 95 % interval over samples, where it has one."""
    interval = f" [{factor * number.low:.{digits}f}, {factor * number.high:.{digits}f}]" if number.low is not None and number.high is not None else ""
    return f"{factor * number.value:.{digits}f}{interval}"


def write_cards(found: dict[str, Measured], demo: Measured | None) -> None:
    pipeline = load("mini")
    rebuilt = ["| set | samples | VAE alone, dB | mini, dB | SSIM, VAE | SSIM, mini |", "|---|---|---|---|---|---|"]
    recalled = ["| set | ask | picture to text R@1, % | R@5 | text to picture R@1, % | R@5 |", "|---|---|---|---|---|---|"]
    captions = ["| model, set | samples | exact, % | token F1, % | CIDEr |", "|---|---|---|---|---|"]
    alone = ["| set | samples | dB | SSIM |", "|---|---|---|---|"]
    for name, each in found.items():
        for part, own, vae in each.rows("psnr"):
            decibels = [cell(of["psnr"], 1, 2) for of in (vae, own)]
            rebuilt.append(f"| {name}, {part} | {own['psnr'].count} | {' | '.join(decibels)} | {cell(vae['ssim'], 1, 3)} | {cell(own['ssim'], 1, 3)} |")
            alone.append(f"| {name}, {part} | {vae['psnr'].count} | {decibels[0]} | {cell(vae['ssim'], 1, 3)} |")
    for name, each in [*found.items(), *([("demo model on openmoji", demo)] if demo else [])]:
        for part, own, _ in each.rows("image_to_text_r@1"):
            cells = [cell(own[f"{way}_r@{k}"]) for way in ("image_to_text", "text_to_image") for k in (1, 5)]
            recalled.append(f"| {name}, {part} | {own['image_to_text_r@1'].count} | {' | '.join(cells)} |")
        for part, own, _ in each.rows("exact_match"):
            captions.append(
                f"| {name}, {part} | {own['exact_match'].count} | {cell(own['exact_match'])} | {cell(own['token_f1'])} | {cell(own['cider'], 1, 2)} |"
            )
    columns = ["| true name | mini |" + (" demo model |" if demo else ""), "|---|---|" + ("---|" if demo else "")]
    written = dict(demo.captions) if demo else {}
    for true, own_words in found["openmoji"].captions[:EXAMPLES]:
        columns.append(f"| {true} | {own_words} |" + (f" {written.get(true, '')} |" if demo else ""))
    named = [f"{cell(own['zeroshot_top_1'])} % of {own['zeroshot_top_1'].count} {part}" for part, own, _ in found["openmoji"].rows("zeroshot_top_1")]
    largest = found["openmoji"].own["all"]["zeroshot_largest_class_share"]
    overlaps = "\n".join(f"- {name}: {each.overlap}" for name, each in found.items())
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
Every number with its protocol: docs/results.md. In brackets 95 % intervals over samples. **Unseen** rows come first: samples of which training
has seen neither the image nor a near-duplicate, nor, where texts count, an equal caption, nor another emoji of the family. Only these say what
to expect of other pictures.

{overlaps}

PSNR and SSIM per picture on uint8, mean:

{chr(10).join(rebuilt)}

Retrieval: these samples ask, all of the set are candidates; equal captions count as positives. "pictures" are Open Clip Art and stamps with titles
and tags as captions, "photos" have the name of their class.

{chr(10).join(recalled)}

Zero-shot over the nine emoji groups (a group is the mean text embedding of its training names): {"; ".join(named)}
(always naming the largest group gives {cell(largest)} % of all).

Captions, greedy; lower-case words, CIDEr by the {found["openmoji"].own["all"]["cider"].how.split(",")[1].strip()}:

{chr(10).join(captions)}

The first {EXAMPLES} unseen emoji, not chosen:

{chr(10).join(columns)}
"""
    )
    vae = json.loads((EMBEDDED / "config.json").read_text())
    parameters = sum(p.numel() for p in pipeline.vae.parameters()) / 1e6
    log = json.loads((EMBEDDED / "training.json").read_text())
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
PSNR and SSIM per picture on uint8, mean, 128 px, 95 % intervals over samples, measured by `make results DATA=FOLDER`; unseen are samples of which
training has seen no near-duplicate, nor another emoji of the family:

{chr(10).join(alone)}
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
