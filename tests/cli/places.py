"""Places in which no app has been: a file, or a database of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest

from tests.pairs import url_of


@contextmanager
def empty_place(request: pytest.FixtureRequest, backend: str, directory: Path) -> Iterator[str]:
    """Yield the URL of a new place of a backend."""
    url = url_of(request, backend, directory)
    if backend != "postgres":
        yield url
        return
    name = f"cli_{uuid4().hex}"
    execute(url, f"CREATE DATABASE {name}")
    try:
        yield urlsplit(url)._replace(path=f"/{name}").geturl()
    finally:
        execute(url, f"DROP DATABASE {name} WITH (FORCE)")


def execute(url: str, statement: str) -> None:
    """Run one statement, in a thread: the test may have an event loop of its own."""

    async def run() -> None:
        connection = await asyncpg.connect(url)
        await connection.execute(statement)
        await connection.close()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, run()).result()
