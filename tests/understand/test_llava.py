"""The network is transformers' own LLaVA: its loss, its tokens and its answers are theirs; only what is said to learn does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_chat import language_folder, row
from tiny_pipeline import make_pipeline, photo

from openvision3.data.batches import to_device
from openvision3.understand.batches import collate, read_example
from openvision3.understand.conversations import Conversations
from openvision3.understand.language import open_language
from openvision3.understand.llava import Llava, check_tower, connect, trained_tensors
from openvision3.understand.prompts import Prompts
from openvision3.understand.tiles import ImageLayout

IGNORED = -100


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    language_folder(folder)
    for name, sides in {"a": (60, 40), "b": (32, 90), "c": (200, 70)}.items():
        photo(*sides, seed=len(name)).save(folder / f"{name}.png")
    return folder


def settings(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**({"size": 64, "anyres": False, "layer": -1, "train_language": "frozen", "lora_rank": 4, "lora_alpha": 8.0} | changes))


def built(root: Path, dtype: torch.dtype = torch.float32, language: str = "", **changes: Any) -> tuple[Llava, Prompts, ImageLayout]:
    pipeline, chosen = make_pipeline(), settings(**changes)
    model, tokenizer = open_language(language or language_folder(root), dtype)
    prompts = Prompts(tokenizer)
    return Llava(connect(chosen, pipeline, model, prompts)), prompts, ImageLayout(chosen.size, chosen.anyres)


def batch_of(root: Path, prompts: Prompts, layout: ImageLayout, *rows: dict[str, Any]) -> dict[str, torch.Tensor]:
    import json

    (root / "rows.json").write_text(json.dumps(rows))
    conversations = Conversations([str(root / "rows.json")])
    return to_device(collate([read_example(conversations, i, prompts, layout) for i in range(len(conversations))], layout, prompts.pad_id), "cpu")


ROWS = (
    row(0, "a.png", "<image>\nwhat is this ?", "a cat ."),
    row(1, ["b.png", "c.png"], "<image> and <image> : what is this ?", "two", "is it red ?", "yes it is"),
    row(2, None, "is there a dog ?", "no there is no dog"),
)


@pytest.mark.parametrize("anyres", [False, True])
def test_the_loss_is_that_of_transformers_class_with_labels(root, anyres):
    """Row by row through their forward with their labels, without padding, weighted by the number of words."""
    model, prompts, layout = built(root, anyres=anyres)
    total, words = torch.zeros(()), 0
    for one in ROWS:
        batch = batch_of(root, prompts, layout, one)
        labels = torch.full_like(batch["input_ids"], IGNORED).flatten()
        labels[batch["answer_positions"] + 1] = batch["answer_ids"]
        seen = {"pixel_values": batch["pixel_values"]} if len(batch["pixel_values"]) else {}
        seen |= {"image_sizes": batch["image_sizes"]} if anyres and seen else {}
        with torch.no_grad():
            out = model.network(input_ids=batch["input_ids"], labels=labels.view_as(batch["input_ids"]), **seen)
        total, words = total + out.loss * len(batch["answer_ids"]), words + len(batch["answer_ids"])
    with torch.no_grad():
        loss, _ = model(batch_of(root, prompts, layout, *ROWS))
    torch.testing.assert_close(loss, total / words, rtol=1e-5, atol=1e-6)


def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(root):
    model, prompts, layout = built(root, train_language="lora")
    model(batch_of(root, prompts, layout, *ROWS))[0].backward()
    whole = {name: p.grad.clone() for name, p in trained_tensors(model.network).items()}
    model.zero_grad()
    for piece in model.prepare([batch_of(root, prompts, layout, one) for one in ROWS]):
        model(piece)[0].backward()
    for name, p in trained_tensors(model.network).items():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-3, atol=1e-7, msg=name)


def test_tiles_of_several_images_reach_the_language_model_in_their_order(root):
    """Another third image changes nothing before its own tokens."""
    model, prompts, layout = built(root, anyres=True)
    rows = [row(0, ["a.png", "b.png", last], "<image> <image> <image> what is this ?", "a cat") for last in ("c.png", "a.png")]
    one, other = (batch_of(root, prompts, layout, each) for each in rows)
    assert len(one["image_sizes"]) == 3 and len(one["pixel_values"]) > 3
    before = int((one["input_ids"][0] == prompts.image_id).nonzero()[0]) + layout.tokens(60, 40) + layout.tokens(32, 90)

    def hidden(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen = {name: batch[name] for name in ("input_ids", "pixel_values", "image_sizes")}
        return model.network.model(**seen).last_hidden_state[0]

    with torch.no_grad():
        a, b = hidden(one), hidden(other)
    torch.testing.assert_close(a[:before], b[:before], rtol=1e-4, atol=1e-5)
    assert (a[-1] - b[-1]).abs().max() > 1e-4


@pytest.mark.parametrize("anyres", [False, True])
def test_generating_with_a_cache_gives_the_words_of_doing_without(root, anyres):
    model, prompts, layout = built(root, anyres=anyres)
    batch = batch_of(root, prompts, layout, ROWS[1])
    ids = batch["input_ids"][:, : int(batch["answer_positions"][0]) + 1]
    seen = {"pixel_values": batch["pixel_values"], **({"image_sizes": batch["image_sizes"]} if anyres else {})}
    answers = [model.network.generate(ids, **seen, max_new_tokens=8, do_sample=False, use_cache=cached, eos_token_id=None) for cached in (True, False)]
    assert answers[0].tolist() == answers[1].tolist() and answers[0].shape[1] == ids.shape[1] + 8


def test_what_is_seen_decides_what_is_predicted(root):
    model, prompts, layout = built(root)
    features = [
        model.features(batch_of(root, prompts, layout, row(0, name, "<image>\nwhat is this ?", "a cat"))).detach() for name in ("a.png", "b.png", "a.png")
    ]
    assert (features[0] - features[1]).abs().max() > 1e-4
    torch.testing.assert_close(features[0], features[2])


@pytest.mark.parametrize(
    ("train_language", "anyres", "parts"),
    [
        ("frozen", False, {"multi_modal_projector"}),
        ("frozen", True, {"multi_modal_projector", "image_newline"}),
        ("lora", False, {"multi_modal_projector", "language_model"}),
        ("full", False, {"multi_modal_projector", "language_model", "lm_head"}),
    ],
)
def test_only_what_is_said_to_learn_has_a_gradient(root, train_language, anyres, parts):
    model, prompts, layout = built(root, train_language=train_language, anyres=anyres)
    model(batch_of(root, prompts, layout, *ROWS))[0].backward()
    assert {name.removeprefix("model.").split(".")[0] for name in trained_tensors(model.network)} == parts
    with_gradient = {name for name, p in model.network.named_parameters() if p.grad is not None}
    assert with_gradient == set(trained_tensors(model.network))
    if train_language == "lora":
        assert all("lora_" in name for name in with_gradient if "language_model" in name)


def test_a_batch_without_an_image_leaves_the_projector_a_gradient_of_zeros(root):
    model, prompts, layout = built(root)
    model(batch_of(root, prompts, layout, ROWS[2]))[0].backward()
    assert all(p.grad is not None and not p.grad.any() for p in trained_tensors(model.network).values())


def test_lora_adds_nothing_at_first(root):
    (plain, prompts, layout), (added, _, _) = built(root), built(root, train_language="lora")
    batch = batch_of(root, prompts, layout, *ROWS)
    with torch.no_grad():
        torch.testing.assert_close(plain(batch)[0], added(batch)[0])


def test_the_layer_chooses_what_the_projector_reads(root):
    losses = []
    for layer in (-1, -2, 0):
        model, prompts, layout = built(root, layer=layer)
        with torch.no_grad():
            losses.append(model(batch_of(root, prompts, layout, *ROWS))[0].item())
    assert len(set(losses)) == 3


@pytest.mark.parametrize("layer", [3, -4, 12])
def test_a_layer_that_the_tower_does_not_have_is_one_line(root, layer):
    with pytest.raises(ValueError, match=rf"layer {layer}: the tower has 2 blocks; choose one of -3 to 2"):
        built(root, layer=layer)


def test_a_tower_with_a_token_too_many_is_one_line():
    """Such as one that keeps its class token: the image's places in the conversation would be too few."""

    def tower(images, output_hidden_states):
        return SimpleNamespace(hidden_states=(torch.zeros(1, 17, 8), torch.zeros(1, 16, 8)))

    check_tower(tower, settings())
    with pytest.raises(ValueError, match=r"the tower gives 17 tokens for an image of 64 px, and 16 stand in its conversation; choose another --layer"):
        check_tower(tower, settings(layer=0))


