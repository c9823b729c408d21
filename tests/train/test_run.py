"""One run for any model: a second trainable, of which `train_run` knows nothing, trains, is resumed, and is divided among processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import Crash, assert_same_run, crash_at, metrics, saved_state
from torch import Tensor, nn

from openvision3.data.problems import Problems
from openvision3.hub import complete_checkpoints
from openvision3.settings import load_config
from openvision3.train import run as run_module
from openvision3.train.checkpoint import RunState
from openvision3.train.loop import Training
from openvision3.train.loop_config import LoopConfig
from openvision3.train.optimizer import OptimizerConfig
from openvision3.train.run import Start, train_run
from openvision3.train.run_folder import RunFolder

WEIGHTS = torch.tensor([[1.0, -2.0, 0.5]])


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 1)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (self.line(batch["x"]) - batch["y"]).square().mean()
        return loss, {"square": loss.detach()}


class Points:
    """Random points on a line; every row is a function of (seed, step), whichever rank has it."""

    pieces = 1

    def __init__(self, config: LoopConfig, start: Start):
        self.batch, self.seed, self.ranks, self.problems = config.batch, config.seed, start.ranks, Problems()

    def from_step(self, first_step: int) -> Iterator[dict[str, Tensor]]:
        step = first_step
        while True:
            x = torch.randn(self.batch, 3, generator=torch.Generator().manual_seed(1000 * self.seed + step))[self.ranks.rank :: self.ranks.world]
            yield {"x": x, "y": x @ WEIGHTS.T + 3}
            step += 1


class Regression(Training):
    """The second trainable: all that `train_run` has to be given."""

    def __init__(self, config: LoopConfig, start: Start):
        torch.manual_seed(config.seed)
        self.model, self.batches = Line(), Points(config, start)
        self.facts = {"rows": config.batch}

    def evaluate(self, step: int, run: RunFolder) -> dict[str, float]:
        return {"loss": (self.model.line.weight - WEIGHTS).square().sum().item()}

    def export(self, folder: Path, weights: dict[str, Tensor], state: RunState) -> None:
        folder.mkdir()
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")


def config_of(steps: int = 12, **changes) -> LoopConfig:
    optimizer = OptimizerConfig(learning_rate=0.3, warmup_steps=2, weight_decay=0.0, clip=100.0)
    return LoopConfig(optimizer, steps, **{"batch": 8, "precision": "fp32", "log_every": 2, "eval_every": 4, "save_every": 3, **changes})


def test_a_second_trainable_trains_through_the_same_run(tmp_path):
    outcome = train_run(config_of(200), Regression, tmp_path / "run")
    assert (outcome.status, outcome.steps, outcome.precision) == ("finished", 200, "fp32")
    weights = load_file(complete_checkpoints(tmp_path / "run")[-1] / "model.safetensors")
    assert weights["line.weight"].flatten().tolist() == pytest.approx(WEIGHTS[0].tolist(), abs=0.02) and weights["line.bias"].item() == pytest.approx(
        3, abs=0.02
    )
    rows = metrics(tmp_path / "run")
    assert {"train/loss", "train/square", "train/grad_norm", "rate", "samples"} <= rows[0].keys() and "val/loss" in rows[-1]
    assert load_config(LoopConfig, tmp_path / "run" / "config.json") == config_of(200)
    assert {"log.txt", "environment.json", "command.txt", "identities.json"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_a_run_of_any_kind_refuses_another_setting_and_a_second_run_in_its_folder(tmp_path):
    train_run(config_of(2), Regression, tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a run"):
        train_run(config_of(2), Regression, tmp_path / "run")
    with pytest.raises(ValueError, match=r"seed was 0 when .* cannot become 1"):
        train_run(config_of(2, seed=1, resume=True), Regression, tmp_path / "run")


def crash(monkeypatch, step: int, config: LoopConfig, out: Path, build: type[Training] = Regression) -> None:
    """A run that dies when `step` is done and before anything of it is written."""
    with monkeypatch.context() as patched, pytest.raises(Crash):
        crash_at(patched, step)
        train_run(config, build, out)


def test_a_crash_before_the_first_checkpoint_starts_over(tmp_path, monkeypatch):
    train_run(config_of(6), Regression, tmp_path / "whole")
    crash(monkeypatch, 3, config_of(6), tmp_path / "broken")
    assert metrics(tmp_path / "broken") and not complete_checkpoints(tmp_path / "broken")
    train_run(config_of(6, resume=True), Regression, tmp_path / "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_resumed_run_has_each_step_once(tmp_path, monkeypatch):
    often = {"log_every": 1, "save_every": 2}
    crash(monkeypatch, 4, config_of(7, **often), tmp_path / "run")
    crash(monkeypatch, 6, config_of(7, **often, resume=True), tmp_path / "run")
    train_run(config_of(7, **often, resume=True), Regression, tmp_path / "run")
    assert [row["step"] for row in metrics(tmp_path / "run") if "train/loss" in row] == list(range(1, 8))


def test_a_finished_run_that_is_resumed_changes_nothing(tmp_path):
    train_run(config_of(6), Regression, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes(), saved_state(complete_checkpoints(tmp_path / "run")[-1])["/model/line.weight"].tolist()
    assert train_run(config_of(6, resume=True), Regression, tmp_path / "run").steps == 6
    after = (tmp_path / "run" / "metrics.jsonl").read_bytes(), saved_state(complete_checkpoints(tmp_path / "run")[-1])["/model/line.weight"].tolist()
    assert after == before


def test_minutes_fix_the_steps_from_a_measured_rate_and_the_same_command_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "measure_steps", lambda training, config, compiled: (round(4 * config.minutes), 4 / 60))
    config = config_of(100, minutes=1.5)
    config.optimizer.warmup_steps = 50
    assert train_run(config, Regression, tmp_path).steps == 6
    stored = load_config(LoopConfig, tmp_path / "config.json")
    assert (stored.steps, stored.optimizer.warmup_steps, stored.minutes) == (6, 1, 1.5)
    assert "6 steps fill 1.5 minutes" in (tmp_path / "log.txt").read_text()
    config.resume = True
    for _ in range(2):
        assert train_run(config, Regression, tmp_path).steps == 6


class Judged(Regression):
    """Its val/loss at each step is given, and computed in way 2."""

    losses: ClassVar[dict[int, float]] = {}
    val_measure = 2

    def evaluate(self, step: int, run: RunFolder) -> dict[str, float]:
        return {"loss": self.losses[step]}


BEST = {"eval_every": 1, "save_every": 1, "keep": 1, "keep_best": 1}


def test_which_checkpoint_is_the_best_outlives_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(Judged, "losses", {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0})
    crash(monkeypatch, 4, config_of(4, **BEST), tmp_path, Judged)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    train_run(config_of(4, **BEST, resume=True), Judged, tmp_path)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]
    assert {row["step"]: row["val/loss"] for row in metrics(tmp_path) if "val/loss" in row} == Judged.losses


def test_a_val_loss_that_was_computed_otherwise_is_not_compared(tmp_path, monkeypatch):
    """As of a run that an older version began, whose checkpoints do not say how."""
    monkeypatch.setattr(Judged, "losses", {1: 0.1, 2: 3.0, 3: 2.0, 4: 4.0})
    crash(monkeypatch, 2, config_of(4, **BEST), tmp_path, Judged)
    (state,) = (tmp_path / "checkpoints").glob("*/run_state.json")
    record = json.loads(state.read_text())
    assert record.pop("val_measure") == 2
    state.write_text(json.dumps(record))
    train_run(config_of(4, **BEST, resume=True), Judged, tmp_path)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    assert (tmp_path / "log.txt").read_text().count("val/loss was computed otherwise until now") == 1


class Files(Regression):
    """A training whose input has a name that is a setting of its own (here: `init`), and a digest."""

    held = "the same"

    def __init__(self, config: LoopConfig, start: Start):
        super().__init__(config, start)
        self.recorded = start.check_inputs(config, lambda: {"init": self.held, "more": [1, 2]})


class FilesConfig(LoopConfig):
    PLACES = ("init",)


def test_a_run_of_any_kind_goes_on_where_its_input_has_moved_and_not_where_it_is_another(tmp_path, monkeypatch):
    def config(**changes) -> FilesConfig:
        return FilesConfig(steps=2, precision="fp32", **changes)

    train_run(config(init="here"), Files, tmp_path / "run")
    again = train_run(config(init="there", resume=True), Files, tmp_path / "run")
    assert again.training.recorded == {"init": "the same", "more": [1, 2]}
    assert "init now lies at there, and holds what it held at here" in (tmp_path / "run" / "log.txt").read_text()
    monkeypatch.setattr(Files, "held", "another")
    with pytest.raises(ValueError, match=r"^init: there no longer holds what it held"):
        train_run(config(init="there", resume=True), Files, tmp_path / "run")
    with pytest.raises(ValueError, match=r"^init was there when .* and cannot become here, which holds something else"):
        train_run(config(init="here", resume=True), Files, tmp_path / "run")


# -- real processes ------------------------------------------------------------------------------------------------

DRIVER = """
import os, signal, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
from pathlib import Path
from test_run import Regression, RunFolder, config_of, train_run
advance = RunFolder.advance
def dying(self, done):
    if done == 8 and sys.argv[3] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    advance(self, done)
