"""scope="matrix": one number for each matrix, however experts are stacked and cut, against whole float64 tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from distwd import LR, Adam, Chain, Measure, RelativeWeightDecay, Rule, attach
from tests import mesh_cases, wire
from tests.layouts import local_of
from tests.mesh_cases import Case, TensorPlacement
from tests.oracle import direction, metric_of

LAMBDA, RATE, SMOOTHING = 0.05, 0.1, 0.5


class Spread(Rule):
    """c = λ·(‖p‖/R + m̄), R = ‖p‖ as the first step begins, m̄ a running mean of mean |g|; each of a matrix."""

    scope = "matrix"

    def measures(self, settings):
        return {"norm": Measure("params", "l2", self.scope), "grad": Measure("grad", "mad", self.scope)}

    def keeps(self, settings):
        return {"radius": Measure("params", "l2", self.scope), "mean": 0.0}

    def coefficient(self, settings, measured, kept):
        mean = SMOOTHING * kept["mean"] + (1 - SMOOTHING) * measured["grad"]
        c = settings["weight_decay"] * (measured["norm"] / kept["radius"] + mean)
        return c, {"radius": kept["radius"], "mean": mean}


KEYS = ("radius", "mean", "num_steps")


def rules() -> list[Rule]:
    """A rule that keeps; one with an order and a mask; and one of whole tensors beside them."""
    return [
        Spread(weight_decay=LAMBDA),
        RelativeWeightDecay(LAMBDA, 3, "update", "rms", scope="matrix", cautious=True),
        RelativeWeightDecay(LAMBDA, norm_input="params", metric="l2", scope="tensor"),
    ]


def make(way: str, named: Mapping[str, nn.Parameter], **where: Any) -> tuple[Any, Any]:
    """What steps, and what has `stats`."""
    if way == "chain":
        chain = Chain(named.items(), Adam(foreach=True, eps=1e-3), *rules(), LR(RATE), **where)
        return chain, chain
    optimizer = torch.optim.AdamW(named.items(), lr=RATE, eps=1e-3, weight_decay=0, foreach=False)
    return optimizer, attach(optimizer, *rules(), **where)


def kept_of(optimizer: Any, named: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """The kept numbers of every parameter that has some, whole."""
    found = {}
    for name, param in named.items():
        own = [optimizer.state[param].get(f"distwd_Spread_{key}") for key in KEYS]
        if own[0] is not None:
            found[name] = [one.full_tensor() if isinstance(one, DTensor) else one for one in own]
    return found


# --- one process, against plain arithmetic ----------------------------------------------------------------------------

WHOLE = {"stack": (4, 5, 3), "deep": (2, 3, 4, 2), "one": (1, 3, 2), "matrix": (6, 4), "vector": (7,), "scalar": ()}


def whole(seed: int, shapes: Mapping[str, tuple[int, ...]] = WHOLE) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def matrices_of(tensor: Tensor) -> list[Tensor]:
    return list(tensor.reshape(-1, *tensor.shape[-2:])) if tensor.dim() > 2 else [tensor]


class Matrices:
    """The rules of `rules()` behind Adam, one matrix after the other, in float64."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = {name: value.double().clone() for name, value in params.items()}
        self.memory: dict[str, tuple[Tensor, Tensor, int]] = {}
        self.kept: dict[tuple[str, int], tuple[float, float, int]] = {}
        self.answers: dict[str, list[list[float]]] = {}

    def step(self, grads: Mapping[str, Tensor | None]) -> None:
        self.answers = {}
        first = not self.kept
        for name, param in self.params.items():
            grad = None if grads[name] is None else grads[name].double()
            if first:
                for number, p in enumerate(matrices_of(param)):
                    self.kept[name, number] = (metric_of([p], "l2"), 0.0, 0)
            if grad is None:
                continue
            m, v, t = self.memory.get(name, (torch.zeros_like(param), torch.zeros_like(param), 0))
            m, v, t = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad * grad, t + 1
            self.memory[name] = m, v, t
            update = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-3)
            new = []
            answers: list[list[float]] = [[], [], []]
            of_tensor = LAMBDA * metric_of([param], "l2")
            for number, (p, u, g) in enumerate(zip(*map(matrices_of, (param, update, grad)), strict=True)):
                radius, mean, steps = self.kept[name, number]
                mean = SMOOTHING * mean + (1 - SMOOTHING) * metric_of([g], "mad")
                self.kept[name, number] = radius, mean, steps + 1
                c = LAMBDA * (metric_of([p], "l2") / radius + mean)
                seen = u + c * p
                cautious = LAMBDA * metric_of([seen], "rms")
                pulled = seen + cautious * torch.where(seen * p > 0, direction(p, 3), 0.0)
                for into, answer in zip(answers, (c, cautious, of_tensor), strict=True):
                    into.append(answer)
                new.append(p - RATE * (pulled + of_tensor * p))
            self.answers[name] = answers
            self.params[name] = torch.stack(new).reshape(param.shape)


