"""The latent cache: what is written, by whom and after which accidents; what is refused; and that training sees the same."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from shapes import tiny_config, tiny_vae
from shard_files import write_shard
from small_runs import Crash as Crashed
from small_runs import assert_same_run, crash_at, metrics, pictures, small

from openvision3.cli import main
from openvision3.data import openmoji, sources
from openvision3.data.batches import BatchPlan, TextShape, TrainingBatches, to_device
from openvision3.data.folders import FolderSource
from openvision3.data.images import ImageError, to_tensor
from openvision3.data.labelled import Classes, read_classes
from openvision3.data.latents.files import AGAIN, TENSORS, Part, draw_crop
from openvision3.data.latents.read import CachedSource, LatentCache
from openvision3.data.latents.settings import LatentJob, LatentSettings
from openvision3.data.latents.write import LatentWriter
from openvision3.data.names import DataOptions, open_source
from openvision3.data.sources import Source
from openvision3.data.text import TextTokenizer
from openvision3.data.view import View
from openvision3.distributed import Ranks
from openvision3.draws import draw_seed
from openvision3.hub import load_vae
from openvision3.model.openvision3 import OpenVision3
from openvision3.model.vae import VAE
from openvision3.train.config import PretrainConfig
from openvision3.train.encode_latents import write_latents
from openvision3.train.open_data import _refuse_evaluated
from openvision3.train.pretrain import pretrain

SIZE, CROPS, PART = 32, 3, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Ten images with words and one that is none."""
    made = pictures(tmp_path_factory.mktemp("latents") / "pics", 10)
    draw = np.random.default_rng(0)
    for path in made.glob("*.png"):  # with something to see, so that no two crops are alike
        Image.fromarray(draw.integers(0, 256, (5, 6, 3), np.uint8)).resize((60, 50), Image.Resampling.BICUBIC).save(path)
    (made / "5.png").write_bytes(b"no image")
    (made / "3.txt").write_text("grün ☃ red")
    return made


@pytest.fixture(scope="module")
def vae() -> VAE:
    return load_vae("embedded")


def settings_of(source: Source, vae: VAE, **changes) -> LatentSettings:
    values = {
        "vae": vae.name,
        "vae_sha256": vae.sha256,
        "scale": vae.scale,
        "shift": vae.shift,
        "channels": vae.latent_channels,
        "stride": vae.stride,
        "size": SIZE,
        "crops": CROPS,
        "crop_area": (0.4, 1.0),
        "seed": 7,
        "precision": "fp32",
        "samples": len(source),
        "part_samples": PART,
        "data": ("pics",),
    }
    return LatentSettings(**(values | changes))


def write(out: Path, source: Source, vae: VAE, **changes) -> LatentCache:
    writer = LatentWriter(out, source, vae.encode, settings_of(source, vae, **changes), batch=5)
    assert sum(writer.write(range(writer.settings.parts))) == len(source)
    assert writer.finish() is not None
    return LatentCache.open(out)


@pytest.fixture(scope="module")
def cache(folder, vae, tmp_path_factory) -> LatentCache:
    return write(tmp_path_factory.mktemp("cache") / "whole", FolderSource(folder), vae)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def command(folder: Path, out: Path, *more: str) -> list[str]:
    start = [sys.executable, "-m", "openvision3", "data", "latents", str(folder), "--out", str(out), "--size", str(SIZE), "--crops", str(CROPS)]
    return [*start, "--seed", "7", "--precision", "fp32", "--part-samples", str(PART), "--batch", "5", *more]


