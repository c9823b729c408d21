"""Several processes as one run: the process group that torchrun or srun started, the few collectives, and sharding from outside the model.

Everything also works in a single process, where a collective does nothing. Losses and logs learn the number of ranks here; no other
module calls `torch.distributed`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate

T = TypeVar("T")

Parallel = Literal["replicate", "fsdp", "hsdp"]

TIMEOUT = timedelta(minutes=20)
"""How long a collective waits for other ranks before the run ends: longer than a save and an evaluation."""

BUCKET = 2**26
"""Numbers of the gradient that one call averages."""


class OtherRankFailed(RuntimeError):
    """Another process of the run has failed and reports why."""


@dataclass(frozen=True)
class Ranks:
    """The number of this process and how many there are, in all and within the machine (`local`)."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as torchrun sets them. Raises ValueError if some are missing."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        variables = {name: os.environ[name] for name in names if os.environ.get(name)}
        if "WORLD_SIZE" not in variables or variables["WORLD_SIZE"] == "1":
            return cls()
        try:
            rank, world = int(variables["RANK"]), int(variables["WORLD_SIZE"])
            local = int(variables.get("LOCAL_RANK", rank)), int(variables.get("LOCAL_WORLD_SIZE", world))
        except (KeyError, ValueError) as error:
            raise ValueError(f"the environment has {variables}; several processes need whole numbers in RANK and WORLD_SIZE, as torchrun sets them") from error
        if not (0 <= rank < world and 0 <= local[0] < local[1] <= world):
            raise ValueError(f"the environment has {variables}; a rank must be at least 0 and below the number of processes")
        return cls(rank, world, *local)


@contextlib.contextmanager
def started(device: str = "cpu") -> Iterator[Ranks]:
    """The process group of this run while the context lasts; a single process has none.

    The GPU of this process becomes the current one, so that `cuda` means it.

    Raises:
        ValueError: the environment describes an incomplete group, or a GPU is missing.
    """
    ranks = Ranks.from_environment()
    place = torch.device(device)
    if ranks.world == 1 or dist.is_initialized():
        if place.index is not None and place.type == "cuda":
            torch.cuda.set_device(place)
        yield ranks
        return
    if place.type == "cuda":
        if place.index is not None:
            raise ValueError(
                f"device {device} is one GPU, but each of {ranks.world} processes takes its own; set --device cuda (CUDA_VISIBLE_DEVICES chooses which)"
            )
        if ranks.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"{ranks.local_world} processes run on this machine, but torch sees {torch.cuda.device_count()} GPUs; start one process for each GPU"
            )
        torch.cuda.set_device(ranks.local_rank)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=TIMEOUT, rank=ranks.rank, world_size=ranks.world)
    try:
        yield ranks
    except BaseException:
        if place.type == "cuda":  # an orderly end of NCCL waits for ranks that wait for this one: the error would never be shown
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


_alone = False


def world() -> int:
    """Number of processes that share a global batch; 1 within `alone`."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within, every rank computes as if it were the only one: an evaluation of the same images on all ranks."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


# -- collectives ---------------------------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        out = rows.new_empty(world() * len(rows), *rows.shape[1:])
        dist.all_gather_single(out, rows.contiguous())
        return out

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        count = len(total) // world()
        return total[rank() * count : (rank() + 1) * count]


def gather(rows: Tensor) -> Tensor:
    """The rows of all ranks in rank order, (B, ...) -> (world x B, ...); gradient flows back to each rank's own rows."""
    return rows if world() == 1 else _Gather.apply(rows)


def total(value: Tensor) -> Tensor:
    """The sum over ranks, without gradient."""
    if world() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def gather_rows(rows: Tensor) -> Tensor:
    """As `gather` for different numbers of rows on the ranks, even none: (B of this rank, ...) -> (sum of all B, ...), without gradient."""
    if world() == 1:
        return rows
    counts = gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    room = rows.new_zeros(max(counts), *rows.shape[1:])
    room[: len(rows)] = rows.detach()
    return torch.cat([part[:count] for part, count in zip(gather(room).split(max(counts)), counts, strict=True)]) if max(counts) else room


def share(sum_of_rows: Tensor, count: Tensor) -> Tensor:
    """A sum over this rank's rows and the number of rows on all ranks -> this rank's share of the mean.

    The mean of the shares is the global mean, and averaged gradients are its gradient.
    """
    return sum_of_rows * world() / count.clamp_min(1)