RunFolder.advance = dying
train_run(config_of(resume=sys.argv[3] == "resume"), Regression, Path(sys.argv[2]))
"""

HERE = os.pathsep.join((str(Path(__file__).parent), str(Path(__file__).parents[1])))


def start(out: Path, what: str, processes: int = 1) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environments = [os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"} for rank in range(processes)]
    return [subprocess.Popen([sys.executable, "-c", DRIVER, HERE, str(out), what], env=env, stderr=subprocess.PIPE, text=True) for env in environments]


def finish(processes: list[subprocess.Popen]) -> tuple[list[int], str]:
    errors = [process.communicate(timeout=300)[1] for process in processes]
    return [process.returncode for process in processes], "".join(errors)[-3000:]


def test_a_second_trainable_that_is_killed_goes_on_bit_for_bit_and_two_processes_train_what_one_does(tmp_path):
    two = start(tmp_path / "two", "go", processes=2)
    killed = start(tmp_path / "killed", "kill")
    train_run(config_of(), Regression, tmp_path / "whole")
    assert finish(killed)[0] == [-signal.SIGKILL]
    assert complete_checkpoints(tmp_path / "killed")[-1].name < "step-00000009"
    codes, errors = finish(start(tmp_path / "killed", "resume"))
    assert codes == [0], errors
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    codes, errors = finish(two)
    assert codes == [0, 0], errors
    assert "2 processes, replicate: 4 of 8 rows each" in (tmp_path / "two" / "log.txt").read_text()
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "two"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
