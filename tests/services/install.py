"""Installing what a native server needs, through the machine's ordinary package clients."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qtasks.testing.errors import Unobtainable

INSTALL_WITHIN = 600.0  # seconds


def cache() -> Path:
    """Return the directory that keeps what was fetched once and the state of running servers."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(base) / "qtasks"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@contextmanager
def one_at_a_time(what: str, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of that name, which all test runs of this user share.

    Raises `Unobtainable` if another run holds it and this one does not wait.
    """
    with open(cache() / f"{what}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise Unobtainable(f"another run of {what} is under way") from None
        yield


def locate(program: str) -> str | None:
    """Return the path of `program`; Debian keeps some servers where only root's PATH looks."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def need_program(program: str, package: str) -> str:
    """Return the path of `program`, installing Debian's `package` when it is missing.

    Raises `Unobtainable` when it cannot be installed.
    """
    found = locate(program)
    if found:
        return found
    install_package(package, program)
    found = locate(program)
    if not found:
        raise Unobtainable(f"{package} is installed, but {program} is not found")
    return found


def install_package(package: str, program: str) -> None:
    """Install a Debian package. Raises `Unobtainable` where that cannot be done."""
    if not shutil.which("apt-get") or os.geteuid() != 0:
        raise Unobtainable(f"{program} is missing; install it (Debian: apt-get install {package})")
    with one_at_a_time("install"):
        if locate(program):  # another run was faster
            return
        apt = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300"]
        # RUNLEVEL=1 keeps the package's scripts from starting a service of their own.
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        run([*apt, "update"], environment)
        run([*apt, "install", "-y", "--no-install-recommends", package], environment)


def run(argv: list[str], environment: dict[str, str], cwd: Path | None = None) -> None:
    """Run an installing command. Raises `Unobtainable` with the end of what it printed."""
    try:
        done = subprocess.run(
            argv,
            env=environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=INSTALL_WITHIN,
        )
    except subprocess.TimeoutExpired as error:
        raise Unobtainable(f"{' '.join(argv)} took over {INSTALL_WITHIN:.0f} s") from error
    if done.returncode != 0:
        said = " | ".join(done.stdout.strip().splitlines()[-3:])
        raise Unobtainable(f"{' '.join(argv)} failed: {said}")
