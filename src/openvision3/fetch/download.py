"""One file over http(s), whole or not at all: the hub's client transfers it, `pooch` compares its sha256 and only then gives it its name.

For a file in a hub repository the hub's client also says where it lies: its commit, its size, for large files its sha256, and whether it may be
had. Ours is the part that stays after a kill: `hf_hub_download` and pooch's own transfer both start anew.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from openvision3 import __version__
from openvision3.contents import contents, short

TOKEN_ENDPOINT = "https://huggingface.co"
"""The one place that is shown HF_TOKEN: no mirror, and nowhere that this place redirects to."""


class SourceError(OSError):
    """What the source refuses or cannot give, in one line; `status` is that of HTTP, 0 where there was none."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Source:
    """Where a file is, and what its source says of it."""

    url: str
    """to be recorded"""
    location: str = ""
    """where the bytes are, if not at `url`"""
    commit: str = ""
    size: int | None = None
    sha256: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


def locate_on_hub(hub: str, name: str, endpoint: str) -> Source:
    """Ask the hub for a file of a repository. Raises SourceError."""
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    check_url(endpoint)
    token = (get_token() if endpoint == TOKEN_ENDPOINT else None) or False
    url = hf_hub_url(hub, name, endpoint=endpoint)
    try:
        metadata = get_hf_file_metadata(url, token=token, endpoint=endpoint)
    except Exception as error:
        shown = "the token of HF_TOKEN was shown" if token else "no token is set"
        raise _source_error(url, error, f" ({shown})") from error
    headers = build_hf_headers(token=token if urlsplit(metadata.location).netloc == urlsplit(url).netloc else False)
    sha256 = metadata.etag if metadata.etag and len(metadata.etag) == 64 else ""  # of small files it is git's hash
    return Source(url, metadata.location, metadata.commit_hash or "", metadata.size, sha256, headers)


def download(source: Source, target: Path, sha256: str = "") -> None:
    """Fetch a source to `target`, if it is not there; `sha256` is the expected one, empty if it is not known.

    Raises:
        ValueError: other bytes came; they are dropped. SourceError: refused, not there, cut off time and again, or no such file. OSError: the disk.
    """
    import pooch
    from filelock import FileLock, Timeout

    url = source.location or source.url
    check_url(url)
    _check_room(target, source.size or 0)
    is_new = not target.parent.exists()
    target.parent.mkdir(parents=True, exist_ok=True)
    pooch.get_logger().setLevel("ERROR")
    lock = FileLock(target.with_name(f".{target.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise OSError(f"{target} is being fetched by another process; wait for it") from error
    try:
        pooch.retrieve(url, sha256 or None, target.name, target.parent, downloader=partial(_transfer, source, target, bool(sha256)))
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder holds something
            if is_new:
                target.parent.rmdir()


def check_url(url: str) -> None:
    """Raises SourceError: neither http nor https."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SourceError(f"{url} cannot be fetched; choose an address that begins with https:// or http://")


def _transfer(source: Source, target: Path, is_checked: bool, url: str, output: str, _: Any) -> None:
    """pooch's downloader: into `.NAME.part`, which is gone on from where its sha256 will be compared (two versions may be joined otherwise)."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    part = target.with_name(f".{target.name}.part")
    try:
        with open(part, "ab" if is_checked else "wb") as file:
            headers = {"User-Agent": f"openvision3/{__version__}", **source.headers, "Accept-Encoding": "identity"}
            http_get(url, file, resume_size=file.tell(), headers=headers, expected_size=source.size, displayed_filename=target.name)
    except Exception as error:
        failure = _source_error(source.url, error)
        arrived = part.stat().st_size
        if failure.status == 416 and arrived:  # the part is as long as the file, or longer
            part.unlink()
            return _transfer(source, target, is_checked, url, output, _)
        if not arrived or failure.status:
            part.unlink()
            raise failure from error
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, error.strerror, str(target)) from error
        kept = f"; {arrived:,} bytes are kept, the same command continues from there" if is_checked else ""
        raise SourceError(f"{failure}{kept}") from error
    if (what := contents(part)).startswith(("0 bytes", "a web page")):
        part.unlink()
        raise SourceError(f"{source.url} gave {what}, not {target.name}")
    os.replace(part, output)


def _source_error(url: str, error: Exception, shown: str = "") -> SourceError:
    """What the hub's client or its http library raised, in one line."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if not status:
        return SourceError(f"{url}: {short(error) or type(error).__name__}")
    return SourceError(f"{url}: HTTP {status}{shown if status in (401, 403) else ''}", status)


def _check_room(target: Path, size: int) -> None:
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"{target} needs {size / 1e6:,.0f} MB, {folder} has {free / 1e6:,.0f} MB free; make room, or name another folder with --to")
