"""The kit on parts that are wrong on purpose: run by `test_can_fail.py`, not by itself.

Each wrong part gets a class with its name, and the honest ones get one a contract.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import qtasks_core
from qtasks_conformance import (
    BackendContract,
    BrokerContract,
    CompositionContract,
    Least,
    Part,
    StorageContract,
    Subject,
)
from qtasks_core import Backend
from qtasks_sqlite import SqliteBroker, SqliteStorage
from tests.kit.served import Broker, FlagServer, Storage, servers
from tests.kit.tries import TRIES, Wrong
from tests.kit.wrong_backends import Honest
from tests.sqlite_file import injector, spoiler

CONTRACTS = {
    "broker": BrokerContract,
    "storage": StorageContract,
    "pair": CompositionContract,
    "backend": BackendContract,
}


def subject_in_memory(wrong: Wrong | None) -> Subject:
    """Return honest parts over memory, but for the wrong one."""
    servers["the"] = FlagServer(*(wrong if isinstance(wrong, tuple) else ()))
    broker, storage = chosen(wrong, Broker, Storage)
    return Subject(
        broker=Part(broker, {"lease": 0.6, "server": "the"}),
        storage=Part(storage, {"server": "the"}),
        lease=0.6,
        slack=1.0,
        server=servers["the"],
        ends_with_process=True,
        least_broker=Least(
            settle_confirmed=True,
            atomic_retries=True,
            counts_deliveries=True,
            priorities=True,
            order="queue",
        ),
        least_storage=Least(survives="server crash"),
    )


def subject_in_processes(wrong: Wrong | None, directory: Path) -> Subject:
    """Return honest parts over a file, but for the wrong one."""
    url = f"sqlite:///{directory}/kit.db"
    broker, storage = chosen(wrong, SqliteBroker, SqliteStorage)
    return Subject(
        broker=Part(broker, {"url": url, "lease": 1.0}),
        storage=Part(storage, {"url": url}),
        lease=1.0,
        inject=injector(directory / "kit.db"),
        spoil=spoiler(directory / "kit.db"),
        driver="sqlite3",
        slack=2.0,
    )


def subject_of_urls(port: int) -> Subject:
    """Return a subject whose URLs name the backend that is registered for `kit`."""
    return Subject(
        broker=Part("qtasks_memory:MemoryBroker"),
        storage=Part("qtasks_memory:MemoryStorage"),
        lease=1.0,
        url=f"kit://127.0.0.1:{port}/one",
        other_url=f"kit://127.0.0.1:{port}/other",
        options=("lease", "retention"),
    )


def register(backend: type[Backend], directory: Path) -> None:
    """Write what says, to whoever has the directory in its path, that `kit` is the backend's."""
    installed = directory / "qtasks_kit-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: qtasks-kit\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(f"[qtasks.backends]\nkit = {target_of(backend)}\n")


def chosen(wrong: Wrong | None, broker: type, storage: type) -> tuple[str, str]:
    """Return the targets of a broker and a storage, with the wrong one in its place."""
    if isinstance(wrong, type):
        broker, storage = (
            (wrong, storage) if issubclass(wrong, qtasks_core.Broker) else (broker, wrong)
        )
    return target_of(broker), target_of(storage)


def target_of(part: type) -> str:
    """Return how a `Part` names a class."""
    return f"{part.__module__}:{part.__name__}"


class OnTrial:
    """Mixed into a contract: the subject is that of the class."""

    wrong: Wrong | None = None
    in_processes = False

    @pytest.fixture
    def subject(self, tmp_path: Path) -> Subject:
        if self.in_processes:
            return subject_in_processes(self.wrong, tmp_path)
        return subject_in_memory(self.wrong)


class BackendOnTrial:
    """Mixed into `BackendContract`: the backend is that of the class."""

    wrong: type[Backend] = Honest

    @pytest.fixture
    def subject(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Subject]:
        register(self.wrong, tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield subject_of_urls(server.getsockname()[1])


for _trial in TRIES:
    _facts = {"in_processes": _trial.in_processes}
    _on_trial = BackendOnTrial if _trial.contract == "backend" else OnTrial
    _bases = (_on_trial, CONTRACTS[_trial.contract])
    globals()[_trial.honest] = type(_trial.honest, _bases, _facts)
    globals()[_trial.on_trial] = type(_trial.on_trial, _bases, {**_facts, "wrong": _trial.wrong})
