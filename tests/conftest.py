"""Fixtures every test module shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.world import Worlds


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small CPU operations gain nothing from threads and lose much on a busy machine."""
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test that has "Muon" as an argument where torch has none."""
    arguments = getattr(item, "callspec", None)
    if arguments is not None and "Muon" in [v for v in arguments.params.values() if isinstance(v, str)]:
        if not hasattr(torch.optim, "Muon"):
            pytest.skip("needs torch 2.9: torch.optim.Muon")


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    """`worlds.run(ranks, fn, *args)` runs `fn` in a world of that many ranks and returns the results."""
    opened = Worlds()
    yield opened
    opened.close()
