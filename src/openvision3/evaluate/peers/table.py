"""Other tokenizers and encoders behind the same functions, so that every peer is measured by the same code.

    peer = load_peer("flux-vae", "weights/FLUX.1-schnell")
    evaluate_reconstruction(batches, peer.reconstruct)

Nothing is downloaded: weights come from a folder, from where `openvision3 fetch` has put them, or from the Hugging Face cache of this machine.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openvision3.contents import short
from openvision3.data.crops import PATCH, padded
from openvision3.evaluate.peers import published
from openvision3.evaluate.peers.checkouts import Checkout, unitok, vila_u
from openvision3.evaluate.peers.loading import (
    Peer,
    Pixels,
    Request,
    TextIds,
    WordPieceIds,
    complete,
    find,
    library_of,
    only_at,
    pixels_of,
    resize,
    shards,
    told,
    weights_sha256,
)
from openvision3.evaluate.peers.own import is_own, load_own
from openvision3.evaluate.protocol import Functions
from openvision3.hub import load_vae, vae_licence
from openvision3.model.vae import VAE
from openvision3.networks.open_clip import OpenClipText, OpenClipViT
from openvision3.networks.perceptual import load_foreign_pickle
from openvision3.settings import nearest

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_peer(name: str, folder: str = "", device: str = "cpu", precision: str = "fp32") -> Functions:
    """A peer by name, from `folder` or, where that is empty, from what was fetched or is in the local Hugging Face cache; or FILE.py:FUNCTION (see `own.py`).

    Raises:
        ValueError: an unknown name or precision, files of another model, a package that is missing or does not fit.
        FileNotFoundError: what is not here, with where to get it and under which licence.
    """
    if name in published.ONLY:
        raise ValueError(f"{name} stands with published numbers only and cannot be measured here; peers that can are {', '.join(PEERS)}")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision {precision!r} is unknown for a peer; legal are fp32 and bf16 (fp16 gives NaN in VAEs)")
    if is_own(name):
        return load_own(name, device, precision)
    if name not in PEERS:
        raise unknown_peer(name, PEERS)
    peer = PEERS[name]
    return peer.load(Request(name, peer, find(name, peer, folder), device, precision))


def unknown_peer(name: str, legal: Collection[str]) -> ValueError:
    close = nearest(name, legal)
    return ValueError(
        f"unknown peer {name!r}. {f'Did you mean {close}? ' if close else ''}Choose one of {', '.join(legal)}, or FILE.py:FUNCTION for a model of your own"
    )


# -- VAEs and RAE: diffusers ----------------------------------------------------------------------------------------


def _vae(asked: Request) -> Functions:
    """The frozen VAE of the model itself, with other weights: posterior mean, never sampled, never fp16."""
    vae = _load_vae(asked)
    can = {name: (lambda images, function=function: asked.run(function, images)) for name, function in _of_vae(vae).items()}
    return asked.functions(can, vae.sha256, fixed=False)


def vae_functions(vae: VAE, name: str, precision: str = "fp32") -> Functions:
    """A VAE alone: the ceiling of what tokens made from its latents can rebuild, and the floor of what a probe can see."""
    device = next(vae.parameters()).device

    def run(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return function(images.to(device)).float().cpu()

    functions = _of_vae(vae)
    return Functions(
        name,
        256,
        precision,
        vae.sha256,
        vae_licence(vae.name),
        reconstruct=lambda images: run(functions["reconstruct"], images),
        features=lambda images: run(functions["features"], images),
    )


def _of_vae(vae: VAE) -> dict[str, Callable[[Tensor], Tensor]]:
    """A probe sees the latents, averaged over a grid of 4 x 4 and put side by side: (B, 16 C)."""

    def reconstruct(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        whole = F.pad(images, (0, padded(width) - width, 0, padded(height) - height), mode="replicate")
        return vae.decode(vae.encode(whole)).clamp(-1, 1)[..., :height, :width]

    def features(images: Tensor) -> Tensor:
        height, width = (side // PATCH * PATCH for side in images.shape[-2:])
        return F.adaptive_avg_pool2d(vae.encode(resize(images, max(height, PATCH), max(width, PATCH))), 4).flatten(1)

    return {"reconstruct": reconstruct, "features": features}


def _load_vae(asked: Request) -> VAE:
    asked.file("diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors")
    vae = load_vae(asked.folder, dtype=asked.dtype)
    assert vae.network is not None
    config: Any = vae.network.config
    asked.check({"class": vae.kind, **config})
    return vae.to(asked.device)


def _rae(asked: Request) -> Functions:
    """diffusers' AutoencoderRAE: a frozen encoder and a decoder that learnt to invert it; pictures in [0, 1], noise off."""
    diffusers = library_of("diffusers")
    asked.check(asked.json("config.json") | {"class": asked.json("config.json").get("_class_name")})
    weights = asked.file("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
    with told(asked):
        try:
            network, report = diffusers.AutoencoderRAE.from_pretrained(
                asked.folder, torch_dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
            )
        except AttributeError as error:  # diffusers 0.42 looks for a part of SiglipVisionModel that transformers 5.24 has no more
            seen = " and ".join(f"{each} {importlib.metadata.version(each)}" for each in ("diffusers", "transformers"))
            raise ValueError(f"{seen} do not fit together for it ({short(error)}); other versions may") from error
    complete(asked, [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]])
    network = network.to(asked.device).eval().requires_grad_(False)
    size = int(network.decoder_image_size)

    def rebuilt(images: Tensor) -> Tensor:
        return network.decode(network.encode(images / 2 + 0.5).latent).sample.float() * 2 - 1

    def features(images: Tensor) -> Tensor:
        return network.encode(resize(images, size, size) / 2 + 0.5).latent.float().mean((2, 3))

    can: dict[str, Callable] = {
        "reconstruct": lambda images: asked.run(only_at(rebuilt, size), images),
        "features": lambda images: asked.run(features, images),
    }
    return asked.functions(can, weights_sha256(shards(weights)), size)


