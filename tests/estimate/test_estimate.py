"""What a run costs: the counts against real runs of the model, and the numbers that a person is told."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import FLUX as FLUX_CONFIG
from shapes import kl_network
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from openvision3 import cli
from openvision3.distributed import block_lists, wrap_blocks
from openvision3.estimate.counts import Cost, Shapes, count_muon, count_parts
from openvision3.estimate.devices import DEVICES, Devices, here, parse_devices
from openvision3.estimate.plan import RESERVE, count_memory, estimate, split_work, values
from openvision3.estimate.planned import BERT, FLUX, Options, PlannedPretraining, build_vae, divisors
from openvision3.estimate.show import bar, show, to_json
from openvision3.estimate.units import flops, gigabytes, hours
from openvision3.hub import load_distance, load_vae
from openvision3.model.openvision3 import LossConfig, OpenVision3
from openvision3.model.vae import VAE
from openvision3.networks.discriminator import Heads
from openvision3.networks.perceptual import EfficientNetDistance, EfficientNetLite0, Lpips
from openvision3.train.config import PretrainConfig
from openvision3.train.decoder_config import latent_decoder
from openvision3.train.optimizer import Muon, Optimizers
from openvision3.train.recipes import RECIPES, base_high_res, base_low_res, folder, mini, small_model, tiny

VOCABULARY = 300


def run_of(device: str = "h100", **fields) -> PlannedPretraining:
    config = base_low_res()
    config.batch = 8
    options = Options(**{k: fields.pop(k) for k in list(fields) if k in {f.name for f in dataclasses.fields(Options)}})
    for name, value in fields.items():
        setattr(config, name, value)
    return PlannedPretraining(config, options, Devices(DEVICES[device]) if device in DEVICES else parse_devices("cpu"))


# -- operations and kept bytes against real runs --------------------------------------------------------------------


def operations(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def kept_bytes(run: Callable[[], object], network: nn.Module) -> float:
    """Distinct storages that autograd keeps, parameters and buffers apart."""
    own = {value.untyped_storage().data_ptr() for value in (*network.parameters(), *network.buffers())}
    storages: dict[int, tuple[torch.Tensor, int]] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return float(sum(size for place, (_, size) in storages.items() if place not in own))


def counts_of(config, side: int = 64, length: int = 24, *, on_cpu: bool = True, bf16: bool = False, checkpointing: bool = False) -> dict[str, Cost]:
    with torch.device("meta"):
        model = OpenVision3(config, build_vae(config.vae.name, torch.bfloat16 if bf16 else torch.float32)[0], VOCABULARY)
    return count_parts(model, Shapes(side, length, length, bf16, on_cpu, checkpointing), 1, 4)


def sized(encoder: str, texts: str = "tiny", **loss):
    config = small_model(encoder, encoder, 64)
    config.text_encoder.size = config.captioner.size = texts
    config.loss = dataclasses.replace(config.loss, **loss)
    return config


def real_parts(config, rows: int, side: int, length: int = 24):
    """{part: (network, a run of it on real numbers)}"""
    model = OpenVision3(config, load_vae("embedded"), VOCABULARY).init_weights()
    grid, width = side // 16, model.encoder.size.width
    latents = torch.rand(rows, model.vae.latent_channels, side // 8, side // 8)
    tokens = torch.rand(rows, grid**2, width, requires_grad=True)
    seen = torch.rand(rows, model.captioner.token_count(grid**2), width, requires_grad=True)
    ids = torch.randint(5, VOCABULARY, (rows, length))
    return {
        "encoder": (model.encoder, lambda: sum(x.sum() for x in model.encoder(latents))),
        "latent decoder": (model.latent_decoder, lambda: (model.latent_decoder(tokens, (grid, grid)) - latents).abs().mean()),
        "text encoder": (model.text_encoder, lambda: model.text_encoder(ids).sum()),
        "captioner": (model.captioner, lambda: model.captioner.features(seen, ids).sum()),
        "VAE decode": (model.vae, lambda: model.vae.decode(latents.clone().requires_grad_()).abs().mean()),
    }


def levered():
    """The mini with everything that changes its networks or what they see."""
    config = sized("mini")
    for part in (config.encoder, config.latent_decoder):
        part.positions, part.qk_norm = "rope", True
    config.encoder.sum_blocks, config.captioner.token_share = 3, 0.35
    return config


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", [sized("tiny"), sized("mini"), levered()], ids=["tiny", "mini", "levers"])
def test_operations_of_each_part_are_those_of_a_real_run_to_the_last_one(config, checkpointing):
    counted = counts_of(config, checkpointing=checkpointing)
    for name, (network, run) in real_parts(config, 1, 64).items():
        if checkpointing and name != "VAE decode":
            wrap_blocks(network, True, False)
        assert counted[name].forward == operations(run), name
        assert counted[name].forward + counted[name].backward + counted[name].again == operations(lambda run=run: run().backward()), name
        assert sum(operations for _, operations in counted[name].modules.values()) == counted[name].forward, name


@pytest.mark.parametrize(
    "config, side",
    [(sized("tiny"), 64), (sized("mini"), 160), (sized("tiny"), 288), (levered(), 64)],  # 324 tokens: a CPU's attention is fused too
    ids=["tiny", "mini", "tiny-fused", "levers"],
)
def test_kept_bytes_of_each_part_are_those_that_autograd_keeps_in_a_real_run(config, side):
    counted = counts_of(config, side)
    two, five = ({name: kept_bytes(run, network) for name, (network, run) in real_parts(config, rows, side).items()} for rows in (2, 5))
    for name, kept in five.items():
        assert 3 * counted[name].saved == pytest.approx(kept - two[name], rel=0.001), name


@pytest.mark.parametrize("side", [64, 128])
def test_a_kl_vae_with_attention_is_counted_from_its_config_alone(tmp_path, side):
    network = kl_network()
    network.save_config(tmp_path)
    config = sized("tiny")
    config.vae.name = str(tmp_path)
    counted, vae = counts_of(config, side), VAE(network)
    with torch.device("meta"):
        empty = diffusers.AutoencoderKL.from_config(network.config).requires_grad_(False)
        images, latents = torch.empty(1, 3, side, side), torch.empty(1, vae.latent_channels, side // 8, side // 8, requires_grad=True)
        assert counted["VAE encode"].forward == operations(lambda: empty.encode(images))
        assert counted["VAE decode"].forward + counted["VAE decode"].backward == operations(lambda: empty.decode(latents).sample.sum().backward())
    two, four = (kept_bytes(lambda rows=rows: decoded_loss(vae, rows, side), vae) for rows in (2, 4))
    assert 2 * counted["VAE decode"].saved == pytest.approx(four - two, rel=0.02)


def decoded_loss(vae: VAE, rows: int, side: int) -> torch.Tensor:
    return vae.decode(torch.rand(rows, vae.latent_channels, side // 8, side // 8, requires_grad=True)).abs().mean()


def test_a_gpu_keeps_no_probabilities_and_computes_the_same_products():
    plain, fused = counts_of(sized("mini"), 256), counts_of(sized("mini"), 256, on_cpu=False)
    heads, tokens, blocks = 4, 257, 6
    for name in ("encoder", "captioner"):
        assert (plain[name].forward, plain[name].backward) == (fused[name].forward, fused[name].backward)
    at_160, fused_at_160 = counts_of(sized("mini"), 160), counts_of(sized("mini"), 160, on_cpu=False)
    probabilities = blocks * heads * 101**2 * 4
    assert at_160["encoder"].saved - fused_at_160["encoder"].saved == pytest.approx(probabilities, rel=0.05)
    assert plain["encoder"].saved == fused["encoder"].saved and tokens > 256  # fused on a CPU as well


def test_bf16_halves_what_is_computed_in_it_and_not_the_norms():
    exact, half = counts_of(sized("mini"), on_cpu=False), counts_of(sized("mini"), on_cpu=False, bf16=True)
    for name in ("encoder", "latent decoder", "text encoder", "captioner"):
        assert half[name].forward == exact[name].forward and 0.5 < half[name].saved / exact[name].saved < 0.7, name
    assert half["VAE decode"].saved / exact["VAE decode"].saved == pytest.approx(0.5, abs=0.1)


def test_checkpointed_blocks_keep_their_inputs_and_one_block_is_whole_again():
    config = sized("mini")
    plain, counted = counts_of(config), counts_of(config, checkpointing=True)
    network, run = real_parts(config, 4, 64)["encoder"]
    one_block = 4 * plain["encoder"].saved / 6
    wrap_blocks(network, True, False)
    assert 4 * counted["encoder"].saved == pytest.approx(kept_bytes(run, network) + one_block, rel=0.1)
    assert counted["encoder"].forward == plain["encoder"].forward > counted["encoder"].again > 0.6 * plain["encoder"].forward
    assert counted["VAE decode"] == plain["VAE decode"]


@pytest.mark.parametrize("kind", ["efficientnet", "lpips-vgg", "lpips-alex"])
def test_operations_and_kept_bytes_of_a_perceptual_network_are_those_of_a_real_run(kind):
    config = sized("tiny")
    config.loss = LossConfig(lambda_perceptual=0.5, perceptual=kind, lpips_backbone="a", lpips_linear="b")
    cost = counts_of(config, 96)["perceptual"]
    network = EfficientNetDistance(EfficientNetLite0()) if kind == "efficientnet" else Lpips(kind.removeprefix("lpips-"))
    images = torch.rand(2, 3, 96, 96, requires_grad=True)
    run = lambda: network(images.detach(), images)  # noqa: E731
    assert 2 * (cost.forward + cost.backward) == operations(lambda: run().backward())
    assert 2 * cost.saved == pytest.approx(kept_bytes(run, network), rel=0.02)


def test_a_frozen_encoder_has_no_backward_pass_but_that_of_its_pooling():
    both, nothing = counts_of(sized("mini"))["encoder"], counts_of(sized("mini", encoder_learns_from="nothing"))["encoder"]
    assert nothing.forward == both.forward and nothing.backward < 0.01 * both.backward and nothing.saved < 0.05 * both.saved


def test_the_operations_of_a_whole_step_are_those_that_torch_counts():
    config = tiny()
    config.captions, config.pixel_share, config.batch, config.model.loss.lambda_perceptual = 2, 1.0, 4, 0.5
    run = PlannedPretraining(config, Options(), parse_devices("cpu"))
    parts = split_work(run)
    model = OpenVision3(config.model, load_vae("embedded"), config.vocabulary, distance=load_distance(config.model.loss)).init_weights()
    words = lambda *shape: torch.randint(5, 500, shape)  # noqa: E731
    batch = {"images": torch.rand(4, 3, config.size, config.size), "text_ids": words(4, 2, run.text_length), "caption_ids": words(4, run.caption_length)}
    assert 4 * sum(p.forward for p in parts) == pytest.approx(operations(lambda: model(batch)), rel=1e-6)
    all_train = operations(lambda: model(batch)[0].backward())
    assert 4 * sum(p.flops for p in parts) == pytest.approx(all_train, rel=1e-6)
    config.decoder_finish, model.finishing = 0.25, True
    finishing = operations(lambda: model(batch)[0].backward())
    parts = split_work(PlannedPretraining(config, Options(), parse_devices("cpu")))
    assert 4 * sum(p.flops for p in parts) == pytest.approx(0.75 * all_train + 0.25 * finishing, rel=1e-3)  # no gradient for the tokens


def test_the_kept_bytes_of_a_whole_step_are_near_those_that_autograd_keeps():
    config = tiny()
    config.captions, config.pixel_share, config.batch, config.precision = 2, 1.0, 4, "fp32"
    result = estimate(config, "tiny", Options(), parse_devices("cpu"), advise=False)
    model = OpenVision3(config.model, load_vae("embedded"), config.vocabulary).init_weights()
    words = lambda *shape: torch.randint(5, 500, shape)  # noqa: E731
    batch = {"images": torch.rand(4, 3, config.size, config.size), "text_ids": words(4, 2, 32), "caption_ids": words(4, 32)}
    kept = sum(value for name, value in result.memory.items() if name.startswith("activations"))
    assert kept == pytest.approx(kept_bytes(lambda: model(batch)[0], model), rel=0.15)  # which keeps the logits too


def test_operations_and_state_of_muon_are_those_of_a_real_step():
    config = PretrainConfig(model=sized("tiny"))
    config.optimizer.kind = "muon"
    model = OpenVision3(config.model, load_vae("embedded"), VOCABULARY).init_weights()
    optimizers = Optimizers(model, config.optimizer)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    real = operations(optimizers.step)
    moments = sum(v.nbytes for o in optimizers.all for state in o.state.values() for v in state.values() if isinstance(v, torch.Tensor) and v.ndim)
    assert any(isinstance(optimizer, Muon) for optimizer in optimizers.all)
    with torch.device("meta"):
        empty = OpenVision3(config.model, build_vae("embedded", torch.float32)[0], VOCABULARY)
    assert count_muon(empty, config.optimizer) == (real, moments)


def test_the_config_of_flux_is_the_one_written_down():
    published = diffusers.AutoencoderKL.load_config
    assert callable(published) and {name: value for name, value in FLUX.items() if name in FLUX_CONFIG} == {
        name: value for name, value in FLUX_CONFIG.items() if name in FLUX
    }
    vae, source = build_vae("black-forest-labs/FLUX.1-schnell", torch.float32)
    assert (vae.stride, vae.latent_channels, sum(p.numel() for p in vae.parameters())) == (8, 16, 83_819_683) and source.startswith("https://")


def test_the_design_s_table_of_the_base_model_is_met():
    """In GFLOP; captions of full length and a vocabulary of 32,000; LPIPS keeps 120 MB an image at 256 px."""
    table = {128: (67.8, 310, 67, 37, 59), 256: (272.9, 1245, 277, 37, 110)}
    for side, expected in table.items():
        costs = run_of(size=side, tokenizer="", caption_keys=(), vocabulary=32_000).costs
        total = {name: (cost.forward + cost.backward) / 1e9 for name, cost in costs.items()}
        totals = (
            total["VAE encode"],
            total["VAE decode"],
            total["encoder"] + total["latent decoder"],
            2 * total["text encoder"],
            total["captioner"] + total["vocabulary head"],
        )
        assert totals == pytest.approx(expected, rel=0.015)
    high = base_high_res()
    high.batch = 8
    assert PlannedPretraining(high, Options(), Devices(DEVICES["h100"])).costs["perceptual"].saved == pytest.approx(120e6, rel=0.01)


# -- the whole estimate --------------------------------------------------------------------------------------------


def of(recipe=base_low_res, gpus: str = "h100", **fields):
    config = recipe()
    options = {name: fields.pop(name) for name in list(fields) if name in {f.name for f in dataclasses.fields(Options)}}
    advise = fields.pop("advise", False)
    for name, value in fields.items():
        setattr(config, name, value)
    return estimate(config, recipe.__name__, Options(gpus=gpus, **options), advise=advise)


def test_hours_are_operations_over_what_the_devices_reach():
    plan = of(gpus="64xh100", utilisation=0.5, price_per_hour=2.0)
    seconds = 625_000 * 8192 * plan.sample_flops / (64 * 989.4e12 * 0.5)
    assert plan.hours == pytest.approx(seconds / 3600)
    assert plan.cost == pytest.approx(plan.hours * 64 * 2.0)
    assert sum(part.share for part in plan.parts) == pytest.approx(1)


def test_the_paper_s_run_takes_about_the_hours_that_its_recipe_states():
    """1,900 H200-hours at 400 TFLOP/s sustained."""
    plan = of(gpus="64xh200", utilisation=400 / 989.4)
    assert plan.hours * 64 == pytest.approx(1900, rel=0.05)


def test_minutes_set_the_steps():
    plan = of(gpus="h100", minutes=5.0, batch=64)
    assert plan.steps * plan.step_seconds == pytest.approx(300, rel=0.02) and plan.hours == pytest.approx(5 / 60, rel=0.02)


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
    plan = estimate(config, "tiny", Options(), parse_devices("cpu"))
    assert sum(plan.parameters.values()) + 1 == sum(p.numel() for p in model.parameters() if p.requires_grad)
    moments = sum(v.numel() for v in momentum(model, config))
    assert plan.memory["optimiser"] == pytest.approx(4 * moments, rel=0.001)


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
    plan = of(gpus=device, batch=batch, pixel_share=share)
    run = run_of(device, batch=batch, pixel_share=share)
    room = plan.devices.device.memory * (1 - RESERVE)
    assert plan.largest_micro_batch in [0, *divisors(batch)]
    for micro in divisors(batch):
        assert (sum(values(count_memory(run, micro)).values()) <= room) == (micro <= plan.largest_micro_batch)


def test_an_all_reduce_sends_twice_the_gradients_but_for_the_own_part():
    plan = of(tiny, gpus="4xh100")
    count = sum(plan.parameters.values()) + 1
    assert plan.parallel == "replicate"
    assert plan.network["gradients within a machine"] == pytest.approx(2 * 4 * count * 3 / 4)
    assert not any(name.endswith("between machines") for name in plan.network)


@pytest.mark.parametrize("pieces", [1, 2])
def test_sharded_blocks_are_gathered_for_forward_and_backward_and_the_rest_once_for_both(pieces):
    plan, run = of(gpus="h100:8", parallel="fsdp", micro_batch=1024 // pieces), base_low_res()
    with torch.device("meta"):
        model = OpenVision3(run.model, build_vae(run.model.vae.name, torch.bfloat16)[0], 30_524)
    parts = {name: sum(p.numel() for blocks in block_lists(part) for p in blocks.parameters()) for name, part in model.named_children()}
    blocks, everything = sum(parts.values()), sum(p.numel() for p in model.parameters() if p.requires_grad)
    embedding = pieces * (parts["encoder"] + parts["text_encoder"]) if pieces > 1 else 0
    expected = 2 * (2 * pieces * blocks + embedding) + 4 * (everything - blocks) * (pieces + (pieces > 1))
    assert plan.network["weights within a machine"] == pytest.approx(expected * 7 / 8, rel=1e-3)


@pytest.mark.parametrize(("title", "bf16"), [("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None)])
def test_a_card_that_only_resembles_one_of_the_table_has_no_sheet(monkeypatch, title, bf16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: title)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(total_memory=80e9))
    assert here().bf16 == (pytest.approx(bf16, rel=1e-2) if bf16 else None) and here().memory == 80e9


def test_hsdp_sends_only_gradients_and_embeddings_to_other_machines():
    plan = of(gpus="16xh100", batch=64)
    count = sum(plan.parameters.values()) + 1
    assert plan.network["gradients between machines"] == pytest.approx(2 * 4 * count / 8 / 2)
    assert {name for name in plan.network if name.endswith("between machines")} == {"gradients between machines", "embeddings between machines"}


def test_the_network_sets_the_pace_where_it_is_slower():
    plan = of(gpus="16xh100", batch=16, network=0.001)
    assert plan.network_seconds > plan.compute_seconds and plan.step_seconds == plan.network_seconds


def test_what_is_unknown_stays_unknown():
    plan = of(gpus="16xl40s", batch=64)
    assert plan.network_seconds is None and plan.hours is not None
    assert any("the link between these devices is unknown" in line for line in plan.assumptions)
    assert plan.disk["data"] is None and plan.disk["latent cache"] is None


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_disk_is_what_a_run_really_writes(tmp_path, ema):
    from small_runs import small

    from openvision3.train.pretrain import pretrain

    config = small(tmp_path, "run", ema=ema)
    run = pretrain(config).folder
    vocabulary = len(json.loads((run / "tokenizer.json").read_text())["model"]["vocab"])
    config.vocabulary, config.tokenizer = vocabulary, str(run / "tokenizer.json")
    plan = estimate(config, "tiny", Options(), parse_devices("cpu"))
    kept = sorted((run / "checkpoints").iterdir())
    written = sum(f.stat().st_size for f in kept[-1].rglob("*.distcp")) + (kept[-1] / "model.safetensors").stat().st_size
    assert plan.disk["one checkpoint"] == pytest.approx(written, rel=0.15)  # each of the many small tensors has a header
    assert plan.disk["data"] == sum(f.stat().st_size for f in (tmp_path / "train").iterdir())


def test_a_latent_cache_holds_two_bytes_a_number():
    plan = of(samples=1_000_000, crops=4)
    assert plan.disk["latent cache"] == 16 * 16 * 16 * 2 * 4 * 1_000_000


def test_advice_states_what_a_run_changed_so_would_take():
    plan = of(gpus="8xh100", batch=1024, advise=True)
    rows = {row["set"]: row for row in plan.advice}
    changed = of(gpus="8xh100", batch=1024, pixel_share=0.25)
    assert (rows["--pixel-share 0.25"]["hours"], rows["--pixel-share 0.25"]["memory"]) == (changed.hours, changed.memory_total)
    cached = of(gpus="8xh100", batch=1024, cached=True)
    assert rows["openvision3 data latents"]["sample_flops"] == cached.sample_flops
    levers = of(gpus="8xh100", batch=1024, cached=True, pixel_share=0.125)
    assert plan.sample_flops / levers.sample_flops == pytest.approx(2.69, rel=0.05)  # the design's ceiling


def test_a_run_that_does_not_fit_is_told_what_would():
    plan = of(gpus="4090", batch=512, advise=True)
    assert plan.fits is False and 0 < plan.largest_micro_batch < 512
    pieces = next(row for row in plan.advice if row["set"] == f"--micro-batch {plan.largest_micro_batch}")
    assert pieces["fits"] and pieces["sample_flops"] > plan.sample_flops


def test_every_part_has_its_formula_with_numbers():
    plan = of(gpus="64xh100")
    sections = {section for section, *_ in plan.formulas}
    assert sections >= {part.name for part in plan.parts} | {"parameters", "memory", "time", "network", "disk"}
    assert ("encoder", "12 x blocks.*.attention.qkv", flops(12 * 2 * 65 * 768 * 3 * 768)) in plan.formulas


def value_of(formula: str) -> float:
    """What a formula says, read as arithmetic: words are left out, x multiplies, ^ raises."""
    text = re.sub(r"\b(?!x\b)[a-z][a-zA-Z-]*", " ", formula.rpartition(": ")[2].replace(",", "")).replace("x", "*").replace("^", "**")
    return eval(text)


@pytest.mark.parametrize("recipe", [base_low_res, tiny])
@pytest.mark.parametrize("gpus", ["h100", "8xh100", "16xh100"])
def test_formulas_say_what_the_numbers_are(recipe, gpus):
    plan = of(recipe, gpus, batch=64)
    formulas = {formula.rpartition(": ")[0]: formula for section, formula, _ in plan.formulas if section in ("network", "memory")}
    names = ("weights", "gradients", "gathered weights and gradients", "weights in bf16", "embeddings of all pairs", *plan.network)
    for name, value in (plan.memory | plan.network).items():
        if name in names:
            assert value_of(formulas[name]) == pytest.approx(value), formulas[name]


# -- devices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "count", "nodes"), [("h100", "h100", 1, 1), ("h100:8", "h100", 8, 1), ("64xH100", "h100", 64, 8), ("2 x a100-40gb", "a100-40gb", 2, 1)]
)
def test_devices_are_named_as_people_name_them(text, name, count, nodes):
    plan = parse_devices(text)
    assert (plan.device.name, plan.count, plan.nodes) == (name, count, nodes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h101", "unknown device 'h101'. Did you mean 'h100'.* Choose one of h100, "),
        ("12xh100", "12 devices do not fill machines of 8; choose a multiple of 8, or set --per-node"),
        ("0xh100", "must be at least 1"),
        ("8xh100:8", "is not understood; write h100, 8xh100 or 64xh100"),
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
    assert "12 x blocks.*.attention.qkv = 2.76 GFLOP" in capsys.readouterr().out


def test_json_is_one_value_with_all_numbers(capsys):
    assert cli.main(["estimate", "tiny", "--gpus", "h100", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["memory_total"] == pytest.approx(sum(plan["memory"].values())) and plan["devices"]["name"] == "h100"
    assert {part["name"] for part in plan["parts"]} >= {"VAE encode", "VAE decode", "captioner"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nope", "unknown recipe 'nope'"),
        ("base_low_res --gpus h100:8 --batch 100", "batch 100 cannot be divided among 8 devices; choose a multiple of 8"),
        ("base_low_res --gpus h100 --utilisation 2", "utilisation 2.0 must be above 0 and at most 1"),
        ("base_low_res --gpus h100 --model.vae.name foo/bar", "the VAE foo/bar is not here and its config is unknown"),
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
    assert "--gpus 8xh100" in done.stdout


def test_help_on_a_recipe_shows_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["estimate", "tiny", "--help"])
    assert stop.value.code == 0 and "--utilisation" in capsys.readouterr().out


def test_nothing_is_loaded(monkeypatch, capsys):
    for place in ("openvision3.hub.load_vae", "torch.load", "safetensors.torch.load_file", "safetensors.safe_open"):
        monkeypatch.setattr(place, lambda *_, place=place, **__: pytest.fail(f"{place} was called"))
    assert cli.main(["estimate", "base_low_res", "--gpus", "h100"]) == 0


def test_a_plain_terminal_gets_no_colour(capsys):
    show([of(batch=64)])
    assert "\x1b" not in capsys.readouterr().out
    assert json.loads(to_json([of(tiny, batch=8)]))["recipe"] == "tiny"


def test_bars_and_units():
    assert (bar(0.5, 4), bar(0.0, 4), bar(1.0, 4), bar(1 / 32, 4)) == ("██  ", "    ", "████", "▏   ")
    assert [flops(x) for x in (0, 999, 2.06e12, 3e18)] == ["0 FLOP", "999 FLOP", "2.06 TFLOP", "3000 PFLOP"]
    assert [gigabytes(x) for x in (8192, 1e6, 2e9, 3e12)] == ["8.2 kB", "1.00 MB", "2.00 GB", "3.00 TB"]
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
    plan = of(recipe, gpus="8xh100")
    assert plan.hours > 0 and plan.largest_micro_batch > 0


def test_of_a_latent_decoder_that_trains_alone_nothing_else_is_counted_as_trained():
    plain, config = latent_decoder(), latent_decoder()
    config.adversarial.weight = 0.5
    one, other = (estimate(each, "latent_decoder", Options(gpus="h100:1"), advise=False) for each in (plain, config))
    parts = {part.name: part for part in other.parts}
    assert set(parts) == {"VAE encode", "encoder", "latent decoder", "VAE decode", "perceptual", "discriminator"}
    assert parts["encoder"].backward == parts["encoder"].again == 0 and one.memory["frozen parts"] > 0
    heads = sum(parameter.numel() for parameter in Heads().parameters())
    assert other.parameters == one.parameters | {"discriminator": heads} and set(one.parameters) == {"latent decoder"}
    assert other.memory["optimiser"] - one.memory["optimiser"] == 2 * 4 * heads
