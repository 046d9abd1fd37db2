"""A rank's pieces as rows of integers: what goes over the wire when a plan is built.

Seven int64 columns, so 56 bytes for each parameter that a rank holds. Every number is the same in every process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .pieces import Piece

NUM_COLUMNS = 7
NAME, META, WHOLE, MEASURE, NUMEL, GROUP, CHECKSUM = range(NUM_COLUMNS)
_MODULUS = 1 << 64
_CHECKSUM_BLOCK = 1 << 20


def rows_of(pieces: Sequence[Piece], groups: Sequence[int], checksums: Sequence[int], named: bool) -> Tensor:
    """[len(pieces), 7] int64, a row for each piece in the order given; groups: the param group of each."""
    rows = [_row(*columns, named) for columns in zip(pieces, groups, checksums, strict=True)]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), NUM_COLUMNS)


def _row(piece: Piece, group: int, checksum: int, named: bool) -> list[int]:
    # Without names, position is all there is to match by; then equal positions must also live on equal meshes.
    # In another group it would be added to another number.
    meta = (piece.shape, piece.is_counted, str(piece.dtype), () if named else piece.mesh, group)
    whole, measure = _measure_of_whole(piece), _measure(piece)
    return [stable_hash(piece.name), stable_hash(meta), whole, measure, piece.numel, group, checksum]


def stable_hash(value: object) -> int:
    """A 64-bit hash of `repr(value)`, the same in every process (Python's own hash of strings is not)."""
    digest = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _measure(piece: Piece) -> int:
    """A number for the piece such that numbers of disjoint pieces add up (mod 2^64) to the number of their union.

    Each dimension gets a pseudo-random increasing-index function R; an interval weighs R(stop) - R(start), a box the product.
    So pieces cover the whole exactly once if and only if (up to chance 2^-64) their measures add up to the whole's,
    whatever shapes they have, and equal pieces have equal measures.
    """
    measure = 1
    for dim, cut in enumerate(piece.cuts):
        measure *= sum(_R(dim, stop) - _R(dim, start) for start, stop in cut)
    return _signed(measure)


def _measure_of_whole(piece: Piece) -> int:
    measure = 1
    for dim, size in enumerate(piece.shape):
        measure *= _R(dim, size) - _R(dim, 0)
    return _signed(measure)


def _R(dim: int, index: int) -> int:
    return stable_hash((dim, index))


def _signed(value: int) -> int:
    value %= _MODULUS
    return value - _MODULUS if value >= _MODULUS // 2 else value


def offsets_of(pieces: Sequence[Piece], gathered: Sequence[Tensor]) -> tuple[int, ...]:
    """For each piece that is known by its number alone, how many elements of the whole come before it; 0 for other pieces.

    gathered: every rank's rows.
    """
    counted = [stable_hash(piece.name) for piece in pieces if piece.is_counted]
    table = torch.cat(list(gathered))[:, [NAME, MEASURE, NUMEL]]
    rows = table[torch.isin(table[:, 0], torch.tensor(counted, dtype=torch.int64))].tolist()
    numel = {(name, measure): size for name, measure, size in rows}
    num_pieces = max((piece.shape[0] for piece in pieces if piece.is_counted), default=0)
    measures = [_signed(_R(0, number + 1) - _R(0, number)) for number in range(num_pieces)]
    return tuple(
        sum(numel[stable_hash(piece.name), measure] for measure in measures[: piece.cuts[0][0][0]])
        if piece.is_counted
        else 0
        for piece in pieces
    )


def checksums_of(locals_: Sequence[Tensor]) -> list[int]:
    """A number for the bits of each tensor, read from the devices together; block by block, so without a copy."""
    if not locals_:
        return []
    sums = [_checksum(tensor.detach()) for tensor in locals_]
    return torch.stack([total.cpu() for total in sums]).tolist()


def _checksum(tensor: Tensor) -> Tensor:
    bits = tensor.contiguous().view(-1).view(_BITS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _CHECKSUM_BLOCK):
        block = bits[start : start + _CHECKSUM_BLOCK].to(torch.int64)
        # Odd weights by position: a plain sum would not notice two elements that changed places.
        weight = torch.arange(start, start + block.numel(), device=tensor.device, dtype=torch.int64).mul_(2).add_(1)
        total += (block * weight).sum()
    return total


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
