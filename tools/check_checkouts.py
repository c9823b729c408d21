"""Compare the peers `unitok` and `vila-u` with their authors' own code: a checkout of their repository, random weights, equal to the last bit.

    python tools/check_checkouts.py unitok CHECKOUT      # github.com/FoundationVision/UniTok
    python tools/check_checkouts.py vila-u CHECKOUT      # github.com/mit-han-lab/vila-u

docs/peers.md says what each needs beside this package, and with which versions it was run. Nothing is downloaded or written into the checkout.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from openvision3.evaluate.peers.checkouts import imported_checkout
from openvision3.evaluate.peers.table import load_peer


def unitok(folder: Path, images: Tensor) -> tuple[Tensor, Tensor]:
    """Write random weights of the released size into `folder`; return what the authors' own functions make of the images."""
    from models.unitok import UniTok
    from utils.config import Args

    settings = Args()
    settings.grad_ckpt = False
    network = UniTok(settings).eval()
    plain = {name: value for name, value in settings.state_dict().items() if not isinstance(value, torch.dtype)}
    torch.save({"args": plain, "trainer": {"unitok": network.state_dict()}}, folder / "unitok_tokenizer.pth")
    return network.idx_to_img(network.img_to_idx(images)), network.encode_image(images)


def vila_u(folder: Path, images: Tensor) -> tuple[Tensor, Tensor]:
    """The same for VILA-U; SigLIP's tower has 4 of its 24 layers, which lie in a loop."""
    from vila_u.model.multimodal_encoder import rqvaesigliptransformer as package

    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 16, "image_size": 256, "patch_size": 16}
    text = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    (folder / "siglip").mkdir()
    (folder / "siglip" / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": tower, "text_config": text}))
    decoder = {"double_z": False, "z_channels": 256, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 1, 2, 2, 4],
               "num_res_blocks": 2, "attn_resolutions": [16], "dropout": 0.0}  # fmt: skip
    autoencoder = {"embed_dim": 1024, "n_embed": 16384, "latent_shape": [16, 16, 1024], "code_shape": [16, 16, 4], "shared_codebook": True,
                   "restart_unused_codes": True, "ddconfig": decoder, "decoder_latent_shape": [16, 16], "pretrained_model": str(folder / "siglip")}  # fmt: skip
    depth = {"block_size": [16, 16, 4], "input_embed_dim_1": 1024, "input_embed_dim_2": 64, "embed_dim": 64, "vocab_size": 16384,
             "head": {"n_layer": 1, "block": {"n_head": 4}}}  # fmt: skip
    config = package.RQVAESIGLIPTransformerConfig(autoencoder, depth, hidden_size=1024, architectures=["RQVAESIGLIPTransformer"])
    network: Any = package.RQVAESIGLIPTransformer(config).to(torch.bfloat16)
    for codebook in network.rqvaesiglip.quantizer.parameters():
        codebook.data.normal_()
    network.save_pretrained(folder / "vision_tower")
    network = package.RQVAESIGLIPTransformer.from_pretrained(folder / "vision_tower", torch_dtype=torch.bfloat16).rqvaesiglip.eval()
    _, z = network.encode_image(images.to(torch.bfloat16))
    return network.decode(z).float().clamp(-1, 1), z.float().mean((1, 2))


AUTHORS: dict[str, Callable[[Path, Tensor], tuple[Tensor, Tensor]]] = {"unitok": unitok, "vila-u": vila_u}


def main(peer: tyro.conf.Positional[Literal["unitok", "vila-u"]], checkout: tyro.conf.Positional[Path]) -> None:
    """Print the largest differences between the peer and its authors' code."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, 256, 256) * 2 - 1
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = Path(temporary)
        for path in checkout.resolve().iterdir():
            (folder / path.name).symlink_to(path)
        with imported_checkout(peer, folder):
            reconstruction, features = AUTHORS[peer](folder, images)
        loaded = load_peer(peer, str(folder))
        assert loaded.reconstruct is not None and loaded.features is not None
        pairs = {"reconstruction": (loaded.reconstruct(images), reconstruction), "features": (loaded.features(images), features)}
    for name, (ours, theirs) in pairs.items():
        print(f"{peer}: {name} {tuple(ours.shape)}, standard deviation {theirs.std():.3f}, largest difference {(ours - theirs).abs().max()}")
    if any(not torch.equal(ours, theirs) for ours, theirs in pairs.values()):
        sys.exit(f"{peer} differs from its authors' code")


if __name__ == "__main__":
    tyro.cli(main)
