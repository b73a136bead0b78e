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
