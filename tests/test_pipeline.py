"""The Python face: images of every kind and shape in, tokens, images, vectors and words out."""

import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_pipeline import NAMES, SIZE, make_pipeline, photo, pipeline, write_photo

import openvision3 as ov3
from openvision3.data.crops import pad
from openvision3.data.familiarity import Calibration, Familiarity
from openvision3.data.images import ImageError, to_pil, to_tensor
from openvision3.pipeline import expand_images, load


def tensor(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return to_tensor(photo(width, height, seed))


# -- images in ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(16, 96))
def test_any_picture_keeps_its_aspect_and_is_padded_to_multiples_of_16(width, height, size):
    scaled = pipeline().scaled(photo(width, height), size)[0]
    prepared = pipeline().prepare(photo(width, height), size)
    _, h, w = scaled.shape
    assert max(h, w) == size
    assert abs(h - size * height / max(width, height)) <= 0.5 or h == 1
    assert abs(w - size * width / max(width, height)) <= 0.5 or w == 1
    assert prepared.shape == (1, 3, -(-h // 16) * 16, -(-w // 16) * 16)
    assert torch.equal(prepared[0, :, :h, :w], scaled), "padding is at the bottom and right"


def test_the_long_side_is_the_training_size_unless_told():
    assert pipeline().prepare(photo(200, 100)).shape == (1, 3, SIZE // 2, SIZE)
    assert pipeline().prepare(photo(200, 100), size=96).shape == (1, 3, 48, 96)
    assert pipeline().prepare(photo(200, 100), size=0).shape == (1, 3, 112, 208)


def test_path_string_pil_and_bytes_of_one_picture_give_the_same_tokens(tmp_path):
    path = write_photo(tmp_path / "a.png")
    picture = Image.open(path)
    expected = pipeline().encode(picture)
    for source in (path, str(path), path.read_bytes(), [path], (picture,), iter([str(path)])):
        assert torch.equal(pipeline().encode(source), expected)


def test_a_list_may_mix_paths_pictures_and_tensors(tmp_path):
    path = write_photo(tmp_path / "a.png", 64, 48)
    picture = Image.open(path).convert("RGB")
    tokens = pipeline().encode([path, picture, to_tensor(picture)])
    assert tokens.shape == (3, 4 * 3, 64)
    assert torch.allclose(tokens[0], tokens[1]) and torch.allclose(tokens[0], tokens[2], atol=1e-5)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "HSV"])
def test_a_picture_of_any_mode_is_taken(mode):
    picture = photo(64, 48)
    picture = picture.convert("L").convert(mode) if mode in ("I", "F", "1", "LA") else picture.convert(mode)
    assert pipeline().prepare(picture).shape == (1, 3, 48, 64)


def test_a_tensor_is_taken_at_its_own_size_alone_or_in_a_list():
    image = tensor(40, 72)
    expected = pad(image)[None]
    assert torch.equal(pipeline().prepare(image), expected)
    assert torch.equal(pipeline().prepare(image[None]), expected)
    assert torch.equal(pipeline().prepare([image]), expected)
    assert pipeline().prepare(image, size=32).shape == (1, 3, 32, 32)


def test_pictures_of_unlike_grids_are_refused_in_one_line_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"different padded sizes \(32x64, 64x32\).*pad_to=\(64, 64\)") as error:
        pipeline().encode([photo(64, 32), photo(32, 64)])
    assert "\n" not in str(error.value)


def test_pad_to_brings_unlike_pictures_to_one_grid():
    images = [photo(64, 32), photo(32, 64)]
    tokens = pipeline().encode(images, pad_to=(64, 64))
    assert tokens.shape == (2, 16, 64)
    assert torch.allclose(tokens[1:], pipeline().encode(images[1], pad_to=(64, 64)), atol=1e-5)
    assert len(pipeline().embed_images(images, pad_to=(64, 64))) == len(pipeline().caption(images, pad_to=(64, 64), max_length=2)) == 2


@pytest.mark.parametrize("wrong", [(48, 64), (64, 72), (0, 0)])
def test_pad_to_must_be_multiples_of_16_that_hold_the_picture(wrong):
    with pytest.raises(ValueError, match=r"choose multiples of 16 of at least \(64, 64\)"):
        pipeline().encode(photo(64, 64), pad_to=wrong)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((3, 16, 16), 255.0), r"run from 255 to 255; give \[-1, 1\]"),
        (torch.full((3, 16, 16), 200, dtype=torch.uint8), r"\[-1, 1\]"),
        (torch.full((3, 16, 16), float("nan")), r"\[-1, 1\]"),
        (torch.zeros(16, 16), "cannot be used"),
        (torch.zeros(1, 4, 16, 16), "cannot be used"),
        (torch.zeros(0, 3, 16, 16), "no images given"),
        ([], "no images given"),
        (np.zeros((16, 16, 3), np.uint8), "a ndarray is no image"),
        ([None], "a NoneType is no image"),
        (7, "a int is no image"),
    ],
    ids=range(10),
)
def test_what_is_no_picture_is_refused_by_name(images, message):
    with pytest.raises(ValueError, match=message):
        pipeline().encode(images)


