"""Which weights decay, how they are stepped, and the rate of every step."""

from __future__ import annotations

import math

import pytest
import shapes
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from openvision3.train.optimizer import Muon, OptimizerConfig, Optimizers, orthogonal, parameter_groups, rate_at


def names_of(model: nn.Module, parameters) -> set[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in parameters}


def test_only_matrices_decay_and_every_trainable_parameter_is_in_one_group():
    model = shapes.tiny_model()
    groups = parameter_groups(model)
    decayed, plain = (names_of(model, groups[name]) for name in ("decayed", "plain"))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert decayed | plain == trainable and not decayed & plain
    assert len(groups["decayed"]) + len(groups["plain"]) == len(trainable)
    spared = ("bias", "positions", "log_temperature", "class_token", "embedding.weight")
    expected = {name for name in trainable if not name.endswith(spared) and "norm" not in name}
    assert decayed == expected
    assert {"encoder.patchify.weight", "encoder.blocks.0.attention.qkv.weight", "captioner.embed_tokens.weight"} <= decayed
    assert {"log_temperature", "encoder.class_token", "captioner.positions", "captioner.output_bias", "text_encoder.embedding.weight"} <= plain


def test_frozen_parameters_are_in_no_group_and_in_no_optimizer():
    model = shapes.tiny_model()
    model.text_encoder.requires_grad_(False)
    grouped = {id(p) for group in parameter_groups(model).values() for p in group}
    stepped = {id(p) for optimizer in Optimizers(model, OptimizerConfig(kind="muon")).all for group in optimizer.param_groups for p in group["params"]}
    for part in (model.vae, model.text_encoder):
        assert not {id(p) for p in part.parameters()} & (grouped | stepped)
    assert grouped == stepped


def test_without_a_gradient_signal_matrices_shrink_by_rate_times_decay_and_the_rest_stays():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = Optimizers(model, OptimizerConfig(weight_decay=0.5))
    optimizers.set_rate(0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers.step()
    after = dict(model.named_parameters())
    torch.testing.assert_close(after["0.weight"], before["0.weight"] * (1 - 0.1 * 0.5))
    assert all(torch.equal(after[name], before[name]) for name in ("0.bias", "1.weight", "1.bias"))


def test_adamw_is_the_formula_of_its_paper():
    model = nn.Linear(3, 2)
    config = OptimizerConfig(beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.3)
    optimizers = Optimizers(model, config)
    generator = torch.Generator().manual_seed(0)
    weight = model.weight.detach().double().clone()
    m = v = torch.zeros_like(weight)
    for t, rate in enumerate((0.1, 0.05, 0.2), 1):
        gradient = torch.randn(2, 3, generator=generator)
        model.weight.grad = gradient.clone()
        optimizers.set_rate(rate)
        optimizers.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        weight = weight * (1 - rate * 0.3) - rate * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-3)
        torch.testing.assert_close(model.weight.detach().double(), weight, rtol=1e-5, atol=1e-6)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = shapes.tiny_model()
    muon, adamw = Optimizers(model, OptimizerConfig(kind="muon")).all
    taken = names_of(model, [p for group in muon.param_groups for p in group["params"]])
    assert taken == {name for name, p in model.named_parameters() if p.requires_grad and ".blocks." in name and p.ndim == 2}
    rest = names_of(model, [p for group in adamw.param_groups for p in group["params"]])
    assert rest | taken == {name for name, p in model.named_parameters() if p.requires_grad} and not rest & taken


@given(
    steps=st.integers(2, 3000),
    share=st.floats(0, 0.99),
    peak=st.floats(1e-6, 1.0),
    at=st.floats(0, 1),
)
def test_the_rate_rises_over_the_warm_up_then_falls_to_zero_after_the_last_step(steps, share, peak, at):
    warmup = int(share * steps)
    config = OptimizerConfig(learning_rate=peak, warmup_steps=warmup)
    step = min(steps - 1, int(at * steps))
    rate, following = rate_at(step, config, steps), rate_at(step + 1, config, steps)
    assert 0 < rate <= peak
    assert rate <= following if step + 1 < warmup else rate >= following
    assert rate_at(max(0, warmup - 1), config, steps) == pytest.approx(peak)
    assert rate_at(steps, config, steps) == pytest.approx(0, abs=1e-12)
    middle = warmup + (steps - warmup) / 2
    if middle == int(middle):
        assert rate_at(int(middle), config, steps) == pytest.approx(peak / 2)


@given(step=st.integers(0, 10_000), warmup=st.integers(0, 10_000), steps=st.integers(1, 5000))
def test_the_rate_is_never_negative_nor_above_its_peak(step, warmup, steps):
    assert 0 <= rate_at(step, OptimizerConfig(learning_rate=0.3, warmup_steps=warmup), steps) <= 0.3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "sgd"),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", 0.0),
        ("clip", 0.0),
        ("clip", math.nan),
    ],
)
def test_an_illegal_setting_is_refused_by_name_with_the_value_seen(field, value):
    with pytest.raises(ValueError, match=rf"{field.removeprefix('beta')}.*{value}"):
        OptimizerConfig(**{field: value})


def test_muon_is_torchs_muon_but_for_the_precision_it_computes_in():
    generator = torch.Generator().manual_seed(0)
    shapes_taken = ((8, 24), (24, 8), (8, 8), (8, 24))
    starts = [torch.randn(shape, generator=generator) for shape in shapes_taken]
    ours, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    own = Muon(ours, learning_rate=0.02, weight_decay=0.1, dtype=torch.bfloat16)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for one, two in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            two.grad = one.grad.clone()
        own.step()
        other.step()
    for one, two, start in zip(ours, theirs, starts, strict=True):
        torch.testing.assert_close(one.data, two.data, atol=0.02 * float((two.data - start).abs().max()), rtol=0)


@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 64, 16), (1, 20, 20)])
def test_orthogonal_keeps_the_singular_vectors_and_brings_the_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonal(matrices)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.3 and values.max() < 1.3 and values.mean() == pytest.approx(1, abs=0.2)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    turned = u.transpose(1, 2) @ found @ v.transpose(1, 2)
    torch.testing.assert_close(turned, torch.diag_embed(torch.diagonal(turned, dim1=1, dim2=2)), atol=1e-3, rtol=0)


def test_a_gradient_of_zeros_moves_nothing_but_the_decay():
    weight = nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.zeros(3, 4)
    Muon([weight], learning_rate=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(weight.data, torch.full((3, 4), 0.95))
