"""The Lightning recipes: Fabric and Trainer train what the same loop trains without them, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DistributedSampler

from distwd import LR, Adam, Chain, RelativeWeightDecay
from tests import recipes
from tests.layouts import mesh_of
from tests.runs import differing

OF_UPDATES = RelativeWeightDecay(0.1)
OF_GRADIENTS = RelativeWeightDecay(0.1, norm_input="grad", metric="l2")
FABRIC = {"chain": OF_UPDATES, "attach": OF_UPDATES}
TRAINER = {"chain": OF_UPDATES, "attach": OF_GRADIENTS, "attach to the gradient": OF_GRADIENTS}


def by_hand(decay: str, rule, program: str) -> dict[str, torch.Tensor]:
    """Two ranks, FSDP2: two micro-batches of four sequences a step, clipped, lr up in a line."""
    small = recipes.small()
    model = small.ByteModel()
    for block in model.blocks:
        fully_shard(block, mesh=mesh_of(2, names=("dp",)))
    fully_shard(model, mesh=mesh_of(2, names=("dp",)))
    if decay == "chain":
        optimizer = Chain(recipes.grouped(model, "weight_decay"), Adam(), rule, LR(1e-2))
    else:
        optimizer = recipes.adamw(model, rule, "gradient" if "gradient" in decay else "lr")
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4)
    for step in batches_of(program, small):
        for number, text in enumerate(step):
            # The Trainer reduces the gradients of every micro-batch.
            model.set_requires_gradient_sync(number == 1 or program == "lightning_trainer.py")
            (model(text) / 2).backward()
        # Lightning clips the parameters of the optimizer, in the order of its groups.
        params = [param for group in optimizer.param_groups for param in group["params"]]
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return recipes.whole(model)


def batches_of(program: str, small) -> torch.Tensor:
    """(steps, micro-batches, 4, bytes) of this rank: as the recipe deals them out, or as Lightning's shuffling sampler does."""
    rank = dist.get_rank()
    if program == "lightning_fabric.py":
        return small.read_sequences(96).view(6, 2, 2, 4, -1)[:, :, rank]
    data = small.read_sequences(48)
    sampler = DistributedSampler(range(48), 2, rank, shuffle=True, seed=0)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(data[list(sampler)].view(3, 2, 4, -1))
    return torch.cat(epochs)


def expected_of(worlds, decay: str, rule, program: str) -> dict[str, torch.Tensor]:
    expected = recipes.on_two_ranks(worlds, by_hand, decay, rule, program)
    assert recipes.apart(expected, recipes.on_two_ranks(worlds, by_hand, "attach", None, program)) > 1e-4
    return expected


@pytest.mark.parametrize("decay", FABRIC)
def test_fabric_trains_as_the_loop_without_it(worlds, tmp_path, decay):
    program = "lightning_fabric.py"
    expected = expected_of(worlds, decay, FABRIC[decay], program)
    recipes.run(program, tmp_path, "--decay", decay)
    assert differing(recipes.trained(tmp_path), expected) == []
    if decay == "attach":
        (tmp_path / "model.pt").unlink()
        recipes.run(program, tmp_path, "--decay", decay, "--resume")
        assert differing(recipes.trained(tmp_path), expected) == []


@pytest.mark.parametrize("decay", TRAINER)
def test_the_trainer_computes_gradients_inside_the_step_and_decay_waits_for_them(worlds, tmp_path, decay):
    program = "lightning_trainer.py"
    expected = expected_of(worlds, decay, TRAINER[decay], program)
    recipes.run(program, tmp_path, "--decay", decay)
    assert differing(recipes.trained(tmp_path), expected) == []
    if decay == "chain":
        (tmp_path / "model.pt").unlink()
        recipes.run(program, tmp_path, "--decay", decay, "--resume")
        assert differing(recipes.trained(tmp_path), expected) == []
