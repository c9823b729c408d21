"""Retrieval and zero-shot classification against plain loops, and what must not score."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openvision3.data.labelled import TEMPLATES
from openvision3.evaluate.metrics import zeroshot
from openvision3.evaluate.metrics.zeroshot import evaluate_classification, evaluate_retrieval
from openvision3.evaluate.protocol import values
from openvision3.model.understanding import class_embedding


def unit(rows: int, seed: int, width: int = 5) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


# -- retrieval ------------------------------------------------------------------------------------------------------


def loop_ranks(queries: torch.Tensor, candidates: torch.Tensor, right: list[set[int]]) -> list[int]:
    """Sort all candidates, wrong ones first among equal ones, and count up to the first right one."""
    found = []
    for query, good in zip(queries.tolist(), right, strict=True):
        scored = [(-sum(a * b for a, b in zip(query, c, strict=True)), j in good) for j, c in enumerate(candidates.tolist())]
        found.append(1 + [is_right for _, is_right in sorted(scored)].index(True))
    return found


@st.composite
def sets_with_several_captions(draw):
    pictures = draw(st.integers(1, 6))
    owners = [*range(pictures), *draw(st.lists(st.integers(0, pictures - 1), max_size=8))]
    owners = draw(st.permutations(owners))
    return owners, draw(st.lists(st.sampled_from("abcdefgh"), min_size=len(owners), max_size=len(owners)))


@settings(max_examples=60, deadline=None)
@given(sets_with_several_captions(), st.integers(0, 1000), st.sampled_from([1, 7, 2**24]))
def test_retrieval_is_that_of_a_plain_loop_whatever_the_chunk(made, seed, at_once):
    owners, texts = made
    pictures = max(owners) + 1
    image, text = unit(pictures, seed), unit(len(texts), seed + 1)
    strings = [{t for t, o in zip(texts, owners, strict=True) if o == i} for i in range(pictures)]
    forth = loop_ranks(image, text, [{j for j, t in enumerate(texts) if t in strings[i]} for i in range(pictures)])
    back = loop_ranks(text, image, [{i for i in range(pictures) if t in strings[i]} for t in texts])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zeroshot, "SCORES_AT_ONCE", at_once)
        numbers = evaluate_retrieval(image, text, texts, owners, ks=(1, 3))
    found = values(numbers)
    wrong = {
        "image_to_text": max(sum(t not in own for t in texts) for own in strings),
        "text_to_image": max(sum(t not in own for own in strings) for t in texts),
    }
    for way, rank in (("image_to_text", forth), ("text_to_image", back)):
        for k in (1, 3):
            share = sum(r <= k for r in rank) / len(rank)
            assert found.get(f"{way}_r@{k}") == (pytest.approx(share) if wrong[way] >= k else None)
            assert wrong[way] >= k or share == 1
        assert found[f"{way}_median_rank"] == pytest.approx(np.median(rank))
    assert {n.metric.split("_r@")[0].split("_median")[0]: n.count for n in numbers} == {"image_to_text": pictures, "text_to_image": len(texts)}


def test_any_of_several_captions_counts_and_a_string_is_right_wherever_it_stands():
    image = torch.eye(3)
    text = torch.stack([torch.eye(3)[i] for i in (1, 0, 1, 2)])  # image 0 has one caption that fits and one that does not
    assert values(evaluate_retrieval(image, text, ["x", "y", "z", "w"], [0, 0, 1, 2], ks=(1,)))["text_to_image_r@1"] == 0.75
    found = values(evaluate_retrieval(image, text, ["x", "y", "x", "w"], [0, 0, 1, 2], ks=(1,)))
    assert found["image_to_text_r@1"] == found["text_to_image_r@1"] == 1, "x is what image 1 is called too"


def test_a_model_that_tells_nothing_apart_gets_nothing():
    constant = unit(1, 3, 64).expand(40, 64)
    texts = [f"text {i}" for i in range(40)]
    found = values(evaluate_retrieval(constant, constant, texts, range(40)))
    assert all(value == 0 for name, value in found.items() if "_r@" in name)
    assert found["image_to_text_median_rank"] == found["text_to_image_median_rank"] == 40
    assert values(evaluate_retrieval(unit(40, 0, 64), constant, texts, range(40)))["image_to_text_r@10"] == 0


def test_the_order_of_the_rows_decides_nothing():
    image, text, texts, owners = unit(6, 0), unit(12, 1), [*"aabcdefghijk"], [*range(6), *range(6)]
    text[3] = text[4]  # a tie
    there = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = evaluate_retrieval(image, text[there], [texts[i] for i in there], [owners[i] for i in there])
    assert values(shuffled) == values(evaluate_retrieval(image, text, texts, owners))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"texts": ["a", "b"]}, "seen 2 texts, 3 embeddings, 3 owners"),
        ({"texts": [], "text_embedding": unit(0, 0), "owners": []}, "seen 0 texts"),
        ({"owners": [0, 1, 1]}, "first that is not so: 2"),
        ({"owners": [0, 1, 3]}, "a text for each of the 3 images"),
        ({"image_embedding": unit(3, 0) * math.nan}, "image embeddings hold NaN"),
        ({"text_embedding": unit(3, 0) / 0}, "text embeddings hold NaN"),
    ],
)
def test_retrieval_refuses_what_has_no_answer(change, told):
    given = {"image_embedding": unit(3, 0), "text_embedding": unit(3, 1), "texts": ["a", "b", "c"], "owners": [0, 1, 2]} | change
    with pytest.raises(ValueError, match=told) as error:
        evaluate_retrieval(**given)
    assert "\n" not in str(error.value)


# -- classification -------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.integers(0, 1000), st.sampled_from([1, 2**24]))
def test_classification_is_that_of_a_plain_loop(labels, seed, at_once):
    pictures, classes, names = unit(len(labels), seed), unit(7, seed + 1), list("tuvwxyz")
    first: dict[int, list[bool]] = {}
    five = 0
    for picture, label in zip(pictures.tolist(), labels, strict=True):
        scores = [sum(a * b for a, b in zip(picture, c, strict=True)) for c in classes.tolist()]
        first.setdefault(label, []).append(scores.index(max(scores)) == label)
        five += sorted(scores, reverse=True).index(scores[label]) < 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zeroshot, "SCORES_AT_ONCE", at_once)
        made = evaluate_classification(pictures, classes, labels, names)
    found = values(made.numbers)
    assert found["top_1"] == pytest.approx(sum(map(sum, first.values())) / len(labels))
    assert found["top_5"] == pytest.approx(five / len(labels))
    assert found["mean_class_accuracy"] == pytest.approx(np.mean([np.mean(r) for r in first.values()]))
    assert found["largest_class_share"] == pytest.approx(max(map(len, first.values())) / len(labels))
    assert [(row.name, row.count) for row in made.classes] == [(names[i], len(first[i])) for i in sorted(first)]
    assert [row.accuracy for row in made.classes] == pytest.approx([np.mean(first[i]) for i in sorted(first)])


def test_zero_shot_over_templates_is_a_loop_over_pictures_classes_and_templates():
    """The whole path with all 80 templates, in Python numbers: normalise each prompt, mean, normalise, nearest."""
    names, width = [f"class {i}" for i in range(6)], 8
    generator = torch.Generator().manual_seed(0)
    spoken = {t.format(n): torch.randn(width, generator=generator) * 3 + 2 * torch.eye(width)[i] for i, n in enumerate(names) for t in TEMPLATES}
    pictures, labels = unit(50, 1, width), torch.randint(0, 6, (50,), generator=generator).tolist()

    def direction(vector: list[float]) -> list[float]:
        length = math.sqrt(sum(v * v for v in vector))
        return [v / length for v in vector]

    right = 0
    for picture, label in zip(pictures.tolist(), labels, strict=True):
        best, chosen = -math.inf, -1
        for i, name in enumerate(names):
            total = [0.0] * width
            for template in TEMPLATES:
                total = [a + b for a, b in zip(total, direction(spoken[template.format(name)].tolist()), strict=True)]
            score = sum(a * b for a, b in zip(picture, direction(total), strict=True))
            if score > best:
                best, chosen = score, i
        right += chosen == label
    classes = class_embedding([torch.stack([spoken[t.format(n)] for t in TEMPLATES]) for n in names])
    found = values(evaluate_classification(pictures, classes, labels, names).numbers)
    assert found["top_1"] == right / 50 and 0 < right < 50


def test_a_constant_embedding_always_names_the_first_class():
    labels = [0, 1, 1, 2, 2, 2, 3, 4, 5, 6]
    constant = unit(1, 0, 64)
    made = evaluate_classification(unit(10, 1, 64), constant.expand(7, 64), labels, list("abcdefg"))
    found = values(made.numbers)
    assert found["top_1"] == 0.1 and found["top_5"] == 0.8 and found["largest_class_share"] == 0.3
    assert found["mean_class_accuracy"] == pytest.approx(1 / 7)


def test_few_classes_have_no_top_5_and_unseen_classes_no_row():
    made = evaluate_classification(unit(3, 0), unit(5, 1), [0, 0, 4], list("abcde"))
    assert "top_5" not in values(made.numbers) and [row.name for row in made.classes] == ["a", "e"]


def test_classification_refuses_what_has_no_answer():
    for features, labels, names, told in (
        (unit(2, 0), [0], ["a", "b"], "features of \\(2, 5\\) and 1 labels"),
        (unit(0, 0), [], ["a", "b"], "0 labels"),
        (unit(2, 0), [0, 2], ["a", "b"], "labels from 0 to 2 do not fit 2 class names"),
        (unit(2, 0), [0, -1], ["a", "b"], "labels from -1"),
        (unit(2, 0), [0, 1], ["a"], "2 classes, 1 names"),
        (unit(2, 0) * math.nan, [0, 1], ["a", "b"], "2 of 2 rows hold NaN"),
    ):
        with pytest.raises(ValueError, match=told):
            evaluate_classification(features, unit(2, 1), labels, names)
    with pytest.raises(ValueError, match="scores of classes are NaN"):
        evaluate_classification(unit(2, 0), unit(2, 1) * math.nan, [0, 1], ["a", "b"])
