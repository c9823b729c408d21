"""The verbs that use a model: rebuild, describe, classify and encode images, and say what the model is."""

from __future__ import annotations

import errno
import sys
import warnings
from collections.abc import Callable, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from openvision3.cli.common import Device, Json, error_message, on_one_line, output_folder
from openvision3.files import write_whole
from openvision3.settings import PathName

if TYPE_CHECKING:
    from openvision3.pipeline import Pipeline


Pictures = Positional[Annotated[tuple[PathName, ...], arg(metavar="PICTURE ...", help="files, folders and globs")]]

Model = Annotated[PathName, arg(metavar="MODEL", help="a shipped name, a model folder or a run folder")]

VaeFolder = Annotated[PathName, arg(metavar="FOLDER", help="the VAE, where the model's own is not at hand")]


def reconstruct(
    pictures: Pictures,
    model: Model = "mini",
    out: PathName = "reconstructed",
    size: int | None = None,
    beside: bool = False,
    device: Device = "auto",
    vae: VaeFolder = "",
    json: Json = False,
) -> int:
    """Rebuild pictures from their tokens and say how close they come.

    Args:
        out: the folder for the PNG files.
        size: long side in pixels (default: the training size; 0: as the picture is).
        beside: write original, VAE alone and rebuilt side by side.
    """
    from openvision3.data.crops import pad
    from openvision3.data.images import to_pil
    from openvision3.evaluate.metrics.reconstruction import psnr
    from openvision3.report.sheets import grid

    paths = _paths(pictures)
    folder = output_folder(out, pictures)
    if any(Path(path).resolve().parent == folder.resolve() for path in paths):
        raise ValueError(f"{out} is where the pictures are, and would be written over; name another folder with --out")
    pipeline = _load(model, device, vae)
    names: dict[str, int] = {}

    def one(path: str) -> dict[str, Any]:
        original = pipeline.scaled(path, size)[0][None]
        height, width = original.shape[2:]
        rebuilt = pipeline.reconstruct(original).cpu()
        through_vae = pipeline.reconstruct_by_vae(pad(original[0])[None])[..., :height, :width]
        columns: list[Any] = [to_pil(images[0]) for images in (original, through_vae, rebuilt)]
        sheet = grid([columns], ("original", "VAE", "rebuilt")) if beside else columns[2]
        target = folder / f"{_unused(Path(path).stem, names)}.png"
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(target, lambda file: sheet.save(file, "PNG"))
        return {
            "picture": path,
            "file": str(target),
            "width": width,
            "height": height,
            "psnr": round(psnr(original, rebuilt).item(), 2),
            "vae_psnr": round(psnr(original, through_vae).item(), 2),
        }

    def line(r: dict[str, Any]) -> str:
        alone = f" (its VAE alone {r['vae_psnr']:.2f})" if pipeline.vae.network is not None else ""
        return f"{r['picture']} -> {r['file']}  {r['width']}x{r['height']}  PSNR {r['psnr']:.2f} dB{alone}"

    return _each(paths, one, json, line)


def caption(
    pictures: Pictures,
    model: Model = "mini",
    beams: int = 1,
    top_p: float | None = None,
    temperature: float = 1.0,
    max_length: int | None = None,
    seed: int = 0,
    device: Device = "auto",
    vae: VaeFolder = "",
    json: Json = False,
) -> int:
    """Describe pictures in words.

    Args:
        beams: hypotheses of the beam search; 1 is greedy.
        top_p: draw words from the smallest set with this probability instead.
        temperature: flattens (> 1) or sharpens (< 1) what is drawn from.
        max_length: longest caption in word pieces.
        seed: of what is drawn.
    """
    paths = _paths(pictures)
    pipeline = _load(model, device, vae)
    settings: dict[str, Any] = {"beams": beams, "top_p": top_p, "temperature": temperature, "max_length": max_length, "seed": seed}
    return _each(
        paths,
        lambda path: {"picture": path, "caption": pipeline.caption(path, **settings)[0]},
        json,
        lambda r: f"{r['picture']}: {r['caption'] or '(nothing)'}",
    )


def classify(
    pictures: Pictures, labels: tuple[str, ...], model: Model = "mini", top: int = 5, device: Device = "auto", vae: VaeFolder = "", json: Json = False
) -> int:
    """Choose among labels in words, with probabilities.

    Args:
        labels: the texts to choose among, such as --labels "a cat" "a dog".
        top: how many to show.
    """
    from openvision3.data.captions import checked_text

    paths = _paths(pictures)
    if not all(map(str.strip, labels)) or not labels or top < 1:
        raise ValueError(
            f"labels {', '.join(map(repr, labels)) or 'none'} and top {top}: legal are one or more of each, such as --labels 'a cat' 'a dog' --top 1"
        )
    for label in labels:
        checked_text(label, "a label")
    pipeline = _load(model, device, vae)

    def one(path: str) -> dict[str, Any]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = pipeline.classify(path, labels)[:top]
        for line in [str(each.message) for each in told if path == paths[0]]:
            print(f"openvision3: {line}", file=sys.stderr)
        return {"picture": path, "labels": [{"label": label, "probability": round(p, 4)} for label, p in found]}

    return _each(paths, one, json, lambda r: f"{r['picture']}: " + ", ".join(f"{x['label']} {100 * x['probability']:.1f}%" for x in r["labels"]))


