"""The section "Cross-checks" of docs/results.md: our metrics and those of other packages on the same data, made from a seed or named.

    python tools/cross_checks.py --data DATA/photos

needs torchmetrics and pycocoevalcap (`pip install -e '.[dev]'`). No weights are read: Inception's are random, and it is ours on both sides, so
that rFID compares everything but the network; that the network is torch-fidelity's is tested in tests/evaluate/metrics/test_distances.py.
"""

from __future__ import annotations

import contextlib
import io
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from openvision3.data.images import from_uint8, to_tensor, to_uint8
from openvision3.data.names import open_source
from openvision3.evaluate.metrics import captioning
from openvision3.evaluate.metrics.distances import Statistics, frechet_distance, kernel_distance
from openvision3.evaluate.metrics.reconstruction import Networks, evaluate_reconstruction, ssim
from openvision3.networks.inception import EfficientNetFeatures, Extractor, Inception

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from random_inception import random_inception

QUALITY = 10
"""of the JPEG that stands for a reconstruction"""
WORDS = ["red", "heart", "cat", "face", "2", "a", "the", "on"]


class Network(nn.Module):
    """Our Inception with the interface of torchmetrics: uint8 images in."""

    def __init__(self, inception: Inception):
        super().__init__()
        self.inception, self.num_features = inception, inception.width

    def forward(self, pixels: Tensor) -> Tensor:
        return self.inception(to_tensor(pixels))


class Given(nn.Module):
    """Precomputed features, for torchmetrics."""

    num_features = 12

    def forward(self, features: Tensor) -> Tensor:
        return features


def photographs(folder: Path, count: int) -> Tensor:
    """The first images of the shards of a folder, centre squares of 256 px: (count, 3, 256, 256) in [-1, 1]."""
    source = open_source((str(folder / "train-*.tar"),))
    return torch.stack([to_tensor(source.image(i, 256)) for i in range(count)])


def through_jpeg(images: Tensor) -> Tensor:
    def coded(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY)
        return Image.open(file)

    return torch.stack([to_tensor(coded(from_uint8(pixels))) for pixels in to_uint8(images)])


def features_of(extractor: Extractor, images: Tensor) -> Tensor:
    return torch.cat([extractor(part) for part in images.split(16)])


def rfid(images: Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        inception = random_inception(Path(folder) / "weights.pth")
        theirs = FrechetInceptionDistance(Network(inception))
        for part in images.split(16):
            theirs.update(to_uint8(part), real=True)
            theirs.update(to_uint8(through_jpeg(part)), real=False)
        starts = range(0, len(images), 16)
        batches = ((range(i, i + len(part)), [str(i + j) for j in range(len(part))], part) for i, part in zip(starts, images.split(16), strict=True))
        scores = evaluate_reconstruction(batches, through_jpeg, Networks([inception]))
    [ours] = [number.value for number in scores.numbers if number.metric == "rfid"]
    print(f"rFID, random Inception, {len(images)} photographs through JPEG: {ours:.4f} against {float(theirs.compute()):.4f}", flush=True)


def on_given_features(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    worst = [0.0, 0.0]
    for counts in ((200, 150), (8, 10), (1000, 1000)):
        mixing = torch.randn(12, 12, dtype=torch.float64, generator=draw)
        a, b = (torch.randn(count, 12, dtype=torch.float64, generator=draw) for count in counts)
        a, b = a @ mixing, b * 1.5 + 0.3
        theirs = FrechetInceptionDistance(Given(), normalize=False).set_dtype(torch.float64)
        theirs.update(a, real=True)
        theirs.update(b, real=False)
        for i, (ours, other) in enumerate(
            ((frechet_distance(Statistics.of(a), Statistics.of(b)), float(theirs.compute())), (kernel_distance(a, b, subsets=1).value, float(poly_mmd(a, b))))
        ):
            if i == 0 or counts[0] == counts[1]:  # poly_mmd is for as many on both sides
                worst[i] = max(worst[i], abs(ours / other - 1))
    print(f"Frechet distance on given features: largest relative difference {worst[0]:.0e}")
    print(f"KID on given features: largest relative difference {worst[1]:.0e}")


def on_images(images: Tensor) -> None:
    rebuilt = through_jpeg(images)
    pixels, pixels_hat = to_uint8(images).double(), to_uint8(rebuilt).double()
    theirs: Any = structural_similarity_index_measure(pixels_hat, pixels, data_range=255.0, gaussian_kernel=True, sigma=1.5, kernel_size=11, reduction="none")
    print(f"SSIM of {len(images)} photographs through JPEG: largest difference {float((ssim(images, rebuilt) - theirs).abs().max()):.0e}")


def captions(seed: int, sets: int) -> None:
    """Largest difference of BLEU-1 to 4, ROUGE-L and CIDEr over sets of 1 to 8 images with 1 to 4 captions of up to 9 words."""
    draw = random.Random(seed)
    scores = {"BLEU": (captioning.bleu, Bleu(4)), "ROUGE-L": (captioning.rouge_l, Rouge()), "CIDEr": (captioning.cider, Cider())}
    worst = dict.fromkeys(scores, 0.0)

    def caption(least: int = 0) -> list[str]:
        return draw.choices(WORDS, k=draw.randint(least, 9))

    for _ in range(sets):
        written, true = [], []
        for _ in range(draw.randint(1, 8)):
            written.append(caption())
            true.append([caption(1), *(caption() for _ in range(draw.randint(0, 3)))])
        for name, (ours, theirs) in scores.items():
            with contextlib.redirect_stdout(io.StringIO()):
                other = theirs.compute_score(
                    {i: [" ".join(each) for each in of] for i, of in enumerate(true)}, {i: [" ".join(one)] for i, one in enumerate(written)}
                )[0]
            own = ours(written, true)
            pairs = zip(own, other, strict=True) if isinstance(own, list) else [(own, other)]
            worst[name] = max(worst[name], *(abs(a - b) for a, b in pairs))
    print(f"captions, {sets} random sets, largest difference: {', '.join(f'{name} {value:.0e}' for name, value in worst.items())}")


def kid_of_photographs(images: Tensor, seed: int) -> None:
    features = features_of(extractor := EfficientNetFeatures(), images)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    first, second = features[order].chunk(2)
    halves = kernel_distance(first, second, seed=seed)
    coded = kernel_distance(features, features_of(extractor, through_jpeg(images)), seed=seed, paired=True)
    usual, unbiased = (kernel_distance(features, features, paired=paired).value for paired in (False, True))
    print(f"KID on EfficientNet-Lite0 features, {len(images)} photographs, mean and spread over {halves.subsets} subsets:")
    print(f"  between disjoint halves: {halves.mean:.4f} ± {halves.spread:.4f} (subsets of {halves.size})")
    print(f"  JPEG at quality {QUALITY} against the originals, own pair left out: {coded.mean:.4f} ± {coded.spread:.4f} (subsets of {coded.size})")
    print(f"  perfect copies with the usual estimator, all at once: {usual:.4f}; own pair left out: {unbiased:.4f}")


def main(data: Path, seed: int = 0, sets: int = 500) -> None:
    """Print every row.

    Args:
        data: a folder of shards train-*.tar of photographs.
        sets: random sets of captions.
    """
    images = photographs(data, 200)
    rfid(images[:48])
    on_given_features(seed)
    on_images(images[:8])
    captions(seed, sets)
    kid_of_photographs(images, seed)


if __name__ == "__main__":
    tyro.cli(main, description=Path(__file__).read_text().split('"""')[1])
