"""The verbs that use a model: reconstruct, caption, classify, generate, encode, info; and the doors to evaluate, data and fetch."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from openvision3.cli.common import Device, Json, error_message, on_one_line, output_folder, run_verb, warnings_on_stderr
from openvision3.files import write_whole
from openvision3.settings import PathName

if TYPE_CHECKING:
    from openvision3.pipeline import Pipeline

Images = Positional[Annotated[tuple[PathName, ...], arg(metavar="IMAGE ...", help="files, folders and globs")]]

Model = Annotated[PathName, arg(metavar="MODEL", help="a shipped name, a model folder or a run folder")]

VaeFolder = Annotated[PathName, arg(metavar="FOLDER", help="folder of the VAE, for a model whose own VAE is not found")]


def reconstruct(
    images: Images,
    model: Model = "mini",
    out: PathName = "reconstructed",
    size: int | None = None,
    beside: bool = False,
    device: Device = "auto",
    vae: VaeFolder = "",
    json: Json = False,
) -> int:
    """Rebuild images from their tokens and print how close they come.

    Args:
        out: the folder for the PNG files
        size: long side in pixels; 0: the image's own. Not set: the training size
        beside: write original, VAE alone and rebuilt side by side
    """
    from openvision3.data.crops import pad
    from openvision3.data.images import to_pil
    from openvision3.evaluate.metrics.reconstruction import psnr
    from openvision3.pipeline import load
    from openvision3.report.sheets import grid

    paths = _expand(images)
    folder = output_folder(out, images)
    if any(Path(path).resolve().parent == folder.resolve() for path in paths):
        raise ValueError(f"{out} holds the images that are read, and they would be overwritten; name another folder with --out")
    pipeline = load(model, device=device, vae=vae)
    names: dict[str, int] = {}

    def rebuild(path: str) -> dict[str, Any]:
        original = pipeline.scaled(path, size)[0][None]
        height, width = original.shape[2:]
        rebuilt = pipeline.reconstruct(original).cpu()
        through_vae = pipeline.reconstruct_by_vae(pad(original[0])[None])[..., :height, :width]
        columns: list[Any] = [to_pil(each[0]) for each in (original, through_vae, rebuilt)]
        sheet = grid([columns], ("original", "VAE", "rebuilt")) if beside else columns[2]
        target = folder / f"{_unused(Path(path).stem, names)}.png"
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(target, lambda file: sheet.save(file, "PNG"))
        scores = {"psnr": round(psnr(original, rebuilt).item(), 2), "vae_psnr": round(psnr(original, through_vae).item(), 2)}
        return {"image": path, "file": str(target), "width": width, "height": height, **scores}

    def line(row: dict[str, Any]) -> str:
        alone = f" (its VAE alone {row['vae_psnr']:.2f})" if pipeline.vae.network is not None else ""
        return f"{row['image']} -> {row['file']}  {row['width']}x{row['height']}  PSNR {row['psnr']:.2f} dB{alone}"

    return _for_each(paths, rebuild, json, line)


def caption(
    images: Images,
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
    """Write a caption for each image.

    Args:
        beams: width of the beam search; 1: greedy decoding
        top_p: sample from the smallest set of word pieces with this probability. Not set: no sampling
        temperature: sampling temperature, with --top-p
        max_length: longest caption, in word pieces. Not set: the longest that the model can write
        seed: seed of the sampling, with --top-p
    """
    from openvision3.pipeline import load

    paths = _expand(images)
    pipeline = load(model, device=device, vae=vae)
    settings: dict[str, Any] = {"beams": beams, "top_p": top_p, "temperature": temperature, "max_length": max_length, "seed": seed}

    def write(path: str) -> dict[str, Any]:
        answer = pipeline.answer(path, **settings)[0]
        return {"image": path, "caption": answer.caption, **_trust(answer.confidence, answer.in_distribution)}

    return _for_each(paths, write, json, lambda row: f"{row['image']}: {_doubted(row, row['caption'] or '(nothing)', pipeline)}")


def classify(
    images: Images,
    labels: tuple[str, ...],
    template: tuple[str, ...] = ("{}",),
    model: Model = "mini",
    top: int = 5,
    device: Device = "auto",
    vae: VaeFolder = "",
    json: Json = False,
) -> int:
    """Choose among labels for each image. A probability is that among the labels given; confidence is how often such a choice is right, if a label fits.

    Args:
        labels: the texts to choose among, such as --labels "a cat" "a dog"; several names of one class are separated by |: "rose|roses"
        template: texts with {} in the place of the label, such as --template "a drawing of {}" "a photo of {}"; a class is the mean of all its texts
        top: number of labels to print
    """
    from openvision3.data.captions import checked_text
    from openvision3.pipeline import load

    paths = _expand(images)
    classes = [[name.strip() for name in label.split("|")] for label in labels]
    if not all(map(all, classes)) or not labels or top < 1:
        names = ", ".join(map(repr, labels)) or "none"
        raise ValueError(f"labels {names} and top {top} cannot be used; give one label or more and --top 1 or more, such as --labels 'a cat' 'a dog' --top 1")
    for text, what in [*((label, "a label") for label in labels), *((text, "a template") for text in template)]:
        checked_text(text, what)
    pipeline = load(model, device=device, vae=vae)

    def choose(path: str) -> dict[str, Any]:
        with warnings_on_stderr(shown=path == paths[0]):  # they are about the labels, so they are the same for every image
            ranking = pipeline.classify(path, classes, template)
        trust = _trust(pipeline.label_confidence(ranking), pipeline.in_distribution(path)[0])
        return {"image": path, "labels": [{"label": label, "probability": round(p, 4)} for label, p in ranking[:top]], **trust}

    def line(row: dict[str, Any]) -> str:
        labels = ", ".join(f"{chosen['label']} {100 * chosen['probability']:.1f}%" for chosen in row["labels"])
        return f"{row['image']}: {_doubted(row, labels, pipeline)}"

    return _for_each(paths, choose, json, line)


def encode(
    images: Images,
    model: Model = "mini",
    out: PathName = "tokens",
    size: int | None = None,
    device: Device = "auto",
    vae: VaeFolder = "",
    json: Json = False,
) -> int:
    """Write the tokens and the embedding of each image as a .safetensors file.

    Args:
        out: the folder for the files; each holds tokens (N, D), embedding (E,) and the image's height and width
        size: long side in pixels; 0: the image's own. Not set: the training size
    """
    import torch
    from safetensors.torch import save

    from openvision3.pipeline import load

    paths = _expand(images)
    folder = output_folder(out, images)
    pipeline = load(model, device=device, vae=vae)
    names: dict[str, int] = {}

    def write(path: str) -> dict[str, Any]:
        image = pipeline.scaled(path, size)[0]
        height, width = image.shape[1:]
        with torch.no_grad():
            tokens, pooled = pipeline.encoder(pipeline.vae.encode(pipeline.prepare(image)))
        tensors = {"tokens": tokens[0].cpu().contiguous(), "embedding": torch.nn.functional.normalize(pooled, dim=-1)[0].cpu().contiguous()}
        target = folder / f"{_unused(Path(path).stem, names)}.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(target, save(tensors, {"height": str(height), "width": str(width), "model": model}))
        sizes = {"tokens": list(tokens.shape[1:]), "embedding": pooled.shape[1], "height": height, "width": width}
        return {"image": path, "file": str(target), **sizes}

    return _for_each(paths, write, json, lambda row: f"{row['image']} -> {row['file']}  tokens {row['tokens'][0]} x {row['tokens'][1]}")


def info(model: Positional[Model] = "mini", json: Json = False) -> int:
    """Describe a model, a generator or a chat model: parts, sizes, VAE, licence, training."""
    from openvision3.generate.folder import SHIPPED as GENERATORS
    from openvision3.hub import ASSETS, CHAT, GENERATOR, find_folder, load_model, shipped_in
    from openvision3.settings import flat, read_json, to_dict
    from openvision3.understand.folder import SHIPPED as CHATS

    places = (("generator", GENERATORS), ("chat model", CHATS))
    folder = find_folder(model, *next((place for place in places if model in shipped_in(place[1])), ("model", ASSETS)))
    describe = {GENERATOR: _info_of_generator, CHAT: _info_of_chat}.get(str(read_json(folder / "config.json").get("model_type")))
    if describe:
        return describe(folder, json)
    network, tokenizer, config = load_model(folder)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    untrained = config.training.get("untrained", ())
    side, vae, width = config.size // 16, network.vae, network.encoder.size.width
    if json:
        derived = {"parameters": parts, "grid": [side] * 2, "token_width": width, "stride": vae.stride}
        print(dumps({"folder": str(folder), **to_dict(config), **derived}, indent=2))
        return 0
    print(f"{folder}\n  trained at {config.size} px: {side * side} tokens of {width}, embeddings of {config.model.encoder.embed_dim}")
    for name, count in parts.items():
        print(
            f"  {name:15s} {count / 1e6:7.2f} M parameters"
            + ("  (frozen)" if name == "vae" else "  (never trained)" if name.replace("_", " ") in untrained else "")
        )
    print(f"  VAE: {vae.name}, {vae.latent_channels} channels, stride {vae.stride}, latents x {vae.scale:g}, sha256 {vae.sha256[:12] or 'none'}")
    print(f"  licence of the training data: {config.training.get('licence', 'not recorded')}; of the VAE: {config.vae.get('licence', 'not recorded')}")
    print(f"  vocabulary: {len(tokenizer)} word pieces")
    for name, value in flat(config.training).items():
        if name != "licence":
            print(f"  {name}: {value}")
    return 0


def _info_of_generator(folder: Path, json: bool) -> int:
    from openvision3.generate.folder import load
    from openvision3.settings import flat, to_dict

    rae, config, _ = load(folder)
    parts = {"network": rae.dit, "tokens": rae.space}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    if json:
        print(dumps({"folder": str(folder), **to_dict(config), "parameters": counts, "grid": rae.grid}, indent=2))
        return 0
    rows, columns = rae.grid
    print(f"{folder}\n  draws images of {config.size} px by {config.condition}: {rows * columns} tokens of {rae.space.channels}")
    print(f"  network         {counts['network'] / 1e6:7.2f} M parameters, predicts {config.flow.predict}")
    count = int(rae.statistics.count)
    print(f"  tokens          of {config.tokens}, sha256 {config.tokens_sha256[:12]}, {f'normalised by {count:,} images' if count else 'as they are'}")
    if config.label_names:
        print(f"  classes         {len(config.label_names)}: {', '.join(config.label_names[:5])}{' ...' if len(config.label_names) > 5 else ''}")
    print(f"  guidance        {'learnt' if config.drop else 'not learnt'}: {config.drop:.0%} of the rows without their condition")
    for name, value in flat(config.training).items():
        print(f"  {name}: {value}")
    return 0


def _info_of_chat(folder: Path, json: bool) -> int:
    from openvision3.hub import read_tensors
    from openvision3.settings import flat, to_dict
    from openvision3.understand.folder import read
    from openvision3.understand.llava import NEWLINE, PROJECTOR

    config = read(folder)
    counts = {"projector": 0, "language model": 0}
    for name, tensor in read_tensors(folder / "model.safetensors").items():
        counts["projector" if name.startswith((PROJECTOR, NEWLINE)) else "language model"] += tensor.numel()
    if json:
        print(dumps({"folder": str(folder), **to_dict(config), "parameters": counts}, indent=2))
        return 0
    seen = f"images of {config.size} px, {'whole and in tiles' if config.anyres else 'padded to a square'}"
    learned = {"frozen": "nothing", "lora": f"additions of rank {config.lora_rank} (LoRA)", "full": "all of it"}[config.train_language]
    print(f"{folder}\n  answers questions about {seen}; conversations are written as {config.template}")
    print(f"  tower           {config.tower}, sha256 {config.tower_sha256[:12]}, its layer {config.layer}")
    print(f"  language model  {config.language}, sha256 {config.language_sha256[:12]}")
    print(f"  projector       {counts['projector'] / 1e6:7.2f} M parameters")
    print(f"  learned beside  {counts['language model'] / 1e6:7.2f} M parameters of the language model: {learned}")
    for name, value in flat(config.training).items():
        print(f"  {name}: {value}")
    return 0


# -- verbs with modules of their own, which are imported when called: the help of all verbs must not wait for them -----


def evaluate(argv: Sequence[str]) -> int:
    """Measure a model, and models of others by the same code: openvision3 evaluate WHAT [MODEL] --data DATA"""
    from openvision3.cli import evaluate as measuring

    return measuring.evaluate(argv)


def calibrate(argv: Sequence[str]) -> int:
    """Save with a model when it is unsure, and how often its answers are right: openvision3 calibrate MODEL --train DATA --val DATA"""
    from openvision3.cli import calibrate as calibrating

    return calibrating.calibrate(argv)


def data(argv: Sequence[str]) -> int:
    """Prepare images with captions for training: openvision3 data COMMAND ..."""
    from openvision3.cli import data as preparing

    return run_verb(argv, preparing.VERBS, "openvision3 data", "usage: openvision3 data COMMAND [ARGUMENTS]")


def export(argv: Sequence[str]) -> int:
    """Write a model for other libraries: openvision3 export WHAT MODEL --out FOLDER"""
    from openvision3.cli import export as exporting

    return run_verb(argv, exporting.VERBS, "openvision3 export", "usage: openvision3 export WHAT MODEL --out FOLDER")


def fetch(
    names: Positional[Annotated[tuple[str, ...], arg(metavar="{NAME ...,all}", help="what to fetch, or to check")]] = (),
    to: PathName = "",
    list: bool = False,
    check: bool = False,
    json: Json = False,
) -> int:
    """Download weights, tokenizers and statistics of others, each with source, licence and hash.

    Args:
        to: the folder that gets a sub-folder for each. Not set: ~/.cache/openvision3, where all commands look
        list: list all files with source, licence and size, and whether they are here
        check: compare the files that are here with their hashes; without names: all of them
    """
    from openvision3.cli import fetch as fetching

    return fetching.run(names, to, list, check, json)


# -- what these verbs share ----------------------------------------------------------------------------------------


def _expand(patterns: Sequence[str]) -> list[str]:
    """The image files behind files, folders and globs. What folders hold besides is counted on stderr."""
    from openvision3.data.problems import reasons_in_words
    from openvision3.pipeline import expand_images

    if not patterns:
        raise ValueError("no images given; name files, folders or globs, and put them before options that take several values, such as --labels")
    unused: list[dict[str, str]] = []
    paths = expand_images(patterns, unused)
    if unused:
        print(f"openvision3: not used: {reasons_in_words(unused)}, such as {unused[0]['key']} ({unused[0]['detail']})", file=sys.stderr)
    return paths


def _trust(confidence: float | None, in_distribution: bool | None) -> dict[str, Any]:
    """The JSON fields of an answer's trust; null where the model has no calibration."""
    return {"confidence": None if confidence is None else round(confidence, 4), "in_distribution": in_distribution}