# -- CLIP and SigLIP: transformers ----------------------------------------------------------------------------------


def _two_towers(asked: Request) -> Functions:
    """CLIPModel or SiglipModel. A probe sees what the vision tower pools: before CLIP's projection, after SigLIP's attention."""
    transformers = library_of("transformers")
    kind = str(asked.json("config.json").get("model_type"))
    asked.check({"model_type": kind})
    pixels = pixels_of(asked.json("preprocessor_config.json"))
    weights = asked.file("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    with told(asked):
        classes = {"clip": transformers.CLIPModel, "siglip": transformers.SiglipModel}
        network, report = classes[kind].from_pretrained(asked.folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    complete(asked, [*report["missing_keys"], *report["mismatched_keys"]])
    vision, text = network.config.vision_config, network.config.text_config
    asked.check({"patch_size": vision.patch_size})
    if pixels.size != vision.image_size:
        raise ValueError(f"{asked.folder}: preprocessor_config.json makes pictures of {pixels.size}, config.json wants {vision.image_size}; get both anew")
    network = network.to(asked.device).eval().requires_grad_(False)
    ids = TextIds(asked.file("tokenizer.json"), text.max_position_embeddings, text.pad_token_id)

    def pooled(images: Tensor) -> Tensor:
        return network.vision_model(pixel_values=pixels(images)).pooler_output

    def image_embedding(images: Tensor) -> Tensor:
        return network.visual_projection(pooled(images)) if kind == "clip" else pooled(images)

    def text_embedding(text_ids: Tensor) -> Tensor:
        found = network.text_model(input_ids=text_ids).pooler_output
        return network.text_projection(found) if kind == "clip" else found

    can: dict[str, Callable] = {
        "embed_images": lambda images: F.normalize(asked.run(image_embedding, images), dim=1),
        "embed_texts": lambda texts: _embed_texts(asked, text_embedding, ids, texts),
        "features": lambda images: asked.run(pooled, images),
    }
    return asked.functions(can, weights_sha256(shards(weights)), pixels.size)


def _embed_texts(asked: Request, embed: Callable[[Tensor], Tensor], ids: Callable[[Sequence[str]], Tensor], texts: Sequence[str]) -> Tensor:
    """Texts -> unit vectors (B, E). Raises ValueError for none at all, or one text instead of a list."""
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts {texts!r:.80} cannot be embedded; legal is a list of texts, such as ['a red heart']")
    return F.normalize(asked.run(embed, ids(texts)), dim=1)


# -- OpenVision 1 and 2, and the released encoders of 3: open_clip's files, our own blocks --------------------------


def _openvision(asked: Request) -> Functions:
    """A probe sees the mean of the last block's tokens. OpenVision 1 has a text tower, too; 2 and 3 were released without."""
    config = asked.json("open_clip_config.json")
    weights = asked.file("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    with told(asked):
        model_cfg = config["model_cfg"]
        vit = OpenClipViT(model_cfg)
    asked.check({"channels": vit.channels, "patch": vit.patch, "side": vit.image_size})
    with told(asked):
        state = _state(weights)
        vit.load_open_clip(state, "visual." if any(key.startswith("visual.") for key in state) else "")
    vit = vit.to(asked.device).eval().requires_grad_(False)
    can: dict[str, Callable] = {}
    note = ""
    if vit.channels == 3:
        asks = config.get("preprocess_cfg") or {}  # OpenVision 2 has none: then ImageNet's, by which the authors train and evaluate
        if asks.get("resize_mode", "shortest") not in ("shortest", "squash"):
            raise ValueError(f"{asked.folder}: resize_mode {asks['resize_mode']!r} is not built here; legal are shortest and squash")
        size = vit.image_size
        prepare: Callable[[Tensor], Tensor] = Pixels(
            size,
            tuple(asks.get("mean") or IMAGENET_MEAN),
            tuple(asks.get("std") or IMAGENET_STD),
            asks.get("resize_mode", "shortest") == "shortest",
            "bicubic" if asks.get("interpolation") == "bicubic" else "bilinear",
        )
    else:
        vae = _latents_of(asked)
        size, note = vit.image_size * vae.stride, f"VAE sha256 {vae.sha256}"
        prepare = lambda images: vae.encode(resize(images, size, size))  # noqa: E731
    if "embed_texts" in asked.peer.can:
        with told(asked):
            tower = OpenClipText(model_cfg)
            tower.load_open_clip({key: value for key, value in state.items() if key.startswith(OpenClipText.KEYS)})
        tower = tower.to(asked.device).eval().requires_grad_(False)
        ids = WordPieceIds(asked.file("vocab.txt"), tower.positions)
        can["embed_images"] = lambda images: F.normalize(asked.run(lambda x: vit(prepare(x))[0], images), dim=1)
        can["embed_texts"] = lambda texts: _embed_texts(asked, tower, ids, texts)
    can["features"] = lambda images: asked.run(lambda x: vit(prepare(x))[1].float().mean(1), images)
    return asked.functions(can, weights_sha256([weights]), size, note)


def _latents_of(asked: Request) -> VAE:
    """The VAE that OpenVision 3 stands on: in the sub-folder `vae`, or FLUX's own place. Latents are the mean x scale, without shift."""
    flux = PEERS["flux-vae"]
    folder = asked.folder / "vae" if (asked.folder / "vae").is_dir() else find("flux-vae", flux, "")
    return _load_vae(Request("flux-vae", flux, folder, asked.device, asked.precision))


def _state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    found: Any = load_foreign_pickle(path)
    return {key.removeprefix("module."): value for key, value in found.get("state_dict", found).items()}


# -- UniTok and VILA-U: their own code ------------------------------------------------------------------------------


def _checkout(load: Callable[[Path, Path, str], Checkout]) -> Callable[[Request], Functions]:
    def loader(asked: Request) -> Functions:
        if asked.precision != "fp32":
            raise ValueError(f"{asked.name} runs by its authors' code, which settles the precision itself; leave {asked.precision} out")
        *_code, weights = (asked.file(name) for name in asked.peer.files)
        size = asked.peer.size
        network = load(asked.folder.resolve(), weights, asked.device)
        can: dict[str, Callable] = {
            "reconstruct": lambda images: asked.run(only_at(lambda x: network.reconstruct(x).float(), size), images),
            "features": lambda images: asked.run(lambda x: network.features(resize(x, size, size)), images),
        }
        hashed = [weights]
        if weights.is_dir():
            hashed = list(weights.glob("*.safetensors")) or list(weights.glob("*.bin")) or [asked.file(f"{weights.name}/model.safetensors")]
        return asked.functions(can, weights_sha256(hashed), dtype=network.dtype)

    return loader


# -- the table ------------------------------------------------------------------------------------------------------

VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
TWO_TOWER_FILES = ("config.json", "model.safetensors or pytorch_model.bin", "preprocessor_config.json", "tokenizer.json")
OPEN_CLIP_FILES = ("open_clip_config.json", "open_clip_pytorch_model.bin or open_clip_model.safetensors")

KEPT = "as it is; sides are padded to multiples of 16 and cut again; back: clamped to [-1, 1]"
ZERO_ONE = "x / 2 + 0.5 into [0, 1], resized to its size; mean and std inside the network; back: 2 x - 1, clamped; rebuilt at its size only"
FROM_FILE = "x / 2 + 0.5, resized bicubically, mean and std of its preprocessor_config.json"
OPEN_CLIP_PIXELS = "x / 2 + 0.5, resized, mean and std of its open_clip_config.json (ImageNet's where it has none)"
LATENTS = "resized to its size, then FLUX latents: posterior mean x 0.3611, no shift"
SQUARE = "resized to 256 x 256 for a probe; rebuilt at 256 x 256 only, clamped to [-1, 1]"


def _kl(hub: str, licence: str, channels: int, scale: float = 0, *, inside: str = "", size: int = 256, kind: str = "AutoencoderKL") -> Peer:
    files = tuple(inside + file for file in VAE_FILES)
    expects = {"class": kind, "latent_channels": channels} | ({"scaling_factor": scale} if scale else {})
    return Peer(_vae, ("reconstruct", "features"), size, hub, files, licence, "diffusers", KEPT, expects)


def _raes(hub: str, encoder: str, note: str = "") -> Peer:
    expects = {"class": "AutoencoderRAE", "encoder_type": encoder, "reshape_to_2d": True}
    licence = "see its model card (encoder and decoder are of different origin)"
    return Peer(_rae, ("reconstruct", "features"), 256, hub, VAE_FILES, licence, "diffusers, transformers", ZERO_ONE, expects, note)


def _texts(hub: str, licence: str, kind: str, patch: int, size: int = 224) -> Peer:
    expects = {"model_type": kind, "patch_size": patch}
    return Peer(_two_towers, ("embed_images", "embed_texts", "features"), size, hub, TWO_TOWER_FILES, licence, "transformers", FROM_FILE, expects)


def _first(hub: str, patch: int, size: int = 224) -> Peer:
    can, files = ("embed_images", "embed_texts", "features"), (*OPEN_CLIP_FILES, "vocab.txt")
    return Peer(_openvision, can, size, hub, files, "Apache-2.0", "", OPEN_CLIP_PIXELS, {"channels": 3, "patch": patch})


def _second(hub: str, patch: int, size: int = 224) -> Peer:
    note = "released without a text tower"
    licence = "unknown; others call it Apache-2.0"
    return Peer(_openvision, ("features",), size, hub, OPEN_CLIP_FILES, licence, "", OPEN_CLIP_PIXELS, {"channels": 3, "patch": patch}, note)


def _third(hub: str, side: int) -> Peer:
    expects, note = {"channels": 16, "patch": 2, "side": side}, "encoder only: released without decoder and text tower"
    files = (*OPEN_CLIP_FILES, "vae/ as of FLUX.1-schnell")
    licence = "see its model card; the VAE Apache-2.0"
    return Peer(_openvision, ("features",), side * 8, hub, files, licence, "diffusers", LATENTS, expects, note)


CLIP_LICENCE = "MIT in github.com/openai/CLIP; its hub page shows none"
RANDOM_ONLY = "compared with its authors' code on random weights only"

PEERS: dict[str, Peer] = {
    "flux-vae": _kl("black-forest-labs/FLUX.1-schnell", "Apache-2.0", 16, 0.3611, inside="vae/"),
    "sd-vae": _kl("stabilityai/sd-vae-ft-mse", "MIT", 4, 0.18215),
    "sd3-vae": _kl("stabilityai/stable-diffusion-3-medium-diffusers", "Stability AI Community Licence, gated", 16, 1.5305, inside="vae/"),
    "taesd": _kl("madebyollin/taesd", "MIT", 4, kind="AutoencoderTiny"),
    "taef1": _kl("madebyollin/taef1", "MIT", 16, kind="AutoencoderTiny"),
    "rae-dinov2": _raes("nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08", "dinov2"),
    "rae-mae": _raes("nyu-visionx/RAE-mae-base-p16-ViTXL-n08", "mae"),
    "rae-siglip2": _raes("nyu-visionx/RAE-siglip2-base-p16-i256-ViTXL-n08", "siglip2"),
    "clip-b16": _texts("openai/clip-vit-base-patch16", CLIP_LICENCE, "clip", 16),
    "clip-l14": _texts("openai/clip-vit-large-patch14", CLIP_LICENCE, "clip", 14),
    "siglip-b16": _texts("google/siglip-base-patch16-224", "Apache-2.0", "siglip", 16),
    "openvision1-b16": _first("UCSC-VLAA/openvision-vit-base-patch16-224", 16),
    "openvision1-l14": _first("UCSC-VLAA/openvision-vit-large-patch14-224", 14),
    "openvision2-l14": _second("UCSC-VLAA/openvision2-vit-large-patch14-224-vision-only", 14),
    "openvision3-b2-256": _third("UCSC-VLAA/openvision3-vit-base-patch2-32", 32),
    "openvision3-b2-224": _third("UCSC-VLAA/openvision3-vit-base-patch2-28", 28),
    "openvision3-l2-256": _third("UCSC-VLAA/openvision3-vit-large-patch2-32", 32),
    "unitok": Peer(
        _checkout(unitok),
        ("reconstruct", "features"),
        256,
        "FoundationVision/unitok_tokenizer",
        ("models/unitok.py", "utils/config.py", "unitok_tokenizer.pth"),
        "MIT",
        "a checkout of github.com/FoundationVision/UniTok; timm, open_clip",
        SQUARE,
        note=RANDOM_ONLY,
    ),
    "vila-u": Peer(
        _checkout(vila_u),
        ("reconstruct", "features"),
        256,
        "mit-han-lab/vila-u-7b-256",
        ("vila_u/model/multimodal_encoder/rqvaesigliptransformer", "vision_tower"),
        "MIT on its hub page (the code is on github.com/mit-han-lab/vila-u)",
        "a checkout of github.com/mit-han-lab/vila-u; transformers 4",
        SQUARE,
        note=RANDOM_ONLY,
    ),
}
