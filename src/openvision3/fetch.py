"""Every foreign file that a command of this project can need: where it comes from, under which terms, and whether it is here.

`openvision3 fetch NAME` is the one thing here that downloads; training and evaluation only look: `find` and `find_hub` say what to fetch.
What is not known stands as unknown. Hashes are enforced: published ones always, others from the first fetch on (`fetched.json` beside the files).
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from openvision3.download import Downloaded, SourceError, check_url, download
from openvision3.files import sha256_of, write_whole

HUB = "https://huggingface.co"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class File:
    """One file of an asset; `name` is its place below the asset's folder and, on the hub, below the repository."""

    name: str
    urls: tuple[str, ...] = ()
    """where it is, the first that works; none: in the asset's hub repository"""
    sha256: str = ""
    """published or seen on bytes: all 64 digits, or the first 8 that torch.hub puts into names; empty: unknown"""
    hash_from: str = ""
    """where that hash stands"""
    size: int | None = None
    """bytes, where they are published with the hash or were seen"""


@dataclass(frozen=True)
class Asset:
    """What is fetched under one name, into a folder of that name."""

    name: str
    files: tuple[File, ...]
    needed_by: str
    licence: str = UNKNOWN
    hub: str = ""
    """id of its hub repository"""
    gated: bool = False
    """the hub wants its licence accepted first"""
    used_by: str = ""
    """how a command finds it where it is not in the default folder"""
    note: str = ""

    def __post_init__(self):
        if not self.used_by and self.needed_by.startswith("comparing"):
            object.__setattr__(self, "used_by", f"openvision3 evaluate ... --peer {self.name} --peer-folder {self.name}=FOLDER")

    @property
    def source(self) -> str:
        return f"{HUB}/{self.hub}" if self.hub else f"https://{urlsplit(self.files[0].urls[0]).hostname}"


def _vae(folder: str = "", sha256: str = "", hash_from: str = "", size: int | None = None) -> tuple[File, ...]:
    return File(f"{folder}config.json"), File(f"{folder}diffusion_pytorch_model.safetensors", (), sha256, hash_from, size)


_OPEN_CLIP = (File("open_clip_config.json"), File("open_clip_pytorch_model.bin"))
_LPIPS_WEIGHTS = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1"
_LPIPS_LICENCE = "channel weights BSD-2-Clause; backbone torchvision's BSD-3-Clause, trained on ImageNet, whose terms may bind too"
_LPIPS_SEEN = "seen on bytes in the PyPI wheel lpips 0.1.4"
_VAE_OPTION = "--model.vae.name FOLDER or --vae FOLDER"
_SEVERAL = "as several public repositories record it"

