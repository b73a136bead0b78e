"""The state of a reader: the proposals without a tombstone, and the current one of each subject.

A log cannot refuse an append. So each save, each change of a value or claim and each deletion is a
proposal with its own key. Every reader judges the proposals in the log's order. The state of a
subject (a uuid, the key of a value or claim) follows from the proposals that have no tombstone. It
does not matter whether compaction has already removed the others, so all readers of a log agree.
This works only if a tombstone never changes the state: `needless` ensures that.

A view has only the subjects in memory: `Store` has the others in a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from typing import Generic, Literal, NamedTuple, TypeAlias, TypeVar

from qtasks_core import Task, records
from qtasks_log.entries import Claiming, Deletion, Items, Setting

Judgement: TypeAlias = Literal["accept", "repeat", "refuse"]
Change = TypeVar("Change", bound=Task | Deletion | Setting | Claiming)


class Proposal(NamedTuple, Generic[Change]):
    """One proposal, with the key that its writer made for it."""

    key: str
    content: Change
    over_at: float | None = None
    """From when it counts as over, if it is the current one. Unix time for a record, else this
    process's monotonic clock. None: never."""
    place: int = 0
    """Its place among all that this reader has read."""


class Judged(NamedTuple, Generic[Change]):
    """What a reader decided on a proposal, and what was current before."""

    judgement: Judgement
    before: Proposal[Change] | None


class Subject(Generic[Change]):
    """The proposals of one subject in the log's order, nearly always one, and its stream."""

    __slots__ = ("current", "size", "standing", "stream")

    def __init__(self) -> None:
        self.standing: list[Proposal[Change]] = []
        self.current: Proposal[Change] | None = None
        self.stream: dict[str, tuple[int, Items]] = {}
        """By the key of the entry: its place and its items."""
        self.size = 0
        """About how many bytes its entries have."""

    @property
    def empty(self) -> bool:
        """Say whether nothing is left of it."""
        return not self.standing and not self.stream

    def has(self, key: str) -> bool:
        """Say whether an entry with this key is here."""
        return key in self.stream or any(key == proposal.key for proposal in self.standing)

    def deleted_at(self) -> int:
        """Return the place of the last deletion that counted, -1 if there was none."""
        chain = accepted(self.standing)
        return max((p.place for p in chain if isinstance(p.content, Deletion)), default=-1)

    def items(self) -> list[Items]:
        """Return the items of its stream since the last deletion."""
        since = self.deleted_at()
        return [items for place, items in self.stream.values() if place > since]


