"""The kit on parts that are wrong on purpose: run by `test_can_fail.py`, not by itself.

Each wrong part gets a class with its name, and the honest ones get one a contract.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import qtasks_core
from qtasks_conformance import (
    BrokerContract,
    CompositionContract,
    Least,
    Part,
    StorageContract,
    Subject,
)
from qtasks_sqlite import SqliteBroker, SqliteStorage
from tests.kit.served import Broker, FlagServer, Storage, servers
from tests.kit.tries import TRIES, Wrong
from tests.sqlite_file import injector, spoiler

CONTRACTS = {"broker": BrokerContract, "storage": StorageContract, "pair": CompositionContract}


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
            settle_confirmed=True, counts_deliveries=True, priorities=True, order="queue"
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


for _trial in TRIES:
    _facts = {"in_processes": _trial.in_processes}
    _bases = (OnTrial, CONTRACTS[_trial.contract])
    globals()[_trial.honest] = type(_trial.honest, _bases, _facts)
    globals()[_trial.on_trial] = type(_trial.on_trial, _bases, {**_facts, "wrong": _trial.wrong})
