"""The registry of workers: each worker renews a shared value `worker/ID` while it lives."""

from __future__ import annotations

import time
from contextlib import suppress

import msgspec

from qtasks_core import Storage, WorkerInfo
from qtasks_core.errors import NotSupported

PREFIX = "worker/"
PERIOD = 10.0
"""Seconds between renewals of an entry. Long enough that an idle worker costs almost nothing."""
SEEN = "worker-seen"
"""The shared value that the first worker sets, and that is never removed."""
STALE = 3 * PERIOD
"""Seconds without a renewal after which a worker counts as dead."""
_GONE = 3600.0
"""Seconds without a renewal after which the entry of a killed worker is removed."""

_decoder = msgspec.msgpack.Decoder(WorkerInfo)


async def workers_alive(storage: Storage) -> list[WorkerInfo]:
    """Return the workers whose entries were renewed in the last `STALE` seconds.

    Raises `NotSupported` or `Unavailable`.
    """
    since = time.time() - STALE
    found = await storage.values(PREFIX)
    infos = [_decoder.decode(found[key]) for key in sorted(found)]
    return [info for info in infos if info.seen_at >= since]


async def ever_seen(storage: Storage) -> bool:
    """Return whether a worker has ever run. Raises `NotSupported` or `Unavailable`."""
    return await storage.get_value(SEEN) is not None


async def forget_silent(storage: Storage) -> None:
    """Remove the entries of workers that died without removing them. Raises `Unavailable`."""
    since = time.time() - _GONE
    with suppress(NotSupported):
        for key, value in (await storage.values(PREFIX)).items():
            if _decoder.decode(value).seen_at < since:
                await storage.set(key, None, expect=value)
