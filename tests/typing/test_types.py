"""mypy, strict as a user may run it, on correct uses and on wrong ones."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.typing import right

PREAMBLE = """
from tests.typing.right import *
from tests.typing.right import add, shout, halve, length, app, blocking_app
"""
WRONG = {
    "an argument of a wrong type": ('add.call(1, "2")', "arg-type"),
    "an argument too few": ("add.call(1)", "call-arg"),
    "an argument of no such name": ("shout.call(text='a', size=2)", "call-arg"),
    "an argument of a wrong type, blocking": ("halve.call('x')", "arg-type"),
    "an argument of a wrong type, called directly": ("coroutine = add(1, None)", "arg-type"),
    "an option of a wrong type": ("coroutine = shout.call('a').add_task(timeout='1')", "arg-type"),
    "an option that does not exist": (
        "coroutine = shout.call('a').add_task(timeouts=1)",
        "call-arg",
    ),
    "an option of a wrong type, beside arguments": (
        "coroutine = shout.add_task('a', delay='1')",
        "arg-type",
    ),
    "an option of a wrong type, blocking": ("halve.call(1.0).add_task(priority='9')", "arg-type"),
    "an option that does not exist, blocking": ("halve.call(1.0).add_task(prio=9)", "call-arg"),
    "a result taken for another type": ("text: str = halve.add_task(1.0).returning", "assignment"),
    "an awaited blocking task": ("async def f() -> None: await halve.add_task(1.0)", "misc"),
    "an option of a task that does not exist": ("app.task(speed=3)", "call-overload"),
    "a class in the place of a plugin": (
        "from qtasks.plugins import Retries; app.add_plugin(Retries)",
        "arg-type",
    ),
    "a handler of what does not yield": (
        "app.task(generate_handler=str)(add.__wrapped__)",
        "arg-type",
    ),
    "a lifespan of something that is no app": (
        "from qtasks.integrations.fastapi import lifespan; lifespan('app')",
        "arg-type",
    ),
    "a call of the wrong face": ("blocking_app.add_tasks([add.call(1, 2)])", "list-item"),
}


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What mypy says of the correct uses and of each wrong one, all in one run."""
    directory = tmp_path_factory.mktemp("typing")
    files = {"right": Path(right.__file__)}
    for number, (name, (code, _)) in enumerate(WRONG.items()):
        files[name] = directory / f"wrong_{number}.py"
        files[name].write_text(f"{PREAMBLE}\n{code}\n")
    # In a process of its own: mypy raises the limit of recursion for good.
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary",
         "--cache-dir", directory / "cache", *files.values()],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not ran.stderr, ran.stderr
    return {name: _about(path, ran.stdout.splitlines()) for name, path in files.items()}


def _about(path: Path, said: Iterable[str]) -> str:
    return "\n".join(line for line in said if line.partition(":")[0].endswith(path.name))


def test_correct_uses_have_precise_types(complaints: dict[str, str]) -> None:
    assert complaints["right"] == ""


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_use_is_told(name: str, complaints: dict[str, str]) -> None:
    (said,) = [line for line in complaints[name].splitlines() if ": error:" in line]
    assert said.endswith(f"[{WRONG[name][1]}]"), said
