"""A GPU that is not there: tensors on `meta` stand for it, and every operation is looked at as it is dispatched.

What would make the host wait for a real GPU is listed with the line of ours it comes from: a number read back, a shape that depends on
values, a copy that blocks (from the device always; to it unless non_blocking and from pinned memory). So are operations that mix devices.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = "meta"

SHAPE_DEPENDS_ON_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "equal", "multinomial"}
"""The last two read a value back besides."""


class FakeDevice(TorchDispatchMode):
    """`waits` and `mixed` count by line of the package; `answer` gives the numbers that are read back (default: ones)."""

    def __init__(self, answer: Callable[[Tensor], Tensor] = torch.ones_like):
        super().__init__()
        self.answer = answer
        self.waits: Counter[str] = Counter()
        self.mixed: Counter[str] = Counter()
        self.operations = 0
        self.pinned: set[int] = set()
        self.functions = _Functions(self)

    def pin(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.pinned |= {id(value) for value in batch.values()}
        self.kept = batch  # or another tensor might get its id
        return batch

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(tensor.device.type == DEVICE for tensor in tensors)
        self.operations += on_device
        if name in ("_to_copy", "copy_"):
            return self._copy(function, name, args, kwargs)
        if on_device and any(tensor.device.type != DEVICE and tensor.ndim for tensor in tensors):  # a number in a 0-dim tensor is passed along
            self.mixed[f"{name} {_line()}"] += 1
        if on_device and (name in SHAPE_DEPENDS_ON_VALUES or (name == "repeat_interleave" and "output_size" not in kwargs)):
            self.waits[f"{name} {_line()}"] += 1
        if name in ("index", "index_put_", "_index_put_impl_") and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            self.waits[f"boolean index {_line()}"] += on_device
        if name == "_local_scalar_dense" and on_device:
            self.waits[f"item {_line()}"] += 1
            return self.answer(torch.empty((), dtype=args[0].dtype)).item()
        return function(*args, **kwargs)

    def _copy(self, function: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        source = args[0] if name == "_to_copy" else args[1]
        target = torch.device(kwargs.get("device") or source.device).type if name == "_to_copy" else args[0].device.type
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if source.device.type == target:
            return function(*args, **kwargs)
        if target != DEVICE:
            self.waits[f"copy from the device {_line()}"] += 1
            values = self.answer(torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype))
            return values if name == "_to_copy" else args[0].copy_(values)
        if waits or id(source) not in self.pinned:
            self.waits[f"{'blocking' if waits else 'unpinned'} copy to the device {_line()}"] += 1
        return function(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """`torch.tensor(..., device=...)` and `new_tensor` copy where no dispatch mode looks."""

    def __init__(self, device: FakeDevice):
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        made = function in (torch.tensor, torch.as_tensor, torch.asarray) and torch.device(kwargs.get("device") or "cpu").type == DEVICE
        if (made and not (args and isinstance(args[0], Tensor))) or (function is Tensor.new_tensor and args[0].device.type == DEVICE):
            self.device.waits[f"blocking copy to the device {_line()}"] += 1
        return function(*args, **kwargs)


def _line() -> str:
    """The innermost line of the package, else of the file that called."""
    frames = [frame for frame in traceback.extract_stack() if "fake_device" not in frame.filename]
    ours = [frame for frame in frames if "/openvision3/" in frame.filename]
    frame = (ours or frames)[-1]
    return f"{frame.filename.rpartition('/openvision3/')[2].rpartition('/tests/')[2]}:{frame.name}"


@contextlib.contextmanager
def fake_device(answer: Callable[[Tensor], Tensor] = torch.ones_like) -> Iterator[FakeDevice]:
    """Everything within computes on `meta` as on a GPU."""
    from torch.fx.experimental import _config

    device = FakeDevice(answer)
    real = torch.autocast

    def autocast(device_type: str, *given: Any, **options: Any) -> Any:  # knows no such device
        return contextlib.nullcontext() if torch.device(device_type).type == DEVICE else real(device_type, *given, **options)

    torch.autocast = autocast  # type: ignore[assignment, misc]
    before = _config.meta_nonzero_assume_all_nonzero
    _config.meta_nonzero_assume_all_nonzero = True
    try:
        with device.functions, device:
            yield device
    finally:
        torch.autocast = real  # type: ignore[misc]
        _config.meta_nonzero_assume_all_nonzero = before
