"""A server's own program on this machine, below a guard: neither outlives the tests."""

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtasks.testing.errors import NotReady, Unobtainable

GUARD = Path(__file__).with_name("guard.py")
PREPARE_WITHIN = 180.0
"""Seconds that a preparing command may take."""
OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""The range of ports that outgoing connections get."""
_LOOK_EVERY = 0.02
"""Seconds between two looks at a preparing command."""


def found(program: str, package: str) -> str:
    """Return the path of an installed program.

    Debian keeps some servers where only root's PATH looks. Raises `Unobtainable`, with the name of
    Debian's package.
    """
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        raise Unobtainable(f"{program} is not installed (Debian: apt-get install {package})")
    return path


def free_port() -> int:
    """Return a free port of 127.0.0.1 below the range of outgoing connections.

    A port from within that range could be taken by any client while its server is down, or a client
    that tries it could be connected to itself. Raises `Unobtainable`.
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


class GuardedProcess:
    """A program in a directory of its own. `stop` ends all its processes and removes the directory.

    So does the end of this process, whatever the cause. `user`: who runs the program if this
    process is root's. `stop_signal`: asks the program to end; it is killed five seconds later.
    """

    def __init__(
        self, user: str | None = None, stop_signal: signal.Signals = signal.SIGKILL
    ) -> None:
        if not hasattr(os, "pidfd_open") or not Path("/proc/self/stat").exists():
            raise Unobtainable("a server's own program is run on Linux only")
        self.user = user if os.geteuid() == 0 else None
        """Who runs the program. None: the user of this process."""
        self.directory = Path(tempfile.mkdtemp(prefix="qtasks-"))
        self._asking = threading.Lock()
        if self.user:
            shutil.chown(self.directory, self.user)
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", GUARD, self.directory, str(int(stop_signal))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C at the terminal is for the tests
        )

    def write(self, name: str, text: str) -> Path:
        """Write a file into the directory, and return its path."""
        path = self.directory / name
        path.write_text(text)
        if self.user:
            shutil.chown(path, self.user)
        return path

    def run(self, *argv: str) -> None:
        """Run a preparing command to its end. Raises `NotReady` with what it printed."""
        self.start(argv)
        deadline = time.monotonic() + PREPARE_WITHIN
        while (state := self._ask("poll"))["running"]:
            if time.monotonic() > deadline:
                raise NotReady(f"{argv[0]} took over {PREPARE_WITHIN:.0f} s")
            time.sleep(_LOOK_EVERY)
        if state["code"] != 0:
            raise NotReady(f"{argv[0]} ended with {state['code']}: {self._printed()}")

    def start(self, argv: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Start a program. `environment` is added to that of this process."""
        log = str(self.directory / "output")
        env = {**os.environ, **(environment or {})}
        spawned = self._ask("spawn", argv=argv, env=env, user=self.user, log=log)
        self.pid: int = spawned["pid"]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the program. After SIGKILL, they are gone."""
        self._ask("signal", number=int(number))

    def ended(self) -> str | None:
        """Return how the program ended and what it printed last, or None while it runs."""
        state = self._ask("poll")
        return None if state["running"] else f"ended with {state['code']}: {self._printed()}"

    def detach(self) -> int:
        """Let the program outlive this process; this object is done with it.

        SIGTERM to the returned pid ends the program.
        """
        self._ask("detach")
        return self._guard.pid

    def stop(self) -> None:
        """End all processes and remove the directory. Idempotent."""
        with self._guard:  # closes its input, which is what ends it
            pass

    def _ask(self, verb: str, **arguments: object) -> Any:
        stdin, stdout = self._guard.stdin, self._guard.stdout
        if stdin is None or stdout is None or stdin.closed:
            raise NotReady("the server was stopped")
        with self._asking:
            stdin.write(json.dumps({"do": verb, **arguments}).encode() + b"\n")
            stdin.flush()
            line = stdout.readline()
        answer = json.loads(line or b'{"error": "its guard has ended"}')
        if "error" in answer:
            raise NotReady(answer["error"])
        return answer

    def _printed(self) -> str:
        try:
            text = (self.directory / "output").read_text(errors="replace")
        except FileNotFoundError:
            text = ""
        return " | ".join(text.strip().splitlines()[-5:]) or "it printed nothing"
