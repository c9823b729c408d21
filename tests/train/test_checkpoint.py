"""Checkpoints: what goes in comes out, and only whole ones can be seen."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from small_runs import Crash, saved_state
from torch import nn

from openvision3.hub import complete_checkpoints
from openvision3.train import checkpoint
from openvision3.train.checkpoint import CheckpointError, RunState, Saver, load_checkpoint, read_state
from openvision3.train.optimizer import OptimizerConfig, Optimizers


class Net(nn.Module):
    """A frozen part, and blocks that Muon takes."""

    def __init__(self, width: int = 4, depth: int = 2, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(self.frozen(x))
        return self.norm(x).pow(3).mean()


def save_checkpoint(run: Path, model, optimizers, state: RunState, export, keep: int = 2, keep_best: int = 0) -> Path:
    """One save, waited for."""
    saver = Saver(run, model, optimizers, export, keep, keep_best)
    saver.save(state)
    saver.wait()
    return run / "checkpoints" / f"step-{state.step:08d}"


def trained(kind: str = "adamw", seed: int = 0, steps: int = 3, **size) -> tuple[Net, Optimizers]:
    model = Net(seed=seed, **size)
    optimizers = Optimizers(model, OptimizerConfig(kind=kind))
    step(model, optimizers, steps)
    return model, optimizers


def step(model: Net, optimizers: Optimizers, steps: int) -> None:
    for i in range(steps):
        model(torch.linspace(-1, 1 + i, model.norm.normalized_shape[0])[None]).backward()
        optimizers.set_rate(0.01)
        optimizers.step()
        optimizers.zero_grad()


def export(folder: Path, weights: dict, state: RunState) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"a model")


def save(run: Path, number: int = 3, kind: str = "adamw", keep: int = 2) -> Path:
    return save_checkpoint(run, *trained(kind), RunState(step=number), export, keep)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_going_on_from_a_checkpoint_equals_never_having_stopped(tmp_path, kind):
    model, optimizers = trained(kind)
    state = RunState(step=3, samples=12, skipped_steps=1, skipped_in_a_row=1, problems=2, seconds=0.1, window={"loss": 1 / 3}, window_steps=2)
    folder = save_checkpoint(tmp_path, model, optimizers, state, export, 2)
    other, others = trained(kind, seed=1, steps=1)
    with torch.no_grad():
        for one, two in zip(other.frozen.parameters(), model.frozen.parameters(), strict=True):
            one.copy_(two)
    assert load_checkpoint(folder, other, others) == state
    step(model, optimizers, 3)
    step(other, others, 3)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_checkpoint_goes_into_a_model_that_has_not_yet_been_stepped(tmp_path):
    model, optimizers = trained()
    folder = save_checkpoint(tmp_path, model, optimizers, RunState(step=3), export, 2)
    fresh = Net()
    others = Optimizers(fresh, OptimizerConfig())
    load_checkpoint(folder, fresh, others)
    step(model, optimizers, 2)
    step(fresh, others, 2)
    assert torch.equal(model.blocks[1].weight, fresh.blocks[1].weight)


def test_the_frozen_part_is_not_saved(tmp_path):
    names = saved_state(save(tmp_path))
    assert "/model/blocks.0.weight" in names and "/optimizer/state/blocks.0.weight/exp_avg" in names
    assert not any("frozen" in name for name in names)


def test_the_plain_model_lies_beside_the_state(tmp_path):
    assert (save(tmp_path) / "model.safetensors").read_bytes() == b"a model"


def test_only_the_newest_are_kept(tmp_path):
    for number in (1, 2, 10, 3):
        save(tmp_path, number, keep=2)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000003", "step-00000010"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_a_save_that_dies_on_the_way_is_not_seen_and_the_next_one_clears_it_away(tmp_path, monkeypatch):
    save(tmp_path, 1)
    for place, name in ((checkpoint.dcp, "save"), (checkpoint, "_flush"), (checkpoint.os, "replace")):
        with monkeypatch.context() as patched, pytest.raises(Crash):
            patched.setattr(place, name, _die)
            save(tmp_path, 2)
        assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000001"]
        assert len(list((tmp_path / "checkpoints").iterdir())) == 2, name
    save(tmp_path, 3)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000001", "step-00000003"]


def _die(*_, **__):
    raise Crash


def test_a_deletion_that_dies_on_the_way_leaves_no_half_checkpoint_in_sight(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)

    def half(path, **_):
        (Path(path) / "state" / ".metadata").unlink()
        raise Crash

    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(checkpoint.shutil, "rmtree", half)
        save(tmp_path, 3)
    found = complete_checkpoints(tmp_path)
    assert [p.name for p in found] == ["step-00000002", "step-00000003"]
    for folder in found:
        load_checkpoint(folder, *trained())


def test_a_step_that_is_saved_already_is_left_alone(tmp_path):
    folder = save(tmp_path)
    before = (folder / "run_state.json").stat().st_mtime_ns
    assert save(tmp_path) == folder
    assert (folder / "run_state.json").stat().st_mtime_ns == before


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _older(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))


def _another_field(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "red"}))


DAMAGE = {
    "one bit": ("state/__0_0.distcp", _flip, "state/__0_0.distcp is not as it was written"),
    "cut off": ("state/__0_0.distcp", lambda path: os.truncate(path, 2000), "state/__0_0.distcp is not as it was written"),
    "a file gone": ("state/__0_0.distcp", Path.unlink, "state/__0_0.distcp is not as it was written"),
    "no index": ("state/.metadata", Path.unlink, "state/.metadata is not as it was written"),
    "no state": ("state", lambda path: path.rename(path.with_name("elsewhere")), "No such file"),
    "not JSON": ("run_state.json", lambda path: path.write_text("{"), "run_state.json cannot be read"),
    "another version": ("run_state.json", _older, "checkpoint format 0, and this version of openvision3 reads 1"),
    "another field": ("run_state.json", _another_field, "colour"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_checkpoint_is_refused_in_one_line(tmp_path, damage):
    name, spoil, seen = DAMAGE[damage]
    folder = save(tmp_path)
    spoil(folder / name)
    for load in (lambda: read_state(folder), lambda: load_checkpoint(folder, *trained())):
        with pytest.raises(CheckpointError, match=seen) as refused:
            load()
        assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("other", "seen"),
    [({"depth": 3}, r"Missing key.*blocks\.2"), ({"depth": 1}, r"blocks\.1\.\w+, which this model does not have"), ({"width": 8}, "Size mismatch")],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, other, seen):
    folder = save(tmp_path)
    with pytest.raises(CheckpointError, match=f"does not fit this run: .*{seen}"):
        load_checkpoint(folder, *trained(**other))


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    folder = save(tmp_path)
    with pytest.raises(CheckpointError, match=r"Missing key.*momentum_buffer"):
        load_checkpoint(folder, *trained("muon"))


@pytest.mark.parametrize("place", ["export", "state"])
def test_no_space_left_is_one_line_that_names_what_is_still_there(tmp_path, monkeypatch, place):
    first = save(tmp_path, 1)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CheckpointError) as refused:
        if place == "state":
            monkeypatch.setattr(checkpoint.dcp, "save", full)
        save_checkpoint(tmp_path, *trained(), RunState(step=2), full if place == "export" else export, 2)
    message = str(refused.value)
    assert f"no space left on the disk at step 2; the last good checkpoint is {first}; make room and continue with --resume" in message and "\n" not in message
    assert os.listdir(tmp_path / "checkpoints") == [first.name]


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MB of our own."""
    place = tmp_path / "disk"
    place.mkdir()
    found = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True) if os.name == "posix" else None
    if found is None or found.returncode:
        pytest.skip("a disk of its own cannot be mounted here (needs root on Linux)")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full_keeps_the_last_good_checkpoint(disk):
    first = save(disk, 1)
    with open(disk / "filler", "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    with pytest.raises(CheckpointError, match="no space left on the disk at step 2; the last good checkpoint is"):
        save(disk, 2)
    assert os.listdir(disk / "checkpoints") == [first.name]
    load_checkpoint(first, *trained())
    (disk / "filler").unlink()
    assert save(disk, 2).name == "step-00000002"


def test_a_disk_that_cannot_be_written_to_keeps_the_last_good_checkpoint(disk):
    first = save(disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(CheckpointError, match=f"Read-only file system at step 2; the last good checkpoint is {first}"):
        save(disk, 2)
    load_checkpoint(first, *trained())


def test_a_place_that_cannot_hold_a_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Not a directory at step 3; there is no checkpoint yet"):
        save(tmp_path / "file")


def test_an_error_that_is_not_the_disks_comes_through_and_leaves_nothing(tmp_path):
    def wrong(folder: Path, *more) -> None:
        export(folder, *more)
        raise ValueError("a mistake of ours")

    with pytest.raises(ValueError, match="a mistake of ours"):
        save_checkpoint(tmp_path, *trained(), RunState(step=1), wrong, 2)
    assert os.listdir(tmp_path / "checkpoints") == []
