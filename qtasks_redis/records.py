"""How a record is stored: its head, its place in the lists, and how long it is kept."""

from __future__ import annotations

import math
import time
from typing import Final

import msgspec

from qtasks_core import Task
from qtasks_core.errors import WireError
from qtasks_core.records import RANK, RANKS, expiry_of, order_of, unreadable
from qtasks_core.wire import decode_task

CLASSES: Final = (*RANK, "dead")
"""A record is in the list of its status, or in `dead` if it is a dead letter."""
_LONGEST: Final = 10**15
"""The most milliseconds that a record is kept. The server refuses much longer times."""


def head_of(task: Task) -> bytes:
    """Return the head that the scripts compare: the order, and the execution with its length."""
    execution = task.execution.encode()
    return b"%010d%03d%b" % (order_of(task), len(execution), execution)


def parts_of(value: bytes) -> tuple[bytes, bytes]:
    """Return the head and the encoded record of a stored value."""
    behind = 13 + int(value[10:13])
    return value[:behind], value[behind:]


def decode(uuid: str, value: bytes) -> Task:
    """Return a stored record. If it is unreadable, return what the head tells."""
    head, data = parts_of(value)
    try:
        return decode_task(data)
    except WireError as error:
        return unreadable(uuid, int(head[:10]), head[13:].decode(errors="replace"), error)


def class_of(task: Task) -> str:
    """Return the class of a record."""
    return "dead" if task.status == "error" and task.dead is not None else task.status


def class_in(head: bytes) -> str:
    """Return the class that the head of a record tells. It does not tell `dead`."""
    rank = int(head[:10]) % RANKS
    return CLASSES[rank] if rank < len(RANK) else "error"


def pair_of(queue: str, task_name: str) -> str:
    """Return a queue and the name of a task as one text."""
    return msgspec.json.encode((queue, task_name)).decode()


def in_pair(pair: str) -> tuple[str, str]:
    """Return the queue and the name of a task of which `pair_of` made this text."""
    return msgspec.json.decode(pair, type=tuple[str, str])


def score_of(task: Task) -> str:
    """Return the time of a record as a score. An infinite time has no place in a list."""
    return repr(task.created_at) if math.isfinite(task.created_at) else "0"


def keep_of(task: Task, retention: float) -> str:
    """Return the milliseconds until a record expires, or nothing if it never does.

    Both times are of this machine's clock, so the server's clock may differ.
    """
    expires_at = expiry_of(task, retention)
    if expires_at is None:
        return ""
    return str(min(max(math.ceil((expires_at - time.time()) * 1000), 1), _LONGEST))
