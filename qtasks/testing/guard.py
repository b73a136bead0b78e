"""The guard: owns a server's processes and directory; neither outlives who asked for them.

A program of its own, run as `python -I -S guard.py DIRECTORY STOP_SIGNAL` and on the
standard library alone. It starts the server, is the reaper of whatever the server forks off, and
when its standard input closes or its parent dies, by whatever death, it ends all of them and
removes the directory. Commands and answers are one JSON object a line:

    {"do": "spawn", "argv": [...], "env": {...}, "user": null, "log": "..."}   -> {"pid": 12}
    {"do": "poll"}                  -> {"running": true, "code": null}  of what was spawned last
    {"do": "signal", "number": 9}   -> {"signalled": 3}                 after 9, when all are gone
    {"do": "detach"}                -> {}                               lives on until SIGTERM
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pwd
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LIBC = ctypes.CDLL(None, use_errno=True)
KILL_WITHIN = 20.0  # seconds; a dying process may hang in the kernel, on a disk say
STOP_GRACE = 5.0  # seconds that a server has to stop in its own way before it is killed


def descendants(ancestor: int) -> list[int]:
    """Return the pids of the processes below `ancestor`, parents before children.

    Zombies count: one that has threads still holds its port until it can be reaped.
    """
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(entry))
    found = [ancestor]
    for pid in found:
        found.extend(children.get(pid, ()))
    return found[1:]


def die_with_guard() -> None:
    """Run in a child before exec: the kernel kills it when the guard itself is killed."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Guard:
    """The server's processes, as the commands see them."""

    def __init__(self, directory: str, stop_signal: int) -> None:
        self.directory = directory
        self.stop_signal = stop_signal
        self.main = 0
        self.codes: dict[int, int] = {}

    def spawn(
        self, argv: list[str], env: dict[str, str], user: str | None, log: str
    ) -> dict[str, Any]:
        """Start `argv` in the directory, as `user` when one is named."""
        account = pwd.getpwnam(user) if user else None
        with open(log, "ab") as output:
            child = subprocess.Popen(
                argv,
                env=env,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_guard,
                user=account and account.pw_uid,
                group=account and account.pw_gid,
                extra_groups=[] if account else None,
            )
        child.returncode = 0  # reap() collects it, not this object
        self.main = child.pid
        return {"pid": self.main}

    def poll(self) -> dict[str, Any]:
        """Tell whether what was spawned last still runs, and how it ended."""
        self.reap()
        code = self.codes.get(self.main)
        return {"running": code is None, "code": code}

    def signal(self, number: int) -> dict[str, Any]:
        """Send `number` to every process of the server; SIGKILL returns when none is left."""
        signalled: set[int] = set()
        deadline = time.monotonic() + KILL_WITHIN
        while time.monotonic() < deadline:
            self.reap()
            pids = descendants(os.getpid())
            fresh = [pid for pid in pids if number == signal.SIGKILL or pid not in signalled]
            if not fresh:
                return {"signalled": len(signalled)}
            for pid in fresh:
                self.send(pid, number)
            signalled.update(fresh)
            time.sleep(0.005)  # a process that was forking meanwhile is seen in the next round
        raise TimeoutError(f"processes {pids} are still there after {KILL_WITHIN:.0f} s")

    def send(self, pid: int, number: int) -> None:
        """Send a signal to a descendant that may have ended since it was seen."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def reap(self) -> None:
        """Collect the ended children, the adopted ones among them."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.codes[pid] = os.waitstatus_to_exitcode(status)

    def end(self) -> None:
        """Stop the server, then kill what is left, then remove the directory."""
        if self.stop_signal != signal.SIGKILL and self.main and self.poll()["running"]:
            self.signal(signal.SIGCONT)
            self.send(self.main, self.stop_signal)
            deadline = time.monotonic() + STOP_GRACE
            while descendants(os.getpid()) and time.monotonic() < deadline:
                time.sleep(0.01)
                self.reap()
        try:
            self.signal(signal.SIGKILL)
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)


def commands(parent: int) -> Iterator[dict[str, Any]]:
    """Yield the commands from standard input until it closes or the process `parent` has ended."""
    pending = b""
    while True:
        ready, _, _ = select.select([0, parent], [], [])
        if 0 not in ready:
            return
        chunk = os.read(0, 65536)
        if not chunk:
            return
        *lines, pending = (pending + chunk).split(b"\n")
        yield from (json.loads(line) for line in lines)


def answer(reply: dict[str, Any]) -> None:
    """Write one answer to standard output."""
    os.write(1, json.dumps(reply).encode() + b"\n")


def leave(*_: object) -> NoReturn:
    """End by way of the `finally` in main()."""
    sys.exit(0)


def main() -> None:
    """Serve commands; whatever ends this, the server ends with it."""
    parent = os.pidfd_open(os.getppid())
    directory, stop_signal = sys.argv[1], int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    guard = Guard(directory, stop_signal)
    try:
        for command in commands(parent):
            verb = command.pop("do")
            if verb == "detach":
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the terminal is not ours to hold
                answer({})
                while True:
                    signal.pause()
            try:
                answer(getattr(guard, verb)(**command))
            except (OSError, KeyError) as error:
                answer({"error": f"{verb}: {error!r}"})
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        guard.end()


if __name__ == "__main__":
    main()
