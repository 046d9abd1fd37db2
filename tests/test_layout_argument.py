"""`layout=`: tensors whose sharding no DTensor shows, on real ranks: FSDP1, hand-cut shards, hidden expert parallelism."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

from tests import layouts
from tests.layouts import MARKED, submesh, whole_model

STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD")


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.LayerNorm(13), torch.nn.Linear(13, 3))


def fsdp1(strategy: str, use_orig_params: bool) -> torch.nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    mesh = {"device_mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))} if strategy[0] == "H" else {}
    return FullyShardedDataParallel(
        small_model(),
        sharding_strategy=getattr(ShardingStrategy, strategy),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
        **mesh,
    )


def numbers_of_fsdp1(strategy: str, use_orig_params: bool) -> tuple[list[float], int, str]:
    """Metrics of the parameters after two steps, the number of elements, and the outcome without a layout."""
    import distwd

    model = fsdp1(strategy, use_orig_params)
    layout = distwd.Sharded.from_fsdp1(model)
    rule = distwd.RelativeWeightDecay(0.1, norm_input="params", metric="std")
    chain = distwd.Chain(model.named_parameters(), distwd.Adam(), rule, distwd.LR(0.01), layout=layout)
    metrics = []
    for _ in range(2):
        model(torch.linspace(-1, 1, 21).view(3, 7)).square().mean().backward()
        chain.step()
        chain.zero_grad()
        metrics.append(chain.stats()["RelativeWeightDecay"]["metric"].item())
    try:
        distwd.Plan.build(model.named_parameters())
        outcome = "accepted"
    except distwd.PlanError as error:
        outcome = str(error)
    return metrics, chain.plan.numel, outcome


def numbers_alone() -> list[float]:
    """The same training by torch alone, in one process: std in float64, decay by hand."""
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    metrics = []
    for _ in range(2):
        model.zero_grad()
        model(torch.linspace(-1, 1, 21).view(3, 7)).square().mean().backward()
        std = torch.cat([p.detach().flatten() for p in model.parameters()]).double().std()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 - 0.01 * 0.1 * std.item())
        optimizer.step()
        metrics.append(std.item())
    return metrics


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_fsdp1_with_its_layout_equals_one_process(worlds, strategy, use_orig_params):
    ranks = worlds.run(4, numbers_of_fsdp1, strategy, use_orig_params)
    expected = numbers_alone()
    for metrics, numel, outcome in ranks:
        assert metrics == pytest.approx(expected, rel=1e-6)
        assert numel == 172
        if strategy == "NO_SHARD":
            assert outcome == "accepted"
        else:  # shards in plain tensors are not taken for copies, and the way out is named
            assert "from_fsdp1" in outcome
    assert len({tuple(metrics) for metrics, _, _ in ranks}) == 1


def counted(marked: bool) -> dict[str, float | str]:
    """Ones in every element: the sum is the number of elements of the whole model."""
    import distwd

    outer, inner = submesh("outer", 2, 2, names=("outer", "inner")), submesh("inner", 2, 2, names=("outer", "inner"))
    rank, pair = dist.get_rank(), inner.get_group()
    uneven = torch.ones(5 if rank % 2 else 0, 3)  # a whole of 5 rows, cut over the pair: 0 and 5
    torch.manual_seed(rank % 2)  # experts differ within the pair, and are copies across
    expert = torch.rand(2, 4).sign()
    hidden = distribute_tensor(torch.full((4, 3), 1.0 + rank % 2), outer, [Shard(0)])
    tensors = [("uneven", uneven), ("expert", expert), ("hidden", hidden), ("copied", torch.ones(6))]
    layout = {"unev*": distwd.Sharded(pair), lambda name, tensor: name in ("expert", "hidden"): distwd.Sharded(pair)}
    try:
        plan = distwd.Plan.build(tensors, layout=layout if marked else None)
    except distwd.PlanError as error:
        return {"error": str(error)}
    return {
        "l0": plan.metric([t for _, t in tensors], "l0").item(),
        "sum": plan.metric([t for _, t in tensors], "sum").item(),
    }


def test_marked_shards_count_once(worlds):
    # 15 rows of uneven, 2 experts of 8, 2 hidden experts of 12 (ones and twos), and one copy of 6.
    assert worlds.run(4, counted, True) == [{"l0": 15 + 16 + 24 + 6, "sum": 15 + 16 + 12 + 24 + 6}] * 4


def test_unmarked_shards_are_refused_alike_on_every_rank(worlds):
    ranks = worlds.run(4, counted, False)
    assert len({outcome["error"] for outcome in ranks}) == 1
    for name in ("uneven", "hidden"):
        assert name in ranks[0]["error"]


def without_marks(layout: str) -> str:
    import distwd

    try:
        distwd.Plan.build(layouts.place(layout, whole_model(0)).items())
    except distwd.PlanError as error:
        return str(error)
    return "accepted"


SPEAKING = ("experts_named", "fsdp1_whole")  # names show the one, and copies the other


@pytest.mark.parametrize("layout", MARKED)
def test_what_needs_a_mark_is_refused_without_it_and_the_mark_is_named(worlds, layout):
    (outcome,) = set(worlds.run(MARKED[layout].ranks, without_marks, layout))
    if layout in SPEAKING:
        assert outcome == "accepted"
    else:
        assert "Sharded.from_fsdp1(model) for FSDP1, {pattern: Sharded(group)}" in outcome
        assert "experts.weight" in outcome or not layout.startswith("experts")


def refusals() -> list[str]:
    import distwd

    outcome = []
    for layout in ({"nothing*": distwd.Sharded()}, {"w": "sharded"}, {3: distwd.Sharded()}, ["w"]):
        try:
            distwd.Plan.build([("w", torch.ones(2))], layout=layout)
            outcome.append("accepted")
        except ValueError as error:
            outcome.append(str(error))
    return outcome


def test_a_layout_that_cannot_be_meant_is_refused(worlds):
    ranks = worlds.run(2, refusals)
    assert ranks[0] == ranks[1]
    nothing, no_mark, no_pattern, no_dict = ranks[0]
    assert "'nothing*' matches no parameter on any rank" in nothing
    assert "must be Sharded(group) or Replicated(group)" in no_mark
    assert "neither a glob of names nor a predicate" in no_pattern
    assert "must be a dict" in no_dict
