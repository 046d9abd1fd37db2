"""The table of optimizers in docs/pages/guides/attach.md is what was seen: an optimizer with a rule attached works where it works alone."""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path

import pytest
import torch

from distwd import RelativeWeightDecay, attach
from tests import layouts, runs
from tests.layouts import LAYOUTS, whole_model
from tests.releases import needs_torch

pytestmark = needs_torch(
    "2.13", "the table is of newer releases; before, DTensor knows fewer operations, and Muon is missing"
)
PAGE = Path(__file__).parent.parent / "docs/pages/guides/attach.md"
NAMES = [
    "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "LBFGS", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
]  # fmt: skip
MODES = {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
COLUMNS = {"plain tensors": "single", "DTensors": "fsdp2", "DTensors on several meshes": "fsdp_tp"}


def modes_of(name: str) -> list[str]:
    known = inspect.signature(getattr(torch.optim, name)).parameters
    return [mode for mode, kwargs in MODES.items() if set(kwargs) <= set(known)] or ["single"]


def steps(layout: str, name: str, mode: str, attached: str | None) -> str:
    cls = getattr(torch.optim, name)
    known = inspect.signature(cls).parameters
    held = layouts.place(layout, whole_model(runs.PARAMS_SEED))
    named = [(n, p) for n, p in held.items() if p.ndim == 2 or name != "Muon"]
    kwargs = {key: value for key, value in {**MODES[mode], "weight_decay": 0}.items() if key in known}
    optimizer = cls(named, lr=0.01, **kwargs)
    if attached:
        attach(optimizer, RelativeWeightDecay(0.1, norm_input=attached))
    try:
        for step in range(2):
            runs.feed(layout, held, step)
            optimizer.step(*([lambda: torch.tensor(1.0)] if name == "LBFGS" else []))
    except (RuntimeError, NotImplementedError):
        return "raises"
    return "works"


def all_steps(layout: str, attached: str | None) -> dict[tuple[str, str], str]:
    return {(name, mode): steps(layout, name, mode, attached) for name in NAMES for mode in modes_of(name)}


@functools.cache
def seen(worlds, layout: str, attached: str | None) -> dict[tuple[str, str], str]:
    first, *others = worlds.run(LAYOUTS[layout].ranks, all_steps, layout, attached)
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize("layout", COLUMNS.values())
def test_an_attached_optimizer_works_where_it_works_alone(worlds, layout):
    assert seen(worlds, layout, "params") == seen(worlds, layout, None)


@pytest.mark.parametrize("layout", COLUMNS.values())
def test_where_a_rule_looks_at_the_update_it_works_there_too(worlds, layout):
    alone, attached = seen(worlds, layout, None), seen(worlds, layout, "update")
    assert {key for key in alone if alone[key] == "works"} <= {key for key in attached if attached[key] == "works"}
    # Zeros in place of DTensors are local, so that kernels which DTensor does not know run all the same.
    assert attached["SGD", "fused"] == attached["Adagrad", "fused"] == "works"


def verdict(worlds, name: str, layout: str) -> str:
    failing = [mode for mode in modes_of(name) if seen(worlds, layout, "params")[name, mode] == "raises"]
    return "yes" if not failing else "no" if len(failing) == len(modes_of(name)) else f"not {', '.join(failing)}"


def test_the_table_is_what_was_seen(worlds):
    section = PAGE.read_text(encoding="utf-8").split("## Which optimizers\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", section, re.MULTILINE)
    ]
    assert rows[0] == ["torch.optim", *COLUMNS]
    stated = {name: cells for names, *cells in rows[2:] for name in re.findall(r"\w+", names)}
    assert stated == {name: [verdict(worlds, name, layout) for layout in COLUMNS.values()] for name in NAMES}
