"""Exported folders open where openvision3 cannot be imported, and give the numbers of the model; they are whole, and hold licence, notice and a card."""

import ast
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipeline import NAMES, make_pipeline, photo, pipeline, write_photo

from openvision3.cli import main
from openvision3.export import diffusers, transformers
from openvision3.export.modules import write_modules

ROOT = Path(__file__).parents[2]

REFUSE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "openvision3":
            raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Refuse())
"""

IMPORTS = """
import sys
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
"""

TRANSFORMERS = """
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, pipeline
folder, image, answer = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text=TEXTS, images=[Image.open(image)], padding=True, return_tensors="pt")
with torch.no_grad():
    output = model(**inputs)
    tokens = model.vision_model(inputs["pixel_values"]).last_hidden_state
scores = pipeline("zero-shot-image-classification", model=folder, trust_remote_code=True)(image, candidate_labels=TEXTS, hypothesis_template="{}")
by_label = {row["label"]: row["score"] for row in scores}
pixels = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)(Image.open(image), return_tensors="pt")["pixel_values"]
assert torch.equal(pixels, inputs["pixel_values"])
extracted = {task: pipeline(task, model=folder, trust_remote_code=True) for task in ("image-feature-extraction", "feature-extraction")}
assert torch.allclose(extracted["image-feature-extraction"](image, return_tensors=True), tokens, atol=1e-5)
assert torch.allclose(extracted["image-feature-extraction"](image, return_tensors=True, pool=True), output.vision_model_output.pooler_output, atol=1e-5)
words = extracted["feature-extraction"](TEXTS[0], return_tensors=True)
assert torch.allclose(words[0], output.text_model_output.last_hidden_state[0, : words.shape[1]], atol=1e-5)
save_file({"logits": output.logits_per_image.contiguous(), "tokens": tokens, "scores": torch.tensor([by_label[text] for text in TEXTS])}, answer)
"""

DIFFUSERS = """
from diffusers import AutoModel
folder, images, answer = sys.argv[1:]
vae = AutoModel.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    latents = vae.encode(load_file(images)["images"]).latent
    save_file({"latents": latents.contiguous(), "sample": vae.decode(latents).sample.contiguous()}, answer)
