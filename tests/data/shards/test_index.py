"""An index says what a scan of the tar says, opens without touching the tar, and is never believed where it may be wrong."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from shard_files import captions, jpeg, keys, reasons, three, write_shard

from openvision3.data import captions as captions_module
from openvision3.data.images import ImageError
from openvision3.data.problems import count_reasons
from openvision3.data.shards import index, tars
from openvision3.data.shards.check import check_shard, write_index
from openvision3.data.shards.index import IndexFile, Stamp, index_path, read_head, scan
from openvision3.data.shards.members import TarScan
from openvision3.data.shards.source import ShardSource
from openvision3.data.shards.tars import Tars


@pytest.fixture
def shards(tmp_path) -> list[str]:
    return [write_shard(tmp_path / f"{i:05d}.tar", three(3 * i)) for i in range(4)]


def no_scan(monkeypatch) -> None:
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("a tar was scanned"))


def test_shards_with_an_index_open_without_a_look_into_a_tar_and_read_the_same(shards, monkeypatch):
    before = ShardSource(shards)
    expected = keys(before), captions(before), [before.data(i) for i in range(len(before))]
    assert all(write_index(path).written for path in shards)
    no_scan(monkeypatch)
    source = ShardSource(shards)
    assert (keys(source), captions(source), [source.data(i) for i in range(len(source))]) == expected
    assert all(isinstance(found, IndexFile) for found in source.tars._indexes), "nothing is in memory but headers"


def test_a_shard_that_the_disk_did_not_give_whole_gets_no_index(shards, monkeypatch):
    """It would fit the file for ever, and the samples behind the error would be lost."""
    add, calls = TarScan._add, []

    def fails(self, *given):
        calls.append(given)
        if len(calls) == 4:
            raise OSError(5, "Input/output error")
        return add(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(TarScan, "_add", fails)
        written = write_index(shards[0])
    assert "Input/output error" in written.error and not Path(shards[0] + ".index").exists()
    assert len(ShardSource(shards)) == 12


def test_a_json_that_is_too_large_costs_one_sample_wherever_it_is_read(tmp_path, monkeypatch):
    members = three(0) | {"000000001.json": b'{"n": 1, "x": "' + b"y" * 2000 + b'"}', "000000002.json": b'{"n": 1}'}
    path = write_shard(tmp_path / "a.tar", members)
    monkeypatch.setattr(captions_module, "MAX_BYTES", 1000)
    source = ShardSource([path], only={"n": "1"})
    assert count_reasons(source.problems)["too large"] == 1 and len(source) == 1
    assert ShardSource([path]).drawing(1) is None


def test_an_index_holds_where_python_finds_the_members(shards):
    write_index(shards[1])
    held = load_file(shards[1] + ".index")
    with tarfile.open(shards[1]) as tar:
        members = {m.name: (m.offset_data, m.size) for m in tar}
    for sample, number in enumerate(range(3, 6)):
        for column, kind in enumerate(("jpg", "txt", "json")):
            assert (held["offsets"][sample, column], held["sizes"][sample, column]) == members[f"{number:09d}.{kind}"]


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="./\0"), min_size=1, max_size=12), st.sets(st.sampled_from(["txt", "json"])), max_size=8
    )
)
def test_what_is_saved_is_what_was_scanned(tmp_path_factory, samples):
    folder = tmp_path_factory.mktemp("index")
    members = {}
    for name, kinds in samples.items():
        members |= {f"{name}.jpg": b"x" * len(name)} | {f"{name}.{kind}": kind.encode() for kind in sorted(kinds)}
    path = write_shard(folder / "s.tar", members)
    scanned = scan(path)
    scanned.save(folder / "i")
    if not samples:
        assert len(scanned) == read_head(folder / "i").count == 0
        return
    loaded = read_head(folder / "i").load()
    assert len(loaded) == len(scanned) == len(samples)
    for i in range(len(loaded)):
        assert loaded.name(i) == scanned.name(i) == list(samples)[i]
        for kind in index.KINDS:
            assert loaded.member(i, kind) == scanned.member(i, kind)
    assert loaded.stamp == scanned.stamp


@pytest.mark.parametrize("change", ["appended to", "replaced by one of the same size"])
def test_a_stale_index_is_noticed_and_written_anew(shards, change, monkeypatch):
    write_index(shards[0])
    if change == "appended to":
        write_shard(Path(shards[0]), three(20) | three(30))
    else:
        write_shard(Path(shards[0]), three(6))
        os.utime(shards[0], (1, 1))
    expected = ("caption 20",) if change == "appended to" else ("caption 6",)
    with monkeypatch.context() as patch:
        patch.setattr(index.os, "replace", readonly)
        unwritten = ShardSource(shards[:1])
        assert reasons(unwritten) == {"stale index": 1}
        assert captions(unwritten)[0] == expected
    source = ShardSource(shards[:1])
    assert (reasons(source), captions(source)[0]) == ({}, expected)
    assert not write_index(shards[0]).written, "it was written anew"
    no_scan(monkeypatch)
    assert captions(ShardSource(shards[:1]))[0] == expected


def readonly(*_):
    raise OSError(30, "Read-only file system")


@settings(max_examples=80, deadline=None)
@given(st.floats(0, 1), st.integers(0, 255), st.floats(0, 1))
def test_a_damaged_index_file_is_refused_or_harmless(tmp_path_factory, where, value, keep):
    folder = tmp_path_factory.mktemp("damaged")
    path = write_shard(folder / "s.tar", three())
    write_index(path)
    data = bytearray(Path(path + ".index").read_bytes())
    data[int(where * (len(data) - 1))] = value
    Path(path + ".index").write_bytes(data[: max(1, int(len(data) * keep))])
    source = ShardSource([path])
    for i in range(len(source)):
        try:
            source.key(i), source.captions(i), source.data(i)
        except ImageError as error:
            assert error.reason in ("unreadable",)


def test_an_index_that_is_cut_off_is_not_used(shards):
    write_index(shards[0])
    whole = Path(shards[0] + ".index").read_bytes()
    Path(shards[0] + ".index").write_bytes(whole[:-5])
    source = ShardSource(shards[:1])
    assert captions(source) == [("caption 0",), ("caption 1",), ("caption 2",)]
    assert Path(shards[0] + ".index").read_bytes() == whole


def test_problems_of_a_damaged_shard_are_in_its_index(tmp_path, monkeypatch):
    path = Path(write_shard(tmp_path / "s.tar", three() | {"README": b""}))
    path.write_bytes(path.read_bytes()[:-9000])
    direct = list(ShardSource([str(path)]).problems)
    write_index(str(path))
    no_scan(monkeypatch)
    assert list(ShardSource([str(path)]).problems) == direct
    assert direct


def test_indexes_in_a_folder_of_their_own_are_told_apart(tmp_path):
    paths = [write_shard(tmp_path / place / "0.tar", three(number)) for number, place in enumerate("ab")]
    for path in paths:
        write_index(path, str(tmp_path / "indexes"))
    assert len(list((tmp_path / "indexes").iterdir())) == 2
    assert not list((tmp_path / "a").glob("*.index"))
    source = ShardSource(Tars(paths, index=str(tmp_path / "indexes")))
    assert captions(source)[0] == ("caption 0",)
    assert captions(source)[3] == ("caption 1",)
    with pytest.raises(ValueError, match=r"no folder of indexes at .*none; write it with: openvision3 data index SHARDS"):
        Tars(paths, index=str(tmp_path / "none"))


def test_an_index_is_written_whole_or_not_at_all(shards, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index.os, "fsync", full)
    assert "No space left" in write_index(shards[0]).error
    assert sorted(p.name for p in Path(shards[0]).parent.iterdir()) == [Path(p).name for p in shards]


def test_a_shard_that_changes_during_the_run_is_not_read_at_the_old_places(shards):
    source = ShardSource(shards)
    assert source.captions(0) == ("caption 0",)
    write_shard(Path(shards[0]), three(50))
    with open(shards[1], "r+b") as file:  # in place, under an open descriptor
        source.captions(3)
        file.write(b"x" * 512)
    os.utime(shards[0], (1, 1))
    os.utime(shards[1], (1, 1))
    for i in (0, 3):
        with pytest.raises(ImageError) as caught:
            source.captions(i)
        assert caught.value.reason == "changed"
    assert source.captions(6) == ("caption 6",)


def test_thousands_of_shards_need_few_descriptors_and_little_memory(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "0.tar", three())
    write_index(path)
    for i in range(1, 2000):
        os.link(path, tmp_path / f"{i}.tar")
        os.link(path + ".index", tmp_path / f"{i}.tar.index")
    no_scan(monkeypatch)
    source = ShardSource([str(tmp_path / f"{i}.tar") for i in range(2000)])
    assert len(source) == 6000
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    assert {source.captions(i)[0] for i in range(0, 6000, 7)} == {"caption 0", "caption 1", "caption 2"}
    if before:
        assert len(os.listdir("/proc/self/fd")) - before <= tars.OPEN_TARS + tars.OPEN_INDEXES
    assert source.tars._load_index.cache_info().currsize <= tars.OPEN_INDEXES


def test_a_member_that_comes_twice_and_a_second_picture_are_reported(tmp_path):
    path = tmp_path / "s.tar"
    write_shard(path, {"a.jpg": jpeg(), "a.png": b"x", "a.txt": b"one"})
    with tarfile.open(path, "a") as tar:
        for text in (b"two", b"three"):
            info = tarfile.TarInfo("a.txt")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    source = ShardSource([str(path)])
    assert captions(source) == [("three",)]
    assert count_reasons(scan(str(path)).problems) == {"duplicate": 3}
    assert reasons(source) == {"duplicate": 1}, "of one sample"


@pytest.mark.parametrize(("stamp", "now", "same"), [((5, 1), (5, 1), True), ((5, 1), (5, 2), False), ((5, 1), (6, 1), False), ((5, 0), (5, 2), True)])
def test_a_stamp_compares_what_both_know(stamp, now, same):
    assert Stamp(*stamp).matches(Stamp(*now)) == same


def test_check_counts_by_reason_what_cannot_be_trained_on(tmp_path):
    members = (
        three()
        | {
            "1.jpg": jpeg(),  # no caption
            "2.jpg": b"",
            "2.txt": b"empty",
            "3.jpg": b"<html>",
            "3.txt": b"page",
            "4.jpg": jpeg(),
            "4.txt": b"fine",
            "4.json": b"{",
            "5.txt": b"alone",
            "6.jpg": jpeg()[:-10],
            "6.txt": b"cut",
            "7.jpg": jpeg(),
            "7.txt": b"fine",
            "7.json": b"{}",
        }
    )
    path = write_shard(tmp_path / "s.tar", members)
    quick, deep = check_shard(path), check_shard(path, decode=True)
    assert index_path(path).name == "s.tar.index"
    assert (quick.samples, quick.usable, deep.usable) == (9, 6, 4)

    def count(checked):
        return {reason: sum(p["reason"] == reason for p in checked.problems) for reason in {p["reason"] for p in checked.problems}}

    assert count(quick) == {"no caption": 1, "empty": 1, "broken JSON": 1, "no image": 1}
    assert count(deep) == count(quick) | {"not an image": 1, "truncated": 1}
    assert count(check_shard(path, ("n",)))["no caption"] == 9, "numbers are no captions"
    shutil.rmtree(tmp_path)
    assert count(check_shard(path)) == {"missing": 1}


def test_memory_for_an_open_index_does_not_grow_with_its_samples(tmp_path):
    count = 200_000
    big = index.ShardIndex(
        Stamp(1), np.zeros((count, 3), np.uint64), np.zeros((count, 3), np.uint32), np.arange(count, dtype=np.uint32), np.zeros(count, np.uint8)
    )
    big.save(tmp_path / "i")
    assert (tmp_path / "i").stat().st_size / count < 45
    loaded = read_head(tmp_path / "i").load()
    assert not loaded.offsets.flags.owndata
    assert not loaded.names.flags.writeable
