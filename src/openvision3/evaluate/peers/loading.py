"""What a foreign network needs before it can be measured: its files, their hash, and images and texts prepared as in its training.

Nothing is downloaded. Errors say in one line which files are missing, where to get them, and under which licence.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from openvision3.contents import contents, short, why_not
from openvision3.evaluate.protocol import Functions
from openvision3.fetch.sources import Asset, Model
from openvision3.fetch.store import find
from openvision3.files import sha256_of
from openvision3.networks import text_models


@dataclass(frozen=True)
class Request:
    """A peer to be loaded, its folder found."""

    asset: Asset
    folder: Path
    device: str
    precision: str

    @property
    def model(self) -> Model:
        assert self.asset.model is not None
        return self.asset.model

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def run(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """On the device, without gradient, in the requested precision; the result in fp32 on the CPU."""
        with torch.no_grad(), torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.precision == "bf16"):
            return function(*(tensor.to(self.device) for tensor in inputs)).float().cpu()

    def file(self, *names: str) -> Path:
        """The first of these files that the folder has. Raises FileNotFoundError."""
        for name in names:
            if (self.folder / name).exists():
                return self.folder / name
        raise FileNotFoundError(f"{self.folder} holds no {' or '.join(names)}; {what_is_needed(self.asset)}")

    def json(self, name: str) -> dict[str, Any]:
        try:
            values = json.loads(self.file(name).read_text(encoding="utf-8"))
            if isinstance(values, dict):
                return values
            raise ValueError(f"a {type(values).__name__}, not an object")
        except ValueError as error:
            raise ValueError(f"{self.folder / name} is no JSON object: {short(error)}; get it anew") from error

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError where the weights are another model's."""
        for name, expected in self.model.expects.items():
            if name in config and config[name] != expected:
                seen = f"{name} is {config[name]!r}, not {expected!r}"
                raise ValueError(f"{self.folder} holds no {self.asset.name}: {seen}; {what_is_needed(self.asset)}")

    def functions(
        self, can: Mapping[str, Callable], sha256: str, pixels: str, *, size: int = 0, note: str = "", dtype: str = "", fixed: bool = True
    ) -> Functions:
        """What the loaders return, with the facts of the table; `pixels` says how images become the input, and back."""
        asset, model = self.asset, self.model
        assert set(can) == set(model.can), f"{asset.name} can {sorted(can)}, its row says {sorted(model.can)}"
        notes = "; ".join(part for part in (other_weights(asset, sha256), model.note, note, f"images: {pixels}") if part)
        return Functions(asset.name, size or model.size, dtype or self.precision, sha256, asset.licence, note=notes, fixed=fixed, **can)


def other_weights(asset: Asset, sha256: str) -> str:
    """What a peer's rows have to say where its weights are known not to be the published ones; else ""."""
    published = [file.sha256 for file in asset.files if file.sha256 and file.name.endswith((".safetensors", ".bin"))]
    if len(published) != 1 or sha256 == published[0]:
        return ""
    return f"NOT the published weights: sha256 {sha256[:12]}..., theirs is {published[0][:12]}..."


def find_folder(asset: Asset, folder: str) -> Path:
    """The folder that was named, else the one of `openvision3 fetch`, else the one in the hub client's cache. Raises FileNotFoundError."""
    assert asset.model is not None
    if folder:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"no such folder: {folder}; {what_is_needed(asset)}")
        return Path(folder)
    if not asset.model.code:
        with contextlib.suppress(FileNotFoundError):
            return find(asset.name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(asset.hub, local_files_only=True))
    except Exception as error:  # the hub client raises a dozen kinds; all mean the same here
        raise FileNotFoundError(f"{asset.name} is not on this machine; {what_is_needed(asset)}") from error


def what_is_needed(asset: Asset) -> str:
    """Which files a peer needs, from where, under which licence, and what to do."""
    files = ", ".join(file.name for file in asset.files)
    place, folder = "", "their folder, if it is not the default one,"
    if asset.model is not None and asset.model.code:
        repository, *modules = asset.model.code
        place, folder = f", in a checkout of github.com/{repository} with {' and '.join(modules)}", "the checkout"
    return (
        f"it needs {files} of huggingface.co/{asset.hub} ({asset.licence}){place}: "
        f"openvision3 fetch {asset.name}, then name {folder} with --peer-folder {asset.name}=FOLDER"
    )


