"""Drawing samples into one file: the same bytes however often the drawing is interrupted, and on any number of processes."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from openvision3.data.arrays import ArraySource
from openvision3.data.images import to_uint8
from openvision3.evaluate import drawing
from openvision3.evaluate.drawing import Drawing, choose_labels, choose_texts, draw
from openvision3.evaluate.image_set import without_progress

COUNT, SIZE = 23, 8


def squares(indices, conditions) -> torch.Tensor:
    """A square of one colour each: a function of number and condition."""
    colours = [torch.rand(3, generator=torch.Generator().manual_seed(1000 * index + label)) for index, label in zip(indices, conditions, strict=True)]
    return (torch.stack(colours)[:, :, None, None] * 2 - 1).expand(-1, 3, SIZE, SIZE)


def of_squares(sample=squares, **changes) -> Drawing:
    settings = {"count": COUNT, "size": SIZE, "sample": sample, "conditions": choose_labels(COUNT, 3, "balanced", 0), "record": {"seed": 0}}
    return Drawing(**{**settings, **changes})


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(drawing, "PART", 4)


@pytest.fixture
def whole(tmp_path) -> bytes:
    """The file of a drawing that was not interrupted."""
    draw(of_squares(), tmp_path / "whole.npz", 3, without_progress)
    return (tmp_path / "whole.npz").read_bytes()


def test_the_file_is_adms_and_holds_every_sample_in_its_place_and_how_it_was_drawn(tmp_path, whole):
    with np.load(tmp_path / "whole.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_0"].shape == (COUNT, SIZE, SIZE, 3)
        expected = to_uint8(squares(range(COUNT), arrays["arr_1"].tolist())).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(arrays["arr_0"], expected) and arrays["arr_1"].tolist() == [number % 3 for number in range(COUNT)]
    record = ArraySource(tmp_path / "whole.npz").record()
    assert record["seed"] == 0 and record["count"] == COUNT
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.parametrize("batch", [1, 4, 7, 100])
def test_batches_do_not_show_in_the_file(tmp_path, whole, batch):
    draw(of_squares(), tmp_path / "other.npz", batch, without_progress)
    assert (tmp_path / "other.npz").read_bytes() == whole


def test_texts_are_kept_with_the_samples(tmp_path):
    texts = [f"a square, number {number} \u2665" for number in range(COUNT)]
    draw(of_squares(lambda indices, _: squares(indices, [0] * len(indices)), conditions=texts), tmp_path / "t.npz", 3, without_progress)
    assert ArraySource(tmp_path / "t.npz").record()["texts"] == texts


def test_samples_without_conditions_have_no_labels(tmp_path):
    model = of_squares(lambda indices, conditions: squares(indices, conditions or [0] * len(indices)), conditions=None)
    draw(model, tmp_path / "s.npz", 3, without_progress)
    with np.load(tmp_path / "s.npz") as arrays:
        assert sorted(arrays.files) == ["arr_0", "drawing"] and len(arrays["arr_0"]) == COUNT


class Fails:
    """Draws squares until sample `at`."""

    def __init__(self, at: int):
        self.at, self.drawn = at, []

    def __call__(self, indices, conditions):
        if self.at in indices:
            raise RuntimeError("interrupted")
        self.drawn += indices
        return squares(indices, conditions)


def test_an_interrupted_drawing_goes_on_from_its_parts_to_the_same_bytes(tmp_path, whole):
    with pytest.raises(RuntimeError, match="interrupted"):
        draw(of_squares(Fails(14)), tmp_path / "s.npz", 3, without_progress)
    rest = Fails(-1)
    draw(of_squares(rest), tmp_path / "s.npz", 3, without_progress)
    assert rest.drawn == list(range(12, COUNT)) and (tmp_path / "s.npz").read_bytes() == whole
    draw(of_squares(Fails(0)), tmp_path / "s.npz", 3, without_progress)  # nothing is left to draw


def test_a_part_that_is_cut_off_is_drawn_again(tmp_path, whole):
    with pytest.raises(RuntimeError):
        draw(of_squares(Fails(14)), tmp_path / "s.npz", 3, without_progress)
    part = sorted((tmp_path / "s.npz.parts").glob("*.uint8"))[1]
    part.write_bytes(part.read_bytes()[:-1])
    draw(of_squares(), tmp_path / "s.npz", 3, without_progress)
    assert (tmp_path / "s.npz").read_bytes() == whole


def test_where_space_runs_out_what_is_there_stays_and_the_same_command_goes_on(tmp_path, whole, monkeypatch):
    written, write = [], drawing.write_whole

    def full(path, content, **more):
        if path.name.endswith(".uint8"):
            written.append(path)
            if len(written) > 3:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content, **more)

    monkeypatch.setattr(drawing, "write_whole", full)
    with pytest.raises(OSError, match="No space left on device; the samples drawn so far are kept, and the same command goes on") as caught:
        draw(of_squares(), tmp_path / "s.npz", 4, without_progress)
    assert caught.value.errno == errno.ENOSPC and len(list((tmp_path / "s.npz.parts").glob("*.uint8"))) == 3
    monkeypatch.setattr(drawing, "write_whole", write)
    rest = Fails(-1)
    draw(of_squares(rest), tmp_path / "s.npz", 4, without_progress)
    assert rest.drawn[0] == 12 and (tmp_path / "s.npz").read_bytes() == whole


def test_samples_of_another_drawing_are_neither_mixed_in_nor_overwritten(tmp_path, whole):
    with pytest.raises(RuntimeError):
        draw(of_squares(Fails(14)), tmp_path / "s.npz", 3, without_progress)
    changes = ({"record": {"seed": 1}}, {"conditions": choose_labels(COUNT, 3, "random", 0)}, {"count": 5, "conditions": [0] * 5})
    for name, change in zip(("seed 0, not 1", "conditions_sha256", "count 23, not 5"), changes, strict=True):
        for path in (tmp_path / "s.npz", tmp_path / "whole.npz"):
            with pytest.raises(ValueError, match=f"{path.name}.* holds samples of another drawing .{name}"):
                draw(of_squares(**change), path, 3, without_progress)
    assert (tmp_path / "whole.npz").read_bytes() == whole


def test_images_of_another_shape_or_not_finite_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"samples 0 to 2 have shape \(3, 3, 8, 4\)"):
        draw(of_squares(lambda *given: squares(*given)[..., :4]), tmp_path / "s.npz", 3, without_progress)
    with pytest.raises(ValueError, match="samples 0 to 2 are not finite"):
        draw(of_squares(lambda *given: squares(*given) * torch.nan), tmp_path / "s.npz", 3, without_progress)


SCRIPT = """
import sys, time
from pathlib import Path
sys.path[:0] = {folders}
import test_drawing
from openvision3 import distributed
from openvision3.evaluate import drawing
drawing.PART = 4
def slow(*given):
    time.sleep({pause})
    return test_drawing.squares(*given)
