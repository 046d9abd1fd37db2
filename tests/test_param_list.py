"""The list of an optimizer's parameters, while other libraries hide groups, swap tensors and leave names out."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from distwd.sharding.params import ParamList


def groups_of(*sizes: int) -> list[dict]:
    return [{"params": [nn.Parameter(torch.ones(1)) for _ in range(size)]} for size in sizes]


def test_the_same_entries_as_long_as_the_groups_hold_the_same_tensors():
    groups = groups_of(2, 1)
    params = ParamList(lambda: groups)
    first = params.read()
    assert [entry.group for entry in first.entries] == [0, 0, 1]
    assert params.read().entries is first.entries
    groups[0] = dict(groups[0])  # as load_state_dict replaces group dicts
    assert params.read().entries is first.entries
    groups[0]["params"][1] = nn.Parameter(torch.ones(1))
    assert params.read().entries is not first.entries


def test_hidden_groups_are_remembered():
    """As DeepSpeed shows one group at a time, in any order."""
    shown = every = groups_of(1, 2, 3)
    params = ParamList(lambda: shown)
    assert params.read().active == {0, 1, 2}
    entries = params.read().entries
    for index in (2, 0, 1):
        shown = [every[index]]
        read = params.read()
        assert read.active == {index}
        assert read.entries is entries
        assert [id(group) for group in read.groups] == [id(group) for group in every]
    shown = []  # none at all is not a part but a whole of its own
    assert params.read().entries == ()


def test_an_unknown_group_makes_a_new_whole():
    every = groups_of(1, 2)
    shown = every
    params = ParamList(lambda: shown)
    params.read()
    shown = [every[1], *groups_of(1)]
    assert params.read().active == {0, 1}
    assert len(params.read().entries) == 3


def test_after_forgetting_a_part_is_the_whole():
    every = groups_of(1, 2)
    shown = every
    params = ParamList(lambda: shown)
    params.read()
    shown = every[:1]
    assert len(params.read().entries) == 3
    params.forget()
    assert len(params.read().entries) == 1


def test_names_go_by_tensor_and_then_by_place():
    """As accelerate puts other tensors into the places of the named ones."""
    groups = groups_of(2, 1)
    first, second, third = (param for group in groups for param in group["params"])
    params = ParamList(lambda: groups, [("a", first), ("b", second), ("c", third)])
    assert [entry.name for entry in params.read().entries] == ["a", "b", "c"]
    groups[0]["params"] = [second, nn.Parameter(torch.ones(1))]
    assert [entry.name for entry in params.read().entries] == ["b", "b", "c"]
    groups[0]["params"] = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
    assert [entry.name for entry in params.read().entries] == ["a", "b", "c"]


def test_a_group_that_is_named_in_part_has_no_names():
    groups = groups_of(2, 1)
    params = ParamList(lambda: groups, [("a", groups[0]["params"][0]), ("c", groups[1]["params"][0])])
    assert [(entry.name, entry.named) for entry in params.read().entries] == [
        ("param 0", False),
        ("param 1", False),
        ("c", True),
    ]


def test_names_of_the_optimizer_come_first():
    groups = groups_of(1)
    groups[0]["param_names"] = ["its own"]
    params = ParamList(lambda: groups, [("another", groups[0]["params"][0])])
    assert [entry.name for entry in params.read().entries] == ["its own"]


@pytest.mark.parametrize("is_read", [True, False])
def test_names_keep_no_tensor_alive(is_read):
    groups = groups_of(1)
    params = ParamList(lambda: groups, [("a", groups[0]["params"][0])])
    old = weakref.ref(groups[0]["params"][0])
    if is_read:
        params.read()
    groups[0]["params"][0] = nn.Parameter(torch.ones(1))
    params.read()
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("given", [True, False])
def test_a_run_keeps_its_own_names_when_a_checkpoint_brings_others(given):
    """torch's `load_state_dict` replaces group dicts, and `param_names` in them."""
    groups = groups_of(2)
    if not given:
        groups[0]["param_names"] = ["a", "b"]
    names = list(zip("ab", groups[0]["params"], strict=True)) if given else ()
    params = ParamList(lambda: groups, names)
    groups[0] = {**groups[0], "param_names": ["_orig_mod.a", "_orig_mod.b"]}
    assert [entry.name for entry in params.read().entries] == ["a", "b"]
    groups[0]["params"] = [*groups[0]["params"], nn.Parameter(torch.ones(1))]
    groups[0]["param_names"] = ["_orig_mod.a", "_orig_mod.b", "c"]
    assert [entry.name for entry in params.read().entries] == ["a", "b", "c"]


def test_names_of_parameters_that_come_later_are_known():
    groups = groups_of(1)
    later = nn.Parameter(torch.ones(1))
    params = ParamList(lambda: groups, [("a", groups[0]["params"][0]), ("later", later)])
    params.read()
    groups.append({"params": [later]})
    assert [entry.name for entry in params.read().entries] == ["a", "later"]


def test_no_parameter_has_a_weak_reference():
    """torch refuses to move or cast such a one, where it swaps parameters (DTensors, always)."""
    groups = groups_of(1)
    (param,) = groups[0]["params"]
    params = ParamList(lambda: groups, [("a", param)])
    params.read()
    assert weakref.getweakrefcount(param) == 0
