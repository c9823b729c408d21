"""A model of the user's own, named as FILE.py:FUNCTION, is measured as any other, and what it does amiss is one line."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny_pipeline import write_photo

from openvision3 import cli
from openvision3.evaluate.peers.own import KINDS
from openvision3.evaluate.peers.table import load_peer

PAGE = (Path(__file__).parents[3] / "docs" / "peers.md").read_text()

ABLE = """
import torch
from neighbour import SHIFT
from openvision3.data.text import TextCount
from openvision3.evaluate.protocol import Functions


def functions(device, precision):
    def vectors(rows, seed):
        return torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(hash(bytes(row)) % 1000 + seed)) for row in rows])

    return Functions(
        "able", 32, precision, note="a note",
        reconstruct=lambda images: images.to(device) + SHIFT,
        reconstruct_noisy=lambda images, sigmas, keys: (images + sigma for sigma in sigmas),
        embed_images=lambda images: vectors(images.flatten(1).mul(9).to(torch.uint8).tolist(), 0),
        embed_texts=lambda texts: vectors([text.encode() for text in texts], 1),
        count_text=lambda texts: TextCount(),
        caption=lambda images: ["a square"] * len(images),
        features=lambda images: images.flatten(1)[:, ::100],
    )
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Labelled images with captions, and the working folder."""
    for side, count in (("data", 2), ("train", 3)):
        for number, kind in enumerate(("circle", "square", "star")):
            for i in range(count):
                path = write_photo(tmp_path / side / kind / f"{i}.png", 40, 40, i + 10 * number + (500 if side == "train" else 0))
                path.with_suffix(".txt").write_text(f"a {kind}")
    (tmp_path / "neighbour.py").write_text("SHIFT = 0.25\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str, name: str = "mine.py") -> str:
    (folder / name).write_text(text)
    return f"{name}:functions"


def evaluate(kind: str, *more: str) -> int:
    return cli.main(["evaluate", kind, "--data", "data", "--size", "32", "--out", "out", *more])


def test_the_example_of_the_documentation_is_ten_lines_and_is_measured(folder):
    [example] = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(example.splitlines()) <= 10
    name = write(folder, example)
    assert f"--peer {name}" in PAGE
    assert evaluate("reconstruction", "--peer", f"{name},vae", "--metrics", "psnr") == 0
    rows = json.loads((folder / "out" / "results.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"four by four", "VAE embedded"}
    [mine] = [row for row in rows if row["model"] == "four by four" and row["metric"] == "psnr"]
    assert 10 < mine["value"] < 40 and "loaded by mine.py, sha256 " in mine["note"]


def test_every_kind_of_evaluation_is_open_to_it(folder):
    name = write(folder, ABLE)
    assert evaluate("all", "--peer", name, "--train", "train", "--least", "2", "--k", "2", "--tokenizer", "simple", "--metrics", "psnr") == 0
    results = json.loads((folder / "out" / "results.json").read_text())
    metrics = {row["metric"] for row in results["rows"]}
    assert {"psnr", "psnr, sigma 0.4", "image_to_text_r@1", "exact_match", "zeroshot_top_1", "knn_top_1", "linear_probe_top_1"} <= metrics
    assert {idle["metric"].partition("@")[0] for idle in results["not_run"]} <= {"image_to_text_r", "text_to_image_r", "meteor"}, "R@5 of six samples; no Java"
    assert all(row["model"] == "able" and row["note"].startswith("a note; loaded by mine.py") for row in results["rows"])


def test_what_it_cannot_do_is_listed_as_not_run(folder, capsys):
    name = write(folder, "from openvision3.evaluate.protocol import Functions\ndef functions(device, precision):\n"
                         "    return Functions('plain', 32, features=lambda images: images.flatten(1)[:, :9])\n")  # fmt: skip
    assert evaluate("reconstruction", "--peer", name) == 2
    assert "plain cannot rebuild" in capsys.readouterr().err


RETURNING = "import torch\nfrom openvision3.evaluate.protocol import Functions\ndef functions(device, precision):\n    return {}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import a_package_that_nobody_has", "mine.py failed: ModuleNotFoundError: No module named 'a_package_that_nobody_has'"),
        ("def functions(:", "mine.py failed: SyntaxError"),
        ("def other(device, precision): ...", "mine.py defines no function 'functions'; choose one of other"),
        ("x = 1", "mine.py defines no function 'functions'; choose one of none"),
        (RETURNING.format("1"), "mine.py:functions returned a int; return openvision3.evaluate.protocol.Functions"),
        (RETURNING.format("torch.load('nowhere.pt')"), "mine.py:functions failed: FileNotFoundError"),
        (RETURNING.format("Functions('a', 32)"), f"without any function; fill at least one of {', '.join(KINDS)}"),
        (RETURNING.format("Functions('', 32, caption=str)"), "name '' and size 32"),
        (RETURNING.format("Functions('a', 0, caption=str)"), "name 'a' and size 0"),
        ("def functions(): ...", "mine.py:functions failed: TypeError: functions() takes 0 positional arguments but 2 were given"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(folder, capsys, text, words):
    assert evaluate("reconstruction", "--peer", write(folder, text)) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not (folder / "out").exists()


def test_a_file_that_is_not_there_and_a_name_that_is_taken_are_refused(folder, capsys):
    assert evaluate("reconstruction", "--peer", "nowhere.py:functions") == 2
    assert "no such file: nowhere.py; --peer FILE.py:FUNCTION" in capsys.readouterr().err
    write(folder, RETURNING.format("Functions('twice', 32, reconstruct=lambda images: images)"))
    write(folder, RETURNING.format("Functions('twice', 32, reconstruct=lambda images: images)"), "other.py")
    assert evaluate("reconstruction", "--peer", "mine.py:functions,other.py:functions") == 2
    assert "two models have the same name (twice, twice)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("reconstruct=lambda images: images[..., :8]", r"reconstruct returned shape \(2, 3, 32, 8\), expected \(2, 3, 32, 32\)"),
        ("reconstruct=lambda images: images / 0", "reconstruct returned numbers that are not finite"),
        ("reconstruct=lambda images: None", "reconstruct returned a NoneType, not a tensor"),
        ("reconstruct=lambda images: images @ torch.ones(5, 5)", "reconstruct failed: RuntimeError: .*32"),
        ("embed_images=lambda images: images", r"embed_images returned shape \(2, 3, 32, 32\), expected \(2, '...'\)"),
        ("features=lambda images: images.flatten(1)[:1]", r"features returned shape \(1, 3072\), expected \(2"),
        ("caption=lambda images: ['one']", "caption returned no list of 2 captions"),
        ("reconstruct_noisy=lambda images, sigmas, keys: [None]", "reconstruct_noisy returned a NoneType"),
    ],
)
def test_a_function_that_returns_something_else_is_reported_in_one_line(folder, function, words):
    model = load_peer(write(folder, RETURNING.format(f"Functions('odd', 32, {function})")))
    kind = function.partition("=")[0]
    with pytest.raises(ValueError, match=rf"^mine\.py:functions: {words}"):
        getattr(model, kind)(torch.zeros(2, 3, 32, 32), *([[0.1], ["a", "b"]] if kind == "reconstruct_noisy" else []))


def test_vectors_get_unit_length_and_images_are_clamped(folder):
    made = "Functions('own', 32, reconstruct=lambda images: images + 9, embed_images=lambda images: images.flatten(1).double() + 1)"
    model = load_peer(write(folder, RETURNING.format(made)))
    images = torch.zeros(2, 3, 32, 32)
    assert torch.equal(model.reconstruct(images), torch.ones_like(images))
    vectors = model.embed_images(images)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    assert vectors.dtype == torch.float32
