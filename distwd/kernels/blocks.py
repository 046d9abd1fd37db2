"""Work on many tensors in pieces that stay in the cache, with temporaries and buffers in memory that is kept.

`blocks` cuts lists of tensors into blocks. A `Workspace` holds the temporaries of one block and has the operations that
write to them. `BufferPool` and `ZeroPool` keep whole tensors from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._torch import cache_size, is_in_dispatch_mode

# Elements in a block. On a CPU, what several operations in a row touch should stay in the cache; but every operation ends
# in a barrier of all threads, so a block grows with them. On a GPU a block should be large enough that launches do not
# count, and small enough that its temporaries do not either.
_CPU_BLOCK = 1 << 17  # for each thread
_CPU_LEAST = 1 << 18  # in all
_CPU_CACHE = 1 << 21  # bytes of a core's second-level cache that hold the block of a thread and its float64 copy
_CPU_MOST = 1 << 21
_GPU_BLOCK = 1 << 22
_KEPT_BLOCKS = 8  # of so many blocks is the largest temporary that is kept
# From here on a tensor on an accelerator that has no Triton kernels is compiled. By no means from a block on: what is
# compiled needs no block, and most shards are smaller.
_GPU_COMPILED = 1 << 16

# Larger tensors come alone on a CPU: there a list saves no launches, only the overhead of small operations. Where only a
# few operations are made, that overhead counts for more than what is in the cache, up to a larger size.
_CPU_SMALL = 1 << 15
_CPU_SMALL_FOR_FEW = 1 << 16

# (positions in the lists, the pieces of each list)
Block = tuple[list[int], tuple[list[Tensor], ...]]
# The second operand of an operation: one number or 0-d tensor for all tensors of a list, or a list with one for each, which
# is 0-d, or has one number for each matrix of a stack: [matrices, 1, 1].
Operand = float | Tensor | list[Tensor]
Call = Callable[..., Any]
# What the operations of Ops take after the object itself, and what they return.
Unary = Callable[["Ops", list[Tensor]], list[Tensor]]
Binary = Callable[["Ops", list[Tensor], Operand], list[Tensor]]


def block_size(device: torch.device) -> int:
    """The number of elements worked on at a time on `device`, at most."""
    if device.type != "cpu":
        return _GPU_BLOCK
    # One block for one thread only where a core's cache holds it; elsewhere the calls of smaller blocks cost more than
    # they save.
    least = _CPU_BLOCK if cache_size() >= _CPU_CACHE else _CPU_LEAST
    return min(max(_CPU_BLOCK * torch.get_num_threads(), least), _CPU_MOST)


def small_size(device: torch.device, few_operations: bool = False, compiles: bool = False) -> int:
    """Up to how many elements a tensor shares a block with others.

    few_operations: whether only a few operations are made on it.
    compiles: whether larger ones are compiled.
    """
    if device.type != "cpu":
        return _GPU_COMPILED if compiles else _GPU_BLOCK
    return _CPU_SMALL_FOR_FEW if few_operations else _CPU_SMALL


def number_on(device: torch.device, number: Tensor, dtype: torch.dtype) -> Tensor:
    """A number, or a vector of them, on `device` and in `dtype`, without waiting for the device where that is possible.

    number: learning rates and decays are often 0-d tensors on the CPU, beside parameters on a card.
    """
    if number.dim() == 0 and number.device.type == "cpu" and device.type != "cpu":
        # A copy would wait. As an operand a number of the CPU travels with the launch, as any Python number does.
        return torch.zeros((), dtype=dtype, device=device) + number.to(dtype)
    return number.to(device, dtype)


def is_large(pieces: Sequence[Tensor]) -> bool:
    """Whether a block is flat slices of tensors that are large enough to be compiled; else it is several whole small ones."""
    return pieces[0].dim() == 1 and pieces[0].numel() > small_size(pieces[0].device, compiles=True)


def blocks(
    *lists: Sequence[Tensor], together: int = 0, few_operations: bool = False, uncut: Collection[int] = ()
) -> Iterator[Block]:
    """Cut equally long lists of equally shaped tensors alike.

    lists: tensors of one device. Those at one position have one shape; dtypes may differ between the lists.
    together: 0: large tensors are cut into slices of a block. Else they come that many at a time and uncut, as the
        compiler wants them; where fewer are left, some are halved so that it comes out even.
    few_operations: as in `small_size`.
    uncut: positions of tensors that come whole and alone: they fit a block, and their shape matters.

    Yields (positions, pieces by list). Small tensors come several at a time, large ones as flat views of a slice, empty
    ones not at all. A tensor that is not contiguous comes whole and alone. The pieces are views: writing to them writes to
    the tensors.
    """
    device = lists[0][0].device if lists[0] else torch.device("cpu")  # of empty lists nothing will come
    size, small = block_size(device), small_size(device, few_operations, compiles=together > 0)
    chosen: list[int] = []  # small tensors that wait for others to share their block
    filled = 0
    waiting: list[Block] = []
    for position, tensors in enumerate(zip(*lists, strict=True)):
        numel = tensors[0].numel()
        if numel and position in uncut:
            yield [position], tuple([tensor] for tensor in tensors)
        elif 0 < numel <= small:
            # One call for many of them: the call costs microseconds, whatever the size.
            if filled + numel > size:
                yield chosen, tuple([tensors[index] for index in chosen] for tensors in lists)
                chosen, filled = [], 0
            chosen.append(position)
            filled += numel
        elif numel and not all(tensor.is_contiguous() for tensor in tensors):
            # It has no flat view, and a flat copy would not be written back.
            yield [position], tuple([tensor] for tensor in tensors)
        elif numel and together:
            waiting.append(([position], tuple([tensor.view(-1)] for tensor in tensors)))
        elif numel:
            # Flat views, cut at the same elements in every list: a shape does not matter to elementwise operations.
            for parts in zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True):
                yield [position], tuple([part] for part in parts)
    if chosen:
        yield chosen, tuple([tensors[index] for index in chosen] for tensors in lists)
    while waiting:
        whole, waiting = waiting[:together], waiting[together:]
        cut = list(whole)
        # A compiled formula takes a fixed number of tensors, and each other number would be compiled anew, in seconds.
        # Where too few are left, the largest is halved until there are enough.
        while len(cut) < together:
            largest = max(range(len(cut)), key=lambda index: cut[index][1][0][0].numel())
            own, pieces = cut[largest]
            half = pieces[0][0].numel() // 128 * 64  # whole vectors
            if half <= small:
                # Halves that count as small would not be compiled at all; so each comes whole, in a call of its own.
                yield from whole
                break
            cut[largest : largest + 1] = [
                (own, tuple([piece[where]] for (piece,) in pieces)) for where in (slice(half), slice(half, None))
            ]
        else:
            columns = zip(*(pieces for _, pieces in cut), strict=True)
            yield [position for own, _ in cut for position in own], tuple([p for (p,) in column] for column in columns)


def _operation(one: Call, each: Call, in_place: bool = False) -> Any:
    """A method of Ops: `one` does it to a tensor, `each` to a list of tensors. Its type stands where it is assigned."""

    def method(self: Ops, xs: list[Tensor], *ys: Operand, **settings: float) -> list[Tensor]:
        return self.run(one, each, in_place, xs, *ys, **settings)

    return method


# With a 0-d tensor `torch._foreach_add` takes the overload for Python numbers, and reads the tensor to get one. (Those of
# products and quotients do not.)


def _add_each(xs: list[Tensor], ys: Operand, **settings: float) -> Any:
    each = torch.ops.aten._foreach_add.Tensor if isinstance(ys, Tensor) else torch._foreach_add
    return each(xs, ys, **settings)


def _add_each_(xs: list[Tensor], ys: Operand, **settings: float) -> None:
    each_ = torch.ops.aten._foreach_add_.Tensor if isinstance(ys, Tensor) else torch._foreach_add_
    each_(xs, ys, **settings)


def _div_each_(xs: list[Tensor], ys: Operand) -> None:
    # By one number torch divides on GPUs as it multiplies by the inverse, which rounds twice; by a list of numbers it does not.
    torch._foreach_div_(xs, [ys] * len(xs) if isinstance(ys, (int, float)) else ys)


class Ops:
    """Elementwise operations on lists of tensors, for formulas that take them as first argument.

    This is the `xp` of the array API standard, for lists. The first operand is a list of tensors of one dtype and device,
    the second an Operand. A name with `_` writes to the first operand, one without makes new tensors, which are valid
    until the next block begins.

    How an operation is done is up to `run`. Here it is done tensor by tensor, as torch.compile wants to read it; a
    Workspace does it at once, in memory that is kept.
    """

    # A table and no methods, since each would be the same three lines; the types are what an editor shows. `add` is open,
    # since the type of a callable cannot name a keyword:  add(xs, ys, alpha=1.0).
    mul: ClassVar[Binary] = _operation(torch.mul, torch._foreach_mul)  # x·y
    mul_: ClassVar[Binary] = _operation(Tensor.mul_, torch._foreach_mul_, in_place=True)
    sub: ClassVar[Binary] = _operation(torch.sub, torch._foreach_sub)  # x − y
    sub_: ClassVar[Binary] = _operation(Tensor.sub_, torch._foreach_sub_, in_place=True)
    # x + alpha·y: one rounding or two, as the device does it; for alpha 1 or −1 it is one.
    add: ClassVar[Callable[..., list[Tensor]]] = _operation(torch.add, _add_each)
    add_: ClassVar[Callable[..., list[Tensor]]] = _operation(Tensor.add_, _add_each_, in_place=True)
    sign: ClassVar[Unary] = _operation(torch.sign, torch._foreach_sign)
    div_: ClassVar[Binary] = _operation(Tensor.div_, _div_each_, in_place=True)  # x/y
    abs: ClassVar[Unary] = _operation(torch.abs, torch._foreach_abs)
    pow: ClassVar[Binary] = _operation(torch.pow, torch._foreach_pow)  # x^y
    clamp_min: ClassVar[Binary] = _operation(torch.clamp_min, torch._foreach_clamp_min)  # max(x, y)
    clamp_min_: ClassVar[Binary] = _operation(Tensor.clamp_min_, torch._foreach_clamp_min_, in_place=True)  # max(x, y)
    clamp_max_: ClassVar[Binary] = _operation(Tensor.clamp_max_, torch._foreach_clamp_max_, in_place=True)  # min(x, y)
    copy_: ClassVar[Binary] = _operation(Tensor.copy_, torch._foreach_copy_, in_place=True)  # y, rounded to the nearest

    def copies(self, xs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """x in another dtype."""
        return [x.to(dtype, copy=True) for x in xs]

    def clear_(self, xs: list[Tensor]) -> None:
        """x ← 0."""
        for x in xs:
            # Zeros that the compiler takes for something made of x: plain ones it would write in a second loop over memory.
            x.copy_(torch.gt(x, torch.inf))

    def run(
        self, one: Call, each: Call, in_place: bool, xs: list[Tensor], *ys: Operand, **settings: float
    ) -> list[Tensor]:
        """Do an operation, tensor by tensor."""
        return [one(x, *(y[i] if isinstance(y, list) else y for y in ys), **settings) for i, x in enumerate(xs)]


class Workspace(Ops):
    """The operations of a block, done at once, with temporaries in memory that is kept.

    On a CPU, fresh memory costs more (page faults) than the work done in it. The n-th temporary of a block is the n-th
    buffer of its dtype and device, and `begin_block` starts again with the first: within a block no two temporaries meet.
    Each optimizer has its own workspace. Streams, threads and CUDA graphs may meet in a buffer only where they would
    already meet in the parameters that are written, so nothing is guarded here.
    compiles: whether formulas are fused where they can be (see `compile.way_of`).
    """

    def __init__(self, compiles: bool = False) -> None:
        self._compiles = compiles
        self._kept: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
        self._num_taken: dict[tuple[torch.device, torch.dtype], int] = {}
        self.ramps: dict[torch.device, Tensor] = {}  # of stochastic.py
        self.tables: dict[Any, Any] = {}  # of triton.py

    @property
    def compiles(self) -> bool:
        """Whether formulas are fused now."""
        # Under a dispatch mode (CommDebugMode, FlopCounterMode) torch would run them uncompiled, and never compile them again.
        return self._compiles and not is_in_dispatch_mode()

    def begin_block(self) -> None:
        """Nothing that was taken is needed any more."""
        # The buffers stay: what counts is how many of them this block has taken.
        self._num_taken.clear()

    def empty(self, numel: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A temporary of `numel` elements, flat, that holds anything; valid until the next block begins."""
        number = self._num_taken.get((device, dtype), 0)
        self._num_taken[device, dtype] = number + 1
        buffer = self._kept.get((number, device, dtype))
        if buffer is None or buffer.numel() < numel:
            with torch.inference_mode(False):  # or no other mode could ever write to it
                buffer = torch.empty(numel, device=device, dtype=dtype)
            # A tensor that is not contiguous comes whole, however large: that much is not kept. (Products lay the vectors of a
            # block side by side.)
            if numel <= _KEPT_BLOCKS * block_size(device):
                self._kept[number, device, dtype] = buffer
        return buffer[:numel]

    def copies(self, xs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """x in another dtype; of one large piece in kept memory."""
        if len(xs) > 1:  # as in `run`
            if xs[0].device.type == "cpu":
                return super().copies(xs, dtype)
            # One kernel for all of them, where a copy of each would start one for each.
            new = [torch.empty_like(x, dtype=dtype) for x in xs]
            torch._foreach_copy_(new, xs)
            return new
        (x,) = xs
        return [self.empty(x.numel(), x.device, dtype).view(x.shape).copy_(x)]

    def clear_(self, xs: list[Tensor]) -> None:
        """x ← 0."""
        torch._foreach_zero_(xs)

    def run(
        self, one: Call, each: Call, in_place: bool, xs: list[Tensor], *ys: Operand, **settings: float
    ) -> list[Tensor]:
        """Do an operation at once: on many small pieces as foreach does it, on one large piece in kept memory."""
        if in_place:
            # Nothing is allocated, so one large piece is no special case; and foreach takes a list of operands as it is.
            each(xs, *ys, **settings)
            return xs
        # Many small pieces: a view of kept memory for each would cost more than what foreach allocates.
        if len(xs) > 1:
            return list(each(xs, *ys, **settings))
        (x,) = xs
        single = [y[0] if isinstance(y, list) else y for y in ys]
        return [one(x, *single, **settings, out=self.empty(x.numel(), x.device, x.dtype).view(x.shape))]


class BufferPool:
    """Tensors like local parameters, by the parameter's position, kept from step to step.

    Memory that is allocated anew in every step costs more (page faults) than what is written to it.
    """

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}
        self._kinds: dict[int, tuple[Any, ...]] = {}

    def take(self, positions: Sequence[int], params: Sequence[Tensor]) -> list[Tensor]:
        """One for each of the local parameters at these positions; it holds what it held, or anything if it is new."""
        for position, param in zip(positions, params, strict=True):
            # Strides too: fused kernels take elements as they lie in memory. They are those of the parameter, since a new
            # tensor like one with gaps has none.
            kind = (param.shape, param.stride(), param.dtype, param.device)
            if self._kinds.get(position) != kind:
                self._kept[position], self._kinds[position] = torch.empty_like(param, requires_grad=False), kind
        return self.taken(positions)

    def taken(self, positions: Sequence[int]) -> list[Tensor]:
        """What was last taken for these positions."""
        return [self._kept[position] for position in positions]


class ZeroPool(BufferPool):
    """A BufferPool whose tensors are zero when they are taken: an optimizer that steps them leaves −lr·update there.

    They are cleared where the step is written, while a block is in the cache (`cleared` records it). What was not, as when
    a step has failed, is cleared when it is taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self._clean: dict[int, Tensor] = {}

    def take(self, positions: Sequence[int], params: Sequence[Tensor]) -> list[Tensor]:
        """Zeros in the shape of the local parameters at these positions, to be written to."""
        zeros = super().take(positions, params)
        clean = [self._clean.pop(position, None) for position in positions]
        if dirty := [zero for zero, known in zip(zeros, clean, strict=True) if zero is not known]:
            torch._foreach_zero_(dirty)
        return zeros

    def cleared(self, positions: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Record that `tensors` hold zeros; only those count that were taken for the parameters at these positions."""
        for position, tensor in zip(positions, tensors, strict=True):
            if self._kept.get(position) is tensor:
                self._clean[position] = tensor
