"""d(p) = sign(p)·|p|^(ord−1), and the mask of cautious decay; with the same bits wherever a tensor is cut."""

from __future__ import annotations

import torch
from torch import Tensor

# Serial in ATen (its parallel grain is 32768), so that the only ends are ours.
_POW_PIECE = 1 << 14
_WHOLE_VECTORS = 64


def direction(ps: list[Tensor], ord: float) -> list[Tensor]:
    """d(p) of each tensor, as new tensors. ord ≥ 1: 1 gives sign(p), 2 gives p."""
    if ord == 2:
        return [p.clone() for p in ps]
    signs = list(torch._foreach_sign(ps))
    if ord == 1:
        return signs
    magnitudes = _power(list(torch._foreach_abs(ps)), ord - 1)
    torch._foreach_mul_(magnitudes, signs)
    return magnitudes


def masked_(values: list[Tensor], us: list[Tensor], ps: list[Tensor], sign: int) -> None:
    """values ← values · [sign·u·p > 0], in place."""
    # The sign of u, not u itself: a product of two small numbers would vanish.
    keep = list(torch._foreach_sign(us))
    torch._foreach_mul_(keep, ps)
    if sign < 0:
        torch._foreach_neg_(keep)
    torch._foreach_clamp_min_(keep, 0.0)
    torch._foreach_sign_(keep)
    torch._foreach_mul_(values, keep)


def _power(magnitudes: list[Tensor], exponent: float) -> list[Tensor]:
    """|p|^exponent from |p|; may use the tensors given."""
    if exponent.is_integer() and exponent <= 8:
        powers = [m.clone() for m in magnitudes]
        for _ in range(int(exponent) - 1):
            torch._foreach_mul_(powers, magnitudes)
        return powers
    for magnitude in magnitudes:
        _steady_pow_(magnitude, exponent)
    return magnitudes


def _steady_pow_(x: Tensor, exponent: float) -> None:
    """x ← x^exponent, each element with the same bits wherever it stands.

    On a CPU, torch computes whole vectors with one algorithm and the rest of a tensor with another that rounds differently;
    a tensor cut elsewhere has its rest elsewhere. Padded to whole vectors, there is no rest.
    """
    if x.device.type != "cpu":
        x.pow_(exponent)
        return
    flat = x.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % _WHOLE_VECTORS), value=1.0)
    for piece in padded.split(_POW_PIECE):
        piece.pow_(exponent)
    x.copy_(padded[: flat.numel()].view_as(x))
