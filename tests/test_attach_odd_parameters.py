"""Parameters and gradients that are not quite ordinary, under a rule that needs the update of their optimizer."""

from __future__ import annotations

import pytest
import torch

from distwd import LR, Chain, RelativeWeightDecay, Wrap, attach
from tests.releases import needs_torch


@pytest.mark.parametrize("of", ["attach", "chain"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_fused_optimizer_steps_a_parameter_in_another_memory_format(name, of):
    results = []
    for decayed in (False, True):
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(3, 4, 3, bias=False)
        optimizer = getattr(torch.optim, name)(conv.parameters(), lr=0.01, weight_decay=0, fused=True)
        if decayed and of == "attach":
            attach(optimizer, RelativeWeightDecay(0.0))
        elif decayed:
            wrapped = Wrap(getattr(torch.optim, name), fused=True)
            optimizer = Chain(conv.parameters(), wrapped, RelativeWeightDecay(0.0), LR(0.01))
        for step in range(4):
            if step == 1:
                conv.to(memory_format=torch.channels_last)
            conv.weight.grad = torch.randn(conv.weight.shape).to(memory_format=torch.channels_last)
            if step == 0:
                conv.weight.grad = conv.weight.grad.contiguous()
            optimizer.step()
        results.append(conv.weight.detach().clone())
    torch.testing.assert_close(*results)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no gradients of another dtype")
@pytest.mark.parametrize(
    "foreach", [False, pytest.param(True, marks=needs_torch("2.13", "foreach SGD by gradients of another dtype"))]
)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)], ids=str)
def test_gradients_may_have_a_dtype_of_their_own(dtypes, foreach):
    dtype, of_grads = dtypes
    results = []
    for decayed in (False, True):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 40, dtype=dtype))
        param.grad_dtype = of_grads
        optimizer = torch.optim.SGD([param], lr=0.5, foreach=foreach)
        if decayed:
            attach(optimizer, RelativeWeightDecay(0.0))
        for _ in range(2):
            param.grad = torch.ones(40, dtype=of_grads)
            optimizer.step()
        param.grad, param.grad_dtype = None, dtype
        param.grad = torch.ones(40, dtype=dtype)
        optimizer.step()
        results.append(param.detach().clone())
    torch.testing.assert_close(*results)


def test_a_sparse_gradient_is_refused_before_anything_is_changed():
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SGD(table.named_parameters(), lr=0.1, momentum=0.9)
    attach(optimizer, RelativeWeightDecay(0.1))
    table(torch.tensor([1, 2])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(ValueError, match=r"the gradient of weight is sparse; use dense gradients"):
        optimizer.step()
    assert torch.equal(table.weight, before)
    assert not optimizer.state[table.weight].get("momentum_buffer")


def test_a_parameter_that_becomes_bf16_is_rounded_as_one():
    results = []
    for is_low_from in (0, 2):
        torch.manual_seed(0)
        linear = torch.nn.Linear(4, 4, bias=False)
        optimizer = torch.optim.SGD(linear.parameters(), lr=0.01)
        attach(optimizer, RelativeWeightDecay(0.1))
        for step in range(4):
            if step == is_low_from:
                linear.bfloat16()
            linear.weight.grad = torch.zeros_like(linear.weight) if step < 2 else torch.ones_like(linear.weight) * 0.3
            optimizer.step()
        results.append(linear.weight.detach().clone())
    assert torch.equal(*results)
