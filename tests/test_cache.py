"""The prefix cache by itself: what is shared, and what has to go when the memory is full."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY

from usbrec.llm.cache import PrefixCache, token_bytes
from usbrec.options import UserError


def cache_of(capacity: int) -> PrefixCache:
    size = capacity * token_bytes(TINY, torch.float32)
    return PrefixCache(TINY, torch.float32, torch.device("cpu"), size)


def call(cache: PrefixCache, *rows: list[int]) -> list[int]:
    """Insert rows in a new call, and return how many tokens of each were cached before."""
    cache.clock += 1
    return [cache.insert(None, row)[1] for row in rows]


def test_a_token_takes_its_keys_and_its_values_of_all_layers() -> None:
    config = replace(TINY, num_hidden_layers=5, num_key_value_heads=3, head_dim=4)
    assert token_bytes(config, torch.bfloat16) == 2 * 5 * 3 * 4 * 2


def test_rows_share_the_slots_of_their_common_beginning_and_no_others() -> None:
    cache = cache_of(20)
    first, none = cache.insert(None, [1, 2, 3, 4])
    second, shared = cache.insert(None, [1, 2, 5])
    again, whole = cache.insert(None, [1, 2, 3, 4])
    assert (none, shared, whole) == (0, 2, 4) and torch.equal(again, first)
    assert torch.equal(second[:2], first[:2]) and second[2] not in first
    assert len(cache.free) == 20 - 5
    assert cache.insert("one", [1, 2, 3])[1] == 0  # another adapter has a tree of its own


def test_the_least_recently_used_row_goes_and_no_more_than_is_needed() -> None:
    """Of 9 slots 8 are taken. A row of four needs three more, which are those of [2, 21, 22]."""
    cache = cache_of(9)
    for row in ([1, 11, 12], [2, 21, 22], [3, 31], [1, 11, 12]):
        call(cache, row)
    assert call(cache, [4, 41, 42, 43]) == [0]
    assert call(cache, [1, 11, 12], [3, 31], [4, 41, 42, 43]) == [3, 2, 4]
    assert call(cache, [2]) == [0]


def test_a_row_is_evicted_from_its_end() -> None:
    """[1, 2] is the beginning of two rows: it stays while the older one's end goes."""
    cache = cache_of(6)
    call(cache, [1, 2, 3, 4])
    call(cache, [1, 2, 5])
    assert call(cache, [7, 8]) == [0]
    assert call(cache, [1, 2, 5], [7, 8]) == [3, 2]


def test_no_token_of_the_present_call_is_evicted() -> None:
    cache = cache_of(5)
    call(cache, [1, 2])
    with pytest.raises(UserError, match="the memory holds 5 tokens"):
        call(cache, [1, 2], [3, 4, 5, 6])
    assert call(cache, [1, 2]) == [2]
    with pytest.raises(UserError, match="the memory holds 5 tokens"):
        call(cache, [3, 4, 5], [6, 7, 8])
