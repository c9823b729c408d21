"""Grids of short runs: they continue, share runs, judge claims and draw their page."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_chat import QUESTION, conversations, language_folder
from tiny_chat import row as conversation
from tiny_pipeline import write_photo

from openvision3 import cli
from openvision3.cli.train import configure_ablation
from openvision3.experiments.ablate import AblationOptions, base_config, change_fields, is_finished, judge, plan_runs
from openvision3.experiments.ablations import Claim, Fork, Parent
from openvision3.experiments.compare import Group, format_tables, protocol, read_groups, split_into_tables, write_comparison
from openvision3.experiments.curves import Curves, choose_metrics, describe_candidates
from openvision3.model.openvision3 import OpenVision3
from openvision3.pipeline import load
from openvision3.settings import flat, to_dict
from openvision3.train.recipes import tiny


def pictures(folder: Path, count: int, seed: int) -> Path:
    for i in range(count):
        write_photo(folder / f"{i}.png", 40, 40, seed + i).with_suffix(".txt").write_text(f"image number {i} of {seed}")
    return folder


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    """A base whose runs take a second, without NAME and --out."""
    root = tmp_path_factory.mktemp("ablate")
    data, val = pictures(root / "train", 12, 0), pictures(root / "val", 4, 100)
    fields = ["--data", str(data), "--val", str(val), "--size", "32", "--batch", "4", "--no-families", "--no-aliases", "--precision", "fp32"]
    return ["--recipe", "tiny", "--steps", "2", "--seeds", "0", "1", *fields]


@pytest.fixture(scope="module")
def synergy(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("grids") / "out"
    assert cli.main(["ablate", "synergy", "--out", str(out), *command]) == 0
    return out


def numbers(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_each_fork_is_trained_once_a_seed_in_a_folder_that_says_what_it_changes(synergy):
    forks = {p.name for p in synergy.iterdir() if p.is_dir()}
    assert forks == {"base", *(f"encoder_learns_from={who}" for who in ("understanding", "reconstruction", "nothing"))}
    assert all(is_finished(synergy / fork / f"seed-{seed}") for fork in forks for seed in (0, 1))


def test_a_frozen_encoder_is_saved_with_the_heads_and_stays_what_it_was(synergy):
    first, last = (load(synergy / "encoder_learns_from=nothing" / f"seed-{seed}").model for seed in (0, 1))
    torch.manual_seed(0)
    fresh = OpenVision3(first.config, first.vae, first.vocabulary, first.pad_id).init_weights()
    for name, value in fresh.encoder.named_parameters():
        assert torch.equal(first.encoder.get_parameter(name), value) == (not name.startswith("pool_")), name
    assert not torch.equal(first.encoder.class_token, last.encoder.class_token)


def test_the_page_holds_every_fork_and_the_mean_over_seeds(synergy):
    page = (synergy / "synergy.html").read_text()
    for label in ("both", "only understanding", "only reconstruction", "heads on a frozen random encoder"):
        assert label in page
    found = json.loads((synergy / "synergy.json").read_text())["groups"]
    for row in found:
        assert row["seeds"] == [0, 1] and len(row["values"]["val/psnr"]) == 2
        for run, value in zip(row["runs"], row["values"]["val/psnr"], strict=True):
            assert value == [r["val/psnr"] for r in numbers(Path(run)) if "val/psnr" in r][-1]
    assert (synergy / "synergy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_grid_that_is_finished_trains_nothing_and_its_forks_serve_another_grid(synergy, command, capsys):
    before = {p: p.stat().st_mtime_ns for p in synergy.rglob("metrics.jsonl")}
    assert cli.main(["ablate", "synergy", "--out", str(synergy), *command]) == 0
    assert cli.main(["ablate", "token_norm", "--out", str(synergy), *command, "--seeds", "0"]) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert {p.name for p in synergy.iterdir() if p.is_dir()} >= {"base", "token_norm=none"}
    assert "tokens as they are" in capsys.readouterr().out


def test_equal_seeds_begin_with_equal_losses_in_every_fork_of_the_synergy(synergy):
    """The same weights see the same images: who learns from whom shows from the second step on."""
    first = [numbers(synergy / fork / "seed-0")[0]["train/loss"] for fork in ("base", "encoder_learns_from=understanding", "encoder_learns_from=nothing")]
    assert first == pytest.approx([first[0]] * 3, abs=1e-5)


def test_a_row_holds_the_seeds_that_all_rows_have(synergy, command, tmp_path, capsys):
    out = shutil.copytree(synergy, tmp_path / "out")
    shutil.rmtree(out / "encoder_learns_from=nothing" / "seed-1")
    assert cli.main(["ablate", "synergy", "--out", str(out), *command, "--draw"]) == 0
    assert [row["seeds"] for row in json.loads((out / "synergy.json").read_text())["groups"]] == [[0]] * 4


def test_a_fork_that_diverges_is_named_and_the_grid_goes_on(command, tmp_path, capsys):
    out = tmp_path / "out"
    argv = [
        "ablate",
        "token_norm",
        "--out",
        str(out),
        *command,
        "--seeds",
        "0",
        "--optimizer.learning-rate",
        "1e30",
        "--steps",
        "12",
        "--optimizer.kind",
        "adamw",
    ]
    assert cli.main(argv) == 2  # both forks are lost, and there is nothing to draw
    assert len(list(out.glob("*/seed-0/DIVERGED"))) == 2
    before = {p: p.stat().st_mtime_ns for p in out.rglob("metrics.jsonl")}
    assert cli.main(argv) == 2 and {p: p.stat().st_mtime_ns for p in before} == before, "not tried again"


def test_a_run_of_another_config_in_the_place_of_a_fork_is_refused(synergy, command, tmp_path, capsys):
    out = shutil.copytree(synergy, tmp_path / "out")
    path = out / "base" / "seed-0" / "config.json"
    path.write_text(path.read_text().replace('"tau": 0.4', '"tau": 0.9'))
    assert cli.main(["ablate", "synergy", "--out", str(out), *command]) == 2
    assert "model.loss.tau 0.9, not 0.4" in capsys.readouterr().err


def test_another_base_in_the_same_folder_is_refused(synergy, command, capsys):
    assert cli.main(["ablate", "synergy", "--out", str(synergy), *command, "--model.loss.tau", "0.1"]) == 2
    assert "model.loss.tau 0.4, not 0.1" in capsys.readouterr().err


def test_unfinished_runs_are_left_out_of_the_numbers_and_named(synergy, command, capsys):
    assert cli.main(["ablate", "synergy", "--out", str(synergy), *command, "--seeds", "0", "1", "7", "--draw"]) == 0
    told = capsys.readouterr()
    assert "4 runs are not finished" in told.err and "both, seed 7" in told.err
    assert "both, seed 7" in (synergy / "synergy.html").read_text()
    assert cli.main(["ablate", "tau", "--out", str(synergy), *command, "--seeds", "7", "--draw"]) == 2


@pytest.mark.slow
def test_a_grid_that_was_killed_goes_on_and_ends_with_the_numbers_of_one_that_was_not(synergy, command, tmp_path):
    argv = [sys.executable, "-m", "openvision3", "ablate", "synergy", "--out", str(tmp_path / "out"), *command]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed = tmp_path / "out" / "encoder_learns_from=understanding" / "seed-0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not killed.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert subprocess.run(argv, capture_output=True, check=False).returncode == 0
    mine, other = (json.loads((p / "synergy.json").read_text())["groups"] for p in (tmp_path / "out", synergy))
    for a, b in zip(mine, other, strict=True):
        for name, found in a["values"].items():
            assert found == pytest.approx(b["values"][name], abs=1e-5), name


@pytest.mark.slow
def test_two_processes_share_a_grid_and_neither_trains_what_the_other_has(command, tmp_path):
    argv = [sys.executable, "-m", "openvision3", "ablate", "token_norm", "--out", str(tmp_path / "out"), *command]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    told = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both].count(0) >= 1, told
    assert cli.main(argv[3:]) == 0
    for run in (tmp_path / "out").glob("*/seed-*"):
        steps = [row["step"] for row in numbers(run) if "train/loss" in row]
        assert steps == sorted(set(steps)), "trained twice"


@pytest.mark.slow
def test_a_grid_in_two_processes_gives_the_numbers_of_one(synergy, command, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "openvision3", "ablate", "token_norm", "--out", str(tmp_path / "out"), *command, "--seeds", "0"]
    both = [
        subprocess.Popen(
            argv, env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}, stdout=subprocess.PIPE
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and b"page:" in told[0] and not told[1]
    for a, b in zip(numbers(tmp_path / "out" / "base" / "seed-0"), numbers(synergy / "base" / "seed-0"), strict=True):
        if "train/loss" in a:
            assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-3)


def test_two_phases_of_a_recipe_that_is_no_first_phase_are_refused(capsys):
    assert cli.main(["ablate", "two_phases", "--recipe", "tiny", "--out", "/nonexistent/x"]) == 2
    assert "no first phase" in capsys.readouterr().err


def test_a_fork_that_breaks_the_config_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="tau"):
        change_fields(tiny(), {"model.loss.tau": -1.0})
    assert flat(to_dict(change_fields(tiny(), {"model.loss.tau": 1.5})))["model.loss.tau"] == 1.5
    assert base_config(AblationOptions(recipe="tiny", steps=7), tiny()).optimizer.warmup_steps == 1
    assert plan_runs(Fork("x", {}), Parent("tiny", tiny())).runs[0][0] == "base"


def test_an_unknown_ablation_is_one_line(capsys):
    assert cli.main(["ablate", "sinergy"]) == 2
    assert "Did you mean 'synergy'?" in capsys.readouterr().err
    assert cli.main(["ablate", "--help"]) == 0
    assert "Does each branch help the other?" in capsys.readouterr().out


# -- compare -------------------------------------------------------------------------------------------------------


def test_compare_groups_runs_that_differ_in_their_seed_alone(synergy, tmp_path, capsys):
    runs = sorted(map(str, synergy.glob("*/seed-*")))
    groups = read_groups([run for run in runs if "token_norm" not in run])
    assert sorted(len(group.runs) for group in groups) == [2, 2, 2, 2]
    assert cli.main(["compare", *runs, "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert "±" in capsys.readouterr().out and "encoder_learns_from" in (tmp_path / "new" / "page.html").read_text()


def test_two_runs_of_one_seed_are_two_rows(synergy, tmp_path):
    run = synergy / "base" / "seed-0"
    again = shutil.copytree(run, tmp_path / "again")
    assert [len(group.runs) for group in read_groups([str(run), str(again), str(synergy / "base" / "seed-1")])] == [2, 1]


def test_numbers_of_unlike_protocols_are_not_put_in_one_table(synergy, tmp_path):
    """Another size is another table; a weighted sum of losses is no column where the weights differ."""
    base = Group("base", [Curves(synergy / "base" / "seed-0").read()])
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text((synergy / "base" / "seed-0" / "metrics.jsonl").read_text())
    config = json.loads((synergy / "base" / "seed-0" / "config.json").read_text())
    config["model"]["loss"]["omega_rec"] = 9.0
    (other / "config.json").write_text(json.dumps(config))
    [(_, columns, members)] = split_into_tables([base, Group("other", [Curves(other).read()])])
    assert len(members) == 2 and "val/loss" not in columns and "val/psnr" in columns
    config["size"] = 64
    (other / "config.json").write_text(json.dumps(config))
    assert [len(members) for _, _, members in split_into_tables([base, Group("other", [Curves(other).read()])])] == [1, 1]
    assert protocol(base, "val/psnr") != protocol(Group("other", [Curves(other).read()]), "val/psnr")


def groups_of(root: Path, **ends: Sequence[float]) -> list[Group]:
    """Groups of runs, a seed a value, that ended at these PSNRs; contrastive loss is the value over ten."""
    made = []
    config = to_dict(tiny())
    for label, values in ends.items():
        runs = []
        for seed, value in enumerate(values):
            folder = root / label / f"seed-{seed}"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(config | {"seed": seed}))
            line = {"step": 10, "val/psnr": value, "val/contrastive": value / 10, "val/contrastive_candidates": 256, "train/contrastive": 1.0}
            (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
            runs.append(Curves(folder).read())
        made.append(Group(label, runs))
    return made


def bold(page: str, label: str) -> list[str]:
    return re.findall("<b>(.*?)</b>", re.search(f"<tr><td>{label}</td>(.*?)</tr>", page.replace("\u00a0", " ")).group(1))


def test_the_best_mean_is_bold_only_where_it_differs_from_the_second_best_over_seeds(tmp_path):
    sure = groups_of(tmp_path / "sure", a=[20.0, 21.0, 22.0], b=[22.0, 23.1, 23.9])
    page = write_comparison(tmp_path / "sure.html", "Compared", "", sure).read_text()
    assert bold(page, "b") == ["23.00 ± 0.95"] and bold(page, "a") == ["2.100 ± 0.100"], "the larger PSNR, the smaller loss"
    assert "*" in format_tables(sure) and "p &lt; .001" in page
    chance = groups_of(tmp_path / "chance", a=[20.0, 21.0, 22.0], b=[22.0, 20.9, 22.3])
    page = write_comparison(tmp_path / "chance.html", "Compared", "", chance).read_text()
    assert not bold(page, "a") and not bold(page, "b") and "*" not in format_tables(chance)
    one = groups_of(tmp_path / "one", a=[20.0], b=[30.0])
    page = write_comparison(tmp_path / "one.html", "Compared", "", one).read_text()
    assert not bold(page, "a") and not bold(page, "b") and "one seed: no interval" in page


def test_differences_over_seeds_are_in_the_numbers_beside_the_page(tmp_path):
    write_comparison(tmp_path / "page.html", "Compared", "", groups_of(tmp_path / "runs", a=[20.0, 21.0, 22.0], b=[22.0, 23.1, 23.9], c=[1.0]))
    found = {(each["metric"], each["a"], each["b"]): each for each in json.loads((tmp_path / "page.json").read_text())["differences"]}
    each = found["val/psnr", "a", "b"] if ("val/psnr", "a", "b") in found else found["val/psnr", "b", "a"]
    assert abs(each["difference"]) == pytest.approx(2.0) and each["seeds"] == 3 and each["p"] == pytest.approx(0.0008322931113192524)
    assert found["val/psnr", "a", "c"]["low"] is None and found["val/psnr", "a", "c"]["p"] == 1


def test_a_contrastive_loss_says_over_how_many_images_it_is_and_unlike_ones_are_not_compared(tmp_path):
    groups = groups_of(tmp_path / "runs", a=[20.0, 21.0], b=[22.0, 23.0])
    page = write_comparison(tmp_path / "page.html", "Compared", "", groups).read_text()
    assert "contrastive of 256 (chance 5.55)" in page and "contrastive of 256 (chance 5.55)" in format_tables(groups)
    assert describe_candidates(groups[0].runs, "train/contrastive") == f" of {tiny().batch} (chance {math.log(tiny().batch):.2f})"
    for run in groups[1].runs:
        run.values["val/contrastive_candidates"] = dict.fromkeys(run.values["val/contrastive_candidates"], 64.0)
    page = write_comparison(tmp_path / "unlike.html", "Compared", "", groups).read_text()
    assert "Left out, because it means something else in each row: contrastive" in page and "contrastive" not in format_tables(groups)
    runs = [run for group in groups for run in group.runs]
    assert describe_candidates(runs, "val/contrastive") == " of 64 and 256: not comparable" and "val/contrastive_candidates" not in choose_metrics(runs)
    for run in groups[1].runs:
        del run.values["val/contrastive_candidates"]
    assert describe_candidates(runs, "val/contrastive") == " of an unknown number and 256: not comparable", "a run of an earlier version"


@pytest.mark.parametrize(
    ("both", "verdicts"),
    [
        ([10.0, 11.0, 12.1], ["fails", "holds"]),
        ([30.0, 31.0, 32.1], ["fails", "fails"]),
        ([20.3, 20.9, 22.4], ["undecided", "undecided"]),
        ([9.0], ["undecided"] * 2),
    ],
)
def test_a_claim_holds_fails_or_is_undecided_by_the_test_over_seeds(tmp_path, both, verdicts):
    groups = groups_of(tmp_path, a=both, b=[20.0, 21.0, 22.0])
    same, lower = (Claim("x", "a", "b", {"val/contrastive": expected}) for expected in ("the same", "lower"))
    assert [judge(claim, groups)[0] for claim in (same, lower)] == verdicts
    assert judge(Claim("x", "a", "nobody", {"val/contrastive": "lower"}), groups) is None
    [(part, value, verdict)] = judge(lower, groups)[1]
    assert part == "contrastive of a - b: lower?" and verdict == verdicts[1] and ("one seed" in value) == (len(both) == 1)


def test_the_page_of_the_synergy_judges_each_claim_of_the_paper(synergy):
    claims = json.loads((synergy / "synergy.json").read_text())["claims"]
    assert [len(claim["parts"]) for claim in claims] == [2, 2, 2, 2] and {claim["verdict"] for claim in claims} <= {"holds", "fails", "undecided"}
    page = (synergy / "synergy.html").read_text()
    assert "What the paper says, here" in page and all(claim["claim"] in page for claim in claims) and "chance 1.39" in page


def test_compare_refuses_what_is_no_run(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(["compare", str(tmp_path / "empty"), "--out", str(tmp_path / "a.html")]) == 2
    assert "no numbers yet" in capsys.readouterr().err
    assert not (tmp_path / "a.html").exists()


def test_gradients_reach_the_encoder_from_the_named_branch_alone():
    """The paper's figures: heads of the other branch learn on detached tokens, and their losses stay those of the whole model."""
    from tiny_pipeline import make_pipeline

    pipeline = make_pipeline()
    batch = {
        "images": torch.rand(3, 3, 32, 32) * 2 - 1,
        "text_ids": pipeline.tokenizer.text_ids(["red heart", "cat face", "black cat"], 32)[:, None],
        "caption_ids": pipeline.tokenizer.caption_ids(["red heart", "cat face", "black cat"], 32),
        "draw_key": torch.arange(3),
    }
    losses, gradients = {}, {}
    for who in ("both", "understanding", "reconstruction", "nothing"):
        config = change_fields(tiny(), {"model.loss.encoder_learns_from": who}).model
        model = OpenVision3(config, pipeline.vae, pipeline.model.vocabulary, pipeline.model.pad_id)
        model.load_state_dict(pipeline.model.state_dict())
        loss, parts = model(batch)
        loss.backward()
        losses[who] = (loss.item(), parts["caption"].item())
        gradients[who] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert all(found == pytest.approx(losses["both"], abs=1e-5) for found in losses.values())
    heads = [name for name in gradients["both"] if not name.startswith("encoder.") or "pool_" in name]
    for who, found in gradients.items():
        assert all(torch.allclose(found[name], gradients["both"][name], atol=1e-5) for name in heads), who
    blocks = [name for name in gradients["both"] if name not in heads]
    assert not any(name in gradients["nothing"] for name in blocks)
    for name in blocks:
        assert torch.allclose(gradients["understanding"][name] + gradients["reconstruction"][name], gradients["both"][name], atol=2e-5), name


