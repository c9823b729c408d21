"""The device and the precision that a command computes with, and whether it can use torch.compile."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import time
from pathlib import Path
from typing import Literal

import torch


def cores() -> int:
    """Number of cores this process may use, limited by its affinity and by its control group (a container's share)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = min(allowed, max(1, round(int(quota) / int(period))))  # without a quota it reads "max"
    return allowed


def choose_device(device: str | torch.device = "auto") -> str:
    """auto -> cuda if there is a GPU, else cpu; cuda:1 is the second GPU. Apple's MPS is not tested and therefore not chosen.

    Raises:
        ValueError: a GPU that does not exist, or another kind of device.
    """
    device = str(device)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (kind == "cpu" and number not in ("", "0")) or (":" in device and not (number.isascii() and number.isdigit())):
        raise ValueError(f"device {device!r} is not supported (MPS is not tested yet); choose one of auto, cpu, cuda and cuda:N, such as cuda:1")
    if kind == "cpu":
        return kind
    if not torch.cuda.is_available():
        raise ValueError(f"device {device} is not available: torch sees no GPU; use --device cpu, or install a CUDA build of torch")
    count = torch.cuda.device_count()
    if number and int(number) >= count:
        raise ValueError(
            f"device {device} is not available: torch sees {count} GPU{'s' * (count > 1)}; choose one of {', '.join(f'cuda:{n}' for n in range(count))}"
        )
    return f"{kind}:{int(number)}" if number else kind


def measure_precision(device: str = "cpu", seconds: float = 0.3) -> dict[str, float]:
    """Steps per second of a small convolution and a matrix product, forward and backward, in fp32 and in bf16."""
    generator, kind = torch.Generator().manual_seed(0), torch.device(device).type
    image = torch.randn(4, 32, 64, 64, generator=generator).to(device).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(32, 32, 3, 3, generator=generator).to(device).requires_grad_()
    rows, matrix = torch.randn(1024, 512, generator=generator).to(device), torch.randn(512, 512, generator=generator).to(device).requires_grad_()

    def step() -> None:
        out = torch.nn.functional.conv2d(image, kernel, padding=1).float().mean() + (rows @ matrix).float().mean()
        out.backward()
        if kind == "cuda":
            torch.cuda.synchronize(device)

    best = {"fp32": float("inf"), "bf16": float("inf")}
    deadline = time.perf_counter() + seconds
    tries = 0
    while tries < 4 or time.perf_counter() < deadline:  # alternating, so that a busy machine disturbs both alike
        for name in best:
            with torch.autocast(kind, torch.bfloat16, enabled=name == "bf16"):
                start = time.perf_counter()
                step()
                if tries:  # the first step of each is a warm-up
                    best[name] = min(best[name], time.perf_counter() - start)
        tries += 1
    return {name: 1 / value for name, value in best.items()}


def choose_precision(precision: Literal["auto", "bf16", "fp32"], device: str) -> tuple[Literal["bf16", "fp32"], str]:
    """(precision, reason): auto is bf16 on a GPU that has it, where a short measurement would only time kernel launches; elsewhere the faster one."""
    if precision != "auto":
        return precision, "as set"
    if device.startswith("cuda"):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU has bf16") if has_bf16 else ("fp32", "this GPU has no bf16")
    speed = measure_precision(device)
    return "bf16" if speed["bf16"] > speed["fp32"] else "fp32", f"measured: bf16 runs at {speed['bf16'] / speed['fp32']:.2g}x the speed of fp32"


def choose_compile(setting: Literal["auto", "on", "off"], device: str) -> tuple[bool, str]:
    """(whether to use torch.compile, why not): auto means on a GPU, if everything that it needs is installed.

    Raises:
        ValueError: `on`, but something is missing.
    """
    if setting == "off" or (setting == "auto" and device == "cpu"):
        return False, ""
    compilers = ("cc", "gcc", "clang") if device != "cpu" else ("c++", "g++", "clang++")
    named = os.environ.get("CC" if device != "cpu" else "CXX")
    missing = "" if named or any(map(shutil.which, compilers)) else f"a compiler ({', '.join(compilers)})"
    if device != "cpu" and importlib.util.find_spec("triton") is None:
        missing = "triton"
    if missing and setting == "on":
        raise ValueError(f"torch.compile needs {missing}, which is not installed; install it, or set --compile off")
    return not missing, f"blocks are not compiled: {missing} is not installed" if missing else ""


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of the parts that autocast does not reach: the VAE and Muon."""
    return torch.bfloat16 if precision == "bf16" else torch.float32
