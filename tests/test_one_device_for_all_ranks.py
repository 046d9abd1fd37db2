"""Ranks with and without tensors on a card hand one device to a collective: gloo and NCCL in one group do not meet."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist

import distwd
from distwd.sharding.world import World
from tests.fake_cuda import fake_cuda

# Where each rank holds its parameters, and whether they have gradients. The first rank is the one that decides nothing.
HOLDS = {
    "no gradients": [("cuda", False), ("cuda", True)],
    "no parameters": [(None, False), ("cuda", True)],
    "offloaded": [("cpu", True), ("cuda", True)],
    "mixed": [("both", True), ("cuda", True)],
    "offloaded everywhere": [("cpu", True), ("cpu", False)],
}
WAYS = ["chain", "attach", "extrema", "by tensor", "metric", "clip"]


def sent_from(holds: str) -> dict[str, list[str]]:
    """By way, the type of the device that this rank has handed to each all-reduce of a step."""
    place, has_gradients = HOLDS[holds][dist.get_rank()]
    sent: list[str] = []
    found = {}

    def recorded(tensor, op=None, group=None):
        sent.append(tensor.device.type)

    with (
        fake_cuda(),
        # The group is gloo's. It is told to serve cards, too; what goes to them is recorded and not sent.
        mock.patch("distwd.sharding.world.device_types", return_value=("cpu", "cuda")),
        mock.patch.object(dist, "all_reduce", recorded),
    ):
        for way in WAYS:
            places = {None: [], "both": ["cpu", "cuda"]}.get(place, [place] * 2)
            named = [
                (f"{dist.get_rank()}.{number}", torch.nn.Parameter(torch.empty(3, 4, device=device)))
                for number, device in enumerate(places)
            ]
            for _, param in named:
                param.grad = torch.empty_like(param) if has_gradients else None
            plan = distwd.Plan.build(named)
            sent.clear()
            step(way, named, plan)
            found[way] = list(sent)
    return found


def step(way: str, named: list, plan: distwd.Plan) -> None:
    if way == "metric":
        plan.metric([param.grad for _, param in named], "mad")
        return
    if way == "clip":
        distwd.clip_grad_norm_([param for _, param in named], 1.0, plan=plan)
        return
    settings = {"chain": {}, "attach": {}, "extrema": {"metric": "linf"}, "by tensor": {"scope": "tensor"}}[way]
    rule = distwd.RelativeWeightDecay(0.1, **settings)
    # A rank without parameters still has a group, of none.
    groups = [{"params": named}]
    if way == "attach":
        optimizer = torch.optim.SGD(groups, lr=0.1) if named else distwd.Chain(groups, distwd.LR(0.1))
        distwd.attach(optimizer, rule)
        optimizer.step()
    else:
        distwd.Chain(groups, distwd.Adam(), rule, distwd.LR(0.1)).step()


@pytest.mark.parametrize("holds", HOLDS)
def test_all_ranks_send_from_one_type_of_device(worlds, holds):
    """A rank that had nothing there would send over gloo, and all would wait for ever."""
    first, second = worlds.run(2, sent_from, holds)
    expected = "cpu" if holds == "offloaded everywhere" else "cuda"
    for way in WAYS:
        assert first[way], way
        assert set(first[way]) == {expected}, way
        assert first[way] == second[way], way


def test_a_rank_sends_from_the_card_that_holds_its_tensors():
    """Not from the current one, which a program need not have set."""
    world = World(None, 1, 2, ("cpu", "cuda"), torch.device("cpu"))
    held = [torch.device("cpu"), torch.device("cuda", 2)]
    types = world.types_of(held)
    assert world.at(held, types).device == torch.device("cuda", 2)
    with mock.patch.object(torch.cuda, "current_device", return_value=3):
        assert world.at([], types).device == torch.device("cuda", 3)
    assert world.at(held, 0).device == torch.device("cpu")


def test_numbers_go_to_what_the_group_serves():
    held, cpu, card = [torch.device("cuda", 2)], torch.device("cpu"), torch.device("cuda", 3)
    gloo = World(None, 0, 2, ("cpu",), cpu)
    assert gloo.types_of(held) == 0
    assert gloo.at(held, 0).device == cpu
    nccl = World(None, 0, 2, ("cuda",), card)
    # Offloaded everywhere: the current card, as before there was a plan.
    assert nccl.at([cpu], nccl.types_of([cpu])).device == card
