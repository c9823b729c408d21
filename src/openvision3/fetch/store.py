"""Which files of others are on this machine, and fetching those that are not: `openvision3 fetch NAME`.

Nothing else downloads them: training and evaluation call `find` and `find_hub`, which say what to fetch. Hashes are enforced:
published ones always, others from the first fetch on (`fetched.json` beside the files). `sources.py` lists the files.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from openvision3.contents import holds
from openvision3.fetch.download import Source, SourceError, download, locate_on_hub
from openvision3.fetch.sources import ASSETS, HUB, UNKNOWN, Asset, File, find_asset
from openvision3.files import sha256_of, write_whole

# -- where things are ------------------------------------------------------------------------------------------------


def default_folder() -> Path:
    """$XDG_CACHE_HOME/openvision3 or ~/.cache/openvision3: where commands look for what was fetched."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "openvision3"


def find(name: str, file: str = "", *, needed_by: str = "", folder: Path | None = None) -> Path:
    """A fetched asset: the path of its `file` (or of its only one), else its folder. Nothing is downloaded.

    Looks into `folder`, or into the default one and then the caches of torch.hub and of the hub's client.

    Raises:
        FileNotFoundError: it is not here; says what to fetch. ValueError: it is damaged, or an unknown name.
    """
    asset = find_asset(name)
    wanted = [f for f in asset.files if f.name == file] if file else list(asset.files)
    if not wanted:
        raise ValueError(f"{name} has no file {file!r}; choose one of {', '.join(f.name for f in asset.files)}")
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
    raise FileNotFoundError(f"{needed_by or asset.needed_by} needs {what}; get it with `openvision3 fetch {name}` ({asset.terms})")


def at_hand(path: str) -> str:
    """The path itself if it exists or was not fetched, else the same path below the default folder."""
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
        raise FileNotFoundError(f"{needed_by} needs {hub}, which is not on this machine; get it with `openvision3 fetch {assets[0].name}` ({assets[0].terms})")
    raise FileNotFoundError(
        f"{needed_by} needs {hub}, which is not on this machine, and nothing is downloaded by itself; get it with `hf download {hub}`, "
        "or name a folder that holds it"
    )


def _in_other_caches(asset: Asset, files: list[File]) -> list[Path]:
    """The folder of torch.hub or of the hub's client that holds all of them, in a list; an empty list if there is none."""
    if asset.hub:
        return _in_hub_cache(asset.hub, tuple(f.name for f in files))
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torch"
    folder = Path(home).expanduser() / "hub" / "checkpoints"
    return [folder] if all((folder / f.name).is_file() for f in files) else []


def _in_hub_cache(hub: str, files: tuple[str, ...]) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        paths = [try_to_load_from_cache(hub, file) for file in files]
    except HFValidationError:  # not the id of a repository
        return []
    if not all(isinstance(path, str) for path in paths):
        return []
    return [Path(str(paths[0])).parents[files[0].count("/")]]


# -- what is recorded and checked ------------------------------------------------------------------------------------


def read_record(place: Path) -> dict[str, dict[str, Any]]:
    """The entries of `fetched.json`: sha256, size, url, commit and time of each file. Raises ValueError where the file is something else."""
    path = place / "fetched.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for entry in record.values():
            if not isinstance(entry["sha256"], str) or not isinstance(entry["size"], int):
                raise TypeError
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} was not written by fetch, so nothing can be compared with it; remove {place} and fetch again") from error
    return record


def _check_size(path: Path, file: File, record: dict[str, dict[str, Any]]) -> None:
    expected = record[file.name]["size"] if file.name in record else file.size
    seen = path.stat().st_size
    if expected is not None and seen != expected:
        raise ValueError(f"{path} has {seen:,} bytes, expected {expected:,}, and {holds(path)}; it is damaged or another file: remove it and fetch again")


def _check_hash(path: Path, file: File, record: dict[str, dict[str, Any]], advice: str) -> str:
    """The sha256 of a file. Raises ValueError naming both hashes where it is not the published or the recorded one."""
    seen = sha256_of(path)
    for expected, whose in ((file.sha256, f"({file.hash_from})"), (record.get(file.name, {}).get("sha256", ""), "as first fetched")):
        if expected and seen != expected:
            raise ValueError(f"{path} has sha256 {seen}, expected {expected} {whose}; {advice}")
    return seen


