"""Every metric against the oracle: empty, single, not finite, far from zero, of every dtype, cut anywhere."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distwd
from tests.layouts import whole_model
from tests.oracle import metric_of

NAMES = ["mad", "std", "var", "sum", "rms", "l0", "l1", "l2", "l3", "l4", "linf"]
NUMBERS = [0, 1, 2, 0.5, 1.5, 2.5, 3, 7, -1, math.inf, -math.inf]
METRICS = [*NAMES, *NUMBERS]

by_metric = pytest.mark.parametrize("metric", METRICS, ids=str)


def agree(measured: torch.Tensor, expected: float) -> bool:
    """Within one spacing of fp32."""
    return math.isclose(measured.item(), expected, rel_tol=2.0**-23, abs_tol=1e-45)


@by_metric
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_metric_is_of_all_elements_as_one_population(metric, dtype):
    tensors = list(whole_model(3, dtype).values())
    assert agree(distwd.global_metric(tensors, metric), metric_of(tensors, metric))


@by_metric
def test_a_metric_over_no_elements_is_zero(metric):
    assert distwd.global_metric([torch.zeros(0), torch.zeros(3, 0)], metric).item() == 0


@by_metric
def test_empty_tensors_change_nothing(metric):
    tensors = [torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.ones(())]
    padded = [torch.zeros(0), *tensors, torch.zeros(0, 4)]
    assert distwd.global_metric(padded, metric).item() == distwd.global_metric(tensors, metric).item()


@by_metric
def test_a_metric_of_one_element(metric):
    """Its spread is 0, not 0/0: one scalar parameter under `scope="tensor"` must not become NaN."""
    assert agree(distwd.global_metric([torch.tensor(-3.0)], metric), metric_of([torch.tensor(-3.0)], metric))


@by_metric
def test_nan_is_not_hidden(metric):
    tensors = [torch.ones(70), torch.tensor([1.0, torch.nan, 2.0])]
    assert distwd.global_metric(tensors, metric).isnan()


@by_metric
@pytest.mark.parametrize("sign", [1, -1])
def test_infinity_is_not_hidden(metric, sign):
    tensors = [torch.ones(70), torch.tensor([1.0, sign * torch.inf, 2.0])]
    measured, expected = distwd.global_metric(tensors, metric), metric_of(tensors, metric)
    assert agree(measured, expected) or (measured.isnan() and math.isnan(expected))


@pytest.mark.parametrize("metric", ["std", "var"])
@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("pieces", [1, 7])
def test_spread_is_right_where_the_mean_is_far_larger(metric, ratio, pieces):
    noise = torch.randn(40_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tensors = list((noise + ratio).float().chunk(pieces))
    measured = distwd.global_metric(tensors, metric).item()
    assert measured == pytest.approx(metric_of(tensors, metric), rel=1e-6)


def test_large_populations_do_not_stall_in_fp32():
    """Two to the 25 ones: an fp32 running sum would stop at two to the 24."""
    ones = torch.ones(2**22).expand(8, -1).reshape(-1)
    assert distwd.global_metric([ones], "sum").item() == 2**25
    assert distwd.global_metric([ones], "l1").item() == 2**25


def test_small_numbers_do_not_underflow():
    tiny = [torch.full((100,), 1e-30)]
    assert agree(distwd.global_metric(tiny, "l2"), metric_of(tiny, "l2"))
    assert agree(distwd.global_metric(tiny, "rms"), metric_of(tiny, "rms"))
    assert agree(distwd.global_metric(tiny, "l4"), metric_of(tiny, "l4"))


def test_large_numbers_do_not_overflow():
    huge = [torch.full((100,), 1e37)]
    for metric in ("l2", "l4", "rms", "std", "mad"):
        assert distwd.global_metric([*huge, -huge[0]], metric).isfinite(), metric


def test_a_metric_is_a_plain_number_on_its_own():
    tensors = [torch.nn.Parameter(torch.ones(3)), torch.ones(2, requires_grad=True)]
    measured = distwd.global_metric(tensors, "sum")
    assert type(measured) is torch.Tensor
    assert measured.shape == ()
    assert not measured.requires_grad


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(2, 700),
    cuts=st.lists(st.integers(0, 700), max_size=6),
    metric=st.sampled_from(METRICS),
)
def test_where_a_tensor_is_cut_does_not_matter(seed, length, cuts, metric):
    whole = torch.randn(length, generator=torch.Generator().manual_seed(seed))
    edges = sorted({0, length, *(min(cut, length) for cut in cuts)})
    pieces = [whole[start:stop] for start, stop in itertools.pairwise(edges)]
    assert distwd.global_metric(pieces, metric).item() == distwd.global_metric([whole], metric).item()


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    metric=st.sampled_from(METRICS),
    seed=st.integers(0, 2**31),
)
def test_any_list_of_shapes_and_dtypes(shapes, dtype, metric, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    measured, expected = distwd.global_metric(tensors, metric), metric_of(tensors, metric)
    assert agree(measured, expected) or (measured.isnan() and math.isnan(expected))


@pytest.mark.parametrize("metric", ["mode", "", "L2", "l-2", None, True, math.nan, "inf?", [2]], ids=str)
def test_an_unknown_metric_is_refused_by_name(metric):
    with pytest.raises(ValueError, match="metric"):
        distwd.global_metric([torch.ones(3)], metric)


def test_a_transposed_and_a_strided_tensor_count_as_their_elements():
    base = torch.arange(24.0).reshape(4, 6)
    tensors = [base.t(), base[:, ::2], base[1]]
    assert agree(distwd.global_metric(tensors, "l3"), metric_of(tensors, "l3"))
