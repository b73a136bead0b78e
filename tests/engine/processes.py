"""Functions for test_processes.py, where another process can import them."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from qtasks import AsyncRouter, Reject, Retry
from qtasks.execution.frames import LARGEST
from qtasks.executors import ProcessDied, ProcessExecutor
from qtasks.plugins import Backoff, Retries

cpu = ProcessExecutor(2)
router = AsyncRouter()


@dataclass
class Box:
    width: int
    price: Decimal


class Refusal(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Float(float):
    """As other libraries have them."""


class Busy(Exception):
    __module__ = None  # type: ignore[assignment]
    retry_after = Float(2.5)


@router.task(executor=cpu)
def pid() -> int:
    return os.getpid()


@router.task(executor=cpu)
def widen(box: Box, by: int = 1) -> Box:
    return Box(box.width + by, box.price)


@router.task(executor=cpu)
def echo(value):  # type: ignore[no-untyped-def]
    return value


@router.task(executor=cpu)
def odds(up_to: int) -> Iterator[int]:
    yield from range(1, up_to, 2)


def _double(item: int) -> int:
    return 2 * item


@router.task(executor=cpu, generate_handler=_double)
def doubled(up_to: int) -> Iterator[int]:
    yield from range(up_to)


def bare(text: str) -> str:
    return text.upper()


shout = router.task("shout", executor=cpu)(bare)


class Nested:
    @staticmethod
    def inner() -> str:
        return "inner"


nested = router.task("nested", executor=cpu)(Nested.inner)


@router.task(executor=cpu)
def refuse() -> None:
    raise Refusal(7, "not today")


at_once = Backoff(1, first=0)


@router.task(executor=cpu, plugins=[Retries(0, on={Refusal: at_once, ProcessDied: at_once})])
def fail(how: str) -> None:
    if how == "refuse":
        raise Refusal(7, "not today")
    if how == "die":
        os._exit(1)
    raise ValueError(how)


@router.task(executor=cpu)
def ask_again(file: str) -> str:
    if not Path(file).exists():
        Path(file).touch()
        raise Retry(after=0)
    return "second"


@router.task(executor=cpu, retry=3)
def reject() -> None:
    raise Reject("no use")


@router.task(executor=cpu)
def misbehave(how: str) -> Any:
    match how:
        case "exit":
            os._exit(3)
        case "sys.exit":
            sys.exit(3)
        case "interrupt":
            raise KeyboardInterrupt
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "memory":
            limit = 512 * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            return len(bytearray(limit))
        case "recursion":
            return misbehave(how)
        case "object":
            return object()
        case "generator":
            return (n for n in range(3))
        case "large":
            return "x" * 2_000_000
        case "huge":
            return bytes(LARGEST + 1)
        case "endless":
            # The begin of an answer that never ends, as far as the worker is told.
            for number in map(int, os.listdir("/proc/self/fd")):
                with suppress(OSError), socket.socket(fileno=os.dup(number)) as line:
                    line.sendall((1 << 40).to_bytes(8))
            time.sleep(60)
        case "odd retry_after":
            raise Busy
        case "close everything":
            os.closerange(0, 256)
    return "well"


@router.task(executor=cpu)
def fork() -> str:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return "parent" if child else "child"


@router.task(executor=cpu)
def fork_and_die() -> None:
    if os.fork():
        os._exit(3)
    time.sleep(60)


@router.task(executor=cpu)
def die_beside_what_it_started(file: str) -> None:
    """Die; what it started has every descriptor that it may inherit, and goes on."""
    # Not by subprocess, which closes descriptors by default.
    os.system(f"sleep 60 >/dev/null 2>&1 & echo $! >{file}.part; mv {file}.part {file}")
    os._exit(3)


@router.task(executor=cpu)
def babble() -> int:
    """Write something that is no answer into the socket to the worker."""
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError), socket.socket(fileno=os.dup(number)) as line:
            line.sendall((3).to_bytes(8) + b"abc")
    time.sleep(60)
    return os.getpid()


@router.task(executor=cpu)
def close_stdout() -> None:
    sys.stdout.close()
    os.close(1)


@router.task(executor=cpu, max_time=0.3)
def stuck(file: str) -> None:
    """Write down who is to be killed: this process, and one that it started."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    note(file, os.getpid(), other.pid)
    time.sleep(60)


@router.task(executor=cpu)
def sleep(file: str, seconds: float = 60) -> int:
    note(file, os.getpid())
    time.sleep(seconds)
    return os.getpid()


@router.task(executor=cpu, retry=1)
def die_once(file: str) -> str:
    if not Path(file).exists():
        Path(file).touch()
        os._exit(1)
    return "alive"


@router.task(executor=cpu, max_time=0.4)
def brief() -> None:
    time.sleep(0.2)


@router.task(executor=cpu)
def deafen() -> int:
    """Leave so little memory that the next arguments do not fit."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 16 * 2**20,) * 2)
    return os.getpid()


@router.task(executor=cpu)
def numbers(up_to: int) -> set[int]:
    return set(range(up_to))


@router.task(executor=cpu, store_result=False)
def unstored() -> int:
    return 1


def note(file: str, *pids: int) -> None:
    """Write a file in one step."""
    Path(f"{file}.part").write_text(" ".join(map(str, pids)))
    Path(f"{file}.part").rename(file)
