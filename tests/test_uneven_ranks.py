"""DDP's join(): ranks with different numbers of batches. What stands in for a rank that is done does so for DDP alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from distwd import LR, Adam, Chain, RelativeWeightDecay, WeightDecay, attach


def uneven(kind: str, rule: str, throws: bool, is_planned: bool) -> tuple[int, str]:
    """Rank 1 has two batches, rank 0 four. Returns how many steps were taken, and the error."""
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 3))
    decay = WeightDecay(0.1) if rule == "absolute" else RelativeWeightDecay(0.1)
    if kind == "chain":
        optimizer = Chain(model.named_parameters(), Adam(), decay, LR(0.1))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0)
        attach(optimizer, decay)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    if is_planned:
        step()
    steps = 0
    try:
        with model.join(throw_on_early_termination=throws):
            for _ in range(4 if dist.get_rank() == 0 else 2):
                step()
                steps += 1
    except (ValueError, RuntimeError) as error:
        return steps, f"{type(error).__name__}: {error}"
    return steps, ""


@pytest.mark.parametrize("kind", ["chain", "attach"])
@pytest.mark.parametrize("is_planned", [True, False])
def test_a_number_over_ranks_is_refused_inside_of_join_on_every_rank(worlds, kind, is_planned):
    for steps, error in worlds.run(2, uneven, kind, "relative", False, is_planned):
        assert steps == 0
        assert error.startswith(
            "ValueError: RelativeWeightDecay needs a metric over all ranks, and inside DDP's join()"
        )
        assert "throw_on_early_termination=True" in error


@pytest.mark.parametrize("kind", ["chain", "attach"])
def test_absolute_rules_need_nothing_of_ranks_that_are_done(worlds, kind):
    assert worlds.run(2, uneven, kind, "absolute", False, False) == [(4, ""), (2, "")]


@pytest.mark.parametrize("kind", ["chain", "attach"])
def test_where_all_ranks_stop_with_the_first_a_number_is_had(worlds, kind):
    for steps, error in worlds.run(2, uneven, kind, "relative", True, False):
        assert steps == 2
        assert error.startswith("RuntimeError")
