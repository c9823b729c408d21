"""Choose and load the models of one evaluation, and choose the size of its images.

MODEL itself is opened by a function of the caller, because this package knows no model; `peers` loads the peers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from openvision3.evaluate.options import Options
from openvision3.evaluate.overlap import Known
from openvision3.evaluate.peers import published, table
from openvision3.evaluate.peers.own import is_own
from openvision3.evaluate.protocol import Functions
from openvision3.evaluate.results import NotRun
from openvision3.evaluate.suite import NEEDS

Say = Callable[[str], None]
"""Shows one line to a person."""


def silent(line: str) -> None:
    """Shows nothing."""


@dataclass
class Subject:
    """MODEL, opened by the caller."""

    functions: Functions
    vae: Functions | None = None
    """its VAE alone; None if this VAE has no network"""
    known: Sequence[Known] = ()
    """the recorded training data of MODEL and its VAE"""
    unknown: Sequence[str] = ()
    """which of the two have no record"""


@dataclass
class Subjects:
    """All models of one evaluation, loaded."""

    models: list[Functions]
    size: int
    """side of the images in pixels"""
    known: Sequence[Known] = ()
    unknown: Sequence[str] = ()


def choose_subjects(options: Options, kinds: Sequence[str]) -> tuple[list[str], list[NotRun]]:
    """(names of the models to load, models that can be measured in none of these kinds). Raises ValueError: an unknown name, or no model is left."""
    names = options.peer or (("ours", "vae") if "reconstruction" in kinds else ("ours",))
    names = tuple(dict.fromkeys((*names, *(("vae",) if "probe" in kinds and "ours" in names else ()))))
    known_names = ["ours", "vae", *table.PEERS, *published.ONLY]
    usable: list[str] = []
    not_run: list[NotRun] = []
    for name in names:
        if name not in known_names and not is_own(name):
            raise table.unknown_peer(name, known_names)
        can = [kind for kind, functions in NEEDS.items() if name in table.PEERS and set(functions) <= set(table.PEERS[name].can)]
        if name in published.ONLY:
            not_run.append(NotRun(name, kinds[0], f"{name} stands with published numbers only, of reconstruction"))
        elif name in table.PEERS and not set(can) & set(kinds):
            not_run.append(NotRun(name, kinds[0], f"{name} can be measured by {' and '.join(can)} only"))
        else:
            usable.append(name)
    if not usable:
        raise ValueError("; ".join(entry.needs for entry in not_run) + "; name a --peer that can be measured here, such as ours")
    return usable, not_run


def load_subjects(options: Options, names: Sequence[str], open_model: Callable[[Options], Subject], is_rebuilt: bool, say: Say) -> Subjects:
    """Load these models and choose the side of the images, which does not depend on the order of the names.

    The side is --size, else that of MODEL, else the largest of the peers; if images are to be rebuilt, of the peers that rebuild.

    Raises:
        ValueError: a --peer-folder whose peer is not measured, a model without a VAE, a peer that cannot be loaded.
        FileNotFoundError: missing weights.
    """
    folders = dict(pair.split("=", 1) for pair in options.peer_folder)
    unused = sorted(folders.keys() - {*names, *options.peer})
    if unused:
        raise ValueError(f"peer_folder names {unused[0]}, which is not among the peers {', '.join(names)}; add it to --peer")
    ours = open_model(options) if {"ours", "vae"} & set(names) else None
    models: list[Functions] = []
    for name in names:
        if ours and name == "ours":
            models.append(ours.functions)
        elif ours and name == "vae":
            models += [ours.vae] if ours.vae else []
        else:
            models.append(table.load_peer(name, folders.get(name, ""), options.device, options.precision))
            if models[-1].note.startswith("NOT "):
                say(f"{name}: {models[-1].note.split(';')[0]}")
    if len({model.name for model in models}) < len(models):
        raise ValueError(f"two models have the same name ({', '.join(model.name for model in models)}); give yours another one in its Functions")
    if not models or ("vae" in options.peer and ours and not ours.vae):
        raise ValueError("this model has no VAE to measure alone; leave vae out of --peer")
    if options.size:
        size, reason = options.size, "--size"
    elif ours:
        size, reason = ours.functions.size, f"the size of {options.model}"
    else:
        size = max([model.size for model in models if is_rebuilt and model.reconstruct] or [model.size for model in models])
        reason = "the largest size of a peer"
    if set(names) - {"ours", "vae"}:
        say(_sizes_in_words(models, size, reason, bool(options.size)))
    return Subjects(models, size, ours.known if ours else (), ours.unknown if ours else ())


def _sizes_in_words(models: Sequence[Functions], size: int, reason: str, is_named: bool) -> str:
    """One line about the size of the images and about models that take one size only."""
    others = [f"{model.name} {model.size} px" for model in models if model.fixed and model.size != size]
    fate = "images are resized for them and not rebuilt" if is_named else "they embed images of their own size, and rebuild none"
    return f"images of {size} px ({reason})" + (f"; one size only: {', '.join(others)}: {fate}" if others else "")
