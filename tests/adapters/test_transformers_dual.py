"""The dual encoder in transformers: numbers, ids and answers of our own model, through its Auto classes and pipelines."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_pipeline import NAMES, make_pipeline, photo, pipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import processors as post_processors
from transformers import AutoImageProcessor, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, AutoTokenizer
from transformers import pipeline as transformers_pipeline

from openvision3.adapters.transformers import dual_encoder, processor, register, text_tokenizer
from openvision3.adapters.transformers_config import OpenVision3Config
from openvision3.adapters.transformers_model import OpenVision3Model, OpenVision3VisionModel
from openvision3.data.text import TextTokenizer

register()
TEXTS = ["a red heart", "cat", "a [CLS] in [PAD] brackets", "heart " * 100, "Ünknown wörds ☃", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dual")
    dual_encoder(pipeline()).save_pretrained(folder)
    processor(pipeline(), "keep").save_pretrained(folder)
    return folder


def test_the_tokenizer_writes_the_ids_of_ours_before_and_after_saving(folder):
    expected = pipeline().tokenizer.text_ids(TEXTS, 32)
    for tokenizer in (text_tokenizer(pipeline().tokenizer, 32), AutoTokenizer.from_pretrained(folder), AutoProcessor.from_pretrained(folder).tokenizer):
        batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
        assert torch.equal(batch["input_ids"], expected)
        assert torch.equal(batch["attention_mask"].bool(), expected != pipeline().tokenizer.pad_id)


def test_the_tokenizer_of_others_keeps_its_ids_and_loses_its_own_begin_and_end():
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3, "red": 4, "heart": 5}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = post_processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    ours = TextTokenizer(words)
    batch = text_tokenizer(ours, 8)(["red heart", "heart"], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], ours.text_ids(["red heart", "heart"], 8))


@torch.no_grad()
def test_embeddings_and_logits_are_those_of_the_model(folder):
    images, ours = [photo(60, 40), photo(60, 40, seed=1)], pipeline()
    for model in (dual_encoder(ours), AutoModel.from_pretrained(folder), AutoModelForZeroShotImageClassification.from_pretrained(folder)):
        assert type(model) is OpenVision3Model and not model.training
        batch = AutoProcessor.from_pretrained(folder)(text=[*NAMES], images=images, padding=True, return_tensors="pt")
        output = model(**batch, return_loss=False)
        image, text = ours.embed_images(images), ours.embed_texts(NAMES)
        assert torch.allclose(output.image_embeds, image, atol=1e-5) and torch.allclose(output.text_embeds, text, atol=1e-5)
        assert torch.allclose(output.logits_per_image, ours.model.temperature * image @ text.T, atol=1e-4)
        assert torch.equal(output.logits_per_text, output.logits_per_image.T) and output.loss is None
        features = model.get_image_features(batch["pixel_values"])
        assert torch.allclose(features.last_hidden_state, ours.encode(images), atol=1e-5)
        assert torch.allclose(torch.nn.functional.normalize(features.pooler_output, dim=-1), image, atol=1e-5)
        words = model.get_text_features(batch["input_ids"], batch["attention_mask"])
        assert torch.allclose(torch.nn.functional.normalize(words.pooler_output, dim=-1), text, atol=1e-5)
        assert words.last_hidden_state.shape[:2] == batch["input_ids"].shape


def test_saved_and_loaded_again_every_weight_is_the_same_bit_for_bit(folder):
    before, after = dual_encoder(pipeline()).state_dict(), OpenVision3Model.from_pretrained(folder).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(name.startswith(("captioner", "latent_decoder")) for name in before)


@torch.no_grad()
def test_the_tower_alone_loads_from_the_folder_of_both_encoders(folder):
    tower = OpenVision3VisionModel.from_pretrained(folder)
    assert torch.allclose(tower(pipeline().prepare(photo(60, 40))).last_hidden_state, pipeline().encode(photo(60, 40)), atol=1e-5)
    assert tower.config.get_text_config() is tower.config and OpenVision3Config.from_pretrained(folder).get_text_config().vocab_size > 0


def test_the_loss_is_the_symmetric_contrastive_one_and_reaches_both_encoders():
    ours = make_pipeline()
    model, batch = dual_encoder(ours), processor(ours)(text=[*NAMES[:3]], images=[photo(64, 64, seed) for seed in range(3)], padding=True, return_tensors="pt")
    output = model(**batch, return_loss=True)
    logits = output.logits_per_image
    by_hand = -sum(logits.softmax(dim).diagonal().log().mean() for dim in (0, 1)) / 2
    assert torch.allclose(output.loss, by_hand)
    output.loss.backward()
    for part in (model.vision_model.encoder.pool_projection.weight, model.text_encoder.embedding.weight, model.log_temperature):
        assert part.grad.abs().sum() > 0


@torch.no_grad()
def test_padding_and_masked_pieces_do_not_change_a_text():
    model, ids = dual_encoder(pipeline()), pipeline().tokenizer.text_ids(["red heart"], 32)
    padded = torch.nn.functional.pad(ids, (0, 5), value=pipeline().model.pad_id)
    noisy = torch.nn.functional.pad(ids, (0, 5), value=9)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 5))
    for other, attention_mask in ((padded, None), (padded, mask), (noisy, mask)):
        assert torch.allclose(model.get_text_features(ids).pooler_output, model.get_text_features(other, attention_mask).pooler_output, atol=1e-5)


@torch.no_grad()
def test_loaded_in_bf16_the_answers_stay_close(folder):
    batch = processor(pipeline())(text=[*NAMES], images=[photo(64, 64)], padding=True, return_tensors="pt")
    exact, half = (AutoModel.from_pretrained(folder, dtype=dtype)(**batch) for dtype in (torch.float32, torch.bfloat16))
    for name in ("image_embeds", "text_embeds"):
        assert (exact[name] * half[name]).sum(-1).min() > 0.99 and half[name].dtype == torch.float32


def test_the_pipelines_of_transformers_answer_as_our_model(folder):
    classify = transformers_pipeline("zero-shot-image-classification", model=str(folder))
    answers = classify(photo(60, 40), candidate_labels=[*NAMES], hypothesis_template="{}")
    expected = pipeline().classify(photo(60, 40), NAMES)
    assert [a["label"] for a in answers] == [label for label, _ in expected]
    assert [a["score"] for a in answers] == pytest.approx([score for _, score in expected], abs=1e-4)
    tower = transformers_pipeline(
        "image-feature-extraction", model=dual_encoder(pipeline()).vision_model, image_processor=AutoImageProcessor.from_pretrained(folder)
    )
    for extract in (tower, transformers_pipeline("image-feature-extraction", model=str(folder))):
        tokens, pooled = (extract(photo(60, 40), return_tensors=True, pool=pool) for pool in (False, True))
        assert torch.allclose(tokens, pipeline().encode(photo(60, 40)), atol=1e-5)
        assert torch.allclose(torch.nn.functional.normalize(pooled, dim=-1), pipeline().embed_images(photo(60, 40)), atol=1e-5)


@torch.no_grad()
def test_of_images_or_texts_alone_the_model_gives_their_features():
    model, batch = dual_encoder(pipeline()), processor(pipeline())(text=[*NAMES], images=[photo(64, 64)], padding=True, return_tensors="pt")
    images = model(pixel_values=batch["pixel_values"], output_hidden_states=True)
    assert torch.equal(images.pooler_output, model.get_image_features(batch["pixel_values"]).pooler_output) and images.hidden_states
    words = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model(**words, return_dict=False)[1], model.get_text_features(**words).pooler_output)
    for wrong in ({}, {"pixel_values": batch["pixel_values"], "return_loss": True}):
        with pytest.raises(ValueError, match="give one of them for features, and both for logits"):
            model(**wrong)


def test_the_folder_of_our_own_format_is_told_apart(tmp_path):
    pipeline().save(tmp_path / "own")
    with pytest.raises(ValueError, match="openvision3 export transformers"):
        OpenVision3Config.from_pretrained(tmp_path / "own")


def test_importing_the_package_does_not_import_transformers():
    code = "import sys, openvision3, openvision3.pipeline, openvision3.adapters; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_config_json_holds_every_setting_of_both_encoders(folder):
    values = json.loads((folder / "config.json").read_text())
    assert values["text_settings"]["size"] == "tiny" and values["vision_config"]["encoder_settings"]["embed_dim"] == 64
    assert values["vision_config"]["vae_settings"]["_class_name"] == "AutoencoderTiny" and values["model_type"] == "openvision3"
