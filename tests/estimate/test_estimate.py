"""What a run costs: the arithmetic against torch's own counters, and the numbers that a person is told."""

from __future__ import annotations

import dataclasses
import json
import re
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
from openvision3.estimate import arithmetic
from openvision3.estimate.arithmetic import FLUX, vae_shape
from openvision3.estimate.devices import DEVICES, Devices, parse_devices
from openvision3.estimate.explain import flops, gigabytes, hours
from openvision3.estimate.plan import RESERVE, _memory, estimate
from openvision3.estimate.show import bar, show, to_json
from openvision3.estimate.sizes import BERT, Options, Sizes, divisors, sample_costs
from openvision3.hub import load_vae
from openvision3.model.encoder import SIZES, Encoder, EncoderConfig
from openvision3.model.openvision3 import OpenVision3
from openvision3.model.reconstruction import LatentDecoder, LatentDecoderConfig
from openvision3.model.understanding import Captioner, CaptionerConfig, TextEncoder, TextEncoderConfig
from openvision3.model.vae import VAE
from openvision3.train.optimizer import Muon, OptimizerConfig, Optimizers
from openvision3.train.recipes import RECIPES, base_high_res, base_low_res, folder, mini, tiny

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


def run_of(device: str = "h100", **fields) -> Sizes:
    config = base_low_res()
    config.batch = 8
    options = Options(**{k: fields.pop(k) for k in list(fields) if k in {f.name for f in dataclasses.fields(Options)}})
    for name, value in fields.items():
        setattr(config, name, value)
    return Sizes(config, options, Devices(DEVICES[device]) if device in DEVICES else parse_devices("cpu"))


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
    from openvision3.networks import perceptual

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
    run = Sizes(config, Options(), parse_devices("cpu"))
    parts = {part.name: part for part in estimate(config, "tiny", Options(), run.devices).parts}
    model = OpenVision3(config.model, load_vae("embedded"), config.vocabulary).init_weights()
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
    from openvision3.networks import perceptual

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


def test_kept_bytes_of_a_whole_step_are_near_those_that_autograd_keeps():
    config = tiny()
    config.captions, config.pixel_share, config.batch, config.precision = 2, 1.0, 4, "fp32"
    found = estimate(config, "tiny", Options(), parse_devices("cpu"))
    model = OpenVision3(config.model, load_vae("embedded"), config.vocabulary).init_weights()
    words = lambda *shape: torch.randint(5, 500, shape)  # noqa: E731
    batch = {"images": torch.rand(4, 3, config.size, config.size), "text_ids": words(4, 2, 32), "caption_ids": words(4, 32)}
    measured = kept_bytes(lambda: model(batch)[0], [model])
    kept = sum(value for name, value in found.memory.items() if name.startswith("activations"))
    assert kept == pytest.approx(measured, rel=0.25)


def test_checkpointed_blocks_keep_their_inputs_and_one_block_is_whole_again():
    from torch.utils.checkpoint import checkpoint

    from openvision3.model.transformer import TransformerSize, blocks

    size, stack = TransformerSize(64, 4, 4, 256), blocks(TransformerSize(64, 4, 4, 256))

    def run():
        x = torch.rand(3, 50, 64, requires_grad=True)
        for block in stack:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    settings = {"width_bytes": 4, "fused": False}
    cost = arithmetic.transformer(size, 50, "", checkpointing=True, **settings)
    one = arithmetic.transformer(TransformerSize(64, 1, 4, 256), 50, "", checkpointing=False, **settings)
    assert 3 * (cost.saved - one.saved) == pytest.approx(kept_bytes(run, [stack]), rel=0.25)


# -- the whole estimate --------------------------------------------------------------------------------------------


def of(recipe=base_low_res, gpus: str = "h100", **fields):
    config = recipe()
    asked = {name: fields.pop(name) for name in list(fields) if name in {f.name for f in dataclasses.fields(Options)}}
    for name, value in fields.items():
        setattr(config, name, value)
    return estimate(config, recipe.__name__, Options(gpus=gpus, **asked))


def test_hours_are_operations_over_what_the_devices_reach():
    found = of(gpus="64xh100", utilisation=0.5, price_per_hour=2.0)
    seconds = 625_000 * 8192 * found.sample_flops / (64 * 989.4e12 * 0.5)
    assert found.hours == pytest.approx(seconds / 3600)
    assert found.cost == pytest.approx(found.hours * 64 * 2.0)
    assert sum(part.share for part in found.parts) == pytest.approx(1)


def test_the_paper_s_run_takes_about_the_hours_that_its_recipe_states():
    """1,900 H200-hours at 400 TFLOP/s sustained."""
    found = of(gpus="64xh200", utilisation=400 / 989.4)
    assert found.hours * 64 == pytest.approx(1900, rel=0.05)


