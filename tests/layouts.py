"""One small model in every layout of the field: how whole tensors are placed on ranks.

`place` wraps a model whose parameters have the given whole values; gradients are placed the same way
(a second model made of the gradients), so nothing here needs a forward pass or a layout's own arithmetic.
Everything runs on the ranks, except `LAYOUTS`, `MARKED`, `EVERY` and what comes from `tests/model.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests import wraps
from tests.model import NUM_ELEMENTS, SHAPES, Net, Whole
from tests.model import Weight as Weight  # these, and what is used below, are imported from here by the tests
from tests.model import mesh_of as mesh_of
from tests.model import submesh as submesh
from tests.model import whole_model as whole_model


class Held(dict[str, nn.Parameter]):
    """The parameters that a rank holds, by name, and the `layout=` for those that do not show how they are sharded."""

    def __init__(self, params: Mapping[str, nn.Parameter], marks: Mapping[Any, Any]):
        super().__init__(params)
        self.marks = dict(marks)


@dataclass(frozen=True)
class Layout:
    """A way to wrap the model, the ranks it needs (0: no process group), the stage of this rank, the marks it needs."""

    ranks: int
    wrap: Callable[[Net], nn.Module | None]
    stage: Callable[[], list[str]] | None = None
    marks: Callable[[nn.Module], dict] = field(default=lambda model: {})

    def place(self, whole: Whole) -> Held:
        """The parameters this rank holds, by the bare model's names, with these whole values."""
        net = Net(whole)
        model = self.wrap(net) or net
        held = {_bare(name): param for name, param in model.named_parameters()}
        if self.stage is not None:
            held = {name: held[name] for name in self.stage()}
        return Held(held, self.marks(model))


