"""The state of a reader: the proposals without a tombstone, and the record of each uuid.

A log cannot refuse an append. So each save is a proposal with its own key. Every reader judges the
proposals in the log's order. The record of a uuid follows from the proposals that have no
tombstone. It does not matter whether compaction has already removed the others, so all readers of a
log agree. This works only if a tombstone never changes the record: `needless` ensures that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias

from qtasks_core import Task
from qtasks_core.records import judge

Judgement: TypeAlias = Literal["accept", "repeat", "refuse"]


class Proposal(NamedTuple):
    """One save, with the key that its writer made for it."""

    key: str
    task: Task


class View:
    """The proposals of each uuid in the log's order, nearly always one, and the one that won."""

    def __init__(self) -> None:
        self._standing: dict[str, list[Proposal]] = {}
        self._records: dict[str, Proposal] = {}

    def get(self, uuid: str) -> Task | None:
        """Return the record of a uuid."""
        record = self._records.get(uuid)
        return record.task if record is not None else None

    def propose(self, proposal: Proposal) -> Judgement:
        """Take the next proposal of the log, and say whether it is the record now.

        If a proposal with this key is already in the view, the new one is only a repeat.
        """
        uuid = proposal.task.uuid
        standing = self._standing.setdefault(uuid, [])
        if any(proposal.key == other.key for other in standing):
            return "repeat"
        standing.append(proposal)
        judgement = judge(proposal.task, self.get(uuid))
        if judgement == "accept":
            self._records[uuid] = proposal
        return judgement

    def keep_record_only(self, uuid: str) -> None:
        """Forget the losers and superseded ones: without compaction, no reader needs them."""
        self._standing[uuid] = [self._records[uuid]]

    def discard(self, uuid: str, key: str) -> None:
        """Apply a tombstone of the log."""
        standing = [p for p in self._standing.get(uuid, ()) if p.key != key]
        if standing:
            self._standing[uuid] = standing
            # The record changes here only for a reader of a half compacted log. It reads a loser
            # whose winner is gone, and then the tombstone of that loser.
            self._records[uuid] = accepted(standing)[-1]
        else:
            self._standing.pop(uuid, None)
            self._records.pop(uuid, None)

    def needless(self, uuid: str) -> list[str]:
        """Return the keys before the record of `uuid`, in the order to discard them.

        Losers come first: without the record that refused it, a loser would win. Then come
        superseded proposals, oldest first. So the remaining ones are always the last links of the
        same chain.
        """
        record = self._records[uuid]
        standing = self._standing[uuid]
        earlier = standing[: standing.index(record)]
        superseded = accepted(earlier)
        losers = [proposal.key for proposal in earlier if proposal not in superseded]
        return losers + [proposal.key for proposal in superseded]


def accepted(proposals: Iterable[Proposal]) -> list[Proposal]:
    """Return the proposals that were the record, one after the other."""
    chain: list[Proposal] = []
    for proposal in proposals:
        if judge(proposal.task, chain[-1].task if chain else None) == "accept":
            chain.append(proposal)
    return chain
