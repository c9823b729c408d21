"""Only answers are learned, conversations are written as their language model expects, and images take as many tokens as they have."""

from __future__ import annotations

import functools

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from openvision3.understand.conversations import ConversationError
from openvision3.understand.prompts import Prompts

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "<image>\nWhat is this?"},
    {"role": "assistant", "content": "A red cat."},
    {"role": "user", "content": "Is it large?"},
    {"role": "assistant", "content": "No, it is\nsmall."},
]


@functools.cache
def _raw() -> str:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = ["What is this? A red cat. Is it large? No, it is small."] * 3
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return raw.to_str()


def byte_level(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    end = "<|im_end|>" if template else "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_raw()), eos_token=end, pad_token="<|endoftext|>")
    if template:
        tokenizer.chat_template = template
    return tokenizer


def learned(prompts: Prompts, messages: list[dict[str, str]], images: tuple[int, ...] = (3,)) -> str:
    tokens = prompts.encode(messages, images)
    return prompts.tokenizer.decode([i for i, inside in zip(tokens.ids, tokens.answers, strict=True) if inside])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("chat", "A red cat.<|im_end|>No, it is\nsmall.<|im_end|>"),
        ("vicuna", " A red cat.<|im_end|> No, it is\nsmall.<|im_end|>"),
        ("plain", "A red cat.\nNo, it is\nsmall.\n"),
    ],
)
def test_the_answers_and_what_ends_them_are_learned_and_nothing_else(template, words):
    assert learned(Prompts(byte_level(), template), TALK) == words


@pytest.mark.parametrize("template", ["chat", "vicuna", "plain"])
def test_changing_a_question_changes_no_word_that_is_learned(template):
    prompts = Prompts(byte_level(), template)
    other = [TALK[0] | {"content": "<image>\nIs this a cat?"}, TALK[1], TALK[2] | {"content": "small"}, TALK[3]]
    assert learned(prompts, other) == learned(prompts, TALK)
    changed = [*TALK[:3], TALK[3] | {"content": "Yes."}]
    assert learned(prompts, changed) != learned(prompts, TALK)


def test_the_ids_are_those_of_the_tokenizers_own_template():
    prompts, tokenizer = Prompts(byte_level()), byte_level()
    talk = [message | {"content": message["content"].replace("<image>\n", "")} for message in TALK]
    assert prompts.encode(talk, []).ids == tokenizer.apply_chat_template(talk, return_dict=False)


def test_vicunas_words_are_the_published_ones():
    text = Prompts(byte_level(None), "auto").text(TALK[:2])
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's "
        "questions. USER: <image>\nWhat is this? ASSISTANT: A red cat.<|endoftext|>"
    )


@pytest.mark.parametrize("template", ["chat", "vicuna", "plain"])
def test_what_is_asked_is_what_the_answer_was_learned_after(template):
    """A question in use has the very tokens that stood before its answer in training."""
    prompts = Prompts(byte_level(), template)
    whole, asked = prompts.encode(TALK, [3]).ids, prompts.ask(TALK[:3], [3])
    assert whole[: len(asked)] == asked and prompts.ask(TALK[:1], [3]) == whole[: prompts.encode(TALK, [3]).answers.index(True)]


def test_each_image_has_its_number_of_tokens_in_its_place():
    prompts = Prompts(byte_level())
    two = [{"role": "user", "content": "<image>, <image>: alike?"}, TALK[1]]
    ids = prompts.encode(two, [2, 5]).ids
    first, second = ids.index(prompts.image_id), len(ids) - ids[::-1].index(prompts.image_id)
    assert ids.count(prompts.image_id) == 7 and ids[first : first + 2] == [prompts.image_id] * 2 and ids[first + 2] != prompts.image_id
    assert ids[second - 5 : second] == [prompts.image_id] * 5


def test_a_token_for_images_is_added_once_and_one_that_is_there_is_used():
    tokenizer = byte_level()
    before = len(tokenizer)
    assert Prompts(tokenizer).image_id == Prompts(tokenizer).image_id == before and len(tokenizer) == before + 1


def test_a_long_conversation_is_cut_and_says_so():
    whole = Prompts(byte_level()).encode(TALK, [3])
    cut = Prompts(byte_level(), length=len(whole.ids) - 4).encode(TALK, [3])
    assert not whole.cut and cut.cut and cut.ids == whole.ids[:-4] and cut.answers == whole.answers[:-4]


@pytest.mark.parametrize(("length", "words"), [(10, "its images end after token 10"), (24, "its first answer begins after token 24")])
def test_a_conversation_without_its_image_or_any_answer_is_refused(length, words):
    with pytest.raises(ConversationError, match=words) as error:
        Prompts(byte_level(), length=length).encode(TALK, [12])
    assert error.value.reason == "too long"


@pytest.mark.parametrize("images", [(), (3, 3)])
def test_more_or_fewer_images_than_places_for_them_are_refused(images):
    with pytest.raises(ConversationError, match=f"its text has 1 <image>, and {len(images)} images are given"):
        Prompts(byte_level()).ask(TALK[:1], images)


@pytest.mark.parametrize("written", ["message['content'] | replace('<image>', '')", "message['content'] ~ message['content']"])
def test_a_template_that_writes_another_number_of_images_is_refused(written):
    prompts = Prompts(byte_level(CHATML.replace("message['content']", written)))
    for ask in (lambda: prompts.ask(TALK[:1], [3]), lambda: prompts.encode(TALK, [3])):
        with pytest.raises(ConversationError, match=r"1 images became [02] places in the text") as error:
            ask()
        assert error.value.reason == "images and <image> differ"


def test_the_end_of_a_turn_ends_an_answer():
    tokenizer = byte_level()
    tokenizer.eos_token = "<|endoftext|>"
    assert Prompts(tokenizer).ends == [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.convert_tokens_to_ids("<|endoftext|>")]


REWRITES = "{% for message in messages %}{% if loop.last or message['role'] == 'user' %}{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("tokenizer", "template", "words"),
    [
        (byte_level, "llama", "unknown chat template 'llama'. .*Choose one of auto, chat, vicuna, plain"),
        (functools.partial(byte_level, None), "chat", "no chat template of its own; set --template vicuna"),
        (functools.partial(byte_level, REWRITES), "auto", "rewrites earlier turns"),
        (functools.partial(byte_level, "{{ raise_exception('never') }}"), "auto", "refuses it: never"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(tokenizer, template, words):
    with pytest.raises(ValueError, match=words) as error:
        Prompts(tokenizer(), template)
    assert "\n" not in str(error.value)
