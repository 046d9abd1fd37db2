"""Small tensors that share a block: nothing but the number of calls may change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from distwd import LR, Adam, CautiousWeightDecay, Chain, Wrap
from distwd.kernels import apply as writing
from distwd.kernels.blocks import Workspace, ZeroPool
from distwd.kernels.formulas import DecayTerm, Mask
from distwd.metrics.measure import Request, Source, measure
from distwd.metrics.metric import parse_metric
from distwd.metrics.plan import Plan


def made(shapes: list[tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def test_a_step_runs_on_fake_tensors(recwarn):
    with FakeTensorMode():
        chain = Chain([torch.nn.Parameter(torch.ones(3)) for _ in range(4)], Adam(), CautiousWeightDecay(0.1), LR(1e-3))
        for group in chain.param_groups:
            for param in group["params"]:
                param.grad = torch.ones(3)
        chain.step()
    assert not recwarn.list


# --- the same bits --------------------------------------------------------------------------------------------------

TERMS = {
    "cautious": [DecayTerm(0.3, cautious=True)],
    "cautious, against": [DecayTerm(0.3, cautious=True, sign=-1)],
    "a number that was measured": [DecayTerm(torch.tensor(0.3), cautious=True)],
    "with linear ones": [DecayTerm(0.1), DecayTerm(0.3, cautious=True), DecayTerm(0.2)],
    "order 1": [DecayTerm(0.3, ord=1.0)],
    "order 3, cautious": [DecayTerm(0.3, ord=3.0, cautious=True)],
    "order 1.5": [DecayTerm(0.3, ord=1.5)],
    "by tensor": [DecayTerm(torch.linspace(0.1, 0.5, 5), cautious=True)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", TERMS)
def test_together_and_one_by_one_give_the_same_bits(name, dtype):
    shapes = [(37, 5), (3, 5), (64, 5), (1, 5), (200, 5)]
    params, updates = made(shapes, 1, dtype), made(shapes, 2, dtype)
    updates[0][:10] = 0.0  # where nothing is to be decayed
    alone, their_updates = ([one.clone() for one in some] for some in (params, updates))
    scratch = Workspace()
    writing.apply_(params, TERMS[name], updates, -1.0, Mask(updates), workspace=scratch, clear=True)
    for place, (param, update) in enumerate(zip(alone, their_updates, strict=True)):
        terms = [
            DecayTerm(
                p.rate[place] if isinstance(p.rate, Tensor) and p.rate.dim() else p.rate, p.ord, p.cautious, p.sign
            )
            for p in TERMS[name]
        ]
        writing.apply_([param], terms, [update], -1.0, Mask([update]), workspace=scratch, clear=True)
    assert same(params, alone)
    assert not any(update.any() for update in updates)


@pytest.mark.parametrize("order", [1, -1], ids=["narrow first", "wide first"])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_differences_of_tensors_of_equal_lengths_and_other_dtypes_are_not_rounded_to_one_another(narrow, order):
    news = [torch.full((6,), 1e5 if narrow == torch.float16 else 1.0001), torch.ones(6, dtype=narrow)][::order]
    olds = [torch.full_like(new, 0.5) for new in news]
    plan = Plan.build([(f"w{number}", new) for number, new in enumerate(news)])
    (found,) = measure(plan, [Request(parse_metric("mad"), [Source([0, 1], news, olds)], "tensor")])
    found = found[list(plan.name_ids)]
    assert found.tolist() == pytest.approx(
        [(new.double() - old.double()).mean().item() for new, old in zip(news, olds, strict=True)]
    )


def test_updates_of_several_dtypes_are_not_rounded_to_the_first():
    params, updates = made([(5,), (5,)], 1), made([(5,), (5,)], 2)
    updates[0] = updates[0].bfloat16()
    expected = params[1] - updates[1]
    writing.apply_(
        params, [DecayTerm(0.0, cautious=True)], updates, mask=Mask(updates), workspace=Workspace(), clear=True
    )
    assert torch.equal(params[1], expected)


def test_autograd_learns_of_every_parameter_that_is_written():
    flat = torch.ones(12)
    params = [torch.nn.Parameter(torch.empty(0)) for _ in range(3)]
    for param, part in zip(params, flat.split(4), strict=True):
        param.data = part
        param.grad = torch.ones(4)
    chain = Chain(params, Wrap(torch.optim.SGD), CautiousWeightDecay(0.1), LR(1.0))
    before = [param._version for param in params]
    chain.step()
    assert all(param._version > version for param, version in zip(params, before, strict=True))


# --- the state of an optimizer that steps the parameters themselves ---------------------------------------------------


def test_state_that_others_have_made_a_plain_dict_is_filled_again():
    param = torch.nn.Parameter(torch.ones(3))
    chain = Chain([param], Adam(), LR(0.1))
    param.grad = torch.ones(3)
    chain.state = {}
    chain.step()
    assert set(chain.state[param]) == {"step", "exp_avg", "exp_avg_sq"}


# --- zeros ----------------------------------------------------------------------------------------------------------


def test_zeros_have_the_strides_of_the_parameters():
    params = made([(4, 6), (7,), (400, 400), (2, 3, 4, 5), (4, 3, 1, 1)])
    params[3:] = [param.to(memory_format=torch.channels_last) for param in params[3:]]
    zeros = ZeroPool().take([3, 5, 6, 9, 7], params)
    assert [zero.shape for zero in zeros] == [param.shape for param in params]
    assert [zero.stride() for zero in zeros] == [param.stride() for param in params]
    assert not any(zero.any() for zero in zeros)


def test_zeros_are_made_anew_only_for_parameters_that_are_of_another_kind():
    params, zeros = made([(4, 6), (4, 6), (4, 6)]), ZeroPool()
    first = zeros.take([0, 1, 2], params)
    params[1] = params[1].t().contiguous().t()
    params[2] = params[2].double()
    second = zeros.take([0, 1, 2], params)
    assert [one is other for one, other in zip(first, second, strict=True)] == [True, False, False]
    assert second[1].stride() == params[1].stride() and second[2].dtype == torch.float64
