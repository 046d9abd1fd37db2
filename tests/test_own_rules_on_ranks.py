"""Rules of one's own on real ranks: sharded equals whole, what is kept travels between layouts, and every rank moves alike."""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import distwd
from distwd import LR, Adam, Chain, Wrap, attach
from tests import layouts, runs, wire
from tests.layouts import EVERY, FLAT, LAYOUTS, SHAPES, Net, groups_of, whole_model
from tests.own_rules import COUPLING, KEPT, MEASURES_NOTHING, PLACES, RULES, SCOPES, kept_of, rule_of
from tests.runs import PARAMS_SEED, differing

NAMES = list(SHAPES)
LATE = {0: ("up.bias", "gate.weight"), 2: ("norm.weight",)}


# --- sharded equals whole ---------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What one rank saw of one rule: whole parameters, kept numbers by name, coefficients by step, collectives of some."""

    params: dict[str, torch.Tensor]
    phases: int
    kept: dict[str, dict[str, float]]
    coefficients: list[dict[Any, float]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


def make(way: str, rule: str, groups: list[dict], marks: dict | None = None) -> tuple[Any, Any]:
    """What steps, and what has `stats`. way: "chain before", "attach between", ...; see `PLACES`."""
    how, place = way.split()
    own = rule_of(rule)
    for group in groups[1:]:
        group["weight_decay" if how == "chain" else "distwd_weight_decay"] = 0.03
    if how == "chain":
        parts = [
            own if one is own else LR(one.lr) if hasattr(one, "lr") else Adam(foreach=True)
            for one in PLACES[place](own)
        ]
        chain = Chain(groups, *parts, layout=marks)
        return chain, chain
    # torch's own foreach step refuses a list of DTensors and plain tensors.
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0, foreach=False)
    return optimizer, attach(optimizer, own, coupling=COUPLING[place], layout=marks)


def numbers_of(stats: Mapping[str, Mapping[str, Any]]) -> dict[Any, float]:
    """All coefficients of a rule, by group or name; of one: under ""."""
    (table,) = stats.values()
    shown = table["coefficient"]
    return {key: value.item() for key, value in shown.items()} if isinstance(shown, dict) else {"": shown.item()}


def train_all(layout: str, cases: list[tuple[str, str]], mutant=nullcontext) -> dict[tuple[str, str], Seen]:
    """Runs on a rank: each (way, rule) from the seeded model, three steps, with gradients that come late."""
    held = layouts.place(layout, whole_model(PARAMS_SEED))
    start = {name: layouts.local_of(param).clone() for name, param in held.items()}
    found = {}
    for way, rule in cases:
        for name, param in held.items():
            layouts.local_of(param).copy_(start[name])
            param.grad = None
        optimizer, decay = make(way, rule, groups_of(held, layout in FLAT), held.marks)
        seen = found[way, rule] = Seen({}, 0, {})
        with mutant():
            for step in range(3):
                runs.feed(layout, held, step, LATE.get(step, ()) if layout not in FLAT else ())
                # The first step may exchange descriptions, if anything is to be measured. Counting slows every operation.
                is_counted = step == 1 or rule in MEASURES_NOTHING
                with wire.Wire() if is_counted else nullcontext() as counted:
                    optimizer.step()
                seen.counts += [len(counted.calls)] if is_counted else []
                seen.coefficients.append(numbers_of(decay.stats()))
        seen.phases = decay.phases
        seen.params = layouts.view(layout, held)
        # Plain pieces without elements keep nothing.
        seen.kept = kept_of(optimizer, {name: param for name, param in held.items() if param.numel()})
    return found


WAYS = [f"{how} {place}" for how in ("chain", "attach") for place in PLACES]
# Every rule in every way on the layouts that differ most; on the others each rule in one, by turns.
DIFFERENT = ("fsdp3", "fsdp_tp", "stages")
SPREAD = [name for name in EVERY if name != "single"]


def cases_on(layout: str) -> list[tuple[str, str]]:
    rules = [rule for rule in RULES if layout not in FLAT or rule not in SCOPES]
    if layout in DIFFERENT:
        return [(way, rule) for way in WAYS for rule in rules]
    turn = SPREAD.index(layout)
    return [(WAYS[(turn + number) % len(WAYS)], rule) for number, rule in enumerate(rules)]


