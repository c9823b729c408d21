"""One process against several on this machine, one thread each: `python benchmarks/scale.py [--help]`.

Alternating runs of `openvision3 train mini_low_res` under torchrun (gloo): the whole run keeps its batch (strong), or each process keeps its
rows (weak). Efficiency is samples/s relative to one process, divided by the number of processes. If processes share one memory bus, it
includes what they lose to each other. The step seconds come from the runs' own metrics.jsonl.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass
class Options:
    processes: tuple[int, ...] = (2,)
    batch: int = 32
    """batch of one process, and of the whole run in `strong`"""
    steps: int = 10
    skip: int = 3
    """first steps of each run that are not counted"""
    runs: int = 3
    parallel: tuple[Literal["replicate", "fsdp"], ...] = ("replicate", "fsdp")
    precision: Literal["auto", "bf16", "fp32"] = "auto"


def rate(options: Options, processes: int, batch: int, parallel: str) -> float:
    """Samples a second of a real run."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        start = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
        command = [sys.executable, "-m", *start, "openvision3", "train", "mini_low_res", "--data", "openmoji", "--val", "openmoji", "--out", str(run)]
        command += ["--batch", str(batch), "--steps", str(options.steps), "--log-every", "1", "--save-every", "0", "--eval-every", "0"]
        command += ["--parallel", parallel, "--precision", options.precision] if processes > 1 else ["--precision", options.precision]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return statistics.median(row["samples_per_second"] for row in rows[options.skip :] if "samples_per_second" in row)


def main(options: Options) -> None:
    """Measure, and print one line for each way."""
    ways = [(1, options.batch, "replicate", "one process")]
    for processes in options.processes:
        for parallel in options.parallel:
            ways.append((processes, options.batch, parallel, f"{processes} processes, {parallel}, strong"))
            ways.append((processes, options.batch * processes, parallel, f"{processes} processes, {parallel}, weak"))
    rates_of: dict[str, list[float]] = {name: [] for *_, name in ways}
    for turn in range(options.runs):
        print(f"turn {turn + 1} of {options.runs}", flush=True)
        for processes, batch, parallel, name in ways:
            rates_of[name].append(rate(options, processes, batch, parallel))
    for processes, batch, _, name in ways:
        ratios = sorted(own / one for own, one in zip(rates_of[name], rates_of["one process"], strict=True))
        ratio = statistics.median(ratios)
        rates = f"{statistics.median(rates_of[name]):7.2f} samples/s"
        print(f"{name:34s} batch {batch:3d} {rates} {ratio:5.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})  efficiency {ratio / processes:4.0%}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=Path(__file__).read_text().split('"""')[1]))
