"""Draw docs/rebuilt.png, the image of the README: `python tools/readme_image.py`.

The first drawings of OpenMoji's test side, none of whose families the shipped model was trained on: original, through its VAE alone, rebuilt from
tokens, with the caption that it writes below. They are the first, not chosen.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import tyro
from matplotlib.figure import Figure
from PIL import Image

import openvision3
from openvision3.data import openmoji
from openvision3.evaluate.openmoji import rebuilt_rows
from openvision3.evaluate.peers.table import vae_functions


def main(out: Path = Path(__file__).parents[1] / "docs" / "rebuilt.png", count: int = 8) -> None:
    pipeline = openvision3.load("mini", device="cpu")
    emoji = openmoji.load_emoji().evaluation("test", count)
    rows = rebuilt_rows(count, pipeline.functions(), vae_functions(pipeline.vae, "VAE", "fp32"))
    captions = [pipeline.caption(openmoji.draw(each.character, 128))[0] for each in emoji]
    figure = Figure(figsize=(1.25 * count, 4.4), dpi=100)
    axes = figure.subplots(3, count, gridspec_kw={"wspace": 0.08, "hspace": 0.08})
    for column, images in enumerate(rows):
        for row, image in enumerate(images):
            axes[row, column].imshow(image)
            axes[row, column].set(xticks=[], yticks=[])
            axes[row, column].spines[:].set_visible(False)
        below = f"{textwrap.fill(captions[column] or '(nothing)', 15)}\n({textwrap.fill(emoji[column].name, 15)})"
        axes[2, column].set_xlabel(below, fontsize=7.5, linespacing=1.3)
    for row, name in enumerate(("original", "its VAE alone", "from tokens")):
        axes[row, 0].set_ylabel(name, fontsize=9)
    figure.savefig(out, bbox_inches="tight", pad_inches=0.05)
    Image.open(out).convert("RGB").quantize(64).save(out, optimize=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
