"""Distributed checkpoints: every rank writes its own shards, and any number of ranks may read them back.

The layout of a folder, of which the newest finished save counts:

    DIR/step-00000100/.metadata     written last, so a folder without it is a save that did not finish
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer


def save(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, progress: dict[str, Any]) -> None:
    """Write everything that the run needs to go on as if it had never stopped."""
    state_dict_saver.save(describe(model, optimizer, progress), checkpoint_id=folder / f"step-{step:08d}")


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
