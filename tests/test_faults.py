"""Faults that show at once: each ends in a right result, or in the same error on every rank, and changes nothing when refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distwd
from tests import layouts

WAYS = ("chain", "attach")


def parameter(*shape: int, value: float = 1.0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    param = nn.Parameter(torch.full(shape, value, dtype=dtype))
    param.grad = torch.ones_like(param)
    return param


def guilty() -> bool:
    return dist.get_rank() == 1


def optimizer_of(way: str, params: object, *rules: object, lr: float = 0.1, coupling: str = "lr", **settings: object):
    rules = rules or (distwd.RelativeWeightDecay(0.1),)
    if way == "chain":
        order = {"lr": (*rules, distwd.LR(lr)), "none": (distwd.LR(lr), *rules)}[coupling]
        return distwd.Chain(params, distwd.Adam(), *order, **settings)
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0, foreach=False)
    optimizer.attachment = distwd.attach(optimizer, *rules, coupling=coupling, **settings)
    return optimizer


Outcome = tuple[str, str, bool]


def outcome_of(act: Callable[[], object], params: list[torch.Tensor]) -> Outcome:
    """The error that came, and whether a parameter changed."""
    before = [layouts.local_of(param).clone() for param in params]
    kind, message = "nothing", ""
    try:
        act()
    except Exception as error:
        kind, message = type(error).__name__, str(error)
    after = [layouts.local_of(param) for param in params]
    return kind, message, not all(map(torch.equal, before, after))


# --- arguments that differ between ranks ------------------------------------------------------------------------------


def different_arguments(fault: str, way: str) -> Outcome:
    params = [("w", parameter(3)), ("v", parameter(2))]
    settings: dict = {}
    if fault == "predicate":

        def chosen(name: str, tensor: torch.Tensor) -> bool:
            return {0: True}[dist.get_rank()]  # KeyError on one rank

        settings["layout"] = {chosen: distwd.Replicated()}
    if fault == "check_replicas":
        settings["check_replicas"] = not guilty()
    if fault == "layout":
        settings["layout"] = (
            {"w": distwd.Replicated()} if guilty() else {"w": distwd.Replicated(), "v": distwd.Replicated()}
        )
    if fault == "groups" and guilty():
        params = [{"params": params[:1]}, {"params": params[1:]}]
    elif fault == "groups":
        params = [{"params": params[1:]}, {"params": params[:1]}]
    if fault == "more parameters" and guilty():
        params.append(("only here", parameter(2)))
    rule = distwd.RelativeWeightDecay(0.1, scope="tensor" if fault == "scope" and guilty() else "group")
    optimizer = optimizer_of(way, params, rule, **settings)
    tensors = [param for group in optimizer.param_groups for param in group["params"]]
    return outcome_of(optimizer.step, tensors)


DIFFERENT = {
    "predicate": "raised KeyError for w: 1",
    "check_replicas": "rank 0: check_replicas=True.*rank 1: check_replicas=False",
    "layout": "a layout of 2 patterns.*a layout of 1 patterns",
    "groups": r"(w|v): rank 0: .*in group \d \| rank 1: .*in group \d",
    "scope": r"mad of update \(group\).*mad of update \(tensor\)",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", DIFFERENT)
def test_ranks_with_different_arguments_all_raise_the_same(worlds, fault, way):
    outcomes = worlds.run(2, different_arguments, fault, way)
    for kind, message, changed in outcomes:
        assert kind == "PlanError", message
        assert re.search(DIFFERENT[fault], message, re.DOTALL), message
        assert not changed
    assert outcomes[0][1] == outcomes[1][1]


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_with_a_parameter_of_its_own_is_a_stage(worlds, way):
    """Named parameters that one rank alone holds count once, as under pipeline parallelism."""
    assert {kind for kind, *_ in worlds.run(2, different_arguments, "more parameters", way)} == {"nothing"}


def other_ord(way: str) -> list[float]:
    """What one rank does with its own parameters is its own affair: no other rank needs to know ord, λ, or lr."""
    held = [(f"stage {dist.get_rank()}", parameter(3, value=2.0))]
    rule = distwd.RelativeWeightDecay(0.1, ord=1 if guilty() else 2, norm_input="params", metric="sum")
    optimizer = optimizer_of(way, held, rule, lr=0.0 if guilty() else 1.0)
    before = held[0][1].detach().clone()
    optimizer.step()
    return (held[0][1].detach() - before).tolist()


@pytest.mark.parametrize("way", WAYS)
def test_lr_zero_on_one_rank_alone_keeps_the_schedule_of_collectives(worlds, way):
    """A frozen stage. The question whether a first step is a real one is asked by all ranks, or by none."""
    moving, frozen = worlds.run(2, other_ord, way)
    # p − lr·(0.1·sum·p + 1): the sum over both stages is 12.
    assert moving == pytest.approx([-(0.1 * 12 * 2 + 1)] * 3, abs=1e-5)
    assert frozen == [0.0] * 3


def loaded_on_one_rank(way: str) -> Outcome:
    params = [("w", parameter(3))]
    optimizer = optimizer_of(way, params, lr=0.0)
    if guilty():
        donor = torch.optim.AdamW([("w", parameter(3))], lr=0.0, weight_decay=0)
        donor.step()
        optimizer.load_state_dict(optimizer.state_dict() if way == "chain" else donor.state_dict())
    optimizer.step()
    return outcome_of(optimizer.step, [params[0][1]])


@pytest.mark.parametrize("way", WAYS)
def test_a_state_loaded_on_one_rank_alone_keeps_the_schedule_of_collectives(worlds, way):
    """At lr 0, as a warm-up begins, where a first step could be no real one."""
    assert [kind for kind, *_ in worlds.run(2, loaded_on_one_rank, way)] == ["nothing"] * 2


# --- gradients that are missing or not finite on one rank ---------------------------------------------------------------

GRADIENTS = ("missing on one rank", "missing everywhere", "nan on one rank", "inf on one rank")


def with_faulty_gradients(way: str, fault: str, whole: bool) -> tuple[dict, list[float]]:
    """Three steps over two shards of each parameter; in the second, the second shard's gradients are wrong. whole: in one process."""
    ranks = range(2) if whole else [dist.get_rank()]
    wholes = {name: torch.arange(size, dtype=torch.float32) - 3.5 for name, size in (("w", 8), ("v", 4))}
    parts = {
        f"{name} {rank}": nn.Parameter(value.chunk(2)[rank].clone()) for rank in ranks for name, value in wholes.items()
    }
    optimizer = optimizer_of(way, list(parts.items()))
    metrics = []
    for step in range(3):
        for name, param in parts.items():
            param.grad = param.detach() * (step + 1)
            wrong = step == 1 and (name.endswith("1") or fault == "missing everywhere")
            if wrong and fault.startswith("missing"):
                param.grad = None
            elif wrong:
                param.grad[0] = float(fault[:3])
        optimizer.step()
        stats = optimizer.stats() if way == "chain" else optimizer.attachment.stats()
        metrics.append(stats["RelativeWeightDecay"]["metric"].item())
    return {name: param.detach() for name, param in parts.items()}, metrics


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", GRADIENTS)
def test_gradients_that_are_wrong_on_one_rank_end_as_in_one_process(worlds, fault, way):
    ((whole, metrics),) = worlds.run(0, with_faulty_gradients, way, fault, True)
    assert "nan" in fault or "inf" in fault or all(param.isfinite().all() for param in whole.values())
    for params, numbers in worlds.run(2, with_faulty_gradients, way, fault, False):
        assert str(numbers) == str(metrics)
        assert all(torch.equal(param.nan_to_num(7.0), whole[name].nan_to_num(7.0)) for name, param in params.items())
    assert (metrics[1] == 0) == (fault == "missing everywhere")


def listed_twice_here(names: list[str]) -> list[str]:
    """One rank gives one tensor under two names, or one name twice; a correct call after that works."""
    one = parameter(3)
    other = one if names == ["w", "v"] and guilty() else parameter(3)
    params = [(names[0], one), (names[1] if guilty() else "v", other)]
    try:
        distwd.Plan.build(params)
    except distwd.PlanError as error:
        return [str(error), str(distwd.Plan.build([("w", one)]).numel)]
    return []


@pytest.mark.parametrize(("names", "message"), [(["w", "v"], r"\(tied\)"), (["w", "w"], "is listed twice")])
def test_a_tensor_listed_twice_on_one_rank_is_refused_on_every_rank(worlds, names, message):
    outcomes = worlds.run(2, listed_twice_here, names)
    assert outcomes[0] == outcomes[1]
    assert re.search(rf"^rank \d: . {'is the same tensor as . ' if 'tied' in message else ''}{message}", outcomes[0][0])
    assert outcomes[0][1] == "3"
