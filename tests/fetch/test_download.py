"""A file over http comes whole or not at all: through cuts, kills, changed files, redirects, refusals, wrong bytes and full disks."""

import errno
import hashlib
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
from openvision3.fetch.download import Source, SourceError, download, locate_on_hub


def get(server: Server, target, path: str = "/file", sha256: str = SHA256, **of_source) -> None:
    download(Source(server.url + path, **of_source), target, sha256)


def ranges(server: Server) -> list[str | None]:
    return [headers.get("Range") for _, headers in server.gets]


def test_a_file_comes_whole_into_a_new_folder_and_nothing_else_stays(server, tmp_path):
    get(server, tmp_path / "new" / "file")
    assert (tmp_path / "new" / "file").read_bytes() == BYTES and names(tmp_path) == ["new/file"]
    get(server, tmp_path / "new" / "file")
    assert len(server.gets) == 1, "what is there is not fetched again"


def test_a_cut_connection_continues_where_it_was_cut(server, tmp_path):
    server.cuts["/file"] = [300_000, 700_000, 701_000]
    get(server, tmp_path / "file", sha256="")
    assert (tmp_path / "file").read_bytes() == BYTES
    assert ranges(server) == [None, "bytes=300000-", "bytes=700000-", "bytes=701000-"] and names(tmp_path) == ["file"]


def test_what_came_before_it_was_given_up_is_kept_and_continued(server, tmp_path):
    server.cuts["/file"] = [1000] * 20
    with pytest.raises(SourceError, match=r"/file: .*; 1,000 bytes are kept, the same command continues from there$"):
        get(server, tmp_path / "file")
    assert names(tmp_path) == [".file.part"]
    server.cuts.clear()
    get(server, tmp_path / "file")
    assert ranges(server)[-1] == "bytes=1000-" and (tmp_path / "file").read_bytes() == BYTES


@pytest.mark.parametrize("is_known", [True, False])
def test_two_versions_are_never_joined(server, tmp_path, is_known):
    server.cuts["/file"] = [1000] * 20
    sha256 = SHA256 if is_known else ""
    with pytest.raises(SourceError):
        get(server, tmp_path / "file", sha256=sha256)
    server.cuts.clear()
    server.files["/file"] = BYTES[::-1]
    if is_known:
        with pytest.raises(ValueError, match=f"expected {SHA256} but got"):
            get(server, tmp_path / "file")
        assert names(tmp_path) == []
    else:
        get(server, tmp_path / "file", sha256="")
        assert ranges(server)[-1] is None and (tmp_path / "file").read_bytes() == BYTES[::-1]


@pytest.mark.parametrize("part", [BYTES, BYTES + b"x", b"x" + BYTES[1:]])
@pytest.mark.parametrize("size", [None, len(BYTES)])
def test_a_part_as_long_as_the_file_is_the_file_or_dropped(server, tmp_path, part, size):
    (tmp_path / ".file.part").write_bytes(part)
    if part == BYTES and size:
        get(server, tmp_path / "file", size=size)
        assert server.gets == [], "a kill between the last byte and the name"
    elif part[0] == ord("x") and size:
        with pytest.raises(ValueError, match="but got"):
            get(server, tmp_path / "file", size=size)
        assert names(tmp_path) == []
    else:
        get(server, tmp_path / "file", size=size)
        assert (tmp_path / "file").read_bytes() == BYTES and names(tmp_path) == ["file"]


def test_a_server_without_ranges_sends_the_file_anew(server, tmp_path):
    (tmp_path / ".file.part").write_bytes(BYTES[:1000])
    server.ranges = False
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BYTES


def test_a_process_killed_half_way_leaves_a_part_that_the_next_continues(server, tmp_path):
    server.slow.add("/file")
    program = (
        "import sys; from pathlib import Path; from huggingface_hub import constants; from openvision3.fetch.download import Source, download\n"
        "constants.HF_HUB_OFFLINE = False; constants.DOWNLOAD_CHUNK_SIZE = 1 << 14\n"
        "download(Source(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])"
    )
    running = subprocess.Popen([sys.executable, "-c", program, f"{server.url}/file", str(tmp_path / "file"), SHA256])
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
    get(server, tmp_path / "file")
    assert ranges(server)[-1] == f"bytes={here}-" and (tmp_path / "file").read_bytes() == BYTES


def test_two_at_once_do_not_mix_their_bytes(server, tmp_path, monkeypatch):
    refused = []
    transfer = downloading._transfer

    def while_another_tries(*arguments):
        with pytest.raises(OSError, match="is being fetched by another process; wait for it"):
            get(server, tmp_path / "file")
        refused.append(True)
        transfer(*arguments)

    monkeypatch.setattr(downloading, "_transfer", while_another_tries)
    get(server, tmp_path / "file")
    assert refused and names(tmp_path) == ["file"]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500])
def test_a_refusal_is_one_line_and_leaves_no_file(server, tmp_path, status):
    server.statuses["/file"] = [status]
    with pytest.raises(SourceError, match=f"/file: HTTP {status}$") as raised:
        get(server, tmp_path / "file")
    assert raised.value.status == status and len(server.gets) == 1 and os.listdir(tmp_path) == []


