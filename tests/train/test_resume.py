"""A run that dies and goes on is, bit for bit, the run that never died."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_runs import Crash, assert_same_run, crash_at, metrics, pictures, saved_state, small

from openvision3.data.text import TextTokenizer
from openvision3.hub import complete_checkpoints
from openvision3.model import vae as vae_module
from openvision3.settings import load_config
from openvision3.train import identities
from openvision3.train import run as run_module
from openvision3.train.config import PretrainConfig
from openvision3.train.pretrain import pretrain


def go_on(config):
    config.resume = True
    return pretrain(config, "tiny")


@pytest.mark.parametrize("kind", [pytest.param("adamw", marks=pytest.mark.slow), "muon"])
def test_a_crash_between_two_checkpoints_leaves_no_trace(tmp_path, monkeypatch, kind):
    runs = [small(tmp_path, name) for name in ("whole", "broken")]
    for config in runs:
        config.optimizer.kind = kind
    for name in ("train/04a.png", "train/04b.png", "held/01a.png"):
        (tmp_path / name).write_bytes(b"no image")
    pretrain(runs[0], "tiny")
    assert len((Path(runs[0].out) / "skipped.jsonl").read_text().splitlines()) == 3
    with monkeypatch.context() as patched, pytest.raises(Crash):
        crash_at(patched, 5)
        pretrain(runs[1], "tiny")
    assert complete_checkpoints(runs[1].out)[-1].name == "step-00000003"  # in the middle of a line's window: logged every 2
    assert go_on(runs[1]).status == "finished"
    assert_same_run(runs[0].out, runs[1].out)


def test_a_crash_in_bf16_leaves_no_trace(tmp_path, monkeypatch):
    whole, broken = (small(tmp_path, name, precision="bf16", batch=2, steps=2, save_every=1, pixel_share=0.5) for name in ("whole", "broken"))
    pretrain(whole, "tiny")
    with monkeypatch.context() as patched, pytest.raises(Crash):
        crash_at(patched, 2)
        pretrain(broken, "tiny")
    assert [p.name for p in complete_checkpoints(broken.out)] == ["step-00000001"]
    assert go_on(broken).precision == "bf16"
    assert_same_run(whole.out, broken.out)


def test_a_run_does_not_start_over_beside_a_checkpoint_that_another_process_wrote_while_it_was_opened(tmp_path, monkeypatch):
    """The process that is told to stop writes its last checkpoint while the one that goes on is already reading."""
    config, other = (small(tmp_path, name, batch=2, steps=2, save_every=1, pixel_share=0.5) for name in ("run", "other"))
    with monkeypatch.context() as patched, pytest.raises(Crash):
        crash_at(patched, 1)
        pretrain(config, "tiny")
    pretrain(other, "tiny")
    set_up = run_module.set_up

    def late(*arguments):
        setup = set_up(*arguments)
        shutil.copytree(Path(other.out) / "checkpoints", Path(config.out) / "checkpoints", dirs_exist_ok=True)
        return setup

    with monkeypatch.context() as patched, pytest.raises(ValueError, match=r"another process has written to .* start again with --resume"):
        patched.setattr(run_module, "set_up", late)
        go_on(config)
    assert go_on(config).steps == 2


def test_a_crash_before_the_first_checkpoint_of_a_second_phase_starts_over_from_the_weights_of_the_first(tmp_path, monkeypatch):
    first, whole, broken = (small(tmp_path, name) for name in ("first", "whole", "broken"))
    pretrain(first, "tiny")
    whole.init = broken.init = first.out
    pretrain(whole, "tiny")
    with monkeypatch.context() as patched, pytest.raises(Crash):
        crash_at(patched, 2)
        pretrain(broken, "tiny")
    assert not complete_checkpoints(broken.out)
    go_on(broken)
    assert_same_run(whole.out, broken.out)


@pytest.mark.parametrize(("before", "after"), [pytest.param(0, 2, marks=pytest.mark.slow), (2, 1)])
def test_a_run_goes_on_with_another_number_of_workers(tmp_path, monkeypatch, before, after):
    whole, broken = small(tmp_path, "whole"), small(tmp_path, "broken", workers=before)
    pretrain(whole, "tiny")
    with monkeypatch.context() as patched, pytest.raises(Crash):
        crash_at(patched, 5)
        pretrain(broken, "tiny")
    broken.workers = after
    go_on(broken)
    assert_same_run(whole.out, broken.out)


def test_unusable_samples_are_counted_and_listed_once_however_often_a_run_goes_on(tmp_path, monkeypatch):
    for folder in ("train", "held"):
        pictures(tmp_path / folder, 3)
        (tmp_path / folder / "99.png").write_bytes(b"no image")
        (tmp_path / folder / "99.txt").write_text("a word")
    whole, broken = small(tmp_path, "whole", eval_every=2), small(tmp_path, "broken", eval_every=2)
    pretrain(whole, "tiny")
    for step in (2, 4, 5, 7):
        with monkeypatch.context() as patched, pytest.raises(Crash):
            crash_at(patched, step)
            pretrain(broken, "tiny")
        broken.resume = True
    go_on(broken)
    assert_same_run(whole.out, broken.out)
    listed = (tmp_path / "broken" / "skipped.jsonl").read_text().splitlines()
    assert len(listed) == len(set(listed)) == 2
    assert metrics(broken.out)[-2]["skipped_samples"] == 2


def test_what_another_batch_leaves_as_the_recipe_has_it_is_said_once(tmp_path):
    config = small(tmp_path, "run", batch=4, steps=1, eval_every=0)
    pretrain(config, "tiny")
    go_on(config)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert (
        log.count("batch 4, while tiny has 8; these settings are still the recipe's, for its own batch: learning rate 0.003 (--optimizer.learning-rate)") == 1
    )


# -- data that lie elsewhere -----------------------------------------------------------------------------------------


def write_shard(folder: Path, name: str, shard: Path) -> Path:
    """The images and texts of `folder` as the one shard `name`."""
    shard.mkdir()
    with tarfile.open(shard / name, "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    return shard / name


def test_a_run_goes_on_bit_for_bit_where_all_it_reads_lies_under_another_path(tmp_path, monkeypatch, capfd):
    def make(out: str) -> PretrainConfig:
        config = small(tmp_path, out, steps=6, eval_every=2)
        config.data = (*config.data, str(tmp_path / "shards"))
        config.tokenizer, config.model.vae.name = str(tmp_path / "words.json"), str(tmp_path / "vae")
        return config

    write_shard(pictures(tmp_path / "more", 3, seed=2), "00000.tar", tmp_path / "shards")
    for folder in ("train", "held"):
        (pictures(tmp_path / folder, 0) / "99.png").write_bytes(b"no image")
        (tmp_path / folder / "99.txt").write_text("a word")
    TextTokenizer.train(["red green blue dark light"], 300).save(tmp_path / "words.json")
    shutil.copytree(Path(vae_module.__file__).parents[1] / "assets" / "vae", tmp_path / "vae")
    pretrain(make("whole"), "tiny")
    broken = make("broken")
    with monkeypatch.context() as patched, pytest.raises(Crash):
        crash_at(patched, 5)
        pretrain(broken, "tiny")
    away = tmp_path / "another mount"
    away.mkdir()
    names = {"train": "images", "held": "val", "shards": "tars", "words.json": "vocabulary.json", "vae": "a vae"}
    for before, after in names.items():
        shutil.move(tmp_path / before, away / after)
    broken.data, broken.val = (str(away / "images"), str(away / "tars" / "*.tar")), (str(away / "val"),)
    broken.tokenizer, broken.model.vae.name = str(away / "vocabulary.json"), str(away / "a vae")
    capfd.readouterr()
    assert go_on(broken).status == "finished"
    assert_same_run(tmp_path / "whole", broken.out)
    assert (Path(broken.out) / "skipped.jsonl").read_text().count("\n") == 2  # each once, under one name
    said = capfd.readouterr().err
    assert f"val now lies at {away / 'val'}, and holds what it held at {tmp_path / 'held'}" in said
    assert said.count(" now lies at ") == 4
    now = load_config(PretrainConfig, Path(broken.out) / "config.json")
    assert (now.data, now.val, now.tokenizer, now.model.vae.name) == (broken.data, broken.val, broken.tokenizer, broken.model.vae.name)


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A folder with a run of two steps in `run`."""
    root = tmp_path_factory.mktemp("begun")
    pretrain(small(root, "run", steps=2, save_every=1), "tiny")
    return root