def in_one_process(way: str, compile: bool = False) -> tuple:
    named = {name: nn.Parameter(value) for name, value in whole(1).items()}
    oracle = Matrices(whole(1))
    optimizer, decay = make(way, named, **({"compile": True} if compile else {}))
    for step in range(4):
        grads: dict[str, Tensor | None] = {**whole(10 + step)}
        if step in (0, 1):
            grads["deep"] = None
        for name, param in named.items():
            param.grad = grads[name]
        optimizer.step()
        oracle.step(grads)
    return named, optimizer, decay, oracle


def test_every_matrix_has_its_own_number():
    named, optimizer, decay, oracle = in_one_process("chain")
    for name, param in named.items():
        assert torch.allclose(param.detach().double(), oracle.params[name], rtol=1e-5, atol=1e-6), name
        for (label, table), answers in zip(decay.stats().items(), oracle.answers[name], strict=True):
            shown = table["coefficient"][name]
            assert shown.shape == (param.shape[:-2] if label != "RelativeWeightDecay_1" else ())
            assert torch.allclose(shown.flatten().double(), torch.tensor(answers).double(), rtol=1e-6)
        radius, mean, steps = (one.flatten().tolist() for one in kept_of(optimizer, named)[name])
        expected = [oracle.kept[name, number] for number in range(len(radius))]
        assert list(zip(radius, mean, steps, strict=True)) == [pytest.approx(one, rel=1e-6) for one in expected]
        assert optimizer.state[param]["distwd_Spread_radius"].shape == param.shape[:-2]


# --- cut over ranks ---------------------------------------------------------------------------------------------------


def on(placements: tuple, **more: Any) -> TensorPlacement:
    return TensorPlacement((0, 1), placements, **more)


# Stacks cut between their matrices and through them, by expert parallelism and FSDP at once, strided, uneven and empty;
# copies that a DTensor shows and copies that it hides; stages that hold some.
PLACES = {
    "ep_fsdp": (
        (2, 2),
        (
            (on((Shard(0), Shard(1))), (4, 5, 3)),
            (on((Shard(0), Shard(0))), (3, 5, 3)),
            (on((Shard(1), Shard(0))), (5, 3, 2)),
            (on((Shard(2), Shard(1))), (2, 3, 4)),
            (TensorPlacement((0,), (Shard(0),), fsdp=1), (5, 3, 2)),
            (TensorPlacement((0,), (Shard(1),), fsdp=1), (3, 4, 2)),
            (on((Shard(0), Replicate())), (3, 2, 2)),
            (TensorPlacement((1,), (Shard(0),)), (3, 2, 2)),
            (on((Shard(1), Shard(0))), (3, 2, 4, 3)),
            (on((Shard(1), Shard(2))), (2, 3, 4, 3)),
            (on((Shard(0), Shard(0))), (1, 3, 2)),
            (on((Shard(0), Shard(1))), (6, 5)),
            (TensorPlacement((0,), (Shard(0),)), (7,)),
            (TensorPlacement(), (3, 4, 2)),
        ),
    ),
    "stages": (
        (3,),
        (
            (TensorPlacement(stage=(0, 0)), (3, 4, 2)),
            (TensorPlacement(stage=(0, 2)), (2, 2, 3, 2)),
            (TensorPlacement(stage=(0, 2)), (5,)),
            (TensorPlacement(fsdp=0), (4, 2, 3)),
            (TensorPlacement(fsdp=0), (2, 2, 3)),
            (TensorPlacement(fsdp=0), (5, 4)),
        ),
    ),
    "pieces": (
        (2,),
        (
            (TensorPlacement((0,), (Shard(1),)), (3, 3, 2)),
            (TensorPlacement((0,), shares=(2.0, 1.0)), (6, 4)),
            (TensorPlacement((0,), shares=(0.0, 1.0)), (5,)),
        ),
    ),
}


