"""launch/recipes/torchtitan_container.py, and what else happens to decay that is attached to such a container.

torchtitan itself is too large for these tests: they run with a container of the same shape (tests/fakes).
"""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from distwd import RelativeWeightDecay, WeightDecay, attach
from tests import recipes
from tests.layouts import mesh_of
from tests.runs import differing

FAKES = recipes.ROOT / "tests" / "fakes"


def by_hand(decays: bool) -> dict[str, torch.Tensor]:
    """Two ranks, FSDP2, two optimizers."""
    small = recipes.small()
    model = small.ByteModel()
    for block in model.blocks:
        fully_shard(block, mesh=mesh_of(2, names=("dp",)))
    fully_shard(model, mesh=mesh_of(2, names=("dp",)))
    named = list(model.named_parameters())
    vectors = [(name, p) for name, p in named if "norm" in name or "bias" in name]
    matrices = [(name, p) for name, p in named if "norm" not in name and "bias" not in name]
    settings = {"lr": 1e-2, "weight_decay": 0.0, "foreach": True}
    optimizers = [torch.optim.Adam(vectors, **settings), torch.optim.AdamW(matrices, **settings)]
    if decays:
        for optimizer, decay in zip(optimizers, (0.0, 0.1), strict=True):
            optimizer.param_groups[0]["distwd_weight_decay"] = decay
        attach(optimizers, RelativeWeightDecay())
    for text in small.read_sequences(96).view(6, 2, 8, -1)[:, dist.get_rank()]:
        model(text).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return recipes.whole(model)


def test_a_container_trains_as_its_optimizers_without_it_and_resumes_where_it_stopped(worlds, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    expected = recipes.on_two_ranks(worlds, by_hand, True)
    printed = recipes.run("torchtitan_container.py", tmp_path)
    assert "1 collective a step for 2 optimizers" in printed
    assert differing(recipes.trained(tmp_path), expected) == []
    (tmp_path / "model.pt").unlink()
    recipes.run("torchtitan_container.py", tmp_path, "--resume")
    assert differing(recipes.trained(tmp_path), expected) == []
    assert recipes.apart(expected, recipes.on_two_ranks(worlds, by_hand, False)) > 1e-4


@pytest.fixture
def titan(monkeypatch):
    """The module of the fake package."""
    monkeypatch.syspath_prepend(str(FAKES))
    for name in [name for name in sys.modules if name.split(".")[0] == "torchtitan"]:
        monkeypatch.delitem(sys.modules, name)
    import torchtitan.components.optimizer as module

    return module


def container_of(titan, model: torch.nn.Module, lr: float | torch.Tensor = 0.1):
    settings = {"lr": lr, "weight_decay": 0.0}
    groups = [
        titan.ParamGroupConfig(pattern="bias", optimizer_name="Adam", optimizer_kwargs=settings),
        titan.ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=settings),
    ]
    config = titan.OptimizersContainer.Config(param_groups=groups, implementation="for-loop")
    return titan.OptimizersContainer(config, model_parts=[model])


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


RULES = {
    "absolute": WeightDecay(0.1),
    "of params": RelativeWeightDecay(0.1, norm_input="params"),
    "of updates": RelativeWeightDecay(0.1),
}


@pytest.mark.parametrize("coupling", ["none", "lr", "gradient"])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_the_containers_own_hidden_step_decays_nothing(titan, name, coupling, lr):
    """It steps one optimizer at lr 0 while the others keep theirs."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    container = container_of(titan, model, lr)
    attach(container.optimizers, RULES[name], coupling=coupling)
    before = values(model)
    saved = copy.deepcopy(container.state_dict())
    assert differing(values(model), before) == []
    container.load_state_dict(saved)
    assert differing(values(model), before) == []
    model(torch.ones(1, 4)).sum().backward()
    container.step()
    assert len(differing(values(model), before)) == 4


@pytest.mark.parametrize("coupling", ["none", "lr", "gradient"])
@pytest.mark.parametrize("name", RULES)
def test_a_hidden_step_of_one_optimizer_leaves_no_trace_in_the_next_steps(titan, name, coupling):
    """But in Adam's count of steps, which is between the container and Adam, and is set back here."""
    ends = []
    for asked in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        container = container_of(titan, model)
        attach(container.optimizers, RULES[name], coupling=coupling)
        if asked:
            titan.make_state(container.optimizers[0])
            for state in container.optimizers[0].state.values():
                state["step"].zero_()
        for _ in range(2):
            model(torch.ones(1, 4)).square().sum().backward()
            container.step()
            container.zero_grad()
        ends.append(values(model))
    assert differing(*ends) == []


def test_a_checkpoint_from_before_decay_names_the_setting_it_lacks(titan):
    """The container asks for every setting of its groups before any hook of ours is called; see docs/pages/guides/frameworks.md."""
    model = torch.nn.Linear(4, 2)
    old = copy.deepcopy(container_of(titan, model).state_dict())
    container = container_of(titan, model)
    attach(container.optimizers, WeightDecay(0.1))
    with pytest.raises(KeyError, match="distwd_weight_decay"):
        container.load_state_dict(old)


def test_attach_refuses_the_container_and_names_what_to_attach_to(titan):
    container = container_of(titan, torch.nn.Linear(4, 2))
    for coupling in ("lr", "none", "gradient"):
        with pytest.raises(
            ValueError, match=r"OptimizersContainer is a wrapper.*attach to all 2 optimizers in its `\.optimizers`"
        ):
            attach(container, WeightDecay(0.1), coupling=coupling)
