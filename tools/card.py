"""Write the card of a model: what it rebuilds and says of unpicked images, its results, its training data with licences, what it cannot do.

    python tools/card.py mini --results results/openmoji results/drawings --show 'drawings=DRAWINGS/*_*-0*.tar' --train openmoji 'DRAWINGS/*-train-*.tar' \
        --licence 'CC BY-SA 4.0' --licence-id cc-by-sa-4.0 --out src/openvision3/assets/mini/README.md

RESULTS are folders of `openvision3 evaluate`. Nothing on the card is written by hand, so after another training the same command writes the new card.
Each `--show NAME=DATA` gives one image of `--count` images that neither the model nor its VAE has seen; of named drawings, one for each
kind of held-out drawing. They are the first by a hash of their content, not chosen: name only data that may be shown.
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from card_parts import CREDITS, CardOptions, commands_of, credits_in_words, markdown_line, origin, run, training_table
from PIL import Image, ImageDraw
from tyro.conf import Positional

import openvision3
from openvision3 import hub
from openvision3.data.images import to_pil
from openvision3.data.names import DataOptions, open_source
from openvision3.data.sources import Source
from openvision3.draws import hash_share
from openvision3.evaluate.image_set import ImageSet
from openvision3.evaluate.overlap import Known, Overlap, recorded_training
from openvision3.evaluate.results import DRAWING_KINDS, SEEN, UNSEEN, Results, Row
from openvision3.evaluate.tables import shown
from openvision3.files import write_whole
from openvision3.pipeline import Pipeline
from openvision3.settings import flat

Cell = tuple[Image.Image, Image.Image, str, str]
"""the original, its reconstruction, the written caption, the true one"""
IN_A_ROW = 4
TABLES: tuple[tuple[str, dict[str, str]], ...] = (
    ("Reconstruction, of the model and of its VAE alone", {"psnr": "PSNR", "VAE psnr": "PSNR, VAE", "ssim": "SSIM", "VAE ssim": "SSIM, VAE"}),
    (
        "Retrieval; of a kind of drawing its samples are the candidates, else all samples of the set",
        {"image_to_text_r@1": "image to text R@1", "image_to_text_r@5": "R@5", "text_to_image_r@1": "text to image R@1", "text_to_image_r@5": "R@5"},
    ),
    (
        "Zero-shot classification",
        {"zeroshot_top_1": "top-1", "zeroshot_mean_class_accuracy": "mean over classes", "zeroshot_largest_class_share": "largest class"},
    ),
    ("Captions, greedy", {"exact_match": "exact", "token_f1": "token F1", "cider": "CIDEr"}),
)
"""title, {metric: its column}; of `VAE metric`, the number of the VAE alone"""
VAE_TABLES = (("Reconstruction", {"VAE psnr": "PSNR", "VAE ssim": "SSIM"}),)
"""the same for the VAE alone"""
ORDER = (*DRAWING_KINDS, UNSEEN, SEEN, "")
"""the parts of a set, as the lines of a table follow one another"""
LEAD = (UNSEEN, *DRAWING_KINDS)
"""the parts that say what to expect of other images"""
WEAK = {
    "image_to_text_r@1": ("find the caption of an image", 0.25),
    "exact_match": ("caption an image in the very words", 0.25),
    "zeroshot_top_1": ("name the class", 0.5),
}
"""metric: (what a model cannot do reliably where it is below the share, that share)"""


@dataclass
class Options(CardOptions):
    """What the card is written from."""

    model: Positional[str] = "mini"
    """a shipped name or a model folder"""
    vae_out: Path | None = None
    """also write the card of the embedded VAE, from the rows of the same results"""


@dataclass
class Shown:
    """The unseen images of one kind, with what the model makes of them."""

    title: str
    path: Path
    licences: Counter[str]
    credits: tuple[str, ...]
    cells: list[Cell]


def part_of(row: Row) -> str:
    """The part of the set that a number is over, without its explanation; "" for all samples."""
    return row.number.part.split(" (")[0]


def result_tables(results: dict[str, Results], model: str, tables: Sequence[tuple[str, dict[str, str]]] = TABLES) -> str:
    """A table for each kind of result: a line for each part of each set."""
    blocks = []
    for title, columns in tables:
        lines = []
        for name, result in results.items():
            by_part: dict[str, dict[str, Row]] = {}
            for row in result.rows:
                if row.model == model or row.model.startswith("VAE "):
                    by_part.setdefault(part_of(row), {})[row.metric if row.model == model else f"VAE {row.metric}"] = row
            for part in sorted(by_part, key=ORDER.index):
                rows = {metric: row for metric, row in by_part[part].items() if metric in columns}
                if next(iter(columns)) in rows:
                    cells = [shown(rows[metric].metric, rows[metric].number) if metric in rows else "" for metric in columns]
                    count = rows[next(iter(columns))].number.count
                    lines.append(markdown_line([name, part or "all", f"{count:,}", *cells]))
        if lines:
            head = ["set", "part", "N", *columns.values()]
            blocks.append("\n".join([f"{title}:", "", markdown_line(head), "|" + "---|" * len(head), *lines]))
    return "\n\n".join(blocks)


def limits(results: dict[str, Results], model: str) -> list[str]:
    """What the results show that the model cannot do, a line each: over the samples that training has not seen, where there are some."""
    lines = []
    for name, result in results.items():
        rows = [row for row in result.rows if row.model == model]
        lead = [row for row in rows if part_of(row) in LEAD] or [row for row in rows if not part_of(row)]
        for row in lead:
            if row.metric in WEAK and row.number.value < WEAK[row.metric][1]:
                where = f"{name}, {part_of(row)}" if part_of(row) else name
                lines.append(
                    f"- {where}: it does not reliably {WEAK[row.metric][0]}: right for {shown(row.metric, row.number)} of {row.number.count:,} samples."
                )
    return lines


def choose(source: Source, pipeline: Pipeline, known: list[Known], count: int) -> dict[str, list[int]]:
    """The first unseen samples of each kind by a hash of their content; "" for samples that are no drawings."""
    images = ImageSet(source, pipeline.size)
    images.collect("reading", lambda batch: batch.keys)
    overlap = Overlap(known)
    order = sorted(images.described, key=lambda index: hash_share(source.sample_key(index)))
    overlap.look(images, order)
    kinds = overlap.drawing_kinds("captioning", order)
    kinds[""] = set(order) - set(overlap.drawings) - overlap.seen("reconstruction", order)
    return {kind: [index for index in order if index in samples][:count] for kind, samples in kinds.items() if samples}


def show_images(pipeline: Pipeline, known: list[Known], name: str, data: str, options: Options) -> list[Shown]:
    """Write one image for each kind of sample in the data. Raises ValueError where training has seen all of them."""
    source = open_source((data,), DataOptions(side="test"))
    functions = pipeline.functions(options.model)
    rebuild, write = functions.reconstruct, functions.caption
    assert rebuild is not None and write is not None
    sheets = []
    for kind, indices in choose(source, pipeline, known, options.count).items():
        view = ImageSet(source, pipeline.size, indices=indices)
        rows = view.collect("writing captions", lambda batch: list(zip(rebuild(batch.images), write(batch.images), batch.captions, strict=True)))
        originals = view.collect("reading", lambda batch: list(batch.images))
        cells: list[Cell] = [(_image(originals[i]), _image(rows[i][0]), rows[i][1], (rows[i][2] or ("",))[0]) for i in indices]
        path = options.images / f"{'-'.join([name, *kind.split()])}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(cells).save(path, quality=90)
        credits = dict.fromkeys(credit for index in indices if (credit := source.value(index, "attribution")))
        title = f"{name}, {kind or UNSEEN}: {len(indices)} images"
        sheets.append(Shown(title, path, Counter(" ".join(origin(source, index)) for index in indices), tuple(credits), cells))
    if not sheets:
        raise ValueError(f"training has seen all {len(source)} samples of {data}; name held-out data with --show")
    return sheets


def _image(image: torch.Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> an image."""
    only = to_pil(image)
    assert isinstance(only, Image.Image)
    return only


