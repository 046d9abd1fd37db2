"""CUDA tensors without a GPU: shapes, dtypes and devices, and no values; and an alarm for what would make a step wait.

On a card a step waits for the device where a value is read on the host, where a tensor is copied from one device to the other,
and where a tensor is made of numbers that lie on the host. Each of them raises `Waits` here, at the line that asked for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from distwd._torch import ORDINARY
from tests.wire import READS, asked_by_distwd

aten = torch.ops.aten


class _PastTheDevice(TorchFunctionMode):
    """x[...] and copies of CUDA tensors. torch looks for the device itself before it dispatches them; a CPU build has none."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.copy_:
            return aten.copy_.default(*args, **(kwargs or {}))
        if func is Tensor.__getitem__ and args[0].device.type == "cuda":
            tensor, index = args
            dim = 0
            for one in index if isinstance(index, tuple) else (index,):
                if isinstance(one, int):
                    tensor = aten.select.int(tensor, dim, one)
                elif isinstance(one, slice):
                    tensor, dim = aten.slice.Tensor(tensor, dim, one.start, one.stop, one.step or 1), dim + 1
                else:
                    tensor = aten.index.Tensor(tensor, [None] * dim + [one])
            return tensor
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Within, tensors on "cuda" can be made, and have no values; nor have those on the CPU."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        _PastTheDevice(),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        # What is told apart by its type: fake tensors stand for ordinary ones.
        mock.patch("distwd._torch.ORDINARY", (*ORDINARY, FakeTensor)),
        mock.patch("distwd.sharding.collectives.ORDINARY", (*ORDINARY, FakeTensor)),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
    ):
        yield


class Waits(AssertionError):
    """A step would wait for the device."""


class NoWaits(TorchDispatchMode):
    """Raises `Waits` where distwd reads a tensor, or brings one to another device, or mixes devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        given = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        line = asked_by_distwd()
        if line and name in READS:
            raise Waits(f"{name} reads a tensor at {line}")
        if line and name == "lift_fresh" and given[0].device.type == "cuda":
            raise Waits(f"a tensor is made of numbers of the host at {line}")
        out = func(*args, **kwargs)
        devices = {tensor.device.type for tensor in given}
        if name in ("copy_", "_foreach_copy_", "_to_copy"):
            devices |= {leaf.device.type for leaf in _leaves(out) if isinstance(leaf, Tensor)}
            # To a card a copy may be left under way. From a card it may not: the host would go on with what is not there yet.
            is_left = kwargs.get("non_blocking", False) or (name == "copy_" and args[2:3] == (True,))
            to = (args[0] if name == "copy_" else out).device.type if is_left else "cpu"
            if line and len(devices) > 1 and to == "cpu":
                raise Waits(f"{name} from one device to the other at {line}")
        # A number on the CPU goes into a kernel as it is, but not into every kernel for lists (read in torch's CUDA sources:
        # those of products and quotients take it). Anything else must be where the kernel runs.
        elif line and "cuda" in devices:
            takes_numbers = not name.startswith("_foreach") or name.startswith(("_foreach_mul", "_foreach_div"))
            if any(tensor.device.type == "cpu" and (tensor.dim() or not takes_numbers) for tensor in given):
                raise Waits(f"{name} of tensors on two devices at {line}")
        return out


def _leaves(tree: object) -> list[object]:
    return torch.utils._pytree.tree_leaves(tree)