def _check_file(path: Path, file: File, record: dict[str, dict[str, Any]]) -> str:
    """The sha256 of a file that is here and is what it should be. Raises ValueError."""
    _check_size(path, file, record)
    return _check_hash(path, file, record, "it is damaged or another file: remove it and fetch again")


def check_published(name: str, file: str, path: Path) -> None:
    """Raises ValueError where `path` has another sha256 than the published one of this file of an asset, if there is one."""
    published = next(f for f in find_asset(name).files if f.name == file)
    _check_hash(path, published, {}, f"its numbers would not be those of the published file; get it with `openvision3 fetch {name}`")


def check(asset: Asset, folder: Path) -> list[str]:
    """Read the files that are here; returns one line for each that is not what it should be."""
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
    """absent, incomplete, here or damaged, from names and sizes only; `check` reads the bytes."""
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
    """The entry of an asset in --list --json; what is not known is null."""
    try:
        record = read_record(folder / asset.name)
    except ValueError:
        record = {}
    files = [
        {
            "name": file.name,
            "urls": list(file.urls) or [f"{HUB}/{asset.hub}/resolve/main/{file.name}"],
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
    """Fetch the files of an asset that are not in `folder`, and check all of them; returns one line for each file.

    Raises:
        ValueError: a file has another hash than the one that is published or was recorded. OSError: source or disk.
    """
    place, lines = folder / asset.name, []
    for file in asset.files:
        path, record = place / file.name, read_record(place)
        source = None if path.is_file() else _download(asset, file, path, record)
        sha256, size = _check_file(path, file, record), path.stat().st_size
        if source is not None or file.name not in record:
            _write_record(place, file, source or Source(""), sha256, size)
        if source is None:
            lines.append(f"{file.name}: was here, sha256 {sha256[:12]}")
        else:
            proof = "as published" if file.sha256 else "as first fetched" if file.name in record else "recorded"
            lines.append(f"{file.name}: {readable_size(size)}, sha256 {sha256[:12]}, {proof}")
    return lines


def _download(asset: Asset, file: File, path: Path, record: dict[str, Any]) -> Source:
    """Fetch a file from the first of its sources that gives it. Raises ValueError, SourceError, OSError."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{asset.name} is not here and HF_HUB_OFFLINE is set, so nothing is downloaded; unset it, or copy the files to {path.parent}")
    recorded = record.get(file.name, {}).get("sha256", "")
    failure: SourceError | None = None
    for url in file.urls or ("",):
        try:
            source = Source(url) if url else locate_on_hub(asset.hub, file.name, (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/"))
            sha256 = file.sha256 or recorded or source.sha256
            download(source, path, sha256)
            return source
        except SourceError as error:
            failure = error
        except ValueError as error:  # pooch's, which names both hashes
            whose = file.hash_from or ("as first fetched" if recorded else "as the hub says")
            hint = f"; if its source has changed and you want the new file, remove {path.parents[file.name.count('/')] / 'fetched.json'}"
            raise ValueError(f"{source.url}: {error} Expected: {whose}{hint if recorded else ''}") from error
    assert failure is not None
    raise _explain(asset, failure) from failure


def _explain(asset: Asset, error: SourceError) -> SourceError:
    if asset.hub and error.status in (401, 403):
        page = f"{HUB}/{asset.hub}"
        advice = f"accept its licence on {page}, then set HF_TOKEN to a token of that account" if asset.gated or error.status == 403 else f"look at {page}"
        return SourceError(f"{asset.name}: {error}; it is gated, or does not exist: {advice}", error.status)
    if error.status in (404, 410):
        return SourceError(f"{asset.name}: {error}; it has moved: tell the authors of openvision3, or copy the file to its place by hand", error.status)
    return SourceError(f"{asset.name}: {error}", error.status)


def _write_record(place: Path, file: File, source: Source, sha256: str, size: int) -> None:
    record = read_record(place)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    record[file.name] = {"sha256": sha256, "size": size, "url": source.url, "commit": source.commit, "fetched": when}
    write_whole(place / "fetched.json", json.dumps(record, indent=2) + "\n")


def readable_size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def size_in_words(files: list[dict[str, Any]]) -> str:
    """The size of the files of an entry of `describe`: unknown, 335 MB, or 168 MB + unknown."""
    known = [file["size"] for file in files if file["size"] is not None]
    if not known:
        return UNKNOWN
    return readable_size(sum(known)) if len(known) == len(files) else f"{readable_size(sum(known))} + {UNKNOWN}"
