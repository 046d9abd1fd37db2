"""DeepSpeed's ZeRO-1 and 2, by their shapes: one flat piece per param group, and a step that sees one group at a time."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distwd import LR, Adam, Chain, RelativeWeightDecay, Sharded, attach
from tests.layouts import SHAPES, whole_model
from tests.runs import PARAMS_SEED, differing, grads_of
from tests.test_attach_sharded_optimizers import RELATIVE, RULES, adamw, rule_of, values_of, whole_parameters
from tests.wire import Wire

CUT = 4
ALIGNMENT = 8
NAMES = list(SHAPES)


def flat(values: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([values[name].reshape(-1) for name in names])


def padded(whole: Tensor) -> Tensor:
    return torch.cat([whole, whole.new_zeros(-len(whole) % (ALIGNMENT * dist.get_world_size()))])


class DeepSpeed:
    """What DeepSpeed makes of an optimizer: flat fp32 pieces of equal length in its groups; `step` shows it one group at a time."""

    def __init__(self, optimizer: torch.optim.Optimizer, groups: list[list[str]]) -> None:
        self.optimizer, self.groups = optimizer, groups
        self.pieces = [self._piece(flat(whole_model(PARAMS_SEED), names)) for names in groups]
        for group, piece in zip(optimizer.param_groups, self.pieces, strict=True):
            group["params"] = [piece]

    def _piece(self, whole: Tensor) -> Tensor:
        return padded(whole).chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()

    def mark_padding(self) -> None:
        """What docs/pages/guides/layout.md asks for, so that the padding counts for nothing."""
        for piece, names in zip(self.pieces, self.groups, strict=True):
            numel, begin = len(flat(whole_model(0), names)), dist.get_rank() * len(piece)
            piece._shard_numel_padded = min(max(begin + len(piece) - numel, 0), len(piece))

    def step(self, step: int) -> None:
        for index, names in enumerate(self.groups):
            self.pieces[index].grad = self._piece(flat(grads_of(step), names)).detach()
            whole = self.optimizer.param_groups
            self.optimizer.param_groups = [whole[index]]
            try:
                self.optimizer.step()
            finally:
                self.optimizer.param_groups = whole
            self.pieces[index].grad = None

    def whole(self) -> dict[str, Tensor]:
        found = {}
        for piece, names in zip(self.pieces, self.groups, strict=True):
            parts = [torch.empty_like(piece) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, piece.detach())
            sizes = [torch.Size(SHAPES[name]).numel() for name in names]
            pieces = torch.cat(parts)[: sum(sizes)].split(sizes)
            found |= {name: part.reshape(SHAPES[name]) for name, part in zip(names, pieces, strict=True)}
        return found


def groups_of(params: dict, num_groups: int) -> list[dict]:
    named = list(params.items())
    return [{"params": named[:CUT]}, {"params": named[CUT:], "lr": 0.05}] if num_groups == 2 else [{"params": named}]


def made(kind: str, groups: list[dict], name: str, scope: str, before, **layout):
    """An optimizer with decay, and its plan, phases and stats; before: what happens to it between construction and attach."""
    if kind == "chain":
        optimizer = Chain(groups, Adam(foreach=False), rule_of(name, scope), LR(0.01), **layout)
        before(optimizer)
        return optimizer, optimizer
    optimizer = adamw(groups)
    before(optimizer)
    return optimizer, attach(optimizer, rule_of(name, scope), coupling=RULES[name][2], **layout)


def with_deepspeed(kind: str, when: str, name: str, scope: str, num_groups: int) -> tuple[dict, list[int], int]:
    groups = groups_of(whole_parameters(), num_groups)
    parts = [NAMES[:CUT], NAMES[CUT:]] if num_groups == 2 else [NAMES]
    marked = {"layout": {"*": Sharded()}}
    engines: list[DeepSpeed] = []

    def engage(optimizer) -> None:
        engines.append(DeepSpeed(optimizer, parts))

    optimizer, decaying = made(kind, groups, name, scope, engage if when == "after" else lambda _: None, **marked)
    if not engines:
        engage(optimizer)
    (engine,) = engines
    engine.mark_padding()
    counts = []
    for step in range(3):
        with Wire() as wire:
            engine.step(step)
        counts.append(len(wire.calls))
    assert all("lr" in group for group in optimizer.param_groups)
    return engine.whole(), counts[1:], decaying.phases


def alone(kind: str, name: str, scope: str, num_groups: int) -> dict[str, Tensor]:
    params = whole_parameters()
    optimizer, _ = made(kind, groups_of(params, num_groups), name, scope, lambda _: None)
    for step in range(3):
        for key, grad in grads_of(step).items():
            params[key].grad = grad
        optimizer.step()
    return values_of(params)


CASES = [
    *(("attach", when, name, "group", 2) for when in ("before", "after") for name in RULES),
    *(("attach", "after", name, "all", 1) for name in RELATIVE),
    ("chain", "before", "of params", "group", 2),
    ("chain", "before", "of the update", "group", 2),
    ("chain", "before", "absolute", "group", 2),
]


@pytest.mark.parametrize(("kind", "when", "name", "scope", "num_groups"), CASES)
def test_flat_pieces_stepped_group_by_group_have_the_bits_of_one_process(worlds, kind, when, name, scope, num_groups):
    expected = alone(kind, name, scope, num_groups)
    for params, counts, phases in worlds.run(3, with_deepspeed, kind, when, name, scope, num_groups):
        assert differing(params, expected) == []
        assert phases == int(name in RELATIVE)
        assert counts == [num_groups * phases] * 2


def refused_by(kind: str, when: str, name: str) -> tuple[str, bool]:
    groups = groups_of(whole_parameters(), 2)
    engines: list[DeepSpeed] = []

    def engage(optimizer) -> None:
        engines.append(DeepSpeed(optimizer, [NAMES[:CUT], NAMES[CUT:]]))

    marked = {"layout": {"*": Sharded()}}
    optimizer, _ = made(kind, groups, name, "all", engage if when == "after" else lambda _: None, **marked)
    if not engines:
        engage(optimizer)
    before = [piece.detach().clone() for piece in engines[0].pieces]
    try:
        engines[0].step(0)
    except ValueError as error:
        same = all(torch.equal(piece, old) for piece, old in zip(engines[0].pieces, before, strict=True))
        return str(error), same and not any(optimizer.state[piece] for piece in engines[0].pieces if kind == "attach")
    return "accepted", False


@pytest.mark.parametrize(("kind", "when"), [("attach", "before"), ("attach", "after"), ("chain", "before")])
@pytest.mark.parametrize("name", ["of params", "of the update"])
def test_a_number_over_groups_that_are_stepped_apart_is_refused_on_every_rank(worlds, kind, when, name):
    for text, unchanged in worlds.run(2, refused_by, kind, when, name):
        assert "1 of the optimizer's 2 param groups" in text
        assert "RelativeWeightDecay" in text
        assert "scope='group'" in text
        assert unchanged


def test_numbers_of_groups_that_are_not_stepped_stay_and_a_new_group_is_no_surprise():
    params = [torch.nn.Parameter(torch.full((3,), float(number))) for number in (1, 2, 4)]
    optimizer = torch.optim.SGD([{"params": [param]} for param in params[:2]], lr=0.5)
    attachment = attach(optimizer, RelativeWeightDecay(0.5, norm_input="params", scope="group"))
    whole = optimizer.param_groups
    for shown in ([0], [1], [1]):
        optimizer.param_groups = [whole[index] for index in shown]
        params[shown[0]].grad = torch.zeros(3)
        optimizer.step()
    optimizer.param_groups = whole
    metrics = attachment.stats()["RelativeWeightDecay"]["metric"]
    assert [metrics[index].item() for index in (0, 1)] == [1.0, 1.0]
    assert [param[0].item() for param in params] == [0.75, 0.75, 4.0]
    optimizer.add_param_group({"params": [params[2]]})
    params[2].grad = torch.zeros(3)
    optimizer.step()
    assert sorted(attachment.stats()["RelativeWeightDecay"]["metric"]) == [0, 1, 2]
    attachment.remove()
    assert not any("distwd_weight_decay" in group for group in optimizer.param_groups)


def piece_by_piece(rule: str) -> str:
    """DeepSpeed's ZeRO-3: groups are empty but for the one piece that is stepped, and its pieces are numbered."""
    params = [torch.nn.Parameter(torch.full((3,), float(number))) for number in (1, 2)]
    optimizer = adamw([params[0]])
    attach(optimizer, rule_of(rule), layout={"*": Sharded()})
    optimizer.param_groups[0]["params"] = []
    errors = []
    for number, param in enumerate(params):
        param.ds_id, param.grad = f"{number}", torch.zeros(3)
        optimizer.param_groups[0]["params"] = [param]
        try:
            optimizer.step()
        except ValueError as error:
            errors.append(str(error))
        optimizer.param_groups[0]["params"] = []
    return " | ".join([*errors, *(f"{param[0].item():g}" for param in params)])


def test_zero_3_is_refused_for_a_relative_rule_and_decays_by_an_absolute_one(worlds):
    for refused in worlds.run(2, piece_by_piece, "of params"):
        assert refused.count("DeepSpeed's ZeRO-3 shows the optimizer one piece after the other") == 2
        assert refused.endswith(" | 1 | 2")
    assert worlds.run(2, piece_by_piece, "absolute") == ["0.999 | 1.998"] * 2
