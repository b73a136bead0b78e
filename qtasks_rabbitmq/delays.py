"""Delays by a ladder of queues: level k holds every message for exactly 2^k units.

A delay is a number of units, and its binary digits say in which levels a message waits. All
messages of a level wait equally long, so first in, first out holds and none waits for another.
From a level the server dead-letters to the exchange of the level below, at least once; that
routes by the digit of its level: into its queue, or on to the exchange below. Below level 0 the
exchange `due` leads to the queue. What finds no way is kept in `lost`, so that it cannot stall
a level. The way in has no such net: there, a missing level is a refusal.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

from qtasks_core.schemas import LONGEST
from qtasks_rabbitmq.topology import QUORUM, Names

if TYPE_CHECKING:
    from pamqp.base import Frame

UNIT = 0.1
"""Seconds of level 0: what rounding up may cost."""
LEVELS = 26
"""The top level holds 38.8 days; the server takes no time to live above 49.7."""
FIRST_LEVELS = 14
"""Declared with the first delay, for all up to 27 minutes; the others with the first longer one."""
MARGIN = 0.03
"""Seconds added against the server's clock, which cuts off up to a millisecond a level."""
DIGITS = 20
"""More digits than any number in a header has."""
ENTER = "qtasks-enter"
REST = "qtasks-rest"
"""Header: milliseconds that are left when a message leaves the ladder; it has to enter again."""


def route(delay: float) -> tuple[int, dict[str, Any]]:
    """Return the level at which a message of this delay (seconds) enters, and its headers."""
    units = max(1, ceil((delay + MARGIN) / UNIT))
    rest = units - (2**LEVELS - 1)
    headers: dict[str, Any] = {}
    if rest > 0:
        units -= rest
        headers[REST] = str(round(rest * UNIT * 1000))
    top = units.bit_length() - 1
    headers[ENTER] = str(top)
    for level in range(top):
        headers[_digit(level)] = bool(units >> level & 1)
    return top, headers


def levels_for(top: int) -> int:
    """Return how many levels to declare for a message that enters at `top` (-1: none)."""
    if top < 0:
        return 0
    return FIRST_LEVELS if top < FIRST_LEVELS else LEVELS


def rest_of(headers: dict[str, Any]) -> float:
    """Return the seconds that a message which left the ladder still has to wait.

    Raises `ValueError` for a header that is none of ours.
    """
    rest = number_of(headers, REST) / 1000
    if rest > LONGEST:
        raise ValueError(f"header {REST}: a delay of {rest:.0f} s")
    return rest


def left_of(names: Names, headers: dict[str, Any]) -> float:
    """Return the seconds that a message still has to wait which found no way within the ladder."""
    deaths = headers.get("x-death")
    passed = {
        death.get("queue")
        for death in (deaths if isinstance(deaths, list) else [])
        if isinstance(death, dict)
    }
    top = number_of(headers, ENTER) if ENTER in headers else -1
    waiting = [
        level
        for level in range(min(top + 1, LEVELS))
        if (level == top or headers.get(_digit(level))) and names.level(level) not in passed
    ]
    return rest_of(headers) + UNIT * sum(1 << level for level in waiting)


def number_of(headers: dict[str, Any], name: str) -> int:
    """Return a number that stands in a header as text; 0 without the header.

    Raises `ValueError` for what QTasks would not have written.
    """
    if name not in headers:
        return 0
    text = headers[name]
    if not (isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < DIGITS):
        raise ValueError(f"header {name} is {str(text)[:40]!r}, which is no number")
    return int(text)


def ladder_methods(names: Names, levels: range) -> list[Frame]:
    """Return what declares some levels; those below them must be there."""
    from pamqp.commands import Exchange

    methods: list[Frame] = [
        Exchange.Declare(exchange=names.delay, exchange_type="headers", durable=True),
    ]
    for level in levels:
        methods += _level_methods(names, level)
    return methods


def _level_methods(names: Names, level: int) -> list[Frame]:
    from pamqp.commands import Exchange, Queue

    name = names.level(level)
    below = names.level(level - 1) if level else names.due
    arguments = QUORUM | {
        "x-message-ttl": round(2**level * UNIT * 1000),
        "x-dead-letter-exchange": below,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
    match: dict[str, Any] = {"x-match": "all"}
    return [
        Queue.Declare(queue=name, durable=True, arguments=arguments),
        Exchange.Declare(
            exchange=name,
            exchange_type="headers",
            durable=True,
            arguments={"alternate-exchange": names.lost},
        ),
        Queue.Bind(queue=name, exchange=name, arguments=match | {_digit(level): True}),
        Exchange.Bind(destination=below, source=name, arguments=match | {_digit(level): False}),
        Queue.Bind(queue=name, exchange=names.delay, arguments=match | {ENTER: str(level)}),
    ]


def _digit(level: int) -> str:
    return f"qtasks-{level}"
