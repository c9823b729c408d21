import diffusers
import pytest
import torch
from shapes import FLUX, kl_network, smooth_images, tiny_network

from openvision3.model import vae as vae_module
from openvision3.model.vae import VAE

NETWORKS = {"kl": kl_network, "tiny": tiny_network}


@pytest.mark.parametrize("shift", [False, True])
def test_encode_is_the_posterior_mean_scaled(shift):
    network, images = kl_network(), smooth_images()
    with torch.no_grad():
        mean = network.encode(images).latent_dist.mean
        expected = (mean - 0.1159) * 0.3611 if shift else mean * 0.3611
        vae = VAE(network, shift=shift)
        torch.testing.assert_close(vae.encode(images), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vae.decode(expected), network.decode(mean).sample, rtol=1e-3, atol=1e-4)
    assert torch.equal(vae.encode(images), vae.encode(images))  # never sampled


def test_encode_is_the_latents_of_a_tiny_autoencoder():
    network, images = tiny_network(scaling_factor=0.5), smooth_images()
    with torch.no_grad():
        latents = network.encode(images).latents
        vae = VAE(network)
        torch.testing.assert_close(vae.encode(images), latents * 0.5, rtol=1e-4, atol=1e-5)
        rebuilt, rounded = vae.decode(vae.encode(images)), network(images).sample
    torch.testing.assert_close(rebuilt, network.decode(latents).sample, rtol=1e-3, atol=1e-4)
    assert (rebuilt - rounded).abs().max() > 1e-2  # its forward clamps the latents and rounds them to 8 bits


