"""clip_grad_norm_: the norm and the gradients of one process on every layout, one collective, torch's value where torch's is right."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import distwd
from distwd import LR, Adam, Chain, Plan, RelativeWeightDecay, Sharded, attach, clip_grad_norm_
from tests import layouts, runs
from tests.layouts import EVERY, LARGE, LAYOUTS, mesh_of, whole_model
from tests.oracle import metric_of
from tests.runs import PARAMS_SEED, differing
from tests.test_law_sharded_equals_whole import ulp
from tests.test_mutants import MUTANTS
from tests.wire import Wire, no_host_sync
from tests.world import World

ORDERS = [2, 1, math.inf, 3, 0.5, 0]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def limit_of(order: float) -> float:
    """Half of the norm that the gradients have."""
    return metric_of(list(runs.grads_of(0).values()), order) / 2


def clipped_on(layout: str, dtype: torch.dtype = torch.float32, orders: list | None = None) -> list[tuple]:
    """For each order: the norm, the whole gradients after it, and the collectives it took. The first norm is found without a plan, too."""
    held = layouts.place(layout, whole_model(PARAMS_SEED, dtype))
    plan = Plan.build(held.items(), layout=held.marks)
    seen = []
    for order in orders or ORDERS:
        runs.feed(layout, held, 0)
        if not seen:
            without_plan = clip_grad_norm_(held.items(), math.inf, order, layout=held.marks).item()
        with Wire() as wire, no_host_sync():
            total = clip_grad_norm_(held.values(), limit_of(order), order, plan=plan)
        grads = layouts.view(layout, {name: param.grad for name, param in held.items()})
        seen.append((total, grads, wire.calls))
    assert seen[0][0].item() == without_plan
    return seen


_known: dict[torch.dtype, list[tuple]] = {}


def clipped_alone(worlds, dtype: torch.dtype) -> list[tuple]:
    if dtype not in _known:
        _known[dtype] = worlds.run(0, clipped_on, "single", dtype)[0]
    return _known[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_process_clips_as_the_formula_says(worlds, dtype):
    for order, (total, grads, calls) in zip(ORDERS, clipped_alone(worlds, dtype), strict=True):
        whole = {name: grad.double() for name, grad in runs.grads_of(0, dtype).items()}
        expected = metric_of(list(whole.values()), order)
        assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert abs(total.item() - expected) <= ulp(expected)
        assert calls == []
        factor = limit_of(order) / (expected + 1e-6)
        assert factor < 0.6
        for name, grad in grads.items():
            rtol = {torch.float32: 2e-7, torch.float64: 1e-14, torch.bfloat16: 2**-8}[dtype]
            torch.testing.assert_close(grad.double(), whole[name] * factor, rtol=rtol, atol=0)
            assert grad.dtype == dtype


@pytest.mark.parametrize("layout", [name for name in EVERY | LARGE if name != "single"])
def test_norm_and_gradients_have_the_bits_of_one_process_and_take_one_collective(worlds, layout):
    expected = clipped_alone(worlds, torch.float32)
    orders = ORDERS if layout in ("fsdp3", "hsdp", "fsdp_tp", "experts_plain", "stages") else ORDERS[:3]
    ranks = (EVERY | LARGE)[layout].ranks
    for seen in worlds.run(ranks, clipped_on, layout, torch.float32, orders):
        for (total, grads, calls), (whole_total, whole_grads, _) in zip(seen, expected, strict=False):
            assert type(total) is torch.Tensor
            assert total.item() == whole_total.item()
            assert differing(grads, whole_grads) == []
            assert len(calls) == (ranks > 1)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("layout", ["fsdp3", "fsdp_tp", "mixed", "stages", "experts_plain"])
def test_other_dtypes_have_the_bits_of_one_process_too(worlds, layout, dtype):
    """bf16 is scaled by a float32 number and rounded once, so where it is cut does not matter."""
    expected = clipped_alone(worlds, dtype)
    for seen in worlds.run(EVERY[layout].ranks, clipped_on, layout, dtype, ORDERS[:3]):
        for (total, grads, _), (whole_total, whole_grads, _) in zip(seen, expected, strict=False):
            # Sums of float64 round by the place where they are cut.
            rtol = 1e-14 if dtype == torch.float64 else 0
            torch.testing.assert_close(total, whole_total, rtol=rtol, atol=0)
            for name, grad in grads.items():
                torch.testing.assert_close(grad.double(), whole_grads[name].double(), rtol=rtol, atol=0)


# --- torch's ----------------------------------------------------------------------------------------------------------


def both_on(layout: str, factor: float) -> list[tuple[float, float, float]]:
    """For each order: torch's norm, ours, and the largest relative difference of the gradients."""
    held = layouts.place(layout, whole_model(PARAMS_SEED))
    plan, seen = Plan.build(held.items()), []
    for order in (2, 1, 3):
        totals, grads = [], []
        for clip in (torch.nn.utils.clip_grad_norm_, lambda *args: clip_grad_norm_(*args, plan=plan)):
            runs.feed(layout, held, 0)
            total = clip(held.values(), factor * limit_of(order), order)
            totals.append(layouts.whole_of(total).item())
            grads.append(torch.cat([layouts.local_of(param.grad).reshape(-1) for param in held.values()]))
        seen.append((*totals, ((grads[0] - grads[1]).abs() / grads[0].abs().clamp(min=1e-30)).max().item()))
    return seen


