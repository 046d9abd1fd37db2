"""Parameters that are not trained, in the list of an optimizer: no number counts them, nothing reads, copies or writes them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing

from distwd import LR, Adam, CautiousWeightDecay, Chain, RelativeWeightDecay, WeightDecay, attach, global_metric

KINDS = ["chain", "attach"]


def made(kind: str, named: list, rule) -> tuple:
    """An SGD of lr 1 with the rule, and what shows its numbers."""
    if kind == "chain":
        chain = Chain(named, rule, LR(1.0))
        return chain, chain
    optimizer = torch.optim.SGD(named, lr=1.0)
    return optimizer, attach(optimizer, rule)


def number(held, name: str = "metric"):
    return next(iter(held.stats().values()))[name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["mad", "l2", "rms", "std", "linf", float("-inf"), -1.0])
@pytest.mark.parametrize("of", ["update", "grad", "params"])
def test_a_number_is_of_what_is_trained(kind, metric, of):
    """The frozen zeros would change every one of these, and the trained parameter without a gradient counts as zeros."""
    a, b = nn.Parameter(torch.tensor([1.0, -2.0, 3.0])), nn.Parameter(torch.tensor([4.0]))
    frozen = nn.Parameter(torch.zeros(100), requires_grad=False)
    optimizer, held = made(kind, [("a", a), ("frozen", frozen), ("b", b)], RelativeWeightDecay(0.0, 2, of, metric))
    a.grad = torch.tensor([0.5, -0.25, 1.0])
    counted = [a.detach().clone(), b.detach().clone()] if of == "params" else [a.grad.clone(), torch.zeros(1)]
    optimizer.step()
    assert torch.equal(number(held), global_metric(counted, metric))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scope", ["group", "tensor"])
def test_finer_numbers_are_of_what_is_trained_too(kind, scope):
    a, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(8), requires_grad=False)
    optimizer, held = made(kind, [("a", a), ("f", frozen)], RelativeWeightDecay(0.0, norm_input="params", scope=scope))
    a.grad = torch.zeros(2)
    optimizer.step()
    assert number(held)[0 if scope == "group" else "a"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_a_gradient_is_trained_though_it_asks_for_none(kind):
    """The fp32 copies that Megatron hands its optimizer."""
    a, copy = nn.Parameter(torch.ones(2)), torch.full((2,), 3.0)
    optimizer, held = made(kind, [("a", a), ("copy", copy)], RelativeWeightDecay(0.5, norm_input="params"))
    a.grad, copy.grad = torch.zeros(2), torch.zeros(2)
    optimizer.step()
    assert number(held) == 2
    assert torch.equal(copy, torch.full((2,), 3.0 - 0.5 * 2 * 3))


class Packed(Tensor):
    """As 4-bit weights of other libraries: a dtype and a shape that it claims to have, and hardly an operation."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16)

    def __init__(self, data):
        self.packed = data

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.view.default):
            return return_and_correct_aliasing(func, args, kwargs or {}, Packed(args[0].packed))
        raise NotImplementedError(f"{func} of a packed tensor")


ODD = {
    "packed": lambda: Packed(torch.zeros(8, 8, dtype=torch.uint8)),
    "int8": lambda: torch.zeros(8, dtype=torch.int8),
    "float8": lambda: torch.ones(8).to(torch.float8_e4m3fn),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "complex": lambda: torch.ones(2, dtype=torch.complex64),
    "meta": lambda: torch.ones(2, device="meta"),
}
RULES = {
    "absolute": lambda: WeightDecay(0.1),
    "cautious": lambda: CautiousWeightDecay(0.1),
    **{f"of {of}": lambda of=of: RelativeWeightDecay(0.1, norm_input=of) for of in ("update", "grad", "params")},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("odd", ODD)
def test_frozen_tensors_of_any_kind_change_nothing(odd, rule, kind):
    found = []
    for extra in ([], [("base", nn.Parameter(ODD[odd](), requires_grad=False))]):
        lora = nn.Parameter(torch.linspace(-1, 1, 6))
        named = [*extra, ("lora", lora)]
        if kind == "chain":
            optimizer = Chain(named, Adam(), RULES[rule](), LR(0.1))
        else:
            optimizer = torch.optim.AdamW(named, lr=0.1, weight_decay=0)
            attach(optimizer, RULES[rule]())
        for step in range(2):
            lora.grad = torch.full((6,), 0.5 - step)
            optimizer.step()
        found.append(lora.detach())
    assert torch.equal(*found)


def test_float8_beside_other_dtypes_is_measured():
    low, high = torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn), torch.tensor([3.0])
    assert global_metric([low, high, torch.tensor([1.0], dtype=torch.bfloat16)], "l1") == 7


def unfrozen_in_turn(kind: str) -> tuple:
    """Ranks hold whole copies; `b` is frozen on all alike in the second of three steps. Numbers, and how often they talked."""
    from tests.wire import Wire

    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.full((6,), 5.0))
    optimizer, held = made(kind, [("a", a), ("b", b)], RelativeWeightDecay(0.0, norm_input="params", metric="mad"))
    numbers, talks, plans = [], [], []
    for step in range(5):
        b.requires_grad_(step % 2 == 0)
        a.grad, b.grad = torch.zeros(2), torch.zeros(6) if step % 2 == 0 else None
        with Wire() as wire:
            optimizer.step()
        numbers.append(number(held).item())
        talks.append(len(wire.calls))
        plans.append(held.plan)
    return numbers, talks[1:], all(plan is plans[0] for plan in plans)


@pytest.mark.parametrize("kind", KINDS)
def test_freezing_on_all_ranks_needs_no_new_plan(worlds, kind):
    for numbers, talks, is_one_plan in worlds.run(2, unfrozen_in_turn, kind):
        assert numbers == [4, 1, 4, 1, 4]
        assert talks == [1, 1, 1, 1]
        assert is_one_plan


def frozen_copies_that_differ() -> float:
    """A frozen base that every rank has packed in its own way is nobody's business."""
    base = nn.Parameter(torch.full((4,), float(dist.get_rank())), requires_grad=False)
    a = nn.Parameter(torch.ones(2))
    chain = Chain([("base", base), ("a", a)], RelativeWeightDecay(0.1, norm_input="params"), LR(1.0))
    a.grad = torch.zeros(2)
    chain.step()
    return number(chain).item()


def test_frozen_copies_are_not_compared(worlds):
    assert worlds.run(2, frozen_copies_that_differ) == [1, 1]
