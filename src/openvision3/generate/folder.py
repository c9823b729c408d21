"""A generator as a folder: config.json, model.safetensors (the network and the statistics of the tokens), README.md.

It names the model whose tokens it draws, with the sha256 of its weights, and is refused with another. Loads are strict.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvision3 import hub
from openvision3.generate.config import VAE_TOKENS, GenerateConfig
from openvision3.generate.dit import DiTConfig
from openvision3.generate.flow import FlowConfig
from openvision3.generate.public import SUFFIXES, read_public
from openvision3.generate.rae import RAE
from openvision3.generate.space import open_space
from openvision3.hub import GENERATOR
from openvision3.settings import flat, to_dict

FORMAT = 1
SHIPPED = hub.ASSETS / "generators"
PUBLIC_DROP = 0.1
"""share of the rows that RAE trains without their label"""


@dataclass
class GeneratorConfig:
    """What config.json holds."""

    format: int
    """version of this layout"""
    size: int
    """side of the images in pixels"""
    tokens: str
    """the name of the model whose tokens are drawn"""
    tokens_sha256: str
    """the sha256 of its weights"""
    condition: str
    """label, text or none"""
    label_names: tuple[str, ...]
    """names of the classes"""
    drop: float
    """share of the rows that were trained without their condition"""
    dit: DiTConfig
    """the network"""
    flow: FlowConfig
    """what it predicts"""
    training: dict[str, Any] = field(default_factory=dict)
    """recipe, steps, samples, data and precision of the training"""
    model_type: str = GENERATOR
    """tells other programs which model this is"""


def shipped() -> list[str]:
    """Names of generators that come with the package."""
    return hub.shipped_in(SHIPPED)


def save(path: Path, rae: RAE, label_names: tuple[str, ...], *, training: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write the folder of a generator. `weights` are those of the whole RAE by name; of them the network and the statistics are kept.

    `dtype` torch.bfloat16 halves what is trained; statistics, frequencies and stored positions keep theirs. A folder that is not finished is removed.
    """
    config = rae.config
    record = GeneratorConfig(
        FORMAT, config.size, config.tokens, rae.space.sha256, config.condition, label_names, config.drop, config.dit, config.flow, training
    )
    kept = {name: value for name, value in weights.items() if name.startswith(("dit.", "statistics."))}
    fixed = {f"dit.{name}" for name, _ in rae.dit.named_buffers()}
    state = {name: value.detach().to("cpu", dtype if name.startswith("dit.") and name not in fixed else None).contiguous() for name, value in kept.items()}
    hub.write_folder(path, record, state, card(record))


def find(name: str | Path) -> Path:
    """A shipped generator ("" is the first), the folder of one, or a run -> the folder with config.json. Raises FileNotFoundError."""
    return hub.find_or_first(name, "generator", SHIPPED)


def read(folder: Path) -> GeneratorConfig:
    """Raises FileNotFoundError; ValueError for another kind of model, or another version."""
    return hub.read_config_of(folder, GeneratorConfig, GENERATOR, FORMAT)


def load(name: str | Path, *, precision: str = "fp32", tokens: str = "", heads: tuple[int, int] = (0, 0)) -> tuple[RAE, GeneratorConfig, Path]:
    """Read a generator strictly, with the model whose tokens it draws; `tokens` names that one, if the name in its config is not found.

    Or read RAE's public weights; `tokens` must name their RAE, and `heads` the attention heads of trunk and head where the file does not tell them.

    Raises:
        FileNotFoundError, ValueError: one line on what is missing or does not fit.
    """
    if str(name).endswith(SUFFIXES):
        return _load_public(Path(name), precision, tokens, heads)
    folder = find(name)
    config = read(folder)
    _refuse_other_heads(folder, config.dit, heads)
    try:
        space = open_space(tokens or config.tokens, precision)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the model whose tokens {folder} draws is not found: {error}; name it with --tokens") from error
    rae = RAE(_settings(config), space, len(config.label_names))
    if space.sha256 != config.tokens_sha256:
        raise ValueError(
            f"{folder} draws tokens of {config.tokens} with sha256 {config.tokens_sha256[:12]}..., "
            f"but {tokens or config.tokens} has {space.sha256[:12]}... now; name the model it was trained with in --tokens"
        )
    load_weights(rae, hub.read_tensors(folder / "model.safetensors"), folder)
    return rae.eval(), config, folder


def _load_public(path: Path, precision: str, tokens: str, heads: tuple[int, int]) -> tuple[RAE, GeneratorConfig, Path]:
    """RAE's public weights as the generator of the tokens that they were trained on, whose normalisation belongs to their RAE. Classes have numbers alone."""
    public = read_public(path, heads)
    _refuse_other_heads(path, public.config, heads)
    if not tokens:
        raise ValueError(f"{path} does not say whose tokens it draws; name its RAE, such as --tokens peer:rae-dinov2")
    space = open_space(tokens, precision)
    if space.channels != public.channels:
        raise ValueError(f"{path} draws tokens of {public.channels} channels, and those of {tokens} have {space.channels}; name its RAE in --tokens")
    names = tuple(str(number) for number in range(public.classes))
    training = {"recipe": f"RAE's public weights, {path.name}"}
    config = GeneratorConfig(FORMAT, space.size, tokens, space.sha256, "label", names, PUBLIC_DROP, public.config, FlowConfig(predict="velocity"), training)
    rae = RAE(_settings(config), space, public.classes)
    hub.copy_tensors(rae.dit.state_dict(), public.weights, path)
    return rae.eval(), config, path