@functools.cache
def whole(worlds, in_one_group: bool) -> dict[tuple[str, str], Seen]:
    """The same in one process; for layouts whose parameters are flat, with all gradients and one group."""
    cases = [(way, rule) for way in WAYS for rule in RULES]
    (found,) = worlds.run(0, train_flat if in_one_group else train_all, "single", cases)
    return found


def train_flat(layout: str, cases: list[tuple[str, str]]) -> dict[tuple[str, str], Seen]:
    with mock.patch.object(__import__(__name__, fromlist=["FLAT"]), "FLAT", ("single",)):
        return train_all(layout, cases)


def assert_equal_to_whole(layout: str, ranks: list[dict], reference: dict) -> None:
    for (way, rule), first in ranks[0].items():
        expected = reference[way, rule]
        for seen in (rank[way, rule] for rank in ranks):
            where = f"{rule}, {way}"
            assert differing(seen.params, expected.params) == [], where
            for ours, theirs in zip(seen.coefficients, expected.coefficients, strict=True):
                assert ours.items() <= theirs.items() and (ours or SCOPES.get(rule) == "tensor"), where
            for name, numbers in seen.kept.items():
                other = name if name in expected.kept else "up.weight"
                assert numbers == expected.kept[other], f"{where}: {name}"
                # A parameter that has never had a gradient has no state to keep them in.
                assert numbers.keys() == KEPT[rule] or (name in LATE[0] and not numbers), where
            is_alone = EVERY[layout].ranks == 1
            assert seen.phases == (0 if rule in MEASURES_NOTHING or is_alone else 1), where
            assert set(seen.counts) == {seen.phases}, where
            assert seen.phases == first.phases


@pytest.mark.parametrize("layout", SPREAD)
def test_sharded_equals_whole(worlds, layout):
    """Parameters, coefficients and kept numbers, bit for bit, from one all-reduce; a rule that only keeps needs none."""
    ranks = worlds.run(EVERY[layout].ranks, train_all, layout, cases_on(layout))
    assert_equal_to_whole(layout, ranks, whole(worlds, layout in FLAT))


def test_rules_do_something(worlds):
    """Kept numbers differ between rules, steps and parameters, so that what is compared above is not all zeros."""
    found = whole(worlds, False)
    for (way, rule), seen in found.items():
        values = {value for numbers in seen.kept.values() for value in numbers.values()}
        assert len(values) > 1 or rule in ("adaptive", "fading", "two scopes", "by update"), (way, rule)
        if SCOPES.get(rule) == "tensor" and KEPT[rule]:
            assert len(values) > 4
    assert differing(found["chain between", "adaptive"].params, found["chain between", "fading"].params) != []


# --- mutants ----------------------------------------------------------------------------------------------------------


@contextmanager
def local_numbers() -> Iterator[None]:
    """A rank measures its own part."""
    with mock.patch("distwd.metrics.measure.sum_over_ranks", lambda packed, world: packed):
        yield


@contextmanager
def local_order() -> Iterator[None]:
    """A number of a parameter is looked up by the parameter's place on this rank."""
    with mock.patch(
        "distwd.metrics.measure.Slots.index",
        lambda self, positions, scope, device: torch.tensor(list(positions), dtype=torch.int64),
    ):
        yield


@contextmanager
def local_gradients() -> Iterator[None]:
    """Whether a number moves is decided by the gradients of this rank."""
    from distwd.step import coefficients

    measure = coefficients.measure

    def wrong(plan, requests, **kwargs):
        numbers = measure(plan, requests, **kwargs)
        if len(requests) > 1 and requests[-1].metric.name == "l0":
            here = torch.zeros_like(numbers[-1])
            for owned, *_ in requests[-1].taken.parts:
                here[[plan.name_ids[position] for position in owned]] = 1.0
            numbers[-1] = here
        return numbers

    with mock.patch.object(coefficients, "measure", wrong):
        yield


