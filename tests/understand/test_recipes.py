"""The recipes are one epoch of the published settings (arXiv 2310.03744, table 9), and all of them build a config."""

from __future__ import annotations

import pytest

from openvision3.settings import from_dict, to_dict
from openvision3.train.optimizer import rate_at
from openvision3.understand.config import LlavaConfig
from openvision3.understand.recipes import RECIPES


@pytest.mark.parametrize(
    ("name", "rate", "batch", "samples", "learns"),
    [
        ("llava15_align", 1e-3, 256, 558_128, "frozen"),
        ("llava15_instruct", 2e-5, 128, 665_298, "full"),
        ("llava_next_align", 1e-3, 256, 558_128, "frozen"),
        ("llava_next_instruct", 2e-5, 128, 779_289, "full"),
    ],
)
def test_published_settings(name, rate, batch, samples, learns):
    config = RECIPES[name]()
    assert (config.batch, config.train_language, config.precision, config.optimizer.weight_decay) == (batch, learns, "bf16", 0.0)
    assert 0 <= samples - config.steps * batch < batch
    rates = [rate_at(step, config.optimizer, config.steps) for step in range(config.steps)]
    assert max(rates) == rate and rates.index(rate) == round(0.03 * config.steps) - 1 and rates[-1] < rate / 1000


@pytest.mark.parametrize("name", RECIPES)
def test_a_config_is_read_as_it_was_written(name):
    config = RECIPES[name]()
    assert from_dict(LlavaConfig, to_dict(config)) == config