def test_no_server_is_one_line(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(SourceError, match=r"/file: .*refused") as raised:
        get(server, tmp_path / "new" / "file")
    assert "\n" not in str(raised.value) and os.listdir(tmp_path) == []


@pytest.mark.parametrize("sha256", ["", SHA256])
@pytest.mark.parametrize(("data", "what"), [(b"", "0 bytes"), (b"<!DOCTYPE html><html>sign in</html>", "a web page")])
def test_an_empty_file_or_a_web_page_is_refused(server, tmp_path, data, what, sha256):
    server.files["/file"] = data
    with pytest.raises(SourceError, match=f"gave {what}.*, not weights.pth"):
        get(server, tmp_path / "weights.pth", sha256=sha256)
    assert names(tmp_path) == []


def test_other_bytes_than_expected_are_dropped_with_both_hashes_in_the_line(server, tmp_path):
    server.files["/file"] = BYTES[::-1]
    with pytest.raises(ValueError, match=f"expected {SHA256} but got {hashlib.sha256(BYTES[::-1]).hexdigest()}"):
        get(server, tmp_path / "file")
    assert names(tmp_path) == []


def test_another_size_than_the_hub_says_is_refused(server, tmp_path):
    with pytest.raises(SourceError, match="should be of size 5 but has size 1048576"):
        get(server, tmp_path / "file", sha256="", size=5)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/file", "host/file", "https://"])
def test_only_http_and_https_are_fetched(tmp_path, url):
    with pytest.raises(SourceError, match="choose an address that begins with https://"):
        download(Source(url), tmp_path / "file")


def test_a_redirect_in_a_circle_or_to_a_file_of_this_machine_is_refused(server, tmp_path):
    for to in ("file:///etc/passwd", "/loop"):
        server.redirects["/loop"] = (302, to, {})
        with pytest.raises(SourceError):
            get(server, tmp_path / "file", "/loop")
    assert names(tmp_path) == []


# -- the hub and the token -----------------------------------------------------------------------------------------------


def test_the_hub_says_where_a_file_lies_its_commit_its_size_and_its_hash(server, tmp_path):
    path = "/owner/repo/resolve/main/vae/weights.bin"
    server.redirects[path] = (302, "http://localhost:1/file", {"X-Linked-ETag": f'"{SHA256}"', "X-Linked-Size": "1048576", "X-Repo-Commit": "abc"})
    source = locate_on_hub("owner/repo", "vae/weights.bin", server.url)
    assert (source.url, source.location, source.commit, source.size, source.sha256) == (server.url + path, "http://localhost:1/file", "abc", len(BYTES), SHA256)
    del server.redirects[path]
    server.files[path] = b"{}"
    source = locate_on_hub("owner/repo", "vae/weights.bin", server.url)
    assert (source.location, source.size, source.sha256) == (server.url + path, 2, ""), "git's hash of a small file is not a sha256"


def test_the_token_is_shown_to_its_host_alone(server, tmp_path, monkeypatch):
    elsewhere = Server()
    elsewhere.files["/file"] = BYTES
    threading.Thread(target=elsewhere.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.files |= {"/owner/repo/resolve/main/large": BYTES, "/owner/repo/resolve/main/small": BYTES}
    server.redirects["/owner/repo/resolve/main/large"] = (302, f"{elsewhere.url}/file", {"X-Repo-Commit": "abc", "X-Linked-ETag": '"a"'})

    def seen_by_hub(folder: str) -> set[str | None]:
        for name in ("large", "small"):
            download(locate_on_hub("owner/repo", name, server.url), tmp_path / folder / name)
        return {headers.get("authorization", headers.get("Authorization")) for _, headers in server.heads + server.gets}

    try:
        assert seen_by_hub("mirror") == {None}, "a mirror is not the hub"
        server.heads, server.gets = [], []
        monkeypatch.setattr(downloading, "TOKEN_ENDPOINT", server.url)
        assert seen_by_hub("hub") == {"Bearer hf_secret"}
        assert all("authorization" not in {name.lower() for name in headers} for _, headers in elsewhere.gets) and len(elsewhere.gets) == 2
    finally:
        elsewhere.shutdown()
        elsewhere.server_close()


# -- disks ---------------------------------------------------------------------------------------------------------------


def test_no_room_is_noticed_before_anything_comes(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=400_000))
    with pytest.raises(OSError, match=r"needs 1 MB, .* has 0 MB free; make room, or name another folder with --to"):
        get(server, tmp_path / "new" / "file", size=len(BYTES))
    assert os.listdir(tmp_path) == [] and server.gets == []


def test_a_disk_that_becomes_full_names_the_file_and_keeps_what_came(server, tmp_path, monkeypatch):
    def full(url, file, **_):
        file.write(BYTES[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(OSError) as raised:
        get(server, tmp_path / "file")
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "file"))
    monkeypatch.undo()
    assert (tmp_path / ".file.part").read_bytes() == BYTES[:1000]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_named(server, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(PermissionError) as raised:
        get(server, tmp_path / "closed" / "new" / "file")
    assert raised.value.filename
