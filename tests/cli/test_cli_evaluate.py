"""openvision3 evaluate: every number with its protocol, the same on any batch size and number of processes, and like beside like alone."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from lpips_files import files  # noqa: F401  random LPIPS files
from PIL import Image
from tiny_peers import save_clip, save_vae
from tiny_pipeline import make_pipeline, write_photo

from openvision3 import cli
from openvision3.cli import evaluate as cli_evaluate
from openvision3.data.labelled import Labels
from openvision3.evaluate import run
from openvision3.evaluate.options import PROTOCOL_COUNTS
from openvision3.evaluate.page import bar_groups, write_summary
from openvision3.evaluate.peers import published
from openvision3.evaluate.protocol import Functions, Number
from openvision3.evaluate.results import NotRun, Results, Row, Scores, Setting
from openvision3.evaluate.statistics import subset_numbers
from openvision3.evaluate.subjects import load_subjects
from openvision3.evaluate.suite import class_texts
from openvision3.evaluate.tables import shown, split, table
from openvision3.fetch.sources import ASSETS

KINDS = ("circle", "square", "star")


def labelled(folder: Path, each: int, seed: int) -> Path:
    """Pictures in a sub-folder a class, with a caption each."""
    for number, kind in enumerate(KINDS):
        for i in range(each):
            path = write_photo(folder / kind / f"{i}.png", 48, 40, seed + 10 * i + 100 * number)
            path.with_suffix(".txt").write_text(f"a {kind} number {i}" if i else f"a {kind}")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    make_pipeline().save(root / "model")
    labelled(root / "data", 3, 0)
    labelled(root / "train", 5, 5)
    return root


def arguments(root: Path, *more: str) -> list[str]:
    return [str(root / "model"), "--data", str(root / "data"), "--size", "32", *more]


@pytest.fixture(scope="module")
def everything(root) -> Path:
    out = root / "all"
    argv = ["evaluate", "all", *arguments(root, "--train", str(root / "train"), "--least", "2", "--k", "3", "--tokenizer", "simple", "--out", str(out))]
    assert cli.main(argv) == 0
    return out


def rows(folder: Path) -> dict[tuple[str, str], dict]:
    return {(row["model"], row["metric"]): row for row in json.loads((folder / "results.json").read_text())["rows"]}


def test_every_kind_is_measured_and_every_row_says_how(everything, root):
    found = rows(everything)
    ours, vae = str(root / "model"), "VAE embedded"
    for metric in ("psnr", "ssim", "EfficientNet-Lite0 feature distance", "KID on EfficientNet-Lite0 features", "knn_top_1", "linear_probe_top_1"):
        assert (ours, metric) in found and (vae, metric) in found
    for metric in ("psnr, sigma 0.4", "image_to_text_r@1", "text_to_image_r@5", "exact_match", "bleu_4", "rouge_l", "cider", "zeroshot_top_1"):
        assert (ours, metric) in found
    for row in found.values():
        assert row["how"] and "torch" in row["library"] and row["resolution"] == "32x32" and row["crop"] and row["dtype"] == "fp32" and row["count"] == 9
        assert re.fullmatch("[0-9a-f]{64}", row["data_sha256"]) and re.fullmatch("[0-9a-f]{64}", row["model_sha256"])
        assert bool(row["network"]) == bool(row["network_sha256"]) and row["seed"] == 0 and row["guidance"] == "none" and row["labels"]
    assert found[vae, "psnr"]["value"] >= found[ours, "psnr"]["value"]
    assert "80 templates" in found[ours, "zeroshot_top_1"]["how"]


def test_what_was_not_run_is_listed_with_what_it_needs_and_never_a_number(everything):
    results = Results.load(everything)
    missing = {each.metric: each.needs for each in results.not_run}
    assert missing["text_to_image_r@10"] == "more candidates: R@10 of 9 images is 100 % for any model"
    assert "openvision3 fetch" in missing["rfid"] and "openvision3 fetch" in missing["lpips"] and "meteor" in missing
    assert not {"rfid", "lpips", "meteor"} & {row.metric for row in results.rows}
    assert any(each.model == "VAE embedded" and each.metric == "captioning" for each in results.not_run)


def test_the_page_shows_pictures_curves_answers_and_protocols(everything):
    page = (everything / "report.html").read_text()
    for heading in (
        "Numbers",
        "Reconstruction: PSNR of all images, and against noise on the tokens",
        "All images, from the worst",
        "the nearest captions",
        "captions of the first",
        "zero-shot by class",
        "Published numbers, not measured here",
        "How it was",
    ):
        assert heading in page
    assert not re.search(r"src=.https?:", page)


def scores(page: str, model: str) -> list[float]:
    """What the model has in the order of the images on the page."""
    return [float(value) for value in re.findall(rf"<figcaption>[^<]* {re.escape(model)} ([\d.]+) dB", page)]


def test_few_pictures_are_each_shown_once_from_the_worst_to_the_best(everything, root):
    page = (everything / "report.html").read_text()
    found = scores(page, str(root / "model"))
    assert len(found) == 9 and found == sorted(found) and "The first images" not in page and "The best" not in page


def test_of_many_pictures_the_first_the_worst_and_the_best_are_shown_and_no_noise_without_a_curve(root, tmp_path, monkeypatch):
    monkeypatch.setattr("openvision3.evaluate.page.FIRST", 3)
    monkeypatch.setattr("openvision3.evaluate.page.EXTREME", 2)
    out = measured(root, tmp_path / "out", "reconstruction", "--data", str(root / "data"), "--metrics", "psnr", "--sigmas", "0")
    page, found = (out / "report.html").read_text(), sorted(json.loads(line)["psnr"] for line in (out / "scores.jsonl").read_text().splitlines()[:9])
    assert all(heading in page for heading in ("The first images", f"The worst of {root / 'model'}", f"The best of {root / 'model'}"))
    assert scores(page, str(root / "model"))[3:] == pytest.approx([*found[:2], *found[:-3:-1]], abs=0.06)
    assert "Reconstruction: PSNR of all images" in page and "against noise" not in page


@pytest.fixture(scope="module")
def retrieved(root) -> Path:
    (root / "retrieved").mkdir()
    (root / "retrieved" / "scores.jsonl").write_text("{}\n")
    return measured(root, root / "retrieved", "retrieval", "--data", str(root / "data"))


def test_published_numbers_are_those_of_metrics_that_stand_on_the_page(retrieved):
    assert "Published numbers" not in (retrieved / "report.html").read_text()
    header, found = published.compact({"psnr", "lpips", "image_to_text_r@1"})
    assert header == ("model", "set", "PSNR", "LPIPS (net not stated)", "paper")
    assert ("unitok", "ImageNet, 256 x 256", "25.34", "0.132", "v1 or v2") in found and "omnitokenizer" not in {row[0] for row in found}


def test_scores_of_an_evaluation_before_are_gone(retrieved, root):
    lines = [json.loads(line) for line in (retrieved / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == 9 and all(line["model"] == str(root / "model") and "psnr" not in line for line in lines)
    assert all(len(line["text_to_image_rank"]) == 1 for line in lines), "a rank for each caption"


def test_every_metric_is_what_the_scores_of_its_samples_come_to_and_has_an_interval_about_it(everything):
    scores, checked = Scores.load(everything), set()
    for row in Results.load(everything).rows:
        if row.metric.endswith("largest_class_share"):
            assert row.number.low is None
            continue
        assert not subset_numbers([row.number], scores.columns[row.model], [], "none")
        samples = {sample for column in scores.columns[row.model].values() for sample in column.samples}
        if not row.metric.startswith("KID"):
            [again] = subset_numbers([row.number], scores.columns[row.model], samples, "all")
            assert again.value == pytest.approx(row.number.value, rel=1e-5, abs=1e-6) and again.count == row.number.count
            assert (again.low, again.high) == pytest.approx((row.number.low, row.number.high), rel=1e-4, abs=1e-5)
        assert row.number.low - 1e-12 <= row.number.value <= row.number.high + 1e-12 and "95 %" in row.number.interval
        checked.add(row.metric)
    assert checked >= {"psnr, sigma 0.4", "cider", "bleu_4", "text_to_image_r@1", "image_to_text_median_rank", "zeroshot_mean_class_accuracy", "knn_top_1"}


def test_two_models_are_compared_over_the_same_samples(everything, root):
    results, page = Results.load(everything), (everything / "report.html").read_text()
    ours = str(root / "model")
    apart = {each.metric: each for each in results.differences}
    found = rows(everything)
    assert {"psnr", "ssim", "KID on EfficientNet-Lite0 features", "knn_top_1", "linear_probe_mean_class_accuracy"} <= apart.keys()
    one = apart["psnr"]
    assert {one.a, one.b} == {ours, "VAE embedded"} and one.count == 9
    assert one.difference == pytest.approx(found[one.a, "psnr"]["value"] - found[one.b, "psnr"]["value"], abs=1e-4)
    assert one.low < one.difference < one.high and one.p == 2 / 2**9 and "all 512 flips" in one.test, "the VAE is better on each of nine images"
    assert "exact McNemar" in apart["knn_top_1"].test and "Differences" in page and "p = .004" in page
    best = max(("VAE embedded", ours), key=lambda name: found[name, "psnr"]["value"])
    assert f"<b>{shown('psnr', next(r.number for r in results.rows if r.model == best and r.metric == 'psnr'))}</b>" in page


def test_every_pictures_score_is_kept(everything, root):
    lines = [json.loads(line) for line in (everything / "scores.jsonl").read_text().splitlines()]
    own = [line for line in lines if line["model"] == str(root / "model") and "psnr" in line]
    assert len({line["key"] for line in own}) == len(own) == 9
    assert sum(line["psnr"] for line in own) / 9 == pytest.approx(rows(everything)[str(root / "model"), "psnr"]["value"], abs=1e-3)
    assert sum("written" in line for line in lines) == 9


def assert_same(a: Path, b: Path) -> None:
    one, other = rows(a), rows(b)
    assert one.keys() == other.keys()
    for name, row in one.items():
        close = 1e-3 if name[1].startswith("psnr") else 1e-4
        assert row["value"] == pytest.approx(other[name]["value"], abs=close), name
        assert [row[end] is None for end in ("low", "high")] == [other[name][end] is None for end in ("low", "high")]
        assert row["low"] is None or [row["low"], row["high"]] == pytest.approx([other[name]["low"], other[name]["high"]], abs=1e-3), name
        floats = ("value", "spread", "low", "high")
        assert {k: v for k, v in row.items() if k not in floats} == {k: v for k, v in other[name].items() if k not in floats}


@pytest.mark.parametrize("batch", ["1", "4"])
def test_the_numbers_do_not_depend_on_how_many_pictures_or_texts_go_at_once(everything, root, batch, monkeypatch):
    monkeypatch.setattr("openvision3.evaluate.suite.TEXTS_AT_ONCE", 3)
    out = root / f"batch-{batch}"
    more = ("--train", str(root / "train"), "--least", "2", "--k", "3", "--tokenizer", "simple", "--batch", batch, "--out", str(out))
    assert cli.main(["evaluate", "all", *arguments(root, *more)]) == 0
    assert_same(everything, out)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one_and_no_picture_twice(everything, root):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = ("--train", str(root / "train"), "--least", "2", "--k", "3", "--tokenizer", "simple", "--out", str(root / "two"))
    argv = [sys.executable, "-m", "openvision3", "evaluate", "all", *arguments(root, *more)]
    both = [
        subprocess.Popen(
            argv,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert "results:" in told[0][0] and not told[1][0], "rank 0 alone speaks"
    assert_same(everything, root / "two")


def test_a_metric_without_its_weights_is_refused_before_anything_is_measured(root, capsys, tmp_path):
    for metric, told in (("rfid", "inception"), ("lpips", "lpips")):
        assert cli.main(["evaluate", "reconstruction", *arguments(root, "--metrics", "psnr", metric, "--out", str(tmp_path / "x"))]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and told in error.lower() and "openvision3 fetch" in error
        assert not (tmp_path / "x").exists()


def test_lpips_is_measured_where_its_two_published_files_are_and_only_there(root, tmp_path, files, monkeypatch, capsys):
    paths = files / "alex.pth", files / "alex_linear.pth"
    more = ("--metrics", "psnr", "lpips", "--lpips-backbone", str(paths[0]), "--lpips-linear", str(paths[1]), "--out", str(tmp_path / "out"))
    assert cli.main(["evaluate", "reconstruction", *arguments(root, *more)]) == 2
    assert "would not be those of the published file" in capsys.readouterr().err and not (tmp_path / "out").exists()
    asset = ASSETS["lpips-alex"]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    published_files = tuple(replace(file, sha256=mark) for file, mark in zip(asset.files, hashes, strict=True))
    monkeypatch.setitem(ASSETS, "lpips-alex", replace(asset, files=published_files))
    assert cli.main(["evaluate", "reconstruction", *arguments(root, *more)]) == 0
    found = rows(tmp_path / "out")[str(root / "model"), "lpips"]
    assert found["network"] == "LPIPS alex" and found["network_sha256"] and "LPIPS v0.1 (alex)" in found["how"] and found["value"] > 0


def test_a_picture_that_cannot_be_read_is_counted_and_left_out(root, tmp_path, capsys):
    data = labelled(tmp_path / "data", 2, 40)
    (data / "star" / "9.png").write_bytes(b"not an image")
    argv = ["evaluate", "retrieval", str(root / "model"), "--data", str(data), "--size", "32", "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    assert "1 images skipped: 1 not an image" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["count"] for row in found["rows"]} == {6} and found["skipped"][0]["key"].endswith("star/9.png")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["reconstructoin"], "Did you mean 'reconstruction'?"),
        (["reconstruction", "--peer", "flux-vea"], "flux-vea"),
        (["reconstruction", "--peer", "omnitokenizer"], "published numbers only"),
        (["reconstruction", "--peer", "our"], "Choose one of ours, vae, flux-vae"),
        (["reconstruction", "--peer", "ours, nothing,flux-vae"], "unknown peer 'nothing'"),
        (["captioning", "--peer", "flux-vae"], "flux-vae can be measured by reconstruction and probe only"),
        (["retrieval", "--protocol", "rfid-coco"], "is one of reconstruction"),
        (["reconstruction", "--metrics", "fid"], "Choose from psnr"),
        (["retrieval", "--peer-folder", "flux-vae=x"], "not among the peers"),
        (["retrieval", "--size", "40"], "multiple of 16"),
        (["retrieval", "no-such-model"], "unknown model"),
        (["probe", "--train"], "name them with --train"),
        (["reconstruction", "--protocol", "rfid-coco", "--count", "5"], "leave out --count"),
    ],
)
def test_bad_input_is_one_line(root, argv, told, capsys, tmp_path):
    data = [] if "no-such-model" in argv else ["--data", str(root / "data")]
    model = [str(root / "model")] if argv[1:2] and argv[1].startswith("--") and argv[1] != "--train" else []
    argv = [word for word in argv if word != "--train"]
    assert cli.main(["evaluate", argv[0], *model, *argv[1:], *data, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_peer_whose_weights_are_absent_says_what_to_fetch(root, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert cli.main(["evaluate", "reconstruction", *arguments(root, "--peer", "flux-vae,ours", "--out", str(tmp_path / "out"))]) == 2
    error = capsys.readouterr().err
    assert "openvision3 fetch flux-vae" in error and "black-forest-labs/FLUX.1-schnell" in error and "Apache-2.0" in error


def test_peers_stand_beside_ours_and_what_the_paper_says_of_them_in_a_column_of_its_own(root, capsys, tmp_path):
    save_vae(tmp_path / "flux", "flux-vae")
    save_clip(tmp_path / "clip")
    peers = ("--peer", "flux-vae,clip-b16,ours", "--peer-folder", f"flux-vae={tmp_path / 'flux'}", f"clip-b16={tmp_path / 'clip'}")
    ours = str(root / "model")
    assert cli.main(["evaluate", "reconstruction", *arguments(root, *peers, "--out", str(tmp_path / "a"))]) == 0
    results, told = Results.load(tmp_path / "a"), capsys.readouterr().out
    assert {row.model for row in results.rows if row.metric == "psnr"} == {"flux-vae", ours}
    assert [(each.model, each.metric) for each in results.not_run if "clip-b16 can be measured by" in each.needs] == [("clip-b16", "reconstruction")]
    assert "not run" in told and "rfid" not in {row.metric for row in results.rows}
    assert f"from the worst of {ours} to the best" in (tmp_path / "a" / "report.html").read_text(), "ours is told of, wherever it stands"
    assert cli.main(["evaluate", "retrieval", *arguments(root, *peers, "--out", str(tmp_path / "b"))]) == 0
    assert {row.model for row in Results.load(tmp_path / "b").rows} == {"clip-b16", ours}


def peer_that(size: int, fixed: bool = True, **can) -> Functions:
    return Functions(f"of-{size}", size, sha256="0" * 64, fixed=fixed, **can)


@pytest.mark.parametrize(("asked", "size"), [(("clip-b16", "openvision3-b2-256"), 256), (("clip-b16", "ours"), 64), (("vae", "clip-b16"), 64)])
def test_the_size_of_images_does_not_depend_on_the_order_of_peers(root, monkeypatch, capsys, asked, size):
    monkeypatch.setattr("openvision3.evaluate.peers.table.load_peer", lambda name, *_: peer_that({"clip-b16": 224}.get(name, 256), embed_images=lambda x: x))

    def side(names: tuple[str, ...], **more) -> int:
        options = cli_evaluate.Options(str(root / "model"), peer=names, device="cpu", **more)
        return load_subjects(options, names, cli_evaluate.open_model, False, print).size

    for names in (asked, asked[::-1]):
        assert side(names) == size
        assert (
            f"images of {size} px (the " in (told := capsys.readouterr().out)
            and "clip-b16" not in told
            and "of-224 224 px: they embed images of their own" in told
        )
    assert side(asked, size=96) == 96
    assert "images of 96 px (--size)" in (told := capsys.readouterr().out) and "of-224 224 px" in told and "resized for them and not rebuilt" in told


def test_a_peer_of_one_size_rebuilds_no_other_and_embeds_images_of_its_own(root, monkeypatch, tmp_path, capsys):
    """Enlarged, rebuilt from more tokens and averaged down again it would gain 5 dB on ours in one table."""
    seen: set[int] = set()

    def features(images):
        seen.add(images.shape[-1])
        return images.flatten(1)[:, :64]

    monkeypatch.setattr("openvision3.evaluate.peers.table.load_peer", lambda name, *_: peer_that(48, reconstruct=lambda x: x, features=features))
    more = ("--peer", "unitok,ours", "--train", str(root / "train"), "--least", "2", "--k", "3", "--metrics", "psnr", "--data", str(root / "data"))
    out = tmp_path / "own"
    assert cli.main(["evaluate", "reconstruction", str(root / "model"), *more, "--size", "32", "--out", str(out)]) == 0
    results = Results.load(out)
    assert "of-48" not in {row.model for row in results.rows}
    assert [each.needs for each in results.not_run if each.model == "of-48"] == ["images of 48 px, the only ones that of-48 rebuilds, not of 32: --size 48"]
    assert cli.main(["evaluate", "probe", str(root / "model"), *more, "--out", str(out)]) == 0
    found = {row.model: row.setting.resolution for row in Results.load(out).rows}
    assert seen == {48} and found == {"of-48": "48x48", str(root / "model"): "64x64", "VAE embedded": "64x64"}
    assert len(split(Results.load(out).rows)) == 2, "sizes are never in one table"
    assert len(Scores.load(out).columns["of-48"]["knn_rank"].values) == 9


def test_a_published_number_is_never_in_the_column_of_a_measured_one():
    lines = published.beside("unitok", ["psnr", "lpips", "rfid"])
    assert {heading: values for heading, values in lines.items() if "ImageNet, 256 x 256" in heading and "COCO" not in heading and "net not" not in heading}
    assert all("not measured here" in heading and heading.startswith("unitok, ") for heading in lines)
    assert published.beside("mini", ["psnr"]) == {}


def test_a_probe_is_not_measured_on_what_it_was_fitted_to(root, capsys, tmp_path):
    assert cli.main(["evaluate", "probe", *arguments(root, "--train", str(root / "data"), "--least", "2", "--out", str(tmp_path / "out"))]) == 2
    assert "must not be measured on what it was fitted to" in capsys.readouterr().err


def test_test_images_that_are_near_copies_of_training_images_are_left_out_of_a_probe_and_counted(root, capsys, tmp_path):
    train = shutil.copytree(root / "train", tmp_path / "train")
    copied = Image.open(root / "data" / "star" / "0.png").convert("RGB")
    copied.resize((96, 80), Image.Resampling.BICUBIC).save(train / "star" / "of-the-test.jpg", quality=80)
    argv = ("--train", str(train), "--least", "2", "--k", "3")
    out = measured(root, tmp_path / "out", "probe", "--data", str(root / "data"), *argv)
    assert "1 that are training images too, or near-duplicates of some" in capsys.readouterr().out
    assert {row["count"] for row in json.loads((out / "results.json").read_text())["rows"]} == {8}
    copy = shutil.copytree(root / "train", tmp_path / "copy")
    assert cli.main(["evaluate", "probe", *arguments(root, *argv, "--out", str(tmp_path / "x"))[:1], "--data", str(copy), "--size", "32", *argv]) == 2
    assert "must not be measured on what it was fitted to" in capsys.readouterr().err


@pytest.mark.slow
def test_what_one_kind_cannot_do_with_costs_no_other_its_numbers(root, tmp_path):
    out = measured(root, tmp_path / "out", "all", "--data", str(root / "data"), "--train", str(root / "train"), "--least", "2", "--k", "1000")
    results = Results.load(out)
    assert {"psnr", "linear_probe_top_1", "zeroshot_top_1"} <= {row.metric for row in results.rows}
    assert any(each.metric == "knn" and "k 1000 must be" in each.needs for each in results.not_run)


def test_a_kill_loses_no_kind_that_was_measured(root, tmp_path, monkeypatch):
    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(run.MEASURES, "captioning", killed)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scores.jsonl").write_text("{}\n")
    with contextlib.suppress(KeyboardInterrupt):
        assert cli.main(["evaluate", "all", *arguments(root, "--out", str(tmp_path / "out"))])
    results = Results.load(tmp_path / "out")
    assert not (tmp_path / "out" / "scores.jsonl").exists(), "scores of an earlier evaluation do not stand beside new numbers"
    assert {"psnr", "image_to_text_r@1"} <= {row.metric for row in results.rows}
    assert {each.metric for each in results.not_run if "not measured yet" in each.needs} == {"captioning", "zeroshot", "probe"}


def test_only_the_metrics_that_are_named_are_measured(root, tmp_path):
    for names, expected in ((["ssim"], {"ssim"}), (["psnr"], {"psnr", "psnr, sigma 0.4"})):
        out = measured(root, tmp_path / names[0], "reconstruction", "--data", str(root / "data"), "--sigmas", "0", "0.4", "--metrics", *names)
        assert {row.metric for row in Results.load(out).rows} == expected


def test_pictures_that_are_named_twice_are_refused(root, tmp_path, capsys):
    argv = ["evaluate", "retrieval", str(root / "model"), "--data", str(root / "data"), str(root / "train" / ".." / "data"), "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    assert "is named twice" in capsys.readouterr().err


def test_pictures_of_which_none_can_be_read_are_counted(root, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.png").write_bytes(b"no image")
    assert cli.main(["evaluate", "reconstruction", str(root / "model"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 2
    assert "none of 1 images can be read: 1 not an image" in capsys.readouterr().err


def test_what_only_has_published_numbers_stands_beside_what_is_measured(root, tmp_path, capsys):
    out = measured(root, tmp_path / "out", "reconstruction", "--data", str(root / "data"), "--peer", "ours,rae-clip", "--metrics", "psnr")
    assert {row.model for row in Results.load(out).rows} == {str(root / "model")}
    assert "rae-clip stands with published numbers only" in capsys.readouterr().out


@pytest.mark.slow
def test_a_published_protocol_that_an_unreadable_picture_breaks_is_said_not_to_hold(root, tmp_path, capsys, monkeypatch):
    from openvision3.evaluate import suite

    data = labelled(tmp_path / "data", 2, 3)
    (data / "star" / "1.png").write_bytes(b"no image")
    monkeypatch.setattr(suite, "reconstruction_networks", lambda *a, **b: suite.Networks())
    monkeypatch.setitem(PROTOCOL_COUNTS, "rfid-coco", (6, "six images"))
    argv = ["evaluate", "reconstruction", str(root / "model"), "--data", str(data), "--protocol", "rfid-coco", "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    assert "needs six images, 6 of them; measured on 5" in capsys.readouterr().err
    [row] = [row for row in Results.load(tmp_path / "out").rows if row.metric == "psnr" and not row.model.startswith("VAE")]
    assert "NOT protocol rfid-coco" in row.number.how


@pytest.mark.slow
def test_a_published_protocol_holds_though_some_of_its_images_were_seen_in_training(root, tmp_path, monkeypatch):
    from openvision3.evaluate import suite

    data = labelled(tmp_path / "data", 2, 3)
    (tmp_path / "train").mkdir()
    shutil.copy(next(data.rglob("*.png")), tmp_path / "train" / "copy.png")
    monkeypatch.setattr(suite, "reconstruction_networks", lambda *a, **b: suite.Networks())
    monkeypatch.setitem(PROTOCOL_COUNTS, "rfid-coco", (6, "six images"))
    argv = ["evaluate", "reconstruction", str(root / "model"), "--data", str(data), "--protocol", "rfid-coco", "--train", str(tmp_path / "train")]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 0
    rows = Results.load(tmp_path / "out").rows
    assert {row.number.count for row in rows if row.metric == "psnr"} == {1, 5, 6} and not [row for row in rows if "NOT protocol" in row.number.how]


def test_a_published_protocol_must_hold(root, capsys, tmp_path, monkeypatch):
    from openvision3.evaluate import suite

    monkeypatch.setattr(suite, "reconstruction_networks", lambda *a, **b: suite.Networks())
    argv = ["evaluate", "reconstruction", str(root / "model"), "--data", str(root / "data"), "--protocol", "rfid-val50k", "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    assert "50,000 of them; --data has 9" in capsys.readouterr().err


def settings(folder: Path, metric: str) -> dict:
    [found] = [row for row in json.loads((folder / "results.json").read_text())["rows"] if row["metric"] == metric and not row["model"].startswith("VAE")]
    return {name: found[name] for name in ("data_sha256", "labels", "captions", "crop", "count")}


def measured(root: Path, out: Path, kind: str, *more: str) -> Path:
    assert cli.main(["evaluate", kind, str(root / "model"), "--size", "32", "--out", str(out), *more]) == 0
    return out


def test_two_checkpoints_of_one_name_are_told_apart_by_their_hash(everything, tmp_path, capsys):
    results = Results.load(everything)
    newer = replace(results, rows=[replace(row, model_sha256="ab" * 32, number=replace(row.number, value=0.5)) for row in results.rows])
    newer.save(tmp_path / "newer")
    assert cli.main(["evaluate", "table", str(everything), str(tmp_path / "newer"), "--out", str(tmp_path / "t.html")]) == 0
    told, page = capsys.readouterr().out, (tmp_path / "t.html").read_text()
    first = next(row for row in results.rows if row.metric == "psnr")
    for text in (told, page):
        assert f"{first.model} sha256 {first.model_sha256[:12]}" in text and f"{first.model} sha256 abababababab" in text
    assert cli.main(["evaluate", "table", str(everything), "--out", str(tmp_path / "new" / "folder" / "t.html")]) == 0
    assert "; " + first.model + " sha256" not in capsys.readouterr().out, "one checkpoint needs no hash in the title"


def test_models_of_two_evaluations_are_compared_over_the_same_samples(everything, root, tmp_path, capsys):
    other = Results.load(everything)
    shutil.copytree(everything, tmp_path / "other")
    renamed = [replace(row, model="other") for row in other.rows if row.model == str(root / "model")]
    replace(other, rows=renamed, differences=[]).save(tmp_path / "other")
    lines = (tmp_path / "other" / "scores.jsonl").read_text().splitlines()
    kept = [json.loads(line) | {"model": "other"} for line in lines if json.loads(line)["model"] == str(root / "model")]
    (tmp_path / "other" / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in reversed(kept)))
    assert cli.main(["evaluate", "table", str(everything), str(tmp_path / "other"), "--out", str(tmp_path / "t.html")]) == 0
    page = (tmp_path / "t.html").read_text()
    assert re.search(rf"<td[^>]*>psnr</td><td[^>]*>{re.escape(str(root / 'model'))} - other</td><td[^>]*>0 \[0, 0\]</td><td[^>]*>p = 1.00</td>", page)
    (tmp_path / "other" / "scores.jsonl").write_text("no json")
    assert cli.main(["evaluate", "table", str(everything), str(tmp_path / "other"), "--out", str(tmp_path / "t.html")]) == 0
    assert "no differences between models" in (told := capsys.readouterr().err) and told.count("\n") == 1


def test_every_row_names_the_versions_that_its_number_may_depend_on(everything):
    results = Results.load(everything)
    for name in ("torch", "diffusers", "tokenizers", "pillow", "transformers"):
        version = importlib.metadata.version(name)
        assert all(f"{name} {version}" in row.number.library for row in results.rows) and results.environment[name].startswith(version)


def test_lines_of_synonyms_are_not_called_clips_names():
    synonyms = Labels(("tench, Tinca tinca", "goldfish, Carassius auratus", "cock"), (), (), ())
    for kind in ("templates", "names"):
        assert "a line of synonyms such as OpenCV's and not CLIP's name" in class_texts(synonyms, kind, None)[1]
        assert "synonyms" not in class_texts(replace(synonyms, names=("tench", "goldfish", "salt, sugar and so on")), kind, None)[1]


def test_own_templates_replace_those_of_clip_and_a_class_may_have_several_names():
    labels = Labels(("rose | roses", "tulip"), (), (0, 1), (0, 1))
    texts, how = class_texts(labels, "templates", None, ("a photo of a {}", "a drawing of a {}"))
    assert texts[0] == ["a photo of a rose", "a drawing of a rose", "a photo of a roses", "a drawing of a roses"]
    assert texts[1] == ["a photo of a tulip", "a drawing of a tulip"] and "'a photo of a {}'" in how and "CLIP" not in how
    assert class_texts(labels, "names", None)[0] == [["rose", "roses"], ["tulip"]]
    assert [len(of_class) for of_class in class_texts(labels, "templates", None)[0]] == [160, 80]


@pytest.mark.parametrize(
    ("given", "message"),
    [(["--template", "a photo"], "template 'a photo' has no {}"), (["--template", "a {}", "--prompts", "names"], "template is not used with prompts names")],
)
def test_a_template_that_cannot_be_used_is_refused_in_one_line(given, message, capsys):
    assert cli.main(["evaluate", "zeroshot", "mini", *given]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_only_an_images_own_captions_are_right_where_asked_for(root, tmp_path):
    data = labelled(tmp_path / "data", 2, 40)
    for path in data.rglob("*.txt"):
        path.write_text("a shape")
    shared, own = (measured(root, tmp_path / rule, "retrieval", "--data", str(data), "--equal-captions", rule) for rule in ("shared", "own"))
    results = Results.load(shared)
    assert {each.metric for each in results.not_run} == {f"{way}_r@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert "R@1 of 6 texts (1 unlike ones) is 100 % for any model" in {each.needs.removeprefix("more candidates: ") for each in results.not_run}
    found = rows(own)
    assert found[str(root / "model"), "image_to_text_r@1"]["value"] == 0, "equal texts are ties, and ties count against"
    assert "only an image's own texts are right for it" in found[str(root / "model"), "image_to_text_r@1"]["how"]


def test_equal_names_of_unlike_pictures_are_unlike_sets_and_unlike_names_of_equal_ones_are_not(root, tmp_path):
    one, other, copy = labelled(tmp_path / "a" / "set", 2, 1), labelled(tmp_path / "b" / "set", 2, 9), labelled(tmp_path / "c" / "copy", 2, 1)
    hashes = [settings(measured(root, tmp_path / f"out-{i}", "retrieval", "--data", str(d)), "image_to_text_r@1") for i, d in enumerate((one, other, copy))]
    assert hashes[0]["data_sha256"] != hashes[1]["data_sha256"] and hashes[0]["captions"] == hashes[1]["captions"]
    assert hashes[0]["data_sha256"] == hashes[2]["data_sha256"]
    (one / "star" / "0.txt").write_text("another caption")
    assert settings(measured(root, tmp_path / "again", "retrieval", "--data", str(one)), "image_to_text_r@1")["captions"] != hashes[0]["captions"]


def test_other_classes_other_prompts_and_other_training_pictures_are_other_protocols(root, tmp_path):
    data, train = ("--data", str(root / "data")), ("--train", str(root / "train"), "--least", "2", "--k", "3")
    labels = [settings(measured(root, tmp_path / kind, "zeroshot", *data, "--prompts", kind), "zeroshot_top_1")["labels"] for kind in ("templates", "names")]
    assert labels[0] != labels[1]
    other = labelled(tmp_path / "train", 5, 77)
    probes = [
        settings(measured(root, tmp_path / f"probe-{i}", "probe", *data, "--train", str(folder), *train[2:]), "knn_top_1")["labels"]
        for i, folder in enumerate((root / "train", other))
    ]
    assert probes[0] != probes[1] and "sub-folder" in probes[0]


def test_training_pictures_are_found_among_the_test_pictures_however_they_are_spelled(root, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    for spelled in ("./data", "data/", str(root / "train" / ".." / "data")):
        assert (
            cli.main(
                ["evaluate", "probe", str(root / "model"), "--data", "data", "--train", spelled, "--least", "2", "--size", "32", "--out", str(tmp_path / "x")]
            )
            == 2
        )
        assert "must not be measured on what it was fitted to" in capsys.readouterr().err


def test_one_picture_has_no_distance_of_sets_and_the_rest_is_measured(root, tmp_path):
    results = Results.load(measured(root, tmp_path / "out", "reconstruction", "--data", str(root / "data"), "--count", "1"))
    assert "psnr" in {row.metric for row in results.rows} and not any(row.metric.startswith("KID") for row in results.rows)
    assert {each.metric for each in results.not_run if each.needs == "two images or more"} == {"KID on EfficientNet-Lite0 features"}


def test_a_file_name_that_is_no_text_ends_no_evaluation(root, tmp_path):
    data = labelled(tmp_path / "data", 2, 3)
    os.rename(os.fsencode(data / "star" / "1.png"), os.fsencode(data / "star") + b"/caf\xe9.png")
    os.rename(os.fsencode(data / "star" / "1.txt"), os.fsencode(data / "star") + b"/caf\xe9.txt")
    (data / "star" / "2.png").write_bytes(b"")
    os.rename(os.fsencode(data / "star" / "2.png"), os.fsencode(data / "star") + b"/\xff.png")
    out = measured(root, tmp_path / "out", "all", "--data", str(data), "--tokenizer", "simple")
    assert (out / "report.html").is_file() and len(Results.load(out).skipped) == 1


def test_peers_alone_need_no_model_of_ours(root, tmp_path):
    save_vae(tmp_path / "flux", "flux-vae")
    argv = ["evaluate", "reconstruction", "--data", str(root / "data"), "--size", "32", "--peer", "flux-vae", "--peer-folder", f"flux-vae={tmp_path / 'flux'}"]
    assert cli.main([*argv, "--metrics", "psnr", "--out", str(tmp_path / "out")]) == 0
    [row] = [row for row in Results.load(tmp_path / "out").rows if row.metric == "psnr"]
    assert row.licence == "Apache-2.0" and "padded to multiples of 16" in row.note


def test_what_is_left_out_is_told_on_the_page_in_the_file_and_on_the_terminal(root, tmp_path, capsys):
    data = labelled(tmp_path / "data", 2, 3)
    (data / "star" / "0.txt").unlink()
    out = measured(root, tmp_path / "out", "retrieval", "--data", str(data))
    assert "left out: retrieval" in capsys.readouterr().out and "without a caption" in (out / "report.html").read_text()
    assert [(each["reason"], each["count"]) for each in Results.load(out).left_out] == [("without a caption", 1)]


def test_names_are_shown_as_they_are_and_never_run(tmp_path, capsys):
    bad = Row("[/b]<script>", "", Number("psnr", 1.0, 1, "<b>"), Setting("[a-c]*.tar", "0" * 64, "<i>", "square", "fp32", 0))
    Results([bad], command="<script>").save(tmp_path / "r")
    assert cli.main(["evaluate", "table", str(tmp_path / "r"), "--out", str(tmp_path / "t.html")]) == 0
    page = (tmp_path / "t.html").read_text()
    assert "<script>" not in page and "<i>" not in page and "[a-c]*.tar" in capsys.readouterr().out
    values = json.loads((tmp_path / "r" / "results.json").read_text())
    values["rows"][0]["value"] = "1"
    (tmp_path / "r" / "results.json").write_text(json.dumps(values))
    assert cli.main(["evaluate", "table", str(tmp_path / "r"), "--out", str(tmp_path / "t.html")]) == 2


# -- tables ---------------------------------------------------------------------------------------------------------

SETTING = Setting("set", "0" * 64, "64x64", "square", "fp32", 0)


def row(model: str = "a", metric: str = "psnr", value: float = 1.0, setting: Setting = SETTING, **changes) -> Row:
    return Row(model, "", Number(metric, value, changes.pop("count", 9), changes.pop("how", "mean"), **changes), setting)


@pytest.mark.parametrize(
    "other",
    [
        row("b", count=10),
        row("b", how="pooled"),
        row("b", network="Inception", network_sha256="1" * 64),
        *(
            row("b", setting=Setting(**{**SETTING.__dict__, **change}))
            for change in ({"resolution": "128x128"}, {"crop": "adm"}, {"dtype": "bf16"}, {"seed": 1})
        ),
        row("b", setting=Setting(**{**SETTING.__dict__, "data_sha256": "2" * 64})),
    ],
    ids=lambda r: str(r.protocol)[-60:],
)
def test_two_unlike_protocols_cannot_stand_in_one_table(other):
    with pytest.raises(ValueError, match="cannot stand in one table"):
        table([row("a"), other])
    assert [len(lines) for _, lines in split([row("a"), other])] == [1, 1]


def test_like_numbers_stand_side_by_side_whatever_the_library_and_the_path():
    elsewhere = row("b", value=2.0, library="another version", setting=Setting(**{**SETTING.__dict__, "data": "/other/path"}), detail="L2 3")
    [(_, [line])] = split([row("a"), elsewhere])
    assert {name: number.value for name, number in line.values.items()} == {"a": 1.0, "b": 2.0}
    with pytest.raises(ValueError, match="there twice"):
        table([row("a"), row("a", value=3.0)])


def test_results_come_back_from_their_file_as_they_were(everything, tmp_path):
    results = Results.load(everything)
    assert Results.load(results.save(tmp_path)) == results
    for text in ("{}", "[]", "x", json.dumps({"format": 99}), json.dumps({"format": 1, "rows": [{}]})):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match=r"is not a results\.json of"):
            Results.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="openvision3 evaluate writes them"):
        Results.load(tmp_path / "none")


def test_several_evaluations_are_one_page_with_the_papers_first_figure(everything, root, tmp_path, capsys):
    assert (
        cli.main(
            ["evaluate", "table", str(everything), str(root / "batch-1" if (root / "batch-1").exists() else everything), "--out", str(tmp_path / "t.html")]
        )
        == 0
    )
    page = (tmp_path / "t.html").read_text()
    assert "first figure" in page and "How it was measured" in page and "not run" in capsys.readouterr().out
    assert cli.main(["evaluate", "table", "--out", str(tmp_path / "t.html")]) == 2


def test_a_summary_says_what_was_left_out_and_once_what_was_not_run(tmp_path):
    def results(**more) -> Results:
        needs = [NotRun("a", "rfid", "Inception"), NotRun("b", "rfid", "Inception"), NotRun("a", "lpips", "AlexNet")]
        return Results([row(), row("b")], needs, command="evaluate", **more)

    one = results(skipped=[{"key": "x", "reason": "truncated", "detail": ""}] * 7)
    other = results(left_out=[{"of": "retrieval", "model": "b", "reason": "without a caption", "count": 5}])
    given = [one, one, other]
    page = write_summary(tmp_path / "t.html", [], [each for one in given for each in one.not_run], given).read_text()
    assert "2 evaluations" in page
    assert page.count("<td>Inception</td>") == page.count("<td>rfid of a, rfid of b</td>") == page.count("<td>AlexNet</td>") == 1
    for line in ((1, "all", "", "truncated", 7), (2, "retrieval", "b", "without a caption", 5)):
        assert page.count("".join(f"<td>{cell}</td>" for cell in line)) == 1


@pytest.mark.parametrize("apart", [{"captions": "others"}, {"crop": "adm"}, {"seed": 1}, {"how": "pooled"}, {"network": "another"}, {"dtype": "bf16"}], ids=str)
def test_bars_of_unlike_protocols_are_in_unlike_groups_with_unlike_labels(apart):
    setting = replace(SETTING, **{name: value for name, value in apart.items() if hasattr(SETTING, name)})
    other = row("b", setting=setting, **{name: value for name, value in apart.items() if not hasattr(SETTING, name)})
    (one, first), (two, second) = bar_groups([row("a"), other, row("c"), row("a")])
    assert one != two and (set(first), set(second)) == ({"a", "c"}, {"b"})


def test_one_model_measured_twice_hides_neither_bar():
    assert [numbers["a"].value for _, numbers in bar_groups([row("a"), row("a", value=3.0)])] == [1.0, 3.0]


def test_shares_are_shown_as_percent_and_psnr_in_db():
    told = {metric: shown(metric, Number(metric, 0.5, 1, "x", spread=0.1)) for metric in ("psnr", "image_to_text_r@1", "knn_top_1", "KID on x", "ssim")}
    assert told == {"psnr": "0.50 dB", "image_to_text_r@1": "50.0 %", "knn_top_1": "50.0 %", "KID on x": "0.5000 ± 0.1000", "ssim": "0.5000"}


def test_words_that_the_tokenizer_does_not_know_are_counted_in_rows_and_told(root, tmp_path, capsys):
    data = labelled(tmp_path / "data", 2, 40)
    for place in data.rglob("*.txt"):
        place.write_text("\u7ea2\u5fc3\n", encoding="utf-8")
    for kind in ("retrieval", "captioning"):
        measured(root, tmp_path / kind, kind, "--data", str(data))
        assert f"{kind} of {root}/model: 100 % of the" in (said := capsys.readouterr().err) and "are unknown to the tokenizer" in said
        rows = json.loads((tmp_path / kind / "results.json").read_text())["rows"]
        assert all("% of the" in row["detail"] and "unknown to the tokenizer" in row["detail"] for row in rows)
