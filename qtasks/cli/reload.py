"""`--reload`: run the command again whenever a source file of the app changes. For development.

Files are compared by their times twice a second: that needs no library, and also sees changes made
from outside a container.
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
    """Run this command without `--reload` in a child, anew after each change; exit as it does."""
    command = [sys.executable, "-m", "qtasks", *(a for a in sys.argv[1:] if a != "--reload")]
    roots = source_roots(modules)
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    # A terminal's Ctrl-C reaches the child too; a SIGTERM is for this process alone.
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    while True:
        before = times_of(roots)
        child = subprocess.Popen(command)
        changed = watch(child, roots, before, asked)
        if changed is None:
            raise SystemExit(end(child, asked))
        logger.info("%s changed; starting anew", changed)
        end(child, [signal.SIGTERM])


def watch(
    child: subprocess.Popen[bytes], roots: Iterable[Path], before: Times, asked: list[int]
) -> str | None:
    """Wait for a changed file and return its name; None: it is time to end.

    A child that failed, perhaps by a typing error, waits for the next change too.
    """
    told = False
    while not asked:
        time.sleep(_PERIOD)
        now = times_of(roots)
        if now != before:
            return min(name for name in now.keys() | before if now.get(name) != before.get(name))
        status = child.poll()
        if status == 0:
            return None
        if status is not None and not told:
            told = True
            logger.info("the worker ended; waiting for a change")
    return None


def end(child: subprocess.Popen[bytes], signals: list[int]) -> int:
    """Hand on the signals, one by one as they come, and return the child's exit status."""
    handed = 0
    while child.poll() is None:
        for number in signals[handed:]:
            # The child of a terminal has its own SIGINT; twice would mean: at once.
            if number != signal.SIGINT or not sys.stdin.isatty():
                child.send_signal(number)
        handed = len(signals)
        time.sleep(0.02)
    return child.wait()


def source_roots(modules: Iterable[str]) -> list[Path]:
    """Return the working directory, and where the modules live that are not below it."""
    roots = [Path.cwd()]
    for module in modules:
        spec = find_spec(module.partition(".")[0])
        places = [] if spec is None else [*(spec.submodule_search_locations or ()), spec.origin]
        for place in places:
            if place and not Path(place).resolve().is_relative_to(roots[0]):
                roots.append(Path(place))
    return roots


def times_of(roots: Iterable[Path]) -> Times:
    """Return when each source file was last written."""
    times: Times = {}
    for name in files_of(roots):
        try:
            times[name] = os.stat(name).st_mtime_ns
        except FileNotFoundError:
            # An editor replaces files; it will be there the next time.
            continue
    return times


def files_of(roots: Iterable[Path]) -> Iterator[str]:
    """Iterate over the Python files below `roots`, without environments and hidden directories."""
    for root in roots:
        if root.is_file():
            yield str(root)
        for directory, below, files in os.walk(root):
            if "pyvenv.cfg" in files:
                below.clear()
                continue
            below[:] = [d for d in below if not d.startswith(".") and d not in _SKIPPED]
            yield from (os.path.join(directory, f) for f in files if f.endswith(".py"))
