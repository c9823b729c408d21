"""The launch files start real runs: SLURM's on a SLURM of one machine, the others as far as they can be read without their service."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_runs import metrics, pictures

from openvision3.hub import complete_checkpoints

ROOT = Path(__file__).parent.parent
DAEMONS = ("munged", "slurmctld", "slurmd")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


@pytest.fixture
def slurm(tmp_path_factory, monkeypatch) -> Iterator[Path]:
    """A SLURM of this machine alone, with its own port, key and folder."""
    if os.geteuid() or not all(shutil.which(name) for name in (*DAEMONS, "sbatch", "srun")):
        pytest.skip("needs root and SLURM: apt-get install slurm-wlm munge")
    folder = Path("/tmp") / f"slurm-{os.getpid()}"  # a socket's path must be short
    folder.mkdir(mode=0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, ports=free_ports(2), cpus=os.cpu_count()))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    places = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    processes = [subprocess.Popen(["munged", "--force", "--foreground", f"--key-file={folder}/key", *places], stderr=subprocess.DEVNULL)]
    wait_for(lambda: (folder / "munge.socket").exists(), "munged")
    processes += [subprocess.Popen([name, "-D"], stderr=subprocess.DEVNULL) for name in ("slurmctld", "slurmd")]
    try:
        wait_for(lambda: "idle" in subprocess.run(["sinfo"], capture_output=True, text=True).stdout, "SLURM")
        yield folder
    finally:
        subprocess.run(["scancel", "--full", "--user", "root"], capture_output=True)
        time.sleep(1)
        for process in reversed(processes):
            process.terminate()
            process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(condition: Callable[[], object], what: str, seconds: int = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.5)


@pytest.mark.slow
def test_slurm_signals_the_ranks_which_save_and_the_job_queues_itself_again_and_ends(slurm, tmp_path, monkeypatch):
    pictures(tmp_path / "train", 24)
    pictures(tmp_path / "held", 3, seed=1)
    out, log = tmp_path / "run", tmp_path / "job.log"
    for name, value in {"RUN": out, "PYTHON": sys.executable, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, str(value))
    options = ["--ntasks-per-node", "2", "--gpus-per-node", "0", "--cpus-per-task", "1", "--time", "30", "--output", str(log)]
    recipe = ["tiny", "--data", str(tmp_path / "train"), "--val", str(tmp_path / "held"), "--size", "32", "--batch", "4", "--precision", "fp32"]
    more = ["--steps", "60", "--log-every", "1", "--save-every", "1000", "--device", "cpu", "--parallel", "fsdp"]
    done = subprocess.run(["sbatch", *options, str(ROOT / "launch" / "slurm.sbatch"), *recipe, *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[-1]

    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 2, "the first steps")
    subprocess.run(["scancel", "--signal", "USR1", job], check=True)
    wait_for(lambda: (out / "REQUEUE").exists(), "the mark of a saved run")
    saved = complete_checkpoints(out)[-1]
    stopped_at = int(saved.name.removeprefix("step-"))
    assert 2 < stopped_at < 60
    wait_for(lambda: "PD" in subprocess.run(["squeue", "-h", "-o", "%t"], capture_output=True, text=True).stdout, "the job in the queue again")
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)  # or it waits for two minutes
    wait_for(lambda: complete_checkpoints(out)[-1].name == "step-00000060", "the end of the run")

    text = log.read_text()
    assert f"SIGUSR1: saved at step {stopped_at} of 60" in text and f"continuing from {saved.name}" in text
    assert [row["step"] for row in metrics(out) if "train/loss" in row] == list(range(1, 61))
    assert not (out / "REQUEUE").exists()


def test_the_sbatch_file_names_the_run_folder_that_it_lacks(tmp_path):
    done = subprocess.run(["bash", str(ROOT / "launch" / "slurm.sbatch"), "tiny"], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode and "set RUN to the run folder" in done.stderr


def test_the_dockerfile_copies_what_the_build_needs():
    lines = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]}
    assert all((ROOT / name).exists() for name in copied)
    project = (ROOT / "pyproject.toml").read_text()
    assert set(re.findall(r'"(LICENSE|NOTICE)"', project)) | {"pyproject.toml", "README.md", "src"} <= copied
    pinned = re.search(r"torch==\S+", (ROOT / "constraints.txt").read_text())
    assert pinned and sum(pinned.group() in line for line in lines) == 1


def test_the_lowest_torch_that_is_allowed_is_the_one_that_is_tested():
    """2.11 and 2.12 lack collectives that several processes need: what is declared must be what was run."""
    declared = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    pinned = re.search(r"torch==([\d.]+)", (ROOT / "constraints.txt").read_text())
    assert declared and pinned and pinned.group(1).startswith(declared.group(1) + ".")


def test_the_shell_parts_of_the_launch_files_are_whole():
    text = (ROOT / "launch" / "skypilot.yaml").read_text()
    for part in ("setup", "run"):
        block = re.search(rf"^{part}: \|\n((?:  .*\n|\n)+)", text, re.M)
        assert block
        script = re.sub(r"^  ", "", block.group(1), flags=re.M)
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert subprocess.run(["bash", "-n", str(ROOT / "launch" / "slurm.sbatch")]).returncode == 0
