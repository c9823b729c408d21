"""A discriminator on frozen features, as in projected GANs (Sauer et al. 2021, arXiv 2111.01007): only its small heads are trained.

The features are those of EfficientNet-Lite0 at strides 4, 8 and 16, each scaled to unit length at every place. The paper's random mixing of channels
and scales is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from openvision3 import distributed
from openvision3.networks.perceptual import EfficientNetLite0, load_efficientnet

CHANNELS = {1: 24, 2: 40, 4: 112}
"""{stage of the features: channels}, at strides 4, 8 and 16"""
WIDTH = 64
"""channels within a head"""


class Heads(nn.Module):
    """For each stage of the features a map of scores (B, 1, h, w): above 0 says that an image is real."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({f"stage_{stage}": _head(channels) for stage, channels in CHANNELS.items()})

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [head(of_stage) for head, of_stage in zip(self.stages.values(), features, strict=True)]


def _head(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, WIDTH, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(WIDTH, 1, 1),
    )


class FeatureDiscriminator(nn.Module):
    """Tells images from rebuilt ones. Its heads are trained; the network of its features is frozen, never saved, and no part of the module.

    Raises:
        FileNotFoundError, ValueError: the weights of EfficientNet-Lite0, unless a `network` is given.
    """

    def __init__(self, network: EfficientNetLite0 | None = None):
        super().__init__()
        self._network = (network.requires_grad_(False) if network is not None else load_efficientnet(),)  # a tuple keeps it outside
        self.heads = Heads()

    def features(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) in [-1, 1] -> (B, C, h, w) of each stage, of length sqrt(C) at every place."""
        (network,) = self._network
        outputs = network.to(images.device).features(images, max(CHANNELS) + 1)
        return [F.normalize(outputs[stage].float(), dim=1, eps=1e-6) * channels**0.5 for stage, channels in CHANNELS.items()]

    def scores(self, features: Sequence[Tensor], *, trained: bool = True) -> list[Tensor]:
        """The maps of scores of each stage. With `trained` False the gradient reaches the features, but not the heads."""
        if trained:
            return self.heads(features)
        return functional_call(self.heads, {name: value.detach() for name, value in self.heads.named_parameters()}, (features,))

    def forward(self, images: Tensor, images_hat: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """(P, 3, H, W) twice -> (the discriminator's hinge loss, the adversarial loss), this rank's share of each.

        The gradient of the first reaches the heads alone, that of the second `images_hat` alone: one backward pass trains both players.
        `count` is the number of images in the global batch.
        """
        with torch.no_grad():
            real = self.features(images)
        rebuilt = self.features(images_hat)
        said_of_real, said_of_rebuilt = self.scores(real), self.scores([of_stage.detach() for of_stage in rebuilt])
        hinge = _rows([F.relu(1 - scores) for scores in said_of_real]) + _rows([F.relu(1 + scores) for scores in said_of_rebuilt])
        adversarial = -_rows(self.scores(rebuilt, trained=False))
        return distributed.share(hinge.sum(), count), distributed.share(adversarial.sum(), count)

    def idle(self) -> Tensor:
        """Zero, with a gradient of zero for all heads: where there are no images to compare, because ranks exchange the gradients of all parameters."""
        return torch.stack([parameter.sum() for parameter in self.heads.parameters()]).sum() * 0.0


def _rows(maps: Sequence[Tensor]) -> Tensor:
    """(B,) means over the places of each map, then over the maps, in fp32."""
    return torch.stack([scores.float().flatten(1).mean(1) for scores in maps]).mean(0)
