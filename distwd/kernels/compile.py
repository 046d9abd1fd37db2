"""Fused formulas: a tensor is read and written once, where else every operation reads and writes it.

Through torch.compile large tensors, and on GPUs, through kernels of Triton, all (see triton.py). What is compiled is the very
code that else runs a block at a time, with other operations as its first argument: each formula is in one place.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
from collections.abc import Callable, Hashable
from typing import Any

import torch

from .._torch import shape_config
from .blocks import Ops, Workspace

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


# Devices where fused formulas are kernels of Triton.
_TRITON_ON = ("cuda",)


def way_of(workspace: Workspace, device: torch.device) -> str | None:
    """How formulas are fused on a device now: by "triton", or by torch's "compiler"; None: not at all."""
    if not workspace.compiles:
        return None
    if device.type in _TRITON_ON:
        return None if why_no_triton(device.type) else "triton"
    return "compiler"


@functools.cache
def why_no_triton(device_type: str) -> str:
    """Why Triton does not work here; "" where it does. Tried on one sum."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    # A GPU that is not there is one of fake tensors, for which nothing is ever started.
    if device_type != "cuda" or torch.cuda.is_available():
        from . import sums, triton

        try:
            one = [torch.ones(8, device=device_type)]
            triton.add_up(Workspace(), (sums.ABS,), [one])
        except (
            RuntimeError,
            ImportError,
            OSError,
            subprocess.SubprocessError,
        ) as error:  # as where there is no C compiler
            return f"Triton does not work: {str(error).strip().splitlines()[0]}"
    return ""


@functools.cache
def check_compiler(device_type: str) -> str:
    """Raise ValueError if torch.compile does not work here; tried on a formula of one line.

    On GPUs, where the same results come without it: returns why Triton does not work, or "".
    """
    if device_type in _TRITON_ON:
        return why_no_triton(device_type)
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
    return ""
