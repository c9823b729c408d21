"""What a run costs: the arithmetic against torch's own counters, and the numbers that a person is told."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from openvision3 import cli
from openvision3.config import RunConfig
from openvision3.estimate import arithmetic
from openvision3.estimate.arithmetic import FLUX, VaeShape, vae_shape
from openvision3.estimate.devices import DEVICES, Devices, parse_devices
from openvision3.estimate.plan import BERT, Options, _Run, divisors, estimate, flops, gigabytes, hours, sample_costs
from openvision3.estimate.show import bar, show, to_json
from openvision3.model.encoder import SIZES, Encoder, EncoderConfig
from openvision3.model.openvision3 import OpenVision3
from openvision3.model.reconstruction import LatentDecoder, LatentDecoderConfig
from openvision3.model.understanding import TEXT_SIZES, Captioner, CaptionerConfig, TextEncoder, TextEncoderConfig
from openvision3.model.vae import VAE
from openvision3.optimizer import Muon, OptimizerConfig, Optimizers
from openvision3.recipes import base_low_res, mini, tiny

KL = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 16, "layers_per_block": 2, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
SMALL_KL = {
    "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3, "block_out_channels": [32, 64, 96],
    "latent_channels": 8, "layers_per_block": 1,
}  # fmt: skip
TINY = {
    "encoder_block_out_channels": (48, 48, 48), "decoder_block_out_channels": (48, 48, 48), "num_encoder_blocks": (1, 2, 1), "num_decoder_blocks": (1, 2, 1),
    "latent_channels": 8, "upsampling_scaling_factor": 2,
}  # fmt: skip
H100 = DEVICES["h100"]


def counted(run) -> float:
    with FlopCounterMode(display=False) as counter:
        result = run()
    counted.result = result  # type: ignore[attr-defined]
    return counter.get_total_flops()


def forward_and_backward(run) -> tuple[float, float]:
    forward = counted(run)
    result = counted.result  # type: ignore[attr-defined]
    return forward, counted(lambda: result.sum().backward())


def run_of(device: str = "h100", **fields) -> _Run:
    config = base_low_res()
    config.batch = 8
    options = Options(**{k: fields.pop(k) for k in list(fields) if k in {f.name for f in dataclasses.fields(Options)}})
    for name, value in fields.items():
        setattr(config, name, value)
    return _Run(config, options, Devices(DEVICES[device]) if device in DEVICES else parse_devices("cpu"))


# -- operations ----------------------------------------------------------------------------------------------------


def networks(size: str, channels: int, vocabulary: int, encoder_size: int = 768):
    encoder = Encoder(EncoderConfig(size, embed_dim=encoder_size), channels)
    width = encoder.size.width
    return {
        "encoder": encoder,
        "latent decoder": LatentDecoder(LatentDecoderConfig(size), width, channels, 2),
        "text encoder": TextEncoder(TextEncoderConfig(size), vocabulary, encoder_size),
        "captioner": Captioner(CaptionerConfig(size), vocabulary, width),
    }


@pytest.mark.parametrize(("size", "side"), [("tiny", 64), ("mini", 128), ("B", 128), ("B", 256), ("L", 256)])
def test_operations_of_the_four_networks_are_those_that_torch_counts(size, side):
    vocabulary = 5000
    with torch.device("meta"):
        parts = networks(size, 16, vocabulary)
        latents, side16 = torch.empty(1, 16, side // 8, side // 8), side // 16
        tokens = torch.empty(1, side16**2, SIZES[size].width, requires_grad=True)
        words, caption = torch.empty(1, 80, dtype=torch.long), torch.empty(1, 128, dtype=torch.long)
        seen = {
            "encoder": forward_and_backward(lambda: parts["encoder"](latents)[1]),
            "latent decoder": forward_and_backward(lambda: parts["latent decoder"](tokens, (side16, side16))),
            "text encoder": forward_and_backward(lambda: parts["text encoder"](words)),
            "captioner": forward_and_backward(lambda: parts["captioner"](tokens, caption)[:, :-1]),
        }
    run = run_of(size=side)
    run.config.model.encoder.size = run.config.model.latent_decoder.size = run.config.model.text_encoder.size = run.config.model.captioner.size = size
    run.vocabulary = vocabulary
    costs = sample_costs(run)
    costs["captioner"] += costs["vocabulary head"]
    for name, (forward, backward) in seen.items():
        assert costs[name].forward == pytest.approx(forward, rel=0.02), name
        assert costs[name].backward == pytest.approx(backward, rel=0.02), name


@pytest.mark.parametrize("side", [64, 128, 256])
@pytest.mark.parametrize("kind, config", [("AutoencoderKL", KL), ("AutoencoderKL", SMALL_KL), ("AutoencoderTiny", TINY)])
def test_operations_and_parameters_of_a_vae_are_those_that_torch_counts(kind, config, side):
    with torch.device("meta"):
        network = getattr(diffusers, kind)(**config).requires_grad_(False)
        shape = vae_shape({**network.config, "_class_name": kind})
        encoded = counted(lambda: network.encode(torch.empty(1, 3, side, side)))
        latents = torch.empty(1, shape.latent_channels, side // shape.stride, side // shape.stride, requires_grad=True)
        forward, backward = forward_and_backward(lambda: network.decode(latents).sample)
    assert shape.parameters == sum(p.numel() for p in network.parameters())
    assert arithmetic.vae_encode(shape, side, 2).forward == pytest.approx(encoded, rel=0.002)
    cost = arithmetic.vae_decode(shape, side, 2)
    assert (cost.forward, cost.backward) == pytest.approx((forward, backward), rel=0.002)
    assert sum(value for _, value in cost.lines) == pytest.approx(cost.forward)


def test_the_config_of_flux_is_the_one_written_down():
    assert vae_shape({**KL, "_class_name": "AutoencoderKL"}) == FLUX
    assert FLUX.stride == 8


@pytest.mark.parametrize("kind", ["efficientnet", "lpips-vgg", "lpips-alex"])
def test_operations_of_the_perceptual_networks_are_those_that_torch_counts(kind):
    from openvision3.model import perceptual

    with torch.device("meta"):
        if kind == "efficientnet":
            network: nn.Module = perceptual.EfficientNetLite0().requires_grad_(False)
            run = lambda images: network.features(images, 5)[-1]  # noqa: E731
        else:
            network = (perceptual._vgg16() if kind == "lpips-vgg" else perceptual._alexnet()).requires_grad_(False)
            run = network
        target = counted(lambda: run(torch.empty(1, 3, 128, 128)))
        forward, backward = forward_and_backward(lambda: run(torch.empty(1, 3, 128, 128, requires_grad=True)))
    cost = arithmetic.perceptual(kind, 128, 4)
    assert (cost.forward, cost.backward) == pytest.approx((target + forward, backward), rel=0.02)


def test_operations_of_a_whole_step_are_those_that_torch_counts():
    config = tiny()
    config.captions, config.pixel_share, config.batch, config.model.loss.lambda_perceptual = 2, 1.0, 4, 0.5
    run = _Run(config, Options(), parse_devices("cpu"))
    parts = {part.name: part for part in estimate(config, "tiny", Options(), run.devices).parts}
    model = OpenVision3(config.model, VAE.load("embedded"), config.vocabulary).init_weights()
    words = lambda *shape: torch.randint(5, 500, shape)  # noqa: E731
    batch = {"images": torch.rand(4, 3, config.size, config.size), "text_ids": words(4, 2, run.text_length), "caption_ids": words(4, run.caption_length)}
    forward = counted(lambda: model(batch)[0])
    loss = counted.result  # type: ignore[attr-defined]
    backward = counted(loss.backward)
    assert sum(p.forward for p in parts.values()) == pytest.approx(forward / 4, rel=0.02)
    assert sum(p.backward for p in parts.values()) == pytest.approx(backward / 4, rel=0.02)


def test_operations_of_muon_are_those_that_torch_counts():
    model = networks("tiny", 4, 100)["encoder"]
    optimizers = Optimizers(model, OptimizerConfig(kind="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    matrices: dict[tuple[int, int], int] = {}
    for matrix in next(o for o in optimizers.all if isinstance(o, Muon)).param_groups[0]["params"]:
        matrices[tuple(matrix.shape)] = matrices.get(tuple(matrix.shape), 0) + 1
    assert arithmetic.muon(matrices) == pytest.approx(counted(optimizers.step), rel=0.02)


def test_the_design_s_table_of_the_base_model_is_met():
    """performance.md 1, in GFLOP; with captions of full length and a vocabulary of 32,000."""
    table = {128: (67.8, 310, 67, 37, 59), 256: (272.9, 1245, 277, 37, 110)}
    for side, expected in table.items():
        run = run_of(size=side)
        run.vocabulary = 32_000
        costs = sample_costs(run)
        total = {name: (cost.forward + cost.backward) / 1e9 for name, cost in costs.items()}
        found = (
            total["VAE encode"],
            total["VAE decode"],
            total["encoder"] + total["latent decoder"],
            2 * total["text encoder"],
            total["captioner"] + total["vocabulary head"],
        )
        assert found == pytest.approx(expected, rel=0.015)


# -- kept bytes ----------------------------------------------------------------------------------------------------


def kept_bytes(run, modules) -> float:
    """Distinct storages that autograd keeps, parameters and inputs apart."""
    frozen = {p.untyped_storage().data_ptr() for m in modules for p in (*m.parameters(), *m.buffers())}
    seen: dict[int, int] = {}
    alive = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            seen[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    del result
    return float(sum(seen.values()))


@pytest.mark.parametrize("size", [("tiny", 4), ("mini", 2), ("Ti", 1)])
@pytest.mark.parametrize("side", [64, 160])
def test_kept_bytes_of_the_four_networks_are_near_those_that_autograd_keeps(size, side):
    name, batch = size
    vocabulary, grid = 300, side // 16
    parts = networks(name, 16, vocabulary)
    latents = torch.rand(batch, 16, side // 8, side // 8)
    tokens = torch.rand(batch, grid**2, SIZES[name].width, requires_grad=True)
    texts, captions = torch.randint(5, 200, (batch, 80)), torch.randint(5, 200, (batch, 128))
    for p in parts.values():
        p.init_weights()
    seen = {
        "encoder": kept_bytes(lambda: parts["encoder"](latents), parts.values()),
        "latent decoder": kept_bytes(lambda: parts["latent decoder"](tokens, (grid, grid)), parts.values()),
        "text encoder": kept_bytes(lambda: parts["text encoder"](texts), parts.values()),
        "captioner": kept_bytes(lambda: parts["captioner"](tokens, captions), parts.values()),
    }
    run = run_of("cpu", size=side, precision="fp32", vocabulary=vocabulary)
    run.config.model.encoder.size = run.config.model.latent_decoder.size = run.config.model.text_encoder.size = run.config.model.captioner.size = name
    costs = sample_costs(run)
    for part, measured in seen.items():
        assert batch * costs[part].saved == pytest.approx(measured, rel=0.25), part


@pytest.mark.parametrize("kind, config", [("AutoencoderKL", SMALL_KL), ("AutoencoderTiny", TINY)])
@pytest.mark.parametrize("side", [64, 128])
def test_kept_bytes_of_a_frozen_vae_s_decoder_are_near_those_that_autograd_keeps(kind, config, side):
    vae = VAE(getattr(diffusers, kind)(**config))
    shape = vae_shape({**vae.network.config, "_class_name": kind})
    latents = torch.rand(2, shape.latent_channels, side // shape.stride, side // shape.stride, requires_grad=True)
    measured = kept_bytes(lambda: vae.decode(latents), [vae])
    assert 2 * arithmetic.vae_decode(shape, side, 4).saved == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("kind", ["efficientnet", "lpips-vgg", "lpips-alex"])
def test_kept_bytes_of_the_perceptual_networks_are_near_those_that_autograd_keeps(kind):
    from openvision3.model import perceptual

    if kind == "efficientnet":
        network: nn.Module = perceptual.EfficientNetLite0().requires_grad_(False)
        run = lambda images: network.features(images, 5)  # noqa: E731
    else:
        network = (perceptual._vgg16() if kind == "lpips-vgg" else perceptual._alexnet()).requires_grad_(False)
        run = network
    images = torch.rand(2, 3, 96, 96, requires_grad=True)
    measured = kept_bytes(lambda: run(images), [network])
    assert 2 * arithmetic.perceptual(kind, 96, 4).saved == pytest.approx(measured, rel=0.25)


@settings(max_examples=12, deadline=None)
@given(depth=st.integers(1, 5), heads=st.sampled_from([1, 2, 4]), width=st.sampled_from([32, 64, 96]), tokens=st.integers(4, 120))
def test_kept_bytes_of_blocks_of_any_depth_and_width_are_near_those_that_autograd_keeps(depth, heads, width, tokens):
    from openvision3.model.transformer import TransformerSize, blocks

    size = TransformerSize(width, depth, heads, 4 * width)
    stack = blocks(size)

    def run():
        x = torch.rand(3, tokens, width, requires_grad=True)
        for block in stack:
            x = block(x)
        return x

    cost = arithmetic.transformer(size, tokens, "", width_bytes=4, fused=False, checkpointing=False)
    assert 3 * cost.saved == pytest.approx(kept_bytes(run, [stack]), rel=0.25)
