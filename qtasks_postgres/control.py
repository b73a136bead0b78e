"""Operations on queues and workers from outside: counting, purging, commands."""

from __future__ import annotations

import logging
from base64 import b64decode, b64encode

from qtasks_core import Command
from qtasks_core.errors import WireError
from qtasks_core.wire import decode_command, encode_command

logger = logging.getLogger("qtasks.postgres")

COMMANDS = "\0commands"
"""Stands for a queue in the name of the channel of commands. No queue has this name."""

# A message that waits was received if it has a count: then its lease holds. A retry is a new row.
# `since` is when the oldest ready message became ready. It is the first one of a priority, or the
# one that came back or became due first.
DEPTH = """
    SELECT (
               SELECT count(*) FROM qtasks.messages
               WHERE namespace = $1 AND queue = $2 AND wake_at IS NULL
           ) + count(*) FILTER (WHERE wake_at <= statement_timestamp()) AS ready,
           count(*) FILTER (WHERE wake_at > statement_timestamp() AND delivery = 0) AS delayed,
           count(*) FILTER (WHERE wake_at > statement_timestamp() AND delivery > 0) AS in_flight,
           extract(epoch FROM statement_timestamp() - least(
               min(wake_at) FILTER (WHERE wake_at <= statement_timestamp()), (
                   SELECT min(first.published_at)
                   FROM generate_series(9, 0, -1) AS level (priority)
                   CROSS JOIN LATERAL (
                       SELECT published_at FROM qtasks.messages
                       WHERE namespace = $1 AND queue = $2 AND wake_at IS NULL
                         AND priority = level.priority
                       ORDER BY id LIMIT 1
                   ) AS first
               )
           ))::float8 AS oldest_age
    FROM qtasks.messages WHERE namespace = $1 AND queue = $2 AND wake_at IS NOT NULL
"""

PURGED = 5000
"""Messages that one statement deletes."""

# Each statement starts where the last one stopped. Else it would pass the deleted entries.
PURGE_READY = f"""
    DELETE FROM qtasks.messages WHERE id = ANY(ARRAY(
        SELECT id FROM qtasks.messages
        WHERE namespace = $1 AND queue = $2 AND wake_at IS NULL
            AND (priority, id) > ($3::smallint, $4::bigint)
        ORDER BY priority, id LIMIT {PURGED} FOR UPDATE SKIP LOCKED
    ))
    RETURNING priority, id
"""
PURGE_WAITING = f"""
    DELETE FROM qtasks.messages WHERE id = ANY(ARRAY(
        SELECT id FROM qtasks.messages
        WHERE namespace = $1 AND queue = $2 AND wake_at IS NOT NULL
            AND (delivery = 0 OR wake_at <= statement_timestamp())
        ORDER BY namespace, queue, priority, wake_at LIMIT {PURGED} FOR UPDATE SKIP LOCKED
    ))
    RETURNING id
"""

# Notifications of one transaction arrive in order and together.
SEND = """
    SELECT pg_notify($1, payload)
    FROM unnest($2::text[]) WITH ORDINALITY AS piece (payload, place) ORDER BY place
"""
PIECE = 7000
"""Characters of one notification, whose payload has less than 8000 bytes."""


def pieces_of(command: Command) -> list[str]:
    """Return the payloads of a command. Most commands have one: `1/1 …`."""
    data = b64encode(encode_command(command)).decode()
    pieces = [data[at : at + PIECE] for at in range(0, len(data), PIECE)]
    return [f"{at}/{len(pieces)} {piece}" for at, piece in enumerate(pieces, 1)]


class Assembly:
    """Joins the pieces of commands for one listener."""

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def add(self, payload: str) -> Command | None:
        """Add a payload, and return the command if it was the last piece of one."""
        place, _, piece = payload.partition(" ")
        at, _, count = place.partition("/")
        if at == "1":
            self._pieces = []
        self._pieces.append(piece)
        if at != count:
            return None
        try:
            return decode_command(b64decode("".join(self._pieces)))
        except (WireError, ValueError) as error:
            logger.warning("a command was passed over: %s", error)
            return None
