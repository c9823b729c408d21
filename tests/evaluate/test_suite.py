"""The figures by which models are measured, each against a plain loop or the properties that define it."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from openvision3.data import openmoji
from openvision3.data.images import to_pil
from openvision3.evaluate.metrics.reconstruction import psnr
from openvision3.evaluate.protocol import Functions, values
from openvision3.experiments import demo
from openvision3.experiments.demo import evaluate_openmoji, rebuilt_rows


def images(count: int = 2, height: int = 3, width: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


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


# -- the embedded data set ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle() -> Functions:
    """Knows every held-out emoji by its drawing: what a perfect model would answer."""
    data = openmoji.load_emoji()
    emoji = data.evaluation("test", 12)
    by_drawing = {np.asarray(openmoji.draw(e.character, 32)).tobytes(): e for e in emoji}
    groups = sorted({e.group for e in (*data.train, *emoji)}, key=str)
    by_name = {e.name: e for e in (*data.train, *emoji)}
    places = {e.name: i for i, e in enumerate(emoji)}

    def vector(e: openmoji.Emoji) -> torch.Tensor:
        out = torch.zeros(len(groups) + len(emoji))
        out[groups.index(e.group)] = 1
        out[len(groups) + places.get(e.name, 0)] = 1.0 if e.name in places else 0.0
        return torch.nn.functional.normalize(out, dim=0)

    def seen(batch: torch.Tensor) -> list[openmoji.Emoji]:
        return [by_drawing[np.asarray(picture).tobytes()] for picture in to_pil(batch)]

    return Functions(
        "oracle",
        32,
        reconstruct=lambda x: x + 4 / 127.5,
        embed_images=lambda x: torch.stack([vector(e) for e in seen(x)]),
        embed_texts=lambda texts: torch.stack([vector(by_name[t]) for t in texts]),
        caption=lambda x: [e.name for e in seen(x)],
    )


PERFECT_VAE = Functions("its VAE", 32, reconstruct=lambda x: x)


def test_a_perfect_model_gets_every_point(oracle):
    found = evaluate_openmoji(oracle, PERFECT_VAE, size=32, count=12)
    r = {name: values(numbers) for name, numbers in found.results.items()}
    assert r["retrieval"]["image_to_text_r@1"] == r["retrieval"]["text_to_image_r@1"] == 1
    assert r["captions"]["exact_match"] == r["captions"]["token_f1"] == 1 and {n.count for n in found.results["captions"]} == {12}
    assert r["zeroshot"]["zeroshot_top_1"] == 1 and all(row.accuracy == 1 for row in found.groups)
    assert sum(row.count for row in found.groups) + found.without_group == 12
    assert r["vae_reconstruction"]["psnr"] == pytest.approx(100)
    assert r["reconstruction"]["psnr"] == pytest.approx(np.mean(found.psnr)) and len(found.vae_psnr) == 12
    assert "32x32" in found.results["reconstruction"][0].how and "simple tokeniser" in found.results["captions"][-1].how
    assert set(found.emoji) <= set(openmoji.load_emoji().test) and all(n.how and n.library for numbers in found.results.values() for n in numbers)


def test_the_demo_writes_every_number_with_its_protocol(oracle):
    found = demo.as_json(evaluate_openmoji(oracle, PERFECT_VAE, size=32, count=12))
    assert found == json.loads(json.dumps(found))
    assert set(found) == {"reconstruction", "vae_reconstruction", "retrieval", "captions", "zeroshot", "zeroshot_groups"}
    assert found["reconstruction"][0]["metric"] == "psnr" and found["reconstruction"][0]["how"] and "torch" in found["reconstruction"][0]["library"]


def test_a_model_that_swaps_answers_gets_none(oracle):
    shifted = dataclasses.replace(
        oracle, caption=lambda x: ["nothing like it"] * len(x), embed_images=lambda x: oracle.embed_images(x).roll(1, 0), reconstruct=lambda x: -x
    )
    r = {name: values(numbers) for name, numbers in evaluate_openmoji(shifted, PERFECT_VAE, size=32, count=12).results.items()}
    assert r["captions"]["exact_match"] == 0 and r["retrieval"]["image_to_text_r@1"] == 0 and r["reconstruction"]["psnr"] < 10


def test_rows_are_original_vae_and_rebuilt(oracle):
    emoji = openmoji.load_emoji().evaluation("test", 3)
    rows = rebuilt_rows(3, oracle, PERFECT_VAE, size=32)
    for e, (original, vae, rebuilt) in zip(emoji, rows, strict=True):
        expected = np.asarray(openmoji.draw(e.character, 32), int)
        assert np.array_equal(np.asarray(original, int), expected) and np.array_equal(np.asarray(vae, int), expected)
        assert np.array_equal(np.asarray(rebuilt, int), (expected + 4).clip(max=255))
