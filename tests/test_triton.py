"""Formulas as Triton kernels: the bits of the same formulas done operation by operation, wherever tensors are cut.

On a machine without a GPU, Triton's interpreter runs the kernels on CPU tensors, by numpy; and Triton compiles them for a GPU
that is not there. On one with a GPU the same tests run on it.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distwd
from distwd.kernels import compile as compiling
from distwd.kernels import triton as fused
from distwd.kernels.apply import apply_, apply_from_
from distwd.kernels.blocks import Workspace
from distwd.kernels.formulas import DecayTerm, Mask, TermKind, Write
from distwd.kernels.stochastic import GlobalIndices, RandomBits
from distwd.kernels.sums import (
    ABS,
    COUNT,
    MAX,
    MIN,
    SQUARE,
    SUM,
    Statistic,
    Vectors,
    local_statistics,
    statistics_of_each,
)
from tests import runs

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# Triton asks when it is imported, too.
INTERPRETED = {} if ON_GPU else {"TRITON_INTERPRET": "1"}
with mock.patch.dict(os.environ, INTERPRETED):
    pytest.importorskip("triton", reason="Triton is not installed; it is no part of torch for CPUs")
    language = importlib.import_module("triton.language")
if not ON_GPU and type(language.sum).__name__ != "InterpretedFunction":
    pytest.skip("Triton was imported to compile; run this file alone", allow_module_level=True)

# numpy tells what IEEE arithmetic does silently.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
F32, F64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F32, F64, BF16, FP16]
# Several chunks, one exactly, the ends of one, and fewer elements than a vector has.
NUMELS = [1500, 3, 512, 301]


@contextmanager
def in_kernels() -> Iterator[list[str]]:
    """`compile=True` means kernels here, in chunks so short that small tensors have several. Gives what was launched."""
    launched: list[str] = []
    launch = fused._launch

    def counting(kernel, *rest):
        launched.append(kernel.__name__)
        launch(kernel, *rest)

    with (
        mock.patch.dict(os.environ, INTERPRETED),
        mock.patch.object(compiling, "_TRITON_ON", (DEVICE.type,)),
        mock.patch.multiple(fused, _CHUNK=512, _BLOCK=256, _launch=counting),
    ):
        assert not compiling.why_no_triton(DEVICE.type)  # launches one, once
        launched.clear()
        yield launched


@pytest.fixture
def launched() -> Iterator[list[str]]:
    with in_kernels() as found:
        yield found


def some(seed: int, dtype: torch.dtype = F32, numels: list[int] = NUMELS) -> list[Tensor]:
    """Numbers of many sizes, zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for numel in numels:
        x = torch.randn(numel, generator=generator) * 2.0 ** torch.randint(-9, 5, (numel,), generator=generator)
        x[:: max(numel // 7, 2)] = 0.0
        found.append(x.to(DEVICE, dtype))
    return found


def cut(tensors: list[Tensor]) -> list[Tensor]:
    """The same elements as views, cut at odd places, so that hardly any begins at a whole vector."""
    return [part for one in tensors for part in one.tensor_split([one.numel() // 3 | 1, one.numel() // 2 | 1])]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether all bits are the same; of zeros but for their sign, of NaNs but for their kind."""
    return all(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        for a, b in zip(ours, theirs, strict=True)
    )


# --- writes ---------------------------------------------------------------------------------------------------------

ANCHORS, OWN = some(3), some(4)
RATES = torch.linspace(0.01, 0.3, len(NUMELS), dtype=F64, device=DEVICE)
ON_DEVICE = torch.tensor(0.07, dtype=F64, device=DEVICE)
SENTENCES = {
    "nothing": [],
    "decay": [DecayTerm(ON_DEVICE)],
    "a number": [DecayTerm(0.03, 1)],
    "by tensor": [DecayTerm(RATES), DecayTerm(RATES, 3, cautious=True)],
    "order 1": [DecayTerm(ON_DEVICE, 1)],
    "order 4": [DecayTerm(ON_DEVICE, 4)],
    "masked": [DecayTerm(ON_DEVICE, cautious=True)],
    "masked by an ascent": [DecayTerm(ON_DEVICE, 1, cautious=True, sign=-1)],
    "inclusive": [DecayTerm(ON_DEVICE, 3, cautious=True, inclusive=True)],
    "masked by its own": [DecayTerm(0.1, cautious=True, own_us=OWN)],
    "capped": [DecayTerm(ON_DEVICE, cap=0.7), DecayTerm(ON_DEVICE, 3, cap=0.3)],
    "toward a number": [DecayTerm(ON_DEVICE, toward=0.25), DecayTerm(0.1, 1, toward=-0.1, cautious=True)],
    "toward tensors": [DecayTerm(ON_DEVICE, toward=ANCHORS), DecayTerm(0.1, cap=0.5, toward=some(5, BF16))],
    "proximal 1": [DecayTerm(RATES, 1, proximal=True)],
    "proximal 2": [DecayTerm(ON_DEVICE, proximal=True), DecayTerm(0.1, proximal=True, cap=0.4)],
    "proximal 3": [DecayTerm(ON_DEVICE, 3, proximal=True), DecayTerm(ON_DEVICE, cautious=True)],
    "several": [
        DecayTerm(0.1),
        DecayTerm(ON_DEVICE, 1, cautious=True),
        DecayTerm(RATES, 5),
        DecayTerm(0.2, 1, proximal=True),
    ],
}


def written(
    terms: list[DecayTerm],
    dtype: torch.dtype,
    compiles: bool,
    is_cut: bool = False,
    clear: bool = True,
    scale=-1.0,
    minus=None,
) -> list[Tensor]:
    """Parameters, and updates, after a write."""
    params, updates, own = some(0, dtype), some(1, dtype), some(2, dtype) if minus else None
    lists = [params, updates, own]
    if is_cut:
        lists = [one and cut(one) for one in lists]
        # A rate for each tensor is one for each of its parts.
        terms = [
            replace(
                term,
                rate=term.rate.repeat_interleave(3) if isinstance(term.rate, Tensor) and term.rate.dim() else term.rate,
                toward=cut(term.toward) if isinstance(term.toward, list) else term.toward,
                own_us=term.own_us and cut(term.own_us),
            )
            for term in terms
        ]
    mask = Mask(lists[1], -1, lists[2])
    apply_(
        lists[0],
        terms,
        None if minus else lists[1],
        1.0 if minus else scale,
        mask,
        workspace=Workspace(compiles),
        clear=clear and not minus,
    )
    return [*params, *updates]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sentence", SENTENCES)
def test_every_sentence_has_the_bits_of_its_operations_whole_and_cut(sentence, dtype, launched):
    terms = SENTENCES[sentence]
    plain = written(terms, dtype, compiles=False)
    assert not launched
    for is_cut in (False, True):
        assert same(written(terms, dtype, compiles=True, is_cut=is_cut), plain)
    # One launch for all tensors.
    assert launched == ["kernel"] * 2


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    "change", [{"scale": ON_DEVICE}, {"scale": 0.5}, {"scale": RATES}, {"clear": False}, {"minus": True}], ids=str
)
def test_updates_that_are_scaled_kept_or_subtracted(change, dtype, launched):
    assert same(
        written(SENTENCES["several"], dtype, True, **change), written(SENTENCES["several"], dtype, False, **change)
    )
    assert launched == ["kernel"]


def test_a_kernel_is_what_numpy_computes(launched):
    """p ← keep·p − rate·[u·p > 0]·p + u, by hand, each operation rounded to float32."""
    (p,), (u,) = some(0, numels=[1500]), some(1, numels=[1500])
    x, y = p.cpu().numpy().copy(), u.cpu().numpy().copy()
    apply_(
        [p],
        [DecayTerm(ON_DEVICE), DecayTerm(0.03, cautious=True)],
        [u],
        -1.0,
        Mask([u]),
        workspace=Workspace(True),
        clear=True,
    )
    keep, rate = np.float32(1 - 0.07), np.float32(0.03)
    masked = np.where(np.sign(x) * np.sign(y) > 0, x, np.float32(0))
    assert (p.cpu().numpy() == keep * x - masked * rate + y).all()
    assert not u.any()
    assert launched == ["kernel"]


def test_what_is_not_a_number_stays_one(launched):
    for terms in ([DecayTerm(0.1, 3, cautious=True, cap=0.5)], [DecayTerm(torch.tensor(math.nan), 1, proximal=True)]):
        found = []
        for compiles in (True, False):
            p, u = some(0), some(1)
            p[0][5], u[0][6], p[0][7], u[0][8] = math.nan, math.nan, math.inf, -math.inf
            apply_(
                p,
                [replace(term, rate=torch.as_tensor(term.rate).to(DEVICE)) for term in terms],
                u,
                1.0,
                Mask(u),
                workspace=Workspace(compiles),
            )
            found.append(p)
        assert same(*found)
        assert found[0][0][:9].isnan().sum() >= 2


@pytest.mark.parametrize("clear", [False, True])
def test_terms_of_other_tensors(clear, launched):
    """The decay of old parameters, written to new ones."""
    found = []
    for compiles in (True, False):
        new, old, us = some(0), some(1), some(2)
        apply_from_(
            new,
            old,
            [DecayTerm(ON_DEVICE), DecayTerm(RATES, 3, cautious=True)],
            Mask(us, 1, old if clear else None),
            workspace=Workspace(compiles),
        )
        found.append([*new, *old])
    assert same(*found)
    assert launched == ["kernel"]


def test_a_rate_for_each_matrix_of_a_stack(launched):
    shapes = [(3, 7, 50), (2, 5, 4, 13), (40,), (9, 31), (600, 2, 2)]
    counts = [3, 10, 1, 1, 600]
    rates = torch.linspace(0.5, 1.5, sum(counts), dtype=F64, device=DEVICE)
    for terms in (
        [DecayTerm(0.1 * rates)],
        [DecayTerm(0.1 * rates, 3, cautious=True), DecayTerm(0.1 * rates, 1, proximal=True)],
    ):
        found = []
        for compiles in (True, False):
            numels = [math.prod(shape) for shape in shapes]
            p, u = (
                [x.view(shape) for x, shape in zip(some(seed, numels=numels), shapes, strict=True)] for seed in (0, 1)
            )
            apply_(p, terms, u, 0.5 * rates, Mask(u), workspace=Workspace(compiles), num_cells=counts)
            apply_(p, terms, workspace=Workspace(compiles), mask=Mask(u), num_cells=counts)
            found.append(p)
        assert same(*found)
    assert launched == ["kernel"] * 4


# --- random rounding ------------------------------------------------------------------------------------------------


def rounded(indices: list[GlobalIndices], dtype: torch.dtype, compiles: bool, special: bool = False) -> list[Tensor]:
    """Parameters after a write that is rounded at random."""
    p, u = some(0, dtype), some(1, dtype)
    if special:
        p[0][:6] = torch.tensor(
            [math.nan, math.inf, -math.inf, torch.finfo(dtype).max, -torch.finfo(dtype).tiny, 0.0], dtype=dtype
        )
    bits = RandomBits(indices, [0xDEADBEEF, 5, 1 << 31, 77], 0xFEDCBA98)
    apply_(p, [DecayTerm(1e-4)], u, 0.01, workspace=Workspace(compiles), random_bits=bits, clear=True)
    return p


FIRST = [GlobalIndices(((0, numel),)) for numel in NUMELS]
FAR = [GlobalIndices((((1 << 33) + 11, numel),)) for numel in NUMELS]
COLUMNS = [
    GlobalIndices(((10, row),), ((((2, 2 + numel // row),), 1000),))
    for numel, row in zip(NUMELS, (60, 3, 128, 7), strict=True)
]
TWO_RUNS = [GlobalIndices(((3, 20), (50, 40)), ((((0, 25),), 100),)), *FIRST[1:]]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("indices", "kernels"),
    [(FIRST, 1), (FAR, 1), (COLUMNS, 1), (TWO_RUNS, 1)],
    ids=["whole", "far", "columns", "two runs"],
)
def test_random_bits_go_by_the_place_in_the_whole(indices, kernels, dtype, launched):
    """What is cut in other ways than rows of one run comes operation by operation."""
    plain = rounded(indices, dtype, compiles=False)
    assert same(rounded(indices, dtype, compiles=True), plain)
    assert len(launched) == kernels
    nearest = some(0, dtype)
    apply_(nearest, [DecayTerm(1e-4)], some(1, dtype), 0.01, workspace=Workspace(), clear=True)
    assert not same(nearest, plain)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_random_rounding_of_what_has_no_neighbours(dtype, launched):
    assert same(rounded(FIRST, dtype, True, special=True), rounded(FIRST, dtype, False, special=True))


# --- statistics -----------------------------------------------------------------------------------------------------

CUBE, FOURTH = Statistic("power", 3.0), Statistic("power", 4.0)
WANTED = (SUM, ABS, SQUARE, CUBE, FOURTH, COUNT, MAX, MIN)


def by_numpy(statistic: Statistic, x: np.ndarray) -> float:
    size = np.abs(x)
    if statistic == COUNT:
        return float(np.count_nonzero(x))
    if statistic.kind == "power":
        return float((size**statistic.p).sum())
    return float({"sum": x.sum, "max": size.max, "min": size.min}[statistic.kind]())


def flat(tensors: list[Tensor]) -> np.ndarray:
    return torch.cat([x.double().flatten() for x in tensors]).cpu().numpy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("minus", [False, True])
def test_statistics_are_those_of_numpy_whole_and_cut(dtype, minus, launched):
    xs, ys = some(0, dtype), some(1, dtype) if minus else []
    # A difference of bf16 is one of float32.
    x = (
        flat(xs)
        if not minus
        else flat([(a.float() - b.float()) if dtype in (BF16, FP16) else a - b for a, b in zip(xs, ys, strict=True)])
    )
    for lists in ((xs, ys), (cut(xs), cut(ys))):
        found = local_statistics(lists[0], WANTED, Workspace(True), lists[1])
        assert launched.pop() == "kernel"
        assert found.keys() == set(WANTED)
        for statistic, value in found.items():
            assert value.dtype == F64
            assert value.dim() == 0
            assert float(value) == pytest.approx(by_numpy(statistic, x), rel=1e-13, abs=1e-11)


def test_a_statistic_of_each_tensor_and_of_each_matrix(launched):
    xs = some(0, numels=[1210] * 3)
    each = statistics_of_each(xs, WANTED, Workspace(True))
    rows = statistics_of_each(xs, WANTED, Workspace(True), num_rows=5)
    assert launched == ["kernel"] * 2
    for statistic in WANTED:
        assert each[statistic].tolist() == pytest.approx(
            [by_numpy(statistic, flat([x])) for x in xs], rel=1e-13, abs=1e-11
        )
        expected = [by_numpy(statistic, flat([row])) for x in xs for row in x.view(5, -1)]
        assert rows[statistic].tolist() == pytest.approx(expected, rel=1e-13, abs=1e-11)


@pytest.mark.parametrize("place", [3, 512, 1499])
def test_a_nan_makes_every_statistic_nan(place, launched):
    xs = some(0)
    xs[0][place] = math.nan
    assert all(value.isnan() for value in local_statistics(xs, WANTED, Workspace(True)).values())
    xs[0][place] = -math.inf
    found = local_statistics(xs, WANTED, Workspace(True))
    assert [float(found[one]) for one in (SUM, ABS, MAX)] == [-math.inf, math.inf, math.inf]
    assert not found[COUNT].isnan()


def test_other_statistics_come_by_blocks(launched):
    wanted = (Statistic("power", -1.0), Statistic("power", 0.5))
    xs = [x.abs() + 1 for x in some(0)]
    found = local_statistics(xs, wanted, Workspace(True))
    assert not launched
    assert [float(found[one]) for one in wanted] == pytest.approx(
        [by_numpy(one, flat(xs)) for one in wanted], rel=1e-12
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_vectors(dtype, launched):
    """θ, u − minus, and two directions, of which one is masked and one pulls to tensors of another dtype."""
    kinds = (TermKind(2.0, toward=0.5), TermKind(3.0, True), TermKind(1.0, anchors=3))
    vectors = Vectors(Write(kinds, False, 1.0, us=1, mask_us=1, mask_minus=2), 2, (2, 3, 4))
    lists = [some(0, dtype), some(1, dtype), some(2, dtype), some(3, BF16)]
    plain = local_statistics(lists[0], vectors, Workspace(), *lists[1:])
    assert not launched
    for some_ in (lists, [cut(one) for one in lists]):
        found = local_statistics(some_[0], vectors, Workspace(True), *some_[1:])
        assert launched.pop() == "kernel"
        for product, value in plain.items():
            assert float(found[product]) == pytest.approx(float(value), rel=1e-12, abs=1e-9)


# --- what no kernel serves ------------------------------------------------------------------------------------------


def odd_ones(seed: int) -> list[Tensor]:
    """A tensor with gaps, a transposed one, an empty one, a number, and two that a kernel serves."""
    a, b, c, d, e = some(seed, numels=[1800, 600, 1, 700, 90])
    return [a.view(30, 60)[:, ::2], b.view(20, 30).t(), a[:0], c.view(()), d, e.view(9, 10)]


def test_tensors_with_gaps_are_written_operation_by_operation(launched):
    rates = torch.linspace(0.01, 0.3, 6, dtype=F64, device=DEVICE)
    for rate in (ON_DEVICE, rates):
        found = []
        for compiles in (True, False):
            p, u = odd_ones(0), odd_ones(1)
            apply_(
                p, [DecayTerm(rate, 3, cautious=True), DecayTerm(rate)], u, rate, Mask(u), workspace=Workspace(compiles)
            )
            found.append(p)
        assert same(*found)
    assert launched == ["kernel"] * 2


def test_tensors_with_gaps_are_measured_by_blocks(launched):
    found, plain = (
        local_statistics(odd_ones(0), WANTED, Workspace(compiles), odd_ones(1)) for compiles in (True, False)
    )
    assert launched == ["kernel"]
    for statistic in WANTED:
        assert float(found[statistic]) == pytest.approx(float(plain[statistic]), rel=1e-12)
    each = statistics_of_each(odd_ones(0)[:1] * 2, (SUM,), Workspace(True))
    assert each[SUM].tolist() == pytest.approx([float(odd_ones(0)[0].double().sum())] * 2)


def test_random_bits_of_tensors_with_gaps(launched):
    found = []
    for compiles in (True, False):
        p = [x.to(BF16) for x in odd_ones(0)]
        p[0] = odd_ones(0)[0].view(-1).to(BF16).view(30, 30).t()
        indices = [GlobalIndices(((7, max(x.numel(), 1)),)) for x in p]
        bits = RandomBits(indices, list(range(6)), 99)
        apply_(p, [DecayTerm(1e-3)], workspace=Workspace(compiles), random_bits=bits)
        found.append(p)
    assert same(*found)
    assert launched == ["kernel"]


def test_dtypes_that_torch_would_convert_are_left_to_torch(launched):
    """Gradients of another dtype than the parameters'. Of bf16 parameters all is widened, and a kernel does it."""
    for dtype, others, kernels in ((F32, BF16, 0), (F32, F64, 0), (BF16, F32, 1), (FP16, F64, 1)):
        found = []
        for compiles in (True, False):
            p, u = some(0, dtype), some(1, others)
            apply_(p, [DecayTerm(ON_DEVICE, cautious=True)], u, -1.0, Mask(u), workspace=Workspace(compiles))
            found.append(p)
        assert same(*found)
        assert len(launched) == kernels
        launched.clear()


def test_tensors_that_are_more_than_their_memory_are_left_to_torch(launched):
    class Odd(Tensor):
        pass

    p = [some(0)[0].as_subclass(Odd), torch._neg_view(some(1)[0])]
    found = local_statistics(p[:1], (ABS,), Workspace(True))
    assert float(found[ABS]) == pytest.approx(float(some(0)[0].double().abs().sum()))
    found = local_statistics(p[1:], (SUM,), Workspace(True))
    assert float(found[SUM]) == pytest.approx(-float(some(1)[0].double().sum()))
    assert not launched


def test_orders_that_need_a_power_are_left_to_torch(launched):
    assert same(written([DecayTerm(0.1, 2.5)], F32, True), written([DecayTerm(0.1, 2.5)], F32, False))
    assert not launched


def test_autograd_sees_what_a_kernel_overwrites(launched):
    x = torch.nn.Parameter(some(0)[0])
    y = (x * x).sum()
    with torch.no_grad():
        apply_([x], [DecayTerm(0.1, 1)], workspace=Workspace(True))
    assert launched
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# --- steps ----------------------------------------------------------------------------------------------------------

RULES = {
    "absolute": distwd.WeightDecay(0.1, ord=1),
    "cautious": distwd.CautiousWeightDecay(0.1),
    "relative params": distwd.RelativeWeightDecay(0.1, norm_input="params", metric="std"),
    "relative grad": distwd.RelativeWeightDecay(0.1, norm_input="grad", metric="l2"),
    "relative update": distwd.RelativeWeightDecay(0.1),
    "by tensor": distwd.RelativeWeightDecay(0.1, ord=3, cautious=True, scope="tensor"),
    "by matrix": distwd.RelativeWeightDecay(0.1, norm_input="params", metric="l2", scope="matrix"),
    "toward the start": distwd.WeightDecay(0.1, toward="initial"),
    "proximal": distwd.WeightDecay(0.1, ord=1, proximal=True),
    "norm": distwd.NormControl(0.1),
    "hyperball": distwd.Hyperball(),
}
HOSTS = {
    "chain": lambda named, rule, **settings: distwd.Chain(
        named, distwd.Adam(foreach=True), rule, distwd.LR(1e-2), **settings
    ),
    "attach": lambda named, rule, **settings: _attached(named, rule, **settings),
}


def _attached(named, rule, **settings):
    optimizer = torch.optim.AdamW(named, lr=1e-2, weight_decay=0, foreach=True)
    distwd.attach(optimizer, rule, **settings)
    return optimizer


def trained(way: str, rule: str, compile: bool, dtype: torch.dtype = F32, copies: int = 1) -> list[Tensor]:
    numels = NUMELS * copies
    named = [(f"p{number}", torch.nn.Parameter(x)) for number, x in enumerate(some(0, dtype, numels))]
    settings = {"rounding": "stochastic"} if dtype == BF16 and way == "chain" else {}
    optimizer = HOSTS[way](named, RULES[rule], compile=compile, **settings)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        # New gradients, at new addresses.
        for (_, param), gradient in zip(named, some(10 + step, dtype, numels), strict=True):
            param.grad = gradient
        optimizer.step()
    return [param.detach() for _, param in named]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("way", HOSTS)
def test_steps_have_the_bits_of_those_that_are_not_fused(way, rule, dtype, launched):
    plain = trained(way, rule, False, dtype)
    assert not launched
    assert same(trained(way, rule, True, dtype), plain)
    assert launched


def test_the_number_of_launches_does_not_grow_with_the_number_of_parameters(launched):
    for rule in ("cautious", "relative update", "by tensor"):
        trained("chain", rule, True)
        few = len(launched)
        launched.clear()
        trained("chain", rule, True, copies=5)
        assert len(launched) == few
        launched.clear()


def _trained_on_ranks(compile: bool, sharded: bool) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 21), torch.nn.Linear(21, 19), torch.nn.Linear(400, 1))
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    rule = distwd.RelativeWeightDecay(0.1, cautious=True, metric="std")
    chain = distwd.Chain(model.named_parameters(), distwd.Adam(foreach=True), rule, distwd.LR(1e-2), compile=compile)
    with in_kernels() as launched:
        for step in range(2):
            runs.feed_model(model, step)
            chain.step()
    assert len(launched) == (4 if compile else 0)
    return runs.wholes_of(model), chain.stats()["RelativeWeightDecay"]["coefficient"]


@pytest.mark.skipif(ON_GPU, reason="ranks are processes on CPUs")
def test_kernels_on_ranks_equal_one_process_without_them(worlds):
    plain, coefficient = _trained_on_ranks(False, False)
    for params, number in worlds.run(2, _trained_on_ranks, True, True):
        assert same(params, plain)
        assert torch.equal(number, coefficient)


# --- tables ---------------------------------------------------------------------------------------------------------


def test_a_table_is_made_once_and_anew_for_other_addresses(launched):
    workspace, p, u = Workspace(True), some(0), some(1)
    for _ in range(3):
        apply_(p, [DecayTerm(0.1)], u, -1.0, workspace=workspace)
        assert len(workspace.tables) == 1
    (first,) = workspace.tables.values()
    apply_(p, [DecayTerm(0.1)], [one.clone() for one in u], -1.0, workspace=workspace)
    _, second = workspace.tables.values()
    assert second.chunks is first.chunks
    assert not torch.equal(second.rows, first.rows)
    assert second.chunks.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [2, 0], [3, 0]]


def test_tables_are_given_up_but_for_those_that_a_graph_reads(launched):
    workspace, p = Workspace(True), some(0)
    apply_(p, [DecayTerm(0.1, 1)], workspace=workspace)
    (kept,) = workspace.tables.values()
    kept.is_captured = True
    updates = [some(1) for _ in range(fused._MAX_KEPT)]
    for u in updates:
        apply_(p, [], u, -1.0, workspace=workspace)
    assert len(workspace.tables) == 2
    assert kept in workspace.tables.values()


# --- the compiler ---------------------------------------------------------------------------------------------------


def test_code_for_a_gpu_is_wide_and_rounds_each_operation():
    """Compiled for sm_90: 16 bytes at once where a tensor allows it, nothing spilled, no product contracted with a sum."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.triton_ahead"], env=env, capture_output=True, text=True, check=True
    )
    kernels = json.loads(ran.stdout)
    assert len(kernels) > 10
    for name, found in kernels.items():
        accesses = found["accesses"]
        assert accesses["LDG.E.128"], name
        assert accesses.get("STG.E.128") or "STG.E.64" in accesses, name  # of sums one number is stored
        assert not {"LDL", "STL"} & set(accesses), name
        assert found["stack"] == 0, name
        assert found["registers"] <= 128, name
        assert found["contracted"] == found["approximate"] == 0, name


# --- the tests ------------------------------------------------------------------------------------------------------


def _statistics_cut() -> bool:
    found = local_statistics(cut(some(0)), WANTED, Workspace(True))
    return all(float(found[one]) == pytest.approx(by_numpy(one, flat(some(0))), rel=1e-12) for one in WANTED)


def _smallest_cut() -> bool:
    xs = [x.abs() + 1 for x in some(0)]
    return float(local_statistics(cut(xs), (MIN,), Workspace(True))[MIN]) == by_numpy(MIN, flat(xs))


def _nan_in_maxima() -> bool:
    xs = some(0)
    xs[0][3] = math.nan
    return all(value.isnan() for value in local_statistics(xs, (MAX, MIN), Workspace(True)).values())


def _sentence(name: str, dtype: torch.dtype, is_cut: bool = False) -> bool:
    return same(written(SENTENCES[name], dtype, True, is_cut), written(SENTENCES[name], dtype, False))


def _noise(indices: list[GlobalIndices], dtype: torch.dtype) -> bool:
    return same(rounded(indices, dtype, True), rounded(indices, dtype, False))


MUTANTS = {
    "an element too many": ("start + i < numel", "start + i <= numel", _statistics_cut),
    "ends that count": ("tl.where(inside, ", "tl.where(start + i >= 0, ", _smallest_cut),
    "a NaN that is lost": ("| (new", "& (new", _nan_in_maxima),
    "one rate for all": ("s + first)", "s)", lambda: _sentence("by tensor", F32)),
    "cut off and not rounded": ("+ 0x7FFF + ", "+ ", lambda: _sentence("decay", BF16)),
    "local places": ("place = base + ", "place = ", lambda: _noise(FAR, BF16)),
    "rows side by side": ("* stride", "* row", lambda: _noise(COLUMNS, FP16)),
    "one key for all": ("tl.load(keys + tensor)", "tl.load(keys)", lambda: _noise(FIRST, BF16)),
    "updates that stay": ("tl.zeros_like(", "(", lambda: _sentence("decay", F32)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_these_tests_see(mutant, launched):
    """A kernel that is wrong in one place."""
    old, new, check = MUTANTS[mutant]
    assert check()
    changed = []

    def wrong(*form):
        text = right(*form)
        changed.append(old in text)
        return text.replace(old, new)

    right = fused.text_of
    fused.kernel_of.cache_clear()
    with mock.patch.object(fused, "text_of", wrong):
        assert not check()
    assert any(changed)
    fused.kernel_of.cache_clear()
