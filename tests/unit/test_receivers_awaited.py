"""What an inbox waits for, and what has arrived."""

from qtasks_core import Task
from qtasks_core.receivers import Awaited


def final(uuid: str) -> Task:
    return Task(uuid=uuid, task_name="t", status="success")


def test_a_final_record_that_is_waited_for_arrives_once() -> None:
    awaited = Awaited()
    awaited.expect(["a"])
    assert awaited.arrive([None, Task(uuid="a", task_name="t", status="process")]) == []
    assert awaited.arrive([final("a"), final("a"), final("b")]) == []
    assert [task.uuid for task in awaited.take()] == ["a"]
    assert awaited.take() == []
    assert not awaited.uuids


def test_what_is_watched_is_told_from_what_is_expected() -> None:
    awaited = Awaited()
    awaited.expect(["a", "b"])
    assert awaited.watch(["b", "c", "c"]) == ["b", "c"]
    assert awaited.watch(["b"]) == []
    assert (awaited.expected, awaited.watched) == ({"a"}, {"b", "c"})
    assert awaited.arrive([final("a"), final("b")]) == ["b"]
    assert (awaited.expected, awaited.watched, awaited.to_unwatch) == (set(), {"c"}, set())


def test_the_server_is_to_unwatch_what_is_forgotten_until_it_is_watched_again() -> None:
    awaited = Awaited()
    awaited.expect(["a"])
    awaited.watch(["b", "c"])
    awaited.forget(["a", "b", "c", "d"])
    assert (awaited.uuids, awaited.to_unwatch) == (set(), {"b", "c"})
    assert awaited.watch(["b"]) == ["b"]
    assert awaited.to_unwatch == {"c"}
    assert awaited.arrive([final("a"), final("c")]) == []
    assert awaited.take() == []
