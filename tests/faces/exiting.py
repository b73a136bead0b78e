"""Programs that end in the ways programs end: `python -m tests.faces.exiting HOW`."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time

from qtasks import AsyncRouter, QueueTasks, SyncRouter

router = SyncRouter()
app = QueueTasks()


@router.task(name="exiting.note")
def note(text: str) -> str:
    return text


@router.task(name="exiting.never")
def never() -> None:
    raise AssertionError("there is no worker")


def say(*words: object) -> None:
    print(*words, flush=True)


def default() -> None:
    """The default app, which nobody closes."""
    say("note", note.add_task("a").uuid)


def at_exit() -> None:
    """The default app, used from an exit handler."""
    atexit.register(lambda: say("note", note.add_task("a").uuid))
    default()


def other_thread() -> None:
    """The default app, first used by a thread that outlives the main one."""

    def later() -> None:
        threading.main_thread().join()
        say("note", note.add_task("a").uuid)
        time.sleep(0.2)
        say("note", note.add_task("b").uuid)

    threading.Thread(target=later).start()


def daemon_thread() -> None:
    """A daemon thread waits for a result as the process ends."""
    waiting = threading.Event()

    def wait() -> None:
        task = never.add_task()
        say("note", task.uuid)
        waiting.set()
        task.wait_result()

    threading.Thread(target=wait, daemon=True).start()
    waiting.wait(120)


def never_stopped() -> None:
    """An app of one's own that nobody stops, with a wait under way."""
    router.included_by(app)
    app.connect().result()
    daemon_thread()


def failing() -> None:
    """The program's own error is the only one that is told."""
    router.included_by(app)
    with app:
        say("note", note.add_task("a").uuid)
        raise ValueError("its own")


def interrupted() -> None:
    """Waits for a result that does not come, until Ctrl-C; then goes on."""
    router.included_by(app)
    with app:
        task = never.add_task()
        say("note", task.uuid)
        say("waiting")
        try:
            task.wait_result()
        except KeyboardInterrupt:
            say("note", note.add_task("after it").uuid)
            raise


def interrupted_starting() -> None:
    """Starts with a server that does not answer, until Ctrl-C."""
    far = QueueTasks("far", os.environ["FAR_URL"])
    say("waiting")
    try:
        far.connect(60).result()
    except KeyboardInterrupt:
        say("interrupted")


def asynchronous() -> None:
    """The default app in a loop that ends with a wait under way."""
    import asyncio

    asynchronous_router = AsyncRouter()

    @asynchronous_router.task(name="exiting.never")
    async def never() -> None: ...

    async def main() -> None:
        task = await never.add_task()
        say("note", task.uuid)
        wait = asyncio.create_task(task.wait_result())
        await asyncio.sleep(0)
        say("waiting" if not wait.done() else "ended")

    asyncio.run(main())


if __name__ == "__main__":
    globals()[sys.argv[1]]()