@pytest.mark.parametrize("size", [-1, "64", (64, 64), 3_000_000_000, 60_000])
def test_a_size_that_is_none_is_refused_before_anything_is_scaled(size):
    with pytest.raises(ValueError, match="choose a long side of 1 to 9433 pixels, or 0"):
        pipeline().encode(photo(20, 20), size=size)


@pytest.mark.parametrize("pair", [128, (1, 2, 3), (128.0, 128.0), "ab"])
def test_what_is_no_height_and_width_is_refused(pair):
    with pytest.raises(ValueError, match=r"pad_to=.* give a pair of whole numbers \(H, W\)"):
        pipeline().encode(photo(20, 20), pad_to=pair)
    with pytest.raises(ValueError, match=r"size=.* give a pair of whole numbers \(H, W\)"):
        pipeline().decode(torch.zeros(1, 64, 64), size=pair)


def test_an_unreadable_picture_is_an_image_error(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"bad\.png holds text, which begins with .no image.; choose one of jpg"):
        pipeline().encode(tmp_path / "bad.png")
    with pytest.raises(ImageError, match="no such image"):
        pipeline().encode("nowhere.png")


# -- tokens and back ------------------------------------------------------------------------------------------------


def test_a_batch_is_encoded_and_decoded_as_one_by_one():
    images = [photo(64, 48, seed) for seed in range(3)]
    tokens = pipeline().encode(images)
    for row, image in enumerate(images):
        assert torch.allclose(tokens[row : row + 1], pipeline().encode(image), atol=1e-5)
    decoded = pipeline().decode(tokens, size=(48, 64))
    for row in range(3):
        assert torch.allclose(decoded[row : row + 1], pipeline().decode(tokens[row : row + 1], size=(48, 64)), atol=1e-4)


def test_encode_is_the_bare_vit_on_the_vaes_latents():
    model, image = pipeline(), tensor(64, 64)[None]
    with torch.no_grad():
        tokens, pooled = model.encoder(model.vae.encode(image))
    assert torch.equal(model.encode(image), tokens)
    assert torch.allclose(model.embed_images(image), torch.nn.functional.normalize(pooled, dim=-1))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50))
