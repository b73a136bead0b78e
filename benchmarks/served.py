"""The backend of a benchmark: a new server, a new file, or memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from tests.services import SERVICES

BACKENDS = ("memory", "sqlite", *SERVICES)


@contextmanager
def served(backend: str) -> Iterator[str]:
    """Yield the URL of a new backend, or of the server in `QTASKS_TEST_…_URL`."""
    if backend == "memory":
        yield "memory://bench"
    elif backend == "sqlite":
        with tempfile.TemporaryDirectory(prefix="qtasks-bench-") as directory:
            yield f"sqlite:///{directory}/bench.db"
    else:
        service = SERVICES[backend]()
        try:
            yield service.start()
        finally:
            service.stop()
