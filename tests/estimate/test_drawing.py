"""What the training of a generator costs: against real steps, and against the numbers that are published."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from openvision3.distributed import wrap_blocks
from openvision3.estimate.devices import parse_devices
from openvision3.estimate.drawing import DRAWN, STEPS, PlannedGenerator
from openvision3.estimate.plan import estimate, split_work
from openvision3.estimate.planned import Options
from openvision3.generate.dit import dit_config
from openvision3.generate.rae import RAE
from openvision3.generate.recipes import RECIPES, drawings_dit_tiny, imagenet_dit_b, imagenet_dit_xl, one_gpu_dit_b
from openvision3.generate.space import open_space


def of(recipe, gpus: str = "8xh100", *, advise: bool = False, **options):
    config = recipe()
    config.classes = "1000"
    return estimate(config, recipe.__name__, Options(gpus=gpus, **options), advise=advise)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("condition", "head", "words"), [("text", True, "keys"), ("text", True, "cross"), ("label", True, "keys"), ("none", False, "keys")])
def test_the_operations_of_a_step_are_those_that_torch_counts(condition, head, words, checkpointing):
    config = drawings_dit_tiny()
    config.condition, config.classes, config.precision, config.checkpointing = condition, "7", "fp32", checkpointing
    config.dit = dit_config("tiny", head=head, qk_norm=True)
    config.dit.words = words
    counted = sum(part.flops for part in split_work(PlannedGenerator(config, Options(), parse_devices("cpu"))))
    rae = RAE(config, open_space("mini"), 7 if condition == "label" else 0)
    rae.dit.init_weights()
    if checkpointing:
        wrap_blocks(rae, checkpointing=True, compiled=False)
    length = rae.space.text_encoder.config.positions
    batch = {"images": torch.rand(2, 3, 64, 64), "draw_key": torch.arange(2), "labels": torch.arange(2)}
    batch |= {"text_ids": torch.randint(5, 90, (2, 1, length)), "text_present": torch.ones(2, 1, dtype=torch.bool)}
    with FlopCounterMode(display=False) as counter:
        rae(batch)[0].backward()
    assert counter.get_total_flops() == 2 * counted


def test_the_paper_s_network_is_the_published_size_and_work():
    plan = of(imagenet_dit_xl)
    [dit] = [part for part in plan.parts if part.name == "DiT"]
    assert dit.forward == pytest.approx(2 * 161.6e9, rel=1e-3)  # published: 161.6 G multiply-adds
    assert plan.parameters["DiT"] == pytest.approx(838.7e6, rel=1e-3)
    assert dit.backward == pytest.approx(2 * dit.forward, rel=0.01)
    assert {part.name for part in plan.parts if not part.backward} == {"VAE encode", "encoder"}


@pytest.mark.parametrize(("recipe", "gpus"), [(imagenet_dit_xl, "8xh100"), (imagenet_dit_b, "8xh100"), (one_gpu_dit_b, "h100:1")])
def test_a_recipe_states_the_hours_of_its_estimate(recipe, gpus):
    stated = [int(number) for number in re.search(r"about (\d+) H100-hours[^,]*, (\d+) with cached latents", recipe.__doc__).groups()]
    for hours, cached in zip(stated, (False, True), strict=True):
        plan = of(recipe, gpus, cached=cached)
        assert hours == pytest.approx(plan.hours * plan.devices.count, rel=0.03)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_can_be_estimated(recipe):
    plan = of(recipe)
    assert plan.hours > 0 and plan.largest_micro_batch > 0 and set(plan.parameters) == {"DiT"}
    assert plan.memory["averaged weights"] == plan.memory["weights"] and plan.memory["frozen parts"] > 0


def test_a_model_that_is_not_here_is_taken_for_the_paper_s_and_a_shipped_one_is_read():
    assert sum("is taken for the paper's" in line for line in of(imagenet_dit_b).assumptions) == 1
    plan = of(drawings_dit_tiny)
    assert not any("paper" in line for line in plan.assumptions) and plan.vae.startswith("embedded")


def test_drawing_is_its_steps_twice_with_guidance_and_its_decoding():
    (once, encoding, _), (_, plain, hours), (_, guided, _) = (plan := of(imagenet_dit_b)).extra
    parts = {part.name: part.forward for part in plan.parts}
    assert once == "statistics, once" and encoding == 50_000 * (parts["VAE encode"] + parts["encoder"])
    assert guided - plain == DRAWN * STEPS * parts["DiT"] and plain > guided - plain
    assert hours == pytest.approx(plain / (8 * 989.4e12 * 0.4) / 3600, rel=1e-3)
    cached = of(imagenet_dit_b, cached=True)
    assert cached.extra[0][1] == 50_000 * parts["encoder"] and cached.extra[1:] == plan.extra[1:]


def test_pieces_repeat_nothing_and_take_less_memory():
    config = imagenet_dit_xl()
    config.micro_batch = 64
    pieces, whole = estimate(config, "", Options(gpus="8xh100"), advise=False), of(imagenet_dit_xl)
    assert pieces.sample_flops == whole.sample_flops and whole.fits is False and pieces.fits
    assert "--micro-batch 64" in [row["set"] for row in of(imagenet_dit_xl, advise=True).advice]


def test_the_protocol_at_512_px_is_the_same_recipe_with_four_times_the_tokens():
    config = imagenet_dit_b()
    config.size, config.classes = 512, "1000"
    larger, plan = estimate(config, "", Options(gpus="8xh100"), advise=False), of(imagenet_dit_b)
    assert larger.parameters == plan.parameters and 4 < larger.sample_flops / plan.sample_flops < 6
