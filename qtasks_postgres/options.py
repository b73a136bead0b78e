"""The options of a postgresql:// URL: ours, and those of libpq that the driver supports."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from urllib.parse import parse_qsl

from qtasks_core.errors import ConfigurationError
from qtasks_core.options import ANY, Kind, one_of
from qtasks_core.urls import redact, split, take_options

SCHEMES = ("postgresql", "postgres")

OURS = ("lease", "retention", "listen_url", "schema", "connect_timeout", "application_name")
OF_THE_DRIVER = (
    "host", "port", "user", "password", "dbname", "passfile", "sslmode", "sslrootcert", "sslcert",
    "sslkey", "sslpassword", "sslcrl", "ssl_min_protocol_version", "ssl_max_protocol_version",
    "target_session_attrs", "krbsrvname",
)  # fmt: skip
"""All other options are settings of the server, which refuses unknown ones."""

FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl", "passfile", "servicefile")

# libpq has these options, but the driver does not. It would send them to the server as settings,
# and the server knows none of them.
UNKNOWN_TO_THE_DRIVER = frozenset(
    {
        "channel_binding", "client_encoding", "fallback_application_name", "gssdelegation",
        "gssencmode", "hostaddr", "keepalives", "keepalives_count", "keepalives_idle",
        "keepalives_interval", "load_balance_hosts", "replication", "require_auth", "requirepeer",
        "sslcertmode", "sslcompression", "sslcrldir", "sslsni", "tcp_user_timeout",
    }
)  # fmt: skip

READ_HERE = {
    "connect_timeout": Kind("a number of seconds; 0: no bound", math.isfinite, float),
    "application_name": ANY,
}
READ_BY_THE_DRIVER = {
    "sslmode": one_of("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "target_session_attrs": one_of(
        "any", "primary", "standby", "prefer-standby", "read-write", "read-only"
    ),
    "port": Kind(
        "a number from 1 to 65535", lambda text: all(_is_port(port) for port in text.split(","))
    ),
}
"""Options of the driver that have a known set of values."""

# Other libraries' names of options that the driver has.
OTHER_NAMES = {
    "ssl": "sslmode=require, verify-ca or verify-full",
    "sslkeyfile": "sslkey",
    "sslcertfile": "sslcert",
    "sslcafile": "sslrootcert",
    "ssl_ca_certs": "sslrootcert",
    "timeout": "connect_timeout",
}


@dataclass(frozen=True)
class Options:
    """A checked URL: the driver's URL, and the options that this package handles."""

    url: str
    shown: str
    connect_timeout: float | None = None
    """Seconds; None: only the general timeout of calls applies."""
    application_name: str = "qtasks"
    several_hosts: bool = False


def options_of(url: str) -> Options:
    """Check a URL. Raises `ConfigurationError`, which names the mistake."""
    shown = redact(url)
    scheme = url.partition(":")[0]
    if scheme.partition("+")[0] in SCHEMES and "+" in scheme:
        raise ConfigurationError(f"{shown}: write postgresql://, without the name of a driver")
    parts = split(url)
    if parts.scheme not in SCHEMES:
        raise ConfigurationError(f"{shown} is no URL of Postgres: it begins with postgresql://")
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name, value in given.items():
        if name in OTHER_NAMES:
            raise ConfigurationError(f"{shown}: {name} is no option here; use {OTHER_NAMES[name]}")
        if name in UNKNOWN_TO_THE_DRIVER:
            raise ConfigurationError(f"{shown}: the driver does not know {name}; leave it out")
        if name in FILES and value and not os.access(value, os.R_OK):
            raise ConfigurationError(f"{shown}: {name}={value} cannot be read")
    take_options(url, READ_BY_THE_DRIVER)
    rest, ours = take_options(url, READ_HERE)
    timeout = ours.get("connect_timeout")
    hosts = parts.netloc.rpartition("@")[2] or given.get("host", "")
    return Options(
        rest,
        shown,
        timeout if timeout is not None and timeout > 0 else None,  # as in libpq, 0 means no limit
        ours.get("application_name") or "qtasks",
        "," in hosts and "target_session_attrs" not in given,
    )


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 6 and 0 < int(text) < 65536
