"""Operations of one training sample and the bytes it keeps for the backward pass, part by part, from sizes alone.

Two operations a multiply-add; only matrix products and convolutions count, as in torch's FlopCounterMode, against which the
tests hold every number. A backward pass costs a linear layer twice its forward (gradient of its input and of its weight), and once
where the weight is frozen or the input is data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from openvision3.model.transformer import TransformerSize

FP32 = 4


@dataclass(frozen=True)
class Cost:
    """Of one sample. `lines` say where the forward's operations come from: (formula with numbers, operations)."""

    forward: float = 0.0
    backward: float = 0.0
    saved: float = 0.0
    """bytes kept from the forward for the backward"""
    largest: float = 0.0
    """bytes of the largest single activation"""
    blocks: float = 0.0
    """operations of `forward` that are made again when blocks are checkpointed"""
    lines: tuple[tuple[str, float], ...] = ()

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward + other.forward,
            self.backward + other.backward,
            self.saved + other.saved,
            max(self.largest, other.largest),
            self.blocks + other.blocks,
            (*self.lines, *other.lines),
        )

    def times(self, count: float) -> Cost:
        """Of `count` samples, or of a share of one. `largest` and `lines` stay those of one."""
        return replace(self, forward=self.forward * count, backward=self.backward * count, saved=self.saved * count, blocks=self.blocks * count)

    def without_backward(self) -> Cost:
        return replace(self, backward=0.0, saved=0.0, blocks=0.0)


NOTHING = Cost()


def linear(rows: float, inputs: int, outputs: int, what: str, *, backward: int = 2, saved: float = 0.0) -> Cost:
    """(rows, inputs) x (inputs, outputs); `backward` counts the products of its backward pass."""
    forward = 2.0 * rows * inputs * outputs
    return Cost(forward, backward * forward, saved, lines=((f"{what}: 2 x {rows:g} x {inputs} x {outputs}", forward),))


def transformer(size: TransformerSize, tokens: float, what: str, *, width_bytes: int, fused: bool, checkpointing: bool) -> Cost:
    """All blocks on `tokens` tokens that may see each other. `width_bytes` is 2 under bf16 autocast, `fused` the attention of GPUs.

    What a block keeps: the inputs of its two norms (sums stay in fp32), the norms' outputs, queries, keys and values, the attention's
    output, both sides of the GELU; without a fused kernel also the probabilities. Checkpointed blocks keep their input alone, and
    one block at a time is whole again.
    """
    n, w, m, b = tokens, size.width, size.mlp, width_bytes
    products = 2.0 * n * (4 * w * w + 2 * w * m) + 4.0 * n * n * w
    attention = n * w * b + FP32 * n * size.heads if fused else n * w * b + size.heads * n * n * (FP32 + (b if b != FP32 else 0))
    block = 2 * n * w * FP32 + 4 * n * FP32 + n * w * b + 3 * n * w * b + attention + n * w * b + 2 * n * m * b
    saved = size.depth * n * w * FP32 + block if checkpointing else size.depth * block
    line = f"{what}: {size.depth} blocks x (2 x {n:g} tokens x (4 x {w}^2 + 2 x {w} x {m}) + 4 x {n:g}^2 x {w})"
    forward = size.depth * products
    return Cost(forward, 2 * forward, saved, max(m, 3 * w) * n * b, forward, ((line, forward),))


# -- the VAE -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VaeShape:
    """What the arithmetic needs of a VAE's config.json."""

    kind: str
    encoder_channels: tuple[int, ...] = ()
    decoder_channels: tuple[int, ...] = ()
    layers: int = 2
    encoder_blocks: tuple[int, ...] = ()
    decoder_blocks: tuple[int, ...] = ()
    latent_channels: int = 3
    attention: bool = True
    quant: bool = True
    post_quant: bool = True
    source: str = field(default="", compare=False)

    @property
    def stride(self) -> int:
        return 2 ** (max(1, len(self.encoder_channels)) - 1)

    @property
    def parameters(self) -> float:
        """Counted layer by layer, biases and norms included."""
        return 0.0 if self.kind == "pixels" else sum(layer.parameters for way in (_encoder_layers(self), _decoder_layers(self)) for layer in way)


