"""The recipes of launch/recipes, run as their users run them, and the same trainings without any framework."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from distwd import attach

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "launch" / "recipes"


def run(name: str, out: Path, *arguments: Any, ranks: int = 2) -> str:
    """Run a recipe to its end under torchrun (0 ranks: as one plain process); what it printed."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *torchrun, str(FOLDER / name), "--out", str(out), *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def trained(out: Path) -> dict[str, Tensor]:
    """The whole parameters that a recipe has left."""
    return torch.load(out / "model.pt", weights_only=True)


def small() -> ModuleType:
    """launch/recipes/small.py, by its path."""
    if "recipes_small" not in sys.modules:
        spec = importlib.util.spec_from_file_location("recipes_small", FOLDER / "small.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["recipes_small"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["recipes_small"]


def grouped(model: nn.Module, key: str) -> list[dict[str, Any]]:
    """Matrices with a decay of 0.1 under this key, and norms and biases without, as the recipes' frameworks do it."""
    named = list(model.named_parameters())
    spared = [(name, param) for name, param in named if "norm" in name or "bias" in name]
    others = [(name, param) for name, param in named if "norm" not in name and "bias" not in name]
    return [{"params": others, key: 0.1}, {"params": spared, key: 0.0}]


def adamw(model: nn.Module, rule: Any, coupling: str = "lr") -> torch.optim.AdamW:
    """AdamW with this rule attached; None: without decay."""
    optimizer = torch.optim.AdamW(grouped(model, "distwd_weight_decay"), lr=1e-2, weight_decay=0)
    if rule is not None:
        attach(optimizer, rule, coupling=coupling)
    return optimizer


def whole(model: nn.Module) -> dict[str, Tensor]:
    from tests import layouts

    return {name: layouts.whole_of(param) for name, param in model.named_parameters()}


def apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference of any element."""
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def on_two_ranks(worlds: Any, fn: Callable[..., dict[str, Tensor]], *arguments: Any) -> dict[str, Tensor]:
    return worlds.run(2, fn, *arguments)[0]
