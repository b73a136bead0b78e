"""A bounded memory of what was done."""

from __future__ import annotations

from copy import copy

from hypothesis import given
from hypothesis import strategies as st

from qtasks_core import Ack, Delivery, Release, Retry, TaskMessage
from qtasks_core.receivers import Recent, repeat_key


@given(st.lists(st.integers(0, 30), max_size=100), st.integers(1, 10))
def test_remembers_the_newest(keys: list[int], limit: int) -> None:
    """All of the newest `limit` keys, none but the newest 2 * `limit`; adding makes a key new."""
    recent = Recent(limit)
    newest: list[int] = []
    for key in keys:
        recent.add(key)
        if key in newest:
            newest.remove(key)
        newest.append(key)
        known = {known for known in range(31) if known in recent}
        assert set(newest[-limit:]) <= known <= set(newest[-2 * limit :])


def test_what_is_discarded_is_forgotten() -> None:
    recent = Recent()
    assert not recent
    recent.add("a")
    recent.discard("b")
    assert recent
    recent.discard("a")
    assert "a" not in recent
    assert not recent


def test_unknown_key() -> None:
    assert ("stream", b"1-0") not in Recent()


def test_limit() -> None:
    recent = Recent()
    for key in range(40_001):
        recent.add(key)
    assert 0 not in recent
    assert 20_001 in recent
    assert 40_000 in recent


def test_a_repeat_is_told_from_what_differs() -> None:
    first, second = (TaskMessage(uuid="u", task_name="t", attempt=n) for n in (1, 2))
    delivery = Delivery(first, "q", ("stream", 1), 1)
    for settlement in (Ack(delivery), Release(delivery), Retry(delivery, first)):
        assert repeat_key(settlement) == repeat_key(copy(settlement))
    assert repeat_key(Ack(delivery)) != repeat_key(Release(delivery))
    assert repeat_key(Ack(delivery)) != repeat_key(Retry(delivery, first))
    assert repeat_key(Retry(delivery, first)) != repeat_key(Retry(delivery, second))