FLUX = VaeShape(
    "AutoencoderKL", (128, 256, 512, 512), (128, 256, 512, 512), 2, latent_channels=16, attention=True, quant=False, post_quant=False,
    source="https://huggingface.co/black-forest-labs/FLUX.1-schnell/blob/main/vae/config.json",
)  # fmt: skip
"""The published config, written down so that the estimate needs no download; ae_params of the FLUX.1 repository say the same
(ch 128, ch_mult 1 2 4 4, num_res_blocks 2, z_channels 16)."""

PUBLISHED = {"black-forest-labs/FLUX.1-schnell": FLUX, "black-forest-labs/FLUX.1-dev": FLUX}

PIXELS = VaeShape("pixels", source="no VAE")


def vae_shape(config: dict[str, Any], source: str = "") -> VaeShape:
    """diffusers' config.json of an AutoencoderKL or AutoencoderTiny. Raises ValueError for another class."""
    kind = config.get("_class_name", "")
    latent = int(config.get("latent_channels", 4))
    if kind == "AutoencoderKL":
        channels = tuple(config["block_out_channels"])
        flags = (bool(config.get("mid_block_add_attention", True)), bool(config.get("use_quant_conv", True)), bool(config.get("use_post_quant_conv", True)))
        return VaeShape(kind, channels, channels, int(config.get("layers_per_block", 1)), (), (), latent, *flags, source=source)
    if kind == "AutoencoderTiny":
        return VaeShape(
            kind,
            tuple(config["encoder_block_out_channels"]),
            tuple(config["decoder_block_out_channels"]),
            encoder_blocks=tuple(config["num_encoder_blocks"]),
            decoder_blocks=tuple(config["num_decoder_blocks"]),
            latent_channels=latent,
            source=source,
        )
    raise ValueError(f"{source or 'the VAE'} is a {kind or 'thing without a class'}; legal are AutoencoderKL and AutoencoderTiny")


@dataclass(frozen=True)
class _Layer:
    """A convolution or the middle attention: where it stands (sides are divided by `down`), its size, what is kept on its way."""

    what: str
    down: int
    macs: float
    """multiply-adds a position"""
    parameters: float
    kept: float = 0.0
    """channels kept a position for the backward"""
    largest: int = 0
    """channels of its widest map"""
    attention: int = 0
    """width, where it also mixes positions"""


def _conv(what: str, down: int, inputs: int, outputs: int, kernel: int = 3, *, bias: bool = True, kept: float = 0.0, reads: int = 1) -> _Layer:
    """`reads` is 2 where the input stands at twice the sides (a stride): what is kept of it is four times as much."""
    macs = kernel * kernel * inputs * outputs
    return _Layer(what, down, macs, macs + outputs * bias, kept or inputs * reads**2, max(inputs * reads**2, outputs))


def _resnet(what: str, down: int, inputs: int, outputs: int) -> Iterator[_Layer]:
    """norm, SiLU, convolution, twice: each keeps its input."""
    yield replace(_conv(f"{what} conv 1", down, inputs, outputs, kept=3 * inputs), parameters=9 * inputs * outputs + outputs + 2 * inputs)
    yield replace(_conv(f"{what} conv 2", down, outputs, outputs, kept=3 * outputs), parameters=9 * outputs * outputs + 3 * outputs)
    if inputs != outputs:
        yield replace(_conv(f"{what} shortcut", down, inputs, outputs, 1), kept=0.0)


