"""The vision tower in transformers: the numbers of our own model, the traps of LLaVA's code, and tiny LLaVA models around it."""

import numpy as np
import pytest
import torch
from shapes import kl_network, tiny_network
from tiny_pipeline import make_pipeline, photo, pipeline, without_vae
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from openvision3.adapters.transformers import image_processor, register, vision_model
from openvision3.adapters.transformers_config import OpenVision3VisionConfig
from openvision3.adapters.transformers_model import OpenVision3VisionModel
from openvision3.data.crops import center_square
from openvision3.data.images import to_tensor
from openvision3.hub import load_vae
from openvision3.model.vae import VAE

register()
IMAGE = 90
"""id of the image token in the tiny language model"""


def pixels(height: int = 64, width: int = 64, rows: int = 1) -> torch.Tensor:
    return torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def vaes() -> dict[str, VAE]:
    kl = kl_network(latent_channels=4, use_quant_conv=True, use_post_quant_conv=True)
    return {"embedded": load_vae("embedded"), "kl": VAE(kl, name="kl"), "shifted": VAE(kl, name="kl", shift=True), "tiny": VAE(tiny_network(), name="tiny")}


@pytest.mark.parametrize("name", ["embedded", "kl", "shifted", "tiny", "none"])
@torch.no_grad()
def test_the_tower_has_the_tokens_and_the_pooling_of_the_model_with_any_vae_before_and_after_saving(name, tmp_path):
    ours = without_vae() if name == "none" else make_pipeline(vaes()[name])
    tower = vision_model(ours)
    tower.save_pretrained(tmp_path)
    images = pixels(48, 80, 2)
    tokens, pooled = ours.encoder(ours.vae.encode(images))
    for model in (tower, AutoModel.from_pretrained(tmp_path)):
        output = model(images)
        assert not model.training
        assert torch.allclose(output.last_hidden_state, tokens, atol=1e-5) and torch.allclose(output.pooler_output, pooled, atol=1e-5)
        assert output.hidden_states is None


def test_a_saved_tower_has_the_same_weights_bit_for_bit_and_no_decoder(tmp_path):
    tower = vision_model(pipeline())
    tower.save_pretrained(tmp_path)
    again = OpenVision3VisionModel.from_pretrained(tmp_path)
    before, after = tower.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any("decoder" in name or "post_quant" in name for name in before)
    assert again.config.vae_origin["sha256"] == pipeline().vae.sha256 and again.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()


def test_the_tower_shares_its_weights_with_the_model_and_the_vae_stays_frozen():
    ours = make_pipeline()
    tower = vision_model(ours)
    with torch.no_grad():
        tower.encoder.class_token.add_(1)
    assert torch.equal(tower.encoder.class_token, ours.encoder.class_token)
    assert not any(p.requires_grad for p in tower.vae.parameters()) and all(p.requires_grad for p in tower.encoder.parameters())
    tower.to(torch.bfloat16)
    assert ours.encoder.class_token.dtype == torch.float32  # moved or rounded, it is another tensor


