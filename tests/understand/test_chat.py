"""A chat model answers the same whole, in pieces, in any batch and through transformers' own generation; a conversation goes on."""

import json
import shutil
import subprocess
import sys
import threading

import pytest
import torch
import transformers
import vqa_files
from PIL import Image
from safetensors.torch import load_file
from tiny_chat import COLOURS, conversations, language_folder, row, small_chat
from tiny_generator import tokens_folder

from openvision3 import hub
from openvision3.cli import main
from openvision3.data.images import ImageError
from openvision3.evaluate.peers.image_text import load_image_text
from openvision3.understand import folder
from openvision3.understand.chat import Chat, load_chat
from openvision3.understand.language import GGUF_SHA256, find_language
from openvision3.understand.training import train_chat


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("chats")
    tokens_folder(place)
    language_folder(place)
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 30), colour).save(place / f"{name}.png")
    return place


@pytest.fixture(scope="module")
def run(root):
    """A chat model that tells four colours apart, and says yes to a second question."""
    place = root / "colours"
    place.mkdir()
    rows = []
    for i, name in enumerate([*COLOURS] * 6):
        Image.new("RGB", (32, 32), COLOURS[name]).save(place / f"{i}.png")
        turns = [f"<image>\n{'what is this ?' if i // 4 % 2 else 'describe it .'}", f"a {name}", "is it in the image ?", "yes" if i % 4 < 2 else "no"]
        rows.append(row(i, f"{i}.png", *turns[: 2 + 2 * (i % 3 > 0)]))
    (place / "data.json").write_text(json.dumps(rows))
    config = small_chat(root, "run", data=(str(place / "data.json"),), val=(), train_language="full", steps=50, eval_every=0, save_every=0, batch=12)
    config.optimizer.learning_rate = 1e-2
    train_chat(config)
    return root / "run"


@pytest.fixture(scope="module")
def chat(run) -> Chat:
    return load_chat(run, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def tiles(root) -> Chat:
    """A few steps of LoRA, with tiles."""
    train_chat(small_chat(root, "tiles", anyres=True, train_language="lora", length=300, steps=4, data=(conversations(root, "t"),), val=()))
    return load_chat(root / "tiles", device="cpu", precision="fp32")


def test_it_answers_what_it_sees(chat, root):
    for name in COLOURS:
        assert chat.ask(root / f"{name}.png", "what is this ?") == f"a {name}"
        with Image.open(root / f"{name}.png") as image:
            assert chat.ask(image, "what is this ?") == f"a {name}"


def test_earlier_turns_are_part_of_the_question(chat, root):
    for name, answer in zip(COLOURS, ("yes", "yes", "no", "no"), strict=True):
        assert chat.ask(root / f"{name}.png", "is it in the image ?", history=[("what is this ?", f"a {name}")]) == answer
    seen = []
    chat_ids = chat.prompts.ask
    try:
        chat.prompts.ask = lambda messages, images: seen.append((messages, images)) or chat_ids(messages, images)
        chat.ask([root / "red.png", root / "dog.png"], "and ?", history=[("one ?", "yes"), ("two ?", "no")], max_tokens=1)
    finally:
        del chat.prompts.ask
    [(messages, images)] = seen
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "user"] and images == [4, 4]
    assert messages[0]["content"] == "<image>\n<image>\none ?" and not any("<image>" in message["content"] for message in messages[1:])


def test_pieces_are_the_answer_and_come_before_it_is_whole(chat, root, monkeypatch):
    pieces = [*chat.stream(root / "cat.png", "what is this ?")]
    assert "".join(pieces).strip() == "a cat" and len(pieces) > 1 and all(pieces)


def test_writing_stops_when_nobody_listens_any_more(tiles, root, monkeypatch):
    calls, threads = [], threading.active_count()
    forward = tiles.network.lm_head.forward
    monkeypatch.setattr(tiles.network.lm_head, "forward", lambda *args: calls.append(1) or forward(*args))
    tiles.network.generation_config.eos_token_id = None  # it would write all that it may
    try:
        pieces = tiles.stream(None, "what ?", max_tokens=150)
        next(pieces)
        pieces.close()
        assert len(calls) < 150 and threading.active_count() == threads
    finally:
        tiles.network.generation_config.eos_token_id = tiles.prompts.ends


