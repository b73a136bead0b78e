"""Every reader of a log ends with the same state, whatever was compacted before it came."""

from __future__ import annotations

from copy import deepcopy
from itertools import count
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qtasks_core import Status, Task
from qtasks_log import Entry
from qtasks_log.entries import Deletion, Items, Setting
from qtasks_log.view import Judgement, Proposal, View, judge
from tests.unit.memory_log import Partition

STATUSES: tuple[Status, ...] = ("new", "scheduled", "process", "retry", "success")
UUID = "one uuid is enough: no two meet"
EVERYTHING = 1_000_000


class Writer:
    """A process: it reads, and discards what its own proposals made needless."""

    def __init__(self, name: str, world: LogMachine) -> None:
        self.name = name
        self.world = world
        self.view: View[Any] = View()
        self.position = 0
        self.needless: dict[str, Entry] = {}

    def read(self, limit: int) -> None:
        for at, entry in self.world.partition.after(self.position)[:limit]:
            self.position = at + 1
            self.take(entry)

    def take(self, entry: Entry) -> None:
        uuid, key = entry.partition_key, entry.key
        if entry.value is None:
            self.view.discard(uuid, key)
            return
        content = self.world.contents[key]
        if isinstance(content, Items):
            self.view.append(uuid, key, content)
            return
        judgement = self.view.propose(uuid, key, content).judgement
        if key.startswith(self.name):
            assert judgement == self.world.judgements[key]
        if not self.world.compacts:
            self.view.keep_current_only(uuid)
        elif key.startswith(self.name):
            self.discard(self.view.needless(uuid) if judgement == "accept" else [key])

    def discard(self, keys: list[str]) -> None:
        for key in keys:
            self.needless.setdefault(key, Entry(UUID, key, None))

    def after(self) -> str:
        """Return the key of the current proposal, as far as this process has read."""
        current = self.view.get(UUID)
        return "" if current is None else current.key


class LogMachine(RuleBasedStateMachine):
    """Writers that propose, read, discard and crash, on a log that is compacted meanwhile.

    The oracle judges all proposals in the order of the log and never forgets one. A reader that
    was kept on a disk goes on in a log that has been compacted before and behind its position. Only
    the tombstones behind it must still be there.
    """

    compacts: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.partition = Partition()
        self.contents: dict[str, Any] = {}
        self.judgements: dict[str, Judgement] = {}
        self.current: Proposal[Any] | None = None
        self.stream: list[Items] = []
        self.names = count()
        self.writers = [self.writer() for _ in range(3)]
        self.kept: list[tuple[int, View[Any]]] = []

    def writer(self) -> Writer:
        writer = Writer(f"w{next(self.names)}.", self)
        writer.read(EVERYTHING)
        return writer

    def propose(self, who: int, content: Any) -> None:
        key = f"{self.writers[who].name}{len(self.contents)}"
        self.contents[key] = content
        if isinstance(content, Items):
            self.stream.append(content)
        else:
            self.judgements[key] = self.judge(Proposal(key, content))
            if self.judgements[key] == "accept":
                self.current = Proposal(key, content)
                if isinstance(content, Deletion):
                    self.stream = []
        self.partition.append(Entry(UUID, key, b"in contents"))

    def judge(self, proposal: Proposal[Any]) -> Judgement:
        return judge(proposal, self.current)

    @rule(who=st.integers(0, 2), limit=st.sampled_from([1, 2, EVERYTHING, EVERYTHING]))
    def read(self, who: int, limit: int) -> None:
        self.writers[who].read(limit)

    @rule(who=st.integers(0, 2), some=st.sampled_from([1, 2, EVERYTHING]), known=st.booleans())
    def discard(self, who: int, some: int, known: bool) -> None:
        """Append tombstones; when the outcome stays unknown they are appended again later."""
        needless = self.writers[who].needless
        for key in list(needless)[:some]:
            self.partition.append(needless[key])
            if known:
                del needless[key]

    @rule(who=st.integers(0, 2))
    def crash(self, who: int) -> None:
        self.writers[who] = self.writer()

    @rule(who=st.integers(0, 2))
    def keep(self, who: int) -> None:
        """Keep what a process has read, as the file of a storage does."""
        writer = self.writers[who]
        self.kept = [*self.kept[-2:], (writer.position, deepcopy(writer.view))]

    @precondition(lambda self: self.partition.end > 0)
    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        """Clean what every running reader has passed: all of it or, in a crash, its beginning."""
        passed = min(writer.position for writer in self.writers)
        cleaned_to = passed - data.draw(st.integers(0, passed))
        known = min([cleaned_to, *(position for position, _ in self.kept)])
        drop_tombstones = data.draw(st.integers(0, known))
        self.partition.compact(passed, cleaned_to, drop_tombstones)

    @invariant()
    def a_new_reader_has_the_oracles_state(self) -> None:
        self.agree(self.writer())

    @invariant()
    def a_kept_reader_has_the_oracles_state(self) -> None:
        for position, view in self.kept:
            reader = Writer(f"w{next(self.names)}.", self)
            reader.position, reader.view = position, deepcopy(view)
            reader.read(EVERYTHING)
            self.agree(reader)

    def agree(self, reader: Writer) -> None:
        assert state_of(reader.view.get(UUID)) == state_of(self.current)
        assert reader.view.stream(UUID) == self.stream

    def teardown(self) -> None:
        for writer in self.writers:
            writer.read(EVERYTHING)
            self.agree(writer)


