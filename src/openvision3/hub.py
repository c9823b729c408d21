"""A model as a folder: config.json, model.safetensors, tokenizer.json, preprocessor_config.json, README.md, vae/, and two that may be absent:
fingerprint.safetensors and familiarity.safetensors.

The folder holds the VAE's weights only if they are the embedded ones. Of any other VAE it records name and sha256, and a load with other weights is
refused. Loads are strict. The fingerprint is that of the training data; `openvision3 calibrate` writes
familiarity.safetensors.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from openvision3.contents import holds, why_not
from openvision3.data.familiarity import FILE as FAMILIARITY
from openvision3.data.fingerprint import FILE
from openvision3.data.text import TextTokenizer
from openvision3.fetch.sources import licence_of
from openvision3.files import sha256_of
from openvision3.model.openvision3 import LossConfig, ModelConfig, OpenVision3
from openvision3.model.vae import LEVELS, VAE, VAEConfig
from openvision3.networks.perceptual import EfficientNetDistance, Lpips
from openvision3.settings import check_fields, flat, from_dict, read_json, save_config, to_dict, unknown, write_json

FORMAT = 1
MODEL, GENERATOR, CHAT = "openvision3", "openvision3-generator", "openvision3-chat"
KINDS = {
    MODEL: "an openvision3 model, which rebuilds and understands images; use it with openvision3 reconstruct",
    GENERATOR: "a generator, which draws images; use it with openvision3 generate",
    CHAT: "a chat model, which answers questions about images; use it with openvision3 chat",
}
"""by model type: what it is, and what it is for"""
T = TypeVar("T")
ASSETS = Path(__file__).parent / "assets"
EMBEDDED = ASSETS / "vae"
FILES = {"config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors", "README.md", "vae", FILE, FAMILIARITY}
"""All that a model folder may hold; a save refuses to replace anything else."""
_VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
VAE_LICENCES = {
    "embedded": "CC BY-SA 4.0 (OpenMoji) and public domain (Open Clip Art) training data; see the model card",
    "pixels": "none: no VAE",
}


@dataclass
class FolderConfig:
    """What config.json holds."""

    format: int
    """version of this layout"""
    size: int
    """side of the training images in pixels"""
    model: ModelConfig
    """settings of every part"""
    vocabulary: int
    """number of word pieces, special tokens included"""
    pad_id: int
    """id of [PAD]"""
    vae: dict[str, Any] = field(default_factory=dict)
    """name, sha256, licence, channels, stride, scale and shift of the VAE of the training"""
    training: dict[str, Any] = field(default_factory=dict)
    """recipe, steps, samples, data and precision of the training"""
    model_type: str = MODEL
    """tells other libraries which model this is"""


def shipped() -> list[str]:
    """Names that `load` takes without a path."""
    return shipped_in(ASSETS)


def save_model(
    folder: str | Path,
    model: OpenVision3,
    tokenizer: TextTokenizer,
    size: int,
    *,
    training: dict[str, Any] | None = None,
    card: str = "",
    dtype: torch.dtype | None = None,
    with_vae: bool | None = None,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a model folder, whole or not at all: it is written beside its place and renamed; an old model is removed last.

    `dtype` None keeps the weights' own. `with_vae` None includes the VAE if it is the embedded one.
    Pass `weights` to save them instead of the model's current parameters (when these are sharded or newer).

    Raises:
        ValueError: the target exists and is not a model folder, or holds more than a model.
    """
    if str(folder) in shipped():
        raise ValueError(f"{folder} is the name of a shipped model, which load would read instead; save to ./{folder} or another name")
    folder = Path(os.path.realpath(folder))  # a link stays a link: its target is replaced
    _check_replaceable(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"{folder.parent} is a file, so no folder can be made in it; name another place") from error
    making, old = folder.with_name(f".{folder.name}.making"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    try:
        origin = vae_origin(model.vae)
        if model.vae.network is not None and (with_vae or (with_vae is None and model.vae.name == "embedded")):
            origin["sha256"] = _save_vae(model.vae, making / "vae")
        vae_config = VAEConfig(model.vae.name or model.config.vae.name, model.vae.uses_shift)  # of the VAE that was loaded, not of the config
        config = FolderConfig(FORMAT, size, replace(model.config, vae=vae_config), model.vocabulary, model.pad_id, origin, training or {})
        save_config(config, making / "config.json")
        write_json(_preprocessor(size), making / "preprocessor_config.json")
        tokenizer.save(making / "tokenizer.json")
        frozen = {name: value for name, value in model.named_parameters() if not value.requires_grad and not name.startswith("vae.")}
        state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in (frozen | weights if weights else model.trained_state()).items()}
        save_file(state, making / "model.safetensors", metadata={"format": "pt"})
        (making / "model.safetensors").chmod((making / "config.json").stat().st_mode)  # safetensors makes files that only their owner may read
        (making / "README.md").write_text(card or model_card(config), encoding="utf-8", errors="backslashreplace")
        _take_place(making, folder, old)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _check_replaceable(folder: Path) -> None:
    if folder == Path.cwd() or folder in Path.cwd().parents:
        raise ValueError(f"{folder} is the working folder or holds it; name another folder")
    if not folder.exists():
        return
    held = {p.name for p in folder.iterdir()} if folder.is_dir() else {folder.name}
    if held and not ({"config.json", "model.safetensors"} <= held and _is_ours(folder)):
        raise ValueError(f"{folder} exists and is not a model folder; name a new one")
    if held - FILES:
        raise ValueError(f"{folder} holds more than a model ({', '.join(sorted(held - FILES)[:3])}), which a save would remove; name a new folder")


