"""Asking a benchmark: chance for random weights, 100 % for an oracle, the same answers however it is interrupted and shared, errors apart from scores."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
import vqa_files as files

from openvision3.evaluate import answering
from openvision3.evaluate.metrics.vqa import ANSWERS, BENCHMARKS, Question
from openvision3.evaluate.options import VqaOptions
from openvision3.evaluate.protocol import AnsweringFunctions
from openvision3.evaluate.questions import QuestionSet
from openvision3.evaluate.results import Results, Scores
from openvision3.evaluate.tables import split, with_differences
from openvision3.evaluate.vqa import VqaEvaluation, _draw, evaluate_vqa


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(answering, "PART", 5)


class Model:
    """Answers by a function of (image, prompt), and remembers what it was asked."""

    def __init__(self, reply, name: str = "model"):
        self.reply, self.name, self.prompts = reply, name, []

    def answer(self, images, prompts, max_tokens):
        self.prompts += prompts
        return [self.reply(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def open(self, options) -> AnsweringFunctions:
        return AnsweringFunctions(self.name, self.answer, sha256=f"sha of {self.name}")


def yes(image, prompt) -> str:
    return "Yes."


def dog(image, prompt) -> str:
    """The right answer to every question of vqa_files.pope."""
    return "Yes" if "dog" in prompt else "No"


def run(benchmark: str, folder: Path, out: Path, model: Model, **options) -> VqaEvaluation:
    if not folder.exists():
        files.ORIGINAL[benchmark](folder)
    evaluation = evaluate_vqa(benchmark, VqaOptions(data=(str(folder),), out=str(out), **{"batch": 2, **options}), model.open)
    evaluation.save(out)
    return evaluation


def value(evaluation: VqaEvaluation, metric: str):
    return next(row.number for row in evaluation.results.rows if row.metric == metric)


@pytest.mark.parametrize("benchmark", [*BENCHMARKS])
def test_an_oracle_has_everything_right(tmp_path, benchmark):
    right = {}

    def oracle(image, prompt) -> str:
        return right[image.size, prompt]

    paths = files.ORIGINAL[benchmark](tmp_path / "data")
    questions = QuestionSet(benchmark, [str(path) for path in paths])
    for one in questions.questions:
        right[questions.image(one.image).size, BENCHMARKS[benchmark].prompt(one)] = one.answer
    found = run(benchmark, tmp_path / "data", tmp_path / "out", Model(oracle))
    for row in found.results.rows:
        if row.metric.endswith(("accuracy", "accuracy_plus", ": f1", ": precision", ": recall")):
            assert row.number.value == 1, row.metric
        if row.metric.endswith(": score"):
            assert row.number.value == 200
    assert value(found, "unmatched").value == 0 and not found.results.left_out


def test_the_numbers_stand_in_results_and_every_answer_in_a_line(tmp_path):
    found = run("pope", tmp_path / "data", tmp_path / "out", Model(dog))
    assert Results.load(tmp_path / "out").rows == found.results.rows
    rows = [json.loads(line) for line in (tmp_path / "out" / ANSWERS).read_text().splitlines()]
    assert [row["key"] for row in rows] == [question.key for question in found.questions] and len(rows) == 24
    assert rows[0] | {"pixels": "", "model": ""} == {
        "model": "", "benchmark": "pope", "key": "adversarial/0", "part": "adversarial", "image": "COCO_0.jpg", "pixels": "",
        "question": "Is there a dog in the image?",
        "choices": [], "answer": "yes", "accept": [], "written": "Yes", "read": "yes", "error": None,
    }  # fmt: skip
    assert not (tmp_path / "out" / answering.PARTS).exists()


class Interrupted(KeyboardInterrupt):
    pass


def test_an_interrupted_evaluation_goes_on_to_the_same_answers(tmp_path):
    run("pope", tmp_path / "data", tmp_path / "whole", Model(dog))

    class Stops(Model):
        def answer(self, images, prompts, max_tokens):
            if len(self.prompts) > 13:
                raise Interrupted
            return super().answer(images, prompts, max_tokens)

    with pytest.raises(Interrupted):
        run("pope", tmp_path / "data", tmp_path / "out", Stops(dog))
    rest = Model(dog)
    run("pope", tmp_path / "data", tmp_path / "out", rest)
    assert len(rest.prompts) == 14  # ten questions in two parts were answered
    assert (tmp_path / "out" / ANSWERS).read_bytes() == (tmp_path / "whole" / ANSWERS).read_bytes()
    again = Model(dog)
    run("pope", tmp_path / "data", tmp_path / "out", again)
    assert not again.prompts


def test_an_answer_may_hold_any_kind_of_line_break(tmp_path):
    for _ in range(2):
        found = run("pope", tmp_path / "data", tmp_path / "out", Model(lambda image, prompt: "yes\u2028no\x85 \u2029\r\n"))
    assert {row["written"] for row in found.answers} == {"yes\u2028no\x85 \u2029\r\n"} and Scores.load(tmp_path / "out")


def test_answers_are_not_kept_when_other_images_are_at_hand(tmp_path):
    files.pope(tmp_path / "data")
    image = tmp_path / "data" / "val2014" / "COCO_0.jpg"
    content = image.read_bytes()
    image.unlink()
    run("pope", tmp_path / "data", tmp_path / "out", Model(dog))
    image.write_bytes(content)
    with pytest.raises(ValueError, match="holds answers by other settings"):
        run("pope", tmp_path / "data", tmp_path / "out", Model(dog))


@pytest.mark.parametrize("change", ["model", "max_tokens", "count", "benchmark"])
def test_answers_by_other_settings_are_never_mixed_in(tmp_path, change):
    run("pope", tmp_path / "data", tmp_path / "out", Model(dog))
    before = (tmp_path / "out" / ANSWERS).read_bytes()
    model, options, benchmark = Model(dog, "other" if change == "model" else "model"), {"max_tokens": {"max_tokens": 5}, "count": {"count": 1}}, "pope"
    if change == "benchmark":
        benchmark = "mme"
    with pytest.raises(ValueError, match=r"holds answers by other settings .*name another folder with --out, or remove it"):
        run(benchmark, tmp_path / ("mme" if change == "benchmark" else "data"), tmp_path / "out", model, **options.get(change, {}))
    assert (tmp_path / "out" / ANSWERS).read_bytes() == before


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_batches_do_not_show_in_the_answers(tmp_path, batch):
    run("mme", tmp_path / "data", tmp_path / "a", Model(dog))
    run("mme", tmp_path / "data", tmp_path / "b", Model(dog), batch=batch)
    assert (tmp_path / "a" / ANSWERS).read_bytes() == (tmp_path / "b" / ANSWERS).read_bytes()


def test_no_more_images_are_open_than_one_batch_asks_about(tmp_path, monkeypatch):
    held: list[weakref.ref] = []
    most: list[int] = []
    read = QuestionSet.image

    def image(self, name):
        held.append(weakref.ref(opened := read(self, name)))
        return opened

    class Counts(Model):
        def answer(self, images, prompts, max_tokens):
            most.append(sum(one() is not None for one in held))
            return super().answer(images, prompts, max_tokens)

    monkeypatch.setattr(answering, "PART", 24)
    monkeypatch.setattr(QuestionSet, "image", image)
    run("pope", tmp_path / "data", tmp_path / "out", Counts(dog), batch=2)
    assert max(most) == 1 and len(held) == 12, "two questions about one image, which is opened once for both"


def test_errors_are_counted_apart_from_wrong_answers(tmp_path):
    files.pope(tmp_path / "data")
    (tmp_path / "data" / "val2014" / "COCO_0.jpg").unlink()
    (tmp_path / "data" / "val2014" / "COCO_1.jpg").write_bytes(b"no image")

    def fails(image, prompt) -> str:
        if image.width == 22 and "cat" in prompt:  # COCO_2
            raise RuntimeError("out of order")
        return yes(image, prompt)

    found = run("pope", tmp_path / "data", tmp_path / "out", Model(fails))
    assert value(found, "all: accuracy").value == pytest.approx(6 / 9) and value(found, "all: accuracy").count == 9
    counts = {one["reason"]: one["count"] for one in found.results.left_out}
    assert counts == {
        "questions whose image is missing": 6,
        "questions whose image is not an image": 6,
        "questions at which the model failed, first with RuntimeError, out of order": 3,
    }
    assert {(one["key"], one["reason"]) for one in found.results.skipped} == {("COCO_0.jpg", "missing"), ("COCO_1.jpg", "not an image")}
    failed = next(row for row in found.answers if (row["error"] or "").startswith("failed"))
    assert failed["written"] == failed["read"] == "" and failed["image"] == "COCO_2.jpg"


def test_a_model_that_always_fails_ends_the_command(tmp_path):
    def fails(image, prompt) -> str:
        raise RuntimeError("out of order")

    with pytest.raises(ValueError, match="model answered none of 5 questions in a row: failed: RuntimeError, out of order"):
        run("pope", tmp_path / "data", tmp_path / "out", Model(fails))


def test_a_failure_at_the_only_question_of_the_last_part_is_counted_and_does_not_end_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "PART", 23)

    def fails(image, prompt) -> str:
        if image.width == 23 and "cat" in prompt:
            raise RuntimeError("out of order")
        return yes(image, prompt)

    found = run("pope", tmp_path / "data", tmp_path / "out", Model(fails))
    assert found.answers[23]["error"] == "failed: RuntimeError, out of order" and [one["count"] for one in found.results.left_out] == [3]


def test_a_full_gpu_says_what_to_lower(tmp_path):
    def full(image, prompt) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(ValueError, match="out of GPU memory with --batch 2; lower --batch or --max-tokens"):
        run("pope", tmp_path / "data", tmp_path / "out", Model(full))


def test_a_blank_image_stands_in_place_of_each_and_is_another_model_over_the_same_questions(tmp_path):
    def looks(image, prompt) -> str:
        return "Yes" if image.getpixel((0, 0)) != (128, 128, 128) and "dog" in prompt else "no"

    seeing = run("pope", tmp_path / "data", tmp_path / "seeing", Model(looks))
    blank = run("pope", tmp_path / "data", tmp_path / "blank", Model(looks), blank=True)
    assert value(seeing, "all: accuracy").value == 1 and value(blank, "all: accuracy").value == 0.5
    rows = seeing.results.rows + blank.results.rows
    tables = split(rows)
    assert len(tables) == 1
    scores = [(evaluation.results.rows, Scores.load(tmp_path / name)) for name, evaluation in (("seeing", seeing), ("blank", blank))]
    differences = {one.metric: one for one in with_differences(tables, scores)}
    assert differences["all: accuracy"].difference == 0.5 and {differences["all: f1"].a, differences["all: f1"].b} == {"model", "model, grey images"}


def test_count_takes_questions_of_each_part_from_all_over_its_file_and_all_where_there_are_no_more(tmp_path):
    whole = run("pope", tmp_path / "data", tmp_path / "whole", Model(dog)).questions
    keys = [one.key for one in whole]
    parts = Counter(one.part for one in whole)
    before: set[str] = set()
    for count in (1, 2, 3, 1000):
        asked = [one.key for one in run("pope", tmp_path / "data", tmp_path / str(count), Model(dog), count=count).questions]
        assert asked == [key for key in keys if key in {*asked}] and before <= {*asked}, "in the order of the files, and more of the same"
        assert Counter(key.partition("/")[0] for key in asked) == {part: min(count, of) for part, of in parts.items()}
        before = {*asked}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_count_keeps_the_two_questions_of_an_image_of_mme_together(tmp_path, count):
    found = run("mme", tmp_path / "data", tmp_path / "out", Model(yes), count=count)
    assert {*Counter(one.image for one in found.questions).values()} == {2}
    for part in ("artwork", "count"):
        assert value(found, f"{part}: score").count == count + count % 2 and value(found, f"{part}: score").value == 50


def test_a_part_of_the_questions_has_yes_and_no_alike_though_they_take_turns(tmp_path):
    questions = [Question(f"q{number}", "", "", "yes" if number % 2 else "no", "all") for number in range(2000)]
    for count in (100, 250, 500):
        right = [one.answer for one in _draw(questions, count)]
        assert len(right) == count and abs(right.count("yes") / count - 0.5) < 0.15


# -- the protocol on an untouched model of transformers ---------------------------------------------------------------


def tiny_llava(folder: Path) -> Path:
    """LlavaForConditionalGeneration with random weights and its processor, as save_pretrained writes them. Its vocabulary holds the words of answers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = ["<unk>", "<pad>", "</s>", "<image>", "Yes", "No", *"abcdefgh"]
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", additional_special_tokens=["<image>"])
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(images, fast, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8, projection_dim=8)
    text = LlamaConfig(vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.5)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_an_untouched_llava_of_random_weights_has_chance_and_answers_alike_in_any_batch(tmp_path):
    pytest.importorskip("transformers")
    from PIL import Image

    from openvision3.evaluate.peers.image_text import is_image_text, load_image_text

    folder = tiny_llava(tmp_path / "llava")
    assert is_image_text(str(folder)) and not is_image_text(str(tmp_path))
    chance = torch.Generator().manual_seed(0)
    rows = []
    for number in range(60):
        pixels = torch.randint(0, 256, (24, 24, 3), generator=chance, dtype=torch.uint8)
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(tmp_path / "data" / f"{number}.png")
        for label in ("yes", "no"):
            rows.append({"question_id": len(rows), "image": f"{number}.png", "text": f"{'abcdefgh'[len(rows) % 8]} {'hgfe'[len(rows) % 3]}", "label": label})
    files.as_json(tmp_path / "data" / "toy_pope_random.json", rows, lines=True)
    model = load_image_text(str(folder))
    options = VqaOptions(data=(str(tmp_path / "data"),), out=str(tmp_path / "out"), batch=7, max_tokens=4)
    found = evaluate_vqa("pope", options, lambda _: model)
    accuracy = value(found, "random: accuracy")
    assert accuracy.low <= 0.5 <= accuracy.high and accuracy.count == 120
    assert {row["read"] for row in found.answers} == {"yes", "no"} and len({row["written"] for row in found.answers}) > 3  # it looks at its inputs
    first = [(question, found.set.image(question.image)) for question in found.questions[:14]]
    alone = [model.answer([image], [BENCHMARKS["pope"].prompt(question)], 4)[0] for question, image in first]
    assert alone == [row["written"] for row in found.answers[:14]]


