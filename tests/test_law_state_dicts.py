"""Law 9: state-dict calls are inert, and a checkpoint resumes bit for bit, on other layouts too."""

from __future__ import annotations

import copy
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from tests import layouts, runs
from tests.chains import CHAINS, LR, transforms_of
from tests.layouts import LAYOUTS, Net, whole_model
from tests.oracle import Decay
from tests.runs import PARAMS_SEED, differing

STATEFUL = ("decoupled", "constant", "update_twice")
PARTS = {
    **{name: CHAINS[name].parts for name in STATEFUL},
    "stateless": (Decay(0.1, metric="rms", norm_input="params"), LR, Decay(0.01)),
    "only direct": (Decay(0.1, target="params_direct"),),
}
FORMS = {
    "plain": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
    "cpu": StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True),
}


def model_on(layout: str, seed: int = PARAMS_SEED) -> tuple[Net, dict]:
    net = Net(whole_model(seed))
    LAYOUTS[layout].wrap(net)
    return net, dict(net.named_parameters())


def chain_of(net: Net, chain_name: str):
    import distwd

    return distwd.Chain(net.named_parameters(), *transforms_of(PARTS[chain_name]))


def snapshot(chain, held: dict) -> tuple[dict, dict]:
    """Parameters and everything of the optimizer, as plain copies."""
    locals_ = {name: layouts.local_of(param).clone() for name, param in held.items()}
    state = copy.deepcopy(chain.state_dict())
    # torch's loader gives an empty entry to parameters that have no state; that is no state either.
    state["state"] = {index: entry for index, entry in state["state"].items() if entry}
    return locals_, state


def same(ours, theirs) -> bool:
    if isinstance(ours, torch.Tensor):
        return torch.equal(layouts.local_of(ours), layouts.local_of(theirs))
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    return ours == theirs


def inert(layout: str, chain_name: str, form: str, num_steps: int) -> dict[str, bool]:
    net, held = model_on(layout)
    chain = chain_of(net, chain_name)
    for step in range(num_steps):
        runs.feed(layout, held, step)
        chain.step()
    before = snapshot(chain, held)
    saved = get_optimizer_state_dict(net, chain, options=FORMS[form])
    after_get = snapshot(chain, held)
    set_optimizer_state_dict(net, chain, saved, options=FORMS[form])
    after_set = snapshot(chain, held)
    return {"get": same(before, after_get), "set": same(before, after_set), "alive": bool(held)}


@pytest.mark.parametrize("num_steps", [0, 2], ids=["fresh", "used"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chain_name", PARTS)
def test_state_dict_calls_change_nothing(worlds, chain_name, form, num_steps):
    for seen in worlds.run(2, inert, "fsdp2", chain_name, form, num_steps):
        assert all(seen.values()), seen


@pytest.mark.parametrize("layout", ["single", "fsdp3", "hsdp", "fsdp_tp", "mixed"])
@pytest.mark.parametrize("chain_name", ["constant", "stateless"])
def test_state_dict_calls_change_nothing_on_any_layout(worlds, chain_name, layout):
    for seen in worlds.run(LAYOUTS[layout].ranks, inert, layout, chain_name, "plain", 0):
        assert all(seen.values()), seen


def hidden_step(chain_name: str) -> bool:
    """The look-alikes of DCP's hidden step: rates zero, gradients zero, no state yet; weight_decay is left as it is."""
    params = {name: torch.nn.Parameter(value) for name, value in whole_model(PARAMS_SEED).items()}
    import distwd

    chain = distwd.Chain(params.items(), *transforms_of(PARTS[chain_name]))
    if chain.state:
        return True  # nobody steps an optimizer that has its state
    for param in params.values():
        param.grad = torch.zeros_like(param)
    for group in chain.param_groups:
        group["lr"] = 0.0
    chain.step()
    return differing({n: p.detach() for n, p in params.items()}, whole_model(PARAMS_SEED)) == []


@pytest.mark.parametrize("chain_name", PARTS)
def test_a_hidden_step_decays_nothing(chain_name):
    assert hidden_step(chain_name)


# --- save and go on -----------------------------------------------------------------------------------------------------


def straight_on(layout: str, chain_name: str, save_to: str, form: str) -> dict:
    """Two steps, save, two more; the parameters at the end."""
    net, held = model_on(layout)
    chain = chain_of(net, chain_name)
    for step in (0, 1):
        runs.feed(layout, held, step)
        chain.step()
    options = FORMS[form]
    dcp.save({"model": get_model_state_dict(net), "optim": get_optimizer_state_dict(net, chain, options=options)},
             checkpoint_id=save_to, no_dist=not dist.is_initialized())  # fmt: skip
    return runs.train_chain(chain, layout, held, 2, first_step=2).params


def resumed(layout: str, chain_name: str, load_from: str, form: str) -> dict:
    """Another model with other values and another optimizer with other settings, loaded, then two steps."""
    net, held = model_on(layout, seed=PARAMS_SEED + 1)
    chain = chain_of(net, chain_name)
    chain.param_groups[0]["lr"] = 123.0
    options = FORMS[form]
    state = {"model": get_model_state_dict(net), "optim": get_optimizer_state_dict(net, chain, options=options)}
    dcp.load(state, checkpoint_id=load_from, no_dist=not dist.is_initialized())
    set_model_state_dict(net, state["model"])
    set_optimizer_state_dict(net, chain, state["optim"], options=options)
    return runs.train_chain(chain, layout, held, 2, first_step=2).params


@pytest.mark.parametrize("form", ["plain", "flattened"])
@pytest.mark.parametrize("chain_name", ["decoupled", "update_twice"])
def test_a_checkpoint_of_four_ranks_resumes_elsewhere_bit_for_bit(worlds, chain_name, form):
    with tempfile.TemporaryDirectory() as folder:
        straight = worlds.run(4, straight_on, "fsdp4", chain_name, folder, form)[0]
        for layout in ("fsdp4", "fsdp2", "fsdp1rank", "hsdp", "fsdp_tp"):
            for params in worlds.run(LAYOUTS[layout].ranks, resumed, layout, chain_name, folder, form):
                assert differing(params, straight) == [], layout


def test_a_stateless_chain_resumes_too(worlds):
    with tempfile.TemporaryDirectory() as folder:
        straight = worlds.run(2, straight_on, "fsdp2", "stateless", folder, "plain")[0]
        for params in worlds.run(2, resumed, "fsdp2", "stateless", folder, "plain"):
            assert differing(params, straight) == []


def resumes_after_torch_save(layout: str, chain_name: str) -> list[str]:
    """Chain.state_dict itself, with DTensors in it, on the same layout."""
    net, held = model_on(layout)
    chain = chain_of(net, chain_name)
    for step in (0, 1):
        runs.feed(layout, held, step)
        chain.step()
    saved, parameters = copy.deepcopy(chain.state_dict()), copy.deepcopy(net.state_dict())
    straight = runs.train_chain(chain, layout, held, 2, first_step=2).params
    net.load_state_dict(parameters)
    other = chain_of(net, chain_name)
    other.load_state_dict(saved)
    return differing(straight, runs.train_chain(other, layout, held, 2, first_step=2).params)


@pytest.mark.parametrize("layout", ["single", "fsdp3", "fsdp_tp"])
@pytest.mark.parametrize("chain_name", PARTS)
def test_its_own_state_dict_resumes_bit_for_bit(worlds, chain_name, layout):
    for different in worlds.run(LAYOUTS[layout].ranks, resumes_after_torch_save, layout, chain_name):
        assert different == []
