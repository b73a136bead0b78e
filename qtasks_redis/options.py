"""The options of a redis:// URL, and the values that each of them may have."""

from __future__ import annotations

import ssl
from collections.abc import Hashable, Mapping
from typing import Final
from urllib.parse import SplitResult, unquote

from qtasks_core.errors import ConfigurationError
from qtasks_core.options import SWITCH, TEXT, Kind, integer, one_of, seconds
from qtasks_core.urls import redact, refuse_options, split, take_options

SENTINEL: Final = "redis+sentinel", "rediss+sentinel"
CLUSTER: Final = "redis+cluster", "rediss+cluster"
TLS: Final = "rediss", "rediss+sentinel", "rediss+cluster"
SENTINEL_PORT: Final = 26379
_SCHEMES: Final = {
    "redis": "redis",
    "rediss": "rediss",
    "valkey": "redis",
    **{scheme: scheme for scheme in (*SENTINEL, *CLUSTER)},
}
_OURS: Final = {
    "lease": "RedisBroker(url, lease=SECONDS)",
    "retention": "RedisStorage(url, retention=SECONDS)",
}
"""Options that the app takes from a URL first, and how to pass them to the constructor."""
LEASE_TIME: Final = seconds(0.1)


def _usable_ciphers(text: str) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).set_ciphers(text)
    except ssl.SSLError:
        return False
    return True


_WORD: Final = Kind(
    "a word of ASCII characters, without spaces",
    lambda text: bool(text) and all("!" <= character <= "~" for character in text),
)

# Options that change what the driver returns are left out.
_KINDS: Final[Mapping[str, Kind]] = {
    "client_name": _WORD,
    "db": integer(0),
    "health_check_interval": integer(0),
    "lib_name": _WORD,
    "lib_version": _WORD,
    "max_connections": integer(1),
    "password": TEXT,
    # This package reads replies in one protocol version only, the smaller one.
    "protocol": Kind("2", lambda text: text == "2"),
    "retry_on_timeout": SWITCH,
    "socket_connect_timeout": seconds(),
    "socket_keepalive": SWITCH,
    "socket_read_size": integer(1),
    # A blocking read waits for four fifths of this and finishes up to 0.1 s late.
    "socket_timeout": seconds(0.5),
    "username": TEXT,
}
_KINDS_OF_SENTINEL: Final[Mapping[str, Kind]] = {
    "sentinel_password": TEXT,
    "sentinel_username": TEXT,
}
_KINDS_OF_TLS: Final[Mapping[str, Kind]] = {
    "ssl_ca_certs": TEXT,
    "ssl_ca_data": TEXT,
    "ssl_ca_path": TEXT,
    "ssl_cert_reqs": one_of("none", "optional", "required"),
    "ssl_certfile": TEXT,
    "ssl_check_hostname": SWITCH,
    "ssl_ciphers": Kind("a list of ciphers that OpenSSL knows", _usable_ciphers),
    "ssl_keyfile": TEXT,
    # TLS 1.0 to 1.3.
    "ssl_min_version": one_of("769", "770", "771", "772"),
    "ssl_password": TEXT,
}


def checked(url: str, *, connections: int = 1) -> str:
    """Return `url` for the driver, without the options that are read here.

    `connections` is the smallest `max_connections` that works. Raises `ConfigurationError` for a
    wrong URL and for a wrong value of an option.
    """
    parts = split(url)
    scheme, database = parts.scheme, parts.path.strip("/")
    shown = redact(url)
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise ConfigurationError(f"{shown}: the scheme must be one of {known}")
    if "," in parts.netloc.rpartition("@")[2] and scheme not in (*SENTINEL, *CLUSTER):
        raise ConfigurationError(
            f"{shown}: a {scheme}:// URL names one host; see {SENTINEL[0]}:// and {CLUSTER[0]}://"
        )
    if scheme in SENTINEL:
        service, database = service_in(parts)
        if not service:
            raise ConfigurationError(
                f"{shown}: the path names the service that the Sentinels watch: "
                f"{scheme}://HOST:{SENTINEL_PORT},HOST:{SENTINEL_PORT}/SERVICE"
            )
    if scheme in CLUSTER and database.strip("0"):
        raise ConfigurationError(f"{shown}: a cluster has database 0 only")
    try:
        number = _KINDS["db"](database or "0")
    except ValueError:
        raise ConfigurationError(f"{shown}: the path names the database, a number") from None
    kinds = dict(_KINDS)
    if scheme in TLS:
        kinds.update(_KINDS_OF_TLS)
    if scheme in SENTINEL:
        kinds.update(_KINDS_OF_SENTINEL)
    rest, given = take_options(url, {**dict.fromkeys(_OURS, str), **kinds})
    refuse_options(rest, (*_OURS, *kinds))
    for name in _OURS.keys() & given:
        raise ConfigurationError(f"{shown}: pass {name} as an argument: {_OURS[name]}")
    if database and given.get("db", number) != number:
        raise ConfigurationError(f"{shown}: the path and db={given['db']} name two databases")
    if given.get("max_connections", connections) < connections:
        raise ConfigurationError(
            f"{shown}: max_connections={given['max_connections']} must be at least {connections}: "
            "a broker waits for messages on one connection and publishes on another"
        )
    return take_options(_SCHEMES[scheme] + url[len(scheme) :], {"protocol": str})[0]


def place_of(url: str) -> Hashable:
    """Return what two checked URLs have in common if they lead to one database by one user."""
    parts = split(url)
    _, given = take_options(url, dict.fromkeys(("db", "username", "password"), str))
    service, database = service_in(parts) if parts.scheme in SENTINEL else ("", parts.path)
    number = int(database.strip("/") or given.pop("db", "0"))
    hosts = tuple(hosts_in(parts))
    login = parts.username, parts.password, *sorted(given.items())
    return parts.scheme, hosts, service, number, *login


def hosts_in(parts: SplitResult) -> list[tuple[str, int]]:
    """Return the hosts of a URL and their ports."""
    port = SENTINEL_PORT if parts.scheme in SENTINEL else 6379
    found: list[tuple[str, int]] = []
    for host in parts.netloc.rpartition("@")[2].split(","):
        one = split(f"redis://{host}")
        found.append((one.hostname or "localhost", one.port or port))
    return found


def service_in(parts: SplitResult) -> tuple[str, str]:
    """Return the service that a URL of Sentinels names, and the text of its database."""
    service, _, database = parts.path.strip("/").partition("/")
    return unquote(service), database