_ALL = (
    Asset(
        "flux-vae",
        _vae(
            "vae/",
            "f5b59a26851551b67ae1fe58d32e76486e1e812def4696a4bea97f16604d40a3",
            f"{_SEVERAL} for FLUX.1; huggingface.co/YuCollection/FLUX.1-schnell-Diffusers shows it for a copy",
            167_666_902,
        ),
        "the paper's recipes and the released OpenVision 3 encoders",
        "Apache-2.0",
        hub="black-forest-labs/FLUX.1-schnell",
        gated=True,  # since July 2025, says modal-labs/modal-examples pull request 1301
        used_by=_VAE_OPTION,
    ),
    Asset(
        "sd-vae",
        (
            File("config.json", (), "92d3dfb746fca211a2c9e019e285f8597412211728dce3c5bcf4eda0f2d62e7e", _SEVERAL, 547),
            File("diffusion_pytorch_model.safetensors", (), "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815", _SEVERAL, 334_643_276),
        ),
        "comparing VAEs",
        "MIT",
        hub="stabilityai/sd-vae-ft-mse",
        used_by=_VAE_OPTION,
    ),
    Asset("sd-vae-ema", _vae(), "comparing VAEs", "MIT", hub="stabilityai/sd-vae-ft-ema", used_by=_VAE_OPTION),
    Asset(
        "sd3-vae",
        _vae("vae/"),
        "comparing VAEs",
        "Stability AI Community License",
        hub="stabilityai/stable-diffusion-3-medium-diffusers",
        gated=True,
        used_by=_VAE_OPTION,
    ),
    Asset("taesd", _vae(), "small runs on SD's latents", "MIT", hub="madebyollin/taesd", used_by=_VAE_OPTION),
    Asset("taef1", _vae(), "small runs on FLUX.1's latents", "MIT", hub="madebyollin/taef1", used_by=_VAE_OPTION),
    Asset(
        "lpips-vgg",
        (
            File(
                "vgg16-397923af.pth",
                ("https://download.pytorch.org/models/vgg16-397923af.pth",),
                "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
                f"its name has the first 8 digits, the others {_SEVERAL}",
                553_433_881,
            ),
            File("vgg.pth", (f"{_LPIPS_WEIGHTS}/vgg.pth",), "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868", _LPIPS_SEEN, 7289),
        ),
        "the perceptual loss of high_res; LPIPS (VGG)",
        _LPIPS_LICENCE,
        used_by="--model.loss.lpips-backbone FOLDER/vgg16-397923af.pth --model.loss.lpips-linear FOLDER/vgg.pth",
    ),
    Asset(
        "lpips-alex",
        (
            File("alexnet-owt-7be5be79.pth", ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",), "7be5be79", "its name"),
            File("alex.pth", (f"{_LPIPS_WEIGHTS}/alex.pth",), "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0", _LPIPS_SEEN, 6009),
        ),
        "LPIPS (AlexNet)",
        _LPIPS_LICENCE,
        used_by="--model.loss.lpips-backbone FOLDER/alexnet-owt-7be5be79.pth --model.loss.lpips-linear FOLDER/alex.pth",
    ),
    Asset(
        "inception-2015",
        (
            File(
                "weights-inception-2015-12-05-6726825d.pth",
                (
                    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
                    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
                ),
                "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
                f"its name has the first 8 digits, the others {_SEVERAL}, under both URLs",
                95_628_359,
            ),
        ),
        "rFID (later gFID, sFID, Inception Score, precision and recall)",
        "unknown for the weights (converted from Google's); torch-fidelity's code is Apache-2.0",
        used_by="openvision3 evaluate ... --inception FOLDER/weights-inception-2015-12-05-6726825d.pth",
    ),
    Asset(
        "adm-imagenet256",
        (
            File(
                "VIRTUAL_imagenet256_labeled.npz",
                ("https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz",),
            ),
        ),
        "gFID, sFID, precision and recall against ImageNet 256",
        "unknown; it holds 10,000 pictures of ImageNet",
    ),
    Asset(
        "bert-base-uncased",
        (File("tokenizer.json"),),
        "the vocabulary of the paper's recipes",
        "Apache-2.0",
        hub="google-bert/bert-base-uncased",
        used_by="--tokenizer FOLDER/tokenizer.json",
    ),
    *(
        Asset(
            name,
            tuple(map(File, ("config.json", "preprocessor_config.json", "tokenizer.json", weights))),
            "comparing with CLIP",
            "MIT in github.com/openai/CLIP; its hub page shows none",
            hub=f"openai/{hub}",
        )
        for name, hub, weights in (("clip-b16", "clip-vit-base-patch16", "pytorch_model.bin"), ("clip-l14", "clip-vit-large-patch14", "model.safetensors"))
    ),
    Asset(
        "siglip-b16",
        tuple(map(File, ("config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"))),
        "comparing with SigLIP",
        "Apache-2.0",
        hub="google/siglip-base-patch16-224",
    ),
    *(
        Asset(
            name,
            (*_OPEN_CLIP, File("vocab.txt")),
            "comparing with OpenVision",
            "Apache-2.0 on the cards of its family",
            hub=f"UCSC-VLAA/{hub}",
            note="file names are those of its family, not looked up here",
        )
        for name, hub in (("openvision1-b16", "openvision-vit-base-patch16-224"), ("openvision1-l14", "openvision-vit-large-patch14-224"))
    ),
    Asset(
        "openvision2-l14",
        _OPEN_CLIP,
        "comparing with OpenVision 2",
        hub="UCSC-VLAA/openvision2-vit-large-patch14-224-vision-only",
        note="its card was not seen; others call it Apache-2.0",
    ),
    *(
        Asset(
            name,
            (_OPEN_CLIP[0], File("open_clip_pytorch_model.bin", (), sha256, hash_from)),
            "the authors' released encoders (with flux-vae)",
            hub=f"UCSC-VLAA/openvision3-vit-{hub}",
        )
        for name, hub, sha256, hash_from in (
            ("openvision3-b2-256", "base-patch2-32", "", ""),
            ("openvision3-b2-224", "base-patch2-28", "", ""),
            ("openvision3-l2-256", "large-patch2-32", "e08712b727e58f1e539f15a2eed96869972cd0f1cfe5baf9ef0b03207999eb69", "its page on the hub"),
        )
    ),
    *(
        Asset(
            f"rae-{name}",
            _vae(),
            "comparing with RAE (diffusers' AutoencoderRAE)",
            hub=f"nyu-visionx/RAE-{hub}-ViTXL-n08",
            note="file names are diffusers' usual ones, not looked up here",
        )
        for name, hub in (("dinov2", "dinov2-wReg-base"), ("mae", "mae-base-p16"), ("siglip2", "siglip2-base-p16-i256"))
    ),
    Asset(
        "unitok",
        (File("unitok_tokenizer.pth"),),
        "comparing with UniTok: put it into a checkout of github.com/FoundationVision/UniTok",
        "MIT",
        hub="FoundationVision/unitok_tokenizer",
        note="a pickle, which the checkout's own code opens",
    ),
)
ASSETS = {asset.name: asset for asset in _ALL}


# -- where things are ------------------------------------------------------------------------------------------------


def default_folder() -> Path:
    """$XDG_CACHE_HOME/openvision3 or ~/.cache/openvision3: where commands look for what was fetched."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "openvision3"


def named(name: str) -> Asset:
    """The asset of this name. Raises ValueError with the legal names and the nearest."""
    if name not in ASSETS:
        import difflib

        near = difflib.get_close_matches(name, ASSETS, 1, cutoff=0.3)
        raise ValueError(f"nothing is fetched under {name!r}; legal are all, {', '.join(ASSETS)}{f'; nearest is {near[0]}' if near else ''}")
    return ASSETS[name]


def find(name: str, file: str = "", *, needed_by: str = "", folder: Path | None = None) -> Path:
    """A fetched asset: the path of its `file` (or of its only one), else its folder. Nothing is downloaded.

    Looks into `folder`, or into the default one and then the caches of torch.hub and of the hub's client.

    Raises:
        FileNotFoundError: it is not here; says what to fetch. ValueError: it is damaged, or an unknown name.
    """
    asset = named(name)
    wanted = [f for f in asset.files if f.name == file] if file else list(asset.files)
    if not wanted:
        raise ValueError(f"{name} has no file {file!r}; legal are {', '.join(f.name for f in asset.files)}")
    one = wanted[0] if len(wanted) == 1 else None
    place = (folder or default_folder()) / name
    if all((place / f.name).is_file() for f in wanted):
        record = read_record(place)
        for f in wanted:
            _check_size(place / f.name, f, record)
        return place / one.name if one else place
    if folder is None:
        for cached in _in_other_caches(asset, wanted):
            return cached / one.name if one else cached
    what = file or (one.name if one else f"the {len(wanted)} files of {name}")
    raise FileNotFoundError(f"{needed_by or asset.needed_by} needs {what}; get it with `openvision3 fetch {name}` ({_terms(asset)}, {asset.source})")


def at_hand(path: str) -> str:
    """A path below the working folder as it is, or, where nothing is there, the same one below the default folder if it was fetched."""
    fetched = default_folder() / path
    return str(fetched) if not Path(path).exists() and fetched.is_file() else path


def find_hub(hub: str, choices: tuple[tuple[str, ...], ...], needed_by: str) -> Path:
    """The folder of a hub repository that holds all files of one of `choices`: fetched, or in the cache of the hub's client.

    Raises:
        FileNotFoundError: it is not here; says how to get it.
    """
    assets = [asset for asset in ASSETS.values() if asset.hub == hub]
    for files in choices:
        for folder in (default_folder() / asset.name for asset in assets):
            if all((folder / file).is_file() for file in files):
                return folder
        for cached in _in_hub_cache(hub, files):
            return cached
    if assets:
        raise FileNotFoundError(
            f"{needed_by} needs {hub}, which is not on this machine; get it with `openvision3 fetch {assets[0].name}` ({_terms(assets[0])}, {assets[0].source})"
        )
    raise FileNotFoundError(
        f"{needed_by} needs {hub}, which is not on this machine, and nothing is downloaded by itself; get it with `hf download {hub}`, "
        "or name a folder that holds it"
    )


def _terms(asset: Asset) -> str:
    licence = "licence unknown" if asset.licence == UNKNOWN else asset.licence
    return f"{licence}, gated" if asset.gated else licence


def _in_other_caches(asset: Asset, files: list[File]) -> list[Path]:
    """The folder that holds all of them already, from torch.hub or the hub's client; none: an empty list."""
    if asset.hub:
        return _in_hub_cache(asset.hub, tuple(f.name for f in files))
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torch"
    folder = Path(home).expanduser() / "hub" / "checkpoints"
    return [folder] if all((folder / f.name).is_file() for f in files) else []


def _in_hub_cache(hub: str, files: tuple[str, ...]) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(hub, file) for file in files]
    except HFValidationError:  # no legal id
        return []
    if not all(isinstance(path, str) for path in found):
        return []
    return [Path(str(found[0])).parents[files[0].count("/")]]