@pytest.mark.parametrize("factor", [1.0, 4.0], ids=["clipped", "below"])
@pytest.mark.parametrize("layout", ["single", "fsdp2", "fsdp3", "hsdp3x1", "ddp2"])
def test_where_torch_is_right_we_have_its_value(worlds, layout, factor):
    for seen in worlds.run(LAYOUTS[layout].ranks, both_on, layout, factor):
        for theirs, ours, gap in seen:
            assert ours == pytest.approx(theirs, rel=1e-6)
            assert gap < (1e-6 if factor == 1.0 else 1e-38)


@pytest.mark.parametrize("order", [2, 1, 0.5, 3, -1, math.inf, -math.inf, "inf"])
@pytest.mark.parametrize("without", [(), ("up.weight", "head.bias")], ids=["all", "some"])
def test_parameters_without_a_gradient_are_left_alone_and_count_for_nothing(order, without):
    """As torch has it, for negative orders too, where a zero would be all."""
    totals, grads = [], []
    for clip in (torch.nn.utils.clip_grad_norm_, clip_grad_norm_):
        held = layouts.place("single", whole_model(PARAMS_SEED))
        runs.feed("single", held, 0, without=without)
        totals.append(clip(held.values(), 0.01, order).item())
        grads.append({name: param.grad for name, param in held.items()})
    assert totals[1] == pytest.approx(totals[0], rel=2e-6)
    for name, theirs in grads[0].items():
        assert (theirs is None) is (grads[1][name] is None) is (name in without)
        if theirs is not None:
            torch.testing.assert_close(grads[1][name], theirs, rtol=2e-6, atol=0)


def partly_on(layout: str) -> tuple[float, list[str]]:
    """The norm where two parameters have no gradient, and the names of those that have none after it."""
    held = layouts.place(layout, whole_model(PARAMS_SEED))
    runs.feed(layout, held, 0, without=["up.weight", "head.bias"])
    total = clip_grad_norm_(held.items(), 0.1, layout=held.marks)
    return total.item(), [name for name, param in held.items() if param.grad is None]


@pytest.mark.parametrize("layout", ["fsdp3", "hsdp", "fsdp_tp", "mixed", "experts_plain", "stages", "fsdp1_hybrid"])
def test_gradients_may_be_missing_on_some_ranks(worlds, layout):
    some = [grad for name, grad in runs.grads_of(0).items() if name not in ("up.weight", "head.bias")]
    ranks = worlds.run(EVERY[layout].ranks, partly_on, layout)
    for total, missing in ranks:
        assert abs(total - metric_of(some, 2)) <= ulp(total)
        # FSDP1 leaves no gradient where a shard is empty.
        assert set(missing) <= {"up.weight", "head.bias"} or layout.startswith("fsdp1")
    assert len({total for total, _ in ranks}) == 1


