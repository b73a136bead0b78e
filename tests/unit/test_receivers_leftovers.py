"""What a cancelled `receive` leaves behind."""

from hypothesis import given
from hypothesis import strategies as some

from qtasks_core import Delivery, Raw
from qtasks_core.receivers import Leftovers


def delivery(queue: str) -> Delivery:
    return Delivery(Raw(b"", ""), queue, None)


@given(
    some.lists(some.sampled_from("abc")),
    some.dictionaries(some.sampled_from("abcd"), some.integers(-1, 5)),
    some.integers(-1, 12),
)
def test_a_call_takes_what_it_wants_and_leaves_the_rest(
    queues: list[str], wanted: dict[str, int], limit: int
) -> None:
    there = [delivery(queue) for queue in queues]
    leftovers = Leftovers()
    leftovers.add(there)
    taken = leftovers.take(wanted, limit)
    assert len(taken) <= max(limit, 0)
    for queue in "abc":
        most = max(wanted.get(queue, 0), 0)
        count = sum(each.queue == queue for each in taken)
        assert count <= most
        if len(taken) < limit:
            assert count == min(most, queues.count(queue))
    assert taken == [each for each in there if each in taken]
    assert leftovers.take_all() == [each for each in there if each not in taken]


def test_a_delivery_whose_lease_has_expired_is_dropped() -> None:
    there = [delivery(queue) for queue in "abab"]
    leftovers = Leftovers()
    leftovers.add(there[:2], until=10.0)
    leftovers.add(there[2:], until=20.0)
    assert leftovers.take({"a": 9}, 9, now=10.0) == [there[2]]
    assert leftovers.take_all() == [there[3]]


def test_what_was_taken_is_not_left() -> None:
    leftovers = Leftovers()
    assert not leftovers
    leftovers.add([delivery("a")])
    assert leftovers
    assert leftovers.take({"a": 1}, 1)
    assert not leftovers
    assert leftovers.take_all() == []