def _is_ours(folder: Path) -> bool:
    try:
        read_config(folder)
    except (ValueError, OSError):
        return False
    return True


def _take_place(making: Path, folder: Path, old: Path) -> None:
    """Rename `making` to `folder`. An old folder is removed afterwards, or put back if the rename fails."""
    replaced = folder.exists()
    if replaced:
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    try:
        os.replace(making, folder)
    except OSError:
        if replaced:
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def vae_origin(vae: VAE) -> dict[str, Any]:
    """What a model's config records of its VAE."""
    return {
        "name": vae.name,
        "sha256": vae.sha256,
        "licence": vae_licence(vae.name),
        "latent_channels": vae.latent_channels,
        "stride": vae.stride,
        "latent_scale": vae.scale,
        "latent_shift": vae.shift,
        "latent_mode": "mean",
    }


def _save_vae(vae: VAE, folder: Path) -> str:
    """Put the VAE into `folder` and return the sha256 of its weights.

    Its own file is copied if it can be found: the weights in memory may be rounded to bf16, and a load would refuse their sha256.
    """
    source = EMBEDDED if vae.name == "embedded" else Path(vae.name)
    for place in (source / "vae", source):
        if vae.sha256 and (place / _VAE_WEIGHTS).is_file() and sha256_of(place / _VAE_WEIGHTS) == vae.sha256:
            folder.mkdir()
            for name in ("config.json", _VAE_WEIGHTS, *([FILE] if (place / FILE).is_file() else [])):
                shutil.copyfile(place / name, folder / name)
            return vae.sha256
    vae.network.save_pretrained(folder)  # type: ignore[union-attr, operator]
    return sha256_of(folder / _VAE_WEIGHTS)


def weights_sha256(folder: Path) -> str:
    """The sha256 of a model folder's model.safetensors."""
    return sha256_of(folder / "model.safetensors")


def _preprocessor(size: int) -> dict[str, Any]:
    """The settings by which other libraries prepare images."""
    return {
        "do_resize": True,
        "do_normalize": True,
        "do_pad": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"longest_edge": size},
        "pad_to_multiple_of": 16,
    }


