"""The features of a peer in the place of Inception's: what images of a generator are compared by."""

from __future__ import annotations

import torch
from torch import Tensor

from openvision3.evaluate.peers.table import load_peer
from openvision3.fetch.sources import split_peer
from openvision3.networks.inception import rounded_and_resized


class PeerFeatures:
    """The extractor of a peer's features, images (B, 3, H, W) in [-1, 1] -> (B, width). `peer` is NAME, NAME=FOLDER or FILE.py:FUNCTION.

    Raises:
        FileNotFoundError, ValueError: as `load_peer`, and for a peer that gives no features.
    """

    def __init__(self, peer: str, device: str):
        name, folder = split_peer(peer)
        self.model = load_peer(name, folder, device)
        if self.model.features is None:
            raise ValueError(f"{name} gives no features to compare images by; name another peer with --extractors")
        self.name, self.sha256, self.side, self.device = self.model.name, self.model.sha256, self.model.size, device
        self.preparation = f"uint8, resized to {self.side}x{self.side} by bicubic interpolation with antialias, clamped to the range of pixels"
        self.width = self(torch.zeros(1, 3, self.side, self.side)).shape[1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        assert self.model.features is not None
        return self.model.features(rounded_and_resized(images.to(self.device), self.side))
