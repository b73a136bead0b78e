"""What runs and what is left, as /proc tells it."""

from __future__ import annotations

import time
from pathlib import Path

from qtasks.testing.guard import descendants


def alive(pid: int) -> bool:
    """Tell whether the process runs; one that waits to be collected does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def below(pid: int) -> list[int]:
    """Return the processes started by `pid`, directly or not."""
    return descendants(pid)


def gone(pids: list[int], within: float) -> bool:
    """Wait up to `within` seconds until none of them runs."""
    deadline = time.monotonic() + within
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
