"""Do two checkouts compute the same numbers, to the last bit?

    python tools/same_numbers.py BEFORE AFTER

Runs in both, through the command line alone: five steps of `tiny`, five of `mini_low_res` in two micro-batches, five and two steps of both phases of
`paper_base` at batch 2 (a random VAE of FLUX.1's shape), a run resumed from its middle, the same run begun by BEFORE and ended by AFTER, and
`evaluate all mini --count 24`. Compares every number of metrics.jsonl and results.json but times, and the bytes of every tensor that was trained.
About 15 minutes a checkout on two cores.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
import tyro
from PIL import Image
from safetensors.torch import load_file

from openvision3.estimate.planned import FLUX

SAME = ("--precision", "fp32", "--device", "cpu", "--compile", "off", "--seed", "0", "--log-every", "1", "--workers", "0")
TIMES = ("seconds", "per_second", "wait", "rate_", "memory", "samples_s", "minutes", "version", "environment", "machine", "command", "date", "openvision3")
"""Names that hold one of these are no results: they depend on the clock or name where the numbers were made."""


def openvision3(checkout: Path, *words: object) -> None:
    """One command of a checkout. Ends this program where it fails."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve() / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "openvision3", *map(str, words)]
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{checkout}: openvision3 {' '.join(map(str, words))} ended with {done.returncode}\n{done.stderr[-2000:]}")


def numbers_of(values: Any, name: str = "") -> dict[str, Any]:
    """Nested values -> {path: number or text}, without what depends on the clock or the place."""
    if any(word in name for word in TIMES):
        return {}
    if isinstance(values, dict):
        return {path: number for key, value in values.items() for path, number in numbers_of(value, f"{name}.{key}").items()}
    if isinstance(values, list):
        return {path: number for index, value in enumerate(values) for path, number in numbers_of(value, f"{name}[{index}]").items()}
    return {name: values}


def numbers_of_run(run: Path) -> dict[str, Any]:
    """Every row of metrics.jsonl, and a hash of every trained tensor of the last checkpoint."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(sorted((run / "checkpoints").iterdir())[-1] / "model.safetensors")
    hashes = {name: hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() for name, value in weights.items()}
    return numbers_of(rows) | hashes


def back_to_the_middle(run: Path) -> None:
    """Drop the last checkpoint, as if the run had been killed before it was written."""
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])


def measure(checkout: Path, place: Path, inputs: Path) -> dict[str, dict[str, Any]]:
    place.mkdir(parents=True)

    def train(recipe: str, *words: object, name: str = "") -> dict[str, Any]:
        run = place / (name or recipe)
        openvision3(checkout, "train", recipe, *SAME, *words, "--out", run)
        return numbers_of_run(run)

    numbers = {
        "tiny": train("tiny", "--steps", 5),
        "mini_low_res": train("mini_low_res", "--steps", 5, "--batch", 32, "--micro-batch", 16, "--data", "openmoji"),
    }
    paper: tuple[object, ...] = (
        "--model.vae.name",
        inputs / "vae",
        "--tokenizer",
        inputs / "words.json",
        "--data",
        "openmoji",
        "--batch",
        2,
        "--pixel-share",
        0.5,
    )
    paper = (*paper, "--eval-every", 0, "--optimizer.warmup-steps", 1, "--model.loss.perceptual", "efficientnet", "--val", inputs / "held_out")
    numbers["base_low_res"] = train("base_low_res", *paper, "--steps", 5)
    numbers["base_high_res"] = train("base_high_res", *paper, "--steps", 2, "--init", place / "base_low_res")
    shutil.rmtree(place / "base_high_res")
    shutil.rmtree(place / "base_low_res")  # some GB
    resumed = ("--steps", 6, "--save-every", 3, "--eval-every", 3)
    numbers["whole"] = train("tiny", *resumed, name="whole")
    shutil.copytree(place / "whole", place / "resumed")
    back_to_the_middle(place / "resumed")
    numbers["resumed"] = train("tiny", *resumed, "--resume", name="resumed")
    openvision3(checkout, "evaluate", "all", "mini", "--count", 24, "--device", "cpu", "--out", place / "evaluation")
    results = (place / "evaluation" / "results.json").read_text().replace(str(place), "OUT")  # a sentence names its own folder
    numbers["evaluate all"] = numbers_of(json.loads(results))
    return numbers


def write_inputs(checkout: Path, inputs: Path) -> None:
    """A VAE of FLUX.1's shape with random weights, a tokenizer and four held-out images."""
    inputs.mkdir(parents=True)
    torch.manual_seed(0)
    diffusers.AutoencoderKL.from_config(FLUX | {"scaling_factor": 0.3611, "shift_factor": 0.1159}).save_pretrained(inputs / "vae")  # type: ignore[attr-defined]
    shutil.copyfile(checkout / "src/openvision3/assets/mini/tokenizer.json", inputs / "words.json")
    (inputs / "held_out").mkdir()
    for number in range(4):
        Image.new("RGB", (256, 256), (60 * number, 200 - 50 * number, 90)).save(inputs / "held_out" / f"{number}.png")
        (inputs / "held_out" / f"{number}.txt").write_text(f"colour {number}")


def compare(what: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    unlike = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    print(f"{what}: {len(before)} values, {len(unlike)} differ")
    for name in sorted(unlike)[:10]:
        print(f"    {name}: {before.get(name)} before, {after.get(name)} after")
    return not unlike


def main(before: Path, after: Path, /, out: Path = Path("same_numbers")) -> int:
    """Exit code 0 where all numbers of two checkouts are the same.

    Args:
        before: one checkout
        after: the other
        out: a folder for runs and results; what BEFORE gave is kept there and not run again
    """
    inputs = out / "inputs"
    if not inputs.is_dir():
        write_inputs(before, inputs)
    kept = out / "before" / "numbers.json"
    first = json.loads(kept.read_text()) if kept.is_file() else measure(before, out / "before", inputs)
    kept.write_text(json.dumps(first))
    shutil.rmtree(out / "after", ignore_errors=True)
    numbers = [first, measure(after, out / "after", inputs)]
    same = [compare(what, numbers[0][what], numbers[1][what]) for what in numbers[0]]
    same.append(compare("resumed against whole", numbers[1]["whole"], numbers[1]["resumed"]))
    shutil.rmtree(out / "handed_over", ignore_errors=True)
    shutil.copytree(out / "before" / "whole", out / "handed_over")
    back_to_the_middle(out / "handed_over")
    openvision3(after, "train", "tiny", *SAME, "--steps", 6, "--save-every", 3, "--eval-every", 3, "--resume", "--out", out / "handed_over")
    same.append(compare("begun before, ended after", numbers[0]["whole"], numbers_of_run(out / "handed_over")))
    print("the same to the last bit" if all(same) else "NOT the same")
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=(__doc__ or "").split("\n\n")[0]))
