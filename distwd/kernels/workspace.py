"""Temporaries of a block in memory that is kept: on a CPU, fresh memory costs more (page faults) than the work done in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch import is_in_dispatch_mode
from .blocks import block_size


class Workspace:
    """Buffers of at most one block each, by use, device and dtype; each optimizer has its own.

    What is taken holds anything, and holds until the same use is taken again. Streams, threads and CUDA graphs may meet in a buffer
    only where they would already meet in the parameters that are written, so nothing is guarded here.
    compiles: whether formulas go through torch.compile where they can (see compiled.py).
    """

    def __init__(self, compiles: bool = False) -> None:
        self._compiles = compiles
        self._kept: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @property
    def compiles(self) -> bool:
        """Whether formulas go through torch.compile now."""
        # Under a dispatch mode (CommDebugMode, FlopCounterMode) torch would run them uncompiled, and never compile them again.
        return self._compiles and not is_in_dispatch_mode()

    def take(self, use: str, numel: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """`numel` elements, flat."""
        key = (use, device, dtype)
        buffer = self._kept.get(key)
        if buffer is None or buffer.numel() < numel:
            with torch.inference_mode(False):  # or no other mode could ever write to it
                buffer = torch.empty(numel, device=device, dtype=dtype)
            if numel <= block_size(device):
                self._kept[key] = buffer
        return buffer[:numel]

    def make(self, op: str, use: str, xs: list[Tensor], *others: Any) -> list[Tensor]:
        """What the foreach operation `op` makes of a block: one large piece in kept memory, many small ones as foreach does it."""
        if len(xs) > 1:
            return list(getattr(torch, f"_foreach_{op}")(xs, *others))
        (x,) = xs
        single = [other[0] if isinstance(other, list) else other for other in others]
        return [getattr(torch, op)(x, *single, out=self.take(use, x.numel(), x.device, x.dtype).view(x.shape))]

    def apply_(self, op: str, xs: list[Tensor], *others: Any, **settings: Any) -> None:
        """The foreach operation `op` on a block, in place."""
        getattr(torch, f"_foreach_{op}_")(xs, *others, **settings)

    def clear_(self, xs: list[Tensor]) -> None:
        """Leave zeros in a block."""
        torch._foreach_zero_(xs)

    def copies(self, use: str, xs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Copies of a block in another dtype: of one large piece in kept memory."""
        if len(xs) > 1:
            return [x.to(dtype, copy=True) for x in xs]
        (x,) = xs
        return [self.take(use, x.numel(), x.device, dtype).view(x.shape).copy_(x)]
