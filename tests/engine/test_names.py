"""Names of apps, queues and tasks: what is wrong with one is said where it enters."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from qtasks import AsyncRouter, SyncRouter, control
from qtasks.asyncio import QueueTasks
from qtasks_core.errors import ConfigurationError
from qtasks_core.names import checked_name, checked_task_name
from tests.cli.command import Command

WRONG = ("", " ", "a b", "a:b", "a/b", "a\n", "a\0", ".a", "-a", "ü", "a" * 101)


@pytest.mark.parametrize("name", ["a", "A.b-c_d", "_a", "0", "a..b", "a" * 100])
def test_right_names(name: str) -> None:
    assert checked_name(name, "an app") == name


@pytest.mark.parametrize("name", WRONG)
def test_wrong_names(name: str) -> None:
    with pytest.raises(ConfigurationError, match="the name of a queue: write 1 to 100 of"):
        checked_name(name, "a queue")


@pytest.mark.parametrize("name", ["models.übung", "a task", "f.<locals>.g", "x" * 200])
def test_right_names_of_tasks(name: str) -> None:
    assert checked_task_name(name) == name


@pytest.mark.parametrize("name", ["", "a\n", "a\0", "\ud800", "x" * 201])
def test_wrong_names_of_tasks(name: str) -> None:
    with pytest.raises(ConfigurationError, match="1 to 200 printable characters"):
        checked_task_name(name)


def test_an_app(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="'my app' cannot be the name of an app:"):
        QueueTasks("my app", "memory://")
    monkeypatch.setenv("QTASKS_NAME", "my app")
    with pytest.raises(ConfigurationError, match=r"of an app \(QTASKS_NAME\):"):
        QueueTasks(broker="memory://")


async def test_a_queue_and_a_task(app: QueueTasks) -> None:
    router = AsyncRouter()
    with pytest.raises(ConfigurationError, match="'a b' cannot be the name of a queue"):
        router.task(queue="a b")
    with pytest.raises(ConfigurationError, match="cannot be the name of a task"):
        router.task("a\n")(len)

    @app.task()
    async def nothing() -> None: ...

    with pytest.raises(ConfigurationError, match="'a b' cannot"):
        app.worker(queues=["a", "a b"])
    with pytest.raises(ConfigurationError, match="'a b' cannot"):
        await asyncio.to_thread(app.run_forever, queues=["a b"])
    async with app:
        with pytest.raises(ConfigurationError, match="'a b' cannot"):
            await nothing.add_task(queue="a b")
        with pytest.raises(ConfigurationError, match="'a b' cannot"):
            await app.control(control.purge, "a b")


@pytest.mark.parametrize(
    "arguments", [("run", "--queues", "a,b/c"), ("purge", "b/c", "--yes"), ("queues", "b/c")]
)
def test_the_command_line(arguments: tuple[str, ...]) -> None:
    said = Command({"QTASKS_BROKER_URL": "memory://"})(*arguments)
    assert said.code == 2
    assert said.error.startswith("qtasks: 'b/c' cannot be the name of a queue: ")


@pytest.mark.parametrize("face", [AsyncRouter, SyncRouter])
def test_a_decorator_without_its_parentheses(face: Any) -> None:
    def forgotten() -> None: ...

    with pytest.raises(ConfigurationError, match=r"forgotten: .* its parentheses: @….task\(\)"):
        face().task(forgotten)