def _doubted(row: dict[str, Any], answer: str, pipeline: Pipeline) -> str:
    """The answer with its confidence, or "unsure" and why."""
    if row["in_distribution"] is None:
        return answer
    if not row["in_distribution"]:
        kinds = ", ".join(pipeline.familiarity.calibration.kinds) if pipeline.familiarity and pipeline.familiarity.calibration else ""
        return f"unsure: this looks like nothing that the model was trained on ({kinds}); its guess: {answer}"
    return f"{answer} (confidence {100 * row['confidence']:.0f}%)"


def _for_each(paths: Sequence[str], work: Callable[[str], dict[str, Any]], json: bool, line: Callable[[dict[str, Any]], str]) -> int:
    """Do the work for every image and print a line or JSON for each.

    Of several, a file that cannot be read or written is reported on stderr, and the exit code is then 2. A full disk ends all of it.
    """
    from openvision3.data.images import ImageError
    from openvision3.progress import track

    rows, skipped = [], 0
    for path in track(paths, "images") if json else paths:  # the printed lines are progress enough
        try:
            row = work(path)
        except (ImageError, OSError) as error:
            if len(paths) == 1 or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            skipped += 1
            print(f"openvision3: {on_one_line(error_message(error))}", file=sys.stderr)
            continue
        rows.append(row)
        if not json:
            print(on_one_line(line(row)), flush=True)
    if json:
        print(dumps(rows, indent=2, ensure_ascii=False))
    if skipped:
        print(f"openvision3: {skipped} of {len(paths)} images skipped", file=sys.stderr)
    return 2 if skipped else 0


def _unused(stem: str, names: dict[str, int]) -> str:
    """a, a-2, a-3: images of one name from several folders do not overwrite each other."""
    names[stem] = names.get(stem, 0) + 1
    return stem if names[stem] == 1 else _unused(f"{stem}-{names[stem]}", names)
