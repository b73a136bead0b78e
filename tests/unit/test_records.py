"""The order of records against an oracle that knows only the words of the design."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtasks_core import Status, Task
from qtasks_core.records import FINAL, FIRST_BEGUN, FIRST_FINAL, RANK, judge, order_of

# In the order of the design: new, scheduled, process, retry, success, error, cancel.
IN_ORDER: list[Status] = ["new", "scheduled", "process", "retry", "success", "error", "cancel"]
LAST_THREE = IN_ORDER[4:]

records = st.builds(
    Task,
    uuid=st.just("u"),
    task_name=st.just("n"),
    status=st.sampled_from(IN_ORDER),
    attempt=st.integers(1, 2**40),
    execution=st.sampled_from(["", "x", "y"]),
    worker=st.none() | st.text(max_size=3),
)


def oracle(new: Task, stored: Task | None) -> str:
    """Say it as the design does, by pairs and names, without a single integer."""
    if stored is None:
        return "accept"
    there = (stored.attempt, IN_ORDER.index(stored.status))
    comes = (new.attempt, IN_ORDER.index(new.status))
    if comes == there and new.execution == stored.execution:
        return "repeat"
    if stored.status in LAST_THREE or new.status in IN_ORDER[:2]:
        return "refuse"
    return "refuse" if comes < there else "accept"


def record(status: Status, attempt: int = 1, execution: str = "") -> Task:
    return Task(uuid="u", task_name="n", status=status, attempt=attempt, execution=execution)


def test_every_pair() -> None:
    states = [record(*state) for state in product(IN_ORDER, (1, 2, 3), ("", "x", "y"))]
    for new, stored in product(states, [None, *states]):
        assert judge(new, stored) == oracle(new, stored), (new, stored)


@given(new=records, stored=st.none() | records)
def test_any_pair(new: Task, stored: Task | None) -> None:
    assert judge(new, stored) == oracle(new, stored)


@given(st.lists(records, max_size=12))
def test_any_history(saves: list[Task]) -> None:
    """The order never goes back, nothing follows a final record, every repeat of it is done."""
    stored: Task | None = None
    for new in saves:
        judgement = judge(new, stored)
        if stored is not None and stored.status in FINAL:
            assert judgement != "accept"
        if judgement == "accept":
            assert stored is None or order_of(new) >= order_of(stored)
            stored = new
        assert stored is not None
        assert judge(stored, stored) == "repeat"


@given(st.lists(records, max_size=12))
def test_first_record_replaces_none(saves: list[Task]) -> None:
    stored: Task | None = None
    for new in saves:
        if stored is not None and new.status in ("new", "scheduled"):
            assert judge(new, stored) != "accept"
        stored = new if judge(new, stored) == "accept" else stored


@given(st.lists(records, max_size=8), st.integers(0, 7))
def test_save_of_unknown_outcome_may_be_repeated(saves: list[Task], which: int) -> None:
    """Saving twice in a row is as saving once."""
    once: Task | None = None
    twice: Task | None = None
    for at, new in enumerate(saves):
        once = new if judge(new, once) == "accept" else once
        for _ in range(2 if at == which else 1):
            twice = new if judge(new, twice) == "accept" else twice
    assert once == twice


def test_the_integer_that_databases_compare() -> None:
    for (a, i), (b, j) in product(product((1, 2, 9), range(7)), repeat=2):
        one, two = record(IN_ORDER[i], a), record(IN_ORDER[j], b)
        assert (order_of(one) < order_of(two)) == ((a, i) < (b, j))
    for status in IN_ORDER:
        assert (order_of(record(status, 5)) % 8 >= FIRST_FINAL) == (status in LAST_THREE)
        assert (order_of(record(status, 5)) % 8 < FIRST_BEGUN) == (status in IN_ORDER[:2])


def test_every_status_has_a_rank() -> None:
    assert list(RANK) == IN_ORDER == list(get_args(Status))
    assert sorted(FINAL) == sorted(LAST_THREE)


@pytest.mark.parametrize("final", LAST_THREE)
def test_final_is_final_whatever_the_attempt(final: Status) -> None:
    for status in IN_ORDER:
        assert judge(record(status, attempt=9, execution="y"), record(final)) == "refuse"