def test_an_error_while_writing_reaches_the_one_who_asked(chat, root, monkeypatch):
    def fail(*args, **settings):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(chat.network, "generate", fail)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        chat.ask(root / "cat.png", "what is this ?")


@pytest.mark.parametrize("which", ["chat", "tiles"])
def test_answers_are_the_same_in_any_batch(which, root, request):
    model = request.getfixturevalue(which)
    images = [root / "red.png", None, root / "dog.png", [root / "cat.png", root / "red.png"], root / "cat.png", Image.new("RGB", (70, 20), "blue")]
    prompts = ["what is this ?", "is there a dog in it ?", "what is this ?", "is this one of two ?", "describe it . how many ?", "what is this ?"]
    alone = [model.ask(image, prompt, max_tokens=9) for image, prompt in zip(images, prompts, strict=True)]
    assert model.answer_batch(images, prompts, max_tokens=9) == alone
    assert model.answer_batch(images[::-1], prompts[::-1], max_tokens=9) == alone[::-1]
    assert model.answer_batch([], []) == []
    assert len({*alone}) > 1


def test_the_cache_changes_nothing(tiles, root):
    """Against the whole conversation computed anew for each word, without cache and without `generate`."""
    with Image.open(root / "dog.png") as image:
        inputs = tiles._inputs([tiles._row(image, "what is this ?", ())], 8)
    ids = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(8):
            logits = tiles.network(**(inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}), use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    written = ids[0, inputs["input_ids"].shape[1] :].tolist()
    end = next((place for place, token in enumerate(written) if token in tiles.prompts.ends), None)
    expected = tiles.prompts.tokenizer.decode(written[:end], skip_special_tokens=True).strip()
    assert tiles.ask(root / "dog.png", "what is this ?", max_tokens=8) == expected


def test_bf16_answers_too(run, root):
    model = load_chat(run, device="cpu", precision="bf16")
    assert model.precision == "bf16"
    assert [model.ask(root / f"{name}.png", "what is this ?") for name in COLOURS] == [f"a {name}" for name in COLOURS]


def test_saved_for_transformers_it_is_evaluated_with_the_same_answers(chat, root, tmp_path, monkeypatch):
    from transformers import LlavaProcessor
    from transformers.models.auto import configuration_auto, image_processing_auto, modeling_auto

    from openvision3.adapters.transformers import image_processor

    images = image_processor(chat.opened.pipeline, "pad")
    images.size = {"height": 32, "width": 32}
    processor = LlavaProcessor(images, chat.prompts.tokenizer, patch_size=16, vision_feature_select_strategy="full", num_additional_image_tokens=0)
    for part in (chat.network, processor):
        part.save_pretrained(tmp_path / "llava")
    for mapping in (configuration_auto.CONFIG_MAPPING, modeling_auto.MODEL_MAPPING, image_processing_auto.IMAGE_PROCESSOR_MAPPING):
        monkeypatch.setattr(mapping, "_extra_content", {})  # as in a process that has not made our classes known
    opened = load_image_text(str(tmp_path / "llava"))
    shown, asked = [root / f"{name}.png" for name in COLOURS], ["what is this ?", "describe it .", "describe it .", "what is this ?"]
    expected = chat.answer_batch(shown, asked, max_tokens=6)
    assert opened.answer([Image.open(path) for path in shown], asked, 6) == expected and len({*expected}) > 2
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    config["text_config"]["hidden_size"] = 64
    (tmp_path / "llava" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="have other shapes than its config"):
        load_image_text(str(tmp_path / "llava"))


