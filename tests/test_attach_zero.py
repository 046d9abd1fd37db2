"""Optimizers whose state is spread over ranks (ZeRO): torch's own, and the shapes that DeepSpeed and Megatron give theirs."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distwd import LR, Adam, Chain, RelativeWeightDecay, Sharded, attach
from tests.layouts import SHAPES, whole_model
from tests.runs import PARAMS_SEED, differing, grads_of
from tests.wire import Wire

# name: (rule and its arguments, coupling)
RULES = {
    "absolute": ("WeightDecay", (0.1,), "lr"),
    "cautious": ("CautiousWeightDecay", (0.1, 1), "lr"),
    "of params": ("RelativeWeightDecay", (0.1, 2, "params", "l2"), "lr"),
    "of the update": ("RelativeWeightDecay", (0.1, 2, "update", "mad"), "lr"),
    "of the gradient": ("RelativeWeightDecay", (0.1, 2, "grad", "rms"), "gradient"),
    "of params, not scaled": ("RelativeWeightDecay", (0.01, 1, "params", "std"), "none"),
}
RELATIVE = [name for name in RULES if name.startswith("of")]


def rule_of(name: str, scope: str = "all"):
    import distwd

    word, args, _ = RULES[name]
    scoped = {"scope": scope} if word == "RelativeWeightDecay" else {}
    return getattr(distwd, word)(*args, **scoped)


def whole_parameters() -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(value) for name, value in whole_model(PARAMS_SEED).items()}


def adamw(params: Iterable, **kwargs) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(params), **{"lr": 0.01, "weight_decay": 0, "foreach": False} | kwargs)


def values_of(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in params.items()}


# --- torch's ZeroRedundancyOptimizer --------------------------------------------------------------------------------------


def zero_of(groups: Iterable, **kwargs):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of torch.jit when it is imported

    return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=0.01, weight_decay=0, foreach=False, **kwargs)


def with_zero(name: str, bucket_view: bool, cut: int) -> tuple[dict, list[int], int, list]:
    """Three steps, with decay attached to the optimizer of this rank's parameters inside; without ranks, to AdamW itself."""
    params = whole_parameters()
    named = list(params.items())
    groups = [{"params": [p for _, p in named[:cut]]}, {"params": [p for _, p in named[cut:]], "lr": 0.05}]
    if dist.is_initialized():
        zero = zero_of(groups, parameters_as_bucket_view=bucket_view)
        host = zero.optim
    else:
        zero = host = adamw(groups)
    attachment = attach(host, rule_of(name), coupling=RULES[name][2], named_parameters=named)
    counts = []
    for step in range(3):
        for key, grad in grads_of(step).items():
            params[key].grad = grad
        with Wire() as wire:
            zero.step()
        counts.append(wire.calls.count("allreduce_"))
    told = [float(value["coefficient"]) for value in attachment.stats().values()]
    return values_of(params), counts[1:], attachment.phases, told


@pytest.mark.parametrize(("ranks", "bucket_view"), [(2, False), (2, True), (3, False)])
@pytest.mark.parametrize("name", RULES)
def test_torchs_zero_has_the_bits_of_one_process(worlds, name, ranks, bucket_view):
    """Every rank keeps whole parameters and steps its own; names say which, as with pipeline stages."""
    ((alone, _, _, told),) = worlds.run(0, with_zero, name, bucket_view, 4)
    for params, counts, phases, coefficients in worlds.run(ranks, with_zero, name, bucket_view, 4):
        assert differing(params, alone) == []
        assert coefficients == told
        assert counts == [phases] * 2 == [int(name in RELATIVE)] * 2


def around_zero() -> list[str]:
    params = whole_parameters()
    zero = zero_of(params.values())
    told = []
    for host in (zero, zero.optim):
        try:
            attach(host, RelativeWeightDecay(0.1))
            for key, grad in grads_of(0).items():
                params[key].grad = grad
            zero.step()
        except ValueError as error:
            told.append(str(error))
    return [*told, str(differing(values_of(params), whole_model(PARAMS_SEED)))]