class View(Generic[Change]):
    """The subjects of one kind that are in memory. A plain view has all of them.

    A `Store` moves subjects to its table and back. Whoever reads or changes a subject has loaded it
    before. `changed` are those whose state the table does not have yet.
    """

    def __init__(self, places: Iterator[int] | None = None) -> None:
        self.loaded: dict[str, Subject[Change]] = {}
        """The one that was used last comes last."""
        self.changed: dict[str, Subject[Change]] = {}
        self.size = 0
        """About how many bytes the entries of the loaded subjects have."""
        self.places = count() if places is None else places

    def get(self, subject: str) -> Proposal[Change] | None:
        """Return the current proposal of a subject. It may be a deletion, or over."""
        state = self.loaded.get(subject)
        return None if state is None else state.current

    def subjects(self) -> list[str]:
        """Return all loaded subjects that have a current proposal."""
        return [subject for subject, state in self.loaded.items() if state.current is not None]

    def propose(
        self,
        subject: str,
        key: str,
        content: Change,
        over_at: float | None = None,
        size: int = 0,
    ) -> Judged[Change]:
        """Take the next proposal of the log, and say whether it is the current one now.

        If a proposal with this key is already in the view, the new one is only a repeat. `size` is
        in bytes.
        """
        state = self._changing(subject, size)
        before = state.current
        for other in state.standing:
            if key == other.key:
                return Judged("repeat", before)
        proposal = Proposal(key, content, over_at, next(self.places))
        state.standing.append(proposal)
        judgement = judge(proposal, before)
        if judgement == "accept":
            state.current = proposal
        return Judged(judgement, before)

    def append(self, subject: str, key: str, items: Items, size: int = 0) -> None:
        """Take the next items of a stream. Nothing can refuse them."""
        stream = self._changing(subject, size).stream
        if key not in stream:
            stream[key] = next(self.places), items

    def stream(self, subject: str) -> list[Items]:
        """Return the items of a stream since the last deletion."""
        state = self.loaded.get(subject)
        return [] if state is None else state.items()

    def streams(self) -> list[str]:
        """Return all loaded subjects that have a stream, perhaps of deleted items."""
        return [subject for subject, state in self.loaded.items() if state.stream]

    def keep_current_only(self, subject: str) -> None:
        """Forget all but the current proposal: without compaction, no reader needs the others.

        The caller has just proposed something.
        """
        state = self.loaded[subject]
        if len(state.standing) == 1 and type(state.standing[0].content) is not Deletion:
            return
        current = state.current
        assert current is not None
        if isinstance(current.content, Deletion):
            state.standing, state.current, state.stream = [], None, {}
        else:
            state.standing = [current]

    def discard(self, subject: str, key: str) -> bool:
        """Apply a tombstone of the log. Return whether its entry was here."""
        state = self.loaded.get(subject)
        if state is None or not state.has(key):
            return False
        self._changing(subject)
        state.stream.pop(key, None)
        state.standing = [p for p in state.standing if p.key != key]
        # The current one changes here only for a reader that starts or goes on in a half compacted
        # log. It has a loser whose winner is gone, and reads the tombstone of that loser.
        state.current = accepted(state.standing)[-1] if state.standing else None
        return True

    def needless(self, subject: str) -> list[str]:
        """Return the keys that the current proposal made needless, in the order to discard them.

        Losers come first: without the proposal that refused it, a loser would win. So do deleted
        items: without the deletion they would be back. Then come superseded proposals, oldest
        first. So the remaining ones are always the last links of the same chain. A deletion is
        itself needless, after all before it.
        """
        state = self.loaded[subject]
        current, standing = state.current, state.standing
        assert current is not None
        earlier = standing[: standing.index(current)]
        superseded = [proposal.key for proposal in accepted(earlier)]
        chain = set(superseded)
        losers = [proposal.key for proposal in earlier if proposal.key not in chain]
        if state.stream:
            since = state.deleted_at()
            losers += [key for key, (place, _) in state.stream.items() if place < since]
        last = [current.key] if isinstance(current.content, Deletion) else []
        return losers + superseded + last

    def all_keys(self, subject: str) -> list[str]:
        """Return the keys of all proposals of a subject, in the order to discard them."""
        state = self.loaded.get(subject)
        standing = [] if state is None else state.standing
        chain = [proposal.key for proposal in accepted(standing)]
        losers = [proposal.key for proposal in standing if proposal.key not in chain]
        return losers + chain

    def touch(self, subject: str) -> bool:
        """Note the use of a subject. Return whether it is loaded."""
        state = self.loaded.pop(subject, None)
        if state is None:
            return False
        self.loaded[subject] = state
        return True

    def load(self, subject: str, state: Subject[Change]) -> None:
        """Take a subject from the table."""
        self.loaded[subject] = state
        self.size += state.size

    def unload(self, subject: str) -> None:
        """Drop a subject that the table has, or of which nothing is left."""
        self.size -= self.loaded.pop(subject).size

    def _changing(self, subject: str, size: int = 0) -> Subject[Change]:
        """Return a subject that is about to change."""
        state = self.loaded.get(subject)
        if state is None:
            state = self.loaded[subject] = Subject()
        self.changed[subject] = state
        state.size += size
        self.size += size
        return state


def judge(new: Proposal[Change], current: Proposal[Change] | None) -> Judgement:
    """Say how readers treat a proposal, given the current one of its subject.

    Without a current proposal they accept any: compaction may have removed the one before it.
    """
    content = new.content
    if isinstance(content, Task):
        stored = None if current is None else current.content
        return records.judge(content, stored if isinstance(stored, Task) else None)
    if current is None:
        return "accept"
    if isinstance(content, Deletion):
        fits = content.of in (None, current.key) or isinstance(current.content, Deletion)
    else:
        fits = content.after == current.key
    return "accept" if fits else "refuse"


def accepted(proposals: Iterable[Proposal[Change]]) -> list[Proposal[Change]]:
    """Return the proposals that were current, one after the other."""
    chain: list[Proposal[Change]] = []
    for proposal in proposals:
        if judge(proposal, chain[-1] if chain else None) == "accept":
            chain.append(proposal)
    return chain
