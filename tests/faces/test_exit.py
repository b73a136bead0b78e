"""How a process ends: without a hang or a complaint, and with all that it was told is durable."""

from __future__ import annotations

import re
import signal
import socket
import sys

import pytest

from qtasks import QueueTasks
from qtasks_memory import MemoryBroker
from tests.faces import exiting
from tests.processes import PATIENCE, Process
from tests.waits import WaitedFor

BACKENDS = ["sqlite", "redis", "postgres", "rabbitmq", "kafka"]
COMPLAINTS = ("Traceback", "Exception ignored", "never awaited", "destroyed", "not closed")


def ended(how: str, environment: dict[str, str], interrupt: bool = False) -> tuple[int, str]:
    """Let a program end; return its status and what it said."""
    with Process("-m", "tests.faces.exiting", how, environment=environment) as program:
        if interrupt:
            program.wait_for("waiting")
            program.signal(signal.SIGINT)
        return program.wait(), program.output()


def noted(said: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the arguments of what was said to be durable, as another process finds them."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    uuids = re.findall(r"note (\S+)", said)
    with QueueTasks() as app:
        found = [app.get_task(uuid) for uuid in uuids]
    assert uuids
    assert None not in found
    return [task.task_name.partition(".")[2] for task in found if task is not None]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize(
    "how", ["default", "at_exit", "other_thread", "daemon_thread", "never_stopped", "asynchronous"]
)
def test_a_program_ends(
    how: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if how in ("at_exit", "other_thread") and (3, 12) <= sys.version_info < (3, 12, 3):
        pytest.skip("this Python starts no thread once its main thread has ended (gh-113964)")
    assert getattr(exiting, how).__doc__
    status, said = ended(how, environment)
    assert status == 0, said
    assert not [line for line in said.splitlines() if any(c in line for c in COMPLAINTS)], said
    times = 2 if how in ("at_exit", "other_thread") else 1
    assert len(noted(said, environment, monkeypatch)) == times


def test_a_programs_own_error_is_the_only_one(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, said = ended("failing", environment)
    assert (status, said.count("Traceback")) == (1, 1)
    assert said.rstrip().endswith("ValueError: its own")
    assert noted(said, environment, monkeypatch) == ["note"]


@pytest.mark.parametrize("backend", ["sqlite", "redis"], indirect=True)
def test_ctrl_c_while_waiting(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    status, said = ended("interrupted", environment, interrupt=True)
    assert status == -signal.SIGINT
    assert said.count("Traceback") == 1
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert noted(said, environment, monkeypatch) == ["never", "note"]


def test_ctrl_c_while_starting(environment: dict[str, str]) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        silent.settimeout(PATIENCE)
        environment["FAR_URL"] = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        how = "interrupted_starting"
        with Process("-m", "tests.faces.exiting", how, environment=environment) as program:
            connection, _ = silent.accept()
            with connection:  # from now on it waits for an answer, and for nothing else
                program.signal(signal.SIGINT)
                status, said = program.wait(), program.output()
    assert status == 0, said
    assert said.split() == ["waiting", "interrupted"]


def test_an_interrupted_wait_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = WaitedFor("waits")
    app = QueueTasks("waits", MemoryBroker("waits"), storage)
    never = app.task(name="never")(exiting.never.__wrapped__)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with app:
        task = never.add_task()
        monkeypatch.setattr("qtasks.bridge.crossing.Event.wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            task.wait_result()
        monkeypatch.undo()
        assert app.get_task(task.uuid) is not None  # what crossed before this has arrived
        assert not storage.waited_for
