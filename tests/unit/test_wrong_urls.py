"""Wrong URLs, for every backend: refused where they are given, and no password is shown."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable

import pytest

from qtasks_core.errors import ConfigurationError
from qtasks_core.lookup import resolve_broker, resolve_storage
from qtasks_kafka import KafkaBroker
from qtasks_memory import MemoryBroker, MemoryStorage
from qtasks_postgres import PostgresBroker
from qtasks_rabbitmq import RabbitMQBroker
from qtasks_redis import RedisBroker, RedisStorage
from qtasks_sqlite import SqliteBroker, SqliteStorage

SCHEMES = ("redis", "postgresql", "amqp", "kafka", "sqlite")


@pytest.mark.parametrize("resolve", [resolve_broker, resolve_storage])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "url",
    [
        "{}://me:hunter2@127.0.0.1:port/0",
        "{}://me:hunter2@127.0.0.1:99999/0",
        "{}://me:hunter2@127.0.0.1:0/0",
        "{}://me:hunter2@[::1/0",
        "{}://me:hunter2/x@127.0.0.1:1/0",
        "{}://me:hunter2?x@127.0.0.1:1/0",
        "{}://me:hunter2#x@127.0.0.1:1/0",
        "{}://me:[hunter2]x@127.0.0.1:1/0",
        "{}://me:[hunter2@127.0.0.1:1/0",
        "{}://me:hunter2℀@127.0.0.1:1/0",
        "{}:me:hunter2@127.0.0.1:1/0",
        "{}:/me:hunter2@127.0.0.1:1/0",
        "{}//me:hunter2@127.0.0.1:1/0",
        "{} hunter2@127.0.0.1",
        "{} host=127.0.0.1 password=hunter2",
    ],
)
def test_it_is_refused_where_it_is_given(resolve: object, scheme: str, url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolve(url.format(scheme))  # type: ignore[operator]
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("resolve", [resolve_broker, resolve_storage])
def test_a_number_as_the_begin_of_a_password(resolve: object) -> None:
    """It passes for a port, and what follows for the database."""
    with pytest.raises(ConfigurationError) as caught:
        resolve("redis://me:1/hunter2@127.0.0.1")  # type: ignore[operator]
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["postgresql://me:hunter2@127.0.0.1:1,127.0.0.2:2/db", "kafka://127.0.0.1:1,127.0.0.2:2"]
)
def test_several_hosts_where_a_server_has_them(url: str) -> None:
    resolve_broker(url)
    resolve_storage(url)


def test_one_host_where_it_has_not() -> None:
    with pytest.raises(ConfigurationError, match="one host"):
        resolve_broker("redis://127.0.0.1:1,127.0.0.2:2")


@pytest.mark.parametrize("lease", ["0", "-1", "nan", "inf", "none", "abc", "", "5&lease=6"])
@pytest.mark.parametrize("scheme", ["memory", *SCHEMES])
def test_a_wrong_lease(scheme: str, lease: str) -> None:
    """Refused by a storage too, though only brokers use it: one URL serves both."""
    url = "sqlite:///wrong.db" if scheme == "sqlite" else f"{scheme}://127.0.0.1"
    told = f"{url}: lease={lease!r} must be a number of seconds "
    for resolve in (resolve_broker, resolve_storage):
        with pytest.raises(ConfigurationError) as caught:
            resolve(f"{url}?lease={lease}")
        assert told in str(caught.value) or str(caught.value) == f"{url}: lease is given twice"


@pytest.mark.parametrize("retention", ["-1", "nan", "1e12", "abc", ""])
@pytest.mark.parametrize("url", ["memory://", "sqlite:///wrong.db", "redis://127.0.0.1"])
def test_a_wrong_retention(url: str, retention: str) -> None:
    told = f"{url}: retention={retention!r} must be a number of seconds of at least 0, or None"
    for resolve in (resolve_broker, resolve_storage):
        with pytest.raises(ConfigurationError) as caught:
            resolve(f"{url}?retention={retention}")
        assert told in str(caught.value)


@pytest.mark.parametrize("retention", ["none", "None", "inf"])
@pytest.mark.parametrize("url", ["memory://", "sqlite:///wrong.db", "redis://127.0.0.1"])
def test_a_retention_for_ever(url: str, retention: str) -> None:
    resolve_broker(f"{url}?retention={retention}")
    storage = resolve_storage(f"{url}?retention={retention}")
    assert storage.guarantees.retention == math.inf
    assert resolve_storage(f"{url}?retention=0").guarantees.retention == 0


@pytest.mark.parametrize(
    "build",
    [
        lambda: MemoryBroker(lease=0),
        lambda: SqliteBroker("sqlite:///x.db", lease=0),
        lambda: RedisBroker(lease=0),
        lambda: PostgresBroker("postgresql://h", lease=0),
        lambda: RabbitMQBroker(lease=0),
        lambda: KafkaBroker("kafka://h", lease=0),
        lambda: MemoryStorage(retention=-1),
        lambda: SqliteStorage("sqlite:///x.db", retention=-1),
        lambda: RedisStorage(retention=-1),
    ],
)
def test_constructors_say_the_same(build: Callable[[], object]) -> None:
    told = "^(lease=0|retention=-1) must be a number of seconds "
    with pytest.raises(ConfigurationError, match=told):
        build()


def test_constructors_take_none_for_ever() -> None:
    assert MemoryStorage(retention=None).guarantees.retention == math.inf
    assert SqliteStorage("sqlite:///x.db", retention=None).guarantees.retention == math.inf
    assert RedisStorage(retention=None).guarantees.retention == math.inf


@pytest.mark.parametrize("resolve", [resolve_broker, resolve_storage])
@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgresql://h?sslmode=maybe", "sslmode=.* must be one of disable, allow"),
        ("postgresql://h?sslmode=", "sslmode=.* must be one of disable, allow"),
        (
            "postgresql://h?target_session_attrs=best",
            "target_session_attrs=.* must be one of any",
        ),
        ("postgresql://h?port=99999", "port=.* must be a number from 1 to 65535"),
        ("postgresql://h?port=x", "port=.* must be a number from 1 to 65535"),
        ("postgresql://h?port=", "port=.* must be a number from 1 to 65535"),
        (
            "postgresql://h?connect_timeout=nan",
            "connect_timeout=.* must be a number of .* 0: no",
        ),
        (
            "postgresql://h?connect_timeout=inf",
            "connect_timeout=.* must be a number of .* 0: no",
        ),
        ("postgresql://h?connect_timeout=", "connect_timeout='' must be a number of seconds"),
        ("postgresql://h?listen_url=", "not a URL"),
        ("kafka://h?partitions=0", "partitions='0' must be an integer of at least 1"),
        ("kafka://h?partitions=", "partitions='' must be an integer of at least 1"),
        ("kafka://h?replicas=0", "replicas='0' must be an integer of at least 1"),
        ("kafka://h?replicas=-2", "replicas='-2' must be an integer of at least 1"),
        ("kafka://h?client_id=", "client_id='' must be a text that is not empty"),
        ("kafka://h?ssl_check_hostname=maybe", "ssl_check_hostname='maybe' must be true or false"),
        ("sqlite:///x.db?synchronous=", "synchronous='' must be one of normal, full"),
    ],
)
def test_a_wrong_option(resolve: object, url: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        resolve(url)  # type: ignore[operator]


@pytest.mark.parametrize("url", ["amqp://h?lease=inf", "amqp://h?lease=200000"])
def test_a_lease_longer_than_any_heartbeat(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"lease=.* must be .* from 3 to 196605"):
        resolve_broker(url)


@pytest.mark.parametrize("lease", ["inf", "0.0001", "3000000"])
def test_a_lease_that_no_session_has(lease: str) -> None:
    with pytest.raises(ConfigurationError, match=r"from 0\.001 to 2147483"):
        resolve_broker(f"kafka://h?lease={lease}")
