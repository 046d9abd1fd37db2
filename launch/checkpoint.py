"""Distributed checkpoints: every rank writes its own shards, and any number of ranks may read them back.

The layout of a folder, of which the newest finished save counts:

    DIR/step-00000100/.metadata     written last, so a folder without it is a save that did not finish
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer


class Saver:
    """Writes checkpoints into one folder; in_background: training goes on while the last one is being written."""

    def __init__(self, folder: Path, in_background: bool) -> None:
        self.folder = folder
        self._pending: Any = None
        # The thread that writes talks to the other ranks, and must not meet the training's collectives on their group.
        self._group = dist.new_group(backend="gloo") if in_background and dist.is_initialized() else None

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, progress: dict[str, Any]) -> None:
        """Write everything that the run needs to go on as if it had never stopped."""
        state, path = describe(model, optimizer, progress), self.folder / f"step-{step:08d}"
        if self._group is None:
            state_dict_saver.save(state, checkpoint_id=path)
            return
        self.finish()
        # What is written is a copy, made before this returns.
        self._pending = state_dict_saver.async_save(state, checkpoint_id=path, process_group=self._group)

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk. Raises what went wrong in writing it."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None


def load(path: Path, model: nn.Module, optimizer: Optimizer, progress: dict[str, Any]) -> dict[str, Any]:
    """Read `path` into the model and the optimizer; returns the progress that was saved with them.

    progress: of the run as it stands, whose keys say what to read.
    """
    state = describe(model, optimizer, progress)
    state_dict_loader.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return dict(state["progress"])


def describe(model: nn.Module, optimizer: Optimizer, progress: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "progress": progress,
    }


def newest(folder: Path) -> Path | None:
    """The last finished checkpoint in `folder`, if any."""
    finished = sorted(path.parent for path in folder.glob("step-*/.metadata"))
    return finished[-1] if finished else None


def find(folder: Path, resume: bool) -> Path | None:
    """The checkpoint to start from: None starts anew. Raises ValueError where that would mix two runs."""
    path = newest(folder)
    if path is not None and not resume:
        raise ValueError(f"{folder} already holds {path.name}; add --resume to go on, or name another folder")
    return path if resume else None
