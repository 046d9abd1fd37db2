"""Stochastic rounding as arithmetic: without bias, in every range of bf16 and fp16, by the element's place in the whole."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import distwd
from distwd.kernels import blocks, stochastic
from distwd.kernels.blocks import Workspace
from distwd.kernels.stochastic import GlobalIndices, RandomBits, dithered
from distwd.sharding.pieces import Piece, describe
from distwd.step.rounding import global_indices_of
from tests import simulated_ranks
from tests.layouts import whole_model
from tests.test_properties_of_plans import models, steady

BF16, FP16 = torch.bfloat16, torch.float16
LOW = [BF16, FP16]
NUM = 1 << 16
CPU = torch.device("cpu")


def bits(num: int, key: int = 7, own: int = 99) -> Tensor:
    return RandomBits([GlobalIndices(((0, num),))], [own], key).bits([(0, 0, num)], CPU, Workspace())


# --- without bias ---------------------------------------------------------------------------------------------------

# Of fp16: ordinary, near the smallest ordinary, subnormal, below the smallest subnormal. bf16 has its own far below.
VALUES = [1.001, -3.3, 1000.7, 6.2e-5, 6.05e-5, -5.1e-6, 7e-8, 2e-8, 1.3e-38, 3e-40]


def mean_error(value: float, dtype: torch.dtype, write=dithered) -> float:
    """How far the mean over many elements is from the value, in standard errors of a fair rounding."""
    x = torch.full((NUM,), value)
    rounded = write(x, bits(NUM), dtype)
    assert torch.equal(rounded.to(dtype).float(), rounded)
    down, up = neighbours(x[0], dtype)
    assert ((rounded == down) | (rounded == up)).all()
    share = (x[0].double() - down) / (up - down)
    error = rounded.double().mean() - x[0].double()
    fair = (up - down) * (share * (1 - share) / NUM).sqrt()
    return 0.0 if error == 0 else float(error / fair)


def neighbours(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of `dtype` around `value`, in float64, found by walking."""
    near = value.to(dtype)
    ends = [near, *(torch.nextafter(near, torch.tensor(end, dtype=dtype)) for end in (-math.inf, math.inf))]
    wide = [end.double() for end in ends]
    down = max(end for end in wide if end <= value.double())
    return down, min(end for end in wide if end >= value.double() and (end > down or end == value.double()))


