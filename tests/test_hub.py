"""A model as a folder: what is saved is loaded bit for bit, saves are all or nothing, damage is named in one line."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes import kl_network, smooth_images, tiny_network
from tiny_pipeline import NAMES, foreign_vae, make_pipeline, photo, pipeline

import openvision3 as ov3
from openvision3 import hub
from openvision3.hub import EMBEDDED
from openvision3.model.vae import VAE


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipeline().save(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_one_line(error: pytest.ExceptionInfo) -> None:
    assert "\n" not in str(error.value)


# -- there and back -------------------------------------------------------------------------------------------------


def test_a_saved_model_gives_equal_tokens_vectors_and_captions_bit_for_bit(saved):
    loaded, image = ov3.load(saved), photo(64, 48)
    for verb in ("encode", "embed_images", "reconstruct"):
        assert torch.equal(getattr(loaded, verb)(image), getattr(pipeline(), verb)(image))
    assert torch.equal(loaded.embed_texts(NAMES), pipeline().embed_texts(NAMES))
    assert loaded.caption(image, max_length=8) == pipeline().caption(image, max_length=8)
    assert (loaded.size, loaded.training) == (pipeline().size, pipeline().training)


def test_a_model_that_was_loaded_and_saved_again_is_the_same_folder(saved, tmp_path):
    ov3.load(saved).save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved)


def test_a_bf16_save_is_half_as_large_and_close(saved, tmp_path):
    pipeline().save(tmp_path / "half", dtype=torch.bfloat16)
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < 0.6 * (saved / "model.safetensors").stat().st_size
    loaded = ov3.load(tmp_path / "half")
    assert {p.dtype for p in loaded.encoder.parameters()} == {torch.float32}
    image = photo(64, 64)
    assert torch.allclose(loaded.embed_images(image), pipeline().embed_images(image), atol=0.05)
    for name, value in pipeline().model.trained_state().items():
        assert torch.equal(loaded.model.trained_state()[name], value.bfloat16().float()), name


def test_a_model_used_in_bf16_can_be_saved_and_loaded(saved, tmp_path):
    quick = ov3.load(saved, precision="bf16")
    assert quick.vae.dtype == torch.bfloat16
    quick.save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved)
    assert torch.nn.functional.cosine_similarity(quick.embed_images(photo(64, 64)), pipeline().embed_images(photo(64, 64))).item() > 0.99


def test_the_folder_holds_what_its_readers_look_for(saved):
    assert {p.name for p in saved.iterdir()} == hub.FILES - {"fingerprint.safetensors", "familiarity.safetensors"}, (
        "neither trained on known data nor calibrated"
    )
    config = json.loads((saved / "config.json").read_text())
    assert config["vae"]["sha256"] == pipeline().vae.sha256 and config["vae"]["latent_channels"] == 16
    assert config["training"] == pipeline().training
    card = (saved / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: openvision3" in card and "steps: 3" in card
    processor = json.loads((saved / "preprocessor_config.json").read_text())
    assert processor["size"] == {"longest_edge": 64} and processor["pad_to_multiple_of"] == 16


def test_no_weight_of_the_vae_is_among_the_models_own(saved):
    assert not [name for name in load_file(saved / "model.safetensors") if name.startswith("vae")]


# -- the VAE --------------------------------------------------------------------------------------------------------


def test_only_the_embedded_vae_travels_with_the_model(saved, tmp_path):
    assert (saved / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == (EMBEDDED / "diffusion_pytorch_model.safetensors").read_bytes()
    make_pipeline(foreign_vae()).save(tmp_path / "foreign")
    assert not (tmp_path / "foreign" / "vae").exists()
    pipeline().save(tmp_path / "without", with_vae=False)
    assert not (tmp_path / "without" / "vae").exists()
    assert torch.equal(ov3.load(tmp_path / "without").encode(photo(64, 64)), pipeline().encode(photo(64, 64)))


def test_any_vae_travels_on_request_and_is_found_inside_first(tmp_path):
    model = make_pipeline(foreign_vae())
    model.save(tmp_path / "foreign", with_vae=True)
    loaded, image = ov3.load(tmp_path / "foreign"), photo(64, 64)
    assert torch.equal(loaded.encode(image), model.encode(image)) and loaded.vae.name == "my/vae"
    loaded.save(tmp_path / "again", with_vae=True)
    assert torch.equal(ov3.load(tmp_path / "again").encode(image), model.encode(image))


def test_a_vae_folder_can_be_named(tmp_path):
    tiny_network().save_pretrained(tmp_path / "taesd")
    model = make_pipeline(hub.load_vae(tmp_path / "taesd"))
    model.save(tmp_path / "model")
    (tmp_path / "taesd").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"the VAE of .*model is not found.*name its folder with --vae") as error:
        ov3.load(tmp_path / "model")
    assert_one_line(error)
    assert torch.equal(ov3.load(tmp_path / "model", vae=str(tmp_path / "moved")).encode(photo(64, 64)), model.encode(photo(64, 64)))


def test_another_vae_is_refused_by_its_channels_and_by_its_hash(saved, tmp_path):
    tiny_network().save_pretrained(tmp_path / "four")
    with pytest.raises(ValueError, match=r"trained with a VAE of latent_channels 16, but .*four has 4; name the VAE of the training") as error:
        ov3.load(saved, vae=str(tmp_path / "four"))
    assert_one_line(error)
    tiny_network(channels=16).save_pretrained(tmp_path / "sixteen")
    with pytest.raises(ValueError, match=rf"VAE of sha256 {pipeline().vae.sha256}, but .*sixteen has") as error:
        ov3.load(saved, vae=str(tmp_path / "sixteen"))
    assert_one_line(error)


def test_a_vae_whose_latents_are_scaled_otherwise_is_refused(copied):
    config = json.loads((copied / "vae" / "config.json").read_text())
    (copied / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    with pytest.raises(ValueError, match=r"a VAE of latent_scale [\d.]+, but .*vae has 0\.5"):
        ov3.load(copied)


def test_the_shift_of_the_vae_in_use_is_what_is_stored(tmp_path):
    model = make_pipeline(VAE(tiny_network(shift_factor=0.25), name="my/vae", shift=False))
    model.save(tmp_path / "model", with_vae=True)
    assert ov3.load(tmp_path / "model").vae.shift == 0 == model.vae.shift


# -- loads are strict -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")) as error:
        ov3.load(copied)
    assert_one_line(error)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "vae/diffusion_pytorch_model.safetensors", "vae/config.json"])
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_file_that_is_cut_off_is_refused(copied, name, kept):
    data = (copied / name).read_bytes()
    (copied / name).write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError) as error:
        ov3.load(copied)
    assert_one_line(error)
    assert str(copied) in str(error.value)


def change_config(folder: Path, **changes) -> None:
    values = json.loads((folder / "config.json").read_text())
    values |= changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, r"is of format 2, this version of openvision3 reads format 1"),
        ({"format": ...}, r"is of format None"),
        ({"model_type": "siglip"}, r"not the config of an openvision3 model"),
        ({"model_type": []}, r"not the config of an openvision3 model"),
        ({"vision_config": {}}, r"was written for transformers; open it with transformers\.AutoModel"),
        ({"colour": 1}, r"unknown field 'colour'"),
        ({"size": "large"}, r"size must be int"),
        ({"size": ...}, r"missing .*'size'"),
        ({"vocabulary": 5}, r"tokenizer\.json has \d+ pieces, the model was built for 5"),
        ({"training": [1]}, r"training must hold fields, not \[1\]"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(copied, changes, message):
    change_config(copied, **changes)
    with pytest.raises(ValueError, match=message) as error:
        ov3.load(copied)
    assert_one_line(error)
    assert str(copied) in str(error.value)


def test_a_config_that_is_no_dictionary_is_refused(copied):
    (copied / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"config\.json must hold fields, not \[1, 2\]"):
        ov3.load(copied)


def test_missing_foreign_and_misshapen_tensors_are_refused(copied):
    path = copied / "model.safetensors"
    weights = load_file(path)
    name = "encoder.class_token"
    for wrong, message in (
        ({k: v for k, v in weights.items() if k != name}, rf"1 tensors missing \({name}\), 0 unknown"),
        ({**weights, "extra": torch.zeros(1)}, r"0 tensors missing \(\), 1 unknown \(extra\)"),
        ({**weights, name: torch.zeros(1, 1, 3)}, rf"{name} is \(1, 1, 3\), this model needs \(1, 1, 64\)"),
    ):
        save_file(wrong, path)
        with pytest.raises(ValueError, match=message) as error:
            ov3.load(copied)
        assert_one_line(error)


def test_an_unknown_name_names_the_legal_and_the_nearest_one(tmp_path, monkeypatch):
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "model.safetensors").touch()
    monkeypatch.setattr(hub, "ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^unknown model 'mimi'\. Did you mean 'mini'\? Choose one of mini, a model folder or a run folder$"):
        ov3.load("mimi")
    for nothing_like_it in (str(tmp_path / "mimi"), "~/nothing", "mini/old"):
        with pytest.raises(FileNotFoundError, match=r"\. Choose one of mini, a model folder or a run folder$"):
            ov3.load(nothing_like_it)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is a file, which holds 0 bytes; name the model folder or run folder that it belongs to$"):
        ov3.load(tmp_path / "mini" / "model.safetensors")


def test_a_run_folder_stands_for_its_newest_complete_checkpoint(saved, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint yet"):
        ov3.load(run)
    for step, complete in ((1, True), (2, True), (3, False)):
        checkpoint = Path(shutil.copytree(saved, run / "checkpoints" / f"step-{step:08d}"))
        change_config(checkpoint, training={"steps": step})
        if complete:
            (checkpoint / "run_state.json").write_text("{}")
    assert ov3.load(run).training == {"steps": 2}


# -- saves are all or nothing ---------------------------------------------------------------------------------------


def test_a_save_through_a_link_is_written_where_it_points_every_time(copied, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(copied, target_is_directory=True)
    for _ in range(2):
        before = (copied / "model.safetensors").stat().st_ino
        pipeline().save(link)
        assert link.is_symlink() and (copied / "model.safetensors").stat().st_ino != before
    assert not [p.name for p in (*tmp_path.iterdir(), *copied.parent.iterdir()) if p.name.startswith(".")]


def test_a_save_replaces_an_older_model(copied):
    other = make_pipeline(seed=5)
    other.save(copied)
    assert torch.equal(ov3.load(copied).encode(photo(64, 64)), other.encode(photo(64, 64)))
    assert os.listdir(copied.parent) == [copied.name]


@pytest.mark.parametrize("step", ["save_file", "model_card", "_save_vae", "write_json"])
def test_a_save_that_fails_leaves_the_old_model_and_nothing_else(copied, monkeypatch, step):
    before = contents(copied)

    def full(*args, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    monkeypatch.setattr(hub, step, full)
    with pytest.raises(OSError, match="No space left"):
        make_pipeline(seed=5).save(copied)
    assert contents(copied) == before
    assert os.listdir(copied.parent) == [copied.name]
    with pytest.raises(OSError, match="No space left"):
        pipeline().save(copied.parent / "new")
    assert os.listdir(copied.parent) == [copied.name]


def test_a_save_whose_last_rename_fails_puts_the_old_model_back(copied, monkeypatch):
    before, rename = contents(copied), os.replace

    def refuse(source, target):
        if str(source).endswith(".making"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        rename(source, target)

    monkeypatch.setattr(hub.os, "replace", refuse)
    with pytest.raises(PermissionError):
        make_pipeline(seed=5).save(copied)
    assert contents(copied) == before
    assert os.listdir(copied.parent) == [copied.name]


def test_a_save_never_replaces_what_is_not_a_model(copied, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    file = tmp_path / "file"
    file.write_text("mine")
    foreign = Path(shutil.copytree(copied, tmp_path / "foreign"))
    change_config(foreign, model_type="siglip")
    (copied / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    for folder, message in (
        (run, "is not a model folder"),
        (file, "is not a model"),
        (foreign, "is not a model"),
        (copied, r"holds more than a model \(notes"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline().save(folder)
    assert contents(tmp_path) == before


def test_a_save_into_the_working_folder_is_refused_and_into_an_empty_one_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is the working folder or holds it; name another folder"):
        pipeline().save(".")
    (tmp_path / "empty").mkdir()
    pipeline().save("empty")
    pipeline().save("deep/er/model")
    assert (
        {p.name for p in Path("deep/er/model").iterdir()}
        == {p.name for p in Path("empty").iterdir()}
        == hub.FILES - {"fingerprint.safetensors", "familiarity.safetensors"}
    )


def test_a_save_without_permission_names_the_place(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(PermissionError, match="closed"):
        pipeline().save(closed / "model")


def test_a_model_is_not_saved_under_a_name_that_loads_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"mini is the name of a shipped model.*\./mini"):
        pipeline().save("mini")
    assert not list(tmp_path.iterdir())
    pipeline().save("./mini-of-mine")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file, so no folder can be made in it"):
        pipeline().save("file/model")
    modes = {path.stat().st_mode for path in (tmp_path / "mini-of-mine").iterdir() if path.is_file()}
    assert len(modes) == 1


# -- the VAE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [kl_network(), tiny_network()], ids=["kl", "tiny"])
@pytest.mark.parametrize("inside", ["", "vae"])
def test_a_folder_in_diffusers_layout_loads_as_it_was_saved(network, inside, tmp_path):
    images = smooth_images()
    network.save_pretrained(tmp_path / inside)
    vae = hub.load_vae(tmp_path)
    torch.testing.assert_close(vae.encode(images), VAE(network).encode(images), rtol=1e-5, atol=1e-6)
    assert vae.sha256 == hashlib.sha256((tmp_path / inside / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    assert hub.load_vae(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert hub.load_vae(tmp_path, shift=True).uses_shift


def test_old_attention_names_load_and_lost_weights_do_not(tmp_path):
    network = kl_network()
    network.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)

    def store(changed):
        save_file(changed, file, metadata={"format": "pt"})

    def old(name):  # Stable Diffusion's file has these
        for new, was in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
            name = name.replace(new, was)
        return name

    store({old(name): value for name, value in state.items()})
    torch.testing.assert_close(hub.load_vae(tmp_path).encode(smooth_images()), VAE(network).encode(smooth_images()), rtol=1e-5, atol=1e-6)

    first, *rest = state
    for changed in ({name: state[name] for name in rest}, state | {"more": torch.ones(1)}):
        store(changed)
        with pytest.raises(ValueError, match=r"do not fit its config\.json: 1 are missing, unknown"):
            hub.load_vae(tmp_path)
    store(state | {first: torch.ones(3)})
    with pytest.raises(ValueError, match=r"cannot be loaded|do not fit") as caught:
        hub.load_vae(tmp_path)
    assert "\n" not in str(caught.value)
    file.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="cannot be loaded"):
        hub.load_vae(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no diffusion_pytorch_model\.safetensors"):
        hub.load_vae(tmp_path)


def test_what_is_no_vae_gets_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="holds no VAE"):
        hub.load_vae(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="holds a UNet2DModel; choose one of AutoencoderKL, AutoencoderTiny"):
        hub.load_vae(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="is not a config"):
            hub.load_vae(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such VAE: \./nowhere"):
        hub.load_vae("./nowhere")


def test_every_kind_of_folder_is_found_by_the_one_walk_and_errors_name_its_kind(tmp_path):
    place, own, step = tmp_path / "shipped", tmp_path / "own", tmp_path / "run" / "checkpoints" / "step-00000002"
    for folder in (place / "first", place / "second", own, step):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
    (step / "run_state.json").touch()
    for name, expected in (("", place / "first"), ("second", place / "second"), (tmp_path / "run", step), (own, own)):
        assert hub.find_or_first(name, "generator", place) == expected
    with pytest.raises(FileNotFoundError, match=r"^unknown generator 'secnd'\. Did you mean 'second'\? Choose one of first, second, a generator folder or"):
        hub.find_or_first("secnd", "generator", place)
    with pytest.raises(FileNotFoundError, match=r"is no generator: it holds no model\.safetensors"):
        hub.find_or_first(place, "generator", place)
    with pytest.raises(FileNotFoundError, match="no generator comes with this version"):
        hub.find_or_first("", "generator", own)
