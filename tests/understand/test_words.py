"""A projector that begins at the words of the answers: what a language model sees of an image is near what it shall write."""

from __future__ import annotations

import pytest
import torch
from small_runs import Crash, assert_same_run, crash_at
from tiny_chat import COLOURS, conversations, language_folder, small_chat
from tiny_generator import tokens_folder

from openvision3.data.images import to_tensor
from openvision3.understand import training
from openvision3.understand.batches import read_example
from openvision3.understand.conversations import Conversations
from openvision3.understand.folder import open_tower
from openvision3.understand.language import open_language
from openvision3.understand.llava import connect
from openvision3.understand.prompts import Prompts
from openvision3.understand.tiles import ImageLayout
from openvision3.understand.training import train_chat
from openvision3.understand.words import begin_with_words


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    tokens_folder(folder), language_folder(folder)
    return folder


def opened(root, count=40):
    """A network, and conversations about images of four colours."""
    config = small_chat(root, "words", data=(conversations(root, "many", count),))
    language, tokenizer = open_language(config.language)
    prompts, layout = Prompts(tokenizer), ImageLayout(config.size, config.anyres)
    network = connect(config, open_tower(config.tower, "fp32"), language, prompts)
    read = Conversations(config.data)
    return network, [read_example(read, index, prompts, layout) for index in range(len(read))], tokenizer


def test_an_image_is_projected_near_the_word_of_its_answer_and_to_the_size_of_words(root):
    network, examples, tokenizer = opened(root)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    explained = begin_with_words(network, examples, -1)
    assert explained > 0.5, "one-coloured images are told apart by any tower"
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"model.multi_modal_projector.linear_2.weight", "model.multi_modal_projector.linear_2.bias"}
    embedding = network.get_input_embeddings().weight
    names = embedding[[tokenizer.convert_tokens_to_ids(name) for name in COLOURS]]
    are_right = []
    for place in (0, 4, 8, 12, 1, 10, 22, 7, 11, 15):  # of each colour some, with one image and one question or two
        seen = network.model.multi_modal_projector(network.model.vision_tower(to_tensor(examples[place].squares[0])).last_hidden_state)
        assert seen.square().mean().sqrt().item() == pytest.approx(embedding.square().mean().sqrt().item(), rel=0.5)
        are_right.append(int(((names - names.mean(0)) @ seen.mean((0, 1))).argmax()) == place % len(COLOURS))
    assert all(are_right)


def test_without_conversations_about_one_image_the_projector_stays_as_it_was_drawn(root):
    network, examples, _ = opened(root)
    without = [one for one in examples if len(one.squares) != 1]
    before = network.model.multi_modal_projector.linear_2.weight.clone()
    assert without and begin_with_words(network, without, -1) is None
    assert torch.equal(network.model.multi_modal_projector.linear_2.weight, before)


def test_a_run_that_begins_with_words_says_so_and_goes_on_bit_for_bit_without_beginning_again(root, monkeypatch):
    train_chat(small_chat(root, "whole", begin="words"))
    assert "the projector begins as a guess of the words of answers, fitted to 8 conversations" in (root / "whole" / "log.txt").read_text()
    with pytest.raises(Crash), monkeypatch.context() as dying:
        crash_at(dying, 5)
        train_chat(small_chat(root, "broken", begin="words"))
    monkeypatch.setattr(training, "begin_with_words", None)
    train_chat(small_chat(root, "broken", begin="words", resume=True))
    assert_same_run(root / "whole", root / "broken")


def test_what_another_training_has_learned_is_not_overwritten(root, monkeypatch):
    train_chat(small_chat(root, "first", steps=1))
    monkeypatch.setattr(training, "begin_with_words", None)
    train_chat(small_chat(root, "second", steps=1, begin="words", init=str(root / "first")))
