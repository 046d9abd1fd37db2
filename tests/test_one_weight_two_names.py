"""A weight that is tied, and comes under two names: counted once, or the user is told both names."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from distwd import LR, Adam, Chain, Plan, PlanError, RelativeWeightDecay, WeightDecay, attach, global_metric


def tied_by_data() -> list[tuple[str, nn.Parameter]]:
    embedding, head = nn.Parameter(torch.randn(7, 4)), nn.Parameter(torch.empty(4, 7))
    head.data = embedding.data.t()
    return [("embedding", embedding), ("head", head)]


def step_of_chain(named, rule) -> None:
    Chain(named, Adam(), rule, LR(0.1)).step()


def step_of_adamw(named, rule) -> None:
    optimizer = torch.optim.AdamW(named, lr=0.1, weight_decay=0)
    attach(optimizer, rule)
    optimizer.step()


@pytest.mark.parametrize(
    "use",
    [step_of_chain, step_of_adamw, lambda named, _: Plan.build(named), lambda named, _: global_metric(named, "l1")],
)
@pytest.mark.parametrize("rule", [WeightDecay(0.5), RelativeWeightDecay(0.5)])
def test_two_parameters_in_one_memory_are_refused_by_name(use, rule):
    named = tied_by_data()
    before = named[0][1].detach().clone()
    for _, param in named:
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"head lies in the memory of embedding.*make it one parameter"):
        use(named, rule)
    assert torch.equal(named[0][1], before)


def test_pieces_of_one_memory_are_no_ties():
    flat = torch.arange(6.0)
    assert global_metric([flat[:2], flat[2:], flat[:0], flat[:0]], "l1") == 15


def pipeline(tied: str, how: str) -> tuple[list[str], float]:
    """Two stages; the table lies on both. Returns the warnings and the number of all parameters."""
    torch.manual_seed(0)
    rank, table = dist.get_rank(), torch.randn(9, 4)
    head, inner = table, torch.full((4, 4), 2.0 + rank)
    if how == "constant":
        table = head = torch.ones(9, 4)
    if how == "different":
        head = table + 1e-6
    if how == "float64 and float32":
        head = table.double()
    mine = [("embed", table), (f"inner{rank}", inner)] if rank == 0 else [(f"inner{rank}", inner), (tied, head)]
    if how == "begins alike everywhere":
        mine = [(f"layer{2 * rank + number}.A", torch.arange(1.0, 17.0).log()) for number in range(2)]
    named = [(name, nn.Parameter(value.clone())) for name, value in mine]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = Plan.build(named, check_replicas=how != "unchecked")
    return [str(one.message) for one in caught], plan.metric([param for _, param in named], "l1").item()


def test_a_weight_tied_across_stages_under_two_names_is_pointed_out(worlds):
    for told, _ in worlds.run(2, pipeline, "head", "alike"):
        (text,) = told
        assert "the same bits by different names: " in text
        assert "embed and head" in text or "head and embed" in text
        assert "give both one name" in text


def test_under_one_name_it_counts_once(worlds):
    torch.manual_seed(0)
    once = torch.randn(9, 4).double().abs().sum().item() + 16 * 2 + 16 * 3
    for told, number in worlds.run(2, pipeline, "embed", "alike"):
        assert told == []
        assert number == pytest.approx(once, rel=1e-6)


@pytest.mark.parametrize(
    "how", ["constant", "different", "float64 and float32", "begins alike everywhere", "unchecked"]
)
def test_what_only_looks_tied_is_left_alone(worlds, how):
    assert all(told == [] for told, _ in worlds.run(2, pipeline, "head", how))


def tied_shards() -> list[str]:
    """Each stage is cut over two ranks, in the same way."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    torch.manual_seed(0)
    table, stage = torch.randn(5, 3), mesh["pp"].get_local_rank()
    param = nn.Parameter(distribute_tensor(table, mesh["dp"], [Shard(0)], src_data_rank=None))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Plan.build([("embed" if stage == 0 else "head", param)])
    return [str(one.message) for one in caught]


def test_shards_of_a_tied_weight_are_pointed_out(worlds):
    for told in worlds.run(4, tied_shards):
        assert len(told) == 1
        assert "embed" in told[0]
        assert "head" in told[0]


def test_a_warning_that_is_an_error_is_one_on_every_rank(worlds):
    for text in worlds.run(2, strict_pipeline):
        assert "give both one name" in text


def strict_pipeline() -> str:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            Plan.build([(f"w{dist.get_rank()}", param)])
        except (UserWarning, PlanError) as error:
            return str(error)
    return ""
