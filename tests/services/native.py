"""A server's own program on this machine: free ports, a directory of its own, a guard."""

from __future__ import annotations

import os
import signal
import socket
import time
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from qtasks.testing.errors import NotReady, Unobtainable
from qtasks.testing.native import GuardedProcess, free_port
from qtasks.testing.recipes import Launch, Recipe
from tests.services.install import install_package
from tests.services.service import NotInContainers, Way, in_containers

STOP_WITHIN = 180.0  # seconds


class Native(Way):
    """The native server; a subclass knows its program, its files and its command."""

    how = "native"
    account: ClassVar[str | None] = None  # whom it runs as when we are root and it refuses root
    stop_signal: ClassVar[signal.Signals] = signal.SIGKILL
    shut_down_signal: ClassVar[signal.Signals] = signal.SIGTERM

    port: int  # where clients connect

    def __init__(self) -> None:
        self._process: GuardedProcess | None = None

    @abstractmethod
    def find(self) -> None:
        """Find the program or install it. Raises `Unobtainable`."""

    @abstractmethod
    def prepare(self) -> str:
        """Choose ports, write the server's files, return its URL."""

    @abstractmethod
    def command(self) -> list[str]:
        """Return the command that runs the server in the foreground."""

    def environment(self) -> Mapping[str, str]:
        """Return the variables that the command needs beyond the inherited ones."""
        return {}

    def start(self) -> str:
        name = type(self).__name__.removeprefix("Native").lower()
        if in_containers():
            raise NotInContainers(f"{name} is run natively: `make test` has the tests that need it")
        self.find()
        self._process = self.process = self.make()
        self.directory = self.process.directory
        try:
            url = self.prepare()
            self.restart()
        except BaseException:
            self.stop()
            raise
        return url

    def make(self) -> GuardedProcess:
        """Return the process, with its directory and without a program."""
        return GuardedProcess(self.account, self.stop_signal)

    def write(self, name: str, text: str) -> Path:
        """Write a file of the server's into its directory and return its path."""
        return self.process.write(name, text)

    def listening(self) -> bool:
        with socket.socket() as client:
            client.settimeout(1)
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def ended(self) -> str | None:
        return self._running().ended()

    def kill(self) -> None:
        self._running().signal(signal.SIGKILL)

    def shut_down(self) -> None:
        if self.ended() is None:
            # Only to the main process: others that get it too may take it for a crash.
            os.kill(self._running().pid, self.shut_down_signal)
        deadline = time.monotonic() + STOP_WITHIN
        while self.ended() is None:
            if time.monotonic() > deadline:
                raise NotReady(f"it did not stop within {STOP_WITHIN:.0f} s")
            time.sleep(0.02)

    def restart(self) -> None:
        self._running().start(self.command(), self.environment())

    def freeze(self) -> None:
        self._running().signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._running().signal(signal.SIGCONT)

    def detach(self) -> int | None:
        process, self._process = self._running(), None
        return process.detach()

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.stop()

    def _running(self) -> GuardedProcess:
        if self._process is None:
            raise NotReady(f"{type(self).__name__} is not running")
        return self._process


class ByRecipe(Native):
    """The server as users of `qtasks.testing` get it; where it is missing, it is installed."""

    recipe: Recipe

    def find(self) -> None:
        try:
            self.program = self.recipe.program()
        except Unobtainable:
            install_package(self.recipe.package, self.recipe.name)
            self.program = self.recipe.program()

    def make(self) -> GuardedProcess:
        return GuardedProcess(self.recipe.account, self.recipe.stop_signal)

    def prepare(self) -> str:
        self.port = free_port()
        self._launch: Launch = self.recipe.set_up(self.process, self.program, self.port)
        return self.recipe.url("127.0.0.1", self.port)

    def command(self) -> list[str]:
        return self._launch.argv

    def environment(self) -> Mapping[str, str]:
        return self._launch.environment
