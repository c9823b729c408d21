"""The command line: every verb on files, folders and globs; bad input is one line on stderr, exit code 2, nothing written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_pipeline import photo, pipeline, write_photo

import openvision3 as ov3
from openvision3 import cli
from openvision3.cli import use
from openvision3.data.familiarity import Calibration, Familiarity
from openvision3.train import open_data


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipeline().save(folder)
    return str(folder)


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A working folder with images: pics/a.png, pics/b.jpg, more/a.png, and more/notes.txt."""
    for seed, name in enumerate(("pics/a.png", "pics/b.jpg", "more/a.png")):
        write_photo(tmp_path / name, 60, 40, seed)
    (tmp_path / "more" / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def refused(capsys, *argv: str) -> str:
    """Run a command that must be refused; returns its one line."""
    before = tree(Path.cwd())
    assert cli.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("openvision3: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert tree(Path.cwd()) == before, "nothing is written"
    return err


# -- every verb -----------------------------------------------------------------------------------------------------

VERBS = {
    "reconstruct": ([], {"image", "file", "width", "height", "psnr", "vae_psnr"}),
    "caption": ([], {"image", "caption", "confidence", "in_distribution"}),
    "classify": (["--labels", "red heart", "black cat", "--top", "2"], {"image", "labels", "confidence", "in_distribution"}),
    "encode": ([], {"image", "file", "tokens", "embedding", "height", "width"}),
}


def test_a_value_in_an_error_is_whole_however_narrow_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    long = "/a/long/path/to/some/folder/of/pictures/on/a/disk/with/a/name/that/is/longer"
    for argv, expected in (
        (["train", "tiny", "--steps", long], f"--steps must be a whole number, not '{long}'. See `openvision3 train tiny --help`"),
        (["caption", "a.png", "--top-p", long], f"--top-p must be a number, not '{long}'. See `openvision3 caption --help`"),
        (["train", "tiny", "--precision", long], f"--precision cannot be '{long}'. Choose one of auto, bf16, fp32. See `openvision3 train tiny --help`"),
        (["train", "tiny", "--crop-area", long], "--crop-area needs 2 values. See `openvision3 train tiny --help`"),
        (["train", "tiny", "--crop-area", "1", long], f"--crop-area must be numbers, not '1', '{long}'. See `openvision3 train tiny --help`"),
        (["train", "tiny", "--optimizer.learning-rate", "a'b"], '--optimizer.learning-rate must be a number, not "a\'b". See'),
        (["classify", "a.png", "--lables", long], "unknown option '--lables'. Did you mean '--labels'? See `openvision3 classify --help`"),
        (["info", "mini", long], f"'{long}' is one argument too many. See `openvision3 info --help`"),
        (["evaluate", "reconstruction", "--metrics", long], f"unknown metric '{long}'. Choose from psnr, "),
    ):
        assert cli.main(argv) == 2
        assert f"openvision3: {expected}" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_files_folders_and_globs_and_json_is_pure(verb, work, model, capsys):
    options, fields = VERBS[verb]
    argv = [verb, "more/a.png", "pics", "pics/*.jpg", "--model", model, *options]
    assert cli.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split(" -> ")[0] for line in lines] == ["more/a.png", "pics/a.png", "pics/b.jpg"]
    assert cli.main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [row["image"] for row in found] == ["more/a.png", "pics/a.png", "pics/b.jpg"] and all(set(row) == fields for row in found)
    assert err == ""


def test_reconstruct_writes_the_rebuilt_picture_and_how_close_it_is(work, model, capsys):
    assert cli.main(["reconstruct", "pics/a.png", "more", "--model", model, "--out", "new/rebuilt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["file"] for row in found] == ["new/rebuilt/a.png", "new/rebuilt/a-2.png"], "images of one name do not overwrite each other"
    assert tree(work / "new") == {"rebuilt", "rebuilt/a.png", "rebuilt/a-2.png"}
    own = ov3.load(model)
    rebuilt = ov3.to_pil(own.reconstruct("pics/a.png"))[0]
    written = Image.open(found[0]["file"])
    assert np.array_equal(np.asarray(written), np.asarray(rebuilt)) and written.size == (64, 43)
    original = np.asarray(ov3.to_pil(own.scaled("pics/a.png")[0]), np.float64)
    expected = 10 * np.log10(255**2 / np.mean((original - np.asarray(written, np.float64)) ** 2))
    assert found[0]["psnr"] == pytest.approx(expected, abs=0.01)


def test_reconstruct_keeps_the_own_size_on_request_and_shows_three_side_by_side(work, model, capsys):
    assert cli.main(["reconstruct", "pics/a.png", "--model", model, "--size", "0", "--beside"]) == 0
    assert "60x40" in capsys.readouterr().out
    width, height = Image.open("reconstructed/a.png").size
    assert width > 3 * 60 and height > 40


def test_encode_writes_what_the_python_face_gives(work, model):
    assert cli.main(["encode", "pics/a.png", "--model", model]) == 0
    own = ov3.load(model)
    with safe_open("tokens/a.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("tokens"), own.encode("pics/a.png")[0])
        assert torch.equal(file.get_tensor("embedding"), own.embed_images("pics/a.png")[0])
        metadata = file.metadata()
    assert own.decode(own.encode("pics/a.png"), size=(int(metadata["height"]), int(metadata["width"]))).shape == (1, 3, 43, 64)


def test_caption_and_classify_say_what_the_python_face_says(work, model, capsys):
    own = ov3.load(model)
    assert cli.main(["caption", "pics/a.png", "--model", model, "--beams", "2", "--max-length", "5"]) == 0
    assert capsys.readouterr().out == f"pics/a.png: {own.caption('pics/a.png', beams=2, max_length=5)[0]}\n"
    labels = ["red heart", "black cat", "dog face"]
    assert cli.main(["classify", "pics/a.png", "--labels", *labels, "--top", "2", "--model", model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[0]["labels"]
    assert [(row["label"], row["probability"]) for row in found] == [(label, round(p, 4)) for label, p in own.classify("pics/a.png", labels)[:2]]


def test_classify_takes_several_names_a_class_and_templates(work, model, capsys):
    argv = ["classify", "pics/a.png", "--labels", "red heart|blue heart", "black cat", "--template", "a {}", "{} face", "--model", model, "--json"]
    assert cli.main(argv) == 0
    found = json.loads(capsys.readouterr().out)[0]["labels"]
    expected = ov3.load(model).classify("pics/a.png", [["red heart", "blue heart"], "black cat"], ["a {}", "{} face"])
    assert [(row["label"], row["probability"]) for row in found] == [(label, round(p, 4)) for label, p in expected]


@pytest.mark.parametrize("threshold", [-1e6, 1e6])
def test_an_image_unlike_all_training_images_is_called_unsure(work, model, capsys, tmp_path, threshold):
    own = ov3.load(model)
    own.familiarity = Familiarity.fit(own.describe(own.prepare([photo(64, 64, seed) for seed in range(40)])))
    own.familiarity.calibration = Calibration(threshold, ("drawings", "flowers"), (0.0, 0.5, 0.01, 0.01), 0.5, {})
    own.save(tmp_path / "calibrated")
    for argv in (["caption"], ["classify", "--labels", "red heart", "black cat"]):
        argv = [argv[0], "pics/a.png", *argv[1:], "--model", str(tmp_path / "calibrated")]
        assert cli.main(argv) == 0
        unsure = "unsure: this looks like nothing that the model was trained on (drawings, flowers); its guess: "
        line = capsys.readouterr().out
        assert (unsure in line, "(confidence " in line) == ((True, False) if threshold > 1 else (False, True))
        assert cli.main([*argv, "--json"]) == 0
        [row] = json.loads(capsys.readouterr().out)
        assert row["in_distribution"] is (threshold < 1) and 0 < row["confidence"] < 1


def test_info_names_parts_vae_and_training(model, capsys):
    assert cli.main(["info", model]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("encoder", "latent_decoder", "text_encoder", "captioner", "16 tokens of 64", "embedded", "steps: 3"))
    assert cli.main(["info", model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["grid"] == [4, 4] and found["parameters"]["encoder"] == sum(p.numel() for p in pipeline().encoder.parameters())


def test_doctor_reports_this_machine(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__ and found["precision"] in ("bf16", "fp32") and isinstance(found["problems"], list)
    assert cli.main(["doctor"]) == 0
    assert torch.__version__ in capsys.readouterr().out


def test_train_saves_a_model_that_the_other_verbs_use(work, capsys, monkeypatch):
    monkeypatch.setattr(open_data, "EVALUATED", 8)
    assert cli.main(["train", "tiny", "--steps", "2", "--batch", "4", "--precision", "fp32", "--out", "run", "--log-every", "1"]) == 0
    assert cli.main(["caption", "pics/a.png", "--model", "run", "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == 1 and "step 2/2" in err, "progress is on stderr, results on stdout"


# -- images that cannot be read -----------------------------------------------------------------------------------


def test_unreadable_pictures_among_many_are_named_and_counted_and_the_others_done(work, model, capsys):
    (work / "pics" / "bad.png").write_bytes(b"no image")
    (work / "pics" / "cut.jpg").write_bytes((work / "pics" / "b.jpg").read_bytes()[:300])
    for options in ([], ["--json"]):
        assert cli.main(["caption", "pics", "--model", model, *options]) == 2
        out, err = capsys.readouterr()
        done = [row["image"] for row in json.loads(out)] if options else [line.split(":")[0] for line in out.splitlines()]
        assert done == ["pics/a.png", "pics/b.jpg"]
        lines = err.splitlines()
        assert len(lines) == 3 and "bad.png" in lines[0] and "cut.jpg" in lines[1] and lines[2] == "openvision3: 2 of 4 images skipped"


def test_one_unreadable_picture_alone_is_one_line_and_no_folder(work, model, capsys):
    assert "notes.txt holds text, which begins with" in refused(capsys, "reconstruct", "more/notes.txt", "--model", model)


# -- refusals -------------------------------------------------------------------------------------------------------

REFUSED = {
    "unknown command": (["recontsruct", "a.png"], r"unknown command 'recontsruct'\. Did you mean 'reconstruct'\? Run `openvision3 --help` for all commands\n"),
    "unknown option": (["caption", "pics", "--beems", "2"], r"unknown option '--beems'\. Did you mean '--beams'\? See `openvision3 caption --help`\n"),
    "option of another type": (["caption", "pics", "--beams", "two"], "--beams must be a whole number, not 'two'"),
    "option without value": (["caption", "pics", "--beams"], r"--beams"),
    "no images named": (["caption"], "no images given; name files, folders or globs"),
    "missing file": (["caption", "nowhere.png"], r"no such image: nowhere\.png"),
    "missing among others": (["caption", "pics", "nowhere.png"], r"no such image: nowhere\.png"),
    "folder without images": (["encode", "empty"], r"empty holds no images that are read; choose one of jpg"),
    "glob without matches": (["encode", "pics/*.tif"], r"no such image: pics/\*\.tif"),
    "labels missing": (["classify", "pics"], "labels"),
    "a name missing": (["classify", "pics", "--labels", "cat|", "dog"], "labels 'cat|', 'dog'"),
    "template without a place": (["classify", "pics", "--labels", "cat", "--template", "a drawing"], r"has no \{\} in the place of the class"),
    "labels empty": (["classify", "pics", "--labels"], "labels none"),
    "top of zero": (["classify", "pics", "--labels", "a", "--top", "0"], "top 0 cannot be used; give one label or more"),
    "unknown model": (["caption", "pics", "--model", "nowhere"], "unknown model 'nowhere'. Choose one of mini, a model folder or a run folder"),
    "model is a plain folder": (["caption", "pics", "--model", "pics"], r"pics is no model: it holds no model\.safetensors"),
    "unknown device": (["caption", "pics", "--device", "tpu"], "device 'tpu' is not supported.*choose one of auto, cpu, cuda and cuda:N"),
    "output is a file": (["encode", "pics", "--out", "more/notes.txt"], r"notes\.txt is a file; name a folder with --out"),
    "output among the images": (["reconstruct", "pics/*.jpg", "--out", "pics"], "pics holds the images that are read.*another folder with --out"),
    "argument as an option": (["info", "--model=~/m"], "MODEL is written without --model: `openvision3 info MODEL`. See `openvision3 info --help`\n"),
    "argument as an option of evaluate": (["evaluate", "probe", "--model", "m"], "MODEL is written without --model: `openvision3 evaluate probe MODEL`"),
    "pipe of webdataset": (["train", "tiny", "--data", "pipe:curl s3://b/x.tar"], "commands are not run here; name the shards by their address"),
    "shards joined by ::": (["train", "tiny", "--data", "a.tar::b.tar"], r"several shards are not joined by ::, but named apart: a\.tar b\.tar\n"),
    "results that are none": (
        ["evaluate", "table", "more/notes.txt"],
        r"notes\.txt is not a results\.json of .*: it holds text, which begins with 'no image'\n",
    ),
    "output without a name": (["reconstruct", "more", "--out", ""], "--out is empty; name a folder\n"),
    "output behind a broken link": (["encode", "more", "--out", "broken"], "broken is a link to nowhere, which does not exist; name another folder with --out"),
    "grid into a file": (["ablate", "tau", "--recipe", "tiny", "--out", "more/notes.txt"], "notes.txt is a file; name a folder with --out"),
    "model without a name": (["caption", "more", "--model="], "the name of a model is empty. Choose one of mini, "),
    "check of a folder that is not there": (
        ["fetch", "--check", "--to", "nowhere"],
        "nowhere is not a folder; give --to the folder that the files were fetched into",
    ),
    "labels forgotten": (["classify", "more"], "--labels is missing. See `openvision3 classify --help`"),
    "unknown recipe": (["train", "tyni"], r"unknown recipe 'tyni'\. Did you mean 'tiny'\? Choose one of mini, "),
    "unknown field": (["train", "tiny", "--batsh", "4"], r"'--batsh'\. Did you mean '--batch'\?"),
    "unknown nested field": (["train", "tiny", "--optimizer.learning-rat", "4"], r"Did you mean '--optimizer\.learning-rate'\?"),
    "field of another type": (["train", "tiny", "--steps", "many"], "--steps must be a whole number, not"),
    "field out of range": (["train", "tiny", "--size", "50"], "50"),
    "demo of no minutes": (["demo", "--minutes", "0"], r"minutes 0\.0 must be a positive number"),
    "demo without end": (["demo", "--minutes", "inf"], "minutes inf must be a positive number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(case, work, capsys):
    (work / "empty").mkdir()
    (work / "broken").symlink_to("nowhere")
    argv, message = REFUSED[case]
    line = refused(capsys, *argv)
    assert re.search(message, line), line


@pytest.mark.parametrize(("option", "value"), [("--beams", "0"), ("--top-p", "2"), ("--temperature", "0"), ("--max-length", "0")])
def test_settings_that_the_model_refuses_are_one_line(option, value, work, model, capsys):
    extra = ["--top-p", "0.5"] if option == "--temperature" else []
    assert option.strip("-").replace("-", "_") in refused(capsys, "caption", "pics/a.png", "--model", model, option, value, *extra)


def test_a_size_that_is_none_is_refused(work, model, capsys):
    for verb in ("reconstruct", "encode"):
        assert "size -3 cannot be used; choose" in refused(capsys, verb, "pics", "--model", model, "--size", "-3")


def test_a_label_without_words_is_refused(work, model, capsys):
    assert "labels 'cat', ' '" in refused(capsys, "classify", "pics", "--model", model, "--labels", "cat", " ")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_one_line(work, model, capsys, error, monkeypatch):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("openvision3.pipeline.Pipeline.answer", full)
    said = refused(capsys, "caption", "pics", "--model", model)
    on_gpu = isinstance(error, torch.OutOfMemoryError)
    assert "not enough memory" in said and said.endswith(f"; {'set --device cpu' if on_gpu else 'close other programs, or use smaller images'}\n")


@pytest.mark.parametrize(
    "words",
    [
        *(["chat"], ["train", "chat_instruct"], ["train", "tiny"], ["train", "dit_tiny"], ["estimate", "tiny"]),
        *(["reconstruct"], ["encode"], ["generate"], ["search", "index"], ["search"], ["doctor"], ["calibrate"], ["export", "diffusers"]),
        *(["evaluate", "reconstruction"], ["evaluate", "generation"], ["evaluate", "vqa", "pope"], ["data", "recaption"]),
    ],
    ids=" ".join,
)
def test_the_advice_on_full_memory_names_options_that_the_command_has(capsys, words):
    options = set(re.findall(r"--[a-z-]+", cli.memory_advice(words)))
    with pytest.raises(SystemExit):
        cli.main([*words, "--help"])
    assert options <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


def test_the_advice_on_full_memory_is_of_chat_and_of_its_training():
    assert cli.memory_advice(["chat", "cat.png"]) == "use a smaller --max-tokens; or set --precision bf16; or set --device cpu"
    assert cli.memory_advice(["train", "chat_instruct"]).startswith("use a smaller --micro-batch, which changes no number; or add --checkpointing")
    assert cli.memory_advice(["ablate", "synergy"]) == cli.memory_advice(["train", "tiny"]), "it takes the fields of a training, which its help leaves to that"


def test_a_disk_without_room_names_the_file_and_what_to_do(work, model, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    Path("new").mkdir()
    said = refused(capsys, "reconstruct", "pics", "--model", model, "--out", "new")
    assert "new/" in said and said.rstrip().endswith("No space left on device; make room")


def test_a_damaged_model_is_one_line(work, model, capsys):
    shutil.copytree(model, "broken")
    data = Path("broken/model.safetensors").read_bytes()
    Path("broken/model.safetensors").write_bytes(data[: len(data) // 2])
    assert "broken/model.safetensors is damaged or no model: " in refused(capsys, "caption", "pics", "--model", "broken")


def test_a_full_disk_is_one_line_and_leaves_no_half_file(work, model, capsys, monkeypatch):
    def full(self, file, *args, **named):
        file.write(b"half of it")
        raise OSError(28, os.strerror(28), "reconstructed/a.png")

    monkeypatch.setattr(Image.Image, "save", full)
    assert cli.main(["reconstruct", "pics/a.png", "--model", model]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "openvision3: reconstructed/a.png: No space left on device; make room\n"
    assert not any(p.is_file() for p in (work / "reconstructed").rglob("*"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a disk that nobody can write to is needed, root included")
def test_a_place_that_cannot_be_written_to_is_one_line_before_any_work(work, model, capsys, monkeypatch):
    monkeypatch.setattr("openvision3.pipeline.load", lambda *_, **__: pytest.fail("the model was loaded first"))
    assert "nothing can be written into /proc" in refused(capsys, "encode", "pics/a.png", "--model", model, "--out", "/proc/tokens")


# -- names of output files ------------------------------------------------------------------------------------------


def test_output_names_never_collide_whatever_the_pictures_are_called():
    names: dict[str, int] = {}
    stems = ["a", "a-2", "a", "a", "a-2", "a-3", "a-2-2", "a"]
    assert len({use._unused(stem, names) for stem in stems}) == len(stems)


def test_output_stays_in_its_folder_for_strange_names(work, model, capsys):
    strange = ["..png", "...png", "-a.png", "a b.png", "ä\n.png", "x.y.png", os.fsdecode(b"\xff.png")]
    for name in strange:
        shutil.copy("pics/a.png", work / "more" / name)
    paths = [f"more/{name}" for name in (*strange, "a.png")]
    assert cli.main(["encode", *paths, "--model", model, "--out", "deep/tokens", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len({row["file"] for row in found}) == len(strange) + 1
    assert tree(work) - tree(work / "pics") >= {"deep/tokens"}
    assert len(list((work / "deep" / "tokens").iterdir())) == len(strange) + 1
    assert {p.name for p in work.iterdir()} == {"pics", "more", "deep"}


def test_a_line_for_each_picture_whatever_its_name_holds(work, model, capsys):
    name = "a\n\x1b[31mred\r.png"
    shutil.copy("pics/a.png", name)
    assert cli.main(["caption", name, "--model", model]) == 0
    assert capsys.readouterr().out.startswith(r"a\n\x1b[31mred\r.png: ")
    assert cli.main(["caption", name, "--model", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["image"] == name
    Path("bad\x1b.png").write_bytes(b"")
    assert cli.main(["caption", "bad\x1b.png", "pics", "--model", model]) == 2
    assert capsys.readouterr().err.startswith(r"openvision3: bad\x1b.png ")


def test_one_output_that_cannot_be_written_is_reported_and_the_others_are_done(work, model, capsys):
    long = "x" * 251
    shutil.copy("pics/a.png", f"pics/{long}.png")
    assert cli.main(["reconstruct", "pics", "--model", model]) == 0
    assert tree(work / "reconstructed") == {"a.png", "b.png", f"{long}.png"}, "any name that the disk takes"
    Path("tokens/b.safetensors").mkdir(parents=True)
    capsys.readouterr()
    assert cli.main(["encode", "pics", "more", "--model", model, "--json"]) == 2
    out, err = capsys.readouterr()
    assert [row["file"] for row in json.loads(out)] == ["tokens/a.safetensors", "tokens/a-2.safetensors"]
    assert err.splitlines() == [
        "openvision3: tokens/b.safetensors: Is a directory",
        f"openvision3: tokens/{long}.safetensors: File name too long",
        "openvision3: 2 of 4 images skipped",
    ]


# -- the program ----------------------------------------------------------------------------------------------------


def run(*argv: str, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "openvision3", *argv], capture_output=True, text=True, **settings)


def test_python_dash_m_runs_the_command_line_and_returns_its_exit_code(work, model):
    assert run("--version").stdout == f"{ov3.__version__}\n"
    assert run().returncode == 2
    (work / "pics" / "bad.png").write_bytes(b"no image")
    found = run("caption", "pics", "--model", model, "--json", cwd=work)
    assert found.returncode == 2 and len(json.loads(found.stdout)) == 2
    assert found.stderr.splitlines()[-1] == "openvision3: 1 of 3 images skipped"


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["caption", "--help"], ["train"], ["nonsense"]], ids=" ".join)
def test_help_and_early_errors_do_not_wait_for_torch(argv):
    code = (
        "import sys, contextlib\nfrom openvision3.cli import main\n"
        f"with contextlib.suppress(SystemExit):\n    main({argv!r})\n"
        "print('SEEN', *[m for m in ('diffusers', 'transformers', 'matplotlib', 'torch') if m in sys.modules])"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.rpartition("SEEN")[2].split()
    assert seen == (["torch"] if argv == ["train"] else [])


def test_help_lists_every_verb_and_each_has_help_of_its_own(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in cli.verbs():
        assert f"\n  {verb} " in text
        if verb in ("train", "estimate", "ablate", "evaluate", "data", "export"):
            assert cli.main([verb, "--help"]) == 0
        else:
            with pytest.raises(SystemExit) as stop:
                cli.main([verb, "--help"])
            assert not stop.value.code
        assert f"openvision3 {verb}" in capsys.readouterr().out


def test_an_interrupt_is_one_line(work, model, capsys, monkeypatch):
    def interrupted(*args, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(ov3.Pipeline, "answer", interrupted)
    assert cli.main(["caption", "pics", "--model", model]) == 130
    assert capsys.readouterr().err == "openvision3: interrupted\n"