def test_minutes_set_the_steps():
    found = of(gpus="h100", minutes=5.0, batch=64)
    assert found.steps * found.step_seconds == pytest.approx(300, rel=0.02) and found.hours == pytest.approx(5 / 60, rel=0.02)


def test_weights_gradients_and_moments_are_sixteen_bytes_a_parameter_spread_over_the_shards():
    one, node, nodes = of(batch=64), of(gpus="8xh100", batch=64), of(gpus="64xh100", batch=64)
    assert (one.parallel, node.parallel, nodes.parallel) == ("one", "fsdp", "hsdp")
    names = ("weights", "gradients", "optimiser")
    count = sum(one.parameters.values()) + 1
    assert sum(one.memory[n] for n in names) == 16 * count
    assert sum(node.memory[n] for n in names) == sum(nodes.memory[n] for n in names) == 2 * count
    assert "weights in bf16" in one.memory and "gathered weights and gradients" in node.memory


def test_parameters_are_those_of_the_real_model():
    config = tiny()
    model = OpenVision3(config.model, load_vae("embedded"), config.vocabulary)
    found = estimate(config, "tiny", Options(), parse_devices("cpu"))
    assert sum(found.parameters.values()) + 1 == sum(p.numel() for p in model.parameters() if p.requires_grad)
    moments = sum(v.numel() for v in momentum(model, config))
    assert found.memory["optimiser"] == pytest.approx(4 * moments, rel=0.001)


def momentum(model, config):
    optimizers = Optimizers(model, config.optimizer)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizers.step()
    return [v for o in optimizers.all for state in o.state.values() for v in state.values() if isinstance(v, torch.Tensor) and v.ndim]


@settings(max_examples=8, deadline=None)
@given(batch=st.sampled_from([8, 64, 96, 1024]), share=st.sampled_from([1.0, 0.5, 0.125]), device=st.sampled_from(["h100", "4090", "l40s"]))
def test_the_largest_micro_batch_is_the_largest_that_fits(batch, share, device):
    found = of(gpus=device, batch=batch, pixel_share=share)
    run = run_of(device, batch=batch, pixel_share=share)
    costs, room = sample_costs(run), found.devices.device.memory * (1 - RESERVE)
    assert found.largest_micro_batch in [0, *divisors(batch)]
    for micro in divisors(batch):
        assert (sum(_memory(run, costs, micro).values()) <= room) == (micro <= found.largest_micro_batch)


def test_an_all_reduce_sends_twice_the_gradients_but_for_the_own_part():
    found = of(tiny, gpus="4xh100")
    count = sum(found.parameters.values()) + 1
    assert found.parallel == "replicate"
    assert found.network["gradients within a machine"] == pytest.approx(2 * 4 * count * 3 / 4)
    assert not any(name.endswith("between machines") for name in found.network)


def test_hsdp_sends_only_gradients_and_embeddings_to_other_machines():
    found = of(gpus="16xh100", batch=64)
    count = sum(found.parameters.values()) + 1
    assert found.network["gradients between machines"] == pytest.approx(2 * 4 * count / 8 / 2)
    assert {name for name in found.network if name.endswith("between machines")} == {"gradients between machines", "embeddings between machines"}


def test_the_network_sets_the_pace_where_it_is_slower():
    found = of(gpus="16xh100", batch=16, network=0.001)
    assert found.network_seconds > found.compute_seconds and found.step_seconds == found.network_seconds


def test_what_is_unknown_stays_unknown():
    found = of(gpus="16xl40s", batch=64)
    assert found.network_seconds is None and found.hours is not None
    assert any("the link between these devices is unknown" in line for line in found.assumptions)
    assert found.disk["data"] is None and found.disk["latent cache"] is None


def test_disk_is_what_a_run_really_writes(tmp_path):
    from small_runs import small

    from openvision3.train.pretrain import pretrain

    config = small(tmp_path, "run")
    run = pretrain(config).folder
    vocabulary = len(json.loads((run / "tokenizer.json").read_text())["model"]["vocab"])
    config.vocabulary, config.tokenizer = vocabulary, str(run / "tokenizer.json")
    found = estimate(config, "tiny", Options(), parse_devices("cpu"))
    kept = sorted((run / "checkpoints").iterdir())
    written = sum(f.stat().st_size for f in kept[-1].rglob("*.distcp")) + (kept[-1] / "model.safetensors").stat().st_size
    assert found.disk["one checkpoint"] == pytest.approx(written, rel=0.15)  # each of the many small tensors has a header
    assert found.disk["data"] == sum(f.stat().st_size for f in (tmp_path / "train").iterdir())


