"""Norm rules: numbers to check by hand, a float64 oracle, every layout, and what must be seen if it goes wrong."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import distwd
from distwd import LR, Adam, Chain, Hyperball, Rule, attach
from tests import chains, layouts, runs, wire
from tests.layouts import EVERY, FLAT, LAYOUTS, SHAPES, Net, groups_of, whole_model
from tests.norm_rules import PHASES, SENTENCES, Norm, NormOracle, rule_of
from tests.oracle import LrPart
from tests.runs import PARAMS_SEED, differing, grads_of

STEPS = 5
NAMES = list(SHAPES)
# Gradients that come late: such parameters rest until then.
LATE = {0: ("up.bias", "gate.weight"), 2: ("norm.weight",)}


# --- every layout -----------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What one rank saw: whole parameters, kept numbers by name and key, gains by step, collectives of a step."""

    params: dict[str, torch.Tensor]
    kept: dict[str, dict[str, torch.Tensor]]
    phases: int
    counts: list[int] = field(default_factory=list)


def make(way: str, sentence: str, groups: list[dict], marks: dict | None = None) -> tuple[Any, Any]:
    """What steps, and what has `stats`."""
    parts = SENTENCES[sentence]
    transforms = [
        rule_of(part) if isinstance(part, Norm) else chains._transform(part, {"foreach": True}, distwd)
        for part in parts
    ]
    if way == "chain":
        chain = Chain(groups, *transforms, layout=marks)
        return chain, chain
    lr = next(part.lr for part in parts if isinstance(part, LrPart))
    rules = [one for one in transforms if isinstance(one, Rule)]
    coupling = "lr" if isinstance(parts[-1], LrPart) else "none"
    cls = torch.optim.AdamW if way == "attach" else Copied
    optimizer = cls(groups, lr=lr, weight_decay=0, foreach=False)
    return optimizer, attach(optimizer, *rules, coupling=coupling, layout=marks)


class Copied(torch.optim.AdamW):
    """An optimizer that attach does not know: it learns the update from a copy of the parameters."""


def train(layout: str, cases: list[tuple[str, str]], mutant=nullcontext) -> dict[tuple[str, str], Seen]:
    """Runs on a rank: each (way, sentence) from the seeded model."""
    held = layouts.place(layout, whole_model(PARAMS_SEED))
    start = {name: layouts.local_of(param).clone() for name, param in held.items()}
    found = {}
    for way, sentence in cases:
        for name, param in held.items():
            layouts.local_of(param).copy_(start[name])
            param.grad = None
        optimizer, decay = make(way, sentence, groups_of(held, layout in FLAT), held.marks)
        seen = found[way, sentence] = Seen({}, {}, 0)
        with mutant():
            for step in range(STEPS):
                runs.feed(layout, held, step, LATE.get(step, ()) if layout not in FLAT else ())
                with wire.Wire() if step == 2 else nullcontext() as counted:
                    optimizer.step()
                seen.counts += [len(counted.calls)] if step == 2 else []
        seen.phases = decay.phases
        seen.params = layouts.view(layout, held)
        seen.kept = kept_of(optimizer, held)
    return found


