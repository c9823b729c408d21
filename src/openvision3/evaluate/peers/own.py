"""A model of the user's own as a peer: `--peer FILE.py:FUNCTION`, where FUNCTION(device, precision) returns `Functions`. See docs/peers.md.

Code of the file is run: name only one that you trust. Whatever goes wrong in its functions becomes one line that names the file.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openvision3.contents import short
from openvision3.evaluate.protocol import AnsweringFunctions, Functions
from openvision3.files import sha256_of

KINDS = tuple(field.name for field in fields(Functions) if "Callable" in str(field.type))
"""the fields of `Functions` that hold a function"""


def is_own(name: str) -> bool:
    """Whether the name of a peer is FILE.py:FUNCTION, rather than that of one we know."""
    return name.rpartition(":")[0].endswith(".py")


def load_own(name: str, device: str = "cpu", precision: str = "fp32") -> Functions:
    """Run FILE.py, call its FUNCTION(device, precision) and return its `Functions`, each guarded. `name` is FILE.py:FUNCTION.

    Raises:
        FileNotFoundError: no such file. ValueError: it cannot be run, has no such function, or the function returns something else.
    """
    model = _built(name, device, precision)
    if not isinstance(model, Functions):
        raise ValueError(f"{name} returned a {type(model).__name__}; return openvision3.evaluate.protocol.Functions")
    able = [kind for kind in KINDS if getattr(model, kind) is not None]
    if not able:
        raise ValueError(f"{name} returned Functions without any function; fill at least one of {', '.join(KINDS)}")
    if not isinstance(model.name, str) or not model.name or not isinstance(model.size, int) or model.size < 1:
        raise ValueError(f"{name} returned Functions of name {model.name!r} and size {model.size!r}; give it a name and a size in pixels")
    note = "; ".join(part for part in (model.note, _loaded_by(name)) if part)
    guarded: dict[str, Any] = {kind: _guarded(model, kind, name) for kind in able}
    return replace(model, note=note, **guarded)


def load_own_answering(name: str, device: str = "cpu", precision: str = "fp32") -> AnsweringFunctions:
    """The same for a FUNCTION that returns `AnsweringFunctions`: a model that answers questions. What it raises while answering is counted, not guarded."""
    model = _built(name, device, precision)
    if not isinstance(model, AnsweringFunctions):
        raise ValueError(f"{name} returned a {type(model).__name__}; return openvision3.evaluate.protocol.AnsweringFunctions")
    return replace(model, note="; ".join(part for part in (model.note, _loaded_by(name)) if part))


def _loaded_by(name: str) -> str:
    path = Path(name.rpartition(":")[0])
    return f"loaded by {path.name}, sha256 {sha256_of(path)[:12]}"


def _built(name: str, device: str, precision: str) -> Any:
    """What FUNCTION of FILE.py returns."""
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {file}; --peer FILE.py:FUNCTION names a Python file and a function in it that returns Functions")
    module = _imported(path)
    build = getattr(module, function, None)
    if not callable(build):
        defined = [key for key, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module.__name__]
        raise ValueError(f"{file} defines no function {function!r}; choose one of {', '.join(defined) or 'none: it defines no function'}")
    return _called(name, build, device, precision)


def _imported(path: Path) -> ModuleType:
    """The file as a module; modules beside it can be imported, as when Python runs it."""
    module_name = f"openvision3_peer_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    sys.path.append(str(path.resolve().parent))
    _called(str(path), spec.loader.exec_module, module)
    return module


def _called(what: str, function: Callable, *inputs: Any) -> Any:
    """Raises ValueError, in one line, for whatever foreign code raises."""
    try:
        with torch.no_grad():
            return function(*inputs)
    except Exception as error:
        raise ValueError(f"{what} failed: {type(error).__name__}: {short(error)}") from error


def _guarded(model: Functions, kind: str, name: str) -> Callable:
    """One function of the model, without gradient, its result on the CPU in fp32 and of the shape that `Functions` promises."""
    function = getattr(model, kind)
    what = f"{name}: {kind}"

    def checked(result: Any, rows: int, shape: Sequence[int] | None = None) -> Tensor:
        if not isinstance(result, Tensor):
            raise ValueError(f"{what} returned a {type(result).__name__}, not a tensor")
        if tuple(result.shape) != shape if shape else result.ndim != 2 or len(result) != rows:
            raise ValueError(f"{what} returned shape {tuple(result.shape)}, expected {shape or (rows, '...')}")
        if not result.isfinite().all():
            raise ValueError(f"{what} returned numbers that are not finite")
        return result.detach().float().cpu()

    def images_from(images: Tensor) -> Tensor:
        return checked(_called(what, function, images), len(images), tuple(images.shape)).clamp(-1, 1)

    def noisy_images_from(images: Tensor, sigmas: Sequence[float], keys: Sequence[str]) -> list[Tensor]:
        results = _called(what, lambda: list(function(images, sigmas, keys)))
        return [checked(result, len(images), tuple(images.shape)).clamp(-1, 1) for result in results]

    def captions_of(images: Tensor) -> list[str]:
        captions = _called(what, function, images)
        if not isinstance(captions, list) or len(captions) != len(images) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"{what} returned no list of {len(images)} captions, one for each image")
        return captions

    def vectors_of(rows: Any) -> Tensor:
        vectors = checked(_called(what, function, rows), len(rows))
        return vectors if kind == "features" else F.normalize(vectors, dim=1)

    guards: dict[str, Callable] = dict.fromkeys(("embed_images", "embed_texts", "features"), vectors_of)
    guards |= {"reconstruct": images_from, "reconstruct_noisy": noisy_images_from}
    guards |= {"caption": captions_of, "count_text": partial(_called, what, function)}
    return guards[kind]