# -- what is recorded and checked ------------------------------------------------------------------------------------


def read_record(place: Path) -> dict[str, dict[str, Any]]:
    """What `fetched.json` says of each file: sha256, size, url, commit, when. Raises ValueError where it is no such file."""
    path = place / "fetched.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for entry in record.values():
            if not isinstance(entry["sha256"], str) or not isinstance(entry["size"], int):
                raise TypeError
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what fetch writes, so nothing can be compared with it; remove {place} and fetch again") from error
    return record


def _check_size(path: Path, file: File, record: dict[str, dict[str, Any]]) -> None:
    expected = record[file.name]["size"] if file.name in record else file.size
    seen = path.stat().st_size
    if expected is not None and seen != expected:
        raise ValueError(f"{path} has {seen:,} bytes, expected {expected:,}; it is damaged or another file: remove it and fetch again")


def _check_hash(subject: str, seen: str, file: File, record: dict[str, dict[str, Any]], todo: str) -> None:
    """Raises ValueError naming both hashes. `subject` has the hash that was seen."""
    recorded = record.get(file.name, {}).get("sha256", "")
    if not seen.startswith(file.sha256):
        first = "" if len(file.sha256) == 64 else "one that begins with "
        raise ValueError(f"{subject} sha256 {seen}, expected {first}{file.sha256} ({file.hash_from}); {todo}")
    if recorded and seen != recorded:
        raise ValueError(f"{subject} sha256 {seen}, expected {recorded} as first fetched; {todo}")


