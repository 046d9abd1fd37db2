"""`group=`: the ranks that together hold the model may be some of a job's; no other rank takes part."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests import runs
from tests.chains import CHAINS, transforms_of
from tests.layouts import gather, mesh_of, submesh, whole_model
from tests.runs import PARAMS_SEED, alone, differing
from tests.wire import Wire


def half() -> dist.ProcessGroup:
    """The two ranks next to this one in a world of four."""
    return submesh("inner", 2, 2, names=("outer", "inner")).get_group()


def spread_over(half_mesh, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: distribute_tensor(value, half_mesh, [Shard(0)]) for name, value in whole.items()}


def two_models_in_one_job(different: bool) -> tuple[dict, list[int], int]:
    """Ranks 0 and 1 hold an actor, 2 and 3 a critic; with `different`, the critic has another rule and other steps."""
    import distwd

    mesh = submesh("inner", 2, 2, names=("outer", "inner"))
    critic = dist.get_rank() >= 2
    chain_name = "cautious_var" if critic and different else "mad_of_update"
    held = {n: torch.nn.Parameter(v) for n, v in spread_over(mesh, whole_model(PARAMS_SEED)).items()}
    chain = distwd.Chain(held.items(), *transforms_of(CHAINS[chain_name].parts), group=half())
    counts = []
    for step in range(3):
        grads = spread_over(mesh, runs.grads_of(step))
        for name, param in held.items():
            param.grad = grads[name]
        with Wire() as wire:
            chain.step()
        counts.append(len(wire.calls))
    mine = {name: param.detach().full_tensor() for name, param in held.items()}
    return mine, counts[1:], chain.phases


def test_two_models_of_one_job_do_not_meet(worlds):
    ranks = worlds.run(4, two_models_in_one_job, True)
    for rank, (params, counts, phases) in enumerate(ranks):
        assert differing(params, alone(worlds, "cautious_var" if rank >= 2 else "mad_of_update").params) == []
        assert (counts, phases) == ([1, 1], 1)


def only_some_ranks() -> str:
    """The others never call distwd at all."""
    import distwd

    group = half()
    if dist.get_rank() >= 2:
        return "not asked"
    return str(distwd.global_metric([torch.ones(3)], "sum", group=group).item())


def test_ranks_outside_the_group_are_not_waited_for(worlds):
    assert worlds.run(4, only_some_ranks) == ["3.0", "3.0", "not asked", "not asked"]


def not_a_member() -> str:
    import distwd

    group = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        return "member"
    try:
        distwd.Chain(
            [torch.nn.Parameter(torch.ones(3))], distwd.RelativeWeightDecay(), distwd.LR(0.1), group=group
        ).step()
    except ValueError as error:
        return str(error)
    return "nothing"


def test_a_rank_outside_the_group_is_refused(worlds):
    outcomes = worlds.run(3, not_a_member)
    assert outcomes[:2] == ["member", "member"]
    assert "group" in outcomes[2]


def groups_made() -> int:
    runs.train("fsdp2", "plain_adam")  # the harness makes its mesh
    before = dist.distributed_c10d._world.group_count
    runs.train("fsdp2", "mad_of_update")
    return dist.distributed_c10d._world.group_count - before


def test_no_group_is_made(worlds):
    assert worlds.run(2, groups_made) == [0, 0]


# --- gradients that lie otherwise than their parameters ---------------------------------------------------------------


def gradients_in_other_placements() -> dict:
    import distwd

    mesh = mesh_of(2, names=("dp",))
    held = {n: torch.nn.Parameter(v) for n, v in spread_over(mesh, whole_model(PARAMS_SEED)).items()}
    chain = distwd.Chain(held.items(), *transforms_of(CHAINS["l2_of_grad"].parts))
    for step in range(3):
        for name, grad in runs.grads_of(step).items():
            held[name].grad = DTensor.from_local(grad, mesh, [Replicate()], run_check=False)
        chain.step()
    return gather(held)


def test_gradients_may_be_replicated_where_parameters_are_sharded(worlds):
    reference = alone(worlds, "l2_of_grad").params
    for params in worlds.run(2, gradients_in_other_placements):
        assert differing(params, reference) == []