with distributed.started("cpu"):
    drawing.draw(test_drawing.of_squares(slow), Path({path!r}), 3, lambda items, *_: items)
"""


def process(path: Path, pause: float, **environment: str) -> subprocess.Popen:
    script = SCRIPT.format(folders=[str(Path(__file__).parent), str(Path(__file__).parents[1])], path=str(path), pause=pause)
    return subprocess.Popen([sys.executable, "-c", script], env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)


def test_a_killed_drawing_goes_on_to_the_bytes_of_one_that_was_not(tmp_path, whole):
    path = tmp_path / "s.npz"
    killed = process(path, 0.5)
    while len(list((tmp_path / "s.npz.parts").glob("*.uint8"))) < 2:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not path.exists() and json.loads((tmp_path / "s.npz.parts" / "drawing.json").read_text())["count"] == COUNT
    rest = Fails(-1)
    draw(of_squares(rest), path, 3, without_progress)
    assert 0 < len(rest.drawn) < COUNT and path.read_bytes() == whole and not list(tmp_path.glob(".*.making"))


def test_two_processes_draw_the_bytes_of_one(tmp_path, whole):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path / "s.npz"
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [process(path, 0, RANK=str(rank), LOCAL_RANK=str(rank), **ranks) for rank in range(2)]
    told = [one.communicate(timeout=300) for one in both]
    assert [one.returncode for one in both] == [0, 0], told
    assert path.read_bytes() == whole


# -- conditions ------------------------------------------------------------------------------------------------------


def test_balanced_labels_are_each_class_in_turn_and_random_ones_functions_of_seed_and_number():
    assert choose_labels(7, 3, "balanced", 5) == [0, 1, 2, 0, 1, 2, 0]
    drawn = choose_labels(600, 3, "random", 5)
    assert drawn[:100] == choose_labels(100, 3, "random", 5) != choose_labels(100, 3, "random", 6)
    assert min(drawn.count(label) for label in range(3)) > 150 and drawn[:7] != [0, 1, 2, 0, 1, 2, 0]


class Captioned:
    """As much of a source as texts are chosen from."""

    def __init__(self, captions):
        self.texts = captions

    def __len__(self):
        return len(self.texts)

    def captions(self, index):
        return self.texts[index]


def test_texts_are_spread_over_the_reference_or_taken_in_turn_and_what_has_none_is_passed_over():
    source = Captioned([("a", "x"), ("b",), (), ("d",)])
    assert choose_texts(source, 2, "balanced", 0) == ["a", "d"]
    assert choose_texts(source, 6, "balanced", 0) == ["a", "b", "d", "d", "a", "b"]
    drawn = choose_texts(source, 50, "random", 0)
    assert set(drawn) == {"a", "b", "d"} and drawn[:9] == choose_texts(source, 9, "random", 0)
    with pytest.raises(ValueError, match="none of the 2 images of the reference has a caption"):
        choose_texts(Captioned([(), ()]), 5, "random", 0)
