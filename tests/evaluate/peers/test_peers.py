"""Every peer against its own library called by hand, on tiny random weights of the true architecture; none of it on real weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_peers as tiny
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from openvision3.data.images import to_uint8
from openvision3.evaluate.metrics.reconstruction import evaluate_reconstruction
from openvision3.evaluate.metrics.zeroshot import evaluate_retrieval
from openvision3.evaluate.peers import loading as foreign
from openvision3.evaluate.peers import table as peers
from openvision3.evaluate.peers.loading import Pixels, WordPieceIds, pixels_of, resize, weights_sha256
from openvision3.evaluate.peers.published import ONLY, PUBLISHED, rows
from openvision3.evaluate.peers.table import PEERS, load_peer
from openvision3.evaluate.protocol import Functions, values
from openvision3.networks.open_clip import OpenClipViT

VAES = ("flux-vae", "sd-vae", "sd3-vae", "taesd", "taef1")
FUNCTIONS = ("reconstruct", "reconstruct_noisy", "embed_images", "embed_texts", "caption", "features")
BUILDERS = {
    **{name: (lambda folder, name=name: tiny.save_vae(folder, name)) for name in VAES},
    "rae-dinov2": lambda folder: tiny.save_rae(folder, "dinov2"),
    "rae-mae": lambda folder: tiny.save_rae(folder, "mae"),
    "clip-b16": tiny.save_clip,
    "clip-l14": lambda folder: tiny.save_clip(folder, 14),
    "siglip-b16": tiny.save_siglip,
    "openvision1-b16": tiny.save_openvision1,
    "openvision2-l14": tiny.save_openvision2,
    "openvision3-b2-256": tiny.save_openvision3,
    "unitok": tiny.save_unitok,
    "vila-u": tiny.save_vila,
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """name -> (folder, the network in it); each built once."""
    kept: dict[str, tuple[Path, object]] = {}

    def build(name: str):
        if name not in kept:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(5)
            kept[name] = folder, BUILDERS[name](folder)
        return kept[name]

    return build


@pytest.fixture
def copied(built, tmp_path):
    """A peer's folder, to be spoilt."""
    return lambda name: Path(shutil.copytree(built(name)[0], tmp_path / name))