def test_decode_returns_the_unpadded_size(height, width):
    tokens = pipeline().encode(tensor(height, width))
    assert tokens.shape[1] == -(-height // 16) * -(-width // 16)
    images = pipeline().decode(tokens, size=(height, width))
    assert images.shape == (1, 3, height, width) and images.min() >= -1 and images.max() <= 1


def test_the_unpadded_size_is_the_corner_of_the_whole_grid():
    tokens = pipeline().encode(tensor(33, 50))
    assert torch.equal(pipeline().decode(tokens, size=(33, 50)), pipeline().decode(tokens, size=(48, 64))[..., :33, :50])


def test_decode_without_a_size_takes_a_square():
    assert pipeline().decode(pipeline().encode(tensor(48, 48))).shape == (1, 3, 48, 48)


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((1, 6, 64), None, "6 tokens are no square; pass size"),
        ((1, 6, 64), (64, 64), "64x64 has 4x4 tokens, not 6"),
        ((1, 6, 64), (0, 0), "0x0 has 0x0 tokens, not 6"),
        ((1, 6, 64), (-20, -40), "tokens, not 6"),
        ((1, 16, 64), (90, 300), r"tokens, not 16; pass the scaled size they came from"),
        ((1, 4, 32), None, r"give (a tensor )?\(B, N, 64\)"),
        ((4, 64), None, r"give (a tensor )?\(B, N, 64\)"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(shape, size, message):
    with pytest.raises(ValueError, match=message):
        pipeline().decode(torch.zeros(shape), size=size)


def test_reconstruct_is_encode_and_decode_at_the_scaled_size():
    picture = photo(90, 50)
    scaled = pipeline().scaled(picture)[0]
    expected = pipeline().decode(pipeline().encode(scaled), size=tuple(scaled.shape[1:]))
    assert torch.equal(pipeline().reconstruct(picture), expected)
    assert pipeline().reconstruct(picture, size=0).shape == (1, 3, 50, 90)
    assert isinstance(ov3.to_pil(expected)[0], Image.Image)


def test_verbs_for_one_picture_refuse_several():
    for verb in (pipeline().reconstruct, lambda images: pipeline().classify(images, ["a", "b"])):
        with pytest.raises(ValueError, match="one image at a time; seen 2"):
            verb([photo(20, 20), photo(20, 20)])


def test_inference_is_without_noise_and_without_gradient():
    image = tensor(32, 32)
    first, second = pipeline().encode(image), pipeline().encode(image)
    assert torch.equal(first, second) and not first.requires_grad
    assert torch.equal(pipeline().decode(first), pipeline().decode(second)) and not pipeline().decode(first).requires_grad


# -- words ----------------------------------------------------------------------------------------------------------


def test_embeddings_are_unit_vectors():
    images = pipeline().embed_images([photo(64, 64, seed) for seed in range(3)])
    texts = pipeline().embed_texts(["red heart", "cat face", "", "words it never saw " * 40])
    assert images.shape == (3, 64) and texts.shape == (4, 64)
    assert torch.allclose(torch.cat([images, texts]).norm(dim=1), torch.ones(7), atol=1e-5)


def test_a_text_embedding_does_not_depend_on_its_neighbours():
    together = pipeline().embed_texts(list(NAMES))
    for row, name in enumerate(NAMES):
        assert torch.allclose(together[row : row + 1], pipeline().embed_texts(name), atol=1e-5)


def test_no_texts_are_refused():
    for texts in ([], [3], ["a", None]):
        with pytest.raises(ValueError, match=r"texts .* cannot be embedded; give a text or a list of texts"):
            pipeline().embed_texts(texts)


def test_classify_gives_sorted_probabilities_that_sum_to_one():
    found = pipeline().classify(photo(64, 64), NAMES)
    assert sorted(label for label, _ in found) == sorted(NAMES)
    probabilities = [p for _, p in found]
    assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) == pytest.approx(1, abs=1e-5)


def test_classify_is_the_softmax_of_scaled_cosines():
    image = photo(64, 64)
    with torch.no_grad():
        cosines = pipeline().embed_images(image) @ pipeline().embed_texts(NAMES).T
        expected = (cosines[0] * pipeline().model.temperature).softmax(0)
    found = dict(pipeline().classify(image, list(NAMES)))
    assert [found[name] for name in NAMES] == pytest.approx(expected.tolist(), abs=1e-6)


def test_labels_may_come_one_by_one():
    image = photo(64, 64)
    assert pipeline().classify(image, (name for name in NAMES)) == pipeline().classify(image, NAMES)


@pytest.mark.parametrize("labels", ["cat", [], ()])
def test_labels_must_be_a_list_of_texts(labels):
    with pytest.raises(ValueError, match="labels must be a list of texts"):
        pipeline().classify(photo(20, 20), labels)


def calibrated(threshold: float):
    model = make_pipeline()
    model.familiarity = Familiarity.fit(model.describe(model.prepare([photo(64, 64, seed) for seed in range(40)])))
    model.familiarity.calibration = Calibration(threshold, ("drawings",), (0.0, 0.5, 0.25, 1.0), 0.5, {})
    return model


def test_answers_are_the_captions_with_the_log_probabilities_of_their_words():
    images = [photo(64, 64, seed) for seed in range(3)]
    answers = pipeline().answer(images, max_length=6)
    assert [answer.caption for answer in answers] == pipeline().caption(images, max_length=6)
    model, words = pipeline().model, pipeline().tokenizer
    tokens = pipeline().encode(images[:1])
    [ids] = model.captioner.write(tokens, words.begin_id, words.end_id, max_length=6)
    row = [words.begin_id, *ids, words.end_id]
    with torch.no_grad():
        logs = model.captioner(tokens, torch.tensor([row])).log_softmax(-1)[0]
    expected = sum(float(logs[i, word]) for i, word in enumerate(row[1:]))
    assert answers[0].total_log_probability == pytest.approx(expected, abs=1e-4)
    assert answers[0].log_probability == pytest.approx(expected / (len(row) - 1), abs=1e-4)
    assert all(answer.confidence is None and answer.in_distribution is None for answer in answers), "there is no calibration"


def test_a_calibrated_model_says_what_it_knows_and_keeps_it_when_saved(tmp_path):
    image = photo(64, 64, 3)
    for threshold, expected in ((-1e6, True), (1e6, False)):
        model = calibrated(threshold)
        [answer] = model.answer(image)
        assert answer.in_distribution is expected and model.in_distribution(image) == [expected]
        familiarity = float(model.familiarity.score(model.describe(model.prepare(image)))[0])
        odds = 0.5 * answer.log_probability + 0.25 * answer.total_log_probability + familiarity
        assert answer.confidence == pytest.approx(1 / (1 + math.exp(-odds)), abs=1e-6)
    ranking = model.classify(image, NAMES)
    assert model.label_confidence(ranking) == pytest.approx(max(p**0.5 for _, p in ranking) / sum(p**0.5 for _, p in ranking))
    model.save(tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert loaded.familiarity.calibration == model.familiarity.calibration and loaded.in_distribution(image) == [False]
    assert pipeline().in_distribution(image) == [None] and pipeline().label_confidence(ranking) is None


def test_a_class_of_several_names_and_templates_is_the_mean_direction_of_all_its_texts():
    image, templates = photo(64, 64), ["a {}", "{} drawing"]
    found = dict(pipeline().classify(image, [["red heart", "blue heart"], "cat face"], templates))
    texts = [["a red heart", "a blue heart", "red heart drawing", "blue heart drawing"], ["a cat face", "cat face drawing"]]
    with torch.no_grad():
        means = torch.stack([pipeline().embed_texts(of_one).mean(0) for of_one in texts])
        cosines = torch.nn.functional.cosine_similarity(pipeline().embed_images(image), means)
        expected = (cosines * pipeline().model.temperature).softmax(0)
    assert [found["red heart"], found["cat face"]] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("templates", ["{}", [], ["a drawing"], [3]])
def test_a_template_has_a_place_for_the_label(templates):
    with pytest.raises(ValueError, match=r"templates must be a list of texts|has no \{\} in the place of the class"):
        pipeline().classify(photo(20, 20), ["cat", "dog"], templates)


def test_a_caption_stops_at_the_end_mark():
    model = make_pipeline()
    image, words = photo(64, 64), model.tokenizer
    cat = words.ids("cat")[0]
    captioner = model.model.captioner
    with torch.no_grad():  # the next word depends on the position alone: cat, cat, end, cat, cat ...
        for block in captioner.blocks:
            for parameter in block.parameters():
                parameter.zero_()
        captioner.embedding.weight.zero_()
        captioner.embedding.weight[cat, 0] = captioner.embedding.weight[words.end_id, 1] = 1.0
        captioner.positions.zero_()
        captioner.positions[:, 0] = 100.0
        captioner.positions[2] = torch.roll(captioner.positions[2], 1)
    assert model.caption(image) == ["cat cat"]
    assert model.caption([image, image], beams=3) == ["cat cat"] * 2
    assert model.caption(image, max_length=1) == ["cat"]


def test_a_sampled_caption_follows_its_seed():
    image = photo(64, 64)
    draw = [pipeline().caption(image, top_p=1.0, temperature=2.0, max_length=12, seed=seed)[0] for seed in (0, 0, 1, 2)]
    assert draw[0] == draw[1] and len(set(draw)) == 3


def test_greedy_captions_of_a_batch_are_those_of_each_picture():
    images = [photo(64, 64, seed) for seed in range(3)]
    assert pipeline().caption(images, max_length=6) == [pipeline().caption(image, max_length=6)[0] for image in images]


@pytest.mark.parametrize(
    "setting",
    [
        {"beams": 0},
        {"beams": 2, "top_p": 0.5},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"temperature": 0.0},
        {"seed": -1},
        {"beams": 2.5},
        {"max_length": 0},
        {"max_length": -1},
    ],
)
def test_caption_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        pipeline().caption(photo(20, 20), **setting)


# -- files, folders, globs ------------------------------------------------------------------------------------------


def test_files_folders_and_globs_expand_in_order_each_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("d/b.png", "d/a.JPG", "d/deep/c.png", "x[1].png"):
        write_photo(tmp_path / name)
    (tmp_path / "d" / "notes.txt").write_text("no image")
    assert expand_images(["d"]) == ["d/a.JPG", "d/b.png", "d/deep/c.png"]
    assert expand_images(["d/*.png", "d", str(tmp_path / "d" / "b.png")]) == ["d/b.png", "d/a.JPG", "d/deep/c.png"]
    assert expand_images(["d/**/*.png"]) == ["d/b.png", "d/deep/c.png"]
    assert expand_images(["x[1].png"]) == ["x[1].png"]


def test_a_pattern_that_names_nothing_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    for pattern, message in (
        (tmp_path / "empty", "holds no images that are read; choose one of"),
        (tmp_path / "*.png", "no such image"),
        (tmp_path / "a.png", "no such"),
    ):
        with pytest.raises(ImageError, match=message):
            expand_images([str(pattern)])


# -- the package ----------------------------------------------------------------------------------------------------


def loaded_after(code: str) -> set[str]:
    names = ("torch", "torchvision", "diffusers", "transformers", "matplotlib", "tyro")
    code += f"\nimport sys; print(*[m for m in {names} if m in sys.modules])"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_imports_no_torch():
    assert loaded_after("import openvision3") == set()


def test_load_needs_torch_alone_and_diffusers_only_for_a_vae():
    assert loaded_after("import openvision3; openvision3.load") == {"torch"}
    assert loaded_after("from openvision3.hub import load_vae; load_vae('embedded')") - {"transformers"} == {
        "torch",
        "diffusers",
    }  # diffusers takes it where it is


def test_all_names_of_the_package_are_there():
    assert {name: getattr(ov3, name) is not None for name in ov3.__all__} == dict.fromkeys(ov3.__all__, True)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        ov3.laod  # noqa: B018


@pytest.mark.parametrize(
    ("settings", "message"), [({"device": "tpu"}, "device 'tpu' is not supported"), ({"precision": "fp16"}, "precision 'fp16' is unknown")]
)
def test_load_refuses_unknown_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ov3.load("anything", **settings)


# -- the model that ships -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini():
    return ov3.load("mini")


def test_the_shipped_mini_rebuilds_names_and_describes_a_held_out_emoji(mini):
    from openvision3.data import openmoji
    from openvision3.evaluate.metrics.reconstruction import psnr

    emoji = openmoji.load_emoji().evaluation("test", 8)
    pictures = [openmoji.draw(e.character, 128) for e in emoji]
    images = mini.prepare(pictures)
    assert psnr(images, mini.decode(mini.encode(images))).mean() > 15
    assert all(mini.caption(images))
    found = [max(mini.classify(picture, [e.name for e in emoji]), key=lambda pair: pair[1])[0] for picture in pictures]
    assert sum(a == e.name for a, e in zip(found, emoji, strict=True)) >= 4
    assert isinstance(to_pil(mini.reconstruct(pictures[0]))[0], Image.Image)


def test_the_shipped_weights_are_small_and_have_a_card_and_their_credits():
    """A wheel on PyPI may have 100 MB."""
    assets = Path(ov3.__file__).parent / "assets"
    weights = [assets / "mini" / "model.safetensors", assets / "vae" / "diffusion_pytorch_model.safetensors"]
    assert sum(path.stat().st_size for path in weights) < 36e6
    assert all(path.stat().st_size < 30e6 for path in assets.glob("generators/*/model.safetensors"))
    assert all(path.stat().st_size < 20e6 for path in assets.glob("chats/*/model.safetensors"))
    assert sum(path.stat().st_size for path in assets.rglob("*") if path.is_file()) < 90e6
    for folder in (assets / "mini", assets / "vae", *assets.glob("generators/*"), *assets.glob("chats/*")):
        assert "CC BY-SA 4.0" in (folder / "README.md").read_text(encoding="utf-8"), folder
    assert len((assets / "mini" / "CREDITS.txt").read_text(encoding="utf-8").splitlines()) > 2000


def test_the_shipped_mini_says_when_an_image_is_like_nothing_in_its_training(mini):
    from openvision3.data import openmoji

    drawings = [openmoji.draw(emoji.character, 128) for emoji in openmoji.load_emoji().evaluation("test", 20)]
    known = mini.in_distribution(drawings)
    noise = [np.random.default_rng(seed).integers(0, 256, (128, 128, 3), dtype=np.uint8) for seed in range(5)]
    assert sum(map(bool, known)) >= 16 and not any(mini.in_distribution([Image.fromarray(image) for image in noise]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_tensors_that_are_no_floats_are_no_images_at_any_door(dtype):
    """Of integers the range alone was looked at: a black image of uint8, all zero, gave the tokens of mid grey."""
    images, model = torch.zeros(1, 3, 64, 64, dtype=dtype), pipeline()
    doors: list[Callable[[], object]] = [
        *(lambda door=door: door(images) for door in (model.scaled, model.prepare, model.encode, model.reconstruct, model.embed_images, model.caption)),
        *(lambda size=size: model.encode([images[0]], size=size) for size in (None, 32)),
        *(lambda door=door: door(images) for door in (model.model.encode, model.model.embed_images, model.vae.encode, ov3.to_pil)),
        lambda: model.classify(images, ["a cat"]),
        lambda: model.vae.decode(torch.zeros(1, 16, 8, 8, dtype=dtype)),
        lambda: model.decode(torch.zeros(1, 16, 64, dtype=dtype)),
        lambda: model.model({"pixel_images": images, "latents": torch.zeros(1, 16, 8, 8), "caption_ids": torch.ones(1, 3).long()}),
    ]
    for door in doors:
        with pytest.raises(ValueError, match=str(dtype)) as caught:
            door()
        assert "\n" not in str(caught.value) and "float" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.9, "temperature": 1e-40}, "temperature 1e-40 must be a positive number from 1e-06"),
        ({"top_p": 0.9, "temperature": 1e40}, "temperature 1e\\+40 must be"),
        ({"top_p": 0.9, "temperature": "1"}, "temperature '1' must be"),
        ({"top_p": "0.9"}, "top_p '0.9' must lie"),
        ({"temperature": 0.5}, "temperature 0.5 has no effect without sampling; set top_p too"),
        ({"temperature": 0.5, "beams": 2}, "set top_p too"),
        ({"max_length": 1.5}, "max_length 1.5 must be a whole number"),
        ({"seed": 1.5}, "seed 1.5 must be a whole number"),
        ({"seed": None}, "seed None must be a whole number"),
    ],
)
def test_settings_of_captions_that_cannot_be_used_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        pipeline().caption(photo(40, 40), **options)


