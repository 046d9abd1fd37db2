"""What surrounds a step in real training, on two real ranks, with a model's own backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from distwd import LR, Adam, Chain, RelativeWeightDecay, WeightDecay, attach
from tests import layouts, recipes
from tests.layouts import mesh_of
from tests.runs import differing

STEPS, MICRO_BATCHES = 3, 2
WAYS = ("chain", "attach", "gradient")


def optimizer_of(way: str, model: torch.nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    rule = RelativeWeightDecay(0.1, norm_input="grad", metric="l2") if way == "gradient" else RelativeWeightDecay(0.1)
    if way == "chain":
        return Chain(model.named_parameters(), Adam(), rule, LR(lr))
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=lr, weight_decay=0)
    if way != "bare":
        attach(optimizer, rule, coupling="gradient" if way == "gradient" else "lr")
    return optimizer


def shard(model: torch.nn.Module, **policy) -> torch.nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh_of(2, names=("dp",)), **policy)
    return fully_shard(model, mesh=mesh_of(2, names=("dp",)), **policy)


def batches() -> torch.Tensor:
    """(steps, ranks, micro-batches, 4, bytes)"""
    return recipes.small().read_sequences(STEPS * 2 * MICRO_BATCHES * 4).view(STEPS, 2, MICRO_BATCHES, 4, -1)


def accumulated(way: str, kind: str) -> dict[str, torch.Tensor]:
    """Gradients meet the other rank with the last micro-batch only."""
    model = recipes.small().ByteModel()
    forward = DistributedDataParallel(model) if kind == "ddp" else shard(model)
    optimizer = optimizer_of(way, model)
    for step in batches()[:, dist.get_rank()]:
        for number, text in enumerate(step, start=1):
            if kind == "ddp":
                forward.require_backward_grad_sync = number == len(step)  # what no_sync() sets
            else:
                model.set_requires_gradient_sync(number == len(step))
            (forward(text) / len(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return recipes.whole(model)


def accumulated_alone(way: str) -> dict[str, torch.Tensor]:
    """One process: each rank's gradients summed by themselves, then their mean."""
    model = recipes.small().ByteModel()
    optimizer = optimizer_of(way, model)
    for step in batches():
        parts: list[Sequence[torch.Tensor]] = []
        for of_rank in step:
            model.zero_grad()
            for text in of_rank:
                (model(text) / len(of_rank)).backward()
            parts.append([param.grad for param in model.parameters()])
        for param, first, second in zip(model.parameters(), *parts, strict=True):
            param.grad = (first + second) / 2
        optimizer.step()
    return recipes.whole(model)


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
@pytest.mark.parametrize("way", WAYS)
def test_accumulated_gradients_without_sync_decay_once(worlds, way, kind):
    (alone,), (bare,) = (worlds.run(0, accumulated_alone, each) for each in (way, "bare"))
    for params in worlds.run(2, accumulated, way, kind):
        assert differing(params, alone) == []
    assert recipes.apart(alone, bare) > 1e-4


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module) -> None:
    """torch's moving average. FSDP2 refuses the deep copy that `AveragedModel` makes, so the average is a second sharded model."""
    get_ema_multi_avg_fn(0.5)(list(average.parameters()), list(model.parameters()), None)