def test_shift_is_off_for_kl_and_on_for_tiny_unless_told():
    assert VAE(kl_network()).shift == 0.0
    assert VAE(kl_network(), shift=True).shift == 0.1159
    assert VAE(tiny_network(shift_factor=0.2)).shift == 0.2
    assert VAE(tiny_network(shift_factor=0.2), shift=False).shift == 0.0
    images = smooth_images()
    on, off = VAE(tiny_network(shift_factor=0.2, scaling_factor=2.0)), VAE(tiny_network(shift_factor=0.2, scaling_factor=2.0), shift=False)
    torch.testing.assert_close(off.encode(images) - on.encode(images), torch.full((2, 4, 4, 6), 0.4), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_stride_follows_from_the_levels(levels):
    vae = VAE(tiny_network(levels=levels, channels=5))
    latents = vae.encode(smooth_images())
    assert latents.shape == (2, 5, 32 // 2 ** (levels - 1), 48 // 2 ** (levels - 1))
    assert vae.decode(latents).shape == (2, 3, 32, 48)
    assert (vae.stride, vae.latent_channels) == (2 ** (levels - 1), 5)


def test_stride_of_a_kl_follows_from_the_levels():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3, "block_out_channels": (8, 8, 8)}
    vae = VAE(kl_network(**blocks))
    assert vae.stride == 4 and vae.encode(smooth_images()).shape == (2, 4, 8, 12)


@pytest.mark.parametrize("kind", NETWORKS)
def test_decode_passes_gradient_to_its_input_and_none_to_the_weights(kind):
    vae = VAE(NETWORKS[kind]())
    latents = torch.randn(1, 4, 3, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    direction = torch.randn(1, 4, 3, 2, generator=torch.Generator().manual_seed(1))
    vae.decode(latents).pow(2).mean().backward()
    with torch.no_grad():
        step = 1e-2
        slope = (vae.decode(latents + step * direction).pow(2).mean() - vae.decode(latents - step * direction).pow(2).mean()) / (2 * step)
    assert (latents.grad * direction).sum().item() == pytest.approx(slope.item(), rel=0.05)
    assert slope.abs() > 1e-6
    assert all(p.grad is None and not p.requires_grad for p in vae.parameters())


def test_encode_gives_no_gradient_and_train_keeps_evaluation_mode():
    vae = VAE(kl_network())
    assert not vae.encode(smooth_images().requires_grad_()).requires_grad
    torch.nn.Sequential(vae).train()
    assert not any(module.training for module in vae.modules())


# -- precision ---------------------------------------------------------------------------------------------------------


def test_fp16_is_refused_wherever_it_comes_from():
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(ValueError, match=r"choose torch\.bfloat16 or torch\.float32"):
            VAE(tiny_network(), dtype=dtype)
    vae = VAE(tiny_network())
    around = torch.nn.ModuleDict({"vae": vae, "other": torch.nn.Linear(2, 2)})
    for change in (vae.half, lambda: vae.to(torch.float16), around.half):
        with pytest.raises(ValueError, match=r"torch\.float16"):
            change()
    assert {p.dtype for p in around.parameters()} == {torch.float32}


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", NETWORKS)
def test_an_autocast_around_it_changes_nothing(kind, autocast):
    vae, images = VAE(NETWORKS[kind]()), smooth_images()
    latents = vae.encode(images)
    rebuilt = vae.decode(latents)
    with torch.autocast("cpu", autocast):
        assert torch.equal(vae.encode(images), latents)
        assert torch.equal(vae.decode(latents), rebuilt)
        seen = latents.clone().requires_grad_()
        vae.decode(seen).mean().backward()
    assert seen.grad.dtype == torch.float32 and seen.grad.abs().max() > 0


def test_bf16_weights_give_fp32_latents_close_to_fp32_ones():
    images, fine, rough = smooth_images(), VAE(tiny_network()), VAE(tiny_network(), dtype=torch.bfloat16)
    assert rough.dtype == torch.bfloat16
    latents = fine.encode(images)
    assert rough.encode(images).dtype == rough.decode(latents).dtype == torch.float32
    assert 0 < (rough.encode(images) - latents).abs().mean() < 0.03 * latents.abs().mean()


# -- chunks and tiles ----------------------------------------------------------------------------------------------------


def test_chunks_equal_the_whole(monkeypatch):
    vae, images = VAE(tiny_network()), smooth_images(5)
    latents = vae.encode(images)
    rebuilt = vae.decode(latents)
    sizes = []
    monkeypatch.setattr(vae_module, "TILE_PIXELS", 32 * 48)  # 4 images a chunk
    inner = vae._run
    monkeypatch.setattr(vae, "_run", lambda function, x: sizes.append(len(x)) or inner(function, x))
    torch.testing.assert_close(vae.encode(images), latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(latents), rebuilt, rtol=1e-4, atol=1e-4)
    assert sizes == [4, 1, 4, 1]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(vae_module, "TILE_PIXELS", 64 * 64)
    monkeypatch.setattr(vae_module, "_TILE", 64)
    monkeypatch.setattr(vae_module, "_OVERLAP", 32)


def whole(monkeypatch, function, x):
    with monkeypatch.context() as context:
        context.setattr(vae_module, "TILE_PIXELS", 1 << 40)
        return function(x)


@pytest.mark.parametrize("height, width", [(96, 160), (144, 64), (48, 200)])
def test_tiles_are_close_to_the_whole_and_have_no_seams(small_tiles, monkeypatch, height, width):
    # an average over 8 x 8 pixels there, a repetition back: exact in every tile, so any difference is the tiling's own
    class Averages(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
            self.config = diffusers.configuration_utils.FrozenDict(latent_channels=3, block_out_channels=(1,) * 4, scaling_factor=0.5)

        def encode(self, x):
            mean = torch.nn.functional.avg_pool2d(x, 8)
            return type("", (), {"latent_dist": type("", (), {"mode": lambda self: mean})()})()

        def decode(self, z):
            return type("", (), {"sample": torch.nn.functional.interpolate(z, scale_factor=8)})()

    exact = VAE(type("AutoencoderKL", (Averages,), {})())
    images = smooth_images(2, height, width)
    latents = exact.encode(images)
    torch.testing.assert_close(latents, torch.nn.functional.avg_pool2d(images, 8) * 0.5, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(exact.decode(latents), torch.nn.functional.interpolate(latents * 2, scale_factor=8), rtol=1e-5, atol=1e-6)

    vae = VAE(tiny_network(levels=3))  # a real one sees a border at a tile's edge
    for function, x in ((vae.encode, images), (vae.decode, vae.encode(images))):
        full, tiled = whole(monkeypatch, function, x), function(x)
        assert tiled.shape == full.shape
        spread = full.std()
        assert (tiled - full).abs().mean() < 0.08 * spread
        for axis in (2, 3):  # no jump is larger than the image's own
            assert tiled.diff(dim=axis).abs().amax() < 1.3 * full.diff(dim=axis).abs().amax() + 0.05 * spread


def test_a_gradient_flows_through_a_picture_larger_than_a_tile(small_tiles):
    vae = VAE(tiny_network())
    latents = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    vae.decode(latents).mean().backward()
    assert latents.grad.flatten(2).abs().amax(1).min() > 0


# -- no VAE --------------------------------------------------------------------------------------------------------------


def test_pixels_are_their_own_latents():
    vae, images = VAE(None), smooth_images()
    assert torch.equal(vae.encode(images), images) and torch.equal(vae.decode(images), images)
    assert (vae.latent_channels, vae.stride, vae.scale, vae.shift) == (3, 1, 1.0, 0.0)
    assert not vae.encode(images.requires_grad_()).requires_grad


def test_another_class_of_network_is_refused():
    with pytest.raises(ValueError, match="Linear is not a VAE"):
        VAE(type("Linear", (torch.nn.Linear,), {"config": {}})(2, 2))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda v: v.encode(torch.zeros(3, 32, 32)), r"shape \(3, 32, 32\)"),
        (lambda v: v.encode(torch.zeros(1, 4, 32, 32)), r"shape \(1, 4, 32, 32\)"),
        (lambda v: v.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), "torch.uint8"),
        (lambda v: v.encode(torch.zeros(1, 3, 32, 36)), "32 x 36 cannot be encoded; sides must be multiples of 8"),
        (lambda v: v.decode(torch.zeros(1, 16, 4, 4)), r"pass \(B, 4, h, w\)"),
    ],
)
def test_what_is_wrong_gets_one_clear_line(call, words):
    with pytest.raises(ValueError, match=words):
        call(VAE(tiny_network()))


# -- full size -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_full_size_flux_shaped_vae_runs_forward_and_backward_at_128_pixels():
    torch.manual_seed(0)
    vae = VAE(diffusers.AutoencoderKL(**FLUX))
    assert sum(p.numel() for p in vae.parameters()) > 80e6
    latents = vae.encode(smooth_images(1, 128, 128))
    assert latents.shape == (1, 16, 16, 16) and latents.isfinite().all() and latents.std() > 0
    latents.requires_grad_()
    images = vae.decode(latents)
    assert images.shape == (1, 3, 128, 128)
    images.abs().mean().backward()
    assert latents.grad.isfinite().all() and latents.grad.flatten(2).abs().amax(2).min() > 0
    assert all(p.grad is None for p in vae.parameters())
