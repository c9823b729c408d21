"""What can be fetched, where it lies, and that bytes other than the published or first fetched ones are refused."""

import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from file_server import BYTES, SHA256, names, server  # noqa: F401
from tiny_pipeline import pipeline

from openvision3 import cli
from openvision3.cli import fetch as cli_fetch
from openvision3.fetch import download as downloading
from openvision3.fetch.sources import ASSETS, Asset, File
from openvision3.fetch.store import find, find_hub
from openvision3.hub import load_vae, vae_licence
from openvision3.train.recipes import base_high_res, base_low_res

OTHER = BYTES[::-1]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """No cache of this machine is seen; returns the default folder."""
    for name in ("HF_TOKEN", "HF_ENDPOINT", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "openvision3"


@pytest.fixture
def two(server, monkeypatch) -> Asset:
    """A foreign asset of two files, one of known hash, and a hub asset of one; the local server has both."""
    server.files |= {"/mirror": BYTES, "/small": b"small", "/owner/repo/resolve/main/vae/config.json": b"{}"}
    foreign = Asset(
        "two",
        (File("big.pth", (f"{server.url}/gone", f"{server.url}/mirror"), SHA256, "a page", len(BYTES)), File("sub/small.pth", (f"{server.url}/small",))),
        "a test",
        "MIT",
    )
    hub = Asset("hub", (File("vae/config.json"),), "a test", "MIT", hub="owner/repo", gated=True)
    for asset in (foreign, hub):
        monkeypatch.setitem(ASSETS, asset.name, asset)
    monkeypatch.setattr("openvision3.cli.fetch.ASSETS", {"two": foreign, "hub": hub})
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    return foreign


def refused(capsys, *argv: str) -> str:
    assert cli.main(["fetch", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("openvision3: ") and err.count("\n") == 1, err
    return err


# -- the table -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asset", ASSETS.values(), ids=ASSETS)
def test_an_entry_says_where_from_and_claims_no_more_than_is_published(asset):
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", asset.name) and asset.needed_by and asset.licence and asset.files
    assert bool(asset.hub) != all(file.urls for file in asset.files)
    assert len({file.name for file in asset.files}) == len(asset.files)
    for file in asset.files:
        assert not Path(file.name).is_absolute() and ".." not in Path(file.name).parts and Path(file.name).name != "fetched.json"
        assert all(url.startswith("https://") for url in file.urls)
        assert re.fullmatch("([0-9a-f]{64})?", file.sha256) and bool(file.sha256) == bool(file.hash_from)
        assert file.size is None or file.sha256, "a size stands with the hash it was published with"
        in_name = re.search(r"-([0-9a-f]{8})\.pth$", file.name)
        assert in_name is None or file.sha256.startswith(in_name[1]), "torch.hub's names hold the first digits"


def test_the_recipes_of_the_paper_name_what_was_fetched(home):
    def named() -> list[str]:
        low, high = base_low_res(), base_high_res()
        return [low.tokenizer, high.model.loss.lpips_backbone, high.model.loss.lpips_linear]

    files = ["bert-base-uncased/tokenizer.json", "lpips-vgg/vgg16-397923af.pth", "lpips-vgg/vgg.pth"]
    assert named() == files, "below the working folder, where nothing was fetched"
    assert all(file in [f.name for f in ASSETS[name].files] for name, file in (path.split("/") for path in files))
    for file in files:
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_bytes(b"")
    assert named() == [str(home / file) for file in files]
    (home.parent.parent / "lpips-vgg").mkdir()
    (home.parent.parent / files[2]).write_bytes(b"")
    assert named()[2] == files[2], "the working folder comes first"
    assert base_low_res().model.vae.name == ASSETS["flux-vae"].hub


# -- fetching ------------------------------------------------------------------------------------------------------------


def test_files_come_into_a_folder_of_the_name_with_a_record_beside_them(two, home, server, capsys):
    assert cli.main(["fetch", "two"]) == 0
    assert names(home) == ["two/big.pth", "two/fetched.json", "two/sub/small.pth"]
    record = json.loads((home / "two/fetched.json").read_text())
    assert {name: (entry["sha256"], entry["size"]) for name, entry in record.items()} == {
        "big.pth": (SHA256, len(BYTES)),
        "sub/small.pth": (hashlib.sha256(b"small").hexdigest(), 5),
    }
    assert record["big.pth"]["url"].endswith("/mirror"), "the first source had moved"
    out = capsys.readouterr().out
    assert "two -> " in out and "as published" in out and "recorded" in out and "MIT" in out
    count = len(server.gets)
    assert cli.main(["fetch", "two"]) == 0 and len(server.gets) == count, "what is here is read and not fetched"
    assert "was here" in capsys.readouterr().out


def test_a_hub_file_keeps_its_place_and_its_commit_is_recorded(two, home, server):
    server.headers["/owner/repo/resolve/main/vae/config.json"] = {"X-Repo-Commit": "abc"}
    assert cli.main(["fetch", "hub"]) == 0
    assert names(home) == ["hub/fetched.json", "hub/vae/config.json"]
    assert json.loads((home / "hub/fetched.json").read_text())["vae/config.json"]["commit"] == "abc"


def test_other_bytes_than_the_published_ones_are_refused_and_dropped(two, home, server, capsys):
    server.files["/mirror"] = OTHER
    message = refused(capsys, "two")
    assert "/mirror: SHA256 hash" in message and f"expected {SHA256} but got {hashlib.sha256(OTHER).hexdigest()}" in message and "Expected: a page" in message
    assert names(home) == []


def test_what_was_first_fetched_is_enforced_from_then_on(two, home, server, capsys):
    assert cli.main(["fetch", "two"]) == 0
    (home / "two/sub/small.pth").unlink()
    server.files["/small"] = b"other"
    capsys.readouterr()
    message = refused(capsys, "two")
    for data in (b"small", b"other"):
        assert hashlib.sha256(data).hexdigest() in message
    assert "as first fetched" in message and "remove" in message and not (home / "two/sub/small.pth").exists()
    server.files["/small"] = b"small"
    assert cli.main(["fetch", "two"]) == 0


@pytest.mark.parametrize("bytes_, words", [(b"smalx", "has sha256"), (b"sma", "has 3 bytes, expected 5")])
def test_a_damaged_file_is_reported_and_never_replaced(two, home, capsys, bytes_, words):
    assert cli.main(["fetch", "two"]) == 0
    (home / "two/sub/small.pth").write_bytes(bytes_)
    capsys.readouterr()
    assert words in refused(capsys, "two") and (home / "two/sub/small.pth").read_bytes() == bytes_
    assert cli.main(["fetch", "--check", "two"]) == 2
    out, err = capsys.readouterr()
    assert out == "two: damaged\n" and words in err
    assert cli.main(["fetch", "--check", "--json"]) == 2
    [entry] = json.loads(capsys.readouterr().out)
    assert entry["state"] == "damaged" and words in entry["problems"][0]


def test_a_damaged_record_is_reported(two, home, capsys):
    assert cli.main(["fetch", "two"]) == 0
    for text in ("{", "[]", '{"big.pth": {"sha256": 1}}'):
        (home / "two/fetched.json").write_text(text)
        capsys.readouterr()
        assert "was not written by fetch" in refused(capsys, "two")
        assert cli.main(["fetch", "--check"]) == 2
        assert cli.main(["fetch", "--list", "--json"]) == 0


def test_files_that_were_put_there_by_hand_are_recorded(two, home, capsys):
    (home / "two/sub").mkdir(parents=True)
    (home / "two/big.pth").write_bytes(BYTES)
    (home / "two/sub/small.pth").write_bytes(b"mine")
    assert cli.main(["fetch", "two"]) == 0 and set(json.loads((home / "two/fetched.json").read_text())) == {"big.pth", "sub/small.pth"}
    assert cli.main(["fetch", "--check"]) == 0 and "two: here" in capsys.readouterr().out


def test_a_file_that_cannot_be_fetched_is_reported_and_the_others_are_fetched(two, home, server, capsys):
    server.statuses["/owner/repo/resolve/main/vae/config.json"] = [401]
    assert cli.main(["fetch", "hub", "two"]) == 2
    out, err = capsys.readouterr()
    assert "two -> " in out and "accept its licence" in err and "1 of 2 could not be fetched" in err
    assert cli.main(["fetch", "all", "--json"]) == 0
    assert {entry["name"]: entry["state"] for entry in json.loads(capsys.readouterr().out)} == {"two": "here", "hub": "here"}


def test_another_folder_is_used_and_how_to_name_it_is_shown(two, home, tmp_path, capsys):
    assert cli.main(["fetch", "two", "--to", "elsewhere"]) == 0
    assert names(tmp_path / "elsewhere") == ["two/big.pth", "two/fetched.json", "two/sub/small.pth"] and not home.exists()
    assert f"commands look in {home}" in capsys.readouterr().out
    (tmp_path / "file").write_bytes(b"")
    assert "file is a file; name a folder with --to" in refused(capsys, "two", "--to", "file")


def test_a_folder_that_cannot_be_made_is_reported_before_anything_is_requested(two, server, capsys, monkeypatch):
    def no_folder(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", no_folder)
    message = refused(capsys, "two", "hub", "--to", "new/folder")
    assert "nothing can be written into new/folder (" in message and "Read-only file system); name another folder with --to" in message and server.gets == []


def test_names_may_be_separated_by_commas(two, home):
    assert cli.main(["fetch", "two,hub"]) == 0
    assert {path.parent.name for path in home.glob("*/fetched.json")} == {"two", "hub"}


# -- refusals ------------------------------------------------------------------------------------------------------------


def test_a_gated_asset_says_what_to_do(two, server, home, monkeypatch, capsys):
    monkeypatch.setattr(downloading, "TOKEN_ENDPOINT", server.url)
    server.statuses["/owner/repo/resolve/main/vae/config.json"] = [401, 403]
    message = refused(capsys, "hub")
    assert "HTTP 401" in message and "no token is set" in message and "accept its licence on https://huggingface.co/owner/repo, then set HF_TOKEN" in message
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    message = refused(capsys, "hub")
    assert "HTTP 403" in message and "the token of HF_TOKEN was shown" in message and "hf_secret" not in message
    assert not home.exists()


def test_a_moved_file_is_reported(two, server, capsys):
    del server.files["/mirror"]
    assert "HTTP 404" in (message := refused(capsys, "two")) and "it has moved" in message


def test_offline_nothing_is_requested(two, server, home, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "two is not here and HF_HUB_OFFLINE is set" in refused(capsys, "two")
    assert server.gets == [] and not home.exists()


def test_an_odd_endpoint_is_refused(two, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc")
    assert "choose an address that begins with https://" in refused(capsys, "hub")


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "no names given; choose from `openvision3 fetch --list`, or fetch all"),
        (["flux-vea"], "Did you mean 'flux-vae'?"),
        (["../../etc"], "unknown file to fetch '../../etc'. Choose one of all, flux-vae"),
        (["/etc/passwd", "--check"], "unknown file to fetch"),
        (["--list", "--check"], "give one of them"),
    ],
)
def test_wrong_arguments_get_one_line(home, capsys, argv, words):
    assert words in refused(capsys, *argv) and not home.exists()


# -- listing -------------------------------------------------------------------------------------------------------------


def test_the_list_names_everything_with_its_state(two, home, capsys):
    assert cli.main(["fetch", "two"]) == 0
    capsys.readouterr()
    assert cli.main(["fetch", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: (line, below) for line, below in itertools.pairwise(lines) if line}
    assert " here " in rows["two"][0] and "1.05 MB" in rows["two"][0] and " absent " in rows["hub"][0] and "unknown" in rows["hub"][0]
    assert "licence MIT (gated)" in rows["hub"][1]
    (home / "two/sub/small.pth").unlink()
    assert cli.main(["fetch", "--list", "two", "--json"]) == 0
    [entry] = json.loads(capsys.readouterr().out)
    assert entry["state"] == "incomplete" and entry["files"][0]["sha256"] == SHA256 and entry["licence"] == "MIT"


@pytest.mark.parametrize("columns", [60, 80, 100, 160, 250])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_no_name_state_or_licence_is_cut_and_no_line_is_wider_than_the_terminal(home, capsys, monkeypatch, columns, is_terminal):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("rich.console.Console.is_terminal", is_terminal)
    assert cli_fetch._list(list(ASSETS.values()), home, False) == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert "\u2026" not in "".join(lines) and max(map(len, lines[:-2])) <= columns
    rows = [line.split()[:2] for line in lines if re.match(r"[a-z0-9]", line)]
    assert [row for row in rows if row[0] in ASSETS] == [[name, "absent"] for name in ASSETS]
    seen = " ".join(" ".join(lines).split())
    assert all(f"licence {asset.licence}{' (gated)' if asset.gated else ''}; for {asset.needed_by}; from " in seen for asset in ASSETS.values())


def test_the_real_list_is_shown_without_a_network_or_torch(home):
    code = (
        "import socket, sys\nsocket.socket.connect = None\nfrom openvision3.cli import main\n"
        "assert main(['fetch', '--list']) == 0 and main(['fetch', '--list', '--json']) == 0\nassert 'torch' not in sys.modules"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
    assert all(name in seen for name in ASSETS) and seen.count("unknown") > 5


def test_check_of_an_empty_place(home, capsys):
    assert cli.main(["fetch", "--check"]) == 0 and "nothing is in" in capsys.readouterr().out


# -- finding -------------------------------------------------------------------------------------------------------------


def test_find_gives_what_was_fetched(two, home):
    with pytest.raises(FileNotFoundError, match=r"^FID needs big\.pth; get it with `openvision3 fetch two` \(licence: MIT; from 127\.0\.0\.1\)$"):
        find("two", "big.pth", needed_by="FID")
    assert cli.main(["fetch", "two", "hub"]) == 0
    assert find("two", "big.pth") == home / "two/big.pth"
    assert find("two") == home / "two"
    assert find("hub") == home / "hub/vae/config.json", "of one file, the file"
    with pytest.raises(ValueError, match=r"two has no file '\.\./x'; choose one of big\.pth, sub/small\.pth"):
        find("two", "../x")
    with pytest.raises(ValueError, match="unknown file to fetch 'none'"):
        find("none")
    (home / "two/big.pth").write_bytes(b"cut")
    with pytest.raises(ValueError, match="has 3 bytes, expected 1,048,576"):
        find("two", "big.pth")


def test_find_sees_the_caches_of_torch_and_of_the_hub(two, tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError,
        match=r"needs weights-inception.*get it with `openvision3 fetch inception-2015` \(licence: unknown for the weights.*from github\.com/toshas",
    ):
        find("inception-2015")
    checkpoints = tmp_path / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    name = ASSETS["inception-2015"].files[0].name
    (checkpoints / name).write_bytes(b"")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert find("inception-2015") == checkpoints / name
    snapshot = in_hub_cache(tmp_path / "hub", "owner/repo", "vae/config.json")
    assert find("hub") == snapshot / "vae/config.json"


def in_hub_cache(cache: Path, hub: str, *files: str) -> Path:
    """The layout of the hub's client."""
    folder = cache / f"models--{hub.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("a" * 40)
    for file in files:
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).write_bytes(b"{}")
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    return snapshot


def test_a_vae_named_by_its_hub_id_is_found_where_it_was_fetched_and_never_downloaded(home, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", None)
    with pytest.raises(
        FileNotFoundError,
        match=r"the VAE needs black-forest-labs/FLUX\.1-schnell, .*get it with `openvision3 fetch flux-vae` \(licence: Apache-2\.0; gated, from",
    ):
        load_vae("black-forest-labs/FLUX.1-schnell")
    with pytest.raises(FileNotFoundError, match=r"the VAE needs some/other, .*`hf download some/other`, or name a folder"):
        load_vae("some/other")
    with pytest.raises(FileNotFoundError, match="needs some/bad id,"):
        load_vae("some/bad id")
    pipeline().vae.network.save_pretrained(home / "flux-vae" / "vae")
    vae = load_vae("black-forest-labs/FLUX.1-schnell")
    assert vae.name == "black-forest-labs/FLUX.1-schnell" and vae_licence(vae.name) == "Apache-2.0"
    by_name = load_vae("flux-vae")
    assert (by_name.name, by_name.sha256) == (vae.name, vae.sha256)
    with pytest.raises(FileNotFoundError, match="get it with `openvision3 fetch sd-vae`"):
        load_vae("sd-vae")
    with pytest.raises(FileNotFoundError, match=r"no such VAE: rae-mae; choose .* a VAE of `openvision3 fetch --list` such as flux-vae"):
        load_vae("rae-mae")
    in_hub_cache(tmp_path / "hub", "some/other", "config.json", "diffusion_pytorch_model.safetensors")
    snapshot = find_hub("some/other", (("config.json", "diffusion_pytorch_model.safetensors"),), "the VAE")
    shutil.rmtree(snapshot)
    shutil.copytree(home / "flux-vae" / "vae", snapshot)
    assert load_vae("some/other").sha256 == vae.sha256
