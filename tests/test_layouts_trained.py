"""Models trained by their own backward, wrapped as people wrap them: the parameters end with the bits of one process.

All ranks see the same inputs and there are two or four of them, so their mean gradient is exactly one process's.
Five and seven rows over four ranks leave uneven and empty shards. The embedding is tied to the head.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from tests.layouts import mesh_of, whole_of
from tests.one_process import relative, seen_of
from tests.releases import needs_torch
from tests.runs import differing
from tests.wraps import fsdp1


class Tied(nn.Module):
    """A token model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 6)
        self.up = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.down = nn.Linear(10, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        return self.head(self.down(self.norm(self.up(hidden)).relu()) + hidden)


def by_blocks(model: Tied, ranks: int | tuple[int, int], **settings) -> nn.Module:
    mesh = mesh_of(2, 2, names=("replicate", "shard")) if ranks == (2, 2) else mesh_of(ranks, names=("dp",))
    for block in (model.up, model.down):
        fully_shard(block, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def without_norm(model: Tied) -> nn.Module:
    """The norm stays plain, and every rank's own business."""
    return fully_shard(model, mesh=mesh_of(2, names=("dp",)), ignored_params=set(model.norm.parameters()))


def fsdp1_without_norm(model: Tied) -> nn.Module:
    device = torch.device("cpu")
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=device, ignored_modules=[model.norm])


def columns(param: nn.Parameter) -> Shard:
    return Shard(param.ndim - 1)


WAYS = {
    "ddp": (2, DistributedDataParallel),
    "fsdp4": (4, lambda model: by_blocks(model, 4)),
    "hsdp": (4, lambda model: by_blocks(model, (2, 2))),
    "kept after forward": (2, lambda model: by_blocks(model, 2, reshard_after_forward=False)),
    "columns": (2, lambda model: by_blocks(model, 2, shard_placement_fn=columns)),
    "ignored": (2, without_norm),
    "offload": (4, lambda model: by_blocks(model, 4, offload_policy=CPUOffloadPolicy(pin_memory=False))),
}
WAYS["FSDP1 without the norm"] = (2, fsdp1_without_norm)
STRATEGIES = [("FULL_SHARD", 4), ("SHARD_GRAD_OP", 2), ("HYBRID_SHARD", 4), ("_HYBRID_SHARD_ZERO2", 4), ("NO_SHARD", 2)]
WAYS |= {
    f"{strategy} {'orig' if orig else 'flat'}": (ranks, fsdp1(strategy, orig))
    for strategy, ranks in STRATEGIES
    for orig in (True, False)
}


def marks_of(model: nn.Module) -> dict:
    import distwd

    return distwd.Sharded.from_fsdp1(model) if isinstance(model, FullyShardedDataParallel) else {}


def whole_params(model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return {name: param.detach().clone() for name, param in model.named_parameters()}
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: whole_of(param) for name, param in model.named_parameters()}


def train(model: nn.Module, how: str) -> tuple[dict, list[dict], int]:
    """The whole parameters after three steps, what was measured in each, and the number of elements."""
    optimizer, rule = relative(how, model.named_parameters(), marks_of(model))
    seen = []
    for step in range(3):
        optimizer.zero_grad()
        tokens = torch.arange(12).view(3, 4).add(step) % 7
        model(tokens).log_softmax(-1)[..., 0].mean().backward()
        optimizer.step()
        seen.append(seen_of(rule))
    return whole_params(model), seen, rule.plan.numel


def trained(way: str, how: str) -> tuple[dict, list[dict], int]:
    return train(WAYS[way][1](Tied()), how)


@functools.cache
def alone(how: str) -> tuple[dict, list[dict], int]:
    return train(Tied(), how)


# Other ways, DDP and FSDP1, are right on all releases.
AVERAGES = needs_torch("2.9", "FSDP2 on gloo adds gradients up, and does not average them")
BY_FSDP2 = ("fsdp4", "hsdp", "kept after forward", "columns", "ignored", "offload")


@pytest.mark.parametrize("how", ["chain", "attach"])
@pytest.mark.parametrize("way", [pytest.param(way, marks=AVERAGES if way in BY_FSDP2 else ()) for way in WAYS])
def test_trained_on_ranks_is_trained_alone(worlds, way, how):
    params, seen, numel = alone(how)
    for ours, measured, counted in worlds.run(WAYS[way][0], trained, way, how):
        assert differing(ours, params) == []
        assert measured == seen
        assert counted == numel


def test_decay_matters_here():
    """Without the rules the parameters end elsewhere: the test above is about decay."""
    bare = Tied()
    optimizer = torch.optim.AdamW(bare.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(3):
        optimizer.zero_grad()
        bare(torch.arange(12).view(3, 4).add(step) % 7).log_softmax(-1)[..., 0].mean().backward()
        optimizer.step()
    gaps = [(p - q).abs().max() for p, q in zip(bare.parameters(), alone("chain")[0].values(), strict=True)]
    assert max(gaps) > 1e-4


# --- groups by the whole shape ----------------------------------------------------------------------------------------


def by_dimensions(strategy: str | None) -> tuple[dict, list[float]]:
    """Matrices decay, vectors do not, and every group has a number of its own; FSDP1's pieces are all vectors."""
    import distwd

    model = Tied() if strategy is None else fsdp1(strategy, True)(Tied())
    rule = distwd.RelativeWeightDecay(0.5, norm_input="params", scope="group")
    chain = distwd.Chain(
        distwd.param_groups(model, 0.5), distwd.Adam(foreach=True), rule, distwd.LR(0.01), layout=marks_of(model)
    )
    for step in range(2):
        chain.zero_grad()
        model(torch.arange(12).view(3, 4).add(step) % 7).log_softmax(-1)[..., 0].mean().backward()
        chain.step()
    return whole_params(model), [
        number.item() for number in chain.stats()["RelativeWeightDecay"]["coefficient"].values()
    ]


@pytest.mark.parametrize("strategy", [strategy for strategy, ranks in STRATEGIES if ranks == 4])
def test_rules_by_dimension_see_the_whole_shape_under_fsdp1(worlds, strategy):
    params, coefficients = by_dimensions(None)
    assert coefficients[1] == 0 < coefficients[0]
    for ours, numbers in worlds.run(4, by_dimensions, strategy):
        assert differing(ours, params) == []
        assert numbers == coefficients