# -- images ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pixels:
    """Images (B, 3, H, W) in [-1, 1] -> a network's input (B, 3, size, size).

    Resizing is torch's, with antialiasing, on values that are not rounded to 8 bits in between as Pillow's are.
    """

    size: int
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)
    crop: bool = False
    """the short side becomes `size` and the centre is cut out; otherwise both sides become `size`"""
    mode: Literal["bicubic", "bilinear"] = "bicubic"

    def __call__(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        edge = min(height, width)
        sides = (self.size * height // edge, self.size * width // edge) if self.crop else (self.size, self.size)
        images = resize(images, *sides, self.mode)
        top, left = ((side - self.size) // 2 for side in sides)
        images = images[..., top : top + self.size, left : left + self.size]
        return (images / 2 + 0.5 - images.new_tensor(self.mean)[:, None, None]) / images.new_tensor(self.std)[:, None, None]


def resize(images: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Images of that size, antialiased and clamped to [-1, 1]; unchanged where they have it already."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images.float(), (height, width), mode=mode, antialias=True).clamp(-1, 1)


def pixels_of(config: Mapping[str, Any]) -> Pixels:
    """A preprocessor_config.json of transformers, old or new, as Pixels. Raises ValueError for what it lacks or we do not support."""
    try:
        crop = bool(config.get("do_center_crop", False))
        named = config["crop_size"] if crop else config["size"]
        size = named if isinstance(named, int) else named["height"]
        mode: Literal["bicubic", "bilinear"] = {2: "bilinear", 3: "bicubic"}[config.get("resample", 3)]  # type: ignore[assignment]
        edge = config["size"] if isinstance(config["size"], int) else config["size"].get("shortest_edge", config["size"].get("height"))
        if edge != size or (not isinstance(named, int) and named["width"] != size):
            raise ValueError(f"size {config['size']} with crop_size {config.get('crop_size')}")
        return Pixels(size, tuple(config["image_mean"]), tuple(config["image_std"]), crop, mode)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"preprocessor_config.json describes a preparation of images that is not supported: {short(error)}; only squares are") from error


def only_at(function: Callable[[Tensor], Tensor], size: int) -> Callable[[Tensor], Tensor]:
    """For a network that reconstructs squares of `size` only.

    Smaller images are not enlarged for it and averaged down again: more tokens per image would flatter it (5 dB from 128 to 256 px).

    Raises:
        ValueError: images of another size.
    """

    def reconstruct(images: Tensor) -> Tensor:
        if images.shape[-2:] != (size, size):
            raise ValueError(f"it reconstructs images of {size}x{size} only, not of {images.shape[-2]}x{images.shape[-1]}; measure at --size {size}")
        return function(images).clamp(-1, 1)

    return reconstruct


# -- texts ----------------------------------------------------------------------------------------------------------


class TextIds:
    """Texts -> ids (B, T) as a tokenizer.json says, cut to `positions` with the end token kept, padded with `pad_id` to all positions."""

    def __init__(self, path: Path, positions: int, pad_id: int):
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {why_not(path, 'JSON', error):.200}; get it anew") from error
        if not self.tokenizer.encode("").ids:
            raise ValueError(f"{path} adds no end token, from which the embedding is read; get the file that lies beside the weights")
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(positions)
        self.positions, self.pad_id = positions, pad_id

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = [self.tokenizer.encode(text).ids for text in texts]
        return torch.tensor([row + [self.pad_id] * (self.positions - len(row)) for row in rows])


class WordPieceIds:
    """Texts -> ids (B, T) as OpenVision 1 was trained on them: begin token, pieces, end token, padding, and the class token in the last place."""

    BEGIN, END, CLASS, PAD = 1, 2, 101, 0

    def __init__(self, path: Path, positions: int):
        from tokenizers import BertWordPieceTokenizer

        try:
            self.tokenizer = BertWordPieceTokenizer.from_file(str(path), lowercase=True)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{path} is not a WordPiece vocabulary: {short(error)}; get it anew") from error
        if self.tokenizer.token_to_id("[CLS]") != self.CLASS:
            raise ValueError(f"{path} has [CLS] at {self.tokenizer.token_to_id('[CLS]')}, not at {self.CLASS}: it is not OpenVision's; get it anew")
        self.positions = positions

    def __call__(self, texts: Sequence[str]) -> Tensor:
        clean = [" ".join(html.unescape(html.unescape(text)).split()) for text in texts]
        pieces = [self.tokenizer.encode(text, add_special_tokens=False).ids[: self.positions - 3] for text in clean]
        return torch.tensor([[self.BEGIN, *row, self.END, *[self.PAD] * (self.positions - 3 - len(row)), self.CLASS] for row in pieces])


# -- files and libraries -------------------------------------------------------------------------------------------------


def shards(path: Path) -> list[Path]:
    """The files of weights: the path itself or, for an index of shards, the shards. Raises FileNotFoundError where one is missing."""
    if not path.name.endswith(".index.json"):
        return [path]
    parts = [path.parent / name for name in sorted(set(json.loads(path.read_text())["weight_map"].values()))]
    for shard in parts:
        if not shard.is_file():
            raise FileNotFoundError(f"{path} names {shard.name}, which is not beside it; get it anew")
    return parts


def weights_sha256(files: Iterable[Path]) -> str:
    """Of one file its own hash; of several the hash of their hashes in hexadecimal, joined in the order of their names."""
    hashes = [sha256_of(path) for path in sorted(files)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def library_of(name: Literal["diffusers", "transformers"]) -> Any:
    """The library, quiet. Raises ValueError where it is not installed."""
    if name == "transformers":
        return text_models.library()
    import diffusers as library  # in any installation

    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


@contextlib.contextmanager
def one_line_errors(request: Request) -> Iterator[None]:
    """Turn what the libraries that read weights raise into a ValueError of one line."""
    try:
        yield
    except (ValueError, LookupError, OSError, EOFError, RuntimeError, TypeError, AttributeError, ImportError, SafetensorError, UnpicklingError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else short(error)
        if isinstance(error, SafetensorError | EOFError) or "Unable to load weights" in what:
            files = sorted(file for ending in ("safetensors", "bin") for file in request.folder.glob(f"*.{ending}"))
            kinds = {file.name: contents(file) for file in files}
            foreign = [f"{name} holds {kind}" for name, kind in kinds.items() if not kind.startswith(("safetensors", "a PyTorch", "a Python pickle"))]
            what = foreign[0] if foreign else "its file of weights is cut short or damaged; get it anew"
        raise ValueError(f"{request.asset.name} cannot be loaded from {request.folder}: {what}") from error


def check_complete(request: Request, misfits: Sequence[Any]) -> None:
    """Raises ValueError where weights are missing: the libraries would go on with random ones."""
    if misfits:
        raise ValueError(f"the weights in {request.folder} do not fit its config.json: {len(misfits)} missing or of another shape; the first is {misfits[0]}")
