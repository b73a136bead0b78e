"""A program that uses QTasks, forks, and uses it on both sides: `python -m tests.faces.forking`."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading

from qtasks import QueueTasks
from tests.faces.descriptors import sockets
from tests.faces.sums import add_blocking, blocking


def main() -> None:
    explicit = "explicit" in sys.argv
    app = QueueTasks(os.environ["QTASKS_NAME"])
    if explicit:
        blocking.included_by(app)
        app.connect().result()
    say("before", add(1))
    forked_all = threading.Event()
    busy = threading.Thread(target=use_until, args=(forked_all,))
    busy.start()
    for number in range(5):
        forked(number, app if explicit else None)
    context = multiprocessing.get_context("fork")
    for number in range(3):
        process = context.Process(target=child, args=(number, app if explicit else None))
        process.start()
        process.join()
        say("multiprocessing", process.exitcode)
    say("after", add(2))
    forked_all.set()
    busy.join()
    say("all", sum(add(n) for n in range(20)))
    if explicit:
        app.disconnect().result()
        say("sockets left", sockets())


def use_until(ended: threading.Event) -> None:
    """Use it all the time: each fork finds it in use."""
    while not ended.is_set():
        add(1)


def forked(number: int, app: QueueTasks | None) -> None:
    pid = os.fork()
    if pid == 0:
        child(number, app)
        sys.exit(0)
    say("fork", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def child(number: int, app: QueueTasks | None) -> None:
    # Of the parent's only the sending end of its loop's own wake-up is left.
    say("inherited sockets", sockets())
    if number % 2 == 0:
        if app is not None:
            app.connect().result()
        say("child", add(number) - number)
        gc.collect()  # nothing of the parent's is collected, with complaints, in the child
        if number == 2:
            grandchild = os.fork()
            if grandchild == 0:
                if app is not None:
                    app.connect().result()
                say("grandchild", add(3))
                sys.exit(0)
            say("fork", os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
            say("child again", add(3))


def add(number: int) -> int:
    return add_blocking.add_task(number, 1, timeout=120).returning


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


if __name__ == "__main__":
    main()
