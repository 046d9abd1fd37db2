"""The arithmetic is where the shard is, the collective on a device that the group serves (`cpu:gloo,cuda:nccl`, or NCCL alone)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from distwd.sharding.world import World, _device
from tests import layouts, runs
from tests.chains import CHAINS, transforms_of
from tests.layouts import whole_model
from tests.runs import alone, differing


def world(*serves: str, device: str) -> World:
    return World(None, 0, 2, serves, torch.device(device))


def test_a_tensor_stays_where_it_is_if_the_group_serves_that():
    tensor = torch.ones(3)
    assert world("cuda", "cpu", device="cpu").sendable(tensor) is tensor


def test_a_tensor_goes_to_a_device_that_the_group_serves():
    # Of the devices that a CPU build of torch has, meta is the other one.
    assert world("meta", device="meta").sendable(torch.ones(3)).device.type == "meta"


def test_a_group_that_serves_the_cpu_reduces_there():
    assert _device(("cuda", "cpu")) == torch.device("cpu")


def test_a_group_that_serves_cards_only_reduces_on_this_processs_card():
    with mock.patch.object(torch.cuda, "current_device", return_value=3):
        assert _device(("cuda",)) == torch.device("cuda", 3)


class Sent(Tensor):
    """A tensor that has been brought to where the group can send it from: another memory than the shard's."""


@contextmanager
def another_device() -> Iterator[list[bool]]:
    """Nothing is where the group serves it: each tensor must be brought, and what comes back be fetched. Returns what was sent."""
    sent: list[bool] = []

    def checked(collective):
        def checking(first, *args, **kwargs):
            parts = first if isinstance(first, list) else []
            sent.append(
                all(isinstance(t, Sent) for t in [*parts, *[t for t in (first, *args) if isinstance(t, Tensor)]])
            )
            return collective(first, *args, **kwargs)

        return checking

    with (
        mock.patch.object(World, "sendable", lambda self, tensor: tensor.clone().as_subclass(Sent)),
        mock.patch.object(dist, "all_reduce", checked(dist.all_reduce)),
        mock.patch.object(dist, "all_gather", checked(dist.all_gather)),
    ):
        yield sent


def trained_elsewhere(chain_name: str) -> tuple[dict, list[bool]]:
    import distwd

    held = layouts.place("fsdp_tp", whole_model(runs.PARAMS_SEED))
    chain = distwd.Chain(held.items(), *transforms_of(CHAINS[chain_name].parts))
    with another_device() as sent:
        for step in range(3):
            runs.feed("fsdp_tp", held, step)
            chain.step()
    return layouts.view("fsdp_tp", held), sent


def test_shards_where_the_group_does_not_serve_decay_alike(worlds):
    """As under CPU offload with NCCL alone: sums and extrema travel, the shards do not."""
    for chain_name in ("mad_of_update", "linf_of_params"):
        for params, sent in worlds.run(4, trained_elsewhere, chain_name):
            assert differing(params, alone(worlds, chain_name).params) == []
            assert all(sent)
            assert len(sent) >= 5  # two for the plan, and one a step
