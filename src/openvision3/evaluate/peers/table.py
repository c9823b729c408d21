"""Other tokenizers and encoders behind the same functions, so that every peer is measured by the same code. Their facts are in fetch/sources.py.

    peer = load_peer("flux-vae", "weights/FLUX.1-schnell")
    evaluate_reconstruction(batches, peer.reconstruct)

Nothing is downloaded: weights come from a folder, from where `openvision3 fetch` has put them, or from this machine's Hugging Face cache.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Collection, Sequence
from functools import partial
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
    Pixels,
    Request,
    TextIds,
    WordPieceIds,
    check_complete,
    find_folder,
    library_of,
    one_line_errors,
    only_at,
    pixels_of,
    resize,
    shards,
    weights_sha256,
)
from openvision3.evaluate.peers.own import is_own, load_own
from openvision3.evaluate.protocol import Functions
from openvision3.fetch.sources import ASSETS
from openvision3.hub import load_vae, vae_licence
from openvision3.model.vae import VAE
from openvision3.networks.open_clip import OpenClipText, OpenClipViT
from openvision3.networks.perceptual import load_foreign_pickle
from openvision3.networks.text_models import REPORTED
from openvision3.settings import unknown

PEERS = {name: asset for name, asset in ASSETS.items() if asset.model is not None}

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_peer(name: str, folder: str = "", device: str = "cpu", precision: str = "fp32") -> Functions:
    """Load a peer by name, or the user's own model by FILE.py:FUNCTION (see `own.py`). Without `folder`, what was fetched or lies in the hub's cache is used.

    Raises:
        ValueError: an unknown name or precision, files of another model, a package that is missing or does not fit.
        FileNotFoundError: files are missing; says where to get them and under which licence.
    """
    if name in published.ONLY:
        raise ValueError(f"{name} has published numbers only and cannot be measured here. Choose one of {', '.join(PEERS)}")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"unknown precision {precision!r} for a peer. Choose one of fp32, bf16 (fp16 gives NaN in VAEs)")
    if is_own(name):
        return load_own(name, device, precision)
    if name not in PEERS:
        raise unknown_peer(name, PEERS)
    asset = PEERS[name]
    assert asset.model is not None
    return LOADERS[asset.model.loader](Request(asset, find_folder(asset, folder), device, precision))


def unknown_peer(name: str, names: Collection[str]) -> ValueError:
    return unknown("peer", name, names, f"Choose one of {', '.join(names)}, or FILE.py:FUNCTION for a model of your own")


# -- VAEs and RAE: diffusers ----------------------------------------------------------------------------------------


def _load_vae_functions(request: Request) -> Functions:
    """The frozen VAE of the model itself, with other weights: posterior mean, never sampled, never fp16."""
    vae = _load_vae(request)
    alone = vae_functions(vae, request.asset.name, request.precision)
    can: dict[str, Any] = {"reconstruct": alone.reconstruct, "features": alone.features}
    return request.functions(can, vae.sha256, "as they are; sides are padded to multiples of 16 and cut again; back: clamped to [-1, 1]", fixed=False)


def vae_functions(vae: VAE, name: str, precision: str = "fp32") -> Functions:
    """A VAE alone: the ceiling of what tokens made from its latents can rebuild, and the floor of what a probe can see.

    A probe sees the latents, averaged over a 4 x 4 grid and flattened: (B, 16 C).
    """
    device = next(vae.parameters()).device

    def run(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return function(images.to(device)).float().cpu()

    def reconstruct(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        whole = F.pad(images, (0, padded(width) - width, 0, padded(height) - height), mode="replicate")
        return vae.decode(vae.encode(whole)).clamp(-1, 1)[..., :height, :width]

    def features(images: Tensor) -> Tensor:
        height, width = (max(side // PATCH * PATCH, PATCH) for side in images.shape[-2:])
        return F.adaptive_avg_pool2d(vae.encode(resize(images, height, width)), 4).flatten(1)

    return Functions(name, 256, precision, vae.sha256, vae_licence(vae.name), reconstruct=partial(run, reconstruct), features=partial(run, features))


def _load_vae(request: Request) -> VAE:
    request.file("diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors")
    vae = load_vae(request.folder, dtype=request.dtype)
    assert vae.network is not None
    config: Any = vae.network.config
    request.check({"class": vae.kind, **config})
    return vae.to(request.device)


def open_rae(name: str, folder: str = "") -> tuple[Any, str]:
    """A peer that is an AutoencoderRAE, whose tokens can be drawn -> (the network, the sha256 of its weights).

    Raises:
        ValueError, FileNotFoundError: as `load_peer`, and for a peer without tokens that can be decoded.
    """
    names = [peer for peer, asset in PEERS.items() if asset.model is not None and asset.model.loader == "rae"]
    if name not in names:
        raise unknown("peer with tokens that can be decoded", name, names)
    request = Request(PEERS[name], find_folder(PEERS[name], folder), "cpu", "fp32")
    network, weights = _open_rae(request)
    return network, weights_sha256(shards(weights))


def _open_rae(request: Request) -> tuple[Any, Path]:
    """(diffusers' AutoencoderRAE, its file of weights): a frozen encoder and a decoder that learnt to invert it; noise off."""
    diffusers = library_of("diffusers")
    request.check(request.json("config.json") | {"class": request.json("config.json").get("_class_name")})
    weights = request.file("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
    with one_line_errors(request):
        try:
            network, report = diffusers.AutoencoderRAE.from_pretrained(
                request.folder, torch_dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
            )
        except AttributeError as error:  # diffusers 0.42 looks for a part of SiglipVisionModel that transformers 5.24 no longer has
            installed = " and ".join(f"{library} {importlib.metadata.version(library)}" for library in ("diffusers", "transformers"))
            raise ValueError(f"{installed} do not fit together for it ({short(error)}); try other versions") from error
    check_complete(request, [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]])
    return network.to(request.device).eval().requires_grad_(False), weights


def _load_rae(request: Request) -> Functions:
    """Images in [0, 1]."""
    network, weights = _open_rae(request)
    size = int(network.decoder_image_size)

    def reconstruct(images: Tensor) -> Tensor:
        return network.decode(network.encode(images / 2 + 0.5).latent).sample.float() * 2 - 1

    def features(images: Tensor) -> Tensor:
        return network.encode(resize(images, size, size) / 2 + 0.5).latent.float().mean((2, 3))

    can: dict[str, Callable] = {
        "reconstruct": lambda images: request.run(only_at(reconstruct, size), images),
        "features": lambda images: request.run(features, images),
    }
    pixels_in_words = "x / 2 + 0.5 into [0, 1], resized to its size; mean and std inside the network; back: 2 x - 1, clamped; rebuilt at its size only"
    return request.functions(can, weights_sha256(shards(weights)), pixels_in_words, size=size)


# -- CLIP and SigLIP: transformers ----------------------------------------------------------------------------------


def _load_two_towers(request: Request) -> Functions:
    """CLIPModel or SiglipModel. A probe sees what the vision tower pools: before CLIP's projection, after SigLIP's attention."""
    transformers = library_of("transformers")
    kind = str(request.json("config.json").get("model_type"))
    request.check({"model_type": kind})
    pixels = pixels_of(request.json("preprocessor_config.json"))
    weights = request.file("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    with one_line_errors(request):
        classes = {"clip": transformers.CLIPModel, "siglip": transformers.SiglipModel}
        network, report = classes[kind].from_pretrained(request.folder, dtype=torch.float32, local_files_only=True, **REPORTED)
    check_complete(request, [*report["missing_keys"], *report["mismatched_keys"]])
    vision, text = network.config.vision_config, network.config.text_config
    request.check({"patch_size": vision.patch_size})
    if pixels.size != vision.image_size:
        raise ValueError(f"{request.folder}: preprocessor_config.json makes images of {pixels.size}, config.json expects {vision.image_size}; get both anew")
    network = network.to(request.device).eval().requires_grad_(False)
    ids = TextIds(request.file("tokenizer.json"), text.max_position_embeddings, text.pad_token_id)

    def pooled(images: Tensor) -> Tensor:
        return network.vision_model(pixel_values=pixels(images)).pooler_output

    def image_embedding(images: Tensor) -> Tensor:
        return network.visual_projection(pooled(images)) if kind == "clip" else pooled(images)

    def text_embedding(text_ids: Tensor) -> Tensor:
        pooled_text = network.text_model(input_ids=text_ids).pooler_output
        return network.text_projection(pooled_text) if kind == "clip" else pooled_text

    can: dict[str, Callable] = {
        "embed_images": lambda images: F.normalize(request.run(image_embedding, images), dim=1),
        "embed_texts": lambda texts: _embed_texts(request, text_embedding, ids, texts),
        "features": lambda images: request.run(pooled, images),
    }
    pixels_in_words = "x / 2 + 0.5, resized bicubically, mean and std of its preprocessor_config.json"
    return request.functions(can, weights_sha256(shards(weights)), pixels_in_words, size=pixels.size)


def _embed_texts(request: Request, embed: Callable[[Tensor], Tensor], ids: Callable[[Sequence[str]], Tensor], texts: Sequence[str]) -> Tensor:
    """Texts -> unit vectors (B, E). Raises ValueError for an empty list, or a text instead of a list."""
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts {texts!r:.80} cannot be embedded; pass a list of texts, such as ['a red heart']")
    return F.normalize(request.run(embed, ids(texts)), dim=1)


# -- OpenVision 1 and 2, and the released encoders of 3: open_clip's files, our own blocks --------------------------


def _load_openvision(request: Request) -> Functions:
    """A probe sees the mean of the last block's tokens. OpenVision 1 also has a text tower; 2 and 3 were released without one."""
    config = request.json("open_clip_config.json")
    vit, weights, state = open_vit(request)
    can: dict[str, Callable] = {}
    note = ""
    if vit.channels == 3:
        wishes = config.get("preprocess_cfg") or {}  # OpenVision 2 has none: then ImageNet's, by which the authors train and evaluate
        if wishes.get("resize_mode", "shortest") not in ("shortest", "squash"):
            raise ValueError(f"{request.folder}: resize_mode {wishes['resize_mode']!r} is not supported; only shortest and squash are")
        size, pixels_in_words = vit.image_size, "x / 2 + 0.5, resized, mean and std of its open_clip_config.json (ImageNet's where it has none)"
        prepare: Callable[[Tensor], Tensor] = Pixels(
            size,
            tuple(wishes.get("mean") or IMAGENET_MEAN),
            tuple(wishes.get("std") or IMAGENET_STD),
            wishes.get("resize_mode", "shortest") == "shortest",
            "bicubic" if wishes.get("interpolation") == "bicubic" else "bilinear",
        )
    else:
        vae = _load_latent_vae(request)
        size, note = vit.image_size * vae.stride, f"VAE sha256 {vae.sha256}"
        pixels_in_words = "resized to its size, then FLUX latents: posterior mean x 0.3611, no shift"
        prepare = lambda images: vae.encode(resize(images, size, size))  # noqa: E731
    if "embed_texts" in request.model.can:
        with one_line_errors(request):
            tower = OpenClipText(config["model_cfg"])
            tower.load_open_clip({key: value for key, value in state.items() if key.startswith(OpenClipText.KEYS)})
        tower = tower.to(request.device).eval().requires_grad_(False)
        ids = WordPieceIds(request.file("vocab.txt"), tower.positions)
        can["embed_images"] = lambda images: F.normalize(request.run(lambda x: vit(prepare(x))[0], images), dim=1)
        can["embed_texts"] = lambda texts: _embed_texts(request, tower, ids, texts)
    can["features"] = lambda images: request.run(lambda x: vit(prepare(x))[1].float().mean(1), images)
    return request.functions(can, weights_sha256([weights]), pixels_in_words, size=size, note=note)


def find_released(name: str, folder: str = "") -> Request:
    """A released OpenVision 3 encoder, which was published without a decoder. Raises ValueError, FileNotFoundError: as `load_peer`, and for another peer."""
    names = [peer for peer, asset in PEERS.items() if asset.model is not None and asset.model.loader == "openvision 3"]
    if name not in names:
        raise unknown("released encoder", name, names)
    return Request(PEERS[name], find_folder(PEERS[name], folder), "cpu", "fp32")


def build_vit(request: Request) -> OpenClipViT:
    """The network that open_clip_config.json describes, without its weights. Raises FileNotFoundError, ValueError."""
    config = request.json("open_clip_config.json")
    with one_line_errors(request):
        vit = OpenClipViT(config["model_cfg"])
    request.check({"channels": vit.channels, "patch": vit.patch, "side": vit.image_size})
    return vit


def vit_file(request: Request) -> Path:
    """Its weights. Raises FileNotFoundError."""
    return request.file("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def open_vit(request: Request) -> tuple[OpenClipViT, Path, dict[str, Tensor]]:
    """(the image tower, frozen, its file of weights, all that the file holds). Raises FileNotFoundError, ValueError."""
    vit, weights = build_vit(request), vit_file(request)
    with one_line_errors(request):
        state = _state(weights)
        vit.load_open_clip(state, "visual." if any(key.startswith("visual.") for key in state) else "")
    return vit.to(request.device).eval().requires_grad_(False), weights, state


def check_latent_vae(vae: VAE) -> None:
    """Raises ValueError for another VAE than that under OpenVision 3, or one that shifts its latents."""
    request = Request(PEERS["flux-vae"], Path(vae.name), "cpu", "fp32")
    request.check({"class": vae.kind, **vae.network.config} if vae.network is not None else {"class": "no VAE"})  # type: ignore[dict-item]
    if vae.uses_shift:
        raise ValueError("the released encoders take latents that are not shifted; set --model.vae.no-shift")


def _load_latent_vae(request: Request) -> VAE:
    """The VAE under OpenVision 3: in the sub-folder `vae`, or where `flux-vae` lies. Latents are the mean x scale, without shift."""
    flux = PEERS["flux-vae"]
    folder = request.folder / "vae" if (request.folder / "vae").is_dir() else find_folder(flux, "")
    return _load_vae(Request(flux, folder, request.device, request.precision))


def _state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    saved: Any = load_foreign_pickle(path)
    return {key.removeprefix("module."): value for key, value in saved.get("state_dict", saved).items()}


# -- UniTok and VILA-U: their own code ------------------------------------------------------------------------------


def _load_checkout(load: Callable[[Path, Path, str], Checkout], request: Request) -> Functions:
    if request.precision != "fp32":
        raise ValueError(f"{request.asset.name} runs by its authors' code, which sets the precision itself; leave out {request.precision}")
    for name in request.model.code[1:]:
        request.file(name)
    weights = request.file(request.asset.files[0].name.split("/")[0])
    size = request.model.size
    network = load(request.folder.resolve(), weights, request.device)
    can: dict[str, Callable] = {
        "reconstruct": lambda images: request.run(only_at(lambda x: network.reconstruct(x).float(), size), images),
        "features": lambda images: request.run(lambda x: network.features(resize(x, size, size)), images),
    }
    files = [weights]
    if weights.is_dir():
        files = list(weights.glob("*.safetensors")) or list(weights.glob("*.bin")) or [request.file(f"{weights.name}/model.safetensors")]
    pixels = "resized to 256 x 256 for a probe; rebuilt at 256 x 256 only, clamped to [-1, 1]"
    return request.functions(can, weights_sha256(files), pixels, dtype=network.dtype)


LOADERS: dict[str, Callable[[Request], Functions]] = {
    "vae": _load_vae_functions,
    "rae": _load_rae,
    "two towers": _load_two_towers,
    "openvision": _load_openvision,
    "openvision 3": _load_openvision,
    "unitok": partial(_load_checkout, unitok),
    "vila-u": partial(_load_checkout, vila_u),
}
