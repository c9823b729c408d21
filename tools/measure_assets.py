"""Measure the shipped VAE and mini on held-out pictures and write their model cards; `--ship RUN` first puts a run there.

    python tools/measure_assets.py --ship runs/mini --held-out DATA
    python tools/measure_assets.py --held-out DATA            # every set
    python tools/measure_assets.py                            # OpenMoji only, anywhere

`--demo RUN` adds the captions of a demo model beside those of the shipped mini. Cards and `scores.json` go into the assets.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from train_embedded_vae import held_out_shards

from openvision3 import hub
from openvision3.config import flat
from openvision3.data.batches import evaluation_batches
from openvision3.data.shards import open_source
from openvision3.demo import as_json
from openvision3.evaluate.openmoji import evaluate_openmoji, psnr_number
from openvision3.evaluate.protocol import Number, values
from openvision3.evaluate.reconstruction import psnr
from openvision3.evaluate.zeroshot import evaluate_retrieval
from openvision3.model.vae import EMBEDDED
from openvision3.pipeline import Pipeline, load
from openvision3.pretrain import functions

MINI = hub.ASSETS / "mini"
EXAMPLES = 32

TERMS = """Trained from random weights on OpenMoji drawings (CC BY-SA 4.0) and Open Clip Art (public domain){more}; photographs and
stamps served only to measure. Whether weights derive from training pictures is not settled; to be safe these are offered under
CC BY-SA 4.0, attribution "OpenMoji - the open-source emoji and icon project". Code: Apache-2.0."""


def measure_pictures(pipeline: Pipeline, shards: list[str]) -> dict[str, list[Number]]:
    """Reconstruction (model and VAE) and retrieval on shards: whole pictures, resized to the training size with antialias.

    A picture without a caption is rebuilt, and not asked for in words.
    """
    source = open_source(tuple(shards))
    run = functions(pipeline)
    problems: list[dict[str, str]] = []
    rows = list(evaluation_batches(source, pipeline.size, 32, problems))
    pictures = [images for _, images, _ in rows]
    captions = [texts[0] if texts else "" for _, _, all_texts in rows for texts in all_texts]
    told = [i for i, caption in enumerate(captions) if caption]
    captions = [captions[i] for i in told]
    embedding = torch.cat([run.embed_images(p) for p in pictures])[told]
    return {
        "reconstruction": [psnr_number(torch.cat([psnr(p, run.reconstruct(p)) for p in pictures]), pipeline.size)],
        "vae_reconstruction": [psnr_number(torch.cat([psnr(p, run.vae_reconstruct(p)) for p in pictures]), pipeline.size)],
        "retrieval": evaluate_retrieval(embedding, run.embed_texts(captions), captions, range(len(captions))),
    }


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


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", type=Path, help="folder with pictures/val-*.tar and photos/val-*.tar")
    parser.add_argument("--demo", type=Path, help="a demo's run folder, for the comparison of captions")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--ship", type=Path, help="a run folder whose newest checkpoint becomes assets/mini")
    args = parser.parse_args()

    if args.ship:
        ship(args.ship)
    pipeline = load("mini", precision=args.precision)
    findings = evaluate_openmoji(functions(pipeline))
    found_on = {"openmoji": findings.results}
    written: dict[str, dict[str, list[dict]]] = {"openmoji": as_json(findings)}
    for name, shards in held_out_shards(args.held_out).items():
        found_on[name] = measure_pictures(pipeline, shards)
        written[name] = {what: [asdict(each) for each in numbers] for what, numbers in found_on[name].items()}
    demo = evaluate_openmoji(functions(load(args.demo, precision=args.precision))) if args.demo else None
    if demo is not None:
        found_on["demo model on openmoji"], written["demo model on openmoji"] = demo.results, as_json(demo)
    (MINI / "scores.json").write_text(json.dumps(written, indent=2) + "\n")
    scores = {name: {what: values(numbers) for what, numbers in results.items()} for name, results in found_on.items()}

    command = f"python tools/measure_assets.py{' --held-out FOLDER' if args.held_out else ''}{' --demo RUN' if args.demo else ''} --precision {args.precision}"
    sets = [name for name in ("openmoji", "pictures", "photos") if name in scores]
    rebuilt = ["| held-out set | pictures | VAE alone, dB | mini, dB | gap, dB |", "|---|---|---|---|---|"]
    for name in sets:
        own, vae = (scores[name][k]["psnr"] for k in ("reconstruction", "vae_reconstruction"))
        rebuilt.append(f"| {name} | {found_on[name]['reconstruction'][0].count} | {vae:.2f} | {own:.2f} | {vae - own:.2f} |")
    found = ["| held-out set | candidates | picture to text R@1 / R@5 | text to picture R@1 / R@5 |", "|---|---|---|---|"]
    for name in [*sets, *(["demo model on openmoji"] if demo else [])]:
        r = scores[name]["retrieval"]
        cells = [" / ".join(percent(r[f"{way}_r@{k}"]) for k in (1, 5)) for way in ("image_to_text", "text_to_image")]
        found.append(f"| {name} | {found_on[name]['retrieval'][0].count} | {cells[0]} % | {cells[1]} % |")
    captions = ["| model | exact name, % | token F1, % | CIDEr, simple tokeniser |", "|---|---|---|---|"]
    for title, name in (("shipped mini", "openmoji"), *([("demo model", "demo model on openmoji")] if demo else [])):
        told = scores[name]["captions"]
        captions.append(f"| {title} | {percent(told['exact_match'])} | {percent(told['token_f1'])} | {told['cider']:.2f} |")
    columns = ["| true name | mini |" + (" demo model |" if demo else ""), "|---|---|" + ("---|" if demo else "")]
    for i, emoji in enumerate(findings.emoji[:EXAMPLES]):
        columns.append(f"| {emoji.name} | {findings.written[i]} |" + (f" {demo.written[i]} |" if demo else ""))
    zeroshot, grouped = scores["openmoji"]["zeroshot"], sum(row.count for row in findings.groups)
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
Measured with `{command}`; sigma 0, {args.precision}, one seed; resized to 128 px with antialias. PSNR per picture on uint8, mean.

{chr(10).join(rebuilt)}

{chr(10).join(found)}

Equal captions count as positives. "pictures" are Open Clip Art and stamps with titles and tags as captions; the class names of "photos" were
never seen in training. Chance is {100 / 256:.1f} % for R@1 among 256.

Zero-shot over the nine emoji groups (a group is the mean text embedding of its training names): {percent(zeroshot["top_1"])} % of {grouped}
({findings.without_group} emoji without a group left out; always naming the largest group gives {percent(zeroshot["largest_class_share"])} %).

Captions on the same 256 held-out emoji, greedy, lower-case words:

{chr(10).join(captions)}

The first {EXAMPLES} of the 256, not chosen:

{chr(10).join(columns)}
"""
    )
    vae = json.loads((EMBEDDED / "config.json").read_text())
    parameters = sum(p.numel() for p in pipeline.vae.parameters()) / 1e6
    log = json.loads((EMBEDDED / "training.json").read_text())
    lines = [f"| {name} | {found_on[name]['vae_reconstruction'][0].count} | {scores[name]['vae_reconstruction']['psnr']:.2f} |" for name in sets]
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
PSNR per picture on uint8, mean, 128 px, measured with `{command}`:

| held-out set | pictures | dB |
|---|---|---|
{chr(10).join(lines)}
"""
    )
    print((MINI / "README.md").read_text())
    print((EMBEDDED / "README.md").read_text())


if __name__ == "__main__":
    main()