def test_nothing_has_a_gradient():
    held = layouts.place("single", whole_model(PARAMS_SEED))
    assert clip_grad_norm_(held.values(), 1.0).item() == 0
    assert all(param.grad is None for param in held.values())


def infinite(of: str) -> tuple[float, torch.Tensor]:
    grads = {"nan": [math.nan, 1.0], "inf": [math.inf, 1.0]}[of]
    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor(grads)
    return clip_grad_norm_(param, 1.0).item(), param.grad


def test_what_is_not_finite_goes_by_torchs_formula():
    total, grad = infinite("nan")
    assert math.isnan(total)
    assert grad.isnan().all()
    total, grad = infinite("inf")
    assert total == math.inf
    assert grad[0].isnan()
    assert grad[1] == 0


# --- what it takes ------------------------------------------------------------------------------------------------------


def some_params() -> list[tuple[str, torch.nn.Parameter]]:
    params = [("w", torch.nn.Parameter(torch.ones(2, 3))), ("v", torch.nn.Parameter(torch.ones(2, 3)))]
    for number, (_, param) in enumerate(params):
        param.grad = torch.full((2, 3), 1.0 + number)
    return params


SOME_NORM = pytest.approx(math.sqrt(6 * 1 + 6 * 4))


def test_tensors_pairs_groups_a_generator_and_one_tensor_are_taken():
    params = some_params()
    bare = [param for _, param in params]
    for given in (bare, params, iter(params), [{"params": bare[:1]}, {"params": bare[1:]}], [{"params": params}]):
        assert clip_grad_norm_(given, math.inf).item() == SOME_NORM
    assert clip_grad_norm_(bare[1], math.inf).item() == pytest.approx(math.sqrt(24))


def test_the_plan_of_a_chain_and_of_an_attachment_serve():
    for way in ("chain", "attach"):
        params = some_params()
        groups = [{"params": params[1:]}, {"params": params[:1], "weight_decay": 0.5}]
        if way == "chain":
            optimizer = owner = Chain(groups, Adam(), RelativeWeightDecay(), LR(0.1))
        else:
            optimizer = torch.optim.SGD(groups[:1], lr=0.1)
            optimizer.add_param_group({"params": params[:1]})
            owner = attach(optimizer, RelativeWeightDecay())
        assert clip_grad_norm_(optimizer.param_groups, 1.0, plan=owner.plan).item() == SOME_NORM
        assert clip_grad_norm_(optimizer.param_groups, 1.0, plan=owner.plan).item() == pytest.approx(1.0)


def test_an_infinite_limit_measures_and_writes_nothing():
    params = some_params()
    params[0][1].grad[0, 0] = math.inf
    before = [(param.grad.clone(), param.grad._version) for _, param in params]
    assert clip_grad_norm_(params, math.inf).item() == math.inf
    for (grad, version), (_, param) in zip(before, params, strict=True):
        assert torch.equal(param.grad, grad)
        assert param.grad._version == version


def test_the_limit_may_be_a_tensor_that_is_not_read():
    params, same = some_params(), some_params()
    plan = Plan.build(params)
    with no_host_sync():
        clip_grad_norm_(params, torch.tensor(0.5), plan=plan)
    clip_grad_norm_(same, 0.5)
    assert all(torch.equal(one.grad, other.grad) for (_, one), (_, other) in zip(params, same, strict=True))


def test_frozen_parameters_may_be_anything():
    packed = torch.nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)
    assert clip_grad_norm_([*some_params(), ("packed", packed)], 1.0).item() == SOME_NORM