def test_the_models_own_ways_to_decode_are_set_aside(tmp_path):
    pytest.importorskip("transformers")
    from PIL import Image

    from openvision3.evaluate.peers.image_text import load_image_text

    folder = tiny_llava(tmp_path / "llava")
    asked = [Image.new("RGB", (24, 24), colour) for colour in ("red", "blue")], ["abc", "abcdef abc"], 12
    plain = load_image_text(str(folder)).answer(*asked)
    settings = json.loads((folder / "generation_config.json").read_text())
    changes = {"do_sample": True, "temperature": 9.0, "num_beams": 3, "repetition_penalty": 50.0, "no_repeat_ngram_size": 1, "min_new_tokens": 9}
    (folder / "generation_config.json").write_text(json.dumps(settings | changes))
    assert load_image_text(str(folder)).answer(*asked) == plain


def test_a_folder_without_its_weights_is_refused(tmp_path):
    pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    from openvision3.evaluate.peers.image_text import load_image_text

    folder = tiny_llava(tmp_path / "llava")
    weights = load_file(folder / "model.safetensors")
    name = min(weights)
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of the model's weights"):
        load_image_text(str(folder))


# -- processes --------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, time
from openvision3 import distributed
from openvision3.evaluate import answering
from openvision3.evaluate.options import VqaOptions
from openvision3.evaluate.protocol import AnsweringFunctions
from openvision3.evaluate.vqa import evaluate_vqa