def _refuse_other_heads(path: Path, network: DiTConfig, heads: tuple[int, int]) -> None:
    if heads not in ((0, 0), (network.heads, network.head_heads)):
        raise ValueError(f"{path} has {network.heads} and {network.head_heads} attention heads, not {heads[0]} and {heads[1]}; leave --heads out")


def _settings(config: GeneratorConfig) -> GenerateConfig:
    """The settings that a network of this folder is built by."""
    condition: Any = config.condition
    settings = GenerateConfig(size=config.size, condition=condition, drop=config.drop, flow=config.flow)
    settings.tokens, settings.dit = config.tokens, config.dit
    return settings


def load_weights(rae: RAE, state: dict[str, Tensor], folder: Path, *, statistics: bool = True) -> None:
    """Copy the tensors of model.safetensors into the network and, with `statistics`, into the statistics. Raises ValueError."""
    parts = ("dit.", "statistics.") if statistics else ("dit.",)
    unused = () if statistics else [name for name in state if name.startswith("statistics.")]
    hub.copy_tensors({name: value for name, value in rae.state_dict().items() if name.startswith(parts)}, state, folder, unused)


def start_from(rae: RAE, name: str) -> None:
    """Copy the network of another generator, which may be of another size of images, into one that is to be trained further; or RAE's public weights.

    Raises:
        FileNotFoundError. ValueError: it draws other tokens, or tokens normalised otherwise, on another condition, or is another network.
    """
    now = rae.config
    if name.endswith(SUFFIXES):
        public = read_public(name, (now.dit.heads, now.dit.head_heads))
        _refuse_other(name, {"condition": "label", "dit": to_dict(public.config), "flow": {"predict": "velocity"}}, now)
        return hub.copy_tensors(rae.dit.state_dict(), public.weights, Path(name))
    folder = find(name)
    before = read(folder)
    if before.tokens_sha256 != rae.space.sha256:
        raise ValueError(
            f"{folder} draws the tokens of {before.tokens} with sha256 {before.tokens_sha256[:12]}..., not those of {now.tokens}; set --tokens alike"
        )
    state = hub.read_tensors(folder / "model.safetensors")
    was = {"condition": before.condition, "dit": to_dict(before.dit), "flow": {"predict": before.flow.predict}}
    _refuse_other(str(folder), was, now, normalised=bool(state["statistics.count"]))
    load_weights(rae, state, folder, statistics=False)


def _refuse_other(name: str, before: dict[str, Any], now: GenerateConfig, normalised: bool | None = None) -> None:
    """Raises ValueError for the settings of these weights that the config does not have: they would mean something else there."""
    settings = flat(to_dict(now))
    others, options = [], []
    for setting, seen in flat(before).items():
        if seen != settings[setting] and not (setting.endswith("mlp") and seen == _hidden(now, setting)):
            part, _, last = setting.replace("_", "-").rpartition(".")
            option = f"{part}.{'no-' if seen is False else ''}{last}".removeprefix(".")
            others.append(f"with {setting} {seen}, not {settings[setting]}")
            options.append(f"--{option}" if isinstance(seen, bool) else f"--{option} {seen}")
    if normalised is not None and normalised != bool(now.statistics):
        others.append("on normalised tokens" if normalised else "on tokens as they are")
        options.append(f"--statistics {50_000 if normalised else 0}")
    if others:
        raise ValueError(f"{name} was trained {' and '.join(others)}; set {' '.join(options)}")


def _hidden(config: GenerateConfig, setting: str) -> int:
    """The hidden channels that dit.mlp or dit.head_mlp stand for."""
    size = config.dit.head if "head" in setting else config.dit.trunk
    return size.mlp if size is not None else 0


def card(config: GeneratorConfig) -> str:
    """A hub model card: what it draws, from what, how it was trained."""
    training = "\n".join(f"- {name}: {value}" for name, value in flat(config.training).items()) or "- not recorded"
    source = "latents of the VAE" if config.tokens.startswith(VAE_TOKENS) else "tokens of"
    return f"""---
library_name: openvision3
pipeline_tag: {"text-to-image" if config.condition == "text" else "unconditional-image-generation"}
license: other
---
# A generator of images of {config.size} px

A diffusion transformer (RAE, arXiv 2510.11690) that draws {source} `{config.tokens.removeprefix(VAE_TOKENS)}`, sha256 `{config.tokens_sha256}`,
saved by `openvision3`.

```python
import openvision3 as ov3

generator = ov3.load_generator("THIS FOLDER")
```

## Training
{training}
"""