def _middle(down: int, width: int, attention: bool) -> Iterator[_Layer]:
    yield from _resnet("middle", down, width, width)
    if attention:  # a norm; q, k, v and the output as linear layers with frozen weights: they keep nothing of their own
        yield _Layer("middle attention", down, 4 * width * width, 4 * (width * width + width) + 2 * width, 5 * width, 3 * width, width)
    yield from _resnet("middle", down, width, width)


def _encoder_layers(vae: VaeShape) -> Iterator[_Layer]:
    channels = vae.encoder_channels
    if vae.kind == "AutoencoderTiny":
        for level, (width, count) in enumerate(zip(channels, vae.encoder_blocks, strict=True)):
            down = 2**level
            yield _conv("first conv", 1, 3, width) if level == 0 else _conv("halving conv", down, width, width, bias=False, reads=2)
            for _ in range(count):
                yield from _tiny_block(down, width)
        yield _conv("last conv", 2 ** (len(channels) - 1), channels[-1], vae.latent_channels)
        return
    yield _conv("first conv", 1, 3, channels[0])
    before = channels[0]
    for level, width in enumerate(channels):
        down = 2**level
        for _ in range(vae.layers):
            yield from _resnet("resnet", down, before, width)
            before = width
        if level < len(channels) - 1:
            yield _conv("halving conv", 2 * down, width, width, reads=2)
    down = 2 ** (len(channels) - 1)
    yield from _middle(down, channels[-1], vae.attention)
    last = _conv("last conv", down, channels[-1], 2 * vae.latent_channels, kept=3 * channels[-1])
    yield replace(last, parameters=last.parameters + 2 * channels[-1])
    if vae.quant:
        yield _conv("quant conv", down, 2 * vae.latent_channels, 2 * vae.latent_channels, 1)


