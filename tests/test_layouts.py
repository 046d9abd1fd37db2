"""The layouts are what their names promise: they hold the whole model, and meet replicas, uneven and empty shards."""

from __future__ import annotations

import pytest
import torch

from tests import layouts, runs
from tests.layouts import EVERY, LAYOUTS, whole_model
from tests.releases import TORCH


def round_trip(layout: str) -> tuple[dict, dict, dict]:
    """Whole parameters, whole gradients, and the local sizes of this rank."""
    held = layouts.place(layout, whole_model(0))
    layouts.set_gradients(layout, held, whole_model(1))
    sizes = {name: layouts.local_of(param).numel() for name, param in held.items()}
    grads = {name: param.grad for name, param in held.items()}
    whole = layouts.view(layout, held), layouts.view(layout, grads)
    # full_tensor() would do, but only members of a mesh can call it, and in torch 2.9 that of fsdp_tp has wrong rows.
    if layout in LAYOUTS and layout != "some_ranks" and (layout != "fsdp_tp" or TORCH > (2, 9)):
        assert runs.differing(whole[0], layouts.gather(held)) == []
        assert runs.differing(whole[1], layouts.gather(grads)) == []
    return *whole, sizes


@pytest.mark.parametrize("layout", EVERY)
def test_a_layout_holds_the_whole_model(worlds, layout):
    for params, grads, _ in worlds.run(EVERY[layout].ranks, round_trip, layout):
        for given, held in ((whole_model(0), params), (whole_model(1), grads)):
            assert given.keys() == held.keys()
            assert all(torch.equal(given[name], held[name]) for name in given)


def held_by_rank(worlds, layout: str, name: str) -> list[int]:
    return [sizes[name] for *_, sizes in worlds.run(EVERY[layout].ranks, round_trip, layout)]


def test_shards_are_uneven_and_empty(worlds):
    assert held_by_rank(worlds, "fsdp3", "head.bias") == [3, 3, 1]
    assert held_by_rank(worlds, "fsdp4", "norm.weight") == [2, 2, 2, 0]
    assert held_by_rank(worlds, "hsdp", "head.bias") == [4, 3, 4, 3]
    assert held_by_rank(worlds, "fsdp4", "gate.weight") == [1, 0, 0, 0]


def test_copies_hide_from_their_tensors(worlds):
    assert held_by_rank(worlds, "fsdp_tp", "norm.weight") == [3, 3, 3, 3]
    assert held_by_rank(worlds, "experts", "experts.weight") == [30, 30, 30, 30]
    assert held_by_rank(worlds, "ddp2", "gate.weight") == [1, 1]
