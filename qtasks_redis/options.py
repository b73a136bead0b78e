"""The options of a redis:// URL: which exist, and which values each of them may have."""

from __future__ import annotations

import math
import ssl
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple
from urllib.parse import parse_qsl

from qtasks_core.errors import ConfigurationError
from qtasks_core.urls import SECRET_WORDS, redact, refuse_options, split, take_options

_SCHEMES: Final = {"redis": "redis", "rediss": "rediss", "valkey": "redis"}
_OURS: Final = {
    "lease": "RedisBroker(url, lease=SECONDS)",
    "retention": "RedisStorage(url, retention=SECONDS)",
}
"""What the app reads from a URL before it makes the broker or the storage, and how to pass it."""
_YES_NO: Final = ("0", "1", "f", "false", "n", "no", "t", "true", "y", "yes")
_SHORTEST: Final = 0.5
"""Seconds to answer in: a blocking read ends up to 0.1 s late, and it has a fifth of this."""


class Kind(NamedTuple):
    """The values that an option may have."""

    allowed: str
    fits: Callable[[str], bool]


def _integer(least: int, most: float = math.inf, words: str = "") -> Kind:
    allowed = words or f"an integer of at least {least}"

    def fits(text: str) -> bool:
        return text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most

    return Kind(allowed, fits)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _usable_ciphers(text: str) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).set_ciphers(text)
    except ssl.SSLError:
        return False
    return True


_TEXT: Final = Kind("a text that is not empty", bool)
_WORD: Final = Kind(
    "a word of ASCII characters, without spaces",
    lambda text: bool(text) and all("!" <= character <= "~" for character in text),
)
_SWITCH: Final = Kind("true or false", lambda text: text.lower() in _YES_NO)

# Without those that change what the driver returns.
_KINDS: Final[Mapping[str, Kind]] = {
    "client_name": _WORD,
    "db": _integer(0),
    "health_check_interval": _integer(0),
    "lib_name": _WORD,
    "lib_version": _WORD,
    "max_connections": _integer(1),
    "password": _TEXT,
    # Replies are read in one version of the protocol, the leaner one.
    "protocol": Kind("2", lambda text: text == "2"),
    "retry_on_timeout": _SWITCH,
    "socket_connect_timeout": Kind(
        "a number of seconds above 0", lambda text: 0 < _seconds(text) < math.inf
    ),
    "socket_keepalive": _SWITCH,
    "socket_read_size": _integer(1),
    "socket_timeout": Kind(
        f"a number of seconds of at least {_SHORTEST}",
        lambda text: _SHORTEST <= _seconds(text) < math.inf,
    ),
    "username": _TEXT,
}
_KINDS_OF_TLS: Final[Mapping[str, Kind]] = {
    "ssl_ca_certs": _TEXT,
    "ssl_ca_data": _TEXT,
    "ssl_ca_path": _TEXT,
    "ssl_cert_reqs": Kind(
        "one of none, optional, required", lambda text: text in ("none", "optional", "required")
    ),
    "ssl_certfile": _TEXT,
    "ssl_check_hostname": _SWITCH,
    "ssl_ciphers": Kind("a list of ciphers that OpenSSL knows", _usable_ciphers),
    "ssl_keyfile": _TEXT,
    "ssl_min_version": _integer(769, 772, "one of 769, 770, 771, 772 (TLS 1.0 to 1.3)"),
    "ssl_password": _TEXT,
}


def checked(url: str, *, connections: int = 1) -> str:
    """Return `url` as the driver wants it, without the options that are read here.

    `connections` is the least number that works. Raises `ConfigurationError` for a wrong URL, and
    for a wrong value of an option.
    """
    parts = split(url)
    scheme, database = parts.scheme, parts.path.strip("/")
    where = redact(url.partition("?")[0])
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise ConfigurationError(f"{redact(url)}: the scheme must be one of {known}")
    if "," in parts.netloc.rpartition("@")[2]:
        raise ConfigurationError(f"{redact(url)}: a redis:// URL names one host")
    if database and not _KINDS["db"].fits(database):
        raise ConfigurationError(f"{redact(url)}: the path names the database, a number")
    kinds = {**_KINDS, **(_KINDS_OF_TLS if scheme == "rediss" else {})}
    refuse_options(take_options(url, dict.fromkeys((*kinds, *_OURS), str))[0], (*_OURS, *kinds))
    given: dict[str, str] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name in _OURS:
            raise ConfigurationError(f"{where}: pass {name} as an argument: {_OURS[name]}")
        if name in given:
            raise ConfigurationError(f"{where}: {name} is given twice")
        given[name] = value
        if not kinds[name].fits(value):
            told = "***" if value and any(word in name for word in SECRET_WORDS) else repr(value)
            raise ConfigurationError(f"{where}: {name}={told} must be {kinds[name].allowed}")
    if database and int(given.get("db", database)) != int(database):
        raise ConfigurationError(f"{where}: the path and db={given['db']} name two databases")
    if int(given.get("max_connections", connections)) < connections:
        raise ConfigurationError(
            f"{where}: max_connections={given['max_connections']} must be at least {connections}: "
            "a broker waits for messages on one connection and publishes on another"
        )
    return take_options(_SCHEMES[scheme] + url[len(scheme) :], {"protocol": str})[0]
