"""A file over http comes whole or not at all: through cuts, kills, changed files, redirects, refusals, wrong bytes and full disks."""

import errno
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from file_server import BYTES, SHA256, Server, names, server  # noqa: F401

from openvision3.fetch import download as downloading
from openvision3.fetch.download import Downloaded, SourceError, download


def keep(_: Downloaded) -> None:
    """Accepts everything."""


def get(server: Server, target, path: str = "/file", before=keep, **named) -> Downloaded:
    return download(server.url + path, target, before, **named)


def test_two_versions_are_never_joined_even_by_a_server_that_does_not_mind_if_range(server, tmp_path):
    server.minds_if_range, server.cuts["/file"] = False, [1 << 19, 0, 0, 0]
    with pytest.raises(SourceError, match="are kept"):
        get(server, tmp_path / "file")
    server.cuts.clear()
    server.files["/file"] = BYTES[::-1]
    assert get(server, tmp_path / "file").sha256 == hashlib.sha256(BYTES[::-1]).hexdigest()
    assert "Range" in server.asked("/file")[-2] and "Range" not in server.asked("/file")[-1]


@pytest.mark.parametrize(
    ("data", "headers", "told"),
    [
        (b"", {}, "is empty"),
        (b"", {"Content-Length": None, "Transfer-Encoding": None}, "is empty"),
        (b"<html>sign in</html>", {"Content-Type": "text/html; charset=utf-8"}, "answers with a page to read instead of weights.pth"),
    ],
)
def test_an_empty_file_or_a_page_to_read_is_no_file(server, tmp_path, data, headers, told):
    server.files["/file"], server.headers["/file"] = data, headers
    with pytest.raises(SourceError, match=told):
        get(server, tmp_path / "weights.pth", checked=True)
    assert names(tmp_path) == []


def test_a_file_comes_whole_into_a_folder_that_is_made(server, tmp_path):
    seen = []
    got = get(server, tmp_path / "new" / "file", before=lambda got: seen.append((got, names(tmp_path))))
    assert got == Downloaded(SHA256, len(BYTES)) and (tmp_path / "new" / "file").read_bytes() == BYTES
    assert names(tmp_path) == ["new/file"]
    assert seen == [(got, ["new/.file.part", "new/.file.part.json"])], "checked before it has its name"


def test_a_cut_connection_goes_on_where_it_was_cut(server, tmp_path):
    server.cuts["/file"] = [300_000, 700_000, 700_001, 700_002, 700_003]  # progress, however small, is a reason to go on
    assert get(server, tmp_path / "file").sha256 == SHA256
    assert [headers.get("Range") for headers in server.asked("/file")] == [
        None, "bytes=300000-", "bytes=700000-", "bytes=700001-", "bytes=700002-", "bytes=700003-",
    ]  # fmt: skip
    assert names(tmp_path) == ["file"]


def test_a_connection_that_brings_nothing_more_is_given_up_and_what_came_is_kept(server, tmp_path):
    server.cuts["/file"] = [1000] * 9
    with pytest.raises(SourceError, match=r"cut after 1,000 bytes of 1,048,576; given up after 4 attempts; 1,000 bytes are kept"):
        get(server, tmp_path / "file")
    assert names(tmp_path) == [".file.part", ".file.part.json"]
    server.cuts.clear()
    assert get(server, tmp_path / "file").sha256 == SHA256
    assert server.asked("/file")[-1]["Range"] == "bytes=1000-"


def test_a_file_that_has_changed_meanwhile_comes_anew(server, tmp_path):
    server.cuts["/file"] = [1000] * 4
    with pytest.raises(SourceError):
        get(server, tmp_path / "file")
    server.cuts.clear()
    server.files["/file"] = changed = BYTES[::-1]
    assert get(server, tmp_path / "file").sha256 == hashlib.sha256(changed).hexdigest()
    assert server.asked("/file")[-1]["If-Range"] == f'"{hashlib.md5(BYTES).hexdigest()}"'
    assert (tmp_path / "file").read_bytes() == changed


@pytest.mark.parametrize("fault", ["no ranges", "no mark", "weak mark", "other url", "no state", "odd state"])
def test_where_a_part_cannot_be_trusted_the_file_comes_anew(server, tmp_path, fault):
    if fault in ("no mark", "weak mark"):
        server.headers["/file"] = {"ETag": None if fault == "no mark" else 'W/"1"'}
    server.cuts["/file"] = [1000] * 4
    with pytest.raises(SourceError):
        get(server, tmp_path / "file")
    server.cuts.clear()
    server.ranges = fault != "no ranges"
    state = tmp_path / ".file.part.json"
    if fault == "other url":
        server.files["/other"] = server.files["/file"]
    elif fault == "no state":
        state.unlink()
    elif fault == "odd state":
        state.write_text('{"url": 1, "total": "x", "validator": []}')
    assert get(server, tmp_path / "file", "/other" if fault == "other url" else "/file").sha256 == SHA256
    assert ("Range" in server.gets[-1][1]) == (fault == "no ranges")
    assert names(tmp_path) == ["file"]


