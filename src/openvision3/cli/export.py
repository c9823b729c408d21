"""`openvision3 export WHAT MODEL --out FOLDER`: a model for other libraries."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from json import dumps
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from openvision3.cli.common import Json, output_folder
from openvision3.settings import PathName

Model = Positional[Annotated[PathName, arg(metavar="MODEL", help="a shipped name, a model folder or a run folder")]]


def transformers(model: Model, out: PathName, fit: Literal["crop", "pad", "keep"] = "crop", vae: PathName = "", json: Json = False) -> int:
    """Encoder and text encoder for transformers' AutoModel and AutoProcessor

    Args:
        out: the new folder
        fit: how the processor makes images square: crop the centre, pad with grey, or keep the aspect (then one image at a time)
        vae: folder of the VAE, for a model whose own VAE is not found
    """
    from openvision3.export.transformers import export
    from openvision3.pipeline import load

    output_folder(out)
    _quiet("transformers")
    return _tell(out, export(load(model, device="cpu", vae=vae), out, fit), "transformers.AutoModel", json)


def diffusers(model: Model, out: PathName, data: tuple[PathName, ...] = (), images: int = 2000, vae: PathName = "", json: Json = False) -> int:
    """Encoder, latent decoder and VAE as an autoencoder for diffusers' AutoModel

    Args:
        out: the new folder
        data: images by which each channel of the latents is normalised: openmoji, folders or shards. Not set: latents are not normalised
        images: how many of them are used, evenly spread
        vae: folder of the VAE, for a model whose own VAE is not found
    """
    from openvision3.export.diffusers import export
    from openvision3.pipeline import load

    if images < 2:
        raise ValueError(f"--images {images} must be at least 2")
    output_folder(out, data)
    _quiet("diffusers")
    pipeline = load(model, device="cpu", vae=vae)
    return _tell(out, export(pipeline, out, _batches(data, images, pipeline.size) if data else None), "diffusers.AutoModel", json)


def _batches(data: tuple[str, ...], count: int, size: int) -> Iterator[Any]:
    """Batches of images in the evaluation view; what cannot be read is counted on stderr."""
    from openvision3.data.batches import evaluation_batches
    from openvision3.data.names import open_source
    from openvision3.data.problems import Problems, reasons_in_words
    from openvision3.progress import track

    source, problems = open_source(data), Problems()
    total = min(count, len(source))
    chosen = [number * len(source) // total for number in range(total)]
    for _, _, images, _ in track(evaluation_batches(source, size, 16, problems, chosen), "statistics of tokens", -(-total // 16)):
        yield images
    if len(problems):
        print(f"openvision3: left out: {reasons_in_words(problems)}", file=sys.stderr)


def _quiet(library: str) -> None:
    """No progress bars for writing a file."""
    with contextlib.suppress(ImportError):  # the export says what is missing
        importlib.import_module(f"{library}.utils.logging").disable_progress_bar()


def _tell(out: str, files: list[str], opened_by: str, json: bool) -> int:
    print(dumps({"folder": out, "files": files}, indent=2) if json else f"{out}: {len(files)} files; open it with {opened_by}.from_pretrained")
    return 0


VERBS: dict[str, Callable[..., int]] = {"transformers": transformers, "diffusers": diffusers}
