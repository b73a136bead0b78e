"""The command `qtasks` as a process of its own."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tests.processes import PATIENCE, ROOT, Process

SHOP = "tests.cli.shop:app"
FORKS = multiprocessing.get_context("forkserver")
"""Forks a process in which the command and the drivers are imported already.

The tests run hundreds of commands, and importing is most of the work of each. What importing does
has its own tests, and `Command.run` starts an interpreter."""
FORKS.set_forkserver_preload(
    ["tests.cli.command", "qtasks.cli", "aiokafka", "aio_pika", "asyncpg", "redis.asyncio"]
)
STANDARD = {
    "in": os.O_RDONLY,
    "out": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    "err": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
}
"""The standard streams of a command: files of a directory."""


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of its output."""
        (line,) = self.out.splitlines()
        return line

    @property
    def error(self) -> str:
        """The one line that it said of an error."""
        (line,) = self.err.splitlines()
        return line

    @property
    def told(self) -> Any:
        """The one JSON document that it said of an error."""
        return json.loads(self.error)

    @property
    def json(self) -> Any:
        """Its one JSON document."""
        return json.loads(self.line)

    @property
    def rows(self) -> list[Any]:
        """Its JSON objects, one a line."""
        return [json.loads(line) for line in self.out.splitlines()]


class Command:
    """Runs `qtasks` with an environment; `-A` names the tests' app unless told otherwise."""

    def __init__(self, environment: Mapping[str, str], cwd: Path = ROOT) -> None:
        self.environment = dict(environment)
        self.cwd = cwd

    @property
    def url(self) -> str:
        """The URL of its broker and storage."""
        return self.environment["QTASKS_BROKER_URL"]

    @property
    def name(self) -> str:
        """The name of the app."""
        return self.environment["QTASKS_NAME"]

    def __call__(self, *arguments: str, app: str | None = SHOP, input: str = "") -> Said:
        words = ["qtasks", *(("-A", app) if app else ()), *arguments]
        with TemporaryDirectory() as directory:
            stdin, stdout, stderr = (Path(directory, name) for name in ("in", "out", "err"))
            stdin.write_text(input)
            process = FORKS.Process(
                target=run_command,
                args=(words, {**inherited(), **self.environment}, self.cwd, directory),
            )
            process.start()
            process.join(PATIENCE)
            code = process.exitcode
            if code is None:
                process.kill()
                process.join()
            out, err = stdout.read_text(), stderr.read_text()
        assert code is not None, f"{words} still ran after {PATIENCE} s:\n{out}{err}"
        assert "Traceback" not in err, err
        return Said(code, out, err)

    def ok(self, *arguments: str, app: str | None = SHOP, input: str = "") -> Said:
        """Run it; it has to end well and say nothing else."""
        said = self(*arguments, app=app, input=input)
        assert (said.code, said.err) == (0, ""), said
        return said

    def run(self, *arguments: str, app: str | None = SHOP, before: bool = False) -> Process:
        """Return a worker that starts; its arguments stand behind the command, or before it."""
        named = ("-A", app) if app else ()
        words = (*arguments, "run") if before else ("run", *arguments)
        return Process("-m", "qtasks", *named, *words, environment=self.environment, cwd=self.cwd)


def inherited() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("QTASKS_")}
    return {**kept, "PYTHONPATH": str(ROOT)}


def run_command(words: list[str], environment: dict[str, str], cwd: Path, files: str) -> None:
    """Become `python -m qtasks` in a process that was forked for it."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    sys.path.insert(0, str(cwd))
    for number, (name, flags) in enumerate(STANDARD.items()):
        os.dup2(os.open(Path(files, name), flags), number)
    try:
        runpy.run_module("qtasks", run_name="__main__", alter_sys=True)
    finally:
        # Such a process ends without what others do when they exit.
        atexit._run_exitfuncs()
