"""What is tested: parts that any process can build, their server, and what they must promise."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, Literal, Protocol

from qtasks_core import Broker, Storage

Begin = Callable[[], AbstractAsyncContextManager[object]]
Survives = Literal["nothing", "client crash", "server crash", "machine crash"]
Order = Literal["none", "queue", "partition"]


@dataclass(frozen=True)
class Part:
    """How to build a broker or a storage, here or in a child process.

    `target` is `module:Class`, `arguments` are its keyword arguments, made of what JSON knows.
    """

    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> type[Any]:
        """Import and return the class."""
        module, _, name = self.target.partition(":")
        loaded: type[Any] = getattr(import_module(module), name)
        return loaded

    def build(self) -> Any:
        """Return a new part, not yet started."""
        return self.load()(**self.arguments)

    def broker(self) -> Broker:
        """Build, and insist on a Broker."""
        part = self.build()
        assert isinstance(part, Broker), f"{self.target} is no Broker"
        return part

    def storage(self) -> Storage:
        """Build, and insist on a Storage."""
        part = self.build()
        assert isinstance(part, Storage), f"{self.target} is no Storage"
        return part

    def but(self, **arguments: Any) -> Part:
        """Return this part with other arguments."""
        return replace(self, arguments={**self.arguments, **arguments})


class Server(Protocol):
    """The server behind the parts, for the tests that crash or freeze it. All calls block.

    Without `freeze` and `thaw` the tests that need them are skipped.
    """

    def kill(self) -> object:
        """Kill it as a crash does (SIGKILL), and return when it is gone."""

    def restart(self) -> object:
        """Start it again on the same address and data, and return when it answers."""

    def freeze(self) -> object:
        """Stop all its processes (SIGSTOP, `docker pause`): it keeps its port and says nothing.

        Takes a moment, and is called on the event loop's thread, as `thaw` is.
        """

    def thaw(self) -> object:
        """Let it go on (SIGCONT, `docker unpause`). Harmless when it is not frozen."""


@dataclass(frozen=True)
class Least:
    """The least a part has to declare. What it declares beyond that is tested as well."""

    survives: Survives = "nothing"
    settle_confirmed: bool = False
    counts_deliveries: bool = False
    priorities: bool = False
    transactions: bool = False
    atomic_retries: bool = False
    leases_survive: bool = False
    order: Order = "none"
    lacks: tuple[str, ...] = ()
    """The optional methods that are not built yet: those, no fewer and no more, are declared
    unsupported. What is built is taken off this list, and its tests are no longer skipped."""


@dataclass(frozen=True)
class Subject:
    """A broker and a storage to be tested, each for itself and as a pair.

    The broker's constructor must take `lease` (seconds): tests that must not lose a lease on a
    slow machine build it with a long one.
    """

    broker: Part
    storage: Part
    lease: float
    """Seconds within which a delivery of a dead receiver of `broker` must go to another."""
    server: Server | None = None
    """None where there is none to kill; for a pair on two servers, one that stands for both."""
    ends_with_process: bool = False
    """Whether all is gone with the process: then 'another process' is another instance here, and
    killing it means to drop it without a word."""
    driver: str | None = None
    """The module that must not be imported before `start`."""
    inject: Callable[[str, str, bytes], Awaitable[None]] | None = None
    """Put bytes into a queue as another program would: `await inject(namespace, queue, data)`.

    None: the test of messages that cannot be decoded is skipped."""
    spoil: Callable[[str, str, bytes], Awaitable[None]] | None = None
    """Put bytes in the place of a record's own: `await spoil(namespace, uuid, data)`.

    None: the test of records that cannot be read is skipped."""
    begin: Begin | None = None
    """Open a transaction as a caller would: `async with begin() as transaction`.

    Needed by a part that declares `transactions`; it commits at the end, or rolls back an error."""
    url: str | None = None
    """A URL for which a backend is registered. None: the tests of `BackendContract` are skipped."""
    other_url: str | None = None
    """One that leads elsewhere: another database, file or path. What is put there stays there.

    None where there is no such place, and the tests of two URLs are skipped."""
    options: tuple[str, ...] = ("lease",)
    """Options of the URL that must be listed when another one is refused."""
    clean_up: Callable[[str], Awaitable[None]] | None = None
    """Remove what a test left in a namespace: `await clean_up(namespace)`.

    Called at a test's end for each namespace that it used, once its parts are stopped."""
    slack: float = 4.0
    """Seconds by which a busy machine may be late."""
    least_broker: Least = Least()
    least_storage: Least = Least()
