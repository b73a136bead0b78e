"""Options of a URL: a wrong value is refused where the broker or the storage is made."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qtasks_core import Broker, Storage
from qtasks_core.errors import ConfigurationError
from qtasks_redis import RedisBackend, RedisBroker, RedisStorage

BACKEND = RedisBackend()
MAKERS = (BACKEND.broker, BACKEND.storage, RedisBroker, RedisStorage)


@pytest.mark.parametrize("make", MAKERS, ids=["broker", "storage", "RedisBroker", "RedisStorage"])
@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("db=x", "db='x' must be an integer of at least 0"),
        ("db=-1", "db='-1' must be an integer of at least 0"),
        ("db=", "db='' must be an integer of at least 0"),
        ("db=" + "9" * 5000, "an integer of at least 0"),
        ("socket_timeout=abc", "socket_timeout='abc' must be a number of seconds of at least 0.5"),
        ("socket_timeout=-1", "a number of seconds of at least 0.5"),
        ("socket_timeout=0", "a number of seconds of at least 0.5"),
        ("socket_timeout=nan", "a number of seconds of at least 0.5"),
        ("socket_timeout=inf", "a number of seconds of at least 0.5"),
        ("socket_timeout=", "a number of seconds of at least 0.5"),
        ("socket_connect_timeout=0", "socket_connect_timeout='0' must be a number of seconds"),
        ("socket_connect_timeout=abc", "a number of seconds of at least 0.001"),
        ("socket_read_size=0", "socket_read_size='0' must be an integer of at least 1"),
        ("socket_keepalive=maybe", "socket_keepalive='maybe' must be true or false"),
        ("retry_on_timeout=off", "retry_on_timeout='off' must be true or false"),
        ("health_check_interval=-5", "health_check_interval='-5' must be an integer"),
        ("max_connections=0", "max_connections='0' must be an integer of at least 1"),
        ("max_connections=abc", "max_connections='abc' must be an integer of at least 1"),
        ("client_name=a%20b", "client_name='a b' must be a word of ASCII characters"),
        ("client_name=%C3%A9", "a word of ASCII characters"),
        ("client_name=", "a word of ASCII characters"),
        ("lib_name=a%20b", "lib_name='a b' must be a word"),
        ("protocol=x", "protocol='x' must be 2"),
        ("protocol=3", "protocol='3' must be 2"),
        ("username=", "username='' must be a text that is not empty"),
        ("password=", "password='' must be a text that is not empty"),
        ("db=1&db=2", "db is given twice"),
    ],
)
def test_a_wrong_value(make: Callable[[str], Broker | Storage], option: str, told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make(f"redis://me:hunter2@127.0.0.1?{option}")
    assert told in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("make", [BACKEND.broker, BACKEND.storage])
@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("ssl_cert_reqs=maybe", "ssl_cert_reqs='maybe' must be one of none, optional, required"),
        ("ssl_cert_reqs=", "one of none, optional, required"),
        ("ssl_check_hostname=maybe", "ssl_check_hostname='maybe' must be true or false"),
        ("ssl_min_version=1.2", "ssl_min_version='1.2' must be one of 769, 770, 771, 772"),
        ("ssl_ciphers=none-such", "ssl_ciphers='none-such' must be a list of ciphers"),
        ("ssl_ca_certs=", "ssl_ca_certs='' must be a text that is not empty"),
        ("ssl_password=", "ssl_password='' must be a text that is not empty"),
    ],
)
def test_a_wrong_value_of_tls(
    make: Callable[[str], Broker | Storage], option: str, told: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make(f"rediss://127.0.0.1?{option}")
    assert told in str(caught.value)


@pytest.mark.parametrize("make", [BACKEND.broker, BACKEND.storage])
@pytest.mark.parametrize("path", ["x", "1/2", "-1", "1.5", "9" * 5000])
def test_a_wrong_database(make: Callable[[str], Broker | Storage], path: str) -> None:
    with pytest.raises(ConfigurationError, match="the path names the database, a number"):
        make(f"redis://127.0.0.1/{path}")


def test_two_databases() -> None:
    with pytest.raises(ConfigurationError, match="the path and db=2 name two databases"):
        BACKEND.broker("redis://127.0.0.1/1?db=2")
    BACKEND.broker("redis://127.0.0.1/2?db=2")


@pytest.mark.parametrize(
    ("make", "option", "told"),
    [
        (BACKEND.broker, "lease=0", "lease='0' must be a number of seconds of at least 0.1"),
        (BACKEND.broker, "lease=abc", "lease='abc' must be a number of seconds"),
        (BACKEND.broker, "lease=", "lease='' must be a number of seconds"),
        (BACKEND.storage, "retention=-1", "retention='-1' must be a number of seconds"),
        (RedisBroker, "lease=0", r"pass lease as an argument: RedisBroker\(url, lease=SECONDS\)"),
        (RedisStorage, "retention=5", r"RedisStorage\(url, retention=SECONDS\)"),
    ],
)
def test_a_wrong_time(make: Callable[[str], Broker | Storage], option: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        make(f"redis://127.0.0.1?{option}")


def test_a_secret_is_never_told() -> None:
    with pytest.raises(ConfigurationError) as caught:
        BACKEND.broker("rediss://127.0.0.1?password=hunter2&ssl_password=hunter3&db=x")
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize("make", [BACKEND.broker, BACKEND.storage])
def test_right_values(make: Callable[[str], Broker | Storage]) -> None:
    make(
        "rediss://127.0.0.1/3?client_name=shop.web-1&health_check_interval=10&max_connections=20"
        "&protocol=2&retry_on_timeout=yes&socket_connect_timeout=0.5&socket_keepalive=True"
        "&socket_read_size=4096&socket_timeout=2.5&ssl_cert_reqs=required&ssl_check_hostname=no"
        "&ssl_min_version=771&ssl_ciphers=HIGH&ssl_password=x&lib_name=shop&lib_version=1.0"
    )


def test_a_broker_needs_two_connections_and_a_storage_one() -> None:
    with pytest.raises(ConfigurationError, match="max_connections=1 must be at least 2"):
        BACKEND.broker("redis://127.0.0.1?max_connections=1")
    BACKEND.broker("redis://127.0.0.1?max_connections=2")
    BACKEND.storage("redis://127.0.0.1?max_connections=1")
