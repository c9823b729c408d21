"""The tokenizer in diffusers: the numbers of our own model, their shapes and statistics, and a place in a pipeline."""

import pytest
import torch
from diffusers import AutoencoderRAE, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from shapes import kl_network
from tiny_pipeline import make_pipeline, pipeline, without_vae

from openvision3.adapters.diffusers import autoencoder
from openvision3.adapters.diffusers_model import AutoencoderOpenVision3
from openvision3.model.vae import VAE

MEAN, STD = torch.linspace(-1, 1, 64).tolist(), torch.linspace(0.5, 2, 64).tolist()


def pixels(height: int = 64, width: int = 48, rows: int = 2) -> torch.Tensor:
    return torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_latents_are_the_tokens_as_a_grid_and_decode_gives_the_images_of_the_model():
    ours, network = pipeline(), autoencoder(pipeline())
    tokens = ours.model.encode(pixels())
    latents = network.encode(pixels()).latent
    assert latents.shape == (2, 64, 4, 3) and torch.allclose(latents[:, :, 1, 2], tokens[:, 5], atol=1e-6)
    sample = network.decode(latents).sample
    assert sample.shape == pixels().shape and torch.allclose(sample, ours.model.decode(tokens, (4, 3)), atol=1e-5)
    assert torch.equal(network(pixels()).sample, sample)
    assert torch.equal(network.encode(pixels(), return_dict=False)[0], latents) and torch.equal(network.decode(latents, return_dict=False)[0], sample)


@torch.no_grad()
def test_statistics_normalise_as_in_diffusers_own_rae_and_decode_takes_them_back():
    plain, network = autoencoder(pipeline()), autoencoder(pipeline(), MEAN, STD)
    tokens = plain.encode(pixels()).latent
    reference = AutoencoderRAE(
        encoder_hidden_size=64,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        latents_mean=torch.tensor(MEAN)[:, None, None],
        latents_std=torch.tensor(STD)[:, None, None],
    )
    latents = network.encode(pixels()).latent
    assert torch.allclose(latents, reference._normalize_latents(tokens), atol=1e-5)
    assert torch.allclose(network.decode(latents).sample, plain.decode(tokens).sample, atol=1e-4)
    network.register_to_config(scaling_factor=0.5)
    assert torch.allclose(network.encode(pixels()).latent, latents / 2)
    assert torch.allclose(network.decode(latents / 2).sample, plain.decode(tokens).sample, atol=1e-4)


@pytest.mark.parametrize("vae", ["embedded", "kl", "none"])
@torch.no_grad()
def test_saved_and_loaded_again_weights_and_config_are_the_same(vae, tmp_path):
    kl = VAE(kl_network(use_quant_conv=True, use_post_quant_conv=True), name="kl", shift=True)
    ours = without_vae() if vae == "none" else make_pipeline(None if vae == "embedded" else kl)
    network = autoencoder(ours, MEAN, STD)
    network.save_pretrained(tmp_path)
    again = AutoencoderOpenVision3.from_pretrained(tmp_path)
    before, after = network.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (
        again.config.latents_mean == MEAN
        and again.config.encoder_settings == network.config.encoder_settings
        and again.config.vae_origin == network.config.vae_origin
    )
    assert torch.allclose(again(pixels()).sample, ours.model.decode(ours.model.encode(pixels()), (4, 3)), atol=1e-4)
    assert not any(p.requires_grad for p in again.vae.parameters())


@torch.no_grad()
def test_in_bf16_the_vae_stays_fp32_and_slices_change_nothing(tmp_path):
    network = autoencoder(pipeline(), MEAN, STD)
    network.save_pretrained(tmp_path)
    half = AutoencoderOpenVision3.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32} and half.dtype == torch.bfloat16
    latents = half.encode(pixels().bfloat16()).latent
    exact = network.encode(pixels()).latent
    assert latents.dtype == torch.bfloat16 and torch.nn.functional.cosine_similarity(latents.float(), exact, dim=1).min() > 0.99
    assert half.decode(latents).sample.dtype == torch.bfloat16
    network.enable_slicing()
    assert torch.allclose(network.encode(pixels()).latent, exact, atol=1e-5) and network.decode(exact).sample.shape == pixels().shape


class TokensToImages(DiffusionPipeline):
    """The smallest pipeline: noise, a step of the scheduler towards zero, the decoder."""

    def __init__(self, vae, scheduler):
        super().__init__()
        self.register_modules(vae=vae, scheduler=scheduler)

    def __call__(self, latents):
        self.scheduler.set_timesteps(2)
        for step in self.scheduler.timesteps:
            latents = self.scheduler.step(torch.zeros_like(latents), step, latents).prev_sample
        return self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]


@torch.no_grad()
def test_a_pipeline_holds_saves_and_loads_the_tokenizer(tmp_path):
    drawing = TokensToImages(autoencoder(pipeline(), MEAN, STD), FlowMatchEulerDiscreteScheduler())
    latents = torch.randn(1, 64, 4, 4, generator=torch.Generator().manual_seed(1))
    images = drawing(latents)
    drawing.save_pretrained(tmp_path)
    again = TokensToImages.from_pretrained(tmp_path)
    assert isinstance(again.vae, AutoencoderOpenVision3) and torch.allclose(again(latents), images, atol=1e-5)


def test_gradient_reaches_latents_and_encoder_but_not_the_vae():
    ours = make_pipeline()
    network = autoencoder(ours)
    latents = network.encode(pixels()).latent
    network.decode(latents).sample.square().mean().backward()
    assert network.encoder.patchify.weight.grad.abs().sum() > 0 and network.latent_decoder.linear.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in network.vae.parameters())


def test_statistics_of_another_number_of_channels_are_refused():
    with pytest.raises(ValueError, match="64 channels"):
        autoencoder(pipeline(), MEAN[:5], STD)
