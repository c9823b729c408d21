"""LPIPS with random weights, under the names of the published files."""

import pytest
import torch

VGG = [
    (0, 64),
    (2, 64),
    "pool",
    (5, 128),
    (7, 128),
    "pool",
    (10, 256),
    (12, 256),
    (14, 256),
    "pool",
    (17, 512),
    (19, 512),
    (21, 512),
    "pool",
    (24, 512),
    (26, 512),
    (28, 512),
]


VGG_READ_AFTER = (2, 7, 14, 21, 28)


ALEX = [(0, 64, 11, 4, 2), "pool", (3, 192, 5, 1, 2), "pool", (6, 384, 3, 1, 1), (8, 256, 3, 1, 1), (10, 256, 3, 1, 1)]


ALEX_READ_AFTER = (0, 3, 6, 8, 10)


LAYERS = {"vgg": ([step if step == "pool" else (*step, 3, 1, 1) for step in VGG], VGG_READ_AFTER, 2), "alex": (ALEX, ALEX_READ_AFTER, 3)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Both nets with random weights under torchvision's and LPIPS's names."""
    folder, generator = tmp_path_factory.mktemp("lpips"), torch.Generator().manual_seed(0)
    for net, (steps, read, _) in LAYERS.items():
        state, linear, width = {}, {}, 3
        for step in steps:
            if step == "pool":
                continue
            index, out, kernel, _, _ = step
            state[f"features.{index}.weight"] = torch.randn(out, width, kernel, kernel, generator=generator) * (2 / (width * kernel**2)) ** 0.5
            state[f"features.{index}.bias"] = torch.randn(out, generator=generator) * 0.1
            width = out
            if index in read:
                linear[f"lin{len(linear)}.model.1.weight"] = torch.rand(1, out, 1, 1, generator=generator)
        state["classifier.6.weight"] = torch.zeros(1, 1)  # the real files hold their classifier too
        torch.save(state, folder / f"{net}.pth")
        torch.save(linear, folder / f"{net}_linear.pth")
    return folder
