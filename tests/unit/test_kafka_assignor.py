"""Partitions are dealt evenly, stay where they were, and busy ones stay first."""

from hypothesis import given
from hypothesis import strategies as st

from qtasks_kafka.assignor import Holdings, deal, keep_busy

NUMBERS = list(range(8))


def held(numbers: list[int]) -> list[tuple[str, int]]:
    return [("t", number) for number in numbers]


@given(st.data(), st.integers(1, 12))
def test_all_is_dealt_evenly(data: st.DataObject, members: int) -> None:
    names = [f"m{n}" for n in range(members)]
    some = st.lists(st.sampled_from(NUMBERS), unique=True)
    holdings = {n: Holdings(held(data.draw(some)), held(data.draw(some))) for n in names}
    owners = deal("t", NUMBERS, names, holdings, dict.fromkeys(names, 0))
    counts = [list(owners.values()).count(name) for name in names]
    assert sorted(owners) == NUMBERS
    assert max(counts) - min(counts) <= 1


def test_the_busy_ones_stay_when_another_comes() -> None:
    holdings = {"old": Holdings(held([1, 3, 5, 7]), held([0, 2, 4, 6])), "new": Holdings()}
    owners = deal("t", NUMBERS, ["new", "old"], holdings, {"old": 0, "new": 0})
    assert [n for n, name in owners.items() if name == "old"] == [1, 3, 5, 7]


@given(st.data(), st.integers(1, 6))
def test_a_busy_partition_never_moves(data: st.DataObject, members: int) -> None:
    """And each member that has busy ones keeps one of them for good, to move tasks to."""
    names = [f"m{n}" for n in range(members)]
    who = st.sampled_from([*names, None])
    has = {number: data.draw(who) for number in NUMBERS}
    busy = {number for number in NUMBERS if has[number] and data.draw(st.booleans())}
    holdings = {
        name: Holdings(
            held([n for n in NUMBERS if has[n] == name and n in busy]),
            held([n for n in NUMBERS if has[n] == name and n not in busy]),
            data.draw(st.booleans()),
        )
        for name in names
    }
    fair = deal("t", NUMBERS, names, holdings, dict.fromkeys(names, 0))
    owners = keep_busy("t", fair, names, holdings)
    assert all(owners[number] == has[number] for number in busy)
    assert owners.keys() == fair.keys()
    for name in {has[number] for number in busy}:
        assert any(owners[n] == fair[n] == name for n in busy)


def test_who_wants_nothing_keeps_what_is_in_flight() -> None:
    holdings = {"a": Holdings(held([1]), held([0, 2]), wanting=False), "b": Holdings()}
    owners = deal("t", NUMBERS, ["a", "b"], holdings, {"a": 0, "b": 0})
    assert owners == {1: "a"} | {n: "b" for n in NUMBERS if n != 1}
    assert deal("t", NUMBERS, ["a"], holdings, {"a": 0}) == {1: "a"}


def test_the_one_over_goes_to_who_has_least() -> None:
    holdings = {"a": Holdings(), "b": Holdings()}
    owners = deal("t", [0], ["a", "b"], holdings, {"a": 3, "b": 1})
    assert owners == {0: "b"}
