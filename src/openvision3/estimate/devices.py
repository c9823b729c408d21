"""Data sheets: the peak of each device without sparsity, as its maker states it. What no sheet states is unknown."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from openvision3.settings import unknown

NODE = 8
"""devices in one machine"""


@dataclass(frozen=True)
class Device:
    """One device. Speeds are operations and bytes a second, links count one direction; None is unknown."""

    name: str
    bf16: float | None
    fp32: float | None
    memory: float | None
    bandwidth: float | None
    link: float | None
    """bytes a second to other devices of the same machine"""
    network: float | None
    """bytes a second to other machines, the share of one device"""
    source: str

    @property
    def fused(self) -> bool:
        """Whether attention is one kernel that keeps no probabilities."""
        return self.name != "cpu"


_H100 = "NVIDIA H100 Tensor Core GPU data sheet (SXM5: 1,979 TFLOP/s bf16 with sparsity, half of it dense); network: DGX H100 data sheet, 8 x 400 Gb/s"
_A100 = "NVIDIA A100 data sheet (nvidia-a100-datasheet-us-nvidia-1758950-r4); network: DGX A100 data sheet, 8 x 200 Gb/s"

DEVICES = {
    d.name: d
    for d in (
        Device("h100", 989.4e12, 66.9e12, 80e9, 3.35e12, 450e9, 50e9, _H100),
        Device("h200", 989.4e12, 66.9e12, 141e9, 4.8e12, 450e9, 50e9, "NVIDIA H200 data sheet (SXM); network: DGX H200 data sheet, 8 x 400 Gb/s"),
        Device("a100", 312e12, 19.5e12, 80e9, 2.039e12, 300e9, 25e9, _A100 + "; SXM, 80 GB"),
        Device("a100-40gb", 312e12, 19.5e12, 40e9, 1.555e12, 300e9, 25e9, _A100 + "; SXM, 40 GB"),
        # HGX B200 sheet, for eight: 36 PFLOP/s bf16 with sparsity, 600 TFLOP/s fp32, 1.4 TB, 0.8 TB/s of network both ways
        Device("b200", 2250e12, 75e12, 180e9, 8e12, 900e9, 50e9, "NVIDIA HGX B200 data sheet, an eighth of the board"),
        Device("l40s", 362.05e12, 91.6e12, 48e9, 0.864e12, 32e9, None, "NVIDIA L40S data sheet; link: PCIe 4.0 x16, 64 GB/s both ways"),
        Device("4090", 165.2e12, 82.6e12, 24e9, 1.008e12, 32e9, None, "NVIDIA Ada GPU architecture white paper, table 2 (fp32 accumulate); link: PCIe 4.0 x16"),
    )
}
"""fp32 is ordinary fp32, not TF32, which torch leaves off by default."""


@dataclass(frozen=True)
class Devices:
    """`count` of one device in machines of up to `per_node`."""

    device: Device
    count: int = 1
    per_node: int = NODE

    @property
    def nodes(self) -> int:
        return -(-self.count // self.per_node)

    @property
    def in_node(self) -> int:
        return min(self.count, self.per_node)

    def __str__(self) -> str:
        machines = f", {self.nodes} machines" if self.nodes > 1 else ""
        return f"{self.count} x {self.device.name}{machines}"


def parse_devices(text: str, per_node: int = NODE) -> Devices:
    """Read h100, h100:8, 8xh100, 64xh100 or cpu; an empty text means this machine's device.

    Raises:
        ValueError: an unknown name, or a count that does not fill its machines.
    """
    text = text.strip().lower()
    if not text:
        return Devices(here())
    match = re.fullmatch(r"(?:(\d+)\s*x\s*)?([a-z0-9-]*[a-z0-9])(?::(\d+))?", text)
    if match is None or (match[1] and match[3]):
        raise ValueError(f"gpus {text!r} is not understood; write h100, 8xh100 or 64xh100")
    name, count = match[2], int(match[1] or match[3] or 1)
    if name == "cpu":
        device = this_processor()
    elif name in DEVICES:
        device = DEVICES[name]
    else:
        raise unknown("device", name, [*DEVICES, "cpu"])
    if count < 1 or per_node < 1:
        raise ValueError(f"{count} devices in machines of {per_node}: both must be at least 1")
    if count > per_node and count % per_node:
        raise ValueError(f"{count} devices do not fill machines of {per_node}; choose a multiple of {per_node}, or set --per-node")
    return Devices(device, count, per_node)


def here() -> Device:
    """The GPU of this machine, with its actual memory; without a GPU the processor."""
    import torch

    if torch.cuda.is_available():
        title = torch.cuda.get_device_name().lower().replace(" ", "")
        memory = float(torch.cuda.get_device_properties(0).total_memory)
        is_other = any(word in title for word in ("pcie", "nvl", "laptop", "gh200", "gb200"))  # slower or larger than the sheet of that name
        known = next((d for d in DEVICES.values() if d.name in title and not is_other), Device(title, None, None, memory, None, None, None, "not in the table"))
        return replace(known, memory=memory)
    return this_processor()


def this_processor() -> Device:
    """The processor: memory from the system, speed from half a second of matrix products, since no sheet states what torch reaches."""
    import time

    import torch

    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        side = 768
        a, b = torch.ones(side, side, dtype=dtype), torch.ones(side, side, dtype=dtype)
        shortest, tries, end = float("inf"), 0, time.perf_counter() + 0.25
        while tries < 2 or time.perf_counter() < end:
            start = time.perf_counter()
            torch.mm(a, b)
            shortest, tries = min(shortest, time.perf_counter() - start), tries + 1
        best[dtype] = 2.0 * side**3 / shortest
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    source = f"measured now on this machine: {torch.get_num_threads()} threads, products of {side} x {side}"
    return Device("cpu", best[torch.bfloat16], best[torch.float32], float(memory), None, None, None, source)