@pytest.mark.parametrize("anyres", [False, True])
def test_what_lora_learned_is_saved_for_transformers_own_class(root, tmp_path, anyres):
    name = f"lora {anyres}"
    config = small_chat(root, name, train_language="lora", anyres=anyres, length=300, steps=4, eval_every=0, save_every=0, val=())
    config.optimizer.learning_rate = 1e-2
    train_chat(config)
    network = load_chat(root / name, device="cpu", precision="fp32").network
    network.save_pretrained(tmp_path / "llava")
    opened, told = getattr(transformers, type(network).__name__).from_pretrained(tmp_path / "llava", output_loading_info=True)
    assert not any(told.values()), told
    ids = torch.arange(12)[None]
    with torch.no_grad():
        learned = network(input_ids=ids).logits
        torch.testing.assert_close(opened(input_ids=ids).logits, learned)
        for part, parameter in network.named_parameters():
            if "lora_B" in part:
                parameter.zero_()
        assert (network(input_ids=ids).logits - learned).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["bloom", "gpt_neox", "qwen2"])
def test_a_language_model_of_any_family_answers_the_same_alone_and_in_a_batch(root, family):
    config = small_chat(root, family, language=language_folder(root, f"{family} language", family=family), train_language="lora", steps=2, val=(), eval_every=0)
    train_chat(config)
    model = load_chat(root / family, device="cpu", precision="fp32")
    assert model.room == (None if family == "bloom" else 512)
    prompts = ["what is this ?", "is there a dog in it ? how many ?"]
    images = [root / "red.png", root / "dog.png"]
    assert model.answer_batch(images, prompts, max_tokens=5) == [model.ask(*pair, max_tokens=5) for pair in zip(images, prompts, strict=True)]


def test_the_language_models_own_ways_to_decode_are_set_aside(chat, run, root, tmp_path):
    own = tmp_path / "language"
    shutil.copytree(root / "language", own)
    changes = {"do_sample": True, "temperature": 9.0, "num_beams": 3, "repetition_penalty": 50.0, "no_repeat_ngram_size": 1, "min_new_tokens": 20}
    settings = json.loads((own / "generation_config.json").read_text())
    (own / "generation_config.json").write_text(json.dumps(settings | changes))
    other = load_chat(run, device="cpu", precision="fp32", language=str(own))
    for name in COLOURS:
        question = f"what is this ? a {name}"  # a penalty on repetition would forbid the answer
        assert other.ask(root / f"{name}.png", question) == chat.ask(root / f"{name}.png", question)


def test_a_model_that_was_trained_without_questions_is_refused(root, capsys):
    train_chat(small_chat(root, "captions", template="plain", steps=1, val=(), eval_every=0))
    capsys.readouterr()
    vqa_files.pope(root / "pope")
    asked = ["evaluate", "vqa", "pope", str(root / "captions"), "--data", str(root / "pope"), "--out", str(root / "out")]
    for argv in (["chat", str(root / "cat.png"), "what is this ?", "--model", str(root / "captions")], asked):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert "was trained without questions (template plain)" in error and "llava15_instruct --init" in error and error.count("\n") == 1


