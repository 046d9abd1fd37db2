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


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    """`worlds.run(ranks, fn, *args)` runs `fn` in a world of that many ranks and returns the results."""
    opened = Worlds()
    yield opened
    opened.close()