def _bare(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")


# Layouts that need no `layout=`: named DTensors.
LAYOUTS: dict[str, Layout] = {
    "single": Layout(0, wraps.alone),
    "fsdp1rank": Layout(1, wraps.fsdp),
    "fsdp2": Layout(2, wraps.fsdp),
    "fsdp3": Layout(3, wraps.fsdp),
    "fsdp4": Layout(4, wraps.fsdp),
    "fsdp_columns": Layout(2, wraps.fsdp_columns),
    "columns4": Layout(4, wraps.columns),
    "some_ranks": Layout(3, wraps.some_ranks),
    "hsdp": Layout(4, wraps.hsdp),
    "hsdp3x1": Layout(3, wraps.hsdp_wide),
    "tp2": Layout(2, wraps.tp),
    "fsdp_tp": Layout(4, wraps.fsdp_tp),
    "ddp2": Layout(2, wraps.ddp),
    "replicated3": Layout(3, wraps.alone),
    "mixed": Layout(2, wraps.mixed),
    "experts": Layout(4, wraps.experts),
    "experts_fsdp": Layout(4, wraps.experts_fsdp),
    "stages": Layout(3, wraps.alone, wraps.two_stages_and_nothing),
    "stages_interleaved": Layout(2, wraps.alone, wraps.every_other_chunk),
    "stages_fsdp": Layout(4, wraps.fsdp_of_pair, wraps.stage_of_pair),
    "stages_tp": Layout(4, wraps.tp_of_pair, wraps.stage_of_pair),
}
# What hides its owners in plain tensors, or an axis of its mesh, and needs `layout=`; or has other names than the model.
MARKED: dict[str, Layout] = {
    "experts_named": Layout(4, wraps.experts_named),
    "experts_hidden": Layout(4, wraps.experts_hidden, marks=wraps.mark_experts),
    "experts_plain": Layout(4, wraps.experts_plain, marks=wraps.mark_experts_and_gate),
    "cut_by_hand": Layout(3, wraps.cut_by_hand, marks=wraps.mark_all),
    "fsdp1_full": Layout(3, wraps.fsdp1("FULL_SHARD", True), marks=wraps.mark_fsdp1),
    "fsdp1_full_flat": Layout(3, wraps.fsdp1("FULL_SHARD", False), marks=wraps.mark_fsdp1),
    "fsdp1_grad_op": Layout(2, wraps.fsdp1("SHARD_GRAD_OP", True), marks=wraps.mark_fsdp1),
    "fsdp1_hybrid": Layout(4, wraps.fsdp1("HYBRID_SHARD", True), marks=wraps.mark_fsdp1),
    "fsdp1_hybrid_flat": Layout(4, wraps.fsdp1("HYBRID_SHARD", False), marks=wraps.mark_fsdp1),
    "fsdp1_whole": Layout(2, wraps.fsdp1("NO_SHARD", True), marks=wraps.mark_fsdp1),
}
# Where several parameters are one, or one is several, nothing goes by their names.
FLAT = ("fsdp1_full_flat", "fsdp1_hybrid_flat", "experts_named")
EVERY = LAYOUTS | MARKED
LARGE: dict[str, Layout] = {"hsdp_tp": Layout(8, wraps.hsdp_tp)}  # only a few laws run there


def groups_of(held: Mapping[str, nn.Parameter], is_flat: bool) -> list[dict[str, Any]]:
    """Two groups, but where parameters have been joined to flat ones."""
    if is_flat:
        return [{"params": list(held.items())}]
    first = list(SHAPES)[:5]
    groups: list[dict[str, Any]] = [
        {"params": [(name, param) for name, param in held.items() if name in first]},
        {"params": [(name, param) for name, param in held.items() if name not in first]},
    ]
    for group in groups:
        # torch refuses a group without names beside one with names, and takes an empty one for that.
        group |= {} if group["params"] else {"param_names": []}
    return groups


def place(layout: str, whole: Whole) -> Held:
    return (EVERY | LARGE)[layout].place(whole)


def set_gradients(layout: str, held: Mapping[str, nn.Parameter], whole: Whole) -> None:
    """Give each held parameter its part of the whole gradients; names that are absent get None."""
    full = {name: whole.get(name, torch.zeros(shape)) for name, shape in SHAPES.items()}
    dtype = next(iter(whole.values())).dtype if whole else torch.float32
    placed = place(layout, {name: value.to(dtype) for name, value in full.items()})
    for name, param in held.items():
        param.grad = None if name in SHAPES.keys() - whole.keys() else placed[name].detach()


def gather(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole model as this rank sees it, with what other pipeline stages hold."""
    mine = {name: whole_of(tensor) for name, tensor in held.items()}
    if len(mine) == len(SHAPES):  # on every rank alike: only pipeline stages hold less
        return mine
    theirs: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(theirs, mine)
    return {name: value for part in theirs for name, value in part.items()} | mine


@functools.cache
def _element_numbers(layout: str, dtype: torch.dtype) -> list[Tensor]:
    """For every rank the numbers, in the whole model, of the elements it holds: found by placing a tensor of element numbers.

    Counted from 1: what FSDP1 fills its last pieces up with is 0, and nobody's.
    """
    numbers = torch.arange(1, NUM_ELEMENTS + 1, dtype=dtype).split(
        [torch.Size(shape).numel() for shape in SHAPES.values()]
    )
    whole = {name: part.reshape(SHAPES[name]) for name, part in zip(SHAPES, numbers, strict=True)}
    mine = _flat(place(layout, whole)).long()
    if not dist.is_initialized():
        return [mine]
    theirs: list[Tensor] = [mine] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    return theirs


def _flat(held: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([local_of(tensor).reshape(-1) for tensor in held.values()] or [torch.zeros(0)])


def view(layout: str, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As `gather`, in one exchange and without DTensor's help; where this rank holds an element, its own copy counts."""
    # A rank that holds nothing has no dtype of its own; float64 carries the bits of all.
    dtype = next((tensor.dtype for tensor in held.values()), torch.float64)
    # FSDP1 aligns by bytes, so there the dtype decides where a parameter is cut.
    numbers = _element_numbers(layout, dtype if layout.startswith("fsdp1_") else torch.float64)
    parts = [_flat(held).double()]
    if dist.is_initialized():
        padded = torch.zeros(max(map(len, numbers)), dtype=torch.float64)
        padded[: parts[0].numel()] = parts[0]
        parts = [torch.empty_like(padded) for _ in numbers]
        dist.all_gather(parts, padded)
    mine = dist.get_rank() if dist.is_initialized() else 0
    whole = torch.full((NUM_ELEMENTS + 1,), torch.nan, dtype=torch.float64)
    for rank in [rank for rank in range(len(parts)) if rank != mine] + [mine]:
        whole[numbers[rank]] = parts[rank][: len(numbers[rank])]
    pieces = whole[1:].to(dtype).split([torch.Size(shape).numel() for shape in SHAPES.values()])
    return {name: piece.reshape(SHAPES[name]) for name, piece in zip(SHAPES, pieces, strict=True)}


def whole_of(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return (detached.full_tensor() if isinstance(detached, DTensor) else detached).clone()


def local_of(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached
