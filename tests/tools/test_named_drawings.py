"""The script that writes named drawings as shards, on packages made here."""

import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from openvision3.data import openmoji
from openvision3.data.names import DataOptions, open_source

SCRIPT = Path(__file__).parents[2] / "tools" / "named_drawings.py"
spec = importlib.util.spec_from_file_location("named_drawings", SCRIPT)
named_drawings = importlib.util.module_from_spec(spec)
sys.modules["named_drawings"] = named_drawings  # its dataclasses look there
spec.loader.exec_module(named_drawings)
SQUARE = '<path fill="#c01020" d="M2 2h12v12H2z"/>'
INFO = {"license": {"title": "MIT", "spdx": "MIT"}, "author": {"name": "Somebody", "url": "https://example.org"}}


def pack(path: Path, **members: object) -> None:
    """An npm package of these JSON members."""
    with tarfile.open(path, "w:gz") as tar:
        for name, value in members.items():
            data = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name.replace('__', '/')}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def pack_style(folder: Path, style: str, icons: dict[str, dict], characters: dict[str, str] | None = None) -> None:
    pack(
        folder / f"{style}.tgz",
        package={"version": "1.0.0"},
        icons={"prefix": style, "icons": icons, "width": 16, "height": 16},
        info=INFO,
        chars=characters or {},
    )


@pytest.fixture
def packages(tmp_path) -> Path:
    """Two styles that draw every emoji of OpenMoji's test side and 300 others, and a third with icons in several sizes."""
    folder = tmp_path / "packages"
    folder.mkdir()
    emoji = [*openmoji.load_emoji().test, *openmoji.load_emoji().train[:300]]
    for style in ("one", "two"):
        characters = {"-".join(f"{ord(c):x}" for c in each.character): f"emoji-{number}-drawn" for number, each in enumerate(emoji)}
        pack_style(folder, style, {icon: {"body": SQUARE} for icon in characters.values()}, characters)
    wide = {"body": '<path d="M0 0h32v16H0z"/>', "width": 32}
    sizes = {"bill-stack-16": {"body": SQUARE}, "bill-stack-24": {"body": "<path d='M0 0h4v4z'/>"}, "wide-thing-16": wide}
    pack_style(folder, "three", sizes)
    annotations = {"\u231a": {"default": ["clock", "time", "watch"]}}
    pack(folder / "cldr.tgz", annotations__en__annotations={"annotations": {"annotations": annotations}})
    return folder


def draw(packages: Path, out: Path, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), str(packages), "--out", str(out), "--size", "32", "--workers", "1", *more]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("change", [{"icons": {"prefix": "../evil", "icons": {"a-thing": {"body": SQUARE}}}}, {"info": {}}])
def test_a_package_does_not_choose_where_files_go_and_one_that_lacks_fields_is_one_line(tmp_path, change):
    folder = tmp_path / "in" / "packages"
    folder.mkdir(parents=True)
    members = {"package": {"version": "1.0.0"}, "icons": {"prefix": "one", "icons": {"a-thing": {"body": SQUARE}}}, "info": INFO} | change
    pack(folder / "x.tgz", **members)
    done = draw(folder, tmp_path / "in" / "out")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "is no icon package" in done.stderr
    assert not list(tmp_path.rglob("*evil*"))


def samples(out: Path) -> list[dict]:
    rows = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            rows += [json.loads(tar.extractfile(name).read()) | {"shard": path.name} for name in tar.getnames() if name.endswith(".json")]  # type: ignore[union-attr]
    return rows


def test_a_concept_is_held_out_in_every_style_or_in_one_and_never_in_both_ways(packages, tmp_path):
    out = tmp_path / "drawings"
    done = draw(packages, out)
    assert done.returncode == 0, done.stderr
    rows = samples(out)
    trained = {row["family"] for row in rows if row["kind"] == "train"}
    trained_styles = {(row["style"], row["family"]) for row in rows if row["kind"] == "train"}
    kinds = {row["kind"] for row in rows}
    assert kinds == {"train", "unseen concept", "unseen style", "seen concept"}
    for row in rows:
        assert row["shard"].startswith(f"{row['style']}-{row['kind'].replace(' ', '_')}-")
        if row["kind"] == "unseen concept":
            assert row["family"] not in trained
        if row["kind"] == "unseen style":
            assert row["family"] in trained and (row["style"], row["family"]) not in trained_styles
        if row["kind"] == "seen concept":
            assert (row["style"], row["family"]) in trained_styles
    concepts = {each.family for each in openmoji.load_emoji().train}
    assert not {row["family"] for row in rows if row["kind"] == "unseen concept"} & concepts, "OpenMoji would train on them"