def encode(
    pictures: Pictures,
    model: Model = "mini",
    out: PathName = "tokens",
    size: int | None = None,
    device: Device = "auto",
    vae: VaeFolder = "",
    json: Json = False,
) -> int:
    """Write tokens and the embedding of each picture as a .safetensors file.

    Args:
        out: the folder for the files; each holds tokens (N, D), embedding (E,) and the picture's height and width.
        size: long side in pixels (default: the training size; 0: as the picture is).
    """
    import torch
    from safetensors.torch import save

    paths = _paths(pictures)
    folder = output_folder(out, pictures)
    pipeline = _load(model, device, vae)
    names: dict[str, int] = {}

    def one(path: str) -> dict[str, Any]:
        image = pipeline.scaled(path, size)[0]
        height, width = image.shape[1:]
        with torch.no_grad():
            tokens, pooled = pipeline.encoder(pipeline.vae.encode(pipeline.prepare(image)))
        embedding = torch.nn.functional.normalize(pooled, dim=-1)[0].cpu()
        tokens = tokens[0].cpu()
        target = folder / f"{_unused(Path(path).stem, names)}.safetensors"
        data = save({"tokens": tokens.contiguous(), "embedding": embedding.contiguous()}, {"height": str(height), "width": str(width), "model": model})
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(target, data)
        return {"picture": path, "file": str(target), "tokens": list(tokens.shape), "embedding": len(embedding), "height": height, "width": width}

    return _each(paths, one, json, lambda r: f"{r['picture']} -> {r['file']}  tokens {r['tokens'][0]} x {r['tokens'][1]}")


def info(model: Positional[Model] = "mini", json: Json = False) -> int:
    """Say what a model folder or a shipped model holds: parts, sizes, VAE, licence, training."""
    from openvision3.hub import find_folder, load_model
    from openvision3.settings import flat, to_dict

    folder = find_folder(model)
    network, tokenizer, config = load_model(folder)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    found = {
        "folder": str(folder),
        **to_dict(config),
        "parameters": parts,
        "grid": [config.size // 16] * 2,
        "token_width": network.encoder.size.width,
        "stride": network.vae.stride,
    }
    if json:
        print(dumps(found, indent=2))
        return 0
    side, vae = config.size // 16, network.vae
    print(f"{folder}\n  trained at {config.size} px: {side * side} tokens of {network.encoder.size.width}, embeddings of {config.model.encoder.embed_dim}")
    for name, count in parts.items():
        print(f"  {name:15s} {count / 1e6:7.2f} M parameters" + ("  (frozen)" if name == "vae" else ""))
    print(f"  VAE: {vae.name}, {vae.latent_channels} channels, stride {vae.stride}, latents x {vae.scale:g}, sha256 {vae.sha256[:12] or 'none'}")
    print(f"  licence of what it was trained on: {config.training.get('licence', 'not recorded')}; of its VAE: {config.vae.get('licence', 'not recorded')}")
    print(f"  vocabulary: {len(tokenizer)} word pieces")
    for name, value in flat(config.training).items():
        if name != "licence":
            print(f"  {name}: {value}")
    return 0


def fetch(
    names: Positional[Annotated[tuple[str, ...], arg(metavar="{NAME ...,all}", help="what to fetch, or to check")]] = (),
    to: PathName = "",
    list: bool = False,
    check: bool = False,
    json: Json = False,
) -> int:
    """Get weights, tokenizers and statistics of others, each with its source, licence and hash.

    Args:
        to: the folder that gets a sub-folder for each; none: ~/.cache/openvision3, where commands look for it.
        list: say what there is, from where, under which terms, and whether it is here.
        check: read what is here and compare it with its hashes; without names, all of it.
    """
    from openvision3.cli import fetch as cli_fetch

    return cli_fetch.run(names, to, list, check, json)


def _load(model: str, device: str, vae: str) -> Pipeline:
    from openvision3.pipeline import load

    return load(model, device=device, vae=vae)


def _paths(patterns: Sequence[str]) -> list[str]:
    from openvision3.data.problems import reasons_in_words
    from openvision3.pipeline import expand_pictures

    if not patterns:
        raise ValueError("no pictures given; name files, folders or globs, and put them before options that take several values, such as --labels")
    unused: list[dict[str, str]] = []
    paths = expand_pictures(patterns, unused)
    if unused:
        print(f"openvision3: not used: {reasons_in_words(unused)}, such as {unused[0]['key']} ({unused[0]['detail']})", file=sys.stderr)
    return paths


def _each(paths: Sequence[str], one: Callable[[str], dict[str, Any]], json: bool, line: Callable[[dict[str, Any]], str]) -> int:
    """Do `one` for every picture; a file that cannot be read or written is reported on stderr, and makes the exit code 2. A full disk ends all."""
    from openvision3.data.images import ImageError
    from openvision3.progress import track

    results, skipped = [], 0
    for path in track(paths, "pictures") if json else paths:  # a line for each is progress enough, and a bar would take stdout over
        try:
            result = one(path)
        except (ImageError, OSError) as error:
            if len(paths) == 1 or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            skipped += 1
            print(f"openvision3: {on_one_line(error_message(error))}", file=sys.stderr)
            continue
        results.append(result)
        if not json:
            print(on_one_line(line(result)), flush=True)
    if json:
        print(dumps(results, indent=2, ensure_ascii=False))
    if skipped:
        print(f"openvision3: {skipped} of {len(paths)} pictures skipped", file=sys.stderr)
    return 2 if skipped else 0


def _unused(stem: str, names: dict[str, int]) -> str:
    """a, a-2, a-3: pictures of one name from several folders do not overwrite each other."""
    names[stem] = names.get(stem, 0) + 1
    return stem if names[stem] == 1 else _unused(f"{stem}-{names[stem]}", names)
