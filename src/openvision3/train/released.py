"""A released OpenVision 3 encoder as the model that a run starts from: `--init peer:openvision3-b2-256`, or peer:NAME=FOLDER.

It was published without the rest. The latent decoder is new and is what the run trains; text encoder and captioner are as small as can be, and are never
trained. `UNTRAINED` in the model's record says so, and whatever needs them refuses.
"""

from __future__ import annotations

from typing import Any

import torch

from openvision3.data.text import TextTokenizer
from openvision3.evaluate.peers.loading import other_weights
from openvision3.evaluate.peers.table import PEERS, build_vit, check_latent_vae, find_released, open_vit, vit_file
from openvision3.fetch.sources import PEER, split_peer
from openvision3.files import sha256_of
from openvision3.model.encoder import SIZES, EncoderConfig
from openvision3.model.openvision3 import ModelConfig, OpenVision3
from openvision3.model.transformer import sincos_positions
from openvision3.model.understanding import CaptionerConfig, TextEncoderConfig
from openvision3.model.vae import VAEConfig

UNTRAINED = ["text encoder", "captioner"]
APART = 1e-3
"""most that a position of the file may differ from ours: rounding to fp32 or fp16 stays below, and MAE's formula is 1 off"""


def is_released(init: str) -> bool:
    return init.startswith(PEER)


def read_settings(init: str) -> tuple[ModelConfig, int]:
    """(the settings of our model, the side of its images in pixels), from open_clip_config.json alone. The latent decoder is the paper's, of size B.

    If no folder is named and nothing is fetched, the paper's sizes stand in, by which a run can be estimated; one that starts needs the files.

    Raises:
        FileNotFoundError, ValueError: no such folder or encoder, or one of a size that is none of ours.
    """
    peer, folder = split_peer(init)
    settings = ModelConfig(text_encoder=TextEncoderConfig("tiny", positions=2), captioner=CaptionerConfig("tiny", positions=2))
    settings.vae = VAEConfig(PEERS["flux-vae"].hub, shift=False)
    try:
        request = find_released(peer, folder)
        with torch.device("meta"):
            vit = build_vit(request)
    except FileNotFoundError:
        if folder:
            raise
        width, embed_dim = ("L", 1024) if "-l2-" in peer else ("B", 768)
        settings.encoder = EncoderConfig(width, embed_dim=embed_dim, token_norm="none")
        return settings, PEERS[peer].model.size  # type: ignore[union-attr]
    name = next((name for name, size in SIZES.items() if size == vit.size), "")
    if not name:
        raise ValueError(f"{request.folder} holds an encoder of width {vit.size.width} with {vit.size.depth} blocks, which is none of {', '.join(SIZES)}")
    settings.encoder = EncoderConfig(name, vit.patch, vit.proj.shape[1], token_norm="none", gelu=vit.gelu)
    if (request.folder / "vae").is_dir():
        settings.vae.name = str(request.folder / "vae")
    return settings, vit.image_size // vit.patch * 16


def wordless() -> TextTokenizer:
    """The smallest tokenizer: no word is trained."""
    return TextTokenizer.train(["a"])


def describe(init: str) -> dict[str, Any]:
    """Where the encoder comes from, for the record of the run. Raises FileNotFoundError, ValueError."""
    request = find_released(*split_peer(init))
    sha256 = sha256_of(vit_file(request))
    about = {"name": init, "hub": request.asset.hub, "sha256": sha256, "licence": request.asset.licence, "untrained": UNTRAINED}
    return about | ({"note": note} if (note := other_weights(request.asset, sha256)) else {})


def start_from(model: OpenVision3, init: str) -> None:
    """Copy the released encoder into ours; the other parts keep their random weights.

    Ours computes its positions, so those of the file must be the same. A position of the class token is added to that token.

    Raises:
        FileNotFoundError, ValueError: other settings of the encoder, another VAE, weights that do not fit, other positions.
    """
    settings, _ = read_settings(init)
    if model.config.encoder != settings.encoder:
        raise ValueError(f"{init} has an encoder of other settings than {model.config.encoder}; leave out --model.encoder")
    check_latent_vae(model.vae)
    vit, weights, _ = open_vit(find_released(*split_peer(init)))
    side, table = vit.image_size // vit.patch, vit.positional_embedding
    apart = (table[1:] - sincos_positions(side, side, vit.size.width)).abs().max().item()
    if not apart <= APART:  # NaN, too
        raise ValueError(f"{weights}: its positions are up to {apart:.2g} from sines and cosines of whole places, which ours are; it cannot be taken over")
    own = {
        "patchify.weight": vit.conv1.weight,
        "class_token": (vit.class_embedding + table[0])[None, None],
        "pool_norm.weight": vit.ln_post.weight,
        "pool_norm.bias": vit.ln_post.bias,
        "pool_projection.weight": vit.proj.T,
        **{f"blocks.{name}": value for name, value in vit.blocks.state_dict().items()},
    }
    model.encoder.load_state_dict(own)