def test_a_latent_cache_holds_two_bytes_a_number():
    found = of(samples=1_000_000, crops=4)
    assert found.disk["latent cache"] == 16 * 16 * 16 * 2 * 4 * 1_000_000


def test_advice_states_what_a_run_changed_so_would_take():
    found = of(gpus="8xh100", batch=1024)
    rows = {row["set"]: row for row in found.advice}
    changed = of(gpus="8xh100", batch=1024, pixel_share=0.25)
    assert (rows["--pixel-share 0.25"]["hours"], rows["--pixel-share 0.25"]["memory"]) == (changed.hours, changed.memory_total)
    cached = of(gpus="8xh100", batch=1024, cached=True)
    assert rows["openvision3 data latents"]["sample_flops"] == cached.sample_flops
    levers = of(gpus="8xh100", batch=1024, cached=True, pixel_share=0.125)
    assert found.sample_flops / levers.sample_flops == pytest.approx(2.69, rel=0.05)  # the design's ceiling


def test_a_run_that_does_not_fit_is_told_what_would():
    found = of(gpus="4090", batch=512)
    assert found.fits is False and 0 < found.largest_micro_batch < 512
    pieces = next(row for row in found.advice if row["set"] == f"--micro-batch {found.largest_micro_batch}")
    assert pieces["fits"] and pieces["sample_flops"] > found.sample_flops


def test_every_part_has_its_formula_with_numbers():
    found = of(gpus="64xh100")
    sections = {section for section, *_ in found.formulas}
    assert sections >= {part.name for part in found.parts} | {"parameters", "memory", "time", "network", "disk"}
    assert ("encoder", "ViT: 12 blocks x (2 x 65 tokens x (4 x 768^2 + 2 x 768 x 3072) + 4 x 65^2 x 768)", "11.2 GFLOP") in found.formulas


def value_of(formula: str) -> float:
    """What a formula says, read as arithmetic: words are left out, x multiplies, ^ raises."""
    text = re.sub(r"\b(?!x\b)[a-z][a-zA-Z-]*", " ", formula.rpartition(": ")[2].replace(",", "")).replace("x", "*").replace("^", "**")
    return eval(text)


@pytest.mark.parametrize("recipe", [base_low_res, tiny])
@pytest.mark.parametrize("gpus", ["h100", "8xh100", "16xh100"])
def test_formulas_say_what_the_numbers_are(recipe, gpus):
    run = Sizes(recipe() if recipe is base_low_res else of_batch(recipe(), 64), Options(), parse_devices(gpus))
    for cost in sample_costs(run).values():
        for line, value in cost.lines:
            times, _, rest = line.partition(" x ")
            count = int(times) if times.isdigit() and ": " in rest else 1  # "2 x resnet conv 1: ..." is of one of two
            assert count * value_of(line) == pytest.approx(value, rel=1e-6), line
    found = estimate(run.config, "", Options(), run.devices)
    told = {formula.partition(": ")[0]: formula for section, formula, _ in found.formulas if section == "network"}
    for name, value in found.network.items():
        assert value_of(told[name]) == pytest.approx(value), told[name]


def of_batch(config, batch: int):
    config.batch = batch
    return config


# -- devices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "count", "nodes"), [("h100", "h100", 1, 1), ("h100:8", "h100", 8, 1), ("64xH100", "h100", 64, 8), ("2 x a100-40gb", "a100-40gb", 2, 1)]
)
def test_devices_are_named_as_people_name_them(text, name, count, nodes):
    found = parse_devices(text)
    assert (found.device.name, found.count, found.nodes) == (name, count, nodes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h101", "device h101 is unknown; legal are h100, .*; nearest is h100"),
        ("12xh100", "12 devices do not fill machines of 8; legal are multiples of 8, or set --per-node"),
        ("0xh100", "must be at least 1"),
        ("8xh100:8", "is not understood; legal are h100, h100:8 and 64xh100"),
    ],
)
def test_devices_that_are_not_known_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_devices(text)


