"""Random shapes, dtypes, orders, rules and groups against the oracle; and a tensor cut anywhere keeps its bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distwd
from tests.chains import transforms_of
from tests.oracle import AdamPart, Decay, LrPart, Oracle, SgdPart

# Any chain, also one without a learning rate.
pytestmark = pytest.mark.filterwarnings("ignore:no LR in this chain:UserWarning")

shapes = st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6)
ords = st.one_of(st.sampled_from([1, 2, 3, 4]), st.floats(1, 4, allow_nan=False))
metrics = st.one_of(
    st.none(), st.sampled_from(["mad", "std", "var", "sum", "rms", "l0", "l1", "l2", "l3", "l4", "linf", 2.5])
)
decays = st.builds(
    Decay,
    weight_decay=st.floats(0, 0.1, allow_subnormal=False),
    ord=ords,
    target=st.sampled_from(["update", "grad", "params_direct", "closure"]),
    metric=metrics,
    norm_input=st.sampled_from(["update", "grad", "params"]),
    cautious=st.booleans(),
    scope=st.sampled_from(["all", "group", "tensor"]),
)
others = st.one_of(
    st.just(AdamPart(eps=1e-3)),
    st.just(SgdPart(0.9)),
    st.builds(LrPart, st.floats(0.001, 1, allow_subnormal=False)),
)
chains = st.lists(st.one_of(decays, decays, others), min_size=1, max_size=5)
seeds = st.integers(0, 2**31)
small = settings(derandomize=True, max_examples=80, deadline=None)


def random_tensors(shapes: list, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return {f"p{index}": value for index, value in enumerate(values)}


def step(chain: distwd.Chain, params: dict, grads: dict) -> None:
    """With a closure, as some targets need one; a gradient that is absent stays None."""

    def closure() -> None:
        for name, param in params.items():
            param.grad = grads[name].clone() if name in grads else None

    chain.step(closure)


def split(names: list[str], at: list[int]) -> list[list[str]]:
    edges = sorted({0, len(names), *(cut % (len(names) + 1) for cut in at)})
    return [names[start:stop] for start, stop in itertools.pairwise(edges)]


@small
@given(
    shapes=shapes,
    parts=chains,
    seed=seeds,
    at=st.lists(st.integers(0, 6), max_size=2),
    missing=st.sets(st.integers(0, 5)),
)
def test_any_chain_equals_the_oracle(shapes, parts, seed, at, missing):
    whole = random_tensors(shapes, seed, torch.float64)
    params = {name: torch.nn.Parameter(value.clone()) for name, value in whole.items()}
    groups = split(list(params), at)
    chain = distwd.Chain([{"params": [(n, params[n]) for n in names]} for names in groups], *transforms_of(parts))
    oracle = Oracle(whole, parts, groups)
    for index in range(2):
        grads = random_tensors(shapes, seed + 1 + index, torch.float64)
        grads = {name: grad for name, grad in grads.items() if index == 0 or int(name[1:]) not in missing}
        step(chain, params, grads)
        oracle.step(grads)
    for name, param in params.items():
        torch.testing.assert_close(param.detach(), oracle.params[name], rtol=1e-4, atol=1e-5)


def cut(tensors: dict, at: list[float]) -> dict:
    """The same elements in more and smaller tensors."""
    pieces = {}
    for name, value in tensors.items():
        flat = value.reshape(-1)
        edges = sorted({0, flat.numel(), *(int(share * flat.numel()) for share in at)})
        for start, stop in itertools.pairwise(edges):
            pieces[f"{name}.{start}"] = flat[start:stop].clone()
    return pieces


@small
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    at=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    parts=st.lists(st.one_of(decays.filter(lambda decay: decay.scope == "all"), others), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=seeds,
)
def test_a_tensor_cut_anywhere_has_the_bits_of_the_whole(sizes, at, parts, dtype, seed):
    def train(change) -> torch.Tensor:
        values = change(random_tensors([[size] for size in sizes], seed, dtype))
        params = {name: torch.nn.Parameter(value) for name, value in values.items()}
        chain = distwd.Chain(params.items(), *transforms_of(parts, foreach=True))
        for index in range(2):
            step(chain, params, change(random_tensors([[size] for size in sizes], seed + 1 + index, dtype)))
        return torch.cat([param.detach() for param in params.values()])

    whole, pieces = train(dict), train(lambda tensors: cut(tensors, at))
    assert torch.equal(whole.nan_to_num(nan=7), pieces.nan_to_num(nan=7))


@small
@given(
    size=st.integers(1, 600),
    at=st.floats(0, 1),
    ord=ords,
    rate=st.floats(0, 1, allow_subnormal=False),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=seeds,
)
def test_decay_alone_is_blind_to_cuts_in_any_dtype(size, at, ord, rate, dtype, seed):
    """distwd's own arithmetic, with no optimizer beside it, in low precision too."""
    whole = random_tensors([[size]], seed, dtype)["p0"]
    pieces = [piece.clone() for piece in (whole[: int(at * size)], whole[int(at * size) :])]
    distwd.decay_weights_(pieces, rate, ord)
    distwd.decay_weights_([whole], rate, ord)
    assert torch.equal(torch.cat(pieces), whole)


@small
@given(size=st.integers(1, 200), ord=ords, rate=st.floats(0, 0.2), seed=seeds,
       dtype=st.sampled_from([torch.bfloat16, torch.float16]))  # fmt: skip
def test_low_precision_decay_rounds_once_from_fp32(size, ord, rate, seed, dtype):
    """As torch's own kernels do it: fp32 arithmetic, one rounding at the end (fp32 itself may be an ulp off the oracle)."""
    param = random_tensors([[size]], seed, dtype)["p0"]
    before = param.double()
    distwd.decay_weights_([param], rate, ord)
    exact = before - rate * before.sign() * before.abs() ** (ord - 1)
    slack = 1e-5 * (before.abs() + exact.abs()) + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    half = 0.5 * torch.finfo(dtype).eps * exact.abs()
    assert ((param.double() - exact).abs() <= half + slack).all()
