"""The kinds of evaluation and their options. Nothing here imports torch, so that `--help` stays fast."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from openvision3.settings import PathName, check_templates, read_rules, unknown

if TYPE_CHECKING:
    from openvision3.data.names import DataOptions

KINDS = {
    "reconstruction": "how well images are reconstructed: PSNR, SSIM, feature distance, KID, LPIPS, rFID, error against noise",
    "retrieval": "R@1/5/10 from image to caption and from caption to image",
    "captioning": "written captions: exact match, F1, BLEU, ROUGE-L, CIDEr, METEOR",
    "zeroshot": "classification by the nearest class text",
    "probe": "k-NN and a linear probe on frozen tokens, beside raw latents as the floor",
}
METRICS = ("psnr", "ssim", "distance", "kid", "lpips", "rfid")
"""Metrics of the kind reconstruction."""
PROTOCOL_COUNTS = {"rfid-val50k": (50_000, "the validation images of ImageNet"), "rfid-coco": (5_000, "the images of COCO val2017")}
"""Published protocols: how many images each has, and which."""


@dataclass
class Options:
    """What to measure, on which images, and how."""

    model: PathName = "mini"
    """a shipped name, a model folder or a run folder"""
    data: tuple[PathName, ...] = ("openmoji",)
    """openmoji (its test side), folders of images, shards and globs: data/{00000..00009}.tar"""
    out: PathName = "evaluation"
    """the folder of results.json, pictures.jsonl and report.html"""
    peer: tuple[str, ...] = ()
    """models by name, such as flux-vae,sd-vae,ours,vae: ours is MODEL, vae is its VAE alone. Not set: ours, and vae if it can do the same.
    A probe of ours always includes vae as its floor. FILE.py:FUNCTION is a model of your own (docs/peers.md)"""
    peer_folder: tuple[PathName, ...] = ()
    """the folder of a peer's weights, as in flux-vae=weights/FLUX.1-schnell. Not set: the folder of `openvision3 fetch`"""
    protocol: Literal["", "rfid-val50k", "rfid-coco"] = ""
    """a published protocol to follow: ImageNet val (50,000 images) or COCO val2017 (5,000 images), ADM crop, 256 px, rFID"""
    count: int = 0
    """measure the first COUNT images; 0: all"""
    size: int = 0
    """side of the images in pixels. 0: the size of MODEL (without MODEL: the largest size of the peers). A peer that takes one size only gets that size"""
    crop: Literal["square", "adm"] = "square"
    """square: crop the central square and resize it; adm: crop as the evaluation of guided diffusion (ADM) does"""
    batch: int = 32
    """images per batch; the numbers do not depend on it"""
    metrics: tuple[str, ...] = ()
    """reconstruction: choose from psnr (also against noise), ssim, distance, kid, lpips, rfid. Not set: all metrics whose weights are present"""
    sigmas: tuple[float, ...] = (0.0, 0.2, 0.4, 0.8, 1.2)
    """reconstruction: noise levels for PSNR against noise on the tokens"""
    inception: PathName = ""
    """rfid: weights-inception-2015-12-05-6726825d.pth. Not set: the file of `openvision3 fetch`"""
    lpips_net: Literal["alex", "vgg"] = "alex"
    """lpips: the network"""
    lpips_backbone: PathName = ""
    """lpips: torchvision's alexnet or vgg16 checkpoint. Not set: the file of `openvision3 fetch`"""
    lpips_linear: PathName = ""
    """lpips: the channel weights of LPIPS v0.1"""
    caption_keys: tuple[str, ...] = ()
    """JSON fields of shards that hold captions; all are used. Not set: the .txt member"""
    only: tuple[str, ...] = ()
    """keep the shard samples whose JSON has these values (source=clipart) or other ones (source!=stamps)"""
    index: PathName = ""
    """the folder in which `data index` wrote the indexes of shards. Not set: beside each shard"""
    cache: PathName = ""
    """the folder that remote shards are fetched into"""
    cache_gb: float = 100.0
    """size limit of that folder, in GB"""
    equal_captions: Literal["shared", "own"] = "shared"
    """retrieval: shared: a caption that several images share is correct for all of them; own: only for its own image, as in CLIP_benchmark"""
    tokenizer: Literal["auto", "simple", "ptb"] = "auto"
    """captioning: the tokenizer that splits captions into words; ptb needs Java"""
    label_key: str = ""
    """zeroshot, probe: the JSON field or table column with the class. Not set: the emoji's group, the column label, the sub-folder or the .cls member"""
    classes: PathName = ""
    """zeroshot, probe: a file of class names, one per line; several names of one class are separated by |: rose|roses"""
    least: int = 20
    """probe: leave out classes with fewer training images than this"""
    prompts: Literal["auto", "templates", "names", "captions"] = "auto"
    """zeroshot: the texts of a class: CLIP's 80 templates, bare name, or captions of training images. auto: captions for emoji groups, else templates"""
    template: tuple[str, ...] = ()
    """zeroshot: your own templates in place of CLIP's, with {} in the place of the class, such as "a photo of {}"; a class is the mean of all its texts"""
    train: tuple[PathName, ...] = ()
    """training data of MODEL, in addition to those recorded with it: data, or fingerprints of data (openvision3 data fingerprint). Samples seen in
    these get rows of their own. A probe is fitted to the data named here. Not set: openmoji, if data is openmoji"""
    k: int = 20
    """probe: number of neighbours of k-NN"""
    device: str = "auto"
    """auto, cpu or cuda"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """precision of the models"""
    vae: PathName = ""
    """the folder of MODEL's VAE, if MODEL does not hold it"""
    seed: int = 0
    """seed of noise and of subsets"""

    def __post_init__(self):
        self.peer = tuple(name.strip() for names in self.peer for name in names.split(",") if name.strip())
        for name in self.metrics:
            if name not in METRICS:
                raise unknown("metric", name, METRICS, f"Choose from {', '.join(METRICS)}; write MODEL before the options")
        for name, low in (("count", 0), ("size", 0), ("batch", 1), ("k", 1), ("least", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {low}")
        if self.size:
            from openvision3.data.crops import check_size

            check_size(self.size)
        check_templates(self.template)
        if self.template and self.prompts not in ("auto", "templates"):
            raise ValueError(f"template is not used with prompts {self.prompts}; leave out one of them")
        if any(not 0 <= sigma < 100 for sigma in self.sigmas):
            raise ValueError(f"sigmas {self.sigmas} must be numbers from 0 to 100")
        for pair in self.peer_folder:
            if "=" not in pair:
                raise ValueError(f"peer_folder {pair!r} must look like NAME=FOLDER, such as flux-vae=weights/FLUX.1-schnell")
        if self.protocol and (self.count or self.size not in (0, 256) or self.precision != "fp32"):
            raise ValueError(f"protocol {self.protocol} needs the whole set, 256 px and fp32; leave out --count, --size and --precision, or --protocol")
        if self.protocol:
            self.size, self.crop, self.metrics = 256, "adm", tuple(dict.fromkeys([*(self.metrics or ("psnr", "ssim")), "rfid"]))

    def data_options(self, side: Literal["train", "test"] = "train") -> DataOptions:
        """The options for reading the data."""
        from openvision3.data.names import DataOptions

        places = {"index": self.index, "cache": self.cache, "cache_gb": self.cache_gb}
        return DataOptions(side=side, caption_keys=self.caption_keys, only=read_rules(self.only), crop=self.crop, **places)  # type: ignore[arg-type]

    def training_data(self) -> tuple[list[str], tuple[str, ...]]:
        """Split --train into (fingerprint files, names of data)."""
        files = [name for name in self.train if name.endswith(".safetensors") and os.path.isfile(name)]
        return files, tuple(name for name in self.train if name not in files)
