"""Two processes that share a batch are one process: the same losses, the same weights, the same end."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_runs import assert_same_run, metrics

from openvision3.hub import complete_checkpoints, load_vae

RATE = 1e-4
FINISH = ("--ema", "0.5", "--decoder-finish", "0.4", "--model.encoder.sum-blocks", "2", "--model.encoder.positions", "rope", "--model.encoder.qk-norm")
RATIO = ("--model.loss.gradient-ratio", "1", "--model.loss.equal-captions", "ignore", "--model.captioner.token-share", "0.5")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pictures of noise with captions of unequal length, one in three with a second caption."""
    folder = tmp_path_factory.mktemp("ranks")
    draw = random.Random(0)
    for name, count in (("train", 24), ("held", 3)):
        (folder / name).mkdir()
        rows = []
        for i in range(count):
            Image.frombytes("RGB", (40, 36), draw.randbytes(40 * 36 * 3)).save(folder / name / f"{i}.png")
            for _ in range(1 + (i % 3 == 0)):
                rows.append({"file": f"{i}.png", "caption": " ".join(draw.choices(("red", "green", "blue", "dark", "light"), k=1 + i % 7))})
        (folder / name / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(data: Path, out: Path, *more: str) -> list[str]:
    return [
        *("train", "tiny", "--data", str(data / "train"), "--val", str(data / "held"), "--size", "32", "--batch", "8", "--steps", "10", "--captions", "2"),
        *("--precision", "fp32", "--pixel-share", "0.5", "--model.loss.tau", "0.8", "--optimizer.kind", "adamw", "--optimizer.learning-rate", str(RATE)),
        *("--log-every", "1", "--save-every", "5", "--device", "cpu", "--out", str(out), *more),
    ]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def run(arguments: list[str], processes: int = 1) -> subprocess.CompletedProcess:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    done = subprocess.run([sys.executable, *start, "-m", "openvision3", *arguments], capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def alone(data) -> Path:
    run(command(data, data / "alone"))
    return data / "alone"


def assert_close(one: Path, other: Path, *, share_of_rate: float = 0.02, losses: float = 1e-4) -> None:
    """Losses to 1e-4 (the rounding of a step grows in those after it) and norms to 1e-3, weights to a share of the learning rate; but not key biases,
    whose true gradient is zero: there Adam steps on rounding.

    It does so wherever a gradient is near zero, in a few entries of a tensor, and in which depends on the processor: so the root mean square of the
    differences is held to the share, and each of them to twice the rate, by which two steps of opposite sign are apart. A sample lost or seen
    twice moves most entries by more than the share.
    """
    rows = [metrics(one), metrics(other)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for first, second in zip(*rows, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            near = {"rel": 1e-3} if name == "train/grad_norm" else {"rel": losses, "abs": 1e-7}
            assert first[name] == pytest.approx(second[name], **near), (first["step"], name)
    weights = [load_file(complete_checkpoints(run)[-1] / "model.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        difference = (value - weights[1][name]).abs()
        if name.endswith("qkv.bias"):
            width = len(value) // 3
            difference[width : 2 * width] = 0
        assert difference.pow(2).mean().sqrt() <= share_of_rate * RATE and difference.max() <= 2 * RATE, name


@pytest.mark.parametrize(
    "more",
    [
        ["--parallel", "replicate"],
        ["--parallel", "fsdp"],
        pytest.param(["--parallel", "fsdp", "--micro-batch", "2", "--checkpointing"], marks=pytest.mark.slow),
        pytest.param(["--parallel", "replicate", "--micro-batch", "1", "--workers", "2"], marks=pytest.mark.slow),
    ],
    ids=lambda more: "-".join(word.strip("-") for word in more),
)
def test_two_processes_train_what_one_does(data, alone, tmp_path, more):
    run(command(data, tmp_path / "two", *more), processes=2)
    assert_close(alone, tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("levers", [FINISH, RATIO], ids=["finish", "ratio"])
def test_changes_of_the_recipe_are_the_same_in_two_processes(data, tmp_path, levers):
    losses = 1e-3 if levers is RATIO else 1e-4  # the measured norms carry the rounding of each step into the weights of the next
    run(command(data, tmp_path / "one", *levers))
    for name, more in {"copies": ["--parallel", "replicate"], "shards": ["--parallel", "fsdp", "--micro-batch", "2", "--checkpointing"]}.items():
        run(command(data, tmp_path / name, *levers, *more), processes=2)
        assert_close(tmp_path / "one", tmp_path / name, losses=losses)


@pytest.mark.slow
def test_muon_on_shards_is_muon(data, tmp_path):
    run(command(data, tmp_path / "one", "--optimizer.kind", "muon"))
    run(command(data, tmp_path / "two", "--optimizer.kind", "muon", "--parallel", "fsdp"), processes=2)
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_two_machines_of_two_processes_train_what_one_process_does(data, alone, tmp_path):
    """hsdp: shards within a machine, copies between them. Each machine is a torchrun of its own."""
    port = str(free_port())
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", port]
    arguments = ["-m", "openvision3", *command(data, tmp_path / "four", "--parallel", "hsdp")]
    machines = [subprocess.Popen([*start, "--node-rank", str(node), *arguments], stderr=subprocess.PIPE, text=True, env=environment()) for node in range(2)]
    for machine in machines:
        _, errors = machine.communicate(timeout=400)
        assert machine.returncode == 0, errors[-3000:]
    assert "4 processes, hsdp" in (tmp_path / "four" / "log.txt").read_text()
    assert_close(alone, tmp_path / "four")


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(data, alone, tmp_path, before, after):
    out = tmp_path / "run"
    run(command(data, out, "--parallel", "fsdp"), before)
    last = complete_checkpoints(out)[-1]
    shutil.rmtree(last)  # as if it had died at step 9
    run([*command(data, out, "--parallel", "fsdp"), "--resume"], after)
    assert_close(alone, out)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "one by one"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_one_rank_stops_all_of_them_at_one_step_and_the_run_goes_on(data, alone, tmp_path, launcher, number):
    out = tmp_path / "run"
    arguments = [sys.executable, "-c", DRIVER, number.name, *command(data, out)]
    if launcher == "torchrun":
        script = tmp_path / "driver.py"
        script.write_text(DRIVER)
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), number.name, *command(data, out)]
        done = subprocess.run(start, capture_output=True, text=True, env=environment(), timeout=300)
        assert done.returncode == 1 and "exitcode  : 75" in done.stderr, done.stderr[-3000:]  # torchrun hides the codes of its ranks
    else:  # as srun starts them: the environment alone says who is who
        port = str(free_port())
        ranks = [
            subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment(RANK=str(r), WORLD_SIZE="2", MASTER_PORT=port)) for r in range(2)
        ]
        for rank in ranks:
            _, errors = rank.communicate(timeout=300)
            assert rank.returncode == 75, errors[-3000:]
    assert (out / "REQUEUE").is_file()
    assert [p.name for p in complete_checkpoints(out)] == ["step-00000004"]
    assert f"{number.name}: saved at step 4 of 10" in (out / "log.txt").read_text()
    run([*command(data, out), "--resume"], processes=2)
    assert not (out / "REQUEUE").exists()
    assert_close(alone, out)


DRIVER = """
import os, signal, sys
from openvision3 import cli, data
from openvision3.data import batches
number, argv = sys.argv[1], sys.argv[2:]
sys.argv = ["openvision3", *argv]
add_draws = batches.TrainingBatches.add_draws
def at_step(self, batch, step, rows):  # the micro-batch of step 4 reaches rank 1
    if step == 3 and os.environ["RANK"] == "1" and "--resume" not in argv:
        os.kill(os.getpid(), getattr(signal, number))
    return add_draws(self, batch, step, rows)
batches.TrainingBatches.add_draws = at_step
sys.exit(cli.main(argv))
"""


@pytest.mark.slow
def test_a_rank_that_is_killed_leaves_a_run_that_goes_on(data, alone, tmp_path):
    out = tmp_path / "run"
    script = tmp_path / "driver.py"
    script.write_text(DRIVER.replace("step == 3", "step == 7"))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), "SIGKILL", *command(data, out)]
    done = subprocess.run(start, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 1 and "SIGKILL" in done.stderr
    assert [p.name for p in complete_checkpoints(out)] == ["step-00000005"]
    run([*command(data, out), "--resume"], processes=2)
    assert_close(alone, out)


SHARDS = """
import os, sys, torch
from torch.distributed.tensor import DTensor
from openvision3 import cli
from openvision3.train import run
folder, argv = sys.argv[1], sys.argv[2:]
sys.argv = ["openvision3", *argv]
fit = run.fit
def told(value):
    sharded = isinstance(value, DTensor)
    return {"sharded": sharded, "rows": len(value), "whole": value.numel(), "here": (value.to_local() if sharded else value).numel()}
def watched(training, optimizers, *more):
    status = fit(training, optimizers, *more)
    model = training.model
    frozen = {name: p for name, p in model.named_parameters() if name.startswith("vae.")}
    free = {name: p for name, p in model.named_parameters() if name not in frozen}
    moments = {name: o.state[p]["exp_avg"] for name, p in free.items() for o in optimizers.all if p in o.state}
    torch.save({
        "trained": {name: told(p) for name, p in free.items()},
        "moments": {name: told(moment) for name, moment in moments.items()},
        "vae": {name: told(p) | {"value": p.detach(), "gradient": p.grad, "wanted": p.requires_grad} for name, p in frozen.items()},
    }, os.path.join(folder, os.environ["RANK"]))
    return status
run.fit = watched
sys.exit(cli.main(argv))
"""


@pytest.mark.slow
def test_with_fsdp_each_process_holds_its_share_of_what_is_trained_and_the_whole_frozen_vae(data, tmp_path):
    arguments = [sys.executable, "-c", SHARDS, str(tmp_path), *command(data, tmp_path / "run", "--parallel", "fsdp", "--steps", "2")]
    port = str(free_port())
    ranks = [subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment(RANK=str(r), WORLD_SIZE="2", MASTER_PORT=port)) for r in range(2)]
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors[-3000:]
    found = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    for kind in ("trained", "moments"):
        assert found[0][kind].keys() == found[1][kind].keys() == found[0]["trained"].keys()
        for name, one in found[0][kind].items():
            other = found[1][kind][name]
            assert one["sharded"] and other["sharded"] and one["here"] + other["here"] == one["whole"] == other["whole"], name
            assert max(one["here"], other["here"]) < one["whole"] or one["rows"] == 1, name  # a single row is not divided
    vae = dict(load_vae("embedded").named_parameters())
    for rank in found:
        assert {name.removeprefix("vae.") for name in rank["vae"]} == vae.keys()
        for name, value in rank["vae"].items():
            assert not value["sharded"] and value["gradient"] is None and not value["wanted"], name
            assert torch.equal(value["value"], vae[name.removeprefix("vae.")]), name


COMPILED = """
import sys
from torch._dynamo.utils import counters
from openvision3 import cli
code = cli.main(sys.argv[1:])
print("graphs:", counters["stats"]["unique_graphs"])
sys.exit(code)
"""


@pytest.mark.slow
def test_compiled_blocks_on_shards_give_the_losses_of_those_that_are_not(data, tmp_path):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler, and none is found here")
    script = tmp_path / "driver.py"
    script.write_text(COMPILED)
    arguments = {how: command(data, tmp_path / how, "--parallel", "fsdp", "--steps", "2", "--compile", how) for how in ("off", "on")}
    run(arguments["off"], processes=2)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), *arguments["on"]]
    done = subprocess.run(start, capture_output=True, text=True, env=environment(TORCHINDUCTOR_COMPILE_THREADS="1"), timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    graphs = [int(line.removeprefix("graphs: ")) for line in done.stdout.splitlines() if line.startswith("graphs: ")]
    assert len(graphs) == 2 and all(graphs)
    plain, compiled = metrics(tmp_path / "off"), metrics(tmp_path / "on")
    assert [row["step"] for row in plain] == [row["step"] for row in compiled] == [1, 2, 2]
    for one, other in zip(plain, compiled, strict=True):
        assert one.keys() == other.keys()
        for name in ("train/loss", "train/latent", "train/pixel", "train/contrastive", "train/caption", "val/loss"):
            assert name not in one or one[name] == pytest.approx(other[name], rel=1e-4), (one["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["replicate", "fsdp"])
def test_two_processes_that_are_killed_and_go_on_equal_two_that_were_not_bit_for_bit(data, tmp_path, parallel):
    script = tmp_path / "driver.py"
    script.write_text(DRIVER.replace("step == 3", "step == 4"))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), "SIGKILL"]
    whole, broken = (
        command(data, tmp_path / name, "--parallel", parallel, "--steps", "6", "--save-every", "3", "--eval-every", "2", "--log-every", "2")
        for name in ("whole", "broken")
    )
    run(whole, processes=2)
    done = subprocess.run([*start, *broken], capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 1 and "SIGKILL" in done.stderr
    assert [p.name for p in complete_checkpoints(tmp_path / "broken")] == ["step-00000003"]  # between two lines
    run([*broken, "--resume"], processes=2)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def together(script: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Two processes of a script of ours."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), *arguments]
    return subprocess.run(start, capture_output=True, text=True, env=environment(), timeout=300)


ONE_MISSES = """
import os, sys
from datetime import timedelta
from openvision3 import cli, distributed
from openvision3.data.images import ImageError
from openvision3.data.folders import FolderSource
from openvision3.train import open_data
distributed.TIMEOUT, open_data.ROWS = timedelta(seconds=60), 2
read = FolderSource.data
def data(self, index):
    if self.labels == ["held"] and index == 1 and os.environ["RANK"] == "1":
        raise ImageError("unreadable", "Input/output error")
    return read(self, index)
FolderSource.data = data
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_held_out_image_that_one_process_of_a_sharded_model_cannot_read_is_left_out_by_both(data, tmp_path):
    """Of three images in rows of two, rank 0 has two parts to compute and rank 1 one: unless they agree, each waits for the other."""
    script = tmp_path / "driver.py"
    script.write_text(ONE_MISSES)
    steps = ("--steps", "2", "--eval-every", "1")
    done = together(script, *command(data, tmp_path / "two", "--parallel", "fsdp", *steps))
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(data / "held", tmp_path / "held")
    (tmp_path / "held" / "1.png").unlink()
    run([*command(data, tmp_path / "one", *steps), "--val", str(tmp_path / "held")])
    two, one = ([row for row in metrics(tmp_path / name) if "val/loss" in row] for name in ("two", "one"))
    assert [row["step"] for row in two] == [row["step"] for row in one] == [1, 2]
    for first, second in zip(two, one, strict=True):
        assert first.pop("val/skipped") == 1
        assert first == pytest.approx(second, rel=1e-4)


OWN_DISKS = """
import os, sys
from openvision3 import cli
sys.exit(cli.main([*sys.argv[2:], "--out", os.path.join(sys.argv[1], "node" + os.environ["RANK"])]))
"""


@pytest.mark.slow
def test_a_run_folder_that_one_process_does_not_see_is_told_of_and_the_run_trains_starts_another_but_does_not_go_on(data, tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(OWN_DISKS)
    words = [word for word in command(data, tmp_path, "--steps", "2") if word not in ("--out", str(tmp_path))]
    done = together(script, str(tmp_path), *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "process 1 does not see" in (tmp_path / "node0" / "log.txt").read_text()
    assert [path.name for path in complete_checkpoints(tmp_path / "node0")] == ["step-00000002"] and not (tmp_path / "node1").exists()
    done = together(script, str(tmp_path), *words, "--resume")
    lines = [line for line in done.stderr.splitlines() if line.startswith("openvision3:")]
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("openvision3: process 1 does not see "), done.stderr[-3000:]
    script.write_text(
        OWN_DISKS.replace('sys.argv[2:], "--out"', 'sys.argv[2:], "--init", sys.argv[1] + "/node" + "0x"[int(os.environ["RANK"])], "--out"').replace(
            '"node" +', '"next" +'
        )
    )
    done = together(script, str(tmp_path), *words)  # as the second phase of a recipe does: rank 0 reads, and sends
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_bad_input_is_one_line_however_many_processes_read_it(data, tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "openvision3"]
    done = subprocess.run([*start, *command(data, tmp_path / "run", "--batch", "7")], capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("openvision3:")]
    assert lines == ["openvision3: batch 7 cannot be divided among 2 processes; choose a positive multiple of 2, such as 8"]
    assert not (tmp_path / "run").exists()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