def complete_checkpoints(run: str | Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(p for p in (Path(run) / "checkpoints").glob("step-*") if (p / "run_state.json").is_file())


def latest_checkpoint(run: str | Path) -> Path | None:
    """The run's newest checkpoint; None where there is none, or where this process does not see the run folder."""
    return next(reversed(complete_checkpoints(run)), None)


def find_folder(name: str | Path, what: str = "model", place: Path = ASSETS) -> Path:
    """A name shipped in `place`, a folder, or a run folder (its newest checkpoint) -> the folder with config.json. `what` is the kind in words of errors.

    Raises:
        FileNotFoundError: it is none of these; names the most similar shipped one.
    """
    name, names = str(name), shipped_in(place)
    choices = ", ".join([*names, f"a {what} folder or a run folder"])
    if not name:
        raise FileNotFoundError(f"the name of a {what} is empty. Choose one of {choices}")
    if name in names:
        return place / name
    folder = Path(name)
    if (folder / "model.safetensors").is_file():
        return folder
    if (folder / "checkpoints").is_dir():
        if newest := latest_checkpoint(folder):
            return newest
        raise FileNotFoundError(f"the run {folder} has no complete checkpoint yet")
    if folder.is_dir():
        raise FileNotFoundError(f"{folder} is no {what}: it holds no model.safetensors; name a {what} folder or a run folder")
    if folder.is_file():
        raise FileNotFoundError(f"{name} is a file, which {holds(folder)}; name the {what} folder or run folder that it belongs to")
    raise FileNotFoundError(str(unknown(what, name, () if "/" in name else names, f"Choose one of {choices}")))


def write_folder(path: Path, config: Any, tensors: dict[str, Tensor], card: str) -> None:
    """A new folder of config.json, model.safetensors and README.md, as generators and chat models are kept. One that is not finished is removed."""
    path.mkdir(parents=True)
    try:
        save_config(config, path / "config.json")
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "model.safetensors").chmod((path / "config.json").stat().st_mode)
        (path / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def find_or_first(name: str | Path, what: str, place: Path) -> Path:
    """As `find_folder`; "" is the first of those shipped in `place`. Raises FileNotFoundError."""
    names = shipped_in(place)
    if not str(name) and not names:
        raise FileNotFoundError(f"no {what} comes with this version; name the folder or the run of one with --model, or train one: openvision3 train --help")
    return find_folder(str(name) or names[0], what, place)


def shipped_in(place: Path) -> list[str]:
    """Names of the models that come with the package in a folder of its assets."""
    return sorted(path.parent.name for path in place.glob("*/model.safetensors"))


def read_config(folder: Path) -> FolderConfig:
    """Raises FileNotFoundError; ValueError for another format version, or a config that is not ours."""
    return read_config_of(folder, FolderConfig, MODEL, FORMAT, free=("vae", "training"))


def read_config_of(folder: Path, config_type: type[T], kind: str, version: int, free: Collection[str] = ("training",)) -> T:
    """config.json of a model, a generator or a chat model, read strictly. `free` are fields that may hold any names.

    Raises:
        FileNotFoundError. ValueError: another kind (with what it is for), another version, or a field that does not fit.
    """
    path = folder / "config.json"
    values = read_json(path)
    seen = str(values.get("model_type"))
    if seen == MODEL and "vision_config" in values:
        raise ValueError(f"{folder} was written for transformers; open it with transformers.AutoModel, or name the model that it was exported from")
    if seen != kind and seen in KINDS:
        raise ValueError(f"{folder} is {KINDS[seen]} --model {folder}; name {KINDS[kind].partition(',')[0]}")
    if seen != kind:
        raise ValueError(f"{path} is not the config of {KINDS[kind].partition(',')[0]}; name a folder that openvision3 saved")
    if values.get("format") != version:
        raise ValueError(f"{path} is of format {values.get('format')}, this version of openvision3 reads format {version}; use the version that wrote it")
    unchecked = {name: values.pop(name, {}) for name in free}
    try:
        config = from_dict(config_type, values)
        for name, value in unchecked.items():
            setattr(config, name, check_fields(value, name))
    except (ValueError, TypeError) as error:  # TypeError: a field is missing
        raise ValueError(f"{path} cannot be used: {str(error).replace(f'{config_type.__name__}.__init__()', 'config')}") from error
    return config


def load_model(
    name: str | Path, *, device: str | torch.device = "cpu", vae_dtype: torch.dtype = torch.float32, vae: str = ""
) -> tuple[OpenVision3, TextTokenizer, FolderConfig]:
    """Read a model folder strictly. `vae` names the VAE's folder, if the name in the config is not found.

    Raises:
        FileNotFoundError, ValueError: one line on what is missing or does not fit.
    """
    folder = find_folder(name)
    config = read_config(folder)
    network = _load_recorded_vae(folder, config, vae_dtype, vae)
    tokenizer = TextTokenizer.load(folder / "tokenizer.json")
    if len(tokenizer) != config.vocabulary:
        raise ValueError(f"{folder}: tokenizer.json has {len(tokenizer)} pieces, the model was built for {config.vocabulary}")
    model = OpenVision3(config.model, network, config.vocabulary, config.pad_id)
    load_weights(model, folder)
    return model.to(device).eval(), tokenizer, config


def _load_recorded_vae(folder: Path, config: FolderConfig, dtype: torch.dtype, vae: str) -> VAE:
    """The VAE that `vae` names, else the one in the folder, else the one that the config names. It must be the VAE of the training."""
    inside = folder / "vae"
    source = vae or (str(inside) if inside.is_dir() else config.model.vae.name)
    try:
        network = load_vae(source, shift=config.model.vae.shift, dtype=dtype)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the VAE of {folder} is not found: {error}; name its folder with --vae, or load(..., vae=FOLDER)") from error
    own, trained = vae_origin(network), config.vae
    for name in ("latent_channels", "sha256", "latent_scale", "latent_shift"):
        if trained.get(name, own[name]) not in (own[name], ""):  # no sha256: the VAE had no file
            raise ValueError(f"{folder} was trained with a VAE of {name} {trained[name]}, but {source} has {own[name]}; name the VAE of the training")
    network.name = config.model.vae.name
    return network


def load_vae(name: str | Path, *, shift: bool | None = None, dtype: torch.dtype = torch.float32) -> VAE:
    """Read `embedded`, `pixels`, a folder in diffusers' layout (or a repository with a `vae` sub-folder), a hub id, or a VAE by its name in
    `openvision3 fetch --list`.

    Raises:
        FileNotFoundError: no such folder, or a hub id that is neither fetched nor in the hub's local cache.
        ValueError: the folder holds no VAE, a VAE of another class, or weights that do not fit its config.
    """
    name = str(name)
    if not Path(name).is_dir():
        from openvision3.fetch.sources import vae_hub

        name = vae_hub(name)
    if name == "pixels":
        return VAE(None, name=name)
    folder = _find_vae(name)
    weights = folder / _VAE_WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} holds no {weights.name}")
    try:
        kind = json.loads((folder / "config.json").read_text()).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not a config in diffusers' layout: {why_not(folder / 'config.json', 'JSON', error)}") from error
    if kind not in LEVELS:
        raise ValueError(f"{folder} holds a {kind}; choose one of {', '.join(LEVELS)}")
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    try:
        network, report = getattr(diffusers, kind).from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"the VAE in {folder} cannot be loaded: {weights.name}: {why_not(weights, 'safetensors', error)}") from error
    # diffusers leaves missing weights at random values
    misfits = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if misfits:
        raise ValueError(
            f"the weights in {folder} do not fit its config.json: {len(misfits)} are missing, unknown or of another shape; the first is {misfits[0]}"
        )
    return VAE(network, name=name, shift=shift, dtype=dtype, sha256=sha256_of(weights))


