"""Start-up time, as ratios and differences taken in one run: `python benchmarks/start_up.py`.

Aims: `import openvision3` adds less than 1 s to `import torch`; `openvision3 --help` stays under 1.5 s.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import tyro

COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "import torch": [sys.executable, "-c", "import torch"],
    "import openvision3": [sys.executable, "-c", "import openvision3"],
    "import torch, openvision3, Pipeline": [sys.executable, "-c", "import torch, openvision3; openvision3.Pipeline"],
    "openvision3 --help": [sys.executable, "-m", "openvision3", "--help"],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(runs: int = 7) -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for run in range(runs + 1):
        for name, command in COMMANDS.items():  # in turn, so that a busy machine disturbs all alike
            value = seconds(command)
            if run:
                times[name].append(value)
    median = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(
            f"{name:38s} median {median[name]:.2f} s  (min {min(values):.2f}, max {max(values):.2f})  {median[name] / median['import torch']:.2f}x import torch"
        )
    print(f"openvision3.Pipeline adds {median['import torch, openvision3, Pipeline'] - median['import torch']:.2f} s to import torch")


if __name__ == "__main__":
    tyro.cli(main, description=Path(__file__).read_text().split('"""')[1])
