"""From a tensor of the user's to the plain tensor that this rank holds of it."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from .._torch import local_part
from ..kernels.ordinary import ORDINARY


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of `tensor` in this rank's memory: the same storage, no autograd, no communication.

    Reading the attribute needs no dispatch and no autograd function, unlike `DTensor.to_local()`, and is right at every
    step, so nothing is cached that could go stale.
    """
    # Told apart first, since looking for what a tensor does not have takes longer than all the rest.
    if type(tensor) in ORDINARY:
        return tensor
    local = local_part(tensor) if isinstance(tensor, DTensor) else tensor
    # A redistributed DTensor can hold a wrapper that still waits for its collective.
    wait = getattr(local, "wait", None)
    return local if wait is None else wait()


def local_like(tensor: Tensor, param: Tensor) -> Tensor:
    """This rank's part of `tensor` (a gradient, say), cut as `param` is cut.

    A gradient may come in other placements than its parameter (`Replicate`, `Partial`); then it is redistributed first, as
    torch's own optimizers do implicitly. With equal placements this costs nothing.
    """
    if type(tensor) in ORDINARY:
        return tensor
    if isinstance(tensor, DTensor) and isinstance(param, DTensor) and tensor.placements != param.placements:
        tensor = tensor.redistribute(placements=param.placements)
    return local_tensor(tensor)
