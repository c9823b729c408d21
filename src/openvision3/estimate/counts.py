"""What one sample costs in each part of the model, counted on the model itself: it is built and called on the meta device, where tensors have
shapes and no numbers.

torch's FlopCounterMode counts operations (two a multiply-add; matrix products and convolutions only). Saved-tensor hooks count the bytes that the
forward pass keeps for the backward pass.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from openvision3.model import losses, transformer
from openvision3.model.openvision3 import OpenVision3
from openvision3.networks.discriminator import FeatureDiscriminator
from openvision3.networks.perceptual import EfficientNetDistance, EfficientNetLite0, Lpips
from openvision3.train.optimizer import OptimizerConfig, Optimizers

HALVED = {F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__}
"""functions of the model that autocast computes in bf16"""

BLOCKS = ("blocks", "trunk", "head")
"""names of the lists of equal blocks in our networks"""


@dataclass(frozen=True)
class Cost:
    """Of one sample, in operations and bytes."""

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0
    """operations of the backward pass that repeat the forward pass of checkpointed blocks"""
    saved: float = 0.0
    """bytes kept from the forward pass for the backward pass"""
    largest: float = 0.0
    """bytes of the largest output of a module"""
    modules: dict[str, tuple[int, float]] = field(default_factory=dict)
    """{modules: (how many, operations of their forward pass)}"""

    def extended(self, one: Cost, two: Cost, times: int) -> Cost:
        """This cost and `times` the difference of two others."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("largest", "modules")}
        modules = dict(self.modules)
        for name, (number, operations) in two.modules.items():
            before, before_operations = one.modules.get(name, (0, 0.0))
            own_number, own_operations = modules.get(name, (0, 0.0))
            modules[name] = own_number + times * (number - before), own_operations + times * (operations - before_operations)
        numbers = {name: value + times * (getattr(two, name) - getattr(one, name)) for name, value in own.items()}
        return Cost(**numbers, largest=self.largest, modules=modules)


@dataclass(frozen=True)
class Shapes:
    """What the cost of a sample depends on beside the model."""

    side: int
    """pixels"""
    text_length: int
    caption_length: int
    bf16: bool
    on_cpu: bool
    checkpointing: bool


_counted: dict[tuple, Cost] = {}
"""A part is counted once, however many estimates of one process ask for it."""


