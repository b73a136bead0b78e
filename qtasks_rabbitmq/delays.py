"""Delays by a ladder of queues: level k holds every message for exactly 2^k units.

A delay is a number of units. Its binary digits say in which levels a message waits. All messages of
a level wait equally long. So first in, first out is right, and no message waits for another.

When a message leaves a level, the server dead-letters it, at least once, to the exchange of the
level below. That exchange routes by the digit of its level: into its queue, or on to the exchange
below. Below level 0, the exchange `due` leads to the task queue. A message that matches no queue
goes to `lost`, so that it cannot stall a level. The entry has no such fallback: if a level is
missing, the server refuses the message.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

from qtasks_core.schemas import LONGEST
from qtasks_rabbitmq.topology import Names, quorum

if TYPE_CHECKING:
    from pamqp.base import Frame

UNIT = 0.1
"""Seconds of level 0, which is also the most that rounding up can add."""
LEVELS = 26
"""The top level holds for 38.8 days. The server refuses a time to live above 49.7 days."""
FIRST_LEVELS = 14
"""Levels for all delays up to 27 minutes. The first delay declares them.

The first longer delay declares the others.
"""
MARGIN = 0.03
"""Seconds added, because the server's clock cuts off up to a millisecond per level."""
DIGITS = 20
"""More digits than any number in our headers has."""
ENTER = "qtasks-enter"
REST = "qtasks-rest"
"""Header: milliseconds that remain when a message leaves the ladder. It must enter again."""


def route(delay: float) -> tuple[int, dict[str, Any]]:
    """Return the level at which a message with this delay (seconds) enters, and its headers."""
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
    """Return the seconds that a message still has to wait after it left the ladder.

    Raises `ValueError` if QTasks did not write the header.
    """
    rest = number_of(headers, REST) / 1000
    if rest > LONGEST:
        raise ValueError(f"header {REST}: a delay of {rest:.0f} s")
    return rest


def left_of(names: Names, headers: dict[str, Any]) -> float:
    """Return the seconds that a message still has to wait, if the ladder could not route it."""
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
    """Return the number that a header contains as text; 0 without the header.

    Raises `ValueError` if QTasks did not write the header.
    """
    if name not in headers:
        return 0
    text = headers[name]
    if not (isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < DIGITS):
        raise ValueError(f"header {name} is {str(text)[:40]!r}, which is no number")
    return int(text)


def ladder_methods(names: Names, levels: range, version: tuple[int, ...]) -> list[Frame]:
    """Return the methods that declare some levels. The levels below them must exist."""
    from pamqp.commands import Exchange

    methods: list[Frame] = [
        Exchange.Declare(exchange=names.delay, exchange_type="headers", durable=True),
    ]
    for level in levels:
        methods += _level_methods(names, level, version)
    return methods


def _level_methods(names: Names, level: int, version: tuple[int, ...]) -> list[Frame]:
    from pamqp.commands import Exchange, Queue

    name = names.level(level)
    below = names.level(level - 1) if level else names.due
    arguments = quorum(version) | {
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
