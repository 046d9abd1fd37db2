"""scope="matrix": one number for each matrix, however experts are stacked and cut, against whole float64 tensors."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from distwd import LR, Adam, Chain, Measure, Plan, PlanError, RelativeWeightDecay, Rule, Sharded, attach
from distwd.kernels import apply as writing
from distwd.kernels import sums
from distwd.kernels.blocks import Workspace
from distwd.kernels.formulas import DecayTerm, Mask
from distwd.metrics.measure import Request, Source, measure
from distwd.metrics.metric import parse_metric
from tests import layouts, mesh_cases, runs, wire
from tests.layouts import EVERY, LAYOUTS, local_of, mesh_of
from tests.mesh_cases import Case, TensorPlacement
from tests.oracle import direction, metric_of
from tests.test_mutants import everyone_owns_everything, no_reduction
from tests.test_own_rules_on_ranks import Job, loaded, quietly, saved

LAMBDA, RATE, SMOOTHING = 0.05, 0.1, 0.5


class Spread(Rule):
    """c = λ·(‖p‖/R + m̄), R = ‖p‖ as the first step begins, m̄ a running mean of mean |g|; each of a matrix."""

    scope = "matrix"

    def measures(self, settings):
        return {"norm": Measure("params", "l2", self.scope), "grad": Measure("grad", "mad", self.scope)}

    def keeps(self, settings):
        return {"radius": Measure("params", "l2", self.scope), "mean": 0.0}

    def coefficient(self, settings, measured, kept):
        mean = SMOOTHING * kept["mean"] + (1 - SMOOTHING) * measured["grad"]
        c = settings["weight_decay"] * (measured["norm"] / kept["radius"] + mean)
        return c, {"radius": kept["radius"], "mean": mean}


KEYS = ("radius", "mean", "num_steps")


def rules() -> list[Rule]:
    """A rule that keeps; one with an order and a mask; and one of whole tensors beside them."""
    return [
        Spread(weight_decay=LAMBDA),
        RelativeWeightDecay(LAMBDA, 3, "update", "rms", scope="matrix", cautious=True),
        RelativeWeightDecay(LAMBDA, norm_input="params", metric="l2", scope="tensor"),
    ]


def make(way: str, named: Mapping[str, nn.Parameter], **where: Any) -> tuple[Any, Any]:
    """What steps, and what has `stats`."""
    if way == "chain":
        chain = Chain(named.items(), Adam(foreach=True, eps=1e-3), *rules(), LR(RATE), **where)
        return chain, chain
    if way == "bf16":  # torch's own kernels round by place there
        chain = Chain(named.items(), *rules(), LR(RATE), rounding="stochastic", seed=3, **where)
        return chain, chain
    optimizer = torch.optim.AdamW(named.items(), lr=RATE, eps=1e-3, weight_decay=0, foreach=False)
    return optimizer, attach(optimizer, *rules(), **where)


def kept_of(optimizer: Any, named: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """The kept numbers of every parameter that has some, whole."""
    found = {}
    for name, param in named.items():
        own = [optimizer.state[param].get(f"distwd_Spread_{key}") for key in KEYS]
        if own[0] is not None:
            found[name] = [one.full_tensor() if isinstance(one, DTensor) else one for one in own]
    return found


# --- one process, against plain arithmetic ----------------------------------------------------------------------------

WHOLE = {"stack": (4, 5, 3), "deep": (2, 3, 4, 2), "one": (1, 3, 2), "matrix": (6, 4), "vector": (7,), "scalar": ()}


def whole(seed: int, shapes: Mapping[str, tuple[int, ...]] = WHOLE) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def matrices_of(tensor: Tensor) -> list[Tensor]:
    return list(tensor.reshape(-1, *tensor.shape[-2:])) if tensor.dim() > 2 else [tensor]


class Matrices:
    """The rules of `rules()` behind Adam, one matrix after the other, in float64."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = {name: value.double().clone() for name, value in params.items()}
        self.memory: dict[str, tuple[Tensor, Tensor, int]] = {}
        self.kept: dict[tuple[str, int], tuple[float, float, int]] = {}
        self.answers: dict[str, list[list[float]]] = {}

    def step(self, grads: Mapping[str, Tensor | None]) -> None:
        self.answers = {}
        first = not self.kept
        for name, param in self.params.items():
            grad = None if grads[name] is None else grads[name].double()
            if first:
                for number, p in enumerate(matrices_of(param)):
                    self.kept[name, number] = (metric_of([p], "l2"), 0.0, 0)
            if grad is None:
                continue
            m, v, t = self.memory.get(name, (torch.zeros_like(param), torch.zeros_like(param), 0))
            m, v, t = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad * grad, t + 1
            self.memory[name] = m, v, t
            update = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-3)
            new = []
            answers: list[list[float]] = [[], [], []]
            of_tensor = LAMBDA * metric_of([param], "l2")
            for number, (p, u, g) in enumerate(zip(*map(matrices_of, (param, update, grad)), strict=True)):
                radius, mean, steps = self.kept[name, number]
                mean = SMOOTHING * mean + (1 - SMOOTHING) * metric_of([g], "mad")
                self.kept[name, number] = radius, mean, steps + 1
                c = LAMBDA * (metric_of([p], "l2") / radius + mean)
                seen = u + c * p
                cautious = LAMBDA * metric_of([seen], "rms")
                pulled = seen + cautious * torch.where(seen * p > 0, direction(p, 3), 0.0)
                for into, answer in zip(answers, (c, cautious, of_tensor), strict=True):
                    into.append(answer)
                new.append(p - RATE * (pulled + of_tensor * p))
            self.answers[name] = answers
            self.params[name] = torch.stack(new).reshape(param.shape)


