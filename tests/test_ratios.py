"""Ratios of metrics, powers of them and their running means: numbers by hand, a float64 oracle, every layout, checkpoints."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from distwd import LR, Adam, Chain, RelativeWeightDecay, attach
from tests import layouts, runs, wire
from tests.layouts import EVERY, FLAT, LAYOUTS, SHAPES, Net, whole_model
from tests.ratios import COUPLING, KEPT, PLACES, RATIOS, RatioOracle, part, places_of, rule_of
from tests.runs import PARAMS_SEED, differing

NAMES = list(SHAPES)
GROUPS = [NAMES[:5], NAMES[5:]]
LATE = {0: ("up.bias", "gate.weight"), 2: ("norm.weight",)}
SECOND_DECAY = 0.03  # λ of the second group
NUM_STEPS = 4


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_awd_by_hand():
    """‖g‖ = 13, ‖θ‖ = 26, λ = 0.1, smoothing 0.1; then no gradient."""
    p = nn.Parameter(torch.tensor([10.0, 24.0]))
    rule = RelativeWeightDecay(0.1, norm_input="grad", metric="l2", per="params", smoothing=0.1)
    chain = Chain([p], rule, LR(0.0))
    for grad, expected in (([5.0, 12.0], 0.045), ([5.0, 12.0], 0.0495), ([0.0, 0.0], 0.00495)):
        p.grad = torch.tensor(grad)
        chain.step()
        shown = chain.stats()["RelativeWeightDecay"]
        torch.testing.assert_close(shown["coefficient"], torch.tensor(expected))
        torch.testing.assert_close(shown["mean"], torch.tensor(expected))
        torch.testing.assert_close(chain.state[p][KEPT], torch.tensor(expected))
    assert (shown["metric"], shown["per"]) == (torch.tensor(0.0), torch.tensor(26.0))


@pytest.mark.parametrize("power", [-2.0, -0.5, 0.0, 0.5, 2.0])
def test_a_power_of_a_ratio_by_hand(power):
    p = nn.Parameter(torch.tensor([3.0, -4.0]))
    p.grad = torch.tensor([0.0, 20.0])
    chain = Chain([p], RelativeWeightDecay(0.01, norm_input="grad", metric="l2", per="params", power=power), LR(1.0))
    chain.step()
    expected = 0.01 * 4.0**power
    torch.testing.assert_close(chain.stats()["RelativeWeightDecay"]["coefficient"], torch.tensor(expected))
    torch.testing.assert_close(p.detach(), torch.tensor([3.0, -4.0]) * (1 - expected) - torch.tensor([0.0, 20.0]))


def test_knobs_at_their_defaults_change_no_bit():
    def train(**knobs):
        params = {name: nn.Parameter(value) for name, value in whole_model(PARAMS_SEED).items()}
        chain = Chain(params.items(), Adam(foreach=True), RelativeWeightDecay(0.1, **knobs), LR(0.01))
        for step in range(2):
            runs.feed("single", params, step)
            chain.step()
        return params

    assert differing(train(), train(per=None, power=1, smoothing=0)) == []
    assert differing(train(), train(power=0.9)) != []


ZEROS: dict[str, tuple[dict, list[float], list[float], float]] = {
    "a parameter of zeros": ({"norm_input": "grad", "per": "params"}, [0.0, 0.0], [1.0, 1.0], 0.0),
    "nothing per nothing": ({"norm_input": "grad", "per": "params"}, [0.0, 0.0], [0.0, 0.0], 0.0),
    "no gradient, inverted": ({"norm_input": "grad", "power": -0.5}, [1.0, 1.0], [0.0, 0.0], 0.0),
    "nothing of a ratio, inverted": ({"norm_input": "grad", "per": "params", "power": -1}, [1.0, 1.0], [0.0, 0.0], 0.0),
    "NaN per nothing": ({"norm_input": "grad", "per": "params"}, [0.0, 0.0], [math.nan, 1.0], math.nan),
    "nothing per NaN, inverted": ({"norm_input": "params", "per": "grad", "power": -1}, [0.0, 0.0], [math.nan, 1.0], math.nan),
    "NaN to the power of 0": ({"norm_input": "grad", "power": 0}, [1.0, 1.0], [math.nan, 1.0], math.nan),
}  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
@pytest.mark.parametrize("case", ZEROS)
def test_a_division_by_zero_is_no_decay_and_nan_is_not_hidden(case, smoothing):
    knobs, values, grads, expected = ZEROS[case]
    p = nn.Parameter(torch.tensor(values))
    p.grad = torch.tensor(grads)
    chain = Chain([p], RelativeWeightDecay(0.1, smoothing=smoothing, **knobs), LR(1.0))
    chain.step()
    assert chain.stats()["RelativeWeightDecay"]["coefficient"].item() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("decay", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_off_is_off_for_the_mean_too(decay):
    """It goes on from zeros, also where the metric is infinite."""
    p = nn.Parameter(torch.ones(2))
    chain = Chain([p], RelativeWeightDecay(0.5, norm_input="grad", metric="linf", smoothing=0.5), LR(0.0))
    for value, expected in ((4.0, 1.0), (math.inf, 0.5)):
        p.grad = torch.full((2,), value)
        chain.step()
        assert chain.state[p][KEPT].item() == expected
        chain.param_groups[0]["weight_decay"] = decay
    assert chain.stats()["RelativeWeightDecay"]["coefficient"] == 0


REFUSED = {
    "per": ({"per": "weights"}, "per='weights' is not known; use one of"),
    "power": ({"power": math.inf}, "power=inf is not usable"),
    "power of a word": ({"power": "half"}, "power='half' is not usable"),
    "smoothing": ({"smoothing": 1.0}, r"smoothing=1.0 must be >= 0 and < 1"),
    "smoothing below 0": ({"smoothing": -0.1}, "smoothing=-0.1"),
    "smoothing that is no number": ({"smoothing": True}, "smoothing=True is not usable"),
    "root of a sum": ({"metric": "sum", "power": 0.5}, r"a sum may be negative, and then power=0.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused(case):
    knobs, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        RelativeWeightDecay(0.1, **knobs)
    # A group's own value, too, and before anything has changed.
    chain = Chain([nn.Parameter(torch.ones(2))], RelativeWeightDecay(0.1), LR(0.1))
    with pytest.raises(ValueError, match=message):
        chain.add_param_group({"params": [nn.Parameter(torch.ones(2))], **knobs})
    assert len(chain.param_groups) == 1


def test_the_table_tells_the_ratio():
    rule = RelativeWeightDecay(0.1, norm_input="grad", metric="l2", per="params", power=-0.5, smoothing=0.1)
    words = "RelativeWeightDecay (× (l2 of grad / l2 of params)^-0.5, smoothed 0.1, × lr)"
    assert words in str(Chain([nn.Parameter(torch.ones(2))], rule, LR(0.1)))


# --- sharded equals whole, and both equal the oracle ------------------------------------------------------------------


@dataclass
class Seen:
    """What one rank saw: whole parameters, c̄ by name, coefficients by step, collectives of a step."""

    params: dict[str, torch.Tensor]
    phases: int = 0
    kept: dict[str, float] = field(default_factory=dict)
    coefficients: list[dict[Any, float]] = field(default_factory=list)
    wires: list[str] = field(default_factory=list)


def groups_of(held: Mapping[str, nn.Parameter], is_flat: bool) -> list[dict]:
    """Two groups, but where parameters have been joined to flat ones."""
    if is_flat:
        return [{"params": list(held.items())}]
    found: list[dict] = [{"params": [(n, p) for n, p in held.items() if n in names]} for names in GROUPS]
    for group in found:
        group |= {} if group["params"] else {"param_names": []}
    return found


def make(way: str, name: str, held: Mapping[str, nn.Parameter], is_flat: bool = False, **adam) -> tuple[Any, Any]:
    """What steps, and what has `stats`. way: "chain between", "attach after", ..."""
    how, place = way.split()
    groups, rule, marks = groups_of(held, is_flat), rule_of(name), getattr(held, "marks", None)
    for group in groups[1:]:
        group["weight_decay" if how == "chain" else "distwd_weight_decay"] = SECOND_DECAY
    if how == "chain":
        adam = {"foreach": True, **adam}
        parts = [
            rule if one is rule else LR(one.lr) if hasattr(one, "lr") else Adam(**adam) for one in PLACES[place](rule)
        ]
        chain = Chain(groups, *parts, layout=marks)
        return chain, chain
    # torch's own foreach step refuses a list of DTensors and plain tensors.
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0, **{"foreach": False, **adam})
    return optimizer, attach(optimizer, rule, coupling=COUPLING[place], layout=marks)


def coefficients_of(stats: Mapping[str, Mapping[str, Any]]) -> dict[Any, float]:
    (table,) = stats.values()
    # Of one metric over all there is a coefficient for each group, since groups have a decay of their own.
    shown = table.get("coefficients", table["coefficient"])
    return {key: value.item() for key, value in shown.items()} if isinstance(shown, dict) else {0: shown.item()}


def kept_of(optimizer, held: Mapping[str, nn.Parameter]) -> dict[str, float]:
    found = {name: optimizer.state.get(param, {}).get(KEPT) for name, param in held.items()}
    return {name: value.item() for name, value in found.items() if value is not None}


def train(layout: str, cases: list[tuple[str, str]], is_flat: bool = False, mutant=nullcontext) -> dict:
    """Runs on a rank: each (way, rule) from the seeded model, with gradients that come late."""
    held = layouts.place(layout, whole_model(PARAMS_SEED))
    start = {name: layouts.local_of(param).clone() for name, param in held.items()}
    found = {}
    for way, name in cases:
        for each, param in held.items():
            layouts.local_of(param).copy_(start[each])
            param.grad = None
        optimizer, decay = make(way, name, held, is_flat)
        seen = found[way, name] = Seen({})
        with mutant():
            for step in range(NUM_STEPS):
                runs.feed(layout, held, step, () if is_flat else LATE.get(step, ()))
                # The first step exchanges descriptions. Counting slows every operation.
                with wire.Wire() if step == 1 else nullcontext() as counted:
                    optimizer.step()
                seen.wires += counted.calls if step == 1 else []
                seen.coefficients.append(coefficients_of(decay.stats()))
        seen.phases, seen.params = decay.phases, layouts.view(layout, held)
        seen.kept = kept_of(optimizer, {each: param for each, param in held.items() if param.numel()})
    return found


CASES = [(f"{how} {place}", name) for name in RATIOS for place in places_of(name) for how in ("chain", "attach")]
SPREAD = [name for name in EVERY if name != "single"]


def cases_on(layout: str) -> list[tuple[str, str]]:
    """Every rule in both ways on two layouts that differ much; on the others some, by turns."""
    if layout in ("fsdp3", "stages"):
        return [case for case in CASES if case[0].endswith("between") and (case[0] < "b") is (layout == "stages")]
    turn = SPREAD.index(layout)
    some = [CASES[(5 * turn + 7 * number) % len(CASES)] for number in range(3)]
    return [case for case in some if layout not in FLAT or RATIOS[case[1]][1].get("scope", "all") == "all"]


@functools.cache
def whole(worlds, is_flat: bool = False) -> dict:
    (found,) = worlds.run(0, train, "single", CASES, is_flat)
    return found


def assert_equal_to_whole(ranks: list[dict], reference: dict, is_alone: bool = False) -> None:
    for case in ranks[0]:
        expected = reference[case]
        for seen in (rank[case] for rank in ranks):
            assert differing(seen.params, expected.params) == [], case
            for ours, theirs in zip(seen.coefficients, expected.coefficients, strict=True):
                assert ours.items() <= theirs.items(), case
            for name, value in seen.kept.items():
                assert value == expected.kept[name if name in expected.kept else "up.weight"], (case, name)
            assert seen.phases == len(seen.wires) == (0 if is_alone else 1), case


@pytest.mark.parametrize("layout", SPREAD)
def test_sharded_equals_whole(worlds, layout):
    """Parameters, coefficients and running means, bit for bit, from one all-reduce."""
    is_flat = layout in FLAT
    ranks = worlds.run(EVERY[layout].ranks, train, layout, cases_on(layout), is_flat)
    assert_equal_to_whole(ranks, whole(worlds, is_flat), EVERY[layout].ranks == 1)


@pytest.mark.parametrize(("way", "name"), CASES)
def test_the_whole_equals_the_oracle(worlds, way, name):
    seen = whole(worlds)[way, name]
    own = part(name, by_name={each: {"weight_decay": SECOND_DECAY} for each in GROUPS[1]})
    oracle = RatioOracle(whole_model(PARAMS_SEED), PLACES[way.split()[1]](own), GROUPS)
    for step in range(NUM_STEPS):
        grads = runs.grads_of(step)
        oracle.step({each: None if each in LATE.get(step, ()) else grad for each, grad in grads.items()})
        expected = {oracle.cell(own, each): oracle.coefficients[0][each] for each in NAMES}
        for cell, value in seen.coefficients[step].items():
            assert value == pytest.approx(expected[cell], rel=1e-5), (step, cell)
    for each, value in oracle.params.items():
        torch.testing.assert_close(seen.params[each].double(), value, rtol=2e-5, atol=2e-6)
    assert seen.kept.keys() == (set(NAMES) if own.smoothing else set())
    for each, value in seen.kept.items():
        assert value == pytest.approx(oracle.means[oracle.cell(own, each)], rel=1e-5), each


# --- mutants ----------------------------------------------------------------------------------------------------------


@contextmanager
def local_numbers() -> Iterator[None]:
    """A rank measures its own part."""
    with mock.patch("distwd.metrics.measure.sum_over_ranks", lambda packed, world: packed):
        yield


@contextmanager
def uncorrected() -> Iterator[None]:
    """The second moment without its bias correction."""
    from distwd.optimizers import state

    source = state.Source
    with mock.patch.object(state, "Source", lambda positions, values, minus, scale: source(positions, values)):
        yield


@contextmanager
def of_updated() -> Iterator[None]:
    """The second moment of the parameters alone that have a gradient now."""
    from distwd.optimizers import state

    def wrong(step, host_of, state_of, right=state.second_moments):
        updated = {position for batch in step.batches for position in batch.index}
        with mock.patch.object(step, "frozen", tuple(set(range(len(step.entries))) - updated)):
            return right(step, host_of, state_of)

    with mock.patch("distwd.optimizers.base.second_moments", wrong):
        yield


@contextmanager
def before_the_step() -> Iterator[None]:
    """The second moment as the step before has left it: the optimizer is not run first."""
    with mock.patch("distwd.step.step.Step.run_waiting", return_value=None):
        yield


@pytest.mark.parametrize(
    ("mutant", "name"),
    [
        (local_numbers, "awd"),
        (local_numbers, "moment per params"),
        (uncorrected, "swd"),
        (of_updated, "swd"),
        (before_the_step, "swd by group"),
    ],
)
def test_a_mutant_is_seen(worlds, mutant, name):
    ranks = worlds.run(3, train, "fsdp3", [("chain between", name)], False, mutant)
    with pytest.raises(AssertionError):
        assert_equal_to_whole(ranks, whole(worlds))


# --- checkpoints ------------------------------------------------------------------------------------------------------

CARRIERS = {"chain": "chain between", "AdamW": "attach between"}


class Job:
    """A model and its optimizer, as a script makes them at its start."""

    def __init__(self, layout: str, carrier: str, name: str, seed: int = PARAMS_SEED) -> None:
        self.layout, self.net = layout, Net(whole_model(seed))
        LAYOUTS[layout].wrap(self.net)
        self.held = dict(self.net.named_parameters())
        self.optimizer, self.decay = make(CARRIERS[carrier], name, self.held)
        if carrier == "chain":  # torch's foreach and single-tensor kernels have the same bits
            assert self.optimizer.state[next(iter(self.held.values()))][KEPT] == 0

    def train(self, steps: range) -> tuple[dict, dict, list]:
        shown = []
        for step in steps:
            runs.feed(self.layout, self.held, step)
            self.optimizer.step()
            shown.append(coefficients_of(self.decay.stats()))
        return layouts.view(self.layout, self.held), kept_of(self.optimizer, self.held), shown

    def state(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.net),
            "optimizer": get_optimizer_state_dict(self.net, self.optimizer),
        }


def saved(layout: str, carrier: str, name: str, folder: str) -> tuple:
    job = Job(layout, carrier, name)
    job.train(range(2))
    dcp.save(job.state(), checkpoint_id=folder)
    return kept_of(job.optimizer, job.held), *job.train(range(2, 4))


def loaded(layout: str, carrier: str, name: str, folder: str, forgets: bool = False) -> tuple:
    job = Job(layout, carrier, name, seed=PARAMS_SEED + 1)
    state = job.state()
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(job.net, state["model"])
    set_optimizer_state_dict(job.net, job.optimizer, state["optimizer"])
    if forgets:
        for own in job.optimizer.state.values():
            own[KEPT].zero_()
    return kept_of(job.optimizer, job.held), *job.train(range(2, 4))


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("name", ["awd", "awd by tensor", "swd by group"])
def test_means_saved_at_four_ranks_go_on_elsewhere_bit_for_bit(worlds, carrier, name):
    with tempfile.TemporaryDirectory() as folder:
        before, params, after, shown = worlds.run(4, saved, "fsdp4", carrier, name, folder)[0]
        assert set(before) == set(NAMES) and 0.0 not in before.values()
        for layout in ("fsdp2", "fsdp1rank", "fsdp_tp"):
            for at_load, ours, kept, seen in worlds.run(LAYOUTS[layout].ranks, loaded, layout, carrier, name, folder):
                assert at_load == before, layout
                assert differing(ours, params) == [], layout
                assert kept == after, layout
                assert seen == shown, layout
        # Who forgets the means would be seen.
        forgotten = worlds.run(2, loaded, "fsdp2", carrier, name, folder, True)[0]
        assert differing(forgotten[1], params) != []


def through_a_hidden_step(carrier: str) -> tuple:
    job, fresh = Job("fsdp3", carrier, "awd"), Job("fsdp3", carrier, "awd")
    start = layouts.view("fsdp3", job.held)
    state = get_optimizer_state_dict(job.net, job.optimizer)
    set_optimizer_state_dict(job.net, job.optimizer, state)
    unchanged = differing(layouts.view("fsdp3", job.held), start) == []
    return unchanged, kept_of(job.optimizer, job.held), job.train(range(1))[1], fresh.train(range(1))[1]


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_hidden_step_moves_no_mean(worlds, carrier):
    for unchanged, kept, after, fresh in worlds.run(3, through_a_hidden_step, carrier):
        assert unchanged
        assert kept == dict.fromkeys(NAMES, 0.0)
        assert after == fresh


# --- a skipped step, and no reads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize("way", ["chain between", "attach between", "attach after"])
def test_a_skipped_step_moves_nothing(way, name):
    """A GradScaler finds an infinity: a fused optimizer is stepped and skips by itself, and so do decay and mean."""
    params = {n: nn.Parameter(v) for n, v in whole_model(PARAMS_SEED).items()}
    adam = {"foreach": None, "fused": True}
    optimizer, _ = make(way, name, params, **adam)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    seen = []
    for step in range(3):
        optimizer.zero_grad()
        grads = runs.grads_of(step)
        scaler.scale(sum((params[n] * grads[n]).sum() for n in params)).backward()
        if step == 1:
            params["up.weight"].grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        seen.append(({n: p.detach().clone() for n, p in params.items()}, kept_of(optimizer, params)))
    (first, kept), (skipped, still), (last, moved) = seen
    assert differing(first, skipped) == [] and kept == still
    assert differing(skipped, last) != [] and (moved != still or not RATIOS[name][1].get("smoothing"))


def without_reads(layout: str, cases: list[tuple[str, str]]) -> None:
    for way, name in cases:
        held = layouts.place(layout, whole_model(PARAMS_SEED))
        optimizer, _ = make(way, name, held)
        for step in range(3):
            runs.feed(layout, held, step)
            with wire.no_host_sync() if step else nullcontext():
                optimizer.step()


@pytest.mark.parametrize("layout", ["single", "fsdp3", "fsdp_tp"])
def test_a_step_reads_nothing(worlds, layout):
    cases = [(f"{how} between", name) for how in ("chain", "attach") for name in RATIOS]
    worlds.run(LAYOUTS[layout].ranks, without_reads, layout, cases)
