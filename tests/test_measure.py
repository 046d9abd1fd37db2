"""What rules ask for (`Measure`), and `measure`: many numbers in one call, with and without what is kept from step to step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import distwd
from distwd.kernels.blocks import Workspace
from distwd.kernels.formulas import TermKind, Write
from distwd.kernels.sums import (
    ABS,
    MAX,
    SQUARE,
    SUM,
    Vectors,
    are_norms,
    local_statistics,
    norms_of_each,
    statistics_of_each,
)
from distwd.metrics.measure import Request, Slots, Source, measure, sources_of
from distwd.metrics.metric import Measure, parse_metric
from tests.fake_cuda import fake_cuda
from tests.layouts import whole_model
from tests.oracle import metric_of


def test_measures_are_equal_if_they_ask_for_the_same_number():
    assert Measure("grad", "l2", "all") == Measure("grad", 2, "all") == Measure("grad", 2.0, scope="all")
    assert len({Measure("grad", "l2"), Measure("grad", 2), Measure("grad", "rms"), Measure("params", 2)}) == 3
    assert Measure("grad", "l2", "all") != Measure("grad", "l2", "group")
    assert Measure("update", "linf").parsed == parse_metric(float("inf"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("gradient", "l2"), "of='gradient' is not known; use one of 'update', 'grad', 'params'"),
        (("grad", "l5"), "metric='l5' is not known"),
        (("grad", float("nan")), "metric=nan is not known"),
        (("grad", "l2", "model"), "scope='model' is not known; use one of 'all', 'group', 'tensor'"),
    ],
)
def test_a_measure_of_something_else_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        Measure(*words)


def asked(kept: bool) -> list[list[float]]:
    """Several numbers of several tensors, three times."""
    tensors = list(whole_model(0).values())
    groups = [{"params": tensors[:3]}, {"params": tensors[3:]}]
    plan = distwd.Plan.build(groups)
    slots = Slots(plan) if kept else None
    halves = [Source([1, 4], [tensors[1], tensors[4]], scale=-0.5), Source([2], [tensors[2]], [tensors[2] / 2])]
    requests = [
        Request(parse_metric("mad"), sources_of(tensors)),
        Request(parse_metric("l2"), sources_of(tensors), "group"),
        Request(parse_metric("linf"), halves, "tensor"),
        Request(parse_metric(float("-inf")), halves, "all"),
    ]
    found = [[n.tolist() for n in measure(plan, requests, slots=slots)] for _ in range(3)]
    assert found[0] == found[1] == found[2]
    mad, by_group, largest, smallest = found[0]
    assert mad == [pytest.approx(metric_of(tensors, "mad"))]
    assert by_group == pytest.approx([metric_of(tensors[:3], "l2"), metric_of(tensors[3:], "l2")])
    expected = {1: tensors[1] / 2, 2: tensors[2] / 2, 4: tensors[4] / 2}
    by_tensor = [largest[place] for place in plan.name_ids]
    for position in range(len(tensors)):
        tensor = expected.get(position, torch.zeros(1))
        assert by_tensor[position] == pytest.approx(metric_of([tensor], "linf"))
    assert smallest == [0]  # parameters without a tensor count as zeros
    return found[0]


def test_what_is_kept_changes_nothing():
    assert asked(kept=True) == asked(kept=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_norms_tell_what_sums_tell(dtype):
    """On a GPU they are taken in the place of sums; there are_norms() says where."""
    tensors = [
        torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype) for size in (1, 7, 1000, 5000)
    ]
    for statistic in (ABS, SQUARE, MAX):
        each = norms_of_each(tensors, statistic)
        expected = torch.stack([local_statistics([tensor], [statistic])[statistic] for tensor in tensors])
        assert each.dtype == torch.float64
        torch.testing.assert_close(each, expected, rtol=1e-14, atol=0)
    tensors[1][3] = torch.nan
    for statistic in (ABS, SQUARE, MAX):
        assert norms_of_each(tensors, statistic).isnan().tolist() == [False, True, False, False]


def test_norms_are_taken_where_torch_reads_once():
    with fake_cuda():
        card, host = torch.empty(3, 4, device="cuda"), torch.empty(3, 4)
        assert are_norms([card], [ABS, SQUARE, MAX])
        assert not are_norms([host], [ABS])
        assert not are_norms([card], [ABS, SUM])
        assert not are_norms([card.t()], [ABS])
        assert not are_norms([card.to(torch.float8_e4m3fn)], [ABS])
        assert not are_norms([card[:0]], [MAX])


# --- products of vectors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("length", [5, 1 << 14, (1 << 14) + 1, 40_003, 1 << 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_those_of_numpy_by_row_and_over_all(length, num_rows, dtype):
    """θ, u and sign(θ) of two tensors: rows shorter than a stretch, one exactly, and with an end that fills none."""
    torch.manual_seed(0)
    thetas, us = ([torch.rand(num_rows, length).to(dtype) + 0.5 for _ in range(2)] for _ in range(2))
    vectors = Vectors(Write((TermKind(1.0),), False, None, us=1), numbers=(2,))
    each = statistics_of_each(thetas, vectors, Workspace(), us, num_rows=num_rows)
    over_all = local_statistics(thetas, vectors, None, us)
    wide = [torch.cat(some).double().numpy().astype(np.longdouble) for some in (thetas, us)]
    wide.append(np.sign(wide[0]))
    for statistic in vectors.statistics:
        one, two = statistic.pair
        by_row = (wide[one] * wide[two]).sum(1)
        np.testing.assert_allclose(each[statistic].numpy(), by_row.astype(np.float64), rtol=1e-14)
        np.testing.assert_allclose(over_all[statistic].item(), float(by_row.sum()), rtol=1e-14)


def test_a_nan_stays_in_the_products_of_its_own_vector_and_row():
    thetas, us = [torch.ones(2, 20_000)], [torch.ones(2, 20_000)]
    us[0][1, 19_999] = torch.nan
    each = statistics_of_each(thetas, Vectors(Write((), False, None, us=1)), Workspace(), us, num_rows=2)
    found = {statistic.pair: values.isnan().tolist() for statistic, values in each.items()}
    assert found == {(0, 0): [False, False], (0, 1): [False, True], (1, 1): [False, True]}
