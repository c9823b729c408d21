"""RAE's public DiT weights (bytetriper/RAE, stage 2) in the layout of `dit`: the same numbers under our names.

Their rotations turn neighbouring channels of a head, rows first; ours turn channel i with i + half, columns first. So the rows of the projections to
queries and keys change places, and nothing else does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from openvision3.generate.dit import DiT, DiTConfig
from openvision3.hub import read_tensors
from openvision3.networks.perceptual import load_foreign_pickle

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
"""endings of files that are read as RAE's weights"""
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 2048: 16}
"""attention heads of their widths; files with the buffers of their rotations say it themselves"""
HEAD_BLOCKS = 2
"""last blocks that are the head, where widths do not tell"""

_OUTSIDE = {
    "s_embedder.proj": "enter",
    "x_embedder.proj": "enter_head",
    "s_projector": "to_head",
    "t_embedder.mlp.0": "time.fc_in",
    "t_embedder.mlp.2": "time.fc_out",
    "final_layer.linear": "leave",
    "final_layer.adaLN_modulation.1": "modulation",
}
_INSIDE = {
    "norm1": "norm_attention",
    "norm2": "norm_mlp",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "mlp.w12": "mlp.fc_in",
    "mlp.w3": "mlp.fc_out",
    "adaLN_modulation.1": "modulation",
}


@dataclass
class PublicDiT:
    """The settings and weights of a file."""

    config: DiTConfig
    channels: int
    """channels of the tokens that it draws"""
    classes: int
    weights: dict[str, Tensor]
    """by the names of `DiT`"""

    def network(self) -> DiT:
        """The network with these weights, strictly."""
        dit = DiT(self.config, self.channels, self.classes)
        dit.load_state_dict(self.weights)
        return dit.eval()


def read_public(path: str | Path, heads: tuple[int, int] = (0, 0)) -> PublicDiT:
    """Read a file of RAE's stage 2; of a training state the averaged weights are taken.

    `heads` are the attention heads of trunk and head where neither the file nor its widths tell them; 0: unknown.

    Raises:
        FileNotFoundError. ValueError: no such layout; names the first tensor that is missing or unknown.
    """
    state = _read(Path(path))
    if not any(name.startswith("s_embedder.") for name in state):
        raise ValueError(f"{path} does not hold RAE's DiT with a wide head: it has no s_embedder, but {', '.join(sorted(state)[:3])} ...")
    try:
        return _convert(state, heads)
    except KeyError as error:
        raise ValueError(f"{path} does not hold RAE's DiT with a wide head: {error.args[0]} is missing") from error
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as RAE's DiT: {error}") from error


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_tensors(path)
    state: dict = load_foreign_pickle(path)
    for part in ("ema", "model"):
        if isinstance(state.get(part), dict):
            state = state[part]
    return {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}


def _convert(state: dict[str, Tensor], given: tuple[int, int]) -> PublicDiT:
    state = {name.replace("embedding_table.weight", "embedding_table"): value for name, value in state.items()}
    blocks = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    widths = [len(state[f"blocks.{number}.norm1.weight"]) for number in range(blocks)]
    width, head_width = len(state["s_embedder.proj.bias"]), len(state["x_embedder.proj.bias"])
    depth = widths.count(width) if width != head_width else blocks - HEAD_BLOCKS
    heads = _heads(state, "enc_feat_rope", width, given[0], "dit.heads"), _heads(state, "dec_feat_rope", head_width, given[1], "dit.head-heads")
    positions = state["pos_embed"].flatten(0, 1)
    config = DiTConfig(
        width, depth, heads[0], state["blocks.0.mlp.w3.weight"].shape[1], head_width, blocks - depth, heads[1],
        state[f"blocks.{blocks - 1}.mlp.w3.weight"].shape[1], stored_positions=len(positions),
    )  # fmt: skip
    weights = {
        "stored_positions": positions,
        "time.frequencies": state["t_embedder.W"],
        "labels.weight": state["y_embedder.embedding_table"],
        "norm.weight": state["final_layer.norm_final.weight"],
    }
    known = {"pos_embed", "t_embedder.W", "y_embedder.embedding_table", "final_layer.norm_final.weight"}
    if width == head_width and "s_projector.weight" not in state:  # an identity there
        weights |= {"to_head.weight": torch.eye(width), "to_head.bias": torch.zeros(width)}
    for name, value in state.items():
        theirs, _, kind = name.rpartition(".")
        inside = re.fullmatch(r"blocks\.(\d+)\.(.+)", theirs)
        if inside and inside[2] in _INSIDE:
            number = int(inside[1])
            part, place, of_part = ("trunk", number, heads[0]) if number < depth else ("head", number - depth, heads[1])
            weights[f"{part}.{place}.{_INSIDE[inside[2]]}.{kind}"] = _reordered(value, of_part) if inside[2] == "attn.qkv" else value
        elif theirs in _OUTSIDE:
            weights[f"{_OUTSIDE[theirs]}.{kind}"] = value.flatten(1) if value.ndim == 4 else value  # convolutions of one pixel
        elif name not in known and not theirs.endswith("_feat_rope"):
            raise ValueError(f"{name} is unknown")
    public = PublicDiT(config, state["final_layer.linear.bias"].numel(), len(state["y_embedder.embedding_table"]) - 1, weights)
    with torch.device("meta"):
        own = DiT(config, public.channels, public.classes).state_dict()
    for name, value in own.items():
        if weights[name].shape != value.shape:
            raise ValueError(f"{name} is {tuple(weights[name].shape)}, the network needs {tuple(value.shape)}")
    return public


def _heads(state: dict[str, Tensor], rotations: str, width: int, given: int, option: str) -> int:
    if f"{rotations}.freqs_cos" in state:
        return width // state[f"{rotations}.freqs_cos"].shape[-1]
    heads = HEADS.get(width, given)
    if not heads:
        raise ValueError(
            f"the number of attention heads is not known: there is no {rotations}.freqs_cos, and width {width} is none of RAE's; "
            f"give it to `openvision3 train` with --{option}, elsewhere both with --heads TRUNK HEAD"
        )
    if width % (4 * heads):
        raise ValueError(f"{heads} attention heads do not fit width {width}: set --{option} or --heads to the number that the file was trained with")
    return heads


def _reordered(qkv: Tensor, heads: int) -> Tensor:
    """The rows of queries and keys, (3 width, ...), in our order within each head."""
    count = len(qkv) // 3 // heads
    quarter = count // 4
    place = torch.arange(count)
    pair, half = place % (2 * quarter), place // (2 * quarter)  # which angle of ours, and which of the two channels that it turns
    axis, number = 1 - pair // quarter, pair % quarter  # ours: columns, then rows; theirs: rows, then columns
    theirs = axis * 2 * quarter + 2 * number + half
    q, k, v = qkv.unflatten(0, (3, heads, count)).unbind(0)
    return torch.stack([q[:, theirs], k[:, theirs], v]).flatten(0, 2).contiguous()
