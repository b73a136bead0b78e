"""Child processes of tests: started, watched, and ended whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryFile

ROOT = Path(__file__).parent.parent
PATIENCE = 120.0
"""Seconds for what takes a moment on an idle machine, and much longer on a busy one."""


class Process:
    """A Python module that runs as a process of its own; a context manager that ends it."""

    def __init__(
        self,
        *arguments: str,
        environment: Mapping[str, str],
        cwd: Path = ROOT,
        python: str = sys.executable,
    ) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("QTASKS_")}
        self._output = TemporaryFile()  # noqa: SIM115  # closed at exit
        self._process = subprocess.Popen(
            [python, *arguments],
            cwd=cwd,
            env={**inherited, "PYTHONPATH": str(ROOT), **environment},
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        self.pid = self._process.pid

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if kind is not None:
            print(f"--- {self._process.args!r}\n{self.output()}")
        self._output.close()

    def output(self) -> str:
        """Return what it has written so far."""
        # The child has the same offset: were it moved, it would write over what it has written.
        descriptor = self._output.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")

    def wait_for(self, text: str) -> None:
        """Wait until it has written `text`."""
        until(lambda: text in self.output() or self._ended(text), f"{text!r} in a log")

    def _ended(self, text: str) -> bool:
        if self._process.poll() is not None and text not in self.output():
            raise AssertionError(f"{self._process.args!r} ended early:\n{self.output()}")
        return False

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it with SIGKILL and wait for its end."""
        self._process.kill()
        self._process.wait()

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait until it ends by itself; return its exit status."""
        return self._process.wait(timeout)

    def terminate(self, timeout: float = PATIENCE) -> int:
        """Stop it with SIGTERM; return its exit status."""
        self._process.terminate()
        return self._process.wait(timeout)


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition; fail when it has not come true within `PATIENCE` seconds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {PATIENCE:.0f} s in vain for {what}")
        time.sleep(0.02)
