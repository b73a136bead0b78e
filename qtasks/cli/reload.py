"""`--reload`: restart the command whenever a source file of the app changes. For development.

The modification times of the files are compared twice a second. That needs no library, and it also
sees changes that are made from outside a container.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import NoReturn

logger = logging.getLogger("qtasks")

_PERIOD = 0.5
_SKIPPED = {"__pycache__", "node_modules", "site-packages"}
Times = dict[str, int]


def run_reloading(modules: Iterable[str]) -> NoReturn:
    """Run this command without `--reload` in a child process; restart it after each change.

    Exits with the child's exit status.
    """
    command = [sys.executable, "-m", "qtasks", *(a for a in sys.argv[1:] if a != "--reload")]
    roots = source_roots(modules)
    signals: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    while True:
        before = times_of(roots)
        child = subprocess.Popen(command)
        changed = watch(child, roots, before, signals)
        if changed is None:
            raise SystemExit(stop_child(child, signals))
        logger.info("%s changed; restarting", changed)
        stop_child(child, [signal.SIGTERM])


def watch(
    child: subprocess.Popen[bytes], roots: Iterable[Path], before: Times, signals: list[int]
) -> str | None:
    """Wait for a changed file and return its name; None if a signal came or the child exited.

    A child that failed, for instance with a syntax error, does not end the wait: the next change
    may fix it.
    """
    logged = False
    while not signals:
        time.sleep(_PERIOD)
        now = times_of(roots)
        if now != before:
            return min(name for name in now.keys() | before if now.get(name) != before.get(name))
        status = child.poll()
        if status == 0:
            return None
        if status is not None and not logged:
            logged = True
            logger.info("the worker exited with status %d; waiting for a change", status)
    return None


def stop_child(child: subprocess.Popen[bytes], signals: list[int]) -> int:
    """Forward the signals to the child, also those still to come; return its exit status."""
    forwarded = 0
    while child.poll() is None:
        for number in signals[forwarded:]:
            # On a terminal, Ctrl-C reaches the child directly. A second SIGINT from here would
            # make it stop at once, without its grace period.
            if number != signal.SIGINT or not sys.stdin.isatty():
                child.send_signal(number)
        forwarded = len(signals)
        time.sleep(0.02)
    return child.wait()


def source_roots(modules: Iterable[str]) -> list[Path]:
    """Return the working directory, and the places of those modules that are not below it."""
    roots = [Path.cwd()]
    for module in modules:
        spec = find_spec(module.partition(".")[0])
        places = [] if spec is None else [*(spec.submodule_search_locations or ()), spec.origin]
        for place in places:
            if place and not Path(place).resolve().is_relative_to(roots[0]):
                roots.append(Path(place))
    return roots


def times_of(roots: Iterable[Path]) -> Times:
    """Return the modification time of each source file."""
    times: Times = {}
    for name in files_of(roots):
        try:
            times[name] = os.stat(name).st_mtime_ns
        except FileNotFoundError:
            # An editor is replacing the file; the next look finds it.
            continue
    return times


def files_of(roots: Iterable[Path]) -> Iterator[str]:
    """Yield the Python files below `roots`, except in environments and hidden directories."""
    for root in roots:
        if root.is_file():
            yield str(root)
        for directory, below, files in os.walk(root):
            if "pyvenv.cfg" in files:
                below.clear()
                continue
            below[:] = [d for d in below if not d.startswith(".") and d not in _SKIPPED]
            yield from (os.path.join(directory, f) for f in files if f.endswith(".py"))
