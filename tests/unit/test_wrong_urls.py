"""Wrong URLs, for every backend: refused where they are given, and no password is shown."""

from __future__ import annotations

import traceback

import pytest

from qtasks_core.errors import ConfigurationError
from qtasks_core.lookup import resolve_broker, resolve_storage

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


@pytest.mark.parametrize("lease", ["0", "-1", "nan", "abc", ""])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_wrong_lease(scheme: str, lease: str) -> None:
    url = "sqlite:///wrong.db" if scheme == "sqlite" else f"{scheme}://127.0.0.1"
    with pytest.raises(ConfigurationError, match="lease"):
        resolve_broker(f"{url}?lease={lease}")


@pytest.mark.parametrize("resolve", [resolve_broker, resolve_storage])
@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgresql://h?sslmode=maybe", "sslmode is one of disable, allow"),
        ("postgresql://h?sslmode=", "sslmode is one of disable, allow"),
        ("postgresql://h?target_session_attrs=best", "target_session_attrs is one of any"),
        ("postgresql://h?port=99999", "port is a number from 1 to 65535"),
        ("postgresql://h?port=x", "port is a number from 1 to 65535"),
        ("postgresql://h?port=", "port is a number from 1 to 65535"),
        ("postgresql://h?connect_timeout=nan", "connect_timeout is a number of seconds"),
        ("postgresql://h?connect_timeout=inf", "connect_timeout is a number of seconds"),
        ("postgresql://h?connect_timeout=", "connect_timeout=''.*not a float"),
        ("postgresql://h?listen_url=", "not a URL"),
        ("kafka://h?partitions=0", "partitions=0 must be at least 1"),
        ("kafka://h?partitions=", "partitions=''.*not a int"),
        ("kafka://h?replicas=0", "replicas=0 must be at least 1"),
        ("kafka://h?replicas=-2", "replicas=-2 must be at least 1"),
        ("kafka://h?client_id=", "client_id is empty"),
        ("kafka://h?ssl_check_hostname=maybe", "ssl_check_hostname=maybe is none of true"),
        ("sqlite:///x.db?synchronous=", "neither normal nor full"),
    ],
)
def test_a_wrong_option(resolve: object, url: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        resolve(url)  # type: ignore[operator]


@pytest.mark.parametrize("url", ["amqp://h?lease=inf", "amqp://h?lease=200000"])
def test_a_lease_longer_than_any_heartbeat(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"lease=.* is too long.*at most 196605"):
        resolve_broker(url)


@pytest.mark.parametrize("lease", ["inf", "0.0001", "3000000"])
def test_a_lease_that_no_session_has(lease: str) -> None:
    with pytest.raises(ConfigurationError, match=r"from 0\.001 to 2147483"):
        resolve_broker(f"kafka://h?lease={lease}")
