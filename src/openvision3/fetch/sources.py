"""Every foreign file that a command of this project can need: what it is for, where it comes from, and under which terms.

What is not known stands as unknown: a size or a hash is here only where it is published or was seen on bytes, with where that stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

HUB = "https://huggingface.co"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class File:
    """One file of an asset; `name` is its place below the asset's folder and, on the hub, below the repository."""

    name: str
    urls: tuple[str, ...] = ()
    """where it is, the first that works; none: in the asset's hub repository"""
    sha256: str = ""
    """published or seen on bytes: all 64 digits, or the first 8 that torch.hub puts into names; empty: unknown"""
    hash_from: str = ""
    """where that hash stands"""
    size: int | None = None
    """bytes, where they are published with the hash or were seen"""


@dataclass(frozen=True)
class Asset:
    """What is fetched under one name, into a folder of that name."""

    name: str
    files: tuple[File, ...]
    needed_by: str
    licence: str = UNKNOWN
    hub: str = ""
    """id of its hub repository"""
    gated: bool = False
    """the hub wants its licence accepted first"""
    used_by: str = ""
    """how a command finds it where it is not in the default folder"""
    note: str = ""

    def __post_init__(self):
        if not self.used_by and self.needed_by.startswith("comparing"):
            object.__setattr__(self, "used_by", f"openvision3 evaluate ... --peer {self.name} --peer-folder {self.name}=FOLDER")

    @property
    def source(self) -> str:
        """Where it comes from, in short: the hub's or GitHub's repository, else the host."""
        if self.hub:
            return f"{HUB}/{self.hub}"
        url = urlsplit(self.files[0].urls[0])
        if url.hostname in ("github.com", "raw.githubusercontent.com"):
            return "https://github.com/" + "/".join(url.path.split("/")[1:3])
        return f"https://{url.hostname}"

    @property
    def terms(self) -> str:
        """How it is licensed and where it comes from, to stand in brackets."""
        licence = "licence unknown" if self.licence == UNKNOWN else f"licence: {self.licence}"
        return f"{licence}; {'gated, ' if self.gated else ''}from {self.source.removeprefix('https://')}"


def _vae(folder: str = "", sha256: str = "", hash_from: str = "", size: int | None = None) -> tuple[File, ...]:
    return File(f"{folder}config.json"), File(f"{folder}diffusion_pytorch_model.safetensors", (), sha256, hash_from, size)


_OPEN_CLIP = (File("open_clip_config.json"), File("open_clip_pytorch_model.bin"))
_LPIPS_WEIGHTS = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1"
_LPIPS_LICENCE = "channel weights BSD-2-Clause; backbone torchvision's BSD-3-Clause, trained on ImageNet, whose terms may bind too"
_LPIPS_SEEN = "seen on bytes in the PyPI wheel lpips 0.1.4"
_SD_VAE_HASHES = "github.com/Ornn8/bside-olivia-community: tests/installer/test_video_vae_offline.py"
_VAE_OPTION = "--model.vae.name FOLDER or --vae FOLDER"

