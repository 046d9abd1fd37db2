"""Tensors of one name and the same bits that are no copies: seeded alike on every rank, they are recognised by their first gradients."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from tests import layouts, runs
from tests.chains import CHAINS, transforms_of
from tests.layouts import submesh, whole_model
from tests.wraps import mesh_without_rank0


def seeded_experts() -> list[tuple[str, torch.nn.Parameter]]:
    """A dense layer that all ranks have, and an expert of each rank's own: as a seed on every rank makes them."""
    torch.manual_seed(0)
    return [("dense", torch.nn.Parameter(torch.randn(5, 3))), ("expert", torch.nn.Parameter(torch.randn(4, 3)))]


def gradients(kind: str) -> dict[str, torch.Tensor | None]:
    rank = dist.get_rank()
    torch.manual_seed(1)
    dense, expert = torch.randn(5, 3), torch.randn(4, 3)
    torch.manual_seed(2 + rank)
    return {
        "experts": {"dense": dense, "expert": torch.randn(4, 3)},
        "all different": {"dense": torch.randn(5, 3), "expert": torch.randn(4, 3)},
        "rounded differently": {"dense": dense * (1 + 0.004 * torch.randn(5, 3)), "expert": expert},
        "one is missing": {"dense": dense, "expert": None if rank == 0 else torch.randn(4, 3)},
        "one is not finite": {"dense": dense, "expert": expert / (rank != 1)},
    }[kind]


def outcome_of(kind: str, how: str = "chain", marked: str = "", **settings) -> list[str]:
    """The outcome of two steps on this rank, or of a plan before them; and whether a parameter changed in spite of an error."""
    import distwd

    params = seeded_experts()
    given = [param for _, param in params] if marked == "unnamed" else params
    layout = {"expert": distwd.Sharded()} if marked == "layout" else None
    rule = distwd.RelativeWeightDecay(0.1)
    if how == "attach":
        optimizer = torch.optim.AdamW(given, weight_decay=0.0)
        plan_of = distwd.attach(optimizer, rule, layout=layout, **settings)
    else:
        optimizer = plan_of = distwd.Chain(given, distwd.Adam(), rule, distwd.LR(0.1), layout=layout, **settings)
    if how == "plan first":
        assert plan_of.plan.numel == 15 + 12
    outcomes = []
    for _ in range(2):
        before = [param.detach().clone() for _, param in params]
        for name, param in params:
            param.grad = gradients(kind)[name]
        try:
            optimizer.step()
            outcomes.append(f"{plan_of.plan.numel} elements")
        except distwd.PlanError as error:
            changed = any(not torch.equal(old, param) for old, (_, param) in zip(before, params, strict=True))
            outcomes.append(f"{error}" + " CHANGED" * changed)
    return outcomes


@pytest.mark.parametrize("how", ["chain", "attach"])
def test_experts_that_were_seeded_alike_are_refused_on_every_rank_at_every_try(worlds, how):
    outcomes = worlds.run(3, outcome_of, "experts", how)
    first, second = outcomes[0]
    assert outcomes == [[first, second]] * 3
    assert first == second
    assert re.search(
        r"different gradients:\n  expert: rank 0: \[0:4, 0:3\] of \[4, 3\] \(plain\), gradient norm [\d.]+ \| rank 1: ",
        first,
    )
    assert "layout={pattern: Sharded(group)}" in first
    assert "dense" not in first
    assert "CHANGED" not in first


def test_a_step_that_finds_its_plan_built_compares_nothing(worlds):
    """It would cost a collective and a read, which a step is not to have; the plan has compared the parameters themselves."""
    assert worlds.run(3, outcome_of, "experts", "plan first") == [["27 elements"] * 2] * 3


def test_without_names_names_are_asked_for(worlds):
    for first, _ in worlds.run(2, outcome_of, "all different", "chain", "unnamed"):
        assert "param 0: rank 0: " in first
        assert "pass model.named_parameters()" in first


