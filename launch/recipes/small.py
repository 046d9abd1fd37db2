"""What the recipes train: a small model that predicts bytes, and text for it: the documentation inside CPython."""

from __future__ import annotations

import os
import sys
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch import Tensor, nn

CONTEXT = 24


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        # A byte sees those before it as their mean.
        seen = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        mixed: Tensor = self.mlp(self.norm(seen))
        return x + mixed


class ByteModel(nn.Module):
    """The mean loss, in nats per byte, of (batch, CONTEXT + 1) bytes: each is predicted from those before it."""

    def __init__(self, width: int = 30, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        logits = self.head(self.blocks(self.embed(text[:, :-1])))
        return nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def read_sequences(count: int) -> Tensor:
    """(count, CONTEXT + 1) bytes, one sequence after the other."""
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()[: count * (CONTEXT + 1)]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(count, CONTEXT + 1)


def leave() -> None:
    """The end of a program: all ranks at once, since one that leaves early would abort the others.

    On gloo without Python's shutdown: DTensor's caches keep the group's threads alive, and about one shutdown in thirty then
    aborted ("terminate called without an active exception").
    """
    if not dist.is_initialized():
        return
    backend = dist.get_backend()
    dist.barrier()
    dist.destroy_process_group()
    if backend == "gloo":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
