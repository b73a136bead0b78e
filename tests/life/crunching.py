"""Run by test_children.py as a script: a worker whose functions run in child processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from qtasks.asyncio import QueueTasks
from qtasks.executors import ProcessExecutor

app = QueueTasks("crunching", f"sqlite:///{os.environ['CRUNCHING']}/tasks.db?lease=2")


@app.task(executor=ProcessExecutor(2))
def crunch(file: str, seconds: float) -> int:
    print(f"crunching in {__name__}")
    Path(f"{file}.part").write_text(str(os.getpid()))
    Path(f"{file}.part").rename(file)
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        pass
    return os.getpid()


@app.task(executor=ProcessExecutor(2))
def crunch_elsewhere(file: str) -> None:
    """Have another process do the work, and write down both."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(f"{file}.part").write_text(f"{os.getpid()} {other.pid}")
    Path(f"{file}.part").rename(file)
    other.wait()


@app.task(executor=ProcessExecutor(2))
def leave_a_thread() -> int:
    threading.Thread(target=time.sleep, args=(60,)).start()
    return os.getpid()


if __name__ == "__main__":
    app.run_forever()
