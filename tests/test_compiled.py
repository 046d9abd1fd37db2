"""compile=True: the same results from fused formulas, no compiling after the first steps, less memory, and an error without a compiler."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distwd
from distwd.kernels import compile as compiling
from distwd.kernels.blocks import Workspace, blocks, is_large
from distwd.kernels.sums import STRETCHES, local_statistics
from distwd.metrics.metric import ABS, COUNT, MAX, MIN, SUM, Statistic
from tests import runs
from tests.fake_cuda import fake_cuda
from tests.releases import needs_torch

pytestmark = needs_torch(
    "2.9", "the compiler of 2.7 raises errors for formulas that take numbers of several rules or tensors"
)

# More large tensors than one call takes, one that does not end in a whole vector, and small ones, which are not compiled.
NUMELS = [40_000, 70_003, 120_000, 7, 300]
RULES = {
    "relative params": distwd.RelativeWeightDecay(0.1, norm_input="params"),
    "relative update": distwd.RelativeWeightDecay(0.1),
    "cautious": distwd.CautiousWeightDecay(0.1),
    "several moments": distwd.RelativeWeightDecay(0.1, ord=1, norm_input="grad", metric="std"),
    "by tensor": distwd.RelativeWeightDecay(0.1, ord=3, cautious=True, scope="tensor"),
    "fractional order": distwd.WeightDecay(0.1, ord=2.5),
}
# The formulas that differ: each takes seconds to compile.
CASES = [("chain", rule, torch.float32) for rule in RULES]
CASES += [("attach", rule, torch.float32) for rule in ("relative update", "cautious")]
CASES += [("attach", "relative update", torch.bfloat16), ("chain", "relative update", torch.float64)]


@pytest.fixture(autouse=True)
def together(monkeypatch):
    """Two tensors a call, not eight, which take longer to compile."""
    for module in ("distwd.kernels.apply", "distwd.kernels.sums"):
        monkeypatch.setattr(f"{module}.TOGETHER", 2)


def params(dtype: torch.dtype = torch.float32, numels: list[int] = NUMELS) -> list[tuple[str, torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    named = [(f"p{i}", torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype))) for i, n in enumerate(numels)]
    for _, param in named:
        param.grad = torch.randn(param.shape, generator=generator).to(dtype)
    return named


def optimizer(way: str, rule: distwd.WeightDecay, named: list, compile: bool):
    if way == "chain":
        chain = distwd.Chain(named, distwd.Adam(), rule, distwd.LR(1e-2), compile=compile)
        return chain, chain
    adamw = torch.optim.AdamW(named, lr=1e-2, weight_decay=0)
    return adamw, distwd.attach(adamw, rule, compile=compile)


def stepped(way: str, rule: str, dtype: torch.dtype, compile: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters after some steps with a learning rate that changes, and the last coefficients."""
    named = params(dtype)
    stepping, with_stats = optimizer(way, RULES[rule], named, compile)
    for step in range(3):
        stepping.param_groups[0]["lr"] = 1e-2 / (step + 1)
        stepping.step()
    coefficients = [
        number for numbers in with_stats.stats().values() for number in torch.utils._pytree.tree_leaves(numbers)
    ]
    return [param.detach() for _, param in named], coefficients


@pytest.mark.parametrize(("way", "rule", "dtype"), CASES)
def test_compiled_formulas_give_the_same_bits(way, rule, dtype):
    ours, ours_numbers = stepped(way, rule, dtype, compile=True)
    plain, plain_numbers = stepped(way, rule, dtype, compile=False)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    # Metrics add up in another order, in float64: what is left of that after rounding to float32 is, in practice, nothing.
    torch.testing.assert_close(ours_numbers, plain_numbers, rtol=2**-23, atol=0)


def calls_of(way: str, rule: str) -> int:
    """How many calls of compiled formulas a step makes."""
    made: list[int] = []
    find = compiling.compiled

    def counting(*form):
        made.append(1)
        return find(*form)

    stepping, _ = optimizer(way, RULES[rule], params(), compile=True)
    with (
        mock.patch("distwd.kernels.apply.compiled", counting),
        mock.patch("distwd.kernels.sums.compiled", counting),
    ):
        stepping.step()
    return len(made)


@pytest.mark.parametrize(
    ("way", "rule", "passes"),
    [
        ("chain", "relative params", 1),
        ("chain", "relative update", 2),
        ("chain", "cautious", 1),
        ("attach", "relative update", 2),
        ("chain", "fractional order", 0),
    ],
)
def test_large_tensors_go_through_the_compiler_some_at_a_time(way, rule, passes):
    """A metric is one pass, and so is the writing of a mask or an update; with one call for two tensors and one for the third."""
    assert calls_of(way, rule) == passes * 2