def test_the_shards_are_ordinary_data_with_captions_style_and_licence(packages, tmp_path):
    out = tmp_path / "drawings"
    draw(packages, out)
    source = open_source((f"{out}/*-train-*.tar",), DataOptions(caption_keys=("caption", "captions")))
    assert not source.problems
    for index in range(0, len(source), 50):
        caption, *others = source.captions(index)
        style = source.value(index, "style")
        assert f"{caption}, {style} style" in others
        assert source.value(index, "licence") == "MIT" and source.value(index, "source").startswith(f"@iconify-json/{style} 1.0.0: ")
        assert source.image(index, 32).size == (32, 32)


def test_of_an_icon_in_several_sizes_the_largest_is_kept_under_a_name_in_words(packages, tmp_path):
    out = tmp_path / "drawings"
    done = draw(packages, out)
    three = [row for row in samples(out) if row["style"] == "three"]
    assert sorted((row["caption"], row["icon"]) for row in three) == [("bill stack", "bill-stack-24"), ("wide thing", "wide-thing-16")]
    assert "three: " in done.stdout and "1 the same icon at another size" in done.stdout


def test_a_wide_drawing_keeps_its_shape_and_lies_in_the_middle_of_its_background(packages, tmp_path):
    out = tmp_path / "drawings"
    draw(packages, out, "--background", "white")
    for path in out.glob("three-*.tar"):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                if name.endswith(".txt") and tar.extractfile(name).read() == b"wide thing":  # type: ignore[union-attr]
                    image = Image.open(io.BytesIO(tar.extractfile(name[:-3] + "png").read())).convert("L")  # type: ignore[union-attr]
    left, top, right, bottom = image.point(lambda value: 255 * (value < 128)).getbbox()
    assert (left, right) == (1, 31) or (left, right) == (2, 31) or (left, right) == (1, 30)
    assert abs((bottom - top) * 2 - (right - left)) <= 2 and abs(top + bottom - 32) <= 1


def test_transparent_drawings_have_an_alpha_channel_and_plain_ones_a_light_colour(packages, tmp_path):
    for background in ("transparent", "plain"):
        out = tmp_path / background
        assert draw(packages, out, "--background", background).returncode == 0
        path = next(out.glob("one-train-*.tar"))
        with tarfile.open(path) as tar:
            image = Image.open(io.BytesIO(tar.extractfile(next(n for n in tar.getnames() if n.endswith(".png"))).read()))  # type: ignore[union-attr]
        corner = image.getpixel((0, 0))
        assert (image.mode == "RGBA" and corner[3] == 0) if background == "transparent" else (image.mode == "RGB" and min(corner) >= 128)


