"""Many small tensors as one flat one: then an operation on all of them is one call, and not one for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ordinary import ORDINARY
from .workspace import Workspace

_WORTH_COPYING = 1 << 12  # elements of a tensor, in the mean


def can_be_joined(pieces: Sequence[Tensor]) -> bool:
    """Whether these are several ordinary tensors of one dtype. Not on a device where a call of foreach is one kernel for all of them."""
    dtype = pieces[0].dtype
    if len(pieces) == 1 or pieces[0].device.type != "cpu":
        return False
    return all(type(piece) in ORDINARY and piece.dtype == dtype for piece in pieces)


def is_worth_writing_joined(lists: Sequence[Sequence[Tensor]]) -> bool:
    """Whether lists, of which the first is written, can be joined, and hold tensors so small that copying them costs less than calls.

    Of written tensors that begin at the same place only one could be copied back.
    """
    written = lists[0]
    if sum(piece.numel() for piece in written) > _WORTH_COPYING * len(written) or not all(map(can_be_joined, lists)):
        return False
    return len({piece.data_ptr() for piece in written}) == len(written)


def joined(pieces: Sequence[Tensor], use: str, workspace: Workspace, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """All elements of `pieces` in `dtype`, flat; and whether that is their own memory, where they lie one after the other, or a copy."""
    if _lie_in_a_row(pieces, dtype):
        return pieces[0].as_strided((sum(piece.numel() for piece in pieces),), (1,)), True
    return copied(pieces, use, workspace, dtype), False


def copied(pieces: Sequence[Tensor], use: str, workspace: Workspace, dtype: torch.dtype) -> Tensor:
    """A copy of all elements of `pieces` in `dtype`, flat."""
    rows = _rows(pieces)
    flat = workspace.take(use, sum(piece.numel() for piece in pieces), pieces[0].device, dtype)
    if rows is None:
        torch.cat([piece.reshape(-1) for piece in pieces], out=flat)
    else:
        torch.cat(list(pieces), out=flat.view(-1, *rows))
    return flat


def spread_(pieces: Sequence[Tensor], flat: Tensor) -> None:
    """Write the elements of `flat` back to the `pieces` that it is a copy of."""
    rows = _rows(pieces)
    if rows is None:
        parts = flat.split([piece.numel() for piece in pieces])
        parts = [part.view(piece.shape) for part, piece in zip(parts, pieces, strict=True)]
    else:
        parts = flat.view(-1, *rows).split([piece.shape[0] for piece in pieces])
    torch._foreach_copy_(list(pieces), list(parts))


def _lie_in_a_row(pieces: Sequence[Tensor], dtype: torch.dtype) -> bool:
    if type(pieces[0]) not in ORDINARY:  # fake tensors have no address
        return False
    address = pieces[0].data_ptr()
    for piece in pieces:
        if piece.data_ptr() != address or piece.dtype != dtype or not piece.is_contiguous() or piece.is_neg():
            return False
        address += piece.nbytes
    # What begins and ends in one storage lies in it.
    return pieces[0].untyped_storage().data_ptr() == pieces[-1].untyped_storage().data_ptr()


def _rows(pieces: Sequence[Tensor]) -> torch.Size | None:
    """The shape of a row, if all have rows of one shape: views of many small tensors would cost as much as all the rest."""
    shapes = {piece.shape for piece in pieces}
    rows = {shape[1:] for shape in shapes}
    return rows.pop() if len(rows) == 1 and all(shapes) else None
