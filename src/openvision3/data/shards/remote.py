"""Remote shards: fetched whole through fsspec into a local folder of bounded size.

Several processes of one machine share the folder, through file locks, which end with their process: a shard is read under a shared
lock and dropped under an exclusive one. It is fetched into a locked file with a hidden name, which has the full size from the start,
so that a fetch in progress counts as used space.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openvision3.data.images import ImageError
from openvision3.data.shards.index import Stamp

ATTEMPTS = 3
PAUSE = 1.0
"""seconds before a fetch is repeated, doubled each time"""
FORGET = 60.0
"""seconds in which a shard that could not be fetched is not requested again"""
PATIENCE = 600.0
"""seconds to wait for room in the shard cache"""
CHUNK = 4 << 20


def filesystem(url: str) -> tuple[Any, str]:
    """(the fsspec file system, the path in it). Raises ValueError: fsspec is missing, or its package for this protocol."""
    try:
        import fsspec
    except ImportError as error:
        raise ValueError(f"{url} needs fsspec; install it with: pip install 'openvision3[remote]'") from error
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} cannot be opened: {error}") from error


def remote_stamp(url: str) -> Stamp:
    """Size and version of a remote file. Raises ValueError, OSError and what the file system raises."""
    system, path = filesystem(url)
    info = system.info(path)
    version = next((info[name] for name in ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "mtime", "created") if info.get(name)), "")
    if info.get("size") is None:
        raise OSError(f"{url}: the server does not give its size")
    return Stamp(int(info["size"]), 0, str(version).strip('"'))


def expand_remote(url: str) -> list[str]:
    """Globs and folders of shards -> URLs of tars; a .tar stands for itself, whether it exists or not."""
    if "*" not in url and "?" not in url and url.endswith(".tar"):
        return [url]
    system, path = filesystem(url if url.endswith(".tar") else url.rstrip("/") + "/*.tar")
    try:
        return sorted(system.unstrip_protocol(shard) for shard in system.glob(path))
    except Exception as error:  # each file system raises its own
        folder = re.split(r"[^/]*[*?\[]", url)[0].rstrip("/")
        raise ValueError(f"{url} cannot be listed: {error or type(error).__name__}; name the shards, such as {folder}/{{00000..00099}}.tar") from error


class ShardCache:
    """At most `gigabytes` of whole shards in `folder`; the least recently read are dropped first.

    Raises:
        ValueError: `gigabytes` is not positive, or the system has no file locks.
    """

    def __init__(self, folder: str | Path, gigabytes: float):
        if not gigabytes > 0:
            raise ValueError(f"cache_gb {gigabytes} must be more than 0")
        try:
            import fcntl  # noqa: F401
        except ImportError as error:
            raise ValueError("a cache needs POSIX file locks; on this system copy the shards to a local folder") from error
        self.folder, self.limit = Path(folder), round(gigabytes * 1e9)
        self._failed: dict[str, tuple[float, ImageError]] = {}

    @contextlib.contextmanager
    def reading(self, url: str, stamp: Stamp) -> Iterator[int]:
        """A descriptor of the whole shard, which stays in the cache within this context.

        Raises:
            ImageError: `unreadable`, or `changed` if it no longer matches `stamp`.
        """
        path = self.folder / f"{hashlib.blake2b(f'{url} {stamp.size} {stamp.etag}'.encode(), digest_size=16).hexdigest()}.tar"
        descriptor = _locked(path)
        while descriptor is None:
            self._fetch(url, path, stamp)
            descriptor = _locked(path)
        try:
            os.utime(descriptor)  # read last: dropped last
            yield descriptor
        finally:
            os.close(descriptor)

    def _fetch(self, url: str, path: Path, stamp: Stamp) -> None:
        """Fetch the shard, or wait for another process that is fetching it."""
        when, error = self._failed.get(url, (0.0, None))
        if error is not None and time.monotonic() - when < FORGET:
            raise ImageError(error.reason, str(error))
        try:
            self._fetch_alone(url, path, stamp)
        except ImageError as failed:
            self._failed[url] = (time.monotonic(), failed)
            raise
        except OSError as failed:
            self._failed[url] = (time.monotonic(), ImageError("unreadable", f"{url} cannot be kept in the cache {self.folder}: {failed}"))
            raise self._failed[url][1] from failed

    def _fetch_alone(self, url: str, path: Path, stamp: Stamp) -> None:
        import fcntl

        self.folder.mkdir(parents=True, exist_ok=True)
        making = path.with_name(f".{path.name}")
        descriptor = os.open(making, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits for whoever is fetching it
            if not _is(making, descriptor):
                return  # another process has fetched it or given up: look again
            try:
                self._reserve(descriptor, making, stamp.size, url)
                fetch(url, descriptor, stamp)
                os.fsync(descriptor)
                with self._alone():  # or a count of the files could miss it between its two names
                    os.replace(making, path)
            except BaseException:
                os.unlink(making)
                raise
        finally:
            os.close(descriptor)

    def _reserve(self, descriptor: int, making: Path, size: int, url: str) -> None:
        """Give the file its full size as soon as there is room."""
        if size > self.limit:
            raise ImageError("unreadable", f"{url} holds {size / 1e9:.3g} GB, more than the whole cache of {self.limit / 1e9:.3g} GB; raise cache_gb")
        give_up = time.monotonic() + PATIENCE
        while not self._make_room(descriptor, making, size):
            if time.monotonic() > give_up:
                raise ImageError("unreadable", f"no room for {url} in the cache {self.folder} for {PATIENCE:g} s: all of it is in use; raise cache_gb")
            time.sleep(0.02)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Exclude other processes from counting, dropping and adding files."""
        import fcntl

        with open(self.folder / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, descriptor: int, making: Path, size: int) -> bool:
        with self._alone():
            files = []
            for entry in os.scandir(self.folder):
                if entry.name.endswith(".tar") and entry.name != making.name:
                    with contextlib.suppress(FileNotFoundError):  # a fetch that has just ended: the file was renamed or deleted
                        status = entry.stat()
                        files.append((not entry.name.startswith("."), status.st_mtime_ns, status.st_size, Path(entry.path)))
            used = sum(file[2] for file in files)
            for _, _, length, path in sorted(files):  # first what killed processes left, then by the last reading
                if used + size <= self.limit:
                    break
                used -= length if _drop(path) else 0
            if used + size > self.limit:
                return False
            os.ftruncate(descriptor, size)
            return True