def count_parts(model: OpenVision3, shapes: Shapes, captions: int, batch: int) -> dict[str, Cost]:
    """{part: cost of a sample that goes through it}, for a model on the meta device. A sample is contrasted with all of a batch."""
    config, vae, side = model.config, model.vae, shapes.side
    grid, width = side // 16, model.encoder.size.width
    learns = config.loss.encoder_learns_from
    dtype = torch.bfloat16 if shapes.bf16 else torch.float32
    one = torch.ones((), device="meta")

    def images(rows: int, **options: Any) -> Tensor:
        return torch.empty(rows, 3, side, side, **options)

    def latents(rows: int, **options: Any) -> Tensor:
        return torch.empty(rows, vae.latent_channels, side // vae.stride, side // vae.stride, **options)

    def tokens(rows: int, branch: str, count: int = grid**2) -> Tensor:
        return torch.empty(rows, count, width, requires_grad=learns in ("both", branch))

    def ids(rows: int, length: int) -> Tensor:
        return torch.empty(rows, length, dtype=torch.long)

    def rebuild(part: nn.Module, rows: int) -> Tensor:
        return losses.latent_loss(latents(rows), part(tokens(rows, "reconstruction"), (grid, grid)), one)

    def decode(_: nn.Module, rows: int) -> Tensor:
        return losses.pixel_loss(images(rows), vae._decode(latents(rows, dtype=dtype, requires_grad=True)).float(), one)

    def features(part: Any, rows: int) -> Tensor:
        return part.features(tokens(rows, "understanding", part.token_count(grid**2)), ids(rows, shapes.caption_length))

    def logits(part: Any, rows: int) -> Tensor:
        return part._logits(torch.empty(rows, shapes.caption_length - 1, part.embedding.embedding_dim, requires_grad=True))

    calls: dict[str, tuple[nn.Module, Any, Callable[[Any, int], Tensor]]] = {
        "encoder": (model.encoder, (config.encoder, learns), lambda part, rows: torch.cat([x.flatten() for x in part(latents(rows))])),
        "latent decoder": (model.latent_decoder, (config.latent_decoder, learns), rebuild),
        "text encoder": (model.text_encoder, config.text_encoder, lambda part, rows: part(ids(rows, shapes.text_length))),
        "captioner": (model.captioner, (config.captioner, learns), features),
        "vocabulary head": (model.captioner, (config.captioner, model.vocabulary), logits),
    }
    if vae.network is not None:
        calls["VAE encode"] = vae.network, vae.network.config, lambda _, rows: vae._encode(images(rows, dtype=dtype))
        calls["VAE decode"] = vae.network, vae.network.config, decode
    if config.loss.lambda_perceptual:
        kind = config.loss.perceptual
        with torch.device("meta"):
            distance = EfficientNetDistance(EfficientNetLite0()) if kind == "efficientnet" else Lpips(kind.removeprefix("lpips-"))
        calls["perceptual"] = distance, kind, lambda part, rows: part.per_image(images(rows), images(rows, requires_grad=True))
    costs = {}
    for name in ("VAE encode", "encoder", "latent decoder", "VAE decode", "text encoder", "captioner", "vocabulary head", "perceptual"):
        if name in calls:
            network, settings, call = calls[name]
            key = (name, shapes, str(settings), width, vae.latent_channels, vae.stride)
            if key not in _counted:
                fused = replace(shapes, on_cpu=False)  # diffusers leaves attention to torch on a CPU, too
                with torch.set_grad_enabled(name != "VAE encode"):
                    _counted[key] = count(network, call, fused if name.startswith("VAE") else shapes)
            costs[name] = _counted[key]
    pairs = 2.0 * 2 * captions * config.encoder.embed_dim * batch  # both ways, with the rows of all devices
    return costs | {"contrast": Cost(pairs, 2 * pairs, modules={f"both ways: 2 x {2 * captions} x {config.encoder.embed_dim} x {batch}": (1, pairs)})}


def count_discriminator(shapes: Shapes) -> tuple[int, Cost]:
    """(trained parameters, the cost of a sample) of a discriminator on EfficientNet's features."""
    side = shapes.side
    with torch.device("meta"):
        discriminator = FeatureDiscriminator(EfficientNetLite0())
    one = torch.ones((), device="meta")

    def call(part: Any, rows: int) -> Tensor:
        return torch.stack(part(torch.empty(rows, 3, side, side), torch.empty(rows, 3, side, side, requires_grad=True), one))

    return sum(p.numel() for p in discriminator.parameters()), count(discriminator, call, shapes)


def count(network: nn.Module, call: Callable[[Any, int], Tensor], shapes: Shapes, names: Sequence[str] = BLOCKS, passed: bool = False) -> Cost:
    """The cost of a sample in `call(network, rows)`, which returns what the backward pass starts from.

    Of each list of equal blocks, which has one of `names`, one and two are counted: each further block adds the difference. `passed`: the blocks are
    frozen, but a gradient passes through them to what comes before.
    """
    lists = {name: part for name, part in network.named_children() if isinstance(part, nn.ModuleList) and name in names}
    if not lists:
        return _count(network, call, shapes)
    trained = passed or any(p.requires_grad for blocks in lists.values() for p in blocks.parameters())

    def shorten(lengths: dict[str, int], wrap: bool = False) -> Cost:
        for name, blocks in lists.items():
            kept = blocks[: lengths.get(name, 1)]
            # A backward pass suspends function modes: each recomputation enters its own.
            wrapped = (checkpoint_wrapper(block, context_fn=lambda: (contextlib.nullcontext(), _AsOnDevice(shapes))) for block in kept)
            setattr(network, name, nn.ModuleList(wrapped) if wrap else kept)
        return _count(network, call, shapes)

    one, inputs_of_one = shorten({}), shorten({}, True) if shapes.checkpointing and trained else Cost()
    cost, inputs, block = one, inputs_of_one, 0.0
    for name, blocks in lists.items():
        if len(blocks) < 2:
            continue
        two, more = shorten({name: 2}), len(blocks) - 1
        cost, block = cost.extended(one, two, more), max(block, two.saved - one.saved)
        if shapes.checkpointing and trained:
            inputs = inputs.extended(inputs_of_one, shorten({name: 2}, True), more)
    for name, blocks in lists.items():
        setattr(network, name, blocks)
    if shapes.checkpointing and trained:
        # In the backward pass one block at a time is whole again.
        cost = replace(cost, again=inputs.backward - cost.backward, saved=inputs.saved + block)
    return cost


def _count(network: nn.Module, call: Callable[[Any, int], Tensor], shapes: Shapes) -> Cost:
    part, of_two, of_three, largest = _Part(network, call), _Kept(), _Kept(), [0]

    def measure(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and module is not part:
            largest.append(output.untyped_storage().nbytes())

    with torch.device("meta"), _AsOnDevice(shapes):
        with FlopCounterMode(display=False) as counter, register_module_forward_hook(measure):
            with of_two:
                result = part(2)
            forward, modules = float(counter.get_total_flops()), operations_by_module(counter)
            if result.requires_grad:
                result.sum().backward()
        if result.requires_grad:
            with of_three:
                part(3)
    # The third row's alone: weights, masks and positions are kept once for all rows. Of a single row some copies are views.
    saved = float(of_three.bytes - of_two.bytes) if result.requires_grad else 0.0
    return Cost(forward / 2, (counter.get_total_flops() - forward) / 2, saved=saved, largest=max(largest) / 2, modules=modules)


class _Part(nn.Module):
    """A call of any method of a network, as a module: FlopCounterMode names modules from the one whose `forward` runs first."""

    def __init__(self, network: nn.Module, call: Callable[[Any, int], Tensor]):
        super().__init__()
        self.network, self.call = network, call

    def forward(self, rows: int) -> Tensor:
        return self.call(self.network, rows)


class _Kept(saved_tensors_hooks):
    """Bytes that autograd keeps, each storage once; parameters count, too."""

    def __init__(self) -> None:
        self.storages: dict[int, tuple[Tensor, int]] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = tensor.detach(), storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.storages.values())


class _AsOnDevice(TorchFunctionMode):
    """On the meta device, the precision and the attention that the model has on a CPU or a GPU."""

    def __init__(self, shapes: Shapes):
        super().__init__()
        self.bf16, self.on_cpu = shapes.bf16, shapes.on_cpu

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in HALVED and self.bf16:
            args = tuple(x.bfloat16() if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in args)
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs or {})
        q, k, v = args
        if k.shape[1] < q.shape[1]:  # queries of several heads share keys and values
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        if self.on_cpu and k.shape[2] <= transformer.PLAIN_TOKENS:
            return transformer.plain_attention(q, k, v, (kwargs or {}).get("attn_mask"))
        return _FusedAttention.apply(q, k, v)


