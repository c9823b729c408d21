"""The path between tokens and noise, times, grids, samplers and guidance, each against its formula, and on a Gaussian whose solution is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openvision3.draws import draw_seed
from openvision3.generate import flow
from openvision3.generate.flow import FlowConfig, Sampling

SHAPE = (5, 3, 2)


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_path_goes_from_tokens_to_noise_with_the_velocity_of_their_difference():
    tokens, noise = normal(0), normal(1)
    zeros, ones = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    assert torch.equal(flow.interpolate(tokens, noise, zeros), tokens) and torch.equal(flow.interpolate(tokens, noise, ones), noise)
    step = 1e-3
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    slope = (flow.interpolate(tokens, noise, t + step) - flow.interpolate(tokens, noise, t - step)) / (2 * step)
    torch.testing.assert_close(slope, noise - tokens)


@pytest.mark.parametrize("predict", ["velocity", "tokens"])
def test_an_exact_prediction_has_the_exact_velocity_and_no_error(predict):
    config, tokens, noise = FlowConfig(predict=predict), normal(0), normal(1)
    t = torch.tensor([0.01, 0.3, 0.5, 0.7, 1.0], dtype=torch.float64)
    noisy = flow.interpolate(tokens, noise, t)
    prediction = tokens if predict == "tokens" else noise - tokens
    torch.testing.assert_close(flow.velocity_of(prediction, noisy, t, config), noise - tokens)
    assert flow.squared_errors(prediction, tokens, noise, t, config).abs().max() == 0


def test_clean_tokens_are_compared_as_velocities_down_to_the_least_time():
    config, tokens, noise, prediction = FlowConfig(predict="tokens", least_time=0.2), normal(0), normal(1), normal(2)
    t = torch.tensor([0.2, 0.3, 0.5, 0.7, 1.0], dtype=torch.float64)
    velocity = flow.velocity_of(prediction, flow.interpolate(tokens, noise, t), t, config)
    expected = (velocity - (noise - tokens)).square().mean((1, 2))
    torch.testing.assert_close(flow.squared_errors(prediction, tokens, noise, t, config), expected)
    early = flow.squared_errors(prediction, tokens, noise, torch.full((5,), 0.01, dtype=torch.float64), config)
    torch.testing.assert_close(early, (prediction - tokens).square().mean((1, 2)) / 0.04)


def test_the_shift_of_the_papers_sizes():
    assert flow.dimension_shift(16 * 16 * 768) == pytest.approx(6.928, abs=1e-3) and flow.dimension_shift(16 * 16 * 1024) == 8.0
    assert flow.dimension_shift(64 * 256) == 2.0 and flow.dimension_shift(4096) == flow.dimension_shift(100) == 1.0


@given(st.floats(0, 1), st.floats(1, 20))
def test_a_shift_keeps_the_ends_and_moves_towards_noise(t, shift):
    shifted = float(flow.shift_time(torch.tensor(t, dtype=torch.float64), shift))
    assert t - 1e-12 <= shifted <= 1
    if t < 0.999:  # odds of noise are multiplied by the shift
        assert shifted / (1 - shifted) == pytest.approx(shift * t / (1 - t), rel=1e-6)


def test_times_are_logit_normal_cut_and_shifted_and_depend_on_their_key_alone():
    keys = torch.tensor([draw_seed("row", i) for i in range(40_000)])
    config = FlowConfig(time_mean=-0.8, time_deviation=0.8)
    t = flow.draw_times(keys, config, shift=1.0).double()
    logits = torch.logit(t)
    assert float(logits.mean()) == pytest.approx(-0.8, abs=0.02) and float(logits.std()) == pytest.approx(0.8, abs=0.02)
    shifted = flow.draw_times(keys, config, shift=3.0).double()
    torch.testing.assert_close(shifted / (1 - shifted), 3 * t / (1 - t), rtol=1e-4, atol=0)
    assert torch.equal(flow.draw_times(keys[100:103], config, 1.0), t[100:103].float())
    late = flow.draw_times(keys[:2000], FlowConfig(time_mean=20.0), shift=4.0)
    assert float(late.max()) == pytest.approx(4 * flow.LAST / (1 + 3 * flow.LAST))


@given(st.integers(1, 200), st.floats(1, 20))
def test_a_full_grid_goes_down_from_noise_to_data(steps, shift):
    times = flow.time_grid(Sampling(steps=steps), shift)
    assert times[0] == 1 and times[-1] == 0 and len(times) == steps + 1
    assert all(a > b for a, b in itertools.pairwise(times))


def test_raes_grid_has_fifty_times_and_ends_where_theirs_does():
    times = flow.time_grid(Sampling(grid="rae49"), flow.dimension_shift(16 * 16 * 768))
    assert len(times) == 50 and times[0] == 1 and times[-1] == pytest.approx(0.0069, abs=5e-5)


MEAN, DEVIATION = 1.5, 0.4


def gaussian_velocity(x: torch.Tensor, t: float, mean: float = MEAN) -> torch.Tensor:
    """The expected velocity at x_t when every value of the data is N(mean, DEVIATION^2): noise and data given their weighted sum."""
    centred, variance = x - (1 - t) * mean, (1 - t) ** 2 * DEVIATION**2 + t**2
    return t / variance * centred - (mean + (1 - t) * DEVIATION**2 / variance * centred)


def gaussian_at(t: float, noise: torch.Tensor, mean: float = MEAN) -> torch.Tensor:
    """Where the flow has carried noise to at time t."""
    return (1 - t) * mean + math.sqrt((1 - t) ** 2 * DEVIATION**2 + t**2) * noise


def error(method: str, steps: int) -> float:
    """The flow carries noise z to MEAN + DEVIATION z."""
    noise = normal(3)
    found = flow.integrate(gaussian_velocity, noise, flow.time_grid(Sampling(steps=steps), 1.0), method)
    return float((found - (MEAN + DEVIATION * noise)).abs().max())


def test_samplers_solve_the_gaussian_euler_in_the_first_order_and_heun_in_the_second():
    euler, heun = [[error(method, steps) for steps in (40, 80)] for method in ("euler", "heun")]
    assert 1.7 < euler[0] / euler[1] < 2.3 and 3.2 < heun[0] / heun[1] < 5
    assert heun[0] < euler[0] / 5 and heun[1] < 1e-3


@pytest.mark.parametrize("shift", [1.0, 2.0, flow.dimension_shift(16 * 16 * 768)])
@pytest.mark.parametrize("sampling", [Sampling(steps=400), Sampling(steps=100, method="heun"), Sampling(steps=49, method="heun", grid="rae49")])
def test_every_grid_arrives_where_the_gaussian_is_at_its_last_time(sampling, shift):
    times, noise = flow.time_grid(sampling, shift), normal(3)
    found = flow.integrate(gaussian_velocity, noise, times, sampling.method)
    torch.testing.assert_close(found, gaussian_at(times[-1], noise), rtol=0, atol=0.04)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guidance_between_two_gaussians_of_one_deviation_draws_the_gaussian_of_the_extrapolated_mean(guidance):
    alone, noise = -0.5, normal(3)
    times = flow.time_grid(Sampling(steps=200), 1.0)
    found = flow.integrate(lambda x, t: flow.guided(gaussian_velocity(x, t), gaussian_velocity(x, t, alone), guidance), noise, times, "heun")
    torch.testing.assert_close(found, gaussian_at(0, noise, alone + guidance * (MEAN - alone)), rtol=0, atol=2e-3)


def test_heun_takes_the_velocity_twice_a_step_but_never_at_time_zero():
    seen: list[float] = []

    def velocity(x, t):
        seen.append(t)
        return gaussian_velocity(x, t)

    flow.integrate(velocity, normal(0), [1.0, 0.5, 0.0], "heun")
    assert seen == [1.0, 0.5, 0.5]


def test_each_step_is_reported_with_the_tokens_it_promises_and_the_last_with_the_answer():
    promised: list[torch.Tensor] = []
    numbers: list[int] = []
    answer = flow.integrate(lambda x, t: x, normal(0), [1.0, 0.6, 0.0], each=lambda number, tokens: (numbers.append(number), promised.append(tokens)))
    assert numbers == [1, 2] and torch.equal(promised[-1], answer)
    assert promised[0].abs().max() == 0  # from x the velocity x leads to 0 in a time of 1


def test_guidance_of_one_is_the_conditional_velocity_and_zero_the_other():
    one, other = normal(0), normal(1)
    torch.testing.assert_close(flow.guided(one, other, 1.0), one)
    torch.testing.assert_close(flow.guided(one, other, 0.0), other)
    torch.testing.assert_close(flow.guided(one, other, 3.0) - one, 2 * (one - other))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 0}, "steps 0"),
        ({"guidance": -1.0}, "guidance -1"),
        ({"guidance": math.nan}, "guidance nan"),
        ({"interval": (0.8, 0.2)}, "interval"),
        ({"grid": "rae49", "steps": 20}, "rae49 has 49 steps"),
        ({"method": "rk4"}, "method cannot be 'rk4'"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_sampling_refuses_what_it_cannot_do(fields, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**fields)


@pytest.mark.parametrize("fields", [{"shift": -1.0}, {"time_deviation": 0.0}, {"least_time": 0.0}, {"predict": "noise"}])
def test_flow_settings_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        FlowConfig(**fields)
