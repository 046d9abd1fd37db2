"""What the guides show and tests/test_docs.py does not run as it stands: lines that need another package, and what is printed."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import distwd
from distwd import RelativeWeightDecay, attach, param_groups
from tests import recipes
from tests.test_attach_packages import package
from tests.test_docs import BLOCKS, PUBLIC, Model

GUIDES = "docs/pages/guides"


def blocks(page: str, language: str) -> list[str]:
    return [b.code for b in BLOCKS if (str(b.page).endswith(f"{GUIDES}/{page}"), b.language) == (True, language)]


def names_at_hand() -> dict:
    torch.manual_seed(0)
    space = {name: getattr(distwd, name) for name in PUBLIC}
    return space | {"torch": torch, "model": Model(), "inputs": torch.randn(4, 8), "step": 7}


def run(code: str, space: dict) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "guide", "exec"), space)
    return out.getvalue()


@pytest.fixture
def told(monkeypatch) -> list[tuple]:
    """What TensorBoard and Weights & Biases are told; they stand in for packages that need not be installed."""
    told: list[tuple] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert isinstance(folder, str)

        def add_scalar(self, name, number, step) -> None:
            told.append((name, float(number), step))

    board, wandb = types.ModuleType("torch.utils.tensorboard"), types.ModuleType("wandb")
    board.SummaryWriter = SummaryWriter
    wandb.init = lambda project, mode: None
    wandb.log = lambda numbers, step: told.extend((name, number, step) for name, number in numbers.items())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return told


def test_every_logger_is_told_each_number_once(told):
    space = names_at_hand()
    run(blocks("logging.md", "python")[0], space)
    shown = blocks("logging.md", "py")
    assert len(shown) == 2
    for code in shown:
        told.clear()
        run(code, space)
        assert [(name, step) for name, _, step in told] == [
            ("RelativeWeightDecay/metric", 7),
            ("RelativeWeightDecay/coefficient", 7),
            ("RelativeWeightDecay/coefficients/0", 7),
        ]
        metric, coefficient, of_group = (number for _, number, _ in told)
        assert 0.5 < metric < 1.1
        assert coefficient == of_group == pytest.approx(0.5 * metric)


@pytest.mark.parametrize(("page", "number"), [("layer-decay.md", 0), ("muon.md", 0)])
def test_a_guide_shows_what_its_lines_print(page, number):
    printed = run(blocks(page, "python")[number], names_at_hand())
    assert printed == blocks(page, "text")[number]


def test_groups_of_timm_keep_their_exclusions():
    space = names_at_hand() | {"timm": types.SimpleNamespace(optim=package("timm.optim"))}
    (code,) = blocks("layer-decay.md", "py")
    run(code, space)
    decays = {}
    for group in space["optimizer"].param_groups:
        assert group["weight_decay"] == 0
        assert 0 < group["lr_scale"] <= 1
        decays |= dict.fromkeys(map(id, group["params"]), group["distwd_weight_decay"])
    found = {name: decays[id(param)] for name, param in space["model"].named_parameters()}
    assert found == {name: 0.05 if param.ndim == 2 else 0.0 for name, param in space["model"].named_parameters()}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_wants_the_key_of_the_decay_and_its_planner_can_be_told(tmp_path):
    """The page's message, its planner, and what is said of the step after it."""
    model = Model()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3, weight_decay=0.1)
    model(torch.ones(4, 8)).sum().backward()
    optimizer.step()
    states = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=tmp_path)

    model = Model()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3, weight_decay=0.3)
    attach(optimizer, RelativeWeightDecay(), take_over=True)
    both = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    (message,) = [code for code in blocks("resume.md", "text") if "Missing key" in code]
    with pytest.raises(CheckpointException) as error:
        dcp.load(both, checkpoint_id=tmp_path)
    assert message.strip() in str(error.value)

    (code,) = blocks("resume.md", "py")
    run(code, {"dcp": dcp, "both": both, "folder": tmp_path})
    set_state_dict(model, optimizer, model_state_dict=both["model"], optim_state_dict=both["optimizer"])
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["distwd_weight_decay"]) == (0.1, 0.3)
    model(torch.ones(4, 8)).sum().backward()
    optimizer.step()
    assert (group["weight_decay"], group["distwd_weight_decay"]) == (0.0, 0.1)


def test_decay_is_attached_before_accelerate_prepares():
    class Accelerator:
        def prepare(self, *given):
            return given

    space = names_at_hand() | {"accelerator": Accelerator(), "loader": []}
    space["model"] = recipes.small().ByteModel()
    source = (recipes.FOLDER / "accelerate_fsdp2.py").read_text(encoding="utf-8")
    run(source.split("# --8<-- [start:groups]")[1].split("# --8<-- [end:groups]")[0], space)
    (code,) = blocks("frameworks.md", "py")
    run(code, space)
    groups = space["optimizer"].param_groups
    assert [group["distwd_weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(param.ndim == 2 for param in groups[0]["params"])
    assert all(param.ndim == 1 for param in groups[1]["params"])


def test_the_padding_of_deepspeed_counts_for_nothing():
    """Adam's first update is ±1 for each element that has a gradient, and 0 for padding."""
    pieces = [torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 0.0])), torch.nn.Parameter(torch.tensor([1.0, 4.0]))]
    inner = torch.optim.AdamW([{"params": [piece]} for piece in pieces], lr=1e-3, weight_decay=0)
    zero = types.SimpleNamespace(optimizer=inner, single_partition_of_fp32_groups=pieces, groups_padding=[1, 0])
    space = names_at_hand() | {"engine": types.SimpleNamespace(optimizer=zero), "group": None}
    (code,) = blocks("layout.md", "py")
    run(code, space)
    for piece in pieces:
        piece.grad = piece.detach().sign()
    inner.step()
    metric = space["attachment"].stats()["RelativeWeightDecay"]["metric"]
    assert [number.item() for number in metric.values()] == pytest.approx([1.0, 1.0])


class WithExclusions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.lm_head = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 5)
        self.pos = torch.nn.Parameter(torch.ones(3, 4))

    def no_weight_decay(self) -> set[str]:
        return {"pos"}


def test_the_usual_exclusions_exclude():
    """The rules in the table of the page, together on one model."""
    text = (recipes.ROOT / GUIDES / "param-groups.md").read_text(encoding="utf-8").split("## Usual exclusions")[1]
    model = WithExclusions()
    shown = re.findall(r"\| `(\(.*\))` \|$", text.split("\n## ")[0], re.MULTILINE)
    groups = param_groups(model, 0.1, [eval(rule, {"torch": torch, "model": model}) for rule in shown])
    decays = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
    assert len(shown) == 3
    assert [name for name, decay in decays.items() if decay] == ["mid.weight"]


def test_every_line_that_is_only_shown_is_run_here():
    """A block ```py is left out by tests/test_docs.py; each one of the guides has a test above."""
    pages = {block.page.name for block in BLOCKS if block.language == "py"}
    assert pages == {"logging.md", "layer-decay.md", "resume.md", "frameworks.md", "layout.md"}
