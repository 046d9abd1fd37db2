"""Ray Train on 2 CPU workers: the recipe runs, resumes from its checkpoint, and ends with the bits of one process."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from tests.test_train import ROOT

RECIPE = ROOT / "launch" / "recipes" / "ray_train.py"


def start(out: Path, steps: int) -> tuple[dict, Path]:
    """Runs the recipe with a Ray of its own; its last numbers and checkpoint."""
    here = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    here["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    here |= {"RAY_AUTH_MODE": "disabled"}  # else Ray keeps a token in the home directory
    here.pop("RAY_ADDRESS", None)
    command = [sys.executable, str(RECIPE), "--steps", str(steps), "--every", "3", "--out", str(out)]
    done = subprocess.run(command, cwd=out, env=here, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"^({.*}); checkpoint: (.*)$", done.stdout, re.MULTILINE)
    assert found, done.stdout
    return eval(found[1]), Path(found[2])


def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch_ray_train", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def alone(steps: int) -> tuple[nn.Module, float]:
    """The recipe's training in this process: the mean of both halves' gradients, as FSDP2 makes it."""
    parts = recipe()
    model = parts.make_model()
    optimizer = parts.make_optimizer(model, 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        for x, y in zip(*(part.chunk(2) for part in parts.make_data()), strict=True):
            (nn.functional.mse_loss(model(x), y) / 2).backward()
        optimizer.step()
    (numbers,) = optimizer.stats().values()
    return model, numbers["coefficient"].item()


def test_ray_workers_resume_and_end_with_the_bits_of_one_process(tmp_path):
    first, _ = start(tmp_path, 3)
    last, checkpoint = start(tmp_path, 6)
    assert (first["step"], last["step"]) == (3, 6)
    model, coefficient = alone(6)
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    assert last["coefficient"] == coefficient
    for name, param in model.named_parameters():
        assert torch.equal(state["model"][name], param.detach()), name
    # Had the second run begun anew, it would have saved after its third step, too.
    assert sum(path.is_dir() for path in (tmp_path / "distwd").glob("checkpoint_*")) == 2