@pytest.mark.parametrize("sum_blocks", [1, 2])
@torch.no_grad()
def test_hidden_states_are_the_embeddings_then_the_blocks_and_last_the_tokens(sum_blocks):
    ours = make_pipeline()
    ours.encoder.config.sum_blocks = sum_blocks
    tower, outputs = vision_model(ours), []
    hooks = [block.register_forward_hook(lambda _, inputs, output: outputs.append((inputs[0], output))) for block in tower.encoder.blocks]
    output = tower(pixels(), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    ours.encoder.config.sum_blocks = 1
    assert len(output.hidden_states) == 1 + len(tower.encoder.blocks) == 1 + tower.config.num_hidden_layers
    assert torch.equal(output.hidden_states[0], outputs[0][0][:, 1:])
    assert all(torch.equal(state, block[:, 1:]) for state, (_, block) in zip(output.hidden_states[1:-1], outputs[:-1], strict=True))
    expected = sum(block for _, block in outputs[-sum_blocks:])[:, 1:]
    assert torch.allclose(output.hidden_states[-1], torch.nn.functional.layer_norm(expected, expected.shape[-1:], eps=1e-6), atol=1e-5)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@torch.no_grad()
def test_a_layer_index_asks_for_hidden_states_even_if_it_is_zero_and_the_output_can_be_changed():
    tower = vision_model(pipeline())
    for index in (0, -1, [0, 1]):
        assert tower(pixels(), output_hidden_states=index).hidden_states is not None
    assert tower(pixels(), output_hidden_states=False).hidden_states is None
    output = tower(pixels(), some_option_of_later_versions=1)
    output.pooler_output = [1]
    assert output["pooler_output"] == [1]
    assert [part.shape for part in tower(pixels(), return_dict=False)] == [(1, 16, 64), (1, 64)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_loaded_in_half_precision_the_vae_stays_fp32_and_the_tokens_stay_close(dtype, tmp_path):
    tower = vision_model(pipeline())
    tower.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert half.dtype == dtype and all(p.dtype == torch.float32 for p in half.vae.parameters())
    exact, output = tower(pixels()), half(pixels().to(dtype), output_hidden_states=True)
    assert {state.dtype for state in (*output.hidden_states, output.pooler_output)} == {dtype}
    assert torch.nn.functional.cosine_similarity(exact.last_hidden_state, output.last_hidden_state.float(), dim=-1).min() > 0.99
    with pytest.raises(ValueError, match=r"bfloat16 or torch\.float32"):
        half.half()  # it would round the VAE, whose activations overflow fp16


def test_fresh_weights_are_drawn_as_for_training():
    torch.manual_seed(0)
    tower = AutoModel.from_config(vision_model(pipeline()).config)
    weights = tower.encoder.blocks[0].attention.qkv.weight.chunk(3)
    assert all(float(part.detach().abs().max()) == pytest.approx((6 / 128) ** 0.5, rel=0.01) for part in weights)  # Xavier for q, k and v apart
    assert float(tower.encoder.class_token.detach().std()) == pytest.approx(0.02, rel=0.5)
    assert all(torch.isfinite(p).all() for p in tower.parameters())


def test_settings_that_contradict_the_encoder_are_refused():
    config = vision_model(pipeline()).config
    assert (config.patch_size, config.hidden_size, config.image_size) == (16, 64, 64)
    for wrong, message in (
        ({"hidden_size": 65}, "hidden_size"),
        ({"encoder_settings": {"sise": "B"}}, "encoder_settings.size"),
        ({"encoder_settings": {"size": "Z"}}, "Choose one of"),
    ):
        with pytest.raises(ValueError, match=message):
            OpenVision3VisionConfig(**{**config.to_dict(), **wrong})
    with pytest.raises(ValueError, match="choose one of AutoencoderKL"):
        OpenVision3VisionModel(OpenVision3VisionConfig(encoder_settings={"size": "tiny"}, vae_settings={"_class_name": "VQModel"}))


# -- LLaVA -----------------------------------------------------------------------------------------------------------


def settings(layer: int | list[int] = -1) -> dict:
    text = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=100)
    tower = vision_model(pipeline())
    return {
        "vision_config": tower.config,
        "text_config": text,
        "image_token_index": IMAGE,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": "full",
        "image_seq_length": 16,
    }


def llava(layer: int | list[int] = -1) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(**settings(layer)))
    model.model.vision_tower = vision_model(pipeline())
    return model.eval()


def question(images: int = 1, tokens: int = 16) -> torch.Tensor:
    return torch.tensor([[1, 5, *[IMAGE] * (tokens * images), 7, 8]])


@pytest.mark.parametrize("layer", [-1, 0, [0, -1]])
def test_llava_sees_the_layer_that_it_names_and_the_loss_reaches_projector_and_tower(layer):
    model = llava(layer)
    ids = question()
    output = model(input_ids=ids, pixel_values=pixels(), labels=ids)
    states = model.model.vision_tower(pixels(), output_hidden_states=True).hidden_states
    chosen = states[layer] if isinstance(layer, int) else torch.cat([states[i] for i in layer], -1)
    features = model.model.multi_modal_projector(chosen)
    embeds = model.get_input_embeddings()(ids)
    embeds[:, 2:18] = features
    logits = model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)
    assert torch.allclose(output.logits, logits, atol=1e-5)
    output.loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    assert model.model.vision_tower.encoder.patchify.weight.grad.abs().sum() > 0
    pipeline().model.zero_grad()


