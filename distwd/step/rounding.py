"""rounding=: how a chain or an attachment writes bf16 and fp16 parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .._torch import is_dtensor, is_fake, layout_spec
from ..checks import check_choice, warn_user
from ..kernels.formulas import DecayTerm
from ..kernels.stochastic import LOW, GlobalIndices, RandomBits
from ..metrics.plan import Plan
from ..sharding.layout import Layout, find_mark
from ..sharding.ownership import stable_hash
from ..sharding.params import NamedParam
from ..sharding.pieces import Piece, describe
from .step import Batch

RoundingMode = Literal["nearest", "stochastic"]
ROUNDINGS: tuple[str, ...] = get_args(RoundingMode)
KEY = "rounding_step"
_MASK = (1 << 64) - 1
_NUM_READS = 10  # steps in which a warm-up, or a GradScaler, may still keep every decay at 0


class Rounding:
    """How parameters are rounded: to the nearest, or stochastically, by a hash of seed, step, write, name and place in the whole.

    The number of the step is a key of the param groups, so that it is saved and loaded with them; "nearest" has none.

    kind: "nearest" or "stochastic".
    seed: an integer, the same on every rank.
    layout: how plain tensors are cut, as in `Chain`.
    key: the name of the group key; it keeps two attachments of one optimizer apart.

    Raises ValueError for another kind, or a seed that is not an integer.
    """

    def __init__(self, kind: str, seed: int, layout: Layout, key: str = KEY) -> None:
        check_choice("rounding", kind, ROUNDINGS)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed={seed!r} is not usable: pass an integer, the same on every rank")
        self.kind, self.seed, self.key = kind, seed, key
        self.is_stochastic = kind == "stochastic"
        # What ranks must agree on, and the group key that counts steps, at its beginning.
        self.words = f" | stochastic rounding, seed {seed}" if self.is_stochastic else ""
        self.defaults: dict[str, int] = {key: 0} if self.is_stochastic else {}
        self._layout = layout
        self._keys: dict[str, int] = {}
        self._indices: dict[int, tuple[NamedParam, Any, GlobalIndices]] = {}
        self._warned, self._reads_left = False, _NUM_READS

    def begin(self, entries: Sequence[NamedParam], batches: Sequence[Batch], plan: Callable[[], Plan]) -> None:
        """Give every batch of bf16 or fp16 its random bits for a step. plan: called only where a layout marks pieces."""
        for batch in batches if self.is_stochastic else ():
            if batch.is_low:
                batch.random_stream = self.random_stream(entries, batch.index, batch.group.get(self.key, 0), plan)

    def count(self, groups: Sequence[dict[str, Any]]) -> None:
        """Record that a step has been taken."""
        if self.is_stochastic:
            for group in groups:
                group[self.key] = group.get(self.key, 0) + 1

    def warn(self, batches: Sequence[Batch], on_gradients: bool) -> None:
        """Warn, once, of a decay that a bf16 or fp16 parameter shows nothing of.

        A rate that is a tensor is read in the first step in which it is not 0, if that is one of the first.
        on_gradients: whether pending terms go to the gradients, where they are not rounded to the parameter.
        """
        # Stochastic rounding keeps a small decay in the mean.
        if self._warned or self.is_stochastic:
            return
        reads, self._reads_left = self._reads_left > 0, max(self._reads_left - 1, 0)
        for batch in [batch for batch in batches if batch.is_low]:
            for terms in (batch.written, [] if on_gradients else batch.all_terms):
                if rate := rate_of(terms, reads):
                    self._reads_left = 0
                    what = f"param_groups[{batch.group_index}]"
                    self._warned = self._warned or warn_if_lost(what, rate, batch.params[0].dtype)

    def random_stream(
        self,
        entries: Sequence[NamedParam],
        index: Sequence[int],
        step: int,
        plan: Callable[[], Plan] | None = None,
    ) -> Iterator[RandomBits]:
        """The random bits of step number `step` for the entries at `index`; others at each write.

        Raises ValueError while a CUDA graph is captured.
        """
        if entries[index[0]].tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                'rounding="stochastic" cannot be captured in a CUDA graph: every replay would draw the same noise; '
                'step outside of the graph, or use rounding="nearest"'
            )
        global_indices = [self._indices_of(position, entries[position], plan) for position in index]
        # Names, not positions: what other parameters a rank holds must not matter. The empty name is for the write.
        names = [*(entries[position].name for position in index), ""]
        for name in names:
            if name not in self._keys:
                self._keys[name] = stable_hash((self.seed, self.key, name)) & _MASK
        *own, shared = [self._keys[name] for name in names]

        def make(write: int) -> RandomBits:
            # Hashed twice, so that write 1 of a step has nothing to do with write 0 of the next.
            tick = _mixed(_mixed(step) + write)
            return RandomBits(global_indices, [_mixed(key ^ tick) for key in own], _mixed(shared ^ tick))

        return map(make, count())

    def _indices_of(self, position: int, entry: NamedParam, plan: Callable[[], Plan] | None) -> GlobalIndices:
        """Which places of the whole a parameter holds; kept for as long as it is cut the same way."""
        tensor = entry.tensor
        # Compared by identity first: it is most often the very spec of the last step, and comparing two takes long.
        cut = layout_spec(tensor) if is_dtensor(tensor) else tensor.shape
        kept = self._indices.get(position)
        if kept is None or kept[0] is not entry or (kept[1] is not cut and kept[1] != cut):
            found = find_mark(entry.name, tensor, self._layout)
            piece = describe(entry.name, tensor, None if found is None else found[1])
            # Of a piece that is known by its number only, the ranks learn where it begins when they build the plan.
            offset = plan().offset_of(position) if piece.is_counted and plan is not None else 0
            kept = self._indices[position] = (entry, cut, global_indices_of(piece, offset))
        return kept[2]


def global_indices_of(piece: Piece, offset: int = 0) -> GlobalIndices:
    """Where the elements of a piece stand in the whole (kernels/stochastic.py has a picture).

    offset: where a piece begins that is known by its number only (`is_counted`).
    """
    if math.prod(piece.local_shape) == 0:
        return GlobalIndices(())
    # A flat stretch of the whole, as FSDP1 and ZeRO cut it: one run.
    if piece.is_counted:
        return GlobalIndices(((offset, math.prod(piece.local_shape)),))
    strides = [1] * (len(piece.shape) + 1)
    for dim in reversed(range(len(piece.shape))):
        strides[dim] = strides[dim + 1] * piece.shape[dim]
    is_cut = [cut != ((0, size),) for cut, size in zip(piece.cuts, piece.shape, strict=True)]
    last = max((dim for dim, cut in enumerate(is_cut) if cut), default=-1)
    if last < 0:  # held whole
        return GlobalIndices(((0, strides[0]),))
    # Behind the last dimension that is cut all is held, so an interval of it is one run.
    unit = strides[last + 1]
    runs = tuple((start * unit, (stop - start) * unit) for start, stop in piece.cuts[last])
    return GlobalIndices(runs, tuple((piece.cuts[dim], strides[dim + 1]) for dim in range(last)))


def rate_of(terms: Sequence[DecayTerm], reads: bool = False) -> float:
    """What terms of ord 2 take of a parameter, all together; 0 if that is not known.

    reads: whether rates that are tensors are read; of one for each parameter the largest.
    """
    rate = 0.0
    # How much of p a pull to something else takes, or one with a cap, depends on p.
    if any(term.ord != 2 or term.cap is not None or term.toward != 0 for term in terms):
        return 0.0
    for term in terms:
        one = term.rate
        if isinstance(one, Tensor):
            # Neither a tensor without a value nor one whose value a CUDA graph has yet to find can be read.
            is_unknown = is_fake(one) or one.is_meta or (one.is_cuda and torch.cuda.is_current_stream_capturing())
            if not reads or is_unknown:
                return 0.0
            one = one.max().item()
        rate += one
    return rate


def warn_if_lost(what: str, rate: float, dtype: torch.dtype) -> bool:
    """Warn, where distwd was called, if decay is too small for `dtype`, written to the nearest. Returns whether it did.

    what: how the message calls the parameters.
    rate: what the decay takes of them.
    """
    # Below a power of two numbers are eps/2 of it apart; elsewhere they are further apart than that part of themselves.
    half_a_step = torch.finfo(dtype).eps / 4
    if dtype not in LOW or not 0 < rate < half_a_step:
        return False
    name = str(dtype).removeprefix("torch.")
    warn_user(
        f"{what}: the decay takes {rate:.3g} of a {name} parameter per step, less than half a step between {name} numbers "
        f"({half_a_step:.3g} of the parameter): on its own it is rounded away every time; rounded together with an update, part "
        "of it survives. rounding='stochastic' keeps it on average; float32 parameters keep it."
    )
    return True


def _mixed(value: int) -> int:
    """A hash of 64 bits to 32: the step of splitmix64 (Steele, Lea, Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return (value ^ (value >> 31)) & 0xFFFFFFFF