def test_info_describes_a_run_and_a_shipped_one(run, tiles, tmp_path, capsys, monkeypatch):
    assert main(["info", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "answers questions about images of 32 px, padded to a square; conversations are written as chat" in shown
    assert "language, sha256" in shown and "all of it" in shown and "steps: 50" in shown
    shutil.copytree(tiles.folder, tmp_path / "small")
    monkeypatch.setattr(folder, "SHIPPED", tmp_path)
    assert main(["info", "small", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (
        told["anyres"]
        and told["train_language"] == "lora"
        and sum(told["parameters"].values()) == sum(tensor.numel() for tensor in load_file(tiles.folder / "model.safetensors").values())
    )


def test_a_shipped_model_names_the_shipped_mini_and_smollm2():
    for name in folder.shipped():
        config = folder.read(folder.find(name))
        assert (config.tower, config.language, config.language_sha256) == ("mini", "smollm2", GGUF_SHA256)
        assert config.tower_sha256 == hub.weights_sha256(hub.find_folder("mini")), "train it again on the mini that ships"


@pytest.mark.slow
def test_the_shipped_model_answers_two_questions_from_the_command_line(root):
    if not folder.shipped():
        pytest.skip("no chat model ships")
    try:
        find_language("smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "openvision3", "chat", str(root / "cat.png"), "What is this?", "What colour is it?"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, answer, second, colour = [line for line in done.stdout.splitlines() if not line.startswith("unsure")][:4]
    assert (first, second) == ("> What is this?", "> What colour is it?") and answer and colour


def test_it_is_known_by_its_weights(chat, run):
    assert chat.folder == folder.find(run) and len(chat.sha256) == 64 and chat.name == chat.folder.name


def test_what_cannot_be_asked_is_one_line(chat, root):
    for question, settings, words in (
        (" ", {}, "question is empty"),
        ("what ?", {"max_tokens": 0}, "max_tokens 0 must be 1 or more"),
        ("what ?", {"max_tokens": 600}, "reads 512 tokens"),
        ("what <image> ?", {}, "write one for each image"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            chat.ask(root / "cat.png", question, **settings)
        assert "\n" not in str(error.value)
    with pytest.raises(ImageError, match="no such image"):
        chat.ask(root / "absent.png", "what ?")
    with pytest.raises(ValueError, match="precision 'fp8' is unknown"):
        load_chat("", precision="fp8")


def test_the_command_holds_a_conversation(run, root, capsys):
    image = str(root / "cat.png")
    options = ["--model", str(run), "--device", "cpu", "--precision", "fp32"]
    assert main(["chat", image, "what is this ?", *options]) == 0
    assert capsys.readouterr().out == "a cat\n"
    assert main(["chat", image, "what is this ?", "is it in the image ?", *options]) == 0
    assert capsys.readouterr().out == "> what is this ?\na cat\n> is it in the image ?\nno\n"
    assert main(["chat", image, "what is this ?", "is it in the image ?", *options, "--json"]) == 0
    turns = [{"question": "what is this ?", "answer": "a cat"}, {"question": "is it in the image ?", "answer": "no"}]
    assert json.loads(capsys.readouterr().out) == {"image": image, "turns": turns, "in_distribution": None}


def test_the_command_reads_questions_from_a_terminal(run, root, capsys, monkeypatch):
    typed = iter(["what is this ?", "is it in the image ?", ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert main(["chat", str(root / "red.png"), "--model", str(run), "--device", "cpu", "--precision", "fp32"]) == 0
    assert capsys.readouterr().out == "a red\nyes\n"


def test_the_command_says_when_an_image_looks_like_nothing_it_knows(run, root, capsys, monkeypatch):
    monkeypatch.setattr(Chat, "in_distribution", lambda self, image: False)
    monkeypatch.setattr(Chat, "kinds", ("drawings", "flowers"))
    assert main(["chat", str(root / "cat.png"), "what is this ?", "--model", str(run), "--precision", "fp32"]) == 0
    assert capsys.readouterr().out == "unsure: this looks like nothing that the model was trained on (drawings, flowers); its guess:\na cat\n"


def test_bad_input_of_the_command_is_one_line(run, root, tmp_path, capsys, monkeypatch):
    image = str(root / "cat.png")
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    for argv, words in (
        ([image], "no question given"),
        ([image, "what ?", " "], "a question is empty"),
        ([image, "what ?", "--max-tokens", "0"], "max_tokens 0 must be 1 or more"),
        ([str(tmp_path / "absent.png"), "what ?"], "no such image"),
        ([image, "what ?", "--model", str(tmp_path)], "is no chat model: it holds no model.safetensors"),
        ([image, "what ?", "--model", str(run), "--language", str(tmp_path / "absent")], "--language"),
        ([image, "what ?", "--precision", "fp8"], "fp8"),
    ):
        assert main(["chat", *argv]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error


def test_control_characters_of_an_answer_do_not_steer_the_terminal(run, root, capsys, monkeypatch):
    monkeypatch.setattr(Chat, "stream", lambda self, *args, **settings: iter(["a \x1b[2J", "cat\nb"]))
    assert main(["chat", str(root / "cat.png"), "what is this ?", "--model", str(run), "--precision", "fp32"]) == 0
    assert capsys.readouterr().out == "a \\x1b[2Jcat\nb\n"