def test_the_coldest_and_hottest_words_that_may_be_drawn_can_be():
    cold, hot = (pipeline().caption(photo(40, 40), top_p=1.0, temperature=temperature, max_length=8) for temperature in (1e-6, 1e6))
    assert cold == pipeline().caption(photo(40, 40), max_length=8) != hot


@pytest.mark.parametrize("labels", [None, 5, "a cat", []])
def test_labels_that_are_no_list_are_refused_in_one_line(labels):
    with pytest.raises(ValueError, match="labels must be a list of texts"):
        pipeline().classify(photo(40, 40), labels)


def test_a_model_moves_to_a_device_by_name_or_by_torch_and_stays_where_there_is_none(monkeypatch):
    model = make_pipeline()
    assert model.to("cpu") is model and model.to(torch.device("cpu")).device.type == "cpu"
    moved = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(model.model, "to", moved.append)
    model.to("cuda:1").to(torch.device("cuda", 0))
    assert moved == ["cuda:1", "cuda:0"]
    for wrong, message in (("cuda:7", "torch sees 2 GPUs"), (torch.bfloat16, "precision='bf16'")):
        with pytest.raises(ValueError, match=message):
            model.to(wrong)
    assert len(moved) == 2


def test_texts_that_the_model_makes_nothing_of_are_refused_or_warned_of():
    model, image = pipeline(), photo(64, 64)
    words = model.model.text_encoder.config.positions
    for labels, said in (
        (["\u7ea2\u5fc3", "\u84dd\u8f66"], "does not know their words"),
        (["red " * words + "heart", "red " * words + "cat"], "put what differs first"),
    ):
        with pytest.raises(ValueError, match=said):
            model.classify(image, labels)
        with pytest.warns(UserWarning, match=r"mostly unknown|put what differs first"):
            model.embed_texts(labels)
    with pytest.warns(UserWarning, match="1 of 2 texts, such as .*mostly unknown"):
        model.classify(image, ["\u732b", "red heart"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.classify(image, list(NAMES))
        model.embed_texts(list(NAMES))


@pytest.mark.parametrize("call", [lambda m, t: m.embed_texts([t]), lambda m, t: m.embed_texts(t), lambda m, t: m.classify(photo(64, 64), ["red heart", t])])
@pytest.mark.parametrize("text", ["\udcff cat", "\ud800"])
def test_text_that_is_no_utf_8_is_one_clear_line(call, text):
    with pytest.raises(ValueError, match="is not UTF-8 text") as refused:
        call(pipeline(), text)
    assert "\n" not in str(refused.value) and str(refused.value).isprintable()
