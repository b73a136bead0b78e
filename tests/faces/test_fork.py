"""Processes that fork after they have used QTasks, from a thread and while another is using it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from qtasks import Closed, QueueTasks
from qtasks_memory import MemoryBroker, MemoryStorage
from tests.faces.descriptors import needs_proc
from tests.processes import Process

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
BACKENDS = ["sqlite", "redis", "postgres", "rabbitmq", "kafka"]


@needs_proc
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("whose", ["default", "explicit"])
@pytest.mark.usefixtures("worker_process")
def test_both_sides_of_a_fork_go_on(whose: str, backend: str, environment: dict[str, str]) -> None:
    # SQLite's doorbells are rung through a socket that is connected to nobody.
    inherited = 2 if backend == "sqlite" else 1
    quiet = ("-W", "ignore::DeprecationWarning")  # of Python 3.12 and newer, for any such fork
    with Process(*quiet, "-m", "tests.faces.forking", whose, environment=environment) as program:
        code = program.wait()
        said = program.output()
        assert code == 0, said
        assert Counter(said.splitlines()) == {
            "before 2": 1,
            f"inherited sockets {inherited}": 8,
            "child 1": 5,
            "grandchild 4": 2,
            "child again 4": 2,
            "fork 0": 7,
            "multiprocessing 0": 3,
            "after 3": 1,
            "all 210": 1,
            **({"sockets left 2": 1} if whose == "explicit" else {}),
        }


def in_child(check: object) -> int:
    assert callable(check)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            check()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_parts_that_were_given_as_objects_are_refused_in_a_child() -> None:
    app = QueueTasks("forked", MemoryBroker("forked"), MemoryStorage("forked"))

    def use() -> None:
        with pytest.raises(Closed, match="give its parts as URLs"):
            app.connect().result()

    with app:
        assert in_child(use) == 0
    assert in_child(lambda: app.connect().result()) == 0, "stopped before the fork"


def test_a_sqlite_file_survives_children_that_use_and_leave_it(tmp_path: Path) -> None:
    """The last one to close a file removes its log: no child may believe it is the last."""
    app = QueueTasks("forked", f"sqlite:///{tmp_path}/qtasks.db")

    @app.task()
    def add(x: int) -> int:
        return x

    uuids: list[str] = []
    with app:
        for number in range(20):

            def use(number: int = number) -> None:
                with app:
                    add.add_task(number)

            assert in_child(use) == 0
            uuids.append(add.add_task(number).uuid)
    with app:
        assert all(app.get_task(uuid) is not None for uuid in uuids)


def test_a_sqlite_file_survives_a_parent_that_leaves_it_first(tmp_path: Path) -> None:
    """Whoever believes to be the last one removes the log, in which the other still writes."""
    app = QueueTasks("forked", f"sqlite:///{tmp_path}/qtasks.db")

    @app.task()
    def add(x: int) -> int:
        return x

    child_is_in, parent_has_left = os.pipe(), os.pipe()
    app.connect().result()
    pid = os.fork()
    if pid == 0:
        try:
            app.connect().result()
            os.write(child_is_in[1], add.add_task(1).uuid.encode())
            os.read(parent_has_left[0], 1)
            os.write(child_is_in[1], add.add_task(2).uuid.encode())
        finally:
            os._exit(0)  # as if it were killed: what it wrote is in the log only
    first = os.read(child_is_in[0], 36).decode()
    app.disconnect().result()
    os.write(parent_has_left[1], b"x")
    second = os.read(child_is_in[0], 36).decode()
    os.waitpid(pid, 0)
    for end in (*child_is_in, *parent_has_left):
        os.close(end)
    with app:
        assert [app.get_task(uuid) is not None for uuid in (first, second)] == [True, True]
