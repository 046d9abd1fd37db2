"""What people get wrong: each mistake is an error or a warning that names the thing, the reason and the next move."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import distwd
from distwd import LR, Adam, Chain, Plan, RelativeWeightDecay, WeightDecay, Wrap, attach, param_groups


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def warned_of(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(one.filename == __file__ for one in caught), "a warning at a line of distwd helps nobody"
    return [str(one.message) for one in caught]


def adamw(model: nn.Module, **settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), weight_decay=0, **settings)


# --- what is passed ---------------------------------------------------------------------------------------------------


def test_a_chain_without_a_learning_rate_is_told():
    named = list(linear().named_parameters())
    (told,) = warned_of(lambda: Chain(named, Adam(), WeightDecay(0.1)))
    assert "Adam steps with a learning rate of 1; put LR(1e-3)" in told
    assert warned_of(lambda: Chain(named, Adam(), LR(1.0))) == []
    # Their own learning rate is 1; and a chain without an optimizer is what it says.
    assert warned_of(lambda: Chain(named, Wrap(torch.optim.Adadelta))) == []
    assert warned_of(lambda: Chain(named, Wrap(torch.optim.LBFGS))) == []
    assert warned_of(lambda: Chain(named, WeightDecay(0.1))) == []


WRONG = {
    "lr of Adam": (lambda m: Adam(lr=0.25), r"put LR\(0.25\) behind it"),
    "lr of Adam by place": (lambda m: Adam(0.25), r"put LR\(0.25\) behind it"),
    "weight_decay of Adam": (lambda m: Adam(weight_decay=0.5), r"put WeightDecay\(0.5\) before it"),
    "a model": (
        lambda m: Chain(m, Adam(), LR(0.1)),
        r"params is a Linear, which is a module; pass model.named_parameters\(\)",
    ),
    "a model of a plan": (lambda m: Plan.build(m), r"pass model.named_parameters\(\)"),
    "a dict": (lambda m: Chain(dict(m.named_parameters()), Adam(), LR(0.1)), r"pass its .items\(\)"),
    "no params": (
        lambda m: Chain(Adam(), LR(0.1)),
        r"params is Adam\(\), which holds no parameters; pass model.named_",
    ),
    "transforms in a list": (lambda m: Chain(m.parameters(), [Adam(), LR(0.1)]), r"Chain\(params, \*transforms\)"),
    "an optimizer in a chain": (
        lambda m: Chain(m.parameters(), adamw(m), LR(0.1)),
        r"^AdamW holds .* Wrap\(AdamW, \.\.\.\)",
    ),
    "an optimizer in Wrap": (lambda m: Wrap(adamw(m)), r"not one AdamW; pass the class"),
    "attach the wrong way round": (lambda m: attach(WeightDecay(0.1), adamw(m)), r"attach\(optimizer, rule\)$"),
    "names without names": (
        lambda m: attach(adamw(m), WeightDecay(0.1), named_parameters=m.parameters()),
        r"pass model.named_parameters\(\)",
    ),
    "names: a model": (
        lambda m: attach(adamw(m), WeightDecay(0.1), named_parameters=m),
        r"pass model.named_parameters\(\)",
    ),
    "names of another model": (
        lambda m: attach(adamw(m), WeightDecay(0.1), named_parameters=linear().named_parameters()),
        r"param_groups\[0\]\['params'\]\[0\] of shape \(2, 3\) and 1 others not in named_parameters.*none of the optimizer's",
    ),
    "a key of a chain": (
        lambda m: Chain([{"params": m.parameters(), "weigth_decay": 0.0}], Adam(), WeightDecay(0.1), LR(0.1)),
        r"param_groups\[0\] has the key 'weigth_decay', which nothing reads; did you mean 'weight_decay'",
    ),
    "a second rule's key without one": (
        lambda m: Chain([{"params": m.parameters(), "weight_decay_1": 0.0}], Adam(), WeightDecay(0.1), LR(0.1)),
        "did you mean 'weight_decay'",
    ),
    "a key of an optimizer in a chain": (
        lambda m: Chain([{"params": m.parameters(), "beta": (0.9, 0.9)}], Adam(), LR(0.1)),
        "did you mean 'betas'",
    ),
    "a key of attach": (
        lambda m: attach(torch.optim.SGD([{"params": m.parameters(), "distwd_weightdecay": 0.0}]), WeightDecay(0.1)),
        "did you mean 'distwd_weight_decay'",
    ),
    "a key in a rule": (
        lambda m: param_groups(m, 0.1, [("*", {"weightdecay": 0.0})]),
        r"rules\[0\] has the key 'weightdecay'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_refused_with_the_way_out(case):
    make, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        make(linear())


def test_a_group_that_is_added_later_is_read_as_closely():
    model, late = linear(), {"params": [nn.Parameter(torch.ones(2))], "weightdecay": 0.0}
    chain = Chain(model.named_parameters(), Adam(), WeightDecay(0.1), LR(0.1))
    with pytest.raises(ValueError, match=r"param_groups\[1\] has the key 'weightdecay'"):
        chain.add_param_group({**late, "params": [("late", late["params"][0])]})
    assert len(chain.param_groups) == 1
    optimizer = adamw(model)
    attach(optimizer, WeightDecay(0.1))
    optimizer.add_param_group({"params": late["params"], "weight_decay": 0, "distwd_wieght_decay": 0.0})
    before = [param.detach().clone() for param in model.parameters()]
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"param_groups\[1\] has the key 'distwd_wieght_decay'"):
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "key", ["name", "lr_scale", "initial_lr", "max_weight_decay", "initial_weight_decay", "max_momentum"]
)
def test_keys_of_others_are_left_alone(key):
    group = {"params": list(linear().named_parameters()), key: 1.0}
    assert Chain([group], Adam(), WeightDecay(0.1), LR(0.1)).param_groups[0][key] == 1.0
    attach(torch.optim.SGD([group]), WeightDecay(0.1))


def test_a_decay_of_a_rule_that_has_been_left_out_is_no_mistake():
    """A checkpoint of a run with two rules, in a run with one."""
    optimizers = [adamw(linear()) for _ in range(2)]
    attach(optimizers[0], WeightDecay(0.1), RelativeWeightDecay(0.2))
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    attach(optimizers[1], WeightDecay(0.1))


def test_names_of_a_part_are_told():
    model = linear()
    (told,) = warned_of(
        lambda: attach(adamw(model), WeightDecay(0.1), named_parameters=list(model.named_parameters())[:1])
    )
    assert "param_groups[0]['params'][1] of shape (2,) not in named_parameters" in told
    # A model may have more than its optimizer steps, and an optimizer that has names needs no others.
    some = torch.optim.SGD([model.weight])
    assert warned_of(lambda: attach(some, WeightDecay(0.1), named_parameters=model.named_parameters())) == []
    named = torch.optim.SGD(model.named_parameters())
    assert warned_of(lambda: attach(named, WeightDecay(0.1), named_parameters=linear().named_parameters())) == []


# --- an optimizer that trains nothing ---------------------------------------------------------------------------------


def made_before_sharding(way: str) -> tuple[list[str], list[str]]:
    """What is warned of in three steps of an optimizer that was made before `fully_shard`, and of one made after it."""
    found = []
    for is_before in (True, False):
        model = linear()
        if not is_before:
            fully_shard(model)
        if way == "chain":
            optimizer = Chain(model.named_parameters(), Adam(), RelativeWeightDecay(0.1), LR(0.1))
        else:
            optimizer = adamw(model)
            attach(optimizer, RelativeWeightDecay(0.1))
        if is_before:
            fully_shard(model)

        def train(model=model, optimizer=optimizer):
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.ones(4, 3)).sum().backward()
                optimizer.step()

        found.append(warned_of(train))
    return found[0], found[1]


@pytest.mark.parametrize("way", ["chain", "attach"])
def test_an_optimizer_made_before_sharding_is_told(worlds, way):
    for before, after in worlds.run(2, made_before_sharding, way):
        assert len(before) == 1
        assert "no parameter of the optimizer has a gradient in its first step" in before[0]
        assert "make the optimizer after that" in before[0]
        assert after == []


def test_a_step_without_gradients_later_is_not_told():
    model = linear()
    chain = Chain(model.named_parameters(), Adam(), WeightDecay(0.1), LR(0.1))
    model(torch.ones(1, 3)).sum().backward()
    chain.step()
    chain.zero_grad()
    assert warned_of(chain.step) == []
    frozen = linear().requires_grad_(False)
    still = Chain(frozen.named_parameters(), Adam(), WeightDecay(0.1), LR(0.1))
    assert warned_of(still.step) == []


# --- groups of param_groups -------------------------------------------------------------------------------------------


def trained(how: str, groups: list, model: nn.Module) -> tuple:
    if how == "chain":
        optimizer, held = Chain(groups, Adam(foreach=False), WeightDecay(0.9), LR(0.1)), None
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.9, foreach=False)
        held = attach(optimizer, WeightDecay(0.9)) if how == "attach" else None
    for step in range(2):
        for number, param in enumerate(model.parameters()):
            param.grad = torch.full_like(param, 0.1 * (number + step + 1))
        optimizer.step()
    return [param.detach() for param in model.parameters()], optimizer, held


@pytest.mark.parametrize("decay", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
@pytest.mark.parametrize("attached", [False, True])
def test_param_groups_serve_adamw_a_chain_and_attach_alike(attached, decay):
    ends = {}
    # AdamW alone decays by itself only without `attached=True`, which says that attach does it.
    ways = ["chain", "attach"] if attached else ["adamw", "chain", "attach"]
    if isinstance(decay, torch.Tensor):
        ways.remove("adamw") if "adamw" in ways else None
    for how in ways:
        model = linear()
        ends[how], optimizer, held = trained(how, param_groups(model, decay, attached=attached), model)
        if held is not None:
            assert [bool(group["distwd_weight_decay"] == 0.5) for group in optimizer.param_groups] == [True, False]
            assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)
    model = linear()
    named = dict(model.named_parameters())
    groups = [{"params": [named["weight"]], "weight_decay": 0.5}, {"params": [named["bias"]], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, foreach=False)
    for step in range(2):
        for number, param in enumerate(model.parameters()):
            param.grad = torch.full_like(param, 0.1 * (number + step + 1))
        optimizer.step()
    for how, values in ends.items():
        for value, param in zip(values, model.parameters(), strict=True):
            assert torch.equal(value, param), how


def test_decay_that_was_taken_over_is_given_back_and_can_be_taken_again():
    model = linear()
    groups = param_groups(model, 0.5)
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    before = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    for _ in range(2):
        held = attach(optimizer, WeightDecay(0.1))
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0]
        held.remove()
        now = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        assert now == before


def test_a_decay_that_was_changed_since_is_nobodys_to_take():
    optimizer = torch.optim.AdamW(param_groups(linear(), 0.5), lr=0.1)
    optimizer.param_groups[0]["weight_decay"] = 0.25
    with pytest.raises(ValueError, match=r"weight_decay=0.25.*take_over=True"):
        attach(optimizer, WeightDecay(0.1))


def test_a_checkpoint_of_an_attached_run_decays_in_a_chain():
    """attach keeps λ in a key of its own, beside a `weight_decay` of 0."""
    model = linear()
    optimizer = torch.optim.AdamW(param_groups(model, 0.5), lr=0.1)
    attach(optimizer, WeightDecay(0.1))
    chain = Chain(param_groups(model, 0.5), Adam(), WeightDecay(0.1), LR(0.1))
    chain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["weight_decay"] for group in chain.param_groups] == [0.5, 0.0]
    # And the other way round: AdamW decays by itself then, until told otherwise.
    optimizer.load_state_dict(copy.deepcopy(chain.state_dict()))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"weight_decay=0.5.*take_over=True"):
        optimizer.step()


def test_a_checkpoint_of_adamw_on_the_same_groups_decays_by_attach():
    model = linear()
    alone = torch.optim.AdamW(param_groups(model, 0.5), lr=0.1)
    attach(optimizer := torch.optim.AdamW(param_groups(model, 0.25), lr=0.1), WeightDecay(0.1))
    optimizer.load_state_dict(copy.deepcopy(alone.state_dict()))
    before = model.weight.detach().clone()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before * (1 - 0.1 * 0.5))
    late = nn.Linear(2, 2)
    optimizer.add_param_group(param_groups(late, 0.125)[0])
    before = late.weight.detach().clone()
    for param in late.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(late.weight.detach(), before * (1 - 0.1 * 0.125))
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)


def test_schedules_made_before_attach_drive_what_is_attached():
    model = linear()
    optimizer = torch.optim.AdamW(param_groups(model, 0.5), lr=0.1)
    schedule = distwd.LinearWeightDecay(optimizer, start_factor=1.0, end_factor=0.0, total_iters=2)
    attach(optimizer, WeightDecay(0.1))
    seen = []
    for _ in range(3):
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        before = model.weight.detach().clone()
        optimizer.step()
        schedule.step()
        seen.append(round(1 - (model.weight / before).mean().item(), 4))
    assert seen == [0.05, 0.025, 0.0]
