"""What a test needs that not every environment has: a release of torch, or a package that goes with it."""

from __future__ import annotations

import importlib
import re
import types
from pathlib import Path

import pytest
import torch

PINS = Path(__file__).resolve().parent.parent / "launch" / "constraints.txt"


def release(version: str) -> tuple[int, ...]:
    """(2, 9) of "2.9.1+cpu"."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


TORCH = release(torch.__version__)

UNEVEN_OVER_TP = "FSDP2 over tensors that tensor parallelism has cut unevenly"


class OldTorch(Exception):
    """Raised on a rank where torch lacks what a test needs: the test is skipped for that reason, if all ranks raise it."""


def needs_torch(since: str, why: str) -> pytest.MarkDecorator:
    """Skips a test on releases of torch that cannot run it, whatever distwd does.

    since: the oldest release that was seen to run it.
    why: what the older ones lack.
    """
    return pytest.mark.skipif(release(since) > TORCH, reason=f"needs torch {since}: {why}")


def require_torch(since: str, why: str) -> None:
    """On the ranks of a test, what `needs_torch` does for all of it."""
    if release(since) > TORCH:
        raise OldTorch(f"needs torch {since}: {why}")


def package(name: str) -> types.ModuleType:
    """A package that tests need beside torch; where it does not go with this release of torch the test is skipped.

    With the release that launch/constraints.txt pins, and CI runs, all packages go: there a missing one is an error.
    """
    pinned = re.search(r"^torch==(.*)$", PINS.read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    if release(pinned[1]) == TORCH:
        return importlib.import_module(name)
    found: types.ModuleType = pytest.importorskip(name, exc_type=ImportError)
    return found
