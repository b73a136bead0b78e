"""What every server for the tests is: got in one of several ways, then used alike."""

from __future__ import annotations

import asyncio
import atexit
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, TypeVar

from qtasks_core.urls import redact

START_WITHIN = 60.0  # seconds; a shared machine may be busy
POLL_EVERY = 0.05  # seconds between two looks at a server that is starting

T = TypeVar("T")


class Unobtainable(Exception):
    """The server cannot be had in this way on this machine; the text says what would help."""


class NotReady(Exception):
    """The server is there but does not answer (in time)."""


class NotOurs(Exception):
    """Somebody else runs this server: it is neither killed nor frozen from here."""


class NotInContainers(Exception):
    """The test needs a server that runs on this machine itself, and this run has none."""


def in_containers() -> str:
    """Return the name of the run whose servers are to be in containers, "" in any other run."""
    return os.environ.get("QTASKS_TEST_CONTAINERS", "")


class Way(ABC):
    """One way to get a server: from the environment, natively, or in a container."""

    how: ClassVar[str]
    ours: ClassVar[bool] = True
    """Whether the server was launched from here, and nobody else has anything in it."""

    @abstractmethod
    def start(self) -> str:
        """Launch the server and return its URL, before it answers. Raises `Unobtainable`."""

    @property
    def version(self) -> str:
        """The server's version where this way knows it; most servers tell it themselves."""
        return ""

    def listening(self) -> bool:
        """Tell whether asking makes sense: drivers are loud about a port that refuses them."""
        return True

    @abstractmethod
    def ended(self) -> str | None:
        """Return why the server no longer runs, as far as known, or None while it does."""

    @abstractmethod
    def kill(self) -> None:
        """Kill every process of the server with SIGKILL; its data stays."""

    @abstractmethod
    def shut_down(self) -> None:
        """Let the server stop in its own way and return when it has ended."""

    @abstractmethod
    def restart(self) -> None:
        """Launch the ended server again on the same port and data."""

    @abstractmethod
    def freeze(self) -> None:
        """Stop every process of the server with SIGSTOP."""

    @abstractmethod
    def thaw(self) -> None:
        """Let the frozen processes go on."""

    @abstractmethod
    def detach(self) -> int | None:
        """Let the server outlive this process.

        Returns the pid of the process that ends it on SIGTERM, None when that is not our business.
        """

    @abstractmethod
    def stop(self) -> None:
        """End the server and remove what it wrote. Idempotent."""


class FromEnvironment(Way):
    """A server that somebody else runs, named by a URL in the environment."""

    how = "environment"
    ours = False

    def __init__(self, variable: str) -> None:
        self._variable = variable

    def start(self) -> str:
        url = os.environ.get(self._variable)
        if not url:
            raise Unobtainable(f"{self._variable} is not set")
        return url

    def ended(self) -> str | None:
        return None

    def kill(self) -> None:
        self._refuse("killed")

    def shut_down(self) -> None:
        self._refuse("shut down")

    def restart(self) -> None:
        self._refuse("restarted")

    def freeze(self) -> None:
        self._refuse("frozen")

    def thaw(self) -> None:
        self._refuse("thawed")

    def detach(self) -> None:
        return None

    def stop(self) -> None:
        """Leave it running: it was there before."""

    def _refuse(self, deed: str) -> None:
        raise NotOurs(
            f"the server of {self._variable} cannot be {deed} from here; unset {self._variable} "
            "to let the tests run one of their own"
        )


class Service(ABC):
    """One server for the tests.

    The methods block until done; call them from async code with `asyncio.to_thread`.
    """

    name: ClassVar[str]
    how: str = ""
    version: str = ""
    url: str = ""

    @property
    def variable(self) -> str:
        """The environment variable that names a server somebody else runs."""
        return f"QTASKS_TEST_{self.name.upper()}_URL"

    @abstractmethod
    def native(self) -> Way:
        """Return the way that runs the server's own program on this machine."""

    def container(self) -> Way:
        """Return the way that runs the server in a container. Raises `NotInContainers`."""
        raise NotInContainers(f"{self.name} is run natively only")

    @abstractmethod
    async def probe(self, url: str) -> str:
        """Ask the server, as a client, for its version ("" where no protocol tells it).

        Raises `NotReady` while it does not answer.
        """

    def ways(self) -> Sequence[Way]:
        """Return the ways to get this server, the preferred one first."""
        if in_containers():
            return (self.container(),)
        return (FromEnvironment(self.variable), self.native())

    def start(self) -> str:
        """Get the server in the first way that works and return its URL once it answers.

        Raises `Unobtainable` when there is no way, `NotReady` when the one that was taken fails.
        """
        reasons = []
        for way in self.ways():
            try:
                self.url = way.start()
            except Unobtainable as error:
                reasons.append(f"{way.how}: {error}")
                continue
            self._way, self.how, self._owner = way, way.how, os.getpid()
            atexit.register(self.stop)
            try:
                self.version = self._wait_until_ready() or way.version or "not told"
            except BaseException:
                self.stop()
                raise
            return self.url
        raise Unobtainable("; ".join(reasons))

    def kill(self) -> None:
        """Kill every process of the server with SIGKILL; its data stays. Raises `NotOurs`."""
        self._way.kill()

    def shut_down(self) -> None:
        """Stop the server as an operator does; its data stays.

        Raises `NotOurs`, and `NotReady` when it does not end.
        """
        self._way.shut_down()

    def restart(self) -> None:
        """Start it again, same URL and data, and return once it answers; kills it first if it runs.

        Raises `NotOurs`, and `NotReady` when it does not come up.
        """
        if self._way.ended() is None:
            self._way.kill()
        self._way.restart()
        self._wait_until_ready()

    def clear(self) -> None:
        """Remove what tests have left, where it slows the server; it must run. No-op if not ours.

        Raises `NotReady` when the server does not answer.
        """
        if self._way.ours:
            run_apart(self.empty(self.url))

    async def empty(self, url: str) -> None:  # noqa: B027  most servers do not mind
        """Remove, as a client, what slows the server down. Raises `NotReady`."""

    def freeze(self) -> None:
        """Stop every process of the server with SIGSTOP: it keeps its port and says nothing."""
        self._way.freeze()

    def thaw(self) -> None:
        """Let the frozen server go on."""
        self._way.thaw()

    def detach(self) -> int | None:
        """Let the server outlive this process; this object is done with it.

        Returns the pid of the process that ends it on SIGTERM, None when it is not ours to end.
        """
        atexit.unregister(self.stop)
        return self._way.detach()

    def stop(self) -> None:
        """End the server and remove its data, when it is ours. Idempotent."""
        if self.how and self._owner == os.getpid():  # a forked child inherits this object
            atexit.unregister(self.stop)
            self._way.stop()

    def _wait_until_ready(self) -> str:
        deadline = time.monotonic() + START_WITHIN
        while True:
            reason = "nothing listens"
            if self._way.listening():
                try:
                    return run_apart(self.probe(self.url))
                except NotReady as error:
                    reason = str(error)
            ended = self._way.ended()
            if ended or time.monotonic() > deadline:
                raise NotReady(f"{self.name} at {redact(self.url)}: {ended or reason}")
            time.sleep(POLL_EVERY)


def run_apart(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a thread: the caller may have an event loop of its own."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
