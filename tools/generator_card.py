"""Write the card of a generator that draws from texts: unpicked drawings of each kind of text, its scores, its training data with licences.

    python tools/generator_card.py drawings --results results/drawn --train openmoji 'DRAWINGS/*-train-*.tar' \
        --show 'Concepts that training knows from other styles=DRAWINGS/*-unseen_style-*.tar' --licence 'CC BY-SA 4.0' --licence-id cc-by-sa-4.0 \
        --out src/openvision3/assets/generators/drawings/README.md

RESULTS are folders of `openvision3 evaluate generation`. Each `--show NAME=DATA` draws the first captions of these data by a hash of the caption; TRIED are
drawn, too. One image each, number 0 of seed 0: nothing is chosen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from card_parts import CardOptions, commands_of, markdown_line, run, training_table
from PIL import Image, ImageDraw
from tyro.conf import Positional

import openvision3
from openvision3.data.names import DataOptions, open_source
from openvision3.draws import hash_share
from openvision3.evaluate.results import Results
from openvision3.evaluate.tables import shown
from openvision3.files import write_whole
from openvision3.generate.flow import Sampling
from openvision3.generate.folder import find, read
from openvision3.understand.facts import join

TRIED = (
    *("a yellow star", "a red apple", "pizza", "cat face", "a house", "a green heart", "a blue dog face", "a purple apple"),
    *("a red car", "a blue tree", "a green cat face", "a pink house", "a black heart", "an orange fish", "two red hearts", "a yellow car"),
)
"""names and combinations that anyone can judge; the card says which of them no training drawing has"""
NAMES = ("caption", "phrase", "coloured", "captions")
"""JSON fields of the training data that hold names"""
COLUMNS, SIDE = 8, 128


@dataclass
class Options(CardOptions):
    """What the card is written from."""

    model: Positional[str] = "drawings"
    """a shipped name or the folder of a generator"""
    guidance: float = 3.0
    """scale of the guidance"""


def captions(data: str, count: int) -> list[str]:
    """The first captions of the data by a hash of the caption, each once."""
    source = open_source((data,), DataOptions(side="test", caption_keys=("caption",)))
    first_captions = {next(iter(source.captions(index)), "") for index in range(len(source))} - {""}
    return sorted(first_captions, key=hash_share)[:count]


def never_trained(texts: Sequence[str], train: tuple[str, ...]) -> list[str]:
    """Those texts that are the name of no training sample, with or without an article."""

    def name_of(text: str) -> str:
        return re.sub("^(a|an|the) ", "", text.lower())

    source = open_source(train, DataOptions(caption_keys=NAMES))
    known = {name_of(text) for index in range(len(source)) for text in source.captions(index)}
    return [text for text in texts if name_of(text) not in known]


def draw_sheet(images: list[Image.Image], texts: list[str]) -> Image.Image:
    """Images under each other in rows of COLUMNS, the text below each."""
    gap, line = 8, 18
    sheet = Image.new("RGB", (COLUMNS * (SIDE + gap) + gap, -(-len(images) // COLUMNS) * (SIDE + line + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = gap + number % COLUMNS * (SIDE + gap), gap + number // COLUMNS * (SIDE + line + gap)
        sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
        while len(text) > 4 and pen.textlength(text, font_size=11) > SIDE:
            text = f"{text.removesuffix(' ...')[:-1]} ..."
        pen.text((x, y + SIDE + 2), text, fill="black", font_size=11)
    return sheet


def result_table(folder: Path) -> str:
    """Each metric of every column of the results, with the number of samples and the reference."""
    results = Results.load(folder)
    columns = list(dict.fromkeys(row.model for row in results.rows))
    lines = [markdown_line([folder.name, *columns]), "|---|" + "---|" * len(columns)]
    for metric in dict.fromkeys(row.metric for row in results.rows):
        of = {row.model: row.number for row in results.rows if row.metric == metric}
        lines.append(markdown_line([metric, *(shown(metric, of[column]) if column in of else "" for column in columns)]))
    samples = next(row.number.count for row in results.rows if not row.metric.startswith("recall"))  # that one counts the reference
    twice = [f"; near_duplicates: {row.number.how}" for row in results.rows if row.metric == "near_duplicates"]
    return "\n".join(lines) + f"\n\n{samples:,} samples, against {results.rows[0].setting.data}{''.join(twice[:1])}."


def card(options: Options, sheets: list[tuple[str, Path]], unheard: Sequence[str], training: str, sampling: Sampling) -> str:
    folder = find(options.model)
    config = read(folder)
    weights = (folder / "model.safetensors").stat().st_size / 1e6
    name = options.model
    drawn = "\n\n".join(f"**{title}**\n\n![{title}]({options.link(path)})" for title, path in sheets)
    if unheard:
        drawn = f"Of the first sheet no training drawing has the name {join(unheard)}.\n\n{drawn}"
    return f"""---
library_name: openvision3
pipeline_tag: text-to-image
license: {options.licence_id}
---
# {name}: a generator of small drawings

It draws {config.size} px images from a few words, such as "a red heart": RAE's diffusion transformer with the wide head (arXiv 2510.11690) in the tokens of
`{config.tokens}` (sha256 `{config.tokens_sha256[:16]}...`), {weights:.1f} MB in bf16.

    openvision3 generate "a red heart" --out heart.png

```python
import openvision3 as ov3

generator = ov3.load_generator("{name}")
image = generator.generate("a red heart", sampling=ov3.Sampling(guidance={sampling.guidance:g}))[0]
```

## Unpicked drawings

Guidance {sampling.guidance:g}, {sampling.steps} steps, seed {sampling.seed}; of each text image number 0.

{drawn}

## Scores

{(chr(10) + chr(10)).join(result_table(folder) for folder in options.results) or "Not measured."}

How each is measured: [evaluation]({options.link(Path("docs/evaluation.md"))}). Of these data no published numbers exist.

## What it cannot do

It knows the names of drawings and single colours, not sentences: several things, their places and their number it mostly ignores. What no drawing in
its training shows, it draws as something near in words. It has never seen a photograph, and it draws no letters.

## Training

{commands_of(folder)}{training}

## Licence

{options.licence}. Code: Apache-2.0.
"""


def main(options: Options) -> None:
    options.check()
    generator = openvision3.load_generator(options.model, device="cpu")
    sampling = Sampling(guidance=options.guidance)
    of_data = {title: captions(data, options.count) for title, data in options.shown_data}
    sheets = []
    options.images.mkdir(parents=True, exist_ok=True)
    for title, texts in {"Plain names and combinations": list(TRIED), **of_data}.items():
        images = [image for text in texts for image in generator.generate(text, sampling=sampling)]
        sheet = draw_sheet(images, texts)
        path = options.images / f"drawn-{'-'.join(title.lower().split())}.png"
        sheet.save(path)
        sheets.append((title, path))
        if options.strip and len(sheets) == 2:
            draw_sheet(images[: 2 * COLUMNS], texts[: 2 * COLUMNS]).save(options.strip)
    training, credits = training_table(options.train, options.only, options.terms) if options.train else ("Not named.", [])
    if credits:
        raise ValueError("authors of single images would have to be credited; train on data whose licences do not ask for that")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.out, card(options, sheets, never_trained(TRIED, options.train) if options.train else (), training, sampling))
    print(f"{options.out}, {len(sheets)} sheets in {options.images}")


if __name__ == "__main__":
    run("generator_card", main, Options, __doc__)
