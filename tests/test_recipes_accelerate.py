"""launch/recipes/accelerate_fsdp2.py: what accelerate trains is what the same loop trains without it, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from distwd import LR, Adam, Chain, RelativeWeightDecay
from tests import recipes
from tests.layouts import mesh_of
from tests.runs import differing


def by_hand(decay: str) -> dict[str, torch.Tensor]:
    """Two ranks, FSDP2: two micro-batches of four sequences a step, clipped, lr up in a line."""
    small = recipes.small()
    model = small.ByteModel()
    for block in model.blocks:
        fully_shard(block, mesh=mesh_of(2, names=("dp",)))
    fully_shard(model, mesh=mesh_of(2, names=("dp",)))
    if decay == "chain":
        optimizer = Chain(recipes.grouped(model, "weight_decay"), Adam(), RelativeWeightDecay(), LR(1e-2))
    else:
        optimizer = recipes.adamw(model, None if decay == "none" else RelativeWeightDecay())
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4)
    batches = small.read_sequences(96).view(6, 2, 2, 4, -1)[:, :, dist.get_rank()]
    for step in batches:
        for number, text in enumerate(step):
            model.set_requires_gradient_sync(number == 1)
            (model(text) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # accelerate steps a schedule once for each rank.
        scheduler.step()
        scheduler.step()
    return recipes.whole(model)


@pytest.mark.parametrize("decay", ["chain", "attach"])
def test_accelerate_trains_as_the_loop_without_it_and_resumes_where_it_stopped(worlds, tmp_path, decay):
    expected = recipes.on_two_ranks(worlds, by_hand, decay)
    recipes.run("accelerate_fsdp2.py", tmp_path, "--decay", decay)
    assert differing(recipes.trained(tmp_path), expected) == []
    (tmp_path / "model.pt").unlink()
    recipes.run("accelerate_fsdp2.py", tmp_path, "--decay", decay, "--resume")
    assert differing(recipes.trained(tmp_path), expected) == []
    assert recipes.apart(expected, recipes.on_two_ranks(worlds, by_hand, "none")) > 1e-4


def test_decay_may_be_attached_after_prepare_too(worlds, tmp_path):
    recipes.run("accelerate_fsdp2.py", tmp_path, "--decay", "attach after prepare")
    assert differing(recipes.trained(tmp_path), recipes.on_two_ranks(worlds, by_hand, "attach")) == []
