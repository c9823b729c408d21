"""One file over http(s), whole or not at all: resumed after a kill or a cut, tried again, checked, and only then given its name.

urllib and not the hub's client: most of what is fetched is on no hub, and a resume that asks whether the file is still the same
(If-Range) is done by neither. What has come lies beside the target as `.NAME.part`, with `.NAME.part.json` saying of what it is a part.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import ssl
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from openvision3 import __version__
from openvision3.files import sha256_of, write_whole

ATTEMPTS = 4
"""in a row that bring nothing new"""
PAUSE = 1.0
"""seconds before the second attempt, doubled each time"""
TIMEOUT = 30.0
"""seconds without a byte"""
CHUNK = 1 << 20

TOKEN_ORIGIN = "https://huggingface.co"
"""The one place that is shown HF_TOKEN: no mirror, and nowhere that this place redirects to."""


class SourceError(OSError):
    """What the source refuses or cannot give, in one line; `status` is that of HTTP, 0 where there was none."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status


class _Broken(Exception):
    """An attempt that may be worth another."""


@dataclass(frozen=True)
class Downloaded:
    """What came: its sha256 and size, and the hub's commit where it told one."""

    sha256: str
    size: int
    commit: str = ""


@dataclass
class _Part:
    """Of what the bytes that have come are a part: where from, which version (ETag or Last-Modified), how large, and what the hub told."""

    url: str
    validator: str = ""
    total: int | None = None
    sha256: str = ""
    commit: str = ""


def download(
    url: str, target: Path, before: Callable[[Downloaded], None], *, what: str = "", token: str = "", size: int | None = None, checked: bool = False
) -> Downloaded:
    """Fetch `url` to `target`; `before` sees what came before it gets its name, and drops it by raising.

    `size` is a published one. `checked` says that `before` knows the hash, without which a source has to say how large the file is.

    Raises:
        SourceError: refused, not there, another size, or broken off time and again. OSError: the disk. What `before` raises.
    """
    part = target.with_name(f".{target.name}.part")
    attempt, longest = 0, 0
    while True:
        try:
            return _once(url, target, part, before, what, token, size, checked)
        except _Broken as error:
            here = part.stat().st_size if part.is_file() else 0
            attempt = 1 if here > longest else attempt + 1
            longest = max(longest, here)
            if attempt >= ATTEMPTS:
                kept = f"; {here:,} bytes are kept, the same command goes on from there" if here else ""
                raise SourceError(f"{url}: {error}; given up after {ATTEMPTS} attempts{kept}") from error
            time.sleep(PAUSE * 2 ** (attempt - 1))


