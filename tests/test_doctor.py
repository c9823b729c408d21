"""What `doctor` reports: what the machine has, what is missing, and a few training steps on it."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import warnings

import pytest
import torch
from PIL import features

from openvision3 import cli, doctor
from openvision3.cli.train import lines_of_a_trial
from openvision3.doctor import examine
from openvision3.generate import folder as generators
from openvision3.train import trial
from openvision3.understand import folder as chats


def test_what_is_missing_is_named_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "measure_precision", lambda device: {"fp32": 2.0, "bf16": 3.0})
    report = examine()
    assert report["torch"] == torch.__version__ and report["bf16_over_fp32"] == 1.5 and report["precision"] == "bf16"
    assert not any("VAE" in problem for problem in report["problems"])
    assert "mini" in report["shipped_models"] and report["shipped_generators"] == generators.shipped() and report["shipped_chats"] == chats.shipped()
    monkeypatch.setattr(features, "check", lambda name: False)
    monkeypatch.setattr("openvision3.hub.EMBEDDED", tmp_path)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    problems = examine()["problems"]
    for what, remedy in (("RAQM", "wheel"), ("EfficientNet", "pip install"), ("VAE", "install")):
        assert any(what in problem and remedy in problem for problem in problems), what


def test_a_trial_of_training_reports_losses_speed_and_memory_and_is_well(capsys):
    assert cli.main(["doctor", "--train", "--json", "--precision", "fp32", "--batch", "4"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["losses"]) == len(report["gradient_norms"]) == trial.STEPS and all(map(math.isfinite, report["losses"]))
    assert report["samples_per_second"] > 0 and report["peak_memory_gb"] > 0 and report["precision"].startswith("fp32")
    assert report["waits_per_step"] is None and report["collectives"] == {} and report["problems"] == []
    assert any("not measurable on a CPU" in line for line in lines_of_a_trial(report))


def test_a_trial_of_training_that_goes_wrong_says_what_and_ends_with_1(monkeypatch, capsys):
    report = {"losses": [1.0, math.nan], "gradient_norms": [1.0, 1.0], "waits": {"train.py:3": 6}, "waits_per_step": 3.0}
    wrong = {"all_gather": {"right": False, "gigabytes_per_second": 1.0}, "all_reduce": {"right": True, "gigabytes_per_second": 1.0}}
    problems = trial._problems(report | {"collectives": wrong}, "cuda")
    assert [line.split(";")[0] for line in problems] == [
        "the loss is not finite in step 2",
        "all_gather gives wrong numbers in process 0: check the network and NCCL before training",
        "the host waits for the GPU 3.0 times a step, and should once, for the log: train.py:3 (6)",
    ]
    seen = {"device": "cpu", "processes": 1, "parallel": "replicate", "precision": "fp32", "compile": "off", "peak_memory_gb": 1.0, "samples_per_second": 1.0}
    monkeypatch.setattr(trial, "try_training", lambda config: report | seen | {"collectives": wrong, "problems": problems})
    assert cli.main(["doctor", "--train"]) == 1
    out = capsys.readouterr().out
    assert "! the loss is not finite in step 2" in out and "WRONG" in out and "all is well" not in out


def test_waits_that_torch_warns_of_are_counted_by_line(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.warns(UserWarning, match="another"), trial.waits_of_the_host("cuda") as waits:
        warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, "/x/openvision3/train.py", 7)
        warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, "/x/openvision3/train.py", 7)
        warnings.warn("another", UserWarning, stacklevel=1)
    assert waits == {"train.py:7": 2} and modes == ["warn", "default"]


@pytest.mark.slow
def test_two_processes_try_training_and_their_collectives(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "openvision3", "doctor", "--train", "--json", "--device", "cpu", "--precision", "fp32", "--batch", "4"]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [subprocess.Popen(command, env=os.environ | group | {"RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE, text=True) for rank in ("0", "1")]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and outputs[1] == ""
    report = json.loads(outputs[0])
    assert report["processes"] == 2 and report["collectives"].keys() == {"all_reduce", "all_gather", "reduce_scatter"}
    assert all(collective["right"] and collective["gigabytes_per_second"] > 0 for collective in report["collectives"].values())
