"""Servers that stay up between test runs: `python -m tests.services up|down|list [name ...]`.

`eval "$(python -m tests.services up redis)"` puts the URL where the tests look for it; such a
server is then nobody's to kill, so the tests that kill servers skip.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from qtasks_core.urls import redact
from tests.services import SERVICES, NotReady, Unobtainable
from tests.services.install import cache, one_at_a_time

END_WITHIN = 15.0  # seconds


def begun(pid: int) -> int | None:
    """Return when the process began, in clock ticks since boot, or None when it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if stat[0] == "Z" else int(stat[19])


@dataclass(frozen=True)
class Up:
    """A server that was left running, and the guard that ends it."""

    name: str
    url: str
    version: str
    guard: int
    begun: int

    @staticmethod
    def file(name: str) -> Path:
        return cache() / f"up-{name}.json"

    @classmethod
    def find(cls, name: str) -> Up | None:
        """Return the running server of that name; the note of one that has ended is removed."""
        try:
            up = cls(**json.loads(cls.file(name).read_text()))
        except FileNotFoundError:
            return None
        if begun(up.guard) != up.begun:  # the pid may be another process's by now
            cls.file(name).unlink()
            return None
        return up

    def keep(self) -> None:
        """Note it, readable by this user only: the URL carries a password."""
        with open(os.open(self.file(self.name), os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            json.dump(asdict(self), file)

    def end(self) -> bool:
        """End the server; tell whether it is gone."""
        os.kill(self.guard, signal.SIGTERM)
        deadline = time.monotonic() + END_WITHIN
        while begun(self.guard) == self.begun:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        self.file(self.name).unlink()
        return True


def start(names: Iterable[str]) -> bool:
    """Start what is not up yet and print the URLs as shell commands; tell whether all are up."""
    all_up = True
    for name in names:
        service = SERVICES[name]()
        up = Up.find(name)
        if up:
            url = up.url
        else:
            try:
                url = service.start()
                guard = service.detach()
            except (Unobtainable, NotReady) as error:
                print(f"{name}: {error}", file=sys.stderr)
                all_up = False
                continue
            if guard:
                Up(name, url, service.version, guard, begun(guard) or 0).keep()
        print(f"export {service.variable}={shlex.quote(url)}", flush=True)
    return all_up


def stop(names: Iterable[str]) -> bool:
    """End what is up and print what takes back the exports; tell whether all are gone."""
    all_gone = True
    for name in names:
        up = Up.find(name)
        if up is None:
            continue
        if up.end():
            print(f"unset {SERVICES[name]().variable}")
        else:
            print(f"{name}: process {up.guard} does not end", file=sys.stderr)
            all_gone = False
    return all_gone


def show(names: Iterable[str]) -> bool:
    """Print which servers are up or named by the environment."""
    rows = [("server", "how", "version", "url")]
    for name in names:
        service, up = SERVICES[name](), Up.find(name)
        if up:
            rows.append((name, "native, up", up.version, redact(up.url)))
        elif service.variable not in os.environ:
            rows.append((name, "-", "-", "-"))
        else:
            try:
                url = service.start()
            except NotReady as error:
                rows.append((name, "environment", "?", str(error)))
            else:
                rows.append((name, service.how, service.version, redact(url)))
    for row in rows:
        print("{:10} {:12} {:10} {}".format(*row))
    return True


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.services", description=__doc__)
    parser.add_argument("verb", choices=["up", "down", "list"])
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(SERVICES))
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(SERVICES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(SERVICES)}")
    for driver in ("aiokafka", "aiormq"):  # loud about a server that is still starting
        logging.getLogger(driver).setLevel(logging.CRITICAL)
    verb = {"up": start, "down": stop, "list": show}[arguments.verb]
    with one_at_a_time("up"):
        return 0 if verb(arguments.names or list(SERVICES)) else 1


if __name__ == "__main__":
    sys.exit(main())
