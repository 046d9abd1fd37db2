"""The number of the step travels with a checkpoint, so that a resumed run draws the noise of the uninterrupted one, on any layout."""

from __future__ import annotations

import copy
import tempfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from tests.layouts import LAYOUTS, Net, view, whole_model
from tests.runs import PARAMS_SEED, differing
from tests.test_rounding_on_ranks import BF16, chain_over, steps

FORMS = {"plain": StateDictOptions(), "flattened": StateDictOptions(flatten_optimizer_state_dict=True)}


def model_on(layout: str, seed: int, through: str):
    net = Net(whole_model(seed, BF16))
    LAYOUTS[layout].wrap(net)
    held = dict(net.named_parameters())
    if through == "chain":
        return net, held, chain_over(held.items())
    import distwd

    optimizer = torch.optim.SGD(held.values(), lr=0.02, foreach=False)
    distwd.attach(optimizer, distwd.WeightDecay(0.05), named_parameters=held.items(), rounding="stochastic")
    return net, held, optimizer


def straight_on(layout: str, through: str, form: str, save_to: str) -> dict[str, Tensor]:
    """Three steps, save, three more."""
    net, held, optimizer = model_on(layout, PARAMS_SEED, through)
    steps(optimizer, layout, held, range(3))
    state = {"model": get_model_state_dict(net), "optim": get_optimizer_state_dict(net, optimizer, options=FORMS[form])}
    dcp.save(state, checkpoint_id=save_to)
    return steps(optimizer, layout, held, range(3, 6))


def resumed(layout: str, through: str, form: str, load_from: str, num_steps: int = 3) -> dict[str, Tensor]:
    net, held, optimizer = model_on(layout, PARAMS_SEED + 1, through)
    options = FORMS[form]
    state = {"model": get_model_state_dict(net), "optim": get_optimizer_state_dict(net, optimizer, options=options)}
    dcp.load(state, checkpoint_id=load_from)
    set_model_state_dict(net, state["model"])
    set_optimizer_state_dict(net, optimizer, state["optim"], options=options)
    return steps(optimizer, layout, held, range(3, 3 + num_steps))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("through", ["chain", "attach"])
def test_a_checkpoint_resumes_elsewhere_with_the_same_noise(worlds, through, form):
    with tempfile.TemporaryDirectory() as folder:
        straight = worlds.run(4, straight_on, "fsdp4", through, form, folder)[0]
        for layout in ("fsdp2", "fsdp_tp"):
            for params in worlds.run(LAYOUTS[layout].ranks, resumed, layout, through, form, folder):
                assert differing(params, straight) == [], layout


def inert(through: str) -> tuple[bool, int]:
    """Whether state-dict calls leave the step number and the parameters, before steps and after two; and what it is then."""
    net, held, optimizer = model_on("fsdp2", PARAMS_SEED, through)
    seen = []
    for number in (0, 2):
        before = copy.deepcopy(optimizer.state_dict()["param_groups"]), view("fsdp2", held)
        saved = get_optimizer_state_dict(net, optimizer)
        set_optimizer_state_dict(net, optimizer, saved)
        seen.append(optimizer.state_dict()["param_groups"] == before[0])
        seen.append(differing(view("fsdp2", held), before[1]) == [])
        if number == 0:
            steps(optimizer, "fsdp2", held, range(2))
    key = "rounding_step" if through == "chain" else "distwd_rounding_step"
    return all(seen), optimizer.param_groups[0][key]


@pytest.mark.parametrize("through", ["chain", "attach"])
def test_the_step_number_counts_real_steps_only(worlds, through):
    assert worlds.run(2, inert, through) == [(True, 2)] * 2
