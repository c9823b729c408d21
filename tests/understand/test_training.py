"""Training a chat model: the run, the loop and the ranks are those of any training, and what is special to it holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_runs import Crash, assert_same_run, crash_at, metrics
from tiny_chat import conversations, language_folder, row, small_chat
from tiny_generator import tokens_folder

from openvision3.cli import main
from openvision3.data.images import open_image
from openvision3.hub import complete_checkpoints
from openvision3.train.run import Start
from openvision3.understand import folder
from openvision3.understand.llava import trained_tensors
from openvision3.understand.training import Talking, train_chat


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("chat")
    tokens_folder(place)
    language_folder(place)
    return place


@pytest.fixture(scope="module")
def aligned(root) -> Path:
    train_chat(small_chat(root, "aligned"))
    return root / "aligned"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(complete_checkpoints(run)[-1] / "model.safetensors")


def test_a_run_that_dies_goes_on_bit_for_bit(root, monkeypatch):
    train_chat(small_chat(root, "whole", train_language="lora", micro_batch=2))
    with pytest.raises(Crash), monkeypatch.context() as dying:
        crash_at(dying, 5)
        train_chat(small_chat(root, "broken", train_language="lora", micro_batch=2))
    assert [path.name for path in complete_checkpoints(root / "broken")] == ["step-00000003"]
    train_chat(small_chat(root, "broken", train_language="lora", micro_batch=2, resume=True))
    assert_same_run(root / "whole", root / "broken")


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("bloom", True), ("gpt_neox", False)])
def test_all_of_a_language_model_of_any_family_is_trained_saved_and_resumed(root, monkeypatch, family, tied):
    name = f"{family}-{tied}"
    settings = {"train_language": "full", "language": language_folder(root, name, family=family, tie_word_embeddings=tied)}
    with pytest.raises(Crash), monkeypatch.context() as dying:
        crash_at(dying, 5)
        train_chat(small_chat(root, f"full-{name}", **settings))
    outcome = train_chat(small_chat(root, f"full-{name}", **settings, resume=True))
    saved = weights(root / f"full-{name}")
    assert saved.keys() == trained_tensors(outcome.training.model.network).keys() and ("lm_head.weight" in saved) == (not tied)
    half = folder.load(root / f"full-{name}", precision="bf16").model.network
    assert half.lm_head.weight.dtype == half.get_input_embeddings().weight.dtype == torch.bfloat16
    opened = folder.load(root / f"full-{name}")
    for key, value in opened.model.network.state_dict().items():
        assert "vision_tower" in key or torch.equal(value, outcome.training.model.network.state_dict()[key]), key


def test_a_folder_holds_the_projector_alone_and_opens_to_the_network_of_the_run(root, aligned):
    saved = weights(aligned)
    assert {name.split(".")[1] for name in saved} == {"multi_modal_projector"} and len(saved) == 4
    config = json.loads((complete_checkpoints(aligned)[-1] / "config.json").read_text())
    assert config["model_type"] == "openvision3-chat" and config["training"]["steps"] == 6 and config["template"] == "chat"
    opened = folder.load(aligned)
    network = opened.model.network
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in saved.items())
    image = opened.layout.squares(open_image(Image.new("RGB", (30, 40), "red"))).float() / 127.5 - 1
    ids = opened.prompts.ask([{"role": "user", "content": "<image>\nwhat is this ?"}], [opened.layout.tokens(30, 40)])
    answer = network.generate(torch.tensor([ids]), pixel_values=image, max_new_tokens=4, do_sample=False)
    assert len(ids) < answer.shape[1] <= len(ids) + 4


def test_instructing_starts_from_what_was_aligned_also_with_tiles(root, aligned):
    config = small_chat(root, "instructed", init=str(aligned), train_language="lora", steps=1, eval_every=0)
    training = Talking(config, Start(root / "instructed"))
    for name, value in weights(aligned).items():
        assert torch.equal(training.model.network.state_dict()[name], value), name
    assert training.begun.endswith("4 tensors")
    train_chat(small_chat(root, "tiles", init=str(aligned), train_language="lora", anyres=True, steps=2, length=300))
    assert "the token that ends a row of tiles is new" in (root / "tiles" / "log.txt").read_text()
    assert "model.image_newline" in weights(root / "tiles")
    train_chat(small_chat(root, "further", init=str(root / "tiles"), train_language="lora", anyres=True, steps=1, length=300))
    folder.load(root / "further")


def test_a_chat_model_learns_what_it_sees(root):
    """Four colours have four names, which no text tells; only the image can."""
    place = root / "colours"
    place.mkdir()
    rows = []
    for i in range(24):
        name, colour = (("red", "red"), ("green", "green"), ("cat", "blue"), ("dog", "white"))[i % 4]
        Image.new("RGB", (32, 32), colour).save(place / f"{i}.png")
        rows.append(row(i, f"{i}.png", "<image>\nwhat is this ?", name))
    (place / "data.json").write_text(json.dumps(rows[4:]))
    (place / "held.json").write_text(json.dumps(rows[:4]))
    data = {"data": (str(place / "data.json"),), "val": (str(place / "held.json"),)}
    config = small_chat(root, "learns", **data, train_language="full", steps=40, eval_every=0, save_every=0, batch=8)
    config.optimizer.learning_rate = 1e-2
    train_chat(config)
    assert metrics(root / "learns")[-1]["val/exact"] == 1.0
    assert "cat" in (root / "learns" / "samples" / "step-00000040.txt").read_text()


def test_an_image_that_is_missing_or_damaged_is_named_counted_and_replaced(root):
    place = Path(conversations(root, "holes")).parent
    (place / "img" / "0.png").write_bytes((place / "img" / "0.png").read_bytes()[:60])
    (place / "img" / "2.png").unlink()
    train_chat(small_chat(root, "holes-run", data=(str(place / "data.json"),), images=(str(place),), val=(), steps=3))
    skipped = [json.loads(line) for line in (root / "holes-run" / "skipped.jsonl").read_text().splitlines()]
    assert {problem["reason"] for problem in skipped} == {"truncated", "missing"} and all("data.json:" in problem["key"] for problem in skipped)
    assert any("no image img/2.png" in problem["detail"] for problem in skipped)
    assert "skipped samples: " in (root / "holes-run" / "log.txt").read_text()


def test_a_conversation_that_is_cut_is_used_and_counted(root):
    rows = [row(i, None, "what is this ?", "a cat . " * 40) for i in range(4)]
    (root / "long.json").write_text(json.dumps(rows))
    train_chat(small_chat(root, "long-run", data=(str(root / "long.json"),), val=(), steps=2, length=30))
    assert "4 longer than the allowed tokens (cut)" in (root / "long-run" / "log.txt").read_text()


def test_held_out_conversations_are_scored_as_the_loss_is(root, aligned):
    """val/loss is the training loss of the held-out rows as one batch."""
    from openvision3.data.batches import to_device
    from openvision3.understand.batches import collate, read_example

    opened, config = folder.load(aligned), small_chat(root, "again")
    from openvision3.understand.conversations import Conversations

    held = Conversations(config.val)
    batch = to_device(collate([read_example(held, i, opened.prompts, opened.layout) for i in range(len(held))], opened.layout, opened.prompts.pad_id), "cpu")
    with torch.no_grad():
        loss = opened.model(batch)[0].item()
    assert metrics(aligned)[-1]["val/loss"] == pytest.approx(loss, rel=1e-5)


def test_recomputed_activations_change_no_number(root, aligned):
    train_chat(small_chat(root, "recomputed", checkpointing=True))
    for one, other in zip(metrics(aligned), metrics(root / "recomputed"), strict=True):
        assert one.get("train/loss") == other.get("train/loss")
    assert all(torch.equal(value, weights(root / "recomputed")[name]) for name, value in weights(aligned).items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train_language", "more", "processes"),
    [
        ("frozen", ["--micro-batch", "1"], 1),
        ("lora", ["--workers", "2"], 2),
        ("full", ["--parallel", "fsdp", "--micro-batch", "1", "--checkpointing"], 2),
        ("lora", ["--parallel", "fsdp", "--checkpointing"], 2),
    ],
)
def test_micro_batches_and_two_processes_train_what_one_does(root, train_language, more, processes):
    def start(out: Path, *more: str, processes: int = 1) -> None:
        config = small_chat(root, out.name)
        words = ["train", "chat_align", "--data", *config.data, "--val", *config.val, "--tower", config.tower, "--language", config.language, "--size", "32"]
        words += ["--batch", "4", "--steps", "6", "--precision", "fp32", "--device", "cpu", "--log-every", "2", "--save-every", "3", "--eval-every", "3"]
        words += ["--optimizer.warmup-steps", "2", "--length", "96", "--train-language", train_language, *more, "--out", str(out)]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, *launcher, "-m", "openvision3", *words], capture_output=True, text=True, env=environment, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]

    one, other = root / f"one-{train_language}", root / f"other-{train_language}-{processes}-{len(more)}"
    if not one.exists():
        start(one)
    start(other, *more, processes=processes)
    for a, b in zip(metrics(one), metrics(other), strict=True):
        for metric in ("train/loss", "val/loss"):
            assert metric not in a or a[metric] == pytest.approx(b[metric], rel=1e-3), (a["step"], metric)
    for tensor, value in weights(one).items():
        assert (value - weights(other)[tensor]).abs().max() < 5e-4, tensor


def test_a_chat_model_of_other_weights_or_settings_is_refused(root, aligned, tmp_path):
    with pytest.raises(ValueError, match=r"was trained with the language .* but .* has"):
        folder.load(aligned, language=language_folder(root, "other language", seed=1))
    with pytest.raises(ValueError, match="was trained with the tower"):
        folder.load(aligned, tower="mini")
    with pytest.raises(FileNotFoundError, match=r"the tower of .* is not found: .*; name it with --tower"):
        folder.load(aligned, tower="nowhere")
    with pytest.raises(FileNotFoundError, match="unknown chat model 'nowhere'"):
        folder.load("nowhere")
    with pytest.raises(ValueError, match=r"is an openvision3 model, .*; name a chat model"):
        folder.load(tokens_folder(root))
    from openvision3.pipeline import load

    with pytest.raises(ValueError, match="is a chat model, which answers questions about images"):
        load(aligned)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer": -2}, "was trained with --layer -1, not -2"),
        ({"language": "wide"}, "was trained with --language .* not .*wide"),
        ({"tower": "mini"}, "was trained with --tower"),
        ({"init": "lora"}, "was trained with train_language lora; set --train-language lora"),
        ({"init": "lora", "train_language": "lora", "lora_rank": 8}, "was trained with lora_rank 16; set --lora-rank 16"),
    ],
)
def test_a_projector_that_would_mean_something_else_is_refused(root, aligned, changes: dict[str, Any], words):
    init = str(aligned)
    if changes.get("init") == "lora":
        init = str(root / "lora-start")
        if not (root / "lora-start").exists():
            train_chat(small_chat(root, "lora-start", train_language="lora", steps=1, eval_every=0))
    if changes.get("language") == "wide":
        changes = {"language": language_folder(root, "wide", width=48)}
    with pytest.raises(ValueError, match=words):
        train_chat(small_chat(root, "refused", **(changes | {"init": init})))
    assert not (root / "refused").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--template", "llama"], "cannot be 'llama'. Choose one of auto, chat, vicuna, plain"),
        (["--size", "40"], "multiple of 16"),
        (["--layer", "9"], "layer 9: the tower has 2 blocks"),
        (["--data", "nowhere.json"], "no such file of conversations: nowhere.json"),
        (["--images", "nowhere"], "no such folder or archive of images: nowhere"),
        (["--tower", "nowhere"], "unknown model 'nowhere'"),
        (["--language", "nowhere"], "unknown language model 'nowhere'"),
        (["--init", "nowhere"], "unknown chat model 'nowhere'"),
        (["--minutes", "3"], "set --steps"),
        (["--length", "6"], "cannot be used, the last because of: too long"),
        (["--lora-rank", "0"], "lora_rank 0 must be at least 1"),
        (["--lenght", "6"], "Did you mean '--length'"),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_written(root, tmp_path, capsys, arguments, words):
    config = small_chat(root, "bad")
    common = ["--data", *config.data, "--val", *config.val, "--tower", config.tower, "--language", config.language, "--size", "32", "--batch", "4"]
    code = main(["train", "chat_align", *common, "--device", "cpu", "--precision", "fp32", "--out", str(tmp_path / "run"), *arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and words in lines[0] and not (tmp_path / "run").exists(), lines


def test_conversations_that_are_trained_on_are_no_held_out_ones(root):
    data = conversations(root, "train")
    with pytest.raises(ValueError, match="--val and --data share"):
        train_chat(small_chat(root, "shared", val=(data,)))


def test_a_resumed_run_refuses_other_conversations_and_other_images(root, aligned):
    other = conversations(root, "other", 6)
    with pytest.raises(ValueError, match=r"data was .* which holds something else"):
        train_chat(small_chat(root, "aligned", data=(other,), resume=True))
    place = Path(conversations(root, "swapped")).parent
    for image in (place / "img").iterdir():
        Image.new("RGB", (9, 9), "black").save(image)
    with pytest.raises(ValueError, match="images was"):
        train_chat(small_chat(root, "aligned", images=(str(place),), resume=True))