"""


def run_elsewhere(code: str, *arguments: Path, cache: Path, python: str = "") -> None:
    """In a process that cannot import openvision3, from a folder without it. `python` is of an environment without it; else its import is refused."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    code = f"{'' if python else REFUSE}{IMPORTS}TEXTS = {[*NAMES]!r}\n{code}"
    command = [python or sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cache.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory) -> str:
    """The Python of a new virtual environment, which has the libraries of this one and not openvision3."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, symlinks=True)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")  # without the .pth files in it, such as that of an editable install
    python = str(folder / "bin" / "python")
    seen = subprocess.run([python, "-c", "import transformers, openvision3"], cwd=folder, env={}, capture_output=True, text=True)
    if "No module named 'openvision3'" not in seen.stderr:
        pytest.skip("openvision3 is installed among the libraries")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [False, True])
@torch.no_grad()
def test_transformers_opens_the_folder_without_openvision3_and_gets_the_same_numbers(tmp_path, fresh, request):
    photo(60, 40).save(tmp_path / "image.png")
    transformers.export(pipeline(), tmp_path / "model", "keep")
    python = request.getfixturevalue("fresh_python") if fresh else ""
    run_elsewhere(TRANSFORMERS, tmp_path / "model", tmp_path / "image.png", tmp_path / "answer", cache=tmp_path / "modules", python=python)
    answer, ours, image = load_file(tmp_path / "answer"), pipeline(), photo(60, 40)
    assert torch.allclose(answer["tokens"], ours.encode(image), atol=1e-5)
    assert torch.allclose(answer["logits"], ours.model.temperature * ours.embed_images(image) @ ours.embed_texts(NAMES).T, atol=1e-4)
    scores = dict(ours.classify(image, NAMES))
    assert answer["scores"].tolist() == pytest.approx([scores[name] for name in NAMES], abs=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_diffusers_opens_the_folder_without_openvision3_and_gets_the_same_numbers(tmp_path):
    images = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_file({"images": images}, tmp_path / "images")
    diffusers.export(pipeline(), tmp_path / "model", [images])
    run_elsewhere(DIFFUSERS, tmp_path / "model", tmp_path / "images", tmp_path / "answer", cache=tmp_path / "modules")
    answer, tokens = load_file(tmp_path / "answer"), pipeline().model.encode(images)
    assert torch.allclose(answer["latents"].mean((0, 2, 3)), torch.zeros(64), atol=1e-4)
    assert torch.allclose(answer["latents"].flatten(2).mT, (tokens - tokens.mean((0, 1))) / tokens.std((0, 1), correction=0), atol=1e-3)
    assert torch.allclose(answer["sample"], pipeline().model.decode(tokens, (4, 3)), atol=1e-4)


@pytest.mark.parametrize("first", [*transformers.MODULES, "adapters.diffusers_model", "model.losses"])
def test_a_copy_of_a_module_is_its_source_with_relative_imports_and_names_all_that_it_needs(first, tmp_path):
    files = write_modules({first: "opened"}, tmp_path)
    assert "opened.py" in files and sorted(path.name for path in tmp_path.iterdir()) == files
    needed = {}
    for file in files:
        text = (tmp_path / file).read_text()
        imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
        assert not [node.module for node in imports if (node.module or "").startswith("openvision3") and not node.level]
        needed[file] = {f"{name}.py" for node in imports if node.level for name in ([node.module] if node.module else [alias.name for alias in node.names])}
        assert all(name in files for name in needed[file])
    assert needed["opened.py"] == {*files} - {"opened.py"}
    source = (ROOT / "src/openvision3" / f"{first.replace('.', '/')}.py").read_text()
    body = lambda text: [line for line in text.splitlines() if line.strip() and "import" not in line and not line.startswith("#")]  # noqa: E731
    assert body((tmp_path / "opened.py").read_text()) == body(source)


def test_a_folder_holds_licence_notice_credits_and_a_card_and_files_that_anybody_may_read(tmp_path):
    ours = make_pipeline()
    ours.save(tmp_path / "own")
    (tmp_path / "own" / "CREDITS.txt").write_text("a.jpg by A")
    ours.folder, ours.training = tmp_path / "own", {"recipe": "tiny", "licence": "CC BY-SA 4.0"}
    for name, write in (("transformers", transformers.export), ("diffusers", diffusers.export)):
        files = write(ours, tmp_path / name)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == files
        for legal in ("LICENSE", "NOTICE"):
            assert (tmp_path / name / legal).read_bytes() == (ROOT / legal).read_bytes()
        assert (tmp_path / name / "CREDITS.txt").read_text() == "a.jpg by A"
        text = (tmp_path / name / "README.md").read_text()
        assert f"library_name: {name}" in text and "trust_remote_code=True" in text and "CC BY-SA 4.0" in text and "CREDITS.txt" in text
        assert all(path.stat().st_mode & 0o044 == (tmp_path / name / "config.json").stat().st_mode & 0o044 for path in (tmp_path / name).iterdir())


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    pipeline().save(tmp_path / "model")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    model = str(tmp_path / "model")
    for words, message in (
        (["transformers", model, "--out", str(taken)], "not empty"),
        (["transformers", model, "--out", str(tmp_path / "new"), "--fit", "stretch"], "Choose one of crop, pad, keep"),
        (["transformers", str(tmp_path / "nothing"), "--out", str(tmp_path / "new")], "nothing"),
        (["diffusers", model, "--out", str(tmp_path / "new"), "--images", "1"], "at least 2"),
        (["onnxx", model], "unknown command"),
    ):
        assert main(["export", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    monkeypatch.setattr(diffusers, "write_legal", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        diffusers.export(pipeline(), tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "taken"] and (taken / "mine.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="two or more"):
        diffusers.export(pipeline(), tmp_path / "new", [torch.zeros(1, 3, 64, 64)])


def test_the_command_writes_both_folders_with_statistics_of_named_images(tmp_path, capsys):
    pipeline().save(tmp_path / "model")
    for number in range(3):
        write_photo(tmp_path / "images" / f"{number}.png", 64, 64, number)
    assert main(["export", "transformers", str(tmp_path / "model"), "--out", str(tmp_path / "t"), "--json"]) == 0
    assert '"modeling_openvision3.py"' in capsys.readouterr().out
    assert main(["export", "diffusers", str(tmp_path / "model"), "--out", str(tmp_path / "d"), "--data", str(tmp_path / "images")]) == 0
    assert "AutoModel" in capsys.readouterr().out
    from openvision3.adapters.diffusers_model import AutoencoderOpenVision3

    tokens = pipeline().model.encode(torch.cat([pipeline().prepare(photo(64, 64, number)) for number in range(3)]))
    config = AutoencoderOpenVision3.from_pretrained(tmp_path / "d").config
    assert torch.allclose(torch.tensor(config.latents_mean), tokens.mean((0, 1)), atol=1e-5)
    assert torch.allclose(torch.tensor(config.latents_std), tokens.std((0, 1), correction=0), atol=1e-5)
    with pytest.raises(ValueError, match="written for transformers"):
        from openvision3.pipeline import load

        load(tmp_path / "t")
