"""attach on real ranks: sharded equals whole, one collective, state-dict calls change nothing, and what is refused."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from distwd import RelativeWeightDecay, WeightDecay, attach
from tests import layouts, runs
from tests.layouts import LAYOUTS, SHAPES, Net, whole_model
from tests.runs import PARAMS_SEED, differing
from tests.wire import Wire

# name: (rule and its arguments, coupling, collectives per step)
CASES = {
    "absolute": ("WeightDecay", (0.1,), "lr", 0),
    "absolute in the gradient": ("WeightDecay", (0.1, 1), "gradient", 0),
    "absolute, not scaled": ("WeightDecay", (0.01, 1.5), "none", 0),
    "cautious": ("CautiousWeightDecay", (0.1,), "lr", 0),
    "of the update": ("RelativeWeightDecay", (0.1,), "lr", 1),
    "of the update, not scaled": ("RelativeWeightDecay", (0.1, 1, "update", "rms"), "none", 1),
    "of the gradient": ("RelativeWeightDecay", (0.1, 2, "grad", "l2"), "gradient", 1),
    "of the parameters": ("RelativeWeightDecay", (0.1, 3, "params", "std"), "lr", 1),
    "at once": ("RelativeWeightDecay", (0.01, 2, "params", "linf", "params_direct"), "none", 1),
}
SPREAD = ("fsdp2", "fsdp3", "fsdp_tp", "ddp2", "mixed", "stages")


def rule_of(case: str):
    import distwd

    rule, args, *_ = CASES[case]
    return getattr(distwd, rule)(*args)


def adamw(held: dict, lr: float = 0.01) -> torch.optim.Optimizer:
    # torch's foreach refuses DTensors of two meshes in one list; a rank without parameters has one empty group.
    return torch.optim.AdamW(list(held.items()) or [{"params": []}], lr=lr, weight_decay=0, foreach=False)


def trained(layout: str) -> dict[str, tuple[dict, list, list[int], int]]:
    """By case: whole parameters at the end, the coefficients, collectives in each step, phases."""
    seen = {}
    for case, (_, _, coupling, _) in CASES.items():
        held = layouts.place(layout, whole_model(PARAMS_SEED))
        optimizer = adamw(held)
        attachment = attach(optimizer, rule_of(case), coupling=coupling)
        numbers, counts = [], []
        for step in range(3):
            runs.feed(layout, held, step, ["up.bias"] if step == 1 else [])
            with Wire() as wire:
                optimizer.step()
            counts.append(len(wire.calls))
            numbers += [value["coefficient"].item() for value in attachment.stats().values()]
        seen[case] = layouts.view(layout, held), numbers, counts, attachment.phases
    return seen


@functools.cache
def on(worlds, layout: str) -> list:
    return worlds.run(LAYOUTS[layout].ranks, trained, layout)


@pytest.mark.parametrize("layout", SPREAD)
@pytest.mark.parametrize("case", CASES)
def test_sharded_equals_whole_with_one_collective(worlds, layout, case):
    (alone,) = on(worlds, "single")
    phases = CASES[case][3]
    for rank in on(worlds, layout):
        params, numbers, counts, announced = rank[case]
        assert differing(params, alone[case][0]) == []
        assert numbers == alone[case][1]
        assert len(numbers) == 3 * phases
        assert announced == phases
        assert counts[1:] == [phases, phases]
        assert phases or counts[0] == 0
    assert alone[case][2:] == ([0, 0, 0], 0)


def several(layout: str, order: int) -> tuple[dict, list[int]]:
    held = layouts.place(layout, whole_model(PARAMS_SEED))
    names = list(held)
    optimizers = [adamw({n: held[n] for n in part}) for part in (names[::2], names[1::2])]
    attach(optimizers, rule_of("of the update"))
    counts = []
    for step in range(3):
        runs.feed(layout, held, step)
        with Wire() as wire:
            for optimizer in optimizers[::order]:
                optimizer.step()
        counts.append(len(wire.calls))
    return layouts.view(layout, held), counts[1:]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("layout", ["fsdp3", "fsdp_tp"])
def test_several_optimizers_share_one_collective(worlds, layout, order):
    ((alone, _),) = worlds.run(0, several, "single", 1)
    for params, counts in worlds.run(LAYOUTS[layout].ranks, several, layout, order):
        assert differing(params, alone) == []
        assert counts == [1, 1]


# --- the schedule of collectives ----------------------------------------------------------------------------------------


def to_lr_zero(layout: str, name: str, missing_on: int) -> list[float]:
    """Steps with a rate, then at lr 0, as at the end of a schedule; one rank never has a gradient, and so no state."""
    held = layouts.place(layout, whole_model(PARAMS_SEED))
    params = list(held.items()) or [{"params": []}]
    kwargs = {"weight_decay": 0} if name == "AdamW" else {}
    optimizer = getattr(torch.optim, name)(params, lr=0.01, foreach=False, **kwargs)
    rule = RelativeWeightDecay(1e-4, norm_input="params", metric="std")
    attachment = attach(optimizer, rule, coupling="none")
    numbers = []
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 if step in (0, 1) else 0.0
        missing = torch.distributed.get_rank() == missing_on
        runs.feed(layout, held, step, list(SHAPES) if missing else [])
        optimizer.step()
        numbers.append(attachment.stats()["RelativeWeightDecay"]["metric"].item())
    return numbers


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize(("layout", "missing_on"), [("stages", -1), ("ddp2", 1)])
def test_a_rank_without_state_takes_part_at_lr_zero(worlds, name, layout, missing_on):
    numbers = worlds.run(LAYOUTS[layout].ranks, to_lr_zero, layout, name, missing_on)
    assert all(rank == numbers[0] for rank in numbers)
    assert len(set(numbers[0])) == 4


# --- state dicts --------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0, foreach=False),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01, foreach=False),
    "momentum": lambda params: torch.optim.SGD(params, lr=torch.tensor(0.01), momentum=0.9, foreach=False),
}
FORMS = {
    "plain": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True),
}


def model_on(layout: str, seed: int = PARAMS_SEED) -> tuple[Net, dict]:
    net = Net(whole_model(seed))
    LAYOUTS[layout].wrap(net)
    return net, dict(net.named_parameters())


def inert(layout: str, inner: str, form: str, case: str, num_steps: int) -> dict:
    """Whether saving and loading leave parameters, groups and numbers; and the next step as it would have been."""
    ends = []
    for asked in (False, True):
        net, held = model_on(layout)
        optimizer = OPTIMIZERS[inner](net.named_parameters())
        attachment = attach(optimizer, rule_of(case), coupling="none")
        for step in range(num_steps):
            runs.feed(layout, held, step)
            optimizer.step()
        before = {n: layouts.local_of(p).clone() for n, p in held.items()}
        stats, groups = copy.deepcopy(attachment.stats()), settings_of(optimizer)
        if asked:
            for param in held.values():
                param.grad = None
            saved = get_optimizer_state_dict(net, optimizer, options=FORMS[form])
            same = {"got": differing(before, {n: layouts.local_of(p) for n, p in held.items()}) == []}
            # torch cannot load the full form of an optimizer without any state ("Expected device to be set").
            if not (inner == "SGD" and form == "full"):
                set_optimizer_state_dict(net, optimizer, saved, options=FORMS[form])
            same["set"] = differing(before, {n: layouts.local_of(p) for n, p in held.items()}) == []
            same["stats"] = str(stats) == str(attachment.stats())
            same["groups"] = groups == settings_of(optimizer)
        for param in held.values():
            param.grad = None
        for step in (7, 8):
            runs.feed(layout, held, step)
            optimizer.step()
        ends.append(layouts.view(layout, held))
    # torch's hidden step counts as one in AdamW's bias correction; that is between it and AdamW.
    return same | {"goes on": differing(*ends) == [] or (inner == "AdamW" and num_steps == 0)}


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict]:
    return [
        {
            k: float(v) if k == "lr" else tuple(v) if k == "betas" else v
            for k, v in g.items()
            if not k.startswith("param")
        }
        for g in optimizer.param_groups
    ]


# The hidden step is the layout's business, the form is not: every form on one layout.
FORM_ON = [("plain", "single"), ("plain", "fsdp_tp"), *((form, "fsdp2") for form in FORMS)]


@pytest.mark.parametrize(("form", "layout"), FORM_ON)
@pytest.mark.parametrize("inner", OPTIMIZERS)
@pytest.mark.parametrize("case", ["absolute, not scaled", "of the update, not scaled", "at once"])
def test_state_dict_calls_change_nothing(worlds, layout, form, inner, case):
    for num_steps in (0, 2):
        for seen in worlds.run(LAYOUTS[layout].ranks, inert, layout, inner, form, case, num_steps):
            assert all(seen.values()), (num_steps, seen)


def saved_on_a_rank_without_parameters() -> tuple[bool, int]:
    held = layouts.place("stages", whole_model(PARAMS_SEED))
    net = torch.nn.ParameterDict({name.replace(".", "_"): param for name, param in held.items()})
    optimizer = adamw(dict(net.named_parameters()))
    attach(optimizer, rule_of("of the parameters"), coupling="none")
    before = {n: p.detach().clone() for n, p in held.items()}
    get_optimizer_state_dict(net, optimizer)
    same = differing(before, {n: p.detach() for n, p in held.items()}) == []
    runs.feed("stages", held, 0)
    optimizer.step()
    get_optimizer_state_dict(net, optimizer)
    return same, len(held)


def test_a_pipeline_stage_without_parameters_saves_with_the_others(worlds):
    """torch steps every optimizer without state when it saves: on that rank, and on no other."""
    assert [same for same, _ in worlds.run(3, saved_on_a_rank_without_parameters)] == [True] * 3


def hidden_step(lr: object, gradients: str) -> list[str]:
    """As torchtitan and others write it: no state yet, every lr 0, gradients 0 or absent."""
    params = {n: torch.nn.Parameter(v) for n, v in whole_model(PARAMS_SEED).items()}
    optimizer = torch.optim.AdamW(params.values(), lr=lr, weight_decay=0)
    for case in CASES:
        attach(optimizer, rule_of(case), coupling="none")
    for param in params.values():
        param.grad = torch.zeros_like(param) if gradients == "zeros" else None
    optimizer.step()
    return differing({n: p.detach() for n, p in params.items()}, whole_model(PARAMS_SEED))


@pytest.mark.parametrize("gradients", ["zeros", "absent"])
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_a_hidden_step_decays_nothing(lr, gradients):
    assert hidden_step(lr, gradients) == []


def goes_on(layout: str, case: str, flat: bool) -> list[str]:
    """Two steps, saved, two more; and another model with another optimizer, loaded, two more."""
    ends = []
    options = FORMS["flattened" if flat else "plain"]
    for seed in (PARAMS_SEED, PARAMS_SEED + 1):
        net, held = model_on(layout, seed)
        optimizer = OPTIMIZERS["AdamW"](net.named_parameters())
        attach(optimizer, rule_of(case), coupling=CASES[case][2])
        if not ends:
            for step in (0, 1):
                runs.feed(layout, held, step)
                optimizer.step()
            model = copy.deepcopy(net.state_dict())
            saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
        else:
            optimizer.param_groups[0]["distwd_weight_decay"] = 123.0
            net.load_state_dict(model)
            set_optimizer_state_dict(net, optimizer, saved, options=options)
        for step in (2, 3):
            runs.feed(layout, held, step)
            optimizer.step()
        ends.append(layouts.view(layout, held))
    return differing(*ends)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("case", ["absolute", "of the update", "of the gradient"])
@pytest.mark.parametrize("layout", ["fsdp3", "fsdp_tp"])
def test_a_checkpoint_resumes_bit_for_bit(worlds, layout, case, flat):
    for different in worlds.run(LAYOUTS[layout].ranks, goes_on, layout, case, flat):
        assert different == []


def test_an_old_checkpoint_loads_and_the_decay_stays():
    params = {n: torch.nn.Parameter(v) for n, v in whole_model(PARAMS_SEED).items()}
    old = torch.optim.AdamW(params.values(), weight_decay=0).state_dict()
    optimizer = torch.optim.AdamW(params.values(), weight_decay=0)
    attach(optimizer, WeightDecay(0.25))
    optimizer.load_state_dict(old)
    runs.feed("single", params, 0)
    optimizer.step()
    assert optimizer.param_groups[0]["distwd_weight_decay"] == 0.25
