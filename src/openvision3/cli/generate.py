"""The verb that draws images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from openvision3.cli.common import Device, Json, output_folder, warnings_on_stderr
from openvision3.files import write_whole
from openvision3.settings import PathName

if TYPE_CHECKING:
    from PIL import Image

Texts = Positional[Annotated[tuple[str, ...], arg(metavar="TEXT ...", help="what to draw, such as 'a red heart'")]]


def generate(
    texts: Texts = (),
    model: Annotated[PathName, arg(metavar="GENERATOR", help="a folder or run of a generator. Not set: the one that ships")] = "",
    label: tuple[str, ...] = (),
    count: Annotated[int, arg(aliases=("-n",))] = 1,
    out: PathName = "drawn.png",
    steps: int = 50,
    method: Annotated[str, arg(metavar="{euler,heun}", help="the sampler; heun computes twice a step and is more exact")] = "euler",
    guidance: float | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    strip: int = 0,
    weaker: PathName = "",
    tokens: PathName = "",
    heads: tuple[int, int] = (0, 0),
    device: Device = "auto",
    json: Json = False,
) -> int:
    """Draw images from texts, or from labels.

    Args:
        label: names or numbers of classes, for a generator that draws by label
        count: images of each text or label
        out: the PNG file; several images lie beside it as NAME-1.png, NAME-2.png, ..., and it is the sheet of all
        steps: steps from noise to image
        guidance: 1: none; more follows the text or label more closely, with less variety. Not set: 4 for texts, 2 for labels and with --weaker
        interval: the times, from and to, at which guidance applies; 0 is the image, 1 is noise
        seed: seed of the noise; the same seed draws the same images
        strip: write so many images of the way from noise to the first image, as NAME-strip.png; 0: none
        weaker: a smaller or shorter generator of the same tokens to guide by, instead of by drawing without the text or label
        tokens: the model whose tokens are drawn, if the one that the generator names is not found
        heads: attention heads of trunk and wide head of RAE's public weights, if neither the file nor its widths tell them
    """
    from openvision3.generate.flow import Sampling
    from openvision3.generate.generator import load_generator
    from openvision3.report.sheets import grid

    target = Path(out)
    if target.suffix.lower() != ".png" or count < 1 or not 0 <= strip <= steps:
        raise ValueError(
            f"out {out}, count {count} and strip {strip} cannot be used; give a name that ends in .png, 1 image or more, and a strip of 0 to {steps} images"
        )
    output_folder(str(target.parent))
    Sampling(steps, method, guidance=guidance or 1.0, interval=interval, seed=seed)  # type: ignore[arg-type]  # refuses bad values before a model is opened
    generator = load_generator(model, device=device, tokens=tokens, weaker=weaker, heads=heads)
    usual = 1.0 if not generator.can_guide else 4.0 if texts and not weaker else 2.0
    strength = usual if guidance is None else guidance
    sampling = Sampling(steps, method, guidance=strength, interval=interval, seed=seed)  # type: ignore[arg-type]
    shown = {round(steps * number / strip) for number in range(1, strip + 1)} if strip else set()
    way: dict[int, Any] = {}  # {step: tokens of the first image that are promised from there}
    with warnings_on_stderr():
        tokens_drawn = generator.draw_tokens(
            texts, labels=label, count=count, sampling=sampling, each=lambda step, promised: way.setdefault(step, promised[:1]) if step in shown else None
        )
        images: Any = generator.images_of(tokens_drawn)
    conditions = [*(texts or label or ("",))]
    target.parent.mkdir(parents=True, exist_ok=True)
    files = [target] if len(images) == 1 else [target.with_name(f"{target.stem}-{number}.png") for number in range(1, len(images) + 1)]
    sheets: dict[Path, Any] = {}
    if len(images) > 1:
        sheets[target] = grid(_rows(images, count), [text[:40] for text in conditions])
    if strip:
        frames = [generator.images_of(way[step])[0] for step in sorted(shown)]
        sheets[target.with_name(f"{target.stem}-strip.png")] = grid([frames], [f"step {step}" for step in sorted(shown)])
    for file, image in [*zip(files, images, strict=True), *sheets.items()]:
        write_whole(file, lambda handle, image=image: image.save(handle, "PNG"))  # type: ignore[misc]
    rows = [{"condition": conditions[number // count], "file": str(file)} for number, file in enumerate(files)]
    answer = {"images": rows, "sheets": [str(file) for file in sheets], "guidance": strength, "steps": steps, "method": method, "seed": seed}
    print(dumps(answer, indent=2) if json else "\n".join([*(f"{row['condition'] or 'image'} -> {row['file']}" for row in rows), *map(str, sheets)]))
    return 0


def _rows(images: Sequence[Image.Image], count: int) -> list[Sequence[Image.Image]]:
    """The sheet of all images: a column of `count` for each text; of one text a square."""
    if len(images) == count:
        across = math.ceil(math.sqrt(count))
        return [images[i : i + across] for i in range(0, count, across)]
    return [images[i::count] for i in range(count)]