def _decoder_layers(vae: VaeShape) -> Iterator[_Layer]:
    channels, top = vae.decoder_channels, len(vae.decoder_channels) - 1
    if vae.kind == "AutoencoderTiny":
        yield _conv("first conv", 2**top, vae.latent_channels, channels[0], kept=2 * vae.latent_channels)
        for level, (width, count) in enumerate(zip(channels, vae.decoder_blocks, strict=True)):
            down = 2 ** (top - level)
            for _ in range(count):
                yield from _tiny_block(down, width)
            yield _conv("doubling conv", down // 2, width, width, bias=False) if level < top else _conv("last conv", 1, width, 3)
        return
    down = 2**top
    if vae.post_quant:
        yield _conv("quant conv", down, vae.latent_channels, vae.latent_channels, 1)
    yield _conv("first conv", down, vae.latent_channels, channels[-1])
    yield from _middle(down, channels[-1], vae.attention)
    before = channels[-1]
    for level in range(top, -1, -1):
        down = 2**level
        for _ in range(vae.layers + 1):
            yield from _resnet("resnet", down, before, channels[level])
            before = channels[level]
        if level:
            yield _conv("doubling conv", down // 2, before, before)
    last = _conv("last conv", 1, channels[0], 3, kept=3 * channels[0])
    yield replace(last, parameters=last.parameters + 2 * channels[0])


def _tiny_block(down: int, width: int) -> Iterator[_Layer]:
    """Three convolutions with ReLUs between, which keep their outputs: the inputs of the next."""
    for _ in range(3):
        yield _conv("block conv", down, width, width)


def _vae_cost(layers: Iterator[_Layer], side: int, width_bytes: int, backward: int) -> Cost:
    """`backward` 1: gradient to the input, weights frozen. Equal layers are one line."""
    total = NOTHING
    lines: dict[tuple[str, str], tuple[int, float]] = {}
    for layer in layers:
        here = side // layer.down
        positions = here * here
        forward, formula = 2.0 * positions * layer.macs, f"2 x {here}^2 x {layer.macs:.0f}"
        back = forward
        if layer.attention:
            mixing = 4.0 * positions * positions * layer.attention
            forward, back, formula = forward + mixing, back + 2 * mixing, f"{formula} + 4 x {here}^4 x {layer.attention}"
        lines[layer.what, formula] = lines.get((layer.what, formula), (0, 0.0))[0] + 1, forward
        total = total + Cost(forward, back * backward, positions * layer.kept * width_bytes * backward, positions * layer.largest * width_bytes)
    found = tuple((f"{here} x {what}: {formula}", here * each) for (what, formula), (here, each) in lines.items())
    return replace(total, lines=found)


def vae_encode(vae: VaeShape, side: int, width_bytes: int) -> Cost:
    """Forward without gradient."""
    return NOTHING if vae.kind == "pixels" else _vae_cost(_encoder_layers(vae), side, width_bytes, 0)


def vae_decode(vae: VaeShape, side: int, width_bytes: int) -> Cost:
    """Forward, and the gradient to the latents."""
    return NOTHING if vae.kind == "pixels" else _vae_cost(_decoder_layers(vae), side, width_bytes, 1)


# -- the perceptual networks ---------------------------------------------------------------------------------------


def perceptual(kind: str, side: int, width_bytes: int) -> Cost:
    """Features of the picture (forward) and of the rebuilt one (forward and gradient to it), weights frozen."""
    layers = list(_efficientnet_layers(side) if kind == "efficientnet" else _stack_layers(kind.removeprefix("lpips-"), side))
    once = sum(2.0 * positions * macs for positions, macs, _ in layers)
    saved = sum(positions * kept * width_bytes for positions, _, kept in layers)
    line = f"{kind} on two pictures of {side}: 2 x (sum over {len(layers)} convolutions of 2 x positions x multiply-adds)"
    return Cost(2 * once, once, saved, max(positions * kept * width_bytes for positions, _, kept in layers), lines=((line, 2 * once),))


def _efficientnet_layers(side: int, stages: int = 5) -> Iterator[tuple[float, float, float]]:
    """(positions, multiply-adds a position, channels kept a position) of each convolution."""
    from openvision3.networks.perceptual import _STAGES

    here, width = math.ceil(side / 2), 32
    yield here * here, 27 * 32, 2 * 32
    for repeats, kernel, stride, expansion, output in _STAGES[:stages]:
        for i in range(repeats):
            hidden = width * expansion
            if expansion != 1:
                yield here * here, width * hidden, width + 2 * hidden
            here = math.ceil(here / (stride if i == 0 else 1))
            yield here * here, kernel * kernel * hidden, 2 * hidden
            yield here * here, hidden * output, hidden
            width = output


def _stack_layers(net: str, side: int) -> Iterator[tuple[float, float, float]]:
    from openvision3.networks.perceptual import _VGG

    if net == "vgg":
        width = 3
        for step in _VGG:
            if isinstance(step, str):
                side //= 2
            else:
                yield side * side, 9 * width * step, width + step
                width = step
        return
    side = (side + 4 - 11) // 4 + 1
    yield side * side, 121 * 3 * 64, 16 * 3 + 64  # of the stride of 4, the picture
    side = (side - 3) // 2 + 1
    yield side * side, 25 * 64 * 192, 3 * 64 + 192  # a pooling keeps its choices, in eight bytes each
    side = (side - 3) // 2 + 1
    for inputs, outputs, pooled in ((192, 384, 2 * 192), (384, 256, 0), (256, 256, 0)):
        yield side * side, 9 * inputs * outputs, pooled + inputs + outputs


# -- the optimiser -------------------------------------------------------------------------------------------------


def muon(matrices: dict[tuple[int, int], int]) -> float:
    """Operations of one step: five Newton-Schulz iterations of three products on every matrix; AdamW has no product."""
    total = 0.0
    for (rows, columns), count in matrices.items():
        short, long = min(rows, columns), max(rows, columns)
        total += count * 5 * (2 * 2.0 * short * short * long + 2.0 * short**3)
    return total
