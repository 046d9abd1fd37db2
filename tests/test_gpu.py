"""What only a GPU can show: no host synchronisation, and the same decay as on a CPU."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

import distwd
from distwd.__main__ import main
from distwd._torch import local_tensor
from distwd.metrics.measure import reduce_statistics
from distwd.metrics.metric import parse_metric
from distwd.sharding.world import World
from tests import runs, test_gpu_waits
from tests.chains import CHAINS, transforms_of
from tests.layouts import whole_model
from tests.runs import PARAMS_SEED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # What torch says of its own tools: of the watch for waits when it is first used, and of a capturable optimizer that is
    # warmed up.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.filterwarnings("ignore:.*capturable=True"),
]


def on(device: str, chain_name: str, watch: bool = False, **adam) -> dict[str, torch.Tensor]:
    params = {n: torch.nn.Parameter(v.to(device)) for n, v in whole_model(PARAMS_SEED, torch.float64).items()}
    chain = distwd.Chain(params.items(), *transforms_of(CHAINS[chain_name].parts, **adam))
    for step in range(3):
        for name, grad in runs.grads_of(step, torch.float64).items():
            params[name].grad = grad.to(device)
        with no_waits() if watch and step else nullcontext():
            chain.step()
    return {name: param.detach().cpu() for name, param in params.items()}


@pytest.mark.parametrize("chain_name", CHAINS)
@pytest.mark.parametrize("settings", [{"foreach": True}, {"fused": True}], ids=["foreach", "fused"])
def test_a_step_never_waits_for_the_device(chain_name, settings):
    on("cuda", chain_name, watch=True, **settings)


@contextmanager
def no_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Of an optimizer that nobody knows, with parameters of half precision: it is told that updates are rounded away.
@pytest.mark.filterwarnings("ignore:Foreign has moved")
@pytest.mark.parametrize("rule", test_gpu_waits.RULES)
def test_no_rule_waits_for_the_device_in_any_situation(rule):
    waits = []
    for way, situation, dtype in test_gpu_waits.cases_of(rule):
        try:
            # In the first steps a rate of bf16 and fp16 is read until it is not 0.
            test_gpu_waits.step_on_a_card(rule, way, situation, dtype, no_waits, num_steps=12)
        except RuntimeError as error:
            waits.append(f"{way}, {situation}, {dtype}: {error}")
    assert waits == []


@pytest.mark.parametrize("chain_name", CHAINS)
def test_a_gpu_decays_as_a_cpu_does(chain_name):
    gpu, cpu = on("cuda", chain_name), on("cpu", chain_name)
    for name in cpu:
        torch.testing.assert_close(gpu[name], cpu[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("settings", [{}, {"cap": 0.5}], ids=str)
def test_proximal_decay_has_the_bits_of_a_cpu(settings):
    """By one number torch divides on a GPU as it multiplies by the inverse."""
    ends = []
    for device in ("cpu", "cuda"):
        params = {name: torch.nn.Parameter(value.to(device)) for name, value in whole_model(PARAMS_SEED).items()}
        for param in params.values():
            param.grad = torch.zeros_like(param)
        distwd.Chain(params.items(), distwd.WeightDecay(0.07, proximal=True, **settings), distwd.LR(1.0)).step()
        ends.append({name: param.detach().cpu() for name, param in params.items()})
    assert runs.differing(*ends) == []


LARGE = 2**26  # elements: 256 MiB


def peak_of_steps(*transforms) -> int:
    """Bytes at the peak, beyond what was there before the optimizer was made: what is kept between steps counts, too."""
    gc.collect()  # what tests before have left would be taken off
    param = torch.nn.Parameter(torch.ones(LARGE, device="cuda"))
    param.grad = torch.ones_like(param)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    chain = distwd.Chain([param], distwd.Adam(fused=True), *transforms)
    for _ in range(2):
        chain.step()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("metric", ["mad", "l2", "std"])
def test_decay_by_a_metric_of_parameters_needs_a_block_and_no_more(metric):
    bare = peak_of_steps(distwd.LR(0.1))
    assert bare >= 2 * 4 * LARGE  # two moments: the count sees what there is
    decayed = peak_of_steps(distwd.RelativeWeightDecay(norm_input="params", metric=metric), distwd.LR(0.1))
    assert decayed - bare <= 4 * LARGE // 2


def test_noise_is_the_same_on_a_gpu():
    """Integer arithmetic and float32: a GPU rounds a decay as a CPU does, bit for bit."""
    for dtype in (torch.bfloat16, torch.float16):
        ends = []
        for device in ("cpu", "cuda"):
            held = [(name, value.to(device)) for name, value in whole_model(PARAMS_SEED, dtype).items()]
            distwd.decay_weights_(held, 1e-3, rounding="stochastic", seed=1)
            ends.append({name: value.cpu() for name, value in held})
        assert runs.differing(*ends) == []


def test_noise_never_waits_for_the_device():
    param = torch.nn.Parameter(torch.ones(1000, 1000, device="cuda", dtype=torch.bfloat16))
    chain = distwd.Chain([param], distwd.Adam(), distwd.WeightDecay(0.1), distwd.LR(1e-3), rounding="stochastic")
    for step in range(3):
        param.grad = torch.zeros_like(param)
        with no_waits() if step else nullcontext():
            chain.step()


def test_noise_of_shards_is_that_of_the_whole(one_rank):
    one_rank("cpu:gloo,cuda:nccl")
    ends = []
    for is_sharded in (False, True):
        model = torch.nn.ParameterDict(
            {name.replace(".", "_"): value.cuda() for name, value in whole_model(PARAMS_SEED, torch.bfloat16).items()}
        )
        if is_sharded:
            fully_shard(model)
        distwd.decay_weights_(list(model.named_parameters()), 1e-3, rounding="stochastic", seed=1)
        ends.append({name: local_tensor(param).detach().cpu() for name, param in model.named_parameters()})
    assert runs.differing(*ends) == []


def test_noise_in_a_graph_is_refused():
    param = torch.nn.Parameter(torch.ones(8, device="cuda", dtype=torch.bfloat16))
    chain = distwd.Chain([param], distwd.WeightDecay(1e-3), rounding="stochastic")
    param.grad = torch.zeros_like(param)
    chain.step()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        # Something is captured: of an empty graph torch warns, and while that is an error it does not end the capture.
        param.grad.zero_()
        with pytest.raises(ValueError, match="CUDA graph"):
            chain.step()


# --- law 8, with torch's CUDA kernels ---------------------------------------------------------------------------------

MODES = {
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"foreach": True, "capturable": True},
}


@pytest.mark.parametrize("way", ["chain", "attach"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_absolute_decay_is_adamw_bit_for_bit(way, mode, dtype):
    ends = []
    for ours in (True, False):
        params = {n: torch.nn.Parameter(v.cuda()) for n, v in whole_model(PARAMS_SEED, dtype).items()}
        # Only a capturable optimizer takes a learning rate that is a tensor into kernels for lists.
        lr = torch.tensor(0.01, device="cuda") if mode == "capturable" else 0.01
        if not ours:
            optimizer = torch.optim.AdamW(params.items(), lr=lr, weight_decay=0.1, **MODES[mode])
        elif way == "chain":
            adam = distwd.Adam(**MODES[mode])
            optimizer = distwd.Chain(params.items(), adam, distwd.WeightDecay(0.1), distwd.LR(lr))
        else:
            optimizer = torch.optim.AdamW(params.items(), lr=lr, weight_decay=0, **MODES[mode])
            distwd.attach(optimizer, distwd.WeightDecay(0.1))
        for step in range(3):
            for name, grad in runs.grads_of(step, dtype).items():
                params[name].grad = grad.cuda()
            optimizer.step()
        ends.append({name: param.detach().cpu() for name, param in params.items()})
    assert runs.differing(*ends) == []


# --- shards on the CPU, a group that serves cards ---------------------------------------------------------------------


@pytest.fixture
def one_rank(tmp_path):
    """A group of one rank, of the backends that are asked for."""

    def start(backend: str) -> None:
        store = dist.FileStore(str(tmp_path / "store"), 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)

    yield start
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_numbers_of_offloaded_shards_go_over_what_the_group_serves(one_rank, backend):
    one_rank(backend)
    # A world that believes in a second rank, so that something is sent.
    world = dataclasses.replace(World.of(None), size=2)
    value = torch.arange(3.0, dtype=torch.float64)
    totals = reduce_statistics([{parse_metric("l1").statistics[0]: value}], world)[0]
    assert world.device.type == ("cuda" if backend == "nccl" else "cpu")
    assert [total.device.type for total in totals.values()] == ["cpu"]
    assert torch.equal(next(iter(totals.values())), value)


def test_offloaded_parameters_decay_where_they_are(one_rank):
    one_rank("cpu:gloo,cuda:nccl")
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    fully_shard(model, offload_policy=CPUOffloadPolicy())
    chain = distwd.Chain(model.named_parameters(), distwd.Adam(), distwd.RelativeWeightDecay(0.1), distwd.LR(0.1))
    before = [param.detach().to_local().clone() for param in model.parameters()]
    model(torch.ones(2, 5, device="cuda")).square().sum().backward()
    chain.step()
    after = [param.detach().to_local() for param in model.parameters()]
    assert {local.device.type for local in after} == {"cpu"}
    assert all((old != new).any() for old, new in zip(before, after, strict=True))


# --- CUDA graphs --------------------------------------------------------------------------------------------------------

RULES = {
    "absolute": lambda: distwd.WeightDecay(0.1),
    "of updates": lambda: distwd.RelativeWeightDecay(0.1),
    "of parameters": lambda: distwd.RelativeWeightDecay(0.01, norm_input="params"),
    "std of gradients": lambda: distwd.RelativeWeightDecay(0.01, norm_input="grad", metric="std"),
    "by tensor": lambda: distwd.RelativeWeightDecay(0.1, scope="tensor"),
    "to a norm": lambda: distwd.NormControl(0.1),
    "cautious": lambda: distwd.CautiousWeightDecay(0.1),
}


def stepped(way: str, name: str, captured: bool) -> dict[str, torch.Tensor]:
    """Steps under a schedule of lr and λ, both tensors on the device; captured: all but the first three are replays."""
    params = {n: torch.nn.Parameter(v.cuda()) for n, v in whole_model(PARAMS_SEED).items()}
    lr, key = torch.tensor(0.01, device="cuda"), "weight_decay" if way == "chain" else "distwd_weight_decay"
    if way == "chain":
        optimizer = distwd.Chain(params.items(), distwd.Adam(capturable=True), RULES[name](), distwd.LR(lr))
    else:
        optimizer = torch.optim.AdamW(params.items(), lr=lr, weight_decay=0, capturable=True)
        distwd.attach(optimizer, RULES[name](), coupling=way)
    (group,) = optimizer.param_groups
    group[key] = decay = torch.tensor(float(group[key]), device="cuda")
    for param in params.values():
        param.grad = torch.zeros_like(param)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    for step in range(6):
        for param, grad in zip(params.values(), runs.grads_of(step).values(), strict=True):
            param.grad.copy_(grad)
        group["lr"].fill_(0.01 * (step + 1))
        decay.fill_(0.1 / (step + 1))
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            if not captured or step < 3:
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        if captured and step == 3:
            with torch.cuda.graph(graph):  # records, and does not run
                optimizer.step()
        if captured and step >= 3:
            graph.replay()
    return {n: param.detach().cpu() for n, param in params.items()}


@pytest.mark.parametrize("way", ["chain", "lr", "none", "gradient"])
@pytest.mark.parametrize("name", RULES)
def test_a_captured_step_uses_the_current_lr_and_weight_decay(way, name):
    captured, eager = stepped(way, name, True), stepped(way, name, False)
    for key in eager:
        torch.testing.assert_close(captured[key], eager[key], rtol=1e-6, atol=1e-7)


def test_bench_times_a_card_with_two_clocks(capsys):
    threads = torch.get_num_threads()
    words = ["--size", "1M", "--tokens", "64", "--rounds", "2", "--rules", "l2 of params", "--ways", "attach", "--json"]
    try:
        assert main(["bench", "--device", "cuda", *words]) == 0
    finally:
        torch.set_num_threads(threads)
    said = json.loads(capsys.readouterr().out)
    assert said["gpu"] == torch.cuda.get_device_name()
    assert said["beside"]["forward and backward"]["best"] > 0
    assert said["copy"] > 1e11
    for row in said["cases"]:
        assert row["seconds"]["best"] > 0
        assert row["host_seconds"]["best"] > 0
