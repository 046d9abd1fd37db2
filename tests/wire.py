"""Counts collectives and reads of tensors, from below distwd."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import distwd
from distwd.cli.wire import Wire as Wire  # imported from here by the tests
from distwd.cli.wire import tensors_in

READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "item", "masked_select", "_unique2")


# The package itself: a checkout that is called distwd, too, may hold an environment with torch in it.
PACKAGE = Path(distwd.__file__).parent.as_posix() + "/"


class HostSync(AssertionError):
    """distwd read a tensor on the host."""


def asked_by_distwd() -> str | None:
    """The line of distwd that caused this call, unless torch's own optimizer stands between (it may read)."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename.replace("\\", "/")
        if "/torch/optim/" in path and not frame.f_code.co_name.startswith("profile_hook_step"):
            return None
        if path.startswith(PACKAGE):
            return f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return None


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if _reads(func._schema.name, args) and (line := asked_by_distwd()):
            raise HostSync(f"{func._schema.name} at {line}")
        return func(*args, **(kwargs or {}))


def _reads(name: str, args: tuple) -> bool:
    """Whether an operation needs values on the host; indexing by a mask needs the number of its elements."""
    if name in ("aten::index", "aten::index_put_"):
        return any(index.dtype == torch.bool for index in tensors_in(args[1]))
    return name.removeprefix("aten::") in READS


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Raise HostSync where distwd turns a tensor into a Python number, truth value or list."""
    names = ("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__", "__complex__")
    patches = [mock.patch.object(Tensor, name, _guarded(name, getattr(Tensor, name))) for name in names]
    patches += [mock.patch.object(torch, "equal", _guarded("torch.equal", torch.equal))]
    with _NoReads():
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def _guarded(name: str, original):
    def guarded(*args, **kwargs):
        if line := asked_by_distwd():
            raise HostSync(f"{name} at {line}")
        return original(*args, **kwargs)

    return guarded
