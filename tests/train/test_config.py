"""Configs: strict, complete, and the same after a trip through JSON."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvision3.model.encoder import SIZES
from openvision3.settings import from_dict, load_config, save_config, to_dict, unknown
from openvision3.train.config import PretrainConfig
from openvision3.train.recipes import RECIPES

shares = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0])


@given(
    size=st.integers(1, 64).map(lambda n: 16 * n),
    data=st.lists(st.text(max_size=8), max_size=3).map(tuple),
    crop=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: (min(pair), max(pair))),
    rate=st.floats(1e-8, 10),
    encoder=st.sampled_from(sorted(SIZES)),
    shift=st.sampled_from([None, True, False]),
    share=shares,
    seed=st.integers(0, 2**63 - 1),
    minutes=st.floats(0, 1e6),
    aliases=st.booleans(),
    precision=st.sampled_from(["auto", "bf16", "fp32"]),
)
def test_a_config_is_the_same_after_json(size, data, crop, rate, encoder, shift, share, seed, minutes, aliases, precision):
    config = PretrainConfig(size=size, data=data, crop_area=crop, batch=8, pixel_share=share, seed=seed, minutes=minutes, aliases=aliases, precision=precision)
    config.model.encoder.size, config.model.vae.shift, config.optimizer.learning_rate = encoder, shift, rate
    assert from_dict(PretrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_a_saved_config_is_loaded_as_it_was(tmp_path):
    save_config(RECIPES["mini"](), tmp_path / "config.json")
    assert load_config(PretrainConfig, tmp_path / "config.json") == RECIPES["mini"]()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_gives_a_valid_config_with_a_command_in_its_docstring(name):
    config = RECIPES[name]()
    assert from_dict(PretrainConfig, to_dict(config)) == config  # builds it anew, so that every check runs
    assert config.optimizer.warmup_steps < config.steps
    assert f"openvision3 train {name}" in (RECIPES[name].__doc__ or "")
    assert RECIPES[name]() is not config


@pytest.mark.parametrize(
    ("values", "place", "near"),
    [
        ({"batchsize": 3}, "batchsize", "batch"),
        ({"model": {"encoder": {"patches": 2}}}, "model.encoder.patches", "model.encoder.patch"),
        ({"optimizer": {"lerning_rate": 1.0}}, "optimizer.lerning_rate", "optimizer.learning_rate"),
    ],
)
def test_an_unknown_field_fails_and_names_the_nearest(values, place, near):
    with pytest.raises(ValueError, match=rf"unknown field '{place}'\. Did you mean '{near}'\?$"):
        from_dict(PretrainConfig, values)


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        ({"batch": 2.5}, "batch must be int, not 2.5"),
        ({"batch": True}, "batch must be int, not True"),
        ({"batch": "8"}, "batch must be int"),
        ({"aliases": 1}, "aliases must be bool"),
        ({"minutes": "long"}, "minutes must be float"),
        ({"data": "openmoji"}, "data must be a list"),
        ({"data": [1]}, "data must be str, not 1"),
        ({"crop_area": [0.1, 0.5, 1.0]}, "crop_area must be a list of 2"),
        ({"precision": "fp16"}, "precision cannot be 'fp16'. Choose one of auto, bf16, fp32"),
        ({"model": 3}, "model must hold fields"),
        ({"model": {"encoder": {"size": "XXL"}}}, "unknown size 'XXL'"),
        ({"model": {"vae": {"shift": "no"}}}, "model.vae.shift must be bool"),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_place(values, seen):
    with pytest.raises(ValueError, match=seen):
        from_dict(PretrainConfig, values)


def test_a_whole_number_is_taken_where_a_float_is_wanted():
    assert from_dict(PretrainConfig, {"minutes": 5}).minutes == 5.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 100),
        ("size", 0),
        ("size", -16),
        ("steps", 0),
        ("batch", 0),
        ("captions", 0),
        ("vocabulary", 0),
        ("log_every", 0),
        ("keep", 0),
        ("save_every", -1),
        ("eval_every", -1),
        ("workers", -1),
        ("minutes", -1.0),
        ("minutes", math.inf),
        ("minutes", math.nan),
        ("pixel_share", 0.3),
        ("pixel_share", 2.0),
        ("pixel_share", -0.25),
        ("pixel_share", math.nan),
        ("pixel_share", 1 / 128),
        ("crop_area", (0.0, 1.0)),
        ("crop_area", (0.9, 0.4)),
        ("crop_area", (0.4, 1.1)),
        ("device", "mps"),
        ("precision", "fp16"),
        ("seed", -1),
        ("seed", 2**63),
        ("only", ("source",)),
    ],
)
def test_an_illegal_value_is_refused_by_name_with_the_value_seen(field, value):
    with pytest.raises(ValueError) as refused:
        PretrainConfig(**{field: value})
    message = str(refused.value)
    assert field in message and "\n" not in message
    assert str(value[0] if field == "only" else value) in message


def test_rules_are_split_at_the_first_equals_sign():
    assert PretrainConfig(only=("source=clipart", "url=a=b")).only_values == {"source": "clipart", "url": "a=b"}


def test_a_missing_or_broken_file_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such config"):
        load_config(PretrainConfig, tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_config(PretrainConfig, tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold fields"):
        load_config(PretrainConfig, tmp_path / "config.json")


def test_an_unknown_name_suggests_a_similar_one_or_none():
    assert "Did you mean 'mini'?" in str(unknown("recipe", "minni", RECIPES))
    assert "Did you mean" not in str(unknown("recipe", "qqqq", RECIPES))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": (1.0, 2.0)}, "weights 1 2: give one positive number for each of the 1 names in data"),
        ({"weights": (0.0,)}, "weights 0: give one positive number"),
        ({"weights": (1.0,), "families": True}, "set --no-families, or leave out --weights"),
        ({"cache_gb": 0.0}, "cache_gb 0.0 must be a positive number"),
    ],
)
def test_weights_and_cache_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**values)