_ALL = (
    Asset(
        "flux-vae",
        _vae(
            "vae/",
            "f5b59a26851551b67ae1fe58d32e76486e1e812def4696a4bea97f16604d40a3",
            "github.com/KAIST-VICLab/ReFlowSET: vae_audit/README.md",
            167_666_902,
        ),
        "the paper's recipes and the released OpenVision 3 encoders",
        "Apache-2.0",
        hub="black-forest-labs/FLUX.1-schnell",
        gated=True,  # since July 2025, says modal-labs/modal-examples pull request 1301
        used_by=_VAE_OPTION,
    ),
    Asset(
        "sd-vae",
        (
            File("config.json", (), "92d3dfb746fca211a2c9e019e285f8597412211728dce3c5bcf4eda0f2d62e7e", _SD_VAE_HASHES, 547),
            File("diffusion_pytorch_model.safetensors", (), "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815", _SD_VAE_HASHES, 334_643_276),
        ),
        "comparing VAEs",
        "MIT",
        hub="stabilityai/sd-vae-ft-mse",
        used_by=_VAE_OPTION,
    ),
    Asset("sd-vae-ema", _vae(), "comparing VAEs", "MIT", hub="stabilityai/sd-vae-ft-ema", used_by=_VAE_OPTION),
    Asset(
        "sd3-vae",
        _vae("vae/"),
        "comparing VAEs",
        "Stability AI Community License",
        hub="stabilityai/stable-diffusion-3-medium-diffusers",
        gated=True,
        used_by=_VAE_OPTION,
    ),
    Asset("taesd", _vae(), "small runs on SD's latents", "MIT", hub="madebyollin/taesd", used_by=_VAE_OPTION),
    Asset("taef1", _vae(), "small runs on FLUX.1's latents", "MIT", hub="madebyollin/taef1", used_by=_VAE_OPTION),
    Asset(
        "lpips-vgg",
        (
            File(
                "vgg16-397923af.pth",
                ("https://download.pytorch.org/models/vgg16-397923af.pth",),
                "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
                "its name; all digits of a copy in huggingface.co/Keiser41/mangaaa: model/vgg16-397923af.pth",
            ),
            File("vgg.pth", (f"{_LPIPS_WEIGHTS}/vgg.pth",), "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868", _LPIPS_SEEN, 7289),
        ),
        "the perceptual loss of high_res; LPIPS (VGG)",
        _LPIPS_LICENCE,
        used_by="--model.loss.lpips-backbone FOLDER/vgg16-397923af.pth --model.loss.lpips-linear FOLDER/vgg.pth",
    ),
    Asset(
        "lpips-alex",
        (
            File(
                "alexnet-owt-7be5be79.pth",
                ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",),
                "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
                "its name; all digits of a copy in huggingface.co/CSWRY/VOSR: torch_cache/checkpoints/alexnet-owt-7be5be79.pth",
            ),
            File("alex.pth", (f"{_LPIPS_WEIGHTS}/alex.pth",), "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0", _LPIPS_SEEN, 6009),
        ),
        "LPIPS (AlexNet)",
        _LPIPS_LICENCE,
        used_by="--model.loss.lpips-backbone FOLDER/alexnet-owt-7be5be79.pth --model.loss.lpips-linear FOLDER/alex.pth",
    ),
    Asset(
        "inception-2015",
        (
            File(
                "weights-inception-2015-12-05-6726825d.pth",
                (
                    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
                    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
                ),
                "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
                "its name; all digits in github.com/snap-research/discoscene: models/inception_model.py, for the second URL; "
                "with the size in huggingface.co/RaphaelLiu/EvalCrafter-Models/commit/6040b4d",
                95_628_359,
            ),
        ),
        "rFID (later gFID, sFID, Inception Score, precision and recall)",
        "unknown for the weights (converted from Google's); torch-fidelity's code is Apache-2.0",
        used_by="openvision3 evaluate ... --inception FOLDER/weights-inception-2015-12-05-6726825d.pth",
    ),
    Asset(
        "adm-imagenet256",
        (
            File(
                "VIRTUAL_imagenet256_labeled.npz",
                ("https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz",),
            ),
        ),
        "gFID, sFID, precision and recall against ImageNet 256",
        "unknown; it holds 10,000 pictures of ImageNet",
    ),
    Asset(
        "bert-base-uncased",
        (File("tokenizer.json"),),
        "the vocabulary of the paper's recipes",
        "Apache-2.0",
        hub="google-bert/bert-base-uncased",
        used_by="--tokenizer FOLDER/tokenizer.json",
    ),
    *(
        Asset(
            name,
            tuple(map(File, ("config.json", "preprocessor_config.json", "tokenizer.json", weights))),
            "comparing with CLIP",
            "MIT in github.com/openai/CLIP; its hub page shows none",
            hub=f"openai/{hub}",
        )
        for name, hub, weights in (("clip-b16", "clip-vit-base-patch16", "pytorch_model.bin"), ("clip-l14", "clip-vit-large-patch14", "model.safetensors"))
    ),
    Asset(
        "siglip-b16",
        tuple(map(File, ("config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"))),
        "comparing with SigLIP",
        "Apache-2.0",
        hub="google/siglip-base-patch16-224",
    ),
    *(
        Asset(
            name,
            (*_OPEN_CLIP, File("vocab.txt")),
            "comparing with OpenVision",
            "Apache-2.0 on the cards of its family",
            hub=f"UCSC-VLAA/{hub}",
            note="file names are those of its family, not looked up here",
        )
        for name, hub in (("openvision1-b16", "openvision-vit-base-patch16-224"), ("openvision1-l14", "openvision-vit-large-patch14-224"))
    ),
    Asset(
        "openvision2-l14",
        _OPEN_CLIP,
        "comparing with OpenVision 2",
        hub="UCSC-VLAA/openvision2-vit-large-patch14-224-vision-only",
        note="its card was not seen; others call it Apache-2.0",
    ),
    *(
        Asset(
            name,
            (_OPEN_CLIP[0], File("open_clip_pytorch_model.bin", (), sha256, hash_from)),
            "the authors' released encoders (with flux-vae)",
            hub=f"UCSC-VLAA/openvision3-vit-{hub}",
        )
        for name, hub, sha256, hash_from in (
            ("openvision3-b2-256", "base-patch2-32", "", ""),
            ("openvision3-b2-224", "base-patch2-28", "", ""),
            (
                "openvision3-l2-256",
                "large-patch2-32",
                "e08712b727e58f1e539f15a2eed96869972cd0f1cfe5baf9ef0b03207999eb69",
                "huggingface.co/UCSC-VLAA/openvision3-vit-large-patch2-32/blob/main/open_clip_pytorch_model.bin",
            ),
        )
    ),
    *(
        Asset(
            f"rae-{name}",
            _vae(),
            "comparing with RAE (diffusers' AutoencoderRAE)",
            hub=f"nyu-visionx/RAE-{hub}-ViTXL-n08",
            note="file names are diffusers' usual ones, not looked up here",
        )
        for name, hub in (("dinov2", "dinov2-wReg-base"), ("mae", "mae-base-p16"), ("siglip2", "siglip2-base-p16-i256"))
    ),
    Asset(
        "unitok",
        (File("unitok_tokenizer.pth"),),
        "comparing with UniTok: put it into a checkout of github.com/FoundationVision/UniTok",
        "MIT",
        hub="FoundationVision/unitok_tokenizer",
        note="a pickle, which the checkout's own code opens",
    ),
    Asset(
        "vila-u",
        tuple(map(File, ("vision_tower/config.json", "vision_tower/model.safetensors", "vision_tower/preprocessor_config.json"))),
        "comparing with VILA-U: put vision_tower into a checkout of github.com/mit-han-lab/vila-u",
        "MIT on its hub page",
        hub="mit-han-lab/vila-u-7b-256",
        note="its hub page shows 2.71 GB for the weights",
    ),
    Asset(
        "imagenet-names",
        (
            File(
                "imagenet_names.txt",
                (
                    "https://raw.githubusercontent.com/opencv/opencv/ab110c0ad1b3ca22fc65d150b9acff68b2295ac8/"
                    "samples/data/dnn/classification_classes_ILSVRC2012.txt",
                ),
            ),
        ),
        "the class names of ImageNet-1k in zero-shot",
        "OpenCV's: BSD-3-Clause in its LICENSE of 2021",
        used_by="openvision3 evaluate zeroshot ... --classes FOLDER/imagenet_names.txt",
        note="in the order of the WordNet ids, each with its synonyms; not the wording of CLIP's authors",
    ),
)
ASSETS = {asset.name: asset for asset in _ALL}


def named(name: str) -> Asset:
    """The asset of this name. Raises ValueError with the legal names and the nearest."""
    if name not in ASSETS:
        import difflib

        near = difflib.get_close_matches(name, ASSETS, 1, cutoff=0.3)
        raise ValueError(f"nothing is fetched under {name!r}; legal are all, {', '.join(ASSETS)}{f'; nearest is {near[0]}' if near else ''}")
    return ASSETS[name]
