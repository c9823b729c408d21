"""The demo: from nothing to a page that stands alone, in one command; it writes over no folder of anything else."""

import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from openvision3 import cli
from openvision3.experiments import demo


@pytest.mark.parametrize("case", ["a folder of something else", "a run that is none", "a file"])
def test_the_demo_refuses_a_folder_that_is_not_a_demo(case, tmp_path, capsys):
    out = tmp_path / "demo"
    kept = {"a folder of something else": out / "thesis.tex", "a run that is none": out / "run" / "main.c", "a file": out}[case]
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("mine")
    assert cli.main(["demo", "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"openvision3: {out} exists and is not a demo; name another folder with --out\n"
    assert kept.read_text() == "mine" and [p for p in tmp_path.rglob("*") if p.is_file()] == [kept]


@pytest.mark.parametrize("left", [("openmoji.png",), ("openmoji.png", "run/log.txt", "run/checkpoints/step-1/config.json", "results.json", "report.html")])
def test_an_earlier_demo_gives_way_and_nothing_else_does(left, tmp_path):
    for name in left:
        (tmp_path / "demo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "demo" / name).touch()
    kept = tmp_path / "demo" / "rebuilt.png"
    if len(left) > 1:  # a finished demo, in which someone has worked on
        kept.touch()
    demo._clear(tmp_path / "demo")
    assert list((tmp_path / "demo").iterdir()) == [kept] * (len(left) > 1)


@pytest.mark.slow
def test_the_demo_ends_in_a_page_with_all_that_it_promises(tmp_path):
    command = [sys.executable, "-m", "openvision3"]
    found = subprocess.run([*command, "demo", "--minutes", "0.5", "--draw", "0.1"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    out = tmp_path / "demo"
    assert found.stdout.splitlines()[0] == f"report: {out / 'report.html'}"
    assert found.stdout.splitlines()[1] == f"try it: {sys.executable} -m openvision3 caption IMAGE --model demo/run"
    assert found.stdout.splitlines()[2] == f'draw:   {sys.executable} -m openvision3 generate "red heart" --model demo/drawing'
    assert "steps/s" in found.stderr and re.search(r"step \d+/\d+ .*loss", found.stderr), "progress is shown as it trains"

    page = (out / "report.html").read_text(encoding="utf-8")
    for heading in (
        "Numbers",
        "Curves",
        "Original | VAE alone | rebuilt from tokens",
        "Captions",
        "Zero-shot by emoji group",
        "Drawn from words",
        "How this was measured",
    ):
        assert f"<h2>{heading}" in page
    assert "image to name, R@1" in page and "name to image, R@5" in page
    assert page.count("<figure>") == 24 + 16 and page.count('class="card"') == 32
    assert not re.search(r"https?:", page)

    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"reconstruction", "vae_reconstruction", "retrieval", "captions", "zeroshot", "zeroshot_groups"}
    assert {row["count"] for name in ("retrieval", "captions", "reconstruction") for row in results[name]} == {256}
    assert 0 < results["reconstruction"][0]["value"] <= results["vae_reconstruction"][0]["value"]
    Image.open(out / "openmoji.png").verify()

    found = subprocess.run(
        [*command, "caption", "demo/openmoji.png", "--model", "demo/run", "--json"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert len(json.loads(found.stdout)) == 1
