"""What every exported folder has: it is whole or absent, and holds licence, notice, credits and a card."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import openvision3
from openvision3.hub import vae_licence
from openvision3.pipeline import Pipeline

LEGAL = ("LICENSE", "NOTICE")
CREDITS = "CREDITS.txt"
"""names the authors of the training images of a shipped model"""


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `out` at the end, or is removed where something fails.

    Raises:
        ValueError: there is something of that name already.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; name a new folder with --out")
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    try:
        yield making
        for path in making.iterdir():
            path.chmod((making / "config.json").stat().st_mode)  # safetensors makes files that only their owner may read
        os.replace(making, folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def write_legal(pipeline: Pipeline, folder: Path) -> None:
    """LICENSE and NOTICE of the package, which name the training data of shipped weights, and the credits beside the model."""
    for name in LEGAL:
        (folder / name).write_bytes(_legal_file(name))
    if _has_credits(pipeline):
        shutil.copyfile(pipeline.folder / CREDITS, folder / CREDITS)  # type: ignore[operator]


def _has_credits(pipeline: Pipeline) -> bool:
    return pipeline.folder is not None and (pipeline.folder / CREDITS).is_file()


def _legal_file(name: str) -> bytes:
    """From the checkout, or from the metadata of the installed package. Raises FileNotFoundError."""
    checkout = Path(openvision3.__file__).parents[2] / name
    if (checkout.parent / "pyproject.toml").is_file():
        return checkout.read_bytes()
    for file in importlib.metadata.files("openvision3") or ():
        if file.name == name:
            return Path(str(file.locate())).read_bytes()
    raise FileNotFoundError(f"{name} of openvision3 is not found beside the package; install openvision3 again")


def card(pipeline: Pipeline, library: str, title: str, usage: str) -> str:
    """A hub model card: what it is, how it is opened, from what it was trained."""
    training, vae, width = pipeline.training, pipeline.vae, pipeline.encoder.size.width
    others = [name for name in ("torch", "diffusers", "pillow", "numpy") if name != library]
    needs = f"{library} (tested with {importlib.metadata.version(library)}), {', '.join(others)}"
    sources = " and ".join(name for name in ("NOTICE", CREDITS) if name == "NOTICE" or _has_credits(pipeline))
    return f"""---
library_name: {library}
pipeline_tag: image-feature-extraction
license: other
tags: [openvision3]
---
# {title}

OpenVision 3 (arXiv 2601.15369): one encoder whose tokens serve to rebuild an image and to understand it. Encoder {pipeline.encoder.config.size}, trained at
{pipeline.size} px; a token of {width} channels for every 16 x 16 pixels. Images are in [-1, 1], their sides any multiples of 16.

```python
{usage.strip()}
```

The code in this folder is that of openvision3 {openvision3.__version__} (Apache-2.0, see LICENSE). It needs {needs}; openvision3 itself need not be installed.

- training: {training.get("recipe", "not recorded")}, {training.get("steps", "?")} steps, {training.get("samples_seen", "?")} samples
- licence of the weights: {training.get("licence", "not recorded")}; what they were trained on: {sources}
- VAE: {vae.name}, sha256 {vae.sha256 or "none"}, licence: {vae_licence(vae.name)}
"""