answering.PART = 4
data, out, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])

def answer(images, prompts, max_tokens):
    time.sleep(seconds)
    return ["Yes" if "dog" in prompt else "No" for prompt in prompts]

with distributed.started() as ranks:
    found = evaluate_vqa("pope", VqaOptions(data=(data,), out=out, batch=2), lambda _: AnsweringFunctions("model", answer, sha256="sha of model"))
    print(sorted((row.metric, row.number.value, row.number.low) for row in found.results.rows))
"""


def start(tmp_path: Path, out: str, seconds: float = 0, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "data"), str(tmp_path / out), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment)


@pytest.mark.slow
def test_after_a_kill_the_same_command_ends_with_the_same_bytes(tmp_path):
    files.pope(tmp_path / "data")
    assert start(tmp_path, "whole").wait() == 0
    killed = start(tmp_path, "out", 0.3)
    while not list((tmp_path / "out" / answering.PARTS).glob("*.jsonl")):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "out" / ANSWERS).exists()
    assert start(tmp_path, "out").wait() == 0
    assert (tmp_path / "out" / ANSWERS).read_bytes() == (tmp_path / "whole" / ANSWERS).read_bytes()


@pytest.mark.slow
def test_two_processes_give_the_same_answers_and_numbers(tmp_path):
    files.pope(tmp_path / "data")
    one = start(tmp_path, "one").communicate()[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(tmp_path, "two", RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(2)]
    printed = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    assert one and [out for out, _ in printed] == [one, one]
    assert (tmp_path / "one" / ANSWERS).read_bytes() == (tmp_path / "two" / ANSWERS).read_bytes()
