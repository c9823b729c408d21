"""The cost of a chat model is that of its tokens through its language model, counted by hand."""

from __future__ import annotations

import sys

import pytest
from tiny_chat import conversations

from openvision3.cli import main
from openvision3.estimate.plan import Estimate, estimate
from openvision3.estimate.planned import Options
from openvision3.understand.recipes import RECIPES

WIDTH, MLP, LAYERS, WORDS = 4096, 11008, 32, 32_000


def plan(recipe: str, options: dict[str, int] | None = None, **changes) -> Estimate:
    config = RECIPES[recipe]()
    for name, value in changes.items():
        setattr(config, name, value)
    lengths = {"text_length": 100, "caption_length": 40} | (options or {})
    return estimate(config, recipe, Options(gpus="h100:8", **lengths), advise=False)


def of(result: Estimate, name: str):
    return next(part for part in result.parts if part.name == name)


def test_operations_of_vicuna_are_those_of_its_matrices_and_of_attention():
    result, tokens = plan("llava15_instruct", checkpointing=False), 256 + 100
    matrices = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * MLP)
    linear, attention = 2 * matrices * tokens, LAYERS * 4 * tokens**2 * WIDTH
    language = of(result, "language model")
    assert language.forward == pytest.approx(linear + attention, rel=1e-3)
    assert language.backward == pytest.approx(2 * (linear + attention), rel=1e-3) and language.again == 0
    assert of(result, "vocabulary head").forward == pytest.approx(2 * 40 * WIDTH * WORDS)
    assert result.parameters["language model"] + result.parameters["words"] == matrices + LAYERS * 2 * WIDTH + WIDTH + 2 * WORDS * WIDTH


def test_a_gradient_passes_through_a_frozen_language_model_without_those_of_its_weights():
    frozen, full = (of(plan(name, length=2048, template="vicuna", checkpointing=False), "language model") for name in ("llava15_align", "llava15_instruct"))
    attention = LAYERS * 4 * 356**2 * WIDTH
    assert frozen.forward == full.forward
    assert frozen.backward == pytest.approx(frozen.forward + attention, rel=1e-3)  # of a product of two activations both gradients
    result = plan("llava15_align")
    assert set(result.parameters) == {"projector"} and result.parallel == "replicate"
    assert result.memory["frozen parts"] == pytest.approx(2 * 6.738e9, rel=0.03) and result.memory["optimiser"] < 1e9


def test_recomputing_a_frozen_language_model_keeps_less_and_computes_more():
    plain, again = (plan("llava15_align", checkpointing=on) for on in (False, True))
    assert of(again, "language model").again > 0.7 * of(plain, "language model").forward
    assert again.memory["activations: language model"] < plain.memory["activations: language model"] / 4


def test_tiles_cost_five_squares_and_their_tokens():
    one, five = plan("llava15_instruct"), plan("llava_next_instruct")
    assert of(five, "VAE encode").forward == 5 * of(one, "VAE encode").forward
    assert of(five, "projector").forward == pytest.approx(of(one, "projector").forward * (5 * 256 + 32) / 256)


def test_lora_of_the_small_model_trains_its_additions_alone():
    result = plan("chat_instruct")
    sides = 576 + 576, 576 + 192, 576 + 192, 576 + 576, 576 + 1536, 576 + 1536, 1536 + 576
    assert result.parameters["language model"] == 30 * 16 * sum(sides) and "words" not in result.parameters
    assert result.disk["latent cache, a sample"] is None


def test_the_length_of_conversations_is_measured_on_data_that_are_here(tmp_path):
    result = plan("chat_align", {"text_length": 0, "caption_length": 0}, data=(conversations(tmp_path, "data"),))
    assert any("measured on the data" in line for line in result.assumptions)
    assert any(
        "taken for 256 tokens of text, 128 of them answers" in line for line in plan("llava15_instruct", {"text_length": 0, "caption_length": 0}).assumptions
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--language", "my/model"], "the language model my/model is not here"),
        (["--length", "60", "--size", "128"], "no room for the 64 tokens of an image"),
        (["--cached"], "leave out --cached"),
        (["--template", "llama"], "cannot be 'llama'"),
    ],
)
def test_what_cannot_be_estimated_is_one_line(capsys, arguments, words):
    assert main(["estimate", "chat_align", "--gpus", "h100", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0], lines


@pytest.mark.parametrize("recipe", ["llava15_instruct", "llava_next_instruct"])
def test_without_transformers_the_extra_is_named_in_one_line(capsys, monkeypatch, recipe):
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails
    assert main(["estimate", recipe, "--gpus", "h100:8"]) == 2
    assert capsys.readouterr().err == "openvision3: transformers is not installed; pip install 'openvision3[chat]'\n"


def test_the_table_of_the_papers_own_run_is_printed(capsys):
    assert main(["estimate", "llava15_instruct", "--gpus", "h100:8"]) == 0
    table = capsys.readouterr().out
    assert "5,197 steps of 128 images" in table and "language model" in table and "latent cache" not in table