def truncated(x: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    return dithered(x, torch.zeros_like(noise), dtype)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_mean_is_the_value(value, dtype):
    assert abs(mean_error(value, dtype)) < 4


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_truncation_is_seen(dtype):
    assert abs(mean_error(1.001, dtype, truncated)) > 40
    assert abs(mean_error(6.05e-5, dtype, truncated)) > 40


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_what_the_dtype_holds_stays(dtype):
    """Every number that bf16 or fp16 has, infinities and NaNs too."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    rounded = dithered(every.float(), bits(1 << 16), dtype).to(dtype)
    assert torch.equal(rounded.isnan(), every.isnan())
    assert torch.equal(rounded.nan_to_num(0.0, math.inf, -math.inf), every.nan_to_num(0.0, math.inf, -math.inf))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_beyond_the_largest_number_the_nearest_decides(dtype):
    largest = torch.finfo(dtype).max
    beyond = torch.tensor([largest * (1 + 2.0**-13), largest * (1 + 2.0**-8)]).clamp(max=torch.finfo().max)
    for sign in (1, -1):
        rounded = dithered((sign * beyond).repeat_interleave(NUM), bits(2 * NUM), dtype).to(dtype)
        assert torch.equal(rounded, (sign * beyond).to(dtype).repeat_interleave(NUM))


def test_a_nan_of_any_bits_stays_one():
    """All ones, as a GPU makes it: adding to its bits would come out as zero."""
    odd = torch.full((NUM,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    assert all(dithered(odd, bits(NUM), dtype).isnan().all() for dtype in LOW)


def chi_square(numbers: Tensor, num_kinds: int) -> float:
    """In standard deviations above what is expected of uniform numbers."""
    counts = torch.bincount(numbers.long().flatten(), minlength=num_kinds).double()
    expected = counts.sum() / num_kinds
    return float((((counts - expected) ** 2 / expected).sum() - (num_kinds - 1)) / math.sqrt(2 * (num_kinds - 1)))


@pytest.mark.parametrize("shift", [0, 8, 16])
def test_every_byte_is_uniform(shift):
    found = [chi_square((bits(NUM, key, own) >> shift) & 255, 256) for key, own in ((7, 99), (8, 99), (7, 100))]
    assert max(map(abs, found)) < 4


@pytest.mark.parametrize("lag", [1, 2, 64, 256, 4096])
def test_neighbours_know_nothing_of_each_other(lag):
    for shift in (0, 12):
        x = (bits(NUM) >> shift) & 15
        assert abs(chi_square(x[lag:] * 16 + x[:-lag], 256)) < 4


def test_steps_and_tensors_know_nothing_of_each_other():
    x = (bits(NUM) >> 12) & 15
    for other in (bits(NUM, key=0xC2B2AE35), bits(NUM, own=0x27D4EB2F)):
        assert abs(chi_square(x * 16 + ((other >> 12) & 15), 256)) < 4
    assert chi_square(x * 16 + x, 256) > 100


# --- by the place in the whole --------------------------------------------------------------------------------------

CUTS = {
    "whole": ((6, 5, 4), (((0, 6),), ((0, 5),), ((0, 4),))),
    "rows": ((6, 5, 4), (((2, 5),), ((0, 5),), ((0, 4),))),
    "strided rows": ((12, 5), (((0, 2), (5, 9), (11, 12)), ((0, 5),))),
    "columns": ((6, 50), (((0, 6),), ((13, 29),))),
    "middle": ((6, 5, 4), (((0, 6),), ((1, 3),), ((0, 4),))),
    "strided columns of strided rows": ((9, 30), (((0, 2), (4, 8)), ((3, 5), (9, 19)))),
    "every dimension": ((6, 5, 4), (((1, 2), (4, 6)), ((0, 2), (3, 4)), ((1, 2), (3, 4)))),
    "scalar": ((), ()),
}


def piece_of(shape: tuple, cuts: tuple) -> tuple[Piece, Tensor]:
    """A piece, and the places of its elements, found by cutting the whole."""
    places = torch.arange(math.prod(shape)).reshape(shape)
    for dim, cut in enumerate(cuts):
        places = torch.cat([places.narrow(dim, start, stop - start) for start, stop in cut], dim)
    return Piece("w", shape, BF16, cuts, tuple(places.shape), "", ()), places.flatten()


@pytest.mark.parametrize("block", [3, 7, 1000])
@pytest.mark.parametrize("name", CUTS)
def test_the_noise_of_a_stretch_is_that_of_its_places(name, block):
    """Any stretch of any piece, whatever the size of a block."""
    piece, places = piece_of(*CUTS[name])
    whole = bits(math.prod(piece.shape))
    with mock.patch.object(stochastic, "block_size", return_value=block):
        noise = RandomBits([global_indices_of(piece)], [99], 7)
        for start in range(len(places)):
            for stop in range(start + 1, len(places) + 1):
                assert torch.equal(noise.bits([(0, start, stop)], CPU, Workspace()), whole[places[start:stop]])


@simulated_ranks.has_local_tensors
@settings(max_examples=60, **steady)
@given(model=models())
def test_the_noise_is_that_of_the_places_on_any_mesh_by_any_placements(model):
    sizes, tensors = model
    numbers = [torch.arange(math.prod(shape)).double().reshape(shape) for shape, _ in tensors]
    for held in simulated_ranks.distribute(numbers, sizes, [placements for _, placements in tensors]):
        for tensor, whole in zip(held, numbers, strict=True):
            places = tensor._local_tensor.flatten().long()
            noise = RandomBits([global_indices_of(describe("w", tensor))], [99], 7)
            if len(places):
                assert torch.equal(noise.bits([(0, 0, len(places))], CPU, Workspace()), bits(whole.numel())[places])


def test_a_rank_that_holds_nothing_has_no_places():
    outside = Piece("w", (), BF16, ((),), (0,), "R", ())  # a scalar that lies on other ranks
    assert global_indices_of(outside).row == 0


@pytest.mark.parametrize("block", [5, 64, 1 << 20])
def test_blocks_do_not_show(block):
    """A tensor in one block, in slices, and one that is not contiguous."""

    def decayed() -> list[Tensor]:
        params = [(f"w{i}", torch.nn.Parameter(v)) for i, v in enumerate(tensors)]
        distwd.decay_weights_(params, 1e-3, rounding="stochastic", seed=1)
        return [p.detach() for _, p in params]

    tensors = [v.clone() for v in whole_model(3, BF16).values()] + [torch.ones(7, 9, dtype=BF16).t()]
    reference = decayed()
    tensors = [v.clone() for v in whole_model(3, BF16).values()] + [torch.ones(9, 7, dtype=BF16)]
    sizes = mock.patch.multiple(blocks, block_size=lambda device: block, _CPU_SMALL=block)
    with sizes, mock.patch.object(stochastic, "block_size", return_value=block):
        assert all(torch.equal(a, b) for a, b in zip(decayed(), reference, strict=True))
    assert not torch.equal(reference[-1], torch.ones(9, 7, dtype=BF16))


# --- decay_weights_ -------------------------------------------------------------------------------------------------


def test_decay_weights_rounds_by_the_seed_that_it_is_given():
    def decayed(**kwargs) -> Tensor:
        w = torch.ones(50_000, dtype=BF16)
        distwd.decay_weights_([("w", w)], 1e-4, **kwargs)
        return w

    first, again, other = (decayed(rounding="stochastic", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert abs(first.double().mean().item() - (1 - 1e-4)) < 4 * 2.0**-8 * math.sqrt(1e-4 * 2**8 / 50_000)


def test_the_name_of_a_parameter_decides_and_its_place_where_it_has_none():
    def decayed(*names: str | None) -> list[Tensor]:
        held = [torch.ones(1000, dtype=BF16) for _ in names]
        pairs = held if None in names else list(zip(names, held, strict=True))
        distwd.decay_weights_(pairs, 1e-3, rounding="stochastic", seed=1)
        return held

    (a, b), (other_b, other_a), (first, second) = decayed("a", "b"), decayed("b", "a"), decayed(None, None)
    assert torch.equal(a, other_a)
    assert torch.equal(b, other_b)
    assert not torch.equal(a, b)
    assert not torch.equal(first, second)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [{"rounding": "up"}, {"rounding": "stochastic", "seed": 1.5}, {"seed": True}])
def test_what_is_no_rounding_is_refused(bad):
    w = torch.nn.Parameter(torch.ones(2))
    for call in (
        lambda: distwd.Chain([w], distwd.LR(0.1), **bad),
        lambda: distwd.attach(torch.optim.SGD([w], lr=0.1), distwd.WeightDecay(0.1), **bad),
        lambda: distwd.decay_weights_([w], 0.1, **bad),
    ):
        with pytest.raises(ValueError, match=r"rounding|seed"):
            call()
    with pytest.raises(ValueError, match="another at every call"):
        distwd.decay_weights_([w], 0.1, rounding="stochastic")