def test_an_answer_that_is_another_part_is_dropped(server, tmp_path):
    server.cuts["/file"] = [1000]
    server.headers["/file"] = {"Content-Range": "bytes 5-1048575/1048576"}
    assert get(server, tmp_path / "file").sha256 == SHA256
    assert [headers.get("Range") for headers in server.asked("/file")] == [None, "bytes=1000-", None]


def test_a_part_longer_than_the_file_is_dropped(server, tmp_path):
    server.statuses["/file"] = [416]
    (tmp_path / ".file.part").write_bytes(b"x" * 10)
    (tmp_path / ".file.part.json").write_text(json.dumps({"url": f"{server.url}/file", "validator": '"a"', "total": 20, "sha256": "", "commit": ""}))
    assert get(server, tmp_path / "file").sha256 == SHA256


def test_a_kill_between_the_last_byte_and_the_name_asks_for_nothing_more(server, tmp_path):
    def killed(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(server, tmp_path / "file", before=killed)
    assert names(tmp_path) == [".file.part", ".file.part.json"]
    assert get(server, tmp_path / "file").sha256 == SHA256 and len(server.gets) == 1


def test_a_process_killed_half_way_leaves_a_part_that_the_next_goes_on_from(server, tmp_path):
    server.slow.add("/file")
    program = (
        "import sys; from pathlib import Path; from openvision3.fetch.download import download; download(sys.argv[1], Path(sys.argv[2]), lambda got: None)"
    )
    running = subprocess.Popen([sys.executable, "-c", program, f"{server.url}/file", str(tmp_path / "file")])
    part = tmp_path / ".file.part"
    deadline = time.monotonic() + 60
    while not part.is_file() or part.stat().st_size < 100_000:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    here = part.stat().st_size
    assert 0 < here < len(BYTES) and not (tmp_path / "file").exists()
    server.slow.clear()
    assert get(server, tmp_path / "file").sha256 == SHA256
    assert server.gets[-1][1]["Range"] == f"bytes={here}-" and names(tmp_path) == ["file"]


def test_two_at_once_do_not_mix_their_bytes(server, tmp_path):
    pytest.importorskip("fcntl")
    refused = []

    def another(_):
        with pytest.raises(OSError, match="is being fetched by another process; wait for it") as raised:
            get(server, tmp_path / "file")
        refused.append(raised)

    assert get(server, tmp_path / "file", before=another).sha256 == SHA256 and refused


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_that_has_trouble_is_asked_again(server, tmp_path, status):
    server.statuses["/file"] = [status, status]
    assert get(server, tmp_path / "file").sha256 == SHA256
    server.statuses["/file"] = [status] * 9
    with pytest.raises(SourceError, match=f"HTTP {status} .*; given up after 4 attempts$"):
        get(server, tmp_path / "two" / "file")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_is_told_at_once_and_nothing_is_written(server, tmp_path, status):
    server.statuses["/file"] = [status]
    with pytest.raises(SourceError, match=f"HTTP {status}") as raised:
        get(server, tmp_path / "new" / "file")
    assert raised.value.status == status and len(server.gets) == 1 and os.listdir(tmp_path) == []


def test_no_server_is_one_line(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(SourceError, match=r"/file: .*refused.*; given up after 4 attempts$"):
        get(server, tmp_path / "new" / "file")
    assert os.listdir(tmp_path) == []


def test_a_server_that_falls_silent_is_cut(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloading, "TIMEOUT", 0.05)
    monkeypatch.setattr(downloading, "ATTEMPTS", 2)
    server.cuts["/file"], server.silent = [1000] * 4, {"/file"}
    with pytest.raises(SourceError, match=r"cut after 1,000 bytes of 1,048,576: .*timed out; given up after 2 attempts"):
        get(server, tmp_path / "file")


def test_what_is_refused_when_checked_is_dropped(server, tmp_path):
    def refuse(got):
        raise ValueError(f"not {got.sha256}")

    with pytest.raises(ValueError, match=SHA256):
        get(server, tmp_path / "file", before=refuse)
    assert names(tmp_path) == []


def test_another_size_than_the_published_one_is_refused_before_it_comes(server, tmp_path):
    with pytest.raises(SourceError, match="is 1,048,576 bytes, expected 5: another file"):
        get(server, tmp_path / "new" / "file", size=5)
    assert os.listdir(tmp_path) == []


def test_a_file_without_a_length_needs_a_hash(server, tmp_path):
    server.headers["/file"] = {"Content-Length": None}
    with pytest.raises(SourceError, match="does not say how large it is"):
        get(server, tmp_path / "file")
    assert names(tmp_path) == []
    assert get(server, tmp_path / "file", checked=True).sha256 == SHA256


def test_a_compressed_answer_is_refused(server, tmp_path):
    server.files["/file"] = gzip.compress(BYTES)
    server.headers["/file"] = {"Content-Encoding": "gzip"}
    with pytest.raises(SourceError, match="is sent as gzip"):
        get(server, tmp_path / "file")
    assert server.gets[0][1]["Accept-Encoding"] == "identity"


# -- redirects and the token ---------------------------------------------------------------------------------------------


def test_a_redirect_is_followed_and_what_the_hub_tells_of_the_file_is_checked(server, tmp_path):
    server.redirects["/hub"] = (302, f"{server.url}/file", {"X-Linked-ETag": f'"{SHA256}"', "X-Repo-Commit": "abc"})
    server.cuts["/file"] = [1000]
    assert get(server, tmp_path / "file", "/hub") == Downloaded(SHA256, len(BYTES), "abc")
    assert server.asked("/file")[-1]["Range"] == "bytes=1000-"
    server.redirects["/hub"] = (302, f"{server.url}/file", {"X-Linked-ETag": f'"{"0" * 64}"'})
    with pytest.raises(SourceError, match=f"sha256 {SHA256}, expected {'0' * 64} as its hub tells"):
        get(server, tmp_path / "two" / "file", "/hub")
    assert names(tmp_path) == ["file"]


def test_the_token_is_shown_to_its_host_alone(server, tmp_path, monkeypatch):
    elsewhere = Server()
    elsewhere.files["/file"] = BYTES
    threading.Thread(target=elsewhere.serve_forever, args=(0.02,), daemon=True).start()
    server.redirects["/hub"] = (307, "/renamed", {})
    server.redirects["/renamed"] = (302, f"{elsewhere.url}/file", {})
    try:
        get(server, tmp_path / "a", "/hub", token="hf_secret")
        assert all("Authorization" not in headers for _, headers in server.gets + elsewhere.gets), "a mirror is not the hub"
        monkeypatch.setattr(downloading, "TOKEN_ORIGIN", server.url)
        get(server, tmp_path / "b", "/hub", token="hf_secret")
        assert [headers.get("Authorization") for _, headers in server.gets] == [None, None, "Bearer hf_secret", "Bearer hf_secret"]
        assert all("Authorization" not in headers for _, headers in elsewhere.gets)
    finally:
        elsewhere.shutdown()
        elsewhere.server_close()


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x", "/loop"])
def test_a_redirect_to_no_web_page_or_in_a_circle_is_refused(server, tmp_path, to):
    server.redirects["/loop"] = (302, to, {})
    with pytest.raises(SourceError):
        get(server, tmp_path / "file", "/loop")
    assert names(tmp_path) == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/file", "host/file", "https://"])
def test_only_http_and_https_are_fetched(tmp_path, url):
    with pytest.raises(SourceError, match="legal are http and https"):
        download(url, tmp_path / "file", keep)


def test_a_redirect_out_of_https_is_refused():
    with pytest.raises(SourceError, match="not encrypted"):
        downloading.check_url("http://host/x", "https://host/x")


# -- disks ---------------------------------------------------------------------------------------------------------------


def test_no_room_is_noticed_before_anything_comes(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=400_000))
    with pytest.raises(OSError, match=r"needs 1 MB more, .* has 0 MB free; make room, or name another folder with --to"):
        get(server, tmp_path / "new" / "file")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_becomes_full_names_the_file_and_keeps_what_came(server, tmp_path, monkeypatch):
    real = downloading._receive

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, chunk):
            self.file.write(chunk[:1000])
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(downloading, "_receive", lambda answer, file, *rest: real(answer, Full(file), *rest))
    with pytest.raises(OSError) as raised:
        get(server, tmp_path / "file")
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "file")) and len(server.gets) == 1
    monkeypatch.undo()
    assert get(server, tmp_path / "file").sha256 == SHA256 and server.gets[-1][1]["Range"] == "bytes=1000-"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_named(server, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(PermissionError) as raised:
        get(server, tmp_path / "closed" / "new" / "file")
    assert raised.value.filename
