"""What a step costs besides time: operations, memory, objects, and what is kept between steps."""

from __future__ import annotations

import copy
import gc
import pickle
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distwd
from distwd.cli.timing import bytes_of
from distwd.kernels.blocks import Workspace, block_size, blocks, is_large
from tests.fake_cuda import fake_cuda

MIB = 1 << 20
RULES = {
    "absolute": distwd.WeightDecay(0.1),
    "relative params": distwd.RelativeWeightDecay(0.1, norm_input="params"),
    "relative grad": distwd.RelativeWeightDecay(0.1, norm_input="grad"),
    "relative update": distwd.RelativeWeightDecay(0.1),
    "cautious": distwd.CautiousWeightDecay(0.1),
    "per tensor": distwd.RelativeWeightDecay(0.1, norm_input="params", scope="tensor"),
}
by_rule = pytest.mark.parametrize("rule", RULES)
by_way = pytest.mark.parametrize("way", ["chain", "attach"])


def named_params(count: int, numel: int) -> list[tuple[str, torch.nn.Parameter]]:
    named = [(f"p{index}", torch.nn.Parameter(torch.ones(numel))) for index in range(count)]
    for _, param in named:
        param.grad = torch.full_like(param, 0.5)
    return named


def stepper(way: str, rule: str, named: list[tuple[str, torch.nn.Parameter]], compile: bool = False):
    if way == "chain":
        return distwd.Chain(named, distwd.Adam(fused=True), RULES[rule], distwd.LR(1e-3), compile=compile).step
    optimizer = torch.optim.AdamW(named, lr=1e-3, weight_decay=0, fused=True)
    distwd.attach(optimizer, RULES[rule], compile=compile)
    return optimizer.step


# --- operations -----------------------------------------------------------------------------------------------------


class Launches(TorchDispatchMode):
    """Counts the operations that compute something: on a GPU, kernels. Views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func._schema.name not in ("aten::detach", "aten::_unsafe_view"):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def launches(way: str, rule: str, count: int) -> list[str]:
    step = stepper(way, rule, named_params(count, 24))
    for _ in range(2):
        step()
    with Launches() as seen:
        step()
    return seen.names


@by_way
@by_rule
def test_the_number_of_operations_does_not_depend_on_the_number_of_parameters(way, rule):
    few, many = launches(way, rule, 5), launches(way, rule, 50)
    assert few
    assert sorted(few) == sorted(many)


def test_an_operation_for_each_parameter_would_be_seen():
    class Slow(distwd.WeightDecay):
        def apply(self, step, place):
            for batch in step.batches:
                for param in batch.params:
                    param.mul_(0.9)

    with mock.patch.dict(RULES, {"slow": Slow(0.1)}):
        assert len(launches("chain", "slow", 50)) - len(launches("chain", "slow", 5)) == 45


# --- kernels on a GPU: fake CUDA tensors, counted by torch's own rules ------------------------------------------------


class Kernels(TorchDispatchMode):
    """Counts what would be launched on a GPU: one kernel for a list that torch's fast path takes, else one for each tensor.

    The fast path takes lists of one dtype and device whose tensors are alike at each position; copies may change the dtype. (Read
    in torch's sources. A kernel takes some 30 to 110 tensors; fewer are counted here.) `largest`: elements of the largest result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, (space, name) = func(*args, **(kwargs or {})), func._schema.name.split("::")
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        is_on_card = any(
            leaf.device.type == "cuda" for leaf in tree_leaves((args, out)) if isinstance(leaf, torch.Tensor)
        )
        computes = not func.is_view and name not in ("detach", "_unsafe_view", "empty_like", "empty", "lift_fresh")
        if space == "aten" and computes and is_on_card:
            self.largest = max([self.largest, *(leaf.numel() for leaf in made)])
            self.names += [name] * (self._of_list(name, args) if name.startswith("_foreach") else 1)
        return out

    @staticmethod
    def _of_list(name: str, args: tuple) -> int:
        lists = [arg for arg in args if isinstance(arg, (list, tuple))]
        rows = list(zip(*lists, strict=True))
        is_alike = all(row[0].shape == other.shape for row in rows for other in row)
        dtypes = {tensor.dtype for row in rows for tensor in row}
        return 1 if is_alike and (len(dtypes) == 1 or name == "_foreach_copy_") else len(rows)


def kernels(way: str, rule: str, count: int, shape: tuple[int, ...] = (24,), dtype=torch.float32) -> Kernels:
    no_kernel = {name: (lambda *_, **__: None) for name in ("_fused_adam_", "_fused_adamw_")}
    with fake_cuda(), mock.patch.multiple(torch, **no_kernel):
        named = [(f"p{i}", torch.nn.Parameter(torch.empty(shape, device="cuda", dtype=dtype))) for i in range(count)]
        for _, param in named:
            param.grad = torch.empty_like(param)
        step = stepper(way, rule, named)
        step()
        with Kernels() as seen:
            step()
    return seen


@by_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "per tensor"])
def test_the_number_of_kernels_does_not_depend_on_the_number_of_parameters(way, rule, dtype):
    few, many = kernels(way, rule, 5, dtype=dtype), kernels(way, rule, 25, dtype=dtype)
    # The least are those of the optimizer, which are left out.
    assert few.names or rule == "absolute"
    assert sorted(few.names) == sorted(many.names)


