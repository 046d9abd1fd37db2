"""The harness itself: results by rank, errors with the rank, and no hang outlives its timeout."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from tests.releases import OldTorch
from tests.world import RankError


def total_of_ranks() -> float:
    number = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(number)
    return number.item()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("not today")


def fail_before_a_collective(rank: int) -> None:
    fail_on(rank)
    dist.barrier()


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def lack_on(ranks: list[int]) -> None:
    if dist.get_rank() in ranks:
        raise OldTorch("needs torch 99")


def has_group() -> bool:
    return dist.is_initialized()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_world_is_exactly_its_ranks(worlds, ranks):
    assert worlds.run(ranks, total_of_ranks) == [sum(range(ranks))] * ranks


def test_a_world_of_none_has_no_group(worlds):
    assert worlds.run(0, has_group) == [False]


def test_an_error_names_its_rank_and_the_world_starts_again(worlds):
    with pytest.raises(RankError, match=r"rank 1 raised(.|\n)*not today"):
        worlds.run(2, fail_on, 1)
    assert worlds.run(2, total_of_ranks) == [1, 1]


def test_ranks_stranded_by_an_error_do_not_hang_the_test(worlds):
    with pytest.raises(RankError, match=r"not today(.|\n)*ranks \[0\] never came back"):
        worlds.run(2, fail_before_a_collective, 1)


def test_a_rank_that_sleeps_is_ended(worlds):
    with pytest.raises(TimeoutError, match=r"ranks \[1\] never came back"):
        worlds.run(2, sleep_on, 1, timeout=2)
    assert worlds.run(2, total_of_ranks) == [1, 1]


def test_what_all_ranks_lack_skips_the_test_and_what_one_lacks_fails_it(worlds):
    with pytest.raises(pytest.skip.Exception, match="needs torch 99"):
        worlds.run(2, lack_on, [0, 1])
    assert worlds.run(2, total_of_ranks) == [1, 1]
    with pytest.raises(RankError, match=r"rank 1 raised(.|\n)*needs torch 99"):
        worlds.run(2, lack_on, [1])
