"""Sentinels and a cluster over TLS, with users of their own and passwords of any characters."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from qtasks.testing.native import free_port
from qtasks.testing.recipes import PASSWORD
from qtasks_core import DONE, Broker, Storage, Task, TaskMessage
from qtasks_core.errors import ConfigurationError
from qtasks_redis import RedisBackend
from tests.redis.ports import has_bus
from tests.redis.test_finding import SERVICE, NativeSentinel, OwnSentinel, again
from tests.redis.test_rights import RIGHTS
from tests.redis.test_roles import until
from tests.redis.test_tls import NativeSecuredRedis
from tests.services import RedisServer
from tests.services.secured_kafka import Certificates
from tests.services.service import Way

WORD = "p@ss:/?#[]%&= +\"'\\é漢~"
USER = "me@work"


def encoded(text: str) -> str:
    return quote(text, safe="")


LOGIN = f"{encoded(USER)}:{encoded(WORD)}"


class NativeNode(NativeSecuredRedis):
    """One node that is a cluster."""

    def prepare(self) -> str:
        while True:
            url = super().prepare()
            if has_bus(self.tls):  # the nodes speak TLS, so that port counts
                return url

    def command(self) -> list[str]:
        return [*super().command(), "--cluster-enabled", "yes", "--tls-cluster", "yes"]


class NativeSecuredSentinel(NativeSentinel):
    """A Sentinel that speaks TLS too, and only TLS with the servers."""

    def __init__(self, primary: int) -> None:
        super().__init__(primary)
        self.tls = free_port()

    def command(self) -> list[str]:
        made = Certificates(self.directory)
        self.authority = made.authority
        return [
            *super().command(),
            "--tls-port", str(self.tls), "--tls-replication", "yes", "--tls-auth-clients", "no",
            "--tls-cert-file", str(self.directory / "localhost.crt"),
            "--tls-key-file", str(self.directory / "localhost.key"),
            "--tls-ca-cert-file", str(made.authority),
        ]  # fmt: skip


class SecuredSentinel(OwnSentinel):
    def ways(self) -> tuple[Way, ...]:
        self.way = NativeSecuredSentinel(self._primary)
        return (self.way,)


class Secured(RedisServer):
    """A server of that kind; `way` knows its other port and its certificates."""

    def __init__(self, kind: type[NativeSecuredRedis]) -> None:
        super().__init__()
        self.way = kind()

    def ways(self) -> tuple[Way, ...]:
        return (self.way,)


class Place:
    """Where clients ask for the server, the server, and a file with all authorities."""

    def __init__(
        self,
        scheme: str,
        asked: NativeSecuredRedis | NativeSecuredSentinel,
        server: NativeSecuredRedis,
    ) -> None:
        self.scheme, self.asked, self.server = scheme, asked, server
        self.namespace = f"found-{uuid4().hex[:8]}"

    def url(self, scheme: str = "", port: int = 0, more: str = "") -> str:
        host = f"127.0.0.1:{port or self.asked.tls}"
        if self.scheme.endswith("cluster"):
            return f"{scheme or self.scheme}://{LOGIN}@127.0.0.1:1,{host}/?{more}"
        login = f"sentinel_username={encoded(USER)}&sentinel_password={encoded(WORD)}"
        return f"{scheme or self.scheme}://{LOGIN}@127.0.0.1:1,{host}/{SERVICE}?{login}&{more}"

    def trusted(self, folder: Path) -> str:
        """Return the option that names the authorities of all servers."""
        files = {self.server.certificates.authority, self.authority_of_asked}
        both = folder / "authorities.pem"
        both.write_text("".join(file.read_text() for file in sorted(files)))
        return f"ssl_ca_certs={both}"

    @property
    def authority_of_asked(self) -> Path:
        if isinstance(self.asked, NativeSecuredSentinel):
            return self.asked.authority
        return self.asked.certificates.authority


async def allow(port: int, password: str, *rights: str) -> None:
    """Give the user these rights on a server."""
    admin: Redis = Redis(port=port, password=password)
    await admin.execute_command(  # type: ignore[no-untyped-call]
        "ACL", "SETUSER", USER, "reset", "resetchannels", "on", f">{WORD}", *rights
    )
    await admin.aclose()


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, tuple[NativeSecuredRedis | NativeSecuredSentinel, ...]]]:
    with ExitStack() as stack:
        server, node = Secured(NativeSecuredRedis), Secured(NativeNode)
        for service in (server, node):
            stack.callback(service.stop)
            service.start()
        sentinel = SecuredSentinel(server.way.tls)
        stack.callback(sentinel.stop)
        sentinel.start()
        yield {
            "rediss+sentinel": (sentinel.way, server.way),
            "rediss+cluster": (node.way, node.way),
        }


@pytest.fixture(params=["rediss+sentinel", "rediss+cluster"])
async def place(
    request: pytest.FixtureRequest,
    servers: dict[str, tuple[NativeSecuredRedis | NativeSecuredSentinel, ...]],
) -> Place:
    """A server with a user who has the rights of docs/rights.md only."""
    asked, server = servers[request.param]
    assert isinstance(server, NativeSecuredRedis)
    place = Place(request.param, asked, server)
    rights = [
        right.replace("NAME", place.namespace)
        for right in (*RIGHTS["both"], *RIGHTS["broker"], *RIGHTS["storage"])
    ]
    if isinstance(asked, NativeSecuredSentinel):
        await allow(asked.port, "watcher", "+hello", "+sentinel|get-master-addr-by-name")
    else:
        rights.append("+cluster")
        admin: Redis = Redis(port=server.port, password=PASSWORD)
        if not await admin.execute_command("CLUSTER", "SLOTS"):  # type: ignore[no-untyped-call]
            await admin.execute_command("CLUSTER", "ADDSLOTS", *range(16384))  # type: ignore[no-untyped-call]

        async def ready() -> bool:
            return "cluster_state:ok" in str(
                await admin.execute_command("CLUSTER", "INFO")  # type: ignore[no-untyped-call]
            )

        await until(ready)
        await admin.aclose()
    await allow(server.port, PASSWORD, *rights)
    return place


async def started(part: Broker | Storage, place: Place) -> None:
    """Start it, as the engine does: on a busy machine a server may not answer in its second."""
    async with asyncio.timeout(120):
        await again(lambda: part.start(place.namespace))


async def test_a_pair_finds_its_server_over_tls(place: Place, tmp_path: Path) -> None:
    url = place.url(more=place.trusted(tmp_path))
    broker, storage = RedisBackend().broker(url), RedisBackend().storage(url)
    pair = broker.join(storage)
    assert pair is not None
    await started(broker, place)
    await started(storage, place)
    admin: Redis = Redis(port=place.server.port, password=PASSWORD)
    lines = await admin.client_list()
    ours = [line for line in lines if line["user"] == USER]
    assert ours
    assert {line["laddr"] for line in ours} == {f"127.0.0.1:{place.server.tls}"}
    await admin.aclose()
    assert await pair.submit([TaskMessage(uuid="u", task_name="a")]) == [DONE]
    inbox = await storage.inbox()  # it has a connection of its own
    record = Task(uuid="v", task_name="a", status="success", reply_to=inbox.address)
    inbox.expect(["v"])
    assert await storage.save([record]) == [DONE]
    assert await inbox.receive() == [record]
    assert await broker.purge("default") == 1
    await broker.stop()
    await storage.stop()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("", "not trusted.*ssl_ca_certs"),
        ("ssl_ca_certs=/none.pem", "No such file.*ssl_ca_certs"),
        ("plain scheme", "the server speaks TLS there; write {scheme}://"),
        ("plain port", "the server speaks no TLS there; write {plain}://"),
        ("wrong password", "refuses the user or password"),
    ],
)
async def test_what_is_wrong_is_told_at_the_start(
    place: Place, tmp_path: Path, change: str, told: str
) -> None:
    plain, trusted = place.scheme.replace("rediss", "redis"), place.trusted(tmp_path)
    urls = {
        "plain scheme": place.url(scheme=plain),
        "plain port": place.url(port=place.asked.port, more=trusted),
        "wrong password": place.url(more=trusted).replace("%C3%A9", "hidden"),
    }
    storage = RedisBackend().storage(urls.get(change) or place.url(more=change))
    told = told.format(scheme=place.scheme, plain=plain).replace("+", r"\+")
    with pytest.raises(ConfigurationError, match=told) as error:
        await started(storage, place)
    assert "hidden" not in str(error.value)
    assert WORD not in str(error.value)
    assert encoded(WORD) not in str(error.value)