@by_way
def test_rates_by_tensor_are_a_kernel_for_each(way):
    """As docs/pages/guides/gpus.md says: torch has no kernel that multiplies each tensor of a list by a number of its own."""
    few, many = (kernels(way, "per tensor", count).names for count in (5, 25))
    assert len(many) - len(few) == 20


@by_way
def test_a_norm_of_a_large_tensor_is_one_kernel_without_a_copy(way):
    """Mean |p|, like l2 and linf, is read once, and added up in float64 without a float64 copy."""
    seen = kernels(way, "relative params", 2, (1 << 13, 1 << 12))
    assert seen.names.count("_foreach_norm") == 1
    assert seen.largest < 100
    # A metric that is no norm takes blocks, and the count sees them.
    with mock.patch.dict(RULES, {"variance": distwd.RelativeWeightDecay(0.1, norm_input="params", metric="std")}):
        assert kernels(way, "variance", 2, (1 << 13, 1 << 12)).largest == block_size(torch.device("cuda"))


def test_what_is_compiled_on_a_gpu_is_smaller_than_a_block():
    """Most shards are smaller than a block; compile=True shall not be idle there."""
    with fake_cuda():
        tensors = [torch.empty(1 << 20, device="cuda") for _ in range(8)]
        (compiled,) = blocks(tensors, together=8)
        assert is_large(compiled[1][0])
        assert len(compiled[0]) == 8
        assert [len(positions) for positions, _ in blocks(tensors)] == [4, 4]


# --- memory ---------------------------------------------------------------------------------------------------------


def extra_bytes(way: str, rule: str, count: int, numel: int, compile: bool = False) -> int:
    """At the peak of a step, beyond what fused AdamW keeps for the same parameters."""

    def measured(make) -> tuple[int, int]:
        gc.collect()  # what an earlier test has left must not be given back meanwhile
        named = named_params(count, numel)
        made = []

        def begin() -> None:
            made.append(make(named))
            made[0]()
            made[0]()

        return bytes_of(torch.device("cpu"), begin, lambda: made[0]())

    plain, _ = measured(lambda named: torch.optim.AdamW(named, lr=1e-3, fused=True).step)
    _, peak = measured(lambda named: stepper(way, rule, named, compile))
    return peak - plain


SHARD = 2 * 20 * MIB  # bytes of two parameters of 5 Mi elements


