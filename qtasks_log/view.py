"""The state of a reader: the proposals without a tombstone, and the current one of each subject.

A log cannot refuse an append. So each save, each change of a value or claim and each deletion is a
proposal with its own key. Every reader judges the proposals in the log's order. The state of a
subject (a uuid, the key of a value or claim) follows from the proposals that have no tombstone. It
does not matter whether compaction has already removed the others, so all readers of a log agree.
This works only if a tombstone never changes the state: `needless` ensures that.
"""

from __future__ import annotations

from collections.abc import Iterable
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


class View(Generic[Change]):
    """The proposals of each subject in the log's order, nearly always one, and the current one."""

    def __init__(self) -> None:
        self._standing: dict[str, list[Proposal[Change]]] = {}
        self._current: dict[str, Proposal[Change]] = {}
        self._streams: dict[str, dict[str, tuple[int, Items]]] = {}
        """By uuid and by the key of the entry: its place and its items."""
        self._places = count()

    def get(self, subject: str) -> Proposal[Change] | None:
        """Return the current proposal of a subject. It may be a deletion, or over."""
        return self._current.get(subject)

    def subjects(self) -> list[str]:
        """Return all subjects that have a current proposal."""
        return list(self._current)

    def propose(
        self, subject: str, key: str, content: Change, over_at: float | None = None
    ) -> Judged[Change]:
        """Take the next proposal of the log, and say whether it is the current one now.

        If a proposal with this key is already in the view, the new one is only a repeat.
        """
        before = self._current.get(subject)
        standing = self._standing.setdefault(subject, [])
        if any(key == other.key for other in standing):
            return Judged("repeat", before)
        proposal = Proposal(key, content, over_at, next(self._places))
        standing.append(proposal)
        judgement = judge(proposal, before)
        if judgement == "accept":
            self._current[subject] = proposal
        return Judged(judgement, before)

    def append(self, subject: str, key: str, items: Items) -> None:
        """Take the next items of a stream. Nothing can refuse them."""
        self._streams.setdefault(subject, {}).setdefault(key, (next(self._places), items))

    def stream(self, subject: str) -> list[Items]:
        """Return the items of a stream since the last deletion."""
        since = self._deleted_at(subject)
        entries = self._streams.get(subject, {}).values()
        return [items for place, items in entries if place > since]

    def streams(self) -> list[str]:
        """Return all subjects that have a stream, perhaps of deleted items."""
        return list(self._streams)

    def _deleted_at(self, subject: str) -> int:
        chain = accepted(self._standing.get(subject, ()))
        return max((p.place for p in chain if isinstance(p.content, Deletion)), default=-1)

    def keep_current_only(self, subject: str) -> None:
        """Forget all but the current proposal: without compaction, no reader needs the others."""
        current = self._current[subject]
        if isinstance(current.content, Deletion):
            del self._standing[subject], self._current[subject]
            self._streams.pop(subject, None)
        else:
            self._standing[subject] = [current]

    def discard(self, subject: str, key: str) -> None:
        """Apply a tombstone of the log."""
        if (stream := self._streams.get(subject)) is not None:
            stream.pop(key, None)
            if not stream:
                del self._streams[subject]
        standing = [p for p in self._standing.get(subject, ()) if p.key != key]
        if standing:
            self._standing[subject] = standing
            # The current one changes here only for a reader of a half compacted log. It reads a
            # loser whose winner is gone, and then the tombstone of that loser.
            self._current[subject] = accepted(standing)[-1]
        else:
            self._standing.pop(subject, None)
            self._current.pop(subject, None)

    def needless(self, subject: str) -> list[str]:
        """Return the keys that the current proposal made needless, in the order to discard them.

        Losers come first: without the proposal that refused it, a loser would win. So do deleted
        items: without the deletion they would be back. Then come superseded proposals, oldest
        first. So the remaining ones are always the last links of the same chain. A deletion is
        itself needless, after all before it.
        """
        current = self._current[subject]
        standing = self._standing[subject]
        earlier = standing[: standing.index(current)]
        superseded = [proposal.key for proposal in accepted(earlier)]
        chain = set(superseded)
        losers = [proposal.key for proposal in earlier if proposal.key not in chain]
        since = self._deleted_at(subject)
        stream = self._streams.get(subject, {})
        losers += [key for key, (place, _) in stream.items() if place < since]
        last = [current.key] if isinstance(current.content, Deletion) else []
        return losers + superseded + last

    def all_keys(self, subject: str) -> list[str]:
        """Return the keys of all proposals of a subject, in the order to discard them."""
        standing = self._standing.get(subject, [])
        chain = [proposal.key for proposal in accepted(standing)]
        losers = [proposal.key for proposal in standing if proposal.key not in chain]
        return losers + chain


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