def test_replaced_tensors_of_the_same_layout_keep_the_plan():
    params, others = some_params(), some_params()
    plan = Plan.build(params)
    assert clip_grad_norm_(others, 1.0, plan=plan).item() == SOME_NORM
    assert clip_grad_norm_([param for _, param in others], 2.0, plan=plan).item() == pytest.approx(1.0)
    assert params[0][1].grad[0, 0] == 1


def test_no_parameters_at_all_is_told():
    used_up = iter(some_params())
    list(used_up)
    with pytest.warns(UserWarning, match=r"no parameters on any rank.*once only") as told:
        assert clip_grad_norm_(used_up, 1.0).item() == 0
    assert told[0].filename == __file__


def pending_sums() -> tuple[float, list[float], list[str]]:
    """A gradient that is the sum of what the ranks have, and one that is whole where its parameter is cut."""
    mesh = mesh_of(2, names=("dp",))
    copied = torch.nn.Parameter(DTensor.from_local(torch.zeros(3), mesh, [Replicate()]))
    cut = torch.nn.Parameter(DTensor.from_local(torch.zeros(2), mesh, [Shard(0)]))
    copied.grad = DTensor.from_local(torch.tensor([1.0, 2.0, 3.0 * dist.get_rank()]), mesh, [Partial()])
    cut.grad = DTensor.from_local(torch.arange(4.0), mesh, [Replicate()])
    plan = Plan.build([("copied", copied), ("cut", cut)])
    with Wire() as wire:
        total = clip_grad_norm_([copied, cut], 1.0, plan=plan)
    assert copied.grad.placements == (Partial(),)
    return total.item(), [*copied.grad.full_tensor().tolist(), *cut.grad.full_tensor().tolist()], wire.calls


def test_gradients_that_are_cut_otherwise_are_redistributed_to_be_measured_and_scaled_where_they_lie(worlds):
    whole = torch.tensor([2.0, 4.0, 3.0, 0.0, 1.0, 2.0, 3.0])
    for total, grads, calls in worlds.run(2, pending_sums):
        assert total == pytest.approx(whole.norm().item())
        torch.testing.assert_close(torch.tensor(grads), whole / whole.norm())
        assert len(calls) == 2  # one for the pending sum


def norms_for_nothing(way: str) -> tuple[float, float]:
    """The norm that clipping measures, and the one that a rule of the step has measured anyway."""
    held = layouts.place("fsdp_tp", whole_model(PARAMS_SEED))
    rule = RelativeWeightDecay(0.1, norm_input="grad", metric="l2")
    if way == "chain":
        optimizer = owner = Chain(held.items(), Adam(), rule, LR(0.1))
    else:
        # Of two meshes torch's foreach kernels make nothing.
        optimizer = torch.optim.AdamW(held.items(), lr=0.1, weight_decay=0, foreach=False)
        owner = attach(optimizer, rule)
    runs.feed("fsdp_tp", held, 0)
    total = clip_grad_norm_(optimizer.param_groups, math.inf, plan=owner.plan)
    optimizer.step()
    return total.item(), owner.stats()["RelativeWeightDecay"]["metric"].item()


@pytest.mark.parametrize("way", ["chain", "attach"])
def test_a_rule_that_measures_gradients_has_the_norm_for_nothing(worlds, way):
    for total, metric in worlds.run(4, norms_for_nothing, way):
        assert total == metric


# --- errors -------------------------------------------------------------------------------------------------------------


def sparse() -> dict:
    (_, param), *rest = some_params()
    param.grad = torch.eye(2, 3).to_sparse()
    return {"params": [("w", param), *rest]}


def with_plan(change: Callable[[list], list]) -> Callable[[], dict]:
    def make() -> dict:
        params = some_params()
        return {"plan": Plan.build(params), "params": change(params)}

    return make


def wider(params: list) -> list:
    for _, param in params:
        grad = param.grad.double()
        param.grad = None
        param.data = param.data.double()
        param.grad = grad
    return params