def _locked(path: Path) -> int | None:
    """A descriptor with a shared lock; None if there is no such file, or it was deleted meanwhile."""
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_nlink:
        return descriptor
    os.close(descriptor)
    return None


def _is(path: Path, descriptor: int) -> bool:
    """Whether `path` is still the open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False


def _drop(path: Path) -> bool:
    """Delete a file unless a process reads or writes it; returns whether it is gone."""
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is(path, descriptor):
            os.unlink(path)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def fetch(url: str, descriptor: int, stamp: Stamp) -> None:
    """Copy a remote file to an open file; a copy that breaks off starts again. Raises ImageError, OSError (no space)."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            filesystem(url)[0].invalidate_cache()  # a listing of the start of the run would answer
            now = remote_stamp(url)
            if not stamp.matches(now):
                states = f"{stamp.size:,} bytes, {stamp.etag or 'no version'} then; {now.size:,} bytes, {now.etag or 'no version'} now"
                raise ImageError("changed", f"{url} has changed since its index was written ({states}); run: openvision3 data index")
            done = _copy(url, descriptor, stamp.size)
            if done == stamp.size:
                return
            raise OSError(f"it ended after {done:,} of {stamp.size:,} bytes")
        except (ImageError, ValueError):
            raise
        except Exception as error:  # each file system raises its own
            if isinstance(error, OSError) and error.errno == 28:
                raise
            if attempt == ATTEMPTS:
                # fsspec calls every failure of HTTP a file that is not found, and has what happened as the cause.
                cause = error.__cause__ if error.__cause__ is not None and type(error.__cause__).__module__.startswith("aiohttp") else error
                why = " ".join(str(cause).split()) or type(cause).__name__
                is_gone = isinstance(error, FileNotFoundError) and (cause is error or getattr(cause, "status", 0) in (404, 410))
                reason = "vanished" if is_gone else "unreadable"
                raise ImageError(reason, f"{url} could not be fetched, tried {ATTEMPTS} times: {why}") from error
            time.sleep(PAUSE * 2 ** (attempt - 1))


def _copy(url: str, descriptor: int, size: int) -> int:
    system, path = filesystem(url)
    protocols = (system.protocol,) if isinstance(system.protocol, str) else system.protocol
    streamed: dict[str, Any] = {"block_size": 0} if set(protocols) & {"http", "https"} else {}  # one request, not one a block
    done = 0
    with system.open(path, "rb", **streamed) as file:
        while chunk := file.read(CHUNK):
            if done + len(chunk) > size:
                raise OSError(f"it sent more than its {size:,} bytes")
            view = memoryview(chunk)
            while view:
                count = os.pwrite(descriptor, view, done)
                view, done = view[count:], done + count
    return done