def test_a_mark_decides_what_they_are(worlds):
    assert worlds.run(3, outcome_of, "experts", "chain", "layout") == [["51 elements"] * 2] * 3


@pytest.mark.parametrize("kind", ["rounded differently", "one is missing", "one is not finite"])
def test_copies_whose_gradients_cannot_be_judged_are_believed(worlds, kind):
    """Kernels that add up in another order are no reason to stop, nor is a rank without a gradient, nor NaN and infinity."""
    assert worlds.run(3, outcome_of, kind) == [["27 elements"] * 2] * 3


def unchecked() -> list[str]:
    return outcome_of("all different", check_replicas=False)


def test_the_comparison_of_gradients_can_be_turned_off(worlds):
    assert worlds.run(2, unchecked) == [["27 elements"] * 2] * 2


def one_of_many() -> str:
    """Seven copies are trained as one, the eighth is not."""
    import distwd

    param = torch.nn.Parameter(torch.ones(40, 30))
    torch.manual_seed(dist.get_rank() == 7)
    param.grad = torch.randn(40, 30)
    try:
        distwd.Chain([("w", param)], distwd.RelativeWeightDecay(), distwd.LR(0.1)).step()
    except distwd.PlanError as error:
        return str(error).split("\n")[1]
    return ""


def test_one_of_eight_is_enough_and_is_named(worlds):
    (outcomes,) = set(worlds.run(8, one_of_many))
    assert re.search(
        r"w: rank 0, 1, 2, 3, 4, 5, 6: .* gradient norm ([\d.]+) \| rank 7: .* gradient norm (?!\1)", outcomes
    )


def first_wires(layout: str) -> list[int]:
    import distwd

    held = layouts.place(layout, whole_model(runs.PARAMS_SEED))
    chain = distwd.Chain(held.items(), *transforms_of(CHAINS["mad_of_update"].parts), layout=held.marks)
    return [len(wire) for wire in runs.train_chain(chain, layout, held, 3).wires]


def test_it_costs_one_collective_once_and_only_where_there_are_copies(worlds):
    (without,) = {tuple(counts) for counts in worlds.run(2, first_wires, "fsdp2")}
    (copied,) = {tuple(counts) for counts in worlds.run(2, first_wires, "ddp2")}
    assert copied == (without[0] + 1, 1, 1)
    assert without[1:] == (1, 1)


def one_holds_nothing() -> str:
    """Ranks 1 and 2 hold copies of what rank 0 is no part of and has no gradient for."""
    import distwd

    mesh, rank = mesh_without_rank0(), dist.get_rank()
    param = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Replicate()]))
    if rank:
        torch.manual_seed(rank)
        param.grad = DTensor.from_local(torch.randn(4, 3), mesh, [Replicate()], run_check=False)
    try:
        distwd.Chain([("w", param)], distwd.RelativeWeightDecay(), distwd.LR(0.1)).step()
    except distwd.PlanError as error:
        return str(error)
    return "accepted"


def test_a_rank_that_holds_nothing_raises_too(worlds):
    (outcomes,) = set(worlds.run(3, one_holds_nothing))
    assert "w: rank 0: [nothing, nothing] of [4, 3] (R), no gradient | rank 1: " in outcomes


def copies_over_pairs() -> int:
    """Ranks 0 and 1 hold one half, 2 and 3 the other: copies within the pairs only, whose numbers are not mixed up."""
    import distwd

    pair = dist.get_rank() // 2
    torch.manual_seed(pair)
    param = torch.nn.Parameter(torch.randn(3 + pair, 5))
    param.grad = torch.randn(3 + pair, 5)
    layout = {"w": distwd.Sharded(submesh("outer", 2, 2, names=("outer", "inner")).get_group())}
    chain = distwd.Chain([("w", param)], distwd.RelativeWeightDecay(), distwd.LR(0.1), layout=layout)
    chain.step()
    return chain.plan.numel


def test_copies_of_pieces_are_compared_piece_by_piece(worlds):
    assert worlds.run(4, copies_over_pairs) == [7 * 5] * 4