@torch.no_grad()
def test_llava_writes_with_a_cache_what_it_writes_without_for_one_image_and_for_several():
    model = llava()
    for ids, images in ((question(), pixels()), (question(2), pixels(rows=2))):
        written = [model.generate(input_ids=ids, pixel_values=images, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
        assert torch.equal(*written)
        assert not torch.equal(model(ids, pixel_values=images).logits, model(ids, pixel_values=-images).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_saved_llava_loads_with_our_tower_whose_vae_stays_fp32(dtype, tmp_path):
    model = llava()
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert isinstance(again.model.vision_tower, OpenVision3VisionModel)
    assert {p.dtype for p in again.model.vision_tower.vae.parameters()} == {torch.float32} and again.lm_head.weight.dtype == dtype
    logits = again(question(), pixel_values=pixels().to(dtype)).logits.float()
    expected = model(question(), pixel_values=pixels()).logits
    assert torch.equal(logits, expected) if dtype == torch.float32 else torch.allclose(logits, expected, atol=0.02 * expected.abs().max())


@torch.no_grad()
def test_llava_next_reads_the_tiles_of_our_tower():
    torch.manual_seed(0)
    grids = [[64, 128], [128, 64]]
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(**settings(), image_grid_pinpoints=grids)).eval()
    model.model.vision_tower = vision_model(pipeline())
    half = [0.5] * 3
    square = {"height": 64, "width": 64}
    tiles = LlavaNextImageProcessorPil(size=square, crop_size=square, image_mean=half, image_std=half, image_grid_pinpoints=grids)(
        photo(100, 50), return_tensors="pt"
    )
    assert tiles["pixel_values"].shape == (1, 3, 3, 64, 64) and float(tiles["pixel_values"].abs().max()) <= 1.001
    features = model.model.get_image_features(tiles["pixel_values"], image_sizes=tiles["image_sizes"]).pooler_output
    ids = question(tokens=len(features[0]))
    assert torch.isfinite(model(ids, **tiles).logits).all()
    written = [model.generate(ids, **tiles, max_new_tokens=4, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*written)


# -- images ----------------------------------------------------------------------------------------------------------


def test_the_image_processor_crops_as_our_evaluations_and_keeps_as_load(tmp_path):
    image = photo(90, 50)
    cropped = image_processor(pipeline())(image, return_tensors="pt")["pixel_values"]
    assert torch.allclose(cropped[0], to_tensor(center_square(image, 64)), atol=1e-6)
    keeping = image_processor(pipeline(), "keep")
    keeping.save_pretrained(tmp_path)
    vision_model(pipeline()).save_pretrained(tmp_path)
    for processor in (keeping, AutoImageProcessor.from_pretrained(tmp_path)):
        assert torch.allclose(processor(image, return_tensors="pt")["pixel_values"], pipeline().prepare(image), atol=1e-6)
    wide = image_processor(pipeline())(image, fit="pad", return_tensors="pt")["pixel_values"][0]
    grey = torch.full((3, 64, 64), 127 / 127.5 - 1)
    grey[:, 14:50] = pipeline().scaled(image)[0]
    assert torch.allclose(wide, grey, atol=1e-6)


def test_the_image_processor_takes_arrays_tensors_grey_and_transparent_images():
    process, image = image_processor(pipeline()), photo(64, 64)
    expected = process(image, return_tensors="pt")["pixel_values"]
    array = torch.from_numpy(np.array(image))
    for other in (array.numpy(), array, array.permute(2, 0, 1), array.permute(2, 0, 1) / 255):
        assert torch.allclose(process([other], return_tensors="pt")["pixel_values"], expected, atol=1e-6)
    clear = image.convert("RGBA")
    clear.putalpha(0)
    assert float(process(clear, return_tensors="pt")["pixel_values"].min()) == 1  # white, as in training
    assert process(image.convert("L"), return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)


def test_the_image_processor_refuses_what_cannot_be_a_batch_of_tokens():
    images = [photo(90, 50), photo(50, 90)]
    for settings_, message in (({"fit": "keep"}, "different padded sizes"), ({"size": 40}, "multiple of 16"), ({"size": (64, 32)}, "no square")):
        with pytest.raises(ValueError, match=message):
            image_processor(pipeline())(images, return_tensors="pt", **settings_)
    with pytest.raises(ValueError, match="fit"):
        image_processor(pipeline())(images, fit="stretch")
    assert image_processor(pipeline())(images, fit="pad", size=32, return_tensors="pt")["pixel_values"].shape == (2, 3, 32, 32)
    assert [row.shape for row in image_processor(pipeline())(images, do_resize=False)["pixel_values"]] == [(3, 64, 96), (3, 96, 64)]