def state_of(current: Proposal[Any] | None) -> object:
    """Return what users see: a record or a value, or None."""
    content = None if current is None else current.content
    if isinstance(content, Setting):
        return content.value
    return None if isinstance(content, Deletion) else content


class RecordMachine(LogMachine):
    """Saves of a record, items of its stream, and deletions of both."""

    @rule(
        who=st.integers(0, 2),
        attempt=st.integers(1, 2),
        status=st.sampled_from(STATUSES),
        execution=st.sampled_from("xy"),
    )
    def save(self, who: int, attempt: int, status: Status, execution: str) -> None:
        name = str(len(self.contents))
        self.propose(
            who,
            Task(uuid=UUID, task_name=name, status=status, attempt=attempt, execution=execution),
        )

    @rule(who=st.integers(0, 2))
    def append(self, who: int) -> None:
        self.propose(who, Items((b"%d" % len(self.contents),), 0.0))

    @rule(who=st.integers(0, 2), whatever_it_is=st.booleans())
    def delete(self, who: int, whatever_it_is: bool) -> None:
        self.propose(who, Deletion(None if whatever_it_is else self.writers[who].after()))


class ValueMachine(LogMachine):
    """Changes of a value by compare-and-set. Claims have the same rules."""

    @rule(who=st.integers(0, 2), deletes=st.booleans())
    def set(self, who: int, deletes: bool) -> None:
        value = None if deletes else b"%d" % len(self.contents)
        self.propose(who, Setting(value, self.writers[who].after()))

    def judge(self, proposal: Proposal[Any]) -> Judgement:
        current = "" if self.current is None else self.current.key
        return "accept" if proposal.content.after == current else "refuse"


class ForgettingMachine(ValueMachine):
    """A deleted value is forgotten at last, so its key is as if it had never had a value."""

    def __init__(self) -> None:
        super().__init__()
        self.forgotten: str | None = None

    def judge(self, proposal: Proposal[Any]) -> Judgement:
        if self.current is not None and self.current.key == self.forgotten:
            return "accept" if proposal.content.after in ("", self.forgotten) else "refuse"
        return super().judge(proposal)

    @precondition(lambda self: self.current is not None and self.current.content.value is None)
    @rule(who=st.integers(0, 2))
    def forget(self, who: int) -> None:
        """Discard all of the key, when nobody can still follow what was before the deletion."""
        assert self.current is not None
        for writer in self.writers:
            writer.read(EVERYTHING)
        for key in self.writers[who].view.all_keys(UUID):
            self.partition.append(Entry(UUID, key, None))
        self.forgotten = self.current.key


class WholeRecordMachine(RecordMachine):
    """A log that never compacts: readers forget by themselves."""

    compacts = False


class WholeValueMachine(ValueMachine):
    compacts = False


MANY = settings(max_examples=300, stateful_step_count=60, deadline=None)
for machine in (RecordMachine, ForgettingMachine, WholeRecordMachine, WholeValueMachine):
    machine.TestCase.settings = MANY
TestRecords = RecordMachine.TestCase
TestValues = ForgettingMachine.TestCase
TestRecordsOfAWholeLog = WholeRecordMachine.TestCase
TestValuesOfAWholeLog = WholeValueMachine.TestCase


def task(key: str, status: Status, attempt: int, execution: str = "x") -> Task:
    return Task(uuid=UUID, task_name=key, status=status, attempt=attempt, execution=execution)


def view_of(**contents: Any) -> View[Any]:
    """Return a view of these proposals, by their keys."""
    view: View[Any] = View()
    for key, content in contents.items():
        if isinstance(content, Items):
            view.append(UUID, key, content)
        else:
            view.propose(UUID, key, content)
    return view


def key_of(view: View[Any]) -> str | None:
    current = view.get(UUID)
    return None if current is None else current.key


