"""Triton's compiler for a GPU that is not there: what becomes of the kernels on sm_90. Prints JSON, by kernel.

python -m tests.triton_ahead
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import torch

from distwd.kernels import triton as fused
from distwd.kernels.formulas import TermKind, Write
from distwd.kernels.sums import ABS, COUNT, MAX, MIN, SQUARE, SUM, Vectors

F32, F64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
UPDATE = Write((), True, -1.0, us=1, spends_us=True)
MASKED = Write((TermKind(2.0, True),), True, -1.0, us=1, mask_us=1, mask_sign=-1, spends_us=True)
SHRINKS = Write((), False, -1.0, us=1, spends_us=True, proximal=(TermKind(2.0), TermKind(3.0)))
PULLED = (
    TermKind(1.0, toward=0.25),
    TermKind(2.0, cap=0.5, anchors=2),
    TermKind(3.0, True, inclusive=True, masked_by=3),
)
PULLS = Write(PULLED, False, None, us=1, mask_us=1)
PRODUCTS = Vectors(Write((TermKind(2.0), TermKind(1.0, True)), False, 1.0, us=1, mask_us=1), None, (2, 3))
KERNELS = {
    "update": (fused._list_write, fused.Frame((F32, F32), (False,)), UPDATE),
    "update by tensor": (fused._list_write, fused.Frame((F32, F32), (True,)), UPDATE),
    "update by matrix": (fused._list_write, fused.Frame((F32, F32), (True,), True), UPDATE),
    "update float64": (fused._list_write, fused.Frame((F64, F64), (False,)), UPDATE),
    "update bf16": (fused._list_write, fused.Frame((BF16, BF16), (False,)), UPDATE),
    "update bf16 at random": (fused._list_write, fused.Frame((BF16, BF16), (False,), False, True), UPDATE),
    "update fp16 at random": (fused._list_write, fused.Frame((FP16, FP16), (False,), False, True), UPDATE),
    "masked": (fused._list_write, fused.Frame((F32, F32), (False, False)), MASKED),
    "proximal": (fused._list_write, fused.Frame((F32, F32), (False,) * 4), SHRINKS),
    "pulls": (fused._list_write, fused.Frame((F32, F32, BF16, F32), (False, True, False, True)), PULLS),
    "mean": (fused._list_sums, fused.Frame((F32,)), (ABS,)),
    "mean of a difference": (fused._list_sums, fused.Frame((F32, F32)), (ABS,)),
    "variance": (fused._list_sums, fused.Frame((F32,)), (SUM, SQUARE)),
    "all": (fused._list_sums, fused.Frame((F32,)), (SUM, ABS, SQUARE, COUNT, MAX, MIN)),
    "products": (fused._list_sums, fused.Frame((F32, F32)), PRODUCTS),
}
TYPES = {"rows": "*i64", "chunks": "*i32", "keys": "*i64", "key": "i32", "sums": "*fp64", "num_chunks": "i32"}


def compiled(body, frame, form) -> dict[str, object]:
    """Registers, bytes of stack, loads and stores by width; and how often a product is contracted with a sum, or something is
    approximate or flushed to zero."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = fused.kernel_of(body, frame, form)
    number = "*fp64" if frame.dtypes[0] == F64 else "*fp32"
    signature = {name: "constexpr" if name.isupper() else TYPES.get(name, number) for name in kernel.arg_names}
    num_sums = 0 if isinstance(form, Write) else len(form.statistics if isinstance(form, Vectors) else form)
    sizes = {"CHUNK": fused._CHUNK, "BLOCK": fused.block_of(num_sums)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=sizes)
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=fused.WAYS)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / one, flag, file.name], capture_output=True, text=True, check=True).stdout
            for one, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "accesses": Counter(re.findall(r"\b(?:LDG|STG)\.E(?:\.\w+)*|\bLDL\b|\bSTL\b", code)),
        "contracted": len(re.findall(r"\bfma\.", found.asm["ptx"])),
        "approximate": len(re.findall(r"\.approx\b|\.full\b|\.ftz\b", found.asm["ptx"])),
    }


if __name__ == "__main__":
    print(json.dumps({name: compiled(*kernel) for name, kernel in KERNELS.items()}))