def gather_objects(value: T) -> list[T]:
    """A small Python value of each rank, in rank order."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def on_any(here: bool) -> bool:
    """Whether `here` is true on any rank. The ranks wait for each other; their devices do not."""
    return bool(total(torch.tensor(float(here))))


def from_first(value: T) -> T:
    """The value of rank 0 on every rank."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """If the body fails on one rank, for example because a file is missing, all ranks fail here and none waits for ever.

    Raises:
        OtherRankFailed: on all ranks but the first that failed, which raises its own error.
    """
    error: BaseException | None = None
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as caught:  # torch's CheckpointException is not an Exception
        error = caught
    failed = gather_objects(error is not None and not isinstance(error, OtherRankFailed))  # that one tells of a failure within, not of its own
    if error is not None and (not failed[rank()] or world() == 1 or failed.index(True) == rank()):
        raise error
    if any(failed):
        raise OtherRankFailed("another rank has failed")


# -- one model on many devices -------------------------------------------------------------------------------------


def choose_parallel(setting: str, trainable: int, ranks: Ranks) -> Parallel:
    """auto: copies of a model below 100 M trained parameters, shards of a larger one; on several machines, shards within each machine."""
    if ranks.world == 1:
        return "replicate"
    if setting != "auto":
        return setting  # type: ignore[return-value]
    if trainable < 100e6:
        return "replicate"
    return "fsdp" if ranks.local_world == ranks.world else "hsdp"


def wrap_blocks(model: nn.Module, checkpointing: bool, compiled: bool) -> None:
    """Checkpoint the activations of each trained block, or compile each block; names and numbers do not change."""
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # all blocks share one code object, called with many shapes, with and without gradient
    for parts in block_lists(model):
        for place, block in enumerate(parts):
            if checkpointing:
                parts[place] = checkpoint_wrapper(block)
            if compiled:
                parts[place].compile()


def block_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of trained blocks; frozen parts have lists of blocks, too."""
    return [m for m in model.modules() if isinstance(m, nn.ModuleList) and any(p.requires_grad for p in m.parameters())]


def spread(model: nn.Module, parallel: Parallel, ranks: Ranks, device: str, precision: str) -> None:
    """Give every rank the weights of rank 0; with fsdp and hsdp each rank keeps a shard of them, block by block, without changing the model.

    Frozen parameters stay whole on every rank. In bf16 the weights of blocks are gathered and applied in bf16 and gradients are
    reduced in fp32; everything outside of blocks (embeddings, positions, last norms, temperature) stays in fp32.

    Raises:
        ValueError: hsdp on machines with different numbers of processes.
    """
    if ranks.world == 1:
        return
    for value in (*model.parameters(), *model.buffers()):
        dist.broadcast(value.data, 0)
    if parallel == "replicate":
        return
    shape, names = (ranks.world,), ("shard",)
    if parallel == "hsdp":
        if ranks.world % ranks.local_world:
            raise ValueError(f"hsdp needs the same number of processes on every machine, but {ranks.world} is not a multiple of {ranks.local_world}; use fsdp")
        shape, names = (ranks.world // ranks.local_world, ranks.local_world), ("replicate", "shard")  # type: ignore[assignment]
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    frozen = {p for p in model.parameters() if not p.requires_grad}
    low = torch.bfloat16 if precision == "bf16" else None
    blocks = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in (block for parts in block_lists(model) for block in parts):
        fully_shard(block, mesh=mesh, mp_policy=blocks, ignored_params=frozen & set(block.parameters()))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False), ignored_params=frozen)
    if hasattr(model, "prepare"):
        register_fsdp_forward_method(model, "prepare")


def is_sharded(module: nn.Module) -> bool:
    """Whether parts of the module are in pieces: they must then be called in step on all ranks, and once a pass."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def full(value: Tensor) -> Tensor:
    """The whole tensor of a shard (a collective: all ranks take part); any other tensor unchanged."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def like(value: Tensor, shard: Tensor) -> Tensor:
    """A whole tensor, the same on all ranks -> the part of it that corresponds to `shard`."""
    if not isinstance(shard, DTensor):
        return value
    copies = DTensor.from_local(value, shard.device_mesh, [Replicate()] * shard.device_mesh.ndim, run_check=False)
    return copies.redistribute(placements=shard.placements)


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within, every rank may call the parts of a sharded model one by one; outside, only its `forward`."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def synchronise_last(model: nn.Module, last: bool) -> None:
    """Send the sum of gradients only in the last of a step's backward passes."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def average_gradients(model: nn.Module) -> None:
    """For copies of a model, the mean gradient over ranks in a few large messages. FSDP averages by itself.

    The parameters of `model.resting`, if it has any, are trained in other steps: they keep no gradient, so that the optimiser leaves them alone.
    """
    if world() == 1 or isinstance(model, FSDPModule):
        return
    resting = {id(p) for p in getattr(model, "resting", ())}
    for bucket in _buckets(p for p in model.parameters() if p.requires_grad and id(p) not in resting):
        for parameter in bucket:
            if parameter.grad is None:  # this rank's rows did not use it
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in bucket])  # type: ignore[union-attr]
        dist.all_reduce(flat)
        flat /= world()
        for parameter, mean in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad.copy_(mean.view_as(parameter))  # type: ignore[union-attr]


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