def draw_sheet(cells: list[Cell], columns: int = IN_A_ROW, side: int = 112) -> Image.Image:
    """All cells as one image, four to a row."""
    gap, text = 8, 46
    width, height = 2 * side + gap, side + text
    sheet = Image.new("RGB", (columns * (width + gap) + gap, -(-len(cells) // columns) * (height + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (original, rebuilt, written, true) in enumerate(cells):
        x, y = gap + number % columns * (width + gap), gap + number // columns * (height + gap)
        for place, image in enumerate((original, rebuilt)):
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x + place * side, y))
        lines = textwrap.wrap(written or "(nothing)", 36, max_lines=2, placeholder=" ...")
        pen.multiline_text((x, y + side + 2), "\n".join(lines), fill="black", font_size=11, spacing=1)
        pen.text((x, y + side + 30), textwrap.shorten(f"({true})", 40, placeholder=" ...)"), fill=(110, 110, 110), font_size=11)
    return sheet


def card(options: Options, results: dict[str, Results], sheets: list[Shown], training: str) -> str:
    """The text of the card."""
    config = hub.read_config(hub.find_folder(options.model))
    examples = []
    for one in sheets:
        licences = "; ".join(f"{count} {licence}" for licence, count in sorted(one.licences.items()))
        examples.append(f"### {one.title}\n\n![{one.title}]({options.link(one.path)})\n\nFrom {licences}.{credits_in_words(one.credits)}")
    overlap = "\n".join(f"- {name}: {result.overlap}" for name, result in results.items() if result.overlap)
    commands = "\n".join(dict.fromkeys(result.command for result in results.values()))
    facts = "\n".join(f"- {name}: {value}" for name, value in flat(config.training).items())
    cannot = limits(results, options.model) or ["- Nothing below the thresholds of this list in these results."]
    return f"""---
library_name: openvision3
pipeline_tag: image-feature-extraction
license: {options.licence_id}
tags: [openvision3, feature-extraction, image-captioning, zero-shot, reconstruction]
---
# openvision3 {Path(options.model).name}

One encoder whose tokens serve to rebuild an image, to name it and to describe it: {config.size} px, VAE `{config.vae.get("name")}`.

```python
import openvision3 as ov3

model = ov3.load("{Path(options.model).name}")
```

## Examples

Left: the image; right: rebuilt from tokens. Below: the caption that the model writes (in brackets: the true one). They are the first by a hash of
their content that neither the model nor its VAE has seen, not chosen.

{chr(10).join(f"{example}{chr(10)}" for example in examples)}
## Results

In brackets: 95 % intervals over samples. Every number with its protocol: `results.json` of each evaluation.

{result_tables(results, options.model)}

{overlap}

```
{commands}
```

## What it cannot do

{chr(10).join(cannot)}
- It has learned from the sources below only; of anything else, its captions and classes are guesses.

## Training data

{training}

## Training

{commands_of(hub.find_folder(options.model))}{facts}

## Licence

{options.licence}. Code: Apache-2.0.
"""


def vae_card(options: Options, results: dict[str, Results], training: str) -> str:
    """The text of the card of the embedded VAE."""
    vae = json.loads((hub.EMBEDDED / "config.json").read_text(encoding="utf-8"))
    log = json.loads((hub.EMBEDDED / "training.json").read_text(encoding="utf-8"))
    stages: list[str] = []
    while log:
        stages.insert(
            0, f"```\n{log['command']}\n```\n{log['steps']:,} steps of {log['batch']}, {log['minutes']:.0f} minutes on {log['machine']}, seed {log['seed']}."
        )
        log = log.get("started_from")
    loaded = hub.load_vae("embedded")
    parameters = sum(p.numel() for p in loaded.parameters()) / 1e6
    return f"""---
library_name: diffusers
license: {options.licence_id}
---
# The embedded VAE

`AutoencoderTiny` of diffusers, {vae["latent_channels"]} latent channels, 8x, {parameters:.2f} M parameters in bf16; encoder blocks
{vae["num_encoder_blocks"]} and decoder blocks {vae["num_decoder_blocks"]} at width 64: the depth stands at low resolution, where a block costs little.
Latents have about unit variance (`scaling_factor` {vae["scaling_factor"]}, measured on training images). sha256 of the weights: `{loaded.sha256}`.

## Results

At 128 px. In brackets: 95 % intervals over samples; *unseen*: neither the VAE nor the model that was measured with it has seen a near-duplicate.

{result_tables(results, options.model, VAE_TABLES)}

## Training

{(chr(10) + chr(10)).join(stages)}

The loss, Muon and averaged weights: `tools/train_embedded_vae.py`. The data of the last stage; images computed from random numbers joined them:

{training}

## Licence

{options.licence}. Code: Apache-2.0.
"""


def main(options: Options) -> None:
    folder = hub.find_folder(options.model)
    pipeline = openvision3.load(str(folder), device="cpu")
    results = {path.name: Results.load(path) for path in options.results}
    if len(results) < len(options.results):
        raise ValueError("two of the results have one folder name; rename one, because sets are called as their folders")
    lacking = [name for name, result in results.items() if not any(row.model == options.model for row in result.rows)]
    if lacking or not results:
        raise ValueError(f"no results of {options.model} in {', '.join(lacking) or 'no folder'}; name folders that openvision3 evaluate wrote with --results")
    options.check()
    known, unknown = recorded_training(options.model, folder, (folder / "vae", hub.EMBEDDED))
    if options.show and unknown:
        raise ValueError(f"what {' and '.join(unknown)} was trained on is not recorded, so that unseen images cannot be told; see openvision3 data fingerprint")
    all_known = [Known(one.of, one.fingerprint) for one in known]
    training, credits = training_table(options.train, options.only, options.terms) if options.train else ("Not named.", [])
    if credits:
        training += f"\n\nThe authors of {len(credits):,} of these images are credited one by one in [{CREDITS}]({CREDITS})."
    sheets = [sheet for name, data in options.shown_data for sheet in show_images(pipeline, all_known, name, data, options)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.out, card(options, results, sheets, training))
    if credits:
        write_whole(options.out.parent / CREDITS, "\n".join(credits) + "\n")
    if options.strip:
        draw_sheet([cell for sheet in sheets[:2] for cell in sheet.cells[:IN_A_ROW]]).save(options.strip)
    if options.vae_out:
        write_whole(options.vae_out, vae_card(options, results, training.replace(f"({CREDITS})", f"(../{options.out.parent.name}/{CREDITS})")))
    print(f"{options.out}, {len(sheets)} images in {options.images}")


if __name__ == "__main__":
    run("card", main, Options, __doc__)
