"""What is tested: a broker, a storage, their server, and the guarantees that they must declare."""

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
    """How to build a broker or a storage, in this process or in another one.

        Part("my_package:MyBroker", {"url": "my://localhost", "lease": 2.0})

    `target` is `module:Class`. `arguments` are the keyword arguments of its constructor; they must
    be values that JSON can represent.
    """

    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> type[Any]:
        """Import and return the class."""
        module, _, name = self.target.partition(":")
        loaded: type[Any] = getattr(import_module(module), name)
        return loaded

    def build(self) -> Any:
        """Return a new instance, not yet started."""
        return self.load()(**self.arguments)

    def broker(self) -> Broker:
        """Return a new broker, not yet started."""
        part = self.build()
        assert isinstance(part, Broker), f"{self.target} is not a subclass of qtasks_core.Broker"
        return part

    def storage(self) -> Storage:
        """Return a new storage, not yet started."""
        part = self.build()
        assert isinstance(part, Storage), f"{self.target} is not a subclass of qtasks_core.Storage"
        return part

    def but(self, **arguments: Any) -> Part:
        """Return a copy with these arguments changed or added."""
        return replace(self, arguments={**self.arguments, **arguments})


class Server(Protocol):
    """The server of the broker and the storage, for the tests that crash or freeze it.

        class Docker:
            def kill(self): run(["docker", "kill", "my-server"], check=True)
            def restart(self): run(["docker", "start", "my-server"], check=True); wait_until_up()
            def freeze(self): run(["docker", "pause", "my-server"], check=True)
            def thaw(self): run(["docker", "unpause", "my-server"], check=False)

    All methods block. Without `freeze` and `thaw`, the tests that need them are skipped.
    """

    def kill(self) -> object:
        """Kill the server without a chance to clean up (SIGKILL); return when it is gone."""

    def restart(self) -> object:
        """Start it again at the same address with the same data; return when it answers."""

    def freeze(self) -> object:
        """Stop all its processes (SIGSTOP, `docker pause`): it keeps its port but never answers.

        The kit calls `freeze` and `thaw` on the event loop's thread, so they must be quick.
        """

    def thaw(self) -> object:
        """Let it continue (SIGCONT, `docker unpause`). Does nothing if it is not frozen."""


@dataclass(frozen=True)
class Least:
    """The least that a broker or a storage must declare in its guarantees.

        Least(survives="server crash", settle_confirmed=True, lacks=("migrate",))

    The kit tests what the guarantees declare. So without `Least`, a backend would pass more tests
    by declaring less. The fields have the names and meanings of `qtasks_core.Guarantees`. What is
    declared beyond them is tested too.
    """

    survives: Survives = "nothing"
    settle_confirmed: bool = False
    counts_deliveries: bool = False
    priorities: bool = False
    transactions: bool = False
    atomic_retries: bool = False
    leases_survive: bool = False
    order: Order = "none"
    lacks: tuple[str, ...] = ()
    """The methods that raise `NotSupported`. `guarantees.unsupported` must list exactly these.

    Their tests are skipped. When you build a method, remove it here and from the guarantees."""


@dataclass(frozen=True)
class Subject:
    """A broker and a storage to test, each alone and both together.

        Subject(
            broker=Part("my_package:MyBroker", {"url": "my://localhost", "lease": 2.0}),
            storage=Part("my_package:MyStorage", {"url": "my://localhost"}),
            lease=2.0,
            url="my://localhost",
        )

    The broker's constructor must accept `lease` (seconds). Tests that must not lose a lease on a
    slow machine build the broker with a long one. To test only a broker or only a storage, take the
    other from `qtasks_memory`.
    """

    broker: Part
    storage: Part
    lease: float
    """The lease of `broker` in seconds. Within this time (plus `slack`), another receiver must get
    what a dead one held. Keep it short: many tests wait for its end."""
    server: Server | None = None
    """The server, to kill and to freeze. For a pair on two servers: one object for both.

    None: the tests of crashes and freezes of the server are skipped."""
    ends_with_process: bool = False
    """Whether all data is lost when the process ends, as in memory.

    Then the tests use other instances in this process instead of other processes. To kill one
    means to abandon it without stopping it."""
    driver: str | None = None
    """The driver's module, which must not be imported before `start`. None: there is no driver."""
    inject: Callable[[str, str, bytes], Awaitable[None]] | None = None
    """Write bytes to a queue as another program would: `await inject(namespace, queue, data)`.

    None: the test of messages that cannot be decoded is skipped."""
    spoil: Callable[[str, str, bytes], Awaitable[None]] | None = None
    """Replace the bytes of a record: `await spoil(namespace, uuid, data)`.

    None: the test of records that cannot be read is skipped."""
    begin: Begin | None = None
    """Open a transaction as a caller would: `async with begin() as transaction`.

    It commits at the end of the block, and rolls back after an error. Required if the broker or the
    storage declares `transactions`."""
    url: str | None = None
    """A URL of your backend. None: the tests of `BackendContract` are skipped."""
    other_url: str | None = None
    """A URL that leads to another place: another database, file or path.

    Messages and records of one URL must not be seen at the other. None: there is no such place, and
    the tests that need it are skipped."""
    options: tuple[str, ...] = ("lease",)
    """Options of the URL. The error for an unknown option must list them."""
    clean_up: Callable[[str], Awaitable[None]] | None = None
    """Remove everything in a namespace: `await clean_up(namespace)`.

    Called at the end of each test for each namespace that it used, after everything is stopped."""
    slack: float = 4.0
    """Seconds by which a busy machine may exceed `lease`."""
    least_broker: Least = Least()
    """The least that the broker must declare."""
    least_storage: Least = Least()
    """The least that the storage must declare."""