def test_after_a_kill_the_same_command_writes_the_missing_shards_with_equal_bytes(packages, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    draw(packages, whole)
    draw(packages, cut)
    shards = sorted(cut.glob("*.tar"))
    shards[0].unlink()
    shards[-1].rename(shards[-1].with_suffix(".partial"))  # what a kill leaves
    kept = shards[1].stat().st_mtime_ns
    done = draw(packages, cut)
    assert done.returncode == 0 and f"{len(shards) - 2} of {len(shards)} shards are there already" in done.stdout
    assert shards[1].stat().st_mtime_ns == kept
    assert [(path.name, path.read_bytes()) for path in sorted(cut.iterdir())] == [(path.name, path.read_bytes()) for path in sorted(whole.iterdir())]


@pytest.mark.slow
def test_bad_input_ends_with_2_and_one_line_that_says_what_to_do(packages, tmp_path):
    out = tmp_path / "drawings"
    draw(packages, out)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    cases = [
        (tmp_path / "none", tmp_path / "a", [], "is not a folder"),
        (tmp_path / "empty", tmp_path / "a", [], "npm pack @iconify-json/noto"),
        (packages, out, ["--background", "white"], "choose another --out"),
        (packages, tmp_path / "full", [], "is not empty"),
        (packages, tmp_path / "a", ["--size", "4"], "at least 16 pixels"),
    ]
    for folder, target, more, line in cases:
        done = draw(folder, target, *more)
        assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1, done.stderr
    (packages / "one.tgz").write_bytes((packages / "one.tgz").read_bytes()[:2000])
    done = draw(packages, tmp_path / "a")
    assert done.returncode == 2 and "not a whole npm package" in done.stderr
    assert not (tmp_path / "a").exists()
    (packages / "one.tgz").unlink()
    (packages / "cldr.tgz").unlink()
    assert "npm pack cldr-annotations-full" in draw(packages, tmp_path / "a").stderr


def test_a_colour_is_told_where_the_drawing_has_one_and_its_name_has_none(packages, tmp_path):
    draw(packages, tmp_path / "out", "--background", "white")
    coloured = {row["caption"]: row["coloured"] for row in samples(tmp_path / "out")}  # all drawings of the package are red, but wide things are black
    assert (coloured["1st place medal"], coloured["Belgium"], coloured["wide thing"]) == ("a red 1st place medal", "Belgium", "a black wide thing")
    assert (coloured["lipstick"], coloured["hollow red circle"]) == ("a red lipstick", "a hollow red circle")


def test_a_drawing_is_recoloured_to_the_colour_that_its_new_name_says_and_never_to_what_is_held_out(packages, tmp_path):
    assert draw(packages, tmp_path / "out", "--background", "white", "--recolour", "6").returncode == 0
    rows = samples(tmp_path / "out")
    others = [row for row in rows if row["kind"] == "recoloured"]
    trained = {(row["style"], row["icon"]): row for row in rows if row["kind"] == "train"}
    unseen = {row["family"] for row in rows if row["kind"] == "unseen concept"}
    unseen_style = {(row["style"], row["family"]) for row in rows if row["kind"] == "unseen style"}
    assert len(others) > 100 and {row["caption"].split()[0] for row in others} >= {"orange", "yellow", "green", "blue", "purple", "pink"}
    for row in others:
        start = trained[row["style"], row["icon"]]
        assert (
            row["shard"].startswith(f"{row['style']}-recoloured-") and row["source"] == start["source"] and row["family"] == row["caption"] != start["caption"]
        )
        assert row["family"] not in unseen and (row["style"], row["family"]) not in unseen_style
        assert named_drawings.concept_share(row["family"]) >= openmoji.UNSEEN_CONCEPT_SHARE
        assert all("red" not in words.split() for words in (row["caption"], row["phrase"], row["coloured"], *row["captions"])), "what was red is not"
    assert not {row["icon"] for row in others if trained[row["style"], row["icon"]]["family"] in named_drawings.families_of_people()}
    assert "purple dog face" not in {row["caption"] for row in others}, "its hash holds it out"
    assert draw(packages, tmp_path / "other", "--recolour", "7").returncode == 2


@settings(deadline=None)
@given(st.sampled_from(sorted(named_drawings.HUES)), st.sampled_from(sorted(named_drawings.HUES)), st.integers(0, 255))
def test_recolouring_turns_the_main_hue_alone_and_keeps_the_other_parts(start, target, grey):
    degrees, saturation = named_drawings.HUES[start]
    main = Image.new("HSV", (32, 32), (round(degrees * 256 / 360) % 256, round(220 * saturation), 230)).convert("RGB")
    opposite = tuple(255 - value for value in main.getpixel((0, 0)))  # far in hue: it must stay
    main.paste(opposite, (0, 0, 3, 3))
    main.paste((grey, grey, grey), (29, 29, 32, 32))
    main.putalpha(200)
    changed = named_drawings.recoloured(main, target)
    hue = changed.convert("RGB").convert("HSV").getpixel((16, 16))[0] * 360 / 256
    assert abs((hue - named_drawings.HUES[target][0] + 180) % 360 - 180) < 4
    assert changed.getchannel("A").getextrema() == (200, 200)
    assert all(abs(a - b) <= 4 for a, b in zip(changed.getpixel((1, 1))[:3], opposite, strict=True))
    assert changed.getpixel((31, 31))[:3] == (grey, grey, grey)