def kept_of(optimizer: Any, held: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for name, param in held.items():
        state = {key: value for key, value in optimizer.state.get(param, {}).items() if key.startswith("distwd_")}
        if param.numel():
            found[name] = {key: layouts.whole_of(value).clone() for key, value in state.items()}
    return found


CHAINS = [("chain", name) for name in SENTENCES]
ATTACHED = [("attach", name) for name in ("brake", "ball", "search")] + [("copied", name) for name in ("ball", "later")]
CASES = CHAINS + ATTACHED
# What wholes are cut like: rows, both dimensions, stacked experts twice, stages, copies on a mesh of their own, plain pieces.
CUT = ("fsdp3", "fsdp_tp", "experts_fsdp", "stages_interleaved", "mixed", "hsdp", "fsdp1_full")


def cases_on(layout: str) -> list[tuple[str, str]]:
    """A few by turns, so that each is met on several layouts."""
    turn = CUT.index(layout)
    if layout == "fsdp1_full":  # pieces that do not tell their matrices
        return [case for case in CASES if case[1] in ("by tensor", "by group")]
    return [CASES[(3 * turn + 7 * number) % len(CASES)] for number in range(6)]


@functools.cache
def whole(worlds) -> dict[tuple[str, str], Seen]:
    (found,) = worlds.run(0, train, "single", CASES)
    return found


def assert_equal_to_whole(layout: str, ranks: list[dict], reference: dict) -> None:
    for rank in ranks:
        for case, seen in rank.items():
            expected = reference[case]
            assert differing(seen.params, expected.params) == [], case
            for name, numbers in seen.kept.items():
                assert numbers.keys() == expected.kept[name].keys(), (case, name)
                for key, value in numbers.items():
                    assert torch.equal(value, expected.kept[name][key]), (case, name, key)
            phases = 0 if EVERY[layout].ranks == 1 else PHASES[case[1]]
            assert seen.phases == phases and seen.counts == [phases], case


@pytest.mark.parametrize("layout", CUT)
def test_sharded_equals_whole(worlds, layout):
    """Parameters and kept numbers, bit for bit, from one all-reduce."""
    ranks = worlds.run(EVERY[layout].ranks, train, layout, cases_on(layout))
    assert_equal_to_whole(layout, ranks, whole(worlds))


@functools.cache
def oracle_of(sentence: str) -> NormOracle:
    oracle = NormOracle(whole_model(PARAMS_SEED), SENTENCES[sentence], [NAMES[:5], NAMES[5:]])
    for step in range(STEPS):
        grads = grads_of(step)
        oracle.step({name: None if name in LATE.get(step, ()) else grad for name, grad in grads.items()})
    return oracle


@pytest.mark.parametrize(("way", "sentence"), CASES)
def test_whole_equals_the_oracle(worlds, way, sentence):
    found = whole(worlds)[way, sentence].params
    # What is learnt from a copy of the parameters is rounded as they are.
    rtol, atol = (2e-5, 3e-6) if way == "copied" else (3e-6, 3e-7)
    for name, expected in oracle_of(sentence).params.items():
        torch.testing.assert_close(found[name].double(), expected, rtol=rtol, atol=atol)


# --- mutants ----------------------------------------------------------------------------------------------------------


@contextmanager
def local_norms() -> Iterator[None]:
    """A rank takes the norms of its own shards."""
    with mock.patch("distwd.metrics.measure.sum_over_ranks", lambda packed, world: packed):
        yield


@contextmanager
def norms_of_stacks() -> Iterator[None]:
    """Stacked experts have one norm together."""
    with mock.patch("distwd.step.transform.BoundTransform.scope", return_value="tensor"):
        yield


@pytest.mark.parametrize(
    ("mutant", "layout"), [(local_norms, "fsdp3"), (norms_of_stacks, "experts_fsdp"), (norms_of_stacks, "fsdp3")]
)
def test_a_mutant_is_seen(worlds, mutant, layout):
    ranks = worlds.run(EVERY[layout].ranks, train, layout, [("chain", "brake")], mutant)
    reference = whole(worlds)["chain", "brake"].params
    assert all(differing(rank["chain", "brake"].params, reference) for rank in ranks)


# --- zeros on one rank --------------------------------------------------------------------------------------------------


def refused() -> list[str]:
    """Runs on a rank: a pipeline stage has a projection of zeros, and no other rank holds it."""
    values = dict(whole_model(PARAMS_SEED))
    values["down.weight"] = torch.zeros_like(values["down.weight"])
    held = layouts.place("stages_interleaved", values)
    runs.feed("stages_interleaved", held, 0)
    before = {name: param.detach().clone() for name, param in held.items()}
    found = []
    for _ in range(2):
        chain = Chain(held.items(), Adam(), Hyperball(), LR(0.1))
        with pytest.raises(distwd.PlanError) as error:
            chain.step()
        found.append(str(error.value))
        assert all(torch.equal(param, before[name]) for name, param in held.items())
    return found


def test_zeros_of_one_stage_are_refused_on_every_rank(worlds):
    texts = {text for rank in worlds.run(2, refused) for text in rank}
    assert len(texts) == 1 and texts.pop().startswith("down.weight: all zeros")


# --- checkpoints --------------------------------------------------------------------------------------------------------

KEEPING = ("ball", "search", "later", "control")


def job(layout: str, sentence: str, way: str, seed: int) -> tuple[Any, Any, Any]:
    net = Net(whole_model(seed))
    LAYOUTS[layout].wrap(net)
    held = dict(net.named_parameters())
    return net, held, make(way, sentence, groups_of(held, layout in FLAT))[0]


def saved(layout: str, folder: str) -> dict:
    """Runs on a rank: three steps, saved, two more."""
    found = {}
    for way, sentence in CARRIED:
        net, held, optimizer = job(layout, sentence, way, PARAMS_SEED)
        for step in range(3):
            runs.feed(layout, held, step)
            optimizer.step()
        dcp.save(
            {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)},
            checkpoint_id=f"{folder}/{way}-{sentence}",
        )
        found[way, sentence] = finished(layout, held, optimizer)
    return found


def loaded(layout: str, folder: str) -> dict:
    found = {}
    for way, sentence in CARRIED:
        net, held, optimizer = job(layout, sentence, way, PARAMS_SEED + 1)
        # A hidden step of checkpoint code is in it: nothing begins with that.
        state = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}
        dcp.load(state, checkpoint_id=f"{folder}/{way}-{sentence}")
        set_model_state_dict(net, state["model"])
        set_optimizer_state_dict(net, optimizer, state["optimizer"])
        found[way, sentence] = finished(layout, held, optimizer)
    return found


def finished(layout: str, held, optimizer) -> Seen:
    for step in range(3, 5):
        runs.feed(layout, held, step)
        optimizer.step()
    return Seen(layouts.view(layout, held), kept_of(optimizer, held), 0)


CARRIED = [("chain", name) for name in KEEPING] + [("attach", "search")]


def test_a_run_saved_at_four_ranks_goes_on_elsewhere_bit_for_bit(worlds):
    """In the middle of a search for a bound, and after a warm start; a radius is never measured anew."""
    with tempfile.TemporaryDirectory() as folder:
        expected = worlds.run(4, saved, "fsdp4", folder)[0]
        for layout in ("fsdp2", "fsdp_tp", "fsdp1rank"):
            for rank in worlds.run(LAYOUTS[layout].ranks, loaded, layout, folder):
                for case, seen in rank.items():
                    assert differing(seen.params, expected[case].params) == [], (layout, case)
                    for name, numbers in expected[case].kept.items():
                        assert all(torch.equal(value, seen.kept[name][key]) for key, value in numbers.items())
