"""Pages: each in one state, shared by equal beginnings, given away in the order of disuse."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pensar.infer.pages import PagePool
from pensar.infer.step import PAGE


def text(*numbers: int) -> np.ndarray:
    """A page of tokens for each number."""
    return np.concatenate([np.full(PAGE, number, np.int64) for number in numbers])


def published(pool: PagePool, *numbers: int) -> list[int]:
    """Pages that hold a text and have one reader."""
    pages = pool.take(len(numbers))
    for page, key in zip(pages, pool.keys(pool.root(), text(*numbers)), strict=True):
        pool.publish(page, key)
    return pages


def test_a_known_beginning_is_found_and_only_that() -> None:
    pool = PagePool(10)
    pages = published(pool, 1, 2, 3)
    assert pool.match(pool.keys(pool.root(), text(1, 2, 9))) == pages[:2]
    assert pool.match(pool.keys(pool.root(), text(2, 3))) == []
    assert pool.match(pool.keys(pool.root("adapter"), text(1, 2))) == []
    assert pool.readers[pages].tolist() == [2, 2, 1]
    assert len(pool.keys(pool.root(), text(1, 2)[:-1])) == 1, "only full pages have keys"


def test_what_nobody_reads_is_kept_until_room_is_needed_and_the_longest_unread_goes_first() -> None:
    pool = PagePool(5)
    first, second = published(pool, 1, 2), published(pool, 7)
    pool.release(first)
    pool.release(second)
    assert (pool.available, pool.num_kept, pool.num_held) == (4, 3, 0)
    assert len(pool.take(2)) == 2  # the one free page, and the end of the text that was released first
    assert pool.match(pool.keys(pool.root(), text(1, 2))) == first[:1]
    assert pool.match(pool.keys(pool.root(), text(7))) == second
    with pytest.raises(IndexError, match="1 pages asked for, 0 available"):
        pool.take(1)
    pool.check()


def test_of_two_pages_with_the_same_content_one_is_shared_and_the_other_freed() -> None:
    pool = PagePool(5)
    first, twin = published(pool, 1), published(pool, 1)
    pool.release(twin)
    assert pool.num_kept == 0
    assert pool.match(pool.keys(pool.root(), text(1))) == first
    pool.check()


def test_forgotten_pages_are_free_once_nobody_reads_them() -> None:
    pool = PagePool(6)
    read, unread = published(pool, 1), published(pool, 2)
    pool.release(unread)
    pool.forget([*read, *unread])
    pool.check()
    assert pool.match(pool.keys(pool.root(), text(1))) == []
    pool.release(read)
    published(pool, 3)
    pool.forget_all()
    pool.check()
    assert (pool.num_kept, pool.num_held) == (0, 1)


def test_pools_do_not_share_keys() -> None:
    """Whoever could compute the keys could look for a text that collides with another's."""
    assert PagePool(2).root() != PagePool(2).root()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(1, 3)), max_size=60))
def test_no_page_is_lost_or_in_two_hands_whatever_happens(moves: list[tuple[int, int, int]]) -> None:
    pool = PagePool(8)
    held: list[list[int]] = []
    for kind, number, count in moves:
        if kind == 0 and count <= pool.available:
            held.append(pool.take(count))
        elif kind == 1 and held:
            pool.release(held.pop(number % len(held)))
        elif kind == 2 and held:
            pages = held[number % len(held)]
            for page, key in zip(
                pages, pool.keys(pool.root(), text(*range(number, number + 9))), strict=False
            ):
                pool.publish(page, key)
        elif kind == 3 and (
            pages := pool.match(pool.keys(pool.root(), text(*range(number, number + count))))
        ):
            held.append(pages)
        elif kind == 4:
            pool.forget(range(1, number + 1)) if count < 3 else pool.forget_all()
        pool.check()
        counts = np.bincount([page for pages in held for page in pages], minlength=pool.num_pages)
        assert (counts == pool.readers).all()
