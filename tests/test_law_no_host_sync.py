"""Law 5: after its first step distwd never reads a tensor on the host, and a skipped step skips the decay."""

from __future__ import annotations

import pytest
import torch

from tests import layouts, runs, wire
from tests.chains import ADAM, CHAINS, LR, transforms_of
from tests.layouts import LAYOUTS, whole_model
from tests.oracle import Decay
from tests.runs import PARAMS_SEED


def steps_without_reads(layout: str, chain_name: str, **adam) -> None:
    import distwd

    held = layouts.place(layout, whole_model(PARAMS_SEED))
    chain = distwd.Chain(held.items(), *transforms_of(CHAINS[chain_name].parts, **adam))
    runs.feed(layout, held, 0)
    chain.step()  # the plan, once
    for step in (1, 2):
        runs.feed(layout, held, step)
        with wire.no_host_sync():
            chain.step()


@pytest.mark.parametrize("chain_name", CHAINS)
@pytest.mark.parametrize("layout", ["single", "fsdp3", "fsdp_tp"])
def test_a_step_reads_nothing(worlds, layout, chain_name):
    worlds.run(LAYOUTS[layout].ranks, steps_without_reads, layout, chain_name)


def metric_without_reads() -> None:
    import distwd

    tensors = list(whole_model(0).values())
    plan = distwd.Plan.build([torch.nn.Parameter(tensor) for tensor in tensors])
    with wire.no_host_sync():
        for metric in ("mad", "std", "var", "sum", "rms", "l0", "l1", "l2", "l3", "l4", "linf", 2.5, float("-inf")):
            assert isinstance(plan.metric(tensors, metric), torch.Tensor)


def test_a_metric_reads_nothing(worlds):
    worlds.run(0, metric_without_reads)


def steps_with_tensor_settings() -> None:
    import distwd

    held = layouts.place("single", whole_model(PARAMS_SEED))
    rules = [distwd.RelativeWeightDecay(torch.tensor(0.1)), distwd.CautiousWeightDecay(torch.tensor(0.1), 3)]
    chain = distwd.Chain(held.items(), *rules, distwd.Adam(fused=True), rules[0], distwd.LR(torch.tensor(0.1)), *rules)
    runs.feed("single", held, 0)
    chain.step()
    with wire.no_host_sync():
        chain.step()


def test_tensor_hyperparameters_are_not_read_either(worlds):
    worlds.run(0, steps_with_tensor_settings)


# --- GradScaler -----------------------------------------------------------------------------------------------------


def scaled_steps(parts: tuple, fused: bool, infinite: bool) -> tuple[dict, dict, dict]:
    """Parameters before, after a step with scaled gradients, and after the same step without a scaler."""
    import distwd

    def train(scaler) -> dict:
        params = {n: torch.nn.Parameter(v) for n, v in whole_model(PARAMS_SEED).items()}
        chain = distwd.Chain(params.items(), *transforms_of(parts, fused=fused))
        for step in range(2):
            chain.zero_grad()
            grads = runs.grads_of(step)
            # A loss whose gradient is exactly the given one.
            loss = sum((params[n] * grads[n]).sum() for n in params)
            scaler.scale(loss).backward()
            if infinite and step == 1:
                params["up.weight"].grad[0, 0] = torch.inf
            before = {n: p.detach().clone() for n, p in params.items()}
            scaler.step(chain)
            scaler.update()
        return before, {n: p.detach().clone() for n, p in params.items()}

    before, after = train(torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100))
    return before, after, train(torch.amp.GradScaler("cpu", enabled=False))[1]


SCALED = {
    "decoupled": (ADAM, Decay(0.1), LR),
    "constant": (ADAM, LR, Decay(0.1)),
    "direct": (Decay(0.1, target="params_direct"), ADAM, LR),
    "relative": (ADAM, LR, Decay(0.1, metric="mad")),
    "relative_grad": (ADAM, Decay(0.1, metric="l2", norm_input="grad"), LR),
    "coupled": (Decay(0.1), ADAM, LR),
}


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("name", SCALED)
def test_a_scaled_step_is_the_unscaled_one(name, fused):
    """The scale is a power of two, so even the bits agree."""
    _, scaled, unscaled = scaled_steps(SCALED[name], fused, infinite=False)
    assert runs.differing(scaled, unscaled) == []


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("name", SCALED)
def test_a_skipped_step_decays_nothing(name, fused):
    before, after, finite = scaled_steps(SCALED[name], fused, infinite=True)
    assert runs.differing(before, after) == []
    assert runs.differing(before, finite) != []