def test_around_torchs_zero_and_without_names_it_is_refused_on_every_rank(worlds):
    for outer, unnamed, changed in worlds.run(2, around_zero):
        assert "ZeroRedundancyOptimizer is a wrapper" in outer
        assert "`.optim`" in outer
        assert "named_parameters" in unnamed
        assert changed == "[]"


# --- DeepSpeed's ZeRO-1 and 2: one flat piece per group, stepped one group at a time ---------------------------------------

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
        """What docs/pages/layout.md says to do, so that the padding counts for nothing."""
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


def test_numbers_of_groups_that_are_not_shown_stay_and_a_new_group_is_no_surprise():
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


# --- Megatron's distributed optimizer: a rank holds a stretch of the flat model, and so a stretch of some parameters -------


def stretch(values: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """What `rank` holds of every parameter: its part of the one flat buffer, cut evenly without regard to parameters."""
    total = sum(value.numel() for value in values.values())
    size = -(-total // ranks)
    held, begin = {}, 0
    for name, value in values.items():
        low, high = (min(max(edge - begin, 0), value.numel()) for edge in (rank * size, (rank + 1) * size))
        held[name] = value.reshape(-1)[low:high].clone()
        begin += value.numel()
    return held


def with_megatron(name: str, scope: str, form: str) -> dict[str, Tensor]:
    """form: of a parameter that a rank holds nothing of it has an "empty" piece, or it is "absent" and pieces have names of their own."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    held = {key: torch.nn.Parameter(value) for key, value in stretch(whole_model(PARAMS_SEED), rank, ranks).items()}
    kept = {key: param for key, param in held.items() if form == "empty" or param.numel()}
    named = [(key if form == "empty" else f"{key} on rank {rank}", param) for key, param in kept.items()]
    marked = {"layout": {"*": Sharded()}} if form == "empty" else {}
    optimizer = adamw(named)
    attach(optimizer, rule_of(name, scope), coupling=RULES[name][2], **marked)
    for step in range(3):
        for key, grad in stretch(grads_of(step), rank, ranks).items():
            held[key].grad = grad
        optimizer.step()
    theirs: list[dict] = [{}] * ranks
    dist.all_gather_object(theirs, values_of(held))
    return {key: torch.cat([part[key] for part in theirs]).reshape(shape) for key, shape in SHAPES.items()}


@pytest.mark.parametrize(
    ("name", "scope", "form"),
    [
        *((name, "all", form) for name in RULES for form in ("empty", "absent")),
        ("of params", "tensor", "empty"),
        ("of the update", "tensor", "empty"),
    ],
)
def test_stretches_of_parameters_have_the_bits_of_one_process(worlds, name, scope, form):
    params = whole_parameters()
    optimizer = adamw(params.items())
    attach(optimizer, rule_of(name, scope), coupling=RULES[name][2])
    for step in range(3):
        for key, grad in grads_of(step).items():
            params[key].grad = grad
        optimizer.step()
    for whole in worlds.run(4, with_megatron, name, scope, form):
        assert differing(whole, values_of(params)) == []


def absent_under_one_name() -> str:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    held = {key: torch.nn.Parameter(value) for key, value in stretch(whole_model(PARAMS_SEED), rank, ranks).items()}
    optimizer = adamw([(key, param) for key, param in held.items() if param.numel()])
    attachment = attach(optimizer, RelativeWeightDecay(0.1), layout={"*": Sharded()})
    try:
        return f"accepted {attachment.plan}"
    except ValueError as error:
        return str(error)


def test_a_piece_that_is_missing_is_refused_with_both_ways_out(worlds):
    texts = worlds.run(4, absent_under_one_name)
    assert len(set(texts)) == 1
    assert "embed.weight" in texts[0]
    assert "an empty tensor" in texts[0]
    assert "names of their own" in texts[0]
