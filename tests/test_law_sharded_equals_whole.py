"""Laws 1, 2 and 4: sharded equals whole, every element counts once, the same bits on every rank."""

from __future__ import annotations

import pytest
import torch

from tests import layouts
from tests.chains import CHAINS
from tests.layouts import EVERY, FLAT, LARGE, NUM_ELEMENTS, SHAPES, whole_model
from tests.oracle import metric_of
from tests.runs import alone, differing, oracle_after, spread

SPREAD = [name for name in EVERY if name != "single"]
# Every chain on the layouts that differ most, one of each kind on every layout.
KINDS = ["decoupled", "direct", "mad_of_update", "cautious_var", "by_tensor", "params_and_grad_share", "update_twice"]
DIFFERENT = ("fsdp3", "hsdp", "fsdp_tp", "mixed", "experts_fsdp", "stages")
PAIRS = [(layout, name) for layout in SPREAD for name in (CHAINS if layout in DIFFERENT else KINDS)]
PAIRS = [(layout, name) for layout, name in PAIRS if layout not in FLAT or name != "by_tensor"]
PAIRS += [(layout, name) for layout in LARGE for name in ("decoupled", "update_twice")]
METRICS = ["mad", "std", "var", "sum", "rms", "l0", "l1", "l2", "l3", "l4", "linf", 2.5, float("-inf")]


def ulp(value: float) -> float:
    """The spacing of fp32 numbers at this value."""
    at = torch.tensor(abs(value), dtype=torch.float32)
    return (torch.nextafter(at, torch.tensor(torch.inf)) - at).item()


# --- parameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "chain_name"), PAIRS)
def test_sharded_parameters_have_the_bits_of_whole_ones(worlds, layout, chain_name):
    reference = alone(worlds, chain_name, foreach=True)
    for run in spread(worlds, layout, chain_name, foreach=True):
        assert differing(run.params, reference.params) == []


