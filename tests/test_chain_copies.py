"""A Chain that is saved and loaded, copied or pickled steps bit for bit as the original."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from tests.one_process import equal, make, step
from tests.one_process import fp32_parameters as parameters


def resumed(save) -> bool:
    """Two steps, save, two more; against two more of what was loaded."""
    going, parked = parameters(), parameters()
    chain = make(going.items())
    for index in (0, 1):
        step(chain, going, index)
    saved = save(chain.state_dict())
    for name in parked:
        parked[name].data.copy_(going[name].data)
    other = make(parked.items(), lr=123.0, rate=456.0)
    other.load_state_dict(saved)
    for index in (2, 3):
        step(chain, going, index)
        step(other, parked, index)
    return equal(going, parked)


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("save", [copy.deepcopy, through_a_file])
def test_a_state_dict_resumes_bit_for_bit(save):
    assert resumed(save)


def test_state_has_the_same_keys_from_construction_on():
    params = parameters()
    chain = make(params.items())

    def keys() -> tuple:
        state = chain.state_dict()
        return (
            sorted(state),
            {index: sorted(entry) for index, entry in state["state"].items()},
            [sorted(group) for group in state["param_groups"]],
        )

    born = keys()
    step(chain, params)
    assert keys() == born


def test_a_state_dict_of_other_groups_is_refused():
    chain = make(parameters().items())
    state = chain.state_dict()
    pairs = list(parameters().items())
    with pytest.raises(ValueError, match="group"):
        make([{"params": pairs[:2]}, {"params": pairs[2:]}]).load_state_dict(state)


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
@pytest.mark.parametrize("num_steps", [0, 2])
def test_a_clone_steps_as_the_original_and_apart_from_it(clone, num_steps):
    params = parameters()
    chain = make(params.items())
    for index in range(num_steps):
        step(chain, params, index)
    twin, twins = clone((chain, params))
    before = {name: param.detach().clone() for name, param in params.items()}
    step(twin, twins, 5)
    assert equal(params, before)
    step(chain, params, 5)
    assert equal(params, twins)
    assert repr(twin) == repr(chain)
