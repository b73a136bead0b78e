"""From a URL to a backend, and what is said when there is none."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest

from qtasks_core import CONTRACT_VERSION, Backend, Broker, Inbox, Storage, Subscription
from qtasks_core.contracts.balancer import Balancer
from qtasks_core.contracts.composition import Composition
from qtasks_core.contracts.executor import Executor
from qtasks_core.contracts.route_policy import RoutePolicy
from qtasks_core.contracts.serializer import Serializer
from qtasks_core.distribution import GROUP
from qtasks_core.errors import ConfigurationError
from qtasks_core.lookup import find_backend, resolve_broker, resolve_storage
from qtasks_log import Log
from qtasks_memory import MemoryBackend, MemoryBroker, MemoryStorage


class LaterBackend(MemoryBackend):
    contract = 99


class EarlierBackend(MemoryBackend):
    contract = 0


class UnfinishedBackend(Backend):
    contract = 1

    def broker(self, url: str) -> Broker:
        return MemoryBroker()


class NoBackend:
    contract = 1


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed: these, whatever the environment holds."""
    names = {
        "memory": "qtasks_memory:MemoryBackend",
        "later": f"{__name__}:LaterBackend",
        "earlier": f"{__name__}:EarlierBackend",
        "unfinished": f"{__name__}:UnfinishedBackend",
        "none": f"{__name__}:NoBackend",
    }
    found = EntryPoints(EntryPoint(n, v, GROUP) for n, v in names.items())

    def entry_points(**params: Any) -> EntryPoints:
        return found.select(**params)

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)


def test_same_url_for_both_halves() -> None:
    assert isinstance(resolve_broker("memory://one?lease=2.5"), MemoryBroker)
    assert isinstance(resolve_storage("memory://one?lease=2.5"), MemoryStorage)
    assert isinstance(find_backend("memory://"), MemoryBackend)
    assert resolve_broker("memory://one?lease=2.5").guarantees.lease == 2.5


@pytest.mark.parametrize("resolve", [find_backend, resolve_broker, resolve_storage])
def test_unknown_scheme(resolve: object) -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolve("mongodb://me:hunter2@host")  # type: ignore[operator]
    said = str(caught.value)
    assert "mongodb://" in said
    assert "earlier, later, memory, none, unfinished" in said
    assert "hunter2" not in said


@pytest.mark.parametrize("url", ["", "localhost", "/var/lib/tasks.db", "redis"])
def test_not_a_url(url: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a URL; try sqlite:///"):
        find_backend(url)


@pytest.mark.parametrize("url", ["://me:hunter2@host", ":hunter2@host", "me:hunter2@host"])
def test_not_quite_a_url_shows_no_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        find_backend(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(("scheme", "contract"), [("later", 99), ("earlier", 0)])
def test_wrong_contract_version(scheme: str, contract: int) -> None:
    with pytest.raises(ConfigurationError) as caught:
        find_backend(f"{scheme}://")
    assert f"contract {contract}" in str(caught.value)
    assert f"contract {CONTRACT_VERSION}" in str(caught.value)


def test_what_is_no_backend() -> None:
    with pytest.raises(
        ConfigurationError, match="NoBackend, registered for none://, is no Backend"
    ):
        find_backend("none://")


def test_unfinished_backend_names_what_it_lacks() -> None:
    with pytest.raises(TypeError, match="storage"):
        find_backend("unfinished://")


def test_option_of_the_wrong_kind() -> None:
    with pytest.raises(ConfigurationError, match="lease"):
        resolve_broker("memory://?lease=soon")


CONTRACTS = [
    Backend, Balancer, Broker, Composition, Executor, Inbox, Log, RoutePolicy, Serializer, Storage,
    Subscription,
]  # fmt: skip


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
def test_class_that_leaves_out_a_method_fails_when_built(contract: type) -> None:
    """For each abstract method: a class with all the others cannot be built and says why."""
    abstract: frozenset[str] = contract.__abstractmethods__  # type: ignore[attr-defined]
    assert abstract
    for left_out in abstract:
        given = {name: lambda self: None for name in abstract - {left_out}}
        incomplete = type("Incomplete", (contract,), given)
        with pytest.raises(TypeError, match=rf"Incomplete.*\b{left_out}\b"):
            incomplete()
    type("Complete", (contract,), {name: lambda self: None for name in abstract})()