def make_images(rows: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    coarse = torch.rand(rows, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, (height, width), mode="bilinear")


def close(result: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(result, expected.detach(), rtol=tolerance * 10, atol=tolerance)


# -- each against its library ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VAES)
def test_a_vae_reconstructs_as_diffusers_does_from_the_posterior_mean(built, name):
    folder, network = built(name)
    peer, images = load_peer(name, str(folder)), make_images()
    with torch.no_grad():
        latents = network.encode(images).latents if name.startswith("tae") else network.encode(images).latent_dist.mean
        expected = network.decode(latents).sample.clamp(-1, 1)
    close(peer.reconstruct(images), expected, 1e-4)
    scale, shift = network.config.scaling_factor, (network.config.get("shift_factor") or 0.0) if name.startswith("tae") else 0.0
    pooled = F.adaptive_avg_pool2d((latents - shift) * scale, 4).flatten(1)
    close(peer.features(images), pooled, 1e-4)
    assert pooled.shape == (3, 16 * network.config.latent_channels)
    assert torch.equal(peer.reconstruct(images), peer.reconstruct(images))


@pytest.mark.parametrize("name", ["rae-dinov2", "rae-mae"])
def test_rae_reconstructs_as_diffusers_does_without_noise(built, name):
    folder, network = built(name)
    peer, images = load_peer(name, str(folder)), make_images()
    with torch.no_grad():
        latents = network.encode((images + 1) / 2).latent
        expected = network.decode(latents).sample * 2 - 1
    assert peer.size == 32 and expected.shape == images.shape and expected.abs().max() > 0.5
    close(peer.reconstruct(images), expected.clamp(-1, 1))
    close(peer.features(images), latents.mean((2, 3)))


def test_rae_siglip2_loads_or_says_in_one_line_which_versions_do_not_fit(tmp_path):
    try:
        network = tiny.save_rae(tmp_path, "siglip2")
    except AttributeError:
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderRAE", "encoder_type": "siglip2", "encoder_patch_size": 16}))
        (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"never read")
        with pytest.raises(ValueError) as caught:
            load_peer("rae-siglip2", str(tmp_path))
        assert_one_line(caught)
        for library in ("diffusers", "transformers"):
            assert f"{library} {importlib.metadata.version(library)}" in str(caught.value)
    else:
        images = make_images()
        with torch.no_grad():
            close(load_peer("rae-siglip2", str(tmp_path)).reconstruct(images), (network((images + 1) / 2).sample * 2 - 1).clamp(-1, 1))


def test_clip_embeds_as_transformers_does(built):
    folder, model = built("clip-b16")
    peer, images, texts = load_peer("clip-b16", str(folder)), make_images(), ["ab cd", "A", "d c b a d c b a d c b a"]
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((images + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    words = tiny.clip_tokenizer()(texts, padding="max_length", truncation=True, max_length=8, return_tensors="pt")
    with torch.no_grad():
        output = model(input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=pixels)
        pooled = model.vision_model(pixels).pooler_output
    close(peer.embed_images(images), output.image_embeds)
    close(peer.embed_texts(texts), output.text_embeds)
    close(peer.features(images), pooled)
    assert peer.size == 32 and (output.text_embeds[0] - output.text_embeds[1]).abs().max() > 0.01


def test_clip_as_openai_published_it_ends_a_text_at_its_largest_id(copied):
    """Their config.json says eos_token_id 2, which is no special token at all; transformers then looks for the largest id."""
    folder = copied("clip-b16")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"eos_token_id": 2, "bos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    texts = ["ab cd", "a c", "b"]
    words = tiny.clip_tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        model = tiny.CLIPModel.from_pretrained(folder).eval()
        expected = model.text_projection(model.text_model(**words).pooler_output)
    close(load_peer("clip-b16", str(folder)).embed_texts(texts), F.normalize(expected, dim=1))


def test_siglip_embeds_as_transformers_does(built):
    folder, model = built("siglip-b16")
    peer, images = load_peer("siglip-b16", str(folder)), make_images()
    ids = torch.tensor([[2, 4, 1, 1, 1, 1, 1, 1], [3, 0, 1, 1, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2, 2, 1]])
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=images)  # mean and std of a half: images as they are
    close(peer.embed_images(images), output.image_embeds)
    close(peer.embed_texts(["Red heart", "blue house", "red " * 20]), output.text_embeds)


def test_openvision_1_is_open_clips_towers_on_our_blocks(built):
    folder, model = built("openvision1-b16")
    peer, images = load_peer("openvision1-b16", str(folder)), make_images()
    pixels = ((images + 1) / 2 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    red, hearts, blue, mark = 104, [105, 106], 107, 108
    ids = [[1, red, *hearts, 2, 0, 0, 0, 0, 0, 0, 101], [1, blue, mark, 2, 0, 0, 0, 0, 0, 0, 0, 101], [1, *[red] * 9, 2, 101]]
    with torch.no_grad():
        pooled, tokens = model.visual(pixels)
        words = model.encode_text(torch.tensor(ids))
    close(peer.embed_images(images), F.normalize(pooled, dim=1))
    close(peer.features(images), tokens.mean(1))
    close(peer.embed_texts(["Red  hearts", "blue &amp;amp;", "red " * 20]), F.normalize(words, dim=1))


def test_openvision_1_squashes_bilinearly_as_its_config_asks(built):
    peer, images = load_peer("openvision1-b16", str(built("openvision1-b16")[0])), make_images(2, 48, 80)
    squashed = F.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    close(peer.features(images), peer.features(squashed))


def test_openvision_2_has_no_text_tower_and_imagenets_mean(built):
    folder, model = built("openvision2-l14")
    peer, images = load_peer("openvision2-l14", str(folder)), make_images(height=28, width=28)
    pixels = ((images + 1) / 2 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        close(peer.features(images), model(pixels)[1].mean(1))
    assert peer.embed_images is None and peer.embed_texts is None


def test_the_released_encoder_of_openvision_3_has_the_documented_keys():
    block = {"ln_1.weight": (768,), "ln_1.bias": (768,), "ln_2.weight": (768,), "ln_2.bias": (768,), "attn.in_proj_weight": (2304, 768),
             "attn.in_proj_bias": (2304,), "attn.out_proj.weight": (768, 768), "attn.out_proj.bias": (768,), "mlp.c_fc.weight": (3072, 768),
             "mlp.c_fc.bias": (3072,), "mlp.c_proj.weight": (768, 3072), "mlp.c_proj.bias": (768,)}  # fmt: skip
    shapes = {"class_embedding": (768,), "positional_embedding": (257, 768), "proj": (768, 768), "conv1.weight": (768, 16, 2, 2),
              "ln_post.weight": (768,), "ln_post.bias": (768,)}  # fmt: skip
    shapes |= {f"transformer.resblocks.{i}.{key}": shape for i in range(12) for key, shape in block.items()}
    assert len(shapes) == 150
    cfg = {**tiny.VISION_CFG, "patch_size": 2, "in_channels": 16, "width": 768, "layers": 12, "head_width": 64, "output_tokens": True}
    with torch.device("meta"):
        OpenClipViT({"embed_dim": 768, "vision_cfg": cfg}).load_open_clip({key: torch.empty(shape) for key, shape in shapes.items()})


def test_openvision_3_reads_latents_that_are_the_mean_times_the_scale(built):
    folder, (model, vae) = built("openvision3-b2-256")
    peer, images = load_peer("openvision3-b2-256", str(folder)), make_images(2, 256, 256)
    with torch.no_grad():
        close(peer.features(images), model(vae.encode(images).latent_dist.mean * 0.3611)[1].mean(1), 1e-4)
    assert peer.size == 256 and "VAE sha256" in peer.note
    close(peer.features(images[..., ::2, ::2]), peer.features(resize(images[..., ::2, ::2], 256, 256)))


def test_a_checkout_is_called_by_its_authors_signature_and_leaves_no_module_behind(built):
    images, before = make_images(2, 256, 256), {name: sys.modules.get(name) for name in ("models", "utils", "vila_u")}
    path = list(sys.path)
    folder, mix = built("unitok")
    peer = load_peer("unitok", str(folder))
    with torch.no_grad():
        close(peer.reconstruct(images), ((mix(images) * 16).round() / 16).clamp(-1, 1))
        close(peer.features(images), mix(images).mean((2, 3)))
    assert "random weights only" in peer.note and peer.dtype == "fp32"
    folder, mix = built("vila-u")
    peer = load_peer("vila-u", str(folder))
    mix = mix.bfloat16()
    with torch.no_grad():
        z = F.avg_pool2d(mix(images.bfloat16()), 16)
        close(peer.reconstruct(images), mix(F.interpolate(z.float(), scale_factor=16).bfloat16()).float().clamp(-1, 1), 0)
    close(peer.features(images), z.float().mean((2, 3)))
    assert "random weights only" in peer.note and peer.dtype == "bf16"
    assert {name: sys.modules.get(name) for name in before} == before and sys.path == path


def test_a_checkout_does_not_take_the_place_of_modules_of_the_same_name(built, monkeypatch):
    mine = type(sys)("models")
    monkeypatch.setitem(sys.modules, "models", mine)
    load_peer("unitok", str(built("unitok")[0]))
    assert sys.modules["models"] is mine and "models.unitok" not in sys.modules


# -- what holds for all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_a_peer_is_what_its_row_says_and_does_not_see_its_neighbours(built, name):
    peer = load_peer(name, str(built(name)[0]))
    assert {each for each in FUNCTIONS if getattr(peer, each)} == set(PEERS[name].can)
    assert (peer.name, peer.licence) == (name, PEERS[name].licence) and len(peer.sha256) == 64
    assert peer.fixed == (name not in VAES)
    for size in (peer.size, 48):
        images = make_images(3, size, size)
        if peer.reconstruct and peer.fixed and size != peer.size:
            with pytest.raises(ValueError, match=f"images of {peer.size}x{peer.size} only, not of 48x48; measure at --size {peer.size}"):
                peer.reconstruct(images)
        elif peer.reconstruct:
            whole = peer.reconstruct(images)
            assert whole.shape == images.shape and whole.abs().max() <= 1 and whole.dtype == torch.float32
            close(peer.reconstruct(images[1:2]), whole[1:2], 1e-4)
        if peer.embed_images:
            whole = peer.embed_images(images)
            close(whole.norm(dim=1), torch.ones(3))
            close(peer.embed_images(images[1:2]), whole[1:2])
            assert whole.shape == peer.embed_texts(["a", "b", "c"]).shape
        whole = peer.features(images)
        assert whole.ndim == 2 and whole.std(0).max() > 1e-4
        close(peer.features(images[1:2]), whole[1:2], 1e-4)
        assert not whole.requires_grad and not whole.is_inference()  # a linear probe trains on them
    if peer.embed_texts:
        texts = ["red heart", "ab cd", "b"]
        close(peer.embed_texts(texts).norm(dim=1), torch.ones(3))
        close(peer.embed_texts(texts[1:2]), peer.embed_texts(texts)[1:2])


def test_texts_are_a_list_of_one_or_more(built):
    peer = load_peer("clip-b16", str(built("clip-b16")[0]))
    for wrong in ([], "a text"):
        with pytest.raises(ValueError, match="pass a list of texts"):
            peer.embed_texts(wrong)


@pytest.mark.parametrize("name", ["flux-vae", "taesd"])
@pytest.mark.parametrize("sides", [(30, 45), (7, 16), (64, 48)])
def test_a_vae_takes_any_size_and_gives_it_back(built, name, sides):
    peer, images = load_peer(name, str(built(name)[0])), make_images(2, *sides)
    assert peer.reconstruct(images).shape == images.shape and peer.features(images).shape == (2, 16 * (16 if name == "flux-vae" else 4))


@pytest.mark.parametrize("name", ["flux-vae", "clip-b16", "rae-dinov2", "openvision1-b16"])
def test_bf16_is_near_fp32_and_named_in_the_row(built, name):
    folder = str(built(name)[0])
    exact, rough = load_peer(name, folder), load_peer(name, folder, precision="bf16")
    assert (exact.dtype, rough.dtype) == ("fp32", "bf16")
    a, b = exact.features(make_images()), rough.features(make_images())
    assert 0 < (a - b).norm() / a.norm() < 0.1 and b.dtype == torch.float32


def test_the_evaluators_measure_a_peer_as_they_measure_anything(built):
    vae, clip = (load_peer(name, str(built(name)[0])) for name in ("taesd", "clip-b16"))
    images, texts = make_images(), ["ab cd", "a", "c d"]
    rows = [(range(len(images)), list(map(str, range(len(images)))), images)]
    assert 0 < values(evaluate_reconstruction(rows, vae.reconstruct).numbers)["psnr"] < 60
    result = values(evaluate_retrieval(clip.embed_images(images), clip.embed_texts(texts), texts, range(len(texts))))
    assert 0 <= result["image_to_text_r@1"] <= 1


# -- pixels ---------------------------------------------------------------------------------------------------------


def test_mid_grey_is_mid_grey_and_the_ends_are_the_ends():
    for mean, std in ((0.5, 0.5), (0.4, 0.2)):
        pixels = Pixels(8, [mean] * 3, [std] * 3)
        for value, unit in ((0.0, 0.5), (-1.0, 0.0), (1.0, 1.0)):
            for size in (8, 20):
                result = pixels(torch.full((1, 3, size, size), value))
                close(result, torch.full((1, 3, 8, 8), (unit - mean) / std))


@pytest.mark.parametrize("name", ["clip-b16", "siglip-b16"])
@pytest.mark.parametrize("sides", [(32, 32), (50, 40), (100, 131)])
def test_pixels_are_those_of_transformers_own_processor_up_to_its_rounding(built, name, sides):
    processor = (tiny.CLIPImageProcessorPil if name == "clip-b16" else tiny.SiglipImageProcessorPil).from_pretrained(built(name)[0])
    # Smooth: where a bicubic overshoots 0 or 255, Pillow cuts it after each direction, we once.
    picture = to_uint8(make_images(1, *sides) * 0.8)[0].permute(1, 2, 0).numpy()
    expected = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    result = pixels_of(json.loads((built(name)[0] / "preprocessor_config.json").read_text()))(torch.tensor(picture).permute(2, 0, 1)[None] / 127.5 - 1)
    grey_level = 1 / 255 / min(processor.image_std)
    assert result.shape == expected.shape and (result - expected).abs().max() < 1.1 * grey_level


def test_an_old_preprocessor_config_is_read_and_an_odd_one_refused():
    marks = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    assert pixels_of({"size": 224, "crop_size": 224, "do_center_crop": True, **marks}) == Pixels(224, (0.5,) * 3, (0.5,) * 3, True)
    assert pixels_of({"size": {"height": 384, "width": 384}, **marks, "resample": 2}) == Pixels(384, (0.5,) * 3, (0.5,) * 3, False, "bilinear")
    for odd in ({"size": {"height": 224, "width": 448}}, {"size": 256, "crop_size": 224, "do_center_crop": True}, {"size": 224, "resample": 0}, {}):
        with pytest.raises(ValueError, match="not supported") as caught:
            pixels_of({**marks, **odd})
        assert_one_line(caught)


def test_word_piece_ids_end_in_the_class_token_and_keep_the_end(built):
    ids = WordPieceIds(built("openvision1-b16")[0] / "vocab.txt", 6)
    assert ids(["", "red red red red red"]).tolist() == [[1, 2, 0, 0, 0, 101], [1, 104, 104, 104, 2, 101]]


# -- files ----------------------------------------------------------------------------------------------------------


def assert_one_line(caught: pytest.ExceptionInfo) -> None:
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 520, str(caught.value)


def test_unknown_names_and_precisions_are_refused(tmp_path):
    for name, message in (("flux", "unknown peer 'flux'"), ("rae-clip", "rae-clip.* published numbers only"), ("omnitokenizer", "published numbers only")):
        with pytest.raises(ValueError, match=f"{message}.*flux-vae.*vila-u"):
            load_peer(name, str(tmp_path))
    with pytest.raises(ValueError, match=r"fp16.*Choose one of fp32, bf16"):
        load_peer("flux-vae", str(tmp_path), precision="fp16")


@pytest.mark.parametrize("name", PEERS)
def test_what_is_not_here_is_named_with_its_place_and_licence(tmp_path, name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for folder in ("", str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(FileNotFoundError) as caught:
            load_peer(name, folder)
        for words in (PEERS[name].hub, PEERS[name].licence, f"openvision3 fetch {name}", PEERS[name].files[0].name):
            assert words in str(caught.value)
        assert_one_line(caught)


@pytest.mark.parametrize("name", ["flux-vae", "rae-dinov2", "clip-b16", "siglip-b16", "openvision1-b16", "openvision3-b2-256", "unitok", "vila-u"])
def test_each_file_that_is_missing_or_damaged_is_reported_in_one_line(copied, name):
    folder = copied(name)
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "tokenizer_config.json" and p.suffix not in (".pyc",)):
        content = path.read_bytes()
        for spoilt in (None, b"", b"{}" if path.suffix == ".json" else b"not what it was", content[: len(content) // 2]):
            path.write_bytes(spoilt) if spoilt is not None else path.unlink()
            if path.name in ("__init__.py", "vocab.txt", "parts.py", "config.py", "unitok.py") and spoilt:
                continue  # as good a file as any
            if path.name == "__init__.py" and path.parent.name in ("models", "vila_u"):
                continue  # an empty one, a name space, or never read
            with pytest.raises((ValueError, FileNotFoundError)) as caught:
                load_peer(name, str(folder))
            assert_one_line(caught)
        path.write_bytes(content)
    load_peer(name, str(folder))


MISTAKEN = {
    "flux-vae": ("sd-vae", "sd3-vae"),
    "sd3-vae": ("flux-vae",),
    "sd-vae": ("taesd",),
    "taesd": ("taef1",),
    "rae-mae": ("rae-dinov2",),
    "clip-b16": ("siglip-b16", "clip-l14"),
    "siglip-b16": ("clip-b16",),
    "openvision2-l14": ("openvision1-b16",),
    "openvision3-b2-224": ("openvision3-b2-256",),
    "openvision1-b16": ("openvision3-b2-256",),
}


@pytest.mark.parametrize("name", MISTAKEN)
def test_another_models_files_are_refused(built, name):
    for given in MISTAKEN[name]:
        with pytest.raises(ValueError, match=f"holds no {name}") as caught:
            load_peer(name, str(built(given)[0]))
        assert_one_line(caught)


def test_an_open_clip_config_of_another_kind_of_network_is_refused(copied):
    folder = copied("openvision1-b16")
    path = folder / "open_clip_config.json"
    good = json.loads(path.read_text())
    for part, change in (("vision_cfg", {"pool_type": "tok"}), ("vision_cfg", {"no_ln_pre": False}), ("vision_cfg", {"norm_kwargs": {"eps": 1e-5}}),
                         ("vision_cfg", {"attentional_pool": True}), ("text_cfg", {"no_causal_mask": False}), ("vision_cfg", {"layers": 3}),
                         ("text_cfg", {"vocab_size": 119})):  # fmt: skip
        config = json.loads(json.dumps(good))
        config["model_cfg"][part] |= change
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"OpenVision encoder, which has|do not fit") as caught:
            load_peer("openvision1-b16", str(folder))
        assert_one_line(caught)


def test_weights_that_lack_a_tensor_or_have_one_of_another_shape_are_refused(copied):
    from safetensors.torch import load_file, save_file

    lost = {"clip-b16": "visual_projection.weight", "rae-mae": "decoder.decoder_pred.bias"}
    for name, key in lost.items():
        file = "model.safetensors" if name == "clip-b16" else "diffusion_pytorch_model.safetensors"
        folder = copied(name)
        state = load_file(folder / file)
        for misfit in ({}, {key: torch.zeros(3, 1)}):
            save_file({other: value for other, value in state.items() if other != key} | misfit, folder / file, metadata={"format": "pt"})
            with pytest.raises(ValueError, match=f"do not fit.*{key}" if name == "clip-b16" or not misfit else key) as caught:
                load_peer(name, str(folder))
            assert_one_line(caught)


def test_the_hash_is_of_the_file_and_of_several_shards_of_their_hashes(built, tmp_path):
    folder, model = built("clip-b16")
    one = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert load_peer("clip-b16", str(folder)).sha256 == one
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("model.safetensors"))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 1
    peer = load_peer("clip-b16", str(tmp_path))
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert peer.sha256 == hashlib.sha256("".join(hashes).encode()).hexdigest() == weights_sha256(reversed(files))
    close(peer.embed_images(make_images()), load_peer("clip-b16", str(folder)).embed_images(make_images()), 1e-6)
    files[0].unlink()
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        load_peer("clip-b16", str(tmp_path))
    assert_one_line(caught)


def test_weights_in_torchs_own_format_are_read_without_unpickling_code(built, tmp_path):
    folder, model = built("clip-b16")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("model.safetensors"))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    close(load_peer("clip-b16", str(tmp_path)).embed_images(make_images()), load_peer("clip-b16", str(folder)).embed_images(make_images()), 1e-6)
    torch.save({"anything": Functions}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError) as caught:
        load_peer("clip-b16", str(tmp_path))
    assert_one_line(caught)


def test_the_local_hub_cache_is_found_without_a_network(built, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--madebyollin--taesd"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(built("taesd")[0], place / "snapshots" / ("0" * 40))
    assert load_peer("taesd").sha256 == load_peer("taesd", str(built("taesd")[0])).sha256


def test_a_vae_is_found_in_the_sub_folder_that_flux_and_sd3_keep_it_in(tmp_path):
    tiny.save_vae(tmp_path / "vae", "flux-vae")
    assert load_peer("flux-vae", str(tmp_path)).reconstruct(make_images()).shape == (3, 3, 32, 32)


def test_a_missing_library_says_what_to_install(built, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="transformers is not installed; pip install"):
        load_peer("clip-b16", str(built("clip-b16")[0]))


def test_a_checkout_that_lacks_a_package_says_which(copied):
    folder = copied("unitok")
    (folder / "models" / "unitok.py").write_text("import a_package_that_nobody_has\n")
    with pytest.raises(ValueError, match=r"cannot be imported.*a_package_that_nobody_has"):
        load_peer("unitok", str(folder))
    with pytest.raises(ValueError, match="bf16"):
        load_peer("unitok", str(folder), precision="bf16")


def test_torchvision_is_imported_nowhere_and_libraries_only_when_a_peer_is_loaded():
    code = (
        "import sys, openvision3.evaluate.peers.table, openvision3.evaluate.peers.published\n"
        "assert not {'torchvision', 'timm', 'open_clip', 'transformers', 'diffusers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for module in (peers, foreign):
        assert "torchvision" not in Path(module.__file__).read_text()


# -- the table and the published numbers ----------------------------------------------------------------------------


def test_every_peer_has_a_loader_and_what_has_published_numbers_only_is_on_the_page():
    for name, peer in PEERS.items():
        assert peer.model.loader in peers.LOADERS and set(peer.can) <= set(FUNCTIONS) and peer.model.size >= 128 and peer.hub.count("/") == 1, name
    page = (Path(__file__).parents[3] / "docs" / "peers.md").read_text()
    assert all(f"`{name}`" in page for name in ONLY)


def test_published_numbers_name_their_version_and_are_the_papers():
    def value(model: str, metric: str, protocol: str, version: str = "") -> float:
        [result] = [each for each in rows(model) if each.metric == metric and protocol in each.protocol and version in each.version]
        return result.value

    assert value("flux-vae", "rFID", "ImageNet") == 0.176 and value("flux-vae", "rFID", "COCO") == 1.343
    assert value("openvision3-b2-256", "rFID", "COCO", "v2") == 1.601
    assert value("openvision3-b2-256 + RAE", "gFID", "ImageNet", "v1") == 1.89
    assert value("clip-b16", "POPE", "LLaVA-1.5") == 82.9 and value("clip-b16", "POPE", "LLaVA-NeXT") == 84.7
    for each in PUBLISHED:
        assert each.version in ("v1", "v2", "v1 or v2") and "not measured here" in each.heading and each.source.endswith("2601.15369")
    assert len(set(PUBLISHED)) == len(PUBLISHED) and rows("nobody") == []
    for model in {each.model for each in PUBLISHED}:
        assert model in PEERS or model in ONLY or " + " in model, model
