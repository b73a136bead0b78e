"""The pairs of parts that end-to-end tests run on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.services import Service

SERVERS = ("redis", "postgres", "rabbitmq", "kafka")
BACKENDS = ("memory", "sqlite", *SERVERS)
ALL = tuple(f"{broker}+{storage}" for broker in BACKENDS for storage in BACKENDS)


class Pair(NamedTuple):
    """A broker and a storage by their URLs, and the lease (seconds) the broker's URL asks for."""

    broker: str
    storage: str
    lease: float

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which an app finds these parts."""
        return {"QTASKS_BROKER_URL": self.broker, "QTASKS_STORAGE_URL": self.storage}


LEASES = dict.fromkeys(BACKENDS, 4.0) | {"rabbitmq": 6.0, "kafka": 6.0}


def url_of(request: pytest.FixtureRequest, name: str, directory: Path) -> str:
    """Return the URL of a backend, starting its server when it has one."""
    if name == "memory":
        return "memory://"
    if name == "sqlite":
        return f"sqlite:///{directory}/qtasks.db"
    service: Service = request.getfixturevalue(f"{name}_server")
    return service.url


def with_lease(url: str, lease: float) -> str:
    """Return the URL with the lease as an option."""
    return f"{url}{'&' if '?' in url else '?'}lease={lease}"


def pair_of(
    request: pytest.FixtureRequest, names: str, directory: Path, lease: float | None = None
) -> Pair:
    """Return the pair called `broker+storage`, or `backend` for both halves of one."""
    broker, _, storage = names.partition("+")
    lease = lease or LEASES[broker]
    broker_url = with_lease(url_of(request, broker, directory), lease)
    return Pair(broker_url, url_of(request, storage or broker, directory), lease)
