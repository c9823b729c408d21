"""Tars as people make them: what follows the end mark, links, holes, system files, endings, and files that are no tar."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from shard_files import captions, jpeg, keys, reasons, recaption, three, write_shard

from openvision3.cli import data as cli_data
from openvision3.data.folders import is_hidden
from openvision3.data.shards.check import check_shard, write_index
from openvision3.data.shards.index import read_head, scan
from openvision3.data.shards.source import ShardSource
from openvision3.recaption.image_text import Answer

PAGE = b"<!DOCTYPE html><html><body>502 Bad Gateway</body></html>" * 30


def says(images, keys):
    return [Answer(f"new {key}") for key in keys]


def tar(path: Path, *members: tuple[str, bytes | str | tuple], kind: int = tarfile.GNU_FORMAT) -> Path:
    """Members as (name, bytes), or (name, target of a symbolic link), or (name, ("hard", target))."""
    with tarfile.open(path, "w", format=kind) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
            else:
                info.type, info.linkname = (tarfile.SYMTYPE, data) if isinstance(data, str) else (tarfile.LNKTYPE, data[1])
            file.addfile(info, io.BytesIO(data if isinstance(data, bytes) else b""))
    return path


def only(path) -> dict[str, str]:
    """{reason: detail} of what is said of a shard."""
    return {problem["reason"]: problem["detail"] for problem in scan(path).problems}


# -- behind the end mark ---------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path) -> list[bytes]:
    return [Path(write_shard(tmp_path / f"{i}.tar", three(3 * i))).read_bytes() for i in range(2)]


@pytest.mark.parametrize("between", [b"", bytes(512), bytes(3 * 10_240)], ids=["nothing", "a block", "much padding"])
def test_tars_joined_by_cat_are_read_whole(tmp_path, two, between):
    (tmp_path / "joined.tar").write_bytes(two[0] + between + two[1])
    source = ShardSource([str(tmp_path / "joined.tar")])
    assert captions(source) == [(f"caption {i}",) for i in range(6)] and not source.problems
    assert [source.data(i) for i in range(6)] == [jpeg()] * 6
    assert check_shard(str(tmp_path / "joined.tar"), decode=True).usable == 6


def test_a_tar_without_padding_to_ten_kibibytes_joins_too(tmp_path, two):
    short = two[0].rstrip(bytes(1)) + bytes(1024)
    short += bytes(-len(short) % 512)
    (tmp_path / "joined.tar").write_bytes(short + two[1])
    assert len(scan(tmp_path / "joined.tar")) == 6 and not only(tmp_path / "joined.tar")


@pytest.mark.parametrize(("rubbish", "said"), [(PAGE, "a web page"), (b"\x01" * 700, "unknown format"), (b"x", "1 bytes after the end mark (text")])
def test_what_follows_the_end_mark_and_is_no_tar_is_reported(tmp_path, two, rubbish, said):
    (tmp_path / "s.tar").write_bytes(two[0] + rubbish)
    source = ShardSource([str(tmp_path / "s.tar")])
    assert len(source) == 3 and reasons(source) == {"damaged shard": 1}
    detail = next(iter(source.problems))["detail"]
    assert f"{len(rubbish):,} bytes after the end mark" in detail and said in detail and len(detail) < 300
    assert [p["reason"] for p in check_shard(str(tmp_path / "s.tar")).problems] == ["damaged shard"]


def test_a_tar_behind_a_web_page_is_found(tmp_path, two):
    (tmp_path / "s.tar").write_bytes(two[0] + PAGE + two[1])
    assert len(scan(tmp_path / "s.tar")) == 6
    assert f"{len(PAGE):,} bytes between two tars (a web page" in only(tmp_path / "s.tar")["damaged shard"]


def test_a_second_tar_that_is_cut_off_says_so(tmp_path, two):
    (tmp_path / "s.tar").write_bytes(two[0] + two[1][:3000])
    assert len(scan(tmp_path / "s.tar")) == 4 and set(only(tmp_path / "s.tar")) == {"damaged shard"}


def test_recaption_loses_no_member_of_joined_tars(tmp_path, two):
    for name, data in (("joined", two[0] + two[1]), ("page", two[0] + PAGE + two[1])):
        (tmp_path / f"{name}.tar").write_bytes(data)
        tally = recaption([str(tmp_path / f"{name}.tar")], tmp_path / name, lambda: says)
        assert tally.samples == 6 and not tally.unwritten and len(tally.problems) == (name == "page")
        with tarfile.open(tmp_path / name / f"{name}.tar") as written:
            assert len(written.getnames()) == 18, "in one tar, which every reader reads whole"
        assert [c[0] for c in captions(ShardSource([str(tmp_path / name / f"{name}.tar")], ("re_caption",)))] == [f"new {i:09d}" for i in range(6)]


def test_recaption_writes_no_shard_that_lacks_members(tmp_path, two):
    """Behind a broken header in the middle lie members that cannot be found; a shard that is cut off has lost none here."""
    with tarfile.open(tmp_path / "0.tar") as file:
        at = file.getmember("000000001.jpg").offset
    (tmp_path / "0.tar").write_bytes(two[0][:at] + b"x" * 512 + two[0][at + 512 :])
    tally = recaption([str(tmp_path / "0.tar")], tmp_path / "out", lambda: says)
    assert tally.unwritten == 1 and [p["reason"] for p in tally.problems] == ["damaged shard"] and not (tmp_path / "out").exists()


# -- links and holes -------------------------------------------------------------------------------------------------


def test_a_hard_link_is_the_member_it_names(tmp_path):
    path = tar(
        tmp_path / "s.tar",
        ("./a.jpg", jpeg()),
        ("a.txt", b"one"),
        ("a.json", b"{}"),
        ("b.jpg", ("hard", "a.jpg")),
        ("b.txt", b"two"),
        ("c.jpg", ("hard", "b.jpg")),
    )
    source = ShardSource([str(path)])
    assert captions(source) == [("one",), ("two",), ()] and not source.problems
    assert [source.data(i) for i in range(3)] == [jpeg()] * 3
    tally = recaption([str(path)], tmp_path / "out", lambda: says)
    assert tally.samples == 3 and not tally.problems
    written = ShardSource([str(tmp_path / "out" / "s.tar")], ("re_caption",))
    assert captions(written) == [("new a",), ("new b",), ("new c",)] and [written.data(i) for i in range(3)] == [jpeg()] * 3


def test_links_that_name_no_member_are_counted_with_what_to_do(tmp_path):
    pairs = [(f"{i}.{ending}", f"/data/originals/{i}.{ending}") for i in range(8) for ending in ("jpg", "txt")]
    path = tar(tmp_path / "s.tar", *pairs, ("lost.jpg", ("hard", "elsewhere.jpg")))
    assert only(path) == {"link": "17 links and no files; pack with tar -h, such as 0.jpg -> /data/originals/0.jpg"}
    with pytest.raises(ValueError, match=r"no samples in 1 shard.*link: 17 links"):
        ShardSource([str(path)])


def test_sparse_members_are_counted_and_the_reader_goes_on(tmp_path):
    """As GNU tar -S writes them: a map of what is not a hole (PAX 1.0), and less data than the size says."""
    data = b"2\n0\n512\n1000000\n512\n"
    data += bytes(512 - len(data)) + b"x" * 1024
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        info = tarfile.TarInfo("GNUSparseFile.0/h.jpg")
        info.size = len(data)
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "h.jpg", "GNU.sparse.realsize": "100000000"}
        file.addfile(info, io.BytesIO(data))
    before = path.read_bytes().rstrip(bytes(1))
    before += bytes(-len(before) % 512)
    path.write_bytes(before + Path(write_shard(tmp_path / "rest.tar", three())).read_bytes())
    source = ShardSource([str(path)])
    assert len(source) == 3 and reasons(source) == {"sparse member": 1}
    assert "h.jpg" in next(iter(source.problems))["detail"]
    recaption([str(path)], tmp_path / "out", lambda: says)
    assert len(ShardSource([str(tmp_path / "out" / "s.tar")])) == 3 and "h.jpg" in tarfile.open(tmp_path / "out" / "s.tar").getnames()


# -- what is no data -------------------------------------------------------------------------------------------------


def test_hidden_and_system_members_are_left_out_and_counted_in_a_short_line(tmp_path):
    apple = b"\0\x05\x16\x07" + bytes(100)
    members = []
    for i in range(3000):
        members += [(f"./._{i:06d}.jpg", apple), (f"./._{i:06d}.txt", apple)]
    members += [("__MACOSX/._0.jpg", apple), ("@eaDir/0.jpg/thumb.jpg", jpeg()), (".thumbs/0.jpg", jpeg()), ("cats/.DS_Store", b"x")]
    path = tar(tmp_path / "s.tar", *members, ("cats.v1/0.jpg", jpeg()), ("cats.v1/0.txt", b"a cat"))
    assert keys(ShardSource([str(path)])) == ["s/cats.v1/0"]
    assert only(path) == {"hidden file": "6,004 hidden or system files, left out, such as ._000000.jpg"}
    assert write_index(str(path)).samples == 1 and Path(f"{path}.index").stat().st_size < 5000


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("a/b.jpg", False),
        ("./a.jpg", False),
        ("../a.jpg", False),
        (".a.jpg", True),
        ("a/._b.jpg", True),
        (".git/a.jpg", True),
        ("x/@eaDir/a.jpg", True),
        ("..a/b", True),
    ],
)
def test_what_is_hidden(name, hidden):
    assert is_hidden(name) is hidden


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (
            [("s.input.jpg", jpeg()), ("s.output.txt", b"x")],
            "only input.jpg, output.txt; names end at their first dot, so s.input.jpg has the ending .input.jpg: rename it to NAME.jpg",
        ),
        (
            [(f"img_v1.{i}.{e}", b"x") for i in range(9) for e in ("jpg", "txt")],
            "only 0.jpg, 0.txt, 1.jpg, 1.txt, 2.jpg and 13 more; names end at their first dot",
        ),
        ([("0.svg", b"x"), ("0.txt", b"x")], "only svg, txt; .svg is not read: choose one of .jpg"),
        ([("0.mp4", b"x")], "only mp4"),
        ([("0." + "y" * 5000, b"x")], "only yyy"),
    ],
)
def test_a_sample_without_a_picture_says_what_it_has_instead(tmp_path, members, said):
    (problem,) = scan(tar(tmp_path / "s.tar", *members, kind=tarfile.PAX_FORMAT)).problems
    assert problem["reason"] == "no image" and problem["detail"].startswith(said) and len(problem["detail"]) < 500


FOREIGN = {
    "gzip": (lambda data: gzip.compress(data), "it holds gzip: unpack it first, with gunzip"),
    "page": (lambda data: PAGE, "it holds a web page"),
    "pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456789\n", "git lfs pull"),
    "empty": (lambda data: b"", "it holds 0 bytes"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_no_tar_is_said_to_hold_what_it_holds_and_gets_no_index(tmp_path, two, kind, capsys):
    make, said = FOREIGN[kind]
    path = tmp_path / "s.tar"
    path.write_bytes(make(two[0]))
    with pytest.raises(ValueError, match="no samples in 1 shard") as refused:
        ShardSource([str(path)])
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert cli_data.index((str(path),)) == 2
    assert said in capsys.readouterr().err and not Path(f"{path}.index").exists()
    tally = recaption([str(path)], tmp_path / "out", lambda: says)
    assert tally.unwritten == 1 and said in tally.problems[0]["detail"] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("members", [[], [("s.input.jpg", jpeg())], [("0.jpg", "/data/0.jpg")], [("0.txt", b"x")], [("._0.jpg", b"x")]])
def test_a_shard_without_a_usable_sample_is_no_success(tmp_path, members, capsys):
    path = tar(tmp_path / "s.tar", *members)
    good = write_shard(tmp_path / "good.tar", three())
    for again in range(2):  # with the index that the first time has written
        assert cli_data.index((str(path), good)) == 2
        assert f"{path}: no usable sample: " in capsys.readouterr().err, again
    tally = recaption([str(path), good], tmp_path / "out", lambda: says)
    assert tally.unwritten == 1 and len(tally.written) == 1 and [p["key"].split(" ")[0] for p in tally.problems] == [str(path)]


def test_an_index_of_an_older_version_is_made_anew(tmp_path):
    """It would lack what follows an end mark."""
    path = write_shard(tmp_path / "s.tar", three())
    write_index(path)
    index = Path(f"{path}.index")
    index.write_bytes(index.read_bytes().replace(b"shard index 2", b"shard index 1"))
    with pytest.raises(ValueError, match="of another version: openvision3 shard index 1"):
        read_head(index)
    assert len(ShardSource([path])) == 3
    assert read_head(index).count == 3
