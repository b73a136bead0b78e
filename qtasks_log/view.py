"""What a reader of the log knows: the proposals that still stand, and the record each uuid has.

A log cannot refuse an append, so each save is a proposal under a key of its own, and every reader
judges them in the log's order. The record of a uuid is the outcome over the proposals that have no
tombstone, whether compaction has removed the others yet or not: so all readers of the same log
agree. For that a tombstone must never change an outcome, which `needless` sees to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias

from qtasks_core import Task
from qtasks_core.records import judge

Judgement: TypeAlias = Literal["accept", "repeat", "refuse"]


class Proposal(NamedTuple):
    """One save, under the key that its writer made for it."""

    key: str
    task: Task


class View:
    """The proposals of each uuid in the log's order, nearly always one, and who won."""

    def __init__(self) -> None:
        self._standing: dict[str, list[Proposal]] = {}
        self._records: dict[str, Proposal] = {}

    def get(self, uuid: str) -> Task | None:
        """Return the record of a uuid."""
        record = self._records.get(uuid)
        return record.task if record is not None else None

    def propose(self, proposal: Proposal) -> Judgement:
        """Take the next proposal of the log and say whether it is the record now.

        A key that stands already is judged where it stood first.
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
        """Forget what lost or was superseded: no reader of a log without compaction needs it."""
        self._standing[uuid] = [self._records[uuid]]

    def discard(self, uuid: str, key: str) -> None:
        """Take a tombstone of the log."""
        standing = [p for p in self._standing.get(uuid, ()) if p.key != key]
        if standing:
            self._standing[uuid] = standing
            # Differs only for a reader that meets a half compacted log: it reads a loser whose
            # winner is gone, and here the tombstone of that loser.
            self._records[uuid] = accepted(standing)[-1]
        else:
            self._standing.pop(uuid, None)
            self._records.pop(uuid, None)

    def needless(self, uuid: str) -> list[str]:
        """Return the keys in front of the record of `uuid`, in the order to discard them in.

        Losers first: without the record that refused it, a loser would win. Then what was
        superseded, oldest first, so that what is left is always the end of the same chain.
        """
        record = self._records[uuid]
        standing = self._standing[uuid]
        earlier = standing[: standing.index(record)]
        superseded = accepted(earlier)
        losers = [proposal.key for proposal in earlier if proposal not in superseded]
        return losers + [proposal.key for proposal in superseded]


def accepted(proposals: Iterable[Proposal]) -> list[Proposal]:
    """Return the proposals that were the record one after the other."""
    chain: list[Proposal] = []
    for proposal in proposals:
        if judge(proposal.task, chain[-1].task if chain else None) == "accept":
            chain.append(proposal)
    return chain
