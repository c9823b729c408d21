"""Captions <-> ids: nothing depends on the order of the data, and marks are where they belong and nowhere else."""

import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from openvision3.data import samples
from openvision3.data.text import TextTokenizer, sentences

CAPTIONS = ["a red heart", "a blue heart", "red panda with a blue hat", "hat", "panda", "two red hats"] * 3


@pytest.fixture(scope="module")
def words() -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, 200)


@pytest.fixture(scope="module")
def emoji_names() -> list[str]:
    found = samples.load_emoji()
    return [e.name for e in found.every]


def marks(tokenizer: TextTokenizer) -> set[int]:
    return {tokenizer.pad_id, tokenizer.class_id, tokenizer.begin_id, tokenizer.end_id}


def test_training_does_not_depend_on_the_order_or_repeats_of_captions():
    one, other = TextTokenizer.train(CAPTIONS, 200), TextTokenizer.train(iter(CAPTIONS[::-1] + CAPTIONS[:3]), 200)
    assert one.tokenizer.to_str() == other.tokenizer.to_str()


def test_training_twice_gives_the_same_file(emoji_names):
    assert TextTokenizer.train(emoji_names, 1000).tokenizer.to_str() == TextTokenizer.train(emoji_names[::-1], 1000).tokenizer.to_str()


def test_text_ids_end_in_the_class_mark_and_are_then_padding(words):
    ids = words.text_ids(["a red heart", "hat", ""], 16)
    for row, text in zip(ids.tolist(), ["a red heart", "hat", ""], strict=True):
        pieces = words.ids(text)
        assert row == [*pieces, words.class_id, *[words.pad_id] * (ids.shape[1] - len(pieces) - 1)]
    assert ids.shape[1] == len(words.ids("a red heart")) + 1, "no longer than the longest caption"


def test_text_ids_that_are_cut_still_end_in_the_class_mark(words):
    ids = words.text_ids(["a red panda with two blue hats"], 4)
    assert ids.tolist() == [[*words.ids("a red panda with two blue hats")[:3], words.class_id]]


def test_caption_ids_stand_between_begin_and_end_and_lose_the_end_when_cut(words):
    pieces = words.ids("a red heart")
    assert words.caption_ids(["a red heart"], 16).tolist() == [[words.begin_id, *pieces, words.end_id]]
    assert words.caption_ids(["a red heart"], 3).tolist() == [[words.begin_id, *pieces[:2]]]


def test_no_captions_give_no_rows(words):
    assert words.text_ids([], 8).shape == (0, 0)


def test_emoji_names_come_back_from_their_ids(emoji_names):
    tokenizer = TextTokenizer.train(emoji_names, 4096)

    def letters(text: str) -> str:
        return "".join(text.lower().split())

    plain = [name for name in emoji_names if name.isascii()]
    assert len(plain) > 3000
    assert [n for n in plain if letters(tokenizer.text(tokenizer.ids(n))) != letters(n)] == []
    simple = [name for name in plain if all(c.isalnum() or c == " " for c in name)]
    assert [n for n in simple if tokenizer.text(tokenizer.ids(n)) != n.lower()] == []


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(" ".join(CAPTIONS).split()), min_size=1, max_size=12))
def test_any_sentence_of_known_words_round_trips(words, parts):
    sentence = " ".join(parts)
    assert words.text(words.ids(sentence)) == sentence
    assert words.text(words.caption_ids([sentence], 64)[0].tolist()) == sentence, "marks and padding leave no trace"


@settings(deadline=None, max_examples=200)
@given(st.text() | st.sampled_from(["[PAD]", "[END]", "a [CLS] b", "[BEGIN][UNK]"]))
def test_no_text_whatever_it_spells_makes_a_mark(words, text):
    assert not marks(words) & set(words.ids(text))


def test_a_copy_in_another_process_spells_the_same(words):
    copy = pickle.loads(pickle.dumps(words))
    for text in ("a red heart", "[END] hat", "[PAD]"):
        assert copy.ids(text) == words.ids(text)


def test_saved_and_loaded_is_the_same(words, tmp_path):
    words.save(tmp_path / "tokenizer.json")
    loaded = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert torch.equal(loaded.caption_ids(CAPTIONS, 12), words.caption_ids(CAPTIONS, 12))
    assert torch.equal(loaded.text_ids(CAPTIONS, 12), words.text_ids(CAPTIONS, 12))
    assert (len(loaded), marks(loaded)) == (len(words), marks(words))


@pytest.mark.parametrize(
    "specials",
    [["[PAD]", "[UNK]", "[CLS]", "[SEP]"], ["<s>", "<pad>", "</s>", "<unk>"], ["<|startoftext|>", "<|endoftext|>"], ["<unk>", "<s>", "</s>"], []],
    ids=["bert", "roberta", "clip", "llama", "bare"],
)
def test_a_foreign_tokenizer_works_and_lends_its_marks(tmp_path, specials):
    foreign = Tokenizer(models.BPE())
    foreign.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    foreign.decoder = decoders.ByteLevel()
    foreign.train_from_iterator(CAPTIONS, trainers.BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False))
    foreign.enable_truncation(2)
    foreign.enable_padding(length=30)
    foreign.save(str(tmp_path / "tokenizer.json"))

    tokenizer = TextTokenizer.load(tmp_path / "tokenizer.json")
    lent = {name: foreign.token_to_id(name) for name in specials}
    assert tokenizer.pad_id == lent.get("[PAD]", lent.get("<pad>", lent.get("<|endoftext|>", tokenizer.pad_id)))
    assert tokenizer.class_id == lent.get("[CLS]", lent.get("<s>", tokenizer.class_id))
    assert len(marks(tokenizer)) == 4
    assert max(marks(tokenizer)) < len(tokenizer)
    caption = "two red hats with a blue panda"
    assert len(tokenizer.ids(caption)) > 2, "its own truncation and padding are off"
    assert tokenizer.text(tokenizer.caption_ids([caption, "hat"], 64)[0].tolist()) == caption
    assert tokenizer.text(tokenizer.caption_ids([caption, "hat"], 64)[1].tolist()) == "hat"


@pytest.mark.parametrize("content", [b"", b"not json", b"{}", b"\xff\xfe\x00", json.dumps({"model": {"type": "Magic"}}).encode()])
def test_a_file_that_is_no_tokenizer_says_so(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        TextTokenizer.load(tmp_path / "tokenizer.json")


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such tokenizer"):
        TextTokenizer.load(tmp_path / "none.json")


@pytest.mark.parametrize("captions", [[], [""], ["  ", "\n"]])
def test_no_words_to_learn_from_is_an_error(captions):
    with pytest.raises(ValueError, match="no words to learn from"):
        TextTokenizer.train(captions)


def test_marks_within_a_word_come_back_without_spaces():
    names = ["medium-dark skin tone", "women’s room", "computer/icons", "left - right"]
    tokenizer = TextTokenizer.train(names * 3, 200)
    assert [tokenizer.text(tokenizer.ids(n)) for n in names] == [*names[:3], "left-right"]


@pytest.mark.parametrize(
    "caption, parts",
    [
        ("lithuania. europe, flag, sign", ["lithuania", "europe, flag, sign"]),
        ("A dog runs. It is wet.", ["A dog runs", "It is wet"]),
        ("flag of St. Lucia", ["flag of St. Lucia"]),
        ("a U.S. flag v1.2.png", ["a U.S. flag v1.2.png"]),
        ("UP! button", ["UP! button"]),
        ("...", ["..."]),
    ],
)
def test_sentences_end_at_full_stops_and_not_at_abbreviations(caption, parts):
    assert sentences(caption) == parts
