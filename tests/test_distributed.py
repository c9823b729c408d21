"""What ranks share: set-up from the environment, means over all rows, gradients through the gather, sharding."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from openvision3 import distributed
from openvision3.distributed import Ranks
from openvision3.model import losses

SCRIPT = """
import sys, torch
from openvision3 import distributed
from openvision3.model import losses
with distributed.started() as ranks:
    given = torch.load(sys.argv[1])
    count = len(given["images"]) // ranks.world
    mine = slice(ranks.rank * count, (ranks.rank + 1) * count)
    images, texts = (given[name][mine].requires_grad_() for name in ("images", "texts"))
    temperature = given["temperature"].requires_grad_()
    share = losses.contrastive_loss(images, texts, temperature, given["present"][mine], given["hashes"][mine])
    share.backward()
    mean = distributed.total(share.detach()) / ranks.world
    gradient = distributed.total(temperature.grad) / ranks.world
    torch.save({"loss": mean, "images": images.grad / ranks.world, "texts": texts.grad / ranks.world, "temperature": gradient}, f"{sys.argv[1]}.{ranks.rank}")
"""


def test_the_contrastive_loss_of_two_processes_and_its_gradients_are_those_of_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    given = {
        "images": F.normalize(torch.randn(12, 8, generator=generator), dim=-1),
        "texts": F.normalize(torch.randn(12, 3, 8, generator=generator), dim=-1),
        "temperature": torch.tensor([2.0]),
        "present": torch.rand(12, 3, generator=generator) > 0.4,
        "hashes": torch.randint(0, 5, (12, 3), generator=generator),  # equal captions on both ranks
    }
    given["present"][:6, 1] = False  # a set that one rank has and the other has not
    given["present"][:, 2] = False  # and one that nobody has
    torch.save(given, tmp_path / "given")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    names = {"WORLD_SIZE": "2", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "given")], env={**os.environ, **names, "RANK": str(r)}) for r in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]

    images, texts, temperature = (given[name].clone().requires_grad_() for name in ("images", "texts", "temperature"))
    loss = losses.contrastive_loss(images, texts, temperature, given["present"], given["hashes"])
    loss.backward()
    found = [torch.load(tmp_path / f"given.{rank}") for rank in range(2)]
    for rank in found:
        torch.testing.assert_close(rank["loss"], loss.detach())
        torch.testing.assert_close(rank["temperature"], temperature.grad)
    for name, gradient in (("images", images.grad), ("texts", texts.grad)):
        torch.testing.assert_close(torch.cat([rank[name] for rank in found]), gradient)


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, Ranks()),
        ({"WORLD_SIZE": "1", "RANK": "0"}, Ranks()),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, Ranks(5, 8, 1, 4)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Ranks(1, 2, 1, 2)),
    ],
)
def test_ranks_are_read_from_the_environment(monkeypatch, given, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert Ranks.from_environment() == expected


@pytest.mark.parametrize("given", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "2"}, {"WORLD_SIZE": "two", "RANK": "0"}])
def test_half_a_set_of_ranks_is_refused(monkeypatch, given):
    monkeypatch.delenv("RANK", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="WORLD_SIZE"), distributed.started():
        pass


def test_small_models_are_copied_and_large_ones_sharded_within_a_machine():
    eight, nodes = Ranks(0, 8, 0, 8), Ranks(0, 16, 0, 8)
    assert distributed.choose_parallel("auto", 10**6, eight) == distributed.choose_parallel("auto", 10**9, Ranks()) == "replicate"
    assert distributed.choose_parallel("auto", 10**9, eight) == "fsdp"
    assert distributed.choose_parallel("auto", 10**9, nodes) == "hsdp"
    assert distributed.choose_parallel("fsdp", 10**6, nodes) == "fsdp"
    assert distributed.choose_parallel("fsdp", 10**6, Ranks()) == "replicate", "one process has nobody to share with"


class Blocks(nn.Module):
    def __init__(self, blocks: int = 2):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(blocks))
        self.frozen = nn.ModuleList([nn.Linear(4, 4)]).requires_grad_(False)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.frozen[0](x)


@pytest.mark.parametrize("how", [(True, False), pytest.param((False, True), marks=pytest.mark.slow), pytest.param((True, True), marks=pytest.mark.slow)])
def test_checkpointing_and_compiling_keep_names_numbers_and_gradients(how):
    torch.manual_seed(0)
    plain, wrapped = Blocks(), Blocks()
    wrapped.load_state_dict(plain.state_dict())
    distributed.wrap_blocks(wrapped, *how)
    assert plain.state_dict().keys() == wrapped.state_dict().keys()
    x = torch.randn(3, 4)
    outputs = plain(x), wrapped(x)
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for one, other in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert one.grad is None if other.grad is None else torch.allclose(one.grad, other.grad)
    assert type(wrapped.frozen[0]) is nn.Linear


def test_checkpointing_keeps_less_for_the_backward_pass():
    def kept(model: nn.Module) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(torch.randn(100, 4))
        return sum(sizes)

    plain, wrapped = Blocks(6), Blocks(6)
    distributed.wrap_blocks(wrapped, True, False)
    assert kept(wrapped) < kept(plain)


def test_an_error_of_a_lone_process_is_its_own():
    with pytest.raises(ValueError, match="mine"), distributed.together():
        raise ValueError("mine")


def test_each_process_has_a_gpu_and_one_that_is_named_is_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with distributed.started("cuda:3"), distributed.started("cuda"), distributed.started("cpu"):
        assert current == [torch.device("cuda", 3)]
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for device, message in (
        ("cuda", "2 processes run on this machine, but torch sees 1 GPUs"),
        ("cuda:0", "is one GPU, but each of 2 processes takes its own"),
    ):
        with pytest.raises(ValueError, match=message), distributed.started(device):
            pass
