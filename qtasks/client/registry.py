"""The registry of workers: each keeps a shared value `worker/ID` fresh while it lives."""

from __future__ import annotations

import time
from contextlib import suppress

import msgspec

from qtasks_core import Storage, WorkerInfo
from qtasks_core.errors import NotSupported

PREFIX = "worker/"
PERIOD = 10.0
"""Seconds between signs of life: few enough for an idle worker to cost next to nothing."""
SEEN = "worker-seen"
"""The shared value that is set once a worker has been there, and stays."""
STALE = 3 * PERIOD
"""Seconds of silence after which a worker is taken for dead."""
_GONE = 3600.0
"""Seconds of silence after which a worker that was killed is taken off the list."""

_decoder = msgspec.msgpack.Decoder(WorkerInfo)


async def workers_alive(storage: Storage) -> list[WorkerInfo]:
    """Return the workers that gave a sign of life lately. Raises `NotSupported`, `Unavailable`."""
    since = time.time() - STALE
    found = await storage.values(PREFIX)
    infos = [_decoder.decode(found[key]) for key in sorted(found)]
    return [info for info in infos if info.seen_at >= since]


async def ever_seen(storage: Storage) -> bool:
    """Say whether there ever was a worker. Raises `NotSupported`, `Unavailable`."""
    return await storage.get_value(SEEN) is not None


async def forget_silent(storage: Storage) -> None:
    """Take workers off the list that could not do it themselves. Raises `Unavailable`."""
    since = time.time() - _GONE
    with suppress(NotSupported):
        for key, value in (await storage.values(PREFIX)).items():
            if _decoder.decode(value).seen_at < since:
                await storage.set(key, None, expect=value)