def trained(way: str, around: str = "") -> dict[str, torch.Tensor]:
    """FSDP2, a batch a step."""
    model = recipes.small().ByteModel()
    if around == "activation checkpointing":
        for number, block in enumerate(model.blocks):
            model.blocks[number] = checkpoint_wrapper(block)
    shard(model)
    optimizer = optimizer_of(way, model)
    average = shard(recipes.small().ByteModel()) if around == "average" else None
    for step in batches()[:, dist.get_rank(), 0]:
        model(step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            update_average(average, model)
    return {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in recipes.whole(model).items()}


@pytest.mark.parametrize("around", ["activation checkpointing", "average"])
@pytest.mark.parametrize("way", WAYS)
def test_what_stands_around_changes_no_bit(worlds, way, around):
    straight = worlds.run(2, trained, way)
    assert [differing(a, b) for a, b in zip(worlds.run(2, trained, way, around), straight, strict=True)] == [[], []]


def averaged(way: str) -> float:
    """How far a moving average of sharded weights is from one made of the whole weights."""
    model = shard(recipes.small().ByteModel())
    optimizer = optimizer_of(way, model)
    average = shard(recipes.small().ByteModel())
    expected = recipes.whole(average)
    for step in batches()[:, dist.get_rank(), 0]:
        model(step).backward()
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, model)
        expected = {name: (expected[name] + value) / 2 for name, value in recipes.whole(model).items()}
    return recipes.apart(recipes.whole(average), expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_moving_average_of_sharded_weights_is_that_of_the_whole(worlds, way):
    assert max(worlds.run(2, averaged, way)) < 1e-6


def in_mixed_precision(way: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    model = shard(recipes.small().ByteModel(), mp_policy=policy)
    named = list(model.named_parameters())
    if way == "chain":
        optimizer: torch.optim.Optimizer = Chain(named, Adam(), WeightDecay(0.3), LR(0.01))
    else:
        optimizer = torch.optim.AdamW(named, lr=0.01, weight_decay=0.3 if way == "torch" else 0)
    if way == "attach":
        attach(optimizer, WeightDecay(0.3))
    for step in batches()[:, dist.get_rank(), 0]:
        model(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return recipes.whole(model), sorted({str(param.dtype) for _, param in named})


def test_parameters_stay_fp32_under_mixed_precision_and_decay_as_torchs(worlds):
    (theirs, dtypes), _ = worlds.run(2, in_mixed_precision, "torch")
    assert dtypes == ["torch.float32"]
    for way in ("chain", "attach"):
        for params, _ in worlds.run(2, in_mixed_precision, way):
            assert differing(params, theirs) == []


def scaled(way: str) -> list[list[str]]:
    """Rank 1's gradient has an infinity in the second step; what has changed after each, in this rank's own shards."""
    model = shard(recipes.small().ByteModel())
    optimizer = optimizer_of(way, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    changed = []
    for number, step in enumerate(batches()[:, dist.get_rank(), 0]):
        before = {name: layouts.local_of(param).clone() for name, param in model.named_parameters()}
        scaler.scale(model(step)).backward()
        if number == 1 and dist.get_rank() == 1:
            model.head.weight.grad.to_local()[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        changed.append(differing(before, {name: layouts.local_of(param) for name, param in model.named_parameters()}))
    return changed


@pytest.mark.parametrize("way", WAYS)
def test_an_infinity_on_one_rank_skips_the_step_and_the_decay_on_all(worlds, way):
    for first, second, third in worlds.run(2, scaled, way):
        assert len(first) == len(third) == 15
        assert second == []


def clipped(way: str) -> tuple[float, float]:
    """The norm that clipping found, and the norm of the gradients as a metric finds it in the step."""
    model = shard(recipes.small().ByteModel())
    rule = RelativeWeightDecay(0.1, norm_input="grad", metric="l2")
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01, weight_decay=0)
    with_stats = optimizer = Chain(model.named_parameters(), Adam(), rule, LR(0.01)) if way == "chain" else optimizer
    if way != "chain":
        with_stats = attach(optimizer, rule, coupling="gradient" if way == "gradient" else "lr")
    model(batches()[0, dist.get_rank(), 0]).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25).full_tensor()
    optimizer.step()
    return norm.item(), with_stats.stats()["RelativeWeightDecay"]["metric"].item()


@pytest.mark.parametrize("way", WAYS)
def test_a_metric_of_gradients_is_of_those_that_torch_has_clipped(worlds, way):
    for norm, metric in worlds.run(2, clipped, way):
        assert norm > 0.5
        assert metric == pytest.approx(0.25, rel=1e-5)
