"""From a tensor of the user's to the plain tensor that this rank holds of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of `tensor` in this rank's memory: the same storage, no autograd, no communication.

    `DTensor.to_local()` is an autograd function with a dispatch of its own; reading the attribute costs a tenth
    and is right at every step, so nothing is cached that could go stale.
    """
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    # A redistributed DTensor can hold a wrapper that still waits for its collective.
    wait = getattr(local, "wait", None)
    return local if wait is None else wait()


def local_like(tensor: Tensor, param: Tensor) -> Tensor:
    """This rank's part of `tensor` (a gradient, say), cut as `param` is cut.

    A gradient may come in other placements than its parameter (`Replicate`, `Partial`); then it is redistributed first, as
    torch's own optimizers do implicitly. With equal placements this costs nothing.
    """
    if isinstance(tensor, DTensor) and isinstance(param, DTensor) and tensor._spec is not param._spec:
        if tensor.placements != param.placements:
            tensor = tensor.redistribute(placements=param.placements)
    return local_tensor(tensor)


def is_plain_float(tensor: Tensor) -> bool:
    """Whether arithmetic on real, strided numbers in memory is possible."""
    return tensor.is_floating_point() and tensor.layout is torch.strided and not tensor.is_meta