@pytest.mark.parametrize("number", [float, torch.tensor], ids=["numbers", "tensors"])
def test_nothing_is_compiled_again_when_numbers_or_lengths_change(number):
    counters.clear()  # of what other tests have compiled
    compiling.compiled.cache_clear()
    graphs = None
    for numels in ([70_003, 70_003, 120_000, 7, 300], NUMELS, [numel + 8 for numel in NUMELS], [120_000] * 3):
        stepping, _ = optimizer("chain", RULES["relative update"], params(numels=numels), compile=True)
        for lr in (1e-2, 1e-3, 1e-4):
            stepping.param_groups[0]["lr"] = number(lr)
            stepping.step()
            graphs = counters["stats"]["unique_graphs"] if graphs is None else graphs
            assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    "numels", [[1_000_000], [40_000], [40_000, 900_001], [70_003, 5, 0, 300_000, 50_000], NUMELS * 4]
)
@pytest.mark.parametrize("number", [2, 8])
def test_a_call_takes_so_many_tensors_or_halves_of_them_or_one(numels, number):
    tensors = [torch.arange(numel) + start for start, numel in enumerate(numels)]
    found: dict[int, list[torch.Tensor]] = {}
    for places, (pieces, others) in blocks(tensors, [-tensor for tensor in tensors], together=number):
        assert not is_large(pieces) or len(pieces) in (1, number)
        assert len(pieces) == 1 or all(is_large([piece]) == is_large(pieces) for piece in pieces)
        for place, piece, other in zip(places, pieces, others, strict=True):
            assert torch.equal(piece, -other)
            found.setdefault(place, []).append(piece)
    assert sorted(found) == [place for place, numel in enumerate(numels) if numel]
    assert all(torch.equal(torch.cat(pieces), tensors[place]) for place, pieces in found.items())


# --- on ranks ---------------------------------------------------------------------------------------------------------


def _trained_on_ranks(compile: bool, sharded: bool = False) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Two matrices with uneven rows, and one with two, so that the third rank has none."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 601), torch.nn.Linear(601, 299), torch.nn.Linear(40_000, 2))
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    rule = distwd.RelativeWeightDecay(0.1, cautious=True)
    chain = distwd.Chain(model.named_parameters(), distwd.Adam(foreach=True), rule, distwd.LR(1e-2), compile=compile)
    for step in range(3):
        runs.feed_model(model, step)
        chain.step()
    return runs.wholes_of(model), chain.stats()["RelativeWeightDecay"]["coefficient"]


@pytest.mark.parametrize(("ranks", "sharded"), [(2, True), (3, True), (2, False)], ids=["fsdp2", "empty", "copies"])
def test_compiled_on_ranks_equals_one_process_that_does_not_compile(worlds, ranks, sharded):
    plain, coefficient = _trained_on_ranks(compile=False)
    for params_, number in worlds.run(ranks, _trained_on_ranks, True, sharded):
        assert all(torch.equal(a, b) for a, b in zip(params_, plain, strict=True))
        assert torch.equal(number, coefficient)


# --- the argument -----------------------------------------------------------------------------------------------------


def test_copies_compile_too():
    chain = distwd.Chain(params(), distwd.Adam(), RULES["cautious"], distwd.LR(1e-2), compile=True)
    for twin in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert twin._runner._workspace.compiles


PROGRAM = """
import torch, distwd
p = torch.nn.Parameter(torch.ones(40_000))
for make in (
    lambda: distwd.Chain([p], distwd.CautiousWeightDecay(0.1), distwd.LR(0.1), compile=True),
    lambda: distwd.attach(torch.optim.SGD([p], lr=0.1), distwd.CautiousWeightDecay(0.1), compile=True),
):
    try:
        make()
    except ValueError as error:
        print(error)
"""


def test_without_a_compiler_it_is_refused_at_once(tmp_path):
    env = {**os.environ, "CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True
    ).stdout
    lines = printed.strip().split("\n")
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(
            "compile=True: torch.compile does not work here, it needs a C++ compiler (gcc or clang) on cpu"
        )
        assert "or leave compile out" in line


@pytest.mark.parametrize("make", ["chain", "attach"])
def test_without_triton_gpus_step_operation_by_operation_and_that_is_told(make):
    """Once, when the optimizer is made; not in its steps."""
    compiling.why_no_triton.cache_clear()
    compiling.check_compiler.cache_clear()
    with fake_cuda(), mock.patch("importlib.util.find_spec", return_value=None):
        named = [("p", torch.nn.Parameter(torch.ones(100_000, device="cuda")))]
        named[0][1].grad = torch.ones(100_000, device="cuda")
        with pytest.warns(
            UserWarning, match="compile=True: Triton is not installed; on cuda distwd steps operation by operation"
        ):
            stepping, _ = optimizer(make, RULES["cautious"], named, compile=True)
        stepping.step()
        assert compiling.way_of(Workspace(True), torch.device("cuda")) is None  # a dispatch mode sees fake tensors
    assert compiling.way_of(Workspace(True), torch.device("cuda")) is None
    assert compiling.way_of(Workspace(True), torch.device("cpu")) == "compiler"
    assert compiling.way_of(Workspace(False), torch.device("cpu")) is None
    compiling.why_no_triton.cache_clear()
    compiling.check_compiler.cache_clear()


def test_moments_of_stretches_are_those_of_all_elements():
    """Of what the stretches leave over, too: the largest element is there, and then a NaN."""
    cube = Statistic("power", 3.0)
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(numel, generator=generator).clamp_min(-0.9) for numel in (40_003, 70_001)]
    assert all(x.numel() % STRETCHES for x in xs)
    xs[0][7], xs[1][-1] = 0.0, 9.0
    whole = torch.cat(xs).double()
    expected = {
        SUM: whole.sum(),
        ABS: whole.abs().sum(),
        COUNT: whole.count_nonzero().double(),
        MAX: whole.abs().max(),
        MIN: whole.abs().min(),
        cube: (whole.abs() ** 3).sum(),
    }
    scratch = Workspace(compiles=True)
    found = local_statistics(xs, expected, scratch)
    assert found.keys() == expected.keys()
    for moment, value in expected.items():
        torch.testing.assert_close(found[moment], value, rtol=1e-12, atol=0)
    for place in (5, -1):
        kept, xs[0][place] = xs[0][place].clone(), torch.nan
        assert all(value.isnan() for value in local_statistics(xs, expected, scratch).values())
        xs[0][place] = kept