WRONG: dict[str, tuple[Callable[[], dict], str]] = {
    "negative limit": (lambda: {"max_norm": -1.0}, "max_norm=-1.0 is not usable"),
    "nan limit": (lambda: {"max_norm": math.nan}, "max_norm=nan is not usable"),
    "true": (lambda: {"max_norm": True}, "max_norm=True is not usable"),
    "text": (lambda: {"max_norm": "1"}, "max_norm='1' is not usable"),
    "two limits": (lambda: {"max_norm": torch.ones(2)}, "max_norm=.* is not usable"),
    "nan order": (lambda: {"norm_type": math.nan}, "norm_type=nan is not usable"),
    "named order": (lambda: {"norm_type": "l2"}, "norm_type='l2' is not usable"),
    "no order": (lambda: {"norm_type": None}, "norm_type=None is not usable"),
    "chain as plan": (lambda: {"plan": Chain(some_params(), LR(0.1))}, r"not Chain; .* pass its \.plan"),
    "plan and layout": (lambda: {"plan": Plan.build(some_params()), "layout": {}}, "a plan and group= or layout="),
    "sparse": (sparse, r"w has a sparse gradient; .*sparse=False"),
    "fewer": (with_plan(lambda params: params[:1]), r"got 1 parameters for a plan of 2.*optimizer\.param_groups"),
    "another order": (with_plan(lambda params: params[::-1]), "got v where the plan has w; .*order of the plan"),
    "another order, bare": (with_plan(lambda params: [params[1][1], params[0][1]]), "got v where the plan has w"),
    "other names": (with_plan(lambda _: [("a", some_params()[0][1]), some_params()[1]]), "got a where the plan has w"),
    "another dtype": (with_plan(wider), "not those of the plan any more; build it anew on every rank"),
    "no tensor": (with_plan(lambda params: [1.0, params[1]]), "must hold tensors"),
    "listed twice": (lambda: {"params": [("w", some_params()[0][1])] * 2}, "w is listed twice"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_clipped_is_an_error_that_says_why_and_changes_nothing(wrong):
    make, message = WRONG[wrong]
    given = {"params": some_params(), "max_norm": 0.1} | make()
    before = [param.grad.clone() for _, param in some_params()]
    with pytest.raises(TypeError if wrong == "no tensor" else ValueError, match=message):
        clip_grad_norm_(given.pop("params"), given.pop("max_norm"), **given)
    if wrong not in ("sparse", "no tensor", "listed twice"):
        params = given.get("params", some_params())
        assert all(torch.equal(param.grad, old) for (_, param), old in zip(params, before, strict=False))


def not_finite(layout: str, raises: bool) -> tuple[str, bool]:
    """The error on this rank after a NaN on the last rank alone, and whether a gradient has changed."""
    held = layouts.place(layout, whole_model(PARAMS_SEED))
    runs.feed(layout, held, 0)
    if dist.get_rank() == dist.get_world_size() - 1:
        layouts.local_of(held["up.weight"].grad).view(-1)[0] = math.nan
    before = [layouts.local_of(param.grad).clone() for param in held.values()]
    message = ""
    try:
        clip_grad_norm_(held.items(), 0.1, error_if_nonfinite=raises)
    except RuntimeError as error:
        message = str(error)
    grads = [layouts.local_of(param.grad) for param in held.values()]
    return message, all(torch.equal(g, b) or b.isnan().any() for g, b in zip(grads, before, strict=True))


@pytest.mark.parametrize("layout", ["fsdp3", "fsdp_tp", "stages_interleaved"])
def test_a_norm_that_is_not_finite_is_the_same_error_on_every_rank_if_asked_for(worlds, layout):
    ranks = LAYOUTS[layout].ranks
    raised = worlds.run(ranks, not_finite, layout, True)
    assert len({message for message, _ in raised}) == 1
    for message, unchanged in raised:
        assert re.search(rf"order 2 is not finite \(rank {ranks - 1}: up\.weight\), so nothing was clipped", message)
        assert unchanged
    for message, unchanged in worlds.run(ranks, not_finite, layout, False):
        assert message == ""
        assert not unchanged


def test_a_finite_norm_is_no_error():
    assert clip_grad_norm_(some_params(), 1.0, error_if_nonfinite=True).item() == SOME_NORM


def seeded_experts() -> str:
    """An expert of each rank's own, under one name, initialised alike: the norm would count one of them."""
    param = torch.nn.Parameter(torch.ones(4, 3))
    torch.manual_seed(dist.get_rank())
    param.grad = torch.randn(4, 3)
    before = param.grad.clone()
    try:
        clip_grad_norm_([("expert", param)], 0.1)
    except distwd.PlanError as error:
        assert torch.equal(param.grad, before)
        whole = clip_grad_norm_([("expert", param)], 0.1, layout={"expert": Sharded()})
        both = [torch.empty(4, 3) for _ in range(2)]
        dist.all_gather(both, before)
        assert whole.item() == pytest.approx(torch.stack(both).norm().item())
        return str(error)
    return "nothing"


def test_experts_that_were_seeded_alike_are_an_error_on_every_rank(worlds):
    first, second = worlds.run(2, seeded_experts)
    assert first == second
    assert "copies of one piece have the same bits, but different gradients" in first


def wrong_on_one_rank() -> tuple[str, str, bool]:
    """The error on this rank where rank 1 passes too few parameters, or has a plan that does not fit."""
    params = some_params()
    plan = Plan.build(params)
    dist.barrier()
    _set_pg_timeout(datetime.timedelta(seconds=4))
    given = params[:1] if dist.get_rank() == 1 else params
    try:
        clip_grad_norm_(given, 0.1, plan=plan)
    except Exception as error:
        same = all(param.grad[0, 0] == 1.0 + number for number, (_, param) in enumerate(params))
        return type(error).__name__, str(error), same
    return "nothing", "", False


def test_an_error_on_one_rank_is_told_to_the_others_when_they_have_waited():
    world = World(2)
    try:
        (theirs, told, same), (own, raised, as_well) = world.run(wrong_on_one_rank)
    finally:
        world.kill()
    assert (theirs, own) == ("PlanError", "ValueError")
    assert raised in told
    assert "rank 1" in told
    assert same
    assert as_well


# --- it can fail --------------------------------------------------------------------------------------------------------

BROKEN = [
    ("everyone owns everything", ["hsdp", "ddp2", "mixed", "stages_tp", "experts_plain", "fsdp1_hybrid"]),
    ("owners by visible replication", ["fsdp_tp", "experts", "stages", "experts_named", "cut_by_hand", "fsdp1_full"]),
    ("no reduction", ["fsdp2", "fsdp3", "stages", "fsdp_tp", "columns4", "fsdp1_full_flat"]),
    ("wrong group", ["fsdp4", "fsdp_tp", "experts_fsdp", "experts_hidden", "stages_fsdp"]),
]


def mutated(mutant: str, layout: str) -> float:
    with MUTANTS[mutant][0]() if mutant else nullcontext():
        held = layouts.place(layout, whole_model(PARAMS_SEED))
        plan = Plan.build(held.items(), layout=held.marks)
        runs.feed(layout, held, 0)
        return clip_grad_norm_(held.items(), 0.1, plan=plan).item()


@pytest.mark.parametrize(("mutant", "layout"), [(mutant, one) for mutant, some in BROKEN for one in some])
def test_a_mutant_is_far_from_the_norm(worlds, mutant, layout):
    """Local norms, and copies that count several times: on some rank wrong by more than any bound here."""
    expected = metric_of(list(runs.grads_of(0).values()), 2)
    ranks = worlds.run(EVERY[layout].ranks, mutated, mutant, layout)
    assert not all(abs(total - expected) <= 1e-3 * expected for total in ranks)


def test_a_module_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"params is a Linear, which is a module; pass model\.named_parameters\(\)"):
        clip_grad_norm_(torch.nn.Linear(2, 3), 1.0)
