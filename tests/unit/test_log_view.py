"""Every reader of a log ends with the same records, whatever was compacted before it came."""

from __future__ import annotations

from itertools import count

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qtasks_core import Status, Task
from qtasks_core.records import judge
from qtasks_log import Entry
from qtasks_log.view import Proposal, View
from tests.unit.memory_log import Partition

STATUSES: tuple[Status, ...] = ("new", "scheduled", "process", "retry", "success")
UUID = "one uuid is enough: no two meet"
EVERYTHING = 1_000_000


class Writer:
    """A process: it reads, and discards what its own proposals made needless."""

    def __init__(self, name: str, world: LogMachine) -> None:
        self.name = name
        self.world = world
        self.view = View()
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
        task = self.world.tasks[key]
        judgement = self.view.propose(Proposal(key, task))
        if key.startswith(self.name):
            assert judgement == self.world.judgements[key]
            for needless in self.view.needless(uuid) if judgement == "accept" else [key]:
                self.needless.setdefault(needless, Entry(uuid, needless, None))


class LogMachine(RuleBasedStateMachine):
    """Writers that propose, read, discard and crash, on a log that is compacted meanwhile.

    The oracle judges all proposals in the order of the log and never forgets one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.partition = Partition()
        self.tasks: dict[str, Task] = {}
        self.judgements: dict[str, str] = {}
        self.record: Task | None = None
        self.names = count()
        self.writers = [self.writer() for _ in range(3)]

    def writer(self) -> Writer:
        writer = Writer(f"w{next(self.names)}.", self)
        writer.read(EVERYTHING)
        return writer

    @rule(
        who=st.integers(0, 2),
        attempt=st.integers(1, 2),
        status=st.sampled_from(STATUSES),
        execution=st.sampled_from("xy"),
    )
    def propose(self, who: int, attempt: int, status: Status, execution: str) -> None:
        key = f"{self.writers[who].name}{len(self.tasks)}"
        task = Task(
            uuid=UUID,
            task_name=key,
            status=status,
            attempt=attempt,
            execution=execution,
        )
        self.tasks[key] = task
        self.judgements[key] = judge(task, self.record)
        if self.judgements[key] == "accept":
            self.record = task
        self.partition.append(Entry(UUID, key, b"in tasks"))

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

    @precondition(lambda self: self.partition.end > 0)
    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        """Clean what every running reader has passed: all of it or, in a crash, its beginning."""
        passed = min(writer.position for writer in self.writers)
        cleaned_to = passed - data.draw(st.integers(0, passed))
        drop_tombstones = data.draw(st.integers(0, cleaned_to))
        self.partition.compact(passed, cleaned_to, drop_tombstones)

    @invariant()
    def a_new_reader_has_the_oracles_records(self) -> None:
        self.agree(self.writer())

    def agree(self, reader: Writer) -> None:
        assert reader.view.get(UUID) == self.record

    def teardown(self) -> None:
        for writer in self.writers:
            writer.read(EVERYTHING)
            self.agree(writer)


LogMachine.TestCase.settings = settings(max_examples=400, stateful_step_count=60, deadline=None)
TestAnyReader = LogMachine.TestCase


def proposal(key: str, status: Status, attempt: int, execution: str = "x") -> Proposal:
    return Proposal(key, Task(uuid=UUID, task_name=key, status=status, attempt=attempt,
                              execution=execution))  # fmt: skip


def test_half_compacted_loser_gives_way_at_its_tombstone() -> None:
    """A cleaner that died had removed the record that refused the loser, but not the loser."""
    view = View()
    view.propose(proposal("loser", "success", 1))
    assert view.propose(proposal("winner", "success", 2)) == "refuse"
    view.discard(UUID, "loser")
    assert view.get(UUID) == proposal("winner", "success", 2).task


def test_needless_names_losers_first_then_the_superseded_from_the_oldest() -> None:
    view = View()
    view.propose(proposal("first", "process", 2))
    view.propose(proposal("loser", "success", 1))
    view.propose(proposal("second", "process", 2, "y"))
    view.propose(proposal("again", "process", 2, "y"))
    view.propose(proposal("winner", "success", 2))
    view.propose(proposal("late", "cancel", 3))
    assert view.needless(UUID) == ["loser", "again", "first", "second"]


def test_what_is_left_while_tombstones_are_on_their_way_ends_with_the_same_record() -> None:
    """Newest first would leave a chain in which the record is a mere repeat of its first link."""
    chain = [proposal("a", "process", 1), proposal("b", "process", 1, "y")]
    record = proposal("c", "process", 1)
    for discarded in range(len(chain) + 1):
        view = View()
        for each in (*chain[discarded:], record):
            view.propose(each)
        assert view.get(UUID) == record.task


def test_tombstone_of_an_unknown_key_changes_nothing() -> None:
    view = View()
    view.discard(UUID, "never seen")
    view.propose(proposal("first", "process", 1))
    view.discard(UUID, "never seen")
    assert view.get(UUID) == proposal("first", "process", 1).task


def test_discarding_everything_forgets_the_uuid() -> None:
    view = View()
    view.propose(proposal("first", "process", 1))
    view.discard(UUID, "first")
    assert view.get(UUID) is None


def test_entry_that_comes_twice_is_judged_once() -> None:
    view = View()
    assert view.propose(proposal("first", "process", 1)) == "accept"
    assert view.propose(proposal("second", "success", 1)) == "accept"
    assert view.propose(proposal("first", "process", 1)) == "repeat"
    assert view.needless(UUID) == ["first"]
