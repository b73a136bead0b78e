"""Settling once: a repeat is `done`, another settlement of the same delivery is refused."""

from __future__ import annotations

from collections.abc import Container, Hashable, Sequence

from qtasks_core.schemas import DONE, LOST, Outcome, Retry, Settlement


class SettleCall:
    """The settlements of one call. At most one of each delivery takes effect.

        call = SettleCall(settlements, self._settled)
        for place, settlement in call.first.items():
            if ...:  # the lease holds, and the settlement has had its effect
                self._settled.add(call.done(place))
        return call.outcomes()

    Only the first settlement of a delivery may take effect. Another one in the same call is a
    repeat or it differs. A repeat gets the same answer as the first, and a different settlement is
    refused. Repeats of settlements of an earlier call are answered at once.
    """

    def __init__(
        self,
        settlements: Sequence[Settlement],
        settled: Container[Hashable] = (),
        *,
        obeyed: Outcome = DONE,
    ) -> None:
        """Start from what is settled already.

        `settled` has the `repeat_key` of each earlier settlement. `obeyed` is the answer to one
        that takes effect, and to its repeats.
        """
        self.first: dict[int, Settlement] = {}
        """The settlements that should take effect, by their places in the call."""
        self.keys: dict[int, Hashable] = {}
        """The `repeat_key` of each of them, by the same places."""
        self._obeyed = obeyed
        self._outcomes = [LOST] * len(settlements)
        self._repeats: dict[int, int] = {}
        places: dict[Hashable, int] = {}
        for place, settlement in enumerate(settlements):
            fence = settlement.delivery.fence
            key = fence, effect_of(settlement)  # its `repeat_key`, inlined to save a call
            if key in settled:
                self._outcomes[place] = obeyed
                continue
            first = places.setdefault(fence, place)
            if first == place:
                self.first[place] = settlement
                self.keys[place] = key
            elif self.keys[first] == key:
                self._repeats[place] = first

    def done(self, place: int) -> Hashable:
        """Note that a settlement took effect, and return its `repeat_key` to remember."""
        self._outcomes[place] = self._obeyed
        return self.keys[place]

    def answer(self, place: int, outcome: Outcome) -> None:
        """Note an outcome. A settlement without one is `refused`, because its lease was lost."""
        self._outcomes[place] = outcome

    def outcomes(self) -> list[Outcome]:
        """Return an outcome for each settlement of the call, in order."""
        for place, first in self._repeats.items():
            self._outcomes[place] = self._outcomes[first]
        return self._outcomes


class Recent:
    """A set of the newest keys: at least `limit` of them, and at most twice as many."""

    def __init__(self, limit: int = 20_000) -> None:
        self._limit = limit
        # Two generations. Dropping the oldest key of a single dict would be slow: each search for
        # it passes the places of all keys that were dropped before.
        self._young: set[Hashable] = set()
        self._old: set[Hashable] = set()

    def add(self, key: Hashable) -> None:
        """Remember a key. A key that is older than `limit` others may be forgotten."""
        self._young.add(key)
        if len(self._young) >= self._limit:
            self._old, self._young = self._young, set()

    def discard(self, key: Hashable) -> None:
        """Forget a key."""
        self._young.discard(key)
        self._old.discard(key)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._young or key in self._old

    def __bool__(self) -> bool:
        return bool(self._young or self._old)


def repeat_key(settlement: Settlement) -> Hashable:
    """Return a key that a settlement shares with its repeats, and with no other settlement."""
    return settlement.delivery.fence, effect_of(settlement)


def effect_of(settlement: Settlement) -> Hashable:
    """Return a key that tells a settlement from other settlements of its delivery.

    A retry must not be reported as done if the delivery was acknowledged.
    """
    if isinstance(settlement, Retry):
        message = settlement.message
        return message.uuid, message.attempt, message.queue
    return type(settlement)