@pytest.mark.parametrize("chain_name", ["decoupled", "mad_of_update", "cautious_var", "grad_then_direct"])
@pytest.mark.parametrize("layout", ["fsdp3", "fsdp_tp", "mixed", "stages"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_single_tensor_steps_have_the_bits_of_whole_ones(worlds, layout, chain_name, dtype):
    reference = alone(worlds, chain_name, dtype=dtype, foreach=False)
    for run in spread(worlds, layout, chain_name, dtype=dtype, foreach=False):
        assert differing(run.params, reference.params) == []


@pytest.mark.parametrize("chain_name", KINDS)
@pytest.mark.parametrize("layout", ["fsdp3", "hsdp", "experts_fsdp"])
def test_float64_parameters_have_the_bits_of_whole_ones(worlds, layout, chain_name):
    reference = alone(worlds, chain_name, dtype=torch.float64)
    for run in spread(worlds, layout, chain_name, dtype=torch.float64):
        assert differing(run.params, reference.params) == []


# --- optimizers that round by where a tensor is cut -------------------------------------------------------------------


def largest_gap(ours: dict, theirs: dict) -> dict[str, float]:
    return {name: (ours[name].double() - theirs[name].double()).abs().max().item() for name in ours}


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp3", "hsdp", "fsdp_tp"])
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [(torch.float32, {"fused": True}), (torch.bfloat16, {"foreach": True}), (torch.bfloat16, {"fused": True})],
    ids=["fused", "bf16", "bf16fused"],
)
@pytest.mark.parametrize("chain_name", ["decoupled", "constant", "mad_of_update", "rms_after_lr"])
def test_low_precision_differs_by_the_bare_optimizer_and_no_more(worlds, layout, chain_name, dtype, settings):
    """One step from equal parameters: where the bare optimizer differs by some ulps, decay adds at most one rounding."""
    reference = alone(worlds, chain_name, 1, dtype, **settings)
    bare_run = spread(worlds, layout, "plain_adam", 1, dtype, **settings)[0]
    bare = largest_gap(bare_run.params, alone(worlds, "plain_adam", 1, dtype, **settings).params)
    for run in spread(worlds, layout, chain_name, 1, dtype, **settings):
        for name, gap in largest_gap(run.params, reference.params).items():
            largest = reference.params[name].abs().max().item()
            one_rounding = largest * torch.finfo(dtype).eps if bare[name] else 0.0
            assert gap <= bare[name] + one_rounding, name


# --- against the oracle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain_name", CHAINS)
def test_the_chain_equals_the_oracle(worlds, chain_name):
    """Float64 leaves nothing to rounding: a wrong place, sign or scale shows at once."""
    run, oracle = alone(worlds, chain_name, dtype=torch.float64), oracle_after(chain_name, dtype=torch.float64)
    for name in SHAPES:
        torch.testing.assert_close(run.params[name], oracle.params[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("chain_name", [name for name in CHAINS if name != "plain_adam"])
def test_decay_of_the_oracle_is_not_vacuous(chain_name):
    """The same chain without decay ends somewhere else by far more than any tolerance here."""
    gaps = largest_gap(oracle_after(chain_name).params, oracle_after("plain_adam").params)
    assert max(gaps.values()) > 1e-4


EXACT = ["l2_of_grad", "std_of_params_coupled", "linf_of_params", "sgd_l0", "params_and_grad_share"]


@pytest.mark.parametrize("layout", EVERY)
@pytest.mark.parametrize("chain_name", EXACT)
def test_coefficients_are_within_one_ulp_of_the_oracle(worlds, layout, chain_name):
    """On the first step the inputs of these metrics are exactly the oracle's."""
    expected = [next(iter(by_name.values())) for by_name in oracle_after(chain_name, 1).coefficients]
    for run in spread(worlds, layout, chain_name, 1):
        measured = [number.item() for number in run.coefficients[0]]
        assert len(measured) == len(expected)
        for ours, theirs in zip(measured, expected, strict=True):
            assert abs(ours - theirs) <= ulp(theirs)


def metrics_on(layout: str, seed: int, scale: float) -> dict[str | float, float]:
    import distwd

    held = layouts.place(layout, whole_model(seed, scale=scale))
    tensors, names = list(held.values()), list(held)
    return {metric: distwd.global_metric(tensors, metric, names=names, layout=held.marks).item() for metric in METRICS}


@pytest.mark.parametrize("layout", EVERY)
def test_metrics_are_within_one_ulp_of_the_oracle(worlds, layout):
    for seed, scale in ((0, 1.0), (1, 1e-12), (2, 1e6)):
        whole = list(whole_model(seed, scale=scale).values())
        for measured in worlds.run(EVERY[layout].ranks, metrics_on, layout, seed, scale):
            for metric, value in measured.items():
                expected = metric_of(whole, metric)
                assert abs(value - expected) <= ulp(expected), metric


# --- every element once ---------------------------------------------------------------------------------------------


def sums_on(layout: str) -> tuple[float, float, float]:
    """The sum of all-ones, and the sum and count where each parameter holds one power of two in all its elements."""
    import distwd

    ones = layouts.place(layout, {name: torch.ones(shape) for name, shape in SHAPES.items()})
    powers = layouts.place(layout, powers_of_two())

    def measure(held: layouts.Held, metric: str) -> float:
        return distwd.global_metric(held.items(), metric, layout=held.marks).item()

    return measure(ones, "sum"), measure(powers, "sum"), measure(powers, "l0")


def powers_of_two() -> dict[str, torch.Tensor]:
    """One element per parameter, a power of two each: the sum's binary digits show who was counted how often."""
    whole = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for digit, value in enumerate(whole.values()):
        value.view(-1)[-1] = 4.0**digit
    return whole


@pytest.mark.parametrize("layout", EVERY | LARGE)
def test_every_element_counts_once(worlds, layout):
    for ones, powers, count in worlds.run((EVERY | LARGE)[layout].ranks, sums_on, layout):
        assert ones == NUM_ELEMENTS
        assert powers == sum(4.0**digit for digit in range(len(SHAPES)))
        assert count == len(SHAPES)


# --- the same bits on every rank --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", SPREAD)
def test_numbers_have_the_same_bits_on_every_rank(worlds, layout):
    for chain_name in ("mad_of_update", "params_and_grad_share", "update_twice"):
        ranks = spread(worlds, layout, chain_name, foreach=True)
        reference = alone(worlds, chain_name, foreach=True)
        for run in ranks:
            for ours, theirs in zip(
                run.coefficients + run.metrics, reference.coefficients + reference.metrics, strict=True
            ):
                assert [number.item() for number in ours] == [number.item() for number in theirs]


@pytest.mark.parametrize(
    "layout", ["hsdp", "ddp2", "replicated3", "fsdp_tp", "experts", "experts_plain", "fsdp1_hybrid", "mixed"]
)
def test_replicas_do_not_drift(worlds, layout):
    gathered = [run.params for run in spread(worlds, layout, "cautious_var", 8)]
    assert all(differing(gathered[0], other) == [] for other in gathered[1:])
