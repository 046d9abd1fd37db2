"""d(p) = sign(p)·|p|^(ord−1), and the mask of cautious decay; with the same bits wherever a tensor is cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .workspace import Workspace

# Serial in ATen (its parallel grain is 32768), so that the only ends are ours.
_POW_PIECE = 1 << 14
_WHOLE_VECTORS = 64


def strength(ps: list[Tensor], ord: float, rate: Any, workspace: Workspace, use: str = "strength") -> list[Tensor]:
    """rate · d(p) of each tensor, apart from `ps`. ord ≥ 1: for 1, d(p) is sign(p), for 2, p. rate: as foreach takes it.

    scratch, use: where and as what a temporary is kept.
    """
    if ord == 2:
        return workspace.make("mul", use, ps, rate)
    if ord == 1:
        found = workspace.make("sign", use, ps)
    else:
        found = _power(workspace.make("abs", "magnitude", ps), ord - 1, workspace, use)
        workspace.apply_("mul", found, workspace.make("sign", "sign", ps))
    workspace.apply_("mul", found, rate)
    return found


def masked(ps: list[Tensor], us: list[Tensor], sign: int, workspace: Workspace, use: str) -> list[Tensor]:
    """[sign·u·p > 0] · p, apart from `ps`. Its direction is the masked one, as d(0) = 0."""
    # The sign of u, not u itself: a product of two small numbers would vanish.
    signs = workspace.make("sign", "sign", us)
    kept = workspace.make("mul", use, ps, signs)
    workspace.apply_("clamp_min" if sign > 0 else "clamp_max", kept, 0.0)
    workspace.apply_("mul", kept, signs)
    return kept


def is_elementary(ord: float) -> bool:
    """Whether d(p) is made of operations that round once in IEEE arithmetic, so that whoever computes them gets the same bits."""
    return ord in (1, 2) or _is_product(ord - 1)


def _is_product(exponent: float) -> bool:
    return exponent.is_integer() and 2 <= exponent <= 8


def _power(magnitudes: list[Tensor], exponent: float, workspace: Workspace, use: str) -> list[Tensor]:
    """|p|^exponent from |p|, apart from it."""
    if _is_product(exponent):
        powers = workspace.make("mul", use, magnitudes, magnitudes)
        for _ in range(int(exponent) - 2):
            workspace.apply_("mul", powers, magnitudes)
        return powers
    powers = workspace.make("abs", use, magnitudes)
    for power in powers:
        _steady_pow_(power, exponent)
    return powers


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
