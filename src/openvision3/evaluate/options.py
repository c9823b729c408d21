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
GENERATION = "images drawn by a generator, or in an .npz: gFID, sFID, Inception Score, precision, recall, KID, the nearest training images"
VQA = "answers to questions about images: pope, mme, seedbench, scienceqa, gqa, conversations"
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
    """the folder of results.json, scores.jsonl and report.html"""
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


@dataclass
class GenerationOptions:
    """Which samples to draw and score, and against what."""

    model: PathName = ""
    """a generator (a shipped name, a folder or a run); or samples in an .npz, drawn by anyone: arr_0, uint8 (N, H, W, 3)"""
    data: tuple[PathName, ...] = ()
    """the reference: openmoji, folders, shards and globs; or an .npz as ADM's reference files: mu, sigma, mu_s, sigma_s, arr_0, or arr_0 alone"""
    out: PathName = "evaluation"
    """the folder of the samples (samples*.npz), results.json, report.html and sheets. The same command goes on from samples that are there"""
    count: int = 1000
    """samples to draw, for each guidance; published numbers have 50,000"""
    guidance: tuple[float, ...] = ()
    """guidance scales to draw with as well, such as 1.5 2 4: each is a column beside the unguided one; they also give a curve"""
    interval: tuple[float, float] = (0.0, 1.0)
    """guide between these times only (0: data, 1: noise)"""
    weaker: PathName = ""
    """a weaker generator of the same tokens to guide by (AutoGuidance). Not set: guide by the generator without its condition"""
    tokens: PathName = ""
    """the model whose tokens are drawn. Not set: the one that the generator names"""
    heads: tuple[int, int] = (0, 0)
    """attention heads of trunk and wide head of RAE's public weights, if neither the file nor its widths tell them"""
    steps: int = 50
    """steps of the sampler"""
    method: Literal["euler", "heun"] = "euler"
    """the sampler"""
    grid: Literal["full", "rae49"] = "full"
    """times of the sampler: full: STEPS intervals down to 0; rae49: the 49 steps of RAE"""
    labels: Literal["balanced", "random"] = "balanced"
    """classes of the samples: in turn, or drawn. Texts are captions of DATA, evenly spaced or drawn"""
    protocol: Literal["", "gfid-adm50k"] = ""
    """the published protocol of gFID: 50,000 samples of 256 px in fp32 against the statistics in ADM's reference file of ImageNet's training set"""
    train: tuple[PathName, ...] = ()
    """the data that the generator was trained on, in which the nearest images are looked for. Not set: DATA"""
    shown: int = 16
    """samples that are shown beside their nearest training images"""
    crop: Literal["square", "adm"] = "square"
    """reference images: square: crop the central square and resize it; adm: crop as the evaluation of guided diffusion (ADM) does"""
    batch: int = 32
    """images per batch"""
    inception: PathName = ""
    """weights-inception-2015-12-05-6726825d.pth. Not set: the file of `openvision3 fetch`; without it, scores on other features remain"""
    extractors: tuple[PathName, ...] = ()
    """further networks whose features images are compared by: peers that give features, such as dinov2-base=FOLDER, or FILE.py:FUNCTION (docs/peers.md)"""
    caption_keys: tuple[str, ...] = ()
    """JSON fields of shards that hold captions. Not set: the .txt member"""
    only: tuple[str, ...] = ()
    """keep the shard samples whose JSON has these values (source=clipart) or other ones (source!=stamps)"""
    index: PathName = ""
    """the folder in which `data index` wrote the indexes of shards. Not set: beside each shard"""
    cache: PathName = ""
    """the folder that remote shards are fetched into"""
    cache_gb: float = 100.0
    """size limit of that folder, in GB"""
    device: str = "auto"
    """auto, cpu or cuda"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """precision of the generator"""
    seed: int = 0
    """seed of the samples, of their classes and of subsets"""

    def __post_init__(self):
        for name, low in (("count", 1), ("steps", 1), ("batch", 1), ("shown", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {low}")
        if any(not 0 <= scale < 1000 for scale in self.guidance):
            raise ValueError(f"guidance {' '.join(f'{scale:g}' for scale in self.guidance)} must be numbers from 0 to 1000; 1 is none, which is always drawn")
        self.guidance = tuple(dict.fromkeys(scale for scale in self.guidance if scale != 1))
        if not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(f"interval {self.interval[0]:g} {self.interval[1]:g} must be two times from 0 to 1, the smaller one first")
        if self.protocol and self.precision != "fp32":
            raise ValueError(f"protocol {self.protocol} needs fp32; leave out --precision, or --protocol")
        if self.protocol:
            self.count = 50_000

    @property
    def is_drawn(self) -> bool:
        """Whether MODEL is a file of samples and not a generator."""
        return self.model.endswith(".npz")

    def data_options(self) -> DataOptions:
        """The options for reading the reference and the training data."""
        from openvision3.data.names import DataOptions

        places = {"index": self.index, "cache": self.cache, "cache_gb": self.cache_gb}
        return DataOptions(caption_keys=self.caption_keys, only=read_rules(self.only), crop=self.crop, **places)  # type: ignore[arg-type]


@dataclass
class VqaOptions:
    """Which questions to ask of which model."""

    model: PathName = ""
    """a chat model (a shipped name, a folder or a run), a folder of an image-text model of transformers such as LLaVA, or FILE.py:FUNCTION
    (docs/evaluation.md)"""
    data: tuple[PathName, ...] = ()
    """the files of the benchmark, as its authors or lmms-lab's Parquet files have them, or their folder"""
    images: tuple[PathName, ...] = ()
    """folders, .zip or .tar files of the images. Not set: the folders of DATA"""
    out: PathName = "evaluation"
    """the folder of answers.jsonl, results.json and report.html. The same command goes on from answers that are there"""
    count: int = 0
    """ask COUNT questions of each part (split, subtask, dimension), the first by a hash of their name; of mme whole images; 0: all"""
    batch: int = 8
    """questions at a time"""
    max_tokens: int = 0
    """the longest answer, in tokens. 0: as LLaVA's scripts have it, 128 (scienceqa: 1024)"""
    blank: bool = False
    """show a grey image in place of each: what is right without looking"""
    device: str = "auto"
    """auto, cpu or cuda"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """precision of the model"""
    tower: PathName = ""
    """the encoder of a chat model, if it is not found where the model names it"""
    language: PathName = ""
    """its language model, likewise"""

    def __post_init__(self):
        for name, low in (("count", 0), ("batch", 1), ("max_tokens", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {low}")