def _check_file(path: Path, file: File, record: dict[str, dict[str, Any]]) -> str:
    """The sha256 of a file that is here and is what it should be. Raises ValueError."""
    _check_size(path, file, record)
    seen = sha256_of(path)
    _check_hash(f"{path} has", seen, file, record, "it is damaged or another file: remove it and fetch again")
    return seen


def check(asset: Asset, folder: Path) -> list[str]:
    """Read every byte that is here; one line for each file that is not what it should be."""
    place, problems = folder / asset.name, []
    try:
        record = read_record(place)
    except ValueError as error:
        return [str(error)]
    for file in asset.files:
        path = place / file.name
        if path.is_file():
            try:
                _check_file(path, file, record)
            except ValueError as error:
                problems.append(str(error))
        elif file.name in record:
            problems.append(f"{path} is missing; fetch {asset.name} again")
    return problems


def state(asset: Asset, folder: Path) -> str:
    """absent, incomplete, here or damaged: from names and sizes alone, `check` reads the bytes."""
    place = folder / asset.name
    here = [file for file in asset.files if (place / file.name).is_file()]
    try:
        record = read_record(place)
        for file in here:
            _check_size(place / file.name, file, record)
    except ValueError:
        return "damaged"
    if len(here) == len(asset.files):
        return "here"
    return "incomplete" if here or any(place.glob("**/.*.part")) else "absent"


def describe(asset: Asset, folder: Path) -> dict[str, Any]:
    """One entry of the list, for --json; what is not known is null."""
    try:
        record = read_record(folder / asset.name)
    except ValueError:
        record = {}
    files = [
        {
            "name": file.name,
            "urls": list(_urls(asset, file)),
            "size": record[file.name]["size"] if file.name in record else file.size,
            "sha256": (record[file.name]["sha256"] if file.name in record else file.sha256) or None,
            "hash_from": "fetched.json" if file.name in record and not file.sha256 else file.hash_from or None,
        }
        for file in asset.files
    ]
    return {
        "name": asset.name,
        "needed_by": asset.needed_by,
        "licence": None if asset.licence == UNKNOWN else asset.licence,
        "gated": asset.gated,
        "source": asset.source,
        "state": state(asset, folder),
        "folder": str(folder / asset.name),
        "used_by": asset.used_by or None,
        "note": asset.note or None,
        "files": files,
    }


