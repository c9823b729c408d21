"""What the paper reports, typed from its tables: shown beside what was measured here, never mixed with it.

for row in rows("unitok"):
    print(row.metric, row.value, row.heading, row.protocol)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

SOURCE = "OpenVision 3, arXiv 2601.15369"


@dataclass(frozen=True)
class Published:
    """A number of somebody else's. Its protocol is as much as the source says, which is less than a `Number` of ours carries."""

    model: str
    """the peer's name where it is one of `peers.PEERS`"""
    metric: str
    value: float
    protocol: str
    version: str = "v1 or v2"
    """of the paper: v1 (January 2026) and v2 (March 2026) differ in places; "v1 or v2" where our notes do not say which they were read from"""
    source: str = SOURCE

    @property
    def heading(self) -> str:
        """The heading of its column."""
        return f"published (paper {self.version}), not measured here"


IMAGENET, COCO = "ImageNet, 256 x 256", "COCO, 256 x 256"
REBUILT = (IMAGENET, COCO)
"""Protocols of reconstruction."""
GENERATION = "ImageNet 256 x 256, by class"
LLAVA, LLAVA_NEXT = "LLaVA-1.5", "LLaVA-NeXT"


def _rebuilt(model: str, imagenet: float, coco: float, version: str = "v1 or v2") -> list[Published]:
    return [Published(model, "rFID", imagenet, IMAGENET, version), Published(model, "rFID", coco, COCO, version)]


def _drawn(model: str, gfid: float, inception: float, precision: float, recall: float, version: str = "v1 or v2") -> list[Published]:
    numbers = {"gFID": gfid, "IS": inception, "precision": precision, "recall": recall}
    return [Published(model, metric, value, GENERATION, version) for metric, value in numbers.items()]


def _answered(model: str, seed: float, science: float, gqa: float, pope: float, protocol: str = LLAVA, version: str = "v1 or v2") -> list[Published]:
    numbers = {"SEED-Bench": seed, "ScienceQA": science, "GQA": gqa, "POPE": pope}
    return [Published(model, metric, value, protocol, version) for metric, value in numbers.items()]


PUBLISHED: tuple[Published, ...] = (
    *_rebuilt("sd-vae", 0.606, 4.142),
    *_rebuilt("sd3-vae", 0.201, 1.671),
    *_rebuilt("flux-vae", 0.176, 1.343),
    *_rebuilt("rae-clip", 1.06, 10.119),
    *_rebuilt("unitok", 0.362, 3.918),
    *_rebuilt("omnitokenizer", 1.411, 6.292),
    *_rebuilt("vila-u", 4.231, 10.997),
    *_rebuilt("openvision3-b2-256", 0.187, 1.601, "v2"),
    Published("openvision3-b2-256", "PSNR", 30.33, IMAGENET),
    Published("openvision3-b2-256", "SSIM", 0.885, IMAGENET),
    Published("openvision3-b2-256", "LPIPS", 0.061, IMAGENET + "; net not stated"),
    Published("unitok", "PSNR", 25.34, IMAGENET),
    Published("unitok", "LPIPS", 0.132, IMAGENET + "; net not stated"),
    Published("vila-u", "PSNR", 22.24, IMAGENET),
    *_drawn("sd-vae + DiT", 2.27, 278.2, 0.83, 0.57),
    *_drawn("sd-vae + SiT", 2.06, 270.3, 0.82, 0.59),
    *_drawn("unitok + LlamaGen", 2.51, 216.7, 0.82, 0.57),
    *_drawn("clip + RAE", 2.54, 256.4, 0.80, 0.54),
    *_drawn("openvision + RAE", 2.44, 262.2, 0.80, 0.53),
    *_drawn("openvision3-b2-256 + RAE", 1.87, 290.0, 0.84, 0.59, "v2"),
    Published("openvision3-b2-256 + RAE", "gFID", 1.89, GENERATION, "v1"),
    *_answered("clip-b16", 62.2, 73.7, 58.6, 82.9),
    *_answered("openvision3-b2-256", 63.1, 73.1, 58.9, 83.7, version="v2"),
    Published("openvision3-b2-256", "SEED-Bench", 62.4, LLAVA, "v1"),
    *_answered("clip-l14", 65.4, 73.9, 60.6, 84.7),
    *_answered("openvision3-l2-256", 65.8, 72.4, 61.0, 85.2),
    *_answered("clip-b16", 61.2, 72.8, 58.1, 84.7, LLAVA_NEXT),
    *_answered("openvision3-b2-256", 63.3, 68.9, 59.2, 84.9, LLAVA_NEXT),
    *_answered("clip-l14", 61.8, 75.3, 59.4, 84.1, LLAVA_NEXT),
    *_answered("openvision3-l2-256", 68.6, 73.6, 62.0, 86.6, LLAVA_NEXT),
)
"""Section 5 of our notes on the paper. The ablations (their section 6) are left out: nobody can load their models."""


def rows(model: str) -> list[Published]:
    """The published numbers of this model, in the order of the tables."""
    return [number for number in PUBLISHED if number.model == model]


ONLY = ("rae-clip", "omnitokenizer")
"""Models that the paper compares with and nobody can load here: they have published numbers only."""

NAMES = {
    "rFID": "rfid",
    "PSNR": "psnr",
    "SSIM": "ssim",
    "LPIPS": "lpips",
    "gFID": "gfid",
    "IS": "inception_score",
    "precision": "precision",
    "recall": "recall",
}
"""A published metric -> ours of that name. The protocols are not the same."""


def beside(model: str, metrics: Sequence[str]) -> dict[str, dict[str, str]]:
    """{heading of a column: {metric of ours: published value}}, for columns beside the measured one."""
    columns: dict[str, dict[str, str]] = {}
    for number in rows(model):
        metric = NAMES.get(number.metric, "")
        if metric in metrics and number.protocol.startswith(REBUILT):
            columns.setdefault(f"{model}, {number.protocol}: {number.heading}", {})[metric] = f"{number.value:g}"
    return columns


def compact(metrics: Collection[str]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, rows) of all published numbers of these metrics of ours: a row for each model, set and version of the paper."""
    table: dict[tuple[str, str, str], dict[str, str]] = {}
    for number in PUBLISHED:
        if NAMES.get(number.metric) in metrics:
            where, _, more = number.protocol.partition("; ")
            table.setdefault((number.model, where, number.version), {})[f"{number.metric} ({more})" if more else number.metric] = f"{number.value:g}"
    columns = dict.fromkeys(column for values in table.values() for column in values)
    rows = [(model, where, *(values.get(column, "") for column in columns), version) for (model, where, version), values in table.items()]
    return ("model", "set", *columns, "paper"), rows
