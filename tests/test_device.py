"""Which device, precision and compiler a command chooses, and what it says where it cannot."""

from __future__ import annotations

import pytest
import torch

from openvision3 import device
from openvision3.device import choose_compile, choose_device, choose_precision, measure_precision


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == "cuda"
    assert choose_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"


def test_a_gpu_of_several_is_chosen_by_number_and_one_that_is_not_there_is_refused_with_those_that_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == choose_device(torch.device("cuda", 1)) == "cuda:1"
    assert choose_device(torch.device("cuda")) == "cuda" and choose_device(torch.device("cpu")) == "cpu"
    with pytest.raises(ValueError, match=r"^device cuda:2 is not available: torch sees 2 GPUs; choose one of cuda:0, cuda:1$"):
        choose_device("cuda:2")
    for wrong in ("cuda:", "cuda:x", "cuda:-1", "cpu:1", "cuda:1:2", ""):
        with pytest.raises(ValueError, match="choose one of auto, cpu, cuda and cuda:N"):
            choose_device(wrong)


@pytest.mark.parametrize("asked", ["cuda", "cuda:0", "mps", "tpu"])
def test_a_device_that_cannot_be_used_is_refused_with_what_to_do(monkeypatch, asked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=rf"device '?{asked}.*cpu"):
        choose_device(asked)


def test_both_precisions_are_measured():
    speed = measure_precision("cpu", seconds=0.0)
    assert speed.keys() == {"fp32", "bf16"}
    assert all(0 < value < float("inf") for value in speed.values())


@pytest.mark.parametrize(("fp32", "bf16", "chosen"), [(10.0, 25.0, "bf16"), (25.0, 10.0, "fp32")])
def test_auto_takes_the_faster_and_says_by_how_much(monkeypatch, fp32, bf16, chosen):
    monkeypatch.setattr(device, "measure_precision", lambda device: {"fp32": fp32, "bf16": bf16})
    precision, why = choose_precision("auto", "cpu")
    assert precision == chosen
    assert f"{bf16 / fp32:.1f}x" in why


def test_a_precision_that_is_asked_for_is_not_measured(monkeypatch):
    monkeypatch.setattr(device, "measure_precision", None)
    assert choose_precision("fp32", "cpu")[0] == "fp32"
    assert choose_precision("bf16", "cpu")[0] == "bf16"


def test_a_gpu_s_precision_is_what_it_has_and_is_not_measured(monkeypatch):
    monkeypatch.setattr(device, "measure_precision", lambda device: 1 / 0)
    for has, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert choose_precision("auto", "cuda")[0] == precision


def test_blocks_are_compiled_on_a_gpu_where_there_is_what_compiles_them(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: object())
    assert choose_compile("auto", "cpu") == (False, "") and choose_compile("off", "cuda") == (False, "")
    compiled, why = choose_compile("auto", "cuda")
    assert not compiled and "a compiler (cc, gcc, clang) is not installed" in why
    with pytest.raises(ValueError, match=r"torch.compile needs a compiler .*set --compile off"):
        choose_compile("on", "cpu")
    monkeypatch.setattr(device.shutil, "which", lambda name: f"/bin/{name}")
    assert choose_compile("auto", "cuda") == (True, "") and choose_compile("on", "cpu") == (True, "")
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    assert choose_compile("auto", "cuda") == (False, "blocks are not compiled: triton is not installed")