class _FusedAttention(torch.autograd.Function):
    """The products of attention, and what a fused kernel keeps of them: no probabilities, but a number for each query and head."""

    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        y = (q @ k.transpose(-1, -2) @ v).transpose(1, 2).contiguous().transpose(1, 2)  # heads side by side, as the next layer reads them
        context.save_for_backward(q, k, v, y, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return y

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        q, k, v, *_ = context.saved_tensors
        scores = gradient @ v.transpose(-1, -2)
        return scores @ k, scores.transpose(-1, -2) @ q, scores.transpose(-1, -2) @ gradient


def operations_by_module(counter: FlopCounterMode) -> dict[str, tuple[int, float]]:
    """Operations of one of two rows so far by module, without those of its sub-modules. Modules whose names differ in numbers alone are one entry."""
    totals: dict[str, float] = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name != "Global"}
    own = dict(totals)
    for name, value in totals.items():
        while name := name.rpartition(".")[0]:
            if name in totals:
                own[name] -= value
                break
    groups: dict[str, list[float]] = {}
    for name, value in own.items():
        if value:
            groups.setdefault(re.sub(r"\.\d+", ".*", name).removeprefix("_Part").removeprefix(".network").removeprefix("."), []).append(value)
    return {name or "output": (len(operations), sum(operations) / 2) for name, operations in groups.items()}


def count_muon(model: nn.Module, config: OptimizerConfig) -> tuple[float, float]:
    """(operations of a step, bytes of the state), for a model on the meta device. AdamW beside it has no matrix product."""
    optimizers = Optimizers(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    with FlopCounterMode(display=False) as counter:
        optimizers.step()
    optimizers.zero_grad()
    state = [value for optimizer in optimizers.all for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return float(counter.get_total_flops()), float(sum(value.nbytes for value in state if value.ndim))