def case_of(name: str) -> Case:
    sizes, tensors = PLACES[name]
    return Case(tuple(range(torch.Size(sizes).numel())), sizes, tensors)


def late(case: Case) -> list[str]:
    """Names without a gradient in the first step."""
    return list(case.named)[::4]


def train(case: Case, way: str, named: Mapping[str, nn.Parameter], feed: Any, **where: Any) -> tuple[Any, Any, list]:
    """Three steps; feed(step) gives gradients by name."""
    optimizer, decay = make(way, named, **where)
    counts = []
    for step in range(3):
        for name, grad in feed(step).items():
            named[name].grad = None if step == 0 and name in late(case) else grad
        with wire.Wire() as wired:
            optimizer.step()
        counts.append(len(wired.calls))
    return optimizer, decay, counts[1:]


def look(name: str, way: str) -> dict[str, Any]:
    """Runs on a rank: what it holds at the end, and the collectives of each step."""
    case = case_of(name)
    mesh, params, layout = mesh_cases.set_up(case)
    where = {"layout": layout} if layout else {}
    optimizer, decay, counts = train(
        case, way, params, lambda step: mesh_cases.placed(case, case.whole(2 + step), mesh), **where
    )
    numbers = mesh_cases.placed(case, case.numbers(), mesh)
    kept = {}
    for key, param in params.items():
        own = [optimizer.state[param][f"distwd_Spread_{kind}"] for kind in KEYS] if local_of(param).numel() else []
        for one in own:
            assert isinstance(one, DTensor) is (isinstance(param, DTensor) and param.dim() > 2)
            assert one.shape == param.shape[:-2] and one.dtype == torch.float32
        kept[key] = [local_of(one) for one in own]
    return {
        "params": {key: local_of(param).clone() for key, param in params.items()},
        "numbers": {key: local_of(number).long() for key, number in numbers.items()},
        "kept": kept,
        "stats": decay.stats(),
        "counts": counts,
        "phases": decay.phases,
    }


def alone(name: str, way: str) -> tuple[dict[str, nn.Parameter], Any, Any]:
    case = case_of(name)
    named = {key: nn.Parameter(value) for key, value in case.whole(1).items()}
    optimizer, decay, _ = train(case, way, named, lambda step: case.whole(2 + step))
    return named, optimizer, decay


def assert_equal_to_whole(name: str, way: str, ranks: list[dict[str, Any]]) -> None:
    named, optimizer, decay = alone(name, way)
    for seen in ranks:
        assert set(seen["counts"]) == {seen["phases"]}
        for key, local in seen["params"].items():
            param, number = named[key], seen["numbers"][key]
            where = f"{way}, {key}"
            assert torch.equal(local.flatten(), param.detach().flatten()[number.flatten()]), where
            # Which matrices these elements are of, as the numbers of the elements tell.
            size = max(param[(0,) * (param.dim() - 2)].numel() if param.dim() > 2 else param.numel(), 1)
            cells = (number.flatten() // size).unique()
            for kept, kind in zip(seen["kept"][key], KEYS, strict=False):
                expected = optimizer.state[param][f"distwd_Spread_{kind}"].reshape(-1)[cells]
                assert torch.equal(kept.flatten(), expected), f"{where}: {kind}"
            for label, table in decay.stats().items():
                for what, values in table.items():
                    theirs, ours = values[key], seen["stats"][label][what][key]
                    if number.numel() and (theirs.dim() or param.dim() <= 2):
                        assert torch.equal(ours.flatten(), theirs.reshape(-1)[cells]), f"{where}: {label} {what}"


@pytest.mark.parametrize("way", ["chain", "attach"])
@pytest.mark.parametrize("name", PLACES)
def test_sharded_equals_whole(worlds, name, way):
    """Parameters, numbers and kept numbers, bit for bit, from one all-reduce a phase."""
    assert_equal_to_whole(name, way, worlds.run(len(case_of(name).ranks), look, name, way))
