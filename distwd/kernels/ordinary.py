"""Which tensors are memory and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

# The types themselves: a subclass may have no address, or hold something other than its elements.
ORDINARY = (Tensor, torch.nn.Parameter)
