"""What `openvision3 evaluate` can measure, and its options. Nothing here imports torch, because `--help` reads it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from openvision3.settings import PathName, read_rules, unknown

if TYPE_CHECKING:
    from openvision3.data.names import DataOptions

KINDS = {
    "reconstruction": "how well images are rebuilt: PSNR, SSIM, feature distance, KID, LPIPS, rFID, error against noise",
    "retrieval": "R@1/5/10 from image to caption and from caption to image",
    "captioning": "written captions: exact match, F1, BLEU, ROUGE-L, CIDEr, METEOR",
    "zeroshot": "classification by the nearest class text",
    "probe": "k-NN and a linear probe on frozen tokens, beside raw latents as the floor",
}
METRICS = ("psnr", "ssim", "distance", "kid", "lpips", "rfid")
"""Of reconstruction."""
PROTOCOL_COUNTS = {"rfid-val50k": (50_000, "the validation images of ImageNet"), "rfid-coco": (5_000, "the images of COCO val2017")}
"""Images of each published protocol: how many, and which."""


@dataclass
class Options:
    """What is measured, on which images, and how."""

    model: PathName = "mini"
    """a shipped name, a model folder or a run folder"""
    data: tuple[PathName, ...] = ("openmoji",)
    """openmoji (its test side), folders of images, shards and globs: data/{00000..00009}.tar"""
    out: PathName = "evaluation"
    """the folder of results.json, pictures.jsonl and report.html"""
    peer: tuple[str, ...] = ()
    """models by name, such as flux-vae,sd-vae,ours,vae: ours is MODEL, vae is its VAE alone. Default: ours, and vae where it can do the same.
    A probe of ours always stands beside vae, its floor. FILE.py:FUNCTION is a model of your own (docs/peers.md)"""
    peer_folder: tuple[PathName, ...] = ()
    """the folder of a peer's weights, as in flux-vae=weights/FLUX.1-schnell. Default: where openvision3 fetch has put them"""
    protocol: Literal["", "rfid-val50k", "rfid-coco"] = ""
    """a published protocol to follow: ImageNet val (50,000 images) or COCO val2017 (5,000 images), ADM crop, 256 px, rFID"""
    count: int = 0
    """measure the first COUNT images; 0: all"""
    size: int = 0
    """side of the images in pixels. 0: the size of MODEL (without MODEL the largest of the peers'); a peer that takes one size only gets its own"""
    crop: Literal["square", "adm"] = "square"
    """square: the central square, resized; adm: as in the evaluation of guided diffusion"""
    batch: int = 32
    """images per batch; the numbers do not depend on it"""
    metrics: tuple[str, ...] = ()
    """reconstruction: choose from psnr (also against noise), ssim, distance, kid, lpips, rfid. Default: all whose weights are here"""
    sigmas: tuple[float, ...] = (0.0, 0.2, 0.4, 0.8, 1.2)
    """reconstruction: strengths of the noise on the tokens for the curve of errors"""
    inception: PathName = ""
    """rfid: weights-inception-2015-12-05-6726825d.pth. Default: where openvision3 fetch has put it"""
    lpips_net: Literal["alex", "vgg"] = "alex"
    """lpips: the network"""
    lpips_backbone: PathName = ""
    """lpips: torchvision's alexnet or vgg16 checkpoint. Default: where openvision3 fetch has put it"""
    lpips_linear: PathName = ""
    """lpips: the channel weights of LPIPS v0.1"""
    caption_keys: tuple[str, ...] = ()
    """JSON fields of shards that hold captions; all of them count. Default: the .txt member"""
    only: tuple[str, ...] = ()
    """keep the shard samples whose JSON has these values, as in source=clipart"""
    index: PathName = ""
    """the folder where `data index` has put the indexes of shards. Default: beside each shard"""
    cache: PathName = ""
    """the folder that remote shards are fetched into"""
    cache_gb: float = 100.0
    """size limit of that folder, in GB"""
    equal_captions: Literal["shared", "own"] = "shared"
    """retrieval: shared: a caption that several images have is right for all of them; own: only for the image it belongs to, as in CLIP_benchmark"""
    tokenizer: Literal["auto", "simple", "ptb"] = "auto"
    """captioning: how captions are split into words; ptb needs Java"""
    label_key: str = ""
    """zeroshot, probe: the JSON field with the class. Default: the emoji's group, the sub-folder or the .cls member"""
    classes: PathName = ""
    """zeroshot, probe: a file of class names, one a line"""
    least: int = 20
    """probe: leave out classes with fewer training images than this"""
    prompts: Literal["auto", "templates", "names", "captions"] = "auto"
    """zeroshot: CLIP's 80 templates, bare names, or captions of the training images of a class; auto: captions for emoji groups, else templates"""
    train: tuple[PathName, ...] = ()
    """what MODEL was trained on, beside what is recorded with it: data, or fingerprints of data (openvision3 data fingerprint). Samples of these
    are reported in rows of their own. A probe is fitted to the data named here. Default: openmoji, if data is openmoji"""
    k: int = 20
    """probe: neighbours"""
    device: str = "auto"
    """auto, cpu or cuda"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """what the models compute in"""
    vae: PathName = ""
    """the folder of MODEL's VAE, if its own is not at hand"""
    seed: int = 0
    """of noise and of subsets"""

    def __post_init__(self):
        self.peer = tuple(name.strip() for names in self.peer for name in names.split(",") if name.strip())
        for name in self.metrics:
            if name not in METRICS:
                raise unknown("metric", name, METRICS, f"Choose from {', '.join(METRICS)}; MODEL stands before the options")
        for name, low in (("count", 0), ("size", 0), ("batch", 1), ("k", 1), ("least", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {low}")
        if self.size:
            from openvision3.data.crops import check_size

            check_size(self.size)
        if any(not 0 <= sigma < 100 for sigma in self.sigmas):
            raise ValueError(f"sigmas {self.sigmas} must be numbers from 0 to 100")
        for pair in self.peer_folder:
            if "=" not in pair:
                raise ValueError(f"peer_folder {pair!r} must look like NAME=FOLDER, such as flux-vae=weights/FLUX.1-schnell")
        if self.protocol and (self.count or self.size not in (0, 256) or self.precision != "fp32"):
            raise ValueError(f"protocol {self.protocol} is over the whole set, at 256 px and in fp32; leave out --count, --size and --precision, or --protocol")
        if self.protocol:
            self.size, self.crop, self.metrics = 256, "adm", tuple(dict.fromkeys([*(self.metrics or ("psnr", "ssim")), "rfid"]))

    def data_options(self, side: Literal["train", "test"] = "train") -> DataOptions:
        """How to read the data."""
        from openvision3.data.names import DataOptions

        places = {"index": self.index, "cache": self.cache, "cache_gb": self.cache_gb}
        return DataOptions(side=side, caption_keys=self.caption_keys, only=read_rules(self.only), crop=self.crop, **places)  # type: ignore[arg-type]

    def training_data(self) -> tuple[list[str], tuple[str, ...]]:
        """--train -> (files of fingerprints, data)."""
        files = [name for name in self.train if name.endswith(".safetensors") and os.path.isfile(name)]
        return files, tuple(name for name in self.train if name not in files)
