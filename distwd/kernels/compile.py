"""Formulas through torch.compile: a large tensor is read and written once, where else every operation reads and writes it.

What is compiled is the very code that else runs a block at a time, with `TRACED` for its operations: each formula is in one
place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch

from .._torch import shape_config
from .blocks import Ops

# Large tensors that one compiled call takes. Calling costs some 0.1 ms, and compiling a second or so for each of them.
TOGETHER = 8


# The operations of a formula that is compiled: plain ones on each tensor. What lies between them is the compiler's business.
TRACED = Ops()


@functools.cache
def compiled(formula: Callable[..., Any], *form: Hashable) -> Callable[..., Any]:
    """`formula(*form, *tensors)` as a function of the tensors, for any number of elements.

    It is compiled when first called, in seconds, and kept for the process, as torch itself keeps it.
    """

    def run(*tensors: Any) -> Any:
        return formula(*form, *tensors)

    # torch keeps what it has compiled by code object, a few versions of each: every form gets one of its own.
    run.__code__ = run.__code__.replace(co_name=f"distwd_{formula.__name__}")
    # In vectors of 512 bits a step with a mask takes a fifteenth longer; sums, which wait for memory, take as long.
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    quick = torch.compile(run, dynamic=True, options={"cpp.simdlen": 256} if has_avx512 else None)

    def call(*tensors: Any) -> Any:
        # Or torch would take lengths that are equal now for one number, and compile anew for others, until it gives up.
        usual, shape_config.use_duck_shape = shape_config.use_duck_shape, False
        try:
            return quick(*tensors)
        finally:
            shape_config.use_duck_shape = usual

    return call


@functools.cache
def check_compiler(device_type: str) -> None:
    """Raise ValueError if torch.compile does not work here; tried on a formula of one line."""
    try:
        # torch.compile is lazy: it looks for a compiler only when what it made is first called.
        compiled(torch.neg)(torch.ones(8, device=device_type))
    except RuntimeError as error:  # torch's own family of errors for this; a missing compiler is one of them
        reason = str(error).strip().split("\n")[0]
        needs = "a C++ compiler (gcc or clang)" if device_type == "cpu" else "Triton"
        raise ValueError(
            f"compile=True: torch.compile does not work here, it needs {needs} on {device_type}: {reason}; "
            "install it on every machine, or leave compile out"
        ) from error
