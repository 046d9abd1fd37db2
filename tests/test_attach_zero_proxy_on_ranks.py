"""An optimizer on zeros, where ranks hold shards or copies: its state is sharded like the parameters, and copies stay equal."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from distwd import RelativeWeightDecay, attach
from tests.model import mesh_of
from tests.test_attach_zero_proxy import OPTIMIZERS, RULES, adamw


def kinds(value) -> object:
    """What a state is made of, without its numbers."""
    if isinstance(value, dict):
        return {key: kinds(one) for key, one in value.items()}
    of_shard = (value.placements, tuple(value.to_local().shape)) if isinstance(value, DTensor) else None
    return type(value), tuple(value.shape), value.dtype, of_shard


def states_on_a_rank(inner: str, wholes: dict, foreach: bool) -> list:
    """By position, the state of DTensors in a bare optimizer, and in one that steps zeros in their place."""
    cls, mesh, found = getattr(torch.optim, inner.split(",")[0]), mesh_of(3, names=("dp",)), []
    for attached in (False, True):
        params = {
            name: torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0) if whole.dim() else Replicate()]))
            for name, whole in wholes.items()
        }
        optimizer = cls(params.items(), lr=0.01, foreach=foreach, **OPTIMIZERS[inner])
        if attached:
            attach(optimizer, RULES["relative"]())
        for _ in range(2):
            for param in params.values():
                param.grad = torch.ones_like(param)
            optimizer.step()
        found.append(kinds(optimizer.state_dict()["state"]))
    return found


@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
@pytest.mark.parametrize("inner", OPTIMIZERS)
def test_the_state_is_of_the_kind_that_the_optimizer_alone_keeps(worlds, inner, foreach):
    # As a plain tensor, the state of a scalar would not mix with a DTensor parameter.
    wholes = {"matrix": torch.ones(4, 3), "vector": torch.ones(5), "scalar": torch.tensor(2.0)}
    for alone, attached in worlds.run(3, states_on_a_rank, inner, wholes, foreach):
        assert alone == attached
        assert len(alone) == len(wholes)


def trained_on_a_rank(beside: str) -> torch.Tensor:
    """What becomes of a weight that two ranks hold, where one of them has something more."""
    torch.manual_seed(0)
    is_first = torch.distributed.get_rank() == 0
    params = {"tied": torch.nn.Parameter(torch.randn(500))}
    if beside != "a hook" and is_first:
        other = torch.zeros(3, dtype=torch.bfloat16) if beside == "bf16" else torch.zeros(3).as_subclass(Marked)
        params[beside] = torch.nn.Parameter(other)
    optimizer = adamw(params)
    if beside == "a hook" and is_first:
        optimizer.register_step_pre_hook(lambda *_: None)
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype) if param.numel() > 3 else None
        optimizer.step()
    return params["tied"].detach()


class Marked(torch.Tensor):
    """A tensor that is not an ordinary one."""


@pytest.mark.parametrize("beside", ["a hook", "bf16", "a subclass"])
def test_copies_do_not_drift_whatever_one_rank_has_beside_them(worlds, beside):
    one, other = worlds.run(2, trained_on_a_rank, beside)
    assert torch.equal(one, other)


def continued_on_a_rank() -> list[torch.Tensor]:
    """A bare optimizer and an attached one, whose state was made whole on every rank and not cut like the parameter."""
    mesh, results = mesh_of(2, names=("dp",)), []
    for attached in (False, True):
        param = torch.nn.Parameter(distribute_tensor(torch.arange(12.0).view(4, 3), mesh, [Shard(0)]))
        optimizer = torch.optim.SGD([("w", param)], lr=0.1, momentum=0.9)
        optimizer.state[param]["momentum_buffer"] = distribute_tensor(torch.ones(4, 3), mesh, [Replicate()])
        if attached:
            attach(optimizer, RelativeWeightDecay(0.0))
        for _ in range(2):
            param.grad = torch.ones_like(param)
            optimizer.step()
        results.append(param.full_tensor())
    return results


def test_a_state_that_is_placed_otherwise_is_cut_like_its_parameter(worlds):
    for bare, attached in worlds.run(2, continued_on_a_rank):
        torch.testing.assert_close(attached, bare)


def stepped_beside_a_marked_one() -> list[torch.Tensor]:
    """A DTensor of an ordinary tensor and one of another kind, in one list of a bare optimizer and of an attached one."""
    mesh, results = mesh_of(2, names=("dp",)), []
    for attached in (False, True):
        params = [torch.nn.Parameter(DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)])) for _ in range(2)]
        params[1]._local_tensor = params[1]._local_tensor.as_subclass(Marked)
        optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=True)
        if attached:
            attach(optimizer, RelativeWeightDecay(0.0))
        for _ in range(2):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
        results += [param.to_local().as_subclass(torch.Tensor) for param in params]
    return results


def test_zeros_and_parameters_do_not_share_a_list(worlds):
    for one, marked, *attached in worlds.run(2, stepped_beside_a_marked_one):
        for param in attached:
            torch.testing.assert_close(param, one)
            torch.testing.assert_close(param, marked)
