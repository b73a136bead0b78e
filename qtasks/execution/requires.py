"""What a task or an app requires of its broker and storage, compared with what they guarantee."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from msgspec import Struct
from msgspec.structs import asdict

from qtasks_core import Guarantees
from qtasks_core.errors import ConfigurationError
from qtasks_core.lookup import installed_parts
from qtasks_core.schemas import EVENTS, ORDERS, Order, Survives

OF_BOTH = ("survives", "largest", "transactions")
"""What the storage must have too."""


class Requires(Struct, frozen=True, kw_only=True):
    """What a task needs. The app starts only with a broker and a storage that guarantee it.

        @app.task(requires=Requires(survives="machine crash", priorities=True))
        async def charge(order: int) -> None: ...

    `survives`, `largest` and `transactions` are required of the broker and of the storage, the rest
    of the broker. `docs/guarantees.md` shows what each guarantees. Raises `ConfigurationError`.
    """

    survives: Survives = "nothing"
    """The worst event after which no task and no result may be missing."""
    order: Order = "none"
    """How far tasks arrive in the order in which a client sent them: in each partition of a queue,
    or in the whole queue."""
    priorities: bool = False
    """Tasks of a higher priority start first."""
    transactions: bool = False
    """Tasks can be enqueued in the caller's transaction."""
    atomic_retries: bool = False
    """A retry replaces its message in one step, so a crash leaves no second message."""
    settle_confirmed: bool = False
    """The server confirms an acknowledgement, so a crash of the server cannot undo it."""
    leases_survive: bool = False
    """A crash of the server does not deliver again what is in flight."""
    counts_deliveries: bool = False
    """The server counts the deliveries of each message."""
    largest: int = 0
    """The size that a message and a record may have at least, in bytes."""

    def __post_init__(self) -> None:
        if self.survives not in EVENTS:
            raise ConfigurationError(
                f"survives={self.survives!r} must be one of {', '.join(map(repr, EVENTS))}"
            )
        if self.order not in ORDERS:
            raise ConfigurationError(
                f"order={self.order!r} must be one of {', '.join(map(repr, ORDERS))}"
            )
        if not (isinstance(self.largest, int) and self.largest >= 0):
            raise ConfigurationError(f"largest={self.largest!r} must be a number of bytes")


NOTHING = Requires()


def checked_requires(requires: Requires) -> Requires:
    """Return the requirements. Raises `ConfigurationError` if they are something else."""
    if not isinstance(requires, Requires):
        raise ConfigurationError(f"requires={requires!r} must be a qtasks.Requires(…)")
    return requires


class Unmet(NamedTuple):
    """One thing that a broker or storage does not guarantee."""

    requirement: str
    """As it is written: `survives='machine crash'`."""
    why: str
    """What the part guarantees instead."""
    able: str
    """The settings that would do, and the installed parts that can guarantee it."""

    def __str__(self) -> str:
        return f"{self.requirement}, but {self.why}" + (f"; {self.able}" if self.able else "")


def unmet(
    requires: Requires, broker: Guarantees, storage: Guarantees, joint: bool
) -> Iterator[Unmet]:
    """Yield what a broker and a storage, both started, do not guarantee.

    `joint`: whether they have a joint composition, which a caller's transaction needs.
    """
    usual = asdict(NOTHING)
    if requires.transactions and broker.transactions and storage.transactions and not joint:
        yield Unmet("transactions=True", f"{broker.part} and {storage.part} use two databases", "")
    for name, wanted in asdict(requires).items():
        if wanted == usual[name]:
            continue
        yield from _missing(name, wanted, "broker", broker)
        if name in OF_BOTH:
            yield from _missing(name, wanted, "storage", storage)


def _missing(
    name: str, wanted: object, half: Literal["broker", "storage"], told: Guarantees
) -> Iterator[Unmet]:
    has = _COMPARED.get(name, lambda given, _: bool(given))
    given = getattr(told, name)
    if has(given, wanted):
        return
    able = [p.part for p in installed_parts(half) if has(_at_best(p, name), wanted)]
    why, better = f"{told.part} has {name}={given!r}", ""
    if name == "survives":
        why += f" ({told.durability})"
        if has(_at_best(told, name), wanted):
            better = f"set {told.best_settings}; "
    others = ", ".join(part for part in able if part != told.part)
    yield Unmet(
        f"{name}={wanted!r}", why, f"{better}each {half} that can: {others or 'none installed'}"
    )


def _at_best(told: Guarantees, name: str) -> object:
    """Return what a part can guarantee if its server is set up for it."""
    if name == "survives":
        return told.at_best or told.survives
    return getattr(told, name)


_COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "survives": lambda given, wanted: EVENTS.index(given) >= EVENTS.index(wanted),
    "order": lambda given, wanted: ORDERS.index(given) >= ORDERS.index(wanted),
    "largest": lambda given, wanted: given is None or given >= wanted,
}
"""How to compare what is given with what is wanted. The rest is there or not."""