def check_url(url: str, before: str = "") -> None:
    """Raises SourceError: neither http nor https, or a redirect from https back to http."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SourceError(f"{url} cannot be fetched; legal are http and https")
    if parts.scheme == "http" and urlsplit(before).scheme == "https":
        raise SourceError(f"{before} redirects to {url}, which is not encrypted; refused")


def _once(url: str, target: Path, part: Path, before: Callable[[Downloaded], None], what: str, token: str, size: int | None, checked: bool) -> Downloaded:
    state, start = _came(part, url)
    if start and start == state.total:  # killed between the last byte and the name
        with _locked(part, target, start) as file:
            return _finish(file, state, part, target, before)
    answer, told = _ask(url, part, state.validator, start, token)
    with answer:
        if answer.status == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
            if not start or found is None or (int(found[1]), int(found[2])) != (start, state.total):
                _drop(part)
                raise _Broken("answered with another part than was asked for")
            if not _same_version(answer.headers, state.validator):  # not every server minds If-Range
                _drop(part)
                raise _Broken("the file has changed since its first part came")
        else:
            start, length = 0, answer.headers.get("Content-Length", "")
            told.total = int(length) if length.isdecimal() else None
            told.validator = _validator(answer.headers)
            state = told
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise SourceError(f"{url} is sent as {answer.headers['Content-Encoding']}, which was not asked for")
        if answer.headers.get_content_type() == "text/html" and target.suffix not in (".html", ".htm"):
            raise SourceError(f"{url} answers with a page to read instead of {target.name}: it wants a login or a consent, or has moved")
        if state.total == 0:
            raise SourceError(f"{url} is empty")
        if size is not None and state.total is not None and size != state.total:
            raise SourceError(f"{url} is {state.total:,} bytes, expected {size:,}: another file")
        if state.total is None and not getattr(answer, "chunked", False) and not checked:
            raise SourceError(f"{url}: the server does not say how large it is, so a cut could not be noticed")
        _check_room(target, (state.total or 0) - start)
        try:
            with _locked(part, target, start) as file:
                if not start:
                    file.truncate(0)
                    write_whole(_beside(part), json.dumps(vars(state)))
                _receive(answer, file, state.total, start, what)
                return _finish(file, state, part, target, before)
        except OSError as error:
            if error.errno and error.filename is None:
                raise OSError(error.errno, error.strerror, str(target)) from error
            raise


def _ask(url: str, part: Path, validator: str, start: int, token: str) -> tuple[Any, _Part]:
    """The open answer, and what the hub told on the way. Raises SourceError, _Broken."""
    check_url(url)
    request = urllib.request.Request(url, headers={"User-Agent": f"openvision3/{__version__}", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", validator)
    redirects = _Redirects(url, token)
    redirects.sign(request)
    try:
        answer = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT)
    except HTTPError as error:
        with error:
            if error.code in (408, 425, 429) or error.code >= 500:
                raise _Broken(f"HTTP {error.code} {error.reason}") from error
            if error.code == 416 and start:
                _drop(part)
                raise _Broken("the file has become shorter") from error
            raise SourceError(f"{url}: HTTP {error.code} {error.reason}", error.code) from error
    except SourceError:
        raise
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise SourceError(f"{url}: {reason.verify_message}; its certificate is not trusted here") from error
        raise _Broken(str(reason) or type(reason).__name__) from error
    redirects.note(answer.url, answer.headers)
    return answer, redirects.told


def _receive(answer: Any, file: IO[bytes], total: int | None, start: int, what: str) -> None:
    """Append what comes. Raises _Broken where it ends before its end."""
    from openvision3.progress import counting

    done, megabytes, cut = start, 0, ""
    with counting(what, "MB", ((total or 0) - start) // 1_000_000, silent=total is None) as count:
        while True:
            try:
                chunk = answer.read1(CHUNK)
            except (OSError, HTTPException) as error:
                cut = f": {error or type(error).__name__}"
                break
            if not chunk:
                break
            file.write(chunk)
            done += len(chunk)
            count((done - start) // 1_000_000 - megabytes)
            megabytes = (done - start) // 1_000_000
    file.flush()
    if cut or (total is not None and done < total):
        raise _Broken(f"the connection was cut after {done:,} bytes{f' of {total:,}' if total is not None else ''}{cut}")


def _finish(file: IO[bytes], state: _Part, part: Path, target: Path, before: Callable[[Downloaded], None]) -> Downloaded:
    """Check the whole part and give it its name, all under its lock. A wrong one is dropped."""
    os.fsync(file.fileno())
    got = Downloaded(sha256_of(part), part.stat().st_size, state.commit)
    if not got.size:
        _drop(part)
        raise SourceError(f"{state.url} is empty")
    try:
        if state.sha256 and got.sha256 != state.sha256:
            raise SourceError(f"{state.url} came with sha256 {got.sha256}, expected {state.sha256} as its hub tells; dropped, fetch it again")
        before(got)
    except Exception:
        _drop(part)
        raise
    os.replace(part, target)
    _beside(part).unlink(missing_ok=True)
    return got


@contextlib.contextmanager
def _locked(part: Path, target: Path, start: int) -> Any:
    """The part, open at its end and for this process alone. Raises OSError: another process fetches it. _Broken: it did so meanwhile."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab") as file:
        with contextlib.suppress(ImportError):  # where there are no such locks, two at once would have to be avoided
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OSError(f"{target} is being fetched by another process; wait for it") from error
        here = os.fstat(file.fileno())
        # one that ended between open and lock has made this very file the target, which must not be cut to nothing
        if not part.is_file() or part.stat().st_ino != here.st_ino or (start and here.st_size != start):
            raise _Broken("another process went on with it")
        yield file


def _came(part: Path, url: str) -> tuple[_Part, int]:
    """What an earlier attempt left, and how many bytes of it can be gone on from."""
    try:
        state = _Part(**json.loads(_beside(part).read_text(encoding="utf-8")))
        here = part.stat().st_size
        whole = state.total is not None and here == state.total
        known = state.total is not None and here < state.total and bool(state.validator)
    except (OSError, ValueError, TypeError):
        return _Part(url), 0
    return (state, here) if state.url == url and (whole or known) else (_Part(url), 0)


def _validator(headers: Message) -> str:
    """What If-Range takes: a strong ETag, else the date."""
    mark = headers.get("ETag", "")
    return mark if mark.startswith('"') else headers.get("Last-Modified", "")


def _same_version(headers: Message, validator: str) -> bool:
    """Whether a part comes from the version that `validator` names, as far as its headers tell."""
    seen = headers.get("ETag" if validator.startswith('"') else "Last-Modified", validator)
    return seen.removeprefix("W/") == validator


def _check_room(target: Path, needed: int) -> None:
    folder = next(p for p in target.absolute().parents if p.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{target} needs {needed / 1e6:,.0f} MB more, {folder} has {free / 1e6:,.0f} MB free; make room, or name another folder with --to")


def _beside(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _drop(part: Path) -> None:
    part.unlink(missing_ok=True)
    _beside(part).unlink(missing_ok=True)


def origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}".lower()


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, with the token only where it may be seen (urllib's own would carry it anywhere), and notes what the first host tells."""

    max_redirections = 8

    def __init__(self, url: str, token: str):
        self.told, self.token = _Part(url), token

    def sign(self, request: urllib.request.Request) -> None:
        if self.token and origin(request.full_url) == TOKEN_ORIGIN:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")

    def note(self, url: str, headers: Message) -> None:
        """The hub names the sha256 of a large file, and its commit, before it redirects to where the bytes are."""
        if origin(url) == origin(self.told.url):
            mark = headers.get("X-Linked-ETag", "").strip('"').lower()
            self.told.sha256 = mark if re.fullmatch("[0-9a-f]{64}", mark) else self.told.sha256
            self.told.commit = headers.get("X-Repo-Commit", "") or self.told.commit

    def redirect_request(self, request: Any, answer: Any, code: int, message: str, headers: Any, url: str) -> urllib.request.Request | None:
        check_url(url, request.full_url)
        self.note(request.full_url, headers)
        made = super().redirect_request(request, answer, code, message, headers, url)
        if made is not None:
            self.sign(made)
        return made
