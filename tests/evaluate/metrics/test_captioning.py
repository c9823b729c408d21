"""Caption metrics against pycocoevalcap's, and what they say of themselves."""

import contextlib
import io
import math
import shutil

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from openvision3.evaluate.metrics import captioning
from openvision3.evaluate.metrics.captioning import bleu, cider, evaluate_captions, rouge_l, token_f1, words
from openvision3.evaluate.protocol import values

VOCABULARY = ["red", "heart", "Cat", "face", "2", "a", "the", "on"]
CAPTION = st.lists(st.sampled_from(VOCABULARY), max_size=9)
SETS = st.lists(st.tuples(CAPTION, st.lists(CAPTION, min_size=1, max_size=4)), min_size=1, max_size=8)
SENTENCES = st.lists(st.sampled_from(VOCABULARY), max_size=6).map(" ".join)
LINES = [
    ("A man -- riding a horse (fast)!", ["a man is riding a horse", "The horse carries a man."]),
    ("two dogs: it's 3 o'clock, isn't it?", ["Dogs running through grass", "Two dogs run... \u201cfast\u201d"]),
    ("", ["an empty room"]),
    ("a caf\u00e9\u2028in Paris\nat night", ["", "a caf\u00e9 at night"]),
]


def split(*captions: str) -> list[list[str]]:
    return [caption.split() for caption in captions]


# -- words ------------------------------------------------------------------------------------------------------------


@given(SENTENCES, SENTENCES)
def test_token_f1_is_symmetric_within_0_and_1_and_1_for_equal_words_alone(a, b):
    value = token_f1(a, b)
    assert value == token_f1(b, a) and 0 <= value <= 1
    assert (value == 1) == (sorted(words(a)) == sorted(words(b)))
    assert (value == 0) == (not set(words(a)) & set(words(b)) and bool(words(a) + words(b)))


def test_token_f1_counts_repeats():
    assert token_f1("red red heart", "red heart heart") == pytest.approx(2 / 3)
    assert token_f1("red red red red", "red") == pytest.approx(2 * (1 / 4) * 1 / (1 / 4 + 1))


def test_words_leave_case_and_marks_out():
    assert words("Man: light-skin tone!") == ["man", "light", "skin", "tone"]


# -- against COCO's ---------------------------------------------------------------------------------------------------


def theirs(name: str, made) -> float | list[float]:
    """pycocoevalcap's score of (written words, references) pairs; it splits at single spaces itself."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    own = {i: [" ".join(one)] for i, (one, _) in enumerate(made)}
    true = {i: [" ".join(reference) for reference in of] for i, (_, of) in enumerate(made)}
    with contextlib.redirect_stdout(io.StringIO()):
        return {"bleu": Bleu(4), "rouge": Rouge(), "cider": Cider()}[name].compute_score(true, own)[0]


@settings(max_examples=150, deadline=None)
@given(SETS)
def test_bleu_rouge_and_cider_are_those_of_coco(made):
    pytest.importorskip("pycocoevalcap.bleu.bleu")
    assume(any(reference for _, of in made for reference in of))  # without any reference word theirs breaks
    own, true = [one for one, _ in made], [of for _, of in made]
    assert bleu(own, true) == pytest.approx(theirs("bleu", made), abs=1e-9, rel=1e-9)
    assert rouge_l(own, true) == pytest.approx(theirs("rouge", made), abs=1e-9)
    assert cider(own, true) == pytest.approx(theirs("cider", made), abs=1e-9)


def test_scores_by_hand():
    own, true = split("a red heart on the face", "the cat"), [split("a red heart"), split("the cat", "a cat sits")]
    assert bleu(own, true)[0] == pytest.approx(5 / 8) and bleu(own, true)[1] == pytest.approx(math.sqrt(5 / 8 * 3 / 6))
    precision, recall, beta = 3 / 6, 1, 1.2
    first = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert rouge_l(own, true) == pytest.approx((first + 1) / 2)
    assert bleu([["a"]], [split("a b c d")])[0] == pytest.approx(math.exp(1 - 4)), "a short caption is punished"
    equal = split("one two three four five", "six seven eight nine ten")
    assert cider(equal, [[one] for one in equal]) == pytest.approx(10)


@pytest.mark.parametrize("captions", [[""], ["", ""]])
def test_captions_without_words_do_not_break_it(captions):
    assert values(evaluate_captions(captions, [["", "red"] for _ in captions], "simple"))["exact_match"] == 1
    assert values(evaluate_captions(captions, [["red heart"] for _ in captions], "simple"))["rouge_l"] == 0


# -- the whole --------------------------------------------------------------------------------------------------------


def test_captions_are_scored_picture_by_picture_against_the_best_reference():
    written, references = ["Red heart", "heart red", "cat"], [["red: heart", "x"], ["red heart"], ["dog face", "a cat"]]
    numbers = evaluate_captions(written, references, "simple")
    found = values(numbers)
    assert found["exact_match"] == pytest.approx(1 / 3) and found["token_f1"] == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert [n.metric for n in numbers] == ["exact_match", "token_f1", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"]
    assert {n.count for n in numbers} == {3} and all("1 to 2 references an image" in n.how for n in numbers)
    own, true = [words(one) for one in written], [[words(one) for one in of] for of in references]
    assert [found[f"bleu_{n}"] for n in range(1, 5)] == bleu(own, true) and found["cider"] == cider(own, true) and found["rouge_l"] == rouge_l(own, true)


def test_numbers_name_their_tokeniser_and_what_is_missing_is_said():
    missing: list[str] = []
    numbers = evaluate_captions(["a cat", "a dog"], [["a cat"], ["a dog"]], "simple", missing)
    assert numbers[-1].how.startswith("CIDEr, simple tokeniser") and all("simple tokeniser" in n.how for n in numbers[2:])
    assert len(missing) == 1 and missing[0].startswith("meteor: ") and "pycocoevalcap" not in numbers[-1].library
    missing = []
    assert "cider" not in values(evaluate_captions(["a cat"], [["a cat"]], "simple", missing)) and missing[0].startswith("cider: of one image")


@pytest.mark.parametrize("lacks", ["java", "pycocoevalcap"])
def test_without_java_or_the_package_auto_is_simple_and_ptb_says_what_to_do(lacks, monkeypatch):
    if lacks == "java":
        monkeypatch.setattr(captioning.shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(captioning, "PACKAGE", "no_such_package_at_all")
    missing: list[str] = []
    numbers = evaluate_captions(["a cat", "a dog"], [["a cat"], ["a dog"]], missing=missing)
    assert "simple tokeniser" in numbers[-1].how and "meteor" not in values(numbers)
    assert len(missing) == 1 and ("java" if lacks == "java" else "openvision3[captions]") in missing[0]
    with pytest.raises(ValueError, match="tokenizer ptb cannot run: "):
        evaluate_captions(["a cat"], [["a cat"]], "ptb")


def test_captions_that_cannot_be_compared_are_refused():
    for written, references, told in (
        ([], [], "seen 0 written"),
        (["a"], [["a"], ["b"]], "seen 1 written and references of 2"),
        (["a"], ["a"], "bare string"),
        (["a", "b"], [["a"], []], "an empty list"),
    ):
        with pytest.raises(ValueError, match=told):
            evaluate_captions(written, references, "simple")
    with pytest.raises(ValueError, match="tokenizer spacy is none of auto, simple, ptb"):
        evaluate_captions(["a"], [["a"]], "spacy")


# -- with Java --------------------------------------------------------------------------------------------------------

needs_java = pytest.mark.skipif(bool(captioning.ptb_lacks()), reason=f"the ptb tokeniser: {captioning.ptb_lacks()}")


@needs_java
def test_ptb_words_keep_their_captions_apart():
    """One line of Java's is one caption, whatever line breaks, marks or nothing it holds."""
    captions = [one for one, _ in LINES] + [one for _, of in LINES for one in of] + ["", ""]
    found = captioning.ptb_words(captions)
    assert found[:4] == split("a man riding a horse -lrb- fast -rrb-", "two dogs it 's 3 o'clock is n't it", "", "a caf\u00e9 in paris at night")
    assert found[-2:] == [[], []] and len(found) == len(captions)