@pytest.mark.parametrize(
    ("mutant", "layout", "rule"),
    [
        (local_numbers, "fsdp3", "adaptive"),
        (local_numbers, "stages", "radius of all"),
        (local_order, "stages_interleaved", "multiplier"),
        (local_order, "stages", "radius"),
    ],
)
def test_a_mutant_is_seen(worlds, mutant, layout, rule):
    cases = [("chain between", rule)]
    ranks = worlds.run(EVERY[layout].ranks, train_all, layout, cases, mutant)
    assert_equal_to_whole(layout, worlds.run(EVERY[layout].ranks, train_all, layout, cases), whole(worlds, False))
    with pytest.raises(AssertionError):
        assert_equal_to_whole(layout, ranks, whole(worlds, False))


# --- checkpoints ------------------------------------------------------------------------------------------------------

ALL_KEPT: set[str] = set().union(*KEPT.values()) - KEPT["radius of all"]
KEEPING = ["adaptive", "multiplier", "radius", "mean of update", "fading"]
CARRIERS = ["chain", "stateless chain", "AdamW", "SGD", "momentum"]
FORMS = {
    "plain": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


class Job:
    """A model and an optimizer with all rules that keep something, as a script makes them at its start."""

    def __init__(self, layout: str, carrier: str, seed: int = PARAMS_SEED, dtype: torch.dtype = torch.float32) -> None:
        self.layout = layout
        self.net = Net(whole_model(seed, dtype))
        LAYOUTS[layout].wrap(self.net)
        self.held = dict(self.net.named_parameters())
        groups = groups_of(self.held, layout in FLAT)
        rules = self.rules()
        if carrier == "chain":
            self.optimizer: torch.optim.Optimizer = Chain(groups, Adam(foreach=False), *rules, LR(0.01))
        elif carrier == "stateless chain":
            self.optimizer = Chain(groups, *rules, LR(0.01))
        elif carrier == "AdamW":
            self.optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0, foreach=False)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9 * (carrier == "momentum"), foreach=False)
        if "chain" not in carrier:
            attach(self.optimizer, *rules)

    def rules(self) -> list[distwd.Rule]:
        return [rule_of(name) for name in KEEPING]

    def train(self, steps: range) -> tuple[dict, dict]:
        for step in steps:
            runs.feed(self.layout, self.held, step)
            self.optimizer.step()
        return layouts.view(self.layout, self.held), self.kept()

    def kept(self) -> dict:
        return kept_of(self.optimizer, self.held)

    def state(self, options: StateDictOptions) -> dict[str, Any]:
        whole_too = StateDictOptions(full_state_dict=options.full_state_dict, cpu_offload=options.cpu_offload)
        return {
            "model": get_model_state_dict(self.net, options=whole_too),
            "optimizer": get_optimizer_state_dict(self.net, self.optimizer, options=options),
        }


def saved(layout: str, carrier: str, form: str, folder: str, make: type[Job] = Job) -> tuple:
    """Two steps, saved, two more: what is kept when it is saved, and parameters and kept numbers at the end."""
    job = make(layout, carrier)
    job.train(range(2))
    before, state = job.kept(), job.state(FORMS[form])
    assert job.kept() == before
    if form != "full":
        dcp.save(state, checkpoint_id=folder)
    elif dist.get_rank() == 0:
        torch.save(state, Path(folder) / "whole.pt")
    dist.barrier()
    return before, *job.train(range(2, 4))


