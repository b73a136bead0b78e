"""A server's own program on this machine: free ports, a directory of its own, a guard."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from tests.services.service import NotInContainers, NotReady, Unobtainable, Way, in_containers

GUARD = Path(__file__).parents[2] / "qtasks" / "testing" / "guard.py"
PREPARE_WITHIN = 60.0  # seconds
STOP_WITHIN = 60.0  # seconds
PASSWORD = "qtasks-test"  # so that a test can get it wrong, and see that it is shown nowhere

OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """Return a free port of 127.0.0.1 below the range of outgoing connections.

    A port from within that range could be taken by any client while its server is down, or a
    client that knocks there could be connected to itself.
    """
    try:
        lowest = int(OUTGOING.read_text().split()[0])
    except FileNotFoundError:  # not on Linux, where servers run in containers only
        lowest = 49_152
    for _ in range(200):
        port = random.randrange(10_000, max(lowest, 11_000))
        with socket.socket() as candidate:
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise Unobtainable("found no free port")


class Native(Way):
    """The native server; a subclass knows its program, its files and its command."""

    how = "native"
    account: ClassVar[str | None] = None  # whom it runs as when we are root and it refuses root
    stop_signal: ClassVar[signal.Signals] = signal.SIGKILL
    shut_down_signal: ClassVar[signal.Signals] = signal.SIGTERM

    directory: Path
    port: int  # where clients connect

    def __init__(self) -> None:
        self._guard: subprocess.Popen[bytes] | None = None
        self._talking = threading.Lock()

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
        if not hasattr(os, "pidfd_open") or not Path("/proc/self/stat").exists():
            raise Unobtainable("native servers are run on Linux only")
        self.find()
        self.directory = Path(tempfile.mkdtemp(prefix=f"qtasks-{name}-"))
        if self.user:
            shutil.chown(self.directory, self.user)
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", GUARD, self.directory, str(int(self.stop_signal))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # an interrupt at the terminal is for the tests
        )
        try:
            url = self.prepare()
            self.restart()
        except BaseException:
            self.stop()
            raise
        return url

    @property
    def user(self) -> str | None:
        """Whom the server runs as, or None for the user that runs the tests."""
        return self.account if os.geteuid() == 0 else None

    def write(self, name: str, text: str) -> Path:
        """Write a file of the server's into its directory and return its path."""
        path = self.directory / name
        path.write_text(text)
        if self.user:
            shutil.chown(path, self.user)
        return path

    def run(self, argv: list[str]) -> None:
        """Run a preparing command to its end as the server's user. Raises `NotReady`."""
        self._spawn(argv)
        deadline = time.monotonic() + PREPARE_WITHIN
        while (state := self._ask("poll"))["running"]:
            if time.monotonic() > deadline:
                raise NotReady(f"{argv[0]} took over {PREPARE_WITHIN:.0f} s")
            time.sleep(0.02)
        if state["code"] != 0:
            raise NotReady(f"{argv[0]} ended with {state['code']}: {self._log_tail()}")

    def listening(self) -> bool:
        with socket.socket() as client:
            client.settimeout(1)
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def ended(self) -> str | None:
        state = self._ask("poll")
        return None if state["running"] else f"ended with {state['code']}: {self._log_tail()}"

    def kill(self) -> None:
        self._ask("signal", number=int(signal.SIGKILL))

    def shut_down(self) -> None:
        if self.ended() is None:
            # Only to the main process: others that get it too may take it for a crash.
            os.kill(self._main, self.shut_down_signal)
        deadline = time.monotonic() + STOP_WITHIN
        while self.ended() is None:
            if time.monotonic() > deadline:
                raise NotReady(f"it did not stop within {STOP_WITHIN:.0f} s")
            time.sleep(0.02)

    def restart(self) -> None:
        self._spawn(self.command())

    def freeze(self) -> None:
        self._ask("signal", number=int(signal.SIGSTOP))

    def thaw(self) -> None:
        self._ask("signal", number=int(signal.SIGCONT))

    def detach(self) -> int | None:
        self._ask("detach")
        guard, self._guard = self._guard, None
        return guard.pid if guard else None

    def stop(self) -> None:
        if self._guard is None:
            return
        guard, self._guard = self._guard, None
        with guard:  # closing its input is what ends it
            pass

    def _spawn(self, argv: list[str]) -> None:
        spawned = self._ask(
            "spawn",
            argv=argv,
            env={**os.environ, **self.environment()},
            user=self.user,
            log=str(self.directory / "output"),
        )
        self._main: int = spawned["pid"]

    def _ask(self, verb: str, **arguments: object) -> Any:
        guard = self._guard
        if guard is None or guard.stdin is None or guard.stdout is None:
            raise NotReady(f"{type(self).__name__} is not running")
        with self._talking:
            guard.stdin.write(json.dumps({"do": verb, **arguments}).encode() + b"\n")
            guard.stdin.flush()
            line = guard.stdout.readline()
        if not line:
            raise NotReady(f"the guard of {type(self).__name__} has ended")
        answer = json.loads(line)
        if "error" in answer:
            raise NotReady(answer["error"])
        return answer

    def _log_tail(self) -> str:
        try:
            text = (self.directory / "output").read_text(errors="replace")
        except FileNotFoundError:
            return "it printed nothing"
        return " | ".join(text.strip().splitlines()[-5:]) or "it printed nothing"
