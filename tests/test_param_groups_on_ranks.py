"""param_groups under every wrapper of a model, and on ranks that hold different parameters."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from distwd import LR, Chain, RelativeWeightDecay
from distwd.groups.model_params import params_of
from distwd.groups.param_groups import param_groups
from tests.layouts import SHAPES, Net, mesh_of
from tests.test_param_groups import RULES, contents, decays, net

# --- wrappers ---------------------------------------------------------------------------------------------------------


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def checkpointed(model: Net) -> nn.Module:
    model.up = checkpoint_wrapper(model.up)
    model.norm = compiled(model.norm)
    return checkpoint_wrapper(model)


def sharded(model: Net) -> nn.Module:
    fully_shard(model.up, mesh=mesh_of(dist.get_world_size(), names=("dp",)))
    fully_shard(model, mesh=mesh_of(dist.get_world_size(), names=("dp",)))
    return model


class Fabric(nn.Module):
    """As Lightning's Fabric wraps: the module as it runs, which may be wrapped, and as it was."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._forward_module, self._original_module = compiled(model), model


WRAPPERS = {
    "fabric": Fabric,
    "averaged": AveragedModel,
    "checkpointed": checkpointed,
    "compiled": compiled,
    "compiled, checkpointed": lambda model: compiled(checkpointed(model)),
}
WRAPPERS_ON_RANKS = {
    "fsdp2": sharded,
    "compiled fsdp2": lambda model: compiled(sharded(checkpointed(model))),
    "ddp": DistributedDataParallel,
    "compiled ddp": lambda model: compiled(DistributedDataParallel(checkpointed(model))),
    "fsdp1": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True),
    "fsdp1 of checkpointed": lambda model: FullyShardedDataParallel(
        checkpointed(model), device_id=torch.device("cpu"), use_orig_params=True
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_changes_nothing(wrapper):
    covered = WRAPPERS[wrapper](net())
    assert {name for name, _ in covered.named_parameters()} != set(SHAPES)  # the names have the wrapper's prefix
    assert contents(param_groups(covered, 0.1, RULES)) == contents(param_groups(net(), 0.1, RULES))


def under_wrapper(wrapper: str) -> tuple:
    model = WRAPPERS_ON_RANKS[wrapper](net())
    groups = param_groups(model, 0.1, RULES)
    changed = any(held.param.ndim != len(SHAPES[held.name]) for held in params_of(model))
    names = sorted(name for name, _ in model.named_parameters())
    return contents(groups), groups.audit().split("\n")[-2], changed, names


@pytest.mark.parametrize("wrapper", WRAPPERS_ON_RANKS)
def test_a_wrapper_over_ranks_changes_nothing(worlds, wrapper):
    alone = param_groups(net(), 0.1, RULES)
    for groups, summary, flat, names in worlds.run(3, under_wrapper, wrapper):
        assert groups == contents(alone)
        assert summary == alone.audit().split("\n")[-1]  # elements are those of whole tensors
        assert flat == wrapper.startswith("fsdp1")  # here a matrix looks like a vector
        assert (names == sorted(SHAPES)) == (wrapper == "fsdp2")  # elsewhere the names have the wrapper's prefix


def flattened() -> str:
    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=False)
    try:
        param_groups(model, 0.1)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_what_is_flattened_beyond_recognition_is_refused(worlds):
    assert all("use_orig_params=True" in text for text in worlds.run(2, flattened))