# -- measures and levers -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_levers_are_measured_judged_and_joined_and_a_run_without_measures_is_measured_only(command, tmp_path, monkeypatch, capsys):
    from openvision3.experiments import ablate, ablations

    def few(parent: Parent) -> ablations.Grid:
        return ablations.Grid([Fork("parent", {}), Fork("averaged weights", {"ema": 0.5}, equal_compute=True)])

    few.__name__ = "levers"
    monkeypatch.setitem(ablations.ABLATIONS, "levers", few)
    classes = pictures(tmp_path / "classes" / "a", 4, 300).parent
    pictures(classes / "b", 4, 400), pictures(tmp_path / "test" / "a", 2, 500), pictures(tmp_path / "test" / "b", 2, 600)
    sets = ["--measure", f"unseen style={pictures(tmp_path / 'style', 4, 700)}", "--classify", f"kinds={classes},{tmp_path / 'test'}", "--label-key", ""]
    argv = ["--out", str(tmp_path / "out"), *command, *sets]
    assert cli.main(["ablate", "levers", *argv]) == 0
    record = json.loads((tmp_path / "out" / "levers.json").read_text())
    [verdict] = record["verdicts"]
    assert verdict["fork"] == "averaged weights" and {test["axis"] for test in verdict["scores"]} == {"reconstruction", "understanding", "drawability"}
    path = tmp_path / "out" / "base" / "seed-0" / "measures.json"
    values = json.loads(path.read_text())["values"]
    assert {"unseen style: PSNR", "unseen style: KID", "unseen style: image to text R@1", "kinds: zero-shot", "kinds: linear probe", "flow loss"} <= set(values)
    path.unlink()
    weights = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("model.safetensors")}
    assert cli.main(["ablate", "levers", *argv]) == 0
    assert json.loads(path.read_text())["values"] == values and {p: p.stat().st_mtime_ns for p in weights} == weights
    monkeypatch.setattr(ablate, "choose_levers", lambda verdicts: ["averaged weights"])
    assert cli.main(["ablate", "levers_together", *argv, "--draw", "--levers", "averaged wheights"]) == 2
    assert "Did you mean 'averaged weights'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["levers", "--measure", "style"], "must look like NAME=DATA"),
        (["levers", "--classify", "flowers=a.tar"], "must look like NAME=TRAIN,TEST"),
        (["levers", "--measure", "a=x", "a=y"], "a names two sets"),
        (["levers_together"], "no levers have been judged"),
        (["levers_together", "--levers", "gradient ratio 0.3", "gradient ratio 1"], "both set model.loss.gradient_ratio; name one of them"),
    ],
)
def test_wrong_sets_and_levers_are_refused_before_anything_runs(argv, message, command, tmp_path, capsys):
    assert cli.main(["ablate", *argv, "--out", str(tmp_path / "out"), *command]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out" / "base.json").exists()


@pytest.mark.slow
def test_a_generator_draws_in_the_tokens_of_the_models_of_its_seed_and_its_drawings_are_measured(synergy, command, tmp_path, capsys):
    data, val = command[command.index("--data") + 1], command[command.index("--val") + 1]
    out = tmp_path / "out"
    small = ["--dit.width", "32", "--dit.depth", "1", "--dit.heads", "2", "--dit.head-width", "32", "--dit.head-heads", "2", "--dit.head-mlp", "32"]
    fields = ["--data", data, "--val", val, "--condition", "none", "--size", "32", "--batch", "4", "--precision", "fp32", "--statistics", "8", *small]
    argv = ["ablate", "spaces", "--tokens", str(synergy / "base" / "seed-{seed}"), "--steps", "2", "--seeds", "0", "1", "--samples", "4", *fields]
    argv += ["--measure", f"held out={val}", "--out", str(out)]
    assert cli.main(argv) == 0
    runs = {json.loads((path / "config.json").read_text())["tokens"]: path for path in out.glob("*/seed-*")}
    models = ("base", *(f"encoder_learns_from={who}" for who in ("understanding", "reconstruction", "nothing")))
    assert runs.keys() == {str(synergy / model / f"seed-{seed}") for model in models for seed in (0, 1)} | {"vae:embedded"}
    assert len(list(out.glob("*/seed-*"))) == 10
    found = json.loads((out / "spaces.json").read_text())
    assert [verdict["fork"] for verdict in found["verdicts"]] == ["only understanding", "only reconstruction", "a frozen random encoder", "the VAE's latents"]
    scores = [[test["what"] for test in verdict["scores"]] for verdict in found["verdicts"]]
    assert all(set(of) - {"precision, %"} == {"KID of drawings x 1000", "recall, %"} for of in scores), "precision only where no recall is 0"
    first = found["measures"]["both branches"]["0"]
    rows = json.loads((out / "base" / "seed-0" / "measures" / "held out" / "results.json").read_text())["rows"]
    assert first["held out: recall"] == next(row["value"] for row in rows if row["metric"] == "recall on EfficientNet-Lite0 features")
    assert not any("val/loss" in group["values"] and pair["metric"] == "val/loss" for group in found["groups"] for pair in found["differences"])
    page = (out / "spaces.html").read_text()
    assert "Drawn from the first conditions" in page and "Left out, because it means something else in each row: loss" in page
    before = {p: p.stat().st_mtime_ns for p in out.rglob("metrics.jsonl")}
    capsys.readouterr()
    assert cli.main(argv) == 0 and {p: p.stat().st_mtime_ns for p in before} == before, "what is finished is not trained again"
    assert cli.main(["compare", *map(str, sorted(out.glob("*/seed-*"))), "--out", str(tmp_path / "compare.html")]) == 0
    assert cli.main(["ablate", "synergy", "--out", str(out), *command]) == 2
    assert "holds an ablation of a generator, not of a model" in capsys.readouterr().err


@pytest.mark.slow
def test_a_language_model_sees_through_the_models_of_its_seed_and_its_answers_are_measured(synergy, command, tmp_path, capsys):
    data, held_out = conversations(tmp_path, "train"), tmp_path / "train" / "held_out.json"
    asked = [conversation(i, f"img/{i}.png", f"<image>\n{QUESTION}", "red") | {"kinds": [("what", "colour")[i % 2]], "accept": [["red"]]} for i in range(8)]
    held_out.write_text(json.dumps(asked))
    out, language = tmp_path / "out", language_folder(tmp_path)
    argv = ["ablate", "towers", "--tower", str(synergy / "base" / "seed-{seed}"), "--steps", "2", "--seeds", "0", "1", "--samples", "3", "--batch", "4"]
    argv += ["--language", language, "--data", data, "--val", str(held_out), "--size", "32", "--precision", "fp32", "--out", str(out)]
    assert cli.main(argv) == 0
    runs = {json.loads((path / "config.json").read_text())["tower"]: path for path in out.glob("*/seed-*")}
    models = ("base", *(f"encoder_learns_from={who}" for who in ("understanding", "reconstruction", "nothing")))
    assert runs.keys() == {str(synergy / model / f"seed-{seed}") for model in models for seed in (0, 1)}
    found = json.loads((out / "towers.json").read_text())
    assert [verdict["fork"] for verdict in found["verdicts"]] == ["only understanding", "only reconstruction", "a frozen random encoder"]
    assert all([test["what"] for test in verdict["scores"]] == ["right answers, %"] for verdict in found["verdicts"])
    assert all(values.keys() == {f"held out 1: right answers, {kind}" for kind in ("what", "colour")} for values in found["measures"]["both branches"].values())
    answers = (out / "base" / "seed-0" / "measures" / "held out 1" / "answers.jsonl").read_text().splitlines()
    assert len(answers) == 6, "--samples 3 of each kind"
    assert {"val/loss", "val/exact"} <= found["groups"][0]["values"].keys()
    assert "held-out conversations of" in (out / "towers.html").read_text()
    capsys.readouterr()
    assert cli.main(["compare", *map(str, sorted(out.glob("*/seed-*"))), "--out", str(tmp_path / "compare.html")]) == 0
    assert "exact answers, %" in capsys.readouterr().out
    assert cli.main([*argv[:2], "--init", "runs/chat_align", *argv[2:]]) == 2
    assert "a projector fits the tower that it was trained with" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dit_head", "levers"])
def test_an_option_of_an_ablation_that_is_also_a_field_of_its_recipe_reaches_the_recipe(name):
    given = {"steps": 7, "label_key": "kind"}
    words = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    options, base = configure_ablation(name, [*words, "--data", "openmoji"])
    shared = {one.name for one in dataclasses.fields(AblationOptions)} & {one.name for one in dataclasses.fields(base)} - {"out"}
    assert shared <= given.keys() and "steps" in shared
    assert {key: getattr(base, key) for key in shared} == {key: given[key] for key in shared}
    assert options.label_key == "kind"
    assert configure_ablation("dit_head", ["--data", "openmoji"])[1].label_key == "", "sub-folders and .cls members are looked for without the option"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["dit_head", "--recipe", "mini"], "changes a generator, and recipe mini trains none; choose one of drawings_dit_tiny"),
        (["synergy", "--recipe", "dit_tiny"], "recipe dit_tiny trains a generator, which this command does not take"),
        (["spaces"], "name the runs of an ablation synergy in --tokens"),
        (["spaces", "--tokens", "nowhere/base/seed-{seed}", "--data", "openmoji", "--val", "openmoji"], "nowhere/base/seed-0"),
        (["dit_head", "--data", "openmoji", "--classify", "a=b,c"], "classify measures a model"),
        (["towers", "--data", "a.json"], "name the runs of an ablation synergy in --tower"),
        (["towers", "--tower", "grid/base/seed-{seed}"], "data is empty: name conversations with --data"),
        (["towers", "--tower", "grid/base/seed-{seed}", "--data", "nowhere.json"], "no such file of conversations: nowhere.json"),
        (["towers", "--recipe", "dit_tiny"], "changes a chat model, and recipe dit_tiny trains none"),
        (["dit_head", "--samples", "1"], "samples 1 must be at least 2"),
        (["dit_head", "--data", "openmoji"], "val is empty: name held-out images with --val"),
        (["time_shift", "--data", "openmoji", "--val", "openmoji"], "size 64: images of so few values are not shifted"),
        (["word_reading", "--data", "openmoji"], "word_reading needs a recipe that draws from texts"),
    ],
)
def test_what_an_ablation_of_generators_or_chat_models_cannot_use_is_one_line(argv, words, tmp_path, capsys):
    assert cli.main(["ablate", *argv, "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0] and not (tmp_path / "out").exists()


def test_a_command_that_ended_before_its_first_run_binds_no_later_one(command, tmp_path, capsys):
    argv = ["ablate", "synergy", "--out", str(tmp_path / "out"), *command]
    assert cli.main([*argv, "--latents", str(tmp_path / "nowhere")]) == 2
    assert (tmp_path / "out" / "base.json").is_file()
    assert cli.main([*argv, "--steps", "1", "--seeds", "0"]) == 0
    capsys.readouterr()
    assert cli.main(argv) == 2
    assert "holds an ablation with steps 1, not 2" in capsys.readouterr().err
