"""A finished training goes into the package whole, without the names of this machine."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import small
from tiny_chat import small_chat
from tiny_generator import small_generator, tokens_folder

from openvision3 import hub
from openvision3.generate.flow import Sampling
from openvision3.generate.generator import load_generator
from openvision3.generate.training import train_generator
from openvision3.pipeline import load
from openvision3.train.pretrain import pretrain
from openvision3.understand import folder as chats
from openvision3.understand.language import GGUF_SHA256
from openvision3.understand.training import train_chat

spec = importlib.util.spec_from_file_location("ship", Path(__file__).parents[2] / "tools" / "ship.py")
ship = importlib.util.module_from_spec(spec)
sys.modules["ship"] = ship
spec.loader.exec_module(ship)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ship")
    pretrain(small(root, "run", steps=2))
    return root / "run"


@pytest.fixture
def assets(tmp_path, monkeypatch) -> Path:
    """A package of its own with an older mini in it."""
    monkeypatch.setattr(hub, "ASSETS", tmp_path / "assets")
    (tmp_path / "assets" / "mini").mkdir(parents=True)
    (tmp_path / "assets" / "mini" / "old").write_text("")
    return tmp_path / "assets"


def test_the_mini_is_replaced_by_the_run_with_its_command_and_no_path_of_this_machine(run, assets):
    (run / "command.txt").write_text(f"openvision3 train tiny --data {run.parent}/train\n2026-01-01\n")
    ship.main(ship.Options("mini", (run,), rename=(f"{run.parent}=DATA",), licence="CC BY-SA 4.0"))
    shipped = assets / "mini"
    assert (shipped / "command.txt").read_text() == "openvision3 train tiny --data DATA/train\n"
    assert not (shipped / "old").exists() and not (shipped / "vae").exists() and [path.name for path in assets.iterdir()] == ["mini"]
    for path in ("config.json", "command.txt", "README.md"):
        assert str(run.parent) not in (shipped / path).read_text()
    model = load(shipped)
    assert model.training["licence"] == "CC BY-SA 4.0" and model.fingerprint is not None and model.fingerprint.data == ("DATA/train",)


def test_a_generator_ships_in_bf16_with_its_commands_and_draws_what_the_run_draws(assets, tmp_path, monkeypatch):
    tokens_folder(tmp_path)
    monkeypatch.chdir(tmp_path)  # so that it names the model of its tokens without a path of this machine
    train_generator(small_generator(tmp_path, "first", tokens="./tokens", steps=1), "small")
    train_generator(small_generator(tmp_path, "run", tokens="./tokens", init=str(tmp_path / "first")), "small")
    for name in ("first", "run"):
        (tmp_path / name / "command.txt").write_text(f"openvision3 train {name} --data {tmp_path}/train\n")
    ship.main(ship.Options("generators/drawings", (tmp_path / "first", tmp_path / "run"), rename=(f"{tmp_path}=DATA",), licence="CC BY-SA 4.0"))
    shipped = assets / "generators" / "drawings"
    assert (shipped / "command.txt").read_text() == "openvision3 train first --data DATA/train\nopenvision3 train run --data DATA/train\n"
    assert ship.stopped(tmp_path / "run") == ""
    recorded = tmp_path / "run" / "config.json"
    recorded.write_text(json.dumps(json.loads(recorded.read_text()) | {"steps": 9}))
    assert ship.stopped(tmp_path / "run") == "  # stopped at step 6"
    config = json.loads((shipped / "config.json").read_text())
    assert (config["training"]["steps"], config["training"]["started_from"]["steps"]) == (6, 1)
    assert config["training"]["licence"] == "CC BY-SA 4.0" and config["training"]["data"] == ["DATA/train"]
    assert {tensor.dtype for name, tensor in load_file(shipped / "model.safetensors").items() if name.endswith(".weight")} == {torch.bfloat16}
    one, other = (load_generator(path, device="cpu").generate("red", sampling=Sampling(steps=2)) for path in (tmp_path / "run", shipped))
    assert np.abs(np.asarray(one[0], float) - np.asarray(other[0], float)).mean() < 2


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory) -> Path:
    """A run that says that it saw through the shipped mini and spoke through SmolLM2."""
    root = tmp_path_factory.mktemp("chat")
    train_chat(small_chat(root, "run", train_language="lora", steps=2, init="", val=(), eval_every=0))
    (root / "run" / "command.txt").write_text(f"openvision3 train small --data {root}/train/data.json\n")
    return root / "run"


def test_a_chat_model_ships_in_bf16_with_its_commands_and_the_names_of_its_parts(chat_run, assets):
    config = chats.find(chat_run) / "config.json"
    rename = (f"{chat_run.parent}=TALK",)
    with pytest.raises(ValueError, match=r"was trained with a tower of sha256 .* but mini has .*; train it with --tower mini"):
        ship.main(ship.Options("chats/small", (chat_run,), rename=rename))
    shas = {"tower_sha256": hub.weights_sha256(hub.find_folder("mini"))}
    config.write_text(json.dumps(json.loads(config.read_text()) | shas))
    with pytest.raises(ValueError, match=r"was trained with a language of sha256 .* but smollm2 has .*; train it with --language smollm2"):
        ship.main(ship.Options("chats/small", (chat_run,), rename=rename))
    shas["language_sha256"] = GGUF_SHA256
    config.write_text(json.dumps(json.loads(config.read_text()) | shas))
    with pytest.raises(ValueError, match=r"would name /.*, a place of this machine; give it another name with --rename"):
        ship.main(ship.Options("chats/small", (chat_run,), licence="CC BY-SA 4.0"))
    assert not [*(assets / "chats").iterdir()], "what is refused leaves nothing"
    ship.main(ship.Options("chats/small", (chat_run,), rename=rename, licence="CC BY-SA 4.0"))
    shipped = assets / "chats" / "small"
    assert sorted(path.name for path in shipped.iterdir()) == ["README.md", "command.txt", "config.json", "model.safetensors"]
    assert (shipped / "command.txt").read_text() == "openvision3 train small --data TALK/train/data.json\n"
    read = chats.read(shipped)
    assert (read.tower, read.language) == ("mini", "smollm2") and read.training["licence"] == "CC BY-SA 4.0"
    weights, trained = load_file(shipped / "model.safetensors"), load_file(config.parent / "model.safetensors")
    assert weights.keys() == trained.keys() and all(torch.equal(weights[name], trained[name].bfloat16()) for name in trained)


def test_what_cannot_ship_leaves_the_old_one(run, assets):
    with pytest.raises((ValueError, OSError)):
        ship.main(ship.Options("mini", (run.parent / "nowhere",)))
    assert (assets / "mini" / "old").exists() and len([*assets.iterdir()]) == 1


def test_the_stages_of_a_vae_are_recorded_one_in_the_other(assets, tmp_path, run):
    from openvision3.data.fingerprint import FILE

    stages = []
    for name in ("first", "more"):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("config.json", "diffusion_pytorch_model.safetensors"):
            (folder / file).write_bytes((hub.EMBEDDED / file).read_bytes())
        (folder / "training.json").write_text(json.dumps({"command": f"{tmp_path}/{name}"}))
        stages.append(folder)
    prints = (next((run / "checkpoints").glob("step-*")) / FILE,)
    ship.main(ship.Options("vae", tuple(stages), rename=(f"{tmp_path}=DATA",), fingerprints=prints))
    training = json.loads((assets / "vae" / "training.json").read_text())
    assert training == {"command": "DATA/more", "started_from": {"command": "DATA/first"}} and hub.load_vae(assets / "vae").sha256


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"which": "mini", "runs": ()}, "at least one run"),
        ({"which": "chat/small", "runs": (Path("x"),)}, "choose one of mini, vae, generators/NAME and chats/NAME"),
        ({"which": "vae", "runs": (Path("x"),)}, "--fingerprints"),
        ({"which": "mini", "runs": (Path("x"),), "rename": ("=y",)}, "must look like OLD=NEW"),
    ],
)
def test_options_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        ship.Options(**fields)
