"""Draw docs/rebuilt.png, the image of the README: `python tools/readme_image.py`.

The first drawings of OpenMoji's test side of which neither the shipped model nor its VAE has seen the image, a near-duplicate, a caption or the family:
original, through the VAE alone, from tokens, and the caption that the model writes. They are the first, not chosen.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

import openvision3
from openvision3.data import openmoji
from openvision3.data.fingerprint import Fingerprint, describe, recorded
from openvision3.data.images import to_pil
from openvision3.data.openmoji import EmojiSource
from openvision3.hub import EMBEDDED


def unseen(source: EmojiSource, images: torch.Tensor, fingerprints: list[Fingerprint]) -> list[int]:
    """The samples of which no fingerprint holds the image, a near-duplicate, a caption or the family."""
    seen: set[int] = set()
    for fingerprint in fingerprints:
        seen |= {row for row, _, _ in fingerprint.nearest(describe(images))}
        seen |= {i for i in range(len(source)) if fingerprint.has_family(source.family(i)) or any(map(fingerprint.has_caption, source.captions(i)))}
    return [i for i in range(len(source)) if i not in seen]


def main(out: Path = Path(__file__).parents[1] / "docs" / "rebuilt.png", count: int = 8) -> None:
    pipeline = openvision3.load("mini", device="cpu")
    emoji = openmoji.load_emoji().evaluation("test", 256)
    source = EmojiSource(emoji)
    images = torch.cat(pipeline.scaled([openmoji.draw(each.character, 128) for each in emoji], 128)).view(len(emoji), 3, 128, 128)
    known = [fingerprint for fingerprint in (pipeline.fingerprint, recorded(EMBEDDED)) if fingerprint]
    assert len(known) == 2
    shown = unseen(source, images, known)[:count]
    rows = [(images[i][None], pipeline.reconstruct_by_vae(images[i][None]), pipeline.reconstruct(images[i])) for i in shown]
    figure = Figure(figsize=(1.25 * count, 4.4), dpi=100)
    axes = figure.subplots(3, count, gridspec_kw={"wspace": 0.08, "hspace": 0.08})
    for column, (index, row) in enumerate(zip(shown, rows, strict=True)):
        for line, image in enumerate(row):
            axes[line, column].imshow(np.asarray(to_pil(image[0])))
            axes[line, column].set(xticks=[], yticks=[])
            axes[line, column].spines[:].set_visible(False)
        caption = pipeline.caption(images[index])[0] or "(nothing)"
        below = f"{textwrap.fill(caption, 15)}\n({textwrap.fill(emoji[index].name, 15)})"
        axes[2, column].set_xlabel(below, fontsize=7.5, linespacing=1.3)
    for line, name in enumerate(("original", "its VAE alone", "from tokens")):
        axes[line, 0].set_ylabel(name, fontsize=9)
    figure.savefig(out, bbox_inches="tight", pad_inches=0.05)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
