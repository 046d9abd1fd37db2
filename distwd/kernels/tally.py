"""How many elements a decay leaves as they would have been without it; counted on the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class Tally:
    """Elements that were written, and how many of them have the value that they would have without the decay."""

    num_written: int = 0
    unchanged: list[Tensor] = field(default_factory=list)

    def add(self, written: list[Tensor], without: list[Tensor]) -> None:
        """Compare what was written with what would have been."""
        for one, other in zip(written, without, strict=True):
            self.num_written += one.numel()
            self.unchanged.append((one == other).sum())

    def share(self) -> Tensor:
        """Unchanged / written, 0-d float32."""
        return torch.stack(self.unchanged).sum() / self.num_written
