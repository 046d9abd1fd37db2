"""From a user's tensor to the plain tensor that this rank holds of it."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from .._torch import ORDINARY, local_part


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of `tensor` in this rank's memory.

    tensor: a DTensor, or a plain tensor, which is returned as it is.
    Returns a plain tensor over the same storage, without autograd and without communication.
    """
    # Plain tensors are told apart first: to look for an attribute that a tensor does not have takes longer than all the
    # rest.
    if type(tensor) in ORDINARY:
        return tensor
    # The attribute is read anew in every step and never cached, so a parameter may be given other storage at any time.
    local = local_part(tensor) if isinstance(tensor, DTensor) else tensor
    # A redistributed DTensor can hold an AsyncCollectiveTensor, which still waits for its collective.
    wait = getattr(local, "wait", None)
    return local if wait is None else wait()


def local_like(tensor: Tensor, param: Tensor) -> Tensor:
    """This rank's part of `tensor`, cut as `param` is cut.

    tensor: a gradient, say; a DTensor or a plain tensor.
    param: the parameter that it belongs to.
    Returns a plain tensor of the local shape of `param`.

    A gradient with other placements than its parameter (`Replicate`, `Partial`) is redistributed first, as torch's own
    optimizers do implicitly. That is a collective, on every rank of the mesh: the only one outside of collectives.py.
    Its ranks agree, since placements are the same on all ranks of a mesh. With equal placements nothing is sent.
    """
    if type(tensor) in ORDINARY:
        return tensor
    if isinstance(tensor, DTensor) and isinstance(param, DTensor) and tensor.placements != param.placements:
        tensor = tensor.redistribute(placements=param.placements)
    return local_tensor(tensor)