# -- fetching ----------------------------------------------------------------------------------------------------------


def fetch(asset: Asset, folder: Path) -> list[str]:
    """Have all files of an asset in `folder`, each checked; returns one line for each file.

    Raises:
        ValueError: a file has another hash than the one that is published or was recorded. OSError: source or disk.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder with --to")
    place, told = folder / asset.name, []
    for file in asset.files:
        path, record = place / file.name, read_record(place)
        if path.is_file():
            seen = _check_file(path, file, record)
            if file.name not in record:
                _write_record(place, file, Downloaded(seen, path.stat().st_size), "")
            told.append(f"{file.name}: was here, sha256 {seen[:12]}")
            continue
        got = _download(asset, file, path, record)
        told.append(f"{file.name}: {readable_size(got.size)}, sha256 {got.sha256[:12]}, {_proof(file, record)}")
    return told


def _proof(file: File, record: dict[str, Any]) -> str:
    if len(file.sha256) == 64:
        return "as published"
    return "as first fetched" if file.name in record else "recorded" + (" (its first digits as published)" if file.sha256 else "")


def _download(asset: Asset, file: File, path: Path, record: dict[str, Any]) -> Downloaded:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ValueError(f"{asset.name} is not here and HF_HUB_OFFLINE is set, so nothing is downloaded; unset it, or copy the files to {path.parent}")
    token = ""
    if asset.hub:
        from huggingface_hub import get_token

        token = get_token() or ""
    urls, place = _urls(asset, file), path.parents[file.name.count("/")]
    for i, url in enumerate(urls):

        def keep(got: Downloaded, url: str = url) -> None:
            todo = f"dropped; if its source has changed and the new one is wanted, remove {place / 'fetched.json'}" if file.name in record else "dropped"
            _check_hash(f"{url} came with", got.sha256, file, record, todo)
            _write_record(place, file, got, url)

        try:
            known = bool(file.sha256) or file.name in record
            return download(url, path, keep, what=f"{asset.name}: {path.name}", token=token, size=file.size, checked=known)
        except SourceError as error:
            if i + 1 == len(urls):
                raise _explained(asset, error, bool(token)) from error
    raise AssertionError("a file without a source")


def _explained(asset: Asset, error: SourceError, token: bool) -> SourceError:
    if asset.hub and error.status in (401, 403):
        page = f"{HUB}/{asset.hub}"
        sign = "the token of HF_TOKEN was shown" if token else "no token is set"
        todo = f"accept its licence on {page}, then set HF_TOKEN to a token of that account" if asset.gated or error.status == 403 else f"look at {page}"
        return SourceError(f"{asset.name}: {error} ({sign}); it is gated, or not there: {todo}", error.status)
    if error.status in (404, 410):
        return SourceError(f"{asset.name}: {error}; it has moved: say so to the authors of openvision3, or copy the file to its place by hand", error.status)
    return SourceError(f"{asset.name}: {error}", error.status)


def _urls(asset: Asset, file: File) -> tuple[str, ...]:
    if not asset.hub:
        return file.urls
    endpoint = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    check_url(endpoint)
    return (f"{endpoint}/{asset.hub}/resolve/main/{file.name}",)


def _write_record(place: Path, file: File, got: Downloaded, url: str) -> None:
    record = read_record(place)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    record[file.name] = {"sha256": got.sha256, "size": got.size, "url": url, "commit": got.commit, "fetched": when}
    write_whole(place / "fetched.json", json.dumps(record, indent=2) + "\n")


def readable_size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def size_in_words(files: list[dict[str, Any]]) -> str:
    """Of a `describe`d asset: unknown, 335 MB, or 168 MB + unknown where the size of some files is not known."""
    known = [file["size"] for file in files if file["size"] is not None]
    if not known:
        return UNKNOWN
    return readable_size(sum(known)) if len(known) == len(files) else f"{readable_size(sum(known))} + {UNKNOWN}"
