"""URLs: no password is ever shown, options are taken off and the rest is left as it was."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtasks_core import Broker, Storage
from qtasks_core.errors import ConfigurationError
from qtasks_core.lookup import resolve_broker, resolve_storage
from qtasks_core.urls import redact, refuse_options, take_options


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://:hunter2@localhost:6379/0", "redis://:***@localhost:6379/0"),
        ("amqp://me:hunter2@host/vhost", "amqp://me:***@host/vhost"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("kafka://me:hunter2@a:1,b:2?acks=all", "kafka://me:***@a:1,b:2?acks=all"),
        ("amqp://me:p@hunter2@host/", "amqp://me:***@host/"),
        ("amqp://me:a:hunter2@host/", "amqp://me:***@host/"),
        ("kafka://h:1?sasl_password=hunter2&x=1", "kafka://h:1?sasl_password=***&x=1"),
        ("x://h?clientSecret=hunter2", "x://h?clientSecret=***"),
        ("x://h?PASSWD=hunter2", "x://h?PASSWD=***"),
        ("sqlite:///tasks.db", "sqlite:///tasks.db"),
        ("sqlite:////var/lib/tasks.db?lease=5", "sqlite:////var/lib/tasks.db?lease=5"),
        ("memory://", "memory://"),
        ("memory://name", "memory://name"),
        ("redis://[::1]:6379", "redis://[::1]:6379"),
        ("redis://:hunter2@[::1:6379", "***"),
        ("redis://:hunter/2@host:1/0", "redis://***"),
        ("redis://:hunter#2@host:1/0", "redis://***"),
        ("amqp://me:hunter?2@host", "amqp://***"),
        ("amqp://me:hun@ter/2@host", "amqp://***"),
        ("sqlite:///home/me@work/t.db", "sqlite:///home/me@work/t.db"),
        ("localhost", "localhost"),
        ("localhost:6379", "localhost:6379"),
    ],
)
def test_redact(url: str, shown: str) -> None:
    assert redact(url) == shown


SECRET = "hunter2"
around = st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), max_size=8)


@given(user=around, before=around, after=around, safe=st.sampled_from(["", "/:@?#[]%"]))
def test_no_password_is_shown(user: str, before: str, after: str, safe: str) -> None:
    """Quoted as it should be or not at all, as people paste it."""
    password = quote(before + SECRET + after, safe=safe)
    assert SECRET not in redact(f"amqp://{quote(user, safe='')}:{password}@host:5672/v?lease=1")


@given(before=around, after=around)
def test_no_secret_option_is_shown(before: str, after: str) -> None:
    for name in ("password", "sasl_plain_password", "secret", "client_secret"):
        assert SECRET not in redact(f"kafka://h?{name}={quote(before + SECRET + after)}&lease=1")


@given(st.text(max_size=30))
def test_redact_never_raises(text: str) -> None:
    assert isinstance(redact(text), str)


@given(st.sampled_from(["redis", "postgresql"]), st.text("ab:@/?&=#[]%", max_size=20))
def test_redact_never_raises_on_what_is_nearly_a_url(scheme: str, rest: str) -> None:
    assert isinstance(redact(f"{scheme}://{rest}"), str)


def test_take_options() -> None:
    url = "redis://me:pw@h:1/0?lease=2.5&ssl=true&partitions=8&empty="
    rest, options = take_options(url, {"lease": float, "partitions": int, "absent": int})
    assert rest == "redis://me:pw@h:1/0?ssl=true&empty="
    assert options == {"lease": 2.5, "partitions": 8}


@pytest.mark.parametrize(
    "url",
    ["memory://", "sqlite:///t.db", "kafka://a:1,b:2", "redis://h/0?ssl=true", "x://h?a=%26b"],
)
def test_without_options_the_url_is_left_as_it_was(url: str) -> None:
    assert take_options(url, {"lease": float}) == (url, {})


def test_option_of_the_wrong_kind_is_named_without_the_password() -> None:
    with pytest.raises(ConfigurationError, match="@h/0: lease='soon' must be a float") as caught:
        take_options("redis://:hunter2@h/0?lease=soon", {"lease": float})
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigurationError):
        take_options("redis://h?lease=", {"lease": float})


def test_a_wrong_secret_and_half_a_password_are_not_shown() -> None:
    with pytest.raises(ConfigurationError) as secret:
        take_options(f"x://h?password={SECRET}", {"password": int})
    assert SECRET not in "".join(traceback.format_exception(secret.value))
    with pytest.raises(ConfigurationError) as half:
        refuse_options("x://me:1?hun=ter2@h:2&colour=blue", ())
    assert str(half.value) == "x://***: there is no option ***; there are: none"


def test_an_option_that_is_given_twice() -> None:
    with pytest.raises(ConfigurationError, match="x://h: lease is given twice"):
        take_options("x://h?lease=1&lease=1", {"lease": float})


def test_wrong_url_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError) as caught:
        take_options("redis://:hunter2@[::1/0?lease=3", {"lease": float})
    assert "hunter2" not in str(caught.value)


values = st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), max_size=10)


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), values), st.floats(0, 1e9))
def test_other_options_keep_their_values(others: dict[str, str], lease: float) -> None:
    query = "&".join(
        f"{name}={quote(value, safe='')}"
        for name, value in [*others.items(), ("lease", str(lease))]
    )
    rest, options = take_options(f"redis://h/0?{query}", {"lease": float})
    assert options == {"lease": lease}
    again, taken = take_options(rest, dict.fromkeys("abc", str))
    assert (again, taken) == ("redis://h/0", others)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("amqp://", "amqp:// is no URL of a RabbitMQ server: host and port was not specified"),
        ("kafka://h:1?security_protocol=bad", "kafka://h:1: security_protocol='bad' must be one"),
        (
            "kafka://me:hunter2@h:1?sasl_mechanism=bad",
            r"kafka://me:\*\*\*@h:1: sasl_mechanism='bad' must be one of PLAIN",
        ),
    ],
)
@pytest.mark.parametrize("resolve", [resolve_broker, resolve_storage])
async def test_what_only_the_driver_knows_to_be_wrong(
    resolve: Callable[[str], Broker | Storage], url: str, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        await resolve(url).start("app")