def test_every_device_has_a_source_and_the_processor_is_measured():
    assert all(device.source for device in DEVICES.values())
    here = parse_devices("cpu").device
    assert here.fp32 > 1e8 and here.memory > 1e8 and "measured" in here.source


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_shows_tables_with_bars(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert cli.main(["estimate", "base_low_res", "--gpus", "64xh100", "--price-per-hour", "2.5", "--pixel-share", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "base_low_res on 64 x h100, 8 machines (HSDP" in out and "█" in out and "fits of 80.00 GB" in out and "--pixel-share 0.125" in out
    assert "--pixel-share 0.5" not in out  # it is set already


def test_explain_prints_the_formulas(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["estimate", "base_low_res", "--gpus", "8xh100", "--explain"]) == 0
    assert "ViT: 12 blocks x (2 x 65 tokens x (4 x 768^2 + 2 x 768 x 3072) + 4 x 65^2 x 768) = 11.2 GFLOP" in capsys.readouterr().out


def test_json_is_one_value_with_all_numbers(capsys):
    assert cli.main(["estimate", "tiny", "--gpus", "h100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory_total"] == pytest.approx(sum(found["memory"].values())) and found["devices"]["name"] == "h100"
    assert {part["name"] for part in found["parts"]} >= {"VAE encode", "VAE decode", "captioner"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nope", "unknown recipe 'nope'"),
        ("base_low_res --gpus h100:8 --batch 100", "batch 100 cannot be divided among 8 devices; legal are multiples of 8"),
        ("base_low_res --gpus h100 --utilisation 2", "utilisation 2.0 must be above 0 and at most 1"),
        ("base_low_res --gpus h100 --model.vae.name foo/bar", "the VAE foo/bar is not at hand and its config not known"),
        ("base_low_res --gpus h100 --text-length 300", "text-length 300 is more than the model's 80 positions"),
        ("base_low_res --gpus h100 --model.vae.name pixels", "set --model.encoder.patch 16"),
        ("base_low_res --gpus h100 --pixel-shar 1", "Did you mean '--pixel-share'?"),
        ("base_low_res --gpus h100 --crops 0", "crops 0 must be at least 1"),
    ],
)
def test_what_cannot_be_estimated_is_one_line(arguments, message, capsys):
    assert cli.main(["estimate", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Options" not in error


def test_a_damaged_vae_config_is_one_line(tmp_path, capsys):
    for text in ("{", '{"_class_name": "VQModel"}', '{"_class_name": "AutoencoderKL"}'):
        (tmp_path / "config.json").write_text(text)
        assert cli.main(["estimate", "base_low_res", "--gpus", "h100", "--model.vae.name", str(tmp_path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_help_needs_no_torch():
    code = "import sys; from openvision3 import cli; cli.main(['estimate', '--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--gpus h100:8" in done.stdout


def test_help_on_a_recipe_shows_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["estimate", "tiny", "--help"])
    assert stop.value.code == 0 and "--utilisation" in capsys.readouterr().out


def test_nothing_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(VAE, "load", lambda *_, **__: pytest.fail("a VAE was loaded"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    assert cli.main(["estimate", "base_low_res", "--gpus", "h100"]) == 0


def test_a_plain_terminal_gets_no_colour(capsys):
    show([of(batch=64)])
    assert "\x1b" not in capsys.readouterr().out
    assert json.loads(to_json([of(tiny, batch=8)]))["recipe"] == "tiny"


def test_bars_and_units():
    assert (bar(0.5, 4), bar(0.0, 4), bar(1.0, 4), bar(1 / 32, 4)) == ("██  ", "    ", "████", "▏   ")
    assert [flops(x) for x in (0, 999, 2.06e12, 3e18)] == ["0 FLOP", "999 FLOP", "2.06 TFLOP", "3000 PFLOP"]
    assert [gigabytes(x) for x in (1e6, 2e9, 3e12)] == ["1.00 MB", "2.00 GB", "3.00 TB"]
    assert [hours(x) for x in (0.5, 30, 240)] == ["30.0 min", "30.0 h", "240 h (10.0 days)"]


def test_the_vocabulary_is_read_where_it_is_at_hand(tmp_path):
    from openvision3.data.text import TextTokenizer

    tokenizer = TextTokenizer.train(["a red house", "a blue tree"], 60)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert of(tokenizer=str(tmp_path / "tokenizer.json"), batch=8).vocabulary == len(tokenizer)
    absent = of(batch=8)
    assert absent.vocabulary == BERT and any("bert-base-uncased" in line for line in absent.assumptions)
    assert of(mini).vocabulary == 3072
    assert of(base_high_res, batch=8, data=("pictures",)).vocabulary == BERT
    assert of(base_high_res, batch=8, init=str(tmp_path)).vocabulary == len(tokenizer)
    assert of(folder).vocabulary == 3072


def test_a_recipe_of_two_phases_is_estimated_phase_by_phase(capsys):
    assert cli.main(["estimate", "paper_base", "--gpus", "64xh100", "--json"]) == 0
    low, high = json.loads(capsys.readouterr().out)
    assert (low["recipe"], high["recipe"]) == ("base_low_res", "base_high_res")
    assert cli.main(["estimate", "paper_base", "--gpus", "64xh100"]) == 0
    assert f"both in turn: {hours(low['hours'] + high['hours'])}" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_can_be_estimated(recipe):
    found = of(recipe, gpus="8xh100")
    assert found.hours > 0 and found.largest_micro_batch > 0