@by_way
@pytest.mark.parametrize("rule", ["absolute", "relative params", "relative grad", "per tensor"])
def test_decay_without_an_update_needs_a_block_and_no_more(way, rule):
    """At most 64 MiB whatever the size of the shard, and by far less than the shard here."""
    extra = extra_bytes(way, rule, 2, 5 * MIB)
    assert extra <= min(64 * MIB, SHARD // 2)
    assert rule == "absolute" or extra >= 8 * min(block_size(torch.device("cpu")), 5 * MIB)  # the record sees blocks


@by_way
@pytest.mark.parametrize("rule", ["relative update", "cautious"])
def test_decay_that_looks_at_the_update_needs_one_shard(way, rule):
    extra = extra_bytes(way, rule, 2, 5 * MIB)
    assert SHARD <= extra <= SHARD + SHARD // 2


@by_way
@pytest.mark.parametrize(("rule", "shards"), [("relative params", 0), ("relative update", 1)])
def test_compiled_formulas_need_no_block(way, rule, shards):
    """Not after a step under a dispatch mode either (as debuggers and profilers of torch are): torch does not compile there."""
    step = stepper(way, rule, named_params(2, 100_000), compile=True)
    step()
    with Launches() as seen:
        step()
    assert "aten::_foreach_mul_" in seen.names or "aten::abs_" in seen.names
    extra = extra_bytes(way, rule, 2, 5 * MIB, compile=True)
    assert shards * SHARD <= extra <= shards * SHARD + MIB // 4


# --- objects --------------------------------------------------------------------------------------------------------


@by_way
@by_rule
def test_live_objects_stay_flat(way, rule):
    step = stepper(way, rule, named_params(7, 5))
    gc.collect()
    gc.freeze()  # what the imports have made need not be looked through again
    counts = []
    for _ in range(6):
        step()
        gc.collect()
        counts.append(len(gc.get_objects()))
    gc.unfreeze()
    assert counts[-1] <= counts[2]


# --- how much at a time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "threads", "thousands"),
    [
        ({"l2_cache_size": 2 * MIB}, 1, 128),
        ({"l2_cache_size": MIB}, 1, 256),
        ({}, 1, 256),
        ({"l2_cache_size": 2 * MIB}, 2, 256),
        ({}, 4, 512),
        ({}, 64, 2048),
    ],
)
def test_a_block_grows_with_the_threads_and_is_small_where_the_cache_holds_it(capabilities, threads, thousands):
    with (
        mock.patch.object(torch.cpu, "get_capabilities", return_value=capabilities, create=True),
        mock.patch.object(torch, "get_num_threads", return_value=threads),
    ):
        assert block_size(torch.device("cpu")) == thousands * 1024


def test_a_torch_that_does_not_describe_its_cpu_is_enough(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert block_size(torch.device("cpu")) == 256 * 1024


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_what_is_kept_is_a_few_blocks_at_most():
    scratch, device = Workspace(), torch.device("cpu")
    size = block_size(device)
    first = scratch.empty(size, device, torch.float32)
    scratch.empty(8 * size + 1, device, torch.float32)
    scratch.begin_block()
    assert scratch.empty(3, device, torch.float32).data_ptr() == first.data_ptr()
    assert sum(buffer.numel() for buffer in scratch._kept.values()) == size


def test_no_two_temporaries_of_a_block_meet():
    scratch, xs = Workspace(), [torch.arange(5.0)]
    products, signs = scratch.mul(xs, 2.0), scratch.sign(xs)
    (wide,) = scratch.copies(xs, torch.float64)
    assert products[0].tolist() == [0, 2, 4, 6, 8] and signs[0].tolist() == [0, 1, 1, 1, 1]
    scratch.begin_block()
    assert scratch.sub(xs, xs)[0].data_ptr() == products[0].data_ptr()
    assert wide.tolist() == xs[0].tolist()


def test_buffers_made_in_inference_mode_serve_outside_of_it():
    named = named_params(2, 40_000)
    step = stepper("chain", "relative params", named)
    with torch.inference_mode():
        step()
    step()
    assert all(param.isfinite().all() for _, param in named)


def test_buffers_do_not_travel_with_a_chain():
    named = named_params(1, 100_000)
    chain = distwd.Chain(named, distwd.Adam(), RULES["cautious"], distwd.LR(1e-3))
    chain.step()
    pickled = len(pickle.dumps(chain))
    assert pickled < 4 * 400_000 + 100_000  # the parameter, its gradient and two moments
    twin = copy.deepcopy(chain)
    assert twin._runner._workspace is not chain._runner._workspace


def test_a_kept_zero_tensor_is_zero_again_after_a_step_that_failed():
    """The update is what zeros become; what an interrupted step has left there must not count."""

    def trained(fail: bool) -> torch.Tensor:
        named = named_params(2, 40_000)
        chain = distwd.Chain(named, distwd.Wrap(torch.optim.SGD), RULES["relative update"], distwd.LR(0.1))
        chain.step()
        if fail:
            with (
                mock.patch("distwd.step.coefficients.measure", side_effect=RuntimeError("lost")),
                pytest.raises(RuntimeError),
            ):
                chain.step()
        chain.step()
        return named[0][1].detach()

    assert torch.equal(trained(fail=True), trained(fail=False))