def vae_licence(name: str) -> str:
    return licence_of(name) or VAE_LICENCES.get(name, "unknown: see its source")


def _find_vae(name: str) -> Path:
    """embedded, a folder or a hub id -> the local folder that holds its config.json. Nothing is downloaded."""
    folder = EMBEDDED if name == "embedded" else Path(name)
    if not folder.is_dir():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise FileNotFoundError(
                f"no such VAE: {name}; choose embedded, pixels, a folder in diffusers' layout, a VAE of `openvision3 fetch --list` such as flux-vae, "
                "or a hub id such as black-forest-labs/FLUX.1-schnell"
            )
        from openvision3.fetch.store import find_hub

        files = ("config.json", _VAE_WEIGHTS)
        folder = find_hub(name, (tuple(f"vae/{file}" for file in files), files), "the VAE")
    for candidate in (folder / "vae", folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise ValueError(f"{folder} holds no VAE: neither it nor its sub-folder vae has a config.json in diffusers' layout")


def load_distance(loss: LossConfig) -> torch.nn.Module | None:
    """The network of the perceptual term, or None if the loss has no such term. Raises FileNotFoundError, ValueError."""
    if not loss.lambda_perceptual:
        return None
    if loss.perceptual == "efficientnet":
        return EfficientNetDistance()
    return Lpips(loss.perceptual.removeprefix("lpips-"), loss.lpips_backbone, loss.lpips_linear)


def start_from(model: OpenVision3, folder: Path) -> None:
    """Copy the weights of a model folder into a model that is to be trained further, if they mean the same there.

    Shapes that fit do not suffice: with another VAE, norm, GELU or kind of positions they are the same. What only training reads may differ.

    Raises:
        FileNotFoundError. ValueError: the weights do not fit, or mean something else here; names the first setting that differs.
    """
    saved = read_config(folder)
    if line := other_vae(saved, model.vae):
        raise ValueError(f"{folder} was trained {line}; set --model.vae.name to the VAE it was trained on, or start from another model")
    before, now = flat(to_dict(saved.model)), flat(to_dict(model.config))
    for name, value in now.items():
        if not name.startswith(("vae.", "loss.")) and name != "captioner.token_share" and before.get(name) != value:
            seen = before.get(name)
            part, _, setting = name.replace("_", "-").partition(".")
            option = f"--model.{part}.{'' if seen else 'no-'}{setting}" if isinstance(seen, bool) else f"--model.{part}.{setting} {seen}"
            raise ValueError(f"{folder} was trained with {name} {seen}, not {value}: its weights mean something else here; set {option}")
    load_weights(model, folder)


def other_vae(saved: FolderConfig, vae: VAE) -> str:
    """How the VAE of a model's training differs from this one, in words; "" if it does not."""
    digest, origin = saved.vae["sha256"], vae_origin(vae)
    if digest != vae.sha256:
        return f"with a VAE of sha256 {str(digest)[:12]}..., but {vae.name} has {str(vae.sha256)[:12]}... now"
    for name in ("latent_scale", "latent_shift"):
        if name in saved.vae and saved.vae[name] != origin[name]:
            return f"with {name} {saved.vae[name]} of its VAE, but {vae.name} has {origin[name]} now"
    return ""


def load_weights(model: OpenVision3, folder: Path) -> None:
    """Copy model.safetensors into `model`, strictly. Raises FileNotFoundError, ValueError."""
    copy_tensors(model.trained_state(), read_tensors(folder / "model.safetensors"), folder / "model.safetensors")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a model folder's file. Raises FileNotFoundError; ValueError for a damaged file."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path.parent} holds no {path.name}") from error
    except SafetensorError as error:
        if not str(path).isascii() and "UTF-8" in str(error):
            raise ValueError(f"{str(path)!a} is not UTF-8, which safetensors needs of a path; give the folder another name") from error
        raise ValueError(f"{path} is damaged or no model: {why_not(path, 'safetensors', error)}") from error


def copy_tensors(own: dict[str, Tensor], state: dict[str, Tensor], path: Path, unused: Collection[str] = ()) -> None:
    """Copy the tensors of the file at `path` into those of the same names, strictly but for `unused`. Raises ValueError."""
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys() - set(unused))
    if missing or extra:
        raise ValueError(
            f"{path} does not fit its config: {len(missing)} tensors missing ({', '.join(missing[:3])}), {len(extra)} unknown ({', '.join(extra[:3])})"
        )
    for key, value in own.items():
        if value.shape != state[key].shape:
            raise ValueError(f"{path}: {key} is {tuple(state[key].shape)}, this model needs {tuple(value.shape)}")
        value.copy_(state[key])


def model_card(config: FolderConfig, scores: str = "") -> str:
    """A hub model card: what it is, from what, under which terms."""
    training = "\n".join(f"- {name}: {value}" for name, value in flat(config.training).items()) or "- not recorded"
    licence = config.vae.get("licence", "unknown")
    return f"""---
library_name: openvision3
pipeline_tag: image-feature-extraction
license: other
---
# {config.model.encoder.size} encoder, {config.size} px

One encoder whose tokens serve both to rebuild an image and to understand it (OpenVision 3, arXiv 2601.15369), saved by `openvision3`.

```python
import openvision3 as ov3

model = ov3.load("THIS FOLDER")
tokens = model.encode("image.jpg")
```

Parts: encoder, latent decoder, text encoder, captioner. VAE: `{config.vae.get("name")}`, sha256 `{config.vae.get("sha256")}`, licence: {licence};
latents are the posterior mean times {config.vae.get("latent_scale")}, shifted by {config.vae.get("latent_shift")}.

## Training
{training}
{scores}"""
