"""The worker: `python -m store.worker`."""

from __future__ import annotations

from .queue import queue
from .settings import settings

if __name__ == "__main__":
    queue.run_forever(concurrency=settings.concurrency)