def test_a_word_embedding_with_room_stays_as_it_is_and_one_without_gets_a_row_of_zeros(root):
    model, tokenizer = open_language(language_folder(root))
    model.resize_token_embeddings(64)
    model.save_pretrained(root / "spare")
    tokenizer.save_pretrained(root / "spare")
    roomy, prompts, _ = built(root, language=str(root / "spare"))
    assert roomy.network.get_input_embeddings().weight.shape[0] == 64 > prompts.image_id
    tight, prompts, _ = built(root)
    weight = tight.network.get_input_embeddings().weight
    assert weight.shape[0] == prompts.image_id + 1 and not weight[-1].any() and not tight.network.lm_head.weight[-1].any()


@pytest.mark.parametrize("anyres", [False, True])
def test_in_bf16_the_language_model_takes_half_the_memory_and_the_loss_is_near(root, anyres):
    exact, prompts, layout = built(root, anyres=anyres, train_language="lora")
    half, _, _ = built(root, torch.bfloat16, anyres=anyres, train_language="lora")
    assert half.network.get_input_embeddings().weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in trained_tensors(half.network).values())
    batch = batch_of(root, prompts, layout, *ROWS)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = half(batch)
    loss.backward()
    assert loss.item() == pytest.approx(exact(batch)[0].item(), rel=0.03)
    assert all(torch.isfinite(p.grad).all() for p in trained_tensors(half.network).values())


@pytest.mark.parametrize("anyres", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_network_is_saved_and_opened_by_transformers_alone(root, tmp_path, anyres, tied):
    import transformers

    model, prompts, layout = built(root, language=language_folder(root, f"tied {tied}", tie_word_embeddings=tied), anyres=anyres)
    model.network.save_pretrained(tmp_path / "whole")
    named = getattr(transformers, type(model.network).__name__)
    again, report = named.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(report.values())
    batch = batch_of(root, prompts, layout, ROWS[0])
    seen = {name: batch[name] for name in ("input_ids", "pixel_values", *(("image_sizes",) if anyres else ()))}
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**seen).logits, model.network(**seen).logits, rtol=1e-4, atol=1e-5)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