def loaded(layout: str, carrier: str, form: str, folder: str, make: type[Job] = Job) -> tuple:
    job = make(layout, carrier, seed=PARAMS_SEED + 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*kept numbers")
        if form != "full":
            state = job.state(FORMS[form])
            begun = {value for numbers in job.kept().values() for value in numbers.values()}
            assert begun <= {0.0, 1.0, (0.0,) * 4}, "a hidden step"
            dcp.load(state, checkpoint_id=folder)
            set_model_state_dict(job.net, state["model"])
            set_optimizer_state_dict(job.net, job.optimizer, state["optimizer"], options=FORMS[form])
        else:
            state = {"model": {}, "optimizer": {}}
            if dist.get_rank() == 0:
                state = torch.load(Path(folder) / "whole.pt", weights_only=True)
            set_model_state_dict(job.net, state["model"], options=FROM_RANK_0)
            set_optimizer_state_dict(job.net, job.optimizer, state["optimizer"], options=FROM_RANK_0)
    return job.kept(), *job.train(range(2, 4))


# torch cannot load the full form of an optimizer whose state is nothing but scalars.
@pytest.mark.parametrize(("carrier", "form"), [(c, f) for c in CARRIERS for f in FORMS if (c, f) != ("SGD", "full")])
def test_kept_numbers_saved_at_four_ranks_go_on_elsewhere_bit_for_bit(worlds, carrier, form):
    with tempfile.TemporaryDirectory() as folder:
        before, params, after = worlds.run(4, saved, "fsdp4", carrier, form, folder)[0]
        assert all(len(numbers) == 7 for numbers in before.values())
        for layout in ("fsdp2", "fsdp1rank", "fsdp_tp"):
            for at_load, ours, kept in worlds.run(LAYOUTS[layout].ranks, loaded, layout, carrier, form, folder):
                assert at_load == before, layout
                assert differing(ours, params) == [], layout
                assert kept == after, layout


def quietly(fn: Callable[..., Any], *args: Any) -> Any:
    """Without warnings of decay that bf16 rounds away, or of FSDP1's age; ours of kept numbers are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*kept numbers")
        return fn(*args)


def saved_in_bf16(carrier: str, folder: str) -> tuple:
    job = Job("fsdp2", carrier, dtype=torch.bfloat16)
    job.train(range(2))
    dcp.save(job.state(StateDictOptions()), checkpoint_id=folder)
    return job.kept(), *job.train(range(2, 4))


def loaded_in_bf16(carrier: str, folder: str) -> tuple:
    job = Job("fsdp2", carrier, PARAMS_SEED + 1, torch.bfloat16)
    state = job.state(StateDictOptions())
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(job.net, state["model"])
    set_optimizer_state_dict(job.net, job.optimizer, state["optimizer"])
    kept = {key: value for key, value in job.optimizer.state[job.held["up.weight"]].items() if key in ALL_KEPT}
    assert all(value.dtype == torch.float32 for value in kept.values()) and len(kept) == len(ALL_KEPT)
    return job.kept(), *job.train(range(2, 4))


@pytest.mark.parametrize("carrier", ["chain", "AdamW"])
def test_a_checkpoint_of_bf16_parameters_keeps_all_bits_of_kept_numbers(worlds, carrier):
    with tempfile.TemporaryDirectory() as folder:
        before, params, after = worlds.run(2, quietly, saved_in_bf16, carrier, folder)[0]
        assert any(
            value != torch.tensor(value).bfloat16().item() for each in before.values() for value in each.values()
        )
        for at_load, ours, kept in worlds.run(2, quietly, loaded_in_bf16, carrier, folder):
            assert at_load == before
            assert differing(ours, params) == []
            assert kept == after


def build_fsdp1(carrier: str, seed: int, flat: bool) -> tuple:
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))
    net = FullyShardedDataParallel(net, use_orig_params=not flat, device_id=torch.device("cpu"))
    rules, layout = [rule_of(name) for name in KEEPING], distwd.Sharded.from_fsdp1(net)
    if carrier == "chain":
        return net, Chain(net.named_parameters(), Adam(foreach=False), *rules, LR(0.01), layout=layout)
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=0.01, weight_decay=0, foreach=False)
    attach(optimizer, *rules, layout=layout)
    return net, optimizer


def numbers_in(state: dict) -> dict[str, dict[str, float]]:
    return {
        name: {key: value.item() for key, value in own.items() if key in ALL_KEPT}
        for name, own in state["state"].items()
    }


def through_fsdp1(carrier: str, flat: bool) -> list:
    """What is saved after two steps, after loading that, and after two more: in one run, and in one that resumes."""
    options = StateDictOptions(full_state_dict=True)

    def train(net: nn.Module, optimizer, steps: range) -> dict:
        for step in steps:
            torch.manual_seed(10 + step)
            net(torch.randn(4, 5)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return get_optimizer_state_dict(net, optimizer, options=options)

    net, optimizer = build_fsdp1(carrier, 0, flat)
    state = train(net, optimizer, range(2))
    weights = get_model_state_dict(net, options=options)
    straight = train(net, optimizer, range(2, 4))
    other, resumed = build_fsdp1(carrier, 1, flat)
    set_model_state_dict(other, weights, options=options)
    set_optimizer_state_dict(other, resumed, state, options=options)
    again = get_optimizer_state_dict(other, resumed, options=options)
    return [numbers_in(each) for each in (state, again, straight, train(other, resumed, range(2, 4)))]


@pytest.mark.parametrize("flat", [False, True], ids=["pieces", "flat"])
@pytest.mark.parametrize("carrier", ["chain", "AdamW"])
def test_fsdp1_saves_and_loads_kept_numbers(worlds, carrier, flat):
    """Over three ranks some pieces are empty. FSDP1 saves nothing of these, and refuses numbers that differ between ranks."""
    for state, again, straight, resumed in worlds.run(3, quietly, through_fsdp1, carrier, flat):
        assert all(numbers.keys() == ALL_KEPT for numbers in state.values())
        assert again == state != straight == resumed


def around_a_hidden_step(carrier: str, form: str) -> tuple:
    """What is kept, and whether parameters have stayed, before and after state dicts are asked for and set."""
    job = Job("fsdp3", carrier)
    start = layouts.view("fsdp3", job.held)
    state = get_optimizer_state_dict(job.net, job.optimizer, options=FORMS[form])
    hidden = job.kept()
    set_optimizer_state_dict(job.net, job.optimizer, state, options=FORMS[form])
    unchanged = differing(layouts.view("fsdp3", job.held), start) == []
    fresh = Job("fsdp3", carrier)
    return unchanged, hidden, job.kept(), job.train(range(2)), fresh.train(range(2))


@pytest.mark.parametrize("form", ["plain", "flattened"])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_the_hidden_step_of_checkpoint_code_moves_nothing(worlds, carrier, form):
    for unchanged, hidden, after, ours, fresh in worlds.run(3, around_a_hidden_step, carrier, form):
        assert unchanged
        for numbers in hidden.values():
            assert numbers.keys() == ALL_KEPT
            begins = {key: float(key.endswith("_multiplier")) for key in numbers}
            assert numbers == begins
        assert hidden == after
        if carrier != "AdamW":  # which counts the hidden step as one of its own
            assert differing(ours[0], fresh[0]) == []
            assert ours[1] == fresh[1]


# --- every rank alike -------------------------------------------------------------------------------------------------


def late_stage(rule: str, way: str) -> tuple:
    """The last stage that holds parameters has no gradients in the first two of three steps."""
    held = layouts.place("stages", whole_model(PARAMS_SEED))
    optimizer, decay = make(f"{way} between", rule, [{"params": list(held.items())}])
    seen = []
    for step in range(3):
        late = list(held) if dist.get_rank() == 1 and step < 2 else []
        runs.feed("stages", held, step, late)
        optimizer.step()
        seen.append(numbers_of(decay.stats()))
    return seen, kept_of(optimizer, held)


@pytest.mark.parametrize("way", ["chain", "attach"])
@pytest.mark.parametrize("rule", ["adaptive", "radius of all", "fading", "mean of update"])
def test_shared_numbers_are_the_same_on_ranks_that_have_no_gradients_yet_or_no_parameters(worlds, rule, way):
    ranks = worlds.run(3, late_stage, rule, way)
    assert any(ranks[1][1].values())
    numbers = [each for _, kept in ranks for each in kept.values()]
    assert all(each == numbers[0] for each in numbers)
    for step in range(3):
        assert [seen[step] for seen, _ in ranks] == [ranks[0][0][step]] * 3


def on_empty_pieces(way: str, mutant=nullcontext) -> tuple:
    held = layouts.place("fsdp1_full", whole_model(PARAMS_SEED))
    optimizer, decay = make(f"{way} between", "multiplier", [{"params": list(held.items())}], held.marks)
    for step in range(2):
        runs.feed("fsdp1_full", held, step, ("up.bias",) if step else ())
        # FSDP1 gives a piece without elements no gradient.
        for param in held.values():
            param.grad = None if param.numel() == 0 else param.grad
        with mutant():
            optimizer.step()
    shown = decay.stats()["Multiplier"]["multiplier"]
    return (
        {name: value.item() for name, value in shown.items()},
        kept_of(optimizer, held),
        [n for n in held if held[n].numel() == 0],
    )


@pytest.mark.parametrize("way", ["chain", "attach"])
def test_a_number_moves_with_a_gradient_anywhere(worlds, way):
    """Over three ranks FSDP1 leaves some ranks an empty piece of a parameter, and no gradient."""
    ranks = worlds.run(3, on_empty_pieces, way)
    assert any(empty for *_, empty in ranks)
    for shown, kept, empty in ranks:
        assert shown == ranks[0][0]
        for name, numbers in kept.items():
            assert numbers == {"distwd_Multiplier_multiplier": shown[name]} or (name in empty and not numbers)
    assert len({ranks[0][0][name] for name in ("up.bias", "up.weight")}) == 2


def test_a_number_that_moves_with_the_gradients_of_its_rank_would_be_seen(worlds):
    ranks = worlds.run(3, on_empty_pieces, "chain", local_gradients)
    assert any(shown != ranks[0][0] for shown, *_ in ranks)


def without_reads(layout: str, rule: str, way: str) -> None:
    held = layouts.place(layout, whole_model(PARAMS_SEED))
    optimizer, _ = make(way, rule, groups_of(held, layout in FLAT), held.marks)
    runs.feed(layout, held, 0)
    optimizer.step()
    for step in (1, 2):
        runs.feed(layout, held, step)
        with wire.no_host_sync():
            optimizer.step()


@pytest.mark.parametrize("layout", ["fsdp3", "fsdp_tp"])
@pytest.mark.parametrize("rule", ["adaptive", "multiplier", "mean of update", "radius"])
def test_a_step_on_ranks_reads_nothing(worlds, layout, rule):
    for way in ("chain between", "attach between"):
        worlds.run(LAYOUTS[layout].ranks, without_reads, layout, rule, way)


class Wrong(distwd.Rule):
    """What it returns is wrong from the second step on."""

    def keeps(self, settings):
        return {"steps": 0.0}

    def measures(self, settings):
        return {"norm": distwd.Measure("params", "l2", "all")}

    def coefficient(self, settings, measured, kept):
        if settings["weight_decay"] == 0.5:
            return torch.ones(5), {"steps": kept["steps"]}
        return measured["norm"] * 0.01, {"steps": kept["steps"] + 1}


def refused(way: str) -> list:
    """The text of a refusal at construction, and of one in a step; and whether that has changed anything."""
    held = layouts.place("fsdp2", whole_model(PARAMS_SEED))
    texts = []

    def build(decay: float):
        if way == "chain":
            return Chain(held.items(), Wrap(torch.optim.SGD), Wrong(weight_decay=decay), LR(0.1))
        optimizer = torch.optim.AdamW(held.items(), lr=0.1, weight_decay=0)
        attach(optimizer, Wrong(weight_decay=decay))
        return optimizer

    try:
        build(0.5)
    except ValueError as error:
        texts.append(str(error))
    optimizer = build(0.1)
    runs.feed("fsdp2", held, 0)
    optimizer.step()
    kept, before = kept_of(optimizer, held), layouts.view("fsdp2", held)
    key = "weight_decay" if way == "chain" else "distwd_weight_decay"
    optimizer.param_groups[0][key] = 0.5
    try:
        optimizer.step()
    except ValueError as error:
        texts.append(str(error))
    still = differing(layouts.view("fsdp2", held), before) == [] and kept_of(optimizer, held) == kept
    optimizer.param_groups[0][key] = 0.1
    optimizer.step()
    return [*texts, still, kept_of(optimizer, held)["up.weight"]]


@pytest.mark.parametrize("way", ["chain", "attach"])
def test_a_wrong_answer_is_refused_on_every_rank_alike_and_can_be_put_right(worlds, way):
    for at_once, later, still, kept in worlds.run(2, refused, way):
        assert "Wrong.coefficient: the coefficient has shape (5,)" in at_once
        assert "Wrong.coefficient: the coefficient has shape (5,)" in later
        assert still
        assert kept == {"distwd_Wrong_steps": 2.0}