def in_one_process(way: str, compile: bool = False) -> tuple:
    named = {name: nn.Parameter(value) for name, value in whole(1).items()}
    oracle = Matrices(whole(1))
    optimizer, decay = make(way, named, **({"compile": True} if compile else {}))
    for step in range(4):
        grads: dict[str, Tensor | None] = {**whole(10 + step)}
        if step in (0, 1):
            grads["deep"] = None
        for name, param in named.items():
            param.grad = grads[name]
        optimizer.step()
        oracle.step(grads)
    return named, optimizer, decay, oracle


def test_every_matrix_has_its_own_number():
    named, optimizer, decay, oracle = in_one_process("chain")
    for name, param in named.items():
        assert torch.allclose(param.detach().double(), oracle.params[name], rtol=1e-5, atol=1e-6), name
        for (label, table), answers in zip(decay.stats().items(), oracle.answers[name], strict=True):
            shown = table["coefficient"][name]
            assert shown.shape == (param.shape[:-2] if label != "RelativeWeightDecay_1" else ())
            assert torch.allclose(shown.flatten().double(), torch.tensor(answers).double(), rtol=1e-6)
        radius, mean, steps = (one.flatten().tolist() for one in kept_of(optimizer, named)[name])
        expected = [oracle.kept[name, number] for number in range(len(radius))]
        assert list(zip(radius, mean, steps, strict=True)) == [pytest.approx(one, rel=1e-6) for one in expected]
        assert optimizer.state[param]["distwd_Spread_radius"].shape == param.shape[:-2]


def variants() -> dict[str, Callable[[Any, str], tuple[Any, Any]]]:
    """Ways to step; each makes, of named parameters and a scope, what steps and what has `stats`."""

    def relative(scope: str, **more: Any) -> Rule:
        return RelativeWeightDecay(LAMBDA, more.pop("ord", 2), more.pop("of", "params"), "l2", scope=scope, **more)

    def chain(*parts: Callable[[str], Any], **options: Any) -> Callable[[Any, str], tuple[Any, Any]]:
        def build(named, scope):
            made = Chain(named, *(part(scope) for part in parts), **options)
            return made, made

        return build

    def attached(cls: Any, coupling: str, *made: Callable[[str], Rule], **settings: Any):
        def build(named, scope):
            optimizer = cls(named, lr=RATE, **settings)
            return optimizer, attach(optimizer, *(rule(scope) for rule in made), coupling=coupling)

        return build

    def several(named, scope):
        """Every optimizer has some; they share one metric."""
        halves = [torch.optim.SGD(some, lr=RATE, momentum=0.9, foreach=False) for some in (named[::2], named[1::2])]
        decay = attach(halves, relative(scope, of="update", cautious=True))

        class Both:
            def step(self):
                for half in halves:
                    half.step()

        return Both(), decay

    def spread(scope: str) -> Rule:
        rule = Spread(weight_decay=LAMBDA)
        rule.scope = scope
        return rule

    adam, lr = (lambda scope: Adam(foreach=False)), (lambda scope: LR(RATE))
    return {
        "keeps": chain(adam, spread, lr),
        "a running mean": chain(adam, lambda scope: relative(scope, smoothing=0.5, per="grad"), lr),
        "in the gradient": chain(lambda scope: relative(scope, target="grad"), adam, lr),
        "at once": chain(adam, lambda scope: relative(scope, target="params_direct", ord=3), lr, track_unchanged=True),
        "behind a mask": chain(adam, spread, lambda scope: relative(scope, of="update", cautious=True), lr),
        "attached, gradient": attached(torch.optim.SGD, "gradient", spread),
        "attached, none": attached(torch.optim.RMSprop, "none", spread),
        "attached, from a copy": attached(torch.optim.ASGD, "lr", lambda s: relative(s, of="update", cautious=True)),
        "attached, second moment": attached(
            torch.optim.AdamW, "lr", lambda s: relative(s, of="second_moment"), weight_decay=0, foreach=False
        ),
        "several": several,
    }