def test_half_compacted_loser_gives_way_at_its_tombstone() -> None:
    """A cleaner that died had removed the record that refused the loser, but not the loser."""
    view = view_of(loser=task("loser", "success", 1))
    assert view.propose(UUID, "winner", task("winner", "success", 2)).judgement == "refuse"
    view.discard(UUID, "loser")
    assert key_of(view) == "winner"


def test_needless_names_losers_first_then_the_superseded_from_the_oldest() -> None:
    view = view_of(
        first=task("first", "process", 2),
        loser=task("loser", "success", 1),
        second=task("second", "process", 2, "y"),
        again=task("again", "process", 2, "y"),
        winner=task("winner", "success", 2),
        late=task("late", "cancel", 3),
    )
    assert view.needless(UUID) == ["loser", "again", "first", "second"]


def test_a_deletion_is_needless_after_all_that_it_deletes() -> None:
    deleted = view_of(
        first=task("first", "success", 1),
        item=Items((b"1",), 0.0),
        loser=task("loser", "success", 2),
        deletion=Deletion(),
    )
    assert deleted.needless(UUID) == ["loser", "item", "first", "deletion"]
    deleted.append(UUID, "later", Items((b"2",), 0.0))
    deleted.propose(UUID, "again", task("again", "new", 1))
    assert deleted.needless(UUID) == ["loser", "item", "first", "deletion"]
    assert deleted.stream(UUID) == [Items((b"2",), 0.0)]


def test_a_deletion_of_another_record_deletes_nothing() -> None:
    view = view_of(first=task("first", "success", 1), item=Items((b"1",), 0.0))
    assert view.propose(UUID, "late", Deletion("earlier")).judgement == "refuse"
    assert view.propose(UUID, "orphans", Deletion("")).judgement == "refuse"
    assert key_of(view) == "first"
    assert view.stream(UUID) == [Items((b"1",), 0.0)]
    assert view.propose(UUID, "right", Deletion("first")).judgement == "accept"
    assert view.stream(UUID) == []


@pytest.mark.parametrize("compacts", [True, False])
def test_of_two_changes_that_follow_the_same_one_the_first_wins(compacts: bool) -> None:
    view = view_of(a=Setting(b"1", ""))
    for key, content, expected in (
        ("b", Setting(None, "a"), "accept"),
        ("c", Setting(b"3", "a"), "refuse"),
        ("d", Setting(b"4", ""), "refuse"),
        ("e", Setting(b"5", "b"), "accept"),
    ):
        assert view.propose(UUID, key, content).judgement == expected
        if not compacts:
            view.keep_current_only(UUID)
    assert key_of(view) == "e"
    assert view.all_keys(UUID) == (["c", "d", "a", "b", "e"] if compacts else ["e"])


def test_a_reader_that_starts_behind_the_superseded_finds_the_same_winner() -> None:
    """The beginning of the log is gone, by compaction or because it was truncated."""
    changes = {"a": Setting(b"1", ""), "b": Setting(b"2", "a"), "c": Setting(b"3", "b"),
               "loser": Setting(b"4", "b")}  # fmt: skip
    for gone in range(3):
        left = dict(list(changes.items())[gone:])
        assert key_of(view_of(**left)) == "c"


def test_what_is_left_while_tombstones_are_on_their_way_ends_with_the_same_record() -> None:
    """Newest first would leave a chain in which the record is a mere repeat of its first link."""
    chain = {"a": task("a", "process", 1), "b": task("b", "process", 1, "y")}
    for discarded in range(len(chain) + 1):
        left = dict(list(chain.items())[discarded:])
        assert key_of(view_of(**left, c=task("c", "process", 1))) == "c"


def test_tombstone_of_an_unknown_key_changes_nothing() -> None:
    view = view_of()
    view.discard(UUID, "never seen")
    view.propose(UUID, "first", task("first", "process", 1))
    view.discard(UUID, "never seen")
    assert key_of(view) == "first"


def test_discarding_everything_forgets_the_uuid() -> None:
    view = view_of(first=task("first", "process", 1), item=Items((b"1",), 0.0))
    view.discard(UUID, "first")
    view.discard(UUID, "item")
    assert view.get(UUID) is None
    assert view.subjects() == view.streams() == []


def test_entry_that_comes_twice_is_judged_once() -> None:
    view = view_of()
    first, second = task("first", "process", 1), task("second", "success", 1)
    for key, content, expected in (
        ("first", first, "accept"), ("second", second, "accept"), ("first", first, "repeat"),
    ):  # fmt: skip
        assert view.propose(UUID, key, content).judgement == expected
    assert view.needless(UUID) == ["first"]
