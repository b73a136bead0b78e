"""Operations on queues and workers from outside: counting, purging, commands."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from qtasks_core import Command, QueueDepth
from qtasks_core.errors import WireError
from qtasks_core.wire import decode_command, encode_command
from qtasks_sqlite.connection import Transaction
from qtasks_sqlite.listening import channel

logger = logging.getLogger("qtasks.sqlite")

PURGED = 5000
"""Messages that one transaction deletes."""
_KEPT = 600.0
"""Seconds that a command is kept for slow listeners."""


def counting(namespace: int, queue: str) -> Callable[[Transaction], QueueDepth]:
    """Return the work that counts messages as a receiver would find them now."""

    def count(turn: Transaction) -> QueueDepth:
        number = turn.known_queue(namespace, queue)
        if number is None:
            return QueueDepth(0, 0, 0)
        these, now = "FROM qtasks_messages WHERE queue = ? AND wake_at", time.time()
        (ready,) = turn.execute(f"SELECT count(*) {these} IS NULL", (number,)).fetchone()
        due, since = turn.execute(
            f"SELECT count(*), min(wake_at) {these} <= ?", (number, now)
        ).fetchone()
        waiting, held = turn.execute(
            f"SELECT count(*), coalesce(sum(holder != 0), 0) {these} > ?", (number, now)
        ).fetchone()
        became_ready = [at for at in (since, *_ready_at(turn, number)) if at is not None]
        age = max(now - min(became_ready), 0.0) if became_ready else None
        return QueueDepth(ready + due, waiting - held, held, age)

    return count


def _ready_at(turn: Transaction, queue: int) -> list[float | None]:
    """Return when the first ready message of each priority became ready, as far as known."""
    firsts = (
        turn.execute(
            "SELECT ready_at FROM qtasks_messages "
            "WHERE queue = ? AND wake_at IS NULL AND priority = ? ORDER BY id LIMIT 1",
            (queue, priority),
        ).fetchone()
        for priority in range(10)
    )
    return [first[0] for first in firsts if first is not None]


def purging(namespace: int, queue: str) -> Callable[[Transaction], tuple[int, bool]]:
    """Return the work that drops some messages that are not in flight.

    The work returns their number, and whether none is left.
    """

    def purge(turn: Transaction) -> tuple[int, bool]:
        number = turn.known_queue(namespace, queue)
        if number is None:
            return 0, True
        dropped = sum(
            turn.execute(
                "DELETE FROM qtasks_messages WHERE id IN (SELECT id FROM qtasks_messages "
                f"WHERE queue = ? AND {which} LIMIT {PURGED})",
                (number, *values),
            ).rowcount
            for which, values in (
                ("wake_at IS NULL", ()),
                ("wake_at IS NOT NULL AND (holder = 0 OR wake_at <= ?)", (time.time(),)),
            )
        )
        return dropped, dropped < PURGED

    return purge


def sending(namespace: int, command: Command) -> Callable[[Transaction], None]:
    """Return the work that stores a command and rings the listeners."""
    data = encode_command(command)

    def send(turn: Transaction) -> None:
        now = time.time()
        turn.execute("DELETE FROM qtasks_commands WHERE sent_at < ?", (now - _KEPT,))
        turn.execute(
            "INSERT INTO qtasks_commands (namespace, sent_at, data) VALUES (?, ?, ?)",
            (namespace, now, data),
        )
        number = turn.known_queue(namespace, channel("commands"))
        if number is not None:
            turn.rung_queues.add(number)

    return send


class Heard:
    """Reads the commands for one listener. Each look finds those after the last look."""

    def __init__(self, namespace: int) -> None:
        self._namespace = namespace
        self._last = 0

    def number(self, turn: Transaction) -> int:
        """Return the number of the channel, and start after the commands that exist now."""
        (last,) = turn.execute("SELECT coalesce(max(id), 0) FROM qtasks_commands").fetchone()
        self._last = last
        return turn.queue(self._namespace, channel("commands"))

    def look(self, turn: Transaction) -> list[Command]:
        """Return the new commands, in the order in which they were sent."""
        rows = turn.execute(
            "SELECT id, data FROM qtasks_commands WHERE namespace = ? AND id > ? ORDER BY id",
            (self._namespace, self._last),
        ).fetchall()
        commands: list[Command] = []
        # After the commit, because a failed transaction is repeated and must find them again.
        turn.after_commit(lambda: self._go_on_behind(rows[-1][0] if rows else self._last))
        for _, data in rows:
            try:
                commands.append(decode_command(data))
            except WireError as error:
                logger.warning("a command was passed over: %s", error)
        return commands

    def _go_on_behind(self, number: int) -> None:
        self._last = number
