"""Settling once: a repeat is `done`, another settlement of the same delivery is refused."""

from __future__ import annotations

from collections.abc import Container, Hashable, Sequence

from qtasks_core.schemas import DONE, LOST, Outcome, Retry, Settlement


class SettleCall:
    """The settlements of one call, of which at most one of each delivery is obeyed.

        call = SettleCall(settlements, self._settled)
        for place, settlement in call.first.items():
            if ...:  # the lease holds, and the settlement has had its effect
                self._settled.add(call.done(place))
        return call.outcomes()

    The first settlement of a delivery is to be obeyed. Another one in the same call is a repeat,
    and is answered as the first is, or it differs, and is refused. Repeats of what an earlier call
    has settled are answered at once.
    """

    def __init__(
        self,
        settlements: Sequence[Settlement],
        settled: Container[Hashable] = (),
        *,
        obeyed: Outcome = DONE,
    ) -> None:
        """`settled` has the `repeat_key` of what is settled already; `obeyed` is its answer."""
        self.first: dict[int, Settlement] = {}
        """By their places in the call: the settlements to be obeyed."""
        self.keys: dict[int, Hashable] = {}
        """By the same places: the `repeat_key` of each."""
        self._obeyed = obeyed
        self._outcomes = [LOST] * len(settlements)
        self._repeats: dict[int, int] = {}
        places: dict[Hashable, int] = {}
        for place, settlement in enumerate(settlements):
            fence = settlement.delivery.fence
            key = fence, effect_of(settlement)  # its `repeat_key`, in one call less
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
        """Note that a settlement was obeyed; return its `repeat_key`, to be remembered."""
        self._outcomes[place] = self._obeyed
        return self.keys[place]

    def answer(self, place: int, outcome: Outcome) -> None:
        """Note another outcome than `refused` for a lost lease, which is that of all the others."""
        self._outcomes[place] = outcome

    def outcomes(self) -> list[Outcome]:
        """Return an outcome for each settlement of the call, in order."""
        for place, first in self._repeats.items():
            self._outcomes[place] = self._outcomes[first]
        return self._outcomes


class Recent:
    """A set of the newest `limit` keys at the least, and of twice as many at the most."""

    def __init__(self, limit: int = 20_000) -> None:
        self._limit = limit
        # Two generations: dropping the oldest key of one dict alone would look for it, each time,
        # past the places of all that were dropped before.
        self._young: set[Hashable] = set()
        self._old: set[Hashable] = set()

    def add(self, key: Hashable) -> None:
        """Remember a key; what is older than `limit` others may be forgotten."""
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
    """Return what a settlement has in common with its repeats, and with no others."""
    return settlement.delivery.fence, effect_of(settlement)


def effect_of(settlement: Settlement) -> Hashable:
    """Return what tells a settlement from others of its delivery.

    What was acknowledged must not be said to be retried.
    """
    if isinstance(settlement, Retry):
        message = settlement.message
        return message.uuid, message.attempt, message.queue
    return type(settlement)