def environment(**changes: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | changes


# -- what is written -----------------------------------------------------------------------------------------------


def test_an_entry_is_the_vae_of_the_crop_that_anyone_can_draw_again(cache, folder, vae):
    source = FolderSource(folder)
    for index in (0, 3, 9):
        key = source.sample_key(index)
        for crop in range(CROPS):
            latents, box = cache.read(key, crop)
            image, drawn = source.crop(index, SIZE, torch.Generator().manual_seed(draw_seed(7, "crop", key, crop)))
            assert tuple(drawn) == box
            expected = vae.encode(to_tensor(image)[None])[0]
            assert latents.dtype == torch.bfloat16
            torch.testing.assert_close(latents.float(), expected, rtol=2**-8, atol=1e-5)


def test_a_part_is_plain_safetensors_with_latents_boxes_and_its_vae(cache, folder):
    file = cache.folder / "part-000000.safetensors"
    found = load_file(file)
    assert found["latents"].shape == (PART, CROPS, 16, SIZE // 8, SIZE // 8) and found["latents"].dtype == torch.bfloat16
    assert found["boxes"].shape == (PART, CROPS, 4) and found["boxes"].dtype == torch.int32
    assert cache.settings.vae_sha256.encode() in file.read_bytes()[:2000]
    assert torch.equal(found["latents"][2, 1], cache.read(FolderSource(folder).sample_key(2), 1)[0])


def test_unusable_samples_are_left_out_counted_and_named(cache):
    told = json.loads((cache.folder / "cache.json").read_text())
    assert told["entries"] == len(cache) == 9 and told["samples"] == 10 and told["skipped"] == {"not an image": 1}
    listed = json.loads((cache.folder / "part-000001.json").read_text())["skipped"]
    assert [(problem["key"], problem["reason"]) for problem in listed] == [("pics/5.png", "not an image")]
    with pytest.raises(ImageError) as missing:
        cache.read("pics/5.png", 0)
    assert missing.value.reason == "not in the cache"


def test_a_cache_keeps_keys_captions_and_families_of_its_source(cache, folder, vae, tmp_path):
    source, alone = FolderSource(folder), CachedSource(cache)
    usable = [index for index in range(10) if index != 5]
    assert [alone.key(i) for i in range(9)] == [source.key(i) for i in usable]
    assert [alone.captions(i) for i in range(9)] == [source.captions(i) for i in usable]
    assert [alone.family(i) for i in range(9)] == [source.family(i) for i in usable]
    with pytest.raises(ImageError, match="holds latents and captions only"):
        alone.crop(0, SIZE, torch.Generator())
    emoji = open_source(("openmoji",), DataOptions(aliases=True))
    emoji.emoji = emoji.emoji[:6]  # type: ignore[attr-defined]
    drawn = CachedSource(write(tmp_path / "emoji", emoji, vae, crops=1))
    assert [(drawn.key(i), drawn.family(i), drawn.captions(i)) for i in range(6)] == [(emoji.key(i), emoji.family(i), emoji.captions(i)) for i in range(6)]


def test_latents_of_emoji_that_are_evaluated_on_are_refused(vae, tmp_path):
    trained, evaluated = (openmoji.EmojiSource(getattr(openmoji.load_emoji(), side)[:2]) for side in ("train", "test"))
    _refuse_evaluated(write(tmp_path / "train", trained, vae, crops=1))
    old = write(tmp_path / "old", sources.MixedSource([trained, evaluated]), vae, crops=1)
    with pytest.raises(ValueError, match=rf"old holds 2 emoji that are evaluated on, such as {evaluated.emoji[0].name}: .* with openvision3 data latents"):
        _refuse_evaluated(old)


def test_processes_that_decode_change_no_byte(cache, folder, vae, tmp_path):
    source = FolderSource(folder)
    writer = LatentWriter(tmp_path / "w", source, vae.encode, settings_of(source, vae), batch=5, workers=2)
    list(writer.write(range(3)))
    writer.finish()
    assert contents(tmp_path / "w") == contents(cache.folder)


def test_latents_that_are_not_finite_are_left_out(folder, vae, tmp_path):
    source = FolderSource(folder)

    def encode(images):
        found = vae.encode(images)
        found[0] = torch.nan
        return found

    writer = LatentWriter(tmp_path / "c", source, encode, settings_of(source, vae), batch=CROPS)
    list(writer.write(range(3)))
    with pytest.raises(ValueError, match=r"none of the 10 samples can be used: 9 latents not finite, 1 not an image"):
        writer.finish()
    assert not (tmp_path / "c" / "cache.json").exists()


def test_a_copy_of_an_image_has_its_latents(vae, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "pics")
    shutil.copy(tmp_path / "pics/1.png", tmp_path / "pics/8.png")
    source = FolderSource(tmp_path / "pics")
    cache = write(tmp_path / "c", source, vae)
    assert cache.values["skipped"] == {"not an image": 1}
    assert cache.find(source.sample_key(8)) == cache.find(source.sample_key(1)) == (0, 1)


def test_a_cache_fits_its_images_wherever_they_lie_and_whatever_is_named_beside_them(vae, tmp_path):
    """Written from two folders of shards of equal names, it serves either alone, moved, packed anew or in folders."""
    pixels = np.random.default_rng(0)
    for place in ("a", "b"):
        members = {}
        for number in range(3):
            out = io.BytesIO()
            Image.fromarray(pixels.integers(0, 255, (40, 40, 3), np.uint8)).save(out, "PNG")
            members |= {f"{number}.png": out.getvalue(), f"{number}.txt": b"a heart"}
        write_shard(tmp_path / "d" / place / "00000.tar", members)
    both = open_source((f"{tmp_path}/d/*/*.tar",))
    cache = write(tmp_path / "c", both, vae)
    written = [cache.read(both.sample_key(index), 0)[0] for index in range(6)]
    assert len({latents.view(torch.int16).numpy().tobytes() for latents in written}) == 6
    (tmp_path / "d/b").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/00000.tar").rename(tmp_path / "elsewhere/other.tar")
    with tarfile.open(tmp_path / "elsewhere/other.tar") as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    words = TextTokenizer.train(["a heart"] * 2, 50)
    for names, rows in ((("d/a/*.tar",), range(3)), (("elsewhere",), range(3, 6)), (("unpacked",), range(3, 6)), (("elsewhere", "d/a"), (3, 4, 5, 0, 1, 2))):
        source = open_source(tuple(f"{tmp_path}/{name}" for name in names))
        assert [cache.find(source.sample_key(index)) for index in range(len(source))] == [divmod(row, PART) for row in rows]
        made = batches(source, words, cache, pixel_share=1.0)
        first(made, 2)
        assert not made.problems


def test_a_cache_of_an_older_version_is_read_under_its_names_but_not_written_to(vae, folder, words, tmp_path):
    """Format 1 knew samples by `Source.key`."""

    class Named(FolderSource):
        def sample_key(self, index):
            self.data(index).stat()
            return self.key(index)

    cache = write(tmp_path / "c", Named(folder), vae)
    for name in ("settings.json", "cache.json"):
        path = cache.folder / name
        path.write_text(path.read_text().replace("openvision3 latents 2", "openvision3 latents 1"))
    old = LatentCache.open(cache.folder)
    made = batches(FolderSource(folder), words, old, pixel_share=1.0)
    first(made, 5)
    assert {problem["reason"] for problem in made.problems} == {"not in the cache"}, "of the image that is none"
    with pytest.raises(ValueError, match="older version; it can be trained on but not continued: choose another folder with --out"):
        LatentWriter(cache.folder, FolderSource(folder), vae.encode, settings_of(FolderSource(folder), vae))
    moved = FolderSource(shutil.copytree(folder, tmp_path / "moved"))
    with pytest.raises(ValueError, match="older version, which identifies samples by their names: name pics again, or write the cache anew"):
        batches(moved, words, old).sample(0)


# -- accidents -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory) -> Path:
    """What one process writes in one go, in parts of a single sample."""
    out = tmp_path_factory.mktemp("uninterrupted") / "c"
    subprocess.run(command(folder, out, "--part-samples", "1"), env=environment(), check=True, capture_output=True)
    return out


@pytest.mark.slow
def test_a_process_killed_in_the_middle_goes_on_to_the_same_bytes(uninterrupted, folder, tmp_path):
    out, first = tmp_path / "killed", tmp_path / "killed" / "part-000000.safetensors"
    run = command(folder, out, "--part-samples", "1")
    process = subprocess.Popen(run, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (out / "part-000000.json").exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = first.stat().st_mtime_ns
    left = out / ".part-000007.safetensors.host-1.making"
    left.write_bytes(b"half a pa")  # what a kill within a write leaves
    os.utime(left, (0, 0))
    with pytest.raises(ValueError, match="is a cache that is not complete; run the same openvision3 data latents command again"):
        LatentCache.open(out)
    subprocess.run(run, env=environment(), check=True, capture_output=True)
    assert first.stat().st_mtime_ns == before
    assert contents(out) == contents(uninterrupted)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(uninterrupted, folder, tmp_path):
    run = command(folder, tmp_path / "two", "--part-samples", "1")
    ranks = [subprocess.Popen(run, env=environment(RANK=str(rank), WORLD_SIZE="2"), stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    said = [process.communicate()[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert contents(uninterrupted) == contents(tmp_path / "two")


def test_one_of_two_processes_alone_leaves_no_cache_and_says_so(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command(folder, tmp_path / "c")[3:]) == 0
    assert "is complete when the other processes have written theirs" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["part-000001.json", "part-000001.safetensors", "settings.json"]


@pytest.fixture
def disk(tmp_path):
    """A disk of 256 KB of our own."""
    place = tmp_path / "disk"
    place.mkdir()
    found = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True) if os.name == "posix" else None
    if found is None or found.returncode:
        pytest.skip("a disk of its own cannot be mounted here (needs root on Linux)")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_keeps_what_is_complete_and_the_same_command_goes_on(folder, tmp_path, disk, capsys):
    out, filler = disk / "c", disk / "filler"
    run = command(folder, out)[3:]
    filler.write_bytes(bytes(256 * 1024 - 40 * 1024))
    assert main(run) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device; " in said and "parts are complete and stay, the same command writes the others; make room" in said
    assert not list(out.glob(".*")) and (out / "part-000000.json").exists()
    filler.unlink()
    assert main(run) == 0
    assert len(LatentCache.open(out)) == 9


def test_a_folder_that_cannot_be_written_is_one_line(folder, disk, capsys):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert main(command(folder, disk / "c")[3:]) == 2
    assert "Read-only file system" in capsys.readouterr().err.splitlines()[-1]


# -- mirrored views ------------------------------------------------------------------------------------------------


def test_a_mirrored_crop_of_a_cache_is_that_of_its_source_and_its_pixels_show_it(folder, vae, tmp_path):
    view = View(mirror=0.5)
    source, plain = FolderSource(folder, view), FolderSource(folder)
    cache = write(tmp_path / "c", source, vae, mirror=0.5)
    assert cache.settings.view == view
    sides = set()
    for index in (0, 3, 9):
        key = source.sample_key(index)
        for epoch in range(CROPS):
            cached = cache.view(source, index, key=key, seed=3, epoch=epoch, pixels=True)
            torch.testing.assert_close(cached.latents.float(), vae.encode(to_tensor(cached.image)[None])[0], rtol=2**-8, atol=1e-5)
        for crop in range(CROPS):
            same, box = draw_crop(plain, index, key, SIZE, 7, crop)
            seen, drawn = draw_crop(source, index, key, SIZE, 7, crop)
            assert drawn == box == cache.read(key, crop)[1]
            sides.add(torch.equal(seen, same))
            assert torch.equal(seen, same) or torch.equal(seen, same.flip(2))
    assert sides == {True, False}


def test_a_cache_of_an_older_version_is_not_mirrored(cache, tmp_path):
    shutil.copytree(cache.folder, tmp_path / "old")
    for name in ("settings.json", "cache.json"):
        values = json.loads((tmp_path / "old" / name).read_text())
        assert values.pop("mirror") == 0
        (tmp_path / "old" / name).write_text(json.dumps(values))
    assert LatentCache.open(tmp_path / "old").settings == cache.settings


def test_every_kind_of_source_mirrors(folder, tmp_path):
    write_shard(tmp_path / "0.tar", {"a.png": (folder / "0.png").read_bytes(), "a.txt": b"a heart"})
    names = ("openmoji", str(folder), str(tmp_path / "0.tar"))
    plain, mirrored = (open_source(names, DataOptions(view=View(mirror=mirror))) for mirror in (0.0, 1.0))
    for index in (0, len(plain) - 2, len(plain) - 1):
        one, other = (source.crop(index, SIZE, torch.Generator().manual_seed(5))[0] for source in (plain, mirrored))
        assert torch.equal(one, other.flip(2)) and not torch.equal(one, other)


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"size": 64}, {"crops": 2}, {"seed": 8}, {"crop_area": (0.2, 1.0)}, {"mirror": 0.5}, {"part_samples": 5}, {"precision": "bf16"}, {"vae_sha256": "0" * 64}],
)
def test_a_cache_goes_on_with_its_own_settings_only(cache, folder, vae, change):
    source, (name, value) = FolderSource(folder), next(iter(change.items()))
    before = contents(cache.folder)
    with pytest.raises(ValueError) as refused:
        LatentWriter(cache.folder, source, vae.encode, settings_of(source, vae, **change))
    assert f"{name} {value}, not {getattr(cache.settings, name)}" in str(refused.value) and "\n" not in str(refused.value)
    assert contents(cache.folder) == before


def test_a_cache_goes_on_with_its_own_samples_only(folder, vae, tmp_path):
    source = FolderSource(folder)
    writer = LatentWriter(tmp_path / "c", source, vae.encode, settings_of(source, vae))
    list(writer.write([0]))
    source.names[2] = "other.png"
    with pytest.raises(ValueError, match=r"part-000000.safetensors holds other samples than the data have now, such as pics/"):
        writer.is_complete(0)


def test_a_folder_with_other_things_is_not_written_into(folder, vae):
    source = FolderSource(folder)
    with pytest.raises(ValueError, match=r"holds other files, such as 0.png; name a new folder with --out"):
        LatentWriter(folder, source, vae.encode, settings_of(source, vae))


def test_another_vae_size_or_scaling_is_refused_with_both_values(cache):
    with pytest.raises(ValueError, match=f"sha256 {cache.settings.vae_sha256[:12]}..., but this one has 123456789012..."):
        LatentCache.open(cache.folder, vae_sha256="1234567890123")
    with pytest.raises(ValueError, match="latents of images of 32 px, not 64; set --size 32"):
        LatentCache.open(cache.folder, size=64)
    with pytest.raises(ValueError, match=r"with shift 0, but the VAE has 0.5 here"):
        LatentCache.open(cache.folder, shift=0.5)
    with pytest.raises(ValueError, match=r"holds no cache.json; write a cache of latents with openvision3 data latents"):
        LatentCache.open(cache.folder.parent)


def test_a_part_that_is_missing_or_cut_is_refused_and_the_same_command_repairs_it(folder, tmp_path, capsys):
    out, part = tmp_path / "c", tmp_path / "c" / "part-000001.safetensors"
    run = command(folder, out)[3:]
    assert main(run) == 0
    whole = contents(out)
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"part-000001.safetensors is damaged: it has [\d,]+ bytes, and had [\d,]+"):
        LatentCache.open(out)
    part.unlink()
    with pytest.raises(ValueError, match=r"part-000001.safetensors is missing"):
        LatentCache.open(out)
    flipped = bytearray(whole[part.name])
    flipped[-len(flipped) // 2] ^= 1
    part.write_bytes(flipped)
    cache = LatentCache.open(out)
    with pytest.raises(ValueError, match="is damaged: its sha256 is not that"):
        list(cache.verify())
    capsys.readouterr()
    assert main(run) == 0
    assert "2 of 3 parts are complete" in capsys.readouterr().err
    assert contents(out) == whole
    assert len(list(LatentCache.open(out).verify())) == 4
    for mark in (b"", b"{}"):
        (out / "part-000001.json").write_bytes(mark)
        assert main(run) == 0 and contents(out) == whole


@settings(max_examples=40, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@example(place=0.099609375, bit=0)
@example(place=0.1015625, bit=0)
def test_no_flipped_bit_of_an_entry_is_read(cache, tmp_path_factory, place, bit):
    """Wherever in the part it lies: an entry reads as it was, or not at all."""
    out = tmp_path_factory.mktemp("flip")
    data = contents(cache.folder)
    name = "part-000000.safetensors"
    damaged = bytearray(data[name])
    damaged[int(place * len(damaged))] ^= 1 << bit
    for file, content in (data | {name: bytes(damaged)}).items():
        (out / file).write_bytes(content)
    keys = [cache.sample(i)[0] for i in range(4)]
    flipped = LatentCache.open(out)
    for key in keys:
        for crop in range(CROPS):
            try:
                latents, box = flipped.read(key, crop)
            except ImageError as error:
                assert error.reason in ("damaged latents", "unreadable latents")
            else:
                expected, there = cache.read(key, crop)
                assert torch.equal(latents.view(torch.int16), expected.view(torch.int16)) and box == there


def test_a_flipped_bit_in_the_header_of_a_part_is_a_fault_of_the_part_and_nothing_else(cache, tmp_path):
    whole = (cache.folder / "part-000000.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    with open(tmp_path / "part-000000.safetensors", "w+b", buffering=0) as file:
        file.write(whole)
        for place in range(header):
            os.pwrite(file.fileno(), bytes([whole[place] ^ 1 << place % 8]), place)
            with contextlib.suppress(ValueError):
                with Part(tmp_path, 0, cache.settings).open() as part:
                    for name in TENSORS:
                        with contextlib.suppress(OSError):
                            part.read(name, 0, 8)
            os.pwrite(file.fileno(), whole[place : place + 1], place)
    Part(tmp_path, 0, cache.settings)


# -- training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(folder) -> TextTokenizer:
    source = FolderSource(folder)
    return TextTokenizer.train([text for i in range(len(source)) for text in source.captions(i)], 200)


def batches(source: Source, words: TextTokenizer | None, cache: LatentCache | None, **changes) -> TrainingBatches:
    plan = {"size": SIZE, "batch": 4, "seed": 3, "pixel_share": 0.5} | {name: changes.pop(name) for name in BatchPlan.__dataclass_fields__ if name in changes}
    return TrainingBatches(source, words, BatchPlan(TextShape(12, 16), **plan), latents=cache, **changes)


def first(made: TrainingBatches, steps: int) -> list[dict[str, torch.Tensor]]:
    found = made.from_step(0)
    try:
        return [to_device(next(found), "cpu") for _ in range(steps * made.pieces)]
    finally:
        found.close()  # type: ignore[attr-defined]


def test_labels_of_cached_samples_come_from_the_data_and_a_cache_alone_says_so(cache, folder):
    source = FolderSource(folder)
    source.value = lambda index, name="": f"class {index}"  # type: ignore[method-assign]
    names = tuple(f"class {i}" for i in range(10))
    classes = Classes(names, {name: i for i, name in enumerate(names)})
    of = {draw_seed(source.sample_key(i)): i for i in range(10)}
    for batch in first(batches(source, None, cache, labels=classes, pixel_share=0.0), 5):
        assert batch.keys() == {"latents", "pixel_images", "labels", "sample_key", "draw_key"}
        assert batch["labels"].tolist() == [of[int(key)] for key in batch["sample_key"]]
    alone = CachedSource(cache)
    for labels in (lambda: read_classes(alone), lambda: batches(alone, None, cache, labels=classes, pixel_share=0.0).check_room()):
        with pytest.raises(ValueError, match=r"holds no class labels; name the data that it was made from with --data"):
            labels()


def test_every_crop_is_seen_in_turn_and_its_order_is_the_samples_own(cache, folder):
    source = FolderSource(folder)
    orders = set()
    for index in (0, 1, 2, 3, 4, 6, 7, 8, 9):
        seen = [cache.view(source, index, key=source.sample_key(index), seed=3, epoch=epoch, pixels=False).latents for epoch in range(2 * CROPS)]
        crops = [next(c for c in range(CROPS) if torch.equal(cache.read(source.sample_key(index), c)[0], latents)) for latents in seen]
        assert sorted(crops[:CROPS]) == list(range(CROPS)) and crops[CROPS:] == crops[:CROPS]
        orders.add(tuple(crops))
    assert len(orders) > 1


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_cached_and_online_steps_on_the_same_crops_have_equal_losses(cache, folder, words, vae, share):
    source = FolderSource(folder)
    torch.manual_seed(0)
    config = tiny_config(patch=2, beta=0.4)
    model = OpenVision3(config, vae, len(words), words.pad_id).init_weights()
    whole = first(batches(source, words, cache, pixel_share=1.0), 3)  # which shows every image
    for cached, shown in zip(first(batches(source, words, cache, pixel_share=share), 3), whole, strict=True):
        online = {name: value for name, value in cached.items() if name not in ("latents", "pixel_images")} | {"images": shown["pixel_images"]}
        assert torch.equal(cached["pixel_images"], online["images"][cached["pixel_rows"]])
        model.zero_grad()
        loss, parts = model(cached)
        expected, expected_parts = model(online)
        torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)
        assert parts.keys() == expected_parts.keys()
        for name in parts:
            torch.testing.assert_close(parts[name], expected_parts[name], rtol=1e-2, atol=1e-4)


def test_the_pixel_target_is_the_original_crop_bit_for_bit(cache, folder, words):
    source = FolderSource(folder)
    made = batches(source, words, cache)
    for batch in first(made, 5):
        assert len(batch["pixel_rows"]) == len(batch["pixel_images"]) == 2
        for row, image in zip(batch["pixel_rows"], batch["pixel_images"], strict=True):
            index = next(i for i in range(10) if draw_seed(source.sample_key(i)) == int(batch["sample_key"][row]))
            key = source.sample_key(index)
            crop = next(c for c in range(CROPS) if torch.equal(cache.read(key, c)[0], batch["latents"][row]))
            drawn, _ = source.crop(index, SIZE, torch.Generator().manual_seed(draw_seed(7, "crop", key, crop)))
            assert torch.equal(image, to_tensor(drawn))


@pytest.mark.parametrize(("share", "opened"), [(0.5, 2), (0.25, 1), (0.0, 0)])
def test_only_pictures_whose_pixels_are_compared_are_opened(cache, folder, words, monkeypatch, share, opened):
    source, count = FolderSource(folder), Counter()
    real = sources.random_view

    def counted(*given):
        count["opened"] += 1
        return real(*given)

    monkeypatch.setattr(sources, "random_view", counted)
    made = batches(source, words, cache, pixel_share=share)
    for number in range(20):
        before = count["opened"]
        rows = [made.sample(4 * number + row) for row in range(4)]
        assert count["opened"] - before == opened == sum(view.image is not None for _, view, *_ in rows)
        batch = made.add_draws(made.collate(rows)[0], number, range(4))
        assert batch["pixel_images"].shape == (opened, 3, SIZE, SIZE) and batch["latents"].shape == (4, 16, SIZE // 8, SIZE // 8)
        assert ("pixel_rows" in batch) == (share > 0)


def test_ranks_micro_batches_and_workers_give_the_rows_of_one(cache, folder, words):
    source = FolderSource(folder)
    whole = first(batches(source, words, cache), 3)
    spread = [first(batches(source, words, cache, ranks=Ranks(rank, 2), micro_batch=1, workers=rank), 3) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        pieces = [*spread[0][2 * step : 2 * step + 2], *spread[1][2 * step : 2 * step + 2]]
        for name in ("latents", "pixel_images", "sample_key", "draw_key"):
            assert torch.equal(torch.cat([piece[name] for piece in pieces]), batch[name]), name


def test_samples_that_the_cache_lacks_or_whose_picture_has_changed_are_replaced_and_listed(cache, words, folder, tmp_path):
    pictures(tmp_path / "pics", 13)
    shutil.copytree(folder, tmp_path / "pics", dirs_exist_ok=True)
    source = FolderSource(tmp_path / "pics")
    made = batches(source, words, cache, pixel_share=0.0)
    keys = {int(key) for batch in first(made, 10) for key in batch["sample_key"]}
    assert keys <= {draw_seed(FolderSource(folder).sample_key(i)) for i in range(10) if i != 5}
    assert {p["key"] for p in made.problems if p["reason"] == "not in the cache"} == {"pics/10.png", "pics/11.png", "pics/12.png", "pics/5.png"}
    changed = FolderSource(folder)
    changed.view = View((0.1, 0.2))
    with pytest.raises(ValueError, match=r"256 samples in a row cannot be used.*another image.*the data have changed"):
        batches(changed, words, cache, pixel_share=1.0).sample(0)


def test_a_damaged_entry_is_replaced_and_listed(cache, folder, words, tmp_path):
    out = tmp_path / "c"
    shutil.copytree(cache.folder, out)
    with open(out / "part-000002.safetensors", "r+b") as part:
        part.seek(Part(cache.folder, 2, cache.settings).starts["latents"])
        part.write(bytes(2 * CROPS * 512))
    made = batches(FolderSource(folder), words, LatentCache.open(out), pixel_share=0.0)
    first(made, 10)
    assert {p["key"] for p in made.problems if p["reason"] == "damaged latents"} == {"pics/8.png", "pics/9.png"}
    assert AGAIN in next(p["detail"] for p in made.problems if p["reason"] == "damaged latents")


# -- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cached_run(tmp_path):
    """A config of seven steps and the cache of its data."""

    def make(out: str, **changes) -> PretrainConfig:
        config = small(tmp_path, out, **({"pixel_share": 0.5} | changes))
        write_latents(LatentJob(config.data, str(tmp_path / "latents"), size=SIZE, crops=2, precision="fp32", part_samples=PART))
        config.latents = str(tmp_path / "latents")
        return config

    return make


def test_a_run_from_the_cache_that_dies_goes_on_to_the_same_bits(cached_run, tmp_path, monkeypatch):
    pretrain(cached_run("whole"))
    with monkeypatch.context() as patched:
        crash_at(patched, 5)
        with pytest.raises(Crashed):
            pretrain(cached_run("cut"))
    pretrain(cached_run("cut", resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_run_goes_on_where_its_cache_lies_under_another_path(cached_run, tmp_path):
    pretrain(cached_run("run", steps=3))
    config = cached_run("run", steps=3, resume=True)
    config.latents = str(tmp_path / "moved")
    (tmp_path / "latents").rename(config.latents)
    pretrain(config)
    assert f"latents now lies at {config.latents}" in (tmp_path / "run" / "log.txt").read_text()


def test_a_run_goes_on_with_its_own_cache_only(cached_run, tmp_path):
    pretrain(cached_run("run", steps=3))
    config = cached_run("run", steps=3, resume=True)
    told = tmp_path / "latents" / "cache.json"
    told.write_text(told.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ValueError, match=r"is not the latent cache that .*run was started with"):
        pretrain(config)


def test_a_cache_without_its_pictures_trains_without_a_pixel_loss_and_says_so(cached_run, tmp_path):
    config = cached_run("run", pixel_share=0.0)
    pretrain(config)
    for name, data in (("alone", ()), ("gone", (str(tmp_path / "nowhere"),))):
        pretrain(replace(config, data, str(tmp_path / name)))
        assert metrics(tmp_path / name) == metrics(tmp_path / "run")
        assert "the images are missing" in (tmp_path / name / "log.txt").read_text()
    assert not any("train/pixel" in row for row in metrics(tmp_path / "alone"))


def replace(config: PretrainConfig, data: tuple[str, ...], out: str, **changes) -> PretrainConfig:
    import copy

    config = copy.deepcopy(config)
    config.data, config.out = data, out
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_a_cache_without_its_pictures_refuses_a_pixel_loss(cached_run, tmp_path):
    config = cached_run("run")
    with pytest.raises(ValueError, match=r"no data named.* holds no images, and pixel_share 0.5 needs some.*--pixel-share 0"):
        pretrain(replace(config, (), config.out))
    with pytest.raises(ValueError, match=r"crop_area is \(0.5, 1.0\), but the crops in .* cover \(0.4, 1.0\)"):
        pretrain(replace(config, config.data, config.out, crop_area=(0.5, 1.0)))
    with pytest.raises(ValueError, match=r"mirror is 0.5, but the crops in .* are mirrored with probability 0; set --mirror alike"):
        pretrain(replace(config, config.data, config.out, mirror=0.5))
    assert not Path(config.out).exists()


def test_a_cache_of_another_vae_or_size_is_refused_before_anything_is_written(cached_run, tmp_path):
    config = cached_run("run")
    tiny_vae().network.save_pretrained(tmp_path / "vae")  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match=r"holds latents of the VAE embedded with sha256 \w{12}\.\.\., but this one has \w{12}"):
        other = replace(config, config.data, config.out)
        other.model.vae.name = str(tmp_path / "vae")
        pretrain(other)
    with pytest.raises(ValueError, match="of images of 32 px, not 64"):
        pretrain(replace(config, config.data, config.out, size=64))
    assert not Path(config.out).exists()


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--size", "30"], "size 30 must be a positive multiple of 16"),
        (["--crops", "0"], "crops 0 must be at least 1"),
        (["--batch", "0"], "batch 0 must be at least 1"),
        (["--vae", "pixels"], "pixels is no VAE"),
        (["--crop-area", "0.9", "0.1"], "crop_area (0.9, 0.1) must be two shares"),
        (["--mirror", "1.5"], "mirror 1.5 must be a probability from 0"),
        (["--only", "clipart"], "only 'clipart' must look like name=value"),
        (["--vae", "/nowhere"], "no such VAE: /nowhere"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(folder, tmp_path, capsys, more, said):
    assert main([*command(folder, tmp_path / "c")[3:], *more]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[-1] and len(lines) == 1 and not (tmp_path / "c").exists()


def test_settings_are_read_back_as_they_were_written(cache):
    assert LatentSettings.read(cache.folder / "settings.json") == cache.settings
    assert asdict(cache.settings)["crop_area"] == (0.4, 1.0)


@pytest.mark.slow
def test_ray_writes_what_one_process_writes(folder, tmp_path):
    pytest.importorskip("ray")
    for name, more in (("one", ()), ("ray", ("--engine", "ray", "--actors", "2"))):
        done = subprocess.run(command(folder, tmp_path / name, *more), env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "ray")


@pytest.mark.slow
def test_an_error_within_ray_is_one_line(folder, tmp_path, disk):
    pytest.importorskip("ray")
    (disk / "filler").write_bytes(bytes(256 * 1024 - 40 * 1024))
    done = subprocess.run(command(folder, disk / "c", "--engine", "ray", "--actors", "1"), env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "No space left on device" in done.stderr.splitlines()[-1]


def test_ray_that_is_not_installed_names_its_extra(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*command(folder, tmp_path / "c")[3:], "--engine", "ray"]) == 2
    assert "pip install 'openvision3[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_of_two_processes_the_one_with_nothing_to_mend_leaves_the_other_to_it(uninterrupted, folder, tmp_path, monkeypatch, capsys, damage):
    out = tmp_path / "c"
    shutil.copytree(uninterrupted, out)
    part = out / "part-000001.safetensors"
    part.write_bytes(part.read_bytes()[:-8]) if damage == "cut" else part.unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main([*command(folder, out)[3:], "--part-samples", "1"]) == 0, capsys.readouterr().err
    assert contents(out) == contents(uninterrupted)
