"""`mypy --strict` on a user's program: what is right passes, and words that distwd does not know are found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is not installed (the extra `lint` has it)")

ROOT = Path(__file__).parent.parent

RIGHT = """
import torch

import distwd
from distwd import LR, Adam, Chain, CosineWeightDecay, RelativeWeightDecay, WeightDecay, attach

model = torch.nn.Linear(4, 4)
rule = RelativeWeightDecay(0.1, norm_input="params", metric=3, scope="tensor", per="grad")
chain = Chain(model.named_parameters(), Adam(), rule, LR(1e-3), rounding="stochastic")
adamw = torch.optim.AdamW(distwd.param_groups(model, 0.1), lr=1e-3)
attachment = attach(adamw, WeightDecay(0.1, toward="initial"), coupling="none", take_over=True)
CosineWeightDecay(chain, T_max=10)
norm: torch.Tensor = distwd.clip_grad_norm_(model.parameters(), 1.0)
metric: torch.Tensor = distwd.global_metric(model.parameters(), "l2")
nothing: None = chain.step()


def closure() -> torch.Tensor:
    return model(torch.ones(4)).sum()  # type: ignore[no-any-return]


loss: torch.Tensor = chain.step(closure)
print(attachment.stats()["WeightDecay"], chain.stats()["RelativeWeightDecay"]["metric"].item())


class Mine(distwd.Rule):
    def measures(self, settings: object) -> dict[str, distwd.Measure]:
        return {"norm": distwd.Measure("params", "l2", scope="matrix")}
"""

WRONG = {
    'RelativeWeightDecay(norm_input="updates")': "norm_input",
    'RelativeWeightDecay(metric="l5")': "metric",
    'RelativeWeightDecay(scope="model")': "scope",
    'RelativeWeightDecay(per="gradient")': "per",
    'WeightDecay(0.1, target="param")': "target",
    'WeightDecay(0.1, toward="start")': "toward",
    'NormControl(0.1, radius="first")': "radius",
    'ConstrainedWeightDecay("begin")': "Argument 1",
    'Measure("gradient", "l2")': "Argument 1",
    'Chain([w], Adam(), LR(1.0), rounding="up")': "rounding",
    'attach(adamw, WeightDecay(0.1), coupling="lrr")': "coupling",
    'CorrectedWeightDecay(adamw, form="square")': "form",
    'decay_weights_([w], 0.1, rounding="random")': "rounding",
    'global_metric([w], "mean")': "Argument 2",
    "Chain([w], LR(1.0)).step(lambda: 1).item()": "no attribute",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[str]]:
    """What mypy says of the right program, and of each wrong line; one run, since reading torch takes most of it."""
    folder = tmp_path_factory.mktemp("types")
    (folder / "right.py").write_text(RIGHT, encoding="utf-8")
    head = ["import torch", "from distwd import *", "w = torch.nn.Parameter(torch.ones(2))"]
    head += ["adamw = torch.optim.AdamW([w])"]
    (folder / "wrong.py").write_text("\n".join([*head, *WRONG]) + "\n", encoding="utf-8")
    options = ["--strict", "--no-error-summary", "--no-color-output", "--no-pretty", "--config-file="]
    command = [sys.executable, "-m", "mypy", *options, "--cache-dir", str(folder / "cache"), "right.py", "wrong.py"]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    said = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300).stdout
    errors: dict[str, list[str]] = {"right": [], **{line: [] for line in WRONG}}
    for name, number, text in re.findall(r"^(\w+)\.py:(\d+): error: (.*)$", said, re.MULTILINE):
        line = "right" if name == "right" else [*head, *WRONG][int(number) - 1]
        errors[line].append(f"{number}: {text}")
    return errors


def test_a_right_program_passes(found):
    assert found["right"] == []


@pytest.mark.parametrize(("line", "what"), WRONG.items())
def test_an_unknown_word_is_found(found, line, what):
    words = what if " " in what else f'Argument "{what}"'
    assert any(words in error for error in found[line]), found[line]
