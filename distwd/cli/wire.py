"""Wire: counts the collectives of a block of code, from below whatever starts them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from .._torch import DispatchMode

_LIBRARIES = ("c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd")
_NO_TALK = ("wait", "_wrap_tensor")


class Wire(DispatchMode):
    """Records every collective of the block, whoever starts it and through whatever API: `with Wire() as wire`.

    calls: the names of the collectives, in order.
    num_elements: elements of all tensors that they were given.
    num_bytes: bytes of them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[str] = []
        self.num_elements = 0
        self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # A DTensor first becomes local work and collectives, and those are what counts.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        library, name = func._schema.name.split("::")
        if library in _LIBRARIES and not any(part in name for part in _NO_TALK):
            self.calls.append(name)
            for tensor in tensors_in(args):
                self.num_elements += tensor.numel()
                self.num_bytes += tensor.numel() * tensor.element_size()
        return func(*args, **(kwargs or {}))


def tensors_in(tree: object) -> Iterator[Tensor]:
    """The tensors in nested lists and tuples."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for leaf in tree:
            yield from tensors_in(leaf)