@pytest.mark.parametrize("variant", variants())
def test_a_stack_decays_as_its_matrices_would_as_parameters(variant):
    """Bit for bit, and so do the numbers: scope "matrix" of [E, m, n] is scope "tensor" of E parameters [m, n]."""
    start = whole(1)
    stacked = [(name, nn.Parameter(value.clone())) for name, value in start.items()]
    apart = [
        (f"{name} {number}", nn.Parameter(part.clone()))
        for name, value in start.items()
        for number, part in enumerate(matrices_of(value))
    ]
    build = variants()[variant]
    (optimizer, decay), (other, its) = build(stacked, "matrix"), build(apart, "tensor")
    for step in range(3):
        grads = whole(10 + step)
        for name, param in stacked:
            param.grad = None if step == 1 and name == "deep" else grads[name].clone()
        parts = [None if p.grad is None else g for name, p in stacked for g in matrices_of(grads[name])]
        for (_, param), grad in zip(apart, parts, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()
        other.step()
    ours = [part for _, param in stacked for part in matrices_of(param.detach())]
    assert all(torch.equal(one, param) for one, (_, param) in zip(ours, apart, strict=True))
    for label, shown in decay.stats().items():
        for what, values in shown.items() if label != "unchanged_here" else ():
            for name in start:
                table = its.stats()[label][what]
                own = [table[f"{name} {number}"] for number in range(len(matrices_of(start[name])))]
                assert torch.equal(values[name].reshape(-1), torch.stack(own)), f"{label} {what} of {name}"


# --- cut over ranks ---------------------------------------------------------------------------------------------------


def on(placements: tuple, **more: Any) -> TensorPlacement:
    return TensorPlacement((0, 1), placements, **more)


# Stacks cut between their matrices and through them, by expert parallelism and FSDP at once, strided, uneven and empty;
# copies that a DTensor shows and copies that it hides; stages that hold some.
PLACES = {
    "ep_fsdp": (
        (2, 2),
        (
            (on((Shard(0), Shard(1))), (4, 5, 3)),
            (on((Shard(0), Shard(0))), (3, 5, 3)),
            (on((Shard(1), Shard(0))), (5, 3, 2)),
            (on((Shard(2), Shard(1))), (2, 3, 4)),
            (TensorPlacement((0,), (Shard(0),), fsdp=1), (5, 3, 2)),
            (TensorPlacement((0,), (Shard(1),), fsdp=1), (3, 4, 2)),
            (on((Shard(0), Replicate())), (3, 2, 2)),
            (TensorPlacement((1,), (Shard(0),)), (3, 2, 2)),
            (on((Shard(1), Shard(0))), (3, 2, 4, 3)),
            (on((Shard(1), Shard(2))), (2, 3, 4, 3)),
            (on((Shard(0), Shard(0))), (1, 3, 2)),
            (on((Shard(0), Shard(1))), (6, 5)),
            (TensorPlacement((0,), (Shard(0),)), (7,)),
            (TensorPlacement(), (3, 4, 2)),
        ),
    ),
    "stages": (
        (3,),
        (
            (TensorPlacement(stage=(0, 0)), (3, 4, 2)),
            (TensorPlacement(stage=(0, 2)), (2, 2, 3, 2)),
            (TensorPlacement(stage=(0, 2)), (5,)),
            (TensorPlacement(fsdp=0), (4, 2, 3)),
            (TensorPlacement(fsdp=0), (2, 2, 3)),
            (TensorPlacement(fsdp=0), (5, 4)),
        ),
    ),
    "pieces": (
        (2,),
        (
            (TensorPlacement((0,), (Shard(1),)), (3, 3, 2)),
            (TensorPlacement((0,), shares=(2.0, 1.0)), (6, 4)),
            (TensorPlacement((0,), shares=(0.0, 1.0)), (5,)),
        ),
    ),
}


def case_of(name: str, way: str) -> Case:
    sizes, tensors = PLACES[name]
    dtype = torch.bfloat16 if way == "bf16" else torch.float32
    return Case(tuple(range(torch.Size(sizes).numel())), sizes, tensors, dtype)


def late(case: Case) -> list[str]:
    """Names without a gradient in the first step."""
    return list(case.named)[::4]


def train(case: Case, way: str, named: Mapping[str, nn.Parameter], feed: Any, **where: Any) -> tuple[Any, Any, list]:
    """Three steps; feed(step) gives gradients by name."""
    optimizer, decay = make(way, named, **where)
    counts = []
    for step in range(3):
        for name, grad in feed(step).items():
            named[name].grad = None if step == 0 and name in late(case) else grad
        with wire.Wire() as wired:
            optimizer.step()
        counts.append(len(wired.calls))
    return optimizer, decay, counts[1:]


def look(name: str, way: str, mutant: Callable[[], Any] = nullcontext) -> dict[str, Any]:
    """Runs on a rank: what it holds at the end, and the collectives of each step."""
    case = case_of(name, way)
    mesh, params, layout = mesh_cases.set_up(case)
    where = {"layout": layout} if layout else {}
    # Most wrong owners are found out by the gradients of copies; here the numbers have to show them.
    unchecked = mock.patch("distwd.optimizers.init_step.check_gradients", return_value=None)
    with mutant(), nullcontext() if mutant is nullcontext else unchecked:
        optimizer, decay, counts = train(
            case, way, params, lambda step: mesh_cases.placed(case, case.whole(2 + step), mesh), **where
        )
    numbers = mesh_cases.placed(case, case.numbers(), mesh)
    kept = {}
    for key, param in params.items():
        own = [optimizer.state[param][f"distwd_Spread_{kind}"] for kind in KEYS] if local_of(param).numel() else []
        for one in own:
            assert isinstance(one, DTensor) is (isinstance(param, DTensor) and param.dim() > 2)
            assert one.shape == param.shape[:-2] and one.dtype == torch.float32
        kept[key] = [local_of(one) for one in own]
    return {
        "params": {key: local_of(param).clone() for key, param in params.items()},
        "numbers": {key: local_of(number).long() for key, number in numbers.items()},
        "kept": kept,
        "stats": decay.stats(),
        "counts": counts,
        "phases": decay.phases,
    }


def alone(name: str, way: str) -> tuple[dict[str, nn.Parameter], Any, Any]:
    case = case_of(name, way)
    named = {key: nn.Parameter(value) for key, value in case.whole(1).items()}
    optimizer, decay, _ = train(case, way, named, lambda step: case.whole(2 + step))
    return named, optimizer, decay


def assert_equal_to_whole(name: str, way: str, ranks: list[dict[str, Any]]) -> None:
    named, optimizer, decay = alone(name, way)
    for seen in ranks:
        assert set(seen["counts"]) == {seen["phases"]}
        for key, local in seen["params"].items():
            param, number = named[key], seen["numbers"][key]
            where = f"{way}, {key}"
            assert torch.equal(local.flatten(), param.detach().flatten()[number.flatten()]), where
            # Which matrices these elements are of, as the numbers of the elements tell.
            size = matrices_of(param)[0].numel()
            cells = (number.flatten() // size).unique()
            for kept, kind in zip(seen["kept"][key], KEYS, strict=False):
                expected = optimizer.state[param][f"distwd_Spread_{kind}"].reshape(-1)[cells]
                assert torch.equal(kept.flatten(), expected), f"{where}: {kind}"
            for label, table in decay.stats().items():
                for what, values in table.items():
                    theirs, ours = values[key], seen["stats"][label][what][key]
                    if number.numel() and (theirs.dim() or param.dim() <= 2):
                        assert torch.equal(ours.flatten(), theirs.reshape(-1)[cells]), f"{where}: {label} {what}"


@pytest.mark.parametrize("way", ["chain", "attach", "bf16"])
@pytest.mark.parametrize("name", PLACES)
def test_sharded_equals_whole(worlds, name, way):
    """Parameters, numbers and kept numbers, bit for bit, from one all-reduce a phase."""
    assert_equal_to_whole(name, way, worlds.run(len(case_of(name, way).ranks), look, name, way))


def on_layout(layout: str) -> dict[str, Tensor]:
    """The whole parameters after three steps."""
    held = layouts.place(layout, layouts.whole_model(runs.PARAMS_SEED))
    optimizer, _ = make("chain", held, **({"layout": held.marks} if held.marks else {}))
    for step in range(3):
        runs.feed(layout, held, step)
        optimizer.step()
    return layouts.view(layout, held)


@functools.cache
def on_one_process(worlds) -> dict[str, Tensor]:
    return worlds.run(0, on_layout, "single")[0]


@pytest.mark.parametrize(
    "layout",
    [
        "fsdp3",
        "fsdp_columns",
        "hsdp3x1",
        "fsdp_tp",
        "experts",
        "experts_fsdp",
        "experts_hidden",
        "stages_fsdp",
        "mixed",
    ],
)
def test_layouts_of_the_field_are_equal_to_whole(worlds, layout):
    for params in worlds.run(EVERY[layout].ranks, quietly, on_layout, layout):
        assert runs.differing(params, on_one_process(worlds)) == []


# --- mutants ----------------------------------------------------------------------------------------------------------


def numbers_of_whole_tensors() -> Any:
    """Every matrix gets the sums of its whole tensor."""
    each = sums.statistics_of_each

    def wrong(tensors, wanted, workspace, *others, num_rows=1):
        whole = each(tensors, wanted, workspace, *others)
        return {statistic: values.repeat_interleave(num_rows) for statistic, values in whole.items()}

    return mock.patch("distwd.metrics.measure.statistics_of_each", wrong)


def local_order() -> Any:
    """The matrices of a piece are numbered as they lie on this rank."""
    return mock.patch("distwd.sharding.pieces.Piece.cells", lambda self: list(range(math.prod(self.local_stack))))


@pytest.mark.parametrize("mutant", [numbers_of_whole_tensors, local_order, everyone_owns_everything, no_reduction])
def test_a_mutant_is_seen(worlds, mutant):
    """Tensor norms for matrices; a rank's own numbering; copies that count twice; local norms."""
    ranks = worlds.run(4, look, "ep_fsdp", "chain", mutant)
    with pytest.raises(AssertionError):
        assert_equal_to_whole("ep_fsdp", "chain", ranks)


# --- which numbers move -----------------------------------------------------------------------------------------------


def with_some_gradients(dim: int) -> tuple[list[float], list[float]]:
    """Running means of experts [4, 6, 3], cut along `dim`, before and after a step in which rank 1 alone has no gradient."""
    mesh = mesh_of(2, names=("ep",))
    param = nn.Parameter(distribute_tensor(torch.ones(4, 6, 3), mesh, [Shard(dim)]))
    chain = Chain([("experts", param)], Spread(weight_decay=0.1), LR(0.1))
    seen = []
    for step in range(2):
        param.grad = distribute_tensor(torch.full((4, 6, 3), 1.0 + 2 * step), mesh, [Shard(dim)])
        if step == 1 and mesh.get_local_rank() == 1:
            param.grad = None
        chain.step()
        seen.append(local_of(chain.state[param]["distwd_Spread_mean"]).tolist())
    return seen[0], seen[1]


def test_a_number_moves_if_any_element_of_its_matrix_has_a_gradient(worlds):
    for before, after in worlds.run(2, with_some_gradients, 1):  # every matrix lies on both ranks
        # Where there is no gradient it counts as zeros.
        assert before == [0.5] * 4 and after == [0.25 + 0.5 * 1.5] * 4
    (_, first), (before, second) = worlds.run(2, with_some_gradients, 0)
    assert first == [0.25 + 0.5 * 3.0] * 2 and second == before == [0.5] * 2


def without_reads(way: str) -> None:
    case = case_of("ep_fsdp", way)
    mesh, params, _ = mesh_cases.set_up(case)
    optimizer, _ = make(way, params)
    for step in range(3):
        for name, grad in mesh_cases.placed(case, case.whole(2 + step), mesh).items():
            params[name].grad = grad
        with wire.no_host_sync() if step else nullcontext():
            optimizer.step()


def test_a_step_reads_nothing(worlds):
    for way in ("chain", "attach"):
        worlds.run(4, without_reads, way)


# --- what does not tell its matrices ----------------------------------------------------------------------------------


def refused(layout: str, by_hand: bool) -> tuple[str, bool]:
    """The text of the refusal, and whether nothing has changed."""
    held = layouts.place(layout, layouts.whole_model(runs.PARAMS_SEED))
    marks = {"*": Sharded()} if by_hand else held.marks
    before = {name: local_of(param).clone() for name, param in held.items()}
    chain = Chain(held.items(), Adam(), *rules(), LR(RATE), layout=marks)
    runs.feed(layout, held, 0)
    with pytest.raises(PlanError) as caught:
        chain.step()
    same = all(torch.equal(before[name], local_of(param)) for name, param in held.items())
    return str(caught.value), same and all(not state["exp_avg"].any() for state in chain.state.values() if state)


@pytest.mark.parametrize(
    ("layout", "by_hand", "words"),
    [
        ("experts_plain", False, "experts.weight is a plain piece of a tensor of 3 dimensions"),
        ("fsdp1_full", False, "experts.weight is a plain piece of a tensor of 3 dimensions"),
        ("fsdp1_full_flat", False, "is a FlatParameter of FSDP1"),
        ("fsdp1_full", True, "layout=Sharded.from_fsdp1(model)"),
    ],
)
def test_what_does_not_tell_its_matrices_is_refused_on_every_rank_alike(worlds, layout, by_hand, words):
    ranks = worlds.run(EVERY[layout].ranks, quietly, refused, layout, by_hand)
    assert all(words in text and same for text, same in ranks)
    assert len({text for text, _ in ranks}) == 1


def on_fsdp1(scope: str) -> tuple[list, dict[str, Any]]:
    """Matrices and vectors under FSDP1: their pieces are flat, and some are empty."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1))
    expected = {name: metric_of([param], "l2") for name, param in net.named_parameters()}
    net = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
    rule = RelativeWeightDecay(0.1, norm_input="params", metric="l2", scope=scope)
    chain = Chain(net.named_parameters(), rule, LR(0.1), layout=Sharded.from_fsdp1(net))
    net(torch.ones(2, 5)).sum().backward()
    chain.step()
    return list(expected.values()), chain.stats()["RelativeWeightDecay"]["metric"]


def test_matrices_under_fsdp1(worlds):
    for expected, shown in worlds.run(3, quietly, on_fsdp1, "matrix"):
        assert [value.item() for value in shown.values()] == pytest.approx(expected, rel=1e-6)


# --- checkpoints ------------------------------------------------------------------------------------------------------


class MatrixJob(Job):
    """A job with rules by matrix: what is kept of stacked experts is a tuple of their numbers."""

    def rules(self) -> list[Rule]:
        return rules()

    def kept(self) -> dict:
        return {
            name: {
                key: value.item() if value.dim() == 0 else tuple(layouts.whole_of(value).tolist())
                for key, value in self.optimizer.state.get(param, {}).items()
                if key.startswith("distwd_")
            }
            for name, param in self.held.items()
        }


# Experts cut over FSDP alone; and over expert parallelism and FSDP at once.
ORIGINS = [
    (carrier, form, "fsdp4") for carrier, form in [("chain", "flattened"), ("chain", "full"), ("AdamW", "plain")]
]


@pytest.mark.parametrize(
    ("carrier", "form", "origin"), [*ORIGINS, ("SGD", "plain", "fsdp4"), ("chain", "plain", "experts_fsdp")]
)
def test_numbers_of_matrices_saved_at_four_ranks_go_on_elsewhere_bit_for_bit(worlds, carrier, form, origin):
    with tempfile.TemporaryDirectory() as folder:
        before, params, after = worlds.run(4, saved, origin, carrier, form, folder, MatrixJob)[0]
        for name, numbers in before.items():
            assert len(numbers) == 3
            assert all(isinstance(number, tuple) is (name == "experts.weight") for number in numbers.values())
        assert len(set(before["experts.weight"]["distwd_Spread_radius"])) == 4
        for layout in ("fsdp2", "fsdp1rank", "fsdp_tp", "experts_fsdp"):
            for at_load, ours, kept in worlds.run(
                LAYOUTS[layout].ranks, loaded, layout, carrier, form, folder, MatrixJob
            ):
                assert at_load == before, layout
                assert runs.differing(ours, params) == [], layout
                assert kept == after, layout


def none_of_one_and_two_of_another() -> list[list[float]]:
    """Means of stacks of which the second rank holds no matrix and two: as many as there are stacks."""
    chain = Chain(
        [
            (name, nn.Parameter(distribute_tensor(torch.ones(num, 2, 3), mesh_of(2, names=("ep",)), [Shard(0)])))
            for name, num in (("one", 1), ("four", 4))
        ],
        Spread(weight_decay=0.1),
        LR(0.1),
    )
    params = chain.param_groups[0]["params"]
    for param in params:
        grad = torch.arange(1.0, 1 + len(param)).view(-1, 1, 1).expand(param.shape).contiguous()
        param.grad = distribute_tensor(grad, mesh_of(2, names=("ep",)), [Shard(0)])
    chain.step()
    return [layouts.whole_of(chain.state[param]["distwd_Spread_mean"]).tolist() for param in params]


def test_a_rank_may_hold_no_matrix_of_one_stack_and_two_of_another(worlds):
    for means in worlds.run(2, none_of_one_and_two_of_another):
        assert means == [[0.5], [0.5, 1.0, 1.5, 2.0]]


def through_a_file(layout: str) -> tuple:
    """A chain's own state dict through torch.save, in bf16: kept numbers have more bits than the parameters."""
    job = MatrixJob(layout, "chain", dtype=torch.bfloat16)
    job.train(range(2))
    file, state = io.BytesIO(), job.optimizer.state_dict()
    torch.save(state, file)
    file.seek(0)
    other = MatrixJob(layout, "chain", dtype=torch.bfloat16)
    other.optimizer.load_state_dict(torch.load(file, weights_only=False))
    dtypes = {
        value.dtype for key, value in other.optimizer.state[other.held["experts.weight"]].items() if "distwd" in key
    }
    return job.kept(), other.kept(), dtypes


def test_a_state_dict_of_bf16_parameters_keeps_all_bits(worlds):
    for kept, again, dtypes in worlds.run(2, quietly, through_a_file, "fsdp2"):
        assert again == kept and dtypes == {torch.float32}


def copied(how: str) -> tuple:
    job = MatrixJob("fsdp2", "chain")
    job.train(range(2))
    chain = copy.deepcopy(job.optimizer) if how == "copy" else pickle.loads(pickle.dumps(job.optimizer))
    twin = copy.copy(job)
    twin.optimizer = chain
    twin.held = {name: chain.param_groups[g]["params"][i] for name, (g, i) in places_of(job).items()}
    return job.train(range(2, 4)), twin.train(range(2, 4))


def places_of(job: Job) -> dict[str, tuple[int, int]]:
    ids = {id(param): name for name, param in job.held.items()}
    groups = job.optimizer.param_groups
    return {ids[id(param)]: (g, i) for g, group in enumerate(groups) for i, param in enumerate(group["params"])}


def test_a_copy_goes_on_alike(worlds):
    for (params, kept), (ours, own) in worlds.run(2, copied, "copy"):
        assert runs.differing(ours, params) == [] and own == kept


def test_a_pickle_goes_on_alike():
    named = {name: nn.Parameter(value) for name, value in whole(1).items()}
    chain, _ = make("chain", named)
    other = None
    for step in range(2):
        for optimizer in [chain] if other is None else [chain, other]:
            for param, grad in zip(optimizer.param_groups[0]["params"], whole(10 + step).values(), strict=True):
                param.grad = grad.clone()
            optimizer.step()
        other = other or pickle.loads(pickle.dumps(chain))
    for ours, param in zip(other.param_groups[0]["params"], named.values(), strict=True):
        assert torch.equal(ours, param)
        for key in KEYS:
            mine, its = (each[one][f"distwd_Spread_{key}"] for each, one in ((other.state, ours), (chain.state, param)))
            assert torch.equal(mine, its)


def test_a_rule_that_had_another_scope_begins_anew_with_a_warning():
    param = nn.Parameter(torch.ones(3, 2, 2))
    one = Spread(weight_decay=0.1)
    one.scope = "tensor"
    old = Chain([("experts", param)], one, LR(0.1))
    new = Chain([("experts", param)], Spread(weight_decay=0.1), LR(0.1))
    with pytest.warns(UserWarning, match="they begin anew"):
        new.load_state_dict(old.state_dict())
    assert new.state[param]["distwd_Spread_radius"].shape == (3,)


def test_a_group_that_is_added_has_numbers_of_its_own():
    first, second = nn.Parameter(torch.ones(2, 3, 2)), nn.Parameter(torch.full((3, 1, 1, 2), 2.0))
    chain = Chain([("first", first)], Spread(weight_decay=0.1), LR(0.1))
    first.grad = torch.ones_like(first)
    chain.step()
    chain.add_param_group({"params": [("second", second)]})
    second.grad = torch.ones_like(second)
    chain.step()
    assert chain.state[second]["distwd_Spread_radius"].tolist() == [[pytest.approx(8**0.5)]] * 3
    assert chain.state[first]["distwd_Spread_num_steps"].tolist() == [2.0, 2.0]


# --- the kernel -------------------------------------------------------------------------------------------------------

# Stacks that share a block, that fill several, whose matrices are blocks of their own, that are deep, that have gaps.
STACKS = {
    "small": torch.Size((6, 8, 8)),
    "blocks": torch.Size((40, 96, 128)),
    "large": torch.Size((3, 400, 500)),
    "deep": torch.Size((2, 3, 16, 8)),
    "gaps": torch.Size((3, 2, 4, 6)),
    "plain": torch.Size((5, 4)),
    "empty": torch.Size((4, 0, 3)),
}
KINDS = {
    "product": [DecayTerm(0.1)],
    "masked": [DecayTerm(0.1, 3, cautious=True), DecayTerm(0.2)],
    "proximal": [DecayTerm(0.1, 1, proximal=True)],
    "anchored": [DecayTerm(0.1, cap=0.5)],
}


def stacks(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=generator).to(dtype) for shape in STACKS.values()]
    return [one.transpose(0, 2) if name == "gaps" else one for name, one in zip(STACKS, found, strict=True)]


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("has_update", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_is_written_as_its_matrices_one_by_one(kind, dtype, has_update, compiles):
    if (compiles or kind == "product") and has_update is compiles:
        return
    params, updates = stacks(dtype, 0), stacks(dtype, 1)
    counts = [max(math.prod(param.shape[:-2]), 1) for param in params]
    rates = torch.linspace(0.5, 1.5, sum(counts), dtype=torch.float64)
    anchors = stacks(torch.float32, 2) if kind == "anchored" else None
    terms = [replace(term, rate=term.rate * rates, toward=anchors or 0.0) for term in KINDS[kind]]
    expected, first = [param.clone() for param in params], 0
    for number, count in enumerate(counts):
        for place, (p, u) in enumerate(zip(matrices(expected[number]), matrices(updates[number]), strict=True)):
            toward = [matrices(anchors[number])[place]] if anchors else 0.0
            own = [replace(term, rate=term.rate[first + place], toward=toward) for term in terms]
            scale = 0.5 * rates[first + place] if has_update else 1.0
            writing.apply_([p], own, [u] if has_update else None, scale, Mask([u]), workspace=Workspace())
        first += count
    given, scale = (updates, 0.5 * rates) if has_update else (None, 1.0)
    workspace = Workspace(compiles)
    writing.apply_(params, terms, given, scale, Mask(updates), workspace=workspace, num_cells=counts)
    for name, ours, theirs in zip(STACKS, params, expected, strict=True):
        assert torch.equal(ours, theirs), name


def matrices(tensor: Tensor) -> list[Tensor]:
    """Views."""
    return [tensor] if tensor.dim() <= 2 else [one for part in tensor.unbind() for one in matrices(part)]


@pytest.mark.parametrize("metric", ["l2", "std", "linf", "l0", -1.0])
@pytest.mark.parametrize("minus", [False, True])
def test_a_stack_is_measured_as_its_matrices_one_by_one(metric, minus):
    news, olds = stacks(torch.float32, 0), stacks(torch.float32, 1) if minus else []
    plan = Plan.build(zip(STACKS, news, strict=True))
    asked = Request(parse_metric(metric), [Source(range(len(news)), news, olds, -0.5)], "matrix")
    # Parameters that are in no source count as zeros.
    empty = Request(parse_metric(metric), [Source([0], news[:1], olds[:1], -0.5)], "matrix")
    found, sparse = measure(plan, [asked, empty])
    for position, new in enumerate(news):
        # The difference of two float32 tensors is taken in float32.
        parts = [-0.5 * part.double() for part in matrices(new - olds[position] if minus else new)]
        expected = [metric_of([part], metric) for part in parts]
        slots = plan.slots_of(position, "matrix")
        assert found[slots].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-300)
        zeros = [metric_of([torch.zeros_like(part)], metric) if part.numel() else 0.0 for part in parts]
        assert sparse[slots].tolist() == pytest.approx(expected if position == 0 else zeros, rel=1e-12, abs=1e-300)
