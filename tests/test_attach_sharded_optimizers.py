"""Optimizers whose state is spread over ranks: torch's ZeroRedundancyOptimizer, and the shapes of Megatron's distributed optimizer."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distwd import RelativeWeightDecay, Sharded, attach
from tests.layouts import SHAPES, whole_model
from tests.runs import PARAMS_SEED, differing, grads_of
from tests.wire import Wire

# name: (rule and its arguments, coupling)
RULES = {
    "absolute": ("WeightDecay", (0.1,), "lr"),
    "cautious": ("CautiousWeightDecay", (0.1, 1), "lr"),
    "of params": ("RelativeWeightDecay", (0.1, 2, "params", "l2"), "lr"),
    "of the update": ("RelativeWeightDecay", (0.1, 2, "update", "mad"), "lr"),
    "of the gradient": ("RelativeWeightDecay", (0.1, 2, "grad", "rms"), "gradient"),
    "of params, not scaled": ("RelativeWeightDecay", (0.01, 1, "params", "std"), "none"),
}
RELATIVE = [name for name in RULES if name.startswith("of")]


def rule_of(name: str, scope: str = "all"):
    import distwd

    rule, args, _ = RULES[name]
    scoped = {"scope": scope} if rule == "RelativeWeightDecay" else {}
    return getattr(distwd, rule)(*args, **scoped)


def whole_parameters() -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(value) for name, value in whole_model(PARAMS_SEED).items()}


def adamw(params: Iterable, **kwargs) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(params), **{"lr": 0.01, "weight_decay": 0, "foreach": False} | kwargs)


def values_of(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in params.items()}


# --- torch's ZeroRedundancyOptimizer --------------------------------------------------------------------------------------


def zero_of(groups: Iterable, **kwargs):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of torch.jit when it is imported

    return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=0.01, weight_decay=0, foreach=False, **kwargs)


def with_zero(name: str, bucket_view: bool, cut: int) -> tuple[dict, list[int], int, list]:
    """Three steps, with decay attached to the optimizer of this rank's parameters inside; without ranks, to AdamW itself."""
    params = whole_parameters()
    named = list(params.items())
    groups = [{"params": [p for _, p in named[:cut]]}, {"params": [p for _, p in named[cut:]], "lr": 0.05}]
    if dist.is_initialized():
        zero = zero_of(groups, parameters_as_bucket_view=bucket_view)
        optimizer = zero.optim
    else:
        zero = optimizer = adamw(groups)
    attachment = attach(optimizer, rule_of(name), coupling=RULES[name][2], named_parameters=named)
    counts = []
    for step in range(3):
        for key, grad in grads_of(step).items():
            params[key].grad = grad
        with Wire() as wire:
            zero.step()
        counts.append(wire.calls.count("allreduce_"))
    found = [float(value["coefficient"]) for value in attachment.stats().values()]
    return values_of(params), counts[1:], attachment.phases, found


@pytest.mark.parametrize(("ranks", "bucket_view"), [(2, False), (2, True), (3, False)])
@pytest.mark.parametrize("name", RULES)
def test_torchs_zero_has_the_bits_of_one_process(worlds, name, ranks, bucket_view):
    """Every rank keeps whole parameters and steps its own; names show which, as with pipeline stages."""
    ((alone, _, _, expected),) = worlds.run(0, with_zero, name, bucket_view, 4)
    for params, counts, phases, coefficients in worlds.run(ranks, with_zero, name, bucket_view, 4):
        assert differing(params, alone) == []
        assert coefficients == expected
        assert counts == [phases] * 2 == [int(name in RELATIVE)] * 2


def around_zero() -> list[str]:
    params = whole_parameters()
    zero = zero_of(params.values())
    errors = []
    for optimizer in (zero, zero.optim):
        try:
            attach(optimizer, RelativeWeightDecay(0.1))
            for key, grad in grads_of(0).items():
                params[key].grad = grad
            zero.step()
        except ValueError as error:
            errors.append(str(error))
    return [*errors, str(differing(values_of(params), whole_model(PARAMS_SEED)))]


def test_around_torchs_zero_and_without_names_it_is_refused_on_every_rank(worlds):
    for outer, unnamed, changed in worlds.run(2, around_zero):
        assert "ZeroRedundancyOptimizer is a wrapper" in outer
        assert "`.optim`" in outer
        assert "named_parameters" in unnamed
        assert changed == "[]"


# --- Megatron's distributed optimizer: a rank holds a stretch of the flat model, and so a stretch of some parameters -------


def stretch(values: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """What `rank` holds of every parameter: its part of the one flat buffer, cut evenly without regard to parameters."""
    total = sum(value.numel() for value in values.values())
    size = -(-total // ranks)
    held, begin = {}, 0
    for name, value in values.items():
        low, high = (min(max(edge - begin, 0), value.numel()) for edge in (rank * size, (rank + 1) * size))
        held[name] = value.reshape(-1)[low:high].clone()
        begin += value.numel()
    return held


def with_megatron(name: str, scope: str, form: str) -> dict[str, Tensor]:
    """form: of a parameter that a rank holds nothing of it has an "empty" piece, or it is "absent" and pieces have names of their own."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    held = {key: torch.nn.Parameter(value) for key, value in stretch(whole_model(PARAMS_SEED), rank, ranks).items()}
    kept = {key: param for key, param in held.items() if form == "empty" or param.numel()}
    named = [(key if form == "empty" else f"{key} on rank {rank}", param) for key, param in kept.items()]
    marked = {"layout": {"*": Sharded()}} if form == "empty" else {}
    optimizer = adamw(named)
    attach(optimizer, rule_of(name, scope), coupling=RULES[name][2], **marked)
    for step in range(3):
        for key, grad in stretch(grads_of(step), rank, ranks).items():
            held[key].grad = grad
        optimizer.step()
    theirs: list[dict] = [{}] * ranks
    dist.all_gather_object(theirs, values_of(held))
    return {key: torch.cat([part[key] for part in theirs]).reshape(shape) for key, shape in SHAPES.items()}


@pytest.mark.parametrize(
    ("name", "scope", "form"),
    [
        *((name, "all", form) for name in RULES for form in ("empty", "absent")),
        ("of params", "tensor", "empty"),
        ("of the update", "tensor", "empty"),
    ],
)
def test_stretches_of_parameters_have_the_bits_of_one_process(worlds, name, scope, form):
    params = whole_parameters()
    optimizer = adamw(params.items())
    attach(optimizer, rule_of(name, scope), coupling=RULES[name][2])
    for step in range(3):
        for key, grad in grads_of(step).items():
            params[key].grad = grad
        optimizer.step()
    for whole in worlds.run(4, with_megatron, name, scope, form):
        assert differing(whole, values_of(params)) == []


def absent_under_one_name() -> str:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    held = {key: torch.nn.Parameter(value) for key, value in stretch(whole_model(PARAMS_SEED), rank, ranks).items()}
    optimizer = adamw([(key, param) for key, param in held.items() if param.numel()])
    attachment = attach(optimizer, RelativeWeightDecay(0.1), layout={"*": Sharded()})
    try:
        return f"accepted {attachment.plan}"
    except ValueError as error:
        return str(error)


def test_a_piece_that_is_missing_is_refused_with_both_ways_out(worlds):
    texts = worlds.run(4, absent_under_one_name)
    assert len(set(texts)) == 1
    assert "embed.weight" in texts[0]
    assert "an empty tensor" in texts[0]
    assert "names of their own" in texts[0]
