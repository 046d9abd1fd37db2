"""The counters count: raw collectives, DTensor's own, and reads by distwd but not by torch's optimizers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests import layouts, wire
from tests.layouts import whole_model


def collectives_seen() -> tuple[list[str], list[str], list[str]]:
    held = layouts.place("fsdp2", whole_model(0))
    with wire.Wire() as raw:
        dist.all_reduce(torch.ones(3))
    with wire.Wire() as gathered:
        held["norm.weight"].full_tensor()
    with wire.Wire() as scalar:
        held["norm.weight"].sum().full_tensor()
    with wire.Wire() as silent:
        torch.optim.AdamW(held.values()).step()
    assert silent.calls == []
    return raw.calls, gathered.calls, scalar.calls


def test_the_wire_sees_every_kind_of_collective(worlds):
    for raw, gathered, scalar in worlds.run(2, collectives_seen):
        assert raw == ["allreduce_"]
        assert gathered == ["all_gather_into_tensor"]
        assert scalar == ["all_reduce"]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.item(),
        float,
        bool,
        int,
        lambda x: x.tolist(),
        lambda x: [0, 1][x],
        lambda x: x == x and x,
        lambda x: torch.equal(x, x),
        lambda x: x.reshape(1).nonzero(),
        lambda x: x.new_ones(1)[x.reshape(1) > 0],
    ],
)
def test_a_read_by_distwd_is_caught(monkeypatch, read):
    monkeypatch.setattr(wire, "asked_by_distwd", lambda: "distwd/some.py:1 in f")
    with pytest.raises(wire.HostSync, match=r"distwd/some\.py"), wire.no_host_sync():
        read(torch.tensor(1))


def test_a_read_by_torchs_optimizer_is_let_pass():
    param = torch.ones(3, requires_grad=True)
    param.grad = torch.ones(3)
    optimizer = torch.optim.Adam([param])
    with wire.no_host_sync():
        optimizer.step()
        assert torch.tensor(1.0).item() == 1


@pytest.mark.parametrize(
    ("file", "is_caught"),
    [
        (f"{wire.PACKAGE}kernels/some.py", True),
        ("/home/me/distwd/.venv/lib/python3/site-packages/torch/_dynamo/some.py", False),
    ],
    ids=["the package", "torch in a checkout of that name"],
)
def test_it_is_the_package_that_may_not_read(file, is_caught):
    code = compile("def read(x): return x.item()", file, "exec")
    found: dict = {}
    exec(code, found)
    with wire.no_host_sync():
        if is_caught:
            with pytest.raises(wire.HostSync, match=r"kernels/some\.py:1 in read"):
                found["read"](torch.tensor(1.0))
        else:
            assert found["read"](torch.tensor(1.0)) == 1