def test_an_empty_tensor_of_zero3_is_what_it_will_be():
    model = net()
    shapes = {name: param.shape for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        param.data, param.ds_shape = torch.empty(0), shapes[name]
    assert contents(param_groups(model, 0.1, RULES)) == contents(param_groups(net(), 0.1, RULES))


# --- ranks that hold different parameters -----------------------------------------------------------------------------


def stage(rank: int) -> nn.Module:
    """A pipeline: matrices and vectors, only matrices, nothing."""
    parts = [("embed", "norm", "up", "gate"), ("experts",), ()]
    model = net()
    return nn.ModuleDict({name: getattr(model, name) for name in parts[rank]})


STAGES = [
    ("norm.*", {"weight_decay": 0.25}),
    ("experts.*", {"weight_decay": 0.5}),
    (nn.Embedding, {"weight_decay": 0.0, "lr": 0.125}),
]


def groups_of_stage() -> tuple:
    groups = param_groups(stage(dist.get_rank()), 0.1, STAGES)
    return contents(groups), groups.audit()


def test_stages_have_the_same_groups_whatever_they_hold(worlds):
    ranks = worlds.run(3, groups_of_stage)
    settings = [[one for one, _ in groups] for groups, _ in ranks]
    assert settings[0] == settings[1] == settings[2]
    assert [one["weight_decay"] for one in settings[0]] == [0.1, 0.0, 0.25, 0.5, 0.0]
    assert [names for _, names in ranks[0][0]] == [
        ["up.weight"], ["up.bias", "gate.weight"], ["norm.weight", "norm.bias"], [], ["embed.weight"]
    ]  # fmt: skip
    assert [names for _, names in ranks[1][0]] == [[], [], [], ["experts.weight"], []]
    assert [names for _, names in ranks[2][0]] == [[], [], [], [], []]
    assert "rank 1 of 3 holds" in ranks[1][1]
    # Non-vacuity: decided on one stage, the rules would be refused.
    for rank in (0, 1):
        with pytest.raises(ValueError, match="matches no parameter"):
            param_groups(stage(rank), 0.1, STAGES)


def refused(rules: str) -> str:
    rank = dist.get_rank()

    def brittle(name: str, param: torch.Tensor) -> bool:
        return param.shape[2] > 0 if name == "experts.weight" and rank == 1 else param.shape[9] > 0

    chosen = {
        "typo": [("norm.*", {}), ("expert.*", {})],
        "brittle": [(brittle, {})],
        "different": [("norm.*" if rank else "nrom.*", {})],
    }
    try:
        param_groups(stage(rank), 0.1, chosen[rules])
    except ValueError as error:
        return str(error)
    return "accepted"


def test_a_refusal_reaches_every_rank(worlds):
    typo, brittle, different = (worlds.run(3, refused, rules) for rules in ("typo", "brittle", "different"))
    assert all("'expert.*' matches no parameter of the model" in text for text in typo)
    assert all("brittle raised IndexError for embed.weight" in text for text in brittle)
    assert all("'nrom.*'" in text and "different rules" in text for text in different)


def train_stages(ranks: int) -> dict[str, torch.Tensor]:
    """Two steps of a rule that measures each group; the whole model, by name."""
    parts = [stage(rank) for rank in range(2)] if ranks == 0 else stage(dist.get_rank())
    groups = param_groups(parts, 0.1, STAGES)
    chain = Chain(groups, RelativeWeightDecay(0.9, norm_input="params", scope="group"), LR(0.5))
    mine = {held.name: held.param for held in params_of(parts)}
    for _ in range(2):
        for param in mine.values():
            param.grad = torch.ones_like(param)
        chain.step()
    return {name: param.detach() for name, param in mine.items()}


def test_a_number_per_group_is_over_the_groups_of_all_stages(worlds):
    alone = train_stages(0)
    spread = worlds.run(3, train_stages, 3)
    assert [len(params) for params in spread] == [6, 1, 0]
    for params in spread:
        assert all(torch.equal(param, alone[name]) for name, param in params.items())


def load_flattened(keep_empty: bool) -> str:
    model = stage(dist.get_rank() % 2)
    optimizer = torch.optim.AdamW(param_groups(model, 0.1, STAGES, keep_empty=keep_empty))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    try:
        set_optimizer_state_dict(model, optimizer, state, options=options)
    except IndexError:
        return "IndexError"
    return str([group["weight_decay"] for group in optimizer.param_groups])


def test_groups_of_which_a_rank_holds_nothing_can_be_left_out(worlds):
    assert worlds.run(2, load_flattened, False) == ["[0.1, 0.0, 0.25, 0.0]", "[0.5]"]
    assert worlds.run(2, load_flattened, True) == ["IndexError", "IndexError"]


def half_decides() -> list[str]:
    """Only the ranks of the group take part."""
    group = dist.new_group([0, 1])
    if dist.get_rank() == 2:
        return ["not asked"]
    return sorted(decays(param_groups(stage(dist.get_rank()), 0.1, STAGES, group=group)))


def test_only_the_ranks_of_the_group_are_asked(worlds):
    ranks = worlds.run(3, half_decides)
    assert ranks[1:] == [["experts.weight"], ["not asked"]]
