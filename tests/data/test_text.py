"""Captions <-> ids: nothing depends on the order of the data, and marks are where they belong and nowhere else."""

import json
import pickle
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from openvision3.data import openmoji
from openvision3.data.text import LONGEST, TextTokenizer, sentences

CAPTIONS = ["a red heart", "a blue heart", "red panda with a blue hat", "hat", "panda", "two red hats"] * 3


@pytest.fixture(scope="module")
def words() -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, 200)


@pytest.fixture(scope="module")
def emoji_names() -> list[str]:
    found = openmoji.load_emoji()
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


# -- what reaches a model ------------------------------------------------------------------------------------------------


def test_a_vocabulary_is_an_upper_bound_whatever_the_letters_and_their_order():
    draw = random.Random(0)
    chinese = ["".join(chr(draw.randrange(0x4E00, 0x9FA5)) for _ in range(20)) for _ in range(300)]
    cyrillic = ["".join(chr(draw.randrange(0x430, 0x450)) for _ in range(9)) for _ in range(300)]
    for captions, vocabulary in ((chinese, 500), (chinese, 10), (cyrillic, 40), (chinese + cyrillic, 300)):
        tokenizer = TextTokenizer.train(captions, vocabulary)
        assert len(tokenizer) <= vocabulary
        assert tokenizer.tokenizer.to_str() == TextTokenizer.train(captions[::-1], vocabulary).tokenizer.to_str()
    often = TextTokenizer.train([*chinese, *["\u732b"] * 2, *[f"\u732b{i}" for i in range(50)]], 100)
    assert often.unknown_id not in often.ids("\u732b"), "the letters that are kept are the frequent ones"
    with pytest.raises(ValueError, match="vocabulary 5 is too small"):
        TextTokenizer.train(chinese, 5)


def test_a_text_is_cut_before_it_is_tokenised(words, monkeypatch):
    lengths = []

    class Watched:
        def encode(self, text, **options):
            lengths.append(len(text))
            return words.tokenizer.encode(text, **options)

        def __getattr__(self, name):
            return getattr(words.tokenizer, name)

    watched = TextTokenizer(words.tokenizer)
    watched.tokenizer = Watched()
    long = "a red heart " * 1_000_000
    assert torch.equal(watched.text_ids([long], 8), words.text_ids(["a red heart " * 8], 8))
    assert torch.equal(watched.caption_ids([long], 8), words.caption_ids(["a red heart " * 8], 8))
    assert watched.count([long], 8).cut == 1 and max(lengths) <= 9 * LONGEST


def test_unknown_and_cut_off_pieces_are_counted(words):
    counts = words.count(["a red heart", "\u7ea2\u5fc3" * 6 + " heart", "red " * 20, "\u732b", ""], 16)
    assert (counts.texts, counts.cut, counts.lost) == (5, 1, 2) and counts.unknown >= 10
    assert str(words.count(["\u7ea2\u5fc3"] * 4, 8)) == "100 % of the 8 tokens of 4 texts are unknown to the tokenizer"
    assert str(words.count(["a red heart"], 2)) == "1 of 1 texts are longer than the model reads and are cut off"
    assert str(words.count(["a red heart"], 8)) == ""


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["\u7ea2\u5fc3", "\u84dd\u8f66"], "tokenizer does not know their words"),
        (["red " * 8 + "heart", "red " * 8 + "hat"], "which reads 8 tokens of a text"),
        (["A red  heart", "a red heart"], ""),
        (["a red heart", "a blue heart"], ""),
        (["heart", "heart"], ""),
    ],
)
def test_unlike_texts_that_are_the_same_to_a_model_are_named(words, texts, said):
    same = words.same(texts, 8)
    assert said in same and bool(said) == bool(same) and "\n" not in same


@pytest.mark.parametrize("text", ["\udcff cat", "\ud800"])
def test_half_a_character_is_one_clear_line_at_every_door_of_the_tokenizer(words, text):
    for door in (
        words.ids,
        lambda t: words.text_ids([t], 8),
        lambda t: words.caption_ids(["a", t], 8),
        lambda t: words.count([t], 8),
        lambda t: words.same([t], 8),
    ):
        with pytest.raises(ValueError, match=r"^the text is not UTF-8 text: '.*\\ud.*' holds half a character at 0$"):
            door(text)
