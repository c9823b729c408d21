"""A released encoder, which has no decoder, starts a run that trains one; what nothing has trained refuses."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import metrics, pictures
from tiny_peers import save_openvision3

import openvision3
from openvision3.cli import main
from openvision3.evaluate.peers.table import load_peer, open_vit
from openvision3.evaluate.suite import NEEDS, CannotRun, needs
from openvision3.files import sha256_of
from openvision3.generate.config import GenerateConfig
from openvision3.generate.space import open_space
from openvision3.generate.training import train_generator
from openvision3.hub import complete_checkpoints, read_config
from openvision3.train.config import PretrainConfig
from openvision3.train.decoder_config import DecoderConfig, latent_decoder
from openvision3.train.latent_decoder import train_decoder
from openvision3.train.pretrain import pretrain
from openvision3.train.released import UNTRAINED, find_released, read_settings

PEER = "peer:openvision3-b2-256"


def bare(folder: Path, count: int, seed: int) -> str:
    """Images without captions."""
    for path in pictures(folder, count, seed).glob("*.txt"):
        path.unlink()
    return str(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("released")
    save_openvision3(root / "released", width=64)
    bare(root / "train", 6, 0), bare(root / "held", 2, 1)
    return root


def decoding(root: Path, out: str, init: str = "", **changes) -> DecoderConfig:
    """2 steps at 32 px of a decoder of size tiny."""
    config = latent_decoder(init or f"{PEER}={root / 'released'}")
    config.data, config.val = (str(root / "train"),), (str(root / "held"),)
    config.model.latent_decoder = replace(config.model.latent_decoder, size="tiny")
    config.size, config.batch, config.steps, config.precision, config.out = 32, 2, 2, "fp32", str(root / out)
    config.log_every, config.save_every, config.eval_every, config.pixel_share = 1, 1, 2, 0.5
    config.optimizer.warmup_steps = 1
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.fixture(scope="module")
def run(root) -> Path:
    return train_decoder(decoding(root, "run")).folder


def test_the_settings_are_those_of_the_file_and_the_decoder_is_the_papers(root):
    model, size = read_settings(f"{PEER}={root / 'released'}")
    assert (model.encoder.size, model.encoder.embed_dim, model.encoder.token_norm, size) == ("tiny", 24, "none", 256)
    assert model.latent_decoder.size == "B" and model.vae.name == str(root / "released" / "vae") and model.vae.shift is False
    save_openvision3(root / "small", width=64, side=28)
    assert read_settings(f"peer:openvision3-b2-224={root / 'small'}")[1] == 224


def test_tokens_and_embedding_are_those_of_the_released_encoder(root, run):
    model = openvision3.load(run, device="cpu")
    vit, _, _ = open_vit(find_released("openvision3-b2-256", str(root / "released")))
    images = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        pooled, tokens = vit(model.vae.network.encode(images).latent_dist.mean * 0.3611)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(model.encode(images), tokens, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.embed_images(images), torch.nn.functional.normalize(pooled, dim=1), rtol=1e-4, atol=1e-4)
    features = load_peer("openvision3-b2-256", str(root / "released")).features
    assert features is not None and model.functions().features is not None
    torch.testing.assert_close(model.functions().features(images), features(images), rtol=1e-4, atol=1e-4)  # type: ignore[misc]


def test_only_the_latent_decoder_changes_on_images_without_captions(run):
    first, last = (load_file(checkpoint / "model.safetensors") for checkpoint in complete_checkpoints(run))
    for name, value in first.items():
        assert torch.equal(value, last[name]) != name.startswith("latent_decoder."), name
    held_out = [row for row in metrics(run) if "val/psnr" in row]
    assert held_out and all({"val/loss", "val/noisy_psnr", "val/latent"} <= set(row) for row in held_out)
    assert not any(word in name for row in metrics(run) for name in row for word in ("caption", "contrastive", "r@"))


def test_the_model_records_where_its_encoder_comes_from_and_what_was_never_trained(root, run):
    training = read_config(complete_checkpoints(run)[-1]).training
    assert training["untrained"] == UNTRAINED and training["trained"] == "the latent decoder alone"
    begun = training["started_from"]
    assert begun["name"] == f"{PEER}={root / 'released'}" and begun["hub"] == "UCSC-VLAA/openvision3-vit-base-patch2-32"
    assert begun["sha256"] == sha256_of(root / "released" / "open_clip_pytorch_model.bin") and "see its model card" in begun["licence"]


def test_the_model_rebuilds_and_draws_and_whatever_needs_texts_refuses(root, run, tmp_path, capsys):
    model = openvision3.load(run, device="cpu")
    image = torch.zeros(1, 3, 32, 32)
    assert model.reconstruct(image).shape == (1, 3, 32, 32)
    for name, part in (("caption", "captioner"), ("answer", "captioner")):
        with pytest.raises(ValueError, match=f"the {part} of this model was never trained"):
            getattr(model, name)(image)
    for ask in (lambda: model.embed_texts("a heart"), lambda: model.classify(image, ["a heart", "a bus"])):
        with pytest.raises(ValueError, match=r"the text encoder of this model was never trained.*encodes, embeds and rebuilds images"):
            ask()
    functions = model.functions()
    for kind in NEEDS:
        if kind in ("reconstruction", "probe"):
            needs(functions, kind)
        else:
            with pytest.raises(CannotRun):
                needs(functions, kind)
    assert functions.note.endswith("never trained: text encoder, captioner")
    assert open_space(str(run)).text_encoder is None
    config = GenerateConfig(tokens=str(run), data=(str(root / "train"),), val=(str(root / "held"),), condition="text", size=32, out=str(tmp_path / "dit"))
    with pytest.raises(ValueError, match=r"the text encoder of .* was never trained, so no text can be read; set --condition label or none"):
        train_generator(config)
    model.save(tmp_path / "model")
    assert main(["info", str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out.count("(never trained)") == 2
    assert main(["caption", str(root / "held"), "--model", str(tmp_path / "model")]) == 2
    assert main(["calibrate", str(tmp_path / "model"), "--train", str(root / "train"), "--val", str(root / "held")]) == 2
    told = capsys.readouterr().err
    assert "the captioner of this model was never trained" in told and "Traceback" not in told


def test_an_evaluation_of_what_was_never_trained_is_not_run(root, run, tmp_path, capsys):
    options = ["--data", str(root / "held"), "--metrics", "psnr", "--device", "cpu", "--size", "32", "--out", str(tmp_path / "scores"), "--sigmas", "0"]
    assert main(["evaluate", "reconstruction", str(run), *options]) == 0
    assert main(["evaluate", "captioning", str(run), "--data", str(root / "held"), "--device", "cpu", "--out", str(tmp_path / "none")]) == 2
    assert "cannot write captions" in capsys.readouterr().err


def test_the_model_is_trained_further_and_its_record_stays(root, run):
    further = train_decoder(decoding(root, "further", str(run))).folder
    training = read_config(complete_checkpoints(further)[-1]).training
    assert training["untrained"] == UNTRAINED and training["started_from"]["started_from"]["hub"] == "UCSC-VLAA/openvision3-vit-base-patch2-32"


def test_only_the_latent_decoder_of_such_a_model_can_be_trained(root, run):
    parts = read_config(complete_checkpoints(run)[-1]).model
    for init in (str(run), f"{PEER}={root / 'released'}"):
        config = PretrainConfig(init=init, model=parts, data=(str(root / "train"),), val=(str(root / "held"),), size=32, batch=4, steps=1)
        config.out, config.precision = str(root / "refused"), "fp32"
        with pytest.raises(ValueError, match="has no trained text encoder and captioner to go on from; openvision3 train latent_decoder"):
            pretrain(config)
    assert not (root / "refused").exists()


def test_a_run_resumes_without_the_released_file(root, run):
    moved = shutil.copytree(root / "released", root / "moved")
    config = decoding(root, "resumed", f"{PEER}={moved}", steps=1)
    train_decoder(config)
    (moved / "open_clip_pytorch_model.bin").unlink(), (moved / "open_clip_config.json").unlink()
    saved = json.loads((root / "resumed" / "config.json").read_text())
    (root / "resumed" / "config.json").write_text(json.dumps(saved | {"steps": 2}))  # as if it had been stopped at the first
    assert main(["train", "latent_decoder", "--out", str(root / "resumed"), "--resume"]) == 0
    training = read_config(complete_checkpoints(root / "resumed")[-1]).training
    assert training["steps"] == 2 and training["untrained"] == UNTRAINED
    assert training["started_from"]["sha256"] == sha256_of(root / "released" / "open_clip_pytorch_model.bin")


def other_positions(folder: Path) -> None:
    state = torch.load(folder / "open_clip_pytorch_model.bin")
    state["module.visual.positional_embedding"][5, 3] += 0.1
    torch.save(state, folder / "open_clip_pytorch_model.bin")


def other_network(folder: Path) -> None:
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["pool_type"] = "tok"
    (folder / "open_clip_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (other_positions, "its positions are up to 0.1 from sines and cosines of whole places"),
        (lambda folder: save_openvision3(folder, width=48), "holds an encoder of width 48 with 2 blocks, which is none of tiny"),
        (other_network, "pool_type 'tok' in vision_cfg is not of an OpenVision encoder"),
        (lambda folder: shutil.rmtree(folder / "vae"), "black-forest-labs/FLUX.1-schnell, which is not on this machine.*openvision3 fetch flux-vae"),
        (lambda folder: (folder / "open_clip_pytorch_model.bin").unlink(), "holds no open_clip_model.safetensors or open_clip_pytorch_model.bin"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_what_cannot_be_taken_over_is_one_line(root, tmp_path, capsys, monkeypatch, spoil, words):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = shutil.copytree(root / "released", tmp_path / "released")
    spoil(folder)
    command = ["train", "latent_decoder", "--init", f"{PEER}={folder}", "--data", str(root / "train"), "--val", str(root / "held"), "--size", "32"]
    assert main([*command, "--batch", "2", "--steps", "1", "--pixel-share", "0.5", "--out", str(tmp_path / "out"), "--model.latent-decoder.size", "tiny"]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("openvision3: ")]
    assert not (tmp_path / "out").exists()
    assert re.search(words, line), line


def test_other_settings_than_the_encoders_are_refused(root):
    for change, words in (
        ({"vae": {"name": "embedded"}}, "holds no flux-vae"),
        ({"vae": {"shift": True}}, "latents that are not shifted"),
        ({"encoder": {"gelu": "tanh"}}, "has an encoder of other settings"),
    ):
        config = decoding(root, "refused")
        for part, fields in change.items():
            setattr(config.model, part, replace(getattr(config.model, part), **fields))
        if "name" in change.get("vae", {}):
            config.model.vae.shift = None
        with pytest.raises(ValueError, match=words):
            train_decoder(config)


def test_an_encoder_that_is_not_fetched_can_be_estimated_and_other_peers_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert read_settings("peer:openvision3-l2-256")[0].encoder.size == "L" and read_settings("peer:openvision3-b2-224")[1] == 224
    assert main(["estimate", "latent_decoder", "--init", PEER, "--gpus", "h100:1"]) == 0
    assert "latent decoder" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"unknown released encoder 'clip-b16'.*Choose one of openvision3-b2-256"):
        latent_decoder("peer:clip-b16")
