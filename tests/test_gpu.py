"""What only a GPU can show: no host synchronisation, and the same decay as on a CPU."""

from __future__ import annotations

import pytest
import torch

import distwd
from tests import runs
from tests.layouts import whole_model
from tests.runs import PARAMS_SEED
from tests.sentences import SENTENCES, transforms_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on(device: str, sentence: str, watch: bool = False, **adam) -> dict[str, torch.Tensor]:
    params = {n: torch.nn.Parameter(v.to(device)) for n, v in whole_model(PARAMS_SEED, torch.float64).items()}
    chain = distwd.Chain(params.items(), *transforms_of(SENTENCES[sentence].parts, **adam))
    for step in range(3):
        for name, grad in runs.grads_of(step, torch.float64).items():
            params[name].grad = grad.to(device)
        torch.cuda.synchronize()
        if watch and step:
            torch.cuda.set_sync_debug_mode("error")
        try:
            chain.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {name: param.detach().cpu() for name, param in params.items()}


@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize("host", [{"foreach": True}, {"fused": True}], ids=["foreach", "fused"])
def test_a_step_never_waits_for_the_device(sentence, host):
    on("cuda", sentence, watch=True, **host)


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_gpu_decays_as_a_cpu_does(sentence):
    gpu, cpu = on("cuda", sentence), on("cpu", sentence)
    for name in cpu:
        torch.testing.assert_close(gpu[name], cpu[name], rtol=1e-6, atol=1e-8)


def peak_of_a_step(*transforms) -> int:
    """Bytes beyond what is there before the step."""
    param = torch.nn.Parameter(torch.ones(2**22, device="cuda"))
    param.grad = torch.ones_like(param)
    chain = distwd.Chain([param], distwd.Adam(fused=True), *transforms)
    chain.step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    chain.step()
    return torch.cuda.max_memory_allocated() - before


def test_decay_of_order_two_needs_no_temporary():
    bare = peak_of_a_step(distwd.LR(0.1))
    decayed = peak_of_a_step(distwd.RelativeWeightDecay(norm_input="params"), distwd.LR(0.1))
    assert decayed - bare < 2**22  # a quarter of the parameter
