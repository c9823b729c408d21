"""The space that images are drawn in, and the statistics of its tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_generator import small_generator, tokens_folder
from tiny_peers import save_rae
from tiny_pipeline import make_pipeline

from openvision3.evaluate.peers.table import load_peer
from openvision3.generate.dit import Condition
from openvision3.generate.flow import Sampling
from openvision3.generate.rae import RAE
from openvision3.generate.space import EPSILON, Moments, TokenStatistics, open_space


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 2, generator=torch.Generator().manual_seed(seed)) * torch.tensor([0.1, 5.0]) + torch.tensor([100.0, -3.0])


@settings(max_examples=25)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_moments_do_not_depend_on_how_tokens_are_cut_into_batches(sizes):
    rows = tokens(sum(sizes))
    moments = Moments(3, 2)
    for part in rows.split(sizes):
        moments.add(part)
    torch.testing.assert_close(moments.mean, rows.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.scatter / moments.count, rows.double().var(0, correction=0), rtol=1e-9, atol=1e-12)


def test_normalised_tokens_have_mean_zero_and_variance_one_in_each_channel_and_place_and_come_back():
    rows, moments, statistics = tokens(500), Moments(3, 2), TokenStatistics(3, 2)
    moments.add(rows)
    statistics.set(moments)
    normal = statistics.normalise(rows)
    assert normal.mean(0).abs().max() < 1e-3
    variance = rows.double().var(0, correction=0)
    torch.testing.assert_close(normal.double().var(0, correction=0), variance / (variance + EPSILON), rtol=1e-3, atol=0)
    torch.testing.assert_close(statistics.restore(normal), rows, rtol=1e-5, atol=1e-4)
    assert int(statistics.count) == 500


def test_without_statistics_tokens_stay_as_they_are():
    rows, statistics = tokens(4), TokenStatistics(3, 2)
    assert torch.equal(statistics.normalise(rows), rows) and torch.equal(statistics.restore(rows), rows)


@pytest.mark.parametrize("rows", [tokens(1), tokens(4).fill_(float("nan"))])
def test_statistics_of_one_image_or_of_tokens_that_are_not_finite_are_refused(rows):
    moments = Moments(3, 2)
    moments.add(rows)
    with pytest.raises(ValueError, match="cannot be used"):
        TokenStatistics(3, 2).set(moments)


def test_tokens_of_a_model_are_those_of_its_pipeline_and_decode_to_its_images(tmp_path):
    space, pipeline = open_space(tokens_folder(tmp_path)), make_pipeline()
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = space.encode(space.vae.encode(images))
    assert torch.equal(found, pipeline.encode(images))
    assert torch.equal(space.decode(found, (2, 3)).clamp(-1, 1), pipeline.decode(found, (32, 48)))
    assert (space.channels, space.stride, space.grid(32)) == (64, 16, (2, 2)) and not any(p.requires_grad for p in space.parameters())


def test_latents_alone_are_squares_that_decode_to_what_the_vae_decodes():
    space = open_space("vae:embedded")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = space.vae.encode(images)
    found = space.encode(latents)
    assert found.shape == (2, 4, 64) and space.channels == 64
    assert torch.equal(found[0, 1], latents[0, :, 0:2, 2:4].flatten())
    assert torch.equal(space.decode(found, (2, 2)), space.vae.decode(latents))


def test_words_are_the_normalised_features_whose_last_is_the_text_embedding(tmp_path):
    space, pipeline = open_space(tokens_folder(tmp_path)), make_pipeline()
    text_ids = pipeline.tokenizer.text_ids(["red heart", "a much longer grinning cat face"], 32)
    words, present = space.words(text_ids)
    assert torch.equal(present, text_ids != pipeline.tokenizer.pad_id)
    last = words[torch.arange(2), present.sum(1) - 1]
    torch.testing.assert_close(torch.nn.functional.normalize(last @ space.text_encoder.projection.weight.T, dim=-1), pipeline.model.embed_texts(text_ids))


def test_tokens_of_a_rae_of_others_are_its_latents_and_decode_to_what_it_rebuilds(tmp_path):
    network = save_rae(tmp_path / "rae", "mae")
    space, peer = open_space(f"peer:rae-mae={tmp_path / 'rae'}"), load_peer("rae-mae", str(tmp_path / "rae"))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = space.encode(space.vae.encode(images))
    assert seen.shape == (2, 4, 64) and space.channels == 64 and space.sha256 == peer.sha256
    with torch.no_grad():
        latents = network.encode(images / 2 + 0.5).latent
    assert torch.equal(seen[:, 3], latents[:, :, 1, 1]) and torch.equal(seen[:, 1], latents[:, :, 0, 1])
    assert peer.reconstruct is not None
    torch.testing.assert_close(space.decode(seen, space.grid(32)).clamp(-1, 1), peer.reconstruct(images), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"decodes images of 32 px only, not 64; set --size 32"):
        space.grid(64)


def test_a_generator_of_those_tokens_takes_a_step_and_draws(tmp_path):
    save_rae(tmp_path / "rae", "mae")
    config = small_generator(tmp_path, "unused", condition="none", tokens=f"peer:rae-mae={tmp_path / 'rae'}")
    rae = RAE(config, open_space(config.tokens))
    rae.dit.init_weights()
    loss, _ = rae({"images": torch.zeros(2, 3, 32, 32), "draw_key": torch.arange(2)})
    loss.backward()
    assert loss > 0 and rae.dit.leave.weight.grad is not None and all(p.grad is None for p in rae.space.parameters())
    tokens = rae.draw(torch.randn(2, 4, 64), Condition(), Sampling(steps=2))
    assert rae.space.decode(tokens, rae.grid).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("peer:flux-vae", "Choose one of rae-dinov2, rae-mae, rae-siglip2"),
        ("peer:rae-mae=/nowhere", "no such folder: /nowhere"),
        ("vae:nowhere", "no such VAE"),
        ("nowhere", "unknown model 'nowhere'"),
    ],
)
def test_a_space_that_is_not_there_is_one_line(name, words):
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        open_space(name)


def test_a_size_that_tokens_do_not_fill_is_refused():
    with pytest.raises(ValueError, match="multiple of 16"):
        open_space("vae:embedded").grid(40)
