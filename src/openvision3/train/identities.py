"""What a run reads, known by what it holds: a run goes on where the same lies under another path, and not where something else lies under the old one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openvision3.data.identity import digest
from openvision3.data.images import ImageError
from openvision3.data.latents.read import CachedSource, LatentCache
from openvision3.data.sources import LOOKED_AT, Source, is_fetched, keep_labels, labels_of
from openvision3.data.text import TextTokenizer
from openvision3.files import sha256_of
from openvision3.model.vae import VAE
from openvision3.settings import flat, load_config, to_dict
from openvision3.train.config import RunConfig

FILE = "identities.json"
"""in a run folder: what `of_inputs` gave when the run was started"""

LABELS = "labels"

MOVABLE = ("data", "val", "latents", "tokenizer", "model.vae.name", "model.loss.lpips_backbone", "model.loss.lpips_linear")
"""fields of a RunConfig that say where something lies"""


@dataclass(frozen=True)
class Input:
    """One field of MOVABLE when a run was started and now, each as a person writes it; `same` tells whether it holds the same."""

    field: str
    before: str
    now: str
    same: bool

    @property
    def moved(self) -> bool:
        return self.before != self.now

    def __str__(self) -> str:
        return f"{self.field} lies at {self.now} now, and holds what it held at {self.before}"


def of_source(source: Source) -> str:
    """A digest of the images (see `Source.identity`) and of some captions; "" where a cache of latents stands for the images."""
    if isinstance(source, CachedSource):
        return ""
    captions: list[object] = []
    for index in () if is_fetched(source) else range(0, len(source), max(1, len(source) // LOOKED_AT)):
        try:
            captions.append(tuple(source.captions(index)))
        except ImageError as error:
            captions.append(error.reason)
    return digest(source.identity(), captions)


def of_tokenizer(tokenizer: TextTokenizer) -> str:
    return hashlib.sha256(tokenizer.tokenizer.to_str().encode()).hexdigest()


def of_inputs(config: RunConfig, source: Source, held_out: Source, vae: VAE, cache: LatentCache | None, tokenizer: TextTokenizer) -> dict[str, Any]:
    """{field of MOVABLE: digest} of what a run reads, "" for what it does not read; and the labels of `data` and `val`, which are no part of it."""
    loss = config.model.loss
    lpips = bool(loss.lambda_perceptual) and loss.perceptual.startswith("lpips")

    def weights(path: str) -> str:
        return sha256_of(path) if lpips and Path(path).is_file() else ""  # the network says what is missing

    return {
        "data": of_source(source),
        "val": of_source(held_out),
        "latents": cache.sha256 if cache is not None else "",
        "tokenizer": of_tokenizer(tokenizer),
        "model.vae.name": digest(vae.sha256, vae.scale, vae.shift),
        "model.loss.lpips_backbone": weights(loss.lpips_backbone),
        "model.loss.lpips_linear": weights(loss.lpips_linear),
        LABELS: {"data": labels_of(source), "val": labels_of(held_out)},
    }


def compared(run: Path, config: RunConfig, now: dict[str, Any]) -> list[Input]:
    """What `run` was started with beside what `config` names and `now` holds; nothing for a run of an older version, which recorded no identities.

    The run keeps its own copy of the tokenizer: another path is looked at, the old one need not be there any more.

    Raises:
        ValueError: identities.json cannot be read, or the file of a tokenizer.
    """
    if not (run / FILE).is_file():
        return []
    recorded = _recorded(run)
    places = [flat(to_dict(each)) for each in (load_config(RunConfig, run / "config.json"), config)]
    inputs = []
    for name in MOVABLE:
        before, after = (_written(each[name]) for each in places)
        digest_now = now[name]
        if name == "tokenizer" and before != after:
            digest_now = of_tokenizer(TextTokenizer.load(config.tokenizer)) if config.tokenizer else ""
        gone = name == "data" and before == after and "" in (recorded.get(name), digest_now)  # the cache of latents stands for the data, and is compared itself
        inputs.append(Input(name, before, after, gone or recorded.get(name) == digest_now))
    return inputs


def _recorded(run: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{run / FILE} cannot be read ({error}); delete it, and name everything where it lay when the run was started") from error


def keep_names(run: Path, source: Source, held_out: Source) -> None:
    """Samples of a run that goes on keep the keys under which `run` has listed some as unusable, wherever they lie now."""
    if (run / FILE).is_file():
        before = _recorded(run)[LABELS]
        keep_labels(source, before["data"])
        keep_labels(held_out, before["val"])


def refuse_other(run: Path, inputs: Iterable[Input]) -> None:
    """Raises ValueError for the first of `inputs` that holds something else than when `run` was started."""
    for each in inputs:
        option = f"--{each.field.replace('_', '-')}"
        if not each.same and each.moved:
            raise ValueError(
                f"{each.field} was {each.before} when {run} was started and cannot become {each.now}, which holds something else; "
                f"name where the same lies now with {option}, or start a new run with --init {run}"
            )
        if not each.same:
            raise ValueError(
                f"{each.field}: {each.now} no longer holds what it held when {run} was started; "
                f"put that back, name where it lies now with {option}, or start a new run with --init {run}"
            )


def _written(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
