"""rounding=: how a chain or an attachment writes bf16 and fp16 parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .._torch import calling_frame, layout_spec
from ..checks import check_choice
from ..kernels.formulas import DecayTerm
from ..kernels.stochastic import LOW, GlobalIndices, Ramp, RandomBits, RandomStream
from ..metrics.plan import Plan
from ..sharding.layout import Layout, find_mark
from ..sharding.ownership import stable_hash
from ..sharding.params import NamedParam
from ..sharding.pieces import Piece, describe
from .step import Batch

ROUNDINGS = ("nearest", "stochastic")
KEY = "rounding_step"
_MASK = (1 << 64) - 1


class Rounding:
    """To the nearest; or stochastic, with noise that is a hash of seed, step, write, parameter and place in the whole tensor.

    The number of the step is a key of the param groups, so that it is saved and loaded with them; there is none for "nearest".
    key: its name, and what keeps two attachments of one optimizer apart.
    """

    def __init__(self, kind: str, seed: int, layout: Layout, key: str = KEY) -> None:
        """Raises ValueError for another kind, or a seed that is not an integer."""
        check_choice("rounding", kind, ROUNDINGS)
        check_seed(seed)
        self.kind, self.seed, self.key = kind, seed, key
        self._layout = layout
        self._ramp = Ramp()
        self._keys: dict[str, int] = {}
        self._extents: dict[int, tuple[NamedParam, Any, GlobalIndices]] = {}
        self._warned = False

    @property
    def is_stochastic(self) -> bool:
        """Whether noise decides."""
        return self.kind == "stochastic"

    @property
    def words(self) -> str:
        """What ranks must agree on."""
        return f" | stochastic rounding, seed {self.seed}" if self.is_stochastic else ""

    @property
    def defaults(self) -> dict[str, int]:
        """The group key that counts steps, at its beginning."""
        return {self.key: 0} if self.is_stochastic else {}

    def begin(self, entries: Sequence[NamedParam], batches: Sequence[Batch], plan: Callable[[], Plan]) -> None:
        """Give every batch of low precision its noise for a step. plan: asked for only where a layout marks pieces."""
        if not self.is_stochastic:
            return
        for batch in batches:
            if batch.is_low:
                batch.random_stream = self.random_stream(entries, batch.index, batch.group.get(self.key, 0), plan)

    def count(self, groups: Sequence[dict[str, Any]]) -> None:
        """A step has been taken."""
        if self.is_stochastic:
            for group in groups:
                group[self.key] = group.get(self.key, 0) + 1

    def warn(self, batches: Sequence[Batch], on_gradients: bool) -> None:
        """Warn, once, of an absolute decay of which a bf16 or fp16 parameter shows nothing; reads no tensor.

        on_gradients: whether what is pending goes to the gradients.
        """
        for batch in () if self._warned or self.is_stochastic else batches:
            for terms in (batch.written, [] if on_gradients else batch.terms):
                self._warned = self._warned or warn_if_lost(
                    f"param_groups[{batch.group_index}]", terms, batch.params[0].dtype
                )

    def random_stream(
        self,
        entries: Sequence[NamedParam],
        index: Sequence[int],
        step: int,
        plan: Callable[[], Plan] | None = None,
    ) -> RandomStream:
        """The noise of step number `step` for the entries at `index`."""
        _refuse_capture(entries[index[0]].tensor)
        global_indices = [self._extent(position, entries[position], plan) for position in index]
        own, shared = [self._own_key(entries[position].name) for position in index], self._own_key("")

        def make(write: int) -> RandomBits:
            tick = _mixed(_mixed(step) + write)
            return RandomBits(global_indices, [_mixed(key ^ tick) for key in own], _mixed(shared ^ tick), self._ramp)

        return RandomStream(make)

    def _own_key(self, name: str) -> int:
        if name not in self._keys:
            self._keys[name] = stable_hash((self.seed, self.key, name)) & _MASK
        return self._keys[name]

    def _extent(self, position: int, entry: NamedParam, plan: Callable[[], Plan] | None) -> GlobalIndices:
        """Kept for as long as the parameter is cut the same way."""
        tensor = entry.tensor
        cut = layout_spec(tensor) if isinstance(tensor, DTensor) else tensor.shape
        kept = self._extents.get(position)
        if kept is None or kept[0] is not entry or (kept[1] is not cut and kept[1] != cut):
            found = find_mark(entry.name, tensor, self._layout)
            piece = describe(entry.name, tensor, None if found is None else found[1])
            offset = plan().offset_of(position) if piece.is_counted and plan is not None else 0
            kept = self._extents[position] = (entry, cut, global_indices_of(piece, offset))
        return kept[2]


def global_indices_of(piece: Piece, offset: int = 0) -> GlobalIndices:
    """Where the elements of a piece stand in the whole. offset: of a piece that is known by its number only."""
    if math.prod(piece.local_shape) == 0:
        return GlobalIndices(())
    if piece.is_counted:
        return GlobalIndices(((offset, math.prod(piece.local_shape)),))
    strides = [1] * (len(piece.shape) + 1)
    for dim in reversed(range(len(piece.shape))):
        strides[dim] = strides[dim + 1] * piece.shape[dim]
    is_cut = [cut != ((0, size),) for cut, size in zip(piece.cuts, piece.shape, strict=True)]
    last = max((dim for dim, cut in enumerate(is_cut) if cut), default=-1)
    if last < 0:
        return GlobalIndices(((0, strides[0]),))
    unit = strides[last + 1]
    runs = tuple((start * unit, (stop - start) * unit) for start, stop in piece.cuts[last])
    return GlobalIndices(runs, tuple((piece.cuts[dim], strides[dim + 1]) for dim in range(last)))


def warn_if_lost(what: str, terms: Sequence[DecayTerm], dtype: torch.dtype) -> bool:
    """Whether pulls of known size are too small for `dtype`, written to the nearest; then that is a warning where distwd was called."""
    known = [term.rate for term in terms if term.ord == 2 and isinstance(term.rate, (int, float))]
    rate = sum(known) if len(known) == len(terms) else 0.0
    # Below a power of two numbers are eps/2 of it apart; elsewhere they are further apart than that part of themselves.
    half_a_step = torch.finfo(dtype).eps / 4
    if dtype not in LOW or not 0 < rate < half_a_step:
        return False
    name = str(dtype).removeprefix("torch.")
    warnings.warn(
        f"{what}: the decay takes {rate:.3g} of a {name} parameter per step, less than half a step between {name} numbers "
        f"({half_a_step:.3g} of the parameter): on its own it is rounded away every time, and beside an update it counts only "
        "where the update carries the parameter past a border. rounding='stochastic' keeps it in the mean; float32 parameters keep it.",
        UserWarning,
        stacklevel=_level_of_the_user(),
    )
    return True


def _level_of_the_user() -> int:
    """The `stacklevel` with which our caller warns at the first line outside of distwd and torch."""
    frame, level = calling_frame(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("distwd.", "torch.")):
        frame, level = frame.f_back, level + 1
    return level


def check_seed(seed: Any) -> None:
    """Raise ValueError for what is not an integer."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed={seed!r} is not usable: pass an integer, the same on every rank")


def _mixed(value: int) -> int:
    """A hash of 64 bits to 32: the step of splitmix64 (Steele, Lea, Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return (value ^ (value >> 31)) & 0xFFFFFFFF


def _refuse_capture(like: Tensor) -> None:
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            'rounding="stochastic" cannot be captured in a CUDA graph: every replay would draw the same noise; '
            'step outside of the graph, or use rounding="nearest"'
        )
