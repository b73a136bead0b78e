"""Done records above the watermark survive the way through a commit's metadata."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtasks_kafka.watermark import METADATA_LIMIT, Partition, owner_of, restored


@given(st.integers(0, 2**40), st.integers(0, 300), st.data())
def test_a_successor_delivers_what_is_open_and_nothing_else(
    start: int, delivered: int, data: st.DataObject
) -> None:
    partition = Partition(start)
    for offset in range(start, start + delivered):
        assert partition.deliver(offset) == 1
    offsets = st.sets(st.integers(start, start + max(0, delivered - 1)))
    done = data.draw(offsets) if delivered else set()
    for offset in done:
        partition.finish(offset)
    heir = restored(partition.watermark, partition.metadata("me"))
    again = [o for o in range(partition.watermark, start + delivered + 5) if heir.deliver(o)]
    undone = [o for o in range(start, start + delivered) if o not in done]
    assert again == undone + list(range(start + delivered, start + delivered + 5))
    assert all(heir.open[offset] == 2 for offset in undone)


def test_a_commit_names_its_owner() -> None:
    assert owner_of(Partition(7).metadata("me")) == "me"
    assert owner_of("") == owner_of("of another program") == ""
    assert restored(5, "of another program").position == 5


def test_metadata_never_outgrows_the_server() -> None:
    partition = Partition(0)
    for offset in range(0, 2_000_000, 100):
        partition.fetch_from(partition.expected, again=True)
        partition.deliver(offset)
    metadata = partition.metadata("x" * 12)
    assert 3000 < len(metadata) <= METADATA_LIMIT
    heir = restored(0, metadata)
    # What did not fit counts as never delivered: it runs again rather than not at all.
    assert heir.position in partition.open
    assert heir.open.keys() == {o for o in partition.open if o < heir.position}


def test_records_that_are_gone_do_not_hold_the_watermark() -> None:
    partition = Partition(10, {3: 1, 5: 1})
    partition.fetch_from(3, again=True)
    assert partition.deliver(5) == 2
    assert partition.watermark == 5
    partition.finish(5)
    assert partition.watermark == 10


def test_settled_means_that_the_group_knows() -> None:
    partition = Partition(0)
    partition.deliver(0)
    assert partition.holds(0)
    assert partition.deliver(0) is None
    partition.finish(0)
    assert not partition.holds(0)
    assert not partition.settled(0)
    partition.unconfirmed.clear()
    assert partition.settled(0)


@given(st.integers(0, 5), st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)))
def test_no_record_that_was_lost_on_its_way_is_counted_as_done(
    start: int, there: set[int], lost: set[int]
) -> None:
    """Whatever is lost once between driver and delivery, and whatever gaps the log has."""
    partition, delivered = Partition(start), []
    log = sorted(offset for offset in there if offset >= start)
    lost = set(lost)
    fetching = iter(log)
    while (offset := next(fetching, None)) is not None:
        if offset in lost:
            lost.discard(offset)
        elif partition.skips(offset):
            partition.fetch_from(partition.expected, again=True)
            fetching = iter([o for o in log if o >= partition.expected])
        elif partition.deliver(offset) is not None:
            delivered.append(offset)
    # What was lost last is not passed: a successor begins there, or fetching comes to it.
    missing = [offset for offset in log if offset not in delivered]
    assert delivered == [offset for offset in log if offset < partition.expected]
    assert all(offset >= partition.expected for offset in missing)
    for offset in delivered:
        partition.finish(offset)
    assert partition.watermark <= min(missing, default=10**9)


def test_a_gap_is_not_passed_before_it_was_looked_at_twice() -> None:
    partition = Partition(3)
    assert partition.deliver(3) == 1
    assert partition.skips(6)
    with pytest.raises(ValueError, match="offset 6 comes, and 4 has not"):
        partition.deliver(6)
    partition.fetch_from(4, again=True)
    assert partition.deliver(6) == 1
    assert partition.skips(8)


@given(st.data())
def test_a_record_that_was_moved_is_settled_once(data: st.DataObject) -> None:
    """Whatever comes first: its end, fetching that reaches the copy, or a purge."""
    old, new = Partition(0), Partition(0)
    for offset in range(3):
        old.deliver(offset)
    copies = {0: 5, 1: 6, 2: 8}
    for offset, copy in copies.items():
        old.move(offset, new, copy)
        assert old.moved[offset] == (new, copy)
    assert (old.in_flight, new.in_flight, old.watermark) == (0, 3, 3)
    delivered: list[int] = []
    steps = [("fetch", n) for n in range(12)] + [("end", copy) for copy in copies.values()]
    for what, offset in data.draw(st.permutations(steps)):
        if what == "end":
            assert new.holds(offset)
            assert new.finish(offset)
            assert not new.finish(offset)
            assert not new.holds(offset)
        elif data.draw(st.booleans()):
            new.drop(offset)
            new.fetch_from(new.next_fetch)
        else:
            while (at := new.expected) <= offset:
                if new.deliver(at) is not None:
                    delivered.append(at)
    assert not set(delivered) & set(copies.values())
    for offset in delivered:
        new.finish(offset)
    new.drop(12)
    assert (new.in_flight, new.watermark) == (0, 12)
    assert restored(new.watermark, new.metadata("me")).position == 12


@given(st.sets(st.integers(0, 60)), st.integers(0, 60), st.sets(st.integers(0, 60)))
def test_a_successor_delivers_no_copy_that_is_finished(
    copies: set[int], fetched: int, finished: set[int]
) -> None:
    """Nor one that was moved on, to yet another partition."""
    old, new, third = Partition(0), Partition(0), Partition(0)
    for offset, copy in enumerate(sorted(copies)):
        old.deliver(offset)
        old.move(offset, new, copy)
    for offset in range(fetched):
        new.deliver(offset)
    for offset in finished:
        new.finish(offset)
    moved_on = copies - finished
    for place, copy in enumerate(sorted(moved_on)):
        new.move(copy, third, 1000 + place)
    assert third.in_flight == len(moved_on)
    assert new.in_flight == len(new.open)
    again = [*new.open, *range(new.position, 65)]
    heir = restored(new.watermark, new.metadata("me"))
    delivered = [o for o in range(new.watermark, 65) if heir.deliver(o) is not None]
    assert delivered == [offset for offset in again if offset not in copies]
    assert (heir.in_flight, heir.position) == (len(delivered), 65)


def test_a_successor_delivers_copies_that_are_in_flight() -> None:
    """Their receiver may be dead."""
    old, new = Partition(0), Partition(0)
    old.deliver(0)
    old.move(0, new, 4)
    heir = restored(new.watermark, new.metadata("me"))
    assert [offset for offset in range(6) if heir.deliver(offset)] == [0, 1, 2, 3, 4, 5]


def test_the_copy_of_a_record_keeps_its_count() -> None:
    old, new = Partition(7, {3: 2}), Partition(0)
    old.fetch_from(3)
    assert old.deliver(3) == 3
    old.move(3, new, 0)
    assert new.deliver(0) is None
    assert new.open == {0: 3}
    heir = restored(0, "")  # its owner died before it committed
    assert heir.deliver(0, 3) == 4


@given(st.integers(0, 60), st.sets(st.integers(0, 39)), st.sets(st.integers(0, 39)))
def test_dropping_keeps_what_is_in_flight(end: int, done: set[int], again: set[int]) -> None:
    """Offsets 0 to 39 were delivered, some are done, and some of the rest wait to be fetched."""
    returning = dict.fromkeys(sorted(again - done), 1)
    partition = Partition(40, returning)
    in_flight = [offset for offset in range(40) if offset not in done | again]
    partition.open = dict(sorted({**partition.open, **dict.fromkeys(in_flight, 1)}.items()))
    dropped = partition.drop(end)
    assert dropped == sum(offset < end for offset in returning) + max(0, end - 40)
    assert partition.position == max(40, end)
    assert list(partition.open) == sorted(in_flight + [o for o in returning if o >= end])
    assert partition.drop(end) == 0
    partition.fetch_from(partition.next_fetch)
    heir = restored(partition.watermark, partition.metadata("me"))
    assert (heir.position, list(heir.open)) == (partition.position, list(partition.open))


def test_a_copy_that_nobody_needs_is_never_delivered() -> None:
    """Neither here nor to a successor: its original was settled while it was written."""
    new = Partition(0)
    new.discard(2)
    assert not new.settled(2)
    heir = restored(new.watermark, new.metadata("me"))
    for partition in (new, heir):
        assert partition.in_flight == 0
        assert [offset for offset in range(4) if partition.deliver(offset)] == [0, 1, 3]


def test_a_gap_that_the_driver_passed_over_is_empty() -> None:
    """It read from 3 to 9, and only 4 and 7 are records: the others are marks of transactions."""
    partition = Partition(3)
    partition.follow(3, [4, 7], 9)
    for offset in (4, 7):
        assert not partition.skips(offset)
        assert partition.deliver(offset) == 1
    partition.follow(9, [], 10)  # a mark only
    partition.follow(10, [11], 12)
    assert partition.deliver(11) == 1
    assert (partition.watermark, partition.position) == (4, 12)


def test_a_gap_of_lost_records_is_not_taken_for_an_empty_one() -> None:
    """The driver is at 9 now, and nobody has noted what it returned before that."""
    partition = Partition(3)
    partition.follow(3, [3], 4)
    assert partition.deliver(3) == 1
    partition.follow(9, [9], 10)
    assert partition.skips(9)
    partition.fetch_from(4, again=True)
    partition.follow(4, [5, 9], 10)
    assert [partition.deliver(5), partition.deliver(9)] == [1, 1]


def test_a_commit_may_count_what_is_about_to_be_finished() -> None:
    """A transaction commits it, and until that is known it is in flight."""
    partition = Partition(0)
    for offset in range(4):
        partition.deliver(offset)
    at, metadata = partition.commit("me", {0, 2})
    heir = restored(at, metadata)
    assert (at, heir.position, heir.open) == (1, 4, {1: 1, 3: 1})
    assert partition.in_flight == 4
    partition.finish(0)
    partition.finish(2)
    assert partition.commit("me") == (at, metadata)