@pytest.fixture
def copied(begun, tmp_path) -> PretrainConfig:
    """What goes on with a copy of that run; its images lie where they lay."""
    shutil.copytree(begun / "run", tmp_path / "run")
    config = small(begun, "run", steps=2, save_every=1, resume=True)
    config.out = str(tmp_path / "run")
    return config


def files_of(run: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(run).rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("field", ["data", "val", "tokenizer"])
def test_a_run_does_not_go_on_with_something_else_under_another_path(copied, tmp_path, field):
    if field == "tokenizer":
        TextTokenizer.train(["other words"], 300).save(tmp_path / "words.json")
        copied.tokenizer = other = str(tmp_path / "words.json")
    else:
        other = str(pictures(tmp_path / "other", {"data": 10, "val": 3}[field], seed=5))
        setattr(copied, field, (other,))
    before = files_of(copied.out)
    with pytest.raises(ValueError, match=f"^{field} was .* and cannot become {other}, which holds something else; name where the same lies now with --{field}"):
        pretrain(copied, "tiny")
    assert files_of(copied.out) == before


@pytest.mark.parametrize(("field", "changed"), [("data", "0.png"), ("data", "0.txt"), ("val", "0.png")])
def test_a_run_does_not_go_on_with_something_else_under_the_old_path(copied, field, changed):
    path = Path(getattr(copied, field)[0]) / changed
    kept = path.read_bytes()
    try:
        if changed.endswith(".txt"):
            path.write_text("another word")
        else:
            Image.new("RGB", (40, 36), (1, 2, 3)).save(path)
        with pytest.raises(ValueError, match=f"^{field}: {path.parent} no longer holds what it held when {copied.out} was started; put that back"):
            pretrain(copied, "tiny")
    finally:
        path.write_bytes(kept)


def test_a_run_of_an_older_version_goes_on_with_the_old_paths_only_and_says_why(copied, tmp_path):
    (Path(copied.out) / identities.FILE).unlink()
    same = copied.val
    copied.val = (str(shutil.copytree(same[0], tmp_path / "val")),)
    with pytest.raises(ValueError, match=r"^val was .* and cannot become .*: an older version started it, and did not record what lay there"):
        pretrain(copied, "tiny")
    copied.val = same
    assert pretrain(copied, "tiny").status == "finished"
    copied.val = (str(tmp_path / "val"),)  # it is recorded from now on
    assert pretrain(copied, "tiny").status == "finished"


# -- real processes ------------------------------------------------------------------------------------------------

DRIVER = """
import os, signal, sys
from openvision3 import cli
from openvision3.train import checkpoint, held_out, pretrain
from openvision3.train.run_folder import RunFolder
what, step, argv = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
sys.argv = ["openvision3", *argv]
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
advance, replace, rmtree, save = RunFolder.advance, os.replace, checkpoint.shutil.rmtree, checkpoint.dcp.save
evaluation = pretrain.quick_evaluation
def at_step(self, done):
    if done == step:
        os.kill(os.getpid(), getattr(signal, what))
    advance(self, done)
def at_rename(source, target):
    if str(target).endswith(f"step-{step:08d}"):
        die()
    replace(source, target)
def in_deletion(path, **how):
    if ".old-" in str(path) and os.path.exists(path):
        os.unlink(os.path.join(path, "state", "__0_0.distcp"))
        die()
    rmtree(path, **how)
def half_written(tensors, checkpoint_id, **how):
    save(tensors, checkpoint_id=checkpoint_id, **how)
    if f"-{step:08d}" in checkpoint_id:
        os.unlink(os.path.join(checkpoint_id, ".metadata"))
        os.truncate(os.path.join(checkpoint_id, "__0_0.distcp"), 2000)
        die()
def in_evaluation(*values):
    if values[3].stem == f"step-{step:08d}":
        held_out.evaluate_retrieval = die
    return evaluation(*values)
if what.startswith("SIG"):
    RunFolder.advance = at_step
elif what == "nan":
    import torch
    from openvision3.train.optimizer import Optimizers
    stepped, steps = Optimizers.step, [0]
    def spoil(self):
        stepped(self)
        steps[0] += 1
        if steps[0] == step:  # from here on every loss is NaN
            torch.nn.Conv2d.forward = lambda self, x: torch.nn.functional.conv2d(x, self.weight * float("nan"), self.bias, self.stride, self.padding)
    Optimizers.step = spoil
elif what == "rename":
    os.replace = at_rename
elif what == "deletion":
    checkpoint.shutil.rmtree = in_deletion
elif what == "half":
    checkpoint.dcp.save = half_written
elif what == "evaluation":
    pretrain.quick_evaluation = in_evaluation
sys.exit(cli.main(argv))
"""


def start(root: Path, out: str, *more: str, fault: str = "none", step: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-c", DRIVER, fault, str(step), "train", "tiny", "--data", str(root / "train"), "--val", str(root / "held")]
    command += ["--size", "32", "--batch", "4", "--precision", "fp32", "--keep", "1", "--save-every", "3", "--log-every", "2", "--out", str(root / out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *more], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    said = process.communicate(timeout=300)[1]
    return process.returncode, said


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run of 8 steps that nothing disturbed, in `whole`."""
    root = tmp_path_factory.mktemp("processes")
    pictures(root / "train", 10)
    pictures(root / "held", 3, seed=1)
    code, said = finish(start(root, "whole", "--steps", "8"))
    assert code == 0, said
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "step", "code"),
    [
        ("SIGKILL", 5, -signal.SIGKILL),
        ("SIGTERM", 4, 75),
        ("SIGINT", 5, 75),
        ("rename", 6, -signal.SIGKILL),
        ("deletion", 6, -signal.SIGKILL),
    ],
)
def test_a_killed_process_that_goes_on_equals_the_one_that_was_not(whole, fault, step, code):
    out = f"{fault}-{step}"
    seen, said = finish(start(whole, out, "--steps", "8", fault=fault, step=step))
    assert seen == code, said
    names = [path.name for path in complete_checkpoints(whole / out)]
    if fault == "SIGKILL":  # the save of step 3 may still be on its way
        assert names in ([], ["step-00000003"])
    else:  # a signal that comes when a step's end has been agreed on waits for the next
        assert names == [{"rename": "step-00000003", "deletion": "step-00000006"}.get(fault, f"step-{step + 1:08d}")]
    assert ("saved at step" in said) == (code == 75)
    seen, said = finish(start(whole, out, "--steps", "8", "--resume"))
    assert seen == 0, said
    assert_same_run(whole / "whole", whole / out)
    assert [p.name for p in (whole / out / "checkpoints").iterdir()] == ["step-00000008"]


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_equals_the_one_that_was_not(whole):
    often = ["--steps", "30", "--save-every", "2", "--eval-every", "3", "--keep-best", "1"]
    code, said = finish(start(whole, "calm", *often))
    assert code == 0, said
    for fault, step in (("half", 4), ("evaluation", 6), ("rename", 8)):
        code, said = finish(start(whole, "shaken", *often, *(["--resume"] if step > 4 else []), fault=fault, step=step))
        assert code == -signal.SIGKILL, said
    draw = random.Random(0)
    for _ in range(3):
        lines = told(whole / "shaken") + 1 + draw.randrange(4)  # a run that goes on tells so in one, then its losses
        process = start(whole, "shaken", *often, "--resume")
        while process.poll() is None and told(whole / "shaken") < lines:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        code, said = finish(process)
        assert code in (0, -signal.SIGKILL), said
    code, said = finish(start(whole, "shaken", *often, "--resume"))
    assert code == 0, said
    assert_same_run(whole / "calm", whole / "shaken")
    assert [p.name for p in complete_checkpoints(whole / "calm")] == [p.name for p in complete_checkpoints(whole / "shaken")]


def told(out: Path) -> int:
    """Lines of log.txt on how far the run is."""
    return sum(" step" in line for line in (out / "log.txt").read_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_signal_from_outside_saves_and_exits_with_75(whole, workers):
    process = start(whole, f"outside-{workers}", "--steps", "1000000", "--workers", workers)
    metrics_file = whole / f"outside-{workers}" / "metrics.jsonl"
    while process.poll() is None and not (metrics_file.exists() and metrics_file.read_text().count("\n") >= 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 75, said
    saved = complete_checkpoints(whole / f"outside-{workers}")[-1]
    assert f"SIGTERM: saved at step {int(saved.name.removeprefix('step-'))} of 1000000" in said


@pytest.mark.slow
def test_losses_that_stay_nan_end_with_1_the_module_and_the_last_good_checkpoint(whole):
    code, said = finish(start(whole, "nan", "--steps", "50", fault="nan", step=4))
    assert code == 1, said
    last = complete_checkpoints(whole / "nan")[-1]
    assert said.count("the step is skipped") == 5 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("openvision3: step 9: the loss ") and f"the last good checkpoint is {last};" in said.splitlines()[-1]
    for name, value in saved_state(last).items():
        assert not isinstance(value, torch.Tensor) or bool(torch.isfinite(value).all()), name


@pytest.mark.slow
def test_a_full_disk_ends_with_2_and_with_room_the_run_goes_on_as_if_nothing_had_been(whole):
    disk = whole / "disk"
    disk.mkdir()
    size = sum(p.stat().st_size for p in complete_checkpoints(whole / "whole")[-1].rglob("*"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", str(disk)]  # one checkpoint and a half
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk of its own cannot be mounted here (needs root on Linux)")
    try:
        code, said = finish(start(whole, "disk/run", "--steps", "8"))
        assert code == 2 and "Traceback" not in said, said
        kept = complete_checkpoints(disk / "run")
        assert [p.name for p in kept] == ["step-00000003"]
        assert f"no space left on the disk at step 6; the last good checkpoint is {kept[0]}; make room and continue with --resume" in said.splitlines()[-1]
        subprocess.run(["mount", "-o", f"remount,size={size * 4}", str(disk)], check=True)
        code, said = finish(start(whole, "disk/run", "--steps", "8", "--resume"))
        assert code == 0, said
        assert_same_run(whole / "whole", disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
