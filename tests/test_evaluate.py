"""The figures by which models are measured, each against a plain loop or the properties that define it."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openvision3.data import samples
from openvision3.data.images import to_pil
from openvision3.evaluate.captioning import evaluate_captions, token_f1, words
from openvision3.evaluate.openmoji import Functions, drawings, evaluate_openmoji, rebuilt_rows
from openvision3.evaluate.reconstruction import mean_psnr, psnr
from openvision3.evaluate.zeroshot import class_embedding, evaluate_classification, evaluate_retrieval


def images(count: int = 2, height: int = 3, width: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def unit(rows: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)), dim=1)


# -- reconstruction -------------------------------------------------------------------------------------------------


def test_psnr_is_that_of_a_hand_loop_over_uint8():
    a, b = images(seed=0), images(seed=1) * 1.3  # beyond the range: clamped
    expected = []
    for one, other in zip(to_pil(a), to_pil(b), strict=True):
        total = 0
        for y in range(3):
            for x in range(4):
                for p, q in zip(one.getpixel((x, y)), other.getpixel((x, y)), strict=True):
                    total += (p - q) ** 2
        expected.append(10 * math.log10(255**2 / (total / 36)))
    assert psnr(a, b).tolist() == pytest.approx(expected, abs=1e-4)


def test_psnr_does_not_see_less_than_half_a_grey_level():
    a = torch.round((images() * 0.9 + 1) * 127.5) / 127.5 - 1  # on the middle of a level
    assert psnr(a, a + 0.4 / 127.5).tolist() == pytest.approx([100.0, 100.0])
    assert psnr(a, a + 1 / 127.5).tolist() == pytest.approx([20 * math.log10(255)] * 2, abs=1e-3)


def test_psnr_refuses_pictures_of_unlike_shape():
    with pytest.raises(ValueError, match="cannot be compared"):
        psnr(images(2), images(1))


def test_reconstruction_is_the_mean_over_pictures_not_over_batches():
    batches = [images(3, seed=0), images(1, seed=1)]
    found = mean_psnr(batches, lambda x: x * 0.9)
    expected = torch.cat([psnr(b, b * 0.9) for b in batches])
    assert found["psnr"] == pytest.approx(expected.mean().item()) and found["count"] == 4
    assert "3x4" in found["protocol"] and "sigma 0" in found["protocol"]
    with pytest.raises(ValueError, match="no pictures"):
        mean_psnr([], lambda x: x)


# -- retrieval ------------------------------------------------------------------------------------------------------


def loop_recall(queries: torch.Tensor, candidates: torch.Tensor, captions: list[str], k: int) -> float:
    hits = 0
    for i, query in enumerate(queries.tolist()):
        scored = [(-sum(a * b for a, b in zip(query, c, strict=True)), j) for j, c in enumerate(candidates.tolist())]
        hits += any(captions[j] == captions[i] for _, j in sorted(scored)[:k])
    return hits / len(queries)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=14), st.integers(0, 1000))
def test_retrieval_is_that_of_a_plain_loop_and_equal_captions_match(captions, seed):
    pictures, texts = unit(len(captions), seed), unit(len(captions), seed + 1)
    found = evaluate_retrieval(pictures, texts, captions, ks=(1, 3))
    for k in (1, 3):
        assert found[f"image_to_text_r@{k}"] == pytest.approx(loop_recall(pictures, texts, captions, k))
        assert found[f"text_to_image_r@{k}"] == pytest.approx(loop_recall(texts, pictures, captions, k))


def test_a_model_that_tells_nothing_apart_gets_no_more_than_chance():
    found = evaluate_retrieval(torch.ones(10, 4) / 2, torch.ones(10, 4) / 2, list("abcdefghij"))
    assert found["image_to_text_r@1"] == found["text_to_image_r@1"] == pytest.approx(0.1)


def test_retrieval_refuses_unlike_counts():
    with pytest.raises(ValueError, match="seen 3 pictures, 2 texts, 3 captions"):
        evaluate_retrieval(unit(3, 0), unit(2, 1), ["a", "b", "c"])
    with pytest.raises(ValueError, match="0 captions"):
        evaluate_retrieval(unit(0, 0), unit(0, 1), [])


# -- classification -------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(0, 1000))
def test_classification_is_that_of_a_plain_loop(labels, seed):
    pictures, classes, names = unit(len(labels), seed), unit(4, seed + 1), ["w", "x", "y", "z"]
    right: dict[int, list[bool]] = {}
    for picture, label in zip(pictures.tolist(), labels, strict=True):
        scores = [sum(a * b for a, b in zip(picture, c, strict=True)) for c in classes.tolist()]
        right.setdefault(label, []).append(scores.index(max(scores)) == label)
    found = evaluate_classification(pictures, classes, labels, names)
    assert found["accuracy"] == pytest.approx(sum(map(sum, right.values())) / len(labels))
    assert found["mean_class_accuracy"] == pytest.approx(np.mean([np.mean(r) for r in right.values()]))
    assert {name: value for name, value in found.items() if name.startswith("accuracy/")} == pytest.approx(
        {f"accuracy/{names[label]}": np.mean(r) for label, r in right.items()}
    )
    assert found["largest_class_share"] == pytest.approx(max(map(len, right.values())) / len(labels))


def test_classification_refuses_unlike_counts():
    with pytest.raises(ValueError, match="seen 2 pictures, 1 labels"):
        evaluate_classification(unit(2, 0), unit(2, 1), [0], ["a", "b"])
    with pytest.raises(ValueError, match="0 labels"):
        evaluate_classification(unit(0, 0), unit(2, 1), [], ["a", "b"])


def test_a_class_embedding_is_the_mean_of_its_prompts_at_unit_length():
    first, second = unit(3, 0), unit(1, 1)
    found = class_embedding([first, second])
    mean = first.sum(0) / 3
    assert torch.allclose(found[0], mean / mean.norm()) and torch.allclose(found[1], second[0])


# -- captions -------------------------------------------------------------------------------------------------------

SENTENCES = st.lists(st.sampled_from(["red", "heart", "Cat", "face", "2"]), max_size=6).map(" ".join)


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


def test_captions_are_scored_pair_by_pair():
    found = evaluate_captions(["Red heart", "heart red", "cat"], ["red: heart", "red heart", "dog face"])
    assert found["exact_match"] == pytest.approx(1 / 3) and found["token_f1"] == pytest.approx(2 / 3) and found["count"] == 3
    for written, true in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(ValueError, match="pair by pair"):
            evaluate_captions(written, true)


# -- the embedded data set ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle() -> Functions:
    """Knows every held-out emoji by its drawing: what a perfect model would answer."""
    data = samples.load_emoji()
    emoji = data.evaluation(12)
    by_drawing = {np.asarray(samples.draw(e.character, 32)).tobytes(): e for e in emoji}
    groups = sorted({e.group for e in (*data.train, *emoji)}, key=str)
    by_name = {e.name: e for e in (*data.train, *emoji)}
    places = {e.name: i for i, e in enumerate(emoji)}

    def vector(e: samples.Emoji) -> torch.Tensor:
        out = torch.zeros(len(groups) + len(emoji))
        out[groups.index(e.group)] = 1
        out[len(groups) + places.get(e.name, 0)] = 1.0 if e.name in places else 0.0
        return torch.nn.functional.normalize(out, dim=0)

    def seen(batch: torch.Tensor) -> list[samples.Emoji]:
        return [by_drawing[np.asarray(picture).tobytes()] for picture in to_pil(batch)]

    return Functions(
        reconstruct=lambda x: x + 4 / 127.5,
        vae_reconstruct=lambda x: x,
        embed_images=lambda x: torch.stack([vector(e) for e in seen(x)]),
        embed_texts=lambda texts: torch.stack([vector(by_name[t]) for t in texts]),
        caption=lambda x: [e.name for e in seen(x)],
    )


def test_a_perfect_model_gets_every_point(oracle):
    found = evaluate_openmoji(oracle, size=32, count=12)
    r = found.results
    assert r["retrieval"]["image_to_text_r@1"] == r["retrieval"]["text_to_image_r@1"] == 1
    assert r["captions"]["exact_match"] == r["captions"]["token_f1"] == 1 and r["captions"]["count"] == 12
    assert r["zeroshot"]["accuracy"] == 1
    assert r["zeroshot"]["count"] + r["zeroshot"]["left_out_without_group"] == 12
    assert r["vae_reconstruction"]["psnr"] == pytest.approx(100)
    assert r["reconstruction"]["psnr"] == pytest.approx(np.mean(found.psnr)) and len(found.vae_psnr) == 12
    assert all(e.held_out for e in found.emoji) and all("protocol" in value for value in r.values())


def test_a_model_that_swaps_answers_gets_none(oracle):
    shifted = dataclasses.replace(
        oracle, caption=lambda x: ["nothing like it"] * len(x), embed_images=lambda x: oracle.embed_images(x).roll(1, 0), reconstruct=lambda x: -x
    )
    r = evaluate_openmoji(shifted, size=32, count=12).results
    assert r["captions"]["exact_match"] == 0 and r["retrieval"]["image_to_text_r@1"] == 0 and r["reconstruction"]["psnr"] < 10


def test_drawings_come_in_order_whatever_the_batch():
    emoji = samples.load_emoji().evaluation(5)
    assert torch.equal(torch.cat(list(drawings(emoji, 16, batch=2))), torch.cat(list(drawings(emoji, 16))))


def test_rows_are_original_vae_and_rebuilt(oracle):
    emoji = samples.load_emoji().evaluation(3)
    rows = rebuilt_rows(emoji, oracle, size=32)
    for e, (original, vae, rebuilt) in zip(emoji, rows, strict=True):
        expected = np.asarray(samples.draw(e.character, 32), int)
        assert np.array_equal(np.asarray(original, int), expected) and np.array_equal(np.asarray(vae, int), expected)
        assert np.array_equal(np.asarray(rebuilt, int), (expected + 4).clip(max=255))
