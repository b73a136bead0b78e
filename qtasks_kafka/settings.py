"""The options of a kafka:// URL, as arguments of the driver."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from qtasks_core.errors import ConfigurationError
from qtasks_core.options import ANY, RETENTION_TIME, SWITCH, TEXT, integer, one_of, seconds
from qtasks_core.urls import redact, refuse_options, split, take_options

REQUEST = 5.0
"""Seconds after which a server that does not answer counts as unreachable."""
LEASE_TIME = seconds(0.001, 2**31 // 1000)
"""The protocol has 31 bits for a session's milliseconds."""
AT_LEAST_ONE = integer(1)
OURS = {
    "lease": LEASE_TIME, "partitions": AT_LEAST_ONE, "replicas": AT_LEAST_ONE,
    "retention": RETENTION_TIME, "directory": TEXT,
}  # fmt: skip
"""Options that `KafkaBackend` takes from a URL for the constructors."""
_TLS = {
    "ssl_cafile": ANY, "ssl_certfile": ANY, "ssl_keyfile": ANY, "ssl_password": ANY,
    "ssl_check_hostname": SWITCH,
}  # fmt: skip
_OPTIONS = {
    "security_protocol": one_of("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"),
    "sasl_mechanism": one_of("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"),
    **_TLS,
    "client_id": TEXT,
}


def settings_of(url: str) -> dict[str, Any]:
    """Return the driver's arguments for `url`. Raises `ConfigurationError`."""
    rest, options = take_options(url, _OPTIONS)
    refuse_options(rest, (*OURS, *_OPTIONS))
    try:
        return _settings_of(split(url).netloc, options)
    except _Wrong as error:
        raise ConfigurationError(f"{redact(url)}: {error}") from error.__cause__


def place_of(url: str) -> tuple[object, ...]:
    """Return what tells the cluster and the user of a URL from those of others."""
    settings = settings_of(url)
    servers = sorted(settings.pop("bootstrap_servers").split(","))
    kept = ("security_protocol", "sasl_mechanism", "sasl_plain_username")
    return (*servers, *(settings.get(name) for name in kept))


class _Wrong(Exception):
    """A mistake in a URL. The message does not show the URL."""


def _settings_of(netloc: str, options: Mapping[str, Any]) -> dict[str, Any]:
    credentials, _, hosts = netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    tls = any(option in options for option in _TLS)
    guessed = ("SASL_" if user else "") + ("SSL" if tls else "PLAINTEXT")
    protocol: str = options.get("security_protocol", guessed)
    settings: dict[str, Any] = {
        "bootstrap_servers": hosts or "localhost:9092",
        "security_protocol": protocol,
    }
    if "client_id" in options:
        settings["client_id"] = options["client_id"]
    if protocol.endswith("SSL"):
        settings["ssl_context"] = _tls_context(options)
    elif tls:
        raise _Wrong("ssl_ options need security_protocol=SSL or SASL_SSL")
    if protocol.startswith("SASL"):
        if not user:
            raise _Wrong(f"{protocol} needs kafka://USER:PASSWORD@HOST:PORT")
        settings["sasl_mechanism"] = options.get("sasl_mechanism", "PLAIN")
        settings["sasl_plain_username"] = unquote(user)
        settings["sasl_plain_password"] = unquote(password)
    elif user or "sasl_mechanism" in options:
        raise _Wrong(f"a login needs security_protocol=SASL_{protocol}")
    return settings


def _tls_context(options: Mapping[str, Any]) -> ssl.SSLContext:
    """Return a TLS context with the URL's files. Raises `_Wrong` if a file cannot be used."""
    authority, certificate, key = (
        options.get(option) for option in ("ssl_cafile", "ssl_certfile", "ssl_keyfile")
    )
    try:
        context = ssl.create_default_context(cafile=authority)
    except OSError as error:
        raise _Wrong(f"ssl_cafile={authority!r}: {error}") from error
    if key is not None and certificate is None:
        raise _Wrong("ssl_keyfile needs ssl_certfile, the certificate of that key")
    if certificate is not None:
        try:
            # Without a password, OpenSSL would ask for one at the terminal.
            context.load_cert_chain(certificate, key, options.get("ssl_password", ""))
        except OSError as error:
            raise _Wrong(
                f"ssl_certfile={certificate!r}, ssl_keyfile={key!r}: {error}; "
                "they must be a PEM certificate and its key, with ssl_password= if it has one"
            ) from error
    context.check_hostname = options.get("ssl_check_hostname", True)
    return context
