import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from openvision3.files import half_written, left_behind, write_whole
from openvision3.train.checkpoint import not_written


def test_no_room_names_the_file_that_was_written_and_not_the_one_that_was_read(tmp_path):
    def full(file) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "the/source", None, file.name)

    with pytest.raises(OSError, match="target") as caught:
        write_whole(tmp_path / "target", full)
    assert caught.value.filename == str(tmp_path / "target")
    error = OSError(errno.ENOSPC, "No space left on device", "the/source", None, str(tmp_path / "copy"))
    assert str(not_written(error, tmp_path, 4)).startswith(f"{tmp_path / 'copy'}: no space left on the disk at step 4")


@pytest.mark.parametrize("content", [b"new", "new", lambda file: file.write(b"new")], ids=["bytes", "text", "function"])
def test_an_older_file_is_replaced_and_nothing_else_is_left(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    write_whole(path, content)
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("no")], ids=["full disk", "fault"])
def test_what_fails_half_way_leaves_the_older_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def content(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)) as raised:
        write_whole(path, content)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    if isinstance(error, OSError):
        assert (raised.value.errno, raised.value.filename) == (28, str(path))


def test_a_kill_half_way_leaves_the_older_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    program = (
        "import os, signal, sys; from openvision3.files import write_whole\n"
        "def content(file):\n    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_whole(sys.argv[1], content)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL and path.read_bytes() == b"old"


def test_an_error_of_what_is_read_names_what_is_read_and_one_of_the_folder_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        write_whole(tmp_path / "file", lambda file: file.write((tmp_path / "missing").read_bytes()))
    assert raised.value.filename == tmp_path / "missing" or raised.value.filename == str(tmp_path / "missing")
    with pytest.raises(FileNotFoundError) as raised:
        write_whole(tmp_path / "nowhere" / "file", b"")
    assert raised.value.filename == str(tmp_path / "nowhere" / "file")


@pytest.mark.parametrize("links", [True, False])
def test_of_two_writers_the_first_wins_where_asked(tmp_path, monkeypatch, links):
    path = tmp_path / "file"

    def no_links(*_):
        raise OSError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    write_whole(path, b"first", first_wins=True)
    write_whole(path, b"second", first_wins=True)
    assert path.read_bytes() == (b"first" if links else b"second") and os.listdir(tmp_path) == ["file"]


def test_a_half_written_file_is_left_behind_where_its_writer_has_ended_or_a_day_has_gone(tmp_path):
    program = "import os, signal, sys; from openvision3.files import write_whole; write_whole(sys.argv[1], lambda file: os.kill(os.getpid(), signal.SIGKILL))"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "file")], check=False)
    [killed] = tmp_path.iterdir()
    assert left_behind(killed) and half_written(tmp_path / "file") == [killed]

    seen = []
    write_whole(tmp_path / "own", lambda file: seen.append(left_behind(Path(file.name))))
    elsewhere = tmp_path / ".file.another-host-1.making"
    elsewhere.write_bytes(b"")
    assert seen == [False] and not left_behind(elsewhere)
    os.utime(elsewhere, (0, 0))
    assert left_behind(elsewhere)


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "a" * 200 + "[*].png", os.fsdecode(b"\xff" * 255)])
def test_any_name_that_the_disk_takes_is_written_and_its_half_written_file_is_found(tmp_path, name):
    path = tmp_path / name
    halves = []
    write_whole(path, lambda file: halves.append((half_written(path), Path(file.name))))
    assert halves == [([halves[0][1]], halves[0][1])] and os.listdir(tmp_path) == [name]
    with pytest.raises(OSError, match="too long"):
        write_whole(tmp_path / ("x" * 256), b"")