@needs_java
def test_a_java_that_fails_is_reported_in_one_line(tmp_path, monkeypatch):
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\necho 'no room in this machine' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert shutil.which("java") == str(program)
    with pytest.raises(ValueError, match="gave 0 lines for 2 captions, java said: no room in this machine"):
        evaluate_captions(["a cat"], [["a cat"]], "ptb")


@needs_java
@pytest.mark.slow
def test_everything_with_the_ptb_tokeniser_is_that_of_coco():
    """Tokeniser, BLEU, ROUGE-L, CIDEr and METEOR of pycocoevalcap end to end, as its own evaluation strings them together."""
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    flat = [(" ".join(one.split()), [" ".join(reference.split()) for reference in of]) for one, of in LINES]
    try:
        own = PTBTokenizer().tokenize({i: [{"caption": one}] for i, (one, _) in enumerate(flat)})
        true = PTBTokenizer().tokenize({i: [{"caption": reference} for reference in of] for i, (_, of) in enumerate(flat)})
    except PermissionError:
        pytest.skip("pycocoevalcap's own tokeniser writes into its own folder, which is not ours")
    missing: list[str] = []
    numbers = evaluate_captions([one for one, _ in LINES], [of for _, of in LINES], missing=missing)
    found = values(numbers)
    pairs = [(own[i][0].split(), [reference.split() for reference in true[i]]) for i in own]
    assert [found[f"bleu_{n}"] for n in range(1, 5)] == pytest.approx(theirs("bleu", pairs), abs=1e-9)
    assert found["rouge_l"] == pytest.approx(theirs("rouge", pairs), abs=1e-9) and found["cider"] == pytest.approx(theirs("cider", pairs), abs=1e-9)
    if "meteor" not in found:
        pytest.skip(missing[0])
    assert found["meteor"] == pytest.approx(Meteor().compute_score(true, own)[0], abs=1e-9) and 0 < found["meteor"] < 1
    assert not missing and all("ptb tokeniser" in n.how and "pycocoevalcap" in n.library for n in numbers[2:])


def test_cider_of_few_pictures_says_that_it_is_of_this_set_alone():
    for count, told in ((999, True), (1000, False)):
        how = next(n.how for n in evaluate_captions(["a cat"] * count, [["a cat"]] * count, "simple") if n.metric == "cider")
        assert ("compare with no other set" in how) == told
