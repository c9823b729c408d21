"""What stands in Inception's place in tests: its weights are not in the repository."""

from __future__ import annotations

import torch

from openvision3.networks.inception import EfficientNetFeatures, Inception, InceptionFeatures


class Inception8(Inception):
    """In the place of Inception: eight of EfficientNet's features."""

    width, spatial_width, sha256 = 8, 8, "1" * 64

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.network = EfficientNetFeatures()

    def features(self, images):
        pool = self.network(images)
        return InceptionFeatures(pool[:, :8], pool[:, 8:16], pool[:, 16:26])
