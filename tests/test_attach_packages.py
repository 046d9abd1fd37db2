"""Optimizers of other packages, for real: what they do alone, and the decay beside it; wrappers are refused by name."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable

import pytest
import torch

from distwd import RelativeWeightDecay, WeightDecay, attach
from tests import releases
from tests.layouts import Net, whole_model
from tests.one_process import fp32_parameters
from tests.oracle import metric_of
from tests.runs import grads_of

PACKAGES = {
    "lion_pytorch": ["Lion"],
    "schedulefree": ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"],
    "torchao.optim": ["Adam4bit", "Adam8bit", "AdamFp8", "AdamW4bit", "AdamW8bit", "AdamWFp8"],
    "pytorch_optimizer": [
        "AdaBelief", "AdamP", "Lion", "Lamb", "LARS", "Adan", "ScheduleFreeAdamW", "SOAP", "AdEMAMix", "StableAdamW", "Kron",
        "Ranger21", "Tiger",
    ],
    "timm.optim": [
        "AdamW", "AdamWLegacy", "Adafactor", "AdafactorBigVision", "Adopt", "Lamb", "LaProp", "MADGRAD", "Mars", "Muon", "NAdamW",
        "NvNovoGrad", "SGDP", "SGDW",
    ],
}  # fmt: skip
ARGUMENTS = {"Ranger21": {"num_iterations": 100}}
LR, DECAY, NUM_STEPS = 0.01, 0.1, 7


# --- timm imports torchvision, which has to fit the very build of torch; its optimizers use none of it ------------------


class Named(type):
    """A class whose unknown attributes are their own names: enough for enumerations that are keys of a table."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class FakeModule(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012 (a package)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Named(name, (), {})


class NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return FakeModule(spec.name)

    def exec_module(self, module):
        pass


@functools.cache
def package(name: str) -> types.ModuleType:
    if not name.startswith("timm"):
        return releases.package(name)
    finder = NoTorchvision()
    sys.meta_path.insert(0, finder)
    try:
        return releases.package(name)
    finally:
        sys.meta_path.remove(finder)
        for name in [key for key in sys.modules if key.split(".")[0] == "torchvision"]:
            del sys.modules[name]


# --- optimizers -----------------------------------------------------------------------------------------------------------


def moved(module: str, cls: str, edit: Callable = lambda param: 0.0, **attached) -> tuple[dict, dict]:
    """The parameters before and after the last of some steps, which alone is decayed: some optimizers only look at first.

    edit: what to add to the gradients.
    """
    params = fp32_parameters()
    torch.manual_seed(0)
    optimizer = getattr(package(module), cls)(list(params.values()), lr=LR, weight_decay=0, **ARGUMENTS.get(cls, {}))
    if hasattr(optimizer, "train"):
        optimizer.train()
    ends = []
    for step in range(NUM_STEPS):
        last = step == NUM_STEPS - 1
        for name, param in params.items():
            param.grad = grads_of(step)[name] + (edit(param.detach()) if last else 0.0)
        if last and attached:
            attach(optimizer, attached["rule"], coupling=attached["coupling"])
        with torch.compiler.set_stance("force_eager"):  # torchao compiles its steps
            optimizer.step()
        ends.append({name: param.detach().clone() for name, param in params.items()})
    return ends[-2], ends[-1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("module", "cls"), [(module, cls) for module in PACKAGES for cls in PACKAGES[module]])
def test_every_coupling_is_its_formula_with_any_optimizer(module, cls):
    """ "lr" and "none": the optimizer alone, and λ·M·d(p_old) less; "gradient": the optimizer alone, with λ·M·d(p) in its gradients."""
    old, alone = moved(module, cls)
    measured = DECAY * metric_of(list(old.values()), "mad")
    for rule, rate in ((WeightDecay(DECAY), DECAY), (RelativeWeightDecay(DECAY, norm_input="params"), measured)):
        for coupling, scale in (("lr", LR), ("none", 1.0)):
            _, values = moved(module, cls, rule=rule, coupling=coupling)
            assert_close(values, {name: alone[name] - scale * rate * old[name] for name in old})
        _, by_hand = moved(module, cls, edit=lambda param, rate=rate: rate * param)
        _, values = moved(module, cls, rule=rule, coupling="gradient")
        assert_close(values, by_hand)
    assert max((alone[name] - old[name]).abs().max() for name in old) > 1e-6


def assert_close(values: dict, expected: dict) -> None:
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=2e-5, msg=lambda text: f"{name}: {text}")


# --- what is refused ------------------------------------------------------------------------------------------------------


def adamw() -> torch.optim.AdamW:
    return torch.optim.AdamW(fp32_parameters().values(), weight_decay=0)


WRAPPERS = {
    "schedulefree": (lambda of: of.ScheduleFreeWrapper(adamw()), "ScheduleFreeWrapper.*AdamW in its `.base`"),
    "timm.optim": (lambda of: of.Lookahead(adamw()), "Lookahead.*AdamW in its `._base_optimizer`"),
    "pytorch_optimizer": (lambda of: of.Lookahead(adamw()), "Lookahead.*AdamW in its `.optimizer`"),
    "pytorch_optimizer, SAM": (lambda of: of.SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD), "SAM.*`.base_optimizer`"),
    "pytorch_optimizer, PCGrad": (lambda of: of.PCGrad(adamw()), "PCGrad.*AdamW in its `.optimizer`"),
    "pytorch_optimizer, LOMO": (lambda of: of.LOMO(Net(whole_model(7))), "LOMO.*`fused_backward`"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_is_refused_by_name_with_what_to_attach_to(name):
    make, message = WRAPPERS[name]
    with pytest.raises(ValueError, match=message):
        attach(make(package(name.split(",")[0])), WeightDecay(0.1))


class Container(torch.optim.Optimizer):
    """As torchtitan's OptimizersContainer: an optimizer by inheritance, with groups of its own that nobody steps."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([param for each in optimizers for group in each.param_groups for param in group["params"]], {})

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()


class ByParameter:
    """As torchao's CPUOffloadOptimizer: no optimizer at all, one in a dict for each parameter."""

    def __init__(self) -> None:
        self.optim_dict = {param: torch.optim.SGD([param]) for param in fp32_parameters().values()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Container([adamw(), adamw()]), "Container.*all 2 optimizers in its `.optimizers` together"),
        (ByParameter, "ByParameter.*all 11 optimizers in its `.optim_dict` together"),
    ],
)
def test_a_container_is_refused_with_all_that_it_holds(make, message):
    with pytest.raises(ValueError, match=message):
        attach(make(), WeightDecay(0.1))
